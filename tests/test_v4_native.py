"""V4's native numerics against tests/emulator_v4.py, which was written from the spec without sight of this code.

Every sub-block on equal inputs, and models of one layer: deeper ones tell nothing, for one BF16 or FP8 rounding that
falls the other way moves everything after it by more than a wrong operator would (spec V4 5).
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import emulator_v4 as em
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulator import scope
from helpers_v4_native import (
    NATIVE,
    SMALL,
    Attended,
    Model,
    attend,
    bf16,
    call_of,
    distance,
    draft_of,
    model,
    same,
    step_of,
    to_jax,
    to_numpy,
    unquantised,
)

from dsjax.cache.v4 import init_cache
from dsjax.layers.ffn import MoE
from dsjax.layers.gate import sqrtsoftplus_gate
from dsjax.layers.indexer import index_scores, lightning_indexer
from dsjax.layers.norm import head_norm, rms_norm
from dsjax.layers.sparse_attention import SparseAttention
from dsjax.layers.streams import hyper_connection_head, hyper_connection_post, hyper_connection_pre, sinkhorn
from dsjax.numerics import Numerics
from quant import E2M1, act_quant, block_scaled_dot, fake_quantise, hadamard
from quant.rows import RowFormat

TOKENS = 330
KINDS = pytest.mark.parametrize("ratio", [0, 4, 128], ids=["window", "csa", "hca"])
ULP = 2.0**-7
"""What a BF16 value that rounds the other way is off by, at most, relative to itself."""


def _wide(*shape: int, key: int) -> np.ndarray:
    """BF16 values whose rows differ by powers of two, some of them all zero, some tiny."""
    x = bf16(*shape, key=key) * np.exp2(np.arange(shape[0]) % 24 - 18.0).astype(np.float32)[:, None]
    x[::17] = 0
    x[5::17] *= np.float32(2.0**-40)
    return x


def _neighbours(x: Any, reference: np.ndarray, near: float = 1e-3) -> float:
    """Share of BF16 values that are equal; asserts that the others are neighbours, those near zero apart."""
    x = to_numpy(x)
    allowed = ULP * np.maximum(np.abs(reference), near * np.abs(reference).max())
    assert (np.abs(x - reference) <= allowed).all(), float((np.abs(x - reference) / allowed).max())
    return same(x, reference)


def _attention_input() -> np.ndarray:
    return bf16(TOKENS, SMALL["hidden_size"], key=1)


# --- formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [128, 64])
def test_activation_codes(group: int) -> None:
    x = _wide(200, 320, key=2)
    codes, scales = jax.jit(partial(act_quant, pow2=True, group=group))(to_jax(x))
    expected, expected_scales = em.act_quant(x, group)
    np.testing.assert_array_equal(codes, expected.view(np.uint8))
    np.testing.assert_array_equal(scales, expected_scales)


def test_key_rows() -> None:
    """Codes, scales and rotary bits as DeepSeek's cache holds them; decoded, what its fake quantisation gives."""
    row = RowFormat("fp8", SMALL["head_dim"], SMALL["qk_rope_head_dim"])
    x = _wide(200, row.channels, key=3)
    rows = np.asarray(jax.jit(row.encode)(to_jax(x))).view(np.uint8)
    codes, scales = em.act_quant(x[:, : row.nope], 64)
    np.testing.assert_array_equal(rows[:, : row.nope], codes.view(np.uint8))
    end = row.nope + 2 * row.rope
    np.testing.assert_array_equal(
        np.ascontiguousarray(rows[:, row.nope : end]).view(np.uint16), x[:, row.nope :].view(np.uint32) >> 16
    )
    np.testing.assert_array_equal(rows[:, end:], em.ue8m0_encode(scales))
    np.testing.assert_array_equal(to_numpy(jax.jit(row.decode)(jnp.asarray(rows))), em.kv_fake_quant(x, row.nope))


def test_indexer_rows() -> None:
    row = RowFormat("fp4", SMALL["index_head_dim"])
    x = _wide(200, row.channels, key=4)
    rows = np.asarray(jax.jit(row.encode)(to_jax(x))).view(np.uint8)
    codes, scales, values = em.fp4_fake_quant(x)
    np.testing.assert_array_equal(rows[:, : row.channels // 2], em.fp4_pack(codes).view(np.uint8))
    np.testing.assert_array_equal(rows[:, row.channels // 2 :], em.ue8m0_encode(scales))
    np.testing.assert_array_equal(to_numpy(jax.jit(row.decode)(jnp.asarray(rows))), values)
    fake = jax.jit(lambda x: fake_quantise(x, E2M1, (1, 32), pow2=True).astype(jnp.bfloat16))(to_jax(x))
    np.testing.assert_array_equal(to_numpy(fake), values)


@pytest.mark.parametrize("size", [64, 128])
def test_hadamard(size: int) -> None:
    x = bf16(300, size, key=5)
    np.testing.assert_array_equal(to_numpy(jax.jit(lambda x: NATIVE.round(hadamard(x)))(to_jax(x))), em.hadamard(x))


# --- streams, norms, gate --------------------------------------------------------------------------------------------


def test_streams() -> None:
    """Weights to float32's rounding, so that of the rounded sums hardly one differs; the head's likewise."""
    m = model(0)
    x = bf16(200, 4, SMALL["hidden_size"], key=6, scale=3.0)
    a = bf16(200, SMALL["hidden_size"], key=7)
    site = em.hc_site(m.layer(), "hc_attn")
    u, post, comb = em.hc_pre(x, *site, m.raw)

    @jax.jit
    def run(x: jax.Array, a: jax.Array, post: jax.Array, comb: jax.Array) -> Any:
        params = m.params["layers"]["attention_streams"]
        return (
            hyper_connection_pre(x, params, (0,), m.config, NATIVE),
            hyper_connection_post(a, x, post, comb, NATIVE),
            hyper_connection_head(x, m.params["head_streams"], (), m.config, NATIVE),
        )

    before, after, head = run(*(to_jax(v[None]) for v in (x, a)), jnp.asarray(post[None]), jnp.asarray(comb[None]))
    np.testing.assert_allclose(before[1][0], post, rtol=2e-6)
    np.testing.assert_allclose(before[2][0], comb, rtol=2e-5, atol=1e-7)
    print("comb", np.abs(before[2][0] / comb - 1).max(), "post", np.abs(before[1][0] / post - 1).max())
    shares = [
        _neighbours(before[0][0], u),
        _neighbours(after[0], em.hc_post(a, x, post, comb)),
        _neighbours(head[0], em.hc_head(x, *em.hc_site(m.weights, "hc_head"), m.raw)),
    ]
    print("streams", shares)
    assert min(shares) >= 0.999
    # The control: the mix contracts the first index.
    assert same(to_numpy(after[0]), em.hc_post(a, x, post, comb.swapaxes(-1, -2))) < 0.1


def test_sinkhorn() -> None:
    logits = np.random.default_rng(8).standard_normal((500, 4, 4), np.float32) * 4
    found = jax.jit(lambda x: sinkhorn(x, 20, 1e-6))(jnp.asarray(logits))
    expected = em.sinkhorn(logits, 20, 1e-6)
    print("sinkhorn", np.abs(np.asarray(found) / expected - 1).max())
    np.testing.assert_allclose(found, expected, rtol=4e-6)


def test_norms() -> None:
    x, gain = bf16(300, SMALL["hidden_size"], key=9), em.NATIVE.round(1 + 0.2 * bf16(SMALL["hidden_size"], key=10))
    found = jax.jit(lambda x: NATIVE.round(rms_norm(x, jnp.asarray(gain), 1e-6)))(to_jax(x))
    shares = [_neighbours(found, em.rms_norm(x, gain, 1e-6))]
    q = bf16(200, 8, SMALL["head_dim"], key=11)
    found = to_numpy(jax.jit(lambda q: head_norm(q, 1e-6, NATIVE))(to_jax(q[None]))[0])
    # A mean that rounds the other way moves its whole head.
    shares.append(_neighbours(found, em.head_norm(q, 1e-6), near=0))
    print("norms", shares)
    assert shares[0] >= 0.999 and shares[1] >= 0.98
    assert same(found, em.head_norm(q, 1e-6, em.Policy(head_norm="float32"))) < 0.8


@pytest.mark.parametrize("hashed", [False, True], ids=["scored", "hashed"])
def test_gate(hashed: bool) -> None:
    m = model(0, hashed=hashed)
    weights = m.layer("ffn.gate.")
    x = bf16(400, SMALL["hidden_size"], key=12) * np.repeat([1, 16], 200)[:, None].astype(np.float32)
    tokens = np.random.default_rng(13).integers(0, SMALL["vocab_size"], 400)
    choices, gates = jax.jit(_gate(m))(to_jax(x), jnp.asarray(tokens))
    expected, expected_gates = em.gate(x, tokens, weights, m.raw)
    np.testing.assert_array_equal(choices, expected)
    relative = np.abs(np.asarray(gates) / expected_gates - 1).max(-1)
    print("gate", relative[:200].max(), relative[200:].max())
    # Where the logits are sums of terms up to 50, their own rounding shows in small weights.
    assert relative[:200].max() < 2e-6 and relative[200:].max() < 3e-5


def _gate(m: Model) -> Any:
    """(x [T, D], token ids [T]) -> the layer's choices and weights."""

    def run(x: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _choose(m, tokens)(block_scaled_dot(x, m.params["layers"]["router"]["weight"], (0,)))

    return run


def _choose(m: Model, tokens: jax.Array) -> Any:
    hashed = m.config.num_hash_layers > 0
    bias = None if hashed else m.params["scored"]["bias"][0]
    choices = m.params["hashed"]["table"][0][tokens] if hashed else None
    return partial(sqrtsoftplus_gate, bias=bias, choices=choices, config=m.config)


# --- experts ---------------------------------------------------------------------------------------------------------


@lru_cache
def _moe() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x, tokens, JAX's output) of a layer with FP4 experts."""
    m = model(0)
    x = bf16(480, SMALL["hidden_size"], key=14)
    tokens = np.random.default_rng(15).integers(0, SMALL["vocab_size"], 480)

    @jax.jit
    def run(x: jax.Array, tokens: jax.Array) -> jax.Array:
        moe = MoE(m.config, NATIVE, m.params["layers"])
        return moe(x[None], jnp.ones((1, len(tokens)), bool), 0, _choose(m, tokens))[0]

    return x, tokens, to_numpy(run(to_jax(x), jnp.asarray(tokens)))


def test_moe() -> None:
    m = model(0)
    x, tokens, found = _moe()
    expected = em.moe(x, tokens, m.layer("ffn."), m.raw)
    print("moe", "same", same(found, expected), "distance", distance(found, expected))
    assert same(found, expected) >= 0.999
    assert distance(found, expected) < 1e-3


def test_moe_shows_what_is_left_out() -> None:
    """Each matrix that takes quantised inputs, one expert's alone included."""
    m = model(0)
    x, tokens, found = _moe()
    for names, least in (
        (("w1", "w3"), 3e-2),
        (("w2",), 1.5e-2),
        (("shared_experts.w2",), 8e-3),
        (("experts.0.w1",), 8e-3),
    ):
        other = em.moe(x, tokens, unquantised(m.layer("ffn."), *names), m.raw)
        print("moe without", names, distance(found, other), same(found, other))
        assert distance(found, other) > least, names
        assert same(found, other) < 0.8, names


# --- attention -------------------------------------------------------------------------------------------------------


@lru_cache
def _emulated(ratio: int) -> tuple[np.ndarray, np.ndarray | None]:
    """The emulator's output of a layer, and which entries were chosen."""
    m = model(ratio)
    return em.attention(_attention_input(), m.layer("attn."), m.raw, ratio)


@lru_cache
def _one_shot(ratio: int) -> Attended:
    return attend(model(ratio), _attention_input(), NATIVE)


@lru_cache
def _step_by_step(ratio: int) -> Attended:
    """The same one token at a time, but for two stretches; the rows that a prefill gave are left at zero."""
    m, x = model(ratio), _attention_input()
    out, chosen, cache = np.zeros_like(x), np.zeros((TOKENS, TOKENS // 4), bool), None
    for first, last, at_once in ((0, 120, True), (120, 140, False), (140, 248, True), (248, TOKENS, False)):
        for t in [first] if at_once else range(first, last):
            end = last if at_once else t + 1
            got = attend(m, x[t:end], NATIVE, cache, tokens=TOKENS if at_once else 1)
            cache = got.cache
            if not at_once:
                out[t] = got.out[0]
                if got.chosen is not None:
                    chosen[t, : got.chosen.shape[1]] = got.chosen[0]
    assert cache is not None
    return Attended(out, chosen if ratio == 4 else None, cache)


DECODED = np.r_[120:140, 248:TOKENS]
BOUND = 5e-3


def _check_choice(found: np.ndarray, expected: np.ndarray, rows: Any) -> None:
    """Sets are equal, or what was swapped scores next to equal."""
    m, x = model(4), _attention_input()
    qr, _ = em.attention_query(x, m.layer("attn."), m.raw, 4, np.arange(len(x)))
    scores, _ = em.indexer(x, qr, m.layer("attn.indexer."), m.raw, 4)
    differ = 0
    for t in rows:
        extra, missing = scores[t][found[t] & ~expected[t]], scores[t][expected[t] & ~found[t]]
        assert len(extra) == len(missing)
        differ += len(extra)
        for a, b in zip(np.sort(extra), np.sort(missing), strict=True):
            assert abs(a - b) <= 0.03 * np.abs(scores[t][np.isfinite(scores[t])]).max(), (t, a, b)
    print("chosen otherwise", differ, "of", int(expected[rows].sum()))
    assert differ <= 0.005 * expected[rows].sum()


@KINDS
def test_attention(ratio: int) -> None:
    m, found = model(ratio), _one_shot(ratio)
    expected, chosen = _emulated(ratio)
    if ratio == 4:
        assert found.chosen is not None and chosen is not None
        assert chosen.sum() < 0.8 * em.visible(TOKENS, 4).sum()  # a choice is made
        _check_choice(found.chosen, chosen, range(TOKENS))
        print("as chosen by itself", distance(found.out, expected))
        assert distance(found.out, expected) < 2e-2
        expected, _ = em.attention(_attention_input(), m.layer("attn."), m.raw, ratio, selected=found.chosen)
    print("attention", ratio, distance(found.out, expected), "same", same(found.out, expected))
    assert distance(found.out, expected) < BOUND


@KINDS
def test_attention_one_token_at_a_time(ratio: int) -> None:
    m, found = model(ratio), _step_by_step(ratio)
    expected, chosen = _emulated(ratio)
    if ratio == 4:
        assert found.chosen is not None and chosen is not None
        _check_choice(found.chosen, chosen, DECODED)
        print("as chosen by itself", distance(found.out[DECODED], expected[DECODED]))
        assert distance(found.out[DECODED], expected[DECODED]) < 2e-2
        used = chosen.copy()
        used[DECODED] = found.chosen[DECODED]
        expected, _ = em.attention(_attention_input(), m.layer("attn."), m.raw, ratio, selected=used)
    print("decode", ratio, distance(found.out[DECODED], expected[DECODED]))
    assert distance(found.out[DECODED], expected[DECODED]) < BOUND


@pytest.mark.parametrize("form", [_one_shot, _step_by_step], ids=["prefill", "decode"])
@pytest.mark.parametrize("ratio", [4, 128], ids=["csa", "hca"])
def test_entries(ratio: int, form: Any) -> None:
    """What the cache holds decodes to the emulator's entries, and the indexer's."""
    m, x = model(ratio), _attention_input()
    cache, count = form(ratio).cache, TOKENS // ratio
    row = RowFormat("fp8", SMALL["head_dim"], SMALL["qk_rope_head_dim"])
    kinds = [("", cache.csa if ratio == 4 else cache.hca, row)]
    if ratio == 4:
        kinds.append(("indexer.", cache.index, RowFormat("fp4", SMALL["index_head_dim"])))
    for prefix, state, row in kinds:
        expected = em.compressor(x, m.layer(f"attn.{prefix}compressor."), m.raw, ratio, indexer=bool(prefix))
        found = to_numpy(jax.jit(row.decode)(state.entries[0, 0]))[:count]
        print("entries", ratio, prefix, same(found, expected), distance(found, expected))
        assert same(found, expected) >= 0.999


@KINDS
def test_window_rows(ratio: int) -> None:
    """The ring holds the last 128 keys in the slots of their positions, rounded through FP8."""
    m, x = model(ratio), _attention_input()
    expected = em.attention_kv(x, m.layer("attn."), m.raw, ratio, np.arange(TOKENS))
    row = RowFormat("fp8", SMALL["head_dim"], SMALL["qk_rope_head_dim"])
    for form in (_one_shot, _step_by_step):
        window = to_numpy(jax.jit(row.decode)(form(ratio).cache.window[0, 0]))
        last = np.arange(TOKENS - 128, TOKENS)
        found = window[last % len(window)]
        print("window", ratio, same(found, expected[last]))
        assert same(found, expected[last]) >= 0.998


def test_indexer() -> None:
    """Queries and head weights of equal latents, scores and choices of equal queries and keys."""
    m, x = model(4), _attention_input()
    weights, positions = m.layer("attn.indexer."), np.arange(TOKENS)
    qr, _ = em.attention_query(x, m.layer("attn."), m.raw, 4, positions)
    q = em.index_queries(qr, weights, m.raw, 4, positions)
    w = em.index_weights(x, weights, m.raw)
    k = em.compressor(x, scope(weights, "compressor."), m.raw, 4, indexer=True)
    scores, chosen = em.indexer(x, qr, weights, m.raw, 4)
    row = RowFormat("fp4", SMALL["index_head_dim"])
    cache = init_cache(m.config, NATIVE, 1, TOKENS)
    keys = cache.index.entries.at[0, 0, : len(k)].set(row.encode(to_jax(k)))  # exact: they are FP4 values

    @jax.jit
    def run(x: jax.Array, low: jax.Array, q: jax.Array, w: jax.Array, k: jax.Array, keys: jax.Array) -> Any:
        call = call_of(m.config, cache, TOKENS, jnp.array([TOKENS]), 4)
        attention = SparseAttention(m.config, NATIVE, m.params["layers"]["attention"], m.params["csa"], 4, 0, 0)
        visible = (call.positions + 1) // 4
        best = lightning_indexer(q, w, keys, 0, visible, m.config.index_topk, row, rounded=True)
        return attention.index_queries(low, x, call), index_scores(q, w, k, rounded=True), best

    (found_q, found_w), found_scores, best = run(*(to_jax(a[None]) for a in (x, qr, q, w, k)), keys)
    seen = em.visible(TOKENS, 4)
    shares = [same(found_q[0], q), _neighbours(found_w[0], w), _neighbours(found_scores[0][seen], scores[seen], 2e-2)]
    print("indexer", shares)
    assert shares[0] >= 0.999 and shares[1] >= 0.998 and shares[2] >= 0.999
    mask = np.zeros((TOKENS, len(k) + 1), bool)
    np.put_along_axis(mask, np.asarray(best)[0], True, -1)
    assert (mask[:, :-1] == chosen).all(-1).mean() > 0.99
    for t in np.flatnonzero((mask[:, :-1] != chosen).any(-1)):
        swapped = scores[t][mask[t, :-1] != chosen[t]]
        assert np.ptp(swapped) <= ULP * np.abs(swapped).max()


SWITCHES: dict[str, em.Policy] = {
    "kv": em.Policy(kv_quant=False),
    "head norm": em.Policy(head_norm="float32"),
    "plain": em.PLAIN,
}


@KINDS
def test_attention_shows_what_is_left_out(ratio: int) -> None:
    """Each rounding that the model was trained with moves the output by several times the bound."""
    m, x, found = model(ratio), _attention_input(), _one_shot(ratio)
    run = partial(em.attention, x, config=m.raw, ratio=ratio, selected=found.chosen)
    others = {n: run(weights=m.layer("attn."), policy=policy)[0] for n, policy in SWITCHES.items()}
    others |= {n: run(weights=unquantised(m.layer("attn."), n))[0] for n in ("wq_a", "wq_b", "wkv", "wo_b")}
    distances = {n: distance(found.out, other) for n, other in others.items()}
    print("without", ratio, distances)
    assert min(distances.values()) > 2.5 * BOUND
    if ratio == 4:  # FP4 shows in the choice alone
        chosen = em.attention(x, m.layer("attn."), m.raw, 4, policy=em.Policy(index_quant=False))[1]
        assert (chosen != found.chosen).sum() > 0.1 * found.chosen.sum()


def test_the_kernels_order_is_near() -> None:
    """DeepSeek's running maximum rounds otherwise: below 1.5% rms from us, yet farther than one maximum of all keys."""
    m, found = model(128), _one_shot(128)
    online, _ = em.attention(_attention_input(), m.layer("attn."), m.raw, 128, policy=em.Policy(softmax="online"))
    ours, kernels = distance(found.out, _emulated(128)[0]), distance(found.out, online)
    print("softmax", "global", ours, "online", kernels)
    assert 3 * ours < kernels < 1.5e-2


def test_bfloat16_keys() -> None:
    """kv="bfloat16" is the emulator without its FP8 rounding."""
    numerics = Numerics("native", kv="bfloat16").for_checkpoint(model(128).config)
    m, x = model(128), _attention_input()
    found = attend(m, x, numerics)
    expected, _ = em.attention(x, m.layer("attn."), m.raw, 128, policy=em.Policy(kv_quant=False))
    print("bfloat16 keys", distance(found.out, expected))
    assert distance(found.out, expected) < BOUND
    assert distance(_one_shot(128).out, expected) > 5 * BOUND


# --- one layer -------------------------------------------------------------------------------------------------------

LAYER_TOKENS = 200
MEDIAN = 1e-3
FAR = 1e-2


def _per_token(x: Any, reference: np.ndarray) -> np.ndarray:
    """|x - reference| / |reference| of each token."""
    a, b = (to_numpy(v).astype(np.float64).reshape(len(reference), -1) for v in (x, reference))
    return np.linalg.norm(a - b, axis=-1) / np.linalg.norm(b, axis=-1)


def _check_layer(found: tuple[Any, Any], expected: tuple[np.ndarray, np.ndarray], least: float) -> None:
    """Half of the tokens are next to exact, and all but a few, which a rounding or a nearly tied gate turned, near."""
    for name, x, reference in zip(("logits", "streams"), found, expected, strict=True):
        errors = _per_token(x, reference)
        print(name, "rms", distance(to_numpy(x), reference), "median", np.median(errors), "far", (errors > FAR).mean())
        assert np.median(errors) < MEDIAN
        assert (errors < FAR).mean() >= least


@pytest.mark.parametrize(
    ("ratio", "hashed"),
    [(4, True), *(pytest.param(ratio, False, marks=pytest.mark.full) for ratio in (0, 4, 128))],
    ids=["csa-hashed", "window-scored", "csa-scored", "hca-scored"],
)
def test_one_layer(ratio: int, hashed: bool) -> None:
    """Medians over tokens: what is left out moves all of them, a rounding that fell the other way only some."""
    m = model(ratio, hashed=hashed)
    tokens = np.random.default_rng(16).integers(0, SMALL["vocab_size"], LAYER_TOKENS)
    cache = init_cache(m.config, NATIVE, 1, LAYER_TOKENS)
    new, count = jnp.asarray(tokens[None], jnp.int32), jnp.array([LAYER_TOKENS], jnp.int32)
    logits, streams, _ = step_of(m.config, NATIVE)(m.params, cache, new, count)
    _check_layer((logits[0], streams[0]), em.model(tokens, m.weights, m.raw), 0.85)
    for name, weights, policy in (
        ("kv", m.weights, em.Policy(kv_quant=False)),
        ("wq_a", unquantised(m.weights, "wq_a"), em.NATIVE),
        ("w2", unquantised(m.weights, "w2"), em.NATIVE),
    ):
        errors = _per_token(logits[0], em.model(tokens, weights, m.raw, policy)[0])
        print("without", name, np.median(errors))
        assert np.median(errors) > 1.5 * FAR, name


def test_draft() -> None:
    m = model(0)
    x = bf16(LAYER_TOKENS, 4, SMALL["hidden_size"], key=17)
    tokens = np.random.default_rng(18).integers(0, SMALL["vocab_size"], LAYER_TOKENS)
    cache = init_cache(m.config, NATIVE, 1, LAYER_TOKENS, draft=True)
    new, count = jnp.asarray(tokens[None], jnp.int32), jnp.array([LAYER_TOKENS], jnp.int32)
    logits, streams, _ = draft_of(m.config, NATIVE)(m.params, cache, to_jax(x[None]), new, count)
    _check_layer((logits[0], streams[0]), em.mtp(x, tokens, m.weights, m.raw), 0.85)
    for name, weights, policy in (
        ("kv", m.weights, em.Policy(kv_quant=False)),
        ("e_proj", unquantised(m.weights, "e_proj"), em.NATIVE),
        ("h_proj", unquantised(m.weights, "h_proj"), em.NATIVE),
        ("w2", unquantised(m.weights, "w2"), em.NATIVE),
    ):
        errors = _per_token(logits[0], em.mtp(x, tokens, weights, m.raw, policy)[0])
        print("without", name, np.median(errors))
        assert np.median(errors) > 1.5 * FAR, name
