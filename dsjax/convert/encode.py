"""float32 values -> codes, and back, a piece of a matrix at a time, in NumPy.

Results are the same to the bit on every platform. Integer operations and float32 additions do what casts to the small
floats would: those hold Python's lock, and take three times as long.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from dsjax.convert.targets import PER_WORD, Encoding
from quant import E2M1, E4M3

_VALUES = {
    "e4m3": np.arange(256, dtype=np.uint8).view(E4M3.dtype).astype(np.float32),
    "e2m1": np.arange(16, dtype=np.uint8).view(E2M1.dtype).astype(np.float32),
}
_LARGEST = {"e4m3": 448.0, "e2m1": 6.0, "int8": 127.0, "int4": 7.0}
_SMALLEST = np.float32(2.0**-126)
"""The least float32 scale, a normal number; E8M0 begins at half of that."""

_SMALLEST_POW2 = np.float32(2.0**-127)


@dataclasses.dataclass(frozen=True)
class _Minifloat:
    """A small float: sign, exponent with this bias, so many mantissa bits; the code of the largest number."""

    mantissa: int
    bias: int
    largest: int
    sign: int

    @property
    def smallest_normal(self) -> int:
        """float32 bits of 2^(1 - bias)."""
        return (127 + 1 - self.bias) << 23

    @property
    def magic(self) -> np.float32:
        """A float32 whose last bit weighs as much as the last bit of a subnormal: adding it rounds."""
        return np.float32(2.0 ** (1 - self.bias - self.mantissa + 23))


_E4M3 = _Minifloat(3, 7, 0x7E, 0x80)
_E2M1 = _Minifloat(1, 1, 0x7, 0x8)


def _minifloat(values: np.ndarray, fmt: _Minifloat) -> tuple[np.ndarray, int]:
    """uint8 codes, rounded to nearest even, and how many lay beyond the largest number, which they became."""
    bits = values.view(np.uint32)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    shift = np.uint32(23 - fmt.mantissa)
    codes = magnitude >> shift
    codes &= np.uint32(1)
    codes += magnitude
    codes += np.uint32((1 << (22 - fmt.mantissa)) - 1)
    codes >>= shift
    codes -= np.uint32((127 - fmt.bias) << fmt.mantissa)
    small = magnitude < np.uint32(fmt.smallest_normal)
    if small.any():
        rounded = magnitude.view(np.float32) + fmt.magic
        np.copyto(codes, rounded.view(np.uint32) - fmt.magic.view(np.uint32), where=small)
    beyond = int(np.count_nonzero(codes > fmt.largest))
    if beyond:
        np.minimum(codes, np.uint32(fmt.largest), out=codes)
    sign = bits >> np.uint32(31)
    sign *= np.uint32(fmt.sign)
    codes |= sign
    return codes.astype(np.uint8), beyond


def bfloat16_bits(values: np.ndarray) -> tuple[np.ndarray, int]:
    """uint16, rounded to nearest even; what would become infinite is the largest number instead, and is counted."""
    bits = values.view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += bits
    rounded += np.uint32(0x7FFF)
    codes = (rounded >> np.uint32(16)).astype(np.uint16)
    infinite = (codes & 0x7FFF) == 0x7F80
    return codes - infinite, int(np.count_nonzero(infinite))


def float16_values(values: np.ndarray) -> tuple[np.ndarray, int]:
    """float16, likewise."""
    with np.errstate(over="ignore"):
        codes = values.astype(np.float16)
    infinite = np.isinf(codes)
    beyond = int(np.count_nonzero(infinite))
    if beyond:
        codes = (codes.view(np.uint16) - infinite).view(np.float16)
    return codes, beyond


def widen(codes: np.ndarray) -> np.ndarray:
    """float32 of bfloat16 bits."""
    return (codes.astype(np.uint32) << np.uint32(16)).view(np.float32)


def pack(codes: np.ndarray) -> np.ndarray:
    """E2M1 codes uint8 [r, K] -> [r, K/2], low nibble first."""
    return codes[:, 0::2] | codes[:, 1::2] << 4


def pack_words(codes: np.ndarray) -> np.ndarray:
    """INT4 codes int8 [r, K] -> int32 [r, ceil(K/8)]: code + 8, low nibble first, zeros beyond K."""
    r, k = codes.shape
    nibbles = np.zeros((r, -(-k // PER_WORD) * PER_WORD), np.uint8)
    np.add(codes.view(np.uint8), np.uint8(8), out=nibbles[:, :k])
    return pack(nibbles).view("<i4")


def unpack_words(words: np.ndarray, k: int) -> np.ndarray:
    """The inverse of `pack_words`: int8 [r, K]."""
    packed = np.ascontiguousarray(words).view(np.uint8)
    nibbles = np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(len(packed), -1)[:, :k]
    return nibbles.view(np.int8) - np.int8(8)


# --- scales ----------------------------------------------------------------------------------------------------------


def largest(values: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """max |value| of each block, float32 [ceil(r/bn), ceil(c/bk)]; values float32 [r, c]."""
    bn, bk = block
    rows = np.abs(values)
    if bn >= len(rows):  # reduceat takes ten times as long
        rows = rows.max(axis=0, keepdims=True)
    elif bn > 1:
        rows = np.maximum.reduceat(rows, np.arange(0, len(rows), bn), axis=0)
    if not bk:
        return rows.max(axis=1, keepdims=True)
    width = rows.shape[1]
    if width % bk:
        rows = np.pad(rows, ((0, 0), (0, -width % bk)))
    return rows.reshape(len(rows), -1, bk).max(axis=2)


def power_above(x: np.ndarray) -> np.ndarray:
    """float32, the smallest power of two >= x >= 0, at least 2^-127; DeepSeek's UE8M0 rule (spec V3 4.2)."""
    bits = np.maximum(x, _SMALLEST_POW2).view(np.uint32)
    up = ((bits >> 23) + ((bits & 0x7FFFFF) != 0)) << 23  # of the subnormals only 2^-127 itself is a power to keep
    return np.where(bits == _SMALLEST_POW2.view(np.uint32), bits, up).astype(np.uint32).view(np.float32)


def is_pow2(scales: np.ndarray) -> np.ndarray:
    """Which float32 scales E8M0 can hold."""
    bits = scales.view(np.uint32)
    normal = ((bits & 0x7FFFFF) == 0) & (bits > 0) & (bits < 0x7F800000)
    return normal | (bits == _SMALLEST_POW2.view(np.uint32))


def new_scales(amax: np.ndarray, encoding: Encoding) -> np.ndarray:
    """float32 scales of blocks whose largest magnitude is `amax`: amax / max, as the encoding's type holds them.

    The smallest power of two that keeps a block in range is also the one that keeps most of its small values: E4M3's
    precision is relative but for subnormals, which begin at 2^-6 scales.
    """
    ratio = amax / np.float32(_LARGEST[encoding.element])
    if encoding.pow2:
        scales = power_above(ratio)
    else:
        scales = np.maximum(ratio, _SMALLEST)
        if encoding.scales == "bf16":
            scales = widen(bfloat16_bits(scales)[0])
    return np.where(amax == 0, np.float32(1), scales)  # zeros fit any scale


def scale_elements(scales: np.ndarray, encoding: Encoding) -> np.ndarray:
    """float32 scales in the file's type, which holds them exactly."""
    if encoding.scales == "e8m0":
        bits = scales.view(np.uint32)
        return (bits >> 23).astype(np.uint8).view(encoding.scale_dtype)  # 2^-127 is a subnormal, code 0
    if encoding.scales == "bf16":
        return (scales.view(np.uint32) >> 16).astype(np.uint16).view(encoding.scale_dtype)
    return scales


def expand(scales: np.ndarray, block: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """Scales of a piece [r, c], so that they broadcast against it."""
    bn, bk = block
    if bn > 1:
        scales = np.repeat(scales, bn, axis=0)[: shape[0]] if len(scales) > 1 else scales
    return np.repeat(scales, bk, axis=1)[:, : shape[1]] if bk and scales.shape[1] > 1 else scales


# --- codes -----------------------------------------------------------------------------------------------------------


def encode(values: np.ndarray, scales: np.ndarray | None, encoding: Encoding) -> tuple[np.ndarray, int]:
    """Codes, not packed, of a piece, and how many values lay beyond the largest number.

    Args:
      values: float32 [r, c].
      scales: float32 that broadcast against it; None for floats.
      encoding: the format.
    """
    if encoding.element == "f32":
        return values, 0
    if encoding.element == "bf16":
        return bfloat16_bits(values)
    if encoding.element == "f16":
        return float16_values(values)
    assert scales is not None
    scaled = values / scales
    if encoding.element in ("e4m3", "e2m1"):
        return _minifloat(scaled, _E4M3 if encoding.element == "e4m3" else _E2M1)
    np.rint(scaled, out=scaled)
    limit = np.float32(_LARGEST[encoding.element])
    beyond = int(np.count_nonzero(np.abs(scaled) > limit))
    np.clip(scaled, -limit, limit, out=scaled)
    return scaled.astype(np.int8), beyond


def decode(codes: np.ndarray, scales: np.ndarray | None, element: str) -> np.ndarray:
    """float32 [r, c] = code * scale, rounded once: the inverse of `encode`."""
    if element == "f32":
        return codes
    if element == "bf16":
        return widen(codes)
    if element == "f16":
        return codes.astype(np.float32)
    assert scales is not None
    values = np.take(_VALUES[element], codes, mode="clip") if element in _VALUES else codes.astype(np.float32)
    values *= scales
    return values


def stored(codes: np.ndarray, encoding: Encoding) -> np.ndarray:
    """Codes as the file holds them: packed, and of its element type."""
    if encoding.element == "e2m1":
        codes = pack(codes)
    if encoding.element == "int4":
        return pack_words(codes)
    return codes.view(encoding.codes[0])


def rounded_as(values: np.ndarray, element: str) -> np.ndarray:
    """What float values become in a file of bfloat16 or float16; others hold float32's products as they are."""
    if element == "bf16":
        return widen(bfloat16_bits(values)[0])
    if element == "f16":
        return float16_values(values)[0].astype(np.float32)
    return values
