#!/usr/bin/env python3
"""Writes a checkpoint as a GGUF file that llama.cpp runs: matrices in Q8_0, norms and routers in float32.

For `bench_vs_hf.py --gguf`: the same weights, rounded from the checkpoint's own to Q8_0 (INT8 with one scale per 32).
The file has no tokenizer. Takes V3 geometries (sigmoid routing, query compression) whose matrices have rows of whole
32s. Needs `pip install gguf`.

    .venv/bin/python scripts/make_bench_gguf.py --model DIR --out FILE

DIR is made, of the bench geometry with random weights, if it does not exist.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from bench_vs_hf import checkpoint

from dsjax.checkpoint.load import load
from dsjax.config import Config
from dsjax.params import Tree

ATTENTION = {"q_a": "attn_q_a", "q_b": "attn_q_b", "kv_a": "attn_kv_a_mqa", "o": "attn_output"}
ATTENTION_NORMS = {"q_norm": "attn_q_a_norm", "kv_norm": "attn_kv_a_norm"}
FFN = {"dense": (("ffn", ""),), "moe": (("shared", "_shexp"), ("experts", "_exps"))}

Tensor = tuple[str, np.ndarray, bool]
"""(name, float32 values, whether they become Q8_0)."""


def _layer(config: Config, layer: dict[str, Any], kind: str, at: int) -> Iterator[Tensor]:
    """One layer's tensors; `at` is its place in its stack."""
    attention = layer["attention"]
    for ours, name in ATTENTION.items():
        yield name + ".weight", np.asarray(attention[ours][at]), True
    for ours, name in ATTENTION_NORMS.items():
        yield name + ".weight", np.asarray(attention[ours][at]), False
    # llama.cpp computes absorbed MLA from kv_b's two halves, the keys' transposed: [H, C, N] and [H, U, C].
    kv_b = np.asarray(attention["kv_b"][at]).reshape(config.num_attention_heads, -1, config.kv_lora_rank)
    keys, values = np.split(kv_b, [config.qk_nope_head_dim], axis=1)
    yield "attn_k_b.weight", np.ascontiguousarray(keys.transpose(0, 2, 1)), True
    yield "attn_v_b.weight", np.ascontiguousarray(values), True
    yield "attn_norm.weight", np.asarray(layer["input_norm"][at]), False
    yield "ffn_norm.weight", np.asarray(layer["post_norm"][at]), False
    for ours, suffix in FFN[kind]:
        for part in ("gate", "up", "down"):
            yield f"ffn_{part}{suffix}.weight", np.asarray(layer[ours][part][at]), True
    if kind == "moe":
        yield "ffn_gate_inp.weight", np.asarray(layer["router"]["weight"][at]), False
        yield "exp_probs_b.bias", np.asarray(layer["router"]["bias"][at]), False


def tensors(config: Config, params: Tree) -> Iterator[Tensor]:
    """Every tensor of the model under llama.cpp's names, from parameters held in float32."""
    yield "token_embd.weight", np.asarray(params["embed"]), True
    yield "output_norm.weight", np.asarray(params["norm"]), False
    yield "output.weight", np.asarray(params["head"]), True
    for number in range(config.num_hidden_layers):
        dense = number < config.first_k_dense_replace
        kind, at = ("dense", number) if dense else ("moe", number - config.first_k_dense_replace)
        for name, values, quantised in _layer(config, params[kind], kind, at):
            yield f"blk.{number}.{name}", values, quantised


def _metadata(writer: Any, gguf: Any, c: Config) -> None:
    """The architecture, in the keys of llama.cpp's deepseek2 (V2 and V3; MLA as one key-value head)."""
    writer.add_name("bench")
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(1)
    writer.add_q_lora_rank(c.q_lora_rank)
    writer.add_kv_lora_rank(c.kv_lora_rank)
    writer.add_key_length(c.latent_dim)
    writer.add_value_length(c.kv_lora_rank)
    writer.add_key_length_mla(c.qk_head_dim)
    writer.add_value_length_mla(c.v_head_dim)
    writer.add_leading_dense_block_count(c.first_k_dense_replace)
    writer.add_expert_feed_forward_length(c.moe_intermediate_size)
    writer.add_expert_count(c.n_routed_experts)
    writer.add_expert_used_count(c.num_experts_per_tok)
    writer.add_expert_shared_count(c.n_shared_experts)
    writer.add_expert_group_count(c.n_group)
    writer.add_expert_group_used_count(c.topk_group)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_norm(c.norm_topk_prob)
    writer.add_expert_weights_scale(c.routed_scaling_factor)
    writer.add_rope_dimension_count(c.qk_rope_head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    if c.yarn is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(c.yarn.factor)
        writer.add_rope_scaling_orig_ctx_len(c.yarn.original_max_position_embeddings)
        writer.add_rope_scaling_yarn_beta_fast(c.yarn.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(c.yarn.beta_slow)
        if c.yarn.mscale_all_dim is not None:
            writer.add_rope_scaling_yarn_log_mul(0.1 * c.yarn.mscale_all_dim)  # the key holds a tenth of it


def write(folder: Path, out: Path) -> None:
    """Writes the checkpoint in `folder` as a GGUF file at `out`."""
    import gguf

    config, params, _ = load(folder, weights="float32")
    if config.q_lora_rank is None or config.scoring_func != "sigmoid" or config.topk_method != "noaux_tc":
        raise SystemExit(f"{folder}: expected a V3 geometry with query compression, found another")
    writer = gguf.GGUFWriter(out, "deepseek2")
    _metadata(writer, gguf, config)
    for name, values, quantised in tensors(config, params):
        if quantised:
            codes = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, codes, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Makes the checkpoint where it is missing, and the file from it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a V3 checkpoint; of the bench geometry if made here")
    parser.add_argument("--out", type=Path, required=True, help="the GGUF file")
    options = parser.parse_args()
    write(checkpoint(options.model), options.out)


if __name__ == "__main__":
    main()
