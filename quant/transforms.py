"""Quantisation as transforms: arrays -> QArrays, activation quantisation, straight-through gradients."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, UInt8

from quant.formats import E4M3, E8M0, Format, decode, encode, encode_e8m0_ceil, exact_divide, pack
from quant.operator import operator
from quant.qarray import QArray, dequantise, expand_scales, scale_values

AMAX_FLOOR = 1e-4
"""DeepSeek's floor under an E4M3 group's amax: an all-zero group gets a finite scale."""

SCALE_FLOOR = 2.0**-126
"""The floor under every other format's scale, float32's smallest normal number (DeepSeek's own for FP4, spec V4 4.3):
an all-zero group gets a finite scale, and a group of small numbers keeps its relative precision."""

GROUP = 128
"""Channels that share one activation scale."""


def _block_amax(x: jax.Array, block: tuple[int, int]) -> jax.Array:
    """max |x| over blocks of the last two axes, zero-padding partial edge blocks: [..., ceil(N/bn), ceil(K/bk)]."""
    *lead, n, k = x.shape
    bn, bk = block
    nb, kb = math.ceil(n / bn), math.ceil(k / bk)
    widths = [(0, 0)] * len(lead) + [(0, nb * bn - n), (0, kb * bk - k)]
    return jnp.abs(jnp.pad(x, widths)).reshape(*lead, nb, bn, kb, bk).max(axis=(-3, -1))


def _scale(amax: jax.Array, fmt: Format, pow2: bool) -> jax.Array:
    """float32 scales amax / max, rounded up to a power of two if asked."""
    floor = AMAX_FLOOR if fmt == E4M3 else SCALE_FLOOR * fmt.max
    scale = exact_divide(jnp.maximum(amax, floor), jnp.float32(fmt.max))
    return decode(encode_e8m0_ceil(scale), E8M0) if pow2 else scale


def quantise(x: jax.Array, fmt: Format, block: tuple[int, int], *, pow2: bool = False) -> QArray:
    """Quantises the last two axes by blocks: scale = max(amax, floor) / max (spec V3 4.2), codes = round(x / scale).

    The floor is DeepSeek's 1e-4 for E4M3. The other formats' keeps the scale a normal number, and does nothing else.

    Args:
      x: float [..., N, K].
      fmt: E4M3, E5M2, E2M1, INT8 or INT4; K must be even for the 4-bit ones.
      block: (bn, bk); WHOLE spans an axis. Partial edge blocks count as zero-padded.
      pow2: round scales up to powers of two and hold them as E8M0 (uint8); otherwise float32.

    Returns:
      QArray of x's shape.
    """
    x = x.astype(jnp.float32)
    n, k = x.shape[-2:]
    block = (block[0] or n, block[1] or k)
    scales = _scale(_block_amax(x, block), fmt, pow2)
    codes = encode(exact_divide(x, expand_scales(scales, block, (n, k))), fmt)
    return QArray(
        codes=pack(codes) if fmt.packed else codes,
        scales=encode_e8m0_ceil(scales) if pow2 else scales,
        format=fmt,
        block=block,
    )


@operator("act_quant")
def act_quant(x: jax.Array, *, pow2: bool, group: int = GROUP) -> tuple[jax.Array, jax.Array]:
    """DeepSeek's activation quantisation: E4M3 per 1 x group of the last axis (spec V3 4.2).

    Args:
      x: float [..., K]; a last group shorter than `group` counts as zero-padded.
      pow2: UE8M0 scales (V3.1 on) instead of float32 ones (V3, R1).

    Returns:
      codes uint8 [..., K] and scales float32 [..., ceil(K/group)].
    """
    q = quantise(x[..., None, :], E4M3, (1, group), pow2=pow2)
    return q.codes[..., 0, :], scale_values(q.scales)[..., 0, :]


def act_dequant(
    codes: UInt8[Array, "*batch K"], scales: Float32[Array, "*batch groups"], *, group: int = GROUP
) -> Float32[Array, "*batch K"]:
    """float32 [..., K], the numbers that `act_quant` wrote: those of `fake_act_quant`, bit for bit.

    Args:
      codes: uint8 E4M3 [..., K].
      scales: float32 [..., ceil(K/group)].
      group: channels that share a scale.
    """
    values = dequantise(QArray(codes[..., None, :], scales[..., None, :], E4M3, (1, group)))[..., 0, :]
    # XLA:CPU repeats what makes the activations of a product for every row of weights, but never a division.
    return exact_divide(values, jnp.float32(1))


def quantise_rows(
    x: Float[Array, "*batch K"], fmt: Format, group: int
) -> tuple[UInt8[Array, "*batch bytes"], UInt8[Array, "*batch groups"]]:
    """Quantises groups of the last axis with UE8M0 scales, both as bytes: what a cache of keys or latents holds.

    scale = the power of two >= max(amax, floor) / max; codes = round(x / scale). With E4M3 and groups of 64 this is
    DeepSeek-V4's rule for KV (spec V4 4.2), with E2M1 and groups of 32 its rule for the indexer (4.3).

    Args:
      x: float [..., K].
      fmt: E4M3, E5M2, E2M1, INT8 or INT4; K must be even for the 4-bit ones.
      group: channels that share a scale; a last group may be shorter.

    Returns:
      codes uint8 [..., K], or [..., K/2] for 4-bit formats (low nibble = even channel); scales uint8
      [..., ceil(K/group)], E8M0.

    Raises:
      ValueError: if a 4-bit format meets an odd K.
    """
    q = quantise(x[..., None, :], fmt, (1, group), pow2=True)
    return q.codes[..., 0, :], q.scales[..., 0, :]


def dequantise_rows(
    codes: UInt8[Array, "*batch bytes"], scales: UInt8[Array, "*batch groups"], fmt: Format, group: int
) -> Float32[Array, "*batch K"]:
    """float32 [..., K], the numbers that `quantise_rows` wrote.

    Args:
      codes: uint8 [..., K] or, packed, [..., K/2].
      scales: uint8 [..., ceil(K/group)], E8M0.
      fmt: the codes' format.
      group: channels that share a scale.

    Raises:
      ValueError: if there are more or fewer scales than groups.
    """
    q = QArray(codes[..., None, :], scales[..., None, :], fmt, (1, group))
    if scales.shape[-1] != -(-q.shape[-1] // group):
        raise ValueError(f"{scales.shape[-1]} scales do not fit {q.shape[-1]} channels in groups of {group}")
    return dequantise(q)[..., 0, :]


def hadamard(x: Float[Array, "*batch K"]) -> Float32[Array, "*batch K"]:
    """x times the orthonormal Hadamard matrix in Sylvester's order, H[i, j] = (-1)^popcount(i & j) / sqrt(K).

    The matrix is symmetric and its own inverse. It spreads one large channel over all, before they share a scale.

    Args:
      x: float [..., K], K a power of two.

    Returns:
      float32 [..., K], sums and products in float32.

    Raises:
      ValueError: if K is no power of two.
    """
    k = x.shape[-1]
    if k < 1 or k & (k - 1):
        raise ValueError(f"a Hadamard matrix needs a power of two channels, found {k}")
    # Made in the program: as a constant it would be most of an exported module's text.
    i, j = (lax.broadcasted_iota(jnp.int32, (k, k), axis) for axis in (0, 1))
    signs = (1 - 2 * (lax.population_count(i & j) & 1)).astype(jnp.float32)
    # Signs alone are exact in any format that a matrix unit takes; the factor is applied once, to the sums.
    sums = jnp.matmul(x.astype(jnp.float32), signs, precision=lax.Precision.HIGHEST)
    return sums * jnp.float32(k**-0.5)


@jax.custom_jvp
def _straight_through(x: jax.Array, rounded: jax.Array) -> jax.Array:
    return rounded


@_straight_through.defjvp
def _(primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    return primals[1], tangents[0].astype(primals[1].dtype)


def fake_act_quant(x: jax.Array, *, pow2: bool, group: int = GROUP) -> jax.Array:
    """x rounded through `act_quant`, as float32; the gradient passes straight through."""
    codes, scales = act_quant(lax.stop_gradient(x), pow2=pow2, group=group)
    return _straight_through(x, act_dequant(codes, scales, group=group))


def fake_quantise(x: jax.Array, fmt: Format, block: tuple[int, int], *, pow2: bool = False) -> jax.Array:
    """dequantise(quantise(x)), float32 [..., N, K]; the gradient passes straight through."""
    stopped = lax.stop_gradient(x)
    return _straight_through(x, dequantise(quantise(stopped, fmt, block, pow2=pow2)))
