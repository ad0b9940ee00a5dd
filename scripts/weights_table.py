"""What each choice of --weights costs: logits and perplexity against float32, of small trained models; docs/weights.md.

    ./scripts/test --parity                                       # once: .venv with PyTorch and transformers
    .venv/bin/python scripts/weights_table.py [--steps 700] [--out docs/weights.md] [--keep DIR]

Two models of bytes, a V3 (latent attention, routed and shared experts) and a Qwen2, are trained by Hugging Face's code
on this project's own text (its documents and sources) until they predict it far better than its byte frequencies do,
and are scored on a part that they have not seen. Random models of the other families are scored on random tokens: their
errors say how a format rounds, not what that does to a model. All in float32 but for the weights, so that nothing else
differs, and once as people run it, in bfloat16.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Qwen2Config, Qwen2ForCausalLM

from dsjax.checkpoint.load import load
from dsjax.config import load_config
from dsjax.generate import Engine
from dsjax.numerics import Numerics
from dsjax.params import tree_bytes
from dsjax.synth import synth_config, synthesise

ROOT = Path(__file__).resolve().parents[1]
LENGTH, BATCH, HELD_OUT = 128, 8, 16
COMMON = {
    "vocab_size": 256,
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
RANDOM = {
    "deepseek-v3.2": (2, {"index_n_heads": 4, "index_head_dim": 32, "index_topk": 512, "q_lora_rank": 128}),
    "deepseek-v4-flash": (4, {"head_dim": 64, "q_lora_rank": 128, "o_lora_rank": 64, "o_groups": 2}),
}
SMALL = {"hidden_size": 256, "vocab_size": 512, "num_attention_heads": 4, "moe_intermediate_size": 256}
SMALL |= {"n_routed_experts": 8, "num_experts_per_tok": 2, "qk_rope_head_dim": 16}
SMALL_V3 = {"intermediate_size": 512, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "v_head_dim": 32, "n_group": 1}
SMALL_V3 |= {"topk_group": 1, "num_nextn_predict_layers": 0}
SMALL_V4 = {"index_n_heads": 4, "index_head_dim": 32, "index_topk": 512, "num_nextn_predict_layers": 0}
ROWS = (  # (heading, --weights, --dtype)
    ("bfloat16", "bfloat16", "float32"),
    ("float16", "float16", "float32"),
    ("fp8, weights alone", "fp8", "float32"),
    ("int8, weights alone", "int8", "float32"),
    ("w8a8", "w8a8", "float32"),
    ("w4a8", "w4a8", "float32"),
    ("bfloat16, activations too", "bfloat16", "bfloat16"),
    ("w8a8, the rest in bfloat16", "w8a8", "bfloat16"),
    ("w4a8, the rest in bfloat16", "w4a8", "bfloat16"),
)


def text() -> np.ndarray:
    """This project's documents and sources, uint8."""
    paths = sorted(p for part in ("docs/*.md", "dsjax/**/*.py", "quant/*.py", "sharding/*.py") for p in ROOT.glob(part))
    return np.frombuffer(b"\n".join(p.read_bytes() for p in [ROOT / "README.md", *paths]), np.uint8)


def pick(data: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """int64 [count, LENGTH + 1], from random places."""
    starts = generator.integers(0, len(data) - LENGTH - 1, count)
    return np.stack([data[s : s + LENGTH + 1] for s in starts]).astype(np.int64)


def untrained(name: str) -> Any:
    torch.manual_seed(0)
    if name == "qwen2":
        more = {"num_key_value_heads": 2, "intermediate_size": 768}
        return Qwen2ForCausalLM(Qwen2Config(**COMMON, **more))
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
    latent = {"q_lora_rank": 128, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
    widths = {"intermediate_size": 512, "moe_intermediate_size": 256, "first_k_dense_replace": 1}
    config = DeepseekV3Config(**COMMON, **experts, **latent, **widths, routed_scaling_factor=1.0)
    return DeepseekV3ForCausalLM(config)


def train(name: str, folder: Path, steps: int, data: np.ndarray) -> None:
    """A trained model, saved in float32 as Hugging Face saves it."""
    model, generator = untrained(name), np.random.default_rng(1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=0.1)
    start = time.perf_counter()
    for step in range(steps):
        batch = torch.from_numpy(pick(data, BATCH, generator))
        loss = model(input_ids=batch, labels=batch).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        rate.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"{name}: step {step}, {loss.item():.3f} nats, {time.perf_counter() - start:.0f} s", flush=True)
    model.save_pretrained(folder)


def scored(folder: Path, tokens: np.ndarray, weights: str, dtype: str) -> tuple[np.ndarray, int]:
    """(logits float64 [B, T, V], bytes of the weights)"""
    numerics = Numerics("plain", dtype).for_checkpoint(load_config(folder), weights)
    config, params, _ = load(folder, weights=weights)
    logits = Engine(config, params, numerics).score(tokens)[0]
    return logits.astype(np.float64), tree_bytes(params)


def losses(logits: np.ndarray, following: np.ndarray) -> np.ndarray:
    """Nats of each token that follows, [B, T]."""
    top = logits.max(-1, keepdims=True)
    log_p = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    found: np.ndarray = -np.take_along_axis(log_p, following[..., None], -1)[..., 0]
    return found


def rows_of(folder: Path, tokens: np.ndarray, trained: bool) -> list[str]:
    """A Markdown table."""
    inputs, following = tokens[:, :-1], tokens[:, 1:]
    reference, nbytes = scored(folder, inputs, "float32", "float32")
    base = losses(reference, following)
    head = "| weights | bytes | logits: relative norm | largest error | same first choice |"
    lines = [head + (" perplexity | change |" if trained else ""), "|---" * (7 if trained else 5) + "|"]
    whole = f" {math.exp(base.mean()):.4f} | |" if trained else ""
    lines.append(f"| float32 | {nbytes / 1e6:.1f} MB | | | |{whole}")
    for heading, weights, dtype in ROWS:
        logits, nbytes = scored(folder, inputs, weights, dtype)
        norm = np.linalg.norm(logits - reference) / np.linalg.norm(reference)
        largest = np.abs(logits - reference).max() / np.abs(reference).max()
        same = (logits.argmax(-1) == reference.argmax(-1)).mean()
        line = f"| {heading} | {nbytes / 1e6:.1f} MB | {norm:.1e} | {largest:.1e} | {100 * same:.1f}% |"
        if trained:
            loss = losses(logits, following)
            change = math.exp(loss.mean() - base.mean()) - 1
            noise = (loss - base).mean(-1).std(ddof=1) / math.sqrt(len(loss))
            line += f" {math.exp(loss.mean()):.4f} | {100 * change:+.3f}% ± {100 * noise:.3f} |"
        lines.append(line)
        print(f"{folder.name}: {line}", flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--out", type=Path, help="the tables go behind the first heading of the last level there")
    parser.add_argument("--random", default="deepseek-v3.2", help=f"presets, of {', '.join(RANDOM)} (slow)")
    parser.add_argument("--keep", type=Path, help="where models are kept, and found again")
    options = parser.parse_args()
    keep = options.keep or Path(tempfile.mkdtemp(prefix="dsjax-weights-"))
    data = text()
    cut = len(data) * 9 // 10
    held_out = pick(data[cut:], HELD_OUT, np.random.default_rng(2))
    parts = []
    for name, title in (("v3", "V3, trained"), ("qwen2", "Qwen2, trained")):
        folder = keep / name
        if not (folder / "config.json").is_file():
            train(name, folder, options.steps, data[:cut])
        parts += ["", f"### {title}", "", *rows_of(folder, held_out, True)]
    for preset in filter(None, options.random.split(",")):
        layers, settings = RANDOM[preset]
        folder = keep / preset
        if not folder.exists():
            more = SMALL_V4 if "v4" in preset else SMALL_V3
            config = synth_config(preset, layers=layers, settings=SMALL | more | settings)
            synthesise(folder, config, template=preset)
        tokens = np.random.default_rng(3).integers(2, 512, (4, 65))
        parts += ["", f"### {preset}, random weights", "", *rows_of(folder, tokens, False)]
    result = "\n".join(parts)
    if options.out:
        before = options.out.read_text(encoding="utf-8").split("\n### ")[0] if options.out.exists() else ""
        options.out.write_text(f"{before.rstrip()}\n{result}\n", encoding="utf-8")
    print(result)


if __name__ == "__main__":
    main()
