"""RMSNorm, alone and with the residual addition in front of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from dsjax.numerics import Numerics


def rms_norm(x: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
    """x * rsqrt(mean(x^2) + eps) * gain over the last axis, in float32 and not rounded (spec V3 2.1)."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * gain


def add_norm(
    residual: jax.Array, delta: jax.Array, gain: jax.Array, eps: float, numerics: Numerics
) -> tuple[jax.Array, jax.Array]:
    """(residual + delta, its RMSNorm), the norm taken of the unrounded float32 sum (spec V3 2.1).

    Args:
      residual, delta: [..., D].
      gain: float32 [D].

    Returns:
      The new residual and the normalised activations, both rounded once to the activation dtype.
    """
    total = residual.astype(jnp.float32) + delta.astype(jnp.float32)
    return numerics.round(total), numerics.round(rms_norm(total, gain, eps))
