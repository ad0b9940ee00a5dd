"""Multi-head latent attention over a latent cache, in its absorbed and naive forms.

Both read the cache a block of positions at a time (`key_block`) and never hold scores for more, so temporary memory
does not grow with the cache's capacity, and work grows with the tokens present.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from dsjax.cache import Latent, key_block, read_block, write
from dsjax.config import V3Config
from dsjax.layers.norm import rms_norm
from dsjax.layers.rope import RopeTable, rope, rope_frequencies, rope_magnitude, rope_table
from dsjax.numerics import Numerics
from dsjax.params import Tree
from quant import QArray, dequantise, retile, take_tile, tile_dot, transposed_tile_dot
from quant.formats import exact_divide
from quant.matmul import FUSED_TOKENS, TILE_BYTES

QUERY_BLOCK = 128
"""Queries scored at a time: their scores against a key block (2 MB with 16 heads) then stay in a core's cache."""

Keys: TypeAlias = Any
"""What a form of attention loads of one key block."""


def _einsum(spec: str, *operands: jax.Array) -> jax.Array:
    """Products summed in float32: of bfloat16 operands where all are, else in float32."""
    if all(o.dtype == jnp.bfloat16 for o in operands):
        return jnp.einsum(spec, *operands, preferred_element_type=jnp.float32)
    return jnp.einsum(spec, *(o.astype(jnp.float32) for o in operands), precision=lax.Precision.HIGHEST)


def attend(
    load: Callable[[Any], Keys],
    score: Callable[[Keys, Any, int], jax.Array],
    value: Callable[[jax.Array, Keys], jax.Array],
    positions: Int32[Array, "B T"],
    blocks: Int32[Array, ""],
    block: int,
    heads: int,
    width: int,
    numerics: Numerics,
) -> Float32[Array, "B T H width"]:
    """softmax(scores) @ values, a block of keys by a block of queries at a time, in float32; causal.

    In plain, one pass with a running maximum (online softmax). In native, two passes: probabilities are rounded to
    bfloat16 after they are normalised by the whole row, as in DeepSeek's code, so the row's sum must come first.

    Args:
      load: key block -> whatever score and value need of it.
      score: (keys, first query, queries) -> float32 [B, H, queries, keys]. Heads lead, as in the products, so that no
        pass over the scores transposes them.
      value: (probabilities [B, H, queries, keys], keys) -> float32 [B, H, queries, width].
      positions: int32 [B, T] of the queries, consecutive; every query sees a key of block 0.
      blocks: int32 [], number of key blocks to visit, at least one.
      block: keys in one.
      heads, width: H, and of a value.
    """
    b, t = positions.shape
    size = QUERY_BLOCK if t % QUERY_BLOCK == 0 else t
    start = positions[:, :1]

    def scores(keys: Keys, j: Any, first: Any) -> jax.Array:
        s = score(keys, first, size)
        query = start + first + jnp.arange(size)
        key = j * block + jnp.arange(block)
        return jnp.where((key <= query[..., None])[:, None], s, -jnp.inf)

    def over_queries(j: Any, keys: Keys, f: Callable[..., Any], state: Any) -> Any:
        """state, arrays [B, H, T, ...], updated by f(scores, part of the state) for every block of queries."""
        if size == t:
            return f(scores(keys, j, 0), state)

        def one(i: Any, state: Any) -> Any:
            part = [lax.dynamic_slice_in_dim(a, i * size, size, axis=2) for a in state]
            part = f(scores(keys, j, i * size), part)
            return [lax.dynamic_update_slice_in_dim(a, p, i * size, axis=2) for a, p in zip(state, part, strict=True)]

        # Queries before the block's first key see none of it.
        first = jnp.clip((j * block - start.max()) // size, 0, t // size)
        return lax.fori_loop(first, t // size, one, state)

    def advance(s: jax.Array, top: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        new_top = jnp.maximum(top, s.max(axis=-1))
        decay = jnp.exp(top - new_top)
        return new_top, total * decay + jnp.exp(s - new_top[..., None]).sum(axis=-1), decay

    shape = (b, heads, t)
    state = [jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, width))]
    if numerics.native:

        def measure(j: jax.Array, state: list[jax.Array]) -> list[jax.Array]:
            return over_queries(j, load(j), lambda s, part: list(advance(s, *part)[:2]), state)

        top_total = lax.fori_loop(0, blocks, measure, state[:2])

        def add(j: jax.Array, state: list[jax.Array]) -> list[jax.Array]:
            keys = load(j)

            def f(s: jax.Array, part: list[jax.Array]) -> list[jax.Array]:
                top, total, out = part
                p = exact_divide(jnp.exp(s - top[..., None]), total[..., None])
                return [top, total, out + value(numerics.round(p), keys)]

            return over_queries(j, keys, f, state)

        return jnp.swapaxes(lax.fori_loop(0, blocks, add, [*top_total, state[2]])[2], 1, 2)

    def online(j: jax.Array, state: list[jax.Array]) -> list[jax.Array]:
        keys = load(j)

        def f(s: jax.Array, part: list[jax.Array]) -> list[jax.Array]:
            top, total, out = part
            new_top, total, decay = advance(s, top, total)
            p = numerics.round(jnp.exp(s - new_top[..., None]))
            return [new_top, total, out * decay[..., None] + value(p, keys)]

        return over_queries(j, keys, f, state)

    _, total, out = lax.fori_loop(0, blocks, online, state)
    return jnp.swapaxes(out / total[..., None], 1, 2)


def _slice_queries(x: jax.Array, first: Any, size: int) -> jax.Array:
    """[B, T, ...] -> [B, size, ...]."""
    return x if size == x.shape[1] else lax.dynamic_slice_in_dim(x, first, size, axis=1)


def rows_of_heads(tile: jax.Array | QArray, heads: int, first: int, rows: int) -> jax.Array | QArray:
    """[heads * G, C] -> [heads, rows, C]: `rows` rows from `first` of each head's G."""
    if not isinstance(tile, QArray):
        return tile.reshape(heads, -1, tile.shape[-1])[:, first : first + rows]
    n = tile.shape[0]
    # A scale block must not be cut by a head's end, nor by `first` or `rows`.
    block = math.gcd(tile.block[0] or n, n // heads, first, rows)
    tile = retile(tile, (block, tile.block[1]))
    codes = tile.codes.reshape(heads, n // heads, -1)[:, first : first + rows]
    if tile.scales is None:
        return dataclasses.replace(tile, codes=codes)
    scales = tile.scales.reshape(heads, n // heads // block, -1)[:, first // block : (first + rows) // block]
    return dataclasses.replace(tile, codes=codes, scales=scales)


def absorbed_attention(
    q_nope: Float[Array, "B T H N"],
    q_rope: Float[Array, "B T H R"],
    latent: Latent,
    kv_b: jax.Array | QArray,
    layer: tuple[Any, Any],
    positions: Int32[Array, "B T"],
    filled: Int32[Array, " B"],
    blocks: Int32[Array, ""],
    config: V3Config,
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

    # The fused products decode nothing; all others, and native's rounding of kv_b, a few heads at a time.
    fused = b * t <= FUSED_TOKENS and not numerics.native
    heads = h if fused else max(1, TILE_BYTES // 4 // (g * c))
    while h % heads:
        heads -= 1

    @jax.named_scope("absorb")
    def over_heads(dot: Callable[..., jax.Array], x: jax.Array, first: int, rows: int) -> jax.Array:
        """x [B, T, H, .] times `rows` rows from `first` of each head's part of kv_b, a group of heads at a time."""

        def one(i: Any) -> jax.Array:
            tile = take_tile(kv_b, (weight_layer,), i * heads * g, heads * g, stride=heads * g if heads < h else 0)
            if numerics.native:
                tile = numerics.round(dequantise(tile)) if isinstance(tile, QArray) else numerics.round(tile)
            group = lax.dynamic_slice_in_dim(x, i * heads, heads, axis=2)
            group = jnp.moveaxis(group, 2, 0).reshape(heads, b * t, -1)
            return numerics.round(dot(rows_of_heads(tile, heads, first, rows), group))

        out = one(0) if h == heads else lax.scan(lambda _, i: (None, one(i)), None, jnp.arange(h // heads))[1]
        return jnp.moveaxis(out.reshape(h, b, t, -1), 0, 2)

    q_latent = over_heads(transposed_tile_dot, q_nope, 0, n)
    query = jnp.concatenate([q_latent, q_rope], axis=-1)

    def load(j: Any) -> jax.Array:
        return read_block(latent, cache_layer, j, filled)

    def score(keys: jax.Array, first: Any, size: int) -> jax.Array:
        return _einsum("btha,bsa->bhts", _slice_queries(query, first, size), keys) * config.softmax_scale

    def value(p: jax.Array, keys: jax.Array) -> jax.Array:
        return _einsum("bhts,bsc->bhtc", p, keys[..., :c])

    context = numerics.round(attend(load, score, value, positions, blocks, key_block(latent.shape[2]), h, c, numerics))
    return over_heads(tile_dot, context, n, u)


def naive_attention(
    q_nope: Float[Array, "B T H N"],
    q_rope: Float[Array, "B T H R"],
    latent: Latent,
    kv_b: jax.Array | QArray,
    layer: tuple[Any, Any],
    positions: Int32[Array, "B T"],
    filled: Int32[Array, " B"],
    blocks: Int32[Array, ""],
    config: V3Config,
    numerics: Numerics,
) -> Float[Array, "B T H U"]:
    """Attention on keys and values expanded from the latent, a block at a time (spec V3 2.4).

    Arguments and result as `absorbed_attention`; in native, kv_b is an FP8 product with quantised latents.
    """
    b, _, h, n = q_nope.shape
    c, u = config.kv_lora_rank, config.v_head_dim
    weight_layer, cache_layer = layer

    query = jnp.concatenate([q_nope, q_rope], axis=-1)

    @jax.named_scope("expand")
    def load(j: Any) -> tuple[jax.Array, jax.Array]:
        rows = read_block(latent, cache_layer, j, filled)
        kv = numerics.linear(rows[..., :c], kv_b, (weight_layer,)).reshape(b, rows.shape[1], h, n + u)
        k_rope = jnp.broadcast_to(rows[:, :, None, c:], (*kv.shape[:-1], rows.shape[-1] - c))
        return jnp.concatenate([kv[..., :n], k_rope], axis=-1), kv[..., n:]

    def score(keys: tuple[jax.Array, jax.Array], first: Any, size: int) -> jax.Array:
        return _einsum("bthk,bshk->bhts", _slice_queries(query, first, size), keys[0]) * config.softmax_scale

    def value(p: jax.Array, keys: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _einsum("bhts,bshu->bhtu", p, keys[1])

    return numerics.round(attend(load, score, value, positions, blocks, key_block(latent.shape[2]), h, u, numerics))


def mla_rope_table(config: V3Config, positions: Int32[Array, "B T"]) -> RopeTable:
    """cos and sin of MLA's rotary channels, float32 [B, T, R/2] each."""
    frequencies = rope_frequencies(config.qk_rope_head_dim, config.rope_theta, config.yarn)
    return rope_table(frequencies, positions, rope_magnitude(config))


def choose_form(tokens: int, config: V3Config, numerics: Numerics) -> str:
    """ "absorbed" or "naive": as asked; else absorbed in native, the one with fewer operations in plain.

    For T queries and S keys, absorbed takes T C (N + U) + T S (2 C + R) multiply-adds per head, naive takes
    S C (N + U) + T S (N + R + U). S is not known here; they are compared at S = 4 T.
    """
    if numerics.mla != "auto":
        return numerics.mla
    c, g, r = config.kv_lora_rank, config.qk_nope_head_dim + config.v_head_dim, config.qk_rope_head_dim
    absorbed, naive = c * g + 4 * tokens * (2 * c + r), 4 * c * g + 4 * tokens * (g + r)
    return "naive" if naive <= absorbed and not numerics.native else "absorbed"


class Attention(nnx.Module):
    """MLA. Leaves stacked over layers: kv_a, kv_norm, kv_b, o; q_a, q_norm, q_b, or q where q_lora_rank is null."""

    def __init__(self, config: V3Config, numerics: Numerics, params: Tree) -> None:
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
        with jax.named_scope("queries"):
            q = self._queries(x, layer[0])
            q_nope = q[..., : config.qk_nope_head_dim]
            q_rope = numerics.round(rope(q[..., config.qk_nope_head_dim :], table))
        with jax.named_scope("latent"):
            kv = numerics.linear(x, self.kv_a[...], index)
            c = rms_norm(kv[..., : config.kv_lora_rank], self.kv_norm[...][layer[0]], config.rms_norm_eps)
            k_rope = rope(kv[..., config.kv_lora_rank :], table)
            rows = numerics.round(jnp.concatenate([c, k_rope], axis=-1))
            latent = write(latent, layer[1], positions, valid, rows)
        forms = {"absorbed": absorbed_attention, "naive": naive_attention}
        attention = forms[choose_form(x.shape[1], config, numerics)]
        filled = positions[:, 0] + valid.sum(axis=1, dtype=jnp.int32)
        with jax.named_scope("attend"):
            out = attention(q_nope, q_rope, latent, self.kv_b[...], layer, positions, filled, blocks, config, numerics)
        with jax.named_scope("output"):
            return numerics.linear(out.reshape(*x.shape[:2], -1), self.o[...], index), latent
