"""What a V4 sequence remembers: a window of keys, compressed entries, and the inputs of entries still to come.

Everything is addressed by absolute position: rings hold position p in slot p mod size, lists hold entry i (tokens
i * ratio and on) in place i. A ring holds SPARE positions more than are looked back at, and an entry counts only while
its last token lies below `length`; so rolling back k <= SPARE tokens is `length - k` and nothing else. A sequence must
not be taken back by more than SPARE from the furthest position it ever wrote, in however many steps. DeepSeek's own
code shifts and accumulates its compressor's state instead, which cannot be rolled back (spec V4 2.4, 9.23).
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax
from jaxtyping import Array, Bool, Int32, Shaped

from dsjax.cache.v3 import SPARE, round_capacity
from dsjax.config import V4Config
from dsjax.config.v4 import CSA, HCA
from dsjax.errors import InputError
from dsjax.numerics import Numerics
from quant.rows import RowFormat

ENTRY_BLOCK = 256
"""Compressed entries that attention reads at a time, at most."""

INDEX_BLOCK = 1024
"""Indexer keys that are scanned at a time, at most: each step also selects the best so far, which takes a while to
start."""

SHORT_STEP = SPARE + 1
"""Tokens of a step, at most, after which a ring still holds all that its first token looks back at.

Such a step writes its rings before it reads them, and needs nothing else. A longer one reads them as they were before;
XLA then copies all layers' rings, as it does not see that every reading is done before the writing.
"""

STATE_VERSION = 1

Rows = Shaped[Array, "L B S width"]
"""Rows of every layer, slot and place, in a `RowFormat`."""


def overlap(ratio: int) -> int:
    """Windows of `ratio` tokens that one entry pools: two where they overlap (spec V4 2.4)."""
    return 2 if ratio == CSA else 1


@partial(jax.tree_util.register_dataclass, data_fields=["entries", "inputs"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Compressed:
    """What one kind of compressor keeps.

    Attributes:
      entries: [L, B, entries, width], rows; entry i is valid while (i + 1) * ratio <= length.
      inputs: float32 [L, B, overlap * ratio + SPARE, 2 c], a ring over positions of what entries are pooled from:
        K, then Z with its position bias, c channels each (both halves where windows overlap).
    """

    entries: Any
    inputs: Any


@partial(
    jax.tree_util.register_dataclass, data_fields=["window", "csa", "index", "hca", "length"], meta_fields=["capacity"]
)
@dataclasses.dataclass(frozen=True)
class V4Cache:
    """Cache of B slots, a pytree with static shapes, to be donated.

    Attributes:
      window: [L, B, sliding_window + SPARE, width], a ring over positions, rows of keys that are values too.
      csa, hca: of the layers with ratio 4 and 128; None where there are none.
      index: indexer keys of the layers with ratio 4.
      length: int32 [B], tokens in each slot; the only truth about positions.
      capacity: positions per slot.
    """

    window: Any
    csa: Compressed | None
    index: Compressed | None
    hca: Compressed | None
    length: Any
    capacity: int

    def compressed(self, ratio: int) -> Compressed | None:
        """Of the layers with this ratio."""
        return {CSA: self.csa, HCA: self.hca}.get(ratio)


def kv_format(config: V4Config, numerics: Numerics) -> RowFormat:
    """How window positions and compressed entries are held."""
    return RowFormat(numerics.kv_format, config.head_dim, config.qk_rope_head_dim)


def index_format(config: V4Config, numerics: Numerics) -> RowFormat:
    """How indexer keys are held."""
    return RowFormat("fp4" if numerics.native else numerics.dtype, config.index_head_dim)


def entry_block(places: int, most: int = ENTRY_BLOCK) -> int:
    """Entries that are read at a time; divides the number of places, and is never all of it.

    XLA:CPU takes a slice of everything for the array itself and then copies it before each update.
    """
    return min(math.gcd(places, most), places // 2)


def _places(capacity: int, ratio: int) -> int:
    """Places for the entries of `capacity` positions: few distinct numbers, which blocks divide."""
    entries = max(2, -(-capacity // ratio))
    if entries > 2 * INDEX_BLOCK:
        return -(-entries // INDEX_BLOCK) * INDEX_BLOCK
    return 1 << (entries - 1).bit_length()


def init_cache(config: V4Config, numerics: Numerics, batch: int, max_length: int, *, draft: bool = False) -> V4Cache:
    """An empty cache.

    Args:
      config: the architecture.
      numerics: which say how rows are held.
      batch: B, slots.
      max_length: tokens that every slot can hold; SPARE more are kept for drafts.
      draft: for the MTP module, one layer that has a window only.
    """
    capacity = round_capacity(max_length)
    kv, index = kv_format(config, numerics), index_format(config, numerics)

    def compressed(ratio: int, row: RowFormat) -> Compressed | None:
        layers = len(config.layers_of(ratio))
        if draft or not layers:
            return None
        entries = jnp.zeros((layers, batch, _places(capacity, ratio), row.width), row.dtype)
        c = overlap(ratio)
        return Compressed(entries, jnp.zeros((layers, batch, c * ratio + SPARE, 2 * c * row.channels), jnp.float32))

    layers = 1 if draft else config.num_hidden_layers
    return V4Cache(
        window=jnp.zeros((layers, batch, config.sliding_window + SPARE, kv.width), kv.dtype),
        csa=compressed(CSA, kv),
        index=compressed(CSA, index),
        hca=compressed(HCA, kv),
        length=jnp.zeros(batch, jnp.int32),
        capacity=capacity,
    )


# --- rings and lists -------------------------------------------------------------------------------------------------


def ring_positions(length: Int32[Array, " B"], size: int) -> Int32[Array, "B size"]:
    """The position that each place of a ring holds: the newest below `length` that falls there; negative if none."""
    last = length[:, None] - 1
    return last - (last - jnp.arange(size, dtype=jnp.int32)) % size


def read_ring(ring: Rows, layer: Any) -> Shaped[Array, "B size width"]:
    """A layer's ring."""
    return lax.dynamic_index_in_dim(ring, layer, axis=0, keepdims=False)


def write_ring(
    ring: Rows, layer: Any, positions: Int32[Array, "B T"], valid: Bool[Array, "B T"], rows: Shaped[Array, "B T width"]
) -> Rows:
    """Puts new rows into one layer's ring, in place where the array is donated.

    Rows that are not valid change no bit. Of more rows than the ring has places the last stay.
    """
    size = ring.shape[2]
    end = jnp.max(jnp.where(valid, positions + 1, 0), axis=1, keepdims=True)
    return write_entries(ring, layer, positions % size, valid & (positions >= end - size), rows)


def write_entries(
    entries: Rows, layer: Any, numbers: Int32[Array, "B n"], valid: Bool[Array, "B n"], rows: Shaped[Array, "B n width"]
) -> Rows:
    """Puts new rows into the places with these numbers of one layer, in place where the array is donated.

    Rows that are not valid change no bit.
    """
    slots = jnp.arange(rows.shape[0])[:, None]
    where = jnp.where(valid, numbers, entries.shape[2])  # an index out of bounds is dropped
    return entries.at[layer, slots, where].set(rows.astype(entries.dtype), mode="drop", unique_indices=True)


def zero_unless(counts: Bool[Array, "*batch"], rows: Shaped[Array, "*batch width"]) -> Shaped[Array, "*batch width"]:
    """Rows that do not count as zeros: a masked key's probability is zero, but zero times a stale NaN is NaN."""
    return jnp.where(counts[..., None], rows, jnp.zeros((), rows.dtype))


def read_entries(
    entries: Rows, layer: Any, block: Any, size: int, count: Int32[Array, " B"]
) -> Shaped[Array, "B size width"]:
    """The block with this number of one layer's entries, `size` in a block; those at or beyond `count` are zero.

    A masked entry's probability is zero, but zero times a stale NaN is NaN.
    """
    _, batch, _, width = entries.shape
    rows = lax.dynamic_slice(entries, (layer, 0, block * size, 0), (1, batch, size, width))[0]
    return zero_unless(block * size + jnp.arange(size) < count[:, None], rows)


def gather_entries(entries: Rows, layer: Any, chosen: Int32[Array, "B T k"]) -> Shaped[Array, "B T k width"]:
    """Entries of one layer by number, each below the number of places; zero where negative."""
    slots = jnp.arange(chosen.shape[0])[:, None, None]
    rows = entries.at[layer, slots, jnp.maximum(chosen, 0)].get(mode="promise_in_bounds")
    return zero_unless(chosen >= 0, rows)


# --- sequences -------------------------------------------------------------------------------------------------------


def rollback(cache: V4Cache, tokens: Int32[Array, " B"]) -> V4Cache:
    """Forgets the last tokens [B] of each slot.

    Never to more than SPARE below the furthest position that the slot ever wrote: of older ones the rings hold newer
    rows. Drafts that are rolled back as soon as they are judged keep to that.
    """
    return dataclasses.replace(cache, length=cache.length - tokens)


@dataclasses.dataclass(frozen=True)
class SequenceState:
    """One sequence's state, free of slot, capacity and mesh: what is handed to another slot, mesh or machine.

    Attributes:
      version: format version of this record.
      length: tokens.
      arrays: NumPy arrays by name, in the order of positions or entries, without what can no longer be read:
        "window" [L, rows, width], the last sliding_window - 1 positions; "<kind>.entries" [L, entries, width];
        "<kind>.inputs" [L, rows, 2 c], from the oldest position that an entry to come pools. Kinds: csa, index, hca.
    """

    version: int
    length: int
    arrays: dict[str, np.ndarray]


_KINDS = {"csa": CSA, "index": CSA, "hca": HCA}


def _kept(cache: V4Cache, length: int) -> dict[str, tuple[Any, np.ndarray]]:
    """By name: the array, and the places of what a sequence of this length needs, in order."""
    size = cache.window.shape[2]
    found = {"window": (cache.window, np.arange(max(0, length - (size - SPARE) + 1), length) % size)}
    for kind, ratio in _KINDS.items():
        state: Compressed | None = getattr(cache, kind)
        if state is not None:
            done = length // ratio
            oldest = max(0, (done - overlap(ratio) + 1) * ratio)
            found[f"{kind}.entries"] = (state.entries, np.arange(done))
            found[f"{kind}.inputs"] = (state.inputs, np.arange(oldest, length) % state.inputs.shape[2])
    return found


def extract(cache: V4Cache, slot: int) -> SequenceState:
    """The state of one slot, on the host."""
    length = int(cache.length[slot])
    arrays = {
        name: np.asarray(lax.dynamic_index_in_dim(array, jnp.int32(slot), axis=1, keepdims=False))[:, places]
        for name, (array, places) in _kept(cache, length).items()
    }
    return SequenceState(STATE_VERSION, length, arrays)


@partial(jax.jit, donate_argnums=0)
def _insert(cache: V4Cache, slot: jax.Array, rows: dict[str, jax.Array], length: jax.Array) -> V4Cache:
    def put(name: str, array: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(array, rows[name][:, None], slot, axis=1)

    def compressed(kind: str) -> Compressed | None:
        state: Compressed | None = getattr(cache, kind)
        if state is None:
            return None
        return Compressed(put(f"{kind}.entries", state.entries), put(f"{kind}.inputs", state.inputs))

    return V4Cache(
        put("window", cache.window),
        compressed("csa"),
        compressed("index"),
        compressed("hca"),
        cache.length.at[slot].set(length),
        cache.capacity,
    )


def insert(cache: V4Cache, slot: int, state: SequenceState) -> V4Cache:
    """The cache with `state` in a slot, whatever was there before forgotten. The cache given is donated.

    Tokens taken after the insertion can be rolled back, those before it cannot.

    Raises:
      InputError: if the state is of another version, model or row format, or too long.
    """
    if state.version != STATE_VERSION:
        raise InputError(f"sequence state: expected version {STATE_VERSION}, found {state.version}")
    if state.length > cache.capacity:
        raise InputError(f"sequence state: {state.length} tokens do not fit a cache of {cache.capacity}")
    kept = _kept(cache, state.length)
    if kept.keys() != state.arrays.keys():
        raise InputError(f"sequence state: expected {', '.join(kept)}, found {', '.join(state.arrays)}")
    rows = {}
    for name, (array, places) in kept.items():
        layers, _, size, width = array.shape
        found, expected = state.arrays[name], (layers, len(places), width)
        if found.shape != expected or found.dtype != array.dtype:
            raise InputError(
                f"sequence state: {name}: expected {array.dtype} {expected}, found {found.dtype} {found.shape}"
            )
        rows[name] = np.zeros((layers, size, width), found.dtype)
        rows[name][:, places] = found
    return _insert(cache, jnp.int32(slot), rows, jnp.int32(state.length))


for _type, _name in ((Compressed, "dsjax.Compressed"), (V4Cache, "dsjax.V4Cache")):
    export.register_pytree_node_serialization(
        _type,
        serialized_name=_name,
        serialize_auxdata=lambda data: b",".join(b"%d" % number for number in data),
        deserialize_auxdata=lambda blob: tuple(int(number) for number in blob.split(b",") if number),
    )
