"""Laws of V3.2's step in plain float32: however a sequence is cut, batched, moved or rolled back, it is the same.

As test_laws.py, around index_topk = 12 tokens: below it attention is dense, above it the indexer chooses. No choice of
the goldens' tokens is nearly tied, so a difference beyond summation order is an error, whatever the seed.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache, partial
from typing import Any

import emulator as em
import emulator_v32 as v32
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    FLOAT32,
    SEED,
    Golden,
    counts,
    draft_of,
    emulated,
    golden,
    one_shot,
    one_shot_draft,
    rng,
    step_of,
    worst,
)
from helpers_laws import Chunk, Stepper, feed
from helpers_v32 import as_v3, run_recorded, thin, with_topk
from hypothesis import given, seed, settings

from dsjax.cache import SPARE, Cache, SequenceState, extract, insert, rollback
from dsjax.cache.per_token import init_cache
from dsjax.cache.rows import row_block
from dsjax.config import load_config
from dsjax.errors import InputError
from dsjax.layers import query_blocks
from dsjax.layers.indexer import lightning_indexer
from dsjax.models import v3
from dsjax.numerics import Numerics
from quant.rows import RowFormat

BOUND = 1e-5  # of the largest logit, between runs of our own
TOKENS, TOPK = 48, 12
NARROW = 9  # of the two widths of `feed`, the other being 1
MODELS = ("thin", *(pytest.param(name, marks=pytest.mark.full) for name in ("v32-fp8", "v32-float32")))


@lru_cache
def _model(name: str, topk: int = TOPK) -> Golden:
    return thin(topk) if name == "thin" else with_topk(golden(name), topk)


@lru_cache
def _reference(name: str, topk: int = TOPK) -> tuple[np.ndarray, Cache]:
    """All tokens in one step: logits [2, T, V] and the cache."""
    logits, _, cache = one_shot(_model(name, topk), golden("v32-float32" if name == "thin" else name).tokens)
    return logits, cache


def _empty(model: Golden, batch: int = 2, max_length: int = TOKENS) -> Cache:
    return init_cache(model.config, FLOAT32, batch, max_length)


def _step(model: Golden, cache: Cache, tokens: np.ndarray, *n_new: int) -> tuple[np.ndarray, np.ndarray, Cache]:
    """Logits, hidden and cache of a step, on the host where a test slices them."""
    logits, hidden, cache = step_of(model.config, FLOAT32)(model.params, cache, jnp.asarray(tokens), counts(*n_new))
    return np.asarray(logits), np.asarray(hidden), cache


def _fed(model: Golden, lengths: list[int], cache: Cache | None = None) -> Cache:
    """A cache that took this many tokens of each sequence."""
    stepper = Stepper(model, _empty(model) if cache is None else cache)
    feed(model.tokens, lengths, [], stepper)
    return stepper.cache


def _stale(cache: Cache, value: float = np.nan) -> Cache:
    """The cache, this value wherever no token is."""
    unused = (np.arange(cache.capacity) >= np.asarray(cache.length)[:, None])[None, ..., None]
    return Cache(jnp.where(unused, value, cache.rows), jnp.where(unused, value, cache.index), cache.length)


def _state_error(found: SequenceState, expected: SequenceState) -> float:
    assert (found.length, found.arrays.keys()) == (expected.length, {"rows", "index"})
    return max(worst(found.arrays[key], expected.arrays[key]) for key in expected.arrays)


def _prefix(cache: Cache, slot: int, length: int) -> SequenceState:
    """The state of a slot after its first tokens."""
    return extract(dataclasses.replace(cache, length=cache.length.at[slot].set(length)), slot)


# --- cutting ---------------------------------------------------------------------------------------------------------


def _chunks(wide: int) -> st.SearchStrategy[list[Chunk]]:
    """Steps of 1, 9 or `wide` tokens, each of two slots taking any part of it, or nothing."""
    chunk = st.sampled_from((1, NARROW, wide)).flatmap(
        lambda width: st.tuples(st.just(width), st.tuples(*[st.integers(0, width)] * 2))
    )
    return st.lists(chunk, max_size=6)


@pytest.mark.parametrize("name", MODELS)
def test_any_chunking(name: str) -> None:
    """One-shot == any steps, with prompts of unequal lengths: logits, rows and indexer keys."""
    model, (reference, cache) = _model(name), _reference(name)
    largest = 0.0

    @seed(SEED)
    @settings(max_examples=12, deadline=None, database=None)
    @given(_chunks(TOKENS), st.integers(1, TOKENS))
    def check(chunks: list[Chunk], shorter: int) -> None:
        nonlocal largest
        stepper, lengths = Stepper(model, _empty(model)), [TOKENS, shorter]
        logits = feed(model.tokens, lengths, chunks, stepper)
        for b, length in enumerate(lengths):
            error = float(np.abs(logits[b] - reference[b, :length]).max() / np.abs(reference).max())
            largest = max(largest, error, _state_error(extract(stepper.cache, b), _prefix(cache, b, length)))
            assert largest <= BOUND, SEED

    check()
    print(name, f"{largest:.1e}")


@pytest.mark.parametrize("width", [1, NARROW])
@pytest.mark.parametrize("name", MODELS)
def test_equal_chunks(name: str, width: int) -> None:
    """Token by token, and in steps of 9, the second of which crosses index_topk."""
    model, stepper = _model(name), Stepper(_model(name), _empty(_model(name)))
    logits = feed(model.tokens, [TOKENS] * 2, [(width, (width, width))] * TOKENS, stepper)
    error = worst(np.stack(logits), _reference(name)[0])
    print(name, width, f"{error:.1e}")
    assert error <= BOUND


@pytest.mark.parametrize("width", [13, *(pytest.param(width, marks=pytest.mark.full) for width in (11, 12, 25))])
def test_chunks_of_exact_width(width: int) -> None:
    """Compiled for just the chunk's tokens, of which the first step has about as many as may be chosen."""
    model = thin()
    cache, parts = _empty(model), []
    for at in range(0, TOKENS - width + 1, width):
        logits, _, cache = _step(model, cache, model.tokens[:, at : at + width], width, width)
        parts.append(logits)
    found = np.concatenate(parts, axis=1)
    error = worst(found, _reference("thin")[0][:, : found.shape[1]])
    print(width, f"{error:.1e}")
    assert error <= BOUND


@pytest.mark.parametrize(
    "sizes", [(3, 2), *(pytest.param(sizes, marks=pytest.mark.full) for sizes in ((1, 1), (2, 5)))]
)
def test_blocks_of_queries(sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A few queries gathered, a few scanned at a time == all at once; stale NaN, an idle slot, a partial step too."""
    model, (gathered, scanned) = thin(), sizes
    monkeypatch.setattr(query_blocks, "GATHER_BYTES", gathered * 4 * 3 * TOPK * model.config.latent_dim)
    monkeypatch.setattr(query_blocks, "SCAN_BYTES", scanned * 4 * 3 * model.config.indexer.heads * 32)
    assert query_blocks.gathered_queries(3, TOPK, model.config.latent_dim) == gathered
    assert query_blocks.scanned_queries(3, model.config.indexer.heads, 32) == scanned
    rows = jnp.asarray(model.tokens[[0, 1, 0], 17:33])
    start, n_new = _empty(model, 3), (16, 7, 0)
    for b, length in enumerate((17, 17, 0)):
        start = insert(start, b, _prefix(_reference("thin")[1], b % 2, length))
    step = jax.jit(partial(v3.step, model.config, FLOAT32, want="all"))
    found, _, after = step(model.params, _stale(start), rows, counts(*n_new))
    logits = np.asarray(found)
    errors = [worst(logits[b, :n], _reference("thin")[0][b, 17 : 17 + n]) for b, n in enumerate(n_new) if n]
    errors += [_state_error(extract(after, b), _prefix(_reference("thin")[1], b, 17 + n)) for b, n in ((0, 16), (1, 7))]
    print(sizes, [f"{e:.1e}" for e in errors])
    assert max(errors) <= BOUND


# --- batching --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["thin", pytest.param("v32-float32", marks=pytest.mark.full)])
def test_batch_equals_alone(name: str) -> None:
    """The longer prompt makes the step sparse, the shorter one alone is dense."""
    model, lengths = _model(name), (TOKENS, 7)
    together, _, cache = _step(model, _empty(model), model.tokens, *lengths)
    for b, length in enumerate(lengths):
        alone, _, own = _step(model, _empty(model, 1), model.tokens[b : b + 1], length)
        error = worst(together[b, :length], alone[0, :length]), _state_error(extract(cache, b), extract(own, 0))
        print(name, b, error)
        assert max(error) <= BOUND
        assert worst(together[b, :length], _reference(name)[0][b, :length]) <= BOUND


@pytest.mark.parametrize("name", MODELS)
def test_an_idle_slot_keeps_every_bit(name: str) -> None:
    """And a busy one every bit of the rows and indexer keys that are not its new tokens'."""
    model, random = _model(name), np.random.default_rng(SEED)
    before = _fed(model, [5, 20])
    noise = [jnp.asarray(random.standard_normal(a.shape, np.float32)) for a in (before.rows, before.index)]
    before = Cache(*noise, before.length)
    for width, n_new in ((1, (0, 1)), (9, (3, 0)), (9, (0, 9)), (TOKENS, (20, 0))):
        logits, _, after = _step(model, before, model.tokens[:, :width], *n_new)
        for old, new in ((before.rows, after.rows), (before.index, after.index)):
            old, new = np.asarray(old).view(np.uint32), np.asarray(new).view(np.uint32)
            for b, n in enumerate(n_new):
                start = int(before.length[b])
                written = np.zeros(old.shape[2], bool)
                written[start : start + n] = True
                np.testing.assert_array_equal(new[:, b, ~written], old[:, b, ~written])
                assert (new[:, b, written] != old[:, b, written]).any(axis=-1).all()
        np.testing.assert_array_equal(after.length, before.length + counts(*n_new))
        assert np.isfinite(logits).all()


def test_an_empty_idle_slot_is_finite() -> None:
    """It has no key to attend to, in a step that is sparse for the slot beside it."""
    model = thin()
    logits, hidden, cache = _step(model, _stale(_empty(model)), model.tokens, TOKENS, 0)
    assert np.isfinite(logits).all() and np.isfinite(hidden).all()
    assert np.isnan(cache.rows[:, 1]).all() and np.isnan(cache.index[:, 1]).all()
    assert worst(logits[0], _reference("thin")[0][0]) <= BOUND


@pytest.mark.parametrize("lengths", [(0, 0), (3, 0), (17, 30)])
def test_what_lies_beyond_a_slots_length_does_not_matter(lengths: tuple[int, int]) -> None:
    """Rows and keys that a former sequence left behind, NaN or huge, change no bit of the next one's logits."""
    model = thin()
    start = _fed(model, list(lengths))
    for width in (NARROW, TOKENS):
        n_new = [min(width, TOKENS - at, 20) for at in lengths]
        tokens = np.stack([np.resize(model.tokens[b, at:], width) for b, at in enumerate(lengths)])
        runs = [_step(model, _stale(start, value), tokens, *n_new)[0] for value in (0.0, np.nan, 1e30)]
        for b, n in enumerate(n_new):
            for other in runs[1:]:
                np.testing.assert_array_equal(other[b, :n], runs[0][b, :n])
            assert worst(runs[0][b, :n], _reference("thin")[0][b, lengths[b] : lengths[b] + n]) <= BOUND


# --- going back, moving on -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_rolling_back_leaves_no_trace(name: str) -> None:
    """Draft 0 to 8 tokens, forget them, go on: the very bits of a sequence that was never drafted.

    One slot from index_topk tokens or fewer, so that drafts cross it; the last time from far beyond.
    """
    model, random = _model(name), rng(11)
    for drafted, first in [*((d, TOPK - d // 2) for d in range(SPARE + 1)), (SPARE, 24)]:
        start = [first, int(random.integers(1, TOPK + 1))]
        cache = _fed(model, start)
        drafts = drafted, int(random.integers(0, SPARE + 1))
        _, _, ahead = _step(model, cache, random.integers(0, 128, (2, NARROW)).astype(np.int32), *drafts)
        back = rollback(ahead, counts(*drafts))
        np.testing.assert_array_equal(back.length, start)
        for width in (1, NARROW):
            rest = np.stack([model.tokens[b, at : at + width] for b, at in enumerate(start)])
            expected, found = (_step(model, c, rest, width, width)[0] for c in (cache, back))
            np.testing.assert_array_equal(found, expected, err_msg=f"start {start}, drafted {drafts}, seed {SEED}")
            for b, at in enumerate(start):
                assert worst(found[b], _reference(name)[0][b, at : at + width]) <= BOUND


def test_extract_insert_elsewhere_go_on() -> None:
    """Into a used cache of another capacity, whose index is scanned in two blocks of other sizes."""
    model = thin()
    state = extract(_fed(model, [9, 21]), 1)
    assert state.arrays["rows"].shape[1] == state.arrays["index"].shape[1] == 21
    other = init_cache(model.config, FLOAT32, 2, 300)
    assert other.capacity == 512
    dirty = np.random.default_rng(SEED).standard_normal(other.rows.shape, np.float32)
    other = Cache(jnp.asarray(dirty), jnp.full_like(other.index, jnp.nan), counts(300, 2))
    moved = insert(other, 0, state)
    np.testing.assert_array_equal(moved.length, [21, 2])
    np.testing.assert_array_equal(moved.rows[:, 1], dirty[:, 1])
    np.testing.assert_array_equal(moved.index[:, 1], np.full_like(moved.index[:, 1], np.nan))
    again = extract(moved, 0)
    for key, array in state.arrays.items():
        np.testing.assert_array_equal(again.arrays[key], array)
    logits, _, _ = _step(model, moved, model.tokens[::-1, 21:30], NARROW, 0)
    assert worst(logits[0], _reference("thin")[0][1, 21:30]) <= BOUND


@pytest.mark.parametrize("way", ["grow", "shrink"])
def test_dense_to_sparse_and_back(way: str) -> None:
    """From a cache of 32 places, at most index_topk = 40 and so always dense, to one of 64, and the reverse."""
    model = thin(40)
    small, large = _empty(model, 2, 24), _empty(model)
    assert (small.capacity, large.capacity) == (32, 64)
    first, second, end = (small, large, TOKENS) if way == "grow" else (large, small, 32)
    state = extract(_fed(model, [20, 23], first), 1)
    moved = insert(insert(second, 1, state), 0, extract(_fed(model, [5, 1], first), 0))
    cache, at = _stale(moved), [5, 23]
    while at[1] < end:
        n_new = [min(NARROW, end - a) for a in at]
        tokens = np.stack([np.resize(model.tokens[b, a:], NARROW) for b, a in enumerate(at)])
        logits, _, cache = _step(model, cache, tokens, *n_new)
        for b, n in enumerate(n_new):
            error = worst(logits[b, :n], _reference("thin", 40)[0][b, at[b] : at[b] + n])
            assert error <= BOUND, (b, at, error)
        at = [a + n for a, n in zip(at, n_new, strict=True)]


def test_insert_refuses() -> None:
    """A state with the indexer's keys where there are none, and the reverse; keys of another width."""
    model = thin()
    state = extract(_fed(model, [9, 9]), 0)
    dense = init_cache(as_v3(model).config, FLOAT32, 1, 24)
    other = init_cache(golden("v32-fp8").config, FLOAT32, 1, 24)
    native = init_cache(model.config, Numerics("native"), 1, 24)
    rows = state.arrays["rows"]
    wide = {"rows": rows, "index": np.tile(state.arrays["index"], 2)}
    for cache, bad, message in (
        (dense, state, "expected rows, found rows, index"),
        (_empty(model), dataclasses.replace(state, arrays={"rows": rows}), "expected rows, index, found rows"),
        (_empty(model), dataclasses.replace(state, arrays=wide), r"index: expected float32 \(3, 9, 32\)"),
        (other, state, r"rows: expected float32 \(2, 9, 144\)"),
        (native, state, "expected int8"),
    ):
        with pytest.raises(InputError, match=message):
            insert(cache, 0, bad)


# --- dense and sparse ------------------------------------------------------------------------------------------------


def _equals_v3(topk: int, max_length: int, sizes: tuple[int, ...]) -> list[float]:
    """Differences of a V3.2 model's logits from V3's on the same parameters, of the largest; steps of these sizes."""
    model = thin(topk)
    dense, at, errors = as_v3(model), 0, []
    mine, theirs = (init_cache(m.config, FLOAT32, 2, max_length) for m in (model, dense))
    for size in sizes:
        tokens = model.tokens[:, at : at + size]
        found, _, mine = _step(model, mine, tokens, size, size)
        expected, _, theirs = _step(dense, theirs, tokens, size, size)
        errors.append(max(worst(found, expected), worst(mine.rows, theirs.rows)))
        at += size
    return errors


def test_all_keys_chosen_is_v3_in_a_small_cache() -> None:
    """index_topk 2048, which no token of the cache can pass: bit for bit."""
    assert _equals_v3(2048, TOKENS, (TOKENS,)) == [0]


@pytest.mark.parametrize(
    ("topk", "max_length", "sizes"),
    [
        (TOKENS, TOKENS, (TOKENS,)),
        pytest.param(27, 24, (NARROW, NARROW, NARROW), marks=pytest.mark.full),
        pytest.param(2048, 2100, (TOKENS,), marks=pytest.mark.full),
    ],
)
def test_few_tokens_in_a_large_cache_are_v3(topk: int, max_length: int, sizes: tuple[int, ...]) -> None:
    """A cache of more places than index_topk, no more tokens than it: the other program takes the dense way."""
    errors = _equals_v3(topk, max_length, sizes)
    print(topk, max_length, errors)
    assert max(errors) <= 1e-6


def test_one_token_more_is_not_v3() -> None:
    """The control: the first 40 of 48 tokens see every key, the others do not."""
    (logits, _), (dense, _, _) = _reference("thin", 40), one_shot(as_v3(thin()), thin().tokens)
    assert worst(logits[:, :40], dense[:, :40]) <= BOUND
    assert worst(logits[:, 40:], dense[:, 40:]) > 1e-2


# --- the choice ------------------------------------------------------------------------------------------------------


def test_the_chosen_keys_are_the_best() -> None:
    """Every query's set in every layer, against the emulator in float64."""
    model, (weights, raw) = golden("v32-float32"), emulated("v32-float32")
    exact = dataclasses.replace(em.PLAIN, accumulate=np.float64)
    logits, _, _, chosen = run_recorded(model, model.tokens, FLOAT32)
    assert worst(logits, model.logits) <= 2e-5
    assert sorted(chosen) == [0, 1, 2]
    for b, row in enumerate(model.tokens):
        expected: list[v32.Selection] = []
        v32.model(row, weights, raw, policy=exact, selections=expected)
        for layer, selection in enumerate(expected):
            largest = np.abs(np.where(selection.scores > -np.inf, selection.scores, 0)).max(-1)
            assert (selection.margin > 1e-4 * largest).all()
            assert chosen[layer].shape == (2, TOKENS, TOPK)
            found = v32.keep_mask(chosen[layer][b], TOKENS)
            np.testing.assert_array_equal(found, v32.keep_mask(selection.indices, TOKENS))
            np.testing.assert_array_equal(found.sum(-1), np.minimum(np.arange(TOKENS) + 1, TOPK))


@pytest.mark.parametrize("places", [64, 2048])
def test_lightning_indexer_against_sorting(places: int) -> None:
    """Small integers, so that ties abound and every sum is exact; two blocks of keys, slots of different lengths."""
    random, k = rng(60), 12
    b, t, heads, x = 3, 5, 4, 8
    q, weights = random.integers(-2, 3, (b, t, heads, x)), random.integers(-2, 3, (b, t, heads))
    keys, layer = random.integers(-2, 3, (2, b, places, x)).astype(np.float32), 1
    visible = np.array([[1, 5, 12, 13, 14], [places] * 5, [0, 0, 33, 34, places // 2]], np.int32)
    for slot, count in enumerate(visible.max(axis=1)):
        keys[:, slot, count:] = np.nan
    row = RowFormat("float32", x)
    found = lightning_indexer(
        jnp.asarray(q, jnp.float32), jnp.asarray(weights, jnp.float32), jnp.asarray(keys), layer,
        jnp.asarray(visible), k, row, rounded=False,
    )  # fmt: skip
    for slot in range(b):
        for query in range(t):
            count = visible[slot, query]
            scores = np.maximum(keys[layer, slot, :count] @ q[slot, query].T, 0) @ weights[slot, query]
            expected = np.argsort(-scores, kind="stable")[:k]
            mine = np.asarray(found[slot, query])
            assert sorted(mine[mine >= 0]) == sorted(expected), (SEED, slot, query)


# --- the draft module ------------------------------------------------------------------------------------------------


def test_mtp_any_chunking() -> None:
    """The MTP module, which has an indexer and a cache of its own: one-shot == any steps, and Hugging Face's logits."""
    model, total = golden("v32-fp8"), TOKENS - 1
    _, hidden, _ = one_shot(model, model.tokens)
    reference = one_shot_draft(model, hidden, model.tokens)
    assert worst(reference, model.mtp_logits) <= 2e-5
    draft, largest = draft_of(model.config, FLOAT32), 0.0
    padded = np.pad(np.asarray(hidden), ((0, 0), (0, total), (0, 0)), constant_values=7.0)

    @seed(SEED)
    @settings(max_examples=8, deadline=None, database=None)
    @given(_chunks(total), st.integers(1, total))
    def check(chunks: list[Chunk], shorter: int) -> None:
        nonlocal largest
        cache = init_cache(model.config, FLOAT32, 2, TOKENS, draft=True)
        assert cache.index.shape[:3] == (1, 2, 64)

        def take(at: list[int], tokens: jax.Array, n_new: jax.Array) -> Any:
            nonlocal cache
            here = np.stack([padded[b, a : a + tokens.shape[1]] for b, a in enumerate(at)])
            logits, _, cache = draft(model.params, cache, jnp.asarray(here), tokens, n_new)
            return logits

        lengths = [total, shorter]
        for b, logits in enumerate(feed(model.tokens[:, 1:], lengths, chunks, take)):
            error = np.abs(logits - reference[b, : lengths[b]]).max() / np.abs(reference).max()
            largest = max(largest, float(error))
            assert largest <= BOUND, (SEED, b)

    check()
    print(f"mtp {largest:.1e}")


@pytest.mark.parametrize("length", [2048, 4096, 16384, 131072, 163840])
def test_keys_are_scanned_in_large_blocks(length: int) -> None:
    """Whatever the capacity: each block's scan also selects the best so far."""
    cache = jax.eval_shape(lambda: init_cache(load_config("deepseek-v3.2"), Numerics(), 1, length))
    assert cache.index.shape[2] >= cache.capacity
    assert row_block(cache.index.shape[2], 2048) == 2048
