"""INT8 activations and their products: bits against NumPy's integers, both forms, stacks, what a compiler sees."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import SEED, rng
from helpers_integers import Integers, integers, product, quantise_rows
from jax import export

from quant import (
    E4M3,
    FUSED,
    INT4,
    INT8,
    WHOLE,
    Int8Rows,
    QArray,
    act_quant_int8,
    expert_dot,
    int8_dot,
    int8_expert_dot,
    int8_tile_dot,
    quantise,
    reference_int8_dot,
)
from quant import int8 as module

KINDS = ("int8-channel", "int8-block", "int4")
BLOCKS = {"int8-channel": (1, WHOLE), "int8-block": (128, 128), "int4": (1, 128)}


def held(w: Integers, kind: str) -> QArray:
    """A NumPy weight as a QArray."""
    codes = w.codes.view(np.uint8)
    if kind == "int4":
        codes = codes[:, 0::2] & 15 | codes[:, 1::2] << 4
    return QArray(jnp.asarray(codes), jnp.asarray(w.scales), INT4 if kind == "int4" else INT8, BLOCKS[kind])


def made(kind: str, n: int, k: int, *key: int) -> tuple[np.ndarray, Integers, QArray]:
    """(float32 [N, K], as integers in NumPy, the same held)"""
    w = rng(*key).standard_normal((n, k), np.float32) * rng(*key, 1).lognormal(0, 1, (n, 1)).astype(np.float32)
    found = integers(w, kind)
    return w, found, held(found, kind)


# --- activations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("group", [WHOLE, 128])
@pytest.mark.parametrize("k", [1, 200, 512])
def test_activations_are_numpy_s(group: int, k: int, dtype: Any) -> None:
    """Codes and scales bit for bit, rows of zeros and of tiny and huge numbers among them."""
    x = rng(1, k, group).standard_normal((9, k), np.float32)
    x[1], x[2], x[3], x[4] = 0, x[2] * 2.0**-14, x[3] * 1e4, 0
    x[4, 0] = 5
    x = x.astype(dtype)
    found = jax.jit(partial(act_quant_int8, group=group))(jnp.asarray(x))
    codes, scales = quantise_rows(x.astype(np.float32), group)
    assert found.codes.dtype == jnp.int8 and found.scales.shape == (9, 1 if group == WHOLE else -(-k // 128))
    np.testing.assert_array_equal(found.codes, codes)
    np.testing.assert_array_equal(np.repeat(found.scales, group or k, -1)[:, :k], scales)
    np.testing.assert_array_equal(found.values, codes.astype(np.float32) * scales)
    assert (np.abs(codes[[0, 2, 3]]).max(-1) == 127).all() and not codes[1].any() and codes[4, 0] == 127


def test_halves_go_to_even() -> None:
    """With a maximum of 127 the scale is one."""
    x = np.float32([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 126.5]])
    assert act_quant_int8(jnp.asarray(x)).codes.tolist() == [[127, 0, 2, 2, 0, -2, -126, 126]]


def test_parts_of_a_row_share_its_scale() -> None:
    """Given the maximum of the whole row, a part is quantised as in the whole."""
    x = jnp.asarray(rng(2).standard_normal((5, 96), np.float32))
    whole = act_quant_int8(x)
    amax = jnp.abs(x).max(-1, keepdims=True)
    parts = [act_quant_int8(x[:, i : i + 32], largest=lambda _: amax) for i in range(0, 96, 32)]
    np.testing.assert_array_equal(jnp.concatenate([p.codes for p in parts], -1), whole.codes)
    np.testing.assert_array_equal(parts[1].scales, whole.scales)


# --- products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "k", "tokens"), [(64, 512, 1), (200, 384, FUSED.fused_tokens), (24, 40, 2), (130, 300, 17)]
)
@pytest.mark.parametrize(
    ("kind", "group"), [("int8-channel", WHOLE), ("int8-block", 128), ("int4", WHOLE), ("int4", 128)]
)
def test_products_are_numpy_s(kind: str, group: int, n: int, k: int, tokens: int) -> None:
    """The formula, and the fast forms, against integer sums in NumPy; one scale a row: bit for bit."""
    _, w, q = made(kind, n, k, 3, n, k)
    x = rng(4, n, k, tokens).standard_normal((tokens, k), np.float32)
    rows = act_quant_int8(jnp.asarray(x), group)
    found = np.asarray(jax.jit(int8_dot)(rows, q))
    formula = np.asarray(jax.jit(reference_int8_dot)(rows, q))
    expected = product(x, w, group)
    bound = 2e-6 * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound, err_msg=f"seed {SEED}")
    np.testing.assert_allclose(formula, expected, rtol=0, atol=bound)
    if kind == "int8-channel":
        codes, scales = quantise_rows(x, WHOLE)
        sums = (codes @ w.codes.astype(np.int64).T).astype(np.float32)
        exact = sums * w.scales[:, 0] * scales[:, :1]
        np.testing.assert_array_equal(formula, exact)
        np.testing.assert_array_equal(found, exact)
    plain = np.asarray(jax.jit(module._plain_dot)(q, rows))
    if kind == "int8-channel":
        np.testing.assert_array_equal(plain, found)
    np.testing.assert_allclose(plain, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("tokens", [1, 8])
def test_the_largest_sums_are_exact(tokens: int) -> None:
    """All codes at their ends, -128 too, over 7,168 channels and more: far above 2^24, where float32 has gaps."""
    k = 18432
    codes = np.full((32, k), -128, np.int8)
    codes[1], codes[2, ::2] = 127, 127
    codes[3, 0] = -127
    q = QArray(jnp.asarray(codes.view(np.uint8)), jnp.ones((32, 1), jnp.float32), INT8, (1, WHOLE))
    rows = Int8Rows(jnp.full((tokens, k), 127, jnp.int8), jnp.ones((tokens, 1), jnp.float32), WHOLE)
    expected = (codes.astype(np.int64).sum(-1) * 127).astype(np.float32)
    assert abs(expected[0]) > 2**24
    for found in (jax.jit(int8_dot)(rows, q), jax.jit(reference_int8_dot)(rows, q)):
        np.testing.assert_array_equal(found, np.tile(expected, (tokens, 1)))


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_stacks_tiles_and_experts(kind: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One matrix of a stack [layer, expert], cut into tiles with a rest; several experts at once."""
    n, k, layers, experts = 300, 256, 2, 5
    w = jnp.asarray(rng(5).standard_normal((layers, experts, n, k), np.float32))
    q = quantise(w, INT4 if kind == "int4" else INT8, BLOCKS[kind])
    group = 128 if kind == "int8-block" else WHOLE
    x = jnp.asarray(rng(6, tokens).standard_normal((2, tokens, k), np.float32)).astype(jnp.bfloat16)
    rows = act_quant_int8(x, group)
    expected = {(i, j): reference_int8_dot(jax.tree.map(lambda a: a[0], rows), q[i, j]) for i in (0, 1) for j in (1, 4)}
    for limit in (1 << 24, 64 * k):
        monkeypatch.setattr(module, "FUSED_ELEMENTS", limit)
        monkeypatch.setattr(module, "TILE_BYTES", limit)
        dot = jax.jit(lambda rows, q, i, j: int8_dot(jax.tree.map(lambda a: a[0], rows), q, (i, j)))
        for (i, j), y in expected.items():
            np.testing.assert_allclose(dot(rows, q, i, j), y, rtol=0, atol=2e-6 * float(jnp.abs(y).max()))
    chosen = jnp.array([4, 2], jnp.int32)
    found = jax.jit(int8_expert_dot)(rows, q, chosen, (1,))
    for c, j in enumerate((4, 2)):
        y = reference_int8_dot(jax.tree.map(lambda a, c=c: a[c], rows), q[1, j])
        np.testing.assert_allclose(found[c], y, rtol=0, atol=2e-6 * float(jnp.abs(y).max()))
    # Weights alone, with activations that are codes times one: the same numbers by the other products.
    alone = expert_dot(rows.codes.astype(jnp.float32), q, chosen, (1,)) if group == WHOLE else None
    if alone is not None:
        y = np.asarray(alone * rows.scales)
        np.testing.assert_allclose(found, y, rtol=0, atol=5e-6 * np.abs(y).max())


def test_blocks_that_shards_cut() -> None:
    """Finer scales, as a split over devices makes them, give the same product; groups that cut each other do not."""
    _, _, q = made("int4", 64, 256, 7)
    finer = QArray(q.codes, jnp.repeat(q.scales, 4, -1), INT4, (1, 32))
    x = jnp.asarray(rng(8).standard_normal((6, 256), np.float32))
    for tokens in (1, 6):
        rows = act_quant_int8(x[:tokens])
        dot = jax.jit(int8_dot)
        np.testing.assert_allclose(dot(rows, finer), dot(rows, q), rtol=1e-5, atol=1e-5)
    odd = QArray(q.codes, jnp.repeat(q.scales, 2, -1)[:, :3], INT4, (1, 96))
    with pytest.raises(ValueError, match="cut each other"):
        int8_tile_dot(odd, act_quant_int8(x, 128))
    with pytest.raises(ValueError, match="do not fit"):
        int8_dot(act_quant_int8(x[:, :100]), q)
    floats = quantise(x, INT8, (1, WHOLE))
    with pytest.raises(ValueError, match="do not fit"):
        reference_int8_dot(act_quant_int8(x), QArray(floats.codes, floats.scales, E4M3, (1, WHOLE)))


# --- what a compiler sees --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_exported_products_are_of_integers(kind: str, tokens: int) -> None:
    """For another platform than a CPU: int8 x int8 -> int32, one token or many, and no product of floats."""
    group = 128 if kind == "int8-block" else WHOLE
    _, _, q = made(kind, 256, 512, 9)
    x = jax.ShapeDtypeStruct((tokens, 512), jnp.bfloat16)
    lowered = export.export(jax.jit(lambda x, q: int8_dot(act_quant_int8(x, group), q)), platforms=["cuda"])(x, q)
    products = re.findall(r"stablehlo\.dot_general.* : (\(tensor.*?xi?\w+>)(?: loc.*)?$", lowered.mlir_module(), re.M)
    assert products
    for types in products:
        assert re.fullmatch(r"\(tensor<[\dx]+xi8>, tensor<[\dx]+xi8>\) -> tensor<[\dx]+xi32>", types), types
