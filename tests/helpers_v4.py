"""Small random DeepSeek-V4 models, their compiled steps, and ways to feed them."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from helpers import FLOAT32

from dsjax.cache.v4 import V4Cache
from dsjax.config import V4Config, parse_config
from dsjax.models import v4
from dsjax.numerics import Numerics
from dsjax.params import FLOAT32 as FLOAT32_ROW
from dsjax.params import INTEGER, VECTOR, Row, Tree, build_tree, leaf_shape, table
from dsjax.presets import preset

TOKENS = 320
"""In every model's sequences: two entries of an HCA layer and a rest, eighty of a CSA layer."""

NATIVE = Numerics("native", pow2=True)

_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "head_dim": 32,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 32,
    "o_lora_rank": 16,
    "o_groups": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "num_hash_layers": 2,
    "index_n_heads": 8,  # all of their products negative: a score of zero, and ties; the fewer, the more often
    "index_head_dim": 16,
    "index_topk": 12,
    "max_position_embeddings": 4096,
}
MODELS: dict[str, dict[str, Any]] = {
    # The released models' kinds of layers; in the first, two periods are scanned.
    "flash": {"compress_ratios": [0, 0, 4, 128, 4, 128, 0], "sliding_window": 128},
    "pro": {
        "compress_ratios": [128, 128, 4, 128, 0],
        "num_hash_layers": 1,
        "o_groups": 4,
        "index_topk": 96,  # more than there are entries
        "sliding_window": 20,
        "routed_scaling_factor": 2.5,
    },
    # Nothing but a scan of two periods.
    "periods": {"compress_ratios": [4, 128, 4, 128, 0], "num_hash_layers": 0, "sliding_window": 128},
    # So narrow that a million positions fit.
    "long": {
        "compress_ratios": [4, 128, 0],
        "num_hash_layers": 0,
        "sliding_window": 20,
        "head_dim": 8,
        "qk_rope_head_dim": 4,
        "index_head_dim": 8,
        "max_position_embeddings": 1 << 20,
    },
    # One layer each, experts by score; heads that a KV scale group divides, keys that an FP4 scale group divides.
    **{
        f"{name}-native": {
            "compress_ratios": [ratio, 0],
            "num_hash_layers": 0,
            "sliding_window": 20,
            "head_dim": 80,
            "qk_rope_head_dim": 16,
            "index_head_dim": 32,
        }
        for name, ratio in (("window", 0), ("csa", 4), ("hca", 128))
    },
}
WHOLE = ("flash", "pro")


@dataclasses.dataclass(frozen=True)
class Model:
    """A random model.

    Attributes:
      tokens: int32 [4, TOKENS].
    """

    config: V4Config
    params: Tree
    tokens: np.ndarray


def config_of(name: str, **changes: Any) -> V4Config:
    """The configuration of one of `MODELS`, changed."""
    data = preset("deepseek-v4-flash")
    del data["quantization_config"], data["expert_dtype"]
    data.update(_SIZES, **MODELS[name])
    data["num_hidden_layers"] = len(data["compress_ratios"]) - 1
    data["rope_scaling"] = {**data["rope_scaling"], "original_max_position_embeddings": 64}
    return parse_config({**data, **changes})


def _leaf(config: V4Config, row: Row) -> jax.Array:
    """Values strong enough that every part shows in the logits; the same for a leaf of the same name and shape."""
    shape = leaf_shape(row, config)
    random = np.random.default_rng(zlib.crc32(".".join(row.path).encode()))
    if row.storage == INTEGER:  # [L, V, k] different experts
        lead, experts = shape[:-1], config.n_routed_experts
        keys = random.random((*lead, experts))
        return jnp.asarray(keys.argsort(axis=-1)[..., : shape[-1]], jnp.int32)
    x, kind = random.standard_normal(shape, np.float32), row.path[-1]
    if row.storage == VECTOR:
        x = 1 + 0.1 * x
    elif kind == "scale":
        x = 1 + 0.3 * x
    elif row.storage == FLOAT32_ROW and kind != "fn":
        x = x * (0.05 if kind == "bias" else 0.5)
    elif kind != "embed":
        x = x * shape[-1] ** -0.5
    return jnp.asarray(x, jnp.float32)


@lru_cache
def model(name: str) -> Model:
    """One of `MODELS`, made once; tokens and weights never change: drawn afresh, one day something would be tied."""
    config = config_of(name)
    tokens = np.random.default_rng(7).integers(0, config.vocab_size, (4, TOKENS)).astype(np.int32)
    with jax.ensure_compile_time_eval():  # the first to ask may be tracing
        return Model(config, build_tree(table(config), partial(_leaf, config)), tokens)


@lru_cache
def _jitted(function: Any, name: str, numerics: Numerics) -> Any:
    one = model(name)
    return partial(jax.jit(partial(function, one.config, numerics, want="all")), one.params)


def step_of(name: str, numerics: Numerics = FLOAT32) -> Any:
    """(cache, tokens, n_new) -> (logits of all, streams, cache), jitted; the cache is not donated."""
    return _jitted(v4.step, name, numerics)


def draft_of(name: str, numerics: Numerics = FLOAT32) -> Any:
    """(cache, hidden, tokens, n_new) -> (logits of all, streams, cache), jitted; the cache is not donated."""
    return _jitted(v4.draft, name, numerics)


def empty(name: str, batch: int = 2, max_length: int = TOKENS, numerics: Numerics = FLOAT32, **how: Any) -> V4Cache:
    """A cache of zeros."""
    return v4.new_cache(model(name).config, numerics, batch, max_length, **how)


def leaves(cache: V4Cache) -> dict[str, np.ndarray]:
    """All arrays of a cache but its lengths, by name, floats as bits; axes [L, B, places, width]."""
    found = {}
    for path, array in jax.tree_util.tree_leaves_with_path(cache):
        name, host = jax.tree_util.keystr(path), np.asarray(array)
        if name != ".length":
            found[name] = host.view(np.uint32) if host.dtype == np.float32 else host
    return found


def filled(cache: V4Cache, value: Any, length: Sequence[int]) -> V4Cache:
    """A cache with a value everywhere (NaN in rows of codes: all ones, which every format reads as NaN or huge)."""

    def fill(array: jax.Array) -> jax.Array:
        code = value if array.dtype == jnp.float32 else jnp.iinfo(array.dtype).max
        return jnp.full_like(array, code)

    full = jax.tree.map(fill, cache)
    return dataclasses.replace(full, length=jnp.asarray(length, jnp.int32))
