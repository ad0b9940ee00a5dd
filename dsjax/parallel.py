"""The step on a mesh: a model's layout on real devices, and functions of local shards as programs of all of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsjax.backend import cache_placement, place, weight_placement
from dsjax.checkpoint.load import LoadStats, load
from dsjax.config import Config, V4Config
from dsjax.errors import InputError
from dsjax.layout import Layout, layout
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

    def cache_placement(self, cache: Any) -> Any:
        """A tree like a cache, arrays or shapes, with what `jax.jit` is told of where they lie."""
        platform = self.mesh.devices.flat[0].platform
        return jax.tree.map(
            lambda where, a: cache_placement(where, a, platform), self.place(self.layout.cache_specs(cache)), cache
        )

    def weight_placement(self, params: Tree) -> Any:
        """The same of parameters."""
        platform = self.mesh.devices.flat[0].platform
        where = self.place(self.layout.param_specs(params, self.config))
        return jax.tree.map(lambda where, a: weight_placement(where, a, platform), where, params)

    def new_cache(self, make: Callable[[], Any]) -> Any:
        """The cache that `make` makes, each device making its part."""
        cache: Any = jax.jit(make, out_shardings=self.cache_placement(jax.eval_shape(make)))()
        return cache

    def program(
        self,
        body: Callable[..., Any],
        params: Tree,
        cache: Any,
        inputs: Sequence[Any],
        outputs: Sequence[Any],
        **options: Any,
    ) -> Any:
        """(params, cache, *inputs) -> (*outputs, cache) of whole arrays, jitted, from a body of local shards.

        Args:
          body: sees this device's part of everything.
          params, cache: arrays or shapes.
          inputs, outputs: a PartitionSpec each.
          options: further arguments of `jax.jit`.
        """
        weights, caches = self.layout.param_specs(params, self.config), self.layout.cache_specs(cache)
        if self.spmd == "manual":
            # Values that differ between devices pass through loops whose start does not: their types are not tracked.
            body = jax.shard_map(
                body,
                mesh=self.mesh,
                in_specs=(weights, caches, *inputs),
                out_specs=(*outputs, caches),
                check_vma=False,
            )
        held = self.cache_placement(cache)
        return jax.jit(
            body,
            in_shardings=(self.weight_placement(params), held, *self.place(tuple(inputs))),
            out_shardings=(*self.place(tuple(outputs)), held),
            **options,
        )


def parallel(
    config: Config,
    plan: Plan,
    numerics: Numerics,
    *,
    attention: str = "heads",
    o_groups: str = "split",
    dispatch: str = "auto",
    spmd: str = "manual",
    devices: Sequence[jax.Device] | None = None,
) -> Parallel:
    """A model on the first devices there are.

    Args:
      config, plan, numerics, attention, o_groups, dispatch: of `layout.layout`.
      spmd: see `Parallel`.
      devices: all of JAX's by default.

    Raises:
      InputError: if the plan cannot work, for this model or on these devices.
    """
    if spmd == "auto" and dispatch != "auto":
        raise InputError(f"--dispatch {dispatch}: expected --spmd manual, whose program sends tokens, found auto")
    if o_groups != "split" and not isinstance(config, V4Config):
        raise InputError(f"--o-groups {o_groups}: expected deepseek_v4, found {config.model_type}")
    found = layout(config, plan, attention, numerics, o_groups, dispatch)
    try:
        mesh = make_mesh(plan, found.inner, devices)
    except ValueError as e:
        raise InputError(str(e)) from None
    platform = mesh.devices.flat[0].platform
    if dispatch == "ragged" and platform == "cpu":
        raise InputError("--dispatch ragged: expected a platform with ragged_all_to_all, found cpu")
    return Parallel(config, found, mesh, spmd)


def one_device(config: Config, device: jax.Device) -> Parallel:
    """A mesh of one device, on which nothing is split."""
    return Parallel(config, layout(config, Plan()), make_mesh(Plan(), devices=[device]), "auto")


def load_onto(parallel: Parallel | None, folder: Path | str, **options: Any) -> tuple[Config, Tree, LoadStats]:
    """`checkpoint.load.load` onto a mesh, or onto one device; every device reads its own part."""
    if parallel is None:
        return load(folder, **options)
    config, params, stats = load(folder, sharding=parallel.sharding, cut=parallel.cut, **options)
    return config, jax.tree.map(place, params, parallel.weight_placement(params)), stats


def to_host(array: jax.Array) -> np.ndarray:
    """A whole array on this host, its parts fetched from other processes where they are there."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def padded(count: int, multiple: int) -> int:
    """The smallest multiple that is not below `count`."""
    return math.ceil(count / multiple) * multiple
