"""Exact casts by table: where every code of a format, with every scale that occurs, becomes an equal number.

A strip of FP8 or FP4 has few codes and few scales. Each pair of a code and a scale is encoded, decoded and compared,
bit for bit, by the functions that convert any value; if all are equal the strip is looked up instead, at a fraction of
the time. If one is not, the strip is converted value by value, which also says what became of it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from dsjax.checkpoint.resident import Source
from dsjax.convert.encode import decode, encode, is_pow2, scale_elements
from dsjax.convert.errors import Errors
from dsjax.convert.targets import Encoding
from dsjax.params import FP4_BLOCK, FP8_BLOCK
from quant import E4M3

_E4M3 = np.arange(256, dtype=np.uint8)
_E4M3[[0x7F, 0xFF]] = 0  # NaN, which the source does not hold
_E2M1 = np.arange(16, dtype=np.uint8)
_LOW, _HIGH = np.arange(256) & 0xF, np.arange(256) >> 4

_NAN = 0x7F
"""Of E4M3."""

_ZEROS = -100
"""In place of the exponent of a group of zeros."""

_PIECE = 512  # bytes of a row that are looked up together

Done = tuple[np.ndarray | None, Errors]
"""Scales, if any, and errors."""


def _table(
    codes: np.ndarray, element: str, scales: np.ndarray, encoding: Encoding, new: np.ndarray | None
) -> np.ndarray | None:
    """New codes [scales, codes] of every code with every scale; None if one would change its value.

    Args:
      codes: of the old format, [codes] or [n, codes].
      element: its name.
      scales: float32 [n, 1], old ones.
      encoding: the new format.
      new: float32 [n, 1], new scales; None for floats.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        old = decode(np.broadcast_to(codes, (len(scales), codes.shape[-1])), scales, element)
        if not np.isfinite(old).all():
            return None
        raw, _ = encode(old, new, encoding)
        values = decode(raw, new, encoding.element)
    return raw if np.array_equal(old.view(np.uint32), values.view(np.uint32)) else None


def _from_fp8(source: Source, encoding: Encoding, old: np.ndarray | None, out: np.ndarray) -> Done | None:
    assert source.scales is not None
    r, k = source.shape
    scales = source.scales.astype(np.float32)
    codes = source.elements.view(np.uint8)
    errors = Errors(count=r * k, unmeasured=r * k)
    if encoding.element == "e4m3":
        # The old codes, if the new type can hold the old scales.
        usable = old is not None and np.array_equal(old, scales) and (scales > 0).all()
        if not usable or (encoding.pow2 and not is_pow2(scales).all()):
            return None
        errors.blocks = errors.carried = scales.size
        out.view(np.uint8)[...] = codes
        return scale_elements(scales, encoding), errors
    table = _table(_E4M3, "e4m3", scales.reshape(-1, 1), encoding, None) if encoding.scales is None else None
    if table is None:
        return None
    raw = out.view(table.dtype)
    for i, start in enumerate(range(0, k, FP8_BLOCK[1])):
        stop = min(start + FP8_BLOCK[1], k)
        raw[:, start:stop] = np.take(table[i], codes[:, start:stop], mode="clip")
    return None, errors


def _block_exponents(words: np.ndarray, exponents: np.ndarray) -> np.ndarray | None:
    """E8M0 exponents of E4M3 blocks, uint8 [blocks], by the rule of `new_scales`; None where it takes a closer look.

    The smallest power of two that is at least m * 2^e / 448 is 2^(e - 6) for an m of 4 or 6, 2^(e - 7) for 2 or 3,
    2^(e - 8) for 1 or 1.5 and 2^(e - 9) for 0.5. Of the largest code's three bits the upper two, the upper one or the
    middle one say which. A block takes the largest of its groups' powers.

    Args:
      words: a group's 32 codes, uint64 [r, groups, 2].
      exponents: uint8 [r, groups].
    """
    per_block = FP8_BLOCK[1] // FP4_BLOCK[1]
    first, second = words[..., 0], words[..., 1]
    either = first | second
    both = ((first & (first >> np.uint64(1))) | (second & (second >> np.uint64(1)))) & np.uint64(0x2222222222222222)
    found = exponents.astype(np.int16)
    found -= 6
    for mask in (both, either & np.uint64(0x4444444444444444), either & np.uint64(0x6666666666666666)):
        found -= mask == 0
    found[(either & np.uint64(0x7777777777777777)) == 0] = _ZEROS
    largest = found.max(axis=0)
    top = np.maximum.reduceat(largest, np.arange(0, len(largest), per_block))
    if ((top < 1) & (top != _ZEROS)).any():
        return None
    return np.where(top == _ZEROS, 127, top).astype(np.uint8)


def _powers(exponents: np.ndarray) -> np.ndarray:
    """float32 of E8M0 codes."""
    return np.ldexp(np.float32(1), exponents.astype(np.int32) - 127)


@lru_cache(maxsize=256)
def _pairs(exponents: bytes, blocks: bytes, encoding: Encoding) -> tuple[np.ndarray, bool] | None:
    """What two FP4 codes in a byte become, side by side in one word, by old and new scale: [256 x scales].

    Codes beyond what the new scale has room for, which a block with that scale does not hold, become NaN in it; also
    returns whether there are any.

    Args:
      exponents: old scales, E8M0, one for each of the bytes.
      blocks: new ones; empty for floats.
      encoding: the new format.
    """
    old, new = (_powers(np.frombuffer(x, np.uint8))[:, None] for x in (exponents, blocks))
    codes = np.broadcast_to(_E2M1, (len(old), len(_E2M1)))
    beyond = np.zeros(codes.shape, bool)
    if blocks:
        with np.errstate(over="ignore"):
            beyond = np.abs(decode(codes, old / new, "e2m1")) > np.float32(E4M3.max)
    table = _table(np.where(beyond, 0, codes), "e2m1", old, encoding, new if blocks else None)
    if table is None:
        return None
    table[beyond] = _NAN
    pair = np.stack([table[:, _LOW], table[:, _HIGH]], axis=-1)
    return pair.view(np.dtype(f"u{2 * table.dtype.itemsize}")).reshape(-1), bool(beyond.any())


def _from_fp4(source: Source, encoding: Encoding, out: np.ndarray) -> Done | None:
    assert source.scales is not None
    r, k = source.shape
    if source.scales.dtype.itemsize != 1 or k % FP4_BLOCK[1]:
        return None
    exponents = source.scales.view(np.uint8)
    packed = np.ascontiguousarray(source.elements).view(np.uint8)
    errors = Errors(count=r * k, unmeasured=r * k)
    lowest = int(exponents.min())
    span, count = int(exponents.max()) - lowest + 1, 1
    keys, blocks = (exponents - np.uint8(lowest)).astype(np.uint16), None
    if encoding.element == "e4m3":
        words = packed.view(np.uint64).reshape(r, -1, 2)
        blocks = _block_exponents(words, exponents)
        if blocks is None:
            return None
        first = int(blocks.min())
        count = int(blocks.max()) - first + 1
        keys += (np.repeat(blocks - np.uint8(first), FP8_BLOCK[1] // FP4_BLOCK[1])[: keys.shape[1]]) * np.uint16(span)
        errors.blocks = blocks.size
    elif encoding.scales is not None:
        return None
    present = np.zeros(span * count, bool)
    present[keys] = True
    found = np.flatnonzero(present)
    if len(found) > 256:
        return None
    new = b"" if blocks is None else (found // span + first).astype(np.uint8).tobytes()
    pairs = _pairs((found % span + lowest).astype(np.uint8).tobytes(), new, encoding)
    if pairs is None:
        return None
    table, partial = pairs
    rank = np.zeros(span * count, np.uint16)
    rank[found] = np.arange(len(found), dtype=np.uint16) << 8
    offsets, per_group = rank[keys], FP4_BLOCK[1] // 2
    raw = out.view(table.dtype)
    for start in range(0, packed.shape[1], _PIECE):
        stop = min(start + _PIECE, packed.shape[1])
        index = np.repeat(offsets[:, start // per_group : stop // per_group], per_group, axis=1)
        index |= packed[:, start:stop]
        raw[:, start:stop] = np.take(table, index, mode="clip")
    if partial and (out.view(np.uint8) == _NAN).any():
        return None
    return (scale_elements(_powers(blocks)[None], encoding) if blocks is not None else None), errors


def convert_by_table(source: Source, encoding: Encoding, old: np.ndarray | None, out: np.ndarray) -> Done | None:
    """Scales and errors of a strip that becomes another format without a change; None if it might.

    Args:
      source: at most 128 rows, which begin with a block.
      encoding: the new format.
      old: scales that would be used again, as `matrix.Origin` has them.
      out: is filled with the codes, of the file's type and shape.
    """
    if source.scales is None or source.integers:
        return None
    return _from_fp4(source, encoding, out) if source.packed else _from_fp8(source, encoding, old, out)
