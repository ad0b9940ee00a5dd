"""Rotary position embedding, of interleaved pairs or of halves, with static YaRN or Llama 3's scaling."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from dsjax.config import Llama3Rope, V3Config, Yarn
from dsjax.config.v3 import yarn_magnitude
from dsjax.numerics import Numerics
from quant.operator import operator


def rope_frequencies(channels: int, theta: float, yarn: Yarn | None) -> np.ndarray:
    """Radians per position of each pair, float32 [channels/2]; the same at every length (spec V3 2.2, V4 2.0).

    DeepSeek builds them in float32; for the thetas of its releases these equal PyTorch's bit for bit. At position 1e6 a
    last bit is 0.06 radians.
    """
    d = channels
    # NumPy's float32 power is off by up to two units in the last place; float64's, rounded, is not.
    powers = theta ** (np.arange(0, d, 2, dtype=np.float32) / np.float32(d)).astype(np.float64)
    with np.errstate(over="ignore"):  # what lies beyond float32 turns nothing
        plain, factor = np.float32(1) / powers.astype(np.float32), np.float32(yarn.factor if yarn else 1)
    if yarn is None:
        return plain

    def pair_that_turns(turns: float) -> float:
        return d * math.log(yarn.original_max_position_embeddings / (2 * math.pi * turns)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), d - 1)
    ramp = np.clip((np.arange(d // 2, dtype=np.float32) - low) / np.float32((high - low) or 0.001), 0, 1)
    kept = 1 - ramp
    return plain / factor * (1 - kept) + plain * kept


def llama3_frequencies(channels: int, theta: float, scaling: Llama3Rope | None) -> np.ndarray:
    """Radians per position of each pair, float32 [channels/2] (spec V3 2.9): long waves slowed, short ones kept."""
    plain = rope_frequencies(channels, theta, None)
    if scaling is None:
        return plain
    turns = scaling.original_max_position_embeddings * plain / np.float32(2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - np.float32(low)) / np.float32(high - low), 0, 1)
    return (1 - kept) * plain / np.float32(scaling.factor) + kept * plain


def rope_magnitude(config: V3Config) -> float:
    """Factor on cos and sin: 1 in every release; a ratio of mscale fields otherwise (spec V3 2.2)."""
    yarn = config.yarn
    if yarn is None:
        return 1.0
    if yarn.mscale and yarn.mscale_all_dim:
        return yarn_magnitude(yarn.factor, yarn.mscale) / yarn_magnitude(yarn.factor, yarn.mscale_all_dim)
    return yarn_magnitude(yarn.factor, 1.0)


RopeTable = tuple[Float32[Array, "B T half"], Float32[Array, "B T half"]]
"""cos and sin of every position and pair."""


def rope_table(frequencies: np.ndarray, positions: Int[Array, "B T"], magnitude: float = 1.0) -> RopeTable:
    """cos and sin, float32 [B, T, R/2], for int32 positions [B, T]; made once per step, not per layer.

    Angles are float32 products, as in DeepSeek's code: at position 1e6 anything more exact would differ visibly.
    """
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude


def inverse(table: RopeTable) -> RopeTable:
    """The table that turns back."""
    return table[0], -table[1]


@operator("rope")
def rope(x: Float[Array, "B T *H R"], table: RopeTable) -> Float32[Array, "B T *H R"]:
    """Rotates the pairs (x[2i], x[2i+1]) of the last axis, in float32 (spec V3 2.3).

    Args:
      x: [B, T, R] or [B, T, H, R].
      table: from `rope_table`.
    """
    cos, sin = (t if x.ndim == 3 else t[:, :, None] for t in table)
    x = x.astype(jnp.float32)
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape)


@rope.variant("swap", bound=1e-6)
def _swapped(x: jnp.ndarray, table: RopeTable) -> jnp.ndarray:
    """x * cos + swapped * sin with each pair's channels swapped by a reshape and a reverse: no strided slice."""
    cos, sin = (t if x.ndim == 3 else t[:, :, None] for t in table)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    signed = jnp.stack([-sin, sin], axis=-1)
    return (pairs * cos[..., None] + pairs[..., ::-1] * signed).reshape(x.shape)


@operator("rope_halves")
def rope_halves(x: Float[Array, "B T *H U"], table: RopeTable) -> Float32[Array, "B T *H U"]:
    """Rotates the pairs (x[i], x[i + R/2]) of the first R channels, R as many as the table has, in float32.

    The other layout of RoPE: of V3.2's indexer (spec V3 2.3), whose other channels stay, and of Qwen2 and Llama, whose
    channels all turn.

    Args:
      x: [B, T, U] or [B, T, H, U].
      table: from `rope_table`.
    """
    cos, sin = (t if x.ndim == 3 else t[:, :, None] for t in table)
    half = cos.shape[-1]
    x = x.astype(jnp.float32)
    a, b = x[..., :half], x[..., half : 2 * half]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos, x[..., 2 * half :]], axis=-1)


@operator("rope_tail")
def rope_tail(x: Float[Array, "B T *H U"], table: RopeTable, numerics: Numerics) -> Float[Array, "B T *H U"]:
    """Rotates the last channels of vectors laid out [nope | rope], as many as the table has (spec V4 2.0).

    Args:
      x: in the activation dtype, in which it stays; channels that are not rotated keep every bit.
      table: from `rope_table`.
    """
    nope = x.shape[-1] - 2 * table[0].shape[-1]
    tail = numerics.round(rope(x[..., nope:], table))
    # Not by dynamic_update_slice: XLA:CPU (jaxlib 0.10.2) may write the tail over x while it still reads x for it, and
    # a pair's second channel then sees the first one turned already (in V4's decode, with some numbers of heads).
    tail = jnp.pad(tail, [(0, 0)] * (x.ndim - 1) + [(nope, 0)])
    return jnp.where(jnp.arange(x.shape[-1]) < nope, x, tail)
