"""quant.formats: every codec on all its codes and at every rounding boundary, against ml_dtypes and exact fractions."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from fractions import Fraction

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from quant import formats
from quant.formats import BF16, E2M1, E4M3, E5M2, E8M0, F16, FORMATS, INT4, INT8, Format

FLOATS = (E4M3, E5M2, E2M1, BF16, F16)

both_modes = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])


def run(function: Callable[..., jax.Array], compiled: bool, *arrays: np.ndarray) -> np.ndarray:
    """The function on NumPy arrays, jitted or operation by operation."""
    return np.asarray((jax.jit(function) if compiled else function)(*map(jnp.asarray, arrays)))


def all_codes(fmt: Format) -> np.ndarray:
    return np.arange(2**fmt.bits).astype(fmt.code_dtype)


def oracle_decode(codes: np.ndarray, fmt: Format) -> np.ndarray:
    """Codes -> float32 by ml_dtypes."""
    if fmt == INT4:  # ml_dtypes keeps an int4 sign-extended in its byte
        codes = np.where(codes & 8, codes | 0xF0, codes).astype(np.uint8)
    with np.errstate(invalid="ignore"):
        return codes.view(fmt.dtype).astype(np.float32)


def oracle_encode(values: np.ndarray, fmt: Format) -> np.ndarray:
    """float32 -> codes by ml_dtypes, after the clip that makes it saturate."""
    with np.errstate(invalid="ignore", over="ignore"):
        clipped = np.clip(values, np.float32(-fmt.max), np.float32(fmt.max))
        return clipped.astype(fmt.dtype).view(fmt.code_dtype)


def finite_values(fmt: Format) -> np.ndarray:
    """The distinct finite values, ascending."""
    values = oracle_decode(all_codes(fmt), fmt)
    return np.unique(values[np.isfinite(values)])


def assert_same_float32(got: np.ndarray, want: np.ndarray) -> None:
    """Bit equality: signed zeros and subnormals count, the payload of a NaN does not."""
    assert got.dtype == want.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    number = ~np.isnan(want)
    np.testing.assert_array_equal(got.view(np.uint32)[number], want.view(np.uint32)[number])


def test_packed_e2m1_equals_ml_dtypes_on_all_bytes() -> None:
    """Low nibble first; the factor makes them the numbers, signed zeros included."""
    packed = np.arange(256, dtype=np.uint8)
    even, odd, factor = jax.jit(formats.decode_packed_e2m1)(packed)
    assert_same_float32(np.asarray(even * factor), oracle_decode(packed & 0xF, E2M1))
    assert_same_float32(np.asarray(odd * factor), oracle_decode(packed >> 4, E2M1))


# --- decoding -------------------------------------------------------------------------------------------------------


@both_modes
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_decode_equals_ml_dtypes_on_all_codes(fmt: Format, compiled: bool) -> None:
    codes = all_codes(fmt)
    assert_same_float32(run(lambda c: formats.decode(c, fmt), compiled, codes), oracle_decode(codes, fmt))


@both_modes
def test_decode_finite_e4m3_on_all_finite_codes(compiled: bool) -> None:
    codes = all_codes(E4M3)
    codes = codes[(codes & 0x7F) != 0x7F]
    _, factor = formats.decode_finite_e4m3(jnp.asarray(codes))
    values = run(lambda c: formats.decode_finite_e4m3(c)[0], compiled, codes)
    assert_same_float32(values * np.float32(factor), oracle_decode(codes, E4M3))


def test_special_codes_of_spec_table() -> None:
    def decoded(fmt: Format, *codes: int) -> list[float]:
        return run(lambda c: formats.decode(c, fmt), True, np.array(codes, fmt.code_dtype)).tolist()

    assert decoded(E4M3, 0x01, 0x08, 0x7E, 0xFE) == [2.0**-9, 2.0**-6, 448.0, -448.0]
    assert decoded(E5M2, 0x01, 0x04, 0x7B, 0x7C, 0xFC) == [2.0**-16, 2.0**-14, 57344.0, np.inf, -np.inf]
    assert decoded(E2M1, *range(8)) == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert decoded(E8M0, 0, 1, 126, 127, 128, 254) == [2.0**-127, 2.0**-126, 0.5, 1, 2, 2.0**127]
    assert np.isnan(decoded(E4M3, 0x7F, 0xFF) + decoded(E8M0, 255)).all()


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_format_describes_its_dtype(fmt: Format) -> None:
    values = oracle_decode(all_codes(fmt), fmt)
    assert fmt.max == values[np.isfinite(values)].max()
    assert fmt.packed == (fmt.bits == 4) and fmt.code_dtype.itemsize == fmt.dtype.itemsize
    assert FORMATS[fmt.name] is fmt


# --- encoding -------------------------------------------------------------------------------------------------------


@both_modes
@pytest.mark.parametrize("fmt", [*FLOATS, INT8, INT4], ids=lambda f: f.name)
def test_encode_inverts_decode(fmt: Format, compiled: bool) -> None:
    codes = all_codes(fmt)
    values = oracle_decode(codes, fmt)
    codes = codes[np.abs(values) <= fmt.max]  # not NaN, infinity, nor -128 and -8, which the symmetric rule never makes
    got = run(lambda c: formats.encode(formats.decode(c, fmt), fmt), compiled, codes)
    assert got.dtype == fmt.code_dtype
    np.testing.assert_array_equal(got, codes)


@both_modes
@pytest.mark.parametrize("fmt", FLOATS, ids=lambda f: f.name)
def test_encode_at_every_midpoint_and_its_neighbours(fmt: Format, compiled: bool) -> None:
    grid = finite_values(fmt).astype(np.float64)
    middle = ((grid[1:] + grid[:-1]) / 2).astype(np.float32)
    assert np.isin(middle.astype(np.float64) * 2, grid[1:] + grid[:-1]).all(), "midpoints are exact in float32"
    around = [middle, np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, np.float32(-np.inf))]
    values = np.concatenate([*around, grid.astype(np.float32), np.float32([0.0, -0.0])])
    got = run(lambda v: formats.encode(v, fmt), compiled, values)
    np.testing.assert_array_equal(got, oracle_encode(values, fmt))


@both_modes
@pytest.mark.parametrize("fmt", [*FLOATS, INT8, INT4], ids=lambda f: f.name)
def test_encode_saturates_at_the_largest_value(fmt: Format, compiled: bool) -> None:
    top = np.float32(fmt.max)
    infinity, largest = np.float32(np.inf), np.finfo(np.float32).max
    beyond = np.float32([top, np.nextafter(top, infinity), min(float(top) * 1.04, float(largest)), largest, infinity])
    got = run(lambda v: formats.encode(v, fmt), compiled, np.concatenate([beyond, -beyond]))
    np.testing.assert_array_equal(oracle_decode(got, fmt), np.repeat([top, -top], len(beyond)))


@both_modes
def test_encode_keeps_nan_where_the_format_has_one(compiled: bool) -> None:
    nans = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF], np.uint32).view(np.float32)
    for fmt in (E4M3, E5M2, BF16, F16):
        assert np.isnan(oracle_decode(run(lambda v, f=fmt: formats.encode(v, f), compiled, nans), fmt)).all(), fmt.name
    for fmt in (E2M1, INT8, INT4):
        assert (oracle_decode(run(lambda v, f=fmt: formats.encode(v, f), compiled, nans), fmt) == 0).all(), fmt.name


def bulk(fmt: Format) -> np.ndarray:
    """A million float32: half of them any bits but NaN, half spread over the format's binades and just outside."""
    rng = np.random.default_rng(7)
    half = 500_000
    anything = rng.integers(0, 2**32, half, dtype=np.uint32).view(np.float32)
    grid = finite_values(fmt)
    low, high = np.log2(grid[grid > 0].min()) - 3, np.log2(fmt.max) + 1
    with np.errstate(over="ignore", under="ignore"):
        near = (rng.choice([-1.0, 1.0], half) * 2 ** rng.uniform(low, high, half)).astype(np.float32)
    values = np.concatenate([anything, near])
    return values[~np.isnan(values)]


@both_modes
@pytest.mark.parametrize("fmt", FLOATS, ids=lambda f: f.name)
def test_encode_a_million_values(fmt: Format, compiled: bool) -> None:
    values = bulk(fmt)
    got = run(lambda v: formats.encode(v, fmt), compiled, values)
    np.testing.assert_array_equal(got, oracle_encode(values, fmt))


@both_modes
@pytest.mark.parametrize("fmt", [INT8, INT4], ids=lambda f: f.name)
def test_encode_integers(fmt: Format, compiled: bool) -> None:
    """Round half to even, clipped symmetrically (spec 6.4): -128 and -8 never occur."""
    halves = np.arange(-2 * int(fmt.max) - 6, 2 * int(fmt.max) + 7, dtype=np.float32) / 2
    around = [halves, np.nextafter(halves, np.float32(np.inf)), np.nextafter(halves, np.float32(-np.inf))]
    values = np.concatenate([*around, bulk(fmt)])
    got = oracle_decode(run(lambda v: formats.encode(v, fmt), compiled, values), fmt)
    np.testing.assert_array_equal(got, np.clip(np.rint(values), -fmt.max, fmt.max))


@pytest.mark.parametrize("call", [formats.encode, formats.decode])
def test_unknown_format_is_refused(call: Callable[..., jax.Array]) -> None:
    unknown = Format("e3m4", np.dtype(ml_dtypes.float8_e3m4), 8, 15.5)
    with pytest.raises(ValueError, match="e3m4"):
        call(jnp.zeros(2, jnp.float32 if call is formats.encode else jnp.uint8), unknown)


# --- UE8M0 ----------------------------------------------------------------------------------------------------------

POWERS = [Fraction(2) ** (code - 127) for code in range(255)]


def least_power(value: np.float32) -> int:
    """The code of the smallest E8M0 value >= `value`, by exact rational comparison; 255 where there is none."""
    if not np.isfinite(value):
        return 255
    return bisect.bisect_left(POWERS, Fraction(float(value)))  # one past the end is 255


@both_modes
def test_encode_e8m0_ceil_on_every_exponent(compiled: bool) -> None:
    """Every float32 exponent (subnormal, inf and NaN too) with mantissas next to powers of two and in between."""
    random = np.random.default_rng(3).integers(2, 0x7FFFFE, 12)
    mantissas = np.array([0, 1, 0x3FFFFF, 0x400000, 0x400001, 0x7FFFFE, 0x7FFFFF, *random], np.uint32)
    bits = (np.arange(256, dtype=np.uint32)[:, None] << 23 | mantissas).reshape(-1)
    values = bits.view(np.float32)
    got = run(formats.encode_e8m0_ceil, compiled, values)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, [least_power(v) for v in values])


def test_encode_e8m0_ceil_at_the_ends() -> None:
    ends = np.float32([0.0, 2.0**-149, 2.0**-127, 2.0**-127 + 2.0**-149, 2.0**-126, 2.0**127, np.inf, np.nan])
    assert run(formats.encode_e8m0_ceil, True, ends).tolist() == [0, 0, 0, 1, 1, 254, 255, 255]
    above = np.nextafter(np.float32(2.0**127), np.float32(np.inf))
    assert run(formats.encode_e8m0_ceil, True, np.float32([above])).tolist() == [255]


@both_modes
def test_encode_e8m0_ceil_inverts_decode(compiled: bool) -> None:
    codes = all_codes(E8M0)
    back = run(lambda c: formats.encode_e8m0_ceil(formats.decode(c, E8M0)), compiled, codes)
    np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize("fmt", [E4M3, E5M2, E2M1, INT8], ids=lambda f: f.name)
def test_e8m0_scale_never_lets_a_value_exceed_the_maximum(fmt: Format) -> None:
    """|x / scale| <= max, and above max / 2: the ceil rule neither saturates nor wastes a binade (spec 4.1, 4.2)."""
    rng = np.random.default_rng(11)
    amax = np.float32(2 ** rng.uniform(-13, 20, 100_000))
    exact = np.float32(fmt.max) * np.float32(2.0) ** np.arange(-20, 21, dtype=np.float32)
    amax = np.concatenate([amax, exact, np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(0))])
    codes = run(formats.encode_e8m0_ceil, True, amax / np.float32(fmt.max))
    scaled = amax.astype(np.float64) / np.exp2(codes.astype(np.float64) - 127)
    assert scaled.max() <= fmt.max and scaled.min() > fmt.max / 2


# --- nibbles and division -------------------------------------------------------------------------------------------


def test_unpack_puts_the_low_nibble_at_even_indices_for_all_bytes() -> None:
    packed = np.arange(256, dtype=np.uint8).reshape(4, 64)
    codes = run(formats.unpack, True, packed)
    assert codes.shape == (4, 128) and codes.dtype == np.uint8
    np.testing.assert_array_equal(codes[:, 0::2], packed % 16)
    np.testing.assert_array_equal(codes[:, 1::2], packed // 16)
    np.testing.assert_array_equal(run(formats.pack, True, codes), packed)


def test_pack_inverts_unpack_for_all_pairs_and_refuses_odd_lengths() -> None:
    low, high = np.meshgrid(np.arange(16, dtype=np.uint8), np.arange(16, dtype=np.uint8))
    codes = np.stack([low, high], -1).reshape(16, 32)
    np.testing.assert_array_equal(run(formats.pack, True, codes), low + 16 * high)
    with pytest.raises(ValueError, match=r"even last axis.*\(2, 3\)"):
        formats.pack(jnp.zeros((2, 3), jnp.uint8))


@both_modes
@pytest.mark.parametrize("shape", [(), (1, 1), (64, 1), (1, 500), (64, 500)], ids=str)
def test_exact_divide_is_ieee_division(shape: tuple[int, ...], compiled: bool) -> None:
    """Why it exists: XLA turns division by a broadcast value into multiplication by its reciprocal.

    That moves a third of the quotients by one ulp, and with them E4M3 codes and scales away from DeepSeek's. NumPy
    rounds each quotient once, as IEEE 754 asks.
    """
    rng = np.random.default_rng(5)
    a = np.float32(rng.normal(size=(64, 500)) * 2 ** rng.uniform(-20, 20, (64, 500)))
    b = np.float32(rng.uniform(0.5, 3, shape))
    assert_same_float32(run(formats.exact_divide, compiled, a, b), a / b)


@pytest.mark.parametrize("divisor", [448.0, 127.0, 6.0, 7.0])
def test_exact_divide_by_a_constant(divisor: float) -> None:
    a = np.float32(np.random.default_rng(6).uniform(1e-4, 1e3, 50_000))
    got = run(lambda v: formats.exact_divide(v, jnp.float32(divisor)), True, a)
    assert_same_float32(got, a / np.float32(divisor))


@both_modes
def test_exact_divide_under_vmap_over_the_dividend(compiled: bool) -> None:
    """vmap must not broadcast the divisor behind the guard."""
    rng = np.random.default_rng(8)
    a, b = np.float32(rng.uniform(1e-4, 1e3, (50, 400))), np.float32(rng.uniform(0.5, 3, (400,)))
    for divisor in (np.float32(448), b):
        want = a / divisor
        assert_same_float32(
            run(jax.vmap(lambda v, d=divisor: formats.exact_divide(v, jnp.asarray(d))), compiled, a), want
        )
    scales = np.float32(rng.uniform(0.5, 3, 50))
    got = run(jax.vmap(formats.exact_divide, in_axes=(None, 0)), compiled, a[0], scales)
    assert_same_float32(got, a[0] / scales[:, None])
    with_nan = run(formats.exact_divide, compiled, np.float32([np.nan, np.inf, 1]), np.float32([2, 2, np.nan]))
    assert_same_float32(with_nan, np.float32([np.nan, np.inf, np.nan]))
