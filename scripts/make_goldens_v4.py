"""Make small reference checkpoints of DeepSeek-V4: the official file format, Hugging Face's logits.

The counterpart of make_goldens.py for `model_type: deepseek_v4`; an oracle that shares no code with this repository.
For each geometry it draws random weights, writes them as a checkpoint folder in DeepSeek's official format (flat names,
F8_E4M3 codes with 128x128 block scales, FP4 experts packed two to a byte with scales per 32 inputs, ...), or as Hugging
Face's `save_pretrained` does, puts exactly the values that the files stand for into transformers' modules, and saves
their float32 logits:

    <folder>/config.json, model*.safetensors[.index.json]
    <folder>/reference.npz    tokens int32 [B, T], logits float32 [B, T, V], and with an MTP module
                              mtp_logits float32 [B, T-1, V] (row i: streams of position i before the head's mix, and
                              token i+1, predicts token i+2)

Hugging Face drops the MTP module; here it is put together from Hugging Face's own layer, norms and head.

    python scripts/make_goldens_v4.py [NAME ...] [--out tests/goldens] [--seed N]
"""

import argparse
import copy
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from make_goldens import (
    MAX_TOKEN_DRAWS,
    MIN_ROUTING_MARGIN,
    Model,
    Tensors,
    per_block,
    prepare,
    quantise,
    write_shards,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4DecoderLayer,
    DeepseekV4HyperHead,
    DeepseekV4RMSNorm,
)

MIN_INDEX_MARGIN = 1e-4
"""Of the gap between the last chosen and the first rejected index score, over the largest score of the query."""
FP4_GROUP = 32
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


@dataclass(frozen=True)
class Geometry:
    """One checkpoint: what it covers, its architecture (changes to the base config) and how it is stored."""

    covers: str
    config: Mapping[str, Any]
    storage: Literal["official", "hf", "hf-names"] = "official"
    """official: DeepSeek's names, FP8 and FP4; hf: what `save_pretrained` writes; hf-names: module names."""
    experts: Literal["fp4", "fp8"] = "fp4"
    scales: Literal["ue8m0-f32", "e8m0", "u8"] = "e8m0"
    """Container of the power-of-two scales."""
    dtype: Literal["bf16", "f32"] = "bf16"
    """Of what Hugging Face stores, except what it keeps in float32."""
    mtp: Literal["full", "copies", "dspark", "none"] = "none"
    """full: mtp.0; copies: also an embedding and a head in it, to be ignored; dspark: tensors of another module."""
    vision: bool = False
    """Tensors of a vision tower beside the text model, to be ignored."""
    shards: int = 1
    """1: a single model.safetensors without an index."""
    batch: int = 1
    length: int = 330
    seed: int = 0
    """Of the committed files; one at which every expert is used."""


# The fields and spellings of DeepSeek's config.json; sizes that no geometry overrides are these.
COMMON = json.loads("""{
    "architectures": ["DeepseekV4ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 0,
    "compress_ratios": [0, 4, 128, 0], "compress_rope_theta": 160000, "eos_token_id": 1, "hc_eps": 1e-06, "hc_mult": 4,
    "hc_sinkhorn_iters": 20, "head_dim": 64, "hidden_act": "silu", "hidden_size": 64, "index_head_dim": 32,
    "index_n_heads": 8, "index_topk": 8, "initializer_range": 0.02, "max_position_embeddings": 1048576,
    "model_type": "deepseek_v4", "moe_intermediate_size": 32, "n_routed_experts": 6, "n_shared_experts": 1,
    "norm_topk_prob": true, "num_attention_heads": 4, "num_experts_per_tok": 2, "num_hash_layers": 1,
    "num_hidden_layers": 3, "num_key_value_heads": 1, "num_nextn_predict_layers": 1, "o_groups": 2, "o_lora_rank": 32,
    "q_lora_rank": 48, "qk_rope_head_dim": 16, "rms_norm_eps": 1e-06, "rope_theta": 10000,
    "routed_scaling_factor": 1.5, "scoring_func": "sqrtsoftplus", "sliding_window": 128, "swiglu_limit": 10.0,
    "tie_word_embeddings": false, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
    "transformers_version": "4.57.1", "use_cache": true, "vocab_size": 96,
    "rope_scaling": {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32,
                     "beta_slow": 1}}""")
QUANTIZATION = json.loads("""{"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
    "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}""")
SHORT_YARN = {
    "max_position_embeddings": 1024,
    "rope_scaling": {**COMMON["rope_scaling"], "original_max_position_embeddings": 64},
}
TINY = {"hidden_size": 32, "moe_intermediate_size": 24, "num_attention_heads": 2, "o_lora_rank": 16, "q_lora_rank": 24}
DSPARK = {
    "dspark_block_size": 5,
    "dspark_markov_rank": 8,
    "dspark_noise_token_id": 95,
    "dspark_target_layer_ids": [0, 1],
}
VISION = json.loads("""{
    "vision_dim": 16, "vision_downsample_ratio": 3, "vision_inter_dim": 24, "vision_max_n_token": 384,
    "vision_max_wh_ratio": 8, "vision_min_pixels": 147456, "vision_n_heads": 2, "vision_n_layers": 1,
    "vision_patch_size": 2, "vision_rope_theta": 10000}""")

GEOMETRIES: dict[str, Geometry] = {
    "v4-flash": Geometry(
        "FP4 experts, F8_E8M0 scales, partial 128-blocks; Flash's order of layers, window 32, top 16 of 82 entries, "
        "yarn from 64 positions; MTP; 2 shards",
        {"compress_ratios": [0, 0, 4, 128, 4, 128, 4, 0], "num_hidden_layers": 7, "num_hash_layers": 3}
        | {"o_lora_rank": 72, "sliding_window": 32, "index_topk": 16, **SHORT_YARN},
        mtp="full",
        shards=2,
        seed=1,
    ),
    "v4-pro": Geometry(
        "FP4 experts, F8_E8M0 scales; Pro's order of layers, 4 o_groups of 8 heads, window 128, every entry chosen; "
        "yarn at its real values, route scale 2.5, swiglu_limit 0.75 (clamps); MTP; 2 shards",
        {"compress_ratios": [128, 128, 4, 128, 4, 128, 4, 0], "num_hidden_layers": 7, "num_hash_layers": 3}
        | {"hidden_size": 64, "num_attention_heads": 8, "head_dim": 80, "o_groups": 4, "o_lora_rank": 24}
        | {"n_routed_experts": 8, "num_experts_per_tok": 3, "index_topk": 96}
        | {"routed_scaling_factor": 2.5, "swiglu_limit": 0.75},
        mtp="full",
        shards=2,
        seed=2,
    ),
    "v4-base": Geometry(
        "FP8 experts with partial 128x128 blocks, power-of-two scales held in F32, no expert_dtype; swiglu_limit 1; "
        "MTP with an embedding and a head of its own, to be ignored",
        {"compress_ratios": [4, 128, 0], "num_hidden_layers": 2, "hidden_size": 136, "moe_intermediate_size": 72}
        | {
            "q_lora_rank": 136,
            "num_attention_heads": 2,
            "n_routed_experts": 3,
            "swiglu_limit": 1.0,
            "sliding_window": 16,
        },
        experts="fp8",
        scales="ue8m0-f32",
        mtp="copies",
        length=150,
        seed=3,
    ),
    "v4-u8": Geometry(
        "FP4 experts, U8 scales; in mtp.0 - 2 another draft module (DSpark), and a vision tower, both to be ignored",
        {"compress_ratios": [128, 4, 0, 0, 0], "num_hidden_layers": 2, "hidden_size": 96, "expert_dtype": "fp4"}
        | {"n_routed_experts": 4, "sliding_window": 16, **SHORT_YARN, **DSPARK, **VISION},
        scales="u8",
        mtp="dspark",
        vision=True,
        length=150,
        seed=4,
    ),
    "v4-hf": Geometry(
        "BF16 and F32 as Hugging Face's save_pretrained writes: its config.json, names nearly the official ones; "
        "no MTP; 2 shards",
        {"compress_ratios": [0, 128, 4, 0], "head_dim": 32, "qk_rope_head_dim": 8, "index_head_dim": 16}
        | {**TINY, "n_routed_experts": 5, "sliding_window": 16, **SHORT_YARN},
        storage="hf",
        shards=2,
        length=150,
        seed=5,
    ),
    "v4-hf-names": Geometry(
        "F32 as Hugging Face's save_pretrained writes under its module names, experts stacked; no MTP",
        {"compress_ratios": [0, 4, 128, 0], "head_dim": 32, "qk_rope_head_dim": 8, "index_head_dim": 16}
        | {**TINY, "n_routed_experts": 5, "sliding_window": 16, **SHORT_YARN},
        storage="hf-names",
        dtype="f32",
        length=150,
        seed=6,
    ),
}


def official_config(geometry: Geometry) -> dict[str, Any]:
    """Returns config.json as DeepSeek publishes it, at this geometry's sizes."""
    config = {**COMMON, **geometry.config}
    if geometry.storage == "official":
        config["quantization_config"] = QUANTIZATION
    return dict(sorted(config.items()))


# Hugging Face's module names and the official ones; each is a part of a name, applied in this order.
RENAMES = [
    (r"^model\.", ""),
    (r"^lm_head\.", "head."),
    (r"^embed_tokens\.", "embed."),
    (r"hc_head\.hc_", "hc_head_"),
    (r"\.(attn|ffn)_hc\.", r".hc_\1_"),
    (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.self_attn\.compressor\.indexer\.scorer\.", ".attn.indexer."),
    (r"\.self_attn\.compressor\.indexer\.q_b_proj\.", ".attn.indexer.wq_b."),
    (r"\.self_attn\.compressor\.indexer\.", ".attn.indexer.compressor."),
    (r"\.self_attn\.", ".attn."),
    (r"\.compressor\.kv_norm\.", ".compressor.norm."),
    (r"\.compressor\.gate_proj\.", ".compressor.wgate."),
    (r"\.position_bias$", ".ape"),
    (r"\.kv_proj\.", ".wkv."),
    (r"\.sinks$", ".attn_sink"),
    (r"\.(q|o)_(a|b)_proj\.", r".w\1_\2."),
    (r"\.q_a_norm\.", ".q_norm."),
    (r"\.mlp\.", ".ffn."),
    (r"\.e_score_correction_bias$", ".bias"),
    (r"\.shared_experts\.gate_proj\.", ".shared_experts.w1."),
    (r"\.shared_experts\.down_proj\.", ".shared_experts.w2."),
    (r"\.shared_experts\.up_proj\.", ".shared_experts.w3."),
]
FP8 = re.compile(
    r"\.(attn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)|shared_experts\.w[123]|e_proj|h_proj|main_proj)\.weight$"
)
EXPERT = re.compile(r"\.experts\.\d+\.w[123]\.weight$")
FLOAT32 = re.compile(r"hc_(attn|ffn|head)_(fn|base|scale)$|\.attn_sink$|\.ape$|\.gate\.bias(_vl)?$")


def official_name(name: str) -> str:
    """Official name of one of Hugging Face's tensors, or of `Mtp`'s with `mtp.0.` before it."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def pieces(name: str, shape: torch.Size) -> list[tuple[str, tuple[int, ...]]]:
    """Lists the official tensors (name, shape) that one tensor of Hugging Face's is the concatenation of."""
    name = official_name(name)
    if name.endswith(".experts.gate_up_proj"):
        prefix, (experts, width, hidden) = name.removesuffix("gate_up_proj"), shape
        return [(f"{prefix}{e}.{w}.weight", (width // 2, hidden)) for e in range(experts) for w in ("w1", "w3")]
    if name.endswith(".experts.down_proj"):
        prefix = name.removesuffix("down_proj")
        return [(f"{prefix}{e}.w2.weight", tuple(shape[1:])) for e in range(shape[0])]
    return [(name, tuple(shape))]


class Mtp(nn.Module):
    """The MTP block: a window-only layer of Hugging Face's on h_proj of the main model's streams plus e_proj of tokens.

    Tensors are named so that `official_name("mtp.0." + name)` is the official name.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        config = copy.deepcopy(config)
        config.num_hidden_layers = 1
        config.layer_types, config.mlp_layer_types = ["sliding_attention"], ["moe"]
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.config = config
        self.block: Model = DeepseekV4DecoderLayer(config, 0)
        self.enorm, self.hnorm, self.norm = (DeepseekV4RMSNorm(hidden, eps=eps) for _ in range(3))
        self.e_proj, self.h_proj = (nn.Linear(hidden, hidden, bias=False) for _ in range(2))
        self.hc_head = DeepseekV4HyperHead(config)

    def forward(self, model: Model, streams: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [B, S, V] of the main model's streams [B, S, n, d] before its head, and the tokens after them."""
        embeddings = model.model.embed_tokens(tokens)
        positions = torch.arange(tokens.shape[1])[None]
        mask = create_sliding_window_causal_mask(
            config=self.config,
            inputs_embeds=embeddings,
            attention_mask=None,
            past_key_values=None,
            position_ids=positions,
        )
        rotary = {"main": model.model.rotary_emb(embeddings, position_ids=positions, layer_type="main")}
        mixed = self.e_proj(self.enorm(embeddings))[:, :, None] + self.h_proj(self.hnorm(streams))
        out = self.block(
            mixed,
            position_embeddings=rotary,
            position_ids=positions,
            attention_mask=mask,
            input_ids=tokens,
            past_key_values=None,
        )
        return model.lm_head(self.norm(self.hc_head(out)))

    def named(self) -> dict[str, torch.Tensor]:
        """Its tensors by Hugging Face's kind of names, the block's own beside the others."""
        return {"mtp.0." + name.removeprefix("block."): tensor for name, tensor in self.state_dict().items()}


def build(config: Mapping[str, Any], mtp: bool) -> tuple[Model, Mtp | None]:
    """Builds Hugging Face's model in float32 with eager attention and experts, and the MTP block if there is one."""
    not_architecture = ("quantization_config", "torch_dtype", "expert_dtype")
    arguments = {k: v for k, v in config.items() if k not in not_architecture}
    hf_config: Any = DeepseekV4Config(**json.loads(json.dumps(arguments)))  # a copy: it changes the dicts it is given
    hf_config._attn_implementation = "eager"
    hf_config._experts_implementation = "eager"
    model = DeepseekV4ForCausalLM(hf_config).float().eval()
    return model, Mtp(hf_config).float().eval() if mtp else None


def parts(model: Model, mtp: Mtp | None) -> dict[str, torch.Tensor]:
    """All parameters and persistent buffers, by Hugging Face's names."""
    return {**model.state_dict(), **(mtp.named() if mtp is not None else {})}


def load(model: Model, mtp: Mtp | None, values: Tensors) -> None:
    """Copies values by official name into Hugging Face's modules; every tensor of theirs must be given."""
    for name, tensor in parts(model, mtp).items():
        assert tensor.dtype == (torch.int64 if name.endswith("tid2eid") else torch.float32), name
        of = pieces(name, tensor.shape)
        assert all(tuple(values[piece].shape) == shape for piece, shape in of), name
        tensor.copy_(torch.cat([values[piece].reshape(-1) for piece, _ in of]).reshape(tensor.shape))


GAINS = {"head": 2.0, "ffn.gate": 2.0, "wgate": 1.5, "wo_a": 1.5, "wo_b": 1.5, "w2": 2.0}


def draw(name: str, shape: tuple[int, ...], config: Mapping[str, Any], seed: int) -> torch.Tensor:
    """Draws one tensor (float32; the hash table int64), scaled so that activations are O(1) and logits O(1..10)."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if name.endswith("tid2eid"):  # distinct experts of each token
        table = rng.permuted(np.tile(np.arange(config["n_routed_experts"]), (shape[0], 1)), axis=1)
        return torch.from_numpy(table[:, : shape[1]].copy())
    noise = rng.standard_normal(shape)
    if name.endswith("_scale"):  # of the three or one mixes of a site
        value = 1 + 0.3 * noise
    elif name.endswith("_fn"):
        value = noise / np.sqrt(shape[1])
    elif name.endswith("attn_sink"):
        value = 2 + noise
    elif name.endswith((".bias", ".bias_vl")):
        value = 0.15 * noise
    elif name.endswith(("kv_norm.weight", "compressor.norm.weight")):  # so that attention is not nearly uniform
        value = 1.5 * (1 + 0.2 * noise)
    elif name.endswith("_base"):  # spread out, so that the streams of a token stay apart
        value = 1.5 * noise
    elif name.endswith((".ape", "embed.weight")):
        value = noise
    elif "norm." in name:
        value = 1 + 0.2 * noise
    elif len(shape) == 1:
        value = noise
    else:
        gain = next((g for key, g in GAINS.items() if f"{key}.weight" in name), 1.0)
        tiles = np.exp(0.5 * rng.standard_normal([-(-n // 32) for n in shape]))  # so that block scales differ
        noise = noise * tiles.repeat(32, 0).repeat(32, 1)[: shape[0], : shape[1]]
        value = gain * noise / np.sqrt(np.mean(noise**2)) / np.sqrt(shape[1])
    return torch.from_numpy(value.astype(np.float32))


def scale_bytes(amax: torch.Tensor, largest: float) -> torch.Tensor:
    """E8M0 bytes of the least powers of two with amax / scale <= largest."""
    bits = (amax.clamp(min=1e-4) / largest).view(torch.int32)  # on the bits: float log2 may err near exact powers
    return (((bits >> 23) & 0xFF) + ((bits & 0x7FFFFF) != 0).int()).to(torch.uint8)


def scale_values(scale: torch.Tensor) -> torch.Tensor:
    """Float32 values of scales in any of their containers."""
    if scale.dtype == torch.float32:
        return scale
    return (scale.view(torch.uint8).to(torch.int32) << 23).view(torch.float32)


def quantise_fp4(weight: torch.Tensor, scales: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises float32 [out, in] to E2M1, two codes to a byte (even inputs low), a scale per 32 inputs of a row.

    Returns int8 [out, in/2] and the scales [out, in/32] in the dtype they are stored in.
    """
    groups = weight.view(weight.shape[0], -1, FP4_GROUP)
    byte = scale_bytes(groups.abs().amax(-1), 6.0)
    scaled = groups / scale_values(byte)[..., None]
    magnitude = (scaled.abs()[..., None] - E2M1).abs().argmin(-1)
    codes = (magnitude + 8 * (scaled < 0)).to(torch.uint8).view(weight.shape)
    packed = (codes[:, 0::2] | (codes[:, 1::2] << 4)).view(torch.int8)
    return packed, {"ue8m0-f32": scale_values(byte), "u8": byte, "e8m0": byte.view(torch.float8_e8m0fnu)}[scales]


def store(name: str, value: torch.Tensor, geometry: Geometry) -> Tensors:
    """Returns the official tensors of one value: cast, or codes and scales."""
    if value.dtype == torch.int64 or FLOAT32.search(name):
        return {name: value}
    if geometry.storage != "official":
        return {name: value if geometry.dtype == "f32" or "norm." in name else value.to(torch.bfloat16)}
    fp4 = EXPERT.search(name) and geometry.experts == "fp4"
    if fp4 or EXPERT.search(name) or FP8.search(name):
        codes, scale = (quantise_fp4 if fp4 else quantise)(value, geometry.scales)
        return {name: codes, name.removesuffix("weight") + "scale": scale}
    return {name: value.to(torch.bfloat16)}


def values_of(stored: Tensors) -> Tensors:
    """Returns the float32 (hash tables: int64) values that official tensors stand for, by name; scales are consumed."""
    values = {}
    for name, tensor in stored.items():
        scale = stored.get(name.removesuffix("weight") + "scale") if name.endswith(".weight") else None
        if name.endswith(".scale"):
            continue
        if scale is None:
            values[name] = tensor if tensor.dtype == torch.int64 else tensor.to(torch.float32)
        elif tensor.dtype == torch.int8:
            byte = tensor.view(torch.uint8)
            codes = torch.stack([byte & 15, byte >> 4], dim=-1).flatten(1).long()
            sign = 1 - 2 * (codes >> 3).float()
            values[name] = sign * E2M1[codes & 7] * scale_values(scale).repeat_interleave(FP4_GROUP, 1)
        else:
            values[name] = tensor.to(torch.float32) * per_block(scale_values(scale), tensor.shape)
    return values


def to_ignore(geometry: Geometry, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Lists official tensors (name, shape) that play no part in the reference: of draft modules and a vision tower."""
    hidden, vocab, experts = config["hidden_size"], config["vocab_size"], config["n_routed_experts"]
    shapes: dict[str, tuple[int, ...]] = {}
    if geometry.mtp == "copies":  # they hold other values than the main model's, so that using them shows
        shapes |= {f"mtp.0.{name}.weight": (vocab, hidden) for name in ("emb.tok_emb", "head")}
    if geometry.mtp == "dspark":
        rank, targets = config["dspark_markov_rank"], len(config["dspark_target_layer_ids"])
        shapes |= {"mtp.0.main_proj.weight": (hidden, targets * hidden), "mtp.0.main_norm.weight": (hidden,)}
        for stage in range(3):
            shapes |= {f"mtp.{stage}.{name}_norm.weight": (hidden,) for name in ("attn", "ffn")}
            shapes |= {f"mtp.{stage}.attn.attn_sink": (config["num_attention_heads"],)}
            shapes |= {f"mtp.{stage}.attn.wq_a.weight": (config["q_lora_rank"], hidden)}
            shapes |= {f"mtp.{stage}.ffn.gate.bias": (experts,)}
        shapes |= {f"mtp.2.markov_head.markov_{name}.weight": (vocab, rank) for name in ("w1", "w2")}
        shapes |= {"mtp.2.confidence_head.proj.weight": (1, hidden + rank), "mtp.2.norm.weight": (hidden,)}
        shapes |= {"mtp.2.hc_head_fn": (4, 4 * hidden), "mtp.2.hc_head_base": (4,), "mtp.2.hc_head_scale": (1,)}
    if geometry.vision:
        dim = config["vision_dim"]
        shapes |= {"vision.patch_embed.weight": (dim, 3 * config["vision_patch_size"] ** 2)}
        shapes |= {"vision.blocks.0.attn.qkv.weight": (3 * dim, dim), "vision.blocks.0.attn.qkv.bias": (3 * dim,)}
        shapes |= {"vision.norm.weight": (dim,), "aligner.0.weight": (hidden, 9 * dim), "aligner.0.bias": (hidden,)}
        shapes |= {f"image_{name}": (hidden,) for name in ("start", "end", "newline", "pad")}
        shapes |= {f"layers.{i}.ffn.gate.bias_vl": (experts,) for i in range(config["num_hidden_layers"])}
    return shapes


def gap(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Gap between the k-th and the next score of each row; infinite where there are no more than k."""
    ordered = scores.sort(dim=-1, descending=True).values
    if k >= scores.shape[-1]:
        return torch.full(scores.shape[:-1], float("inf"))
    return torch.where(ordered[..., k] == float("-inf"), float("inf"), ordered[..., k - 1] - ordered[..., k])


@torch.no_grad()
def reference(model: Model, mtp: Mtp | None, tokens: torch.Tensor) -> tuple[dict[str, Any], torch.Tensor]:
    """Returns logits (and mtp_logits) of tokens int64 [B, T], and bool [B, T]: which take part in no near tie.

    A near tie is one of expert scores, or of index scores relative to the largest that the query may see.
    """
    sound = torch.ones(tokens.shape, dtype=torch.bool)
    streams = []

    def router(module: Model, _: Any, output: Any) -> None:
        scores = module.score_fn(output[0]) + module.e_score_correction_bias
        margin = gap(scores, module.top_k).view(len(tokens), -1)
        sound[:, -margin.shape[1] :] &= margin > MIN_ROUTING_MARGIN  # the MTP block's rows belong to their tokens

    def scorer(_: Model, __: Any, scores: torch.Tensor) -> None:
        visible = torch.arange(scores.shape[-1]) < (torch.arange(scores.shape[1])[:, None] + 1) // 4
        largest = scores.abs().masked_fill(~visible, 0).amax(-1)
        margin = gap(scores.masked_fill(~visible, float("-inf")), model.config.index_topk)
        sound.logical_and_(margin > MIN_INDEX_MARGIN * largest)

    hooks = [model.model.hc_head.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0]))]
    for module in [*model.modules(), *(mtp.modules() if mtp is not None else ())]:
        kind = type(module).__name__
        if kind in ("DeepseekV4TopKRouter", "DeepseekV4IndexerScorer"):
            hooks.append(module.register_forward_hook(router if kind.endswith("Router") else scorer))
    arrays = {"logits": model(input_ids=tokens, use_cache=False).logits.numpy()}
    if mtp is not None:
        arrays["mtp_logits"] = mtp(model, streams[0][:, :-1], tokens[:, 1:]).numpy()
    for hook in hooks:
        hook.remove()
    return arrays, sound


def choose_tokens(
    name: str, model: Model, mtp: Mtp | None, shape: tuple[int, int], seed: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """Draws tokens, again where they take part in a near tie, and returns them int64 [B, T] with their reference.

    Raises:
        RuntimeError: none without a near tie were found.
    """
    rng = np.random.default_rng([seed, zlib.crc32(b"tokens")])
    tokens = rng.integers(0, model.config.vocab_size, shape)
    for _ in range(MAX_TOKEN_DRAWS):
        arrays, sound = reference(model, mtp, torch.from_numpy(tokens))
        if sound.all():
            return tokens, arrays
        again = (~sound).numpy()
        tokens[again] = rng.integers(0, model.config.vocab_size, again.sum())
    raise RuntimeError(f"{name}: seed {seed}: a near tie in each of {MAX_TOKEN_DRAWS} draws of tokens")


def saved_name(name: str) -> str:
    """The name under which Hugging Face's save_pretrained writes an official tensor: all but the official one."""
    renames = [(r"^embed\.", "embed_tokens."), (r"^hc_head_", "hc_head.hc_"), (r"\.attn\.kv_norm\.", ".attn.norm.")]
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name if name == "head.weight" else f"model.{name}"


def write_hf(folder: Path, model: Model, stored: Tensors, geometry: Geometry) -> None:
    """Has Hugging Face save its model in the dtypes of `stored`, and checks what is in the files."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(stored[pieces(name, parameter.shape)[0][0]].dtype)
    model.config.dtype = {"bf16": torch.bfloat16, "f32": torch.float32}[geometry.dtype]
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    names = geometry.storage == "hf-names"
    model.save_pretrained(folder, max_shard_size=int(1.1 * size / geometry.shards), save_original_format=not names)
    written: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        written |= load_file(file)
    expected = model.state_dict() if names else {saved_name(name): tensor for name, tensor in stored.items()}
    assert written.keys() == expected.keys(), written.keys() ^ expected.keys()
    for name, tensor in written.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


def make(name: str, folder: Path, seed: int | None = None) -> None:
    """Writes the checkpoint and the reference of geometry `name` into `folder`.

    Args:
        name: a key of GEOMETRIES.
        folder: made if missing; model files already there are replaced.
        seed: of weights and tokens; None is the geometry's own, which the committed files have. Tokens at which a
            choice of experts or of entries is nearly tied are drawn again, so any seed gives a reference that
            summation order cannot flip.

    Raises:
        KeyError: no such geometry.
        RuntimeError: no tokens without a near tie were found.
    """
    geometry = GEOMETRIES[name]
    seed = geometry.seed if seed is None else seed
    torch.set_num_threads(2)
    config = official_config(geometry)
    model, mtp = build(config, geometry.mtp in ("full", "copies"))
    drawn = {
        piece: draw(piece, shape, config, seed)
        for hf_name, tensor in parts(model, mtp).items()
        for piece, shape in pieces(hf_name, tensor.shape)
    }
    drawn |= {name: draw(name, shape, config, seed) for name, shape in to_ignore(geometry, config).items()}
    stored = {n: t for piece, value in drawn.items() for n, t in store(piece, value, geometry).items()}
    load(model, mtp, values_of(stored))
    tokens, arrays = choose_tokens(name, model, mtp, (geometry.batch, geometry.length), seed)
    prepare(folder)
    if geometry.storage != "official":
        write_hf(folder, model, stored, geometry)
    else:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if geometry.shards == 1:
            save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        else:
            place = {n: i * geometry.shards // len(stored) for i, n in enumerate(stored)}
            write_shards(folder, stored, place, geometry.shards)
    np.savez(folder / "reference.npz", tokens=tokens.astype(np.int32), **arrays)


def main() -> None:
    """Makes the named geometries, or all of them, and prints a line on each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(GEOMETRIES)}")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "tests" / "goldens")
    parser.add_argument("--seed", type=int, help="instead of each geometry's own")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in GEOMETRIES]:
        parser.error(f"unknown geometry {unknown[0]}")
    for name in arguments.names or GEOMETRIES:
        make(name, arguments.out / name, arguments.seed)
        size = sum(file.stat().st_size for file in (arguments.out / name).iterdir())
        print(f"{name:16} {size / 1000:6.0f} kB  {GEOMETRIES[name].covers}", flush=True)


if __name__ == "__main__":
    main()
