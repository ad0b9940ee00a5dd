"""Parts of arrays on this host's devices, each filled once, region by region, and given to all devices that hold it.

A CPU device's memory is the host's: its part is filled where it will stay. Of any other device a part is filled through
host memory, a region at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

Region = tuple[tuple[int, int], ...]
"""(start, stop) on every axis of a leaf."""

Fill = Callable[[Region, np.ndarray], None]
"""Writes a region of an array into host memory of the region's shape."""

_ALIGNMENT = 64  # bytes; XLA:CPU adopts a NumPy array so aligned instead of copying it


def extents(region: Region) -> list[int]:
    """The region's shape."""
    return [stop - start for start, stop in region]


def split_region(region: Region, itemsize: int, limit: int) -> Iterator[Region]:
    """Cuts a region into regions of at most `limit` bytes, along leading axes first, never inside a row."""
    sizes = extents(region)
    if math.prod(sizes) * itemsize <= limit:
        yield region
        return
    axis = next((i for i, n in enumerate(sizes[:-1]) if n > 1), None)
    if axis is None:
        yield region
        return
    per_index = math.prod(sizes[axis + 1 :]) * itemsize
    step = max(1, limit // per_index)
    start, stop = region[axis]
    for at in range(start, stop, step):
        part = (*region[:axis], (at, min(at + step, stop)), *region[axis + 1 :])
        yield from split_region(part, itemsize, limit)


def local_parts(sharding: Sharding, shape: tuple[int, ...]) -> dict[Region, list[jax.Device]]:
    """The parts of an array that this process's devices hold, and the devices that hold each."""
    parts: dict[Region, list[jax.Device]] = {}
    found: Mapping[Any, Any] = sharding.addressable_devices_indices_map(shape)
    for device, index in found.items():
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index or (), shape, strict=True))
        parts.setdefault(bounds, []).append(device)
    return parts


def undivided(sharding: Sharding, ndim: int, *axes: int) -> Sharding:
    """The same sharding with some axes in whole on every device that would hold a part of them.

    Args:
      sharding: on a mesh; another one is returned as it is.
      ndim: the array's.
      axes: counted from the last one, -1.
    """
    if not axes or not isinstance(sharding, NamedSharding):
        return sharding
    entries = [*sharding.spec, *[None] * (ndim - len(sharding.spec))]
    for axis in axes:
        entries[axis] = None
    return NamedSharding(sharding.mesh, PartitionSpec(*entries), memory_kind=sharding.memory_kind)


def host_buffer(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """Memory that XLA:CPU can adopt as a device's array."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


class HostPart:
    """A part that CPU devices hold: one memory for all of them, which none of them writes to."""

    def __init__(self, bounds: Region, dtype: np.dtype, devices: list[jax.Device]) -> None:
        self._bounds, self._devices = bounds, devices
        self._buffer = host_buffer(extents(bounds), dtype)

    def fill(self, region: Region, fill: Fill) -> int:
        """Fills a region of it; returns the bytes that were staged for that: none."""
        inside = tuple(slice(a - low, b - low) for (a, b), (low, _) in zip(region, self._bounds, strict=True))
        fill(region, self._buffer[inside])
        return 0

    def arrays(self) -> list[jax.Array]:
        """The filled part on each of its devices."""
        return [jax.device_put(self._buffer, SingleDeviceSharding(d), may_alias=True) for d in self._devices]


@partial(jax.jit, donate_argnums=0)
def _put(buffer: jax.Array, piece: jax.Array, start: list[jax.Array]) -> jax.Array:
    return lax.dynamic_update_slice(buffer, piece, start)


class DevicePart:
    """A part that other devices hold, each in its own memory."""

    def __init__(self, bounds: Region, dtype: np.dtype, devices: list[jax.Device]) -> None:
        self._bounds, self._dtype = bounds, dtype
        self._where = [SingleDeviceSharding(d) for d in devices]
        self._buffers = [jnp.zeros(extents(bounds), dtype, device=where) for where in self._where]

    def fill(self, region: Region, fill: Fill) -> int:
        """Fills a region of it on all devices; returns the bytes that were staged for that."""
        piece = np.empty(extents(region), self._dtype)
        fill(region, piece)
        start = [jnp.int32(a - low) for (a, _), (low, _) in zip(region, self._bounds, strict=True)]
        for i, where in enumerate(self._where):
            self._buffers[i] = _put(self._buffers[i], jax.device_put(piece, where), start)
        jax.block_until_ready(self._buffers)  # so that one staging buffer is alive at a time
        return piece.nbytes

    def arrays(self) -> list[jax.Array]:
        """The filled part on each of its devices."""
        return self._buffers
