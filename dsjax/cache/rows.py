"""Rows of every layer, slot and place: written by one scatter, read by a slice or a gather.

Each reader says which rows count; what others hold is never seen.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32, Shaped

from quant.operator import operator

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


@operator("write_rows", first="drop")
def write_rows(
    rows: Rows, layer: Any, numbers: Int32[Array, "B n"], valid: Bool[Array, "B n"], new: Shaped[Array, "B n width"]
) -> Rows:
    """Puts new rows into the places with these numbers of one layer, in place where the array is donated.

    Rows that are not valid, or beyond the places, change no bit; a slot's valid ones have numbers of their own.
    """
    slots = jnp.arange(new.shape[0])[:, None]
    where = jnp.where(valid, numbers, rows.shape[2])  # an index out of bounds is dropped
    return rows.at[layer, slots, where].set(new.astype(rows.dtype), mode="drop", unique_indices=True)


@write_rows.variant("within", bound=0.0, platforms=["generic"])
def _write_within(
    rows: Rows, layer: Any, numbers: Int32[Array, "B n"], valid: Bool[Array, "B n"], new: Shaped[Array, "B n width"]
) -> Rows:
    """By a scatter whose indices are all within bounds, for compilers that do not drop what is outside.

    What is not to be written repeats one of the slot's rows that are, or else the row that is there.
    """
    batch, count, width = new.shape
    slots, new = jnp.arange(batch), new.astype(rows.dtype)
    valid = valid & (numbers < rows.shape[2])
    there = lax.dynamic_slice(rows, (layer, 0, 0, 0), (1, batch, 1, width))[0, :, 0]
    first = jnp.min(jnp.where(valid, jnp.arange(count), count - 1), axis=1)
    picked = lambda a: a.at[slots, first].get(mode="promise_in_bounds")  # noqa: E731
    some = picked(valid)
    place = jnp.where(some, picked(numbers), 0)
    row = jnp.where(some[:, None], picked(new), there)
    where = jnp.where(valid, numbers, place[:, None])
    values = jnp.where(valid[..., None], new, row[:, None])
    return rows.at[layer, slots[:, None], where].set(values, mode="promise_in_bounds", unique_indices=count == 1)


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
