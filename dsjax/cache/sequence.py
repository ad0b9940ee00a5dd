"""One sequence's state taken out of a cache and put into another: slot reuse, prefix reuse, another mesh or machine."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32

from dsjax.cache.per_token import Cache
from dsjax.cache.v4 import V4Cache
from dsjax.errors import InputError

STATE_VERSION = 2


AnyCache = TypeVar("AnyCache", Cache, V4Cache)


def rollback(cache: AnyCache, tokens: Int32[Array, " B"]) -> AnyCache:
    """Forgets the last tokens [B] of each slot.

    V4: never to more than SPARE below the furthest position that the slot ever wrote: of older ones its rings hold
    newer rows. Drafts that are rolled back as soon as they are judged keep to that.
    """
    return dataclasses.replace(cache, length=cache.length - tokens)


@dataclasses.dataclass(frozen=True)
class SequenceState:
    """One sequence's state, free of slot, capacity and mesh.

    Attributes:
      version: format version of this record.
      length: tokens.
      arrays: NumPy arrays [L, rows, width] by name, in the order of positions or entries, without what can no longer
        be read; see `kept` of the family's cache.
    """

    version: int
    length: int
    arrays: dict[str, np.ndarray]


def extract(cache: Cache | V4Cache, slot: int) -> SequenceState:
    """The state of one slot, on the host."""
    length = int(cache.length[slot])
    arrays = {
        name: np.asarray(lax.dynamic_index_in_dim(array, jnp.int32(slot), axis=1, keepdims=False))[:, places]
        for name, (array, places) in cache.kept(length).items()
    }
    return SequenceState(STATE_VERSION, length, arrays)


def _insert(cache: Any, slot: jax.Array, rows: dict[str, jax.Array], length: jax.Array) -> Any:
    arrays = {
        name: lax.dynamic_update_slice_in_dim(array, rows[name][:, None], slot, axis=1)
        for name, (array, _) in cache.kept(0).items()
    }
    return cache.updated(arrays, cache.length.at[slot].set(length))


@lru_cache(maxsize=16)
def _inserting(held: tuple[Any, ...], tree: Any) -> Any:
    """`_insert` for a cache whose arrays lie so, and stay there: a step takes no other."""
    return jax.jit(_insert, donate_argnums=0, out_shardings=jax.tree.unflatten(tree, held))


def insert(cache: AnyCache, slot: int, state: SequenceState) -> AnyCache:
    """The cache with `state` in a slot, whatever was there before forgotten. The cache given is donated.

    V4: tokens taken after the insertion can be rolled back, those before it cannot.

    Raises:
      InputError: if the state is of another version, model or row format, or too long.
    """
    if state.version != STATE_VERSION:
        raise InputError(f"sequence state: expected version {STATE_VERSION}, found {state.version}")
    if state.length > cache.capacity:
        raise InputError(f"sequence state: {state.length} tokens do not fit a cache of {cache.capacity}")
    kept = cache.kept(state.length)
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
    held, tree = jax.tree.flatten(jax.tree.map(lambda a: a.format, cache))
    inserted: AnyCache = _inserting(tuple(held), tree)(cache, jnp.int32(slot), rows, jnp.int32(state.length))
    return inserted
