"""Manifold-constrained hyper-connections: n residual streams, mixed before and after every sub-layer (spec V4 2.2).

The streams are [B, T, n, D]. Each site reads a weighted sum of them, and writes back to all of them through a doubly
stochastic n x n matrix. Statistics, weights and mixing are float32; streams are rounded once, when they are written.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from dsjax.config import V4Config
from dsjax.numerics import Numerics
from dsjax.params import Tree
from quant import block_scaled_dot
from quant.operator import operator


def sinkhorn(logits: Float32[Array, "*batch n n"], iterations: int, eps: float) -> Float32[Array, "*batch n n"]:
    """Doubly stochastic matrices: softmax of the rows, plus eps, then columns; then rows and columns in turn.

    Args:
      logits: float32 [..., n, n].
      iterations: normalisations of the columns in all.
      eps: added to every entry once, and to every sum that divides.
    """
    n = logits.shape[-1]
    # Entries lead, so that sums are sums of arrays: a reduction over n = 4 elements costs more to start than to do.
    c = jnp.moveaxis(logits, (-2, -1), (0, 1))

    def rows(c: jax.Array) -> jax.Array:
        return sum((c[:, k] for k in range(1, n)), c[:, 0])[:, None]

    def columns(c: jax.Array) -> jax.Array:
        return sum((c[j] for j in range(1, n)), c[0])[None]

    def both(_: Any, c: jax.Array) -> jax.Array:
        c = c / (rows(c) + eps)
        return c / (columns(c) + eps)

    c = jnp.exp(c - c.max(axis=1, keepdims=True))
    c = c / rows(c) + eps
    c = c / (columns(c) + eps)
    return jnp.moveaxis(lax.fori_loop(0, iterations - 1, both, c), (0, 1), (-2, -1))


def _mixes(streams: jax.Array, params: Tree, index: tuple[Any, ...], config: V4Config, numerics: Numerics) -> jax.Array:
    """fn @ z * rsqrt(mean(z^2) + eps), z all streams of a token as one vector; float32 [B, T, mixes]."""
    z = streams.reshape(*streams.shape[:2], -1).astype(jnp.float32)
    rho = lax.rsqrt(jnp.mean(z * z, axis=-1, keepdims=True) + config.rms_norm_eps)
    return block_scaled_dot(z, params["fn"], index, numerics.form) * rho


@operator("hyper_connection_pre")
def hyper_connection_pre(
    streams: Float[Array, "B T n D"], params: Tree, index: tuple[Any, ...], config: V4Config, numerics: Numerics
) -> tuple[Float[Array, "B T D"], Float32[Array, "B T n"], Float32[Array, "B T n n"]]:
    """What a sub-layer reads, and how its output is written back (spec V4 2.2, HCPre).

    Args:
      streams: X, [B, T, n, D].
      params: float32 fn [..., (2 + n) n, n D], base [..., (2 + n) n], scale [..., 3].
      index: layer in the stack.

    Returns:
      u = sum_j pre_j X_j, [B, T, D] in the activation dtype; post, float32 [B, T, n]; comb, float32 [B, T, n, n].
    """
    n = config.hc_mult
    m = _mixes(streams, params, index, config, numerics)
    base, scale = params["base"][index], params["scale"][index]
    pre = jax.nn.sigmoid(m[..., :n] * scale[0] + base[:n]) + config.hc_eps
    post = 2 * jax.nn.sigmoid(m[..., n : 2 * n] * scale[1] + base[n : 2 * n])
    logits = (m[..., 2 * n :] * scale[2] + base[2 * n :]).reshape(*m.shape[:-1], n, n)
    comb = sinkhorn(logits, config.hc_sinkhorn_iters, config.hc_eps)
    return numerics.round(_weighted_sum(pre, streams)), post, comb


def _weighted_sum(weights: jax.Array, streams: jax.Array) -> jax.Array:
    """sum_j weights[..., j] streams[..., j, :] in float32, as a sum of n arrays."""
    terms = [weights[..., j, None] * streams[..., j, :].astype(jnp.float32) for j in range(streams.shape[-2])]
    return sum(terms[1:], terms[0])


@operator("hyper_connection_post")
def hyper_connection_post(
    output: Float[Array, "B T D"],
    streams: Float[Array, "B T n D"],
    post: Float32[Array, "B T n"],
    comb: Float32[Array, "B T n n"],
    numerics: Numerics,
) -> Float[Array, "B T n D"]:
    """X'_k = post_k output + sum_j comb[j, k] X_j, rounded once (spec V4 2.2, HCPost). comb's first index contracts."""
    new = [
        post[..., k, None] * output.astype(jnp.float32) + _weighted_sum(comb[..., k], streams)
        for k in range(streams.shape[-2])
    ]
    return numerics.round(jnp.stack(new, axis=-2))


@operator("hyper_connection_head")
def hyper_connection_head(
    streams: Float[Array, "B T n D"], params: Tree, index: tuple[Any, ...], config: V4Config, numerics: Numerics
) -> Float[Array, "B T D"]:
    """The streams as one, before the final norm: sum_j pre_j X_j (spec V4 2.2, HCHead).

    Args:
      params: float32 fn [..., n, n D], base [..., n], scale [..., 1].
    """
    m = _mixes(streams, params, index, config, numerics)
    pre = jax.nn.sigmoid(m * params["scale"][index] + params["base"][index]) + config.hc_eps
    return numerics.round(_weighted_sum(pre, streams))
