"""The R1 distills, Qwen2 and Llama: laws of the step function, frequencies, heads, rounding, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from damage import Capture, edit_json, generate_arguments, put, refused, refused_everywhere, rewrite, score_arguments
from helpers import (
    FLOAT32,
    GOLDENS,
    LOOKED_AT,
    SEED,
    Golden,
    counts,
    golden,
    one_shot,
    relative_norm,
    rng,
    step_of,
    worst,
)
from helpers_laws import Chunk, Stepper, any_chunks, feed
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from dsjax.cache import SPARE, Cache, extract, insert, rollback
from dsjax.cache.per_token import init_cache
from dsjax.cache.rows import ROW_BLOCK, row_block
from dsjax.cli.main import main
from dsjax.config import DenseConfig, Llama3Rope, load_config
from dsjax.generate import Engine
from dsjax.layers import attend, gqa
from dsjax.layers.rope import llama3_frequencies
from dsjax.models import dense, family
from dsjax.numerics import Numerics
from dsjax.params import abstract_params, accounting, tree_bytes
from quant import QArray

BOUND = 1e-5  # of the largest logit, between runs of our own (design section 6)
BFLOAT16 = 2e-2
"""Median of the tokens' relative norms, measured 0.6e-2 to 1.1e-2; test_parity_live says where they come from."""
PLAIN, NATIVE = Numerics("plain"), Numerics("native")
CASES = (
    "qwen2-untied",  # biases
    "llama-llama3",  # heads wider than hidden / heads
    pytest.param("qwen2-tied", marks=pytest.mark.full),
    pytest.param("llama-hf", marks=pytest.mark.full),
)


@lru_cache
def _reference(name: str) -> tuple[np.ndarray, Cache]:
    """All tokens of a golden in one step: logits [B, T, V] and the cache."""
    logits, _, cache = one_shot(golden(name), golden(name).tokens)
    return logits, cache


def _config(name: str) -> DenseConfig:
    config = golden(name).config
    assert isinstance(config, DenseConfig)
    return config


def _empty(model: Golden, batch: int = 2, max_length: int = 0, numerics: Numerics = FLOAT32) -> Cache:
    return init_cache(model.config, numerics, batch, max_length or model.tokens.shape[1])


# --- however a sequence is cut, batched, moved or rolled back, it is the same ----------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_any_chunking(name: str) -> None:
    """One-shot == any steps, padded ones and idle slots included, with prompts of unequal lengths."""
    model, (reference, cache) = golden(name), _reference(name)
    total, scale = model.tokens.shape[1], np.abs(reference).max()

    @seed(SEED)
    @settings(max_examples=12, deadline=None, database=None)
    @given(any_chunks(2), st.integers(1, total))
    def check(chunks: list[Chunk], shorter: int) -> None:
        stepper, lengths = Stepper(model, _empty(model)), [total, shorter]
        logits = feed(model.tokens, lengths, chunks, stepper)
        for b, length in enumerate(lengths):
            assert np.abs(logits[b] - reference[b, :length]).max() / scale <= BOUND, (SEED, b)
            state, expected = extract(stepper.cache, b), np.asarray(cache.rows[:, b, :length])
            assert worst(state.arrays["rows"], expected) <= BOUND

    check()


@pytest.mark.parametrize("name", CASES)
def test_chunks_of_one_width(name: str) -> None:
    """Token by token, and in chunks of a width of the day."""
    model = golden(name)
    total = model.tokens.shape[1]
    for width in (1, int(rng(70).integers(2, total))):
        stepper, parts = Stepper(model, _empty(model)), []
        for at in range(0, total, width):
            n = min(width, total - at)
            new = np.pad(model.tokens[:, at : at + n], ((0, 0), (0, width - n)))
            parts.append(np.asarray(stepper([at, at], jnp.asarray(new), counts(n, n)))[:, :n])
        assert worst(np.concatenate(parts, axis=1), _reference(name)[0]) <= BOUND, (SEED, width)


@pytest.mark.parametrize("name", CASES)
def test_batch_equals_alone(name: str) -> None:
    """Two prompts of unequal lengths in one step; the other does not show."""
    model, lengths = golden(name), (7, 3)
    rows, step = jnp.asarray(model.tokens[:, :9]), step_of(model.config, FLOAT32)
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
    empty = _empty(model)
    random = np.random.default_rng(SEED).standard_normal(empty.rows.shape, np.float32)
    before = dataclasses.replace(empty, rows=jnp.asarray(random), length=counts(5, 11))
    for width, n_new in ((1, (0, 1)), (9, (3, 0)), (9, (0, 9))):
        new = jnp.asarray(model.tokens[:, :width])
        _, _, after = step_of(model.config, FLOAT32)(model.params, before, new, counts(*n_new))
        old, now = np.asarray(before.rows).view(np.uint32), np.asarray(after.rows).view(np.uint32)
        for b, n in enumerate(n_new):
            start = int(before.length[b])
            written = np.zeros(old.shape[2], bool)
            written[start : start + n] = True
            np.testing.assert_array_equal(now[:, b, ~written], old[:, b, ~written])
            assert (now[:, b, written] != old[:, b, written]).any(axis=-1).all()
            assert int(after.length[b]) == start + n


@pytest.mark.parametrize("name", CASES)
def test_rolling_back_leaves_no_trace(name: str) -> None:
    """Draft up to SPARE tokens, forget them, go on: the very bits of a sequence that was never drafted."""
    model, random = golden(name), rng(71)
    step, total = step_of(model.config, FLOAT32), model.tokens.shape[1]
    for _ in range(4):
        start, drafted = int(random.integers(1, 10)), random.integers(0, SPARE + 1, 2)
        _, _, cache = step(model.params, _empty(model), jnp.asarray(model.tokens[:, :9]), counts(start, start))
        wrong = jnp.asarray(random.integers(0, 128, (2, 9)), jnp.int32)
        _, _, ahead = step(model.params, cache, wrong, counts(*drafted))
        back = rollback(ahead, counts(*drafted))
        rest = jnp.asarray(model.tokens[:, start : start + 9])
        expected, found = (step(model.params, c, rest, counts(9, 9))[0] for c in (cache, back))
        np.testing.assert_array_equal(found, expected, err_msg=f"start {start}, drafted {drafted}, seed {SEED}")
    # At the very end of the cache there is still room for SPARE drafts.
    stepper = Stepper(model, _empty(model))
    feed(model.tokens, [total, total], [], stepper)
    drafts = random.integers(0, 128, (2, 9)).astype(np.int32)
    found, _, _ = step(model.params, stepper.cache, jnp.asarray(drafts), counts(SPARE, SPARE))
    longer = np.concatenate([model.tokens, drafts[:, :SPARE]], axis=1)
    assert worst(found[:, :SPARE], one_shot(model, longer)[0][:, total:]) <= BOUND


@pytest.mark.parametrize("name", CASES)
def test_extract_insert_elsewhere_go_on(name: str) -> None:
    """Slot 1 of 2 moves into slot 0 of a used cache of another capacity (two key blocks), and goes on there."""
    model = golden(name)
    stepper = Stepper(model, _empty(model))
    feed(model.tokens, [9, 13], [], stepper)
    state = extract(stepper.cache, 1)
    config = _config(name)
    width = 2 * config.num_key_value_heads * config.head_dim  # a key and a value of each
    assert {k: a.shape for k, a in state.arrays.items()} == {"rows": (config.num_hidden_layers, 13, width)}

    other = _empty(model, 2, ROW_BLOCK + 20)
    dirty = np.random.default_rng(SEED).standard_normal(other.rows.shape, np.float32)
    moved = insert(dataclasses.replace(other, rows=jnp.asarray(dirty), length=counts(300, 2)), 0, state)
    np.testing.assert_array_equal(moved.length, [13, 2])
    np.testing.assert_array_equal(moved.rows[:, 1], dirty[:, 1])
    np.testing.assert_array_equal(extract(moved, 0).arrays["rows"], state.arrays["rows"])
    tokens = jnp.asarray(model.tokens[::-1, 13:22])
    logits, _, _ = step_of(model.config, FLOAT32)(model.params, moved, tokens, counts(9, 0))
    assert worst(logits[0], _reference(name)[0][1, 13:22]) <= BOUND


@pytest.mark.parametrize("name", CASES)
def test_what_lies_beyond_a_slots_length_does_not_matter(name: str) -> None:
    """Rows that a former sequence left behind, NaN too, change no bit of the next one's logits."""
    model = golden(name)
    new, clean, step = jnp.asarray(model.tokens[:, :9]), _empty(model), step_of(model.config, FLOAT32)
    results = []
    for cache in (clean, dataclasses.replace(clean, rows=jnp.full_like(clean.rows, jnp.nan))):
        first, _, cache = step(model.params, cache, new, counts(9, 4))
        second, _, _ = step(model.params, cache, new, counts(0, 9))
        results.append((first[0], first[1, :4], second[1]))
    for expected, found in zip(*results, strict=True):
        assert np.isfinite(expected).all()
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("numerics", [FLOAT32, pytest.param(NATIVE, marks=pytest.mark.full)], ids=["plain", "native"])
def test_blocks_of_queries_and_keys(numerics: Numerics, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks, those that no query sees skipped == all at once: slots of different lengths, one taking part of the
    step, one idle and unchanged bit for bit; stale NaN everywhere else."""
    model = golden("llama-llama3")
    bound = BOUND if numerics is FLOAT32 else 1e-3  # a flipped rounding shows
    rows = jnp.asarray(np.tile(model.tokens, (2, 1))[:, :24], jnp.int32)
    empty = _empty(model, 4, 40, numerics)
    nan = jnp.asarray(np.nan, jnp.float32) if numerics is FLOAT32 else jnp.int16(0x7FC0)
    empty = dataclasses.replace(empty, rows=jnp.full_like(empty.rows, nan))
    results = []
    for queries, keys in ((128, 256), (4, 8)):
        monkeypatch.setattr(attend, "QUERY_BLOCK", queries)
        for module in (attend, gqa):
            monkeypatch.setattr(module, "row_block", partial(row_block, most=keys))
        step = jax.jit(partial(dense.step, model.config, numerics, want="all"))
        _, _, cache = step(model.params, empty, rows[:, :12], counts(12, 3, 0, 9))
        logits, _, after = step(model.params, cache, rows[:, 12:], counts(12, 12, 0, 5))
        np.testing.assert_array_equal(after.rows[:, 2], empty.rows[:, 2])
        results.append([np.asarray(logits)[b, :n] for b, n in enumerate((12, 12, 0, 5)) if n])
    for one, other in zip(*results, strict=True):
        assert np.isfinite(other).all()
        assert worst(other, one) <= bound


def test_generate_and_score() -> None:
    """Batches as each alone; score in chunks as in one step."""
    model = golden("qwen2-untied")
    engine = Engine(model.config, model.params, FLOAT32)
    logits, drafts = engine.score(model.tokens[:, :17], chunk=8)
    assert drafts is None and worst(logits, _reference("qwen2-untied")[0][:, :17]) <= BOUND
    prompts = [model.tokens[0, :17].tolist(), model.tokens[1, :5].tolist()]
    together, _ = engine.generate(prompts, 6)
    for i, prompt in enumerate(prompts):
        alone, _ = engine.generate([prompt], 6, max_length=23, first_sequence=i, chunk=16)
        assert alone[0] == together[i], SEED


# --- rounding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_and_native(name: str) -> None:
    """Both run, hold the cache in bfloat16, and lie near float32; native, which rounds probabilities after they are
    normalised and not before, near plain bfloat16 and apart from it."""
    model = golden(name)
    logits = {FLOAT32: _reference(name)[0]}
    for numerics in (PLAIN, NATIVE):
        logits[numerics], hidden, cache = one_shot(model, model.tokens, numerics.for_checkpoint(model.config))
        assert (hidden.dtype, cache.rows.dtype) == (jnp.bfloat16, jnp.int16)

    def median(a: Numerics, b: Numerics) -> float:
        rows = zip(*(logits[n].reshape(-1, logits[n].shape[-1]) for n in (a, b)), strict=True)
        return float(np.median([relative_norm(x, y) for x, y in rows]))

    print(name, [median(a, b) for a, b in ((PLAIN, FLOAT32), (NATIVE, FLOAT32), (NATIVE, PLAIN))])
    assert max(median(PLAIN, FLOAT32), median(NATIVE, FLOAT32)) <= BFLOAT16
    assert 0 < median(NATIVE, PLAIN) <= BFLOAT16


# --- Llama 3's frequencies -------------------------------------------------------------------------------------------


def _rule(channels: int, theta: float, scaling: Llama3Rope) -> np.ndarray:
    """Spec V3 2.9 as it is written, in float64."""
    original, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    found = []
    for i in range(channels // 2):
        f = theta ** (-2 * i / channels)
        wave = 2 * np.pi / f
        a = (original / wave - low) / (high - low)
        mixed = (1 - a) * f / scaling.factor + a * f
        found.append(f if wave < original / high else f / scaling.factor if wave > original / low else mixed)
    return np.array(found)


def test_llama3_frequencies() -> None:
    """The releases' from 8192 positions, as the rule has them and as worked out by hand at the joints of its branches;
    and other scalings."""
    config = load_config("deepseek-r1-distill-llama-8b")
    assert isinstance(config, DenseConfig) and config.llama3 == Llama3Rope(8.0, 1.0, 4.0, 8192)
    found = llama3_frequencies(config.head_dim, config.rope_theta, config.llama3)
    assert found.shape == (64,) and found.dtype == np.float32
    np.testing.assert_allclose(found, _rule(128, 500000.0, config.llama3), rtol=1e-6)
    short = {0: 1.0, 1: 0.8146172338565447, 28: 0.003211445994752591}
    between = {29: 0.002166570763503359, 30: 0.0013718935677611381, 34: 0.0001785078127679964}
    long = {35: 9.556212353964683e-05, 36: 7.78465527393245e-05, 63: 3.068925988914511e-07}
    for i, value in (short | between | long).items():
        assert found[i] == pytest.approx(value, rel=1e-6), i
    for name in ("llama-llama3", "llama-hf"):
        c = _config(name)
        assert c.llama3 is not None
        found = llama3_frequencies(c.head_dim, c.rope_theta, c.llama3)
        np.testing.assert_allclose(found, _rule(c.head_dim, c.rope_theta, c.llama3), rtol=1e-6)
    plain = llama3_frequencies(128, 500000.0, None)
    np.testing.assert_allclose(plain, 500000.0 ** (-np.arange(0, 128, 2) / 128), rtol=1e-6)


@pytest.mark.parity
def test_llama3_frequencies_are_hugging_faces() -> None:
    """To the last bit where the scaling is a release's; of others to one."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for channels, theta, scaling, ulp in (
        (128, 500000.0, Llama3Rope(8.0, 1.0, 4.0, 8192), 0),
        (128, 500000.0, Llama3Rope(32.0, 1.0, 4.0, 8192), 0),
        (64, 10000.0, Llama3Rope(8.0, 1.5, 16.0, 1024), 1),
    ):
        config = transformers.LlamaConfig(
            head_dim=channels,
            max_position_embeddings=131072,
            rope_parameters={"rope_type": "llama3", "rope_theta": theta, **dataclasses.asdict(scaling)},
        )
        expected, magnitude = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
        assert magnitude == 1.0
        np.testing.assert_array_max_ulp(llama3_frequencies(channels, theta, scaling), expected.numpy(), ulp)


# --- heads -----------------------------------------------------------------------------------------------------------


def test_heads_of_another_width_than_hidden() -> None:
    """head_dim is not hidden / heads: projections are [192, 96], [64, 96] and back [96, 192]; the logits are
    test_goldens' to compare."""
    model = golden("llama-llama3")
    config, attention = _config("llama-llama3"), model.params["layers"]["attention"]
    assert config.head_dim == 32 != config.hidden_size // config.num_attention_heads
    assert {k: v.shape for k, v in attention.items()} == {
        "q": (3, 192, 96),
        "k": (3, 64, 96),
        "v": (3, 64, 96),
        "o": (3, 96, 192),
    }


def test_biases_are_used() -> None:
    """Of queries, keys and values; a change of any changes the logits, and the rows of keys or values."""
    model = golden("qwen2-untied")
    reference, cache = _reference("qwen2-untied")
    heads, width = _config("qwen2-untied").num_key_value_heads, _config("qwen2-untied").head_dim
    for name in ("q_bias", "k_bias", "v_bias"):
        layers = model.params["layers"]
        changed = layers["attention"] | {name: layers["attention"][name] * 0}
        params = model.params | {"layers": layers | {"attention": changed}}
        logits, _, after = one_shot(dataclasses.replace(model, params=params), model.tokens)
        assert worst(logits, reference) > 0.01
        first = np.asarray(after.rows != cache.rows)[0].reshape(2, -1, heads, 2, width)  # of the first layer
        assert (first[..., 0, :].any(), first[..., 1, :].any()) == (name == "k_bias", name == "v_bias")


def test_the_tied_head_is_the_embedding(tmp_path: Path, capsys: Capture) -> None:
    """Neither a parameter nor a tensor of its own; a row of the embedding that no token takes changes one logit."""
    model = golden("qwen2-tied")
    embed = model.params["embed"]
    assert model.config.tie_word_embeddings and "head" not in model.params and not isinstance(embed, QArray)
    tokens = np.where(model.tokens == 7, 8, model.tokens)
    changed = dataclasses.replace(model, params=model.params | {"embed": embed.at[7].set(-embed[7])})
    (before, _, _), (after, _, _) = one_shot(model, tokens), one_shot(changed, tokens)
    np.testing.assert_array_equal(after[..., 7], -before[..., 7])
    assert (np.delete(after, 7, -1) == np.delete(before, 7, -1)).all() and before[..., 7].any()

    counted = accounting(model.config)
    assert counted["active_parameters"] == counted["parameters"] == sum(a.size for a in jax.tree.leaves(model.params))
    untied = accounting(dataclasses.replace(_config("qwen2-tied"), tie_word_embeddings=False))
    assert untied["parameters"] - counted["parameters"] == 128 * 80
    assert untied["active_parameters"] == counted["active_parameters"]
    assert main(["inspect", str(model.folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["active_parameters"] == counted["parameters"]


def test_a_head_beside_a_tied_embedding(tmp_path: Path, capsys: Capture) -> None:
    """It is refused, though it were the same; so is an untied model without one."""
    folder = _copy("qwen2-tied", tmp_path)
    head = np.asarray(golden("qwen2-tied").params["embed"])
    rewrite(folder, put("lm_head.weight", head))
    refused_everywhere(capsys, folder, tmp_path, ".safetensors", "lm_head.weight", "qwen2", "found one")
    rewrite(folder, lambda tensors: tensors.pop("lm_head.weight"))
    edit_json(folder / "config.json", tie_word_embeddings=False)
    refused_everywhere(capsys, folder, tmp_path, "lm_head.weight", "[128, 80]", "found none")


# --- at true size ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numerics", [PLAIN, pytest.param(NATIVE, marks=pytest.mark.full)], ids=["plain", "native"])
def test_decode_holds_neither_cache_nor_matrix(numerics: Numerics) -> None:
    """One token of the 70B model, compiled from shapes: all of the cache is aliased, and temporaries, the same for a
    cache 16 times as long, are less than one bfloat16 matrix of keys."""
    config, temporary = load_config("deepseek-r1-distill-llama-70b"), []
    new, row = jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    for max_length in (4088, 65528):
        cache = jax.eval_shape(partial(dense.new_cache, config, numerics, 1, max_length))
        step = jax.jit(partial(dense.step, config, numerics), donate_argnums=1)
        lowered = step.lower(abstract_params(config), cache, new, row)
        memory = lowered.compile(LOOKED_AT).memory_analysis()
        assert memory.alias_size_in_bytes == tree_bytes(cache)
        assert tree_bytes(cache) == (max_length + SPARE) * accounting(config)["kv_bytes_per_token"] + 4
        temporary.append(memory.temp_size_in_bytes)
    print(temporary)
    assert temporary[0] == temporary[1] < 2 * 1024 * 8192


# --- refusals --------------------------------------------------------------------------------------------------------


def _copy(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(GOLDENS / name, folder / "model", ignore=shutil.ignore_patterns("reference.npz")))


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
BAD_FIELDS: list[tuple[str, str, dict[str, Any]]] = [
    ("qwen2-untied", "use_sliding_window", {"use_sliding_window": True}),
    ("qwen2-untied", "layer_types", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
    ("qwen2-untied", "layer_types", {"layer_types": 3}),
    ("qwen2-untied", "rope_type", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
    ("qwen2-untied", "'type'", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    ("qwen2-untied", "rope_type", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0}}),
    ("qwen2-untied", "rope_scaling", {"rope_scaling": "llama3"}),
    ("qwen2-untied", "weight_block_size", {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}}),
    ("qwen2-untied", "num_key_value_heads", {"num_key_value_heads": 5}),
    ("qwen2-untied", "num_key_value_heads", {"num_key_value_heads": 0}),
    ("qwen2-untied", "head_dim", {"head_dim": 7}),
    ("qwen2-untied", "head_dim", {"num_attention_heads": 10, "num_key_value_heads": 2}),  # 96 / 10
    ("qwen2-untied", "hidden_act", {"hidden_act": "gelu"}),
    ("qwen2-untied", "rope_theta", {"rope_theta": 0}),
    ("qwen2-untied", "tie_word_embeddings", {"tie_word_embeddings": 1}),
    ("qwen2-untied", "eos_token_id", {"eos_token_id": 128}),
    ("llama-llama3", "attention_bias", {"attention_bias": True}),
    ("llama-llama3", "mlp_bias", {"mlp_bias": True}),
    ("llama-llama3", "original_max_position_embeddings", {"rope_scaling": LLAMA3}),
    (
        "llama-llama3",
        "high_freq_factor",
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 48, "high_freq_factor": 1.0}},
    ),
    (
        "llama-llama3",
        "factor",
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 48, "factor": None}},
    ),
]


@pytest.mark.parametrize("name", ["qwen2-untied", "llama-llama3"])
def test_bad_config_field(name: str, tmp_path: Path, capsys: Capture) -> None:
    folder = _copy(name, tmp_path)
    original = (folder / "config.json").read_text()
    for golden_name, field, changes in BAD_FIELDS:
        if golden_name == name:
            (folder / "config.json").write_text(original)
            edit_json(folder / "config.json", **changes)
            refused(capsys, generate_arguments(folder), "config.json", field, "expected", "found")


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (("--mla", "absorbed"), ("--mla absorbed", "latent attention", "qwen2")),
        (("--mla", "naive"), ("--mla naive", "qwen2")),
        (("--kv", "fp8", "--numerics", "native"), ("--kv fp8", "qwen2")),
    ],
)
def test_flags_of_other_families(
    flags: tuple[str, ...], names: tuple[str, ...], tmp_path: Path, capsys: Capture
) -> None:
    folder = GOLDENS / "qwen2-untied"
    refused(capsys, generate_arguments(folder, *flags), *names)
    refused(capsys, score_arguments(folder, tmp_path, *flags), *names)
    refused(capsys, ["bench", "--model", folder, *flags], *names)


def test_no_draft_module(tmp_path: Path, capsys: Capture) -> None:
    """`score --mtp-logits` is refused; nothing is written."""
    arguments = score_arguments(GOLDENS / "qwen2-untied", tmp_path, "--mtp-logits", tmp_path / "mtp.npy")
    refused(capsys, arguments, "qwen2-untied", "MTP module", "found none")
    assert [p.name for p in tmp_path.iterdir()] == ["tokens.json"]
    with pytest.raises(NotImplementedError, match="qwen2"):
        family(golden("qwen2-untied").config).draft(golden("qwen2-untied").config)


def test_a_bias_too_many_or_too_few(tmp_path: Path, capsys: Capture) -> None:
    """Qwen2's biases must be there; Llama has none."""
    name = "model.layers.1.self_attn.k_proj.bias"
    folder = _copy("qwen2-untied", tmp_path)
    rewrite(folder, lambda tensors: tensors.pop(name))
    refused_everywhere(capsys, folder, tmp_path, name, "found none")
    shutil.rmtree(folder)
    folder = _copy("llama-llama3", tmp_path)
    rewrite(folder, put(name, np.zeros(64, np.float32)))
    refused_everywhere(capsys, folder, tmp_path, name, "llama", "found one")
