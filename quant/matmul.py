"""Matrix products with quantised weights: a form that reads like the formula, and one that decodes tile by tile.

No weight larger than a tile is decoded whole. XLA:CPU does not fuse a decode into a dot, so a whole decode costs a
temporary of four bytes per weight and the page faults that go with it. On every backend the tiles keep temporary memory
independent of the weight's size.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt8

from quant.formats import E4M3, Format, decode, decode_finite_e4m3, unpack
from quant.qarray import QArray, dequantise, expand_scales, scale_values

TILE_ELEMENTS = 1 << 20
"""Weights decoded at a time, 4 MB as float32: large enough for XLA:CPU to spread a tile over its threads and to hide
what starting an operation costs (measured from 128 K to 2 M; see docs/decisions.md)."""

MAX_TILE_ROWS = 2048
MAX_GROUP_ROWS = 128

Index = tuple[Any, ...]
"""One index, static or traced, per leading (layer, expert) axis of a stacked weight."""


# --- reference forms ------------------------------------------------------------------------------------------------


def reference_dot(x: Float[Array, "*batch K"], w: jax.Array | QArray, index: Index = ()) -> Float32[Array, "*batch N"]:
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


# --- tiled form -----------------------------------------------------------------------------------------------------


def tile_rows(n: int, k: int, bn: int) -> int:
    """Rows per tile for a matrix [n, k] with row blocks of bn: about TILE_ELEMENTS.

    A tile is made of whole blocks or divides one; one that cuts a block would cost a gather of its scales.
    """
    limit = min(n, max(8, min(MAX_TILE_ROWS, TILE_ELEMENTS // k)))
    if limit >= bn:
        return limit - limit % bn
    rows = 1 << (limit.bit_length() - 1)
    return rows if bn % rows == 0 or bn > MAX_TILE_ROWS else min(bn, n)


def _decode_tile(codes: jax.Array, fmt: Format) -> tuple[jax.Array, float]:
    """(values, factor) with the number = values * factor; E4M3 weights hold no NaN (the loader refuses them)."""
    return decode_finite_e4m3(codes) if fmt == E4M3 else (decode(codes, fmt), 1.0)


def _dot(weights: jax.Array, x: jax.Array) -> jax.Array:
    """[n, k] and [t, k] -> [n, t]. With the weights on the left XLA:CPU takes up to 1.5 times less than x @ w.T."""
    return jnp.einsum("nk,tk->nt", weights, x, precision=lax.Precision.HIGHEST)


def _tile_dot(tile: jax.Array | QArray, x: jax.Array) -> jax.Array:
    """A tile [rows, K] with float32 x [T, K] -> float32 [rows, T]."""
    if not isinstance(tile, QArray):
        return _dot(tile.astype(jnp.float32), x)
    parts: tuple[tuple[jax.Array, jax.Array], ...]
    bk = tile.block[1] or tile.shape[-1]
    if tile.format.packed and bk % 2:
        parts = ((x, unpack(tile.codes)),)
    elif tile.format.packed:
        # Interleaving the nibbles costs six times as much as splitting the activations into even and odd channels.
        parts = ((x[:, 0::2], tile.codes & 0xF), (x[:, 1::2], tile.codes >> 4))
        bk //= 2
    else:
        parts = ((x, tile.codes),)
    total = jnp.zeros((), jnp.float32)
    for channels, codes in parts:
        values, factor = _decode_tile(codes, tile.format)
        rows, k = values.shape
        if tile.scales is None:
            total = total + _dot(values * factor, channels)
            continue
        scales = scale_values(tile.scales) * factor
        blocks = scales.shape[0]
        if channels.shape[0] * blocks <= rows:
            # The activations are the smaller side: scale them, once per row block.
            scaled = channels * expand_scales(scales, (1, bk), (blocks, k))[:, None]
            grouped = values.reshape(blocks, -1, k)
            product = jnp.einsum("rnk,rtk->rnt", grouped, scaled, precision=lax.Precision.HIGHEST)
            total = total + product.reshape(rows, -1)
        else:
            total = total + _dot(values * expand_scales(scales, (rows // blocks, bk), (rows, k)), channels)
    return total


def take_tile(w: jax.Array | QArray, index: Index, start: Any, rows: int, *, stride: int) -> jax.Array | QArray:
    """Rows start : start + rows of the matrix w[index], copying no more than that; see `QArray.tile`."""
    if isinstance(w, QArray):
        return w.tile(index, start, rows, stride=stride)
    return lax.dynamic_slice(w, (*index, start, 0), (1,) * len(index) + (rows, w.shape[-1])).reshape(rows, -1)


def block_scaled_dot(
    x: Float[Array, "*batch K"], w: jax.Array | QArray, index: Index = ()
) -> Float32[Array, "*batch N"]:
    """y[..., n] = sum_k x[..., k] w[index][n, k], decoding the weight tile by tile.

    Equal to `reference_dot` within float32 summation order.

    Args:
      x: float [..., K].
      w: [*lead, N, K], a QArray or a float array; `lead` has one axis per entry of `index`.
      index: leading indices; the matrix is sliced at the point of use, so no layer of a stack is ever copied.

    Returns:
      float32 [..., N].

    Raises:
      ValueError: if x, w and index do not fit together.
    """
    n, k = w.shape[-2:]
    if x.shape[-1] != k or len(index) != len(w.shape) - 2:
        raise ValueError(f"activations {x.shape} and index of {len(index)} do not fit weight {w.shape}")
    channels = x.reshape(-1, k).astype(jnp.float32)
    t = channels.shape[0]
    bn = (w.block[0] or n) if isinstance(w, QArray) and w.scales is not None else 1
    rows = tile_rows(n, k, bn)
    full = n // rows

    def one(start: Any, size: int) -> jax.Array:
        return _tile_dot(take_tile(w, index, start, size, stride=rows), channels)

    if full == 1:
        y = one(0, rows)
    else:
        _, tiles = lax.scan(lambda _, i: (None, one(i * rows, rows)), None, jnp.arange(full))
        y = tiles.reshape(full * rows, t)
    if full * rows < n:
        y = jnp.concatenate([y, one(full * rows, n - full * rows)], axis=0)
    return y.T.reshape(*x.shape[:-1], n)


# --- grouped form ---------------------------------------------------------------------------------------------------


@partial(jax.tree_util.register_dataclass, data_fields=["source", "place", "expert", "used"], meta_fields=["size"])
@dataclasses.dataclass(frozen=True)
class Groups:
    """Assignments (token, choice) sorted by expert into blocks of `size` rows, each block of one expert.

    P = T * k assignments, G blocks (a static bound; only the first `used` hold work).

    Attributes:
      source: int32 [G * size], the assignment in each row, P where the row is empty.
      place: int32 [T, k], the row of each assignment, G * size where it was masked out.
      expert: int32 [G], the expert of each block.
      used: int32 [], number of blocks that hold work.
      size: rows per block.
    """

    source: Any
    place: Any
    expert: Any
    used: Any
    size: int


def group_size(tokens: int, choices: int, experts: int) -> int:
    """Rows per block: a power of two a third above an expert's mean load.

    Larger blocks compute more padding, smaller ones decode an expert's weights more often; decoding costs about as
    much as 15 rows (measured on XLA:CPU).
    """
    mean = -(-tokens * choices // experts)
    target = min(tokens, -(-4 * mean // 3), MAX_GROUP_ROWS)
    return 1 << max(target - 1, 0).bit_length()


def group_tokens(choices: Int32[Array, "T k"], experts: int, valid: Bool[Array, " T"], size: int) -> Groups:
    """Sorts assignments by expert into blocks, in static shapes.

    Args:
      choices: int32 [T, k], expert of each assignment.
      experts: E.
      valid: bool [T]; assignments of invalid tokens (padding) get no row and cost no work.
      size: rows per block.
    """
    t, k = choices.shape
    p = t * k
    blocks = min(p, experts + p // size)
    flat = jnp.where(valid[:, None], choices, experts).reshape(p)
    order = jnp.argsort(flat, stable=True)
    counts = jnp.zeros(experts + 1, jnp.int32).at[flat].add(1)[:experts]
    per_expert = (counts + size - 1) // size
    last_block = jnp.cumsum(per_expert)
    # Rank inside its expert and first block of its expert, for each assignment in sorted order.
    of = jnp.minimum(flat[order], experts - 1)
    rank = jnp.arange(p, dtype=jnp.int32) - (jnp.cumsum(counts) - counts)[of]
    row = jnp.where(flat[order] < experts, (last_block - per_expert)[of] * size + rank, blocks * size)
    source = jnp.full(blocks * size, p, jnp.int32).at[row].set(order.astype(jnp.int32), mode="drop")
    place = jnp.zeros(p, jnp.int32).at[order].set(row.astype(jnp.int32)).reshape(t, k)
    expert = jnp.searchsorted(last_block, jnp.arange(blocks), side="right").astype(jnp.int32)
    return Groups(source, place, jnp.minimum(expert, experts - 1), last_block[-1].astype(jnp.int32), size)


def grouped_matmul(
    x: Float[Array, "rows K"], w: jax.Array | QArray, groups: Groups, index: Index = ()
) -> Float32[Array, "rows N"]:
    """Each block of rows times its expert's matrix: a loop over the blocks that hold work, in plain operations.

    Work grows with the routed tokens, not with the number of experts; a chosen expert's bytes are decoded once per
    block.

    Args:
      x: float [G * size, K], rows as `groups` lays them out.
      w: [*lead, E, N, K], QArray or float.
      groups: from `group_tokens`.
      index: indices of the `lead` axes.

    Returns:
      float32 [G * size, N]; rows of unused blocks are zero.
    """
    size = groups.size

    def body(b: jax.Array, out: jax.Array) -> jax.Array:
        rows = lax.dynamic_slice_in_dim(x, b * size, size)
        y = block_scaled_dot(rows, w, (*index, groups.expert[b]))
        return lax.dynamic_update_slice_in_dim(out, y, b * size, axis=0)

    return lax.fori_loop(0, groups.used, body, jnp.zeros((x.shape[0], w.shape[-2]), jnp.float32))
