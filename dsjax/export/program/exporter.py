"""One program to export: the step of a phase for static shapes, lowered to StableHLO for no backend in particular."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from dsjax.config import Config
from dsjax.errors import InputError
from dsjax.export.program.signature import Value, caches, expand_fp4, parameters
from dsjax.export.program.targets import Target
from dsjax.layout import Layout
from dsjax.models import family
from dsjax.models.rank import rank_draft, rank_step
from dsjax.numerics import Numerics
from dsjax.parallel import EVERYWHERE
from dsjax.params import Path, Row, Stored, Tree, abstract_params, is_mtp, table
from quant import QArray
from quant.operator import choosing, outlining
from sharding import UNSPLIT

PHASES = ("prefill", "decode", "mtp-prefill", "mtp")


def is_draft(phase: str) -> bool:
    """Whether a phase is the draft module's."""
    return phase.startswith("mtp")


OF_DRAFTS = ("embed", "head", "mtp")
"""Parameters that the draft module takes."""

PLATFORM = "generic"
"""What programs are lowered for: JAX takes the rules that hold on any platform."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a program is for.

    Attributes:
      phase: "prefill" or "decode": the model's step; "mtp-prefill" or "mtp": the draft module's.
      batch: slots.
      tokens: new ones of every slot, at most.
      length: positions of every slot.
    """

    phase: str
    batch: int
    tokens: int
    length: int

    @property
    def name(self) -> str:
        return f"{self.phase}-b{self.batch}-s{self.length}"


@dataclasses.dataclass(frozen=True, eq=False)
class Exporter:
    """A model as it is exported.

    Attributes:
      config, numerics: of the checkpoint; products tiled.
      target: what compilers are to see.
      layout: how ranks split it; of one device otherwise.
      spmd: "manual": the program of one rank, with its collectives; "auto": of all, with shardings.
      choices: variants of operators.
      stored: how each row is stored in the checkpoint; the official way if None.
      split: whether ranks share it at all.
    """

    config: Config
    numerics: Numerics
    target: Target
    layout: Layout
    spmd: str = "manual"
    choices: Mapping[str, str] = dataclasses.field(default_factory=dict)
    stored: Mapping[Path, Stored] | None = None
    split: bool = True

    @property
    def ranks(self) -> int:
        return self.layout.plan.devices if self.split else 1

    @property
    def whole(self) -> Exporter:
        """The same model on one device, its scale blocks as the ranks have them."""
        return dataclasses.replace(self, split=False)

    @property
    def manual(self) -> bool:
        return self.spmd == "manual" and self.ranks > 1

    @property
    def mesh(self) -> AbstractMesh:
        extents = self.layout.rules.extents
        return AbstractMesh(tuple(extents.values()), tuple(extents), axis_types=(AxisType.Auto,) * len(extents))

    @cached_property
    def has_mtp(self) -> bool:
        """Whether there is a draft module to export."""
        rows = [row for row in table(self.config) if is_mtp(row)]
        return bool(rows) and (self.stored is None or any(row.path in self.stored for row in rows))

    def params(self, mtp: bool = False) -> Tree:
        """Shapes of the parameters, whole, as the step takes them; or what the draft module takes of them."""
        weights = self.target.weights
        found = self.held(abstract_params(self.config, mtp=mtp, stored=self.stored, weights=weights, cut=self.cut))
        return {name: found[name] for name in OF_DRAFTS} if mtp else found

    def cut(self, row: Row, held: Stored) -> Stored:
        """Scale blocks as ranks need them: what `checkpoint.load` asks."""
        return self.layout.held(row, held, self.config)

    def held(self, params: Tree) -> Tree:
        """Loaded parameters, or shapes of them, as the step takes them."""
        if not self.target.expand_fp4:
            return params
        is_leaf = lambda x: isinstance(x, QArray)  # noqa: E731
        expanded: Tree = jax.tree.map(expand_fp4, params, is_leaf=is_leaf)
        return expanded

    def cache(self, shape: Shape) -> Any:
        """Shapes of the cache, of all ranks together."""
        make = partial(family(self.config).new_cache, self.config, self.numerics, shape.batch, shape.length)
        return jax.eval_shape(partial(make, draft=is_draft(shape.phase)))

    def chosen(self) -> contextlib.AbstractContextManager[None]:
        """Under which its programs are traced."""
        return choosing({**self.target.choices, **self.choices}, PLATFORM)

    def program(self, shape: Shape) -> Program:
        """The program of a phase.

        Raises:
          InputError: for a draft module that is not there, or a batch that the ranks do not split.
        """
        if is_draft(shape.phase) and not self.has_mtp:
            raise InputError(f"--phases {shape.phase}: expected a model with a draft module, found none")
        ways = self.layout.rules.ways("slots")
        if shape.batch % ways:
            raise InputError(f"--batch {shape.batch}: expected a multiple of {ways}, which the mesh splits slots by")
        return Program(self, shape)


def step_of(exporter: Exporter, phase: str) -> Callable[..., tuple[Any, Any, Any]]:
    """(params, cache, *inputs) -> (logits, hidden, cache): the model's, for one device or for a rank."""
    rules = exporter.layout.rules if exporter.manual else UNSPLIT
    return partial(rank_draft if is_draft(phase) else rank_step, exporter.config, exporter.numerics, rules, "last")


class Program:
    """The step of one phase for static shapes: its arguments, its results, and what it computes.

    Attributes:
      arguments: parameters, then caches, then inputs.
      results: outputs, then caches, each of which replaces the argument of its name.
    """

    def __init__(self, exporter: Exporter, shape: Shape) -> None:
        self.exporter, self.shape = exporter, shape
        config, layout, mtp = exporter.config, exporter.layout, is_draft(shape.phase)
        self.params, self.cache = exporter.params(mtp), exporter.cache(shape)
        param_specs, cache_specs = layout.param_specs(self.params, config), layout.cache_specs(self.cache)
        found = list(parameters(self.params, param_specs, config, exporter.target, exporter.stored))
        self.rows, weights = [(row, part) for row, part, _ in found], [value for _, _, value in found]
        held = caches(self.cache, cache_specs)

        def whole(kind: str, name: str, a: Any, split: PartitionSpec = EVERYWHERE) -> Value:
            spec = jax.ShapeDtypeStruct(a.shape, a.dtype)
            return Value(kind, name, spec, spec, split)

        inputs = [
            whole("input", "tokens", jax.ShapeDtypeStruct((shape.batch, shape.tokens), jnp.int32)),
            whole("input", "n_new", jax.ShapeDtypeStruct((shape.batch,), jnp.int32)),
        ]
        slots = layout.hidden_spec()
        if mtp:
            inputs.insert(0, whole("input", "hidden", self._hidden(), slots))
        self.arguments = [*weights, *held, *inputs]
        logits = jax.ShapeDtypeStruct((shape.batch, config.vocab_size), jnp.float32)
        self.results = [
            whole("output", "logits", logits, layout.logits_spec(positions=False)),
            whole("output", "hidden", self._hidden(), slots),
            *held,
        ]

    def _hidden(self) -> jax.ShapeDtypeStruct:
        config, numerics = self.exporter.config, self.exporter.numerics
        streams = (config.hc_mult,) if hasattr(config, "hc_mult") else ()
        shape = (self.shape.batch, self.shape.tokens, *streams, config.hidden_size)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(numerics.dtype))

    @property
    def aliases(self) -> dict[int, int]:
        """Result -> the argument whose memory it takes."""
        places = {value.name: i for i, value in enumerate(self.arguments) if value.kind == "cache"}
        return {i: places[value.name] for i, value in enumerate(self.results) if value.kind == "cache"}

    def function(self, *arrays: jax.Array) -> list[jax.Array]:
        """Arguments -> results, in order; of one rank in a manual program."""
        entered = [value.enter(a) for value, a in zip(self.arguments, arrays, strict=True)]
        leaves = jax.tree.leaves(self.params), jax.tree.leaves(self.cache)
        first, second = len(leaves[0]), len(leaves[0]) + len(leaves[1])
        params = jax.tree.unflatten(jax.tree.structure(self.params), entered[:first])
        cache = jax.tree.unflatten(jax.tree.structure(self.cache), entered[first:second])
        step = step_of(self.exporter, self.shape.phase)
        results = jax.tree.leaves(step(params, cache, *entered[second:]))
        return [value.leave(a) for value, a in zip(self.results, results, strict=True)]

    def traced(self) -> Any:
        """The program lowered, still with its shardings where it has any.

        Raises:
          InputError: where an operator's variant cannot compute it.
        """
        exporter, mesh = self.exporter, self.exporter.mesh
        function: Callable[..., Any] = self.function
        options: dict[str, Any] = {}
        inputs, outputs = (tuple(v.partition for v in values) for values in (self.arguments, self.results))
        if exporter.manual:
            function = jax.shard_map(
                lambda *arrays: tuple(self.function(*arrays)),
                mesh=mesh,
                in_specs=inputs,
                out_specs=outputs,
                check_vma=False,
            )
        elif exporter.ranks > 1:
            place = lambda specs: tuple(NamedSharding(mesh, spec) for spec in specs)  # noqa: E731
            options = {"in_shardings": place(inputs), "out_shardings": list(place(outputs))}
        with exporter.chosen(), outlining():
            traced = jax.jit(function, keep_unused=True, **options).trace(*(v.spec for v in self.arguments))
            return traced.lower(lowering_platforms=(PLATFORM,))
