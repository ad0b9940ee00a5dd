"""Mesh plans: how many devices along which axes, and which devices these are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ("dp", "ep", "tp")
"""Data, expert and tensor parallelism: orthogonal axes, in this order, the chattiest last."""

INNER = "_in"
"""What the name of the inner part of an axis ends in, where one is made of two: tp of tp x tp_in."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Extent of every axis; 1 where an axis is absent."""

    dp: int = 1
    ep: int = 1
    tp: int = 1

    @property
    def devices(self) -> int:
        return math.prod(getattr(self, axis) for axis in AXES)

    def __str__(self) -> str:
        return ",".join(f"{axis}={getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1) or "tp=1"


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


def mesh_axes(plan: Plan, inner: int = 1) -> dict[str, int]:
    """Names and extents of a mesh's axes, outermost first.

    Something may be split over only a part of the devices along ep x tp: `inner` neighbours then share what the others
    do not have. The axis that this cuts becomes two, of which the inner has INNER at the end of its name.

    Args:
      inner: devices next to each other along ep x tp that are an axis, or axes, of their own.

    Raises:
      ValueError: if `inner` cannot be made of the inner parts of tp, then ep.
    """
    axes = {"dp": plan.dp}
    of_tp = math.gcd(inner, plan.tp)
    of_ep = inner // of_tp
    if plan.ep % of_ep or (of_ep > 1 and of_tp < plan.tp):
        raise ValueError(f"mesh plan {plan}: {inner} neighbours along ep x tp are no part of it")
    for axis, part in (("ep", of_ep), ("tp", of_tp)):
        extent = getattr(plan, axis)
        axes[axis] = extent if part in (1, extent) else extent // part
        if part not in (1, extent):
            axes[axis + INNER] = part
    return axes


def inner_axes(plan: Plan, inner: int) -> tuple[str, ...]:
    """The axes of `mesh_axes(plan, inner)` that the `inner` neighbours lie along."""
    found: list[str] = []
    for axis, extent in reversed(mesh_axes(plan, inner).items()):
        if inner > 1 and extent > 1:
            found.insert(0, axis)
            inner //= extent
    return tuple(found)


def make_mesh(plan: Plan, inner: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The plan on the first devices, with automatic axes (the default has been Explicit since JAX 0.9).

    Devices are in the order of their processes, so that the last axes, which talk most, lie inside a host; those of a
    TPU as its torus lies.

    Args:
      inner: see `mesh_axes`.
      devices: all of JAX's by default.

    Raises:
      ValueError: if the plan needs more devices than there are, or leaves a process without one.
    """
    found = sorted(jax.devices() if devices is None else devices, key=lambda d: (d.process_index, d.id))
    if plan.devices > len(found):
        raise ValueError(f"mesh plan {plan} needs {plan.devices} devices, found {len(found)}")
    used = found[: plan.devices]
    processes = {d.process_index for d in found} if jax.process_count() > 1 else set()
    if idle := processes - {d.process_index for d in used}:
        raise ValueError(
            f"mesh plan {plan}: expected one that uses devices of all {len(processes)} processes, found "
            f"{plan.devices} devices, none of process {min(idle)}"
        )
    axes = mesh_axes(plan, inner)
    return Mesh(arranged(tuple(axes.values()), used), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def arranged(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """Devices as an array of that shape: in order, but on a TPU so that axes lie along those of its torus.

    `jax.make_mesh` would refuse extents that are no products of the torus's: dp=2,ep=32 on 4 x 4 x 4.
    """
    try:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except AssertionError:  # some of a TPU's devices that are no block of it
        return np.array(devices).reshape(shape)
