"""The step on a mesh: a model's layout on real devices, and functions of local shards as programs of all of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsjax.config import Config
from dsjax.errors import InputError
from dsjax.layout import Layout, layout
from dsjax.models.ends import vocabulary_axes
from dsjax.numerics import Numerics
from dsjax.params import Row, Stored, Tree
from sharding import UNSPLIT, Plan, Rules, make_mesh

SPMD = ("manual", "auto")

EVERYWHERE = PartitionSpec()
"""Of an array that every device has in whole."""


@dataclasses.dataclass(frozen=True)
class Parallel:
    """A model's layout on the devices of a mesh.

    Attributes:
      config: of the model.
      layout: what is split how.
      mesh: its devices.
      spmd: "manual": the body sees local shards and names its collectives. "auto": the body is the program of one
        device, and XLA's partitioner finds out what its arguments' shardings ask for.
    """

    config: Config
    layout: Layout
    mesh: Mesh
    spmd: str = "manual"

    @property
    def rules(self) -> Rules:
        """What the body is to know of how it is split."""
        return self.layout.rules if self.spmd == "manual" else UNSPLIT

    @property
    def slots(self) -> int:
        """A batch's slots must be a multiple of this."""
        return self.layout.rules.ways("slots")

    def place(self, specs: Any) -> Any:
        """A tree of PartitionSpecs as shardings on the mesh."""
        is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs, is_leaf=is_spec)

    def sharding(self, row: Row, part: str) -> NamedSharding:
        """Where a leaf's arrays go: what `checkpoint.load` asks."""
        return NamedSharding(self.mesh, self.layout.rules.spec(row.logical_axes))

    def cut(self, row: Row, held: Stored) -> Stored:
        """Scale blocks as shards need them: what `checkpoint.load` asks."""
        return self.layout.held(row, held, self.config)

    def param_specs(self, params: Tree) -> Tree:
        """PartitionSpecs of parameters."""
        return self.layout.param_specs(params, self.config)

    def new_cache(self, make: Callable[[], Any]) -> Any:
        """The cache that `make` makes, each device making its part."""
        shapes = jax.eval_shape(make)
        cache: Any = jax.jit(make, out_shardings=self.place(self.layout.cache_specs(shapes)))()
        return cache

    def logits_spec(self, positions: bool) -> PartitionSpec:
        """Of what `models.ends.logits` returns: [B, V], or [B, T, V] with all positions."""
        rules = self.layout.rules
        differ, _ = vocabulary_axes(rules)
        slots = tuple(a for a in rules.axes("slots") if a not in differ)
        return PartitionSpec(slots or None, *([None] if positions else []), rules.axes("vocab") or None)

    def hidden_spec(self) -> PartitionSpec:
        """Of what a step returns for the draft module."""
        return self.layout.rules.spec(("slots",))

    def program(self, body: Callable[..., Any], in_specs: Sequence[Any], out_specs: Any, **jit: Any) -> Any:
        """A jitted function of whole arrays from a body of local shards.

        Args:
          body: of as many arguments as `in_specs`.
          in_specs, out_specs: trees of PartitionSpecs.
          jit: further arguments of `jax.jit`.
        """
        if self.spmd == "manual":
            # Values that differ between devices pass through loops whose start does not: their types are not tracked.
            body = jax.shard_map(body, mesh=self.mesh, in_specs=tuple(in_specs), out_specs=out_specs, check_vma=False)
        return jax.jit(body, in_shardings=self.place(tuple(in_specs)), out_shardings=self.place(out_specs), **jit)


def parallel(
    config: Config,
    plan: Plan,
    numerics: Numerics,
    *,
    attention: str = "heads",
    o_groups: str = "split",
    spmd: str = "manual",
    devices: Sequence[jax.Device] | None = None,
) -> Parallel:
    """A model on the first devices there are.

    Args:
      config, plan, numerics, attention, o_groups: of `layout.layout`.
      spmd: see `Parallel`.
      devices: all of JAX's by default.

    Raises:
      InputError: if the plan cannot work, for this model or on these devices.
    """
    found = layout(config, plan, attention, numerics, o_groups)
    try:
        mesh = make_mesh(plan, found.inner, devices)
    except ValueError as e:
        raise InputError(str(e)) from None
    return Parallel(config, found, mesh, spmd)


def to_host(array: jax.Array) -> np.ndarray:
    """A whole array on this host, its parts fetched from other processes where they are there."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def padded(count: int, multiple: int) -> int:
    """The smallest multiple that is not below `count`."""
    return math.ceil(count / multiple) * multiple
