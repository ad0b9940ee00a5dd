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

from dsjax.cache.rows import write_rows
from dsjax.cache.v4 import SHORT_STEP, Compressed, overlap, read_ring, write_ring
from dsjax.layers.norm import rms_norm
from dsjax.numerics import Numerics
from dsjax.params import Tree
from quant import block_scaled_dot
from quant.operator import operator
from quant.rows import RowFormat


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


def window_positions(numbers: Int32[Array, "B n"], ratio: int) -> Int32[Array, "B n slots"]:
    """Positions of the tokens that each entry pools, in order; negative before the sequence."""
    slots = jnp.arange(overlap(ratio) * ratio, dtype=jnp.int32)
    return (numbers[..., None] - (overlap(ratio) - 1)) * ratio + slots


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

    def advance(
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
            k = block_scaled_dot(x, self.params["kv"], index, self.numerics.form)
            z = block_scaled_dot(x, self.params["gate"], index, self.numerics.form)
            z = z + self.params["position"][layer][positions % self.ratio]
            new = jnp.concatenate([k, z], axis=-1)
            start = positions[:, 0]
            end = start + valid.sum(axis=1, dtype=jnp.int32)
            numbers = entry_numbers(start, x.shape[1], self.ratio)
            complete = (numbers + 1) * self.ratio <= end[:, None]
            inputs = write_ring(state.inputs, layer, positions, valid, new)
            at = window_positions(numbers, self.ratio)
            size = inputs.shape[2]

            def windows() -> jax.Array:
                if x.shape[1] <= SHORT_STEP:  # the ring still has all that these entries pool
                    rows, place = read_ring(inputs, layer), at % size
                else:
                    rows = jnp.concatenate([read_ring(state.inputs, layer), new], axis=1)
                    since = at - start[:, None, None]
                    place = jnp.where(since < 0, at % size, size + jnp.minimum(since, x.shape[1] - 1))
                return rows.at[jnp.arange(at.shape[0])[:, None, None], place].get(mode="promise_in_bounds")

            def entries() -> jax.Array:
                return self.row.encode(self.finish(self._pooled(windows(), at >= 0, layer)))

            if x.shape[1] >= self.ratio:
                found = entries()
            else:  # most steps complete none
                shape = jax.eval_shape(entries)
                found = lax.cond(complete.any(), entries, lambda: jnp.zeros(shape.shape, shape.dtype))
            return Compressed(write_rows(state.entries, layer, numbers, complete, found), inputs)

    def _pooled(self, windows: Float32[Array, "B n slots w"], seen: Bool[Array, "B n slots"], layer: Any) -> jax.Array:
        """Entries after the norm, float32 [B, n, channels] (spec V4 2.4, steps 3 to 5)."""
        k, z = jnp.split(windows, 2, axis=-1)
        if overlap(self.ratio) == 2:
            # Tokens of the window before give their first half, the window's own their second.
            channels, r = self.row.channels, self.ratio
            k, z = (jnp.concatenate([a[:, :, :r, :channels], a[:, :, r:, channels:]], axis=2) for a in (k, z))
        c = self.numerics.round(pool(k, z, seen))
        return rms_norm(c, self.params["norm"][layer], self.eps)


@operator("compressor")
def compressor(
    bound: Compressor,
    x: Float[Array, "B T D"],
    state: Compressed,
    layer: Any,
    positions: Int32[Array, "B T"],
    valid: Bool[Array, "B T"],
) -> Compressed:
    """One layer's compressor takes new tokens, and appends the entries that they complete (spec V4 2.4)."""
    return bound.advance(x, state, layer, positions, valid)
