"""A stored matrix, part by part, in another format.

In NumPy, a small piece at a time: temporaries stay in a core's cache, the result is the same to the bit on every
platform, and there is nothing to compile for each shape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from quant import E2M1, E4M3, INT8

_PIECE = 1 << 17  # values converted together

_E4M3_VALUES = np.arange(256, dtype=np.uint8).view(E4M3.dtype).astype(np.float32)
_E2M1_VALUES = np.arange(16, dtype=np.uint8).view(E2M1.dtype).astype(np.float32)
_E2M1_PAIRS = np.stack([np.tile(_E2M1_VALUES, 16), np.repeat(_E2M1_VALUES, 16)], axis=-1)  # [byte, low then high]


def _pieces(rows: slice, width: int) -> Iterator[slice]:
    step = max(1, _PIECE // max(width, 1))
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))


@dataclasses.dataclass(frozen=True)
class Source:
    """One tensor as the file has it.

    Attributes:
      elements: [N, K], E4M3 without NaN or a float type; of E2M1 its packed codes [N, K/2], any type of a byte.
      scales: float32 [ceil(N/bn), ceil(K/bk)] of E4M3 and E2M1 elements; None for floats.
      block: (bn, bk).
      packed: whether the elements are E2M1.
    """

    elements: np.ndarray
    scales: np.ndarray | None
    block: tuple[int, int]
    packed: bool = False

    def _decode(self, rows: slice, columns: slice) -> np.ndarray:
        """float32 [rows, columns], elements without their scales."""
        if not self.packed:
            codes = self.elements[rows, columns].view(np.uint8)
            return np.take(_E4M3_VALUES, codes, mode="clip")  # four times as fast as a cast
        first = columns.start // 2
        codes = self.elements[rows, first : -(-columns.stop // 2)].view(np.uint8)
        pairs = np.take(_E2M1_PAIRS, codes, axis=0, mode="clip").reshape(codes.shape[0], 2 * codes.shape[1])
        return pairs[:, columns.start - 2 * first : columns.stop - 2 * first]

    def values(self, rows: slice, columns: slice) -> np.ndarray:
        """float32 [rows, columns] = element * scale, rounded once; any part, whatever blocks it cuts."""
        if self.scales is None:
            return self.elements[rows, columns].astype(np.float32)
        bn, bk = self.block
        first = columns.start // bk
        scales = self.scales[np.arange(rows.start, rows.stop) // bn, first : -(-columns.stop // bk)]
        cut = columns.start - first * bk
        values = self._decode(rows, columns)
        values *= np.repeat(scales, bk, axis=1)[:, cut : cut + values.shape[1]]
        return values

    def row_scales(self) -> np.ndarray:
        """float32 [N, 1], INT8 scales: each row's amax / 127; for a row of zeros the smallest normal number."""
        n, stored_width = self.elements.shape
        amax = np.empty((n, 1), np.float32)
        for rows in _pieces(slice(0, n), stored_width):
            if self.scales is None:
                magnitudes = np.abs(self.values(rows, slice(0, stored_width)))
            else:
                # Without their sign, codes are ordered as the values are: a block's largest is decoded, not all.
                bn, bk = self.block
                codes, table = self.elements[rows].view(np.uint8), _E4M3_VALUES
                if self.packed:
                    codes, table, bk = np.maximum(codes & 7, codes >> 4 & 7), _E2M1_VALUES, bk // 2
                largest = np.maximum.reduceat(codes & 0x7F, np.arange(0, stored_width, bk), axis=1)
                magnitudes = table[largest] * np.abs(self.scales[np.arange(rows.start, rows.stop) // bn])
            magnitudes.max(axis=1, keepdims=True, out=amax[rows])
        return np.maximum(amax / np.float32(INT8.max), np.finfo(np.float32).tiny)


def _bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """uint16 codes, rounded to nearest even; what would round to infinity stays the largest number."""
    bits = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    return bits - ((bits & 0x7FFF) == 0x7F80)


def fill(
    out: np.ndarray, source: Source, rows: slice, columns: slice, fmt: str, row_scales: np.ndarray | None = None
) -> None:
    """Writes source[rows, columns] into `out` in another format.

    Args:
      out: [rows, columns], float32, uint16 or uint8.
      source: the stored tensor.
      rows, columns: the part.
      fmt: "f32", "bf16" or "int8", as in `params.Stored`.
      row_scales: float32 [N, 1] for int8, of the whole tensor.
    """
    for piece in _pieces(rows, columns.stop - columns.start):
        values = source.values(piece, columns)
        target = out[piece.start - rows.start : piece.stop - rows.start]
        if fmt == "int8":
            assert row_scales is not None
            target[...] = np.rint(values / row_scales[piece]).astype(np.int8).view(np.uint8)
        else:
            target[...] = _bfloat16_bits(values) if fmt == "bf16" else values
