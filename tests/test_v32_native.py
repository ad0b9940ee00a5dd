"""V3.2's native numerics against tests/emulator_v32.py, which was written from the spec without sight of this code.

Operators on equal inputs first, where a difference tells its place; then layers and the whole model as medians over
many short rows, the emulator attending to the keys that this code chose: one key that changes sets costs far more than
the rounding that made it change, so sets are compared on their own (spec V3 11).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import emulator as em
import emulator_v32 as v32
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SEED, counts, draft_of, emulated, golden, relative_norm, rng, step_of, worst
from helpers_v32 import recorded, run_recorded
from test_emulator_v32 import WRONG
from test_native import FAR, MEDIAN, _bf16, _jax, _numpy

from dsjax.cache import Cache
from dsjax.cache.per_token import index_format, init_cache, row_format
from dsjax.layers.attend import Call
from dsjax.layers.indexer import index_scores, lightning_indexer
from dsjax.layers.mla import Attention, mla_rope_table
from dsjax.layers.token_indexer import TokenIndexer
from dsjax.numerics import Numerics
from quant.rows import LATENT_GROUP, RowFormat

ROWS, TOKENS = 16, 24  # twice index_topk
TINY = np.finfo(np.float32).tiny
"""Under the largest score of a query whose scores are all zero: nothing is then apart from the cut."""

LATENT = RowFormat("fp8", 576, 64, LATENT_GROUP, wide_scales=True)
KEY = RowFormat("fp8", 128, group=128, wide_scales=True)


def _numerics(name: str, kv: str = "auto") -> Numerics:
    return Numerics("native", kv=kv).for_checkpoint(golden(name).config)


# --- rows ------------------------------------------------------------------------------------------------------------


def test_row_sizes() -> None:
    """Those of DeepSeek's production layout (spec V3 4.4)."""
    assert (LATENT.nbytes, KEY.nbytes) == (656, 132)
    config = golden("v32-fp8").config
    assert row_format(config, Numerics("native")) == RowFormat("fp8", 144, 16, 128, wide_scales=True)
    assert index_format(config, Numerics("native")) == KEY
    assert row_format(config, Numerics("native", kv="bfloat16")).kind == "bfloat16"
    assert index_format(config, Numerics("native", kv="bfloat16")) == KEY
    assert row_format(golden("v3-mtp").config, Numerics("native")).kind == "bfloat16"


@pytest.mark.parametrize("row", [LATENT, KEY, RowFormat("fp8", 144 + 16, 16, 128, wide_scales=True)])
def test_every_code_round_trips(row: RowFormat) -> None:
    """All 254 finite E4M3 codes at every scale that occurs, and all bfloat16 bits: rows -> values -> the same rows."""
    finite = np.array([c for c in range(256) if c & 0x7F != 0x7F], np.uint8)
    powers = np.arange(-22, 21, dtype=np.int8)
    groups = -(-row.nope // row.group)
    codes = np.resize(finite, (len(powers), 2, row.nope))
    codes[:, 1] = np.roll(codes[:, 1], 127, -1)
    codes[..., :: row.group] = 0x7E  # 448, which keeps each group's scale
    codes[:, 1, :: row.group] = 0xFE
    scales = np.exp2(powers.astype(np.float32))[:, None, None] * np.ones((1, 2, groups), np.float32)
    bits = rng(70).integers(0, 0x7F80, (len(powers), 2, row.rope)).astype("<u2")
    rows = np.concatenate([codes, bits.view(np.uint8), scales.astype("<f4").view(np.uint8)], -1)
    assert rows.shape[-1] == row.nbytes
    values = jax.jit(row.decode)(jnp.asarray(rows))
    expected = em.e4m3_decode(codes) * scales.repeat(row.group, -1)[..., : row.nope]
    np.testing.assert_array_equal(_numpy(values)[..., : row.nope], expected)
    np.testing.assert_array_equal(np.asarray(values)[..., row.nope :].view(np.uint16), bits)
    np.testing.assert_array_equal(np.asarray(jax.jit(row.encode)(values)).view(np.uint8), rows)


@pytest.mark.parametrize("row", [LATENT, KEY, RowFormat("fp8", 144 + 16, 16, 128, wide_scales=True)])
def test_row_bytes(row: RowFormat) -> None:
    """The emulator's codes and scales, byte for byte; the rotary channels untouched; zeros have the floor's scale."""
    x = _bf16(40, row.channels, key=71) * np.exp2(rng(72).integers(-20, 10, (40, 1))).astype(np.float32)
    x[0] = 0
    rows = np.asarray(jax.jit(row.encode)(_jax(x))).view(np.uint8)
    codes, scales = v32.latent_quant(x[:, : row.nope])
    end = row.nope + 2 * row.rope
    np.testing.assert_array_equal(rows[:, : row.nope], codes.view(np.uint8))
    np.testing.assert_array_equal(rows[:, end:], np.ascontiguousarray(scales, "<f4").view(np.uint8))
    np.testing.assert_array_equal(rows[:, row.nope : end], em.f32(x[:, row.nope :]).astype(em.BF16).view(np.uint8))
    expected = np.concatenate([v32.latent_dequant(codes, scales), x[:, row.nope :]], -1)
    np.testing.assert_array_equal(_numpy(jax.jit(row.decode)(jnp.asarray(rows))), expected)


# --- the indexer -----------------------------------------------------------------------------------------------------


@lru_cache
def _indexed(name: str) -> tuple[Any, ...]:
    """The first layer's indexer on equal inputs: cached key rows, query values, head weights, choice; the emulator's
    inputs, and its outcome by row."""
    model, (weights, raw) = golden(name), emulated(name)
    config, numerics = model.config, _numerics(name)
    layer = em.scope(weights, "model.layers.0.self_attn.indexer.")
    x, low = _bf16(ROWS, TOKENS, config.hidden_size, key=73), _bf16(ROWS, TOKENS, config.q_lora_rank, key=74)
    indexer = TokenIndexer(config, numerics, model.params["dense"]["indexer"])

    @jax.jit
    def run(x: jax.Array, low: jax.Array) -> Any:
        cache, call = _new(config, numerics, x)
        cache = indexer.remember(x, cache, (0, 0), call)
        q, w = indexer.queries(x, low, 0, call)
        return cache.index[0, :, :TOKENS], q, w, indexer.choose(x, low, cache, (0, 0), call)

    found = [np.asarray(a) for a in run(_jax(x), _jax(low))]
    return *found, x, low, layer, raw


def _new(config: Any, numerics: Numerics, x: jax.Array) -> tuple[Cache, Call]:
    """An empty cache of one layer, and the call of a step that takes all of x [B, T, D]."""
    cache = init_cache(config, numerics, x.shape[0], x.shape[1], draft=True)
    positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    return cache, Call(positions, jnp.ones(x.shape[:2], bool), mla_rope_table(config, positions), jnp.int32(1))


@pytest.mark.parametrize("name", ["v32-fp8", "v32-hf"])
def test_index_keys_and_queries(name: str) -> None:
    """As cached: the emulator's codes and scales but where a bfloat16 before them falls the other way. Head weights are
    not rounded at all."""
    rows, q, w, _, x, low, layer, raw = _indexed(name)
    positions, d = np.arange(TOKENS), golden(name).config.indexer.head_dim
    same_codes, same_scales, same_q = [], [], []
    for b in range(ROWS):
        codes, scales = v32.index_key(x[b], layer, raw, positions, em.policy_for(raw))
        same_codes.append(rows[b, :, :d] == codes.view(np.int8))
        same_scales.append(np.ascontiguousarray(rows[b, :, d:]).view("<f4")[:, 0] == scales)
        q_codes, q_scales = v32.index_query(low[b], layer, raw, positions, em.policy_for(raw))
        expected = em.e4m3_decode(q_codes) * q_scales[..., None]
        same_q.append(_numpy(q[b]) == expected)
        assert worst(w[b], v32.index_weights(x[b], layer, np.ones_like(q_scales), d)) <= 1e-6
    shares = np.mean(same_codes), np.mean(same_scales), np.mean(same_q)
    print(name, "equal key codes, key scales, query values:", *shares)
    assert min(shares) >= 0.999, SEED


@pytest.mark.parametrize("name", ["v32-fp8", "v32-hf"])
def test_index_scores_of_equal_codes(name: str) -> None:
    """The product and the choice, on the emulator's own codes: scores to float32's summation order, sets exact."""
    _, _, _, _, x, low, layer, raw = _indexed(name)
    row = index_format(golden(name).config, _numerics(name))
    for b in range(3):
        expected = v32.lightning_indexer(x[b], low[b], layer, raw, np.arange(TOKENS), em.policy_for(raw))
        codes, scales = v32.index_key(x[b], layer, raw, np.arange(TOKENS), em.policy_for(raw))
        q_codes, q_scales = v32.index_query(low[b], layer, raw, np.arange(TOKENS), em.policy_for(raw))
        q = _jax(em.e4m3_decode(q_codes) * q_scales[..., None])[None]
        w = jnp.asarray(v32.index_weights(x[b], layer, np.ones_like(q_scales), codes.shape[-1]))[None]
        bytes_ = np.concatenate([codes.view(np.uint8), np.asarray(scales, "<f4")[:, None].view(np.uint8)], -1)
        found = np.asarray(index_scores(q, w, row.decode(jnp.asarray(bytes_[None])), rounded=False))[0]
        visible = np.tri(TOKENS, dtype=bool)
        error = worst(found[visible], expected.scores[visible])
        assert error <= 1e-6
        keys = jnp.asarray(np.pad(bytes_, ((0, 32 - TOKENS), (0, 0)))[None, None])
        seen = jnp.arange(1, TOKENS + 1, dtype=jnp.int32)[None]
        chosen = np.asarray(lightning_indexer(q, w, keys, 0, seen, 12, row, rounded=False))[0]
        clear = expected.margin > 2e-6 * np.abs(found).max()
        assert clear.mean() > 0.9
        assert (expected.recall(chosen)[clear] == 1).all() and (expected.disagreement(chosen)[clear] == 0).all()


@pytest.mark.parametrize("name", ["v32-fp8", "v32-hf"])
def test_chosen_sets(name: str) -> None:
    """From the layer's inputs: all keys are the emulator's but those within a near tie of the cut."""
    _, _, _, chosen, x, low, layer, raw = _indexed(name)
    recall, apart, wrong = [], [], {what: [] for what in ("no hadamard", "interleaved rope", "float32 scales")}
    for b in range(ROWS):
        args = x[b], low[b], layer, raw, np.arange(TOKENS), em.policy_for(raw)
        expected = v32.lightning_indexer(*args)
        largest = np.abs(np.where(expected.scores > -np.inf, expected.scores, 0)).max(-1)
        recall.append(expected.recall(chosen[b]))
        apart.append(expected.disagreement(chosen[b]) / np.maximum(largest, TINY))
        for what, out in wrong.items():
            with pytest.MonkeyPatch.context() as patch:
                for function, other in WRONG[what].items():
                    patch.setattr(v32, function, other)
                out.append(v32.lightning_indexer(*args).recall(chosen[b]))
    controls = {what: float(np.mean(out)) for what, out in wrong.items()}
    print(name, "recall", np.mean(recall), "farthest from the cut", np.max(apart), "wrong choices'", controls)
    assert np.mean(recall) >= 0.999 and np.max(apart) <= 1e-2
    assert controls["interleaved rope"] < 0.98 and max(controls.values()) < np.mean(recall)


# --- one layer -------------------------------------------------------------------------------------------------------


def _wrong(what: str, patch: pytest.MonkeyPatch) -> None:
    for function, other in WRONG[what].items():
        patch.setattr(v32, function, other)


def _medians(found: np.ndarray, expected: list[np.ndarray]) -> tuple[float, float]:
    errors = [relative_norm(a, b) for a, b in zip(found, expected, strict=True)]
    return float(np.median(errors)), max(errors)


@pytest.mark.parametrize("kv", ["auto", "bfloat16"])
def test_attention(kv: str) -> None:
    """One layer over the keys that it chose: near the emulator with, or without, the latent's rounding through FP8, and
    far from the other, from the naive form and from dense attention."""
    name = "v32-fp8"
    model, (weights, raw) = golden(name), emulated(name)
    config, numerics, policy = model.config, _numerics(name, kv), em.policy_for(raw)
    layer = em.scope(weights, "model.layers.0.self_attn.")
    x = np.stack([_bf16(TOKENS, config.hidden_size, key=80 + i) for i in range(ROWS)])
    dense = model.params["dense"]

    @jax.jit
    def run(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        cache, call = _new(config, numerics, x)
        out, cache = Attention(config, numerics, dense["attention"], dense["indexer"])(x, cache, (0, 0), call)
        return out, cache.rows[0, :, :TOKENS]

    with recorded() as chosen:
        found, rows = (np.asarray(a) for a in run(_jax(x)))
        jax.effects_barrier()
    everything = np.broadcast_to(np.arange(TOKENS), (TOKENS, TOKENS))

    def emulate(
        form: str = "absorbed", forced: Callable[[int], np.ndarray] = lambda b: chosen[0][b]
    ) -> list[np.ndarray]:
        return [v32.mla(r, layer, raw, np.arange(TOKENS), form, policy, forced(b))[0] for b, r in enumerate(x)]

    rounded = emulate()
    with pytest.MonkeyPatch.context() as patch:
        _wrong("latent not rounded", patch)
        unrounded = emulate()
    right, other = (rounded, unrounded) if kv == "auto" else (unrounded, rounded)
    median, most = _medians(_numpy(found), right)
    wrong = other, emulate(forced=lambda _: everything), emulate("naive")
    far = [_medians(_numpy(found), e)[0] for e in wrong]
    print("attention", kv, median, most, "other cache, dense, naive", far)
    assert median <= MEDIAN and most <= 2e-2
    assert min(far[:2]) > FAR
    assert far[2] > 3 * MEDIAN  # of FP8 latents, the naive form's products are of the same codes
    latent = np.stack([em.linear(r, em.stored(layer, "kv_a_proj_with_mqa.weight"), policy)[:, :128] for r in x])
    latent = em.rms_norm(latent, layer["kv_a_layernorm.weight"], em.LATENT_EPS, policy)
    codes, scales = v32.latent_quant(latent)
    if kv == "auto":
        assert (rows[..., :128] == codes.view(np.int8)).mean() >= 0.999
        assert (np.ascontiguousarray(rows[..., -4:]).view("<f4") == scales).mean() >= 0.999
    else:
        assert (rows[..., :128] == latent.astype(em.BF16).view(np.int16)).mean() >= 0.999


def test_bfloat16_checkpoint() -> None:
    """UE8M0 belongs to V3.2, not to its weights: a BF16 copy rounds latent and indexer through FP8 all the same."""
    name = "v32-hf"
    model, (weights, raw) = golden(name), emulated(name)
    config, numerics = model.config, _numerics(name)
    assert config.quantization is None and "quantization_config" not in raw
    layer, dense = em.scope(weights, "model.layers.0.self_attn."), model.params["dense"]
    x = np.stack([_bf16(TOKENS, config.hidden_size, key=100 + i) for i in range(ROWS)])

    @jax.jit
    def run(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        cache, call = _new(config, numerics, x)
        out, cache = Attention(config, numerics, dense["attention"], dense["indexer"])(x, cache, (0, 0), call)
        return out, cache

    with recorded() as chosen:
        out, cache = run(_jax(x))
        jax.effects_barrier()
    for rows, row in ((cache.rows, row_format(config, numerics)), (cache.index, index_format(config, numerics))):
        scales = np.ascontiguousarray(np.asarray(rows)[0, :, :TOKENS, -4:]).view(np.uint32)
        assert (row.kind, rows.dtype) == ("fp8", jnp.int8)
        assert (scales & 0x7FFFFF == 0).all() and (scales > 0).all()

    def median() -> float:
        forced = chosen[0]
        expected = [v32.mla(r, layer, raw, np.arange(TOKENS), forced=forced[b])[0] for b, r in enumerate(x)]
        return _medians(_numpy(out), expected)[0]

    right = median()
    with pytest.MonkeyPatch.context() as patch:
        _wrong("latent not rounded", patch)
        unrounded = median()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(v32, "latent_quant", lambda c: em.act_quant(c, "float32"))
        wide = median()
    print("bfloat16 checkpoint", right, "unrounded", unrounded, "float32 scales", wide)
    assert right <= MEDIAN
    assert min(unrounded, wide) > 1e-2


# --- the whole model -------------------------------------------------------------------------------------------------

COUNTS = (ROWS, pytest.param(128, marks=pytest.mark.full))


@lru_cache
def _run(name: str, count: int, kv: str = "auto") -> tuple[np.ndarray, Any, Any, dict[int, np.ndarray], np.ndarray]:
    """Logits, hidden, cache and chosen keys of `count` random rows in one step; the rows."""
    model = golden(name)
    tokens = rng(90).integers(0, model.config.vocab_size, (count, TOKENS)).astype(np.int32)
    return *run_recorded(model, tokens, _numerics(name, kv)), tokens


def _model(name: str, tokens: np.ndarray, chosen: dict[int, np.ndarray] | None, **choices: Any) -> list[np.ndarray]:
    """The emulator's logits of each row, over the keys given if any."""
    weights, raw = emulated(name)
    layers = range(raw["num_hidden_layers"])
    return [
        v32.model(row, weights, raw, forced=None if chosen is None else [chosen[i][b] for i in layers], **choices)[0]
        for b, row in enumerate(tokens)
    ]


@pytest.mark.parametrize("count", COUNTS)
def test_model(count: int) -> None:
    """Over the keys that this code chose; over the emulator's own; and far from every wrong choice."""
    name = "v32-fp8"
    logits, _, _, chosen, tokens = _run(name, count)
    (median, most), (free, worst_free) = (_medians(logits, _model(name, tokens, c)) for c in (chosen, None))
    some, wrong = tokens[:5], ({"policy": em.PLAIN}, {"mla": "naive"}, {"scale_fmt": "float32"})
    far = {str(choice): _medians(logits[:5], _model(name, some, chosen, **choice))[0] for choice in wrong}
    for what in ("no hadamard", "interleaved rope", "latent not rounded"):
        with pytest.MonkeyPatch.context() as patch:
            _wrong(what, patch)
            far[what] = _medians(logits[:5], _model(name, some, None))[0]
    print(f"median {median:.1e}, worst {most:.1e}; free {free:.1e}, {worst_free:.1e}; {far}; {SEED}")
    assert median <= MEDIAN and most <= 0.1
    assert free <= MEDIAN
    assert min(far.values()) > FAR


@pytest.mark.parametrize("count", COUNTS)
def test_chosen_sets_in_every_layer(count: int) -> None:
    """Of rows whose logits agree, all layers chose the emulator's keys, but those within a near tie of the cut."""
    name = "v32-fp8"
    logits, _, _, chosen, tokens = _run(name, count)
    weights, raw = emulated(name)
    recall, apart = [], []
    for b, row in enumerate(tokens):
        layers: list[v32.Selection] = []
        expected, _ = v32.model(row, weights, raw, forced=[c[b] for _, c in sorted(chosen.items())], selections=layers)
        if relative_norm(logits[b], expected) > MEDIAN:
            continue
        for i, selection in enumerate(layers):
            largest = np.abs(np.where(selection.scores > -np.inf, selection.scores, 0)).max(-1)
            recall.append(selection.recall(chosen[i][b]).mean())
            apart.append((selection.disagreement(chosen[i][b]) / np.maximum(largest, TINY)).max())
    print("rows", len(recall) // 2, "of", count, "recall", np.mean(recall), "farthest from the cut", np.max(apart))
    assert len(recall) > count
    assert np.mean(recall) >= 0.999 and np.max(apart) <= 1e-2


@pytest.mark.full
def test_bfloat16_latents() -> None:
    """--kv bfloat16 is the emulator without the latent's rounding, and far from it with."""
    name = "v32-fp8"
    logits, _, _, chosen, tokens = _run(name, ROWS, "bfloat16")
    other = _medians(logits, _model(name, tokens, chosen))[0]
    with pytest.MonkeyPatch.context() as patch:
        _wrong("latent not rounded", patch)
        median, most = _medians(logits, _model(name, tokens, chosen))
    print(f"bfloat16 latents: median {median:.1e}, worst {most:.1e}; FP8 {other:.1e}")
    assert median <= MEDIAN
    assert other > FAR


def test_mtp(monkeypatch: pytest.MonkeyPatch) -> None:
    """The MTP module and its indexer, both sides on hidden states of this code."""
    name = "v32-fp8"
    model, (weights, raw) = golden(name), emulated(name)
    _, hidden, _, _, tokens = _run(name, ROWS)
    cache = init_cache(model.config, _numerics(name), ROWS, TOKENS, draft=True)
    draft = draft_of(model.config, _numerics(name))
    given, following = hidden[:, :-1], jnp.asarray(tokens[:, 1:])
    logits, _, _ = draft(model.params, cache, given, following, counts(*[TOKENS - 1] * ROWS))
    monkeypatch.setattr(em, "decoder_layer", lambda *arguments: v32.decoder_layer(*arguments)[:2])
    expected = [em.mtp(h, t[1:], weights, raw)[0] for h, t in zip(_numpy(given), tokens, strict=True)]
    _wrong("no hadamard", monkeypatch)
    far = [em.mtp(h, t[1:], weights, raw)[0] for h, t in zip(_numpy(given), tokens, strict=True)]
    median, most = _medians(np.asarray(logits), expected)
    other = _medians(np.asarray(logits), far)[0]
    print(f"mtp: median {median:.1e}, worst {most:.1e}; no hadamard {other:.1e}")
    assert median <= MEDIAN
    assert other > FAR


def test_decode_equals_prefill() -> None:
    """Token by token, dense up to index_topk and sparse from there == one step, sparse throughout: both absorbed."""
    name = "v32-fp8"
    logits, _, cache, _, tokens = _run(name, ROWS)
    model = golden(name)
    step, own = step_of(model.config, _numerics(name)), init_cache(model.config, _numerics(name), ROWS, TOKENS)
    found = []
    for t in range(TOKENS):
        one, _, own = step(model.params, own, jnp.asarray(tokens[:, t : t + 1]), counts(*[1] * ROWS))
        found.append(np.asarray(one))
    steps = np.concatenate(found, axis=1)
    errors = np.linalg.norm(steps - logits, axis=-1) / np.linalg.norm(logits, axis=-1)
    same = [(np.asarray(a)[:, :, :TOKENS] == np.asarray(b)[:, :, :TOKENS]).mean() for a, b in
            ((own.rows, cache.rows), (own.index, cache.index))]  # fmt: skip
    print(f"decode: median {np.median(errors):.1e}, of short contexts {np.median(errors[:, :12]):.1e}; bytes", same)
    assert np.median(errors) <= MEDIAN and np.median(errors[:, :12]) <= MEDIAN
    assert min(same) >= 0.98
