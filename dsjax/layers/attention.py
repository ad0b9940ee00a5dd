"""Multi-head latent attention over a latent cache, in its absorbed and naive forms.

Both read the cache KEY_BLOCK positions at a time and never hold scores for more, so temporary memory does not grow
with the cache's capacity, and work grows with the tokens present.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from dsjax.cache import KEY_BLOCK, Latent, read_block, write
from dsjax.config import Config
from dsjax.layers.norm import rms_norm
from dsjax.layers.rope import RopeTable, rope
from dsjax.numerics import Numerics
from dsjax.params import Tree
from quant import QArray, dequantise, take_tile, tile_rows
from quant.formats import exact_divide


def _einsum(spec: str, *operands: jax.Array) -> jax.Array:
    """Products summed in float32, whatever the operands' dtype."""
    return jnp.einsum(spec, *(o.astype(jnp.float32) for o in operands), precision=lax.Precision.HIGHEST)


def attend(
    score: Callable[[Any], jax.Array],
    value: Callable[[jax.Array, Any], jax.Array],
    blocks: jax.Array,
    shape: tuple[int, int, int],
    width: int,
    numerics: Numerics,
) -> jax.Array:
    """softmax(scores) @ values over key blocks, in float32.

    In plain, one pass with a running maximum (online softmax). In native, two passes: probabilities are rounded to
    bfloat16 after they are normalised by the whole row, as in DeepSeek's code, so the row's sum must come first.

    Args:
      score: block -> float32 [B, T, H, keys], -inf where a key is not visible.
      value: (probabilities [B, T, H, keys], block) -> float32 [B, T, H, width].
      blocks: int32 [], number of key blocks to visit, at least one; every query sees a key of block 0.
      shape: (B, T, H).
      width: of a value.
    """
    top = jnp.full(shape, -jnp.inf)
    zero = jnp.zeros(shape)

    def advance(s: jax.Array, top: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        new_top = jnp.maximum(top, s.max(axis=-1))
        decay = jnp.exp(top - new_top)
        return new_top, total * decay + jnp.exp(s - new_top[..., None]).sum(axis=-1), decay

    accumulator = jnp.zeros((*shape, width))
    if numerics.native:

        def measure(j: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            return advance(score(j), *carry)[:2]

        top, total = lax.fori_loop(0, blocks, measure, (top, zero))

        def add(j: jax.Array, out: jax.Array) -> jax.Array:
            p = exact_divide(jnp.exp(score(j) - top[..., None]), total[..., None])
            return out + value(numerics.round(p), j)

        return lax.fori_loop(0, blocks, add, accumulator)

    def online(j: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        top, total, out = carry
        s = score(j)
        new_top, total, decay = advance(s, top, total)
        p = numerics.round(jnp.exp(s - new_top[..., None]))
        return new_top, total, out * decay[..., None] + value(p, j)

    _, total, out = lax.fori_loop(0, blocks, online, (top, zero, accumulator))
    return out / total[..., None]


def _visible(scores: jax.Array, positions: jax.Array, block: Any) -> jax.Array:
    """Causal mask: a query at position p sees keys at positions <= p."""
    keys = block * KEY_BLOCK + jnp.arange(scores.shape[-1])
    return jnp.where((keys <= positions[..., None])[:, :, None], scores, -jnp.inf)


def absorbed_attention(
    q_nope: Float[Array, "B T H N"],
    q_rope: Float[Array, "B T H R"],
    latent: Latent,
    kv_b: jax.Array | QArray,
    layer: tuple[Any, Any],
    positions: Int32[Array, "B T"],
    filled: Int32[Array, " B"],
    blocks: Int32[Array, ""],
    config: Config,
    numerics: Numerics,
) -> Float[Array, "B T H U"]:
    """Attention on the latent itself: kv_b is applied to queries and outputs instead of keys (spec V3 2.4).

    Args:
      q_nope: [B, T, H, N]; q_rope: [B, T, H, R], rotated.
      latent: [L, B, S, A], the new rows already written.
      kv_b: stack of [HG, C]; in native it is dequantised to bfloat16 here, and activations are not quantised.
      layer: (index into the weight stack, index into the cache).
      positions: int32 [B, T].
      filled: int32 [B], tokens in each slot, the new ones included.
      blocks: key blocks to visit.

    Returns:
      [B, T, H, U] in the activation dtype.
    """
    b, t, h, n = q_nope.shape
    c, u = config.kv_lora_rank, config.v_head_dim
    g = n + u
    weight_layer, cache_layer = layer

    heads = max(1, tile_rows(h * g, c, g) // g)
    while h % heads:
        heads -= 1

    def head_weights(i: Any, part: slice) -> jax.Array:
        """Part of the rows of each head of group i, float32 [heads, rows, C]."""
        tile = take_tile(kv_b, (weight_layer,), i * heads * g, heads * g, stride=heads * g)
        values = dequantise(tile) if isinstance(tile, QArray) else tile.astype(jnp.float32)
        return numerics.round(values.reshape(heads, g, c)[:, part])

    def over_heads(spec: str, x: jax.Array, part: slice) -> jax.Array:
        """x [B, T, H, .] times each head's part of kv_b, a group of heads at a time: [B, T, H, .]."""

        def one(_: None, i: Any) -> tuple[None, jax.Array]:
            group = lax.dynamic_slice_in_dim(x, i * heads, heads, axis=2)
            return None, numerics.round(_einsum(spec, group, head_weights(i, part)))

        if h == heads:
            return one(None, 0)[1]
        _, groups = lax.scan(one, None, jnp.arange(h // heads))
        return jnp.moveaxis(groups, 0, 2).reshape(b, t, h, -1)

    q_latent = over_heads("bthn,hnc->bthc", q_nope, slice(0, n))
    query = jnp.concatenate([q_latent, q_rope], axis=-1)

    def score(j: Any) -> jax.Array:
        keys = read_block(latent, cache_layer, j, filled)
        return _visible(_einsum("btha,bsa->bths", query, keys) * config.softmax_scale, positions, j)

    def value(p: jax.Array, j: Any) -> jax.Array:
        return _einsum("bths,bsc->bthc", p, read_block(latent, cache_layer, j, filled)[..., :c])

    context = numerics.round(attend(score, value, blocks, (b, t, h), c, numerics))
    return over_heads("bthc,huc->bthu", context, slice(n, n + u))


def naive_attention(
    q_nope: Float[Array, "B T H N"],
    q_rope: Float[Array, "B T H R"],
    latent: Latent,
    kv_b: jax.Array | QArray,
    layer: tuple[Any, Any],
    positions: Int32[Array, "B T"],
    filled: Int32[Array, " B"],
    blocks: Int32[Array, ""],
    config: Config,
    numerics: Numerics,
) -> Float[Array, "B T H U"]:
    """Attention on keys and values expanded from the latent, a block at a time (spec V3 2.4).

    Arguments and result as `absorbed_attention`; in native, kv_b is an FP8 product with quantised latents.
    """
    b, t, h, n = q_nope.shape
    c, u = config.kv_lora_rank, config.v_head_dim
    weight_layer, cache_layer = layer

    def expand(j: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        rows = read_block(latent, cache_layer, j, filled)
        kv = numerics.linear(rows[..., :c], kv_b, (weight_layer,)).reshape(b, rows.shape[1], h, n + u)
        return kv[..., :n], rows[..., c:], kv[..., n:]

    def score(j: Any) -> jax.Array:
        k_nope, k_rope, _ = expand(j)
        s = _einsum("bthn,bshn->bths", q_nope, k_nope) + _einsum("bthr,bsr->bths", q_rope, k_rope)
        return _visible(s * config.softmax_scale, positions, j)

    def value(p: jax.Array, j: Any) -> jax.Array:
        return _einsum("bths,bshu->bthu", p, expand(j)[2])

    return numerics.round(attend(score, value, blocks, (b, t, h), u, numerics))


def choose_form(tokens: int, config: Config, numerics: Numerics) -> str:
    """ "absorbed" or "naive": as asked; else absorbed in native, the one with fewer operations in plain.

    Per key and head, absorbed takes T (2C + R) multiply-adds; naive takes T (N + R + U), and C (N + U) to expand.
    """
    if numerics.mla != "auto":
        return numerics.mla
    c, u, n, r = config.kv_lora_rank, config.v_head_dim, config.qk_nope_head_dim, config.qk_rope_head_dim
    naive_is_cheaper = tokens * (2 * c + r) > tokens * (n + r + u) + c * (n + u)
    return "naive" if naive_is_cheaper and not numerics.native else "absorbed"


class Attention(nnx.Module):
    """MLA. Leaves stacked over layers: kv_a, kv_norm, kv_b, o; q_a, q_norm, q_b, or q where q_lora_rank is null."""

    def __init__(self, config: Config, numerics: Numerics, params: Tree) -> None:
        self.config = config
        self.numerics = numerics
        self.kv_a = nnx.Param(params["kv_a"])
        self.kv_norm = nnx.Param(params["kv_norm"])
        self.kv_b = nnx.Param(params["kv_b"])
        self.o = nnx.Param(params["o"])
        if config.q_lora_rank is None:
            self.q = nnx.Param(params["q"])
        else:
            self.q_a = nnx.Param(params["q_a"])
            self.q_norm = nnx.Param(params["q_norm"])
            self.q_b = nnx.Param(params["q_b"])

    def _queries(self, x: jax.Array, layer: Any) -> jax.Array:
        linear, round_ = self.numerics.linear, self.numerics.round
        if self.config.q_lora_rank is None:
            q = linear(x, self.q[...], (layer,))
        else:
            low = linear(x, self.q_a[...], (layer,))
            low = round_(rms_norm(low, self.q_norm[...][layer], self.config.rms_norm_eps))
            q = linear(low, self.q_b[...], (layer,))
        return q.reshape(*x.shape[:2], -1, self.config.qk_head_dim)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        latent: Latent,
        layer: tuple[Any, Any],
        positions: Int32[Array, "B T"],
        valid: Bool[Array, "B T"],
        blocks: Int32[Array, ""],
        table: RopeTable,
    ) -> tuple[Float[Array, "B T D"], Latent]:
        """Writes the new rows, then attends.

        Args:
          x: [B, T, D].
          latent: [L, B, S, A].
          layer: (index into the weight stack, index into the cache).
          positions: int32 [B, T]; valid: bool [B, T].
          blocks: int32 [], key blocks to visit.
          table: cos and sin from `rope_table`.

        Returns:
          [B, T, D] and the cache with the new rows.
        """
        config, numerics = self.config, self.numerics
        index = (layer[0],)
        q = self._queries(x, layer[0])
        q_nope = q[..., : config.qk_nope_head_dim]
        q_rope = numerics.round(rope(q[..., config.qk_nope_head_dim :], table))
        kv = numerics.linear(x, self.kv_a[...], index)
        c = rms_norm(kv[..., : config.kv_lora_rank], self.kv_norm[...][layer[0]], config.rms_norm_eps)
        k_rope = rope(kv[..., config.kv_lora_rank :], table)
        rows = numerics.round(jnp.concatenate([c, k_rope], axis=-1))
        latent = write(latent, layer[1], positions, valid, rows)
        forms = {"absorbed": absorbed_attention, "naive": naive_attention}
        attention = forms[choose_form(x.shape[1], config, numerics)]
        filled = positions[:, 0] + valid.sum(axis=1, dtype=jnp.int32)
        out = attention(q_nope, q_rope, latent, self.kv_b[...], layer, positions, filled, blocks, config, numerics)
        return numerics.linear(out.reshape(*x.shape[:2], -1), self.o[...], index), latent
