"""Multi-head latent attention over cached latents, in its absorbed and naive forms; V3.2's over the chosen ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int32

from dsjax.cache import Cache
from dsjax.cache.per_token import row_format
from dsjax.cache.rows import Rows, gather_rows, read_rows, row_block, write_rows
from dsjax.config import V3Config
from dsjax.layers.attend import Call, attend, attend_once, einsum, slice_queries
from dsjax.layers.norm import rms_norm
from dsjax.layers.query_blocks import by_query_blocks, gathered_queries
from dsjax.layers.rope import RopeTable, rope, rope_frequencies, rope_magnitude, rope_table
from dsjax.layers.token_indexer import TokenIndexer
from dsjax.numerics import Numerics
from dsjax.params import Tree
from quant import QArray, block_scaled_dot, dequantise, retile, take_tile, tile_dot, transposed_tile_dot
from quant.matmul import TILE_BYTES
from quant.operator import operator
from sharding import UNSPLIT, Rules


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


Latents = Callable[[Any], Float[Array, "B S A"]]
"""Block of cached positions -> their rows; those not there are zero."""


def absorbed(
    q_nope: Float[Array, "B T H N"],
    q_rope: Float[Array, "B T H R"],
    kv_b: jax.Array | QArray,
    layer: Any,
    context: Callable[[jax.Array], jax.Array],
    config: V3Config,
    numerics: Numerics,
) -> Float[Array, "B T H U"]:
    """Attention on the latents themselves: kv_b is applied to queries and outputs instead of keys (spec V3 2.4).

    Args:
      q_nope: [B, T, H, N]; q_rope: [B, T, H, R], rotated.
      kv_b: stack of [HG, C]; in native it is dequantised to bfloat16 here, and activations are not quantised.
      layer: index into the weight stack.
      context: queries [B, T, H, A] against rows [., A] -> float32 [B, T, H, C], sums of latents by probability.

    Returns:
      [B, T, H, U] in the activation dtype.
    """
    b, t, h, n = q_nope.shape
    c, u = config.kv_lora_rank, config.v_head_dim
    g = n + u

    index: tuple[Any, ...] = (layer,)
    if not numerics.form.fused_tokens:
        # It is used twice, across and along its rows: XLA:TPU would turn the whole stack over for one of them.
        kv_b, index = lax.optimization_barrier(take_tile(kv_b, index, 0, kv_b.shape[-2], stride=0)), ()

    # The fused products decode nothing; all others, and native's rounding of kv_b, a few heads at a time.
    fused = b * t <= numerics.form.fused_tokens and not numerics.native
    heads = h if fused else max(1, TILE_BYTES // 4 // (g * c))
    while h % heads:
        heads -= 1

    @jax.named_scope("absorb")
    def over_heads(dot: Callable[..., jax.Array], x: jax.Array, first: int, rows: int) -> jax.Array:
        """x [B, T, H, .] times `rows` rows from `first` of each head's part of kv_b, a group of heads at a time."""

        def one(i: Any) -> jax.Array:
            tile = take_tile(kv_b, index, i * heads * g, heads * g, stride=heads * g if heads < h else 0)
            if numerics.native:
                tile = numerics.round(dequantise(tile)) if isinstance(tile, QArray) else numerics.round(tile)
            group = lax.dynamic_slice_in_dim(x, i * heads, heads, axis=2)
            group = jnp.moveaxis(group, 2, 0).reshape(heads, b * t, -1)
            return numerics.round(dot(rows_of_heads(tile, heads, first, rows), group, numerics.form))

        out = one(0) if h == heads else lax.scan(lambda _, i: (None, one(i)), None, jnp.arange(h // heads))[1]
        return jnp.moveaxis(out.reshape(h, b, t, -1), 0, 2)

    q_latent = over_heads(transposed_tile_dot, q_nope, 0, n)
    out = numerics.round(context(jnp.concatenate([q_latent, q_rope], axis=-1)))
    return over_heads(tile_dot, out, n, u)


def absorbed_attention(
    q_nope: Float[Array, "B T H N"],
    q_rope: Float[Array, "B T H R"],
    latents: Latents,
    kv_b: jax.Array | QArray,
    layer: Any,
    call: Call,
    block: int,
    config: V3Config,
    numerics: Numerics,
) -> Float[Array, "B T H U"]:
    """Absorbed attention on all cached positions (spec V3 2.4).

    Args:
      q_nope: [B, T, H, N]; q_rope: [B, T, H, R], rotated.
      latents: the cached rows, `block` positions at a time, the new ones already written.
      kv_b: stack of [HG, C].
      layer: index into the weight stack.

    Returns:
      [B, T, H, U] in the activation dtype.
    """
    c = config.kv_lora_rank

    def context(query: jax.Array) -> jax.Array:
        def score(keys: jax.Array, first: Any, size: int) -> jax.Array:
            return einsum("btha,bsa->bhts", slice_queries(query, first, size), keys) * config.softmax_scale

        def value(p: jax.Array, keys: jax.Array) -> jax.Array:
            return einsum("bhts,bsc->bhtc", p, keys[..., :c])

        return attend(latents, score, value, call, block, query.shape[2], c, numerics)

    return absorbed(q_nope, q_rope, kv_b, layer, context, config, numerics)


def naive_attention(
    q_nope: Float[Array, "B T H N"],
    q_rope: Float[Array, "B T H R"],
    latents: Latents,
    kv_b: jax.Array | QArray,
    layer: Any,
    call: Call,
    block: int,
    config: V3Config,
    numerics: Numerics,
) -> Float[Array, "B T H U"]:
    """Attention on keys and values expanded from the latents, a block at a time (spec V3 2.4).

    Arguments and result as `absorbed_attention`; in native, kv_b is an FP8 product with quantised latents. With INT8
    activations the latents are not quantised, as they are not in the absorbed form, which deployed engines decode with:
    the two are equal, and either may be chosen.
    """
    h, n = q_nope.shape[2:]
    c, u = config.kv_lora_rank, config.v_head_dim

    query = jnp.concatenate([q_nope, q_rope], axis=-1)

    @jax.named_scope("expand")
    def load(j: Any) -> tuple[jax.Array, jax.Array]:
        rows = latents(j)
        if numerics.native:
            kv = numerics.linear(rows[..., :c], kv_b, (layer,))
        else:
            kv = numerics.round(block_scaled_dot(rows[..., :c], kv_b, (layer,), numerics.form))
        kv = kv.reshape(*rows.shape[:2], h, n + u)
        k_rope = jnp.broadcast_to(rows[:, :, None, c:], (*kv.shape[:-1], rows.shape[-1] - c))
        return jnp.concatenate([kv[..., :n], k_rope], axis=-1), kv[..., n:]

    def score(keys: tuple[jax.Array, jax.Array], first: Any, size: int) -> jax.Array:
        return einsum("bthk,bshk->bhts", slice_queries(query, first, size), keys[0]) * config.softmax_scale

    def value(p: jax.Array, keys: tuple[jax.Array, jax.Array]) -> jax.Array:
        return einsum("bhts,bshu->bhtu", p, keys[1])

    return numerics.round(attend(load, score, value, call, block, h, u, numerics))


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


@operator("mla", first="auto")
def mla(
    q_nope: Float[Array, "B T H N"],
    q_rope: Float[Array, "B T H R"],
    rows: Rows,
    kv_b: jax.Array | QArray,
    layer: tuple[Any, Any],
    call: Call,
    config: V3Config,
    numerics: Numerics,
) -> Float[Array, "B T H U"]:
    """Attention on all cached latents, in the form that `choose_form` says (spec V3 2.4).

    Args:
      q_nope: [B, T, H, N]; q_rope: [B, T, H, R], rotated.
      rows: the cache's, the new ones already written.
      kv_b: stack of [HG, C].
      layer: (index into the weight stack, index into the cache).

    Returns:
      [B, T, H, U] in the activation dtype.
    """
    (index, place), row, size = layer, row_format(config, numerics), row_block(rows.shape[2])

    def latents(j: Any) -> jax.Array:
        return row.decode(read_rows(rows, place, j, size, call.end))

    form = {"absorbed": absorbed_attention, "naive": naive_attention}[choose_form(q_nope.shape[1], config, numerics)]
    return form(q_nope, q_rope, latents, kv_b, index, call, size, config, numerics)


def _in_form(form: str, args: Any) -> jax.Array:
    *arrays, numerics = args
    out: jax.Array = mla.variants["auto"].body(*arrays, dataclasses.replace(numerics, mla=form))
    return out


@mla.variant("absorbed", bound=1e-5)
def _absorbed(*args: Any) -> jax.Array:
    """On the latents themselves, kv_b applied to queries and outputs."""
    return _in_form("absorbed", args)


@mla.variant("naive", bound=1e-5)
def _naive(*args: Any) -> jax.Array:
    """On keys and values expanded from the latents."""
    return _in_form("naive", args)


@operator("sparse_mla", first="gather")
def sparse_mla(
    q_nope: Float[Array, "B T H N"],
    q_rope: Float[Array, "B T H R"],
    rows: Rows,
    chosen: Int32[Array, "B T k"],
    kv_b: jax.Array | QArray,
    layer: tuple[Any, Any],
    config: V3Config,
    numerics: Numerics,
) -> Float[Array, "B T H U"]:
    """Absorbed attention on the chosen positions, gathered for a few queries at a time (spec V3 2.8).

    Args:
      chosen: int32 [B, T, k], positions, -1 for none.
      q_nope, q_rope, rows, kv_b, layer: as in `mla`.
    """
    (index, place), row, c = layer, row_format(config, numerics), config.kv_lora_rank

    def block(_: Any, query: jax.Array, chosen: jax.Array) -> jax.Array:
        keys = row.decode(gather_rows(rows, place, chosen))
        scores = einsum("btha,btka->bthk", query, keys) * config.softmax_scale
        # Not -inf: an empty slot's padding has no key at all, and must not become NaN.
        scores = jnp.where((chosen >= 0)[:, :, None], scores, jnp.finfo(jnp.float32).min)
        p, total = attend_once(scores, numerics)
        return einsum("bthk,btkc->bthc", p, keys[..., :c]) / total

    def context(query: jax.Array) -> jax.Array:
        size = gathered_queries(query.shape[0], chosen.shape[-1], config.latent_dim)
        return by_query_blocks(block, size, query, chosen)

    return absorbed(q_nope, q_rope, kv_b, index, context, config, numerics)


class Attention(nnx.Module):
    """MLA. Leaves stacked over layers: kv_a, kv_norm, kv_b, o; q_a, q_norm, q_b, or q where q_lora_rank is null.

    With an indexer, a query attends to the tokens it chooses, once more are there than it may choose. Where heads are
    split, each device has all latents and its own heads' queries; what they give is summed after the output projection.
    """

    def __init__(
        self, config: V3Config, numerics: Numerics, params: Tree, indexer: Tree | None = None, rules: Rules = UNSPLIT
    ) -> None:
        self.config = config
        self.numerics = numerics
        self.rules = rules
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
        self.indexer = TokenIndexer(config, numerics, indexer) if indexer is not None else None

    def _queries(self, x: jax.Array, layer: Any) -> tuple[jax.Array, jax.Array]:
        """Queries [B, T, H, K], and what they are made of: compressed [B, T, Q], or x."""
        linear, round_, low = self.numerics.linear, self.numerics.round, x
        if self.config.q_lora_rank is None:
            q = linear(x, self.q[...], (layer,))
        else:
            low = linear(x, self.q_a[...], (layer,))
            low = round_(rms_norm(low, self.q_norm[...][layer], self.config.rms_norm_eps))
            q = linear(low, self.q_b[...], (layer,))
        return q.reshape(*x.shape[:2], -1, self.config.qk_head_dim), low

    def __call__(
        self, x: Float[Array, "B T D"], cache: Cache, layer: tuple[Any, Any], call: Call
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Writes the new rows, then attends.

        Args:
          x: [B, T, D].
          cache: of all layers.
          layer: (index into the weight stack, index into the cache).

        Returns:
          [B, T, D], and the cache with the new rows; its length is the caller's to advance.
        """
        config, numerics, (index, place) = self.config, self.numerics, layer
        row = row_format(config, numerics)
        with jax.named_scope("queries"):
            q, low = self._queries(x, index)
            q_nope = q[..., : config.qk_nope_head_dim]
            q_rope = numerics.round(rope(q[..., config.qk_nope_head_dim :], call.table))
        with jax.named_scope("latent"):
            kv = numerics.linear(x, self.kv_a[...], (index,))
            c = rms_norm(kv[..., : config.kv_lora_rank], self.kv_norm[...][index], config.rms_norm_eps)
            k_rope = rope(kv[..., config.kv_lora_rank :], call.table)
            new = row.encode(numerics.round(jnp.concatenate([c, k_rope], axis=-1)))
            cache = dataclasses.replace(cache, rows=write_rows(cache.rows, place, call.positions, call.valid, new))
        if self.indexer is not None:
            cache = self.indexer.remember(x, cache, layer, call)

        def dense() -> jax.Array:
            return mla(q_nope, q_rope, cache.rows, self.kv_b[...], layer, call, config, numerics)

        def sparse() -> jax.Array:
            assert self.indexer is not None
            chosen = self.indexer.choose(x, low, cache, layer, call)
            return sparse_mla(q_nope, q_rope, cache.rows, chosen, self.kv_b[...], layer, config, numerics)

        with jax.named_scope("attend"):
            if config.indexer is None or cache.capacity <= config.indexer.topk:
                out = dense()
            else:
                out = lax.cond(call.end.max() <= config.indexer.topk, dense, sparse)
        with jax.named_scope("output"):
            out = out.reshape(*x.shape[:2], -1)
            total, largest = partial(self.rules.sum, "heads"), partial(self.rules.largest, "heads")
            return numerics.linear(out, self.o[...], (index,), total, largest), cache
