"""What a conversion does to values: exact where theory says so and flagged where not, on all codes, bit for bit.

Expected numbers come from fractions and from ml_dtypes' own types, never from the code under test.
"""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from helpers import SEED, rng

from dsjax.checkpoint.resident import Source
from dsjax.convert import TARGETS, matrix
from dsjax.convert.encode import bfloat16_bits, encode, new_scales, pack_words, power_above, unpack_words
from dsjax.convert.matrix import Origin, Strip, convert_strip
from dsjax.convert.targets import Encoding
from dsjax.params import EXPERT, LINEAR

E2M1 = np.dtype(ml_dtypes.float4_e2m1fn)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
BF16 = np.dtype(ml_dtypes.bfloat16)
MAGNITUDES = [Fraction(n, 2) for n in (0, 1, 2, 3, 4, 6, 8, 12)]
"""Of E2M1's codes 0 .. 7."""

FP8 = [Encoding("e4m3", "f32", (128, 128)), Encoding("e4m3", "e8m0", (128, 128), True)]


def fp4(codes: np.ndarray, exponents: np.ndarray) -> Source:
    """E2M1 codes [128, K] with scales 2^exponents [128, K/32]."""
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8).view(np.int8)
    return Source(packed, (exponents + 127).astype(np.uint8).view(E8M0), (1, 32), packed=True)


def decoded(strip: Strip, encoding: Encoding, shape: tuple[int, int]) -> np.ndarray:
    """float32 values of FP8, by ml_dtypes."""
    assert strip.scales is not None
    scales = strip.scales.astype(np.float32)
    spread = np.repeat(np.repeat(scales, 128, axis=0), 128, axis=1)[: shape[0], : shape[1]]
    return strip.codes.view(E4M3).astype(np.float32) * spread


def bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x, np.float32).view(np.uint32)


def fits(code: int, ratio: int) -> bool:
    """Whether E2M1's number times 2^(6 - ratio) is one of E4M3: a multiple of 2^-9, its two bits always fit."""
    return (MAGNITUDES[code & 7] * Fraction(2) ** (6 - ratio + 9)).denominator == 1


# --- FP4 to FP8 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", FP8)
@pytest.mark.parametrize("ratio", range(18))
def test_fp4_to_fp8_one_code(ratio: int, encoding: Encoding) -> None:
    """A group with the largest number beside a group of one code, for every code and ratio of scales."""
    for code in range(16):
        codes = np.full((128, 128), 7, np.uint8)
        codes[5, 32:64] = code
        exponents = np.full((128, 4), 3)
        exponents[5, 1] = 3 - ratio
        strip = convert_strip(fp4(codes, exponents), Origin("e2m1"), encoding)
        assert strip.errors.exact == fits(code, ratio), (code, ratio)
        old = codes.view(E2M1).astype(np.float32) * np.repeat(np.exp2(exponents.astype(np.float32)), 32, axis=1)
        new = decoded(strip, encoding, (128, 128))
        assert np.array_equal(bits(old), bits(new)) == strip.errors.exact
        if not strip.errors.exact:
            assert strip.errors.reasons(encoding)[0] == f"scale ratio 2^{ratio} above 2^14 in 1 block"
            assert strip.errors.different == 32 and strip.errors.max_abs == np.abs(new - old).max()


@pytest.mark.parametrize("encoding", FP8)
def test_fp4_to_fp8_all_codes(encoding: Encoding) -> None:
    """With all codes in all groups: exact up to a ratio of 2^14, flagged beyond, block by block."""
    random = rng(800)
    for ratio in range(18):
        codes = random.integers(0, 16, (128, 256)).astype(np.uint8)
        codes[:, :32] = np.tile(np.arange(16, dtype=np.uint8), (128, 2))
        codes[:, 32:64] = codes[:, :32]
        exponents = random.integers(-2, 1, (128, 8))
        exponents[:, 0], exponents[:, 1] = 0, -ratio  # the second block of 128 columns is always fine
        exponents[:, 2:4] = np.maximum(exponents[:, 2:4], -ratio)
        strip = convert_strip(fp4(codes, exponents), Origin("e2m1"), encoding)
        assert strip.errors.exact == (ratio <= 14), (ratio, SEED)
        assert sum(strip.errors.ratios.values()) == (ratio > 14)
        if ratio > 14:
            assert strip.errors.reasons(encoding)[0] == f"scale ratio 2^{ratio} above 2^14 in 1 block"


@pytest.mark.parametrize("encoding", FP8)
def test_fp4_to_fp8_beyond_the_rule(encoding: Encoding) -> None:
    """Scales of groups of zeros do not count; nor does room that the codes leave: with 3 for the largest, 2^15 fits."""
    codes = np.zeros((128, 128), np.uint8)
    codes[:, 32:64] = np.arange(8, 16)[np.arange(32) % 8]  # -0 among them
    exponents = np.full((128, 4), 40)
    exponents[:, 1] = -20
    assert convert_strip(fp4(codes, exponents), Origin("e2m1"), encoding).errors.exact
    codes[0, 0], exponents[0, 0] = 5, -5  # 3 * 2^-5
    strip = convert_strip(fp4(codes, exponents), Origin("e2m1"), encoding)
    assert strip.errors.exact
    codes[0, 0] = 7  # 6 * 2^-5
    assert not convert_strip(fp4(codes, exponents), Origin("e2m1"), encoding).errors.exact


@pytest.mark.parametrize("encoding", FP8)
def test_fp4_to_fp8_loses_small_values_only(encoding: Encoding) -> None:
    """Beyond the rule, too, a block keeps a power of two for a scale: what is not tiny is not rounded."""
    codes = np.full((128, 128), 7, np.uint8)
    codes[:, 32:] = np.arange(16)[np.arange(96) % 16]
    exponents = np.zeros((128, 4), int)
    exponents[:, 3] = -18
    strip = convert_strip(fp4(codes, exponents), Origin("e2m1"), encoding)
    assert not strip.errors.exact and strip.errors.summary()["relative_norm"] < 1e-5
    found, old = decoded(strip, encoding, (128, 128)), fp4(codes, exponents).values(slice(0, 128), slice(0, 128))
    np.testing.assert_array_equal(bits(found[:, :96]), bits(old[:, :96]))


@pytest.mark.parametrize("encoding", FP8)
@pytest.mark.parametrize("largest", range(1, 8))
def test_fp4_to_fp8_scales(largest: int, encoding: Encoding, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest power of two that keeps a block's largest number within 448; the same bytes without tables.

    Channels i and i + 16 of a group have codes whose bits together would be a greater code's.
    """
    codes = np.full((128, 128), 1, np.uint8)
    codes[:, ::16] = largest
    codes[:, 16::32] = 2 if largest > 2 else 1
    source = fp4(codes, np.full((128, 4), 2))
    strip = convert_strip(source, Origin("e2m1"), encoding)
    limit = MAGNITUDES[largest] * 4
    exponent = next(e for e in range(-20, 20) if Fraction(2) ** e * 448 >= limit)
    assert strip.scales is not None and strip.scales.astype(np.float32).item() == 2.0**exponent
    monkeypatch.setattr(matrix, "convert_by_table", lambda *_: None)
    plain = convert_strip(source, Origin("e2m1"), encoding)
    assert plain.scales is not None and plain.scales.tobytes() == strip.scales.tobytes()
    assert plain.codes.tobytes() == strip.codes.tobytes()


@pytest.mark.parametrize("encoding", FP8)
def test_fp4_to_fp8_scales_of_all_sets_of_codes(encoding: Encoding, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block for each set of magnitudes: looked up, with the least power of two, and as without tables."""
    random = rng(843)
    sets = [[c for c in range(8) if members >> c & 1] for members in range(1, 256)]
    codes = np.concatenate([random.choice(s, (128, 128)) for s in sets], axis=1)
    source = fp4(codes | random.integers(0, 2, codes.shape) << 3, np.full((128, codes.shape[1] // 32), -3))
    strip = convert_strip(source, Origin("e2m1"), encoding)
    largest = [MAGNITUDES[max(s)] / 8 for s in sets]
    powers = [min(e for e in range(-20, 20) if Fraction(2) ** e * 448 >= x) if x else 0 for x in largest]
    assert strip.scales is not None and strip.errors.exact
    assert np.log2(strip.scales.astype(np.float32)).tolist() == [powers]
    assert matrix.convert_by_table(source, encoding, None, np.empty_like(strip.codes)) is not None
    monkeypatch.setattr(matrix, "convert_by_table", lambda *_: None)
    plain = convert_strip(source, Origin("e2m1"), encoding)
    assert plain.scales is not None and plain.scales.tobytes() == strip.scales.tobytes()
    assert plain.codes.tobytes() == strip.codes.tobytes() and plain.errors == strip.errors


def test_fp4_with_scales_of_zero() -> None:
    """Groups whose float32 scale is zero have no part in a block's ratio."""
    codes = np.full((128, 128), 7, np.uint8)
    codes[0, 32:64] = 1
    scales = np.full((128, 4), 8, np.float32)
    scales[0, 1:3] = 8 / 2**17, 0
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).view(np.int8)
    strip = convert_strip(Source(packed, scales, (1, 32), packed=True), Origin("e2m1"), FP8[0])
    assert not strip.errors.exact and strip.errors.ratios == {17: 1}


@pytest.mark.parametrize("shape", [(128, 128), (64, 96), (3, 160), (128, 1056)])
def test_fp4_and_back(shape: tuple[int, int]) -> None:
    """With the old scales at hand, FP8 becomes the same FP4 bytes again; without, the same values."""
    random = rng(801, *shape)
    codes = random.integers(0, 16, shape).astype(np.uint8)
    codes[0] &= 8  # zeros of both signs
    source = fp4(codes, random.integers(-9, -3, (shape[0], -(-shape[1] // 32))))
    assert source.scales is not None
    there = convert_strip(source, Origin("e2m1"), FP8[1])
    assert there.errors.exact
    back = TARGETS["mxfp4"].encoding(EXPERT, True)
    assert back is not None
    middle = Source(there.codes, there.scales, (128, 128))
    again = convert_strip(middle, Origin("e4m3", source.scales.astype(np.float32)), back)
    assert again.errors.exact and again.errors.carried == again.errors.blocks
    assert again.scales is not None and np.array_equal(again.codes, source.elements)
    assert np.array_equal(again.scales.view(np.uint8), source.scales.view(np.uint8))
    assert convert_strip(middle, Origin("e4m3"), back).errors.exact


# --- FP8 to floats ---------------------------------------------------------------------------------------------------

ALL_CODES = np.array([c for c in range(256) if c & 0x7F != 0x7F], np.uint8)


def all_codes(scale: float, container: np.dtype) -> Source:
    codes = np.resize(ALL_CODES, (128, 128))
    return Source(codes.view(E4M3), np.full((1, 1), scale, np.float32).astype(container), (128, 128))


@pytest.mark.parametrize("container", [np.dtype(np.float32), E8M0])
def test_fp8_with_powers_of_two_to_bfloat16(container: np.dtype) -> None:
    """All codes with all scales that leave the results normal: exact."""
    for exponent in range(-117, 120):
        source = all_codes(2.0**exponent, container)
        strip = convert_strip(source, Origin("e4m3"), Encoding("bf16"))
        assert strip.errors.exact, exponent
        expected = source.elements.astype(np.float32) * np.float32(2.0**exponent)
        assert np.array_equal(bits(strip.codes.astype(np.float32)), bits(expected))


def test_fp8_with_float_scales_to_bfloat16() -> None:
    """Flagged, with an error of at most 2^-8, which is what a comparison in float64 gives."""
    random = rng(802)
    for _ in range(20):
        scale = np.float32(random.random() * 1e-3)
        source = all_codes(float(scale), np.dtype(np.float32))
        strip = convert_strip(source, Origin("e4m3"), Encoding("bf16"))
        assert not strip.errors.exact and "float32 scales" in strip.errors.reasons(Encoding("bf16"))
        old = (source.elements.astype(np.float32) * scale).astype(np.float64)
        new = strip.codes.astype(np.float64)
        relative = np.abs(new - old)[old != 0] / np.abs(old[old != 0])
        assert 0 < strip.errors.max_rel <= 2**-8, SEED
        assert strip.errors.max_rel == relative.max()
        assert strip.errors.max_abs == np.abs(new - old).max()
        norm = strip.errors.summary()["relative_norm"]
        assert norm == pytest.approx(np.linalg.norm(new - old) / np.linalg.norm(old), rel=1e-5)


def test_float16_audit() -> None:
    """Overflow is counted and saturates, what is too small is counted, and what is neither is exact."""
    scales = np.array([[2.0**9, 2.0**-18, 1.0]], np.float32)
    codes = np.zeros((128, 384), np.uint8)
    codes[:, :128] = 0x7E  # 448 * 2^9
    codes[:, 128:] = 0x01  # 2^-9
    strip = convert_strip(Source(codes.view(E4M3), scales, (128, 128)), Origin("e4m3"), Encoding("f16"))
    assert (strip.codes[:, :128] == 65504).all() and (strip.codes[:, 128:256] == 0).all()
    assert (strip.codes[:, 256:] == 2.0**-9).all()
    found = strip.errors
    assert (found.saturated, found.flushed, found.small, found.different) == (128 * 128,) * 3 + (2 * 128 * 128,)
    reasons = found.reasons(Encoding("f16"))
    assert reasons == [f"float16 overflow of {128 * 128} values", f"subnormal: {128 * 128} values"]


# --- and back --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("element", ["bf16", "f16", "f32"])
def test_fp8_round_trip(element: str) -> None:
    """A block whose largest code is small has a scale that its values do not tell; the old scales bring it back."""
    random = rng(803)
    codes = random.choice(ALL_CODES[(ALL_CODES & 0x7F) < 0x50], (128, 256))
    codes[0, :2] = 0x80, 0x00
    scales = np.exp2(random.integers(-12, -4, (1, 2))).astype(np.float32)
    there = convert_strip(Source(codes.view(E4M3), scales, (128, 128)), Origin("e4m3"), Encoding(element))
    assert there.errors.exact
    middle = Source(there.codes, None, (1, 0))
    for encoding in FP8:
        back = convert_strip(middle, Origin(element, scales), encoding)
        assert back.errors.exact and back.errors.carried == 2
        assert np.array_equal(back.codes.view(np.uint8), codes), (element, SEED)
        assert back.scales is not None and np.array_equal(back.scales.astype(np.float32), scales)
        fresh = convert_strip(middle, Origin(element), encoding)
        assert fresh.errors.exact  # the same values, though with other scales
        wrong = convert_strip(middle, Origin(element, scales * 2.0**12), encoding)
        assert wrong.errors.exact and wrong.errors.carried == 0


def test_rounded_fp8_round_trip() -> None:
    """FP8 with float32 scales is not exact in bfloat16, but what was rounded there still tells its codes."""
    random = rng(804)
    codes = random.choice(ALL_CODES[ALL_CODES != 0x80], (128, 128))
    scale = np.full((1, 1), random.random() * 1e-3, np.float32)
    there = convert_strip(Source(codes.view(E4M3), scale, (128, 128)), Origin("e4m3"), Encoding("bf16"))
    back = convert_strip(Source(there.codes, None, (1, 0)), Origin("bf16", scale), FP8[0])
    assert np.array_equal(back.codes.view(np.uint8), codes), SEED
    assert not back.errors.exact and back.errors.max_rel <= 2**-8


# --- by table ---


@pytest.mark.parametrize("target", ["bf16", "f16", "f32", "fp8", "fp8-ue8m0"])
@pytest.mark.parametrize("kind", ["fp4", "fp4 with gaps", "fp8 pow2", "fp8 float"])
def test_tables_change_nothing(kind: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked up or converted value by value: the same bytes and verdicts."""
    random = rng(809)
    codes = random.integers(0, 16, (128, 416)).astype(np.uint8)
    if kind == "fp4 with gaps":
        codes[:, :256] = np.minimum(codes[:, :256], 1)  # blocks without a 4 or a 6
        codes[3, 256:288] = 0
    source = fp4(codes, random.integers(-6, -1, (128, 13)))
    if kind.startswith("fp8"):
        scales = np.exp2(random.integers(-9, -5, (1, 4))) if kind == "fp8 pow2" else random.random((1, 4))
        source = Source(random.choice(ALL_CODES, (128, 416)).view(E4M3), scales.astype(np.float32), (128, 128))
    encoding = TARGETS[target].encoding(EXPERT, True)
    assert encoding is not None
    origin = Origin("e2m1" if source.packed else "e4m3", None if source.packed else source.scales)
    one = convert_strip(source, origin, encoding)
    looked_up = matrix.convert_by_table(source, encoding, origin.scales, np.empty_like(one.codes)) is not None
    assert looked_up == one.errors.exact, SEED
    monkeypatch.setattr(matrix, "convert_by_table", lambda *_: None)
    other = convert_strip(source, origin, encoding)
    assert one.errors == other.errors
    assert one.codes.dtype == other.codes.dtype and one.codes.tobytes() == other.codes.tobytes()
    assert (one.scales is None) == (other.scales is None)
    assert one.scales is None or (other.scales is not None and one.scales.tobytes() == other.scales.tobytes())


# --- the codecs ------------------------------------------------------------------------------------------------------


def many_values() -> np.ndarray:
    """float32 [1, n]: of all magnitudes about 1, midpoints of E4M3 and E2M1 and their neighbours."""
    random = rng(805)
    values = [random.standard_normal(100_000) * np.exp2(random.integers(-14, 10, 100_000))]
    for dtype, count in ((E4M3, 256), (E2M1, 16)):
        grid = np.arange(count, dtype=np.uint8).view(dtype).astype(np.float64)
        grid = np.unique(grid[np.isfinite(grid)])
        values += [grid, (grid[1:] + grid[:-1]) / 2]
    found = np.concatenate(values).astype(np.float32)
    return np.concatenate([np.nextafter(found, -np.inf), found, np.nextafter(found, np.inf), [0.0, -0.0]])[None].astype(
        np.float32
    )


@pytest.mark.parametrize(("element", "dtype", "largest"), [("e4m3", E4M3, 448), ("e2m1", E2M1, 6)])
def test_small_floats(element: str, dtype: np.dtype, largest: float) -> None:
    values = many_values()
    codes, _ = encode(values, np.ones((1, 1), np.float32), Encoding(element, "f32", (1, 0)))
    expected = np.clip(values, -largest, largest).astype(dtype).view(np.uint8)
    assert np.array_equal(codes, expected)


def test_bfloat16() -> None:
    values = np.concatenate([many_values()[0], np.float32([3.4e38, -3.4e38, 1e-40, -1e-45])])[None]
    codes, beyond = bfloat16_bits(values)
    expected = values.astype(BF16).view(np.uint16)
    infinite = (expected & 0x7FFF) == 0x7F80
    assert beyond == infinite.sum() == 2
    assert np.array_equal(codes, expected - infinite)


def test_powers_of_two() -> None:
    x = np.float32([0, 1e-45, 2.0**-127, 2.0**-127 * 1.5, 2.0**-126, 1, np.nextafter(np.float32(1), 2), 3, 2.0**100])
    expected = [2.0**-127] * 3 + [2.0**-126] * 2 + [1, 2, 4, 2.0**100]
    assert power_above(x).tolist() == expected


def test_words_of_nibbles() -> None:
    """One nibble at a time, by its definition."""
    codes = rng(806).integers(-7, 8, (3, 20)).astype(np.int8)
    words = pack_words(codes)
    assert words.shape == (3, 3) and words.dtype == np.int32
    for row in range(3):
        for k in range(24):
            nibble = int(words[row, k // 8]) >> 4 * (k % 8) & 0xF
            assert nibble == (codes[row, k] + 8 if k < 20 else 0)
    assert np.array_equal(unpack_words(words, 20), codes)


@pytest.mark.parametrize("name", ["int8-channel", "int8-block", "int4-group", "w4a8"])
def test_integers(name: str) -> None:
    """Codes are the nearest, none saturates, and a block of zeros has a finite scale."""
    encoding = TARGETS[name].encoding(LINEAR, False)
    assert encoding is not None
    values = (rng(807).standard_normal((128, 320)) * 1e-3).astype(np.float32)
    values[:, 128:256] = 0
    strip = convert_strip(Source(values, None, (1, 0)), Origin("f32"), encoding)
    assert strip.scales is not None
    scales = strip.scales.astype(np.float32)
    codes = unpack_words(strip.codes, 320) if encoding.element == "int4" else strip.codes
    bn, bk = encoding.block[0], encoding.block[1] or 320
    spread = np.repeat(np.repeat(scales, bn, axis=0), bk, axis=1)[:128, :320]
    assert np.isfinite(scales).all() and (scales > 0).all()
    assert strip.errors.saturated == 0
    limit = 127 if encoding.element == "int8" else 7
    assert np.abs(codes).max() == limit
    off = np.abs(codes * spread.astype(np.float64) - values)
    assert (off <= spread * 0.5001).all()
    if encoding.element == "int4":  # a bfloat16 scale may lie half a step below amax / 7
        assert np.array_equal(scales, scales.astype(BF16).astype(np.float32))


def test_new_scales_are_the_papers() -> None:
    """amax / 448, and the power of two above it: never below, less than twice."""
    amax = np.abs(rng(808).standard_normal((4, 4))).astype(np.float32)
    assert np.array_equal(new_scales(amax, FP8[0]), amax / np.float32(448))
    pow2 = new_scales(amax, FP8[1])
    assert (np.frexp(pow2)[0] == 0.5).all() and (pow2 >= amax / 448).all() and (pow2 < amax / 224).all()
