"""A strip of a matrix, 128 rows or less, in another format: decoded, encoded, decoded again and compared.

Nothing is taken for granted: a verdict is what the comparison of old and new values found. Work is done on pieces that
stay in a core's cache.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator

import numpy as np

from dsjax.checkpoint.resident import Source
from dsjax.convert.encode import (
    decode,
    encode,
    expand,
    is_pow2,
    largest,
    new_scales,
    rounded_as,
    scale_elements,
    stored,
)
from dsjax.convert.errors import Errors, compare
from dsjax.convert.tables import convert_by_table
from dsjax.convert.targets import PER_WORD, Encoding
from dsjax.params import FP8_BLOCK

STRIP = 128
"""Rows of a strip: those of a block."""

_PIECE_COLUMNS = 512  # 256 KB of values; with four times as many, memory for temporaries is fetched anew each time

_WIDE = 1e35
"""Scales above this may have products that float32 does not hold."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a matrix was, as far as verdicts and old scales depend on it.

    Attributes:
      element: "e4m3", "e2m1", "int8", "int4", "bf16", "f16" or "f32".
      scales: float32 [blocks], of the strip in the grid of the target's blocks: scales that the values came from, to be
        used again where that gives the same values; NaN or zero where there is none.
    """

    element: str
    scales: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Strip:
    """A converted strip: codes and scales as the file holds them, and what became of the values."""

    codes: np.ndarray
    scales: np.ndarray | None
    errors: Errors


def _block_any(mask: np.ndarray, block: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """Which blocks of a strip hold a true value, bool [rows of blocks, blocks]."""
    bn, bk = block[0], block[1] or shape[1]
    rows = np.logical_or.reduceat(mask, np.arange(0, shape[0], bn), axis=0) if bn > 1 else mask
    return np.logical_or.reduceat(rows, np.arange(0, shape[1], bk), axis=1)


def _few_bits(values: np.ndarray) -> np.ndarray:
    """Blocks whose values are as short as E4M3's codes, of at most 4 significant bits: bool [blocks]."""
    bits = np.bitwise_or.reduce(values.view(np.uint32), axis=0) & 0xFFFFF
    found: np.ndarray = np.bitwise_or.reduceat(bits, np.arange(0, len(bits), FP8_BLOCK[1])) == 0
    return found


def _candidates(values: np.ndarray, encoding: Encoding, old: np.ndarray | None) -> list[np.ndarray]:
    """Scales to try for each block, the last of them in any case: old ones, then new ones.

    For E4M3 these are powers of two where the values are as short as its codes: nothing is rounded then but what
    becomes subnormal. Another scale would round them all.
    """
    amax = largest(values, encoding.block)
    found = [new_scales(amax, encoding)]
    if encoding.element == "e4m3" and not encoding.pow2:
        powers = new_scales(amax, dataclasses.replace(encoding, pow2=True))
        found = [np.where(_few_bits(values), powers, found[0])]
    if old is not None:
        usable = np.isfinite(old) & (old > 0)
        if encoding.pow2:
            usable &= is_pow2(old)
        if usable.any():
            found.insert(0, np.where(usable, old, found[0]))
    return found


def _choose(
    values: np.ndarray, origin: Origin, encoding: Encoding, old: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Codes, scales, decoded values and the count of saturated ones, each block with the first scale that is exact.

    Exact: what is decoded, rounded to the type that the values were stored in, is what was stored.
    """
    candidates = _candidates(values, encoding, old)
    scales = candidates.pop(0)
    while True:
        spread = expand(scales, encoding.block, (values.shape[0], values.shape[1]))
        with np.errstate(over="ignore", invalid="ignore"):
            codes, saturated = encode(values, spread, encoding)
            decoded = decode(codes, spread, encoding.element)
        if not candidates:
            return codes, scales, decoded, saturated
        same = rounded_as(decoded, origin.element).view(np.uint32) == values.view(np.uint32)
        if same.all():
            return codes, scales, decoded, saturated
        wrong = _block_any(~same, encoding.block, (values.shape[0], values.shape[1]))
        scales = np.where(wrong, candidates.pop(0), scales)


def _ratios(source: Source, wrong: np.ndarray, columns: slice, rows: int) -> Counter[int]:
    """Of each block that is not exact: log2 of the ratio of its groups' scales, groups of zeros apart."""
    assert source.scales is not None
    found: Counter[int] = Counter()
    width = FP8_BLOCK[1]
    for block in np.flatnonzero(wrong):
        start = columns.start + block * width
        stop = min(start + width, columns.stop)
        group = source.block[1]
        scales = np.abs(source.scales[:rows, start // group : -(-stop // group)].astype(np.float32))
        values = source.elements[:rows, start // 2 : stop // 2].view(np.uint8) & 0x77  # signs do not count
        used = np.logical_or.reduceat(values != 0, np.arange(0, values.shape[1], group // 2), axis=1)
        used &= scales != 0
        if not used.any():
            continue  # zeros, which a conversion keeps; a result that is verified may hold anything
        exponents = np.log2(scales[used])
        found[round(float(exponents.max() - exponents.min()))] += 1
    return found


def _pieces(shape: tuple[int, int], encoding: Encoding) -> Iterator[tuple[slice, slice]]:
    """Rows and columns that are converted together: whole blocks."""
    r, k = shape
    rows, columns = r, _PIECE_COLUMNS
    if encoding.scales and not encoding.block[1]:  # whole rows, which share nothing
        rows, columns = max(1, STRIP * _PIECE_COLUMNS // k), k
    for i in range(0, r, rows):
        for j in range(0, k, columns):
            yield slice(i, min(i + rows, r)), slice(j, min(j + columns, k))


def convert_strip(source: Source, origin: Origin, encoding: Encoding, codes: np.ndarray | None = None) -> Strip:
    """Converts all of `source`, which has at most 128 rows and begins with a block.

    Args:
      source: the strip.
      origin: what its matrix was.
      encoding: what it becomes.
      codes: memory for the new codes, contiguous, of the file's type and shape; memory that is new costs more than
        a conversion.

    Raises:
      ValueError: if a value is not finite.
    """
    r, k = source.shape
    if codes is None:
        codes = np.empty(encoding.codes_shape((r, k)), encoding.codes[0])
    if (found := convert_by_table(source, encoding, origin.scales, codes)) is not None:
        return Strip(codes, *found)
    grid = encoding.grid((r, k))
    scales = np.empty(grid, encoding.scale_dtype) if encoding.scales else None
    total = Errors()
    wide = source.scales is not None and float(np.abs(source.scales.astype(np.float32)).max()) > _WIDE
    per_code = {"e2m1": 2, "int4": PER_WORD}.get(encoding.element, 1)
    for rows, columns in _pieces((r, k), encoding):
        with np.errstate(over="ignore"):
            values = np.ascontiguousarray(source.values(rows, columns))
        if wide and not np.isfinite(values).all():
            raise ValueError("a product of code and scale beyond float32's range")
        into = codes[rows, columns.start // per_code : -(-columns.stop // per_code)]
        if encoding.scales is None:
            raw, saturated = encode(values, None, encoding)
            errors, differ = compare(values, decode(raw, None, encoding.element), encoding, None, saturated)
        else:
            assert scales is not None
            bn, bk = encoding.block[0], encoding.block[1] or k
            blocks = slice(rows.start // bn, -(-rows.stop // bn)), slice(columns.start // bk, -(-columns.stop // bk))
            old = None if origin.scales is None else origin.scales[blocks]
            raw, chosen, decoded, saturated = _choose(values, origin, encoding, old)
            scales[blocks] = scale_elements(chosen, encoding)
            spread = expand(chosen, encoding.block, (values.shape[0], values.shape[1]))
            errors, differ = compare(values, decoded, encoding, spread, saturated)
            errors.blocks = chosen.size
            if old is not None:
                errors.carried = int(np.count_nonzero(old == chosen))
        into[...] = stored(raw, encoding)
        if differ is not None:
            explain(errors, source, encoding, differ, columns)
        total.add(errors)
    return Strip(codes, scales, total)


def explain(errors: Errors, source: Source, encoding: Encoding, differ: np.ndarray, columns: slice) -> None:
    """Notes what of the old scales explains that values differ."""
    if source.scales is None or source.integers:
        return
    r = differ.shape[0]
    wrong = _block_any(differ, FP8_BLOCK, (r, differ.shape[1]))[0]
    if source.packed:
        if encoding.element == "e4m3":
            errors.ratios = _ratios(source, wrong, columns, r)
    elif source.scales.dtype == np.float32:
        first = columns.start // FP8_BLOCK[1]
        old = np.ascontiguousarray(source.scales[0, first : first + len(wrong)])
        errors.float_scales = int(np.count_nonzero(wrong & ~is_pow2(np.abs(old))))
