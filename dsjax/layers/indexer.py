"""The lightning indexer: which cached keys a query reads (spec V3 2.8, V4 2.5)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from dsjax.cache.rows import INDEX_BLOCK, Rows, read_rows, row_block
from dsjax.layers.query_blocks import by_query_blocks, scanned_queries
from dsjax.layers.top_k import top_k
from quant.operator import operator
from quant.rows import RowFormat


def index_scores(
    q: Float[Array, "B T I X"], weights: Float[Array, "B T I"], keys: Float[Array, "B S X"], *, rounded: bool
) -> Float32[Array, "B T S"]:
    """I[t, s] = sum_h weights[t, h] relu(q[t, h] . keys[s]).

    Args:
      q: [B, T, heads, X]; weights: [B, T, heads], already scaled; keys: [B, entries, X].
      rounded: round products, their weighted values and the sum to bfloat16, as DeepSeek's code does for V4; exact
        ties are then common.
    """
    precision = None if q.dtype == jnp.bfloat16 else lax.Precision.HIGHEST
    s = jnp.einsum("btix,bsx->btis", q, keys, precision=precision, preferred_element_type=jnp.float32)
    if not rounded:
        return jnp.einsum("btis,bti->bts", jax.nn.relu(s), weights.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    s = jax.nn.relu(_bfloat16(s))
    return _bfloat16(_bfloat16(s * weights[..., None].astype(jnp.float32)).sum(axis=2))


def _bfloat16(x: jax.Array) -> jax.Array:
    """float32 rounded to bfloat16's values."""
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


@operator("lightning_indexer")
def lightning_indexer(
    q: Float[Array, "B T I X"],
    weights: Float[Array, "B T I"],
    keys: Rows,
    layer: Any,
    visible: Int32[Array, "B T"],
    k: int,
    row: RowFormat,
    *,
    rounded: bool,
) -> Int32[Array, "B T k"]:
    """Numbers of the k visible keys with the highest scores, -1 where fewer are visible; of equal scores the older.

    Keys are scanned block by block beside the best so far, for a few queries at a time: work grows with the keys that
    the longest sequence has, memory with neither.

    Args:
      q, weights, rounded: of `index_scores`.
      keys: [L, B, places, width] rows of indexer keys.
      layer: index into them.
      visible: int32 [B, T]; keys below it may be chosen.
      k: index_topk, less than the number of places.
      row: how keys are held.
    """
    size = row_block(keys.shape[2], max(INDEX_BLOCK, 1 << (k - 1).bit_length()))
    count = visible.max(axis=1)

    def choose(_: Any, q: jax.Array, weights: jax.Array, visible: jax.Array) -> jax.Array:
        b, t = visible.shape

        def body(j: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            block = row.decode(read_rows(keys, layer, j, size, count))
            numbers = j * size + jnp.arange(size, dtype=jnp.int32)
            scores = index_scores(q, weights, block, rounded=rounded)
            scores = jnp.where(numbers < visible[..., None], scores, -jnp.inf)
            values = jnp.concatenate([best[0], scores], axis=-1).reshape(b * t, -1)
            names = jnp.concatenate([best[1], jnp.broadcast_to(numbers, scores.shape)], axis=-1).reshape(b * t, -1)
            top, at = top_k(values, k)
            return top.reshape(b, t, k), jnp.take_along_axis(names, at, axis=-1).reshape(b, t, k)

        start = jnp.full((b, t, k), -jnp.inf), jnp.full((b, t, k), -1, jnp.int32)
        blocks = (visible.max() + size - 1) // size
        scores, chosen = lax.fori_loop(0, blocks, body, start)
        return jnp.where(scores > -jnp.inf, chosen, -1)

    return by_query_blocks(choose, scanned_queries(q.shape[0], q.shape[2], size), q, weights, visible)
