"""Products written for matrix units (`quant.TILED`): the numbers of the fused form, whatever the compiler likes."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import counts, golden, one_shot, rng, sampled, step_of, worst
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.layout import Format, Layout
from test_quant_matmul import BOUND, few_examples, random_weight

from dsjax.backend import LANES, place, weight_placement
from dsjax.errors import InputError
from dsjax.models import family
from dsjax.numerics import Numerics
from quant import E2M1, E4M3, FUSED, INT4, INT8, TILED, block_scaled_dot, group_size
from quant.grouped import batched_dot, group_tokens, grouped_sum
from quant.matmul import tile_rows

FORMATS = {
    "fp8": (E4M3, (128, 128), False),
    "fp8-e8m0": (E4M3, (128, 128), True),
    "fp4": (E2M1, (1, 32), True),
    "fp4-float-scales": (E2M1, (1, 32), False),
    "int4": (INT4, (1, 128), False),
    "int8": (INT8, (1, 0), False),
    "fine": (E4M3, (16, 16), False),
}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_tiled_products(kind: str, tokens: int) -> None:
    """Against float64; several tiles, a short last one; scales that stand for one row's group or for many rows."""
    fmt, block, pow2 = FORMATS[kind]
    random = rng(1, tokens)
    w, numbers = random_weight(random, (2, 2300, 512), fmt, block, pow2)
    x = random.standard_normal((tokens, 512), np.float32)
    found = jax.jit(lambda x, w, i: block_scaled_dot(x, w, (i,), TILED))(x, w, 1)
    want = x.astype(np.float64) @ numbers[1].T
    assert np.abs(found - want).max() <= BOUND * np.abs(want).max()


def test_spread_scales_are_exact() -> None:
    """A product with ones and zeros adds no rounding: each output is one weight, whatever its scale's bits."""
    w, numbers = random_weight(rng(2), (64, 64), E2M1, (1, 32), False)
    found = jax.jit(lambda x, w: block_scaled_dot(x, w, (), TILED))(jnp.eye(64), w)
    np.testing.assert_array_equal(found, np.float32(numbers).T)


def test_bfloat16_activations_round_weights_whatever_the_tokens() -> None:
    w, numbers = random_weight(rng(3), (96, 256), E4M3, (32, 128), False)
    x = jnp.asarray(rng(4).standard_normal((1, 256)), jnp.bfloat16)
    rounded = np.float32(jnp.asarray(numbers, jnp.float32).astype(jnp.bfloat16))
    want = np.float64(x) @ np.float64(rounded).T
    assert (
        np.abs(jax.jit(lambda x, w: block_scaled_dot(x, w, (), TILED))(x, w) - want).max() <= BOUND * np.abs(want).max()
    )


@few_examples
@given(st.integers(1, 9000), st.sampled_from([256, 1536, 7168, 18432]), st.sampled_from([1, 16, 32, 128, 48]))
def test_tiles_of_whole_rows(n: int, k: int, bn: int) -> None:
    """All of a matrix, or a multiple of 32 rows and of a block, wherever a tile can hold such."""
    rows = tile_rows(n, k, bn, 1 << 20, TILED.tile_rows)
    assert rows == n or rows % TILED.tile_rows == 0 or math.lcm(bn, TILED.tile_rows) * k > 1 << 20
    assert rows == n or rows % bn == 0 or bn % rows == 0


@pytest.mark.parametrize("assignments", [1, 8, 100, 4096])
def test_blocks_are_filled_rows_of_a_matrix_unit(assignments: int) -> None:
    size = group_size(assignments, 16, TILED)
    assert size % TILED.block_rows == 0 and size >= min(assignments / 16, 128)


@pytest.mark.parametrize("kind", ["fp8", "fp4"])
def test_tiled_experts(kind: str) -> None:
    """Blocks of eight rows against one row each, one expert at a time; and many matrices, one token each."""
    fmt, block, pow2 = FORMATS[kind]
    random = rng(5)
    w, numbers = random_weight(random, (6, 128, 256), fmt, block, pow2)
    x = random.standard_normal((7, 256), np.float32)
    choices = np.stack([random.permutation(6)[:3] for _ in range(7)]).astype(np.int32)
    shares = random.uniform(0.1, 1, (7, 3)).astype(np.float32)

    def experts(form: Any) -> Any:
        def run(x: Any, w: Any) -> jax.Array:
            groups = group_tokens(jnp.asarray(choices), 6, jnp.ones(7, bool), group_size(21, 6, form))

            def f(rows: jax.Array, chosen: jax.Array, weight: jax.Array) -> jax.Array:
                return block_scaled_dot(rows, w, (chosen[0],), form) * weight[..., None]

            return grouped_sum(f, x, groups, 1, jnp.asarray(shares))

        return jax.jit(run)(x, w)

    want = np.einsum("tk,tkn->tn", shares, np.einsum("td,tknd->tkn", x.astype(np.float64), numbers[choices]))
    for form in (FUSED, TILED):
        assert np.abs(experts(form) - want).max() <= BOUND * np.abs(want).max()
    each = x[:6, None]
    want = np.einsum("gtk,gnk->gtn", each.astype(np.float64), numbers)
    found = jax.jit(lambda x, w: batched_dot(x, w, (), TILED))(each, w)
    assert np.abs(found - want).max() <= BOUND * np.abs(want).max()


NAMES = ("v3-fp8-ue8m0", "v2-lite", "v32-fp8", "qwen2-tied", "llama-llama3")
SLOW = ("v4-flash", "v4-base", "v4-pro")


@pytest.mark.parametrize(
    "name", [n if n in sampled(NAMES, 2, 6) else pytest.param(n, marks=pytest.mark.full) for n in NAMES + SLOW]
)
def test_models_in_the_tiled_form(name: str) -> None:
    """Prefill against Hugging Face, then a token at a time: the logits of either form."""
    model, bound = golden(name), 3e-5 if name.startswith("v4") else 2e-5
    tiled = Numerics("plain", "float32", products="tiled")
    logits, _, _ = one_shot(model, model.tokens, tiled)
    assert worst(logits, model.logits) <= bound
    batch, few = len(model.tokens), 6
    step, cache = step_of(model.config, tiled), family(model.config).new_cache(model.config, tiled, batch, few)
    for t in range(few):
        new = jnp.asarray(model.tokens[:, t : t + 1], jnp.int32)
        out, _, cache = step(model.params, cache, new, counts(*[1] * batch))
        assert worst(np.asarray(out)[:, 0], logits[:, t]) <= bound


def test_the_platform_chooses_unless_the_caller_does() -> None:
    assert Numerics().form == FUSED == Numerics().for_platform("cpu").form == Numerics().for_platform("cuda").form
    assert Numerics().for_platform("tpu").form == TILED
    for products in ("fused", "tiled"):
        chosen = Numerics(products=products)
        assert chosen.for_platform("tpu") == chosen.for_platform("cpu") == chosen
    with pytest.raises(InputError, match="products: expected auto or fused or tiled, found 'best'"):
        Numerics(products="best")


def test_weights_lie_row_major_but_for_short_rows() -> None:
    """Here that is where they lie already: told so, nothing moves, and a program takes them as they are."""
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wide, narrow = jnp.zeros((3, 4, LANES)), jnp.zeros((3, LANES, 4))
    assert weight_placement(where, wide, "cpu") is where is weight_placement(where, narrow, "tpu")
    placed = weight_placement(where, wide, "tpu")
    assert place(wide, placed) is wide and place(narrow, where) is narrow
    jax.jit(lambda x: x + 1, in_shardings=placed)(wide)
    turned = Format(Layout((1, 2, 0)), where)
    assert place(wide, turned).format.layout.major_to_minor == (1, 2, 0)
    np.testing.assert_array_equal(place(wide, turned), wide)
