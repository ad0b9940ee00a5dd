"""The one table that says what is split, and over which axes of a mesh: for placing arrays, and inside a manual body.

A manual body (`jax.shard_map`) sees local shards and names its collectives by the *logical* axis that was split:
`rules.sum("heads", y)` adds up what devices with different heads have found. Where nothing is split the collective is
not there, so that the same body is the program of one device, and the global program that a partitioner splits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
from jax import lax
from jax.sharding import PartitionSpec

Axes = tuple[str, ...]
"""Axes of a mesh, outermost first."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """Mesh axes by logical axis.

    Attributes:
      table: logical axis -> mesh axes; what is not in it is replicated.
      extents: of the mesh's axes.
      dispatch: how tokens get to their experts, where devices have different tokens: see `sharding.dispatch`.
    """

    table: Mapping[str, Axes] = dataclasses.field(default_factory=dict)
    extents: Mapping[str, int] = dataclasses.field(default_factory=dict)
    dispatch: str = "auto"

    def axes(self, *names: str) -> Axes:
        """The mesh axes, of more than one device, that these logical axes are split over."""
        found = [axis for name in names for axis in self.table.get(name, ())]
        return tuple(axis for axis in dict.fromkeys(found) if self.extents[axis] > 1)

    def ways(self, *names: str) -> int:
        """Into how many parts they are split together."""
        return math.prod(self.extents[axis] for axis in self.axes(*names))

    def spec(self, names: Sequence[str]) -> PartitionSpec:
        """The PartitionSpec of an array whose axes have these logical names.

        Raises:
          ValueError: if two of its axes would be split over the same mesh axis.
        """
        entries = [self.axes(name) for name in names]
        used = [axis for entry in entries for axis in entry]
        if len(used) != len(set(used)):
            raise ValueError(f"axes {tuple(names)} would use a mesh axis twice: {entries}")
        return PartitionSpec(*(entry or None for entry in entries))

    # --- inside a manual body ---

    def rank(self, *names: str) -> jax.Array | int:
        """Which part this device has; int32 [], or 0 where nothing is split."""
        axes = self.axes(*names)
        return lax.axis_index(axes) if axes else 0

    def sum(self, name: str, x: jax.Array) -> jax.Array:
        """The sum of all parts' x, on every device (an all-reduce)."""
        axes = self.axes(name)
        return lax.psum(x, axes) if axes else x

    def largest(self, name: str, x: jax.Array) -> jax.Array:
        """The largest of all parts' x, element by element, on every device (an all-reduce)."""
        axes = self.axes(name)
        return lax.pmax(x, axes) if axes else x

    def part(self, name: str, x: jax.Array, dim: int = 0) -> jax.Array:
        """This device's part of an x that all devices have."""
        size = x.shape[dim] // self.ways(name)
        return x if size == x.shape[dim] else lax.dynamic_slice_in_dim(x, self.rank(name) * size, size, axis=dim)


def gather(x: jax.Array, axes: Axes, dim: int = 0) -> jax.Array:
    """All devices' parts one after the other (an all-gather); x itself without axes."""
    return lax.all_gather(x, axes, axis=dim, tiled=True) if axes else x


def scatter_sum(x: jax.Array, axes: Axes, dim: int = 0) -> jax.Array:
    """This device's part of the sum of all devices' x (a reduce-scatter); x itself without axes."""
    return lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True) if axes else x


UNSPLIT = Rules()
"""Of one device, and of the global program that a partitioner splits."""
