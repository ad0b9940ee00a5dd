"""How a model lies on a mesh: for every logical axis of its arrays, which mesh axes split it.

Attention, dense and shared layers by *heads* (over ep x tp where they divide, else over tp) with the batch's slots over
dp; or by *slots* (over dp x ep), heads then over tp only. Routed experts lie over ep, each cut over tp; embedding and
head over ep x tp by vocabulary, where it divides. What is left (norms, latents, routers, indexers, compressors,
streams) every device has.

V4's output projection has groups of heads. Split more ways than there are groups, neighbours share a group: either each
keeps its heads' part of the group's matrix, and partial products are summed (`o_groups="split"`); or each keeps all of
it, and heads are gathered first (`"gather"`: products as on one device, at the price of copies). Grouped queries have
key-value heads, which neighbours then share likewise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import PartitionSpec

from dsjax.config import Config, DenseConfig, V4Config
from dsjax.errors import InputError
from dsjax.models.ends import vocabulary_axes
from dsjax.numerics import Numerics
from dsjax.params import (
    EXPERT,
    LINEAR,
    Row,
    Stored,
    Tree,
    abstract_params,
    leaves,
    matrix_shape,
    official_storage,
    table,
)
from quant import WHOLE, QArray
from quant.transforms import GROUP
from sharding import DISPATCHES, Axes, Plan, Rules, inner_axes, mesh_axes

ATTENTION = ("heads", "slots")
O_GROUPS = ("split", "gather")
DISPATCH = ("auto", *DISPATCHES)


@dataclasses.dataclass(frozen=True)
class Layout:
    """What `layout` returns.

    Attributes:
      plan: as asked for.
      attention: "heads" or "slots".
      inner: neighbours along ep x tp that have mesh axes of their own (`sharding.mesh_axes`).
      rules: mesh axes by logical axis.
    """

    plan: Plan
    attention: str
    inner: int
    rules: Rules

    def held(self, row: Row, stored: Stored, config: Config) -> Stored:
        """How a row is held, its scale blocks made finer where a shard's edge would cut one; exact."""
        if stored.scales is None:
            return stored
        ways = [self.rules.ways(axis) for axis in row.axes]
        sizes = zip(matrix_shape(row, config), stored.block, ways, strict=True)
        bn, bk = (b if b == WHOLE or parts == 1 else math.gcd(b, n // parts) for n, b, parts in sizes)
        block = (bn, bk)
        shape = matrix_shape(row, config)
        if stored.packed and shape[-1] // ways[-1] % 2:
            raise InputError(
                f"mesh plan {self.plan}: {shape[-1]} channels of {'.'.join(row.path)} make parts of "
                f"{shape[-1] // ways[-1]}, which two to a byte do not fit"
            )
        return stored if block == stored.block else dataclasses.replace(stored, finer=block)

    def param_specs(self, params: Tree, config: Config) -> Tree:
        """A tree like `params`, arrays or shapes, with PartitionSpecs for arrays."""
        specs: Tree = {}
        for row, leaf in leaves(params, config):
            node = specs
            for key in row.path[:-1]:
                node = node.setdefault(key, {})
            node[row.path[-1]] = self._leaf_spec(row, leaf)
        return specs

    def _leaf_spec(self, row: Row, leaf: Any) -> Any:
        spec = self.rules.spec(row.logical_axes)
        if not isinstance(leaf, QArray):
            return spec
        scales = PartitionSpec(*spec[:-1], None) if leaf.block[1] == WHOLE else spec  # one per row: with all its parts
        return dataclasses.replace(leaf, codes=spec, scales=None if leaf.scales is None else scales)

    def cache_specs(self, cache: Any) -> Any:
        """A tree like a cache, arrays or shapes, with PartitionSpecs: by slots, grouped queries' rows by heads."""
        last = "kv_heads" if "kv_heads" in self.rules.table else "positions"

        def spec(a: Any) -> PartitionSpec:
            return self.rules.spec(("slots",)) if a.ndim == 1 else self.rules.spec(("layers", "slots", "places", last))

        return jax.tree.map(spec, cache)

    def logits_spec(self, positions: bool) -> PartitionSpec:
        """Of what `models.ends.logits` returns: [B, V], or [B, T, V] with all positions."""
        differ, _ = vocabulary_axes(self.rules)
        slots = tuple(a for a in self.rules.axes("slots") if a not in differ)
        return PartitionSpec(slots or None, *([None] if positions else []), self.rules.axes("vocab") or None)

    def hidden_spec(self) -> PartitionSpec:
        """Of what a step returns for the draft module."""
        return self.rules.spec(("slots",))

    def local(self, tree: Any, specs: Any) -> Any:
        """Shapes of one device's part of a tree of arrays or shapes."""

        def shard(spec: PartitionSpec, a: Any) -> jax.ShapeDtypeStruct:
            axes = [(entry,) if isinstance(entry, str) else entry or () for entry in spec]
            parts = [math.prod(self.rules.extents[axis] for axis in entry) for entry in axes]
            parts += [1] * (len(a.shape) - len(parts))
            return jax.ShapeDtypeStruct(tuple(n // p for n, p in zip(a.shape, parts, strict=True)), a.dtype)

        return jax.tree.map(shard, specs, tree, is_leaf=lambda x: isinstance(x, PartitionSpec))

    def abstract_params(self, config: Config, *, mtp: bool = False, weights: str = "stored") -> Tree:
        """The model's parameters as shapes, scale blocks as this layout needs them; whole, not one device's part."""
        return abstract_params(config, mtp=mtp, weights=weights, cut=lambda row, held: self.held(row, held, config))

    def local_params(self, config: Config, *, mtp: bool = False, weights: str = "stored") -> Tree:
        """Shapes of one device's parameters."""
        params = self.abstract_params(config, mtp=mtp, weights=weights)
        return self.local(params, self.param_specs(params, config))


def _divides(row: Row, config: Config, rules: Rules, grouped: str | None) -> str | None:
    """Why a row cannot be split as the rules say; None where it can.

    `grouped`: what quantises activations in groups of channels, if anything does.
    """
    shape = (*row.stacking, *matrix_shape(row, config))
    for n, axis in zip(shape, row.logical_axes, strict=True):
        if n % rules.ways(axis):
            return f"{n} {axis} do not split {rules.ways(axis)} ways"
    if row.storage not in (LINEAR, EXPERT) or rules.ways(row.axes[-1]) == 1:
        return None
    width, official = shape[-1] // rules.ways(row.axes[-1]), official_storage(row, config)
    if official.format == "e2m1" and width % 2:
        return f"{shape[-1]} channels of {'.'.join(row.path)} make parts of {width}, which two to a byte do not fit"
    if grouped and official.scales is not None and row.path[-1] != "o_a" and width % GROUP:
        return (
            f"{shape[-1]} channels of {'.'.join(row.path)} make parts of {width}, which cut the groups of {GROUP} that "
            f"{grouped} quantises activations in"
        )
    return None


def _grouped(numerics: Numerics | None) -> str | None:
    """What quantises activations in groups of channels, which a plan must not cut."""
    if numerics is not None and numerics.native:
        return "native"
    return "block-wise INT8" if numerics is not None and numerics.activations == "int8-group" else None


def _build(config: Config, plan: Plan, attention: str, grouped: str | None, o_groups: str) -> Layout:
    """`layout`, its reasons raised as ValueError."""
    rows = table(config)
    experts = getattr(config, "n_routed_experts", 0)
    if plan.ep > 1 and not experts:
        raise ValueError(f"{config.model_type} has no experts to split {plan.ep} ways; tp splits its layers")
    heads = config.num_attention_heads
    shared = _groups(config)  # of heads: V4's output groups, grouped queries' key-value heads
    candidates = (plan.ep * plan.tp, plan.tp) if attention == "heads" else (plan.tp,)
    ways = next((n for n in candidates if _splits(heads, shared, n)), None)
    if ways is None:
        name = "o_groups" if isinstance(config, V4Config) else "key-value heads"
        of = f" in {shared} {name}" if shared != heads else ""
        raise ValueError(f"{heads} heads{of} do not split {plan.tp} ways")
    inner = max(1, ways // shared) if shared != heads else 1
    extents = mesh_axes(plan, inner)
    tp: Axes = tuple(a for a in extents if a.startswith("tp"))
    ep: Axes = tuple(a for a in extents if a.startswith("ep"))
    within = inner_axes(plan, inner)
    if ways == plan.tp and not set(within) <= set(tp):
        raise ValueError(f"{heads} heads do not split {plan.tp} ways")
    of_heads = ep + tp if ways == plan.ep * plan.tp else tp
    of_groups = tuple(axis for axis in of_heads if axis not in within)
    found: dict[str, Axes] = {
        "slots": ("dp",) if attention == "heads" else ("dp", *ep),
        "heads": of_heads,
        "experts": ep,
        "expert_ffn": tp,
        # What routed experts give is summed over these; over ep beside, where tokens were sent to them and come back.
        "routed": (*ep, *tp) if attention == "heads" else tp,
    }
    if isinstance(config, V4Config):
        found |= {"o_groups": of_groups, "group_heads": within, "o_low": of_heads}
        if o_groups == "gather":
            found |= {"group_heads": (), "o_low": of_groups}
    if isinstance(config, DenseConfig):
        found["kv_heads"] = of_groups

    def fits(rules: Rules, *names: str) -> bool:
        return not any(_divides(row, config, rules, grouped) for row in rows if set(names) & set(row.axes))

    for name, choices in (
        ("ffn", (ep + tp, tp) if attention == "heads" else (tp,)),
        ("shared_ffn", (ep + tp, tp) if attention == "heads" else (tp,)),
        ("vocab", (ep + tp, tp)),
    ):
        for axes in choices:
            if fits(Rules({name: axes}, extents), name):
                found[name] = axes
                break
    rules = Rules(found, extents)
    for row in rows:
        if reason := _divides(row, config, rules, grouped):
            raise ValueError(reason)
    return Layout(plan, attention, inner, rules)


def _groups(config: Config) -> int:
    """Into how many groups heads come that share something: V4's output groups, key-value heads; else every head."""
    if isinstance(config, V4Config):
        return config.o_groups
    return config.num_key_value_heads if isinstance(config, DenseConfig) else config.num_attention_heads


def _splits(heads: int, groups: int, ways: int) -> bool:
    """Whether heads split that many ways into whole groups, or each group into equal parts."""
    return heads % ways == 0 and (groups % ways == 0 or ways % groups == 0)


def working_plans(
    config: Config, devices: int, attention: str = "heads", numerics: Numerics | None = None, o_groups: str = "split"
) -> Iterator[Plan]:
    """Every plan for this many devices that `layout` takes."""
    grouped = _grouped(numerics)
    for dp in range(1, devices + 1):
        for ep in range(1, devices // dp + 1):
            if devices % (dp * ep) == 0:
                plan = Plan(dp, ep, devices // (dp * ep))
                try:
                    _build(config, plan, attention, grouped, o_groups)
                except ValueError:
                    continue
                yield plan


def _distance(a: Plan, b: Plan) -> float:
    return sum(abs(math.log2(getattr(a, axis) / getattr(b, axis))) for axis in ("dp", "ep", "tp"))


def layout(
    config: Config,
    plan: Plan,
    attention: str = "heads",
    numerics: Numerics | None = None,
    o_groups: str = "split",
    dispatch: str = "auto",
) -> Layout:
    """How the model lies on a mesh of this plan.

    Args:
      config: the architecture.
      plan: extents of dp, ep and tp.
      attention: "heads" or "slots".
      numerics: no plan may cut a group of channels that share an activation's scale, in native or with INT8 blocks.
      o_groups: "split" or "gather", for V4 split more ways than it has output groups.
      dispatch: how tokens get to their experts where devices have different ones (`sharding.dispatch`).

    Raises:
      InputError: if the plan cannot work, with the reason and the nearest one for as many devices that does.
    """
    if dispatch != "auto" and attention == "heads":
        raise InputError(f"--dispatch {dispatch}: expected --attention slots; with heads every device has all tokens")
    try:
        found = _build(config, plan, attention, _grouped(numerics), o_groups)
        return dataclasses.replace(found, rules=dataclasses.replace(found.rules, dispatch=dispatch))
    except ValueError as e:
        works = list(working_plans(config, plan.devices, attention, numerics, o_groups))
        nearest = min(works, key=lambda p: _distance(p, plan), default=None)
        hint = f"the nearest that works is {nearest}" if nearest else f"none works for {plan.devices} devices"
        raise InputError(f"mesh plan {plan}: {e}; {hint}") from None
