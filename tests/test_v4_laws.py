"""Laws of V4's step function: however a sequence is cut, batched, moved, rolled back or left over, it is the same.

Small random models in plain float32, one layer of each kind in native. Weights and tokens are fixed, and no routing or
indexing decision of theirs is nearly tied; what is drawn is how they are fed. So a difference beyond summation order is
an error, whatever the seed. `SHORT` steps write their rings before they read them, longer ones after.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FLOAT32, LOOKED_AT, SEED, V4_SETTINGS, counts, rng, worst
from helpers_v4 import (
    NATIVE,
    TOKENS,
    WHOLE,
    config_of,
    draft_of,
    empty,
    filled,
    leaves,
    model,
    step_of,
)
from hypothesis import example, given, seed, settings
from jax import export

import dsjax.models.v4 as v4_module
from dsjax.cache import SPARE, SequenceState, V4Cache, extract, insert, rollback
from dsjax.cache.rows import ROW_BLOCK
from dsjax.cache.v4 import SHORT_STEP
from dsjax.checkpoint.load import load
from dsjax.config import V4Config, load_config
from dsjax.errors import InputError
from dsjax.generate import Engine
from dsjax.models import v4
from dsjax.models.schedule import MAX_PERIOD, Schedule, find_schedule
from dsjax.numerics import Numerics
from dsjax.params import abstract_params
from dsjax.synth import synth_config, synthesise

BOUND = 2e-5  # of the largest logit, between runs of our own (design section 6)
SHORT = 8
WIDTHS = (1, SHORT, TOKENS)  # static T of a step; each is compiled once per model
CHUNKS = (1, 3, 64, 127, 128, 129, 200)
LENGTHS = tuple(range(1, 10)) + tuple(range(18, 25)) + tuple(range(123, 134)) + tuple(range(253, 261))
"""Around 4, both windows, 128 and 256."""

NATIVE_BOUND = 0.02
"""Of the largest logit, between two cuts of a one-layer model in native.

Sums in another order flip roundings to bfloat16 and codes; a flipped code of a key is 2^-4 of it. Measured: 7e-4 for a
window layer, 2e-5 for a CSA layer, 3e-3 for an HCA layer at most, root mean squares below 5e-5.
"""

Plan = Sequence[tuple[int, tuple[int, ...]]]
"""Steps: (T, new tokens of each slot)."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What feeding came to.

    Attributes:
      logits, streams: per slot, of its tokens in order.
    """

    logits: list[np.ndarray]
    streams: list[np.ndarray]
    cache: V4Cache


def _width(tokens: int) -> int:
    return next(width for width in WIDTHS if tokens <= width)


def _feed(
    name: str, cache: V4Cache, rows: np.ndarray, plan: Plan, numerics: Numerics = FLOAT32, check: Any = None
) -> Run:
    """Feeds tokens of `rows` [B, T] from each slot's length on; padding ids are arbitrary.

    Args:
      check: called with (cache before, n_new, cache after) of each step.
    """
    step, padding = step_of(name, numerics), rng(10)
    found: tuple[list[list[Any]], list[list[Any]]] = ([[] for _ in rows], [[] for _ in rows])
    at = np.asarray(cache.length).tolist()
    for width, n_new in plan:
        tokens = padding.integers(0, 96, (len(rows), width)).astype(np.int32)
        for b, n in enumerate(n_new):
            tokens[b, :n] = rows[b, at[b] : at[b] + n]
        *values, after = step(cache, jnp.asarray(tokens), counts(*n_new))
        if check is not None:
            check(cache, n_new, after)
        cache = after
        for kept, value in zip(found, values, strict=True):
            host = np.asarray(value, np.float32)
            for b, n in enumerate(n_new):
                kept[b].append(host[b, :n])
        at = [a + n for a, n in zip(at, n_new, strict=True)]
        np.testing.assert_array_equal(cache.length, at)
    logits, streams = ([np.concatenate(parts) if parts else parts for parts in kept] for kept in found)
    return Run(logits, streams, cache)


def _cut(lengths: Sequence[int], chunk: int, width: int = 0, start: Sequence[int] = ()) -> Plan:
    """Each slot's tokens in chunks, a slot that has none left idle."""
    at, plan = list(start or [0] * len(lengths)), []
    while at != list(lengths):
        n_new = tuple(min(chunk, length - a) for length, a in zip(lengths, at, strict=True))
        plan.append((width or _width(chunk), n_new))
        at = [a + n for a, n in zip(at, n_new, strict=True)]
    return plan


@lru_cache
def _reference(name: str, numerics: Numerics = FLOAT32) -> Run:
    """All tokens of the first two sequences in one step."""
    start = empty(name, numerics=numerics)
    return _feed(name, start, model(name).tokens[:2], [(TOKENS, (TOKENS, TOKENS))], numerics)


def _at(name: str, lengths: Sequence[int], numerics: Numerics = FLOAT32) -> V4Cache:
    """A cache that took this many tokens of the first two sequences."""
    plan = [(TOKENS, tuple(lengths))]
    return _feed(name, empty(name, numerics=numerics), model(name).tokens[:2], plan, numerics).cache


def _assert_same(found: Run, expected: Run, message: str = "") -> None:
    """Bit for bit, logits, streams, and what counts of the cache."""
    for b in range(len(expected.logits)):
        np.testing.assert_array_equal(found.logits[b], expected.logits[b], err_msg=message)
        np.testing.assert_array_equal(found.streams[b], expected.streams[b], err_msg=message)
        _assert_same_state(extract(found.cache, b), extract(expected.cache, b), message)


def _assert_same_state(found: SequenceState, expected: SequenceState, message: str = "") -> None:
    assert (found.version, found.length) == (expected.version, expected.length)
    assert found.arrays.keys() == expected.arrays.keys()
    for key, array in expected.arrays.items():
        assert found.arrays[key].dtype == array.dtype
        np.testing.assert_array_equal(found.arrays[key], array, err_msg=f"{key} {message}")


def _state_error(found: SequenceState, expected: SequenceState) -> float:
    """The largest `worst` of all arrays."""
    assert (found.length, found.arrays.keys()) == (expected.length, expected.arrays.keys())
    return max([worst(found.arrays[k], a) for k, a in expected.arrays.items() if a.size], default=0.0)


def _error(found: Run, name: str, lengths: Sequence[int]) -> float:
    """Against the one-shot run, of the largest logit and the largest stream."""
    reference, errors = _reference(name), []
    for b, length in enumerate(lengths):
        for mine, all_of in ((found.logits[b], reference.logits[b]), (found.streams[b], reference.streams[b])):
            assert mine.shape[0] == length
            errors.append(float(np.abs(mine - all_of[:length]).max() / np.abs(all_of).max()))
    return max(errors)


# --- cutting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", WHOLE)
def test_chunks(name: str, chunk: int) -> None:
    """One-shot == chunks, of which the last and those of the shorter slot are partial; the state too."""
    lengths = (TOKENS, TOKENS - 17)
    run = _feed(name, empty(name), model(name).tokens[:2], _cut(lengths, chunk))
    error = _error(run, name, lengths)
    state = _state_error(extract(run.cache, 0), extract(_reference(name).cache, 0))
    print(name, chunk, f"outputs {error:.1e}, state {state:.1e}")
    assert max(error, state) <= BOUND


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (16, 2)])
def test_token_by_token_with_any_heads(heads: int, groups: int) -> None:
    """One layer. XLA:CPU fuses a single token's rotation in other ways by numbers of heads; one of them was wrong."""
    sizes = {"head_dim": 16, "qk_rope_head_dim": 4, "o_lora_rank": 12, "num_nextn_predict_layers": 0}
    config = synth_config(
        "deepseek-v4-flash",
        layers=1,
        settings=V4_SETTINGS | sizes | {"num_attention_heads": heads, "o_groups": groups},
    )
    with TemporaryDirectory() as folder:
        synthesise(Path(folder) / "model", config, template="deepseek-v4-flash")
        loaded, params, _ = load(Path(folder) / "model")
    engine = Engine(loaded, params, FLOAT32.for_checkpoint(loaded))
    tokens = rng(71).integers(2, 320, (1, 8))
    expected, found = (engine.score(tokens, chunk=chunk)[0] for chunk in (8, 1))
    assert worst(found, expected) <= BOUND


@pytest.mark.parametrize(
    ("name", "width"),
    [("pro", 129), *(pytest.param(n, w, marks=pytest.mark.full) for n in WHOLE for w in (3, 9, 10, *CHUNKS[2:]))],
)
def test_chunks_of_exact_width(name: str, width: int) -> None:
    """Compiled for just the chunk's tokens."""
    lengths = (TOKENS, TOKENS - 17)
    run = _feed(name, empty(name), model(name).tokens[:2], _cut(lengths, width, width))
    error = _error(run, name, lengths)
    print(name, width, f"{error:.1e}")
    assert error <= BOUND


def _chunks(slots: int) -> st.SearchStrategy[list[tuple[int, tuple[int, ...]]]]:
    """Steps of any width, each slot taking any part of it, or nothing."""
    chunk = st.sampled_from(WIDTHS).flatmap(
        lambda width: st.tuples(st.just(width), st.tuples(*[st.integers(0, width)] * slots))
    )
    return st.lists(chunk, max_size=8)


def _clipped(asked: Plan, lengths: Sequence[int]) -> Plan:
    """As asked as far as the lengths go, then the rest."""
    at, plan = [0] * len(lengths), []
    for width, n_new in [*asked, (TOKENS, (TOKENS,) * len(lengths))]:
        taken = tuple(min(n, length - a) for n, length, a in zip(n_new, lengths, at, strict=True))
        plan.append((width, taken))
        at = [a + n for a, n in zip(at, taken, strict=True)]
    return plan


@pytest.mark.parametrize("name", WHOLE)
def test_any_steps(name: str) -> None:
    """Slots that advance each in its own way, one of them idle now and then, are as one-shot alone."""
    largest = 0.0

    @seed(SEED)
    @settings(max_examples=10, deadline=None, database=None)
    @given(_chunks(2), st.integers(1, TOKENS))
    def check(asked: Plan, shorter: int) -> None:
        nonlocal largest
        lengths = (TOKENS, shorter)
        run = _feed(name, empty(name), model(name).tokens[:2], _clipped(asked, lengths))
        largest = max(largest, _error(run, name, lengths))
        assert largest <= BOUND, SEED

    check()
    print(name, f"{largest:.1e}")


# --- batching --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pro", pytest.param("flash", marks=pytest.mark.full)])
def test_batch_equals_alone(name: str) -> None:
    """Sequences of unequal lengths in one step == each in a cache of its own."""
    lengths, rows = (TOKENS - 1, 37), model(name).tokens[:2]
    together = _feed(name, empty(name), rows, [(TOKENS, lengths)])
    for b, length in enumerate(lengths):
        alone = _feed(name, empty(name, 1), rows[b : b + 1], [(TOKENS, (length,))])
        assert worst(together.logits[b], alone.logits[0]) <= BOUND
        assert worst(together.streams[b], alone.streams[0]) <= BOUND
        assert _state_error(extract(together.cache, b), extract(alone.cache, 0)) <= BOUND


MILLION = 1 << 20


@pytest.mark.parametrize("start", [MILLION - 130, MILLION - 20])
def test_a_long_slot_beside_a_fresh_one(start: int) -> None:
    """Near a million tokens and at none, NaN in all that does not count, one token at a time == each alone.

    From the first start on entries of both kinds are completed; from the second one the sequence becomes full.
    """
    name, random = "long", np.random.default_rng(20)  # not of the day: of 262,144 scores some might be tied
    fresh = empty(name, 1, MILLION - SPARE)
    assert fresh.capacity == MILLION

    def fill(array: jax.Array) -> jax.Array:
        return jnp.asarray(random.standard_normal(array.shape, np.float32))

    old = dataclasses.replace(jax.tree.map(fill, fresh), length=counts(start))
    both = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=min(1, parts[0].ndim - 1)), old, fresh)
    both = _poisoned(both)
    # The control: what is a million tokens back counts.
    cut = jax.tree.map(lambda a: a.at[:, :, : a.shape[2] // 2].set(0) if a.ndim == 4 and a.shape[2] > 99 else a, old)
    step, one, largest = step_of(name), counts(1), 0.0
    for i, tokens in enumerate(model(name).tokens[:2, :12].T):
        *found, both = step(both, jnp.asarray(tokens)[:, None], counts(1, 1))
        alone = [step(cache, jnp.asarray(t).reshape(1, 1), one) for cache, t in zip((old, fresh), tokens, strict=True)]
        if i == 0:
            assert worst(step(cut, jnp.asarray(tokens[:1])[:, None], one)[0], alone[0][0]) > 100 * BOUND
        for value, parts in zip(found, zip(*(x[:2] for x in alone), strict=True), strict=True):
            errors = [worst(value[b], part[0]) for b, part in enumerate(parts)]
            assert max(errors) <= BOUND, (i, errors)
            largest = max(largest, *errors)
        old, fresh = (x[2] for x in alone)
    np.testing.assert_array_equal(both.length, [start + 12, 12])
    assert max(_state_error(extract(both, b), extract(x, 0)) for b, x in enumerate((old, fresh))) <= BOUND
    print(start, f"{largest:.1e}")


def _written(array: str, size: int, start: int, n: int) -> np.ndarray:
    """bool [size]: places of an array of the cache that n tokens from `start` on write."""
    ratio = 128 if ".hca" in array else 4
    if array.endswith(".entries"):
        places = np.arange(start // ratio, (start + n) // ratio)
    else:
        places = np.arange(max(start, start + n - size), start + n) % size
    found = np.zeros(size, bool)
    found[places] = True
    return found


def _check_places(before: V4Cache, n_new: Sequence[int], after: V4Cache) -> None:
    """A step changes every place that its new tokens write, and no bit of any other."""
    old, new = leaves(before), leaves(after)
    for key in old:
        for b, n in enumerate(n_new):
            written = _written(key, old[key].shape[2], int(before.length[b]), n)
            np.testing.assert_array_equal(new[key][:, b, ~written], old[key][:, b, ~written], err_msg=key)
            assert (new[key][:, b, written] != old[key][:, b, written]).any(axis=-1).all(), key


def _random_cache(name: str, lengths: Sequence[int], numerics: Numerics = FLOAT32) -> V4Cache:
    """Whatever a cache may hold: random floats, random codes."""
    random = rng(12)

    def fill(array: jax.Array) -> jax.Array:
        if array.dtype == jnp.float32:
            return jnp.asarray(random.standard_normal(array.shape, np.float32))
        return jnp.asarray(random.integers(0, 120, array.shape), array.dtype)

    cache = jax.tree.map(fill, empty(name, numerics=numerics))
    return dataclasses.replace(cache, length=jnp.asarray(lengths, jnp.int32))


@pytest.mark.parametrize("name", WHOLE)
def test_only_new_rows_change(name: str) -> None:
    """An idle slot keeps every bit of every array, a busy one every bit of what is not its new tokens'."""
    rows = np.tile(model(name).tokens[:2], 2)
    for lengths in ((5, 131), (127, 0), (496, 255)):
        plan = [(1, (0, 1)), (8, (3, 0)), (8, (0, 8)), (1, (0, 0)), (1, (1, 1)), (8, (0, 0))]
        if max(lengths) + 200 < 500:
            plan += [(TOKENS, (0, 150)), (TOKENS, (200, 0)), (TOKENS, (0, 0))]
        _feed(name, _random_cache(name, lengths), rows, plan, check=_check_places)


def test_rows_beyond_the_capacity_are_dropped() -> None:
    """They must not wrap around or be clamped onto the last entry."""
    name = "pro"
    before = _random_cache(name, (0, 0))
    capacity = before.capacity
    before = dataclasses.replace(before, length=counts(capacity - 2, 0))
    _, _, after = step_of(name)(before, jnp.asarray(model(name).tokens[:2, :8]), counts(6, 0))
    old, new = leaves(before), leaves(after)
    for key in old:
        if key.endswith(".entries"):
            changed = (new[key] != old[key]).any(axis=(0, 3))
            expected = np.zeros_like(changed)
            expected[0, capacity // (128 if ".hca" in key else 4) - 1] = True  # completed by the last token that fits
            np.testing.assert_array_equal(changed, expected, err_msg=key)


@pytest.mark.parametrize("name", WHOLE)
def test_padding_ids_do_not_matter(name: str) -> None:
    rows = jnp.asarray(model(name).tokens[:2, :TOKENS])
    for width, n_new, lengths in ((8, (3, 7), (5, 252)), (TOKENS, (150, 9), (0, 120))):
        cache, found = _at(name, lengths), []
        for padding in (0, 95):
            tokens = jnp.where(jnp.arange(width) < counts(*n_new)[:, None], rows[:, :width], padding)
            found.append(step_of(name)(cache, tokens, counts(*n_new)))
        for b, n in enumerate(n_new):
            np.testing.assert_array_equal(found[0][0][b, :n], found[1][0][b, :n])
            np.testing.assert_array_equal(found[0][1][b, :n], found[1][1][b, :n])
        for key, array in leaves(found[0][2]).items():
            np.testing.assert_array_equal(array, leaves(found[1][2])[key], err_msg=key)


# --- what is left over -----------------------------------------------------------------------------------------------


def _poisoned(cache: V4Cache) -> V4Cache:
    """NaN (all ones in rows of codes) in every place that does not count at the slots' lengths."""
    window = cache.window.shape[2] - SPARE

    def poison(path: Any, array: jax.Array) -> jax.Array:
        key = jax.tree_util.keystr(path)
        if key == ".length":
            return array
        host = np.array(array)
        ratio = 128 if ".hca" in key else 4
        pooled = ratio if ".hca" in key else 2 * ratio
        for b, length in enumerate(np.asarray(cache.length)):
            if key.endswith(".entries"):
                counting = np.arange(length // ratio)
            elif key.endswith(".inputs"):
                counting = np.arange(max(0, (length // ratio) * ratio + ratio - pooled), length) % host.shape[2]
            else:
                counting = np.arange(max(0, length - window + 1), length) % host.shape[2]
            stale = np.ones(host.shape[2], bool)
            stale[counting] = False
            host[:, b, stale] = np.nan if host.dtype == np.float32 else np.iinfo(host.dtype).max
        return jnp.asarray(host)

    return jax.tree_util.tree_map_with_path(poison, cache)


def _go_on(name: str, cache: V4Cache, width: int, numerics: Numerics = FLOAT32, tokens: int = 0) -> Run:
    """Up to 8 more tokens (150 in a wide step) of the first two sequences."""
    count = tokens or (150 if width == TOKENS else SHORT)
    rows = np.tile(model(name).tokens[:2], 2)
    end = [int(length) + count for length in cache.length]
    return _feed(name, cache, rows, _cut(end, min(width, count), width, np.asarray(cache.length).tolist()), numerics)


@pytest.mark.parametrize("name", WHOLE)
def test_a_used_slot_is_as_a_fresh_one(name: str) -> None:
    """Length set to zero and nothing else, in a cache full of another sequence, or of NaN: not a bit differs."""
    rows, used = model(name).tokens[:2], _feed(name, empty(name), model(name).tokens[2:], [(TOKENS, (TOKENS, 261))])
    for plan in (_cut((TOKENS, 30), 8), _cut((19, 40), 1), [(TOKENS, (TOKENS, 131)), (8, (0, 8)), (1, (0, 1))]):
        expected = _feed(name, empty(name), rows, plan)
        for stale in (
            dataclasses.replace(used.cache, length=counts(0, 0)),
            filled(empty(name), jnp.nan, (0, 0)),
        ):
            _assert_same(_feed(name, stale, rows, plan), expected)


@pytest.mark.parametrize("name", WHOLE)
def test_stale_rows_do_not_matter(name: str) -> None:
    """NaN in every place that does not count changes no bit of what follows, in steps of any width."""
    lengths = rng(13).permutation(LENGTHS)
    for pair in lengths[: 2 * (len(lengths) // 2)].reshape(-1, 2)[:8]:
        cache = _at(name, pair)
        for width in WIDTHS:
            expected, found = _go_on(name, cache, width), _go_on(name, _poisoned(cache), width)
            assert all(np.isfinite(logits).all() for logits in found.logits)
            _assert_same(found, expected, f"lengths {pair}, width {width}, seed {SEED}")


# --- rolling back ----------------------------------------------------------------------------------------------------


def _check_rollback(
    name: str, cache: V4Cache, drafted: tuple[int, int], one_by_one: bool, numerics: Numerics, widths: Sequence[int]
) -> None:
    """Drafts wrong tokens, forgets them, goes on with right ones: the very bits of a sequence never drafted."""
    wrong = np.tile(model(name).tokens[2:], 2)
    start = np.asarray(cache.length).tolist()
    end = [a + n for a, n in zip(start, drafted, strict=True)]
    plan = _cut(end, 1, 1, start) if one_by_one else [(SHORT, drafted)]
    ahead = _feed(name, cache, wrong, plan, numerics).cache
    back = rollback(ahead, counts(*drafted))
    for width in widths:
        message = f"{name} lengths {start}, drafted {drafted}, one by one {one_by_one}, width {width}, seed {SEED}"
        _assert_same(_go_on(name, back, width, numerics), _go_on(name, cache, width, numerics), message)


@pytest.mark.parametrize("name", WHOLE)
def test_rolling_back_leaves_no_trace(name: str) -> None:
    lengths, drafts = st.sampled_from(LENGTHS), st.integers(0, SPARE)

    @seed(SEED)
    @settings(max_examples=16, deadline=None, database=None)
    @given(st.tuples(lengths, lengths), st.tuples(drafts, drafts), st.booleans(), st.sampled_from([1, SHORT, TOKENS]))
    @example((3, 127), (1, 1), False, 8)
    @example((3, 127), (8, 8), True, 1)
    @example((19, 256), (8, 8), True, 8)
    @example((20, 128), (8, 8), False, 1)
    @example((1, 255), (8, 1), True, TOKENS)
    def check(start: tuple[int, int], drafted: tuple[int, int], one_by_one: bool, width: int) -> None:
        _check_rollback(name, _at(name, start), drafted, one_by_one, FLOAT32, [width])

    check()


@pytest.mark.full
@pytest.mark.parametrize("name", WHOLE)
def test_rolling_back_anywhere(name: str) -> None:
    """Every length near a boundary, with every number of drafts."""
    for start in LENGTHS:
        cache = _at(name, (start, max(1, start - 4)))
        for drafted in range(SPARE + 1):
            for one_by_one in (False, True):
                _check_rollback(name, cache, (drafted, SPARE - drafted), one_by_one, FLOAT32, [SHORT, 1])


@pytest.mark.parametrize("name", WHOLE)
def test_there_is_room_for_drafts_at_the_very_end(name: str) -> None:
    """A cache that holds all the tokens asked for takes SPARE more, and forgets them."""
    assert empty(name, max_length=504).capacity == 512
    assert empty(name).capacity == 512
    for lengths in ((504, 503), (497, 500)):
        cache = _random_cache(name, lengths)
        drafted = (512 - lengths[0], 512 - lengths[1])
        drafted = (min(drafted[0], SPARE), min(drafted[1], SPARE))
        for one_by_one in (False, True):
            _check_rollback(name, cache, drafted, one_by_one, FLOAT32, [SHORT])


# --- moving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "max_length"), [pytest.param("flash", 1000, marks=pytest.mark.full), ("pro", 248)])
def test_extract_insert_elsewhere_go_on(name: str, max_length: int) -> None:
    """Slot 1 moves into slot 0 of a dirty cache of another capacity, and goes on there.

    In the smaller cache the second model has fewer places for entries than its indexer chooses, and reads them all.
    """
    other = empty(name, max_length=max_length)
    assert other.capacity == max_length + SPARE + (16 if name == "flash" else 0)
    for length in (3, 20, 127, 131, 200):
        cache = _at(name, (9, length))
        expected = _go_on(name, cache, SHORT)
        state = extract(cache, 1)
        dirty = filled(other, jnp.nan, (77, 2))
        before = leaves(dirty)
        moved = insert(jax.tree.map(jnp.array, dirty), 0, state)
        np.testing.assert_array_equal(moved.length, [length, 2])
        for key, array in leaves(moved).items():
            np.testing.assert_array_equal(array[:, 1], before[key][:, 1], err_msg=key)
        _assert_same_state(extract(moved, 0), state)
        rows = np.stack([np.tile(model(name).tokens[1], 2), model(name).tokens[2].repeat(2)])
        found = _feed(name, moved, rows, [(SHORT, (SHORT, 0))])
        assert worst(found.logits[0], expected.logits[1]) <= BOUND
        assert worst(found.streams[0], expected.streams[1]) <= BOUND
        assert _state_error(extract(found.cache, 0), extract(expected.cache, 1)) <= BOUND


@pytest.mark.parametrize("name", WHOLE)
def test_insert_in_the_same_place_changes_no_bit(name: str) -> None:
    """Into a slot full of NaN, of a cache of equal capacity."""
    for lengths in ((9, 128), (260, 21)):
        cache = _at(name, lengths)
        expected = _go_on(name, cache, SHORT)
        again = filled(empty(name), jnp.nan, (5, 500))
        for b in range(2):
            again = insert(again, b, extract(cache, b))
        _assert_same(_go_on(name, again, SHORT), expected)
        _assert_same(_go_on(name, again, TOKENS), _go_on(name, cache, TOKENS))


@pytest.mark.parametrize("name", WHOLE)
def test_a_state_holds_what_counts(name: str) -> None:
    """Its size and order are fixed by its length: nothing of the slot, of the capacity, or of what was drafted."""
    config = model(name).config
    for length in (1, 3, 4, 131, 260):
        state = extract(_at(name, (length, 2)), 0)
        layers = {kind: len(config.layers_of(ratio)) for kind, ratio in (("csa", 4), ("index", 4), ("hca", 128))}
        width = {"csa": config.head_dim, "index": config.index_head_dim, "hca": config.head_dim}
        expected = {"window": (config.num_hidden_layers, min(length, config.sliding_window - 1), config.head_dim)}
        for kind, ratio, before in (("csa", 4, 4), ("index", 4, 4), ("hca", 128, 0)):
            done = length // ratio
            expected[f"{kind}.entries"] = (layers[kind], done, width[kind])
            rows = length - max(0, done * ratio - before)
            expected[f"{kind}.inputs"] = (layers[kind], rows, 2 * width[kind] * (2 if before else 1))
        assert {key: array.shape for key, array in state.arrays.items()} == expected


def test_insert_refuses() -> None:
    """A state of another version, model, row format, length or capacity; the cache stays as it was."""
    cache = _at("pro", (20, 9))
    state = extract(cache, 0)
    small = empty("pro", max_length=24)
    assert small.capacity == 32

    def changed(name: str, array: Any) -> SequenceState:
        return dataclasses.replace(state, arrays={**state.arrays, name: array})

    missing = {key: array for key, array in state.arrays.items() if key != "hca.inputs"}
    for target, bad, message in (
        (cache, dataclasses.replace(state, version=1), "expected version 2, found 1"),
        (
            cache,
            dataclasses.replace(state, length=19),
            r"csa.entries: expected float32 \(1, 4, 32\), found float32 \(1, 5, 32\)",
        ),
        (cache, dataclasses.replace(state, length=513), "513 tokens do not fit a cache of 512"),
        (small, extract(_at("pro", (33, 1)), 0), "33 tokens do not fit a cache of 32"),
        (
            cache,
            changed("csa.entries", state.arrays["csa.entries"][:, :3]),
            r"csa.entries: expected .* found .*, 3, 32",
        ),
        (cache, changed("window", state.arrays["window"].astype(np.int16)), "window: expected float32.*found int16"),
        (empty("pro", numerics=Numerics("plain", "bfloat16")), state, "window: expected int16"),
        (empty("flash"), state, r"window: expected float32 \(6, 20, 32\), found float32 \(4, 19, 32\)"),
        (
            empty("window-native", numerics=Numerics("plain", "float32")),
            state,
            "expected window, found window, csa.entries",
        ),
        (empty("pro", draft=True), state, "expected window, found"),
        (cache, dataclasses.replace(state, arrays=missing), "expected .*hca.inputs, found"),
    ):
        with pytest.raises(InputError, match=message):
            insert(target, 0, bad)
    np.testing.assert_array_equal(cache.length, [20, 9])  # not donated


# --- the draft module ------------------------------------------------------------------------------------------------

DRAFT_TOKENS = 64  # three windows; a draft module sees nothing else


def _draft(
    name: str, cache: V4Cache, plan: Plan, hidden: Sequence[np.ndarray], tokens: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray], V4Cache]:
    """Feeds each slot's streams and the tokens after them; padding is arbitrary. Logits and own streams, per slot."""
    draft, padding = draft_of(name), rng(14)
    logits: list[list[np.ndarray]] = [[] for _ in tokens]
    streams: list[list[np.ndarray]] = [[] for _ in tokens]
    for width, n_new in plan:
        at = np.asarray(cache.length)
        h = padding.standard_normal((len(tokens), width, *hidden[0].shape[1:])).astype(np.float32)
        ids = padding.integers(0, 96, (len(tokens), width)).astype(np.int32)
        for b, n in enumerate(n_new):
            h[b, :n], ids[b, :n] = hidden[b][at[b] : at[b] + n], tokens[b, at[b] : at[b] + n]
        one, own, cache = draft(cache, jnp.asarray(h), jnp.asarray(ids), counts(*n_new))
        for b, n in enumerate(n_new):
            logits[b].append(np.asarray(one)[b, :n])
            streams[b].append(np.asarray(own)[b, :n])
    return [np.concatenate(x) for x in logits], [np.concatenate(x) for x in streams], cache


def test_draft_module() -> None:
    """One-shot == chunks; its cache is one window; a chain on its own streams leaves no trace once rolled back."""
    name = "pro"  # whose window 64 tokens go round three times
    hidden, following = _reference(name).streams, model(name).tokens[:2, 1:]
    fresh = empty(name, max_length=DRAFT_TOKENS, draft=True)
    assert fresh.csa is fresh.index is fresh.hca is None
    assert fresh.window.shape == (1, 2, 20 + SPARE, 32)
    lengths = (DRAFT_TOKENS, 50)
    logits, streams, cache = _draft(name, fresh, [(DRAFT_TOKENS, lengths)], hidden, following)
    for chunk in (1, 3, 8, 17):
        plan = _cut(lengths, chunk, chunk if chunk == 1 else SHORT if chunk <= SHORT else DRAFT_TOKENS)
        again, own, after = _draft(name, fresh, plan, hidden, following)
        for b in range(2):
            error = max(worst(again[b], logits[b]), worst(own[b], streams[b]))
            error = max(error, _state_error(extract(after, b), extract(cache, b)))
            print(name, "draft", chunk, f"{error:.1e}")
            assert error <= BOUND
    # A chain: each further token from the module's own streams, in steps of one token or of a padded many.
    chains = []
    for width in (1, SHORT):
        state, own, chain = cache, np.stack([s[-1:] for s in streams]), []
        for ids in ((3, 5), (90, 1), (17, 17)):
            h = jnp.pad(jnp.asarray(own), ((0, 0), (0, width - 1), (0, 0), (0, 0)), constant_values=7.0)
            tokens = jnp.pad(jnp.asarray(ids, jnp.int32)[:, None], ((0, 0), (0, width - 1)))
            one, out, state = draft_of(name)(state, h, tokens, counts(1, 1))
            own = np.asarray(out)[:, :1]
            chain.append(np.asarray(one)[:, 0])
        chains.append(np.stack(chain))
        np.testing.assert_array_equal(state.length, [n + 3 for n in lengths])
        plan = [(SHORT, (0, 8))]
        expected = _draft(name, cache, [*plan, (1, (1, 0))], hidden, following)
        found = _draft(name, rollback(state, counts(3, 3)), [*plan, (1, (1, 0))], hidden, following)
        for b in range(2):
            np.testing.assert_array_equal(found[0][b], expected[0][b])
            _assert_same_state(extract(found[2], b), extract(expected[2], b))
    assert worst(chains[1], chains[0]) <= BOUND
    assert np.abs(np.diff(chains[0], axis=0)).max() > 0.1


# --- native ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pytest.param("window", marks=pytest.mark.full), "csa", "hca"])
def test_native(kind: str) -> None:
    """One layer in native: cut anyhow within roundings; idle slots, rollback and moving to the bit."""
    name = f"{kind}-native"
    numerics = Numerics("native").for_checkpoint(model(name).config)
    assert numerics == NATIVE
    rows, reference = model(name).tokens[:2], _reference(name, numerics)
    scale = max(float(np.abs(one).max()) for one in reference.logits)
    for chunk in (3, 127):
        run = _feed(name, empty(name, numerics=numerics), rows, _cut((TOKENS, TOKENS - 17), chunk), numerics)
        errors = [np.abs(a - b[: len(a)]) / scale for a, b in zip(run.logits, reference.logits, strict=True)]
        largest, rms = max(float(e.max()) for e in errors), math.sqrt(np.mean(np.concatenate(errors) ** 2))
        print(name, "chunk", chunk, f"of the largest logit: at most {largest:.1e}, rms {rms:.1e}")
        assert largest <= NATIVE_BOUND
    before = _at(name, (131, 5), numerics)
    _feed(name, before, np.tile(rows, 2), [(8, (0, 8)), (8, (5, 0)), (TOKENS, (0, 40))], numerics, _check_idle)
    for lengths, drafted in (((3, 127), (8, 1)), ((20, 128), (1, 8)), ((255, 260), (7, 8))):
        cache = _at(name, lengths, numerics)
        expected = _go_on(name, cache, SHORT, numerics)
        _check_rollback(name, cache, drafted, False, numerics, [SHORT])
        _assert_same(_go_on(name, _poisoned(cache), SHORT, numerics), expected)
        again = filled(empty(name, numerics=numerics), jnp.nan, (5, 400))
        for b in range(2):
            again = insert(again, b, extract(cache, b))
        _assert_same(_go_on(name, again, SHORT, numerics), expected)


def _check_idle(before: V4Cache, n_new: Sequence[int], after: V4Cache) -> None:
    old, new = leaves(before), leaves(after)
    for key in old:
        for b, n in enumerate(n_new):
            if not n:
                np.testing.assert_array_equal(new[key][:, b], old[key][:, b], err_msg=key)


# --- the schedule ----------------------------------------------------------------------------------------------------


def _expanded(kinds: Sequence[Any], schedule: Schedule) -> list[Any]:
    period = list(kinds[schedule.prefix : schedule.prefix + schedule.period])
    return [*kinds[: schedule.prefix], *period * schedule.repeats, *kinds[schedule.rest :]]


def test_find_schedule() -> None:
    """Expanded, a schedule gives its list back; nothing shorter to write out exists; known lists give known splits."""

    def written(kinds: Sequence[Any], schedule: Schedule) -> int:
        return len(kinds) - schedule.period * max(0, schedule.repeats - 1)

    @seed(SEED)
    @settings(max_examples=300, deadline=None, database=None)
    @given(
        st.one_of(
            st.lists(st.integers(0, 2), max_size=24),
            st.builds(
                lambda prefix, period, repeats, rest: prefix + period * repeats + rest,
                st.lists(st.integers(0, 2), max_size=5),
                st.lists(st.integers(0, 2), min_size=1, max_size=5),
                st.integers(0, 9),
                st.lists(st.integers(0, 2), max_size=5),
            ),
        )
    )
    def check(kinds: list[int]) -> None:
        schedule = find_schedule(kinds)
        assert _expanded(kinds, schedule) == kinds, (SEED, schedule)
        assert schedule.repeats != 1 and 0 <= schedule.rest <= len(kinds)
        assert (schedule.period == 0) == (schedule.repeats == 0)
        every = (
            Schedule(start, period, repeats)
            for period in range(1, min(MAX_PERIOD, len(kinds) // 2) + 1)
            for start in range(len(kinds) - 2 * period + 1)
            for repeats in range(2, (len(kinds) - start) // period + 1)
            if _expanded(kinds, Schedule(start, period, repeats)) == kinds
        )
        assert written(kinds, schedule) == min([len(kinds), *(written(kinds, s) for s in every)]), (SEED, schedule)

    check()
    for name, layers, expected in (
        ("deepseek-v4-flash", 43, Schedule(3, 2, 20)),
        ("deepseek-v4-pro", 61, Schedule(3, 2, 29)),
    ):
        config = load_config(name)
        assert isinstance(config, V4Config)
        kinds = v4.layer_kinds(config)
        schedule = find_schedule(kinds)
        print(name, schedule)
        assert (len(kinds), schedule) == (layers, expected)
        assert written(kinds, schedule) == layers - expected.period * (expected.repeats - 1) <= 5
    kinds = v4.layer_kinds(config_of("flash"))
    assert find_schedule(kinds) == Schedule(2, 2, 2)
    assert find_schedule([]) == Schedule(0, 0, 0)


def test_scanned_equals_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first model's two periods as a scan, and every layer by itself: outputs and cache."""
    name, rows = "flash", jnp.asarray(model("flash").tokens[:2, 250:258])
    cache = _at(name, (250, 124))
    scanned = step_of(name)(cache, rows, counts(8, 8))
    monkeypatch.setattr(v4_module, "find_schedule", lambda kinds: Schedule(len(kinds), 0, 0))
    one = model(name)
    written = jax.jit(partial(v4.step, one.config, FLOAT32, want="all"))(one.params, cache, rows, counts(8, 8))
    errors = [worst(written[i], scanned[i]) for i in range(2)]
    errors += [_state_error(extract(written[2], b), extract(scanned[2], b)) for b in range(2)]
    print(f"{max(errors):.1e}")
    assert max(errors) <= BOUND


# --- export ----------------------------------------------------------------------------------------------------------


def test_exports() -> None:
    """A step as bytes, read back: the cache keeps its capacity and what is None in it, no bit of a result differs."""
    one, cache = model("csa-native"), _random_cache("csa-native", (131, 5), NATIVE)
    cache = jax.tree.map(lambda a: a & 63 if a.dtype == jnp.int8 else a, cache)  # no code of them is huge
    step = jax.jit(partial(v4.step, one.config, NATIVE))
    arguments = one.params, cache, jnp.asarray(one.tokens[:2, :1]), counts(1, 1)
    exported = export.export(step)(*arguments)
    again = export.deserialize(exported.serialize())
    assert (again.in_avals, again.out_avals) == (exported.in_avals, exported.out_avals)
    assert again.in_tree == jax.tree.structure((arguments, {})) and again.out_tree == jax.tree.structure((0, 0, cache))
    found, expected = again.call(*arguments), step(*arguments)
    after = found[2]
    assert np.isfinite(found[0]).all()
    assert isinstance(after, V4Cache) and after.capacity == cache.capacity == 512
    assert after.csa is not None and after.index is not None and after.hca is None
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


# --- memory ----------------------------------------------------------------------------------------------------------


@lru_cache
def _compiled(name: str, numerics: Numerics, tokens: int, max_length: int) -> tuple[Any, V4Cache]:
    """The step compiled for one slot, its cache donated, and the cache's shapes."""
    config = load_config(name) if name.startswith("deepseek") else config_of(name)
    assert isinstance(config, V4Config)
    cache = jax.eval_shape(partial(v4.new_cache, config, numerics, 1, max_length))
    step = jax.jit(partial(v4.step, config, numerics), donate_argnums=1)
    new, row = jax.ShapeDtypeStruct((1, tokens), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    params = abstract_params(config) if name.startswith("deepseek") else jax.eval_shape(lambda: model(name).params)
    return step.lower(params, cache, new, row).compile(LOOKED_AT), cache


def _cache_bytes(cache: V4Cache) -> int:
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(cache))


def _copies(text: str, cache: V4Cache) -> list[str]:
    """Copies of any of the cache's arrays of more than one layer: a slice of the only layer is taken for the array."""
    shapes = {",".join(map(str, a.shape)) for a in jax.tree.leaves(cache) if a.ndim == 4 and a.shape[0] > 1}
    return [c for s in shapes for c in re.findall(rf"= \w+\[{s}\]\S* copy\(.*", text)]


LONG = 512 * 128 - SPARE
"""From here on entries of HCA layers, too, are read in the widest pieces: temporary memory has reached its most."""


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("periods", 1),
        ("periods", 64),
        pytest.param("flash", 1, marks=pytest.mark.full),
        pytest.param("flash", SHORT_STEP, marks=pytest.mark.full),
        pytest.param("flash", 64, marks=pytest.mark.full),
        pytest.param("pro", 1, marks=pytest.mark.full),
        pytest.param("pro", 64, marks=pytest.mark.full),
    ],
)
def test_the_cache_is_updated_in_place(name: str, tokens: int) -> None:
    """All of its bytes are aliased, and temporary memory is the same for a cache 4 times as long."""
    temporary = []
    for max_length in (LONG, 4 * LONG):
        compiled, cache = _compiled(name, FLOAT32, tokens, max_length)
        assert cache.hca is not None and cache.hca.entries.shape[2] >= 2 * ROW_BLOCK
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes == _cache_bytes(cache)
        temporary.append(memory.temp_size_in_bytes)
        if tokens <= SHORT_STEP:
            assert _copies(compiled.as_text(), cache) == []
    print(name, tokens, temporary)
    assert temporary[0] == temporary[1]


@pytest.mark.full
@pytest.mark.parametrize("name", ["deepseek-v4-flash", "deepseek-v4-pro"])
@pytest.mark.parametrize("numerics", [Numerics("plain", "bfloat16"), NATIVE], ids=["plain", "native"])
def test_the_released_models_copy_no_cache(name: str, numerics: Numerics) -> None:
    """At full size, from shapes alone: a decode step."""
    compiled, cache = _compiled(name, numerics, 1, LONG)
    assert compiled.memory_analysis().alias_size_in_bytes == _cache_bytes(cache)
    assert _copies(compiled.as_text(), cache) == []
