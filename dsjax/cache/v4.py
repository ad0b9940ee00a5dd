"""What a V4 sequence remembers: a window of keys, compressed entries, and the inputs of entries still to come.

Everything is addressed by absolute position: rings hold position p in slot p mod size, lists hold entry i (tokens
i * ratio and on) in place i. A ring holds SPARE positions more than are looked back at, and an entry counts only while
its last token lies below `length`; so rolling back k <= SPARE tokens is `length - k` and nothing else. A sequence must
not be taken back by more than SPARE from the furthest position it ever wrote, in however many steps. DeepSeek's own
code shifts and accumulates its compressor's state instead, which cannot be rolled back (spec V4 2.4, 9.23).
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax
from jaxtyping import Array, Bool, Int32, Shaped

from dsjax.cache.rows import SPARE, Rows, round_capacity, scanned_places, write_rows
from dsjax.config import V4Config
from dsjax.config.v4 import CSA, HCA
from dsjax.numerics import Numerics
from quant.rows import RowFormat

SHORT_STEP = SPARE + 1
"""Tokens of a step, at most, after which a ring still holds all that its first token looks back at.

Such a step writes its rings before it reads them, and needs nothing else. A longer one reads them as they were before;
XLA then copies all layers' rings, as it does not see that every reading is done before the writing.
"""

_KINDS = {"csa": CSA, "index": CSA, "hca": HCA}


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

    window: Any  # arrays, or whatever stands for them in a tree: shapes, shardings
    csa: Any  # a Compressed or None; where a tree of shardings leaves something open, JAX's own mark for that
    index: Any
    hca: Any
    length: Any
    capacity: int

    def compressed(self, ratio: int) -> Compressed | None:
        """Of the layers with this ratio."""
        return {CSA: self.csa, HCA: self.hca}.get(ratio)

    def kept(self, length: int) -> dict[str, tuple[Any, np.ndarray]]:
        """By name: the array, and the places of what a sequence of this length needs, in order of positions.

        "window": the last sliding_window - 1 positions; "<kind>.entries"; "<kind>.inputs", from the oldest position
        that an entry to come pools. Kinds: csa, index, hca.
        """
        size = self.window.shape[2]
        found = {"window": (self.window, np.arange(max(0, length - (size - SPARE) + 1), length) % size)}
        for kind, ratio in _KINDS.items():
            state: Compressed | None = getattr(self, kind)
            if state is not None:
                done = length // ratio
                oldest = max(0, (done - overlap(ratio) + 1) * ratio)
                found[f"{kind}.entries"] = (state.entries, np.arange(done))
                found[f"{kind}.inputs"] = (state.inputs, np.arange(oldest, length) % state.inputs.shape[2])
        return found

    def updated(self, arrays: dict[str, Any], length: Any) -> V4Cache:
        """The same cache with these arrays, named as in `kept`, and lengths."""

        def compressed(kind: str) -> Compressed | None:
            if f"{kind}.entries" not in arrays:
                return None
            return Compressed(arrays[f"{kind}.entries"], arrays[f"{kind}.inputs"])

        csa, index, hca = map(compressed, _KINDS)
        return V4Cache(arrays["window"], csa, index, hca, length, self.capacity)


def kv_format(config: V4Config, numerics: Numerics) -> RowFormat:
    """How window positions and compressed entries are held."""
    return RowFormat(numerics.kv_format, config.head_dim, config.qk_rope_head_dim)


def index_format(config: V4Config, numerics: Numerics) -> RowFormat:
    """How indexer keys are held."""
    return RowFormat("fp4" if numerics.native else numerics.dtype, config.index_head_dim)


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
        entries = jnp.zeros((layers, batch, scanned_places(max(2, -(-capacity // ratio))), row.width), row.dtype)
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

    Positions follow one another, the valid ones first. Rows that are not valid change no bit. Of more rows than the
    ring has places the last stay.
    """
    size, tokens = ring.shape[2], rows.shape[1]
    if tokens > size:
        first = jnp.clip(valid.sum(axis=1, dtype=jnp.int32) - size, 0, tokens - size)
        last = first[:, None] + jnp.arange(size, dtype=jnp.int32)
        positions, valid = (jnp.take_along_axis(a, last, axis=1, mode="promise_in_bounds") for a in (positions, valid))
        rows = jnp.take_along_axis(rows, last[..., None], axis=1, mode="promise_in_bounds")
    return write_rows(ring, layer, positions % size, valid, rows)


for _type, _name in ((Compressed, "dsjax.Compressed"), (V4Cache, "dsjax.V4Cache")):
    export.register_pytree_node_serialization(
        _type,
        serialized_name=_name,
        serialize_auxdata=lambda data: b",".join(b"%d" % number for number in data),
        deserialize_auxdata=lambda blob: tuple(int(number) for number in blob.split(b",") if number),
    )
