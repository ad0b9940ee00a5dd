"""Mesh plans: which devices, along which axes."""

from __future__ import annotations

import dataclasses
import math

import jax
from jax.sharding import AxisType, Mesh

AXES = ("dp", "ep", "tp")
"""Data, expert and tensor parallelism: orthogonal axes, in this order, the chattiest last."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Extent of every mesh axis; 1 where an axis is absent."""

    dp: int = 1
    ep: int = 1
    tp: int = 1

    @property
    def devices(self) -> int:
        return math.prod(getattr(self, axis) for axis in AXES)


def parse_plan(text: str) -> Plan:
    """A plan from "dp=2,ep=8,tp=4"; absent axes are 1.

    Raises:
      ValueError: for an unknown or repeated axis, or an extent that is not a positive integer.
    """
    extents: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        axis, _, extent = part.partition("=")
        if axis not in AXES or axis in extents or not extent.isdecimal() or int(extent) < 1:
            raise ValueError(
                f"mesh plan {text!r}: expected axes {', '.join(AXES)} with positive extents, found {part!r}"
            )
        extents[axis] = int(extent)
    return Plan(**extents)


def make_mesh(plan: Plan) -> Mesh:
    """The plan on the first devices, with automatic axes (the default has been Explicit since JAX 0.9).

    Raises:
      ValueError: if the plan needs more devices than there are.
    """
    devices = jax.devices()
    if plan.devices > len(devices):
        raise ValueError(f"mesh plan needs {plan.devices} devices, found {len(devices)}")
    shape = tuple(getattr(plan, axis) for axis in AXES)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[: plan.devices])
