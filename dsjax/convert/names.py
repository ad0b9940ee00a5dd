"""What tensors of a result are called: as in the source, or V4's under DeepSeek's or Hugging Face's names."""

from __future__ import annotations

import re

_STACK = re.compile(r"\.experts\.(gate_up_proj|down_proj)")
_EXPERT = re.compile(r"^(layers\.\d+)\.ffn\.experts\.(\d+)\.(w[123])\.weight$")

# From official names to Hugging Face's modules (spec V4 3.3), in this order. `checkpoint.names` leads back.
_RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^head\.", "lm_head."),
        (r"^embed\.", "model.embed_tokens."),
        (r"^norm\.", "model.norm."),
        (r"^hc_head_", "model.hc_head.hc_"),
        (r"^layers\.", "model.layers."),
        (r"\.attn_norm\.", ".input_layernorm."),
        (r"\.ffn_norm\.", ".post_attention_layernorm."),
        (r"\.hc_(attn|ffn)_", r".\1_hc."),
        (r"\.indexer\.weights_proj\.", ".compressor.indexer.scorer.weights_proj."),
        (r"\.indexer\.wq_b\.", ".compressor.indexer.q_b_proj."),
        (r"\.indexer\.compressor\.", ".compressor.indexer."),
        (r"(\.compressor\.(?:indexer\.)?)wkv\.", r"\1kv_proj."),
        (r"(\.compressor\.(?:indexer\.)?)wgate\.", r"\1gate_proj."),
        (r"(\.compressor\.(?:indexer\.)?)norm\.", r"\1kv_norm."),
        (r"(\.compressor\.(?:indexer\.)?)ape$", r"\1position_bias"),
        (r"\.attn\.q_norm\.", ".attn.q_a_norm."),
        (r"\.attn_sink$", ".sinks"),
        (r"\.attn\.w(q_a|q_b|kv|o_a|o_b)\.", r".attn.\1_proj."),
        (r"\.gate\.bias$", ".gate.e_score_correction_bias"),
        (r"\.shared_experts\.w1\.", ".shared_experts.gate_proj."),
        (r"\.shared_experts\.w2\.", ".shared_experts.down_proj."),
        (r"\.shared_experts\.w3\.", ".shared_experts.up_proj."),
        (r"\.attn\.", ".self_attn."),
        (r"\.ffn\.", ".mlp."),
        (r"(?<!_hc)\.scale$", ".weight_scale_inv"),
    )
)


def hugging_face_name(name: str) -> str:
    """A V4 tensor's name in Hugging Face's modules, from its official one; routed experts apart.

    Draft modules (`mtp.`) have no place there and keep their names.
    """
    if name.startswith("mtp."):
        return name
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name


def stack_of(name: str) -> tuple[str, tuple[int, int]] | None:
    """Which stack of Hugging Face's an official weight of a routed expert belongs to, and its place: (expert, part).

    `gate_up_proj` has an expert's gate (part 0) above its up projection (1), `down_proj` one part. None for others.
    """
    match = _EXPERT.match(name)
    if match is None:
        return None
    layer, expert, which = match.groups()
    stack = "down_proj" if which == "w2" else "gate_up_proj"
    return f"model.{layer}.mlp.experts.{stack}", (int(expert), int(which == "w3"))


def is_stack(name: str) -> bool:
    """Whether a tensor of this name, in any spelling, holds all experts of a layer."""
    return _STACK.search(name) is not None


def scale_name(weight: str, v4: bool) -> str:
    """What the E4M3 or E2M1 scales of a weight are called, whose own name may be of any spelling."""
    if not weight.endswith(".weight"):  # a stack of experts
        return weight + "_scale_inv"
    if v4 and not re.search(r"\.(self_attn|mlp)\.", weight):
        return weight.removesuffix("weight") + "scale"
    return weight + "_scale_inv"
