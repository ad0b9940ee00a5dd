"""Whether codes hold NaN or infinity, in files, on the host or on devices."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# A code is NaN or infinite where all these bits are set. Formats that are not listed have neither.
_NOT_FINITE = {"e4m3": 0x7F, "e5m2": 0x7C, "e8m0": 0xFF, "bf16": 0x7F80, "f16": 0x7C00, "f32": 0x7F800000}

_CHUNK = 1 << 18  # elements looked at together, so that temporaries stay in a core's cache


def host_finite(elements: np.ndarray, fmt: str) -> bool:
    """Whether no element is NaN or infinite.

    Args:
      elements: of any type as wide as the format's codes, contiguous.
      fmt: name of the codes' format.
    """
    mask = _NOT_FINITE.get(fmt)
    if mask is None:
        return True
    flat = elements.reshape(-1).view(np.dtype(f"u{elements.dtype.itemsize}"))
    parts = (flat[i : i + _CHUNK] for i in range(0, flat.size, _CHUNK))
    if fmt == "e4m3":  # 0xFF is the largest unsigned byte, 0x7F the largest signed one; two maxima, no temporary
        return all(int(part.max()) < 0xFF and int(part.view(np.int8).max()) < 0x7F for part in parts)
    return not any(bool((part & mask == mask).any()) for part in parts)


@partial(jax.jit, static_argnums=1)
def _on_device(array: jax.Array, mask: int) -> jax.Array:
    bits = lax.bitcast_convert_type(array, jnp.uint32) if array.dtype == jnp.float32 else array
    return (bits & bits.dtype.type(mask) == mask).any()


def all_finite(array: Any, fmt: str, *, on_host: bool = True) -> bool:
    """Whether no element is NaN or infinite.

    Args:
      array: codes, unsigned integers of the format's width, or float32 for "f32".
      fmt: name of the codes' format.
      on_host: look at the parts on CPU devices without copying them; False asks the devices.
    """
    mask = _NOT_FINITE.get(fmt)
    if mask is None:
        return True
    if not on_host or any(d.platform != "cpu" for d in array.sharding.device_set):
        return not _on_device(array, mask)
    return all(host_finite(np.asarray(s.data), fmt) for s in array.addressable_shards if s.replica_id == 0)


def all_below(array: jax.Array, limit: int) -> bool:
    """Whether no integer is negative, or `limit` or above."""
    return bool(((array >= 0) & (array < limit)).all())
