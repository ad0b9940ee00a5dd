"""Make small reference checkpoints: DeepSeek's file format, Hugging Face's logits.

An oracle that shares no code with this repository. For each geometry it draws random weights, writes them as a
checkpoint folder in DeepSeek's official format (config.json, safetensors, F8_E4M3 codes + `_scale_inv`), loads exactly
the values that the files stand for (float32 product code x scale, BF16 widened) into Hugging Face transformers, and
saves the float32 logits:

    <folder>/config.json, model*.safetensors[.index.json]
    <folder>/reference.npz    tokens int32 [B, T], logits float32 [B, T, V], and with a draft module
                              mtp_logits float32 [B, T-1, V] (row i: hidden state of position i and token i+1,
                              predicts token i+2)

    python scripts/make_goldens.py [NAME ...] [--out tests/goldens] [--seed N]
"""

import argparse
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

BLOCK = 128
E4M3_MAX = 448.0
AMAX_FLOOR = 1e-4
MIN_ROUTING_MARGIN = 1e-4
MAX_TOKEN_DRAWS = 1000

Tensors = dict[str, torch.Tensor]
Model = Any  # Hugging Face's modules: to a type checker each of their attributes is `Tensor | Module`


@dataclass(frozen=True)
class Geometry:
    """One checkpoint: what it covers, its architecture (changes to the family's base config) and how it is stored."""

    covers: str
    config: Mapping[str, Any]
    family: Literal["v3", "v2"] = "v3"
    storage: Literal["f32", "bf16", "fp8"] = "bf16"
    scales: Literal["f32", "ue8m0-f32", "e8m0", "u8"] = "f32"
    """How FP8 block scales are derived (f32: amax / 448, else UE8M0) and stored (F32, F8_E8M0 or U8 exponent)."""
    float32_scales: str | None = None
    """Weights whose name contains this keep float32 scales that are not powers of two (V3.1-Terminus: o_proj)."""
    norms: Literal["f32", "bf16"] = "bf16"
    bias: Literal["f32", "bf16"] = "f32"
    bias_mean: float = 0.0
    """Centre of e_score_correction_bias; well below 0, selection scores of kept groups turn negative."""
    shards: int = 1
    """1: a single model.safetensors without an index."""
    scatter: bool = False
    """Spread tensors over the shards so that no scale lies in the shard of its weight."""
    batch: int = 2
    length: int = 24
    seed: int = 0
    """Of the committed files; one at which every expert is used."""


YARN = json.loads("""{"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096,
    "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}""")
# The fields and spellings of DeepSeek's config.json; sizes that no geometry overrides are these.
COMMON = json.loads("""{
    "attention_bias": false, "attention_dropout": 0.0, "aux_loss_alpha": 0.001, "ep_size": 1,
    "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 64, "initializer_range": 0.02,
    "intermediate_size": 96, "kv_lora_rank": 32,
    "max_position_embeddings": 163840, "moe_intermediate_size": 16, "moe_layer_freq": 1, "n_routed_experts": 16,
    "n_shared_experts": 1, "num_attention_heads": 4, "num_experts_per_tok": 4, "num_hidden_layers": 3,
    "num_key_value_heads": 4, "pretraining_tp": 1, "q_lora_rank": 48, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "rms_norm_eps": 1e-06, "rope_theta": 10000, "seq_aux": true, "tie_word_embeddings": false,
    "transformers_version": "4.33.1", "use_cache": true, "v_head_dim": 16, "vocab_size": 128}""")
V3 = json.loads("""{
    "model_type": "deepseek_v3", "bos_token_id": 0, "eos_token_id": 1, "num_nextn_predict_layers": 0, "n_group": 4,
    "topk_group": 2, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": true,
    "routed_scaling_factor": 2.5}""")
V2 = json.loads("""{
    "model_type": "deepseek_v2", "bos_token_id": 100, "eos_token_id": 101, "n_group": 1, "topk_group": 1,
    "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": false, "routed_scaling_factor": 1.0}""")
SMALL_MOE = {"n_routed_experts": 8, "num_experts_per_tok": 3, "num_hidden_layers": 2}
FP8_SMALL = {**SMALL_MOE, "hidden_size": 128, "intermediate_size": 192, "moe_intermediate_size": 32, "v_head_dim": 24}

GEOMETRIES: dict[str, Geometry] = {
    "v3-float32": Geometry(
        "F32, no quantisation; yarn, grouped top-4 of 16; biases so low that selection scores turn negative",
        {"moe_intermediate_size": 8},
        storage="f32",
        norms="f32",
        bias_mean=-0.4,
        seed=1,
    ),
    "v3-bf16": Geometry(
        "BF16; no yarn (`rope_scaling: null`), 2 shared experts; 2 shards",
        {"rope_scaling": None, "n_shared_experts": 2, "v_head_dim": 12},
        shards=2,
        seed=20,
    ),
    "v3-fp8-partial": Geometry(
        "FP8, F32 scales, F32 norms; partial blocks: hidden 136, kv_a_proj 144 rows, dense 160, experts 72; 2 shards",
        {"hidden_size": 136, "intermediate_size": 160, "moe_intermediate_size": 72, "num_hidden_layers": 2}
        | {"kv_lora_rank": 128, "qk_rope_head_dim": 16}
        | {"n_routed_experts": 6, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
        storage="fp8",
        norms="f32",
        shards=2,
        seed=3,
    ),
    "v3-fp8-ue8m0": Geometry(
        "FP8, UE8M0 scales held in F32 (V3.1); hidden 256; 3 shards, every scale in another shard than its weight",
        {**SMALL_MOE, "hidden_size": 256, "intermediate_size": 160},
        storage="fp8",
        scales="ue8m0-f32",
        shards=3,
        scatter=True,
        seed=4,
    ),
    "v3-fp8-e8m0": Geometry(
        "FP8, UE8M0 scales stored as F8_E8M0; F32 norms", FP8_SMALL, storage="fp8", scales="e8m0", norms="f32", seed=5
    ),
    "v3-fp8-u8": Geometry(
        "FP8, UE8M0 scales stored as U8 exponents; 2 shards", FP8_SMALL, storage="fp8", scales="u8", shards=2, seed=6
    ),
    "v31-terminus": Geometry(
        "FP8, `scale_fmt: ue8m0`, but the o_proj scales are no powers of two; 6 heads; 2 shards",
        {**FP8_SMALL, "num_attention_heads": 6, "num_key_value_heads": 6},
        storage="fp8",
        scales="ue8m0-f32",
        float32_scales=".self_attn.o_proj.",
        shards=2,
        seed=7,
    ),
    "v3-no-q-lora": Geometry(
        "BF16; `q_lora_rank: null` (plain q_proj); F32 norms, e_score_correction_bias stored BF16",
        {**SMALL_MOE, "q_lora_rank": None},
        norms="f32",
        bias="bf16",
        seed=8,
    ),
    "v3-dense-only": Geometry(
        "FP8, F32 scales; first_k_dense_replace = num_hidden_layers, no expert anywhere; 2 shards",
        {"first_k_dense_replace": 2, "num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 272},
        storage="fp8",
        shards=2,
        seed=9,
    ),
    "v3-mtp": Geometry(
        "FP8, F32 scales; MTP module stored as layer num_hidden_layers, with mtp_logits; 3 shards",
        {**FP8_SMALL, "moe_intermediate_size": 16, "num_nextn_predict_layers": 1},
        storage="fp8",
        shards=3,
        seed=10,
    ),
    "v2-lite": Geometry(
        "deepseek_v2, BF16; softmax, greedy top-4, no renormalisation, plain q_proj, mscale 0.707, 2 shared experts",
        {"q_lora_rank": None, "n_shared_experts": 2},
        family="v2",
        seed=11,
    ),
    "v2-group": Geometry(
        "deepseek_v2, BF16, F32 norms; group_limited_greedy, 2 of 4 groups, q_lora, scaling factor 4; 2 shards",
        {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy", "routed_scaling_factor": 4.0}
        | {"n_shared_experts": 2, "num_hidden_layers": 2},
        family="v2",
        norms="f32",
        shards=2,
        seed=12,
    ),
    "v3-high-theta": Geometry(
        "BF16; theta 50000, yarn factor 8 from 16 positions, T = 32; no renormalisation, scaling factor 1.5, one group",
        {"rope_theta": 50000, "qk_rope_head_dim": 32, "max_position_embeddings": 128}
        | {"rope_scaling": {**YARN, "factor": 8, "original_max_position_embeddings": 16, "beta_slow": 0.25}}
        | {**SMALL_MOE, "norm_topk_prob": False, "routed_scaling_factor": 1.5, "n_group": 1, "topk_group": 1},
        length=32,
        seed=13,
    ),
    "v3-yarn-mscale": Geometry(
        "BF16; mscale 1.0, mscale_all_dim 0.5: cos and sin scaled by a ratio that is not 1 (no release has this)",
        {**SMALL_MOE, "rope_scaling": {**YARN, "mscale_all_dim": 0.5}},
        seed=14,
    ),
}


def official_config(geometry: Geometry) -> dict[str, Any]:
    """Returns config.json as DeepSeek publishes it, at this geometry's sizes."""
    family = geometry.family.upper()
    yarn = YARN if family == "V3" else {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}
    config = {**COMMON, "rope_scaling": yarn, **(V3 if family == "V3" else V2), **geometry.config}
    config["architectures"] = [f"Deepseek{family}ForCausalLM"]
    config["auto_map"] = {
        "AutoConfig": f"configuration_deepseek.Deepseek{family}Config",
        "AutoModel": f"modeling_deepseek.Deepseek{family}Model",
        "AutoModelForCausalLM": f"modeling_deepseek.Deepseek{family}ForCausalLM",
    }
    config["torch_dtype"] = "float32" if geometry.storage == "f32" else "bfloat16"
    if geometry.storage == "fp8":
        quantization = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
        scale_fmt = {} if geometry.scales == "f32" else {"scale_fmt": "ue8m0"}
        config["quantization_config"] = {**quantization, **scale_fmt, "weight_block_size": [BLOCK, BLOCK]}
    return dict(sorted(config.items()))


def per_block(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Repeats block values [cdiv(out, 128), cdiv(in, 128)] to one value per weight [out, in]."""
    return scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: shape[0], : shape[1]]


def quantise(weight: torch.Tensor, scales: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises float32 [out, in] to E4M3 codes and 128x128 block scales; edge blocks are zero-padded for amax only.

    Returns the codes [out, in] and the scales [cdiv(out, 128), cdiv(in, 128)] in the dtype they are stored in.
    """
    rows, columns = weight.shape
    grid = (-(-rows // BLOCK), -(-columns // BLOCK))
    padded = torch.zeros(grid[0] * BLOCK, grid[1] * BLOCK)
    padded[:rows, :columns] = weight
    amax = padded.view(grid[0], BLOCK, grid[1], BLOCK).abs().amax(dim=(1, 3))
    scale = amax.clamp(min=AMAX_FLOOR) / E4M3_MAX
    stored = scale
    if scales != "f32":  # round up to a power of two, on the bits: float log2 may err near exact powers
        bits = scale.view(torch.int32)
        exponent = ((bits >> 23) & 0xFF) + ((bits & 0x7FFFFF) != 0).int()
        scale = (exponent << 23).view(torch.float32)
        byte = exponent.to(torch.uint8)
        stored = {"ue8m0-f32": scale, "u8": byte, "e8m0": byte.view(torch.float8_e8m0fnu)}[scales]
    codes = (weight / per_block(scale, weight.shape)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes, stored


def dequantise(stored: Tensors) -> Tensors:
    """Returns the float32 values that checkpoint tensors stand for, by official name; scales are consumed."""
    values = {}
    for name, tensor in stored.items():
        if name.endswith("_scale_inv"):
            continue
        values[name] = tensor.to(torch.float32)
        scale = stored.get(f"{name}_scale_inv")
        if scale is not None:
            if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):  # exponent 0 (2^-127) cannot occur: amax has a floor
                scale = (scale.view(torch.uint8).to(torch.int32) << 23).view(torch.float32)
            values[name] = values[name] * per_block(scale, tensor.shape)
    return values


def build(config: Mapping[str, Any]) -> tuple[Model, Model | None]:
    """Builds Hugging Face's model in float32 with eager attention and experts, and its MtpModel if there is one."""
    arguments = {k: v for k, v in config.items() if k not in ("quantization_config", "torch_dtype", "auto_map")}
    v2 = config["model_type"] == "deepseek_v2"
    config_class, model_class = (
        (DeepseekV2Config, DeepseekV2ForCausalLM) if v2 else (DeepseekV3Config, DeepseekV3ForCausalLM)
    )
    hf_config: Any = config_class(**json.loads(json.dumps(arguments)))  # a copy: it changes the dicts it is given
    hf_config._attn_implementation = "eager"
    hf_config._experts_implementation = "eager"
    model = model_class(hf_config).eval()
    drafts = config.get("num_nextn_predict_layers", 0)
    return model, MtpModel(model, drafts).eval() if drafts else None


def _pieces(name: str, shape: torch.Size) -> list[tuple[str, tuple[int, ...]]]:
    """Lists the official tensors (name, shape) that one Hugging Face tensor is the concatenation of."""
    if name.endswith(".experts.gate_up_proj"):
        prefix, (experts, width, hidden) = name.removesuffix("gate_up_proj"), shape
        parts = [f"{prefix}{e}.{part}_proj.weight" for e in range(experts) for part in ("gate", "up")]
        return [(part, (width // 2, hidden)) for part in parts]
    if name.endswith(".experts.down_proj"):
        prefix = name.removesuffix("down_proj")
        return [(f"{prefix}{e}.down_proj.weight", tuple(shape[1:])) for e in range(shape[0])]
    return [(name, tuple(shape))]


def _official(name: str, mtp_index: int | None) -> str:
    """Official name of a Hugging Face tensor; `mtp_index` is the MTP module's layer index, None for the main model."""
    if mtp_index is None:
        return name
    name = {
        "embed_tokens.weight": "layers.0.embed_tokens.weight",
        "shared_head.weight": "layers.0.shared_head.head.weight",
    }.get(name, name)
    name = name.replace(".mtp_block.", ".").replace(".post_norm.", ".shared_head.norm.")
    return name.replace("layers.0.", f"model.layers.{mtp_index}.", 1)


def load(model: Model, mtp: Model | None, values: Tensors) -> None:
    """Loads float32 values by official name into Hugging Face's modules; every tensor must be given."""
    for module, index in ((model, None), (mtp, model.config.num_hidden_layers)):
        if module is None:
            continue
        state = {}
        for name, tensor in module.state_dict().items():
            assert tensor.dtype == torch.float32, name
            pieces = _pieces(_official(name, index), tensor.shape)
            assert all(tuple(values[piece].shape) == shape for piece, shape in pieces), name
            state[name] = torch.cat([values[piece].reshape(-1) for piece, _ in pieces]).reshape(tensor.shape)
        module.load_state_dict(state, strict=True)


def draw(name: str, shape: tuple[int, ...], geometry: Geometry, seed: int) -> torch.Tensor:
    """Draws one float32 tensor, scaled so that activations are O(1), logits O(1..10) and scores spread out."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    noise = rng.standard_normal(shape)
    if name.endswith("e_score_correction_bias"):
        value = geometry.bias_mean + 0.15 * noise
    elif len(shape) == 1:  # norm gains
        value = 1 + 0.2 * noise
    elif "embed_tokens" in name:
        value = noise
    else:
        gains = {"lm_head": 2.0, "mlp.gate": 2.0, "o_proj": 1.5, "down_proj": 2.0, "q_proj": 1.5, "q_b_proj": 1.5}
        gain = next((g for key, g in gains.items() if f"{key}." in name), 1.0)
        tiles = np.exp(0.5 * rng.standard_normal([-(-n // 64) for n in shape]))  # so that block scales differ
        noise = noise * tiles.repeat(64, 0).repeat(64, 1)[: shape[0], : shape[1]]
        value = gain * noise / np.sqrt(np.mean(noise**2)) / np.sqrt(shape[1])
    return torch.from_numpy(value.astype(np.float32))


def store(name: str, value: torch.Tensor, geometry: Geometry) -> Tensors:
    """Returns the stored tensors of one float32 value: cast, or codes and scales."""
    if geometry.storage == "f32" or (name.endswith("e_score_correction_bias") and geometry.bias == "f32"):
        return {name: value}
    if value.ndim == 1 and "norm" in name:
        return {name: value if geometry.norms == "f32" else value.to(torch.bfloat16)}
    quantised = "_proj" in name and "eh_proj" not in name
    if geometry.storage == "bf16" or not quantised:
        return {name: value.to(torch.bfloat16)}
    keep = geometry.float32_scales is not None and geometry.float32_scales in name
    codes, scale = quantise(value, "f32" if keep else geometry.scales)
    return {name: codes, f"{name}_scale_inv": scale}


def draw_checkpoint(model: Model, mtp: Model | None, geometry: Geometry, seed: int) -> Tensors:
    """Draws all tensors of a checkpoint, by official name and in stored form; MTP embedding and head are duplicates."""
    main_index = model.config.num_hidden_layers
    duplicates = {
        f"model.layers.{main_index}.embed_tokens.weight": "model.embed_tokens.weight",
        f"model.layers.{main_index}.shared_head.head.weight": "lm_head.weight",
    }
    stored: Tensors = {}
    for module, index in ((model, None), (mtp, main_index)):
        for hf_name, tensor in module.state_dict().items() if module is not None else ():
            for name, shape in _pieces(_official(hf_name, index), tensor.shape):
                if name in duplicates:
                    stored[name] = stored[duplicates[name]].clone()
                else:
                    stored.update(store(name, draw(name, shape, geometry, seed), geometry))
    return stored


def routing_margin(router: Model, router_logits: torch.Tensor) -> float:
    """Smallest gap between the last chosen and the first rejected score, over tokens, of groups and of experts."""

    def gap(scores: torch.Tensor, k: int) -> float:
        ordered = scores.sort(dim=-1, descending=True).values
        return (ordered[..., k - 1] - ordered[..., k]).min().item() if k < scores.shape[-1] else float("inf")

    bias = getattr(router, "e_score_correction_bias", None)
    scores = router_logits.softmax(-1) if bias is None else router_logits.sigmoid() + bias
    margin = float("inf")
    if bias is not None or router.topk_method == "group_limited_greedy":
        grouped = scores.view(len(scores), router.num_group, -1)
        group_scores = grouped.max(-1).values if bias is None else grouped.topk(2, dim=-1).values.sum(-1)
        margin = gap(group_scores, router.topk_group)
        cut = group_scores.topk(router.topk_group, dim=-1).values[:, -1:]
        scores = grouped.masked_fill((group_scores < cut)[..., None], float("-inf")).flatten(1)
    return min(margin, gap(scores, router.top_k))


@torch.no_grad()
def reference(model: Model, mtp: Model | None, tokens: torch.Tensor) -> tuple[dict[str, Any], float]:
    """Returns logits (and mtp_logits) of tokens int64 [B, T], and the smallest routing margin met on the way."""
    margins = [float("inf")]
    routers = [
        m for root in (model, mtp) if root is not None for m in root.modules() if type(m).__name__.endswith("Router")
    ]
    hooks = [
        m.register_forward_hook(lambda m, _, output: margins.append(routing_margin(m, output[0]))) for m in routers
    ]
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state  # after the final norm
    arrays = {"logits": model.lm_head(hidden).numpy()}
    if mtp is not None:
        positions = torch.arange(1, tokens.shape[1])[None]
        cache = MtpCache(config=model.config.get_mtp_config())
        draft = mtp.forward_layer(0, hidden[:, :-1], positions, cache, input_ids=tokens[:, 1:])
        arrays["mtp_logits"] = mtp._project_to_logits(draft).numpy()
    for hook in hooks:
        hook.remove()
    return arrays, min(margins)


def write_shards(folder: Path, stored: Tensors, place: Mapping[str, int], count: int) -> None:
    """Writes each tensor into shard `place[name]` of `count`, and their index (file names with 5 and 6 digits)."""
    files = [f"model-{i + 1:05d}-of-{count:06d}.safetensors" for i in range(count)]
    weight_map = {name: files[place[name]] for name in sorted(stored)}
    for file in files:
        part = {name: stored[name] for name in stored if weight_map[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in stored.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_tensors(folder: Path, stored: Tensors, geometry: Geometry) -> None:
    """Writes the tensors as one file, or as shards with their index (file names as DeepSeek's: 5 and 6 digits)."""
    if geometry.shards == 1:
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weights = [name for name in stored if not name.endswith("_scale_inv")]
    place = {name: i if geometry.scatter else i * geometry.shards // len(weights) for i, name in enumerate(weights)}
    for name in stored.keys() - place.keys():
        place[name] = place[name.removesuffix("_scale_inv")] + geometry.scatter
    write_shards(folder, stored, {name: i % geometry.shards for name, i in place.items()}, geometry.shards)


def prepare(folder: Path) -> None:
    """Makes the folder; model files already there are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("model*.safetensors"), *folder.glob("model.safetensors.index.json")]:
        old.unlink()


def make(name: str, folder: Path, seed: int | None = None) -> None:
    """Writes the checkpoint and the reference of geometry `name` into `folder`.

    Args:
        name: a key of GEOMETRIES.
        folder: made if missing; model files already there are replaced.
        seed: of weights and tokens; None is the geometry's own, which the committed files have. Tokens whose routing is
            nearly tied anywhere are drawn again, so any seed gives a reference that summation order cannot flip.

    Raises:
        KeyError: no such geometry.
        RuntimeError: no tokens without a near tie were found.
    """
    geometry = GEOMETRIES[name]
    seed = geometry.seed if seed is None else seed
    torch.set_num_threads(2)
    config = official_config(geometry)
    model, mtp = build(config)
    stored = draw_checkpoint(model, mtp, geometry, seed)
    load(model, mtp, dequantise(stored))
    for attempt in range(MAX_TOKEN_DRAWS):
        rng = np.random.default_rng([seed, zlib.crc32(b"tokens"), attempt])
        tokens = rng.integers(0, config["vocab_size"], (geometry.batch, geometry.length))
        arrays, margin = reference(model, mtp, torch.from_numpy(tokens))
        if margin > MIN_ROUTING_MARGIN:
            break
    else:
        raise RuntimeError(f"{name}: seed {seed}: routing nearly tied in each of {MAX_TOKEN_DRAWS} draws of tokens")
    prepare(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_tensors(folder, stored, geometry)
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
