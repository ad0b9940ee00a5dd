"""A stored matrix, part by part, in another format.

In NumPy, a small piece at a time: temporaries stay in a core's cache, the result is the same to the bit on every
platform, and there is nothing to compile for each shape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from dsjax.params import Stored
from quant import E2M1, E4M3, F16, INT4, INT8
from quant.transforms import AMAX_FLOOR

_PIECE = 1 << 17  # values converted together

_E4M3_VALUES = np.arange(256, dtype=np.uint8).view(E4M3.dtype).astype(np.float32)
_E2M1_VALUES = np.arange(16, dtype=np.uint8).view(E2M1.dtype).astype(np.float32)
_E2M1_PAIRS = np.stack([np.tile(_E2M1_VALUES, 16), np.repeat(_E2M1_VALUES, 16)], axis=-1)  # [byte, low then high]
_INT4_VALUES = np.arange(-8, 8, dtype=np.float32)  # a file holds code + 8
_INT4_PAIRS = np.stack([np.tile(_INT4_VALUES, 16), np.repeat(_INT4_VALUES, 16)], axis=-1)


class Overflow(Exception):
    """A value that is too large for a format; its text is the value."""


@dataclasses.dataclass(frozen=True)
class Narrowed:
    """What floats became float16 with a loss other than a rounding.

    Attributes:
      subnormal: values below float16's smallest normal number, 2^-14, which keep fewer bits.
      flushed: values that became zero.
    """

    subnormal: int = 0
    flushed: int = 0

    def __add__(self, other: Narrowed) -> Narrowed:
        return Narrowed(self.subnormal + other.subnormal, self.flushed + other.flushed)


def pieces(rows: slice, width: int) -> Iterator[slice]:
    """Rows of a matrix of this width, a few at a time."""
    step = max(1, _PIECE // max(width, 1))
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))


@dataclasses.dataclass(frozen=True)
class Source:
    """One tensor as the file has it.

    Attributes:
      elements: [N, K], E4M3 without NaN, INT8 or a float type; packed codes [N, K/2 or more], any type of a byte.
      scales: float32 or E8M0 [ceil(N/bn), ceil(K/bk)] of E4M3 and E2M1 elements, floats of integers; None for floats.
      block: (bn, bk).
      packed: whether two elements share a byte: E2M1, or INT4 as code + 8.
      integers: whether the elements are integers.
      width: K where rows of packed codes are filled up to more.

    Elements and scales may be views of a file: what is asked for is all that is read.
    """

    elements: np.ndarray
    scales: np.ndarray | None
    block: tuple[int, int]
    packed: bool = False
    integers: bool = False
    width: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K]."""
        n, k = self.elements.shape
        return n, 2 * k if self.packed and self.width is None else self.width or k

    def _scales_of(self, rows: slice, columns: slice) -> np.ndarray:
        """float32 scales [rows or 1, blocks that the columns touch]."""
        assert self.scales is not None
        bn, bk = self.block
        first = rows.start // bn
        scales = self.scales[first : -(-rows.stop // bn), columns.start // bk : -(-columns.stop // bk)]
        if scales.shape[0] == 1 or bn == 1:  # one row of blocks, which broadcasts, or one row of scales for each
            return scales.astype(np.float32)
        return scales.astype(np.float32)[np.arange(rows.start, rows.stop) // bn - first]

    def _decode(self, rows: slice, columns: slice) -> np.ndarray:
        """float32 [rows, columns], elements without their scales."""
        if self.integers and not self.packed:
            return self.elements[rows, columns].view(np.int8).astype(np.float32)
        if not self.packed:
            codes = self.elements[rows, columns].view(np.uint8)
            return np.take(_E4M3_VALUES, codes, mode="clip")  # four times as fast as a cast
        first = columns.start // 2
        codes = self.elements[rows, first : -(-columns.stop // 2)].view(np.uint8)
        table = _INT4_PAIRS if self.integers else _E2M1_PAIRS
        pairs = np.take(table, codes, axis=0, mode="clip").reshape(codes.shape[0], 2 * codes.shape[1])
        return pairs[:, columns.start - 2 * first : columns.stop - 2 * first]

    def values(self, rows: slice, columns: slice) -> np.ndarray:
        """float32 [rows, columns] = element * scale, rounded once; any part, whatever blocks it cuts."""
        if self.scales is None:
            part = self.elements[rows, columns]
            if part.dtype == ml_dtypes.bfloat16:  # whose own cast is slower and lets no other thread run
                return (part.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
            return part.astype(np.float32)
        bk = self.block[1]
        cut = columns.start % bk
        values = self._decode(rows, columns)
        values *= np.repeat(self._scales_of(rows, columns), bk, axis=1)[:, cut : cut + values.shape[1]]
        return values

    def row_scales(self, rows: slice) -> np.ndarray:
        """float32 [rows, 1], INT8 scales: each row's amax / 127; for a row of zeros the smallest normal number."""
        stored_width, columns = self.elements.shape[1], slice(0, self.shape[1])
        amax = np.empty((rows.stop - rows.start, 1), np.float32)
        for piece in pieces(rows, stored_width):
            if self.scales is None or self.integers:
                magnitudes = np.abs(self.values(piece, columns))
            else:
                # Without their sign, codes are ordered as the values are: a block's largest is decoded, not all.
                bk = self.block[1]
                codes, table = self.elements[piece].view(np.uint8), _E4M3_VALUES
                if self.packed:
                    codes, table, bk = np.maximum(codes & 7, codes >> 4 & 7), _E2M1_VALUES, bk // 2
                largest = np.maximum.reduceat(codes & 0x7F, np.arange(0, stored_width, bk), axis=1)
                magnitudes = table[largest] * np.abs(self._scales_of(piece, columns))
            magnitudes.max(axis=1, keepdims=True, out=amax[piece.start - rows.start : piece.stop - rows.start])
        return np.maximum(amax / np.float32(INT8.max), np.finfo(np.float32).tiny)


def _group_scales(source: Source, bk: int, rows: slice, columns: slice) -> np.ndarray:
    """float32, INT4 scales: the amax / 7 of each row's groups of bk channels, as `quant.quantise` takes them."""
    starts = np.arange(0, columns.stop - columns.start, bk)
    amax = np.empty((rows.stop - rows.start, len(starts)), np.float32)
    for piece in pieces(rows, columns.stop - columns.start):
        part = amax[piece.start - rows.start : piece.stop - rows.start]
        np.maximum.reduceat(np.abs(source.values(piece, columns)), starts, axis=1, out=part)
    return np.maximum(amax / np.float32(INT4.max), np.finfo(np.float32).tiny)


def _block_scales(source: Source, block: tuple[int, int], rows: slice, columns: slice) -> np.ndarray:
    """float32, E4M3 scales: the amax / 448 of each block of some rows and columns, as `quant.quantise` takes them."""
    (bn, bk), width = block, columns.stop - columns.start
    starts = range(rows.start, rows.stop, bn)
    amax = np.empty((len(starts), -(-width // bk)), np.float32)
    for i, start in enumerate(starts):
        values = source.values(slice(start, min(start + bn, rows.stop)), columns)
        amax[i] = np.maximum.reduceat(np.abs(values).max(axis=0), np.arange(0, width, bk))
    return np.maximum(amax, np.float32(AMAX_FLOOR)) / np.float32(E4M3.max)


def new_scales(source: Source, held: Stored, rows: slice, columns: slice) -> np.ndarray:
    """float32 scales of a format that a tensor is to be held in.

    Args:
      source: the stored tensor.
      held: "int8", a scale per row, "int4", one per group of a row, or "e4m3", one per block.
      rows, columns: whole blocks, or all there is of them; whole rows for INT8.
    """
    if held.format == "int4":
        return _group_scales(source, held.block[1], rows, columns)
    return source.row_scales(rows) if held.format == "int8" else _block_scales(source, held.block, rows, columns)


def _bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """uint16 codes, rounded to nearest even; what would round to infinity stays the largest number."""
    bits = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    return bits - ((bits & 0x7FFF) == 0x7F80)


def _float16_bits(values: np.ndarray) -> tuple[np.ndarray, Narrowed]:
    """uint16 codes, rounded to nearest even, and what was lost.

    Raises:
      Overflow: for a value above the largest number; it would become infinity, or a number that is not near it.
    """
    largest = values.flat[np.abs(values).argmax()] if values.size else 0
    if abs(largest) > F16.max:
        raise Overflow(f"{largest:g}")
    bits = values.astype(np.float16).view(np.uint16)
    magnitudes = bits & 0x7FFF
    small = magnitudes < 0x0400
    flushed = int(np.count_nonzero(values[magnitudes == 0]))
    return bits, Narrowed(int(np.count_nonzero(small & (magnitudes != 0))), flushed)


def fill(
    out: np.ndarray, source: Source, rows: slice, columns: slice, held: Stored, scales: np.ndarray | None = None
) -> Narrowed:
    """Writes source[rows, columns] into `out` in another format; returns what became float16 with a loss.

    Args:
      out: [rows, columns], float32, uint16 or uint8; of INT4 [rows, columns / 2], two codes a byte.
      source: the stored tensor.
      rows, columns: the part.
      held: "f32", "bf16", "f16", "int8", "int4" or "e4m3".
      scales: from `new_scales`, of the whole tensor, or with any numbers where the part does not touch them.

    Raises:
      Overflow: for a value that float16 cannot hold.
    """
    narrowed = Narrowed()
    for piece in pieces(rows, columns.stop - columns.start):
        values = source.values(piece, columns)
        target = out[piece.start - rows.start : piece.stop - rows.start]
        if held.format == "int8":
            assert scales is not None
            target[...] = np.rint(values / scales[piece]).astype(np.int8).view(np.uint8)
        elif held.format == "int4":
            assert scales is not None
            values /= scales[piece][:, np.arange(columns.start, columns.stop) // held.block[1]]
            codes = np.clip(np.rint(values, out=values), -INT4.max, INT4.max).astype(np.int8).view(np.uint8)
            target[...] = codes[:, 0::2] & 0xF | codes[:, 1::2] << 4
        elif held.format == "f16":
            target[...], lost = _float16_bits(values)
            narrowed += lost
        elif held.format == "e4m3":
            assert scales is not None
            bn, bk = held.block
            grid = scales[np.arange(piece.start, piece.stop) // bn]
            values /= grid[:, np.arange(columns.start, columns.stop) // bk]
            np.clip(values, -E4M3.max, E4M3.max, out=values)  # the cast does not saturate
            target[...] = values.astype(E4M3.dtype).view(np.uint8)
        else:
            target[...] = _bfloat16_bits(values) if held.format == "bf16" else values
    return narrowed
