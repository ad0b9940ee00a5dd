"""Small twins exported through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers import V4_SETTINGS

from dsjax.cli.main import main

V3_SETTINGS: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "moe_intermediate_size": 128,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
}

DENSE_SETTINGS: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

TWINS: dict[str, tuple[int, dict[str, Any]]] = {
    "deepseek-v3": (2, V3_SETTINGS),
    "deepseek-v3.2": (2, {**V3_SETTINGS, "index_head_dim": 32, "index_n_heads": 4, "index_topk": 16}),
    "deepseek-v4-flash": (5, V4_SETTINGS),
    "deepseek-v4-pro": (5, V4_SETTINGS),
    "deepseek-r1-distill-qwen-1.5b": (2, DENSE_SETTINGS),
}


def twin_flags(preset: str) -> list[str]:
    """--model and what makes it small."""
    layers, settings = TWINS[preset]
    return ["--model", preset, "--layers", str(layers)] + [
        flag for key, value in settings.items() for flag in ("--set", f"{key}={json.dumps(value)}")
    ]


def export_twin(out: Path, preset: str, *flags: str) -> dict[str, Any]:
    """A bundle with random weights and golden numbers; its manifest."""
    small = ["--length", "32", "--chunk", "8"]
    status = main(["export", *twin_flags(preset), "--synthetic-golden", *small, "--out", str(out), *flags])
    assert status == 0
    manifest: dict[str, Any] = json.loads((out / "manifest.json").read_text())
    return manifest
