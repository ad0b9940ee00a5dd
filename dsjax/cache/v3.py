"""What a sequence remembers: one latent row per token and layer, addressed by absolute position."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt16

from dsjax.config import V3Config
from dsjax.errors import InputError
from quant.formats import BF16, encode

KEY_BLOCK = 256
"""Cached positions that attention reads at a time, at most (`key_block`); capacity is a multiple of it, or below it."""

SPARE = 8
"""Positions beyond the asked length, so that drafted tokens have room."""

STATE_VERSION = 1

Latent = Float32[Array, "L B S A"] | UInt16[Array, "L B S A"]
"""Cached rows; uint16 holds bfloat16 bits: XLA:CPU would widen a whole bfloat16 cache at every slice."""


@partial(jax.tree_util.register_dataclass, data_fields=["latent", "length"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Cache:
    """Latent cache of B slots, a pytree with static shapes, to be donated.

    Rolling back k tokens is `length - k` and nothing else: rows at or beyond `length` count as zero, whatever is
    there, and are overwritten by the next tokens.

    Attributes:
      latent: [L, B, S, A]: per position the normalised latent (C values) and the rotated shared key (R values).
        See `Latent` for its types.
      length: int32 [B], tokens in each slot; the only truth about positions.
    """

    latent: Any  # arrays, or whatever stands for them in a tree: shapes, shardings
    length: Any

    @property
    def capacity(self) -> int:
        """S, positions per slot."""
        return self.latent.shape[2]


def round_capacity(max_length: int) -> int:
    """Positions for `max_length` tokens and SPARE more; few distinct numbers, so that lengths share programs."""
    capacity = max_length + SPARE
    if capacity > KEY_BLOCK:
        return -(-capacity // KEY_BLOCK) * KEY_BLOCK
    return 1 << max(capacity - 1, 31).bit_length()


def init_cache(config: V3Config, batch: int, max_length: int, dtype: str, *, layers: int | None = None) -> Cache:
    """An empty cache.

    Args:
      config: the architecture.
      batch: B, slots.
      max_length: tokens that every slot can hold; SPARE more are kept for drafts.
      dtype: "float32" or "bfloat16".
      layers: number of layers, by default the model's; 1 for an MTP module.
    """
    capacity = round_capacity(max_length)
    layers = config.num_hidden_layers if layers is None else layers
    shape = (layers, batch, capacity, config.latent_dim)
    latent = jnp.zeros(shape, jnp.float32 if dtype == "float32" else jnp.uint16)
    return Cache(latent, jnp.zeros(batch, jnp.int32))


def key_block(capacity: int) -> int:
    """Positions that attention reads at a time; divides the capacity.

    Never all of it: XLA:CPU takes a slice of everything for the array itself and then copies it before each update.
    """
    return min(KEY_BLOCK, capacity // 2)


def write(
    latent: Latent,
    layer: Any,
    positions: Int32[Array, "B T"],
    valid: Bool[Array, "B T"],
    rows: Float[Array, "B T A"],
) -> Latent:
    """Puts new rows into one layer, in place where the array is donated; rows that are not valid change no bit.

    Args:
      latent: [L, B, S, A] as `Cache.latent`.
      layer: which layer, traced.
      positions: int32 [B, T].
      valid: bool [B, T].
      rows: float [B, T, A].
    """
    if latent.dtype == jnp.uint16:
        rows = encode(rows, BF16)
    slots = jnp.arange(rows.shape[0])[:, None]
    # An index out of bounds is dropped by the scatter.
    where = jnp.where(valid, positions, latent.shape[2])
    return latent.at[layer, slots, where].set(rows.astype(latent.dtype), mode="drop", unique_indices=True)


def read_block(latent: Latent, layer: Any, block: Any, filled: Int32[Array, " B"]) -> Float[Array, "B keys A"]:
    """Rows of one layer from position block * keys on, keys = `key_block(capacity)`, in the cache's dtype.

    Rows at or beyond `filled` are zero: a masked key's probability is zero, but zero times a stale NaN is NaN.
    """
    _, batch, capacity, width = latent.shape
    size = key_block(capacity)
    rows = lax.dynamic_slice(latent, (layer, 0, block * size, 0), (1, batch, size, width))[0]
    positions = block * size + jnp.arange(size)
    rows = jnp.where((positions < filled[:, None])[..., None], rows, jnp.zeros((), rows.dtype))
    return lax.bitcast_convert_type(rows, jnp.bfloat16) if rows.dtype == jnp.uint16 else rows


def rollback(cache: Cache, tokens: Int32[Array, " B"]) -> Cache:
    """Forgets the last tokens [B] of each slot."""
    return dataclasses.replace(cache, length=cache.length - tokens)


@dataclasses.dataclass(frozen=True)
class SequenceState:
    """One sequence's state, free of slot, capacity and mesh: what is handed to another slot, mesh or machine.

    Attributes:
      version: format version of this record.
      length: tokens.
      latent: NumPy [L, length, A], float32, or uint16 holding bfloat16 bits.
    """

    version: int
    length: int
    latent: np.ndarray


def extract(cache: Cache, slot: int) -> SequenceState:
    """The state of one slot, on the host."""
    length = int(cache.length[slot])
    rows = lax.dynamic_index_in_dim(cache.latent, jnp.int32(slot), axis=1, keepdims=False)
    return SequenceState(STATE_VERSION, length, np.asarray(rows)[:, :length])


@partial(jax.jit, donate_argnums=0)
def _insert(cache: Cache, slot: jax.Array, rows: jax.Array, length: jax.Array) -> Cache:
    latent = lax.dynamic_update_slice_in_dim(cache.latent, rows[:, None], slot, axis=1)
    return Cache(latent, cache.length.at[slot].set(length))


def insert(cache: Cache, slot: int, state: SequenceState) -> Cache:
    """The cache with `state` in a slot, whatever was there before forgotten. The cache given is donated.

    Raises:
      InputError: if the state is of another version, model or dtype, or too long.
    """
    layers, _, capacity, width = cache.latent.shape
    expected = (layers, state.length, width)
    if state.version != STATE_VERSION:
        raise InputError(f"sequence state: expected version {STATE_VERSION}, found {state.version}")
    if state.latent.shape != expected or state.latent.dtype != cache.latent.dtype:
        raise InputError(
            f"sequence state: expected {cache.latent.dtype} {expected}, found {state.latent.dtype} {state.latent.shape}"
        )
    if state.length > capacity:
        raise InputError(f"sequence state: {state.length} tokens do not fit a cache of {capacity}")
    rows = np.zeros((layers, capacity, width), state.latent.dtype)
    rows[:, : state.length] = state.latent
    return _insert(cache, jnp.int32(slot), rows, jnp.int32(state.length))


export.register_pytree_node_serialization(
    Cache, serialized_name="dsjax.Cache", serialize_auxdata=lambda _: b"", deserialize_auxdata=lambda _: ()
)
