"""An independent NumPy emulator of DeepSeek-V3's inference numerics, operator by operator.

Written from `spec/deepseek_v3.md` (sections 2, 3, 4) without sight of the JAX code, so that the two can check each
other. It covers V2-Lite, V3, R1 and V3.1, and V3.2 while all keys are selected (T <= index_topk: no indexer here).
- Activations are float32 arrays; under a native `Policy` their values are BF16 wherever the spec rounds to BF16.
- Weights are a dict from checkpoint names to arrays as stored (FP8 scales beside their weight, `<name>_scale_inv`);
  layer functions take the names below their prefix, which `scope` cuts off.
- Letters: T tokens, D hidden, H heads, N/R/V no-rope, rope and value head dims, C kv_lora_rank, E experts, k top-k.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray
Weights = Mapping[str, Array]
Config = Mapping[str, Any]
Block = tuple[int, int]
Stored = Array | tuple[Array, Array]  # a float weight, or (E4M3 codes, float32 scales)

BF16 = np.dtype(ml_dtypes.bfloat16)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
GROUP = 128  # activation group along K, and both sides of a weight block
LATENT_EPS = 1e-6  # of q_a_layernorm and kv_a_layernorm, whatever rms_norm_eps says (2.4)


@dataclass(frozen=True)
class Policy:
    """How to compute."""

    native: bool = True  # BF16 rounding points and FP8 activations; False ("plain"): float32 throughout
    scale_fmt: str | None = None  # of activations: "ue8m0", or "float32" / None
    accumulate: type[np.floating] = np.float32  # in which every sum (dots, means, softmax, experts) is taken

    def round(self, x: Array) -> Array:
        """A BF16 rounding point: float32 -> nearest BF16 value, as float32. Nothing happens in plain."""
        return f32(f32(x).astype(BF16)) if self.native else f32(x)

    def einsum(self, subscripts: str, a: Array, b: Array) -> Array:
        """Dot products with float32 result, summed in `accumulate`; nothing is rounded to BF16."""
        return f32(np.einsum(subscripts, a.astype(self.accumulate), b.astype(self.accumulate), optimize=True))


NATIVE = Policy()
PLAIN = Policy(native=False)


def f32(x: Array) -> Array:
    return np.asarray(x).astype(np.float32)


def policy_for(config: Config, policy: Policy = NATIVE, scale_fmt: str | None = None) -> Policy:
    """`policy` with the activation scale format: explicit, else the policy's own, else quantization_config's (3.3)."""
    stated = (config.get("quantization_config") or {}).get("scale_fmt")
    return replace(policy, scale_fmt=scale_fmt or policy.scale_fmt or stated)


# ------------------------------------------------------------------------------------------------- number formats (4.1)
def e4m3_encode(x: Array) -> Array:
    """float32 [...] -> float8_e4m3fn [...]: clip to +-448, then round to nearest even (4.1)."""
    return np.clip(f32(x), -448, 448).astype(E4M3)


def e4m3_decode(codes: Array) -> Array:
    """float8_e4m3fn, or its bytes as uint8, [...] -> float32 [...], exact (4.1)."""
    return f32(codes.view(E4M3))


def ue8m0_encode(s: Array) -> Array:
    """float32 [...] > 0 -> exponent byte uint8 of the least power of two >= s, in 2^-126 .. 2^127, else 255 (4.2)."""
    bits = np.asarray(s, np.float32).view(np.uint32)
    exponent = ((bits >> 23) & 255) + ((bits & 0x7FFFFF) != 0)
    return np.minimum(exponent, 255).astype(np.uint8)


def ue8m0_decode(codes: Array) -> Array:
    """Exponent byte uint8 (or float8_e8m0fnu) [...] -> float32 [...]: 2^(code - 127), 255 -> NaN (4.1)."""
    exponent = codes.view(np.uint8).astype(np.int32)
    return f32(np.where(exponent == 255, np.nan, np.ldexp(1.0, exponent - 127)))


def scale_from_amax(amax: Array, scale_fmt: str | None) -> Array:
    """max|x| float32 [...] -> scale float32 [...]: max(amax, 1e-4) / 448, rounded up to a power of two (4.2)."""
    assert scale_fmt in (None, "float32", "ue8m0"), scale_fmt
    scale = np.maximum(amax, np.float32(1e-4)) / np.float32(448)
    return ue8m0_decode(ue8m0_encode(scale)) if scale_fmt == "ue8m0" else scale


def act_quant(x: Array, scale_fmt: str | None = None) -> tuple[Array, Array]:
    """x [..., K] -> (codes float8_e4m3fn [..., K], scales float32 [..., ceil(K/128)]), 1x128 groups (4.2)."""
    size = x.shape[-1]
    groups = pad_last(f32(x)).reshape(*x.shape[:-1], -1, GROUP)
    scales = scale_from_amax(np.abs(groups).max(-1), scale_fmt)
    codes = e4m3_encode(groups / scales[..., None])
    return codes.reshape(*x.shape[:-1], -1)[..., :size], scales


def weight_quant(w: Array, block: Block = (GROUP, GROUP), scale_fmt: str | None = None) -> tuple[Array, Array]:
    """w [out, in] -> (codes [out, in], scales float32 [cdiv(out, br), cdiv(in, bc)]), edges zero-padded (3.3, 4.2)."""
    w, grid = f32(w), (-(-w.shape[0] // block[0]), -(-w.shape[1] // block[1]))
    padded = np.zeros((grid[0] * block[0], grid[1] * block[1]), np.float32)
    padded[: w.shape[0], : w.shape[1]] = w
    amax = np.abs(padded).reshape(grid[0], block[0], grid[1], block[1]).max((1, 3))
    scales = scale_from_amax(amax, scale_fmt)
    return e4m3_encode(w / expand(scales, block, w.shape)), scales


def dequantise(codes: Array, scales: Array, block: Block = (GROUP, GROUP)) -> Array:
    """(codes [out, in], scales [cdiv(out, br), cdiv(in, bc)]) -> float32 [out, in] = code * scale (3.2, 6.3)."""
    return e4m3_decode(codes) * expand(f32(scales), block, codes.shape)


def expand(scales: Array, block: Block, shape: tuple[int, ...]) -> Array:
    return scales.repeat(block[0], 0).repeat(block[1], 1)[: shape[0], : shape[1]]


def pad_last(x: Array) -> Array:
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % GROUP)])


# --------------------------------------------------------------------------------------------------------- linear (4.3)
def fp8_gemm(a_codes: Array, a_scales: Array, w_codes: Array, w_scales: Array, policy: Policy = NATIVE) -> Array:
    """A [..., K] with scales [..., K/128], W [out, K] with scales [out/128, K/128] -> float32 [..., out] (4.3).

    sum_kb (sum_{k in kb} A8 W8) * sA[kb] * sW[kb]: each block's dot is summed, scaled, then added. Not yet rounded.
    """
    kind, out = policy.accumulate, w_codes.shape[0]
    a = pad_last(e4m3_decode(a_codes)).reshape(-1, a_scales.shape[-1], GROUP).transpose(1, 0, 2)  # [kb, M, 128]
    w = pad_last(e4m3_decode(w_codes)).reshape(out, -1, GROUP).transpose(1, 2, 0)  # [kb, 128, out]
    blocks = a.astype(kind) @ w.astype(kind)
    a_scale = f32(a_scales).reshape(-1, a_scales.shape[-1]).T[:, :, None]  # [kb, M, 1]
    w_scale = f32(w_scales).repeat(GROUP, 0)[:out].T[:, None, :]  # [kb, 1, out]
    return f32((blocks * a_scale * w_scale).sum(0)).reshape(*a_codes.shape[:-1], out)


def linear(x: Array, w: Stored, policy: Policy = NATIVE) -> Array:
    """x [..., in], w [out, in] -> x w^T [..., out], BF16 out; an FP8-stored w takes quantised activations (4.3)."""
    if isinstance(w, tuple) and policy.native:
        return policy.round(fp8_gemm(*act_quant(x, policy.scale_fmt), *w, policy))
    return policy.round(policy.einsum("...i,oi->...o", x, dense(w, policy)))


def dense(w: Stored, policy: Policy = NATIVE) -> Array:
    """A stored weight as float32 [out, in]: dequantised, and in native rounded to BF16 (2.4 absorbed, 6.3)."""
    return policy.round(dequantise(*w) if isinstance(w, tuple) else w)


def stored(weights: Weights, name: str) -> Stored:
    """The weight `name`, paired with its `_scale_inv` when it has one (3.2)."""
    scales = weights.get(name + "_scale_inv")
    return weights[name] if scales is None else (weights[name], scales)


def scope(weights: Weights, prefix: str) -> dict[str, Array]:
    """The entries below `prefix`, under their remaining names."""
    return {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}


# ---------------------------------------------------------------------------------------------- RoPE and norm (2.1-2.3)
def rope_settings(config: Config) -> dict[str, Any]:
    """rope_scaling (`type`) or rope_parameters (`rope_type`, `rope_theta` inside) as one dict with `kind` (1.1)."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = given.get("rope_type", given.get("type", "default"))
    unscaled = given.get("mscale") and given.get("mscale") == given.get("mscale_all_dim")  # cos and sin, as in 2.2
    assert kind == "default" or (kind == "yarn" and unscaled), (
        f"RoPE scaling that no release of the family has: {given}"
    )
    return {"rope_theta": config.get("rope_theta", 10000.0), **given, "kind": kind}


def yarn_frequencies(config: Config) -> Array:
    """The rotary frequencies f' float32 [R/2], static YaRN (2.2). Correction range in double precision."""
    rope_, d = rope_settings(config), config["qk_rope_head_dim"]
    theta = rope_["rope_theta"]
    i = np.arange(d // 2, dtype=np.float32)
    f = np.float32(1) / np.float32(theta) ** (2 * i / np.float32(d))
    if rope_["kind"] == "default":
        return f
    original = rope_.get("original_max_position_embeddings") or config["max_position_embeddings"]
    turns = rope_.get("beta_fast") or 32, rope_.get("beta_slow") or 1
    corr = [d * math.log(original / (2 * math.pi * n)) / (2 * math.log(theta)) for n in turns]
    low, high = max(math.floor(corr[0]), 0), min(math.ceil(corr[1]), d - 1)
    ramp = np.clip((i - np.float32(low)) / np.float32(high - low or 0.001), 0, 1)
    return f / np.float32(rope_["factor"]) * ramp + f * (1 - ramp)


def softmax_scale(config: Config) -> np.float32:
    """(N + R)^-0.5 * m^2, m = 0.1 mscale_all_dim ln(factor) + 1; m = 1 without yarn or mscale_all_dim (2.2)."""
    rope_, scale = rope_settings(config), (config["qk_nope_head_dim"] + config["qk_rope_head_dim"]) ** -0.5
    if rope_["kind"] == "yarn" and rope_["factor"] > 1 and rope_.get("mscale_all_dim"):
        scale *= (0.1 * rope_["mscale_all_dim"] * math.log(rope_["factor"]) + 1) ** 2
    return np.float32(scale)


def rope(x: Array, positions: Array, freqs: Array, policy: Policy = NATIVE) -> Array:
    """x [T, ..., R], positions [T], freqs [R/2] -> [T, ..., R]: pairs (x[2i], x[2i+1]) in FP32, BF16 out (2.3)."""
    angle = f32(positions)[:, None] * f32(freqs)
    angle = angle.reshape(len(x), *[1] * (x.ndim - 2), -1).astype(np.float64)  # cos and sin to the last bit
    cos, sin, even, odd = f32(np.cos(angle)), f32(np.sin(angle)), f32(x[..., 0::2]), f32(x[..., 1::2])
    return policy.round(np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape))


def rms_norm(x: Array, gain: Array, eps: float = 1e-6, policy: Policy = NATIVE) -> Array:
    """x [..., D], gain [D] -> x * rsqrt(mean(x^2) + eps) * gain, in FP32, rounded once to BF16 (2.1)."""
    mean = f32(np.square(f32(x)).mean(-1, keepdims=True, dtype=policy.accumulate))
    return policy.round(f32(x) * (1 / np.sqrt(mean + np.float32(eps))) * f32(gain))


def add_norm(x: Array, residual: Array, gain: Array, eps: float, policy: Policy) -> tuple[Array, Array]:
    """(x, residual) [..., D] -> (norm of the unrounded FP32 sum, the sum rounded to BF16): V3.2's way (2.1)."""
    total = f32(x) + f32(residual)
    return rms_norm(total, gain, eps, policy), policy.round(total)


# ------------------------------------------------------------------------------------------------------------ MLA (2.4)
def softmax(scores: Array, policy: Policy) -> Array:
    """FP32 softmax of the last axis, normalised; -inf marks what is not visible."""
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / f32(e.sum(-1, keepdims=True, dtype=policy.accumulate))


def mla(
    x: Array, weights: Weights, config: Config, positions: Array, form: str = "absorbed", policy: Policy = NATIVE
) -> Array:
    """Causal multi-head latent attention over one sequence, x [T, D] -> [T, D] (2.4).

    `weights` holds the names below `self_attn.`; `form` is "absorbed" (MQA over the latent) or "naive" (MHA).
    """
    assert form in ("absorbed", "naive"), form
    assert len(x) <= (config.get("index_topk") or math.inf), "the lightning indexer is not emulated"
    T, H = len(x), config["num_attention_heads"]
    N, V, C = config["qk_nope_head_dim"], config["v_head_dim"], config["kv_lora_rank"]
    freqs, scale = yarn_frequencies(config), softmax_scale(config)
    if "q_a_proj.weight" in weights:
        qr = linear(x, stored(weights, "q_a_proj.weight"), policy)
        qr = rms_norm(qr, weights["q_a_layernorm.weight"], LATENT_EPS, policy)
        q = linear(qr, stored(weights, "q_b_proj.weight"), policy)
    else:
        q = linear(x, stored(weights, "q_proj.weight"), policy)
    q = q.reshape(T, H, -1)
    q_nope, q_pe = q[..., :N], rope(q[..., N:], positions, freqs, policy)

    kv_a = linear(x, stored(weights, "kv_a_proj_with_mqa.weight"), policy)
    c = rms_norm(kv_a[:, :C], weights["kv_a_layernorm.weight"], LATENT_EPS, policy)
    k_pe = rope(kv_a[:, C:], positions, freqs, policy)
    if policy.native and config.get("model_type") == "deepseek_v32":  # imitates the FP8 KV cache; UE8M0 always
        codes, scales = act_quant(c, "ue8m0")
        c = e4m3_decode(codes) * scales.repeat(GROUP, -1)[:, :C]

    kv_b = stored(weights, "kv_b_proj.weight")
    mask = np.triu(np.full((T, T), -np.inf, np.float32), 1)
    scores = policy.einsum("thr,sr->hts", q_pe, k_pe)
    if form == "naive":
        kv = linear(c, kv_b, policy).reshape(T, H, N + V)
        scores += policy.einsum("thn,shn->hts", q_nope, kv[..., :N])
        p = policy.round(softmax(scores * scale + mask, policy))
        o = policy.round(policy.einsum("hts,shv->thv", p, kv[..., N:]))
    else:
        w = dense(kv_b, policy).reshape(H, N + V, C)
        qa = policy.round(policy.einsum("thn,hnc->thc", q_nope, w[:, :N]))
        scores += policy.einsum("thc,sc->hts", qa, c)
        p = policy.round(softmax(scores * scale + mask, policy))
        oc = policy.round(policy.einsum("hts,sc->thc", p, c))
        o = policy.round(policy.einsum("thc,hvc->thv", oc, w[:, N:]))
    return linear(o.reshape(T, H * V), stored(weights, "o_proj.weight"), policy)


# ---------------------------------------------------------------------------------------------- feed-forward (2.5, 2.6)
def sigmoid(x: Array) -> Array:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-f32(x)))


def swiglu_ffn(x: Array, weights: Weights, policy: Policy = NATIVE) -> Array:
    """down(silu(gate x) * up x), x [T, D] -> [T, D]; the product in FP32 from BF16 factors, rounded once (2.5)."""
    gate = linear(x, stored(weights, "gate_proj.weight"), policy)
    up = linear(x, stored(weights, "up_proj.weight"), policy)
    return linear(policy.round(gate * sigmoid(gate) * up), stored(weights, "down_proj.weight"), policy)


def top_k(scores: Array, k: int) -> Array:
    """Indices [..., k] of the largest along the last axis, descending, the lowest index first among equals."""
    return np.argsort(-scores, -1, kind="stable")[..., :k]


def moe_gate(x: Array, w: Array, bias: Array | None, config: Config, policy: Policy = NATIVE) -> tuple[Array, Array]:
    """x [T, D], w [E, D], bias [E] -> (indices [T, k] by falling selection score, weights float32 [T, k]) (2.6).

    `noaux_tc`: sigmoid scores, groups by their two best biased scores, weights renormalised. V2's `greedy` and
    `group_limited_greedy`: softmax scores, groups by their best, no bias, no renormalisation. All in FP32.
    """
    method = config.get("topk_method") or ("greedy" if config.get("model_type") == "deepseek_v2" else "noaux_tc")
    scoring = config.get("scoring_func") or ("sigmoid" if method == "noaux_tc" else "softmax")
    assert method in ("noaux_tc", "greedy", "group_limited_greedy") and scoring in ("sigmoid", "softmax")
    logits = policy.einsum("td,ed->te", x, f32(w))
    scores = sigmoid(logits) if scoring == "sigmoid" else softmax(logits, policy)
    choice = scores + f32(bias) if method == "noaux_tc" and bias is not None else scores
    groups = config.get("n_group") or 1
    if groups > 1 and method != "greedy":
        grouped = choice.reshape(len(x), groups, -1)
        best = np.sort(grouped, -1)[..., -2:] if method == "noaux_tc" else grouped.max(-1, keepdims=True)
        keep = np.zeros((len(x), groups, 1), bool)
        np.put_along_axis(keep, top_k(best.sum(-1), config["topk_group"])[..., None], True, 1)
        choice = np.where(keep, grouped, np.float32(-np.inf)).reshape(len(x), -1)
    indices = top_k(choice, config["num_experts_per_tok"])
    gates = np.take_along_axis(scores, indices, -1)
    if scoring == "sigmoid" and config.get("norm_topk_prob", True):
        gates = gates / gates.sum(-1, keepdims=True)
    return indices, gates * np.float32(config.get("routed_scaling_factor", 1.0))


def moe(x: Array, weights: Weights, config: Config, policy: Policy = NATIVE) -> Array:
    """sum_e w_e Expert_e(x) + Shared(x), x [T, D] -> [T, D]: BF16 terms, summed in that order, rounded once (2.6)."""
    bias = weights.get("gate.e_score_correction_bias")
    indices, gates = moe_gate(x, weights["gate.weight"], bias, config, policy)
    total = np.zeros(x.shape, policy.accumulate)
    for expert in np.unique(indices):
        token, slot = np.nonzero(indices == expert)
        total[token] += gates[token, slot, None] * swiglu_ffn(x[token], scope(weights, f"experts.{expert}."), policy)
    if config.get("n_shared_experts"):
        total += swiglu_ffn(x, scope(weights, "shared_experts."), policy)
    return policy.round(total)


# ----------------------------------------------------------------------------------------------- model (2.1), MTP (2.7)
def decoder_layer(
    x: Array, residual: Array, weights: Weights, config: Config, form: str = "absorbed", policy: Policy = NATIVE
) -> tuple[Array, Array]:
    """One layer, positions 0.., on a pair (x, residual) [T, D] whose FP32 sum is the residual stream (2.1)."""
    eps = config.get("rms_norm_eps", 1e-6)
    x, residual = add_norm(x, residual, weights["input_layernorm.weight"], eps, policy)
    x = mla(x, scope(weights, "self_attn."), config, np.arange(len(x)), form, policy)
    x, residual = add_norm(x, residual, weights["post_attention_layernorm.weight"], eps, policy)
    ffn = scope(weights, "mlp.")
    return moe(x, ffn, config, policy) if "gate.weight" in ffn else swiglu_ffn(x, ffn, policy), residual


def model(
    tokens: Array, weights: Weights, config: Config, mla: str = "absorbed",
    scale_fmt: str | None = None, policy: Policy = NATIVE,
) -> tuple[Array, Array]:  # fmt: skip
    """tokens int [T] -> (logits float32 [T, vocab], never rounded; hidden [T, D] after the final norm) (2.1)."""
    policy, eps = policy_for(config, policy, scale_fmt), config.get("rms_norm_eps", 1e-6)
    embed = weights["model.embed_tokens.weight"]
    residual = policy.round(embed[tokens])
    x = np.zeros_like(residual)
    for i in range(config["num_hidden_layers"]):
        x, residual = decoder_layer(x, residual, scope(weights, f"model.layers.{i}."), config, mla, policy)
    hidden, _ = add_norm(x, residual, weights["model.norm.weight"], eps, policy)
    return policy.einsum("td,vd->tv", hidden, dense(weights.get("lm_head.weight", embed), policy)), hidden


def mtp(
    hidden: Array, next_tokens: Array, weights: Weights, config: Config, mla: str = "absorbed",
    scale_fmt: str | None = None, policy: Policy = NATIVE,
) -> tuple[Array, Array]:  # fmt: skip
    """hidden [T, D] of the main model after its final norm, next_tokens [T] (t_{i+1}) -> as `model`, for t_{i+2} (2.7).

    Embedding first; rope position i; the hidden returned is after shared_head.norm (feed it to draft again).
    """
    policy, eps = policy_for(config, policy, scale_fmt), config.get("rms_norm_eps", 1e-6)
    layer = scope(weights, f"model.layers.{config['num_hidden_layers']}.")
    embed = layer.get("embed_tokens.weight", weights["model.embed_tokens.weight"])
    e = rms_norm(policy.round(embed[next_tokens]), layer["enorm.weight"], eps, policy)
    h = rms_norm(hidden, layer["hnorm.weight"], eps, policy)
    z = linear(np.concatenate([e, h], -1), layer["eh_proj.weight"], policy)
    x, residual = decoder_layer(np.zeros_like(z), z, layer, config, mla, policy)
    hidden, _ = add_norm(x, residual, layer["shared_head.norm.weight"], eps, policy)
    w = layer.get("shared_head.head.weight", weights.get("lm_head.weight", embed))
    return policy.einsum("td,vd->tv", hidden, dense(w, policy)), hidden


# ----------------------------------------------------------------------------------------------------- checkpoint (3.1)
SAFETENSORS = {
    "F32": np.float32, "F16": np.float16, "BF16": BF16, "F8_E4M3": E4M3, "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "U8": np.uint8, "I8": np.int8,
}  # fmt: skip


def load_folder(path: str | Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """A trusted checkpoint folder -> (weights by name as stored, but scales always float32; config.json) (3.1)."""
    weights: dict[str, Array] = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        data = file.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        entries = {name: entry for name, entry in json.loads(data[8:start]).items() if name != "__metadata__"}
        for name, entry in entries.items():
            first, last = (start + offset for offset in entry["data_offsets"])
            array = np.frombuffer(data[first:last], SAFETENSORS[entry["dtype"]]).reshape(entry["shape"])
            if name.endswith("_scale_inv"):
                array = ue8m0_decode(array) if array.dtype.itemsize == 1 else f32(array)
            weights[name] = array
    return weights, json.loads((Path(path) / "config.json").read_text())
