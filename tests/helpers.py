"""What the tests of the model share: goldens loaded once, compiled steps kept, seeds that are printed, distances."""

from __future__ import annotations

import dataclasses
import datetime
import os
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import emulator as em
import jax
import jax.numpy as jnp
import numpy as np

from dsjax.backend import compiler_options
from dsjax.checkpoint.load import load
from dsjax.config import Config
from dsjax.models import family
from dsjax.numerics import Numerics
from dsjax.params import Tree
from dsjax.plan.counted import QUICK

ROOT = Path(__file__).resolve().parents[1]
GOLDENS = ROOT / "tests" / "goldens"
_ALL = sorted(p.parent.name for p in GOLDENS.glob("*/config.json"))
V32_NAMES, V4_NAMES = (tuple(name for name in _ALL if name.startswith(family)) for family in ("v32", "v4"))
DENSE_NAMES: tuple[str, ...] = tuple(name for name in _ALL if name.startswith(("qwen2", "llama")))
NAMES: tuple[str, ...] = tuple(name for name in _ALL if name not in V32_NAMES + V4_NAMES + DENSE_NAMES)
"""V2's and V3's."""
V3_NAMES = NAMES + V32_NAMES + DENSE_NAMES
"""Those of spec V3: all but V4's."""
FLOAT32 = Numerics("plain", "float32")

LOOKED_AT: dict[str, Any] = compiler_options("cpu") | QUICK
"""Options for a program of ours that is compiled only for its text and memory: `test_compiled_step` holds both to those
of the program that runs. Compiling takes two thirds of the time."""

SEED = int(os.environ.get("DSJAX_TEST_SEED", 20_000 + datetime.date.today().toordinal()))
"""Of everything that is sampled; a new one each day. Every assertion on sampled cases prints it."""

SYNTH_SETTINGS = {
    "hidden_size": 32,
    "vocab_size": 320,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_attention_heads": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
}
"""`dsjax synth --set` of a model that takes no time."""

V32_SETTINGS = {**SYNTH_SETTINGS, "index_n_heads": 4, "index_head_dim": 16, "index_topk": 4}
"""The same of V3.2; four tokens of any context are chosen."""

DENSE_SETTINGS = {
    "hidden_size": 64,
    "vocab_size": 320,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
"""The same of a distill; a head is wider than hidden / heads."""

V4_SETTINGS = {
    "hidden_size": 64,
    "vocab_size": 320,
    "moe_intermediate_size": 40,
    "num_attention_heads": 4,
    "head_dim": 16,
    "qk_rope_head_dim": 4,
    "q_lora_rank": 24,
    "o_lora_rank": 12,
    "o_groups": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 4,
}
"""The same of V4; the last group of 32 of an expert's `down` is short."""


def rng(*key: int) -> np.random.Generator:
    """A generator of the run's seed and a key of the caller's."""
    return np.random.default_rng([SEED, *key])


def sampled(names: tuple[str, ...], count: int, *key: int) -> tuple[str, ...]:
    """`count` of the names, drawn by the run's seed, in their order."""
    chosen = rng(*key).choice(len(names), count, replace=False)
    return tuple(names[i] for i in sorted(chosen))


@dataclasses.dataclass(frozen=True)
class Golden:
    """A checkpoint folder in memory, and Hugging Face's logits of it.

    Attributes:
      tokens: int32 [B, T].
      logits: float32 [B, T, V].
      mtp_logits: float32 [B, T - 1, V] or None.
    """

    folder: Path
    config: Config
    params: Tree
    tokens: np.ndarray
    logits: np.ndarray
    mtp_logits: np.ndarray | None


def read_golden(folder: Path) -> Golden:
    """A folder as scripts/make_goldens*.py write it, the MTP module included where there is one."""
    with np.load(folder / "reference.npz") as reference:
        arrays = dict(reference)
    config, params, _ = load(folder, mtp="mtp_logits" in arrays)
    return Golden(folder, config, params, arrays["tokens"], arrays["logits"], arrays.get("mtp_logits"))


@lru_cache
def golden(name: str) -> Golden:
    """A committed golden, loaded once."""
    return read_golden(GOLDENS / name)


@lru_cache
def emulated(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A committed golden as the emulator reads it: weights by checkpoint name, config.json."""
    return em.load_folder(GOLDENS / name)


@lru_cache
def step_of(config: Config, numerics: Numerics, want: str = "all") -> Any:
    """The step jitted, its cache not donated, so that a test may go on twice from one state."""
    return jax.jit(partial(family(config).step, config, numerics, want=want))


@lru_cache
def draft_of(config: Config, numerics: Numerics, want: str = "all") -> Any:
    """The MTP module jitted, its cache not donated."""
    return jax.jit(partial(family(config).draft, config, numerics, want=want))


def counts(*n_new: int) -> jax.Array:
    """int32 [B], how many new tokens each slot takes."""
    return jnp.array(n_new, jnp.int32)


def one_shot(
    model: Golden, tokens: np.ndarray, numerics: Numerics = FLOAT32, cache: Any = None
) -> tuple[np.ndarray, jax.Array, Any]:
    """Logits float32 [B, T, V], hidden (`step`'s) and cache of one step that takes all of `tokens` [B, T]."""
    batch, length = tokens.shape
    if cache is None:
        cache = family(model.config).new_cache(model.config, numerics, batch, length)
    new = jnp.asarray(tokens, jnp.int32)
    logits, hidden, cache = step_of(model.config, numerics)(model.params, cache, new, counts(*[length] * batch))
    return np.asarray(logits), hidden, cache


def one_shot_draft(model: Golden, hidden: jax.Array, tokens: np.ndarray, numerics: Numerics = FLOAT32) -> np.ndarray:
    """The MTP module's logits float32 [B, T - 1, V]: row i from hidden [B, T, D] at i and the token at i + 1."""
    batch, length = tokens.shape
    cache = family(model.config).new_cache(model.config, numerics, batch, length, draft=True)
    draft = draft_of(model.config, numerics)
    following = jnp.asarray(tokens[:, 1:], jnp.int32)
    logits, _, _ = draft(model.params, cache, hidden[:, :-1], following, counts(*[length - 1] * batch))
    return np.asarray(logits)


def worst(x: Any, reference: Any) -> float:
    """max |x - reference| over max |reference|; NaN if anything is."""
    x, reference = np.asarray(x, np.float32), np.asarray(reference, np.float32)
    assert x.shape == reference.shape, (x.shape, reference.shape)
    return float(np.abs(x - reference).max() / np.abs(reference).max())


def relative_norm(x: Any, reference: Any) -> float:
    """|x - reference| / |reference|."""
    x, reference = np.asarray(x, np.float64), np.asarray(reference, np.float64)
    assert x.shape == reference.shape, (x.shape, reference.shape)
    return float(np.linalg.norm(x - reference) / np.linalg.norm(reference))
