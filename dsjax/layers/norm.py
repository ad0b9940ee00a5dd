"""RMSNorm: alone, with the residual addition in front of it, and of each head without a gain; LayerNorm."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from dsjax.numerics import Numerics
from quant.operator import operator


@operator("rms_norm")
def rms_norm(x: Float[Array, "*batch D"], gain: Float32[Array, " D"], eps: float) -> Float32[Array, "*batch D"]:
    """x * rsqrt(mean(x^2) + eps) * gain over the last axis, in float32 and not rounded (spec V3 2.1)."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * gain


@operator("layer_norm")
def layer_norm(
    x: Float[Array, "*batch D"], gain: Float32[Array, " D"], bias: Float32[Array, " D"], eps: float
) -> Float32[Array, "*batch D"]:
    """(x - mean) * rsqrt(variance + eps) * gain + bias over the last axis, in float32, not rounded (spec V3 2.8)."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * gain + bias


def add_norm(
    residual: Float[Array, "*batch D"],
    delta: Float[Array, "*batch D"],
    gain: Float32[Array, " D"],
    eps: float,
    numerics: Numerics,
) -> tuple[Float[Array, "*batch D"], Float[Array, "*batch D"]]:
    """(residual + delta, its RMSNorm), the norm taken of the unrounded float32 sum (spec V3 2.1).

    Args:
      residual, delta: [..., D].
      gain: float32 [D].

    Returns:
      The new residual and the normalised activations, both rounded once to the activation dtype.
    """
    total = residual.astype(jnp.float32) + delta.astype(jnp.float32)
    return numerics.round(total), numerics.round(rms_norm(total, gain, eps))


@operator("head_norm")
def head_norm(q: Float[Array, "B T H U"], eps: float, numerics: Numerics) -> Float[Array, "B T H U"]:
    """Each head's vector over its root mean square, without a gain (spec V4 2.3, step 2).

    In native every operation rounds to bfloat16, the mean's sum apart, as DeepSeek's code on a bfloat16 tensor does.
    """
    if not numerics.native:
        x = q.astype(jnp.float32)
        return numerics.round(x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps))
    r, x = numerics.round, q.astype(jnp.float32)
    square = r(x * x).astype(jnp.float32)
    mean = r(r(jnp.mean(square, axis=-1, keepdims=True)).astype(jnp.float32) + eps).astype(jnp.float32)
    return r(x * r(lax.rsqrt(mean)).astype(jnp.float32))
