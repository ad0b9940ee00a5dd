"""The compressor: one cached entry for every `ratio` tokens, pooled channel by channel (spec V4 2.4).

Entry i pools the tokens ratio * i .. ratio * (i + 1) - 1; with ratio 4 also the four before them, each token giving one
half of its channels to its own entry and the other half to the next. What entries are pooled from stays cached by
position, so any chunking of a sequence, and any rollback, gives the same entries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from dsjax.cache.rows import RowFormat
from dsjax.cache.v4 import SHORT_STEP, Compressed, overlap, read_ring, write_entries, write_ring
from dsjax.layers.norm import rms_norm
from dsjax.numerics import Numerics
from dsjax.params import Tree
from quant import block_scaled_dot


def pool(
    k: Float32[Array, "B n slots c"], z: Float32[Array, "B n slots c"], seen: Bool[Array, "B n slots"]
) -> Float32[Array, "B n c"]:
    """sum over slots of softmax(z) * k, for each channel by itself, over the slots that are seen (spec V4 2.4, step 4).

    Args:
      k, z: float32 [B, entries, slots, channels].
      seen: bool [B, entries, slots]; the first entry has no window before it.
    """
    z = jnp.where(seen[..., None], z, -jnp.inf)
    p = jnp.exp(z - z.max(axis=2, keepdims=True))
    return jnp.where(seen[..., None], p * k, 0).sum(axis=2) / p.sum(axis=2)


def entry_numbers(start: Int32[Array, " B"], tokens: int, ratio: int) -> Int32[Array, "B n"]:
    """Numbers of the entries that up to `tokens` tokens from `start` on can complete, int32 [B, n]."""
    count = (tokens + ratio - 1) // ratio
    return (start // ratio)[:, None] + jnp.arange(count, dtype=jnp.int32)


def _windows(
    ring: Float32[Array, "B size width"],
    new: Float32[Array, "B T width"],
    numbers: Int32[Array, "B n"],
    start: Int32[Array, " B"],
    ratio: int,
) -> tuple[jax.Array, jax.Array]:
    """The inputs of every entry: ([B, n, slots, width], bool [B, n, slots]), slots in the order of positions.

    The ring is that after the new tokens if the step is short, else that before them.
    """
    b, n = numbers.shape
    slots = overlap(ratio) * ratio
    positions = (numbers[:, :, None] - (overlap(ratio) - 1)) * ratio + jnp.arange(slots)
    size, tokens = ring.shape[1], new.shape[1]
    if tokens <= SHORT_STEP:
        at, rows = positions % size, ring
    else:
        at = jnp.where(
            positions < start[:, None, None],
            positions % size,
            size + jnp.minimum(positions - start[:, None, None], tokens - 1),
        )
        rows = jnp.concatenate([ring, new], axis=1)
    picked = jnp.take_along_axis(rows, at.reshape(b, -1, 1), axis=1, mode="clip")
    return picked.reshape(b, n, slots, -1), positions >= 0


@dataclasses.dataclass(frozen=True)
class Compressor:
    """One layer's compressor, bound to its parameters.

    Attributes:
      params: kv, gate [L, c, D] matrices, c = overlap * channels; position float32 [L, ratio, c]; norm [L, channels].
      ratio: 4 or 128.
      row: how entries are held.
      eps: of the norm.
      finish: what an entry goes through before it is held: (values float32 [B, n, channels]) -> the same, rounded.
    """

    params: Tree
    ratio: int
    row: RowFormat
    eps: float
    numerics: Numerics
    finish: Callable[[jax.Array], jax.Array]

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: Compressed,
        layer: Any,
        positions: Int32[Array, "B T"],
        valid: Bool[Array, "B T"],
    ) -> Compressed:
        """Takes new tokens' inputs, and appends the entries that they complete.

        Args:
          x: [B, T, D], the normalised input of the attention.
          state: of all layers with this compressor.
          layer: index into weights and state.
          positions, valid: [B, T].
        """
        index = (layer,)
        with jax.named_scope("compressor"):
            k = block_scaled_dot(x, self.params["kv"], index)
            z = block_scaled_dot(x, self.params["gate"], index)
            z = z + self.params["position"][layer][positions % self.ratio]
            new = jnp.concatenate([k, z], axis=-1)
            start = positions[:, 0]
            end = start + valid.sum(axis=1, dtype=jnp.int32)
            numbers = entry_numbers(start, x.shape[1], self.ratio)
            complete = (numbers + 1) * self.ratio <= end[:, None]
            ring = read_ring(state.inputs, layer)
            inputs = write_ring(state.inputs, layer, positions, valid, new)
            if x.shape[1] <= SHORT_STEP:
                ring = read_ring(inputs, layer)

            def entries() -> jax.Array:
                return self.row.encode(self.finish(self._pooled(ring, new, numbers, start, layer)))

            if x.shape[1] >= self.ratio:
                rows = entries()
            else:  # most steps complete none
                shape = jax.eval_shape(entries)
                rows = lax.cond(complete.any(), entries, lambda: jnp.zeros(shape.shape, shape.dtype))
            return Compressed(write_entries(state.entries, layer, numbers, complete, rows), inputs)

    def _pooled(
        self, ring: jax.Array, new: jax.Array, numbers: jax.Array, start: jax.Array, layer: Any
    ) -> Float32[Array, "B n channels"]:
        """Entries after the norm, float32 (spec V4 2.4, steps 3 to 5)."""
        windows, seen = _windows(ring, new, numbers, start, self.ratio)
        k, z = jnp.split(windows, 2, axis=-1)
        if overlap(self.ratio) == 2:
            # Tokens of the window before give their first half, the window's own their second.
            channels, r = self.row.channels, self.ratio
            k, z = (jnp.concatenate([a[:, :, :r, :channels], a[:, :, r:, channels:]], axis=2) for a in (k, z))
        c = self.numerics.round(pool(k, z, seen))
        return rms_norm(c, self.params["norm"][layer], self.eps)
