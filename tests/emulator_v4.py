"""An independent NumPy emulator of DeepSeek-V4's inference numerics, operator by operator.

Written from `spec/deepseek_v4.md` (sections 2, 3, 4) without sight of the JAX code, so that the two can check each
other. One-shot only: whole sequences from position 0, no cache, no decode state, no DSpark head.
- Activations are float32 arrays; under a native `Policy` their values are BF16 wherever the spec rounds to BF16.
- Weights are a dict from official names to arrays as stored (`<name>.weight` with `<name>.scale` beside it); functions
  take the names below their prefix, which `scope` cuts off. `config` is the official config.json, or Hugging Face's.
- Every size comes from `config` or the weights; groups and blocks of sizes that do not divide end in a short one.
- Letters: T tokens, d hidden, n streams, H heads, D head_dim, R rotary and N = D - R other channels, r compression
  ratio, E compressed entries, J index heads, I index_head_dim, F experts, k top-k, K the axis a matmul contracts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from emulator import (
    BF16,
    E4M3,
    Array,
    Config,
    Weights,
    dequantise,
    e4m3_decode,
    e4m3_encode,
    f32,
    scope,
    sigmoid,
    top_k,
    ue8m0_decode,
    ue8m0_encode,
    weight_quant,
)
from emulator import SAFETENSORS as V3_SAFETENSORS

E2M1 = np.dtype(ml_dtypes.float4_e2m1fn)
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
GROUP = 128  # of a linear's FP8 input along K, and both sides of an FP8 weight's block
KV_GROUP = 64  # of the FP8 fake quantisation of keys
FP4_GROUP = 32  # of an FP4 weight along K, and of the indexer's FP4 fake quantisation
P_BLOCK = 64  # keys that one step of the online softmax takes


@dataclass(frozen=True)
class Policy:
    """How to compute. The switches after `accumulate` act in native alone; plain has none of what they switch."""

    native: bool = True  # BF16 rounding points, quantised linears, fake quantisation; False ("plain"): float32
    accumulate: type[np.floating] = np.float32  # in which every sum (dots, means, softmax, experts) is taken
    kv_quant: bool = True  # FP8 fake quantisation of keys (4.2)
    index_quant: bool = True  # FP4 fake quantisation of the indexer's queries and keys (4.3)
    hadamard: bool = True  # of the same, before that; orthonormal, so the scores do not depend on it
    head_norm: Literal["bf16", "float32"] = "bf16"  # the order of the per-head norm of q (2.3)
    softmax: Literal["global", "online"] = "global"  # the max that BF16 probabilities are taken against (2.3)

    def round(self, x: Array) -> Array:
        """A BF16 rounding point: float32 -> nearest BF16 value, as float32. Nothing happens in plain."""
        return f32(f32(x).astype(BF16)) if self.native else f32(x)

    def einsum(self, subscripts: str, a: Array, b: Array) -> Array:
        """Dot products with float32 result, summed in `accumulate`; nothing is rounded to BF16."""
        a, b = a.astype(self.accumulate), b.astype(self.accumulate)
        return f32(np.einsum(subscripts, a, b, optimize=bool(a.size and b.size)))  # optimize fails on empty ones

    def sum(self, x: Array, axis: int = -1) -> Array:
        """x float32 -> its sums along `axis`, kept with size 1, float32."""
        return f32(x.sum(axis, keepdims=True, dtype=self.accumulate))

    def mean(self, x: Array) -> Array:
        """x float32 [..., K] -> means [..., 1] float32."""
        return f32(x.mean(-1, keepdims=True, dtype=self.accumulate))


NATIVE = Policy()
PLAIN = Policy(native=False)


@dataclass(frozen=True)
class Stored:
    """A matrix as stored (3.1). FP8: codes [out, in]; FP4: two codes a byte, [out, in / 2]; else the values."""

    kind: Literal["fp8", "fp4", "float"]
    codes: Array
    scales: Array  # float32: FP8 [cdiv(out, 128), cdiv(in, 128)], FP4 [out, cdiv(in, 32)], empty otherwise


# -------------------------------------------------------------------------------------------- number formats (3.1, 4.x)
def groups(x: Array, size: int) -> Array:
    """x [..., K] -> [..., ceil(K / size), size], the last one filled up with zeros, which change no amax."""
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)])
    return padded.reshape(*x.shape[:-1], -(-x.shape[-1] // size), size)


def ungroup(grouped: Array, size: int) -> Array:
    """[..., G, group] -> its first channels [..., size]."""
    return grouped.reshape(*grouped.shape[:-2], grouped.shape[-2] * grouped.shape[-1])[..., :size]


def per_channel(scales: Array, group: int, size: int) -> Array:
    """Scales of groups [..., G] -> of channels [..., size]."""
    return scales.repeat(group, -1)[..., :size]


def scale_values(scales: Array) -> Array:
    """Scales stored as F8_E8M0 or U8 (the byte e of 2^(e - 127)) or as F32 values -> float32 (3.1, pitfall 18)."""
    return ue8m0_decode(scales) if scales.dtype.itemsize == 1 else f32(scales)


def power_of_two_scale(amax: Array, largest: int, floor: float) -> Array:
    """amax float32 [...] -> 2^ceil(log2(max(amax, floor) / largest)) float32 [...], from the bits (4.1, 4.3)."""
    quotient = np.maximum(f32(amax), np.float32(floor)) * np.float32(1 / largest)
    return ue8m0_decode(ue8m0_encode(quotient))


def act_quant(x: Array, group: int = GROUP) -> tuple[Array, Array]:
    """x [..., K] -> (codes float8_e4m3fn [..., K], scales float32 [..., ceil(K / group)], powers of two) (4.1)."""
    grouped = groups(f32(x), group)
    scales = power_of_two_scale(np.abs(grouped).max(-1), 448, 1e-4)
    codes = e4m3_encode(grouped / scales[..., None])
    return ungroup(codes, x.shape[-1]), scales


def act_fake_quant(x: Array, group: int = GROUP) -> Array:
    """x [..., K] -> code * scale, float32 [..., K] with values that BF16 holds (4.1, 4.2)."""
    codes, scales = act_quant(x, group)
    return e4m3_decode(codes) * per_channel(scales, group, x.shape[-1])


def kv_fake_quant(kv: Array, nope: int, policy: Policy = NATIVE) -> Array:
    """kv [..., D] -> the same with channels [:nope] rounded to FP8 in groups of 64; the rotary ones stay (4.2)."""
    if not (policy.native and policy.kv_quant):
        return kv
    return np.concatenate([act_fake_quant(kv[..., :nope], KV_GROUP), kv[..., nope:]], -1)


def fp4_encode(x: Array) -> Array:
    """float32 [...] -> E2M1 codes uint8 [...], sign << 3 | magnitude: clip to +-6, nearest, ties to even (4.3)."""
    return np.clip(f32(x), -6, 6).astype(E2M1).view(np.uint8)


def fp4_decode(codes: Array) -> Array:
    """E2M1 codes uint8 [...] in 0 .. 15 -> float32 [...] (3.1)."""
    magnitude = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)[codes & 7]
    return np.where(codes & 8, -magnitude, magnitude)


def fp4_quant(x: Array, group: int = FP4_GROUP) -> tuple[Array, Array]:
    """x [..., K] -> (E2M1 codes uint8 [..., K], scales float32 [..., ceil(K / group)], powers of two) (4.3)."""
    grouped = groups(f32(x), group)
    scales = power_of_two_scale(np.abs(grouped).max(-1), 6, 6 * 2.0**-126)
    codes = fp4_encode(grouped / scales[..., None])
    return ungroup(codes, x.shape[-1]), scales


def fp4_fake_quant(x: Array, group: int = FP4_GROUP) -> tuple[Array, Array, Array]:
    """x [..., K] -> (codes, scales) of `fp4_quant` and the values code * scale float32 [..., K] (4.3)."""
    codes, scales = fp4_quant(x, group)
    return codes, scales, fp4_decode(codes) * per_channel(scales, group, x.shape[-1])


def fp4_unpack(packed: Array) -> Array:
    """Bytes int8 or uint8 [..., K / 2] -> codes uint8 [..., K]: the low nibble is the even element (3.1)."""
    byte = packed.view(np.uint8)
    return np.stack([byte & 15, byte >> 4], -1).reshape(*packed.shape[:-1], -1)


def fp4_pack(codes: Array) -> Array:
    """Codes uint8 [..., K], K even -> bytes int8 [..., K / 2] as stored (3.1)."""
    return (codes[..., 0::2] | codes[..., 1::2] << 4).view(np.int8)


def fp4_dequantise(packed: Array, scales: Array) -> Array:
    """(bytes [out, in / 2], scales [out, cdiv(in, 32)]) -> float32 [out, in] = code * scale (3.1)."""
    codes = fp4_unpack(packed)
    return fp4_decode(codes) * per_channel(scale_values(scales), FP4_GROUP, codes.shape[-1])


def fp8_dequantise(codes: Array, scales: Array) -> Array:
    """(codes [out, in], scales [cdiv(out, 128), cdiv(in, 128)]) -> float32 [out, in], partial edge blocks too (3.1)."""
    return dequantise(codes, scale_values(scales))


def fp8_weight(w: Array) -> tuple[Array, Array]:
    """w [out, in] -> (E4M3 codes [out, in], F8_E8M0 scales per block of 128 x 128), as stored (3.1)."""
    codes, scales = weight_quant(w, scale_fmt="ue8m0")
    return codes, ue8m0_encode(scales).view(E8M0)


def fp4_weight(w: Array) -> tuple[Array, Array]:
    """w [out, in], `in` even -> (bytes int8 [out, in / 2], F8_E8M0 scales [out, cdiv(in, 32)]), as stored (3.1)."""
    codes, scales = fp4_quant(w)
    return fp4_pack(codes), ue8m0_encode(scales).view(E8M0)


def hadamard(x: Array, policy: Policy = NATIVE) -> Array:
    """x [..., 2^m] times the orthonormal Hadamard matrix, Sylvester order: FP32 sums, BF16 out (2.4)."""
    matrix, size = np.ones((1, 1), np.float32), x.shape[-1]
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    assert len(matrix) == size, f"{size} is not a power of two"
    return policy.round(policy.einsum("...i,io->...o", x, matrix) * np.float32(size**-0.5))


# --------------------------------------------------------------------------------------------------------- linear (2.0)
def stored(weights: Weights, name: str) -> Stored:
    """The matrix `<name>.weight` with `<name>.scale` when it has one; FP4 is recognised by its dtype (1.1, 3.1)."""
    w, scales = weights[name + ".weight"], weights.get(name + ".scale")
    if scales is None:
        return Stored("float", w, np.zeros(0, np.float32))
    return Stored("fp8" if w.dtype == E4M3 else "fp4", w, scale_values(scales))


def dense(w: Stored, policy: Policy = NATIVE) -> Array:
    """A stored matrix as float32 [out, in]: dequantised, and in native rounded to BF16 (2.3 wo_a, 3.1)."""
    if w.kind == "float":
        return policy.round(w.codes)
    return policy.round((fp8_dequantise if w.kind == "fp8" else fp4_dequantise)(w.codes, w.scales))


def quantised_matmul(codes: Array, scales: Array, w: Stored, policy: Policy = NATIVE) -> Array:
    """E4M3 codes [..., K] with scales [..., ceil(K / 128)], FP8 or FP4 w [out, K] -> float32 [..., out] (2.0).

    sum over blocks of K (128 for FP8, 32 for FP4) of (codes . codes) * s_x * s_w; not yet rounded.
    """
    a = e4m3_decode(codes).reshape(-1, codes.shape[-1]).astype(policy.accumulate)
    a_scales = scales.reshape(len(a), -1)
    if w.kind == "fp8":
        block, b = GROUP, e4m3_decode(w.codes)
        b_scales = w.scales.repeat(GROUP, 0)[: len(b)]
    else:
        block, b, b_scales = FP4_GROUP, fp4_decode(fp4_unpack(w.codes)), w.scales
    total = np.zeros((len(a), len(b)), policy.accumulate)
    for i, start in enumerate(range(0, a.shape[1], block)):
        dots = a[:, start : start + block] @ b[:, start : start + block].T.astype(policy.accumulate)
        total += dots * a_scales[:, start // GROUP, None] * b_scales[:, i]
    return f32(total).reshape(*codes.shape[:-1], len(b))


def linear(x: Array, w: Stored, policy: Policy = NATIVE) -> Array:
    """x [..., in], w [out, in] -> x w^T [..., out], BF16 out; a quantised w takes quantised activations (2.0)."""
    if w.kind != "float" and policy.native:
        return policy.round(quantised_matmul(*act_quant(x), w, policy))
    return policy.round(policy.einsum("...i,oi->...o", x, dense(w, policy)))


# ------------------------------------------------------------------------------------------------- RoPE and norms (2.0)
def rope_dim(config: Config) -> int:
    """R, of the main heads and of the indexer's alike."""
    return config.get("qk_rope_head_dim") or int(config["head_dim"] * config["partial_rotary_factor"])


def layer_ratio(config: Config, layer: int) -> int:
    """r of a main layer: 0 (window only), 4, 128. From compress_ratios, by layer id, or from layer_types (1.1, 3.3)."""
    if config.get("compress_ratios") is not None:
        return int(config["compress_ratios"][layer])
    kind = config["layer_types"][layer]
    rates = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
    return 0 if kind == "sliding_attention" else {**rates, **(config.get("compress_rates") or {})}[kind]


def frequencies(config: Config, ratio: int) -> Array:
    """Rotary frequencies float32 [R / 2] of everything in a layer: ratio 0 unscaled, else its own theta and YaRN."""
    size, theta = rope_dim(config), config["compress_rope_theta"] if ratio else config["rope_theta"]
    i = np.arange(size // 2, dtype=np.float32)
    # The power in float64, rounded: NumPy's float32 power is off by up to two units in the last place, torch's by none.
    f = np.float32(1) / f32(float(theta) ** (2 * i / np.float32(size)).astype(np.float64))
    parameters = config.get("rope_parameters") or {}
    scaling = parameters.get("compress") or parameters or config.get("rope_scaling") or {}
    if not ratio or scaling.get("rope_type", scaling.get("type", "default")) != "yarn":
        return f
    turns = scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1
    original = scaling["original_max_position_embeddings"]
    corr = [size * math.log(original / (2 * math.pi * n)) / (2 * math.log(theta)) for n in turns]
    low, high = max(math.floor(corr[0]), 0), min(math.ceil(corr[1]), size - 1)
    ramp = np.clip((i - np.float32(low)) / np.float32(high - low or 0.001), 0, 1)
    return f / np.float32(scaling["factor"]) * ramp + f * (1 - ramp)


def rope(x: Array, positions: Array, freqs: Array, policy: Policy = NATIVE, inverse: bool = False) -> Array:
    """x [T, ..., N + R], positions [T], freqs [R / 2] -> the same with the last R channels turned in FP32, BF16 out.

    Neighbours (x[2i], x[2i + 1]) turn by position * freq, an FP32 product (pitfall 27); `inverse` turns them back.
    """
    nope, pe = np.split(f32(x), [x.shape[-1] - 2 * len(freqs)], -1)
    angle = f32(positions)[:, None] * f32(freqs)
    angle = angle.reshape(len(x), *[1] * (x.ndim - 2), len(freqs)).astype(np.float64)  # cos and sin to the last bit
    cos, sin, even, odd = f32(np.cos(angle)), f32(np.sin(angle)), pe[..., 0::2], pe[..., 1::2]
    sin = -sin if inverse else sin
    turned = np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(pe.shape)
    return np.concatenate([nope, policy.round(turned)], -1)


def rms_norm(x: Array, gain: Array, eps: float, policy: Policy = NATIVE) -> Array:
    """x [..., d], gain [d] -> gain * (x * rsqrt(mean(x^2) + eps)), in FP32, rounded once to BF16 (2.0)."""
    x = f32(x)
    return policy.round(f32(gain) * (x * (1 / np.sqrt(policy.mean(np.square(x)) + np.float32(eps)))))


def head_norm(q: Array, eps: float, policy: Policy = NATIVE) -> Array:
    """q [..., D] * rsqrt(mean(q^2) + eps), no gain; in native every step rounds to BF16, as REF's does (2.3)."""
    step = policy.round if policy.head_norm == "bf16" else f32
    mean = step(policy.mean(step(np.square(q))))
    return policy.round(q * step(1 / np.sqrt(step(mean + np.float32(eps)))))


# ------------------------------------------------------------------------------------------------------------ mHC (2.2)
def sinkhorn(logits: Array, iterations: int, eps: float, policy: Policy = NATIVE) -> Array:
    """logits float32 [..., n, n] -> almost doubly stochastic float32: rows first, columns last, FP32 (2.2)."""
    e, small = np.exp(logits - logits.max(-1, keepdims=True)), np.float32(eps)
    c = e / policy.sum(e) + small
    c = c / (policy.sum(c, -2) + small)
    for _ in range(iterations - 1):
        c = c / (policy.sum(c) + small)
        c = c / (policy.sum(c, -2) + small)
    return c


def hc_project(x: Array, fn: Array, config: Config, policy: Policy) -> Array:
    """x [..., n, d], fn [m, n d] -> (fn z) * rsqrt(mean(z^2) + rms_norm_eps), z = x flattened; FP32 [..., m] (2.2)."""
    z = f32(x).reshape(*x.shape[:-2], -1)
    rho = 1 / np.sqrt(policy.mean(np.square(z)) + np.float32(config["rms_norm_eps"]))
    return policy.einsum("...i,oi->...o", z, f32(fn)) * rho


def hc_pre(
    x: Array, fn: Array, scale: Array, base: Array, config: Config, policy: Policy = NATIVE
) -> tuple[Array, Array, Array]:
    """Streams x [..., n, d] -> (u [..., d] BF16, post [..., n], comb [..., n, n], both FP32) (2.2).

    fn [(2 + n) n, n d], scale [3], base [(2 + n) n].
    """
    n, eps = x.shape[-2], config["hc_eps"]
    m, scale, base = hc_project(x, fn, config, policy), f32(scale), f32(base)
    pre = sigmoid(m[..., :n] * scale[0] + base[:n]) + np.float32(eps)
    post = 2 * sigmoid(m[..., n : 2 * n] * scale[1] + base[n : 2 * n])
    logits = (m[..., 2 * n :] * scale[2] + base[2 * n :]).reshape(*m.shape[:-1], n, n)
    comb = sinkhorn(logits, config["hc_sinkhorn_iters"], eps, policy)
    return policy.round(policy.einsum("...j,...jd->...d", pre, f32(x))), post, comb


def hc_post(a: Array, x: Array, post: Array, comb: Array, policy: Policy = NATIVE) -> Array:
    """x'_k = post_k a + sum_j comb[j, k] x_j: a [..., d], x [..., n, d] -> [..., n, d], rounded once (2.2)."""
    mixed = policy.einsum("...jk,...jd->...kd", comb, f32(x))
    return policy.round(post[..., None] * f32(a)[..., None, :] + mixed)


def hc_head(x: Array, fn: Array, scale: Array, base: Array, config: Config, policy: Policy = NATIVE) -> Array:
    """Streams x [..., n, d] -> [..., d] BF16; fn [n, n d], scale [1], base [n] (2.2)."""
    pre = sigmoid(hc_project(x, fn, config, policy) * f32(scale) + f32(base)) + np.float32(config["hc_eps"])
    return policy.round(policy.einsum("...j,...jd->...d", pre, f32(x)))


# ----------------------------------------------------------------------------------------------------- compressor (2.4)
def pool(x: Array, weights: Weights, ratio: int, size: int, policy: Policy = NATIVE) -> Array:
    """x [T, d] -> what the gate makes of each complete window, float32 [T // r, size], not yet rounded (2.4, 1 - 4).

    `weights` holds wkv, wgate [c size, d], ape [r, c size]; c = 2 means overlapping windows: the first half of the
    channels serves the next entry, the second half the current one.
    """
    entries, overlap = len(x) // ratio, weights["ape"].shape[-1] == 2 * size
    x = f32(x[: entries * ratio])
    k, z = (policy.einsum("ti,oi->to", x, f32(weights[name + ".weight"])) for name in ("wkv", "wgate"))
    k, z = (a.reshape(entries, *weights["ape"].shape) for a in (k, z))
    z = z + f32(weights["ape"])
    if overlap and entries:
        none = np.zeros((1, ratio, size), np.float32)  # before the first window: weight exactly 0
        k = np.concatenate([np.concatenate([none, k[:-1, :, :size]]), k[:, :, size:]], 1)
        z = np.concatenate([np.concatenate([none - np.float32(np.inf), z[:-1, :, :size]]), z[:, :, size:]], 1)
    e = np.exp(z - z.max(1, keepdims=True))
    return policy.sum(e / policy.sum(e, 1) * k, 1)[:, 0, :size]


def compressor(
    x: Array, weights: Weights, config: Config, ratio: int, positions: Array | None = None,
    policy: Policy = NATIVE, indexer: bool = False,
) -> Array:  # fmt: skip
    """x [T, d] -> compressed entries [T // r, D], of the indexer [T // r, I], as a cache holds them (2.4).

    An entry turns at the position of its window's first token. Main entries are rounded to FP8, the indexer's are
    Hadamard'ed and rounded to FP4.
    """
    size = config["index_head_dim"] if indexer else config["head_dim"]
    positions = np.arange(len(x)) if positions is None else positions
    pooled = policy.round(pool(x, weights, ratio, size, policy))
    entries = rms_norm(pooled, weights["norm.weight"], config["rms_norm_eps"], policy)
    first = positions[: len(entries) * ratio : ratio]
    entries = rope(entries, first, frequencies(config, ratio), policy)
    return index_round(entries, policy) if indexer else kv_fake_quant(entries, size - rope_dim(config), policy)


def visible(T: int, ratio: int) -> Array:
    """Bool [T, T // r]: entry s is visible to query t iff s < (t + 1) // r, its window being complete (2.5, 2.6)."""
    return np.arange(T // ratio) < (np.arange(T)[:, None] + 1) // ratio


# -------------------------------------------------------------------------------------------------------- indexer (2.5)
def index_round(x: Array, policy: Policy = NATIVE) -> Array:
    """The indexer's queries or keys [..., I] after RoPE -> Hadamard'ed and rounded to FP4, in native (2.5)."""
    if policy.native and policy.hadamard:
        x = hadamard(x, policy)
    return fp4_fake_quant(x)[2] if policy.native and policy.index_quant else x


def index_queries(
    qr: Array, weights: Weights, config: Config, ratio: int, positions: Array, policy: Policy = NATIVE
) -> Array:
    """qr [T, q_lora_rank] (after q_norm) -> q' [T, J, I]; no norm per head (2.5)."""
    q = linear(qr, stored(weights, "wq_b"), policy).reshape(len(qr), config["index_n_heads"], -1)
    return index_round(rope(q, positions, frequencies(config, ratio), policy), policy)


def index_weights(x: Array, weights: Weights, config: Config, policy: Policy = NATIVE) -> Array:
    """x [T, d] (the attention's input) -> w [T, J], scaled by I^-0.5 J^-0.5 in one multiplication (2.5)."""
    scale = np.float32(config["index_head_dim"] ** -0.5 * config["index_n_heads"] ** -0.5)
    return policy.round(linear(x, stored(weights, "weights_proj"), policy) * scale)


def index_scores(q: Array, k: Array, w: Array, policy: Policy = NATIVE) -> Array:
    """q' [T, J, I], k' [E, I], w [T, J] -> sum_j relu(q'_j . k') w_j [T, E]; dot, product and sum BF16 (2.5)."""
    dots = np.maximum(policy.round(policy.einsum("tji,ei->tje", q, k)), 0)
    return policy.round(policy.sum(policy.round(dots * w[..., None]), 1)[:, 0])


def index_select(scores: Array, seen: Array, k: int) -> Array:
    """scores [T, E], seen bool [T, E] -> bool [T, E], the k best of those seen; the lowest index among equals (2.5)."""
    selected = np.zeros(scores.shape, bool)
    np.put_along_axis(selected, top_k(np.where(seen, scores, -np.inf), k), True, -1)
    return selected & seen


def indexer(
    x: Array, qr: Array, weights: Weights, config: Config, ratio: int, positions: Array | None = None,
    policy: Policy = NATIVE,
) -> tuple[Array, Array]:  # fmt: skip
    """x [T, d], qr [T, q_lora_rank] -> (scores [T, E], -inf where not visible, selected bool [T, E]) (2.5).

    `weights` holds the names below `attn.indexer.`.
    """
    positions = np.arange(len(x)) if positions is None else positions
    q = index_queries(qr, weights, config, ratio, positions, policy)
    k = compressor(x, scope(weights, "compressor."), config, ratio, positions, policy, indexer=True)
    scores = index_scores(q, k, index_weights(x, weights, config, policy), policy)
    seen = visible(len(x), ratio)
    return np.where(seen, scores, np.float32(-np.inf)), index_select(scores, seen, config["index_topk"])


# ------------------------------------------------------------------------------------------------------ attention (2.3)
def attention_query(
    x: Array, weights: Weights, config: Config, ratio: int, positions: Array, policy: Policy = NATIVE
) -> tuple[Array, Array]:
    """x [T, d] -> (qr [T, q_lora_rank], which the indexer takes too, q [T, H, D] after norm and RoPE) (2.3, 1 - 3)."""
    eps = config["rms_norm_eps"]
    qr = rms_norm(linear(x, stored(weights, "wq_a"), policy), weights["q_norm.weight"], eps, policy)
    q = linear(qr, stored(weights, "wq_b"), policy).reshape(len(x), config["num_attention_heads"], -1)
    return qr, rope(head_norm(q, eps, policy), positions, frequencies(config, ratio), policy)


def attention_kv(
    x: Array, weights: Weights, config: Config, ratio: int, positions: Array, policy: Policy = NATIVE
) -> Array:
    """x [T, d] -> the window's keys, which are its values, [T, D]: norm, RoPE, FP8 on the other channels (2.3, 4)."""
    kv = linear(x, stored(weights, "wkv"), policy)
    kv = rms_norm(kv, weights["kv_norm.weight"], config["rms_norm_eps"], policy)
    kv = rope(kv, positions, frequencies(config, ratio), policy)
    return kv_fake_quant(kv, config["head_dim"] - rope_dim(config), policy)


def window_slots(T: int, window: int) -> Array:
    """Key indices int [T, min(T, window)] of each query's window, itself included, ascending; -1: unused (2.3, 5)."""
    t = np.arange(T)[:, None]
    slots = np.maximum(t - window + 1, 0) + np.arange(min(T, window))
    return np.where(slots <= t, slots, -1)


def entry_slots(chosen: Array, offset: int, size: int, scores: Array | None = None) -> Array:
    """chosen bool [T, E] -> key indices int [T, size] = offset + entry, ascending or by falling score; -1: unused."""
    order = -np.arange(chosen.shape[1], dtype=np.float32) if scores is None else scores
    entries = top_k(np.where(chosen, order, -np.inf), size)
    return np.where(np.take_along_axis(chosen, entries, -1), entries + offset, -1)


def attention_core(q: Array, keys: Array, slots: Array, sink: Array, policy: Policy = NATIVE) -> Array:
    """q [T, H, D], keys = values [K, D], slots int [T, S] (-1: none), sink [H] -> o [T, H, D], BF16 out (2.3, 6).

    The sink joins the denominator alone. P is rounded to BF16 for the values and unrounded in the denominator. Its
    maximum, without the sink, is over all keys, or with softmax="online" over the blocks of 64 slots up to its own.
    """
    scale, sink = np.float32(keys.shape[-1] ** -0.5), f32(sink)[:, None]
    if not (policy.native and policy.softmax == "online"):
        mask = np.zeros((len(q), len(keys) + 1), bool)
        np.put_along_axis(mask, slots, True, -1)  # -1 is the column too many
        scores = policy.einsum("thd,kd->thk", q, keys) * scale
        scores = np.where(mask[:, None, :-1], scores, np.float32(-np.inf))
        top = scores.max(-1, keepdims=True)
        p = np.exp(scores - top)
        return policy.round(policy.einsum("thk,kd->thd", policy.round(p), keys) / (policy.sum(p) + np.exp(sink - top)))
    top = np.full((*q.shape[:2], 1), -np.inf, np.float32)
    total, o = np.zeros_like(top), np.zeros_like(q)
    for start in range(0, slots.shape[1], P_BLOCK):
        block = slots[:, start : start + P_BLOCK]
        values = keys[block]
        scores = policy.einsum("thd,tkd->thk", q, values) * scale
        scores = np.where(block[:, None] >= 0, scores, np.float32(-np.inf))
        higher = np.maximum(top, scores.max(-1, keepdims=True))
        p, fade = np.exp(scores - higher), np.exp(top - higher)
        total = total * fade + policy.sum(p)
        o = o * fade + policy.einsum("thk,tkd->thd", policy.round(p), values)
        top = higher
    return policy.round(o / (total + np.exp(sink - top)))


def attention_output(
    o: Array, weights: Weights, config: Config, ratio: int, positions: Array, policy: Policy = NATIVE
) -> Array:
    """o [T, H, D] -> [T, d]: turned back at the query's position, then wo_a per group of heads, then wo_b (2.3, 7 - 8).

    wo_a is dequantised to BF16 and takes BF16 activations, whatever it is stored as (pitfall 20).
    """
    G = config["o_groups"]
    o = rope(o, positions, frequencies(config, ratio), policy, inverse=True).reshape(len(o), G, -1)
    wo_a = dense(stored(weights, "wo_a"), policy).reshape(G, config["o_lora_rank"], -1)
    y = policy.round(policy.einsum("tgi,goi->tgo", o, wo_a))
    return linear(y.reshape(len(o), -1), stored(weights, "wo_b"), policy)


def attention(
    x: Array, weights: Weights, config: Config, ratio: int, positions: Array | None = None,
    policy: Policy = NATIVE, selected: Array | None = None,
) -> tuple[Array, Array | None]:  # fmt: skip
    """Attention of any kind over one sequence, x [T, d] -> (out [T, d], the entries used, bool [T, E] or None) (2.3).

    `weights` holds the names below `attn.`. Entries: none without a compressor, with an indexer those it selects
    (CSA), else all visible ones (HCA). `selected` replaces that choice. `positions` are those of RoPE; what is seen
    depends on the order alone.
    """
    T = len(x)
    positions = np.arange(T) if positions is None else positions
    qr, q = attention_query(x, weights, config, ratio, positions, policy)
    keys = attention_kv(x, weights, config, ratio, positions, policy)
    slots, scores, chosen = window_slots(T, config["sliding_window"]), None, None
    if ratio:
        entries = compressor(x, scope(weights, "compressor."), config, ratio, positions, policy)
        size = len(entries)
        if "indexer.wq_b.weight" in weights:
            scores, chosen = indexer(x, qr, scope(weights, "indexer."), config, ratio, positions, policy)
            size = min(size, config["index_topk"])
        else:
            chosen = visible(T, ratio)
        if selected is not None:
            assert selected.shape == chosen.shape, (selected.shape, chosen.shape)
            chosen, size = selected, max(size, int(selected.sum(-1).max(initial=0)))
        slots = np.concatenate([slots, entry_slots(chosen, T, size, scores)], -1)
        keys = np.concatenate([keys, entries])
    o = attention_core(q, keys, slots, weights["attn_sink"], policy)
    return attention_output(o, weights, config, ratio, positions, policy), chosen


# --------------------------------------------------------------------------------------------- gate and MoE (2.7, 2.8)
def gate(x: Array, tokens: Array, weights: Weights, config: Config, policy: Policy = NATIVE) -> tuple[Array, Array]:
    """x [T, d], token ids [T] -> (expert ids [T, k], their weights float32 [T, k]), all in FP32 (2.7).

    `weights` holds the names below `ffn.gate.`. With tid2eid the token chooses the experts, otherwise the biased score;
    the unbiased scores are the weights in both cases. An id may occur twice in a row of tid2eid.
    """
    logits = policy.einsum("ti,fi->tf", x, f32(weights["weight"]))
    softplus = np.where(logits > 20, logits, np.log1p(np.exp(np.minimum(logits, 20))))
    scores = np.sqrt(softplus)
    if "tid2eid" in weights:
        indices = weights["tid2eid"][tokens].astype(np.int64)
    else:
        indices = top_k(scores + f32(weights["bias"]), config["num_experts_per_tok"])
    chosen = np.take_along_axis(scores, indices, -1)
    return indices, chosen / policy.sum(chosen) * np.float32(config["routed_scaling_factor"])


def expert(x: Array, weights: Weights, limit: float, policy: Policy = NATIVE, gates: Array | None = None) -> Array:
    """w2(gates * silu(w1 x) * w3 x), x [T, d], gates [T] (routed experts only) -> [T, d] (2.8).

    w1 x is clipped from above alone, w3 x on both sides; the product is FP32, rounded once.
    """
    left = np.minimum(linear(x, stored(weights, "w1"), policy), np.float32(limit))
    up = np.clip(linear(x, stored(weights, "w3"), policy), -np.float32(limit), np.float32(limit))
    a = left * sigmoid(left) * up
    a = a if gates is None else gates[:, None] * a
    return linear(policy.round(a), stored(weights, "w2"), policy)


def moe(x: Array, tokens: Array, weights: Weights, config: Config, policy: Policy = NATIVE) -> Array:
    """x [T, d], token ids [T] -> [T, d]: routed experts summed in FP32 by rising id, the shared one last (2.8).

    `weights` holds the names below `ffn.`.
    """
    limit = config["swiglu_limit"]
    indices, gates = gate(x, tokens, scope(weights, "gate."), config, policy)
    total = np.zeros(x.shape, policy.accumulate)
    for f in np.unique(indices):
        token, slot = np.nonzero(indices == f)
        y = expert(x[token], scope(weights, f"experts.{f}."), limit, policy, gates[token, slot])
        np.add.at(total, token, y)  # a token may come twice
    return policy.round(total + expert(x, scope(weights, "shared_experts."), limit, policy))


# ----------------------------------------------------------------------------------------------- model (2.1), MTP (2.9)
def hc_site(weights: Weights, site: str) -> tuple[Array, Array, Array]:
    """(fn, scale, base) of the site "hc_attn", "hc_ffn" or "hc_head"."""
    return weights[site + "_fn"], weights[site + "_scale"], weights[site + "_base"]


def block(
    x: Array, tokens: Array, weights: Weights, config: Config, ratio: int, positions: Array | None = None,
    policy: Policy = NATIVE, selected: Array | None = None,
) -> tuple[Array, Array | None]:  # fmt: skip
    """One layer over one sequence's streams: x [T, n, d], token ids [T] -> ([T, n, d], entries as `attention`) (2.1).

    `weights` holds the names below `layers.<i>.`.
    """
    eps = config["rms_norm_eps"]
    u, post, comb = hc_pre(x, *hc_site(weights, "hc_attn"), config, policy)
    a = rms_norm(u, weights["attn_norm.weight"], eps, policy)
    a, selected = attention(a, scope(weights, "attn."), config, ratio, positions, policy, selected)
    x = hc_post(a, x, post, comb, policy)
    u, post, comb = hc_pre(x, *hc_site(weights, "hc_ffn"), config, policy)
    m = rms_norm(u, weights["ffn_norm.weight"], eps, policy)
    m = moe(m, tokens, scope(weights, "ffn."), config, policy)
    return hc_post(m, x, post, comb, policy), selected


def embed(tokens: Array, weights: Weights, config: Config, policy: Policy = NATIVE) -> Array:
    """Token ids [...] -> streams [..., n, d], n equal copies (2.1)."""
    h = policy.round(weights["embed.weight"][tokens])
    return np.repeat(h[..., None, :], config["hc_mult"], -2)


def head(x: Array, norm: Array, site: tuple[Array, Array, Array], w: Array, config: Config, policy: Policy) -> Array:
    """Streams x [..., n, d], norm [d], (fn, scale, base), w [vocab, d] -> logits float32 [..., vocab] (2.1)."""
    y = rms_norm(hc_head(x, *site, config, policy), norm, config["rms_norm_eps"], policy)
    return policy.einsum("...d,vd->...v", y, f32(w))


def layers(
    tokens: Array, weights: Weights, config: Config, policy: Policy = NATIVE,
    selections: Mapping[int, Array] | None = None,
) -> Iterator[tuple[Array, Array | None]]:  # fmt: skip
    """Token ids [T] -> after each main layer its streams [T, n, d] and the entries its queries used (2.1)."""
    x = embed(tokens, weights, config, policy)
    for i in range(config["num_hidden_layers"]):
        fixed = (selections or {}).get(i)
        layer, ratio = scope(weights, f"layers.{i}."), layer_ratio(config, i)
        x, used = block(x, tokens, layer, config, ratio, None, policy, fixed)
        yield x, used


def model(
    tokens: Array, weights: Weights, config: Config, policy: Policy = NATIVE,
    selections: Mapping[int, Array] | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """Token ids [T] or [B, T] -> (logits float32 [..., vocab], unrounded; streams [..., n, d] before the head) (2.1).

    `selections` fixes the compressed entries of some layers: layer -> bool [..., T, E].
    """
    if tokens.ndim == 2:
        fixed = [{i: mask[b] for i, mask in (selections or {}).items()} for b in range(len(tokens))]
        rows = [model(row, weights, config, policy, masks) for row, masks in zip(tokens, fixed, strict=True)]
        return np.stack([logits for logits, _ in rows]), np.stack([x for _, x in rows])
    x = embed(tokens, weights, config, policy)
    for x, _ in layers(tokens, weights, config, policy, selections):  # noqa: B007 - the last one is wanted
        pass
    norm, w = weights["norm.weight"], weights["head.weight"]
    return head(x, norm, hc_site(weights, "hc_head"), w, config, policy), x


def mtp(
    x: Array, next_tokens: Array, weights: Weights, config: Config, policy: Policy = NATIVE, index: int = 0
) -> tuple[Array, Array]:
    """Streams before the head x [..., T, n, d] and ids [..., T] one ahead -> as `model`, for two ahead (2.9).

    Positions are those of x; the streams returned draft again.
    """
    if next_tokens.ndim == 2:
        rows = [mtp(*row, weights, config, policy, index) for row in zip(x, next_tokens, strict=True)]
        return np.stack([logits for logits, _ in rows]), np.stack([x for _, x in rows])
    layer, eps = scope(weights, f"mtp.{index}."), config["rms_norm_eps"]
    e = rms_norm(policy.round(weights["embed.weight"][next_tokens]), layer["enorm.weight"], eps, policy)
    y = rms_norm(x, layer["hnorm.weight"], eps, policy)
    e, y = linear(e, stored(layer, "e_proj"), policy), linear(y, stored(layer, "h_proj"), policy)
    x, _ = block(policy.round(e[:, None] + y), next_tokens, layer, config, 0, None, policy)
    return head(x, layer["norm.weight"], hc_site(layer, "hc_head"), weights["head.weight"], config, policy), x


# ----------------------------------------------------------------------------------------------------- checkpoint (3.1)
SAFETENSORS = {**V3_SAFETENSORS, "I64": np.int64, "I32": np.int32}


def load_folder(path: str | Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """A trusted checkpoint folder under the official names -> (weights by name as stored; config.json) (3.1)."""
    weights: dict[str, Array] = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        data = file.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        entries = {name: entry for name, entry in json.loads(data[8:start]).items() if name != "__metadata__"}
        for name, entry in entries.items():
            first, last = (start + offset for offset in entry["data_offsets"])
            weights[name] = np.frombuffer(data[first:last], SAFETENSORS[entry["dtype"]]).reshape(entry["shape"])
    return weights, json.loads((Path(path) / "config.json").read_text())
