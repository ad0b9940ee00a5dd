"""Number formats: what one code of each format means, exactly.

A *code* is the raw bit pattern of a number, held in an unsigned integer. Codes travel as integers because that is what
a checkpoint holds, what every backend can slice and move, and because XLA:CPU widens a whole float8 or bfloat16 array
as soon as one tile of it is sliced (measured; see docs/decisions.md). Decoding uses integer operations and one cast
from float16, so it needs no float8 type from the backend. Tables of the formats: OCP MX v1.0 and OCP 8-bit floating
point.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from quant.operator import operator


@dataclasses.dataclass(frozen=True)
class Format:
    """A number format.

    Attributes:
      name: the name used in messages and manifests, e.g. "e4m3".
      dtype: the NumPy dtype (ml_dtypes for the small floats) of one element; FP4 and INT4 are packed in memory.
      bits: bits per element.
      max: largest finite magnitude, the value that an amax is scaled to.
    """

    name: str
    dtype: np.dtype
    bits: int
    max: float

    @property
    def packed(self) -> bool:
        """Whether two codes share a byte (low nibble = even index)."""
        return self.bits == 4

    @property
    def code_dtype(self) -> np.dtype:
        """The unsigned integer that holds a code (or two packed ones)."""
        return np.dtype(f"uint{max(self.bits, 8)}")


E4M3 = Format("e4m3", np.dtype(ml_dtypes.float8_e4m3fn), 8, 448.0)
E5M2 = Format("e5m2", np.dtype(ml_dtypes.float8_e5m2), 8, 57344.0)
E8M0 = Format("e8m0", np.dtype(ml_dtypes.float8_e8m0fnu), 8, 2.0**127)
E2M1 = Format("e2m1", np.dtype(ml_dtypes.float4_e2m1fn), 4, 6.0)
INT8 = Format("int8", np.dtype(np.int8), 8, 127.0)
INT4 = Format("int4", np.dtype(ml_dtypes.int4), 4, 7.0)
BF16 = Format("bf16", np.dtype(ml_dtypes.bfloat16), 16, float(ml_dtypes.finfo(ml_dtypes.bfloat16).max))
F16 = Format("f16", np.dtype(np.float16), 16, 65504.0)

FORMATS: dict[str, Format] = {f.name: f for f in (E4M3, E5M2, E8M0, E2M1, INT8, INT4, BF16, F16)}


def pack(codes: jax.Array) -> jax.Array:
    """Packs 4-bit codes, uint8 [..., K] with K even, into uint8 [..., K/2]; element 2i goes to the low nibble."""
    if codes.shape[-1] % 2:
        raise ValueError(f"packing needs an even last axis, found shape {codes.shape}")
    return codes[..., 0::2] & 0xF | codes[..., 1::2] << 4


def unpack(packed: jax.Array) -> jax.Array:
    """Unpacks uint8 [..., K/2] into 4-bit codes, uint8 [..., K]; the inverse of `pack`."""
    pair = jnp.stack([packed & 0xF, packed >> 4], axis=-1)
    return pair.reshape(*packed.shape[:-1], packed.shape[-1] * 2)


def _float16(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.float16).astype(jnp.float32)


# A small float whose exponent is narrower than float16's can be placed in float16's fields: the value is then off by a
# power of two (the difference of the biases) and subnormals stay right, since float16 has them in the same place.
# Straight into float32 the subnormals would be lost: XLA:CPU flushes float32 subnormals to zero.
_E4M3_REBIAS = 2.0**8
_E2M1_REBIAS = 2.0**14


def decode_finite_e4m3(codes: jax.Array) -> tuple[jax.Array, float]:
    """E4M3 codes (uint8) -> (values, factor): `values * factor` is the number, for every code but NaN.

    The factor is left to the caller, who folds it into a block scale. NaN codes (0x7F, 0xFF) come out as +-480, so
    this is for weights whose loader has refused NaN.
    """
    if decode.chosen != "bits":
        return decode(codes, E4M3), 1.0
    wide = lax.bitcast_convert_type(codes, jnp.int8).astype(jnp.int16)
    # Sign extension puts the sign into bit 15 after the shift; bit 14 (a copy of it) is not part of the number.
    bits = (wide << 7) & jnp.int16(~0x4000)
    return lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32), _E4M3_REBIAS


def decode_packed_e2m1(packed: jax.Array) -> tuple[jax.Array, jax.Array, float]:
    """Packed E2M1 codes, uint8 [..., K/2] -> (even values, odd values, factor): `values * factor` are the numbers.

    Both values are float32 [..., K/2]; the factor is left to the caller, as in `decode_finite_e4m3`.
    """
    if decode.chosen == "convert":
        pairs = lax.bitcast_convert_type(packed, E2M1.dtype).astype(jnp.float32)
        return pairs[..., 0], pairs[..., 1], 1.0
    # A nibble's sign is copied down by an arithmetic shift until its number is in float16's place; the mask clears the
    # copies. Five operations for two numbers, against eleven with sign and number apart.
    wide = lax.bitcast_convert_type(packed, jnp.int8).astype(jnp.int16)
    even, odd = (bits & jnp.int16(~0x71FF) for bits in ((wide << 12) >> 3, wide << 5))

    def values(bits: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)

    return values(even), values(odd), _E2M1_REBIAS


@operator("decode", first="bits")
def decode(codes: jax.Array, fmt: Format) -> jax.Array:
    """Codes -> float32 values, exactly; NaN codes give NaN.

    Args:
      codes: uint8 [...] (uint16 for the 16-bit formats), one code per element (4-bit codes in the low nibble).
      fmt: their format.

    Returns:
      float32 [...].
    """
    if fmt == E4M3:
        values, factor = decode_finite_e4m3(codes)
        return jnp.where((codes & 0x7F) == 0x7F, jnp.nan, values * factor)
    if fmt == E5M2:
        return _float16(codes.astype(jnp.uint16) << 8)
    if fmt == E8M0:
        bits = codes.astype(jnp.uint32) << 23
        bits = jnp.where(codes == 0, jnp.uint32(1 << 22), bits)  # 2^-127 is a float32 subnormal
        bits = jnp.where(codes == 255, jnp.uint32(0x7FC00000), bits)
        return lax.bitcast_convert_type(bits, jnp.float32)
    if fmt == E2M1:
        wide = codes.astype(jnp.uint16)
        return _float16((wide & 8) << 12 | (wide & 7) << 9) * _E2M1_REBIAS
    if fmt == INT8:
        return lax.bitcast_convert_type(codes, jnp.int8).astype(jnp.float32)
    if fmt == INT4:
        return (((codes & 0xF) ^ 8).astype(jnp.int8) - 8).astype(jnp.float32)
    if fmt == BF16:
        return lax.bitcast_convert_type(codes.astype(jnp.uint32) << 16, jnp.float32)
    if fmt == F16:
        return _float16(codes)
    raise ValueError(f"no decoder for {fmt.name}")


@decode.variant("convert", bound=0.0)
def _converted(codes: jax.Array, fmt: Format) -> jax.Array:
    """By a bitcast to the format's own type and `convert`, for compilers that know the types; 4-bit codes by bits."""
    if fmt.packed or fmt in (INT8, INT4):
        return decode.variants["bits"].body(codes, fmt)
    return lax.bitcast_convert_type(codes, fmt.dtype).astype(jnp.float32)


@decode.variant("fp8", bound=0.0)
def _converted_fp8(codes: jax.Array, fmt: Format) -> jax.Array:
    """As "convert" for FP8, by bits for E8M0 and FP4, which fewer compilers know."""
    return decode.variants["convert" if fmt in (E4M3, E5M2) else "bits"].body(codes, fmt)


def encode(values: jax.Array, fmt: Format) -> jax.Array:
    """float32 values -> codes, rounding to nearest even and saturating at the format's maximum; NaN stays NaN.

    For E8M0 use `encode_e8m0_ceil`, DeepSeek's rule. 4-bit codes come unpacked, one per byte.

    Args:
      values: float32 [...].
      fmt: E4M3, E5M2, E2M1, INT8, INT4, BF16 or F16. Integers and E2M1 have no NaN; a NaN there gives zero.

    Returns:
      uint8 [...] (uint16 for the 16-bit formats).
    """
    if fmt == E4M3:
        return _encode_e4m3(values)
    if fmt in (E5M2, BF16, F16):
        # The cast overflows to infinity, whose code follows that of the maximum. (A clip would flush bf16 subnormals.)
        cast = values.astype(fmt.dtype)
        return lax.bitcast_convert_type(cast, fmt.code_dtype) - jnp.isinf(cast).astype(fmt.code_dtype)
    if fmt == E2M1:
        # Thresholds are the midpoints of 0, .5, 1, 1.5, 2, 3, 4, 6; a tie goes to the even code.
        a = jnp.abs(values)
        steps = (a > 0.25, a >= 0.75, a > 1.25, a >= 1.75, a > 2.5, a >= 3.5, a > 5.0)
        magnitude = sum(s.astype(jnp.uint8) for s in steps)
        return jnp.where(jnp.signbit(values), magnitude | jnp.uint8(8), magnitude)
    if fmt in (INT8, INT4):
        integer = jnp.clip(jnp.round(jnp.nan_to_num(values)), -fmt.max, fmt.max).astype(jnp.int8)
        codes = lax.bitcast_convert_type(integer, jnp.uint8)
        return codes & 0xF if fmt == INT4 else codes
    raise ValueError(f"no encoder for {fmt.name}")


def _encode_e4m3(values: jax.Array) -> jax.Array:
    """In integers and one float32 addition: no backend need know the type, and XLA:CPU takes half a cast's time."""
    bits = lax.bitcast_convert_type(values, jnp.uint32)
    sign, size = bits >> 24 & 0x80, bits & 0x7FFFFFFF
    kept = jnp.minimum(size, jnp.uint32(0x43E00000))  # 448
    # Twenty of the mantissa's bits go, half to even; a carry runs on into the exponent, as it should.
    normal = ((kept + 0x7FFFF + (kept >> 20 & 1)) >> 20) - (120 << 3)
    # Below 2^-6 codes count multiples of 2^-9, to which the sum with 2^14 rounds.
    shifted = lax.bitcast_convert_type(kept, jnp.float32) + 2.0**14
    small = lax.bitcast_convert_type(shifted, jnp.uint32) & 0xF
    code = jnp.where(kept < 121 << 23, small, normal)
    return (jnp.where(size > 0x7F800000, jnp.uint32(0x7F), code) | sign).astype(jnp.uint8)


def round_to_bfloat16(values: jax.Array) -> jax.Array:
    """Finite float32 -> bfloat16, to nearest, halves away from zero.

    For decoded weights on their way into a matrix unit: on XLA:CPU a prefill takes 6% less than with halves to even;
    XLA's own cast takes twice as long. A product of a code and its scale is hardly ever such a half.
    """
    bits = lax.bitcast_convert_type(values, jnp.uint32) + jnp.uint32(0x8000)
    return lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def bfloat16_bits(x: jax.Array) -> jax.Array:
    """bfloat16 as uint16, other types as they are: XLA:CPU widens a bfloat16 array whole whenever it moves a part."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def bfloat16_of_bits(x: jax.Array) -> jax.Array:
    """The inverse of `bfloat16_bits`."""
    return lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def encode_e8m0_ceil(values: jax.Array) -> jax.Array:
    """The smallest power of two that is >= the value, as an E8M0 code, in integer operations only.

    DeepSeek's UE8M0 rule (spec V3 4.2). Logarithms are avoided: they misround next to exact powers.

    Args:
      values: float32 [...], positive.

    Returns:
      uint8 [...]: exponent + 127. Zero and everything up to 2^-127 give 0; above 2^127, infinity and NaN give 255
      (NaN), there being no such power.
    """
    bits = lax.bitcast_convert_type(values, jnp.uint32)
    exponent = (bits >> 23) & 0xFF
    mantissa = bits & 0x7FFFFF
    # A subnormal is mantissa * 2^-149, so 2^-127 has mantissa 2^22: up to there code 0, above it code 1 (2^-126).
    up = jnp.where(exponent == 0, mantissa > 1 << 22, mantissa != 0)
    return jnp.minimum(exponent + up, 255).astype(jnp.uint8)


def exact_divide(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a / b` with IEEE rounding, b broadcast against a.

    XLA rewrites division by a broadcast value into multiplication by its reciprocal, which moves a third of float32
    quotients by one ulp (measured on XLA:CPU). The barrier hides the broadcast; the select makes the divisor depend on
    every element of `a`, else `jax.vmap` over `a` alone would broadcast it after the barrier.
    """
    return a / lax.optimization_barrier(jnp.where(jnp.isnan(a), a, b))
