"""Matrix products with quantised weights: a form that reads like the formula, and two that never decode a weight whole.

Few tokens (decode): *fused*. Decoding, product and sum are one loop over the stored bytes; with the options of
`dsjax.backend` XLA:CPU writes no decoded weight to memory.

More tokens (prefill, large batches): *by tiles*. A tile of the weight is decoded, then multiplied by the backend's
matrix product, in the activations' dtype: bfloat16 activations take the matrix units with bfloat16 operands and float32
sums, the dequantised weight rounded once; float32 activations, or float32 weights, take float32 products. Temporary
memory does not grow with the weight on any backend.

Which of the two is a `Form`'s choice: compilers differ in what they make of them.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, UInt8

from quant.form import FUSED, TILED, Form
from quant.formats import (
    BF16,
    E2M1,
    E4M3,
    F16,
    decode,
    decode_finite_e4m3,
    decode_packed_e2m1,
    round_to_bfloat16,
    unpack,
)
from quant.operator import operator
from quant.qarray import QArray, dequantise, expand_scales, scale_values

TILE_BYTES = 4 << 20
"""Decoded bytes per tile: large enough for XLA:CPU to spread a tile over its threads and to hide what starting an
operation costs (measured; see docs/decisions.md)."""

MAX_TILE_ROWS = 2048

FUSED_ELEMENTS = 1 << 24
"""Weights in one fused product. Where a compiler does not fuse, its partial sums take 1/16 of that per token and more,
in float32."""

LANES = 32
"""Channels added side by side in the fused form: a multiple of any vector register's width."""

MAX_STEPS = 16
"""Additions per lane in one partial sum. XLA:CPU unrolls a reduction of up to 16 and then vectorises the lanes; one
more and it does neither (2048 x 1024: 22 against 3 billion weights a second)."""

GROUP = 32
"""Channels under one scale, each row with its own, in OCP's MX formats: DeepSeek-V4's FP4 experts."""

GROUP_STEPS = 8
"""MAX_STEPS of the form for such groups. A step does twice as much: with 16 XLA:CPU unrolls but vectorises nothing
(a third of the speed)."""

Index = tuple[Any, ...]
"""One index, static or traced, per leading (layer, expert) axis of a stacked weight."""

Weight = jax.Array | QArray


# --- reference forms ------------------------------------------------------------------------------------------------


def reference_dot(x: Float[Array, "*batch K"], w: Weight, index: Index = ()) -> Float32[Array, "*batch N"]:
    """y[..., n] = sum_k x[..., k] w[index][n, k] in float32, the weight decoded whole."""
    matrix = dequantise(w[index]) if isinstance(w, QArray) else w[index].astype(jnp.float32)
    return jnp.einsum("...k,nk->...n", x.astype(jnp.float32), matrix, precision=lax.Precision.HIGHEST)


def reference_block_scaled_dot(
    codes: UInt8[Array, "T K"], scales: Float32[Array, "T groups"], w: QArray
) -> Float32[Array, "T N"]:
    """DeepSeek's FP8 product (spec V3 4.3): float32 sums inside each 128-block, scaled, then added in float32.

    Args:
      codes: uint8 E4M3 [T, K], as `act_quant` returns them.
      scales: float32 [T, ceil(K/128)].
      w: E4M3 QArray [N, K] with block (bn, 128).

    Returns:
      float32 [T, N].
    """
    n, k = w.shape
    bk = w.block[1]
    if w.format != E4M3 or bk < 1 or -(-k // bk) != scales.shape[-1]:
        raise ValueError(f"activation groups {scales.shape} do not match weight blocks {w.block} of {w.shape}")
    pad = scales.shape[-1] * bk - k

    def blocks(c: jax.Array) -> jax.Array:
        return jnp.pad(decode(c, E4M3), ((0, 0), (0, pad))).reshape(c.shape[0], -1, bk)

    partial_sums = jnp.einsum("tbk,nbk->tnb", blocks(codes), blocks(w.codes), precision=lax.Precision.HIGHEST)
    row_scales = expand_scales(scale_values(w.scales), (w.block[0], 1), (n, scales.shape[-1]))
    return jnp.sum(partial_sums * scales[:, None, :] * row_scales[None], axis=-1)


# --- one tile -------------------------------------------------------------------------------------------------------


def _split_scales(tile: QArray) -> tuple[jax.Array | None, jax.Array | None]:
    """(block scales [*lead, R, CB] as held, of N / R rows each; float32 row scales [*lead, N]); one of them is None.

    A scale that spans all channels is a row scale: it is applied to the result, at no cost per weight.
    """
    if tile.scales is None:
        return None, None
    scales = tile.scales
    n = tile.shape[-2]
    bn = tile.block[0] or n
    if scales.shape[-1] == 1:
        return None, expand_scales(scale_values(scales), (bn, 1), (n, 1))[..., 0]
    rows = math.gcd(n, bn)  # a last block that is cut: smaller blocks of equal size
    return (scales if rows == bn else scales[..., np.arange(0, n, rows) // bn, :]), None


def _nibbles(tile: QArray) -> tuple[jax.Array, jax.Array, float]:
    """Values of the even and of the odd channels of a packed tile, each [*lead, N, K/2], and a factor on them."""
    if tile.format == E2M1:
        return decode_packed_e2m1(tile.codes)
    return decode(tile.codes & 0xF, tile.format), decode(tile.codes >> 4, tile.format), 1.0


def _parts(tile: Weight, x: jax.Array) -> tuple[list[tuple[jax.Array, jax.Array, int]], float]:
    """([(decoded values [*lead, N, k], their activations [*lead, T, k], channel block)], factor on the values)."""
    if not isinstance(tile, QArray):
        return [(tile.astype(jnp.float32), x, 1)], 1.0
    bk = tile.block[1] or tile.shape[-1]
    if tile.format == E4M3:  # weights hold no NaN: the loader refuses them
        values, factor = decode_finite_e4m3(tile.codes)
        return [(values, x, bk)], factor
    if not tile.format.packed:
        return [(decode(tile.codes, tile.format), x, bk)], 1.0
    if bk % 2:
        return [(decode(unpack(tile.codes), tile.format), x, bk)], 1.0
    # Interleaving the nibbles costs six times as much as splitting the activations into even and odd channels.
    even, odd, factor = _nibbles(tile)
    return [(even, x[..., 0::2], bk // 2), (odd, x[..., 1::2], bk // 2)], factor


def fused_steps(length: int, lanes: int = LANES, most: int = MAX_STEPS) -> int:
    """Additions per lane in one partial sum, or 0 where `length` does not divide into such sums well."""
    groups, rest = divmod(length, lanes)
    if rest or not groups:
        return 0
    steps = max(s for s in range(1, most + 1) if groups % s == 0)
    return steps if steps == groups or steps >= 4 else 0


def fused_sum(products: jax.Array) -> jax.Array:
    """Sum over the last axis, in the shape that XLA:CPU fuses with what made the products and vectorises."""
    *lead, k = products.shape
    partial_sums = products.reshape(*lead, -1, fused_steps(k), LANES).sum(axis=-2)
    return lax.optimization_barrier(partial_sums).sum(axis=(-2, -1))


def _has_row_groups(w: Weight) -> bool:
    """Whether each row of w has a scale for every GROUP channels, two channels a byte."""
    return isinstance(w, QArray) and w.format.packed and w.block == (1, GROUP)


def can_fuse(shape: tuple[int, ...], w: Weight, tokens: int, form: Form = FUSED) -> bool:
    """Whether a tile [..., N, K] of w takes the fused form."""
    if tokens > form.fused_tokens:
        return False
    n, k = shape[-2:]
    packed = isinstance(w, QArray) and w.format.packed
    if _has_row_groups(w):
        return fused_steps(k, GROUP, GROUP_STEPS) > 0
    if not fused_steps(k // 2 if packed else k):
        return False
    if not isinstance(w, QArray) or w.scales is None or w.scales.shape[-1] == 1:
        return True
    return math.gcd(n, w.block[0] or n) >= MAX_STEPS and not (packed and w.block[1] % 2)


def _takes_bfloat16(w: Weight, tokens: int, dtype: Any, form: Form) -> bool:
    """Whether a decoded tile is multiplied in bfloat16. What is held in float32 or float16 has more bits than that."""
    return isinstance(w, QArray) and w.format != F16 and dtype == jnp.bfloat16 and tokens > form.fused_tokens


def _fused_group_dot(tile: QArray, x: jax.Array) -> jax.Array:
    """The fused form for scales per row and GROUP channels. The 16 bytes of a group are 16 lanes, one scale for all."""
    *lead, n, k = tile.shape
    t = x.shape[-2]
    lanes = GROUP // 2
    steps = fused_steps(k, GROUP, GROUP_STEPS)
    grid = (k // GROUP // steps, steps, lanes)
    even, odd, factor = _nibbles(tile)
    x = x.astype(jnp.float32)

    def products(values: jax.Array, channels: jax.Array) -> jax.Array:
        return values.reshape(*lead, n, 1, *grid) * channels.reshape(*lead, 1, t, *grid)

    total = products(even, x[..., 0::2]) + products(odd, x[..., 1::2])
    scales = tile.scales
    if scales.dtype == jnp.uint8:  # E8M0 as float32's exponent: 2^-127 becomes zero, as its products would on XLA:CPU
        scales = lax.bitcast_convert_type(scales.astype(jnp.uint32) << 23, jnp.float32)
    total = total * scales.reshape(*lead, n, 1, *grid[:2], 1)
    y = lax.optimization_barrier(total.sum(axis=-2)).sum(axis=(-2, -1))  # as in `fused_sum`
    return jnp.swapaxes(y if factor == 1.0 else y * factor, -1, -2)


def _inverse(scales: jax.Array) -> jax.Array:
    """E8M0 codes as float32 1 / scale, to divide by: exact, and XLA:CPU does not repeat a division for every row of the
    product that follows, as it would a multiplication. float32 scales as they are, to multiply by."""
    if scales.dtype != jnp.uint8:
        return scales
    return lax.bitcast_convert_type((254 - scales.astype(jnp.int32)) << 23, jnp.float32)


def _fused_dot(tile: Weight, x: jax.Array) -> jax.Array:
    if isinstance(tile, QArray) and _has_row_groups(tile):
        return _fused_group_dot(tile, x)
    block, row = _split_scales(tile) if isinstance(tile, QArray) else (None, None)
    *lead, n, _ = tile.shape
    t = x.shape[-2]
    r = 1 if block is None else block.shape[-2]
    parts, factor = _parts(tile, x.astype(jnp.float32))
    total: Any = 0
    for values, channels, bk in parts:
        k = values.shape[-1]
        channels = channels[..., None, :, :]
        if block is not None:
            # The activations are the smaller side: they carry the scales, once per row block.
            spread = expand_scales(_inverse(block), (1, bk), (r, k))[..., :, None, :]
            channels = channels / spread if block.dtype == jnp.uint8 else channels * spread
        channels = lax.optimization_barrier(channels)  # made once, not again for every row
        total = total + values.reshape(*lead, r, n // r, 1, k) * channels.reshape(*channels.shape[:-2], 1, t, k)
    y = fused_sum(total).reshape(*lead, n, t)
    if factor != 1.0:
        y = y * factor
    return jnp.swapaxes(y if row is None else y * row[..., None], -1, -2)


def _spread(block: jax.Array, factor: float, bk: int, k: int, form: Form) -> jax.Array:
    """Block scales [*lead, r, CB] as held -> float32 [*lead, r, k], times a factor."""
    if form.spread == "repeat" or bk >= 128:  # whole rows of lanes repeat without harm
        # Scales are spread over channels beforehand: the loop over weights then divides no index.
        return lax.optimization_barrier(expand_scales(scale_values(block) * factor, (1, bk), (block.shape[-2], k)))
    channel = lax.broadcasted_iota(jnp.int32, (block.shape[-1], k), 1)
    ones = channel // bk == lax.broadcasted_iota(jnp.int32, channel.shape, 0)
    values, dtype = scale_values(block) * factor, jnp.float32
    if block.dtype == jnp.uint8:  # powers of two, which bfloat16 holds
        values, dtype = values.astype(jnp.bfloat16), jnp.bfloat16
    ones = jnp.where(ones, jnp.ones((), dtype), jnp.zeros((), dtype))  # a cast of booleans some compilers take for -1
    return jnp.einsum(
        "...rc,ck->...rk", values, ones, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def _decoded_dot(tile: Weight, x: jax.Array, form: Form) -> jax.Array:
    block, row = _split_scales(tile) if isinstance(tile, QArray) else (None, None)
    n = tile.shape[-2]
    bfloat16 = _takes_bfloat16(tile, x.shape[-2], x.dtype, form)
    parts, factor = _parts(tile, x if bfloat16 else x.astype(jnp.float32))
    y: Any = 0
    for values, channels, bk in parts:
        k = values.shape[-1]
        if block is not None:
            r = block.shape[-2]
            spread = _spread(block, factor, bk, k, form)
            values = values.reshape(*values.shape[:-2], r, n // r, k) * spread[..., None, :]
            values = values.reshape(*values.shape[:-3], n, k)
        if bfloat16 and isinstance(tile, QArray) and tile.format == BF16:
            values = lax.bitcast_convert_type(tile.codes, jnp.bfloat16)
        elif bfloat16:
            values = round_to_bfloat16(values)
        y = y + jnp.einsum(
            "...tk,...nk->...tn",
            channels,
            values,
            precision=None if bfloat16 else lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
    if block is None and factor != 1.0:
        y = y * factor
    return y if row is None else y * row[..., None, :]


def tile_dot(tile: Weight, x: Float[Array, "*lead T K"], form: Form = FUSED) -> Float32[Array, "*lead T N"]:
    """x [*lead, T, K] with a tile [*lead, N, K]; the tile should be a slice, which is then read in place."""
    if can_fuse(tile.shape, tile, x.shape[-2], form):
        return _fused_dot(tile, x)
    return _decoded_dot(tile, x, form)


def transposed_tile_dot(tile: Weight, x: Float[Array, "*lead T N"], form: Form = FUSED) -> Float32[Array, "*lead T K"]:
    """x [*lead, T, N] with the transpose of a tile [*lead, N, K]: y[..., k] = sum_n x[..., n] tile[n, k]."""
    *_, n, k = tile.shape
    t = x.shape[-2]
    steps = fused_steps(n, 1)
    block, row = _split_scales(tile) if isinstance(tile, QArray) else (None, None)
    per_block = n if block is None else n // block.shape[-2]
    packed = isinstance(tile, QArray) and tile.format.packed
    if t > form.fused_tokens or packed or not steps or n // steps > MAX_STEPS or per_block % steps:
        weights = dequantise(tile) if isinstance(tile, QArray) else tile.astype(jnp.float32)
        if _takes_bfloat16(tile, t, x.dtype, form):
            return jnp.einsum("...nk,...tn->...tk", round_to_bfloat16(weights), x, preferred_element_type=jnp.float32)
        x = x.astype(jnp.float32)
        return jnp.einsum("...nk,...tn->...tk", weights, x, precision=lax.Precision.HIGHEST)
    x = x.astype(jnp.float32)
    x = lax.optimization_barrier(x if row is None else x * row[..., None, :])
    [(values, _, bk)], factor = _parts(tile, x)
    if block is not None:
        block = lax.optimization_barrier(expand_scales(scale_values(block) * factor, (1, bk), (block.shape[-2], k)))
    total: Any = 0
    for first in range(0, n, steps):  # partial sums one by one, each unrolled and vectorised over k
        part = slice(first, first + steps)
        products = values[..., None, part, :] * x[..., part, None]
        partial_sum = products.sum(axis=-2)
        total = total + (partial_sum if block is None else partial_sum * block[..., None, first // per_block, :])
    return total * factor if block is None and factor != 1.0 else total


# --- one matrix of a stack ------------------------------------------------------------------------------------------


def tile_elements(shape: tuple[int, ...], w: Weight, tokens: int, dtype: Any, form: Form = FUSED) -> int:
    """Weights to take at a time from a matrix of this shape for that many tokens of activations in `dtype`."""
    if can_fuse(shape, w, tokens, form):
        return FUSED_ELEMENTS
    return TILE_BYTES // (2 if _takes_bfloat16(w, tokens, dtype, form) else 4)


def tile_rows(n: int, k: int, bn: int, limit: int, multiple: int = 1) -> int:
    """Rows per tile for a matrix [n, k] with row blocks of bn: about `limit` weights.

    A tile is made of whole blocks or divides one; one that cuts a block would cost a gather of its scales.

    Args:
      multiple: of rows, of which a tile has a multiple where that is possible; a power of two.
    """
    rows = min(n, max(8, limit // k))
    if rows == n:
        return n
    rows = rows if limit == FUSED_ELEMENTS else min(rows, MAX_TILE_ROWS)  # no limit for the fused form
    step = math.lcm(bn, multiple)
    if rows >= step:
        return rows - rows % step
    if rows >= bn:
        return rows - rows % bn
    rows = 1 << (rows.bit_length() - 1)
    return rows if bn % rows == 0 or bn > MAX_TILE_ROWS else min(bn, n)


def take_tile(w: Weight, index: Index, start: Any, rows: int, *, stride: int) -> Weight:
    """Rows start : start + rows of the matrix w[index], copying no more than that; see `QArray.tile`."""
    if isinstance(w, QArray):
        return w.tile(index, start, rows, stride=stride)
    return lax.dynamic_slice(w, (*index, start, 0), (1,) * len(index) + (rows, w.shape[-1])).reshape(rows, -1)


@operator("block_scaled_dot", first="form")
def block_scaled_dot(
    x: Float[Array, "*batch K"], w: Weight, index: Index = (), form: Form = FUSED
) -> Float32[Array, "*batch N"]:
    """y[..., n] = sum_k x[..., k] w[index][n, k], decoding the weight as it is used.

    With few tokens, float32 activations or float32 weights, equal to `reference_dot` within float32 summation order.
    With more than the form's `fused_tokens` in bfloat16, the dequantised weight is rounded to bfloat16 too, as in a
    bfloat16 copy of the checkpoint; sums stay float32.

    Args:
      x: float [..., K].
      w: [*lead, N, K], a QArray or a float array; `lead` has one axis per entry of `index`.
      index: leading indices; the matrix is sliced at the point of use, so no layer of a stack is ever copied.
      form: how it is written.

    Returns:
      float32 [..., N].

    Raises:
      ValueError: if x, w and index do not fit together.
    """
    n, k = w.shape[-2:]
    if x.shape[-1] != k or len(index) != len(w.shape) - 2:
        raise ValueError(f"activations {x.shape} and index of {len(index)} do not fit weight {w.shape}")
    channels = x.reshape(-1, k)
    t = channels.shape[0]
    bn = (w.block[0] or n) if isinstance(w, QArray) and w.scales is not None else 1
    rows = tile_rows(n, k, bn, tile_elements((n, k), w, t, x.dtype, form), form.tile_rows)
    full = n // rows

    def one(start: Any, size: int = rows) -> jax.Array:
        return tile_dot(take_tile(w, index, start, size, stride=rows if rows < n else 0), channels, form)

    if can_fuse((n, k), w, t, form):
        # Two tiles in a step of the loop: XLA:CPU fuses a lone one with the update of the result, on a single thread.
        pairs = full // 2 if full > 2 else 0
        rest = [one(start, min(rows, n - start)) for start in range(2 * pairs * rows, n, rows)]
        if pairs:
            starts = jnp.arange(pairs) * (2 * rows)
            _, y = lax.scan(lambda _, s: (None, jnp.concatenate([one(s), one(s + rows)], axis=-1)), None, starts)
            rest.insert(0, jnp.moveaxis(y, 0, 1).reshape(t, -1))
        y = jnp.concatenate(rest, axis=-1)
    elif full < 2:
        y = jnp.concatenate([one(start, min(rows, n - start)) for start in range(0, n, rows)], axis=-1)
    else:
        # Written where it stays: stacked and then turned over, many tokens' results would be copied twice more.
        def step(i: Any, y: jax.Array) -> jax.Array:
            return lax.dynamic_update_slice(y, one(i * rows), (0, i * rows))

        y = lax.fori_loop(0, full, step, jnp.zeros((t, n), jnp.float32))
        if full * rows < n:
            y = lax.dynamic_update_slice(y, one(full * rows, n - full * rows), (0, full * rows))
    return y.reshape(*x.shape[:-1], n)


@block_scaled_dot.variant("fused", bound=1e-6)
def _fused(x: jax.Array, w: Weight, index: Index = (), form: Form = FUSED) -> jax.Array:
    """In the form for compilers that fuse decoding, product and sum (`quant.FUSED`)."""
    return block_scaled_dot.variants["form"].body(x, w, index, FUSED)


@block_scaled_dot.variant("tiled", bound=1e-6)
def _tiled(x: jax.Array, w: Weight, index: Index = (), form: Form = FUSED) -> jax.Array:
    """In the form for matrix units (`quant.TILED`)."""
    return block_scaled_dot.variants["form"].body(x, w, index, TILED)


@block_scaled_dot.variant("whole", bound=1e-6)
def _whole(x: jax.Array, w: Weight, index: Index = (), form: Form = FUSED) -> jax.Array:
    """The weight decoded whole, then one float32 product: no loop, and the memory of a decoded weight."""
    return reference_dot(x, w, index)
