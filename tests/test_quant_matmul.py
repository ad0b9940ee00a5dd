"""quant.matmul: tiled and block-scaled products against NumPy in float64, the emulator and plain loops."""

from __future__ import annotations

import math
import re
from typing import Any

import emulator
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsjax.backend import compiler_options
from dsjax.config import load_config
from dsjax.params import VECTOR, abstract_leaf, matrix_shape, official_storage, resident, table
from quant import matmul
from quant.form import FUSED
from quant.formats import BF16, E2M1, E4M3, E5M2, F16, INT4, INT8, Format, round_to_bfloat16
from quant.grouped import expert_dot
from quant.matmul import (
    block_scaled_dot,
    can_fuse,
    reference_block_scaled_dot,
    reference_dot,
    transposed_tile_dot,
)
from quant.qarray import WHOLE, QArray
from quant.transforms import act_quant, fake_act_quant, quantise

Block = tuple[int, int]

SCALED = (E4M3, E5M2, E2M1, INT8, INT4)
UNSCALED = (BF16, F16)
BLOCKS = ((128, 128), (1, 128), (1, 32), (32, 32), (1, WHOLE), (WHOLE, WHOLE))
TOKENS = (1, 5, 33, 200)
BOUND = 2e-6  # of the largest output: summation order in float32

few_examples = settings(
    max_examples=12, deadline=None, database=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)


def random_weight(
    rng: np.random.Generator, shape: tuple[int, ...], fmt: Format, block: Block, pow2: bool
) -> tuple[QArray, np.ndarray]:
    """A QArray of any finite codes and random scales, and its numbers in float64 by ml_dtypes."""
    *lead, n, k = shape
    table = np.arange(2**fmt.bits).astype(fmt.code_dtype)
    if fmt == INT4:
        numbers = np.where(table & 8, table | 0xF0, table).astype(np.uint8).view(fmt.dtype).astype(np.float64)
    else:
        with np.errstate(invalid="ignore"):
            numbers = table.view(fmt.dtype).astype(np.float64)
    # Numbers of similar magnitude, so that every element counts in the sum.
    usable = table[np.isfinite(numbers) & (np.abs(numbers) <= min(fmt.max, 448))]
    codes = rng.choice(usable, shape)
    values = numbers[codes]
    packed = codes[..., 0::2] + 16 * codes[..., 1::2] if fmt.packed else codes
    if fmt in UNSCALED:
        return QArray(jnp.asarray(packed), None, fmt, block), values
    bn, bk = block[0] or n, block[1] or k
    grid = (*lead, math.ceil(n / bn), math.ceil(k / bk))
    if pow2:
        held = rng.integers(118, 124, grid).astype(np.uint8)
        scales = held.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    else:
        held = rng.uniform(2e-3, 2e-2, grid).astype(np.float32)
        scales = held.astype(np.float64)
    spread = scales[..., (np.arange(n) // bn)[:, None], np.arange(k) // bk]
    return QArray(jnp.asarray(packed), jnp.asarray(held), fmt, block), values * spread


def assert_close(got: Any, want: np.ndarray, bound: float = BOUND) -> None:
    """Largest error within `bound` of the largest output."""
    assert got.shape == want.shape and got.dtype == jnp.float32
    error = np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()
    assert error <= bound, f"error {error:.2e} of the largest output"


def bfloat16_weights(numbers: np.ndarray) -> np.ndarray:
    """float64 numbers rounded to float32, then to bfloat16 with halves away from zero, by adding half a unit."""
    bits = np.float32(numbers).view(np.uint32) + np.uint32(0x8000)
    return (bits & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)


def test_round_to_bfloat16() -> None:
    """Every midpoint goes away from zero, its neighbours to the nearer side, bfloat16 numbers stay."""
    codes = np.arange(1 << 16, dtype=np.uint32) << 16
    codes = codes[np.isfinite(codes.view(np.float32)) & ((codes & 0x7FFFFFFF) < 0x7F7F0000)]
    for low, up in ((0, 0), (0x7FFF, 0), (0x8000, 1), (0x8001, 1), (0xFFFF, 1)):
        got = np.asarray(round_to_bfloat16(jnp.asarray((codes + np.uint32(low)).view(np.float32)))).view(np.uint16)
        np.testing.assert_array_equal(got, (codes >> 16) + up)


# --- block_scaled_dot -----------------------------------------------------------------------------------------------

dot = jax.jit(block_scaled_dot)
plain_dot = jax.jit(reference_dot)

CASES = [
    (fmt, block, pow2, TOKENS[i % len(TOKENS)])
    for i, (fmt, block, pow2) in enumerate((f, b, p) for f in SCALED for b in BLOCKS for p in (False, True))
]


@pytest.mark.parametrize(("fmt", "block", "pow2", "tokens"), CASES, ids=str)
def test_block_scaled_dot_on_formats_and_blocks(fmt: Format, block: Block, pow2: bool, tokens: int) -> None:
    """Several tiles, partial blocks at both edges and a partial last tile; N is odd, and K where it may be."""
    rng = np.random.default_rng(tokens)
    k = 258 if fmt.packed else 259
    w, numbers = random_weight(rng, (333, k), fmt, block, pow2)
    x = np.float32(rng.normal(size=(tokens, k)))
    assert_close(dot(x, w), x.astype(np.float64) @ numbers.T)


@pytest.mark.parametrize("fmt", [*SCALED, *UNSCALED], ids=lambda f: f.name)
def test_reference_dot_is_the_float64_product(fmt: Format) -> None:
    rng = np.random.default_rng(1)
    w, numbers = random_weight(rng, (2, 67, 130), fmt, (32, 32), True)
    x = np.float32(rng.normal(size=(2, 3, 130)))
    want = x.astype(np.float64) @ numbers[1].T
    assert_close(plain_dot(x, w, (1,)), want)
    assert_close(dot(x, w, (1,)), want)
    assert_close(block_scaled_dot(jnp.asarray(x), w, (1,)), want)


@pytest.mark.parametrize("rows", [256, 512, 640])
@pytest.mark.parametrize("fmt", [E4M3, E2M1], ids=lambda f: f.name)
def test_block_scaled_dot_where_tiles_are_cut_by_width(fmt: Format, rows: int) -> None:
    """A wide K makes tiles shorter than a scale block."""
    rng = np.random.default_rng(rows)
    w, numbers = random_weight(rng, (rows + 17, 4096), fmt, (128, 128), False)
    for tokens in (1, 40):
        x = np.float32(rng.normal(size=(tokens, 4096)))
        assert_close(dot(x, w), x.astype(np.float64) @ numbers.T)


def channels(length: int) -> st.SearchStrategy[int]:
    """Widths of any kind, and as often some that divide into the fused form's lanes."""
    return st.integers(1, length) | st.integers(1, length // 32).map(lambda groups: 32 * groups)


@st.composite
def products(draw: st.DrawFn) -> dict[str, Any]:
    fmt = draw(st.sampled_from((*SCALED, *UNSCALED)))
    k = draw(channels(2100))
    return {
        "fmt": fmt,
        "block": draw(st.sampled_from(BLOCKS)),
        "pow2": draw(st.booleans()),
        "tokens": draw(st.sampled_from(TOKENS)),
        "n": draw(channels(400)),
        "k": k + k % 2 if fmt.packed else k,
        "lead": draw(st.lists(st.integers(1, 3), max_size=2)),
        "traced": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


@few_examples
@given(case=products())
def test_block_scaled_dot_on_random_geometries(case: dict[str, Any]) -> None:
    """Any N and K, indices into stacks, static and traced; a failure prints the case, its seed included."""
    rng = np.random.default_rng(case["seed"])
    w, numbers = random_weight(rng, (*case["lead"], case["n"], case["k"]), case["fmt"], case["block"], case["pow2"])
    index = tuple(int(rng.integers(size)) for size in case["lead"])
    x = np.float32(rng.normal(size=(case["tokens"], case["k"])))
    magnitude = np.abs(x).astype(np.float64) @ np.abs(numbers[index]).T
    for function in (block_scaled_dot, reference_dot):
        got = (
            jax.jit(function)(x, w, index) if case["traced"] else jax.jit(lambda x, w, f=function: f(x, w, index))(x, w)
        )
        error = np.abs(np.asarray(got, np.float64) - x.astype(np.float64) @ numbers[index].T)
        # With one or two terms everything may cancel: here the scale is the sum of magnitudes.
        assert error.max() <= BOUND * magnitude.max()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=["float32", "bfloat16", "float16"])
def test_block_scaled_dot_of_float_weights(dtype: Any) -> None:
    rng = np.random.default_rng(2)
    w = jnp.asarray(rng.normal(size=(2, 3, 301, 75)), dtype)
    x = jnp.asarray(rng.normal(size=(2, 7, 75)), jnp.bfloat16)
    want = np.asarray(x, np.float64) @ np.asarray(w, np.float64)[1, 2].T
    for function in (dot, plain_dot):
        assert_close(function(x, w, (1, 2)), want)
        assert_close(function(x[0, 0], w, (1, 2)), want[0, 0])


@pytest.mark.parametrize("fmt", [E4M3, E2M1, INT8, BF16], ids=lambda f: f.name)
@pytest.mark.parametrize("tokens", [1, FUSED.fused_tokens, FUSED.fused_tokens + 1, 40])
def test_bfloat16_activations_take_bfloat16_weights_beyond_few_tokens(fmt: Format, tokens: int) -> None:
    """Few tokens: the float64 product of the exact weights. Many: that of the weights rounded once to bfloat16."""
    rng = np.random.default_rng(tokens)
    w, numbers = random_weight(rng, (2, 333, 512), fmt, (64, 64), False)
    x = jnp.asarray(rng.normal(size=(tokens, 512)), jnp.bfloat16)
    if tokens > FUSED.fused_tokens:
        numbers = bfloat16_weights(numbers)
    got = dot(x, w, (1,))
    assert_close(got, np.asarray(x, np.float64) @ numbers[1].T)


@pytest.mark.parametrize("block", [(1, WHOLE), (128, 512)], ids=str)
def test_a_scale_per_row_leaves_bfloat16_codes_exact(block: Block) -> None:
    """INT8 and E4M3 codes are exact in bfloat16; a scale that spans all channels is applied to the result."""
    rng = np.random.default_rng(5)
    x = jnp.asarray(rng.normal(size=(40, 512)), jnp.bfloat16)
    for fmt in (INT8, E4M3):
        w, numbers = random_weight(rng, (333, 512), fmt, block, False)
        assert_close(dot(x, w), np.asarray(x, np.float64) @ numbers.T)


@pytest.mark.parametrize("fmt", [E4M3, INT8, BF16, E2M1], ids=lambda f: f.name)
@pytest.mark.parametrize(
    ("n", "k", "block"), [(128, 96, (128, 128)), (48, 512, (16, 128)), (30, 50, (10, 32))], ids=str
)
@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_transposed_tile_dot(fmt: Format, n: int, k: int, block: Block, tokens: int) -> None:
    """Sums over a tile's rows, batched over heads, in float32 and in bfloat16."""
    rng = np.random.default_rng(n)
    for scales in (block, (1, WHOLE)):
        w, numbers = random_weight(rng, (3, n, k), fmt, scales, False)
        x = np.float32(rng.normal(size=(3, tokens, n)))
        assert_close(jax.jit(transposed_tile_dot)(w, x), np.einsum("htn,hnk->htk", x.astype(np.float64), numbers))
        half = jnp.asarray(x, jnp.bfloat16)
        if tokens > FUSED.fused_tokens:
            numbers = bfloat16_weights(numbers)
        want = np.einsum("htn,hnk->htk", np.asarray(half, np.float64), numbers)
        assert_close(jax.jit(transposed_tile_dot)(w, half), want)


def test_the_fused_product_writes_no_decoded_weight() -> None:
    """Temporaries: partial sums of 1/16 of the weights in float32, at most."""
    codes, scales = jax.ShapeDtypeStruct((3, 4096, 2048), jnp.uint8), jax.ShapeDtypeStruct((3, 32, 16), jnp.float32)
    w = QArray(codes, scales, E4M3, (128, 128))
    x, i = jax.ShapeDtypeStruct((1, 2048), jnp.bfloat16), jax.ShapeDtypeStruct((), jnp.int32)
    compiled = jax.jit(lambda x, w, i: block_scaled_dot(x, w, (i,))).lower(x, w, i).compile(compiler_options("cpu"))
    assert compiled.memory_analysis().temp_size_in_bytes <= 4096 * 2048 * 4 // 16 + 32 * 2048 * 4 * 2


@pytest.mark.parametrize("fmt", [E4M3, INT8, BF16])
def test_fused_products_of_many_tiles(fmt: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    """One to six tiles of 256 rows, and a rest: pairs in a loop, what remains behind it."""
    monkeypatch.setattr(matmul, "FUSED_ELEMENTS", 256 * 64)
    random = np.random.default_rng(66)
    for n in (256, 300, 512, 700, 768, 1024, 1300, 1536):
        w, numbers = random_weight(random, (n, 64), fmt, (128, 128) if fmt == E4M3 else (1, WHOLE), False)
        x = random.standard_normal((2, 64), np.float32)
        assert_close(jax.jit(block_scaled_dot)(jnp.asarray(x), w), x.astype(np.float64) @ numbers.T)


def test_a_loop_over_tiles_runs_on_all_threads() -> None:
    """No product is fused into the update of a result: XLA:CPU would run that on a single thread."""
    w = QArray(
        jax.ShapeDtypeStruct((151936, 1536), jnp.uint8),
        jax.ShapeDtypeStruct((151936, 1), jnp.float32),
        INT8,
        (1, WHOLE),
    )
    x = jax.ShapeDtypeStruct((1, 1536), jnp.bfloat16)
    text = jax.jit(block_scaled_dot).lower(x, w).compile(compiler_options("cpu")).as_text()
    assert " while(" in text
    for computation in text.split("\n\n"):
        reads_codes = "u8[151936,1536]" in computation.split("\n", 1)[0]
        assert not (reads_codes and "fused_computation" in computation and " dynamic-update-slice(" in computation)


def test_block_scaled_dot_inside_a_scan_over_layers() -> None:
    """The use that it is made for: the stack closed over, the index traced."""
    rng = np.random.default_rng(3)
    w, numbers = random_weight(rng, (3, 160, 160), E4M3, (128, 128), False)
    x = np.float32(rng.normal(size=(4, 160)))

    @jax.jit
    def network(x: jax.Array, w: QArray) -> jax.Array:
        return jax.lax.scan(lambda h, i: (block_scaled_dot(h, w, (i,)), None), x, jnp.arange(3))[0]

    want = x.astype(np.float64)
    for layer in numbers:
        want = want @ layer.T
    assert_close(network(x, w), want, 3 * BOUND)


def test_block_scaled_dot_copies_no_layer_and_decodes_no_matrix() -> None:
    """Temporary memory does not depend on the depth of the stack, and stays below the decoded matrix."""

    def temporaries(layers: int) -> int:
        codes, scales = jax.ShapeDtypeStruct((layers, 4096, 2048), jnp.uint8), (layers, 32, 16)
        w = QArray(codes, jax.ShapeDtypeStruct(scales, jnp.float32), E4M3, (128, 128))
        x, i = jax.ShapeDtypeStruct((4, 2048), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
        compiled = jax.jit(lambda x, w, i: block_scaled_dot(x, w, (i,))).lower(x, w, i).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(2) == temporaries(16) < 4096 * 2048 * 4 / 2


@pytest.mark.parametrize("quantised", [False, True])
def test_block_scaled_dot_refuses_what_does_not_fit(quantised: bool) -> None:
    x, w = jnp.ones((2, 8)), jnp.ones((3, 4, 8))
    stored = quantise(w, E4M3, (128, 128)) if quantised else w
    for activations, index in ((jnp.ones((2, 9)), (0,)), (x, ()), (x, (0, 0))):
        with pytest.raises(ValueError, match=r"do not fit weight \(3, 4, 8\)"):
            block_scaled_dot(activations, stored, index)


# --- FP4 with a scale per row and 32 channels -----------------------------------------------------------------------

FP4_BLOCK = (1, 32)


def every_byte(n: int, k: int) -> tuple[QArray, np.ndarray]:
    """An FP4 matrix [n, k] in which every byte occurs, its scales 1, and its numbers by ml_dtypes."""
    codes = np.resize(np.arange(256, dtype=np.uint8), (n, k // 2))
    nibbles = np.stack([codes & 0xF, codes >> 4], axis=-1).reshape(n, k)
    scales = np.full((n, k // 32), 127, np.uint8)
    w = QArray(jnp.asarray(codes), jnp.asarray(scales), E2M1, FP4_BLOCK)
    return w, nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float64)


@pytest.mark.parametrize("tokens", [1, 4])
def test_every_fp4_byte_and_every_scale(tokens: int) -> None:
    """Unit vectors read single weights out: all bytes with scale 1, then two with every usual scale."""
    w, numbers = every_byte(8, 512)
    both = jax.jit(lambda x, w: jax.lax.map(lambda rows: block_scaled_dot(rows, w), x))
    got = both(np.eye(512, dtype=np.float32).reshape(-1, tokens, 512), w)
    np.testing.assert_array_equal(np.asarray(got).reshape(512, 8).T, numbers)
    codes = np.arange(16, 240, dtype=np.uint8)  # 2^-111 to 2^112
    scales = jnp.asarray(np.tile(codes[:, None], (1, 4)))
    w = QArray(jnp.full((len(codes), 64), 0x97, jnp.uint8), scales, E2M1, FP4_BLOCK)  # 6 and -0.5
    x = np.zeros((tokens, 128), np.float32)
    x[:, 32:34] = 1
    got = dot(x, w)
    want = 5.5 * codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    np.testing.assert_array_equal(np.asarray(got), np.tile(want, (tokens, 1)))


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 16])
@pytest.mark.parametrize(("n", "k"), [(40, 512), (7, 192), (24, 1056), (5, 96)], ids=str)
def test_fp4_products(tokens: int, n: int, k: int) -> None:
    """Channels that divide into 8 groups and such that do not, for one matrix and for several gathered from a stack."""
    rng = np.random.default_rng(tokens)
    w, numbers = random_weight(rng, (2, 4, n, k), E2M1, FP4_BLOCK, True)
    assert can_fuse((n, k), w, tokens) == (tokens <= FUSED.fused_tokens and k != 1056)
    chosen = np.array([3, 0, 3], np.int32)
    x = jnp.asarray(rng.normal(size=(3, tokens, k)), jnp.bfloat16)
    exact = np.einsum("ctk,cnk->ctn", np.asarray(x, np.float64), numbers[1, chosen])
    several = jax.jit(lambda x, w, e, i: expert_dot(x, w, e, (i,)))
    # FP4 times a power of two is exact in bfloat16: no rounding, however many tokens.
    assert_close(several(x, w, chosen, 1), exact)
    assert_close(dot(x[0], w, (1, 3)), exact[0])
    assert_close(dot(x[0].astype(jnp.float32), w, (1, 3)), exact[0])


def test_fused_fp4_takes_float_scales_and_integers() -> None:
    rng = np.random.default_rng(8)
    x = np.float32(rng.normal(size=(2, 256)))
    for fmt in (E2M1, INT4):
        w, numbers = random_weight(rng, (12, 256), fmt, FP4_BLOCK, False)
        assert can_fuse((12, 256), w, 2)
        assert_close(dot(x, w), x.astype(np.float64) @ numbers.T)


def test_the_fused_fp4_product_of_experts_writes_no_decoded_weight() -> None:
    """With one token temporaries are the scales' bytes, whatever the stack; the decoded weights would be 12 MB."""
    codes, scales = jax.ShapeDtypeStruct((2, 8, 512, 512), jnp.uint8), jax.ShapeDtypeStruct((2, 8, 512, 32), jnp.uint8)
    w = QArray(codes, scales, E2M1, FP4_BLOCK)
    x, chosen = jax.ShapeDtypeStruct((6, 1, 1024), jnp.bfloat16), jax.ShapeDtypeStruct((6,), jnp.int32)
    lowered = jax.jit(lambda x, w, e: expert_dot(x, w, e, (1,))).lower(x, w, chosen)
    temporaries = lowered.compile(compiler_options("cpu")).memory_analysis().temp_size_in_bytes
    assert temporaries <= 2 * 6 * 512 * 32


# --- DeepSeek's FP8 product -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pow2", [False, True], ids=["float32", "ue8m0"])
@pytest.mark.parametrize(("tokens", "n", "k"), [(1, 128, 128), (5, 300, 640), (33, 77, 200)])
def test_fp8_product_equals_emulator_and_folded_scales(tokens: int, n: int, k: int, pow2: bool) -> None:
    """reference_block_scaled_dot against the emulator's fp8_gemm, and the form that folds the scales into x and w."""
    rng = np.random.default_rng(n)
    x = np.float32(rng.normal(size=(tokens, k)))
    kind = "ue8m0" if pow2 else None
    codes, scales = emulator.act_quant(x, kind)
    w_codes, w_scales = emulator.weight_quant(np.float32(rng.normal(size=(n, k))), scale_fmt=kind)
    want = emulator.fp8_gemm(codes, scales, w_codes, w_scales, emulator.Policy(accumulate=np.float64))
    w = QArray(jnp.asarray(w_codes.view(np.uint8)), jnp.asarray(w_scales), E4M3, (128, 128))

    ours = jax.jit(lambda x, w: reference_block_scaled_dot(*act_quant(x, pow2=pow2), w))(x, w)
    folded = jax.jit(lambda x, w: block_scaled_dot(fake_act_quant(x, pow2=pow2), w))(x, w)
    assert_close(ours, want.astype(np.float64), 1e-6)
    assert_close(folded, np.asarray(ours, np.float64), 1e-6)


def test_fp8_product_takes_e8m0_weight_scales() -> None:
    rng = np.random.default_rng(6)
    w, numbers = random_weight(rng, (200, 300), E4M3, (128, 128), True)
    x = np.float32(rng.normal(size=(7, 300)))
    codes, scales = jax.jit(lambda v: act_quant(v, pow2=True))(x)
    values = emulator.e4m3_decode(np.asarray(codes)) * np.asarray(scales).repeat(128, -1)[:, :300]
    assert_close(jax.jit(reference_block_scaled_dot)(codes, scales, w), values.astype(np.float64) @ numbers.T)


def test_fp8_product_refuses_other_blocks_and_formats() -> None:
    codes, scales = act_quant(jnp.ones((2, 256)), pow2=False)
    for w in (quantise(jnp.ones((4, 256)), E4M3, (1, 64)), quantise(jnp.ones((4, 256)), INT8, (128, 128))):
        with pytest.raises(ValueError, match="do not match weight blocks"):
            reference_block_scaled_dot(codes, scales, w)


def test_every_official_matrix_takes_the_fused_form() -> None:
    """Else decoding would be several times slower and no other test would tell."""
    for preset in ("deepseek-v3", "deepseek-v2-lite"):
        config = load_config(preset)
        for row in table(config):
            if row.storage != VECTOR:
                for weights in ("stored", "int8", "bfloat16"):
                    leaf = abstract_leaf(row, config, resident(row, official_storage(row, config), weights))
                    assert can_fuse(matrix_shape(row, config), leaf, 1), (preset, row.path, weights)


def test_activations_are_quantised_once() -> None:
    """Not again for every row of weights, which XLA:CPU would do if it fused the two: decode 10 to 30 times slower."""
    w = QArray(jnp.zeros((256, 1024), jnp.uint8), jnp.ones((2, 8)), E4M3, (128, 128))
    run = jax.jit(lambda x, w: block_scaled_dot(fake_act_quant(x, pow2=False), w))
    text = run.lower(jnp.ones((1, 1024)), w).compile(compiler_options("cpu")).as_text()
    computations = re.split(r"^}", text, flags=re.MULTILINE)
    products = [c for c in computations if "multiply" in c and re.search(r"u8\[256,1024\]\S* parameter", c)]
    assert products and not any("f8e4m3" in c for c in products)
