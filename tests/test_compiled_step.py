"""What XLA makes of a step: the cache is updated in place, and nothing the size of a weight or the cache is ever made.

From `memory_analysis()` and the optimised text of a mid-size geometry (the bench geometry at three layers), compiled
from shapes alone.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from dsjax.cache import KEY_BLOCK, init_cache
from dsjax.config import Config, parse_config
from dsjax.models import v3
from dsjax.numerics import Numerics
from dsjax.params import LINEAR, abstract_params, leaf_shape, matrix_shape, table
from dsjax.presets import preset
from quant import group_size

CONFIG: Config = parse_config(
    {
        **preset("deepseek-v3"),
        "hidden_size": 1024,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "intermediate_size": 2816,
        "num_attention_heads": 16,
        "q_lora_rank": 384,
        "n_routed_experts": 64,
        "moe_intermediate_size": 512,
        "num_experts_per_tok": 6,
        "vocab_size": 32000,
        "num_nextn_predict_layers": 0,
    }
)
NUMERICS = {
    "float32": Numerics("plain", "float32"),
    "bfloat16": Numerics("plain", "bfloat16"),
    "native": Numerics("native", "bfloat16"),
}
SHORT, LONG = 1016, 16376  # capacities 1024 and 16384
DECODE, PREFILL = 1, 128
EXPERT_BYTES = 3 * 512 * 1024 + 3 * 4 * 4 * 8  # codes, and a float32 scale per 128 x 128


@lru_cache
def _compiled(kind: str, tokens: int, max_length: int) -> tuple[Any, int]:
    """The step compiled for one slot, its cache donated, and the cache's bytes."""
    numerics = NUMERICS[kind]
    cache = jax.eval_shape(partial(init_cache, CONFIG, 1, max_length, numerics.dtype))
    step = jax.jit(partial(v3.step, CONFIG, numerics), donate_argnums=1)
    new, row = jax.ShapeDtypeStruct((1, tokens), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    compiled = step.lower(abstract_params(CONFIG), cache, new, row).compile()
    return compiled, sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(cache))


@pytest.mark.parametrize("tokens", [DECODE, PREFILL])
@pytest.mark.parametrize("kind", NUMERICS)
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
