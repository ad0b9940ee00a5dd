"""Laws of the step function in plain float32: however a sequence is cut, batched, moved or rolled back, it is the same.

Tokens are the goldens' own, whose routing decisions are not near a tie (tests/goldens/README.md); what is drawn is how
they are fed. So a difference beyond summation order is an error, whatever the seed.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache, partial

import emulator as em
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
from helpers_laws import WIDTHS, Chunk, Stepper, any_chunks, feed
from hypothesis import given, seed, settings

from dsjax.cache import SPARE, Cache, extract, insert, rollback
from dsjax.cache.per_token import init_cache
from dsjax.cache.rows import ROW_BLOCK, row_block
from dsjax.errors import InputError
from dsjax.generate import Engine
from dsjax.layers import attend, mla
from dsjax.models import v3
from dsjax.numerics import Numerics
from dsjax.sampling import Sampling

BOUND = 1e-5  # of the largest logit, between runs of our own (design section 6)
FORMS = {form: Numerics("plain", "float32", form) for form in ("naive", "absorbed")}
CASES = (
    "v3-float32",  # group routing, q_lora, yarn
    "v2-lite",  # softmax gates, no q_lora
    "v3-dense-only",
    pytest.param("v3-no-q-lora", marks=pytest.mark.full),
    pytest.param("v2-group", marks=pytest.mark.full),
    pytest.param("v3-fp8-partial", marks=pytest.mark.full),
    pytest.param("v3-high-theta", marks=pytest.mark.full),
    pytest.param("v31-terminus", marks=pytest.mark.full),
)


@lru_cache
def _reference(name: str) -> tuple[np.ndarray, Cache]:
    """All tokens of a golden in one step, in the naive form: logits [B, T, V] and the cache."""
    logits, _, cache = one_shot(golden(name), golden(name).tokens, FORMS["naive"])
    return logits, cache


def _empty(model: Golden, batch: int = 2, max_length: int = 0) -> Cache:
    return init_cache(model.config, FLOAT32, batch, max_length or model.tokens.shape[1])


@pytest.mark.parametrize("form", ["naive", "absorbed", "native"])
def test_blocks_of_queries(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries scored a block at a time, key blocks that none of them sees skipped == all at once: slots of different
    lengths, one taking part of the step, one idle and unchanged bit for bit; stale NaN everywhere else."""
    model = golden("v3-float32")
    numerics = Numerics("native") if form == "native" else FORMS[form]
    bound = 1e-3 if form == "native" else BOUND  # native rounds to bfloat16 as it goes: a flipped rounding shows
    rows = jnp.asarray(np.tile(model.tokens, (2, 1))[:4, :24], jnp.int32)
    empty = init_cache(model.config, numerics, 4, 40)
    nan = jnp.asarray(np.nan, jnp.float32) if numerics.dtype == "float32" else jnp.int16(0x7FC0)
    empty = dataclasses.replace(empty, rows=jnp.full_like(empty.rows, nan))
    results = []
    for size, keys in ((128, 256), (4, 8)):
        monkeypatch.setattr(attend, "QUERY_BLOCK", size)
        for module in (attend, mla):
            monkeypatch.setattr(module, "row_block", partial(row_block, most=keys))
        step = jax.jit(partial(v3.step, model.config, numerics, want="all"))
        _, _, cache = step(model.params, empty, rows[:, :12], counts(12, 3, 0, 9))
        logits, _, after = step(model.params, cache, rows[:, 12:], counts(12, 12, 0, 5))
        np.testing.assert_array_equal(after.rows[:, 2], empty.rows[:, 2])
        results.append([np.asarray(logits)[b, :n] for b, n in enumerate((12, 12, 0, 5)) if n])
    for one, other in zip(*results, strict=True):
        assert np.isfinite(other).all()
        assert worst(other, one) <= bound


@pytest.mark.parametrize("name", CASES)
def test_any_chunking(name: str) -> None:
    """One-shot == any steps, padded ones and idle slots included, with prompts of unequal lengths."""
    model = golden(name)
    reference, cache = _reference(name)
    total = model.tokens.shape[1]

    @seed(SEED)
    @settings(max_examples=12, deadline=None, database=None)
    @given(any_chunks(2), st.integers(1, total))
    def check(chunks: list[Chunk], shorter: int) -> None:
        stepper = Stepper(model, _empty(model))
        lengths = [total, shorter]
        logits = feed(model.tokens, lengths, chunks, stepper)
        scale = np.abs(reference).max()
        for b, length in enumerate(lengths):
            error = np.abs(logits[b] - reference[b, :length]).max() / scale
            assert error <= BOUND, (SEED, b, error)
            state, expected = extract(stepper.cache, b), np.asarray(cache.rows[:, b, :length])
            assert worst(state.arrays["rows"], expected) <= BOUND

    check()


@pytest.mark.parametrize("name", CASES)
def test_token_by_token(name: str) -> None:
    """One-shot == decoding, where every step may choose another form of attention than the prefill did."""
    model = golden(name)
    one_each = [(1, (1, 1))] * model.tokens.shape[1]
    logits = feed(model.tokens, [model.tokens.shape[1]] * 2, one_each, Stepper(model, _empty(model)))
    assert worst(np.stack(logits), _reference(name)[0]) <= BOUND


@pytest.mark.parametrize("name", CASES)
def test_naive_equals_absorbed(name: str) -> None:
    logits, _, cache = one_shot(golden(name), golden(name).tokens, FORMS["absorbed"])
    assert worst(logits, _reference(name)[0]) <= BOUND
    assert worst(cache.rows, _reference(name)[1].rows) <= BOUND


@pytest.mark.parametrize("name", CASES)
def test_batch_equals_alone(name: str) -> None:
    """Two prompts of unequal lengths in one step; the other does not show."""
    model = golden(name)
    lengths, rows = (7, 3), jnp.asarray(model.tokens[:, : WIDTHS[-1]])
    step = step_of(model.config, FLOAT32)
    together, _, cache = step(model.params, _empty(model), rows, counts(*lengths))
    for b, length in enumerate(lengths):
        alone, _, own = step(model.params, _empty(model, 1), rows[b : b + 1], counts(length))
        assert worst(together[b, :length], alone[0, :length]) <= BOUND
        assert worst(extract(cache, b).arrays["rows"], extract(own, 0).arrays["rows"]) <= BOUND
        assert worst(together[b, :length], _reference(name)[0][b, :length]) <= BOUND


@pytest.mark.parametrize("name", CASES)
def test_an_idle_slot_keeps_every_bit(name: str) -> None:
    """And a busy one every bit of the rows that are not its new tokens'."""
    model = golden(name)
    random = np.random.default_rng(SEED)
    empty = _empty(model)
    before = Cache(jnp.asarray(random.standard_normal(empty.rows.shape, np.float32)), None, counts(5, 11))
    step = step_of(model.config, FLOAT32)
    for width, n_new in ((1, (0, 1)), (9, (3, 0)), (9, (0, 9))):
        _, _, after = step(model.params, before, jnp.asarray(model.tokens[:, :width]), counts(*n_new))
        old, new = np.asarray(before.rows).view(np.uint32), np.asarray(after.rows).view(np.uint32)
        for b, n in enumerate(n_new):
            start = int(before.length[b])
            written = np.zeros(old.shape[2], bool)
            written[start : start + n] = True
            np.testing.assert_array_equal(new[:, b, ~written], old[:, b, ~written])
            assert (new[:, b, written] != old[:, b, written]).any(axis=-1).all()
            assert int(after.length[b]) == start + n


def test_rows_beyond_the_capacity_are_dropped() -> None:
    """They must not wrap around or be clamped onto the last row."""
    model = golden("v3-dense-only")
    empty = _empty(model)
    before = Cache(jnp.ones_like(empty.rows), None, counts(empty.capacity - 2, 0))
    _, _, after = step_of(model.config, FLOAT32)(
        model.params, before, jnp.asarray(model.tokens[:, :9]), counts(4, 0)
    )  # fmt: skip
    same = np.asarray(after.rows == 1).all(axis=(0, 3))
    expected = np.ones_like(same)
    expected[0, -2:] = False
    np.testing.assert_array_equal(same, expected)


@pytest.mark.parametrize("name", CASES)
def test_rolling_back_leaves_no_trace(name: str) -> None:
    """Draft up to SPARE tokens, forget them, go on: the very bits of a sequence that was never drafted."""
    model = golden(name)
    step, total = step_of(model.config, FLOAT32), model.tokens.shape[1]
    random = rng(11)
    for _ in range(4):
        start, drafted = int(random.integers(1, 10)), random.integers(0, SPARE + 1, 2)
        _, _, cache = step(model.params, _empty(model), jnp.asarray(model.tokens[:, :9]), counts(start, start))
        wrong = jnp.asarray(random.integers(0, 128, (2, 9)), jnp.int32)
        _, _, ahead = step(model.params, cache, wrong, counts(*drafted))
        back = rollback(ahead, counts(*drafted))
        np.testing.assert_array_equal(back.length, cache.length)
        rest = jnp.asarray(model.tokens[:, start : start + 9])
        expected, _, _ = step(model.params, cache, rest, counts(9, 9))
        found, _, _ = step(model.params, back, rest, counts(9, 9))
        np.testing.assert_array_equal(found, expected, err_msg=f"start {start}, drafted {drafted}, seed {SEED}")
    # At the very end of the cache there is still room for SPARE drafts.
    stepper = Stepper(model, _empty(model))
    feed(model.tokens, [total, total], [], stepper)
    assert stepper.cache.capacity - total >= SPARE
    drafts = jnp.asarray(random.integers(0, 128, (2, 9)), jnp.int32)
    eight, _, _ = step(model.params, stepper.cache, drafts, counts(SPARE, SPARE))
    longer = np.concatenate([model.tokens, np.asarray(drafts)[:, :SPARE]], axis=1)
    if name == "v3-dense-only":  # no routing that random tokens could bring near a tie
        assert worst(eight[:, :SPARE], one_shot(model, longer)[0][:, total:]) <= BOUND


@pytest.mark.parametrize("name", ["v3-float32", pytest.param("v2-group", marks=pytest.mark.full)])
def test_extract_insert_elsewhere_go_on(name: str) -> None:
    """Slot 1 of 2 moves into slot 0 of a used cache of another capacity (two key blocks), and goes on there."""
    model = golden(name)
    stepper = Stepper(model, _empty(model))
    feed(model.tokens, [9, 13], [], stepper)
    state = extract(stepper.cache, 1)
    assert (state.length, state.arrays["rows"].shape[1]) == (13, 13)

    other = _empty(model, 2, ROW_BLOCK + 20)
    assert other.capacity == 2 * ROW_BLOCK
    dirty = np.random.default_rng(SEED).standard_normal(other.rows.shape, np.float32)
    other = Cache(jnp.asarray(dirty), None, counts(300, 2))
    moved = insert(other, 0, state)
    np.testing.assert_array_equal(moved.length, [13, 2])
    np.testing.assert_array_equal(moved.rows[:, 1], dirty[:, 1])
    again = extract(moved, 0)
    np.testing.assert_array_equal(again.arrays["rows"], state.arrays["rows"])

    tokens = jnp.asarray(model.tokens[::-1, 13:22])
    logits, _, _ = step_of(model.config, FLOAT32)(model.params, moved, tokens, counts(9, 0))
    assert worst(logits[0], _reference(name)[0][1, 13:22]) <= BOUND


def test_insert_refuses() -> None:
    """A state of another version, model, dtype or capacity."""
    model = golden("v3-dense-only")
    stepper = Stepper(model, _empty(model))
    feed(model.tokens, [9, 9], [], stepper)
    state = extract(stepper.cache, 0)
    tiny = init_cache(model.config, FLOAT32, 1, 0)
    tiny = dataclasses.replace(tiny, rows=tiny.rows[:, :, :8])
    bfloat16 = init_cache(model.config, Numerics(), 1, 24)
    other_model = init_cache(golden("v3-float32").config, FLOAT32, 1, 24)
    for cache, bad, message in (
        (stepper.cache, dataclasses.replace(state, version=1), "expected version 2, found 1"),
        (stepper.cache, dataclasses.replace(state, length=8), r"expected float32 \(2, 8, 40\)"),
        (bfloat16, state, "expected int16"),
        (other_model, state, r"\(3, 9, 40\)"),
        (tiny, state, "9 tokens do not fit a cache of 8"),
    ):
        with pytest.raises(InputError, match=message):
            insert(cache, 0, bad)


def test_mtp_any_chunking() -> None:
    """The MTP module, one-shot == any steps, on hidden states that come from one step of the main model."""
    model = golden("v3-mtp")
    _, hidden, _ = one_shot(model, model.tokens, FORMS["naive"])
    reference = one_shot_draft(model, hidden, model.tokens, FORMS["naive"])
    scale, total = np.abs(reference).max(), model.tokens.shape[1] - 1
    draft = draft_of(model.config, FLOAT32)
    padded = jnp.pad(hidden, ((0, 0), (0, max(WIDTHS)), (0, 0)), constant_values=7.0)

    @seed(SEED)
    @settings(max_examples=8, deadline=None, database=None)
    @given(any_chunks(2), st.integers(1, total))
    def check(chunks: list[Chunk], shorter: int) -> None:
        cache = init_cache(model.config, FLOAT32, 2, total, draft=True)

        def take(at: list[int], tokens: jax.Array, n_new: jax.Array) -> jax.Array:
            nonlocal cache
            width = tokens.shape[1]
            here = jnp.stack([padded[b, a : a + width] for b, a in enumerate(at)])
            logits, _, cache = draft(model.params, cache, here, tokens, n_new)
            return logits

        lengths = [total, shorter]
        logits = feed(model.tokens[:, 1:], lengths, chunks, take)
        for b, length in enumerate(lengths):
            assert np.abs(logits[b] - reference[b, :length]).max() / scale <= BOUND, (SEED, b)

    check()


@pytest.mark.parametrize("name", ["v3-float32", pytest.param("v2-lite", marks=pytest.mark.full)])
def test_prompt_across_key_blocks(name: str) -> None:
    """300 tokens lie in two key blocks: equal to the emulator, to other cuts, and to a cache of more blocks.

    The tokens are fixed: drawn afresh, one day in many a routing decision would be nearly tied.
    """
    model = golden(name)
    tokens = np.random.default_rng(5).integers(0, model.config.vocab_size, (1, 300)).astype(np.int32)
    logits, _, cache = one_shot(model, tokens, FORMS["naive"])
    assert cache.capacity == 2 * ROW_BLOCK
    weights, config = emulated(name)
    expected, _ = em.model(tokens[0], weights, config, policy=em.PLAIN)
    assert worst(logits[0], expected) <= BOUND
    for capacity, form in ((300, "absorbed"), (700, "absorbed")):
        stepper = Stepper(model, _empty(model, 1, capacity), FORMS[form])
        parts = [
            np.asarray(stepper([at], jnp.asarray(np.resize(tokens[:, at : at + 130], (1, 130))), counts(n)))[:, :n]
            for at, n in ((0, 130), (130, 130), (260, 40))
        ]
        assert stepper.cache.capacity == -(-(capacity + SPARE) // ROW_BLOCK) * ROW_BLOCK
        assert worst(np.concatenate(parts, axis=1), logits) <= BOUND


@pytest.mark.parametrize("name", ["v3-dense-only", pytest.param("v3-float32", marks=pytest.mark.full)])
def test_generate_batch_equals_alone(name: str) -> None:
    """Greedy and drawn, whatever else is in the batch and however the prompt is cut."""
    model = golden(name)
    engine = Engine(model.config, model.params, FLOAT32)
    prompts = [model.tokens[0, :17].tolist(), model.tokens[1, :5].tolist()]
    for sampling in (Sampling(), Sampling(temperature=0.8, top_p=0.9, top_k=40, seed=SEED)):
        together, _ = engine.generate(prompts, 6, sampling)
        assert [len(o.ids) for o in together] == [6, 6]
        assert [o.finish_reason for o in together] == ["length", "length"]
        for i, prompt in enumerate(prompts):
            alone, _ = engine.generate([prompt], 6, sampling, max_length=23, first_sequence=i, chunk=16)
            assert alone[0] == together[i], (SEED, sampling)


def test_sampling_depends_on_seed_and_sequence() -> None:
    """Equal prompts as different sequences, or another seed, give other draws; the same again gives the same."""
    model = golden("v3-dense-only")
    engine = Engine(model.config, model.params, FLOAT32)
    prompt = model.tokens[0, :5].tolist()
    drawn = [engine.generate([prompt, prompt], 6, Sampling(temperature=2.0, seed=s))[0] for s in (SEED, SEED, SEED + 1)]
    assert drawn[0] == drawn[1]
    assert len({tuple(o.ids) for outputs in drawn[1:] for o in outputs}) == 4


@pytest.mark.parametrize("name", ["v3-dense-only", pytest.param("v2-group", marks=pytest.mark.full)])
def test_greedy_is_the_argmax_of_full_scoring(name: str) -> None:
    """Every token generated is the most likely one when the whole sequence so far is scored from nothing."""
    model = golden(name)
    engine = Engine(model.config, model.params, FLOAT32)
    prompt = model.tokens[0, :11].tolist()
    new = 8
    (output,), timing = engine.generate([prompt], new, max_length=24)
    last = step_of(model.config, FORMS["naive"], "last")
    sequence = list(prompt)
    for token in output.ids:
        padded = jnp.asarray(np.resize(sequence, (1, 24)), jnp.int32)
        logits, _, _ = last(model.params, _empty(model, 1), padded, counts(len(sequence)))
        assert int(jnp.argmax(logits[0])) == token
        sequence.append(token)
    assert len(timing.token_s) == new - 1

    # A stop id ends the sequence and is not part of it; so does the end of the room.
    stop = output.ids[3]
    (stopped,), _ = engine.generate([prompt], new, stop=[stop], max_length=24)
    assert (stopped.ids, stopped.finish_reason) == (output.ids[: output.ids.index(stop)], "stop")
    (cut,), _ = engine.generate([prompt], new, max_length=11 + 2)
    assert (cut.ids, cut.finish_reason) == (output.ids[:2], "length")


def test_score_equals_one_shot() -> None:
    """Engine.score in chunks, the MTP module's logits too."""
    model = golden("v3-mtp")
    logits, drafts = Engine(model.config, model.params, FLOAT32).score(model.tokens[:, :17], mtp=True, chunk=8)
    _, hidden, _ = one_shot(model, model.tokens, FORMS["naive"])
    assert worst(logits, _reference("v3-mtp")[0][:, :17]) <= BOUND
    assert worst(drafts, one_shot_draft(model, hidden, model.tokens, FORMS["naive"])[:, :16]) <= BOUND


@pytest.mark.parametrize("form", ["naive", "absorbed"])
def test_what_lies_beyond_a_slots_length_does_not_matter(form: str) -> None:
    """Rows that a former sequence left behind, NaN too, change no bit of the next one's logits."""
    model = golden("v3-dense-only")
    tokens = jnp.asarray(model.tokens[:, :8])
    step = step_of(model.config, FORMS[form], "all")
    clean = step(model.params, _empty(model), tokens, counts(8, 8))[0]
    stale = _empty(model)
    stale = dataclasses.replace(stale, rows=jnp.full_like(stale.rows, jnp.nan))
    np.testing.assert_array_equal(step(model.params, stale, tokens, counts(8, 8))[0], clean)
