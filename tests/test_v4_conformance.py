"""V4's layers against the spec's golden values, and laws that hold whatever the weights (spec V4 11)."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import emulator_v4 as em
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_v4_native import FLOAT32, SMALL, Attended, Model, attend, bf16, distance, model
from test_emulator_v4 import SINKHORN, YARN_GOLDEN

from dsjax.cache.v4 import overlap
from dsjax.config.fields import Yarn
from dsjax.layers.gate import sqrtsoftplus_gate
from dsjax.layers.rope import rope_frequencies
from dsjax.layers.sink_attention import Keys, sink_attention
from dsjax.layers.streams import sinkhorn
from quant import E2M1, QArray, act_quant, dequantise, quantise
from quant.formats import decode, encode

KINDS = pytest.mark.parametrize("ratio", [0, 4, 128], ids=["window", "csa", "hca"])
YARN = Yarn(factor=16.0, original_max_position_embeddings=65536)
PADDED = 264
"""Tokens of every step that takes more than one, so that few programs are compiled."""


def _plain(ratio: int) -> Model:
    return model(ratio, native=False)


def _run(m: Model, x: np.ndarray, cache: Any = None, shift: int = 0) -> Attended:
    """In float32."""
    return attend(m, x, FLOAT32, cache, shift, tokens=1 if len(x) == 1 else PADDED, capacity=PADDED)


def _input(tokens: int, key: int = 1) -> np.ndarray:
    return bf16(tokens, SMALL["hidden_size"], key=key)


# --- golden values ---------------------------------------------------------------------------------------------------


def test_sinkhorn() -> None:
    logits, golden = (jnp.array(x, jnp.float32) for x in SINKHORN)
    found = sinkhorn(logits, 20, 1e-6)
    np.testing.assert_allclose(found, golden, atol=2e-8, rtol=1e-6)
    np.testing.assert_allclose(found.sum(0), 0.999999, atol=2e-7)


def test_frequencies() -> None:
    np.testing.assert_allclose(rope_frequencies(64, 160000.0, YARN), YARN_GOLDEN, rtol=6e-7)  # seven digits given
    np.testing.assert_allclose(rope_frequencies(64, 10000.0, None), 10000.0 ** (-np.arange(32) / 32), rtol=2e-7)
    for raw, yarn in ((model(4).raw, model(4).config.yarn), (model(0).raw, None)):
        theta = 160000.0 if yarn else 10000.0
        expected = em.frequencies(raw, 4 if yarn else 0)
        np.testing.assert_array_equal(rope_frequencies(SMALL["qk_rope_head_dim"], theta, yarn), expected)


@pytest.mark.parity
@pytest.mark.parametrize(("theta", "yarn"), [(10000.0, None), (160000.0, YARN), (10000.0, Yarn(40.0, 4096))])
def test_frequencies_match_torch(theta: float, yarn: Yarn | None) -> None:
    """Bit for bit as DeepSeek's code builds them, with torch's float32 arithmetic (pitfall 27)."""
    torch = pytest.importorskip("torch")
    expected = 1.0 / theta ** (torch.arange(0, 64, 2, dtype=torch.float32) / 64)
    if yarn is not None:
        turns = (yarn.beta_fast, yarn.beta_slow)
        original = yarn.original_max_position_embeddings
        fast, slow = (64 * math.log(original / (n * 2 * math.pi)) / (2 * math.log(theta)) for n in turns)
        low, high = max(math.floor(fast), 0), min(math.ceil(slow), 63)
        kept = 1 - torch.clamp((torch.arange(32, dtype=torch.float32) - low) / (high - low), 0, 1)
        expected = expected / yarn.factor * (1 - kept) + expected * kept
    np.testing.assert_array_equal(rope_frequencies(64, theta, yarn), expected.numpy())


_act_quant = jax.jit(partial(act_quant, pow2=True))
_fp4 = jax.jit(lambda x: decode(encode(x, E2M1), E2M1))


@pytest.mark.parametrize(("amax", "power"), [(1, -8), (448, 0), (449, 1), (1e-4, -22), (0, -22), (3.5, -7), (3.52, -6)])
def test_activation_scales(amax: float, power: int) -> None:
    x = np.zeros((1, 130), np.float32)
    x[0, 5], x[0, 129] = -amax, 1
    _, scales = _act_quant(jnp.asarray(x))
    assert scales.tolist() == [[2.0**power, 2.0**-8]]


def test_fp4_ties_go_to_the_even_code() -> None:
    ties = {0.25: 0, 0.75: 1, 1.25: 1, 1.75: 2, 2.5: 2, 3.5: 4, 5: 4}
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    x = np.array(list(ties), np.float32)
    for sign in (1, -1):
        assert _fp4(sign * x).tolist() == [sign * y for y in ties.values()]
    np.testing.assert_array_equal(_fp4(np.nextafter(x, 9)), values[1:])
    np.testing.assert_array_equal(_fp4(np.nextafter(x, 0)), values[:-1])
    # A group whose amax is 6 has scale 1, one of 6.1 scale 2; an empty one the floor's.
    row = np.zeros((1, 96), np.float32)
    row[0, :8], row[0, 32:39], row[0, 39] = [*x, 6], 2 * x, 6.1
    q, values = jax.jit(lambda x: (q := quantise(x, E2M1, (1, 32), pow2=True), dequantise(q)))(row)
    assert q.scales.tolist() == [[127, 128, 1]]
    expected = np.zeros(96)
    expected[:8], expected[32:39], expected[39] = [*ties.values(), 6], 2 * np.array(list(ties.values())), 6
    np.testing.assert_array_equal(values[0], expected)


def test_fp4_nibbles() -> None:
    q = QArray(jnp.array([[0x21, 0xF9]], jnp.uint8), jnp.array([[127]], jnp.uint8), E2M1, (1, 32))
    assert dequantise(q).tolist() == [[0.5, 1.0, -0.5, -6.0]]


# --- attention -------------------------------------------------------------------------------------------------------


def test_a_sink_is_a_key_without_a_value() -> None:
    """A key that scores each head's sink and carries nothing, in place of the sink.

    Keys are values, so it lies in a channel of its own, in which queries hold what makes it score so.
    """
    b, t, heads, channels, scale = 2, 5, 3, 16, 0.25
    q, keys = bf16(b, t, heads, channels, key=2), bf16(b, 7, channels, key=3)
    sink = np.array([0.3, -2.0, 4.0], np.float32)
    own = np.broadcast_to(sink[:, None] / scale, (b, t, heads, 1))
    wide_q = np.concatenate([q, own], -1)
    wide = np.concatenate([keys, np.zeros((b, 7, 1), np.float32)], -1)
    extra = np.zeros((b, 1, channels + 1), np.float32)
    extra[..., -1] = 1

    def run(q: np.ndarray, keys: np.ndarray, sink: np.ndarray) -> np.ndarray:
        seen = jnp.ones((b, t, keys.shape[1]), bool)
        source = Keys(1, lambda _: (jnp.asarray(keys), seen))
        return np.asarray(sink_attention(jnp.asarray(q), [source], jnp.asarray(sink), scale, FLOAT32))

    with_sink = run(wide_q, wide, sink)[..., :-1]
    with_key = run(wide_q, np.concatenate([wide, extra], 1), np.full(3, -np.inf, np.float32))[..., :-1]
    np.testing.assert_allclose(with_key, with_sink, atol=1e-6)
    assert distance(with_sink, run(wide_q, wide, np.full(3, -np.inf, np.float32))[..., :-1]) > 0.1


@KINDS
def test_only_distances_matter(ratio: int) -> None:
    """The same added to the position that RoPE sees of queries, keys and entries: the output is turned back."""
    m, x = _plain(ratio), _input(200)
    here, there = _run(m, x), _run(m, x, shift=1000)
    print("shifted", ratio, distance(there.out, here.out))
    assert distance(there.out, here.out) < 5e-5
    if ratio == 4:
        np.testing.assert_array_equal(there.chosen, here.chosen)
    keys = [np.asarray(a.cache.window[0, 0]) for a in (here, there)]
    assert distance(*keys) > 0.1  # they were turned


def test_choosing_all_is_dense_attention() -> None:
    """As many entries as index_topk: no choice changes anything; one more does."""
    few, all_ = model(4, native=False), model(4, native=False, topk=128)
    topk = SMALL["index_topk"]
    x = _input(4 * topk + 40)
    chosen, dense = _run(few, x), _run(all_, x)
    assert chosen.chosen is not None and dense.chosen is None
    within = 4 * topk + 3
    np.testing.assert_allclose(chosen.out[:within], dense.out[:within], atol=2e-6 * np.abs(dense.out).max())
    assert distance(chosen.out[within + 1 :], dense.out[within + 1 :]) > 1e-3
    expected, _ = em.attention(x, all_.layer("attn."), all_.raw, 4, policy=em.PLAIN, selected=em.visible(len(x), 4))
    assert distance(dense.out, expected) < 5e-6


@KINDS
def test_decoding_around_the_window(ratio: int) -> None:
    """One token at a time where the ring of the window fills, and where it begins again."""
    m, x = _plain(ratio), _input(262)
    expected, chosen = em.attention(x, m.layer("attn."), m.raw, ratio, policy=em.PLAIN)
    cache, found = None, {}
    for first, last in ((0, 125), (132, 253)):
        got = _run(m, x[first:last], cache)
        assert distance(got.out, expected[first:last]) < 5e-6
        cache = got.cache
        for t in range(last, last + 7):
            got = _run(m, x[t : t + 1], cache)
            cache, found[t] = got.cache, got.out[0]
            if ratio == 4:
                assert got.chosen is not None and chosen is not None
                np.testing.assert_array_equal(got.chosen[0], chosen[t, : (t + 1) // 4])
    assert {126, 127, 128, 129, 130, 255, 256, 257} <= found.keys()
    for t, out in found.items():
        assert distance(out, expected[t]) < 5e-6, t


@pytest.mark.parametrize("ratio", [4, 128])
def test_entries_do_not_depend_on_how_tokens_come(ratio: int) -> None:
    """A prefill and then one token at a time, over the boundaries of both ratios; entries, and what is left over."""
    m, x = _plain(ratio), _input(262)

    def states(cache: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        kinds = {"": cache.csa, "indexer.": cache.index} if ratio == 4 else {"": cache.hca}
        return {name: (np.asarray(s.entries)[0, 0], np.asarray(s.inputs)[0, 0]) for name, s in kinds.items()}

    for first, last in ((1, 10), (2, 5), (3, 9), (4, 8), (126, 131), (127, 133), (128, 129), (252, 258)):
        cache = _run(m, x[:first]).cache
        for t in range(first, last):
            cache = _run(m, x[t : t + 1], cache).cache
        one_by_one, at_once = states(cache), states(_run(m, x[:last]).cache)
        count = last // ratio
        oldest = max(0, (count - overlap(ratio) + 1) * ratio)  # that an entry to come pools
        for name, (entries, inputs) in one_by_one.items():
            other_entries, other_inputs = at_once[name]
            places = np.arange(oldest, last) % len(inputs)
            np.testing.assert_allclose(inputs[places], other_inputs[places], atol=5e-6)
            np.testing.assert_allclose(entries[:count], other_entries[:count], atol=5e-6)
            weights = m.layer(f"attn.{name}compressor.")
            expected = em.compressor(x[:last], weights, m.raw, ratio, None, em.PLAIN, indexer=bool(name))
            np.testing.assert_allclose(entries[:count], expected, atol=2e-5)


# --- experts by token id ---------------------------------------------------------------------------------------------


def test_token_ids_choose_and_scores_weigh() -> None:
    config, rng = model(0, hashed=True).config, np.random.default_rng(4)
    table = jnp.asarray(rng.integers(0, 12, (20, 3)), jnp.int32)
    gate = partial(sqrtsoftplus_gate, bias=None, choices=table, config=config)
    one, other = (gate(jnp.asarray(rng.standard_normal((20, 12), np.float32))) for _ in range(2))
    np.testing.assert_array_equal(one[0], table)
    np.testing.assert_array_equal(other[0], table)
    assert np.abs(one[1] - other[1]).max() > 0.1
    for _, weights in (one, other):
        np.testing.assert_allclose(weights.sum(-1), config.routed_scaling_factor, rtol=1e-6)
    equal = jax.tree.map(np.asarray, gate(jnp.ones((20, 12))))
    np.testing.assert_allclose(equal[1], config.routed_scaling_factor / 3, rtol=1e-6)
