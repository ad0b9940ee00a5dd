"""quant.transforms and quant.qarray: quantisers against NumPy and the emulator, gradients, and QArray as a pytree."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import emulator
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import export

from quant.formats import BF16, E2M1, E4M3, E5M2, E8M0, INT4, INT8, Format, decode, encode_e8m0_ceil
from quant.qarray import WHOLE, QArray, dequantise, look_up, retile
from quant.transforms import (
    act_quant,
    dequantise_rows,
    fake_act_quant,
    fake_quantise,
    hadamard,
    quantise,
    quantise_rows,
)

Block = tuple[int, int]

BLOCKS = [(128, 128), (1, 128), (1, 32), (32, 32), (1, WHOLE), (WHOLE, WHOLE)]

both_modes = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
both_scales = pytest.mark.parametrize("pow2", [False, True], ids=["float32", "ue8m0"])
all_formats = pytest.mark.parametrize("fmt", [E4M3, E5M2, E2M1, INT8, INT4], ids=lambda f: f.name)
all_blocks = pytest.mark.parametrize("block", BLOCKS, ids=str)


def bits(a: Any) -> np.ndarray:
    """float32 as its bits, so that equality counts signed zeros."""
    a = np.asarray(a)
    assert a.dtype == np.float32
    return a.view(np.uint32)


def assert_bit_equal(got: Any, want: Any) -> None:
    np.testing.assert_array_equal(bits(got), bits(want))


def sample(shape: tuple[int, ...], seed: int, spread: float = 3.0) -> np.ndarray:
    """bf16-valued float32 whose rows differ in magnitude."""
    rng = np.random.default_rng(seed)
    rows = np.exp2(rng.uniform(-spread, spread, (*shape[:-1], 1)))
    return np.float32(rng.normal(size=shape) * rows).astype(ml_dtypes.bfloat16).astype(np.float32)


def at(function: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
    """The function, jitted or to be run operation by operation (it then wants JAX arrays, as the type checks do)."""
    return jax.jit(function) if compiled else lambda *args: function(*jax.tree.map(jnp.asarray, args))


# --- a NumPy quantiser, block by block ------------------------------------------------------------------------------


def power_at_least(scale: np.float32) -> np.float32:
    mantissa, exponent = math.frexp(float(scale))  # scale = mantissa * 2^exponent, mantissa in [0.5, 1)
    return np.float32(math.ldexp(1.0, exponent - (mantissa == 0.5)))


def numpy_quantise(x: np.ndarray, fmt: Format, block: Block, pow2: bool) -> tuple[np.ndarray, np.ndarray]:
    """Matrix -> (codes, one per byte; float32 scales), one block at a time (spec 4.2; 6.4 for the integers)."""
    n, k = x.shape
    bn, bk = block[0] or n, block[1] or k
    codes = np.zeros(x.shape, np.uint8)
    scales = np.zeros((math.ceil(n / bn), math.ceil(k / bk)), np.float32)
    for i, j in np.ndindex(*scales.shape):
        here = np.s_[i * bn : (i + 1) * bn, j * bk : (j + 1) * bk]
        floor = np.float32(1e-4) if fmt == E4M3 else np.float32(2.0**-126 * fmt.max)
        scale = max(np.abs(x[here]).max(), floor) / np.float32(fmt.max)
        scale = scales[i, j] = power_at_least(scale) if pow2 else scale
        if fmt in (INT8, INT4):
            codes[here] = np.clip(np.rint(x[here] / scale), -fmt.max, fmt.max).astype(np.int8).view(np.uint8)
        else:
            codes[here] = np.clip(x[here] / scale, -fmt.max, fmt.max).astype(fmt.dtype).view(np.uint8)
    return codes & np.uint8(0xF if fmt.packed else 0xFF), scales


def split_nibbles(packed: np.ndarray) -> np.ndarray:
    """Low nibble first."""
    codes = np.zeros((*packed.shape[:-1], packed.shape[-1] * 2), np.uint8)
    codes[..., 0::2], codes[..., 1::2] = packed % 16, packed // 16
    return codes


def numpy_values(codes: np.ndarray, fmt: Format) -> np.ndarray:
    if fmt == INT4:
        codes = np.where(codes & 8, codes | 0xF0, codes).astype(np.uint8)
    return codes.view(fmt.dtype).astype(np.float32)


def float_scales(scales: Any) -> np.ndarray:
    """Scales as float32 by ml_dtypes."""
    scales = np.asarray(scales)
    return scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32) if scales.dtype == np.uint8 else scales


def numpy_dequantise(q: QArray) -> np.ndarray:
    """float32 code * scale, rounded once, for any leading axes."""
    n, k = q.shape[-2:]
    codes = np.asarray(q.codes)
    values = numpy_values(split_nibbles(codes) if q.format.packed else codes, q.format)
    i, j = np.arange(n) // (q.block[0] or n), np.arange(k) // (q.block[1] or k)
    return values * float_scales(q.scales)[..., i[:, None], j[None, :]]


# --- act_quant ------------------------------------------------------------------------------------------------------


GOLDEN_SCALES = {  # amax -> float32 scale as printed in spec 4.2, exponent of the UE8M0 scale; then below the floor
    1e-4: ("2.2321e-07", -22), 0.5: ("0.00111607", -9), 1.0: ("0.00223214", -8), 3.5: ("0.0078125", -7),
    448.0: ("1", 0), 449.0: ("1.0022", 1), 896.0: ("2", 1), 0.0: ("2.2321e-07", -22), 3e-5: ("2.2321e-07", -22),
}  # fmt: skip


@both_modes
def test_act_quant_golden_scales(compiled: bool) -> None:
    """The table of spec 4.2, and the floor under it, bit for bit."""
    x = np.zeros((len(GOLDEN_SCALES), 128), np.float32)
    x[:, 17] = [-amax for amax in GOLDEN_SCALES]
    x[:, 90] = -x[:, 17] / 2
    scales = np.asarray(at(lambda v: act_quant(v, pow2=False), compiled)(x)[1])[:, 0]
    assert_bit_equal(scales, np.maximum(-x[:, 17], np.float32(1e-4)) / np.float32(448))
    for scale, (printed, _) in zip(scales, GOLDEN_SCALES.values(), strict=True):
        digits = len(printed.split("e")[0].replace(".", "").lstrip("0"))
        assert f"{scale:.{digits}g}" == printed
    _, powers = at(lambda v: act_quant(v, pow2=True), compiled)(x)
    assert_bit_equal(powers[:, 0], np.float32([2.0**exponent for _, exponent in GOLDEN_SCALES.values()]))


@both_scales
@pytest.mark.parametrize(
    ("shape", "compiled"),
    [((1, 1), True), ((6, 128), True), ((7, 640), True), ((5, 200), False), ((5, 200), True), ((2, 3, 144), True)],
    ids=str,
)
def test_act_quant_equals_emulator(shape: tuple[int, ...], compiled: bool, pow2: bool) -> None:
    """Codes and scales bit-equal: magnitudes from the floor to 2^20, zero groups, signed zeros, partial groups."""
    run = at(lambda v: act_quant(v, pow2=pow2), compiled)
    for spread in (1.0, 20.0):
        x = sample(shape, seed=len(shape), spread=spread)
        x[0, ..., : min(128, shape[-1])] = 0.0
        x[-1, ..., -1] = -0.0
        want_codes, want_scales = emulator.act_quant(x, "ue8m0" if pow2 else None)
        codes, scales = run(x)
        assert codes.dtype == jnp.uint8 and codes.shape == shape
        np.testing.assert_array_equal(codes, want_codes.view(np.uint8))
        assert_bit_equal(scales, want_scales)


@both_scales
def test_act_quant_of_bfloat16_and_of_many_groups(pow2: bool) -> None:
    """20,000 groups, in bf16 as the model passes them: no quotient is rounded twice."""
    x = sample((20_000, 128), seed=9, spread=12).astype(ml_dtypes.bfloat16)
    codes, scales = jax.jit(lambda v: act_quant(v, pow2=pow2))(x)
    want_codes, want_scales = emulator.act_quant(x, "ue8m0" if pow2 else None)
    np.testing.assert_array_equal(codes, want_codes.view(np.uint8))
    assert_bit_equal(scales, want_scales)


@both_scales
@pytest.mark.parametrize("group", [32, 64])
def test_act_quant_groups_of_other_sizes(group: int, pow2: bool) -> None:
    x = sample((5, 144), seed=2)
    codes, scales = jax.jit(lambda v: act_quant(v, pow2=pow2, group=group))(x)
    want_codes, want_scales = numpy_quantise(x, E4M3, (1, group), pow2)
    np.testing.assert_array_equal(codes, want_codes)
    assert_bit_equal(scales, want_scales)


def test_act_quant_scaled_values_reach_but_never_exceed_448() -> None:
    x = sample((4000, 128), seed=1, spread=12)
    _, scales = jax.jit(lambda v: act_quant(v, pow2=True))(x)
    top = np.abs(x).max(-1).astype(np.float64) / np.asarray(scales, np.float64)[:, 0]
    floored = np.abs(x).max(-1) < 1e-4
    assert top.max() <= 448 and top[~floored].min() > 224


# --- quantise and dequantise ----------------------------------------------------------------------------------------


@all_formats
@all_blocks
@both_scales
def test_quantise_equals_numpy(fmt: Format, block: Block, pow2: bool) -> None:
    """Codes, scales and the dequantised matrix, bit for bit, with partial blocks at both edges."""
    x = sample((144, 200), seed=4)
    x[:32, :32] = 0.0
    q, values = jax.jit(lambda v: (q := quantise(v, fmt, block, pow2=pow2), dequantise(q)))(x)
    codes, scales = numpy_quantise(x, fmt, block, pow2)
    assert q.shape == x.shape and q.scales.dtype == (jnp.uint8 if pow2 else jnp.float32)
    assert_bit_equal(float_scales(q.scales), scales)
    np.testing.assert_array_equal(split_nibbles(np.asarray(q.codes)) if fmt.packed else q.codes, codes)
    assert_bit_equal(values, numpy_dequantise(q))


@both_scales
def test_quantise_equals_emulator_weight_quant(pow2: bool) -> None:
    x = sample((300, 260), seed=5)
    q = quantise(jnp.asarray(x), E4M3, (128, 128), pow2=pow2)
    codes, scales = emulator.weight_quant(x, scale_fmt="ue8m0" if pow2 else None)
    np.testing.assert_array_equal(q.codes, codes.view(np.uint8))
    assert_bit_equal(float_scales(q.scales), scales)
    assert_bit_equal(dequantise(q), emulator.dequantise(codes, scales))


@both_modes
@pytest.mark.parametrize("fmt", [E4M3, INT4], ids=lambda f: f.name)
def test_quantise_leading_axes_are_independent(fmt: Format, compiled: bool) -> None:
    x = sample((2, 3, 40, 72), seed=6)
    q = at(lambda v: quantise(v, fmt, (32, 32)), compiled)(x)
    assert q.shape == x.shape and q.scales.shape == (2, 3, 2, 3)
    for i, j in np.ndindex(2, 3):
        codes, scales = numpy_quantise(x[i, j], fmt, (32, 32), False)
        held = np.asarray(q.codes[i, j])
        np.testing.assert_array_equal(split_nibbles(held) if fmt.packed else held, codes)
        assert_bit_equal(q.scales[i, j], scales)
    assert_bit_equal(at(dequantise, compiled)(q), numpy_dequantise(q))


# Half a step of the mantissa, relative, and half the distance of subnormals (or integers), in units of the scale.
ERROR = {E4M3: (2.0**-4, 2.0**-10), E5M2: (2.0**-3, 2.0**-17), E2M1: (0.25, 0.25), INT8: (0.0, 0.5), INT4: (0.0, 0.5)}


@all_formats
@both_scales
def test_reconstruction_error_is_half_a_step(fmt: Format, pow2: bool) -> None:
    x = sample((96, 256), seed=7)
    q = jax.jit(lambda v: quantise(v, fmt, (1, 32), pow2=pow2))(x)
    relative, absolute = ERROR[fmt]
    scales = float_scales(q.scales).astype(np.float64).repeat(32, -1)
    error = np.abs(numpy_dequantise(q).astype(np.float64) - x)
    # The quotient and the product are each rounded to float32: 2^-24 relative each.
    assert (error <= np.maximum(relative * np.abs(x), absolute * scales) + 2.0**-23 * np.abs(x)).all()


def test_e4m3_with_e8m0_scales_survives_bfloat16() -> None:
    """Spec 6.2: every finite code times every power of two whose products are normal is exact in bfloat16."""
    codes = np.arange(256, dtype=np.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]
    exponents = np.arange(-117, 120)
    q = QArray(
        codes=jnp.broadcast_to(codes, (len(exponents), len(codes))),
        scales=jnp.asarray((exponents + 127).astype(np.uint8))[:, None],
        format=E4M3,
        block=(1, WHOLE),
    )
    exact = np.ldexp(numpy_values(codes, E4M3).astype(np.float64), exponents[:, None])
    values = jax.jit(dequantise)(q)
    np.testing.assert_array_equal(np.asarray(values, np.float64), exact)
    assert_bit_equal(values.astype(jnp.bfloat16).astype(jnp.float32), values)


def test_e4m3_through_bfloat16_returns_the_same_codes() -> None:
    """Spec 6.2: an UE8M0 checkpoint goes to BF16 and, with its own scales, back."""
    q = quantise(jnp.asarray(sample((256, 384), seed=8)), E4M3, (128, 128), pow2=True)
    wide = np.asarray(dequantise(q).astype(jnp.bfloat16), np.float32)
    scales = float_scales(q.scales).repeat(128, 0).repeat(128, 1)
    np.testing.assert_array_equal((wide / scales).astype(ml_dtypes.float8_e4m3fn).view(np.uint8), q.codes)


@pytest.mark.parametrize("block", [(128, 128), (1, WHOLE)], ids=["block", "channel"])
def test_int8_rule(block: Block) -> None:
    """Spec 6.4: amax -> +-127, no -128, zero point 0, values below amax / 254 vanish."""
    x = sample((128, 256), seed=10, spread=0)
    x[5, 7], x[100, 200] = 40.0, -40.0
    q = jax.jit(lambda v: quantise(v, INT8, block))(x)
    codes = np.asarray(q.codes).view(np.int8).astype(np.int32)
    assert codes[5, 7] == 127 and codes[100, 200] == -127 and codes.min() == -127
    step = float_scales(q.scales).repeat(128 if block[0] == 128 else 1, 0)
    step = step.repeat(128, 1) if block[1] else np.broadcast_to(step, x.shape)
    assert_bit_equal(step[5, 7], np.float32(40) / np.float32(127))
    assert (codes[np.abs(x) < step * 0.4999] == 0).all() and (codes[np.abs(x) > step * 0.5001] != 0).all()


@pytest.mark.parametrize("fmt", [E5M2, E2M1, INT8, INT4], ids=lambda f: f.name)
@both_scales
@both_modes
def test_small_rows_keep_their_precision(fmt: Format, compiled: bool, pow2: bool) -> None:
    """DeepSeek's floor of 1e-4 under an amax is E4M3's only: scaled by 2^-60, any row has the same codes."""
    x = sample((16, 64), seed=11)
    x[3] = 0.0
    run = at(lambda v: (q := quantise(v, fmt, (1, WHOLE), pow2=pow2), dequantise(q)), compiled)
    (large, _), (small, values) = run(x), run(x * np.float32(2.0**-60))
    np.testing.assert_array_equal(small.codes, large.codes)
    ratio = float_scales(small.scales) / float_scales(large.scales)
    assert (np.delete(ratio, 3) == 2.0**-60).all() and ratio[3] == 1
    np.testing.assert_array_equal(values[3], np.zeros(64))


@pytest.mark.parametrize("block", [(1, 128), (128, 128), (32, 32)], ids=str)
@both_scales
def test_requantising_e4m3_is_idempotent(block: Block, pow2: bool) -> None:
    """Spec 2.4. With float32 scales codes and scales repeat; with UE8M0 the values do.

    (An amax between 224 and 232 times its power of two rounds down to 224, so the second scale is half the first and
    every code doubles.)
    """
    x = jnp.asarray(sample((512, 512), seed=12))
    again = jax.jit(lambda v: (q := quantise(v, E4M3, block, pow2=pow2), dequantise(q)))
    first, values = again(x)
    second, repeated = again(values)
    assert_bit_equal(repeated, values)
    if not pow2:
        np.testing.assert_array_equal(second.codes, first.codes)
        assert_bit_equal(second.scales, first.scales)


def test_activations_quantised_twice_change_nothing() -> None:
    """The step that V3.2's KV cache repeats: UE8M0 first, then either kind."""
    x = jnp.asarray(sample((20_000, 128), seed=13, spread=8))
    for pow2 in (False, True):
        fake = jax.jit(lambda v, pow2=pow2: fake_act_quant(v, pow2=pow2))
        once = fake(x)
        assert_bit_equal(fake(once), once)


def test_four_bit_formats_need_an_even_axis() -> None:
    with pytest.raises(ValueError, match="even"):
        quantise(jnp.ones((4, 7)), E2M1, (1, WHOLE))


# --- straight-through gradients -------------------------------------------------------------------------------------

FAKES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "act_quant": lambda v: fake_act_quant(v, pow2=False),
    "act_quant_ue8m0": lambda v: fake_act_quant(v, pow2=True),
    "e4m3": lambda v: fake_quantise(v, E4M3, (128, 128)),
    "e2m1_ue8m0": lambda v: fake_quantise(v, E2M1, (1, 32), pow2=True),
    "int8": lambda v: fake_quantise(v, INT8, (1, WHOLE)),
}
all_fakes = pytest.mark.parametrize("fake", FAKES.values(), ids=FAKES)


@both_scales
def test_fake_values_are_dequantised_values(pow2: bool) -> None:
    x = sample((40, 144), seed=14)
    codes, scales = emulator.act_quant(x, "ue8m0" if pow2 else None)
    want = emulator.e4m3_decode(codes) * scales.repeat(128, -1)[:, :144]
    assert_bit_equal(jax.jit(lambda v: fake_act_quant(v, pow2=pow2))(x), want)
    fmt, block = (E2M1, (1, 32)) if pow2 else (INT8, (32, WHOLE))
    got = jax.jit(lambda v: fake_quantise(v, fmt, block, pow2=pow2))(x)
    assert_bit_equal(got, numpy_dequantise(jax.jit(lambda v: quantise(v, fmt, block, pow2=pow2))(x)))


@all_fakes
def test_fake_gradient_is_the_identity(fake: Callable[[jax.Array], jax.Array]) -> None:
    x = jnp.asarray(sample((6, 160), seed=15))
    weight = jnp.asarray(sample((6, 160), seed=16))
    assert_bit_equal(jax.jit(jax.grad(lambda v: jnp.sum(fake(v) * weight)))(x), weight)
    value, tangent = jax.jvp(jax.jit(fake), (x,), (weight,))
    assert_bit_equal(tangent, weight)
    assert_bit_equal(value, jax.jit(fake)(x))


@all_fakes
def test_fake_gradient_under_vmap_and_scan(fake: Callable[[jax.Array], jax.Array]) -> None:
    x = jnp.asarray(sample((3, 4, 160), seed=17))
    weight = jnp.asarray(sample((3, 4, 160), seed=18))

    def loss(v: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sum(fake(v) * w)

    assert_bit_equal(jax.jit(jax.vmap(jax.grad(loss)))(x, weight), weight)

    def scanned(v: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda total, pair: (total + loss(*pair), None), 0.0, (v, weight))[0]

    assert_bit_equal(jax.jit(jax.grad(scanned))(x), weight)
    one = jax.jit(fake)
    assert_bit_equal(jax.jit(jax.vmap(fake))(x), np.stack([one(v) for v in x]))


@all_fakes
def test_fake_gradient_of_bfloat16(fake: Callable[[jax.Array], jax.Array]) -> None:
    x = jnp.asarray(sample((4, 160), seed=19)).astype(jnp.bfloat16)
    weight = jnp.asarray(sample((4, 160), seed=20))  # bf16-valued, so the cast back is exact
    value, gradient = jax.jit(jax.value_and_grad(lambda v: jnp.sum(fake(v) * weight)))(x)
    assert gradient.dtype == jnp.bfloat16 and value.dtype == jnp.float32
    assert_bit_equal(gradient.astype(jnp.float32), weight)


def test_fake_gradient_chain_rule() -> None:
    """The incoming gradient is taken at the rounded value: d/dx fake(x)^2 = 2 fake(x); here without jit."""
    x = jnp.asarray(sample((4, 128), seed=21))
    gradient = jax.grad(lambda v: jnp.sum(fake_act_quant(v, pow2=True) ** 2))(x)
    assert_bit_equal(gradient, 2 * fake_act_quant(x, pow2=True))


@pytest.mark.parametrize(("fmt", "block"), [(E4M3, (32, 32)), (E2M1, (1, 32)), (INT8, (1, WHOLE))], ids=str)
def test_dequantise_is_differentiable_in_its_scales(fmt: Format, block: Block) -> None:
    """The gradient of a scale is the sum over its block of code * cotangent."""
    q = quantise(jnp.asarray(sample((40, 72), seed=22)), fmt, block)
    weight = sample((40, 72), seed=23)

    def loss(scales: jax.Array) -> jax.Array:
        return jnp.sum(dequantise(dataclasses.replace(q, scales=scales)) * weight)

    codes = np.asarray(q.codes)
    terms = numpy_values(split_nibbles(codes) if fmt.packed else codes, fmt).astype(np.float64) * weight
    want = np.zeros(q.scales.shape)
    np.add.at(want, np.ix_(np.arange(40) // q.block[0], np.arange(72) // q.block[1]), terms)
    got = np.asarray(jax.jit(jax.grad(loss))(q.scales), np.float64)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(terms).sum(1).max())
    # The loss is linear in the scales, so a finite difference along any direction is exact up to rounding.
    direction = np.random.default_rng(24).uniform(0.5, 1, want.shape) * np.asarray(q.scales, np.float64)
    _, slope = jax.jvp(jax.jit(loss), (q.scales,), (jnp.float32(direction),))
    assert abs(float(slope) - (want * direction).sum()) <= 1e-6 * np.abs(want * direction).sum() + 1e-4


# --- QArray ---------------------------------------------------------------------------------------------------------


def stack(fmt: Format = E4M3, block: Block = (32, 32), *, pow2: bool = False, seed: int = 30) -> QArray:
    return quantise(jnp.asarray(sample((2, 3, 80, 72), seed=seed)), fmt, block, pow2=pow2)


def bf16_bits(x: np.ndarray) -> QArray:
    """A QArray without scales."""
    return QArray(jnp.asarray(x.astype(ml_dtypes.bfloat16).view(np.uint16)), None, BF16, (1, 1))


def assert_same_qarray(got: QArray, want: QArray) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_qarray_flattens_into_codes_and_scales() -> None:
    q = stack()
    leaves, tree = jax.tree.flatten(q)
    assert len(leaves) == 2 and leaves[0] is q.codes and leaves[1] is q.scales
    assert_same_qarray(jax.tree.unflatten(tree, leaves), q)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path({"w": q})]
    assert paths == ["['w'].codes", "['w'].scales"]
    assert jax.tree.structure(q) != jax.tree.structure(stack(block=(1, 32)))
    assert jax.tree.leaves(bf16_bits(sample((4, 6), 0)))[0].dtype == jnp.uint16
    assert len(jax.tree.leaves(bf16_bits(sample((4, 6), 0)))) == 1


@pytest.mark.parametrize(
    ("fmt", "pow2", "nbytes"),
    [(E4M3, False, 80 * 72 + 4 * 3 * 3), (E4M3, True, 80 * 72 + 3 * 3), (E2M1, True, 80 * 36 + 3 * 3)],
    ids=str,
)
def test_qarray_shape_and_bytes_are_known_without_arrays(fmt: Format, pow2: bool, nbytes: int) -> None:
    q = stack(fmt, pow2=pow2)
    abstract = jax.eval_shape(lambda: stack(fmt, pow2=pow2))
    for array in (q, abstract, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), q)):
        assert array.shape == (2, 3, 80, 72) and array.ndim == 4 and array.nbytes == 6 * nbytes
    assert jax.eval_shape(dequantise, abstract) == jax.ShapeDtypeStruct((2, 3, 80, 72), jnp.float32)
    assert bf16_bits(sample((4, 6), 0)).nbytes == 48


def test_qarray_through_jit_with_donation() -> None:
    q, want = stack(), stack()
    assert_same_qarray(jax.jit(lambda v: v)(q), want)
    donated = jax.jit(lambda v: jax.tree.map(lambda a: a + a.dtype.type(0), v), donate_argnums=0)(q)
    assert_same_qarray(donated, want)
    assert q.codes.is_deleted() and q.scales.is_deleted()


def test_qarray_under_vmap_and_scan() -> None:
    q = stack(E2M1, (1, 32), pow2=True)
    want = numpy_dequantise(q)
    assert_bit_equal(jax.vmap(jax.vmap(dequantise))(q), want)
    _, scanned = jax.lax.scan(lambda carry, layer: (carry, dequantise(layer)), None, q)
    assert_bit_equal(scanned, want)
    _, indexed = jax.lax.scan(lambda carry, i: (carry, dequantise(q[i])), None, jnp.arange(2))
    assert_bit_equal(indexed, want)


def test_qarray_indexing_of_leading_axes() -> None:
    q = stack(INT4)
    want = numpy_dequantise(q)
    assert q[...] is q
    for index in (1, (), (1, 2), slice(0, 1), (slice(None), 1), np.array([1, 0, 1])):
        assert_bit_equal(numpy_dequantise(q[index]), want[index])
    assert_bit_equal(jax.jit(lambda i, j: dequantise(q[i, j]))(1, 2), want[1, 2])
    plain = bf16_bits(sample((3, 4, 6), 0))
    assert_bit_equal(dequantise(plain[2]), sample((3, 4, 6), 0)[2])


@pytest.mark.parametrize("index", [(0, 0, 0), (..., 0), (0, ...)], ids=str)
def test_qarray_indexing_inside_a_matrix_is_refused(index: Any) -> None:
    with pytest.raises(IndexError, match="leading 2 axes"):
        stack()[index]


def test_qarray_matrix_has_no_leading_axes() -> None:
    with pytest.raises(IndexError, match="leading 0 axes"):
        stack()[0, 0][0]


@pytest.mark.parametrize(
    ("block", "start", "rows", "stride", "tile_block"),
    [
        ((32, 32), 32, 32, 32, 32), ((32, 32), 48, 16, 16, 16), ((32, 32), 64, 16, 64, 16), ((16, 32), 32, 48, 16, 16),
        ((32, 32), 0, 64, 0, 32), ((32, 32), 20, 30, 20, 1), ((32, 32), 16, 32, 16, 1), ((32, 32), 0, 80, 0, 32),
        ((1, 32), 7, 9, 7, 1), ((1, WHOLE), 79, 1, 1, 1), ((WHOLE, WHOLE), 40, 40, 40, 40), ((WHOLE, 32), 5, 70, 5, 1),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("fmt", [E4M3, E2M1], ids=lambda f: f.name)
def test_tile_is_a_slice_of_the_matrix(
    fmt: Format, block: Block, start: int, rows: int, stride: int, tile_block: int
) -> None:
    """Where no block is cut its scales stay shared, else there is one per row; Python and traced indices."""
    q = dataclasses.replace(stack(fmt, block), block=block)
    want = numpy_dequantise(q)[1, 2, start : start + rows]
    tile = jax.jit(lambda q: q.tile((1, 2), start, rows, stride=stride))(q)
    assert tile.shape == (rows, 72) and tile.block == (tile_block, block[1])
    assert_bit_equal(numpy_dequantise(tile), want)
    traced = jax.jit(lambda q, i, j, first: q.tile((i, j), first, rows, stride=stride))(q, 1, 2, start)
    assert_same_qarray(traced, tile)


def test_tile_without_scales() -> None:
    x = sample((3, 20, 6), seed=33)
    assert_bit_equal(dequantise(bf16_bits(x).tile((2,), 5, 7, stride=5)), x[2, 5:12])


@all_formats
@pytest.mark.parametrize(
    ("old", "new"), [((32, 32), (16, 8)), ((32, 32), (1, 32)), ((32, 32), (32, 32)), ((WHOLE, WHOLE), (16, 8))], ids=str
)
def test_retile_keeps_every_number(fmt: Format, old: Block, new: Block) -> None:
    q = stack(fmt, old)
    finer = jax.jit(lambda v: retile(v, new))(q)
    assert finer.block == new and finer.scales.shape == (2, 3, math.ceil(80 / new[0]), math.ceil(72 / new[1]))
    np.testing.assert_array_equal(finer.codes, q.codes)
    assert_bit_equal(dequantise(finer), dequantise(q))
    assert_bit_equal(numpy_dequantise(finer), numpy_dequantise(q))


def test_retile_lets_a_shard_cut_a_block() -> None:
    """Rows 16..47 and columns 24..47 of a matrix with 32 x 32 blocks, cut out of the arrays alone."""
    q = stack(pow2=True)[0, 1]
    finer = retile(q, (16, 8))
    shard = dataclasses.replace(finer, codes=finer.codes[16:48, 24:48], scales=finer.scales[1:3, 3:6])
    assert_bit_equal(dequantise(shard), numpy_dequantise(q)[16:48, 24:48])


@pytest.mark.parametrize("new", [(64, 32), (32, 24), (5, 32), (WHOLE, 32)], ids=str)
def test_retile_refuses_blocks_that_do_not_divide(new: Block) -> None:
    with pytest.raises(ValueError, match="does not divide"):
        retile(stack(), new)


def test_retile_without_scales_is_the_array() -> None:
    q = bf16_bits(sample((4, 6), 0))
    assert retile(q, (1, 2)) is q


@pytest.mark.parametrize("kind", ["float32", "ue8m0", "none"])
def test_qarray_survives_export(kind: str) -> None:
    """A serialised program takes and gives QArrays, static format data included."""
    q = bf16_bits(sample((2, 3, 80, 72), 35)) if kind == "none" else stack(E2M1, (1, 32), pow2=kind == "ue8m0")

    def program(tree: dict[str, QArray], layer: jax.Array) -> tuple[jax.Array, QArray]:
        return dequantise(tree["w"][layer]), tree["w"][layer]

    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), {"w": q})
    exported = export.export(jax.jit(program))(abstract, jax.ShapeDtypeStruct((), jnp.int32))
    restored = export.deserialize(exported.serialize())
    values, layer = restored.call({"w": q}, jnp.int32(1))
    assert_bit_equal(values, dequantise(q)[1])
    assert_same_qarray(layer, q[1])
    assert layer.format is q.format and layer.block == q.block


def test_dequantise_decodes_e8m0_scales_down_to_the_smallest_normal() -> None:
    codes = jnp.full((254, 2), 0x38, jnp.uint8)  # 1.0
    q = QArray(codes, jnp.arange(1, 255, dtype=jnp.uint8)[:, None], E4M3, (1, 2))
    assert_bit_equal(jax.jit(dequantise)(q)[:, 0], np.exp2(np.arange(-126.0, 128.0)).astype(np.float32))
    assert np.isnan(jax.jit(dequantise)(dataclasses.replace(q, scales=jnp.full((254, 1), 255, jnp.uint8)))).all()


def test_scale_decoding_is_the_e8m0_codec() -> None:
    q = stack(pow2=True)
    assert_bit_equal(decode(q.scales, E8M0), float_scales(q.scales))
    assert_bit_equal(decode(encode_e8m0_ceil(jnp.asarray(float_scales(q.scales))), E8M0), float_scales(q.scales))


@pytest.mark.parametrize("fmt", [E4M3, E2M1, INT8], ids=lambda f: f.name)
@pytest.mark.parametrize("block", [(32, 32), (1, WHOLE), (WHOLE, 32)], ids=str)
def test_look_up_is_rows_of_the_matrix(fmt: Format, block: Block) -> None:
    """Scales and packing included."""
    q = dataclasses.replace(stack(fmt, block), block=block)[1, 2]
    rows = np.array([[0, 79, 33], [5, 5, 64]])
    np.testing.assert_array_equal(look_up(q, jnp.asarray(rows)), numpy_dequantise(q)[rows])


# --- rows with bytes for scales, and rotations ----------------------------------------------------------------------


@pytest.mark.parametrize(("fmt", "group"), [(E4M3, 64), (E2M1, 32)], ids=["fp8", "fp4"])
@pytest.mark.parametrize(
    ("shape", "compiled"), [((448,), True), ((3, 100), False), ((2, 5, 128), True), ((4, 2), True)], ids=str
)
def test_quantise_rows_equals_numpy(shape: tuple[int, ...], fmt: Format, group: int, compiled: bool) -> None:
    """Codes and scale bytes of every group, a short last one included, and their numbers, bit for bit."""
    x = sample(shape, 3, 20.0)
    x.reshape(-1, shape[-1])[0, : min(group, shape[-1])] = 0
    codes, scales = at(lambda v: quantise_rows(v, fmt, group), compiled)(x)
    want, powers = numpy_quantise(x.reshape(-1, shape[-1]), fmt, (1, group), True)
    got = split_nibbles(np.asarray(codes)) if fmt.packed else np.asarray(codes)
    assert codes.dtype == scales.dtype == jnp.uint8
    np.testing.assert_array_equal(got, want.reshape(shape))
    np.testing.assert_array_equal(float_scales(scales), powers.reshape(*shape[:-1], -1))
    back = at(lambda c, s: dequantise_rows(c, s, fmt, group), compiled)(codes, scales)
    spread = powers.repeat(group, -1)[:, : shape[-1]]
    usual = np.abs(spread) > 2.0**-100  # XLA:CPU flushes what is below float32's normal numbers
    assert_bit_equal(np.asarray(back).reshape(usual.shape)[usual], (numpy_values(want, fmt) * spread)[usual])


def test_quantise_rows_scales_of_spec_v4() -> None:
    """Spec V4 4.1 and 4.3: amax times float32(1 / max) rounded up to a power; next to powers, at the floors."""
    for fmt, floor in ((E4M3, np.float32(1e-4)), (E2M1, np.float32(6 * 2.0**-126))):
        amax = np.float32([fmt.max * 2.0**e for e in range(-12, 20)])
        amax = np.concatenate([amax, np.nextafter(amax, np.float32(0)), np.nextafter(amax, np.float32(np.inf))])
        amax = np.concatenate([amax, np.float32([0, 1, 448, 449, floor, floor * 2])])
        _, scales = jax.jit(lambda x, fmt=fmt: quantise_rows(x, fmt, 32))(np.repeat(amax[:, None], 32, -1))
        product = (np.maximum(amax, floor) * np.float32(1 / fmt.max)).view(np.uint32)
        np.testing.assert_array_equal(scales[:, 0], (product >> 23) + (product & 0x7FFFFF != 0))
    _, scales = jax.jit(lambda x: quantise_rows(x, E4M3, 64))(np.float32([[1.0], [448.0], [449.0], [0.0]]))
    np.testing.assert_array_equal(np.asarray(scales)[:, 0].astype(int) - 127, [-8, 0, 1, -22])


def test_rows_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="even last axis"):
        jax.eval_shape(lambda x: quantise_rows(x, E2M1, 32), jnp.ones((2, 33)))
    with pytest.raises(ValueError, match="2 scales do not fit 128 channels in groups of 32"):
        dequantise_rows(jnp.zeros((3, 128), jnp.uint8), jnp.zeros((3, 2), jnp.uint8), E4M3, 32)


@both_modes
@pytest.mark.parametrize("k", [1, 2, 8, 128])
def test_hadamard_equals_its_definition(k: int, compiled: bool) -> None:
    """Row i, column j: the parity of the bits that i and j share; twice is the identity."""
    parity = np.array([[(i & j).bit_count() % 2 for j in range(k)] for i in range(k)])
    x = sample((3, 5, k), k)
    got = at(hadamard, compiled)(x)
    want = x.astype(np.float64) @ ((1 - 2 * parity) / np.sqrt(k))
    assert got.dtype == jnp.float32 and got.shape == x.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-7 * np.abs(x).max() * np.sqrt(k))
    np.testing.assert_allclose(at(lambda v: hadamard(hadamard(v)), compiled)(x), x, rtol=0, atol=1e-6 * np.abs(x).max())
    assert at(hadamard, compiled)(x.astype(ml_dtypes.bfloat16)).dtype == jnp.float32


def test_hadamard_refuses_other_lengths() -> None:
    for k in (0, 3, 96):
        with pytest.raises(ValueError, match="power of two"):
            hadamard(jnp.ones((2, k)))
