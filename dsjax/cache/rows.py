"""Rows of every layer, slot and place: written by one scatter, read by a slice or a gather.

Each reader says which rows count; what others hold is never seen.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32, Shaped

Rows: TypeAlias = Shaped[Array, "L B S width"]
"""Rows of every layer, slot and place, in a `quant.rows.RowFormat`."""

SPARE = 8
"""Positions beyond the asked length, so that drafted tokens have room."""

ROW_BLOCK = 256
"""Rows that attention reads at a time, at most (`row_block`)."""

INDEX_BLOCK = 1024
"""Indexer keys that are scanned at a time, at most: each step also selects the best so far, which takes a while to
start."""


def round_capacity(max_length: int) -> int:
    """Positions for `max_length` tokens and SPARE more; few distinct numbers, so that lengths share programs."""
    capacity = max_length + SPARE
    if capacity > ROW_BLOCK:
        return -(-capacity // ROW_BLOCK) * ROW_BLOCK
    return 1 << max(capacity - 1, 31).bit_length()


def scanned_places(places: int, block: int = INDEX_BLOCK) -> int:
    """Places for that many keys that are scanned by blocks: few distinct numbers, which `block` divides or which divide
    it. What `round_capacity` gives has a large power of two in it only by chance."""
    return -(-places // block) * block if places > 2 * block else 1 << (places - 1).bit_length()


def row_block(places: int, most: int = ROW_BLOCK) -> int:
    """Rows that are read at a time; divides the number of places, and is never all of it.

    XLA:CPU takes a slice of everything for the array itself and then copies it before each update.
    """
    return min(math.gcd(places, most), places // 2)


def zero_unless(counts: Bool[Array, "*batch"], rows: Shaped[Array, "*batch width"]) -> Shaped[Array, "*batch width"]:
    """Rows that do not count as zeros: a masked key's probability is zero, but zero times a stale NaN is NaN."""
    return jnp.where(counts[..., None], rows, jnp.zeros((), rows.dtype))


def write_rows(
    rows: Rows, layer: Any, numbers: Int32[Array, "B n"], valid: Bool[Array, "B n"], new: Shaped[Array, "B n width"]
) -> Rows:
    """Puts new rows into the places with these numbers of one layer, in place where the array is donated.

    A slot's numbers are distinct modulo the places, of which there are at least n. Rows that are not valid change no
    bit: they write what is there. Nothing is written out of bounds, which not every compiler drops.
    """
    slots = jnp.arange(new.shape[0])[:, None]
    where = numbers % rows.shape[2]
    there = rows.at[layer, slots, where].get(mode="promise_in_bounds", unique_indices=True)
    written = jnp.where(valid[..., None], new.astype(rows.dtype), there)
    return rows.at[layer, slots, where].set(written, mode="promise_in_bounds", unique_indices=True)


def read_rows(
    rows: Rows, layer: Any, block: Any, size: int, count: Int32[Array, " B"]
) -> Shaped[Array, "B size width"]:
    """The block with this number of one layer's rows, `size` in a block; those at or beyond `count` are zero."""
    _, batch, _, width = rows.shape
    found = lax.dynamic_slice(rows, (layer, 0, block * size, 0), (1, batch, size, width))[0]
    return zero_unless(block * size + jnp.arange(size) < count[:, None], found)


def gather_rows(rows: Rows, layer: Any, chosen: Int32[Array, "B T k"]) -> Shaped[Array, "B T k width"]:
    """Rows of one layer by number, each below the number of places; zero where negative."""
    slots = jnp.arange(chosen.shape[0])[:, None, None]
    found = rows.at[layer, slots, jnp.maximum(chosen, 0)].get(mode="promise_in_bounds")
    return zero_unless(chosen >= 0, found)
