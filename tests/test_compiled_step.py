"""What XLA makes of a step: the cache is updated in place, and nothing the size of a weight or the cache is ever made.

From `memory_analysis()` and the optimised text of DeepSeek-V3 at its full 671B size, compiled from shapes alone.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers import LOOKED_AT

from dsjax.backend import compiler_options
from dsjax.cache.per_token import init_cache
from dsjax.cache.rows import ROW_BLOCK
from dsjax.config import Config, load_config
from dsjax.models import v3
from dsjax.numerics import Numerics
from dsjax.params import VECTOR, abstract_params, leaf_shape, matrix_shape, table
from quant import group_size, reference_dot
from quant.matmul import TILE_BYTES

CONFIG: Config = load_config("deepseek-v3")
NUMERICS = {
    "float32": Numerics("plain", "float32"),
    "bfloat16": Numerics("plain", "bfloat16"),
    "native": Numerics("native", "bfloat16"),
}
CASES = [
    ("float32", 1),
    ("bfloat16", 1),
    ("native", 1),
    ("native", 120),
    pytest.param("float32", 120, marks=pytest.mark.full),
    pytest.param("bfloat16", 120, marks=pytest.mark.full),
]
SHORT, LONG = 1016, 16376  # capacities 1024 and 16384
DECODE, PREFILL = 1, 120
"""Tokens. 120, not 128: no product of it with heads or choices is a weight's width, so a shape tells its owner."""

EXPERT_BYTES = 3 * 2048 * 7168 + 3 * 4 * 16 * 56  # codes, and a float32 scale per 128 x 128


@lru_cache
def _compiled(kind: str, tokens: int, max_length: int, as_it_runs: bool = False) -> tuple[Any, int]:
    """The step compiled for one slot, its cache donated, and the cache's bytes."""
    numerics = NUMERICS[kind]
    cache = jax.eval_shape(partial(init_cache, CONFIG, numerics, 1, max_length))
    step = jax.jit(partial(v3.step, CONFIG, numerics), donate_argnums=1)
    new, row = jax.ShapeDtypeStruct((1, tokens), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    compiled = step.lower(abstract_params(CONFIG), cache, new, row).compile(
        compiler_options("cpu") if as_it_runs else LOOKED_AT
    )
    return compiled, sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(cache))


def test_what_is_looked_at_is_what_runs() -> None:
    """Unoptimised machine code is made of the same program, to the letter, and takes the same memory."""
    looked, runs = (_compiled("native", 1, SHORT, as_it_runs)[0] for as_it_runs in (False, True))
    assert looked.as_text() == runs.as_text()
    for name in ("temp_size_in_bytes", "alias_size_in_bytes", "argument_size_in_bytes"):
        assert getattr(looked.memory_analysis(), name) == getattr(runs.memory_analysis(), name)


@pytest.mark.parametrize(("kind", "tokens"), CASES)
def test_the_cache_is_updated_in_place(kind: str, tokens: int) -> None:
    """All of the cache's bytes are aliased, and temporary memory is the same for a cache 16 times as long."""
    temporary = []
    for max_length in (SHORT, LONG):
        compiled, cache_bytes = _compiled(kind, tokens, max_length)
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes == cache_bytes
        temporary.append(memory.temp_size_in_bytes)
    print(kind, tokens, temporary)
    assert temporary[0] == temporary[1]


@pytest.mark.parametrize("max_length", [20, 240, *(pytest.param(n, marks=pytest.mark.full) for n in (100, 600))])
def test_no_step_copies_the_cache(max_length: int) -> None:
    """Nor at any small capacity, where one block of keys might be all of it."""
    for tokens in (1, 16):
        compiled, _ = _compiled("bfloat16", tokens, max_length)
        shape = jax.eval_shape(partial(init_cache, CONFIG, Numerics(), 1, max_length)).rows.shape
        copies = re.findall(rf"= u16\[{','.join(map(str, shape))}\]\S* copy\(", compiled.as_text())
        assert copies == []


def _activation_bytes(tokens: int) -> int:
    """A bound on what lives at once besides weights' tiles, every value counted as float32, one slot.

    - The stream, always: residual, delta, normalised input and one copy: 4 T D.
    - In attention: queries in and out of the latent space (T H K, 2 T H A), three buffers of the context (loop carry,
      its update, its rounded copy: 3 T H C), three of the scores of one key block (scores, exponentials, copy), and the
      key block twice.
    - Or in the experts: the sum and what it takes rows of (2 T D); in blocks of g rows, one expert at a time, the rows
      in, out and weighted (3 g D), gate, up, inner and inner quantised (4 g M). Nothing for all assignments.
    - Or in a dense layer: gate, up, inner and inner quantised: 4 T F.
    """
    c, t = CONFIG, tokens
    heads = c.qk_head_dim + 2 * c.latent_dim + 3 * c.kv_lora_rank + 3 * ROW_BLOCK
    attention = t * c.num_attention_heads * heads + 2 * ROW_BLOCK * c.latent_dim
    size = group_size(t * c.num_experts_per_tok, c.n_routed_experts)
    moe = 2 * t * c.hidden_size + size * (3 * c.hidden_size + 4 * c.moe_intermediate_size)
    dense = 4 * t * c.intermediate_size
    return 4 * (4 * t * c.hidden_size + max(attention, moe, dense))


@pytest.mark.parametrize(("kind", "tokens"), CASES)
def test_temporary_memory_is_less_than_an_expert_and_the_activations(kind: str, tokens: int) -> None:
    compiled, _ = _compiled(kind, tokens, SHORT)
    temporary = compiled.memory_analysis().temp_size_in_bytes
    print(kind, tokens, temporary, EXPERT_BYTES + _activation_bytes(tokens))
    assert temporary < EXPERT_BYTES + _activation_bytes(tokens)
    if tokens == DECODE:  # a step that moves every weight once must not hold a thousandth of them
        weights = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(abstract_params(CONFIG)))
        assert temporary < weights / 1000


def _forbidden() -> dict[tuple[int, int], str]:
    """(rows, columns) of every matrix that is more than a tile, alone, and of each stack of it, in both orders."""
    shapes = {}
    for row in table(CONFIG):
        if row.storage == VECTOR or math.prod(matrix_shape(row, CONFIG)) <= TILE_BYTES // 2:
            continue
        n, k = matrix_shape(row, CONFIG)
        stack = leaf_shape(row, CONFIG)[:-2]
        for lead in {1, *(math.prod(stack[i:]) for i in range(len(stack)))}:
            shapes[lead * n, k] = shapes[lead * k, n] = ".".join(row.path)
    return shapes


def _whole_weights(text: str) -> list[str]:
    """Float arrays in optimised HLO that hold a whole matrix, or a stack of them, however its rows are split up.

    Inside a loop fusion nothing is held: only its operands and results count.
    """
    forbidden, found = _forbidden(), []
    text = re.sub(r"^%fused_computation.*?^}", "", text, flags=re.DOTALL | re.MULTILINE)
    for dtype, shape in set(re.findall(r"\b(f16|bf16|f32|f64)\[([0-9,]+)\]", text)):
        dims = [n for n in map(int, shape.split(",")) if n > 1]
        if len(dims) > 1 and (math.prod(dims[:-1]), dims[-1]) in forbidden:
            found.append(f"{dtype}[{shape}] {forbidden[math.prod(dims[:-1]), dims[-1]]}")
    return found


@pytest.mark.parametrize(("kind", "tokens"), CASES)
def test_no_weight_is_ever_decoded_whole(kind: str, tokens: int) -> None:
    assert _whole_weights(_compiled(kind, tokens, SHORT)[0].as_text()) == []


def test_a_whole_decode_would_be_seen() -> None:
    """The reference product decodes one expert's matrix whole."""
    leaves = abstract_params(CONFIG)["moe"]["experts"]
    x = jax.ShapeDtypeStruct((PREFILL, 7168), jnp.float32)
    whole = jax.jit(lambda x, w: reference_dot(x, w, (1, 5))).lower(x, leaves["gate"]).compile()
    assert _whole_weights(whole.as_text())
