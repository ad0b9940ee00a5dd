"""Operators by themselves: their variants against the formula and against NumPy, who takes which, and what is kept."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import FLOAT32, ROOT, SEED, golden, relative_norm, rng
from jax import lax

from dsjax.cache.rows import write_rows
from dsjax.errors import InputError
from dsjax.layers.attend import new_call
from dsjax.layers.grouped_matmul import Expert, grouped_matmul
from dsjax.layers.mla import mla, mla_rope_table
from dsjax.layers.norm import rms_norm
from dsjax.layers.rope import rope, rope_table
from dsjax.layers.top_k import top_k
from dsjax.models import family
from dsjax.numerics import Numerics
from dsjax.operators import check_choices, listing, named_platforms, operators, report
from quant import E2M1, E4M3, INT8, WHOLE, act_quant_int8, block_scaled_dot, dequantise, quantise
from quant.grouped import sort_assignments
from quant.operator import OPERATORS, VariantError, choosing, current, find, outlining

REST = 1e-7  # beside a bound: what one more rounding of a float32 result may do


@pytest.fixture
def restored() -> Iterator[None]:
    """Variants and defaults that a test adds are gone after it."""
    before = {o.name: (dict(o.variants), o.platforms) for o in operators()}
    yield
    for o in operators():
        o.variants, o.platforms = before[o.name]


def others(name: str) -> list[str]:
    """All variants of an operator but the first."""
    return list(find(name).variants)[1:]


def in_variant(name: str, variant: str, function: Callable[..., Any], *arrays: Any) -> Any:
    """What a function gives, compiled with an operator's variant, as NumPy arrays."""
    with choosing({name: variant}):
        return jax.tree.map(np.asarray, jax.jit(function)(*arrays))


# --- the list --------------------------------------------------------------------------------------------------------


def test_the_list_is_complete() -> None:
    """Every operator that the source defines is listed without anything else imported before."""
    files = [f for package in ("quant", "dsjax", "sharding") for f in (ROOT / package).rglob("*.py")]
    written = re.findall(r'^@operator\("(\w+)"', "\n".join(f.read_text() for f in files), re.MULTILINE)
    assert len(written) > 20 and sorted(written) == [o.name for o in operators()]
    needed = {"rms_norm", "rope", "act_quant", "block_scaled_dot", "grouped_matmul", "moe_gate", "mla"}
    needed |= {"sparse_attention", "compressor", "lightning_indexer", "hyper_connection_pre", "top_k"}
    assert needed <= set(written)


def test_every_variant_but_the_first_is_compared_here() -> None:
    compared = {"top_k", "sort_assignments", "rope", "block_scaled_dot", "grouped_matmul", "mla", "decode"}
    assert {o.name for o in operators() if len(o.variants) > 1} <= compared | {"write_rows"}


def test_forms_are_told_as_what_they_mean() -> None:
    assert Numerics().for_platform("tpu").products == "tiled"
    (dot,) = [o for o in listing(named_platforms(), "tpu") if o["name"] == "block_scaled_dot"]
    told = {"cpu": "form: fused", "cuda": "form: fused", "tpu": "form: tiled", "generic": "form: tiled"}
    assert dot["platforms"] == told and dot["chosen"] == "form: tiled"
    with choosing({"block_scaled_dot": "fused"}):
        chosen = {o["name"]: o["chosen"] for o in listing(named_platforms(), "tpu")}
        assert chosen["block_scaled_dot"] == "fused" and chosen["int8_dot"] == "form: tiled"
        assert report("tpu") == {"block_scaled_dot": "fused"}


def test_a_plugin_s_platform_reports_all_and_takes_what_was_registered_for_it(restored: None) -> None:
    assert report("cpu") == {} and set(report("mychip")) == set(OPERATORS)
    rms_norm.variant("mychip", bound=1e-6, platforms=["mychip"])(rms_norm.variants["lax"].body)
    assert report("cpu") == {} and report("mychip")["rms_norm"] == "mychip" and "mychip" in named_platforms()
    with choosing({}, "mychip"):
        assert rms_norm.chosen == "mychip"
        with choosing({"rms_norm": "lax"}):
            assert rms_norm.chosen == "lax"
    with pytest.raises(ValueError, match="operator rms_norm: variant mychip exists already"):
        rms_norm.variant("mychip", bound=0.0)
    with pytest.raises(ValueError, match="operator rms_norm: mychip takes variant mychip already"):
        rms_norm.variant("other", bound=0.0, platforms=["mychip"])
    assert "other" not in rms_norm.variants


def test_a_platform_takes_a_variant_that_there_is(restored: None) -> None:
    top_k.take("loop", "mychip", "theirs")
    top_k.take("loop", "mychip")  # said twice is no contradiction
    assert report("mychip")["top_k"] == report("theirs")["top_k"] == "loop" and report("cpu") == {}
    with pytest.raises(ValueError, match="operator top_k: expected chlo or sort or loop, found lop"):
        top_k.take("lop", "other")
    with pytest.raises(ValueError, match="operator top_k: mychip takes variant loop already"):
        top_k.take("sort", "other", "mychip")
    with pytest.raises(TypeError):  # unchecked
        top_k.platforms["other"] = "lop"  # type: ignore[index]
    assert set(top_k.platforms) == {"mychip", "theirs"}


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("topk", "loop")], r"--op topk=loop: operator: expected act_quant, .*, found topk"),
        ([("top_k", "heap")], r"--op top_k=heap: operator top_k: expected chlo or sort or loop, found heap"),
        ([("top_k", "sort"), ("top_k", "loop")], r"--op top_k=loop: expected one variant of top_k, found sort, too"),
    ],
)
def test_choices_that_are_none(pairs: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_choices(pairs)
    assert check_choices([("top_k", "loop"), ("top_k", "loop")]) == {"top_k": "loop"}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (lambda x: x, r"^rms_norm=wrong: expected a function of what rms_norm takes, found one with "),
        (lambda x, gain, eps: x[..., :3], r"^rms_norm=wrong: expected float32 \[2, 8\], found float32 \[2, 3\]"),
        (lambda x, gain, eps: x.astype(jnp.bfloat16), r"expected float32 \[2, 8\], found bfloat16 \[2, 8\]"),
        (lambda x, gain, eps: (x, x), r"found float32 \[2, 8\], float32 \[2, 8\]"),
    ],
)
def test_a_variant_from_outside_gives_what_the_operator_gives(
    restored: None, body: Callable[..., Any], said: str
) -> None:
    """Another signature, shape, type or structure is told, while the program is traced."""
    rms_norm.variant("wrong", bound=0.0, says="of a test")(body)
    with choosing({"rms_norm": "wrong"}), pytest.raises(VariantError, match=said):
        jax.jit(partial(rms_norm, eps=1e-6)).lower(jnp.ones((2, 8)), jnp.ones(8))


# --- variants against the formula, and both against NumPy ------------------------------------------------------------


def rows_to_choose_from(kind: str) -> np.ndarray:
    """float32 [6, 20]"""
    random = rng(100)
    x = random.standard_normal((6, 20)).astype(np.float32)
    if kind == "ties":
        x = random.integers(0, 3, x.shape).astype(np.float32)
    elif kind == "-inf":
        x[:, 3:] = np.where(random.random((6, 17)) < 0.8, -np.inf, x[:, 3:])
        x[0] = -np.inf
    return x


@pytest.mark.parametrize("variant", ["chlo", *others("top_k")])
@pytest.mark.parametrize("kind", ["plain", "ties", "-inf"])
@pytest.mark.parametrize("k", [1, 7, 20])
def test_top_k(variant: str, kind: str, k: int) -> None:
    x = rows_to_choose_from(kind)
    expected = np.argsort(-x, axis=-1, kind="stable")[:, :k]
    values, places = in_variant("top_k", variant, lambda a: top_k(a.reshape(2, 3, 20), k), x)
    assert places.dtype == np.int32 and values.dtype == np.float32
    np.testing.assert_array_equal(places.reshape(6, k), expected, err_msg=f"seed {SEED}")
    np.testing.assert_array_equal(values.reshape(6, k), np.take_along_axis(x, expected, axis=-1))


@pytest.mark.parametrize("variant", ["sort", *others("sort_assignments")])
@pytest.mark.parametrize("case", ["any", "one expert", "none at all", "one"])
def test_sort_assignments(variant: str, case: str) -> None:
    experts = 5  # of which 3 never occurs; 5 itself is "none"
    of = rng(101).choice([0, 1, 2, 4, 5], 1 if case == "one" else 23).astype(np.int32)
    of[:] = {"one expert": 2, "none at all": 5}.get(case, of)
    order = in_variant("sort_assignments", variant, lambda a: sort_assignments(a, experts), of)
    assert order.dtype == np.int32
    np.testing.assert_array_equal(order, np.argsort(of, kind="stable"), err_msg=f"seed {SEED}")


@pytest.mark.parametrize("variant", ["drop", *others("write_rows")])
@pytest.mark.parametrize("count", [1, 5])
def test_write_rows(variant: str, count: int) -> None:
    """Padding, a slot without a token, and a row beyond the places: only what is valid changes, whatever the bits."""
    rows = rng(102).integers(0, 1 << 16, (2, 4, 8, 3), np.uint16)
    new = rng(103).integers(0, 1 << 16, (4, count, 3), np.uint16)
    numbers = np.array([[2], [7], [0], [1]], np.int32) + np.arange(count, dtype=np.int32)
    valid = np.arange(count) < np.array([[count], [count], [0], [max(count - 2, 1)]])
    valid[3, 0] = count == 1  # the first is not always one
    expected = rows.copy()
    for slot, i in np.argwhere(valid):
        if numbers[slot, i] < 8:
            expected[1, slot, numbers[slot, i]] = new[slot, i]
    found = in_variant("write_rows", variant, lambda *a: write_rows(a[0], 1, *a[1:]), rows, numbers, valid, new)
    np.testing.assert_array_equal(found, expected, err_msg=f"seed {SEED}")


@pytest.mark.parametrize("variant", ["lax", *others("rope")])
@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 3, 5, 8)])
def test_rope(variant: str, shape: tuple[int, ...]) -> None:
    x, positions = rng(102).standard_normal(shape).astype(np.float32), np.array([[0, 1, 9], [7, 100, 3]], np.int32)
    frequencies = np.float32(10000) ** -(np.arange(4, dtype=np.float32) / 4)
    out = in_variant("rope", variant, lambda a: rope(a, rope_table(frequencies, jnp.asarray(positions))), x)
    angles = (positions[..., None].astype(np.float32) * frequencies).astype(np.float64)
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles if len(shape) == 3 else 1j * angles[:, :, None])
    expected = np.stack([turned.real, turned.imag], axis=-1).reshape(shape)
    assert relative_norm(out, expected) < find("rope").variants[variant].bound + 3 * REST, f"seed {SEED}"


@pytest.mark.parametrize("variant", ["form", *others("block_scaled_dot")])
@pytest.mark.parametrize("fmt", ["float32", "e4m3", "e8m0 scales", "fp4", "int8"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_block_scaled_dot(variant: str, fmt: str, tokens: int) -> None:
    """Of a stack, with row counts that no tile and no block divides, and a whole group short; against float64."""
    n, k = 2600, 416  # a tile has at most 2048 rows: two trips or more, and a rest
    random = rng(103, tokens)
    w = random.standard_normal((2, n, k)).astype(np.float32)
    w[:, 130:140] = 0
    x = random.standard_normal((tokens, k)).astype(np.float32)
    x[1:2] = 0
    held: Any = jnp.asarray(w)
    if fmt != "float32":
        kind, block = {"fp4": (E2M1, (1, 32)), "int8": (INT8, (1, WHOLE))}.get(fmt, (E4M3, (128, 128)))
        held = quantise(held, kind, block, pow2=fmt in ("e8m0 scales", "fp4"))
        w = np.asarray(dequantise(held))
    out = in_variant("block_scaled_dot", variant, lambda a, b: block_scaled_dot(a, b, (1,)), x, held)
    expected = x.astype(np.float64) @ w[1].astype(np.float64).T
    bound = max(v.bound for v in block_scaled_dot.variants.values())
    assert out.dtype == np.float32 and relative_norm(out, expected) < bound, f"seed {SEED}"


def one_expert(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """A SwiGLU in float64."""
    g = gate @ x
    return down @ (g / (1 + np.exp(-g)) * (up @ x))


@pytest.mark.parametrize("variant", ["loop", *others("grouped_matmul")])
@pytest.mark.parametrize("held", ["float32", "e4m3"])
@pytest.mark.parametrize("tokens", [1, 7, 40])
@pytest.mark.parametrize("early", [False, True])
def test_grouped_matmul(variant: str, held: str, tokens: int, early: bool) -> None:
    """Experts without tokens, choices of -1, tokens that are not valid; against every assignment by itself."""
    if early and tokens == 7:
        pytest.skip("nothing new")
    experts, wide, inner, k, random = 6, 48, 20, 3, rng(104, tokens)
    matrices = [
        random.standard_normal((2, experts, *s)).astype(np.float32) * 0.2
        for s in ((inner, wide), (inner, wide), (wide, inner))
    ]
    leaves: Any = tuple(jnp.asarray(m) for m in matrices)
    if held == "e4m3":
        leaves = tuple(quantise(m, E4M3, (16, 16)) for m in leaves)
        matrices = [np.asarray(dequantise(m)) for m in leaves]
    x = random.standard_normal((tokens, wide)).astype(np.float32)
    choices = np.stack([random.choice([0, 1, 3, 4], k, replace=False) for _ in range(tokens)]).astype(np.int32)
    choices[random.random(choices.shape) < 0.2] = -1
    weights = random.random((tokens, k)).astype(np.float32)
    present = (choices >= 0) & (random.random(tokens) < 0.8)[:, None]
    expert = Expert(FLOAT32, None, early, True, lambda amax: amax)

    def run(*arrays: Any) -> Any:
        return grouped_matmul(leaves, *arrays, 1, choices.size, expert)

    out = in_variant("grouped_matmul", variant, run, x, choices, weights, present)
    expected = np.zeros((tokens, wide))
    for t, j in zip(*np.nonzero(present), strict=True):
        parts = [m[1, choices[t, j]].astype(np.float64) for m in matrices]
        expected[t] += weights[t, j] * one_expert(x[t].astype(np.float64), *parts)
    bound = find("grouped_matmul").variants[variant].bound or 1e-6
    assert out.dtype == np.float32
    assert np.linalg.norm(out - expected) <= bound * np.linalg.norm(expected), f"seed {SEED}"


def test_a_variant_that_cannot_says_so() -> None:
    expert = Expert(Numerics("plain", "float32", activations="int8"), None, False, True, lambda amax: amax)
    w = jnp.ones((1, 2, 16, 16))
    leaves = tuple(quantise(w, INT8, (1, WHOLE)) for _ in range(3))
    rows, zeros = act_quant_int8(jnp.ones((1, 16))), jnp.zeros((1, 1), jnp.int32)
    with choosing({"grouped_matmul": "ragged"}), pytest.raises(VariantError, match="variant ragged: expected float"):
        grouped_matmul(leaves, rows, zeros, zeros * 1.0, jnp.array([True]), 0, 1, expert)


@pytest.mark.parametrize("tokens", [1, 9])
def test_mla(tokens: int) -> None:
    """Slots of different lengths, one that takes nothing."""
    config, random = golden("v3-float32").config, rng(105)
    heads, (n, r, u, c) = 4, (config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim, config.kv_lora_rank)
    cache = family(config).new_cache(config, FLOAT32, 3, 40)
    rows = jnp.asarray(random.standard_normal(cache.rows.shape), jnp.float32)
    q_nope, q_rope = (random.standard_normal((3, tokens, heads, w)).astype(np.float32) for w in (n, r))
    kv_b = random.standard_normal((2, heads * (n + u), c)).astype(np.float32) * c**-0.5
    length = jnp.array([0, 13, 30], jnp.int32)

    def run(q_nope: Any, q_rope: Any, rows: Any, kv_b: Any) -> Any:
        held = type(cache)(**{**vars(cache), "rows": rows, "length": length})
        call = new_call(held, tokens, jnp.array([tokens, 1, 0], jnp.int32), partial(mla_rope_table, config))
        return mla(q_nope, q_rope, rows, kv_b, (1, 2), call, config, FLOAT32)

    results = {v: in_variant("mla", v, run, q_nope, q_rope, rows, kv_b) for v in find("mla").variants}
    for variant in others("mla"):
        for slot, real in enumerate((tokens, 1)):
            found, first = (results[v][slot, :real] for v in (variant, "auto"))
            assert relative_norm(found, first) < mla.variants[variant].bound, (variant, f"seed {SEED}")


@pytest.mark.skipif("decode" not in OPERATORS, reason="there is no such operator")
def test_decode_of_every_code() -> None:
    decode = find("decode")
    types = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "e8m0": ml_dtypes.float8_e8m0fnu}
    for variant in decode.variants:
        for name, dtype in types.items():
            from quant import FORMATS

            codes = np.arange(256, dtype=np.uint8)
            out = in_variant("decode", variant, partial(lambda fmt, a: decode(a, fmt), FORMATS[name]), codes)
            np.testing.assert_array_equal(out, codes.view(dtype).astype(np.float32), err_msg=f"{variant} {name}")


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_no_cache_of_jax_s_hands_out_a_program_of_another_choice(restored: None) -> None:
    """One function object under two choices: jitted, in loops, in branches, and mapped."""
    rms_norm.variant("zero", bound=1.0)(lambda x, gain, eps: jnp.zeros(x.shape, jnp.float32))

    def norm(x: jax.Array) -> jax.Array:
        return rms_norm(x, jnp.ones(4), 1e-6)

    def scanned(x: jax.Array, _: Any) -> tuple[jax.Array, None]:
        return norm(x), None

    def looped(_: Any, x: jax.Array) -> jax.Array:
        return norm(x)

    inner = jax.jit(norm)
    ways: dict[str, Callable[[jax.Array], jax.Array]] = {
        "jit": jax.jit(norm),
        "nested": jax.jit(lambda x: inner(x)),
        "scan": jax.jit(lambda x: lax.scan(scanned, x, None, length=2)[0]),
        "eager scan": lambda x: lax.scan(scanned, x, None, length=2)[0],
        "eager loop": lambda x: lax.fori_loop(0, 2, looped, x),
        "eager cond": lambda x: lax.cond(x.sum() > 0, norm, norm, x),
        "vmap": jax.vmap(norm),
        "grad": jax.grad(lambda x: jax.checkpoint(norm)(x).sum() + norm(x).sum()),
    }
    x = jnp.asarray(rng(106).standard_normal((2, 4)), jnp.float32)
    for way, function in ways.items():
        for _ in range(2):
            assert np.asarray(function(x)).any(), way
            with choosing({"rms_norm": "zero"}):
                assert not np.asarray(function(x)).any(), way


def test_the_key_of_kept_programs_tells_choices_apart() -> None:
    start = current()
    with choosing({"top_k": "loop"}):
        loop = current()
        with choosing({"rope": "swap"}):
            assert current() not in (start, loop)
    with choosing({}, "tpu"):
        assert current() != start
    with outlining():
        assert current() != start
    assert current() == start and hash(current()) == hash(start)
