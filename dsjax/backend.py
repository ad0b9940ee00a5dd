"""What the compiler is told, by platform. The programs themselves are the same everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax
from jax.experimental.layout import Format, Layout
from jax.extend.backend import backends
from jax.sharding import Sharding

_CPU_OPTIONS: dict[str, Any] = {
    # XLA:CPU prefers 256-bit vectors even where the machine has wider ones.
    "xla_cpu_prefer_vector_width": 512,
    # Its kernel library (YNN) keeps matrix products, but must not take sums: it would write every decoded weight to
    # memory to add it up there, which makes a decode step seven times slower.
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
}


def platform_of(device: jax.Device) -> str:
    """The name that the user calls a device's platform by: cpu, cuda, tpu, or the one that a plugin was loaded under,
    whatever the plugin calls itself (pip's xla-cpu-pjrt says "cpu"). Of a device that is not there, what it says."""
    client = getattr(device, "client", None)
    names = (name for name, backend in backends().items() if backend is client) if client is not None else iter(())
    return next(names, device.platform)


@lru_cache
def _accepted(name: str, value: Any) -> bool:
    """Whether this version of XLA:CPU knows the option."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        try:
            jax.jit(lambda: 0).lower().compile({name: value})
        except jax.errors.JaxRuntimeError:
            return False
    return True


def cache_placement(sharding: Sharding, cache: Any, platform: str) -> Any:
    """Where a cache's array lies, for `in_shardings` and `out_shardings`, both of them.

    Row-major everywhere, which XLA:TPU has to be told. Left to itself it puts positions last, where a row's odd width
    needs no padding, and then copies the whole donated cache into the order of the step's loops and back, every step.

    Args:
      sharding: of the array.
      cache: the array, or its shape.
      platform: of its devices.
    """
    return Format(Layout(tuple(range(cache.ndim))), sharding) if platform == "tpu" else sharding


LANES = 128
"""Elements that lie side by side in a TPU's tiles, the last axis filled up to a multiple."""


def weight_placement(sharding: Sharding, weight: Any, platform: str) -> Any:
    """Where a parameter's array lies, for `in_shardings` and `jax.device_put`.

    Row-major, as products take it, unless a device's rows are short. XLA:TPU lays an array of odd width (scales of 7168
    channels are 224) along another axis, which needs less padding, and then turns the whole stack over in every step.

    Args:
      sharding, platform: as of `cache_placement`.
      weight: the array, or its shape.
    """
    rows = has_long_rows(sharding.shard_shape(weight.shape))
    return cache_placement(sharding, weight, platform) if rows else sharding


def has_long_rows(shape: Sequence[int]) -> bool:
    """Whether an array's rows fill a TPU's lanes, so that it should lie row-major there."""
    return bool(shape) and shape[-1] >= LANES


def place(weight: Any, where: Any) -> jax.Array:
    """A parameter's array where `weight_placement` says; the same array if it lies there."""
    wanted = where.layout if isinstance(where, Format) else None
    if isinstance(wanted, Layout) and weight.format.layout.major_to_minor != wanted.major_to_minor:
        return jax.device_put(weight, where)
    return weight


def compiler_options(platform: str) -> dict[str, Any]:
    """Options for `jax.jit(..., compiler_options=)` and `Lowered.compile()`.

    They change speed and temporary memory, not the meaning of results. None but for XLA:CPU, and there those that this
    version of it knows.

    Args:
      platform: of the devices that will run the program, as `platform_of` says.
    """
    return {k: v for k, v in _CPU_OPTIONS.items() if _accepted(k, v)} if platform == "cpu" else {}
