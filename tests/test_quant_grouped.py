"""quant.grouped: assignments sorted by expert, and sums over them, against plain loops in NumPy."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rng as generator
from hypothesis import given
from hypothesis import strategies as st
from test_quant_matmul import BOUND, few_examples, random_weight

from quant import E2M1, E4M3, FUSED, QArray, quantise
from quant.grouped import Groups, expert_dot, experts_at_once, group_size, group_tokens, grouped_sum

jit_group = jax.jit(group_tokens, static_argnums=(1, 3))


# --- groups ---------------------------------------------------------------------------------------------------------


def check_groups(groups: Groups, choices: np.ndarray, experts: int, present: np.ndarray, size: int) -> None:
    """Every assignment that is present exactly once, in a block of its expert; nothing else; no block too many."""
    t, k = choices.shape
    assignment, expert = np.asarray(groups.assignment), np.asarray(groups.expert)
    assert len(assignment) == len(expert) * size and groups.size == size
    held = np.flatnonzero(assignment < t * k)
    np.testing.assert_array_equal(np.sort(assignment[held]), np.flatnonzero(present))
    assert (np.delete(assignment, held) == t * k).all()
    np.testing.assert_array_equal(expert[held // size], choices.reshape(-1)[assignment[held]])
    counts = np.bincount(choices[present], minlength=experts)
    assert int(groups.used) == sum(math.ceil(c / size) for c in counts) <= len(expert)
    assert (held < int(groups.used) * size).all()
    assert ((expert >= 0) & (expert < experts)).all()


def routing(rng: np.random.Generator, tokens: int, choices: int, experts: int) -> np.ndarray:
    """Distinct experts per token, as a gate picks them."""
    return rng.permuted(np.tile(np.arange(experts), (tokens, 1)), axis=1)[:, :choices].astype(np.int32)


@pytest.mark.parametrize("size", [1, 2, 64])
@pytest.mark.parametrize(("tokens", "choices", "experts"), [(1, 1, 1), (1, 6, 64), (37, 4, 16), (50, 2, 3)], ids=str)
def test_groups_hold_each_valid_assignment_once(tokens: int, choices: int, experts: int, size: int) -> None:
    rng = np.random.default_rng(tokens)
    chosen = routing(rng, tokens, choices, experts)
    for valid in (np.ones(tokens, bool), rng.random(tokens) < 0.5, np.zeros(tokens, bool)):
        present = np.broadcast_to(valid[:, None], chosen.shape)
        check_groups(jit_group(chosen, experts, valid, size), chosen, experts, present, size)
        check_groups(jit_group(chosen, experts, present, size), chosen, experts, present, size)


@few_examples
@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 12), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_groups_of_any_routing(tokens: int, choices: int, experts: int, size: int, seed: int) -> None:
    """Repeated experts in one token, sizes that are no power of two, experts without tokens, absent choices of -1."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, rng.integers(1, experts + 1), (tokens, choices)).astype(np.int32)
    valid = rng.random(tokens) < rng.random()
    present = np.broadcast_to(valid[:, None], chosen.shape)
    check_groups(jit_group(chosen, experts, valid, size), chosen, experts, present, size)
    chosen = np.where(rng.random(chosen.shape) < rng.random(), chosen, -1)
    for valid in (chosen >= 0, np.ones(tokens, bool)):
        if tokens > 1 or size > 1 or valid.ndim == 2:
            check_groups(jit_group(chosen, experts, valid, size), chosen, experts, chosen >= 0, size)


@pytest.mark.parametrize("expert", [0, 5, 15])
def test_groups_with_all_tokens_on_one_expert(expert: int) -> None:
    chosen, valid = np.full((70, 1), expert, np.int32), np.ones(70, bool)
    groups = jit_group(chosen, 16, valid, 8)
    check_groups(groups, chosen, 16, valid[:, None], 8)
    assert int(groups.used) == 9 and (np.asarray(groups.expert)[:9] == expert).all()
    np.testing.assert_array_equal(np.asarray(groups.assignment)[:70], np.arange(70))  # stable: tokens keep their order


@pytest.mark.parametrize("experts", [64, 256])
def test_blocks_follow_routed_tokens_not_experts(experts: int) -> None:
    """The loop runs over the blocks that are used: bounded by assignments, whatever the number of experts."""
    rng = np.random.default_rng(experts)
    for tokens in (1, 32):
        chosen = routing(rng, tokens, 4, 8)  # the same eight experts are chosen from, however many there are
        used = [int(jit_group(chosen, e, np.ones(tokens, bool), 8).used) for e in (8, experts)]
        assert used[0] == used[1] <= min(tokens * 4, 8 + tokens * 4 // 8)
        half = np.arange(tokens) < tokens // 2
        assert int(jit_group(chosen, experts, half, 8).used) <= tokens // 2 * 4
        here = chosen < 2  # as on one rank of four
        assert int(jit_group(np.where(here, chosen, -1), 2, here, 1).used) == here.sum()
    assert int(jit_group(chosen, experts, np.zeros(32, bool), 8).used) == 0


@pytest.mark.parametrize(
    ("assignments", "experts"), [(8, 256), (8 * 6, 64), (128 * 4, 32), (4096 * 8, 256), (0, 32)], ids=str
)
def test_group_size_holds_the_mean_load_without_much_padding(assignments: int, experts: int) -> None:
    """1 while the fused product is used; else a whole number of matrix-unit tiles (16 rows), about half above it."""
    size, mean = group_size(assignments, experts), assignments / experts
    assert size == 1 if mean <= FUSED.fused_tokens else size % 16 == 0 and size <= 1.5 * mean + 16
    assert size >= min(mean, 128) or mean <= FUSED.fused_tokens


def test_no_more_experts_at_once_than_are_expected() -> None:
    """A rank that expects one of eight choices reads one matrix at a time, not eight."""
    w = quantise(jnp.ones((8, 64, 64)), E4M3, (32, 32))
    groups = group_tokens(jnp.arange(8, dtype=jnp.int32)[None], 8, jnp.ones((1, 8), bool), 1)
    assert [experts_at_once(groups, [w], jnp.float32, n) for n in (0, 1, 3, 8, 20)] == [1, 1, 3, 8, 8]


# --- sums -----------------------------------------------------------------------------------------------------------


def _sum(
    numbers: np.ndarray, x: np.ndarray, chosen: np.ndarray, weights: np.ndarray, present: np.ndarray
) -> np.ndarray:
    """sum_j weights[t, j] |numbers[chosen[t, j]] x[t]| over the assignments that are present, in float64."""
    want = np.zeros((len(x), numbers.shape[-2]))
    for token, slot in zip(*np.nonzero(present), strict=True):
        want[token] += np.abs(numbers[chosen[token, slot]] @ x[token].astype(np.float64)) * weights[token, slot]
    return want


def _check(got: Any, want: np.ndarray, bound: float) -> None:
    assert got.dtype == jnp.float32 and got.shape == want.shape
    assert np.abs(np.asarray(got, np.float64) - want).max() <= bound * max(np.abs(want).max(), 1)


@pytest.mark.parametrize(
    ("kind", "tokens", "size", "at_once", "dtype"),
    [
        ("e4m3", 1, 1, 3, "float32"),  # one token: all its experts at once, or one by one
        ("e2m1", 1, 1, 1, "bfloat16"),
        ("e4m3", 23, 1, 5, "bfloat16"),
        ("float", 23, 4, 2, "float32"),
        ("e2m1", 23, 4, 1, "float32"),
        ("e4m3", 23, 32, 1, "float32"),
        pytest.param("float", 23, 1, 1, "bfloat16", marks=pytest.mark.full),
        pytest.param("float", 1, 1, 2, "float32", marks=pytest.mark.full),
        pytest.param("e2m1", 23, 32, 5, "bfloat16", marks=pytest.mark.full),
        pytest.param("e4m3", 23, 4, 5, "bfloat16", marks=pytest.mark.full),
    ],
)
def test_grouped_sum_equals_a_loop_over_tokens(kind: str, tokens: int, size: int, at_once: int, dtype: str) -> None:
    """Stacked layers; tokens, then single choices, masked; NaN of what is masked goes nowhere."""
    rng = generator(size)
    experts, choices, n, k = 6, 3, 70, 64
    if kind == "float":
        numbers = rng.normal(size=(2, experts, n, k)).astype(np.float32)
        w: QArray | jax.Array = jnp.asarray(numbers)
    else:
        fmt, block, pow2 = (E4M3, (32, 32), False) if kind == "e4m3" else (E2M1, (1, 32), True)
        w, numbers = random_weight(rng, (2, experts, n, k), fmt, block, pow2)
    x = rng.normal(size=(tokens, k)).astype(np.float32)
    scales = rng.uniform(0.5, 2, tokens).astype(np.float32)  # a second array of which rows are taken
    weights = rng.uniform(0.1, 1, (tokens, choices)).astype(np.float32)
    chosen = routing(rng, tokens, choices, experts)
    masks = [np.ones(tokens, bool), np.arange(tokens) % 2 == 1, rng.random((tokens, choices)) < 0.4]

    @jax.jit
    def layer(x: Any, weights: jax.Array, w: QArray | jax.Array, valid: jax.Array, i: jax.Array) -> jax.Array:
        groups = group_tokens(jnp.asarray(chosen), experts, valid, size)

        def f(rows: tuple[jax.Array, jax.Array], e: jax.Array, weight: jax.Array) -> jax.Array:
            codes, scale = rows
            assert weight.shape == scale.shape == codes.shape[:2] == (len(e), size) and weight.dtype == jnp.float32
            out = expert_dot(codes * scale[..., None], w, e, (i,))
            return (jnp.abs(out) * weight[..., None]).astype(dtype)

        return grouped_sum(f, x, groups, at_once, weights)

    for valid in masks:
        present = np.broadcast_to(valid.reshape(tokens, -1), chosen.shape)
        want = _sum(numbers[1], x * scales[:, None], chosen, weights, present)
        unused = ~present.any(axis=1)
        hurt = np.where(unused[:, None], np.nan, x), np.where(unused, np.nan, scales)
        got = layer(hurt, np.where(present, weights, np.nan), w, valid, 1)
        _check(got, want, 2**-8 if dtype == "bfloat16" else BOUND)
        assert (np.asarray(got)[unused] == 0).all()


def test_grouped_sum_of_repeated_experts() -> None:
    """Two rows of a block may belong to one token: hash tables of V4 may repeat an expert."""
    rng = generator(1)
    w, numbers = random_weight(rng, (3, 32, 64), E4M3, (32, 32), False)
    x, chosen = rng.normal(size=(9, 64)).astype(np.float32), rng.integers(0, 3, (9, 4)).astype(np.int32)
    weights, valid = np.ones((9, 4), np.float32), np.ones((9, 4), bool)
    groups = group_tokens(jnp.asarray(chosen), 3, jnp.asarray(valid), 16)
    got = grouped_sum(lambda rows, e, _: jnp.abs(expert_dot(rows, w, e)), jnp.asarray(x), groups, 2, jnp.ones((9, 4)))
    _check(got, _sum(numbers, x, chosen, weights, valid), BOUND)


def test_memory_does_not_grow_with_assignments() -> None:
    """Temporaries of a sum over 16 choices are those of a sum over 2, but for the indices."""
    tokens, n, experts = 64, 512, 32
    w = jnp.ones((experts, n, 64))

    def temporary(k: int) -> int:
        def layer(x: jax.Array, chosen: jax.Array, weights: jax.Array) -> jax.Array:
            groups = group_tokens(chosen, experts, chosen >= 0, 16)
            return grouped_sum(lambda rows, e, _: expert_dot(rows, w, e), x, groups, 1, weights)

        shapes = [((tokens, 64), jnp.float32), ((tokens, k), jnp.int32), ((tokens, k), jnp.float32)]
        compiled = jax.jit(layer).lower(*(jax.ShapeDtypeStruct(*s) for s in shapes)).compile()
        return int(compiled.memory_analysis().temp_size_in_bytes)

    indices = tokens * 16 * 4
    assert temporary(16) - temporary(2) <= 16 * indices < tokens * 14 * n  # rows in bfloat16 would be twice the last


def test_grouped_sum_of_no_valid_token_is_zero() -> None:
    w = quantise(jnp.ones((2, 8, 8)), E4M3, (8, 8))
    groups = group_tokens(jnp.zeros((4, 1), jnp.int32), 2, jnp.zeros(4, bool), 2)
    run = jax.jit(lambda x, g: grouped_sum(lambda rows, e, _: expert_dot(rows, w, e), x, g, 1, jnp.ones((4, 1))))
    got = run(jnp.ones((4, 8)), groups)
    assert got.shape == (4, 8) and (got == 0).all()
