"""Expert dispatch on eight virtual devices: every way gives the dense sum over all experts, for any routing."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SEED, rng
from helpers_dispatch import emulated_ragged
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from test_quant_matmul import few_examples

from sharding import dispatch_bytes, expert_parallel
from sharding.dispatch_plan import (
    DISPATCHES,
    arrivals,
    capacity,
    choose_dispatch,
    destinations,
)

EXPERTS, WIDTH = 16, 24
AXES = {"one": ("ep",), "two": ("dp", "ep"), "some": ("ep",), "none": ("dp",)}
SHAPES = {"one": (1, 8), "two": (2, 4), "some": (2, 4), "none": (1, 1)}
"""Experts over one axis of eight, over two axes, over one axis while another has tokens of its own; over one device."""

FAR = 1e-5


def _mesh(layout: str) -> Mesh:
    shape = SHAPES[layout]
    return jax.make_mesh(
        shape, ("dp", "ep"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[: math.prod(shape)]
    )


def _ranks(layout: str) -> int:
    return math.prod(dict(zip(("dp", "ep"), SHAPES[layout], strict=True))[axis] for axis in AXES[layout])


def _experts(w: jax.Array, scales: bool) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
    """tanh(x w[e]) for the experts w [E / n, D, D], all of them for every row, then those that are chosen."""

    def compute(rows: Any, choices: jax.Array, weights: jax.Array) -> jax.Array:
        x = rows[0].astype(jnp.float32) * rows[1].repeat(8, axis=1) if scales else rows.astype(jnp.float32)
        out = jnp.tanh(jnp.einsum("rd,efd->ref", x, w, precision=lax.Precision.HIGHEST))
        picked = jnp.take_along_axis(out, jnp.maximum(choices, 0)[..., None], axis=1) * weights[..., None]
        return jnp.where((choices >= 0)[..., None], picked, 0).sum(axis=1)

    return compute


def _rows(x: np.ndarray, kind: str) -> Any:
    """Activations as they travel: float32, bfloat16, or integers of one byte and a scale per eight channels."""
    if kind == "codes":
        amax = np.abs(x.reshape(len(x), -1, 8)).max(-1)
        codes = np.nan_to_num(x.reshape(len(x), -1, 8) / amax[..., None] * 100).astype(np.int8)
        return jnp.asarray(codes.reshape(x.shape)), jnp.asarray(amax / 100)
    return jnp.asarray(x, kind)


@lru_cache
def _program(layout: str, how: str, back: str = "float32", scales: bool = False) -> Any:
    axes = AXES[layout]

    def local(w: jax.Array, rows: Any, choices: jax.Array, weights: jax.Array, valid: jax.Array) -> jax.Array:
        args = (_experts(w, scales), rows, choices, weights, valid)
        return expert_parallel(*args, axes=axes, experts=EXPERTS, how=how, back=back)

    every = P(("dp", "ep"))
    specs = (P(axes), every, every, every, every)
    return jax.jit(jax.shard_map(local, mesh=_mesh(layout), in_specs=specs, out_specs=every, check_vma=False))


@lru_cache
def _weights() -> np.ndarray:
    return rng(1).standard_normal((EXPERTS, WIDTH, WIDTH)).astype(np.float32) / 5


def _dense(rows: Any, choices: np.ndarray, weights: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """The sum over all experts, in float64."""
    x = np.asarray(rows[0], np.float64) * np.repeat(rows[1], 8, 1) if isinstance(rows, tuple) else rows
    want = np.zeros(np.shape(x))
    for token, slot in zip(*np.nonzero(np.broadcast_to(valid[:, None], choices.shape)), strict=True):
        out = np.tanh(_weights()[choices[token, slot]] @ np.asarray(x[token], np.float64))
        want[token] += out * weights[token, slot]
    return want


def _choices(random: np.random.Generator, tokens: int, k: int, routing: str) -> np.ndarray:
    """Distinct experts per token: any, or the same for all, or those of one rank of eight first."""
    any_ = random.permuted(np.tile(np.arange(EXPERTS), (tokens, 1)), axis=1)[:, :k]
    if routing == "same":
        return np.tile(any_[:1], (tokens, 1)).astype(np.int32)
    if routing == "one rank":  # experts 6 and 7 are one rank's, where there are eight
        return np.tile([6, 7, *range(6), *range(8, EXPERTS)], (tokens, 1))[:, :k].astype(np.int32)
    return any_.astype(np.int32)


ROUTINGS = ("any", "same", "one rank")


def _case(tokens: int, k: int, routing: str, masked: float, key: int, kind: str = "float32") -> tuple[Any, ...]:
    """(rows, choices, weights, valid) of 8 * tokens tokens; what is masked holds NaN and choices of anything."""
    random, total = rng(key), 8 * tokens
    x = random.standard_normal((total, WIDTH)).astype(np.float32)
    weights = random.uniform(0.1, 1, (total, k)).astype(np.float32)
    valid = random.random(total) >= masked
    x[~valid], weights[~valid] = np.nan, np.nan
    return _rows(x, kind), _choices(random, total, k, routing), weights, valid


def _run(layout: str, how: str, case: tuple[Any, ...], back: str = "float32") -> np.ndarray:
    rows, choices, weights, valid = case
    found = _program(layout, how, back, isinstance(rows, tuple))(_weights(), rows, choices, weights, valid)
    assert found.dtype == jnp.float32
    return np.asarray(found)


def _check(layout: str, how: str, case: tuple[Any, ...], back: str = "float32") -> None:
    found, want = _run(layout, how, case, back), _dense(*case)
    # Each of a token's partial sums is rounded to eight bits.
    bound = FAR if back == "float32" else 2**-8 * min(case[1].shape[1], _ranks(layout))
    assert np.abs(found - want).max() <= bound * max(1, np.abs(want).max()), SEED
    assert (found[~case[3]] == 0).all()


# --- ragged_all_to_all, which CPU lacks -------------------------------------------------------------------------------


def _numpy_ragged(calls: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
    """What `lax.ragged_all_to_all` is documented to return to each rank of one axis; checks what it demands."""
    outputs = [call["output"].copy() for call in calls]
    for sender, call in enumerate(calls):
        for receiver, out in enumerate(outputs):
            start, size, to = (call[name][receiver] for name in ("input_offsets", "send_sizes", "output_offsets"))
            assert size == calls[receiver]["recv_sizes"][sender]
            assert start >= 0 and start + size <= len(call["operand"]) and to >= 0 and to + size <= len(out)
            out[to : to + size] = call["operand"][start : start + size]
    return outputs


@pytest.fixture
def ragged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lax, "ragged_all_to_all", emulated_ragged)


@pytest.mark.parametrize("layout", ["one", "two"])
def test_the_emulation_is_what_is_documented(layout: str) -> None:
    """On random ragged rows; and the documentation's own example."""
    random, axes = rng(2), AXES[layout]
    size = random.integers(0, 4, (8, 8)).astype(np.int32)
    begin, arrive = np.cumsum(size, 1) - size, np.cumsum(size, 0) - size
    longest = int(max(size.sum(0).max(), size.sum(1).max()))
    calls = [
        {
            "operand": random.integers(0, 99, (longest, 3)).astype(np.int32),
            "output": random.integers(100, 199, (longest, 3)).astype(np.int32),
            "input_offsets": begin[rank],
            "send_sizes": size[rank],
            "output_offsets": arrive[rank],
            "recv_sizes": size[:, rank],
        }
        for rank in range(8)
    ]

    def local(*args: jax.Array) -> jax.Array:
        return emulated_ragged(*(a[0] for a in args), axis_name=axes)[None]

    run = jax.jit(jax.shard_map(local, mesh=_mesh(layout), in_specs=P(axes), out_specs=P(axes), check_vma=False))
    stacked = {name: np.stack([call[name] for call in calls]) for name in calls[0]}
    np.testing.assert_array_equal(run(*stacked.values()), _numpy_ragged(calls))
    wrong = stacked | {"recv_sizes": stacked["recv_sizes"] + 1}
    assert (np.asarray(run(*wrong.values())) == 1).all()
    keys = list(calls[0])
    a = dict(zip(keys, map(np.array, ([1, 2, 2], [0, 0, 0, 0], [0, 1], [1, 2], [0, 0], [1, 1])), strict=True))
    b = dict(zip(keys, map(np.array, ([3, 4, 0], [0, 0, 0, 0], [0, 1], [1, 1], [1, 2], [2, 1])), strict=True))
    assert [out.tolist() for out in _numpy_ragged([a, b])] == [[1, 3, 0, 0], [2, 2, 4, 0]]


# --- the sum ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("ragged")
@pytest.mark.parametrize("how", DISPATCHES)
@pytest.mark.parametrize("layout", ["one", "two", "some"])
def test_every_way_is_the_dense_sum(layout: str, how: str) -> None:
    """Any routing, some or all tokens masked, few tokens, a number that is a multiple of nothing."""
    for key, (tokens, k) in enumerate(((1, 4), (53, 4), (53, 1))):
        for routing in ROUTINGS:
            _check(layout, how, _case(tokens, k, routing, 0.2, key))
        _check(layout, how, _case(tokens, k, "any", 1.0, key))
        _check(layout, how, _case(tokens, k, "same", 0.0, key))


@pytest.mark.usefixtures("ragged")
@pytest.mark.parametrize("how", DISPATCHES)
@pytest.mark.parametrize(("kind", "back"), [("bfloat16", "float32"), ("codes", "bfloat16")])
def test_rows_travel_bit_for_bit(how: str, kind: str, back: str) -> None:
    """bfloat16, codes and scales are the rows that a dense sum takes; only the way back may round."""
    _check("two", how, _case(21, 3, "any", 0.2, 5, kind), back)


@few_examples
@given(st.sampled_from(("one", "two")), st.sampled_from((9, 40)), st.sampled_from(ROUTINGS), st.integers(0, 2**31))
def test_all_to_all_equals_replicated(layout: str, tokens: int, routing: str, seed: int) -> None:
    case = _case(tokens, 2, routing, 0.3 * (seed % 2), seed)
    found, other = (_run(layout, how, case) for how in ("all-to-all", "replicated"))
    assert np.abs(found - other).max() <= FAR


def test_on_one_rank_nothing_travels() -> None:
    case = _case(2, 4, "any", 0.5, 7)
    _check("none", "replicated", case)
    lowered = _program("none", "replicated").lower(_weights(), *case)
    assert not re.search("all_gather|all_to_all|all_reduce|reduce_scatter", lowered.as_text())


def test_a_token_goes_to_each_rank_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that ranks compute, counted: as many as (token, rank) pairs, in the rounds that the fullest pair needs."""
    seen: list[tuple[int, int]] = []
    for routing, tokens, k in (("any", 64, 4), ("one rank", 64, 2), ("same", 40, 4)):

        def local(choices: jax.Array) -> jax.Array:
            def compute(x: jax.Array, choices: jax.Array, _: jax.Array) -> jax.Array:
                jax.debug.callback(lambda *a: seen.append((int(a[0]), int(a[1]))), (choices >= 0).any(1).sum(), len(x))
                return x

            ones = jnp.ones(choices.shape)
            valid = jnp.ones(len(choices), bool)
            return expert_parallel(
                compute, ones, choices, ones, valid, axes=("ep",), experts=EXPERTS, how="all-to-all", back="float32"
            )

        choices = _choices(rng(8), 8 * tokens, k, routing)
        seen.clear()
        run = jax.shard_map(local, mesh=_mesh("one"), in_specs=P("ep"), out_specs=P("ep"), check_vma=False)
        jax.block_until_ready(jax.jit(run)(choices))
        jax.effects_barrier()
        wanted = np.array([[np.isin(c // 2, r).any(1).sum() for r in range(8)] for c in np.split(choices, 8)])
        size = capacity(tokens, k, EXPERTS, 8)
        assert size < tokens
        assert sum(rows for rows, _ in seen) == wanted.sum()
        assert len(seen) == 8 * math.ceil(wanted.max() / size)
        assert {length for _, length in seen} == {8 * size}
        if routing == "any":
            assert len(seen) == 8


@pytest.mark.parametrize(
    ("how", "back", "experts", "words"),
    [("ring", "float32", 16, "found 'ring'"), ("ragged", "int8", 16, "found int8"), ("ragged", "float32", 12, "12")],
)
def test_refused(how: str, back: str, experts: int, words: str) -> None:
    def local(x: jax.Array) -> jax.Array:
        def compute(*_: Any) -> jax.Array:
            return x

        choices, valid = jnp.zeros((1, 1), jnp.int32), jnp.ones(1, bool)
        return expert_parallel(compute, x, choices, x, valid, axes=("ep",), experts=experts, how=how, back=back)

    run = jax.shard_map(local, mesh=_mesh("one"), in_specs=P("ep"), out_specs=P("ep"), check_vma=False)
    with pytest.raises(ValueError, match=words):
        jax.jit(run)(jnp.ones((8, 1)))


# --- bytes ------------------------------------------------------------------------------------------------------------

ELEMENT = {"f32": 4, "s32": 4, "u32": 4, "u16": 2, "bf16": 2, "u8": 1}


def _moved(text: str, kind: str) -> list[int]:
    """Bytes of the results of a compiled program's collectives of one kind, each with all its operands."""
    found = []
    for result in re.findall(rf"= ([^=]*?) {kind}(?:-start)?\(", re.sub(r"/\*.*?\*/", "", text)):
        shapes = re.findall(r"(\w+)\[([\d,]*)\]", result)
        found.append(sum(ELEMENT[t] * math.prod(map(int, filter(None, d.split(",")))) for t, d in shapes))
    return found


@pytest.mark.parametrize(
    ("kind", "row_bytes"), [("float32", 4 * WIDTH), ("bfloat16", 2 * WIDTH), ("codes", WIDTH + 12)]
)
@pytest.mark.parametrize("back", ["float32", "bfloat16"])
def test_bytes_are_the_closed_form(kind: str, row_bytes: int, back: str) -> None:
    """Counted in the compiled program: in a round, the collectives hold what the closed form says and nothing else."""
    tokens, k, ranks = 64, 2, 8
    case = _case(tokens, k, "any", 0.0, 9, kind)
    sum_bytes = WIDTH * jnp.dtype(back).itemsize

    def text(how: str) -> str:
        return _program("two", how, back, kind == "codes").lower(_weights(), *case).compile().as_text()

    def planned(how: str) -> tuple[int, int]:
        traffic = dispatch_bytes(how, tokens, k, EXPERTS, ranks, row_bytes=row_bytes, sum_bytes=sum_bytes)
        return traffic.out * ranks // (ranks - 1), traffic.back * ranks // (ranks - 1)  # with what stays

    arrays = 1 if kind == "float32" else 2
    moved = _moved(hlo := text("all-to-all"), "all-to-all")
    assert len(moved) == arrays + 1
    assert sum(moved) == sum(planned("all-to-all"))
    assert planned("all-to-all")[1] in moved
    assert _moved(hlo, "all-reduce") == [4]  # how many rounds
    assert not _moved(hlo, "all-gather")
    moved = _moved(hlo := text("replicated"), "all-gather")
    assert len(moved) == arrays and sum(moved) == planned("replicated")[0]
    if back == "bfloat16":
        assert _moved(hlo, "all-to-all") == [planned("replicated")[1]]
    else:
        assert [ranks * n for n in _moved(hlo, "reduce-scatter")] == [planned("replicated")[1]]


def test_expected_destinations() -> None:
    """Against random draws; the known cases; and the capacity that follows holds nearly every pair's rows."""
    assert destinations(8, 256, 256) == pytest.approx(8)
    assert destinations(1, 64, 8) == pytest.approx(1)
    assert destinations(8, 64, 1) == 1
    assert destinations(8, 8, 4) == pytest.approx(4)
    random = rng(10)
    for choices, experts, ranks, tokens in ((8, 256, 8, 128), (6, 64, 16, 256), (8, 256, 64, 64)):
        per = experts // ranks
        draws = np.argsort(random.random((100, tokens, experts)), axis=2)[:, :, :choices] // per
        present = (draws[..., None] == np.arange(ranks)).any(axis=2)
        assert destinations(choices, experts, ranks) == pytest.approx(present.sum(-1).mean(), rel=0.02)
        counts = present.sum(axis=1)
        assert (counts > capacity(tokens, choices, experts, ranks)).mean() < 1e-3
        assert counts.mean() < capacity(tokens, choices, experts, ranks) <= tokens


def test_plans() -> None:
    """Bytes by hand for V3 on eight and 64 ranks, and what is chosen."""
    mean = 512 * (1 - math.comb(224, 8) / math.comb(256, 8))
    assert capacity(512, 8, 256, 8) == 8 * math.ceil(mean * 1.125 / 8) == 384
    assert capacity(4, 8, 256, 8) == 4
    # 128 tokens on each of 64 ranks: 15.4 rows for every rank, four deviations of 3.7, whole eights.
    assert capacity(128, 8, 256, 64) == 32
    native = dispatch_bytes("all-to-all", 128, 8, 256, 64, row_bytes=7168 + 224, sum_bytes=2 * 7168)
    assert native.out == 63 * 32 * (7392 + 64) and native.back == 63 * 32 * 14336
    whole = dispatch_bytes("replicated", 128, 8, 256, 64, row_bytes=7168 + 224, sum_bytes=2 * 7168)
    assert whole.out == 4 * native.out and whole.back == 4 * native.back
    exact = dispatch_bytes("ragged", 128, 8, 256, 64, row_bytes=7168 + 224, sum_bytes=2 * 7168)
    assert native.back / 2.2 < exact.back < native.back / 2
    assert 128 * 7.71 * 1.125 < arrivals(128, 8, 256, 64) < 128 * 7.71 * 1.125 + 8
    assert choose_dispatch(128, 8, 256, 64) == "all-to-all"
    assert (
        choose_dispatch(8, 8, 256, 64)
        == choose_dispatch(1, 8, 256, 8)
        == choose_dispatch(64, 8, 256, 1)
        == "replicated"
    )
    assert choose_dispatch(128, 8, 64, 2) == "replicated"  # nearly every token has an expert on both
    with pytest.raises(ValueError, match="found 'ring'"):
        dispatch_bytes("ring", 1, 1, 2, 2, row_bytes=1, sum_bytes=1)


@pytest.mark.parametrize("rows", ["bfloat16", "codes"])
def test_ragged_lowers_for_tpu(rows: str) -> None:
    """Two ragged exchanges each way at most, and an all-gather of counts."""
    case = _case(16, 4, "any", 0.0, 11, rows)
    traced = _program.__wrapped__("two", "ragged", "bfloat16", rows == "codes").trace(_weights(), *case)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@ragged_all_to_all") == 3
    assert text.count("stablehlo.all_gather") == 1
    assert "stablehlo.all_to_all" not in text
