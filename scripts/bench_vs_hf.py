#!/usr/bin/env python3
"""Decode and prefill speed beside Hugging Face transformers, in one run.

The model is the bench geometry (V3 layers: hidden 1024, 8 layers of which 1 dense, 16 heads, 64 experts of 512, top-6,
vocabulary 32000; 841 M parameters). dsjax runs a checkpoint in the official FP8 format, weights resident as stored;
Hugging Face runs its DeepseekV3ForCausalLM in bfloat16. Both have random weights, batch 1 unless --batch. Rounds
alternate between the two; medians and their ratio are printed. Needs the `parity` extra.

    .venv/bin/python scripts/bench_vs_hf.py [--batch 1] [--prompt-length 128] [--new-tokens 24] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from dsjax.checkpoint.load import load
from dsjax.config import Config
from dsjax.generate import Engine
from dsjax.numerics import Numerics
from dsjax.synth import synth_config, synthesise

BENCH_GEOMETRY = {
    "num_hidden_layers": 8,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "q_lora_rank": 384,
    "n_routed_experts": 64,
    "moe_intermediate_size": 512,
    "num_experts_per_tok": 6,
}


def hugging_face(config: Config) -> DeepseekV3ForCausalLM:
    """Hugging Face's model of the same geometry, random bfloat16 weights."""
    c = synth_config("deepseek-v3", settings=BENCH_GEOMETRY)
    for key in ("quantization_config", "torch_dtype", "architectures", "model_type"):
        c.pop(key)
    c["num_key_value_heads"] = config.num_attention_heads
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**c)).eval()
    torch.set_default_dtype(torch.float32)
    return model


def time_hugging_face(model: DeepseekV3ForCausalLM, prompt: np.ndarray, new_tokens: int) -> tuple[float, list[float]]:
    """(seconds of prefill, seconds of each decode step), greedy, with its own cache."""
    with torch.inference_mode():
        start = time.perf_counter()
        out = model(torch.from_numpy(prompt), use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        prefill = time.perf_counter() - start
        steps = []
        for _ in range(new_tokens):
            start = time.perf_counter()
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            steps.append(time.perf_counter() - start)
    return prefill, steps


def main() -> None:
    """Runs the comparison and prints a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt-length", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", type=Path, help="a checkpoint of the bench geometry; made if not given")
    options = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or Path(scratch) / "bench"
        if not folder.exists():
            synthesise(folder, synth_config("deepseek-v3", settings=BENCH_GEOMETRY))
        config, params, _ = load(folder)
        engine = Engine(config, params, Numerics("plain", "bfloat16"))
        reference = hugging_face(config)
        prompt = np.random.default_rng(0).integers(0, config.vocab_size, (options.batch, options.prompt_length))
        times: dict[str, tuple[list[float], list[float]]] = {"dsjax": ([], []), "hf": ([], [])}
        for round_ in range(options.rounds + 1):
            timing = engine.generate(prompt.tolist(), options.new_tokens + 1)[1]
            prefill, steps = time_hugging_face(reference, prompt, options.new_tokens)
            if round_ > 0:  # the first round warms up
                for name, first, rest in (("dsjax", timing.ttft_s, timing.token_s), ("hf", prefill, steps)):
                    times[name][0].append(first)
                    times[name][1].append(statistics.median(rest))
    result: dict[str, float] = {}
    for name, (prefills, steps) in times.items():
        result[f"{name}_prefill_tokens_per_s"] = options.batch * options.prompt_length / statistics.median(prefills)
        result[f"{name}_decode_tokens_per_s"] = options.batch / statistics.median(steps)
    for what in ("prefill", "decode"):
        ours, theirs = (result[f"{name}_{what}_tokens_per_s"] for name in ("dsjax", "hf"))
        result[f"{what}_ratio"] = ours / theirs
        print(
            f"{what:8} dsjax FP8 {ours:7.1f} tokens/s   Hugging Face bf16 {theirs:7.1f} tokens/s   {ours / theirs:.2f}x"
        )
    print(json.dumps({"batch": options.batch, "prompt_length": options.prompt_length, **result}))


if __name__ == "__main__":
    main()
