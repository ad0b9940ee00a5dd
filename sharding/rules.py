"""From logical axis names to mesh axes: the one place that says what is split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jax.sharding import PartitionSpec

Rules = Mapping[str, str | tuple[str, ...]]
"""Mesh axis, or axes, for a logical axis name; names left out are replicated."""


def partition_spec(axes: Sequence[str], rules: Rules) -> PartitionSpec:
    """The PartitionSpec of an array whose axes have these logical names.

    Raises:
      ValueError: if two of its axes would be split over the same mesh axis.
    """
    entries = [rules.get(axis) for axis in axes]
    used = [name for entry in entries if entry for name in ((entry,) if isinstance(entry, str) else entry)]
    if len(used) != len(set(used)):
        raise ValueError(f"axes {tuple(axes)} would use a mesh axis twice: {entries}")
    return PartitionSpec(*entries)
