"""INT8 activations, and their products with INT8 and INT4 weights: sums of integers are exact, scales come after.

What W8A8 and W4A8 mean where they are deployed: codes are multiplied as int8 x int8 and added in int32, per output
channel over the whole row, or over blocks and groups of 128 channels, whose sums are scaled and added in float32.
Activations are quantised per token as they come ("dynamic"), or per token and 128 channels where weights have 128 x 128
blocks.

Two forms, as in `quant.matmul`. Up to the form's `fused_tokens` on a CPU, decoding, product and sum are one loop over
the stored bytes: int16 products, int32 sums. Else, and on any other platform, `dot_general` of int8 to int32, which is
what a compiler for integer matrix units looks for. Where one scale spans a row, both give the same bits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from quant.form import FUSED, Form
from quant.formats import INT4, INT8, decode, exact_divide, unpack
from quant.grouped import Groups
from quant.matmul import (
    FUSED_ELEMENTS,
    GROUP_STEPS,
    LANES,
    MAX_STEPS,
    TILE_BYTES,
    Index,
    fused_steps,
    tile_dot,
    tile_rows,
)
from quant.operator import operator
from quant.qarray import WHOLE, QArray, expand_scales
from quant.transforms import GROUP, SCALE_FLOOR

_PAIRS = GROUP // 2
"""Bytes of a group of 128 INT4 channels: as many lanes, with one scale for all of them."""


@partial(jax.tree_util.register_dataclass, data_fields=["codes", "scales"], meta_fields=["group"])
@dataclasses.dataclass(frozen=True)
class Int8Rows:
    """Activations that stand for `codes * scales`.

    Attributes:
      codes: int8 [..., K], from -127 to 127.
      scales: float32 [..., 1], or [..., ceil(K/group)].
      group: channels that share a scale; WHOLE for all.
    """

    codes: Any
    scales: Any
    group: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    @property
    def values(self) -> jax.Array:
        """float32 [..., K]"""
        k = self.shape[-1]
        spread = expand_scales(self.scales[..., None, :], (1, self.group or k), (1, k))[..., 0, :]
        # XLA:CPU repeats what makes the activations of a product for every row of weights, but never a division.
        return exact_divide(self.codes.astype(jnp.float32) * spread, jnp.float32(1))

    def reshape(self, *lead: int) -> Int8Rows:
        """Other leading axes."""
        codes, scales = (a.reshape(*lead, a.shape[-1]) for a in (self.codes, self.scales))
        return dataclasses.replace(self, codes=codes, scales=scales)


@operator("act_quant_int8")
def act_quant_int8(
    x: Float[Array, "*batch K"], group: int = WHOLE, largest: Callable[[jax.Array], jax.Array] = lambda amax: amax
) -> Int8Rows:
    """Symmetric INT8 per token, or per token and group of channels (spec V3 6.4).

    scale = max |x| / 127, codes = round(x / scale) to nearest even; nothing exceeds 127 then. A group of zeros gets the
    smallest normal number as its scale.

    Args:
      x: float [..., K].
      group: channels that share a scale, WHOLE for all; a last group may be shorter.
      largest: given the maxima float32 [..., groups] of what is here, those of whole rows: where K is split over
        devices and one scale spans a row, the maximum over them.
    """
    x = x.astype(jnp.float32)
    *lead, k = x.shape
    size = group or k
    magnitudes = jnp.pad(jnp.abs(x), [(0, 0)] * len(lead) + [(0, -k % size)])
    amax = largest(magnitudes.reshape(*lead, -1, size).max(axis=-1))
    scales = exact_divide(jnp.maximum(amax, SCALE_FLOOR * INT8.max), jnp.float32(INT8.max))
    spread = expand_scales(scales[..., None, :], (1, size), (1, k))[..., 0, :]
    codes = jnp.clip(jnp.round(exact_divide(x, spread)), -INT8.max, INT8.max).astype(jnp.int8)
    return Int8Rows(codes, scales, group)


def is_integer(w: Any) -> bool:
    """Whether a weight is held in INT8 or INT4."""
    return isinstance(w, QArray) and w.format in (INT8, INT4)


# --- the formula ----------------------------------------------------------------------------------------------------


def _sum_width(rows: Int8Rows, w: QArray) -> int:
    """Channels whose products share both scales: those of one integer sum.

    Raises:
      ValueError: if neither width divides the other.
    """
    k = w.shape[-1]
    widths = sorted(min(width or k, k) for width in (w.block[1], rows.group))
    if rows.shape[-1] != k or not is_integer(w):
        raise ValueError(f"INT8 activations {rows.shape} do not fit {w.format.name} weights {w.shape}")
    if widths[-1] < k and widths[-1] % widths[0]:
        raise ValueError(f"groups of {rows.group} activations and blocks {w.block} of weights cut each other")
    return widths[0]


def _scales_per_sum(rows: Int8Rows, w: QArray, width: int) -> tuple[jax.Array, jax.Array]:
    """float32 scales of every integer sum: of activations [*lead, T, 1 or G], of weights [*lead, N, G]."""
    n, k = w.shape[-2:]
    sums = math.ceil(k / width)

    def repeats(block: int) -> int:
        return max(1, block // width) if WHOLE < block < k else sums

    weights = expand_scales(w.scales, (w.block[0] or n, repeats(w.block[1])), (n, sums))
    if rows.group == WHOLE:
        return rows.scales, weights
    return jnp.repeat(rows.scales, repeats(rows.group), axis=-1)[..., :sums], weights


def reference_int8_dot(rows: Int8Rows, w: QArray) -> Float32[Array, "T N"]:
    """Integer sums over channels that share their scales, scaled, then added in float32.

    With one scale per row on both sides y[t, n] = float32(sum_k x[t, k] w[n, k]) * w_scale[n] * x_scale[t].

    Args:
      rows: [T, K].
      w: INT8 or INT4 [N, K].
    """
    width = _sum_width(rows, w)
    k = w.shape[-1]
    pad = -k % width
    codes = unpack(w.codes) if w.format.packed else w.codes
    integers = decode(codes, w.format).astype(jnp.int32)

    def parts(a: jax.Array) -> jax.Array:
        return jnp.pad(a.astype(jnp.int32), ((0, 0), (0, pad))).reshape(a.shape[0], -1, width)

    sums = jnp.einsum("tgk,ngk->tng", parts(rows.codes), parts(integers)).astype(jnp.float32)
    of_rows, of_weights = _scales_per_sum(rows, w, width)
    if rows.group == WHOLE:
        return jnp.sum(sums * of_weights, axis=-1) * of_rows
    return jnp.sum(sums * of_weights * of_rows[:, None, :], axis=-1)


# --- one tile -------------------------------------------------------------------------------------------------------


def _int8_parts(tile: QArray, rows: Int8Rows) -> list[tuple[jax.Array, jax.Array]]:
    """[(int8 weights [*lead, N, k], their int8 activations [*lead, T, k])]: of INT4 the even and the odd channels."""
    if tile.format == INT8:
        return [(lax.bitcast_convert_type(tile.codes, jnp.int8), rows.codes)]
    wide = lax.bitcast_convert_type(tile.codes, jnp.int8)
    return [(wide << 4 >> 4, rows.codes[..., 0::2]), (wide >> 4, rows.codes[..., 1::2])]


def _integer_dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """int8 [*lead, T, k] with int8 [*lead, N, k] -> int32 [*lead, T, N]"""
    return jnp.einsum("...tk,...nk->...tn", x, w, preferred_element_type=jnp.int32)


def _plain_dot(tile: QArray, rows: Int8Rows) -> jax.Array:
    """By `dot_general` of int8; groups one after the other, as XLA:CPU has no fast product of many small ones."""
    width, k = _sum_width(rows, tile), tile.shape[-1]
    of_rows, of_weights = _scales_per_sum(rows, tile, width)
    of_weights = jnp.swapaxes(of_weights, -1, -2)  # [*lead, G, N]
    parts = _int8_parts(tile, rows)
    per_part = width // len(parts)

    def one(g: Any, first: Any, size: int) -> jax.Array:
        """The scaled sum of group g, of `size` channels of each part from `first`."""
        cut = partial(lax.dynamic_slice_in_dim, start_index=first, slice_size=size, axis=-1)
        total = sum(_integer_dot(cut(x), cut(w)) for w, x in parts).astype(jnp.float32)  # type: ignore[union-attr]
        total = total * lax.dynamic_slice_in_dim(of_weights, g, 1, axis=-2)
        return total if rows.group == WHOLE else total * lax.dynamic_slice_in_dim(of_rows, g, 1, axis=-1)

    full, rest = divmod(k, width)
    shape = (*rows.shape[:-1], tile.shape[-2])
    if full == 1:
        y = one(0, 0, per_part)
    else:
        y = lax.fori_loop(0, full, lambda g, y: y + one(g, g * per_part, per_part), jnp.zeros(shape, jnp.float32))
    if rest:
        y = y + one(full, full * per_part, rest // len(parts))
    return y * of_rows if rows.group == WHOLE else y


def _once(x: jax.Array) -> jax.Array:
    """int16 codes, made once, not again for every row of weights: by a division, which XLA:CPU does not repeat."""
    return lax.div(x.astype(jnp.int16), lax.optimization_barrier(jnp.ones_like(x, jnp.int16)))


def _fused_row_dot(tile: QArray, rows: Int8Rows) -> jax.Array:
    """One scale per row: int16 products, int32 sums, in lanes as `quant.matmul` has them."""
    *lead, n, _ = tile.shape
    t = rows.shape[-2]
    total: Any = 0
    for weights, x in _int8_parts(tile, rows):
        k = x.shape[-1]
        lanes = (k // LANES // fused_steps(k), fused_steps(k), LANES)
        products = weights.astype(jnp.int16).reshape(*lead, n, 1, *lanes) * _once(x).reshape(*lead, 1, t, *lanes)
        total = total + products.astype(jnp.int32).sum(axis=-2)
    sums = lax.optimization_barrier(total).sum(axis=(-2, -1)).astype(jnp.float32)  # [*lead, N, T]
    scales = expand_scales(tile.scales, (tile.block[0] or n, 1), (n, 1))
    return jnp.swapaxes(sums * scales, -1, -2) * rows.scales


def _fused_group_dot(tile: QArray, rows: Int8Rows) -> jax.Array:
    """INT4 with a scale per row and 128 channels: the 64 bytes of a group are lanes under one scale.

    Two products of a byte fit 16 bits together; they are scaled before they are added further.
    """
    *lead, n, k = tile.shape
    t = rows.shape[-2]
    steps = fused_steps(k // 2, _PAIRS, GROUP_STEPS)
    lanes = (k // GROUP // steps, steps, _PAIRS)
    total: Any = 0
    for weights, x in _int8_parts(tile, rows):
        total = total + weights.astype(jnp.int16).reshape(*lead, n, 1, *lanes) * _once(x).reshape(*lead, 1, t, *lanes)
    scaled = total.astype(jnp.float32) * tile.scales.reshape(*lead, n, 1, *lanes[:2], 1)
    y = lax.optimization_barrier(scaled.sum(axis=-2)).sum(axis=(-2, -1))
    return jnp.swapaxes(y, -1, -2) * rows.scales


def _fused_form(
    shape: tuple[int, ...], w: QArray, tokens: int, group: int, form: Form
) -> Callable[..., jax.Array] | None:
    """The fused form that a tile [..., N, K] of w takes, if any."""
    n, k = shape[-2:]
    if tokens > form.fused_tokens:
        return None
    if group != WHOLE or (w.block[1] not in (WHOLE, k) and w.format == INT8):
        # Scales on the activations' side: weights decoded in float32, whose products with codes are exact.
        fits = w.format == INT8 and fused_steps(k) and math.gcd(n, w.block[0] or n) >= MAX_STEPS
        return (lambda tile, rows: tile_dot(tile, rows.values)) if fits else None
    if w.format == INT4 and w.block == (1, GROUP) and k % GROUP == 0 and fused_steps(k // 2, _PAIRS, GROUP_STEPS):
        return _fused_group_dot
    per_row = w.block[1] in (WHOLE, k)
    return _fused_row_dot if per_row and fused_steps(k // 2 if w.format.packed else k) else None


def int8_tile_dot(tile: QArray, rows: Int8Rows, form: Form = FUSED) -> Float32[Array, "*lead T N"]:
    """Rows [*lead, T, K] with a tile [*lead, N, K]; the tile should be a slice, which is then read in place."""
    fused = _fused_form(tile.shape, tile, rows.shape[-2], rows.group, form)
    if fused is None:
        return _plain_dot(tile, rows)
    y: jax.Array = lax.platform_dependent(tile, rows, cpu=fused, default=_plain_dot)
    return y


# --- one matrix of a stack, and several ------------------------------------------------------------------------------


@operator("int8_dot", first="form")
def int8_dot(rows: Int8Rows, w: QArray, index: Index = (), form: Form = FUSED) -> Float32[Array, "*batch N"]:
    """y[..., n] = sum_k x[..., k] w[index][n, k], in integers as far as scales are shared.

    Args:
      rows: [..., K].
      w: INT8 or INT4 [*lead, N, K]; `lead` has one axis per entry of `index`.
      index: leading indices; the matrix is sliced at the point of use.
      form: how it is written.

    Returns:
      float32 [..., N].

    Raises:
      ValueError: if rows, w and index do not fit together.
    """
    n, k = w.shape[-2:]
    if rows.shape[-1] != k or len(index) != len(w.shape) - 2:
        raise ValueError(f"activations {rows.shape} and index of {len(index)} do not fit weight {w.shape}")
    x = rows.reshape(-1)
    t = x.shape[0]
    fused = _fused_form((n, k), w, t, rows.group, form) is not None
    size = tile_rows(n, k, w.block[0] or n, FUSED_ELEMENTS if fused else TILE_BYTES, form.tile_rows)
    full = n // size

    def one(start: Any, count: int = size) -> jax.Array:
        return int8_tile_dot(w.tile(index, start, count, stride=size if size < n else 0), x, form)

    parts = []
    if full > 1 and fused:  # two tiles in a step of the loop, as in `quant.matmul.block_scaled_dot`
        pairs = full // 2
        starts = jnp.arange(pairs) * (2 * size)
        _, y = lax.scan(lambda _, s: (None, jnp.concatenate([one(s), one(s + size)], axis=-1)), None, starts)
        parts.append(jnp.moveaxis(y, 0, 1).reshape(t, -1))
        full = 2 * pairs
    elif full > 1:

        def step(i: Any, y: jax.Array) -> jax.Array:
            return lax.dynamic_update_slice(y, one(i * size), (0, i * size))

        parts.append(lax.fori_loop(0, full, step, jnp.zeros((t, full * size), jnp.float32)))
    else:
        full = 0
    parts += [one(start, min(size, n - start)) for start in range(full * size, n, size)]
    return jnp.concatenate(parts, axis=-1).reshape(*rows.shape[:-1], n)


def int8_expert_dot(
    rows: Int8Rows, w: QArray, experts: Int32[Array, " C"], index: Index = (), form: Form = FUSED
) -> Float32[Array, "C size N"]:
    """Blocks of rows [C, size, K], each times its expert's matrix w[*index, experts[c]]; as `grouped.expert_dot`."""
    if rows.shape[0] == 1:
        return int8_dot(rows, w, (*index, experts[0]), form)
    return int8_tile_dot(w.gather((*index, experts)), rows, form)


def int8_experts_at_once(
    groups: Groups, matrices: Sequence[QArray], group: int, assignments: int, form: Form = FUSED
) -> int:
    """Blocks that one `int8_expert_dot` takes, as `grouped.experts_at_once`: one where rows are many, for XLA:CPU has
    no fast integer product of several matrices.

    Args:
      groups: from `group_tokens`.
      matrices: stacks that a block is multiplied with.
      group: of the activations' scales.
      assignments: how many are expected.
      form: how products are written.
    """
    if any(_fused_form(w.shape[-2:], w, groups.size, group, form) is None for w in matrices):
        return 1
    blocks = max(1, min(groups.expert.shape[0], assignments))
    fit = min(FUSED_ELEMENTS // math.prod(w.shape[-2:]) for w in matrices)
    trips = -(-blocks // max(1, fit))
    return -(-blocks // trips)
