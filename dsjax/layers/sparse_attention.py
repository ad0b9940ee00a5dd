"""V4's attention: shared keys and values, a sliding window, and compressed entries - all of them or a chosen few.

Queries are taken a block at a time. Each block sees a band of the window and, in pieces, the entries; temporary memory
is bounded by a block of queries and a piece of keys, whatever the cache holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, Shaped

from dsjax.cache.rows import RowFormat
from dsjax.cache.v4 import (
    SHORT_STEP,
    Compressed,
    V4Cache,
    entry_block,
    gather_entries,
    index_format,
    kv_format,
    read_entries,
    read_ring,
    ring_positions,
    write_ring,
)
from dsjax.config import V4Config
from dsjax.config.v4 import CSA, HCA, WINDOW
from dsjax.layers.compressor import Compressor
from dsjax.layers.indexer import lightning_indexer
from dsjax.layers.norm import head_norm, rms_norm
from dsjax.layers.rope import RopeTable, inverse, rope
from dsjax.layers.sink_attention import Keys, sink_attention
from dsjax.numerics import Numerics
from dsjax.params import Tree
from quant import E2M1, batched_dot, fake_quantise, hadamard, split_rows

QUERY_BLOCK = 128
"""Queries taken together, at most."""

GATHER_BYTES = 16 << 20
"""Of chosen entries, decoded, that one block of queries gathers, at most."""


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


WindowKeys = Callable[[jax.Array], list[Keys]]
"""Positions of a block of queries, int32 [B, q] -> what they see of the window."""


def _zero_unless(kept: Bool[Array, "B R"], rows: Shaped[Array, "B R width"]) -> Shaped[Array, "B R width"]:
    """A masked key's probability is zero, but zero times a stale NaN is NaN."""
    return jnp.where(kept[..., None], rows, jnp.zeros((), rows.dtype))


def _bits(x: jax.Array) -> jax.Array:
    """bfloat16 as uint16: XLA:CPU widens bfloat16 arrays whenever it moves them."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _from_bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def _join(x: jax.Array, tail: jax.Array) -> jax.Array:
    """x with `tail` for its last channels."""
    at = x.shape[-1] - tail.shape[-1]
    return _from_bits(lax.dynamic_update_slice_in_dim(_bits(x), _bits(tail), at, axis=-1))


def _pad_queries(x: jax.Array, count: int) -> jax.Array:
    return x if x.shape[1] == count else jnp.pad(x, [(0, 0), (0, count - x.shape[1])] + [(0, 0)] * (x.ndim - 2))


class SparseAttention:
    """One attention layer of any ratio, bound to its parameters and its place.

    Args:
      config, numerics: static.
      params: the stack "attention" of all layers, and with a ratio "compressor" (and "indexer") of those that have it.
      ratio: 0, 4 or 128.
      layer: index into the stack of all layers, and into the cache's windows.
      place: index into the stack of the layers with this ratio, and into their part of the cache.
    """

    def __init__(
        self, config: V4Config, numerics: Numerics, params: Tree, compressed: Tree, ratio: int, layer: Any, place: Any
    ) -> None:
        self.config, self.numerics = config, numerics
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
        numerics, eps, index = self.numerics, self.config.rms_norm_eps, (self.layer,)
        table = call.compress if self.ratio else call.main
        with jax.named_scope("queries"):
            low = numerics.linear(x, self.params["q_a"], index)
            low = numerics.round(rms_norm(low, self.params["q_norm"][self.layer], eps))
            q = numerics.linear(low, self.params["q_b"], index)
            q = q.reshape(*x.shape[:2], self.config.num_attention_heads, self.config.head_dim)
            q = self._turned(head_norm(q, eps, numerics), table)
        with jax.named_scope("keys"):
            kv = numerics.linear(x, self.params["kv"], index)
            kv = numerics.round(rms_norm(kv, self.params["kv_norm"][self.layer], eps))
            new = self.kv_row.encode(self._turned(kv, table))
            window = write_ring(cache.window, self.layer, call.positions, call.valid, new)
            if x.shape[1] <= SHORT_STEP:  # the ring still has all that the first query looks back at
                source = self._ring(read_ring(window, self.layer), call)
            else:
                source = self._band(read_ring(cache.window, self.layer), new, call)
            cache = dataclasses.replace(cache, window=window)
        if self.ratio:
            cache = self._compress(x, cache, call)
        with jax.named_scope("attend"):
            out = self._attend(q, low, x, source, cache, call)
            out = self._turned(out, inverse(table))
        with jax.named_scope("output"):
            return self._output(out), cache

    def _turned(self, x: jax.Array, table: RopeTable) -> jax.Array:
        """`rope_tail` of what is rounded already, rounded: only the tail passes through float32."""
        nope = x.shape[-1] - self.config.qk_rope_head_dim
        return _join(x, self.numerics.round(rope(x[..., nope:], table)))

    # --- keys --------------------------------------------------------------------------------------------------------

    def _compress(self, x: jax.Array, cache: V4Cache, call: Call) -> V4Cache:
        """Advances this layer's compressors."""
        numerics, eps = self.numerics, self.config.rms_norm_eps
        table = call.entries[self.ratio]

        def finish(entry: jax.Array) -> jax.Array:
            return self._turned(numerics.round(entry), table)

        def advance(params: Tree, state: Compressed, row: RowFormat, finish: Any) -> Compressed:
            compressor = Compressor(params, self.ratio, row, eps, numerics, finish)
            return compressor(x, state, self.place, call.positions, call.valid)

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

    def _ring(self, ring: Shaped[Array, "B R width"], call: Call) -> WindowKeys:
        """What queries see of the window, all of it read from the ring: for few new tokens, already written."""
        window = self.config.sliding_window
        held = ring_positions(call.end, ring.shape[1])
        keys = self.kv_row.decode(_zero_unless((held >= 0) & (held > call.start[:, None] - window), ring))

        def sources(query: jax.Array) -> list[Keys]:
            position = held[:, None]
            seen = (position <= query[..., None]) & (position > query[..., None] - window) & (position >= 0)
            return [Keys(1, lambda _: (keys, seen))]

        return sources

    def _band(self, ring: Shaped[Array, "B R width"], new: Shaped[Array, "B T width"], call: Call) -> WindowKeys:
        """What queries see of the window: the ring as it was before this step, if they look so far back, and a band of
        the new keys."""
        back = self.config.sliding_window - 1
        held = ring_positions(call.start, ring.shape[1])
        kept = (held >= 0) & (held >= call.start[:, None] - back)
        old = self.kv_row.decode(_zero_unless(kept, ring))
        # In front of the first new key as many as a query looks back, so that all queries' slices are equal.
        rows = jnp.pad(new, [(0, 0), (back, QUERY_BLOCK), (0, 0)])

        def sources(query: jax.Array) -> list[Keys]:
            size = query.shape[1]
            first = query[0, 0] - call.start[0]
            band = self.kv_row.decode(lax.dynamic_slice_in_dim(rows, first, back + size, axis=1))
            key = query[:, :1] - back + jnp.arange(back + size)
            seen_old = kept[:, None] & (held[:, None] >= query[..., None] - back)
            own = (key[:, None] <= query[..., None]) & (key[:, None] >= query[..., None] - back)
            seen_new = own & (key >= call.start[:, None])[:, None]
            return [Keys(1, lambda _: (band, seen_new)), Keys(seen_old.any(), lambda _: (old, seen_old))]

        return sources

    # --- attention ---------------------------------------------------------------------------------------------------

    def _attend(
        self, q: jax.Array, low: jax.Array, x: jax.Array, window: WindowKeys, cache: V4Cache, call: Call
    ) -> Float[Array, "B T H U"]:
        b, t = q.shape[:2]
        config, numerics = self.config, self.numerics
        state = {WINDOW: None, CSA: cache.csa, HCA: cache.hca}[self.ratio]
        chosen_few = self.ratio == CSA and state is not None and state.entries.shape[2] > config.index_topk
        size = QUERY_BLOCK
        if chosen_few:
            size = max(1, min(size, GATHER_BYTES // (b * config.index_topk * config.head_dim * 4)))
        size = min(size, t)
        padded = -(-t // size) * size
        q = _pad_queries(q, padded)
        sink = self.params["sink"][self.layer]
        if chosen_few:
            with jax.named_scope("indexer"):
                index_q, weights = (_pad_queries(a, padded) for a in self._index_queries(low, x, call))

        def block(first: Any) -> jax.Array:
            queries = lax.dynamic_slice_in_dim(q, first, size, axis=1)
            query = call.start[:, None] + first + jnp.arange(size, dtype=jnp.int32)
            sources = window(query)
            if state is not None:
                # Entries that this step completed are in the cache, beyond it nothing counts.
                visible = jnp.minimum((query + 1) // self.ratio, (call.end // self.ratio)[:, None])
                if chosen_few:
                    assert cache.index is not None
                    with jax.named_scope("indexer"):
                        chosen = lightning_indexer(
                            lax.dynamic_slice_in_dim(index_q, first, size, axis=1),
                            lax.dynamic_slice_in_dim(weights, first, size, axis=1),
                            cache.index.entries,
                            self.place,
                            visible,
                            config.index_topk,
                            self.index_row,
                            numerics,
                        )

                    def picked(_: Any) -> tuple[jax.Array, jax.Array]:
                        rows = gather_entries(state.entries, self.place, chosen)
                        return self.kv_row.decode(rows), chosen >= 0

                    sources.append(Keys(1, picked))
                else:
                    sources.append(self._all_entries(state, visible))
            return sink_attention(queries, sources, sink, config.softmax_scale, numerics)

        if padded == size:
            return block(0)[:, :t]
        _, out = lax.scan(lambda _, i: (None, _bits(block(i * size))), None, jnp.arange(padded // size))
        return _from_bits(jnp.moveaxis(out, 0, 1).reshape(b, padded, *q.shape[2:])[:, :t])

    def _all_entries(self, state: Compressed, visible: Int32[Array, "B q"]) -> Keys:
        """All visible entries, block by block."""
        size = entry_block(state.entries.shape[2])
        count = visible.max(axis=1)

        def load(j: Any) -> tuple[jax.Array, jax.Array]:
            keys = self.kv_row.decode(read_entries(state.entries, self.place, j, size, count))
            return keys, j * size + jnp.arange(size) < visible[..., None]

        return Keys((count.max() + size - 1) // size, load)

    def _index_queries(self, low: jax.Array, x: jax.Array, call: Call) -> tuple[jax.Array, jax.Array]:
        """The indexer's queries [B, T, I, X] and head weights [B, T, I] (spec V4 2.5, steps 1 and 3)."""
        config, numerics, index = self.config, self.numerics, (self.place,)
        params = self.compressed["indexer"]
        q = numerics.linear(low, params["q_b"], index)
        q = q.reshape(*x.shape[:2], config.index_n_heads, config.index_head_dim)
        q = self._rotate(self._turned(q, call.compress))
        if numerics.native:
            q = fake_quantise(q, E2M1, (1, 32), pow2=True).astype(jnp.bfloat16)
        weights = numerics.linear(x, params["weights"], index).astype(jnp.float32) * config.index_scale
        return q, numerics.round(weights)

    def _output(self, out: Float[Array, "B T H U"]) -> Float[Array, "B T D"]:
        """The grouped low-rank projection: each group of heads by its own matrix, then all (spec V4 2.3, step 8)."""
        config, numerics = self.config, self.numerics
        b, t = out.shape[:2]
        g = config.o_groups
        groups = jnp.moveaxis(out.reshape(b * t, g, -1), 1, 0)
        one = batched_dot(groups, split_rows(self.params["o_a"], g), (self.layer,))
        low = numerics.round(jnp.moveaxis(one, 0, 1)).reshape(b, t, -1)
        return numerics.linear(low, self.params["o_b"], (self.layer,))
