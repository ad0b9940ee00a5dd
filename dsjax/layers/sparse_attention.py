"""V4's attention: shared keys and values, a sliding window, and compressed entries - all of them or a chosen few.

Queries are taken a block at a time. Each block sees a band of the window and, in pieces, the entries; temporary memory
is bounded by a block of queries and a piece of keys, whatever the cache holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32, Shaped

from dsjax.cache import SPARE
from dsjax.cache.rows import RowFormat
from dsjax.cache.v4 import (
    Compressed,
    V4Cache,
    entry_block,
    gather_entries,
    read_entries,
    read_ring,
    ring_positions,
    write_ring,
)
from dsjax.config import V4Config
from dsjax.config.v4 import CSA, HCA, WINDOW
from dsjax.layers.compressor import Compressor
from dsjax.layers.indexer import top_entries
from dsjax.layers.norm import rms_norm
from dsjax.layers.rope import RopeTable, inverse, rope
from dsjax.numerics import Numerics
from dsjax.params import Tree
from quant import E2M1, batched_dot, block_scaled_dot, fake_quantise, hadamard, split_rows
from quant.matmul import FUSED_TOKENS

QUERY_BLOCK = 128
"""Queries taken together, at most."""

GATHER_BYTES = 16 << 20
"""Of chosen entries, decoded, that one block of queries gathers, at most."""


@dataclasses.dataclass(frozen=True)
class Keys:
    """One source of keys, in pieces.

    Attributes:
      pieces: how many; 1, an int32 [], or a bool [] for one that is loaded by load(True) or load(False).
      load: piece -> (keys, which are values too, [B, S, U] for all queries or [B, q, S, U] for each its own;
        bool [B, q, S], who is seen by whom).
    """

    pieces: Any
    load: Callable[[Any], tuple[jax.Array, jax.Array]]


def _products(q: jax.Array, keys: jax.Array) -> jax.Array:
    """q [B, q, H, U] with keys: float32 [B, q, H, S]."""
    if keys.ndim == 4:
        return _einsum("bqhu,bqsu->bqhs", q, keys)
    if q.shape[1] * q.shape[2] < keys.shape[1]:  # XLA:CPU turns the second operand over: let it be the smaller one
        return jnp.moveaxis(_einsum("bsu,bqhu->bsqh", keys, q), 1, 3)
    return _einsum("bqhu,bsu->bqhs", q, keys)


def _values(p: jax.Array, keys: jax.Array) -> jax.Array:
    """Probabilities [B, q, H, S] with keys as values: float32 [B, q, H, U]."""
    return _einsum("bqhs,bsu->bqhu" if keys.ndim == 3 else "bqhs,bqsu->bqhu", p, keys)


def _einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    if a.dtype == b.dtype == jnp.bfloat16:
        return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
    return jnp.einsum(spec, a.astype(jnp.float32), b.astype(jnp.float32), precision=lax.Precision.HIGHEST)


def sink_attention(
    q: Float[Array, "B q H U"],
    sources: Sequence[Keys],
    sink: Float32[Array, " H"],
    scale: float,
    numerics: Numerics,
) -> Float[Array, "B q H U"]:
    """softmax with a sink over all keys of all sources, times the keys (spec V4 2.3, step 6).

        o_h = sum_k p_k key_k / (sum_k p_k + exp(sink_h - M)),  p_k = exp(s_k - M),  s_k = scale q_h . key_k

    In plain M is a running maximum. In native it is the maximum over all keys, known before the values are summed, for
    p is rounded to bfloat16 for the sum: so the result does not depend on the order of keys. (DeepSeek's kernel rounds
    against a running maximum over blocks of 64, in an order that differs between its prefill and its decode.)

    Args:
      q: [B, q, H, U] in the activation dtype.
      sources: every query sees at least one key.
      sink: float32 [H].
      scale: of scores, not of the sink.

    Returns:
      [B, q, H, U], rounded to the activation dtype.
    """

    def scores(piece: tuple[jax.Array, jax.Array]) -> jax.Array:
        keys, seen = piece
        return jnp.where(seen[:, :, None], _products(q, keys) * scale, -jnp.inf)

    def over(source: Keys, f: Callable[[Any, Any], Any], state: Any) -> Any:
        if isinstance(source.pieces, int):
            assert source.pieces == 1
            return f(source.load(0), state)
        if source.pieces.dtype == jnp.bool_:

            def either(which: bool) -> Callable[[Any], Any]:
                return lambda state: f(source.load(which), state)

            return lax.cond(source.pieces, either(True), either(False), state)
        return lax.fori_loop(0, source.pieces, lambda j, state: f(source.load(j), state), state)

    def measure(piece: Any, top: jax.Array) -> jax.Array:
        return jnp.maximum(top, scores(piece).max(axis=-1))

    def add(piece: Any, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        top, total, out = state
        s = scores(piece)
        if not numerics.native:
            new_top = jnp.maximum(top, s.max(axis=-1))
            # No key so far, and none in this piece: nothing is to be scaled.
            decay = jnp.where(top == new_top, 1.0, jnp.exp(top - new_top))
            top, total, out = new_top, total * decay, out * decay[..., None]
        p = jnp.where(s > -jnp.inf, jnp.exp(s - top[..., None]), 0)
        return top, total + p.sum(axis=-1), out + _values(numerics.round(p), piece[0])

    shape = q.shape[:3]
    top = jnp.full(shape, -jnp.inf)
    if numerics.native:
        for source in sources:
            top = over(source, measure, top)
    state = top, jnp.zeros(shape), jnp.zeros(q.shape, jnp.float32)
    for source in sources:
        state = over(source, add, state)
    top, total, out = state
    return numerics.round(out / (total + jnp.exp(sink - top))[..., None])


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
    entries: dict[int, RopeTable]

    @property
    def start(self) -> jax.Array:
        """int32 [B], the first new position."""
        return self.positions[:, 0]

    @property
    def end(self) -> jax.Array:
        """int32 [B], the position after the last new one."""
        return self.start + self.valid.sum(axis=1, dtype=jnp.int32)


WindowKeys = Callable[[jax.Array], Keys]
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
        self.kv_row = RowFormat(numerics.kv_format, config.head_dim, config.qk_rope_head_dim)
        self.index_row = RowFormat("fp4" if numerics.native else numerics.dtype, config.index_head_dim)

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
            if x.shape[1] <= SPARE + 1:  # the ring still has all that the first query looks back at
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

        def source(query: jax.Array) -> Keys:
            position = held[:, None]
            seen = (position <= query[..., None]) & (position > query[..., None] - window) & (position >= 0)
            return Keys(1, lambda _: (keys, seen))

        return source

    def _band(self, ring: Shaped[Array, "B R width"], new: Shaped[Array, "B T width"], call: Call) -> WindowKeys:
        """What queries see of the window: the ring as it was before this step, if they look so far back, and a band of
        the new keys."""
        back = self.config.sliding_window - 1
        held = ring_positions(call.start, ring.shape[1])
        kept = (held >= 0) & (held >= call.start[:, None] - back)
        old = self.kv_row.decode(_zero_unless(kept, ring))
        # In front of the first new key as many as a query looks back, so that all queries' slices are equal.
        rows = jnp.pad(new, [(0, 0), (back, QUERY_BLOCK), (0, 0)])

        def source(query: jax.Array) -> Keys:
            size = query.shape[1]
            first = query[0, 0] - call.start[0]
            band = self.kv_row.decode(lax.dynamic_slice_in_dim(rows, first, back + size, axis=1))
            key = query[:, :1] - back + jnp.arange(back + size)
            seen_old = kept[:, None] & (held[:, None] >= query[..., None] - back)
            own = (key[:, None] <= query[..., None]) & (key[:, None] >= query[..., None] - back)
            seen_new = own & (key >= call.start[:, None])[:, None]

            def load(both: bool) -> tuple[jax.Array, jax.Array]:
                if not both:
                    return band, seen_new
                return jnp.concatenate([old, band], axis=1), jnp.concatenate([seen_old, seen_new], axis=-1)

            return Keys(seen_old.any(), load)

        return source

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
            sources = [window(query)]
            if state is not None:
                # Entries that this step completed are in the cache, beyond it nothing counts.
                visible = jnp.minimum((query + 1) // self.ratio, (call.end // self.ratio)[:, None])
                if chosen_few:
                    assert cache.index is not None
                    with jax.named_scope("indexer"):
                        chosen = top_entries(
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
        matrices = split_rows(self.params["o_a"], g)
        if b * t <= FUSED_TOKENS:
            one = batched_dot(groups, matrices, (self.layer,))
        else:  # one by one: XLA:CPU takes a product of several, their operand moved, to float32
            numbers = jnp.arange(g, dtype=jnp.int32)
            one = lax.map(lambda a: block_scaled_dot(a[0], matrices, (self.layer, a[1])), (groups, numbers))
        low = numerics.round(jnp.moveaxis(one, 0, 1)).reshape(b, t, -1)
        return numerics.linear(low, self.params["o_b"], (self.layer,))
