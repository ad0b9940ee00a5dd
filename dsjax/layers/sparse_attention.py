"""V4's attention: shared keys and values, a sliding window, and compressed entries - all of them or a chosen few.

Queries are taken a block at a time. Each block sees a band of the window and, in pieces, the entries; temporary memory
is bounded by a block of queries and a piece of keys, whatever the cache holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, Shaped

from dsjax.cache.rows import gather_rows, read_rows, row_block, zero_unless
from dsjax.cache.v4 import (
    SHORT_STEP,
    Compressed,
    V4Cache,
    index_format,
    kv_format,
    read_ring,
    ring_positions,
    write_ring,
)
from dsjax.config import V4Config
from dsjax.config.v4 import CSA, HCA
from dsjax.layers.compressor import Compressor, compressor
from dsjax.layers.indexer import lightning_indexer
from dsjax.layers.norm import head_norm, rms_norm
from dsjax.layers.query_blocks import QUERY_BLOCK, by_query_blocks, gathered_queries
from dsjax.layers.rope import RopeTable, inverse, rope_tail
from dsjax.layers.sink_attention import Keys, sink_attention
from dsjax.numerics import Numerics
from dsjax.params import Tree
from quant import E2M1, batched_dot, fake_quantise, hadamard, split_rows
from quant.operator import operator
from quant.rows import INDEX_GROUP, RowFormat
from sharding import UNSPLIT, Rules, gather, scatter_sum


@dataclasses.dataclass(frozen=True)
class Call:
    """What every layer of one step shares.

    Attributes:
      positions: int32 [B, T]; valid: bool [B, T]; ids: int32 [B, T].
      main, compress: rotary tables of the tokens' positions, for layers without and with a compressor.
      entries: by ratio, the rotary table of the entries that this step can complete.
    """

    positions: jax.Array
    valid: jax.Array
    ids: jax.Array
    main: RopeTable
    compress: RopeTable
    entries: dict[int, Any]  # RopeTables, each of a length of its own

    @property
    def start(self) -> jax.Array:
        """int32 [B], the first new position."""
        return self.positions[:, 0]

    @property
    def end(self) -> jax.Array:
        """int32 [B], the position after the last new one."""
        return self.start + self.valid.sum(axis=1, dtype=jnp.int32)


WindowKeys = Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]
"""(number of the first query, positions int32 [B, q]) -> (keys [B, S, U], bool [B, q, S], who is seen by whom)."""


def ring_keys(ring: Shaped[Array, "B R width"], row: RowFormat, window: int, call: Call) -> WindowKeys:
    """What queries see of the window, all of it in the ring: for short steps, whose keys are there already."""
    held = ring_positions(call.end, ring.shape[1])
    keys = row.decode(zero_unless((held >= 0) & (held > call.start[:, None] - window), ring))

    def load(_: Any, query: jax.Array) -> tuple[jax.Array, jax.Array]:
        position = held[:, None]
        seen = (position <= query[..., None]) & (position > query[..., None] - window) & (position >= 0)
        return keys, seen

    return load


def band_keys(
    ring: Shaped[Array, "B R width"], new: Shaped[Array, "B T width"], row: RowFormat, window: int, call: Call
) -> WindowKeys:
    """What queries see of the window: the ring as it was before this step, and a band of the new keys."""
    back = window - 1
    held = ring_positions(call.start, ring.shape[1])
    kept = (held >= 0) & (held >= call.start[:, None] - back)
    old = row.decode(zero_unless(kept, ring))
    # In front of the first new key as many as a query looks back, so that all queries' slices are equal.
    rows = jnp.pad(new, [(0, 0), (back, QUERY_BLOCK), (0, 0)])

    def load(first: Any, query: jax.Array) -> tuple[jax.Array, jax.Array]:
        size = back + query.shape[1]
        band = row.decode(lax.dynamic_slice_in_dim(rows, first, size, axis=1))
        key = call.start[:, None] + first - back + jnp.arange(size)
        seen_old = kept[:, None] & (held[:, None] >= query[..., None] - back)
        own = (key[:, None] <= query[..., None]) & (key[:, None] >= query[..., None] - back)
        seen_new = own & (key >= call.start[:, None])[:, None]
        return jnp.concatenate([old, band], axis=1), jnp.concatenate([seen_old, seen_new], axis=-1)

    return load


def grouped_output(
    out: Float[Array, "B T H U"], o_a: Any, o_b: Any, layer: Any, numerics: Numerics, rules: Rules = UNSPLIT
) -> Float[Array, "B T D"]:
    """The low-rank projection: each group of heads by its own matrix, then all together (spec V4 2.3, step 8).

    Where devices share a group, each either has its own heads' channels of the group's matrix: partial products are
    summed in float32 and each keeps its part of the sum, for which it has the channels of o_b. Or each has all of the
    group's matrices: then heads are gathered first (spec V4 6.2).

    Args:
      out: [B, T, H, U], its rotation undone.
      o_a: stack of [G O, J U]; its input is not quantised, neither in native nor to INT8.
      o_b: stack of [D, G O].
      layer: index into the stacks.
      rules: o_a is split over "o_groups" and "group_heads", o_b over "o_low".
    """
    b, t = out.shape[:2]
    here = rules.axes("o_groups", "group_heads")
    out = gather(out, tuple(axis for axis in rules.axes("heads") if axis not in here), dim=2)
    out = out.reshape(b * t, -1, o_a.shape[-1])
    groups = out.shape[1]
    low = batched_dot(jnp.moveaxis(out, 1, 0), split_rows(o_a, groups), (layer,), numerics.form)
    low = scatter_sum(low, rules.axes("group_heads"), dim=2)
    low = numerics.round(jnp.moveaxis(low, 0, 1)).reshape(b, t, -1)
    return numerics.linear(low, o_b, (layer,), partial(rules.sum, "o_low"), partial(rules.largest, "o_low"))


class SparseAttention:
    """One attention layer of any ratio, bound to its parameters and its place.

    Args:
      config, numerics: static.
      params: the stack "attention" of all layers, and with a ratio "compressor" (and "indexer") of those that have it.
      ratio: 0, 4 or 128.
      layer: index into the stack of all layers, and into the cache's windows.
      place: index into the stack of the layers with this ratio, and into their part of the cache.
      rules: how heads are split; keys, compressors and the indexer are not.
    """

    def __init__(
        self,
        config: V4Config,
        numerics: Numerics,
        params: Tree,
        compressed: Tree,
        ratio: int,
        layer: Any,
        place: Any,
        rules: Rules = UNSPLIT,
    ) -> None:
        self.config, self.numerics, self.rules = config, numerics, rules
        self.params, self.compressed = params, compressed
        self.ratio, self.layer, self.place = ratio, layer, place
        self.kv_row, self.index_row = kv_format(config, numerics), index_format(config, numerics)

    def __call__(self, x: Float[Array, "B T D"], cache: V4Cache, call: Call) -> tuple[Float[Array, "B T D"], V4Cache]:
        """Attends, and remembers the new tokens.

        Args:
          x: [B, T, D], normalised.

        Returns:
          [B, T, D], and the cache with this layer's state advanced; its length is not.
        """
        config, numerics, params = self.config, self.numerics, self.params
        eps, index, window = config.rms_norm_eps, (self.layer,), config.sliding_window
        table = call.compress if self.ratio else call.main
        with jax.named_scope("queries"):
            low = numerics.linear(x, params["q_a"], index)
            low = numerics.round(rms_norm(low, params["q_norm"][self.layer], eps))
            q = numerics.linear(low, params["q_b"], index)
            q = q.reshape(*x.shape[:2], -1, config.head_dim)
            q = rope_tail(head_norm(q, eps, numerics), table, numerics)
        with jax.named_scope("keys"):
            kv = numerics.linear(x, params["kv"], index)
            kv = numerics.round(rms_norm(kv, params["kv_norm"][self.layer], eps))
            new = self.kv_row.encode(rope_tail(kv, table, numerics))
            ring = write_ring(cache.window, self.layer, call.positions, call.valid, new)
            if x.shape[1] <= SHORT_STEP:
                keys = ring_keys(read_ring(ring, self.layer), self.kv_row, window, call)
            else:
                keys = band_keys(read_ring(cache.window, self.layer), new, self.kv_row, window, call)
            cache = dataclasses.replace(cache, window=ring)
        if self.ratio:
            cache = self._compress(x, cache, call)
        with jax.named_scope("indexer"):
            chosen = self.choose(low, x, cache, call)
        with jax.named_scope("attend"):
            out = sparse_attention(self, q, keys, chosen, cache, call)
            out = rope_tail(out, inverse(table), numerics)
        with jax.named_scope("output"):
            return grouped_output(out, params["o_a"], params["o_b"], self.layer, numerics, self.rules), cache

    def _compress(self, x: jax.Array, cache: V4Cache, call: Call) -> V4Cache:
        """Advances this layer's compressors."""
        numerics, eps = self.numerics, self.config.rms_norm_eps
        table = call.entries[self.ratio]

        def finish(entry: jax.Array) -> jax.Array:
            return rope_tail(numerics.round(entry), table, numerics)

        def advance(params: Tree, state: Compressed, row: RowFormat, finish: Any) -> Compressed:
            bound = Compressor(params, self.ratio, row, eps, numerics, finish)
            return compressor(bound, x, state, self.place, call.positions, call.valid)

        if self.ratio == HCA:
            assert cache.hca is not None
            hca = advance(self.compressed["compressor"], cache.hca, self.kv_row, finish)
            return dataclasses.replace(cache, hca=hca)
        assert cache.csa is not None and cache.index is not None
        csa = advance(self.compressed["compressor"], cache.csa, self.kv_row, finish)
        keys = self.compressed["indexer"]["compressor"]
        index = advance(keys, cache.index, self.index_row, lambda entry: self._rotate(finish(entry)))
        return dataclasses.replace(cache, csa=csa, index=index)

    def _rotate(self, x: jax.Array) -> jax.Array:
        """The indexer's Hadamard rotation, which spreads outliers before FP4; in plain it would change no score."""
        return self.numerics.round(hadamard(x)) if self.numerics.native else x

    def _visible(self, query: Int32[Array, "B q"], entries: Any, call: Call) -> Int32[Array, "B q"]:
        """How many entries each query sees: those whose last token it does not precede, and that are there."""
        there = jnp.minimum(call.end // self.ratio, entries.shape[2])
        return jnp.minimum((query + 1) // self.ratio, there[:, None])

    def index_queries(
        self, low: Float[Array, "B T Q"], x: Float[Array, "B T D"], call: Call
    ) -> tuple[Float[Array, "B T I X"], Float[Array, "B T I"]]:
        """The indexer's queries and head weights (spec V4 2.5, steps 1 and 3)."""
        config, numerics, index = self.config, self.numerics, (self.place,)
        params = self.compressed["indexer"]
        q = numerics.linear(low, params["q_b"], index)
        q = q.reshape(*x.shape[:2], config.index_n_heads, config.index_head_dim)
        q = self._rotate(rope_tail(q, call.compress, numerics))
        if numerics.native:
            q = fake_quantise(q, E2M1, (1, INDEX_GROUP), pow2=True).astype(jnp.bfloat16)
        weights = numerics.linear(x, params["weights"], index).astype(jnp.float32) * config.index_scale
        return q, numerics.round(weights)

    def choose(
        self, low: Float[Array, "B T Q"], x: Float[Array, "B T D"], cache: V4Cache, call: Call
    ) -> Int32[Array, "B T k"] | None:
        """Numbers of the entries that each query reads, -1 for none; None where all visible ones are read."""
        config = self.config
        if self.ratio != CSA or cache.index is None or cache.index.entries.shape[2] <= config.index_topk:
            return None
        keys = cache.index.entries
        visible = self._visible(call.positions, keys, call)
        q, weights = self.index_queries(low, x, call)
        k = config.index_topk
        return lightning_indexer(q, weights, keys, self.place, visible, k, self.index_row, rounded=self.numerics.native)

    def attend(
        self, q: Float[Array, "B T H U"], window: WindowKeys, chosen: jax.Array | None, cache: V4Cache, call: Call
    ) -> Float[Array, "B T H U"]:
        """Over the window and the entries, a block of queries at a time."""
        config = self.config
        sink, state = self.params["sink"][self.layer], cache.compressed(self.ratio)

        def block(first: Any, q: jax.Array, query: jax.Array, *few: jax.Array) -> jax.Array:
            sources = [Keys(1, lambda _: window(first, query))]
            if state is not None and few:
                rows = gather_rows(state.entries, self.place, few[0])
                sources.append(Keys(1, lambda _: (self.kv_row.decode(rows), few[0] >= 0)))
            elif state is not None:
                sources.append(self._all_entries(state, query, call))
            return sink_attention(q, sources, sink, config.softmax_scale, self.numerics)

        if chosen is None:
            return by_query_blocks(block, QUERY_BLOCK, q, call.positions)
        size = gathered_queries(q.shape[0], config.index_topk, config.head_dim)
        return by_query_blocks(block, size, q, call.positions, chosen)

    def _all_entries(self, state: Compressed, query: Int32[Array, "B q"], call: Call) -> Keys:
        """All visible entries, block by block."""
        size = row_block(state.entries.shape[2])
        visible = self._visible(query, state.entries, call)
        count = visible.max(axis=1)

        def load(j: Any) -> tuple[jax.Array, jax.Array]:
            keys = self.kv_row.decode(read_rows(state.entries, self.place, j, size, count))
            return keys, j * size + jnp.arange(size) < visible[..., None]

        return Keys((count.max() + size - 1) // size, load)


@operator("sparse_attention")
def sparse_attention(
    layer: SparseAttention,
    q: Float[Array, "B T H U"],
    window: WindowKeys,
    chosen: Int32[Array, "B T k"] | None,
    cache: V4Cache,
    call: Call,
) -> Float[Array, "B T H U"]:
    """Attention over the window and the entries, all of them or the chosen ones (spec V4 2.3)."""
    return layer.attend(q, window, chosen, cache, call)
