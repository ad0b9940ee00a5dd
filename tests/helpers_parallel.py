"""Small models of every family with enough heads, experts and groups for sixteen devices, and what one device gives."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
from helpers import FLOAT32, V4_SETTINGS

from dsjax.checkpoint.load import load
from dsjax.config import Config, load_config
from dsjax.generate import Engine
from dsjax.numerics import Numerics
from dsjax.parallel import Parallel, load_onto, parallel
from dsjax.plan.counted import QUICK
from dsjax.synth import synth_config, synthesise
from sharding import parse_plan

_LATENT = {
    "hidden_size": 96,
    "vocab_size": 320,
    "intermediate_size": 160,
    "num_attention_heads": 16,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 16,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
}
_INDEX = {"index_n_heads": 4, "index_head_dim": 16, "index_topk": 12}
_DENSE = {"hidden_size": 96, "vocab_size": 320, "intermediate_size": 160, "num_attention_heads": 16, "head_dim": 8}

MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "v3": ("deepseek-v3.1", 2, _LATENT),
    "v32": ("deepseek-v3.2", 2, _LATENT | _INDEX),
    "v4": (
        "deepseek-v4-flash",
        5,
        V4_SETTINGS
        | {
            "num_attention_heads": 16,
            "o_groups": 4,
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "o_lora_rank": 16,
        }
        | {"moe_intermediate_size": 64},
    ),
    "qwen2": ("deepseek-r1-distill-qwen-7b", 2, _DENSE | {"num_key_value_heads": 4}),
    "llama": ("deepseek-r1-distill-llama-8b", 2, _DENSE | {"num_key_value_heads": 2}),
}
"""Preset, layers, settings. FP8 blocks and groups of FP4 are cut by almost every plan."""

_WIDE = {
    "hidden_size": 256,
    "vocab_size": 320,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "kv_lora_rank": 128,
    "q_lora_rank": 96,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 64,
    "n_routed_experts": 16,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
}
_WIDE_V4 = {
    "hidden_size": 256,
    "vocab_size": 320,
    "num_attention_heads": 8,
    "head_dim": 64,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 96,
    "o_groups": 2,
    "o_lora_rank": 256,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 512,
    "sliding_window": 8,
    "index_n_heads": 4,
    "index_head_dim": 32,
    "index_topk": 2,
    "num_hash_layers": 0,
    "compress_ratios": [4, 0],
}
NATIVE_MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "v3-wide": ("deepseek-v3.1", 1, _WIDE),
    "v3-wide-dense": ("deepseek-v3", 1, _WIDE | {"first_k_dense_replace": 1, "num_nextn_predict_layers": 0}),
    "v32-wide": ("deepseek-v3.2", 1, _WIDE | {"index_n_heads": 4, "index_head_dim": 64, "index_topk": 12}),
    "v4-wide": ("deepseek-v4-flash", 1, _WIDE_V4),
    "v4-wide-hca": ("deepseek-v4-flash", 1, _WIDE_V4 | {"compress_ratios": [128, 0]}),
}
"""Of one layer each: deeper ones tell little, for one rounding that falls the other way moves all that follows. Wide
enough for two to four devices to have whole groups of 128 channels of every input that native quantises."""

PLANS = {
    "v3": ["tp=2", "ep=4", "dp=2", "dp=2,ep=2,tp=2", "ep=16", "tp=16", "ep=4,tp=4", "ep=4/slots",
        "ep=8/sent", "dp=2,ep=4,tp=2/slots"],
    "v32": ["tp=4", "ep=8", "dp=4", "dp=2,ep=2,tp=4", "ep=16/slots", "ep=4,tp=2/sent", "tp=16"],
    "v4": [
        "tp=4", "tp=8", "tp=16", "tp=8/gather", "ep=16", "ep=4,tp=4/gather", "dp=2,ep=2,tp=2", "ep=4/slots",
        "dp=2,ep=2,tp=4/sent",
    ],
    "qwen2": ["tp=2", "tp=4", "tp=8", "tp=16", "dp=4", "dp=2,tp=8"],
    "llama": ["tp=2", "tp=4", "tp=8", "tp=16", "dp=2", "dp=8,tp=2"],
}  # fmt: skip
"""Plans by family: `dp=..,ep=..,tp=..`, then "slots" (attention by slots), "sent" (tokens
to their experts, even few), or "gather" (output groups copied)."""

TOKENS = np.random.default_rng(17).integers(2, 320, (3, 16))
PROMPTS = [[5, 6, 7], TOKENS[0, :11].tolist(), [9]]


@lru_cache
def folder(name: str) -> Path:
    """A checkpoint of the family, as DeepSeek writes it."""
    preset, layers, settings = (MODELS | NATIVE_MODELS)[name]
    where = Path(mkdtemp(prefix=f"dsjax-{name}-")) / "model"
    synthesise(where, synth_config(preset, layers=layers, settings=settings), template=preset)
    return where


def arrange(config: Config, plan: str, numerics: Numerics = FLOAT32, **options: Any) -> Parallel:
    """A plan as `PLANS` writes it, on the first virtual devices."""
    mesh, _, how = plan.partition("/")
    slots = {"attention": "slots"}
    options |= {"slots": slots, "sent": slots | {"dispatch": "all-to-all"}, "gather": {"o_groups": "gather"}}.get(
        how, {}
    )
    return parallel(config, parse_plan(mesh), numerics, **options)


def _made_soon(engine: Engine) -> Engine:
    """Where programs are only compared with each other, in float32 and within a bound, machine code is not what is
    tested: unoptimised, with the same collectives and fusions, a test of V4 takes a third less."""
    if not engine.numerics.native:
        engine.compiler_options |= QUICK
    return engine


@lru_cache
def one_engine(name: str, numerics: Numerics = FLOAT32, weights: str = "stored") -> Engine:
    """The whole model on one device, its draft module too where it has one."""
    config = load_config(folder(name))
    numerics = numerics.for_checkpoint(config, weights)
    config, params, _ = load(folder(name), mtp=None, weights=weights)
    return _made_soon(Engine(config, params, numerics))


def engine_on(name: str, plan: str, numerics: Numerics = FLOAT32, weights: str = "stored", **options: Any) -> Engine:
    """The model on a mesh."""
    config = load_config(folder(name))
    numerics = numerics.for_checkpoint(config, weights)
    many = arrange(config, plan, numerics, **options)
    config, params, _ = load_onto(many, folder(name), mtp=None, weights=weights)
    return _made_soon(Engine(config, params, numerics, parallel=many))


@lru_cache
def scored(name: str, chunk: int) -> tuple[np.ndarray, np.ndarray | None]:
    """One device's logits of TOKENS in chunks, and the draft's."""
    return one_engine(name).score(part(chunk), mtp=name.startswith("v"), chunk=chunk)


def part(chunk: int) -> np.ndarray:
    """TOKENS as prefill; of a chunk of one, the first few as decode."""
    return TOKENS if chunk > 1 else TOKENS[:, :4]
