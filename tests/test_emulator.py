"""Checks of tests/emulator.py itself: the spec's golden values, all codes of its codecs, Hugging Face in float32."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import emulator as em
import ml_dtypes
import numpy as np
import pytest

YARN = {
    "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
V3_ROPE = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rope_theta": 10000, "rope_scaling": YARN}
TINY = {
    "model_type": "deepseek_v3", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 384,
    "moe_intermediate_size": 128, "num_hidden_layers": 4, "first_k_dense_replace": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "q_lora_rank": 128, "kv_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
    "v_head_dim": 32, "n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 4, "n_group": 4,
    "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "max_position_embeddings": 163840, "tie_word_embeddings": False,
}  # fmt: skip
TINY_V3 = {**TINY, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "rope_scaling": YARN}
TINY_V2 = {
    **TINY, "model_type": "deepseek_v2", "q_lora_rank": None, "n_shared_experts": 2, "routed_scaling_factor": 1.0,
    "scoring_func": "softmax", "topk_method": "group_limited_greedy", "norm_topk_prob": False,
    "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
}  # fmt: skip


def synthesise(config: dict[str, Any], seed: int = 0, mtp: bool = False) -> dict[str, np.ndarray]:
    """Random float32 weights under the official names."""
    rng, weights = np.random.default_rng(seed), {}
    D, H, C = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    N, R, V = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]

    def matrix(name: str, out: int, size: int) -> None:
        weights[name + ".weight"] = rng.standard_normal((out, size), np.float32) * np.float32(size**-0.5)

    def norm(name: str, size: int) -> None:
        weights[name + ".weight"] = 1 + np.float32(0.1) * rng.standard_normal(size, np.float32)

    def ffn(name: str, width: int) -> None:
        matrix(name + "gate_proj", width, D)
        matrix(name + "up_proj", width, D)
        matrix(name + "down_proj", D, width)

    matrix("model.embed_tokens", config["vocab_size"], D)
    matrix("lm_head", config["vocab_size"], D)
    norm("model.norm", D)
    for i in range(config["num_hidden_layers"] + mtp):
        layer, attention = f"model.layers.{i}.", f"model.layers.{i}.self_attn."
        norm(layer + "input_layernorm", D)
        norm(layer + "post_attention_layernorm", D)
        if config["q_lora_rank"]:
            matrix(attention + "q_a_proj", config["q_lora_rank"], D)
            norm(attention + "q_a_layernorm", config["q_lora_rank"])
            matrix(attention + "q_b_proj", H * (N + R), config["q_lora_rank"])
        else:
            matrix(attention + "q_proj", H * (N + R), D)
        matrix(attention + "kv_a_proj_with_mqa", C + R, D)
        norm(attention + "kv_a_layernorm", C)
        matrix(attention + "kv_b_proj", H * (N + V), C)
        matrix(attention + "o_proj", D, H * V)
        if i < config["first_k_dense_replace"]:
            ffn(layer + "mlp.", config["intermediate_size"])
        else:
            matrix(layer + "mlp.gate", config["n_routed_experts"], D)
            if config["scoring_func"] == "sigmoid":
                bias = rng.standard_normal(config["n_routed_experts"], np.float32) * np.float32(0.05)
                weights[layer + "mlp.gate.e_score_correction_bias"] = bias
            for e in range(config["n_routed_experts"]):
                ffn(f"{layer}mlp.experts.{e}.", config["moe_intermediate_size"])
            ffn(layer + "mlp.shared_experts.", config["n_shared_experts"] * config["moe_intermediate_size"])
    if mtp:
        for name in ("enorm", "hnorm", "shared_head.norm"):
            norm(layer + name, D)
        matrix(layer + "eh_proj", D, 2 * D)
    return weights


def quantised(weights: dict[str, np.ndarray], scale_fmt: str | None) -> dict[str, np.ndarray]:
    """As DeepSeek stores them: attention and FFN matrices FP8 with scales, the rest BF16, the gate's bias float32."""
    result = {}
    for name, w in weights.items():
        if name.endswith(("_proj.weight", "mqa.weight")) and "eh_proj" not in name:
            result[name], result[name + "_scale_inv"] = em.weight_quant(w, scale_fmt=scale_fmt)
        else:
            result[name] = w if name.endswith("bias") else w.astype(ml_dtypes.bfloat16)
    return result


def distance(x: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(x - reference) / np.linalg.norm(reference))


def bf16_noise(*shape: int, seed: int = 0) -> np.ndarray:
    return em.NATIVE.round(np.random.default_rng(seed).standard_normal(shape, np.float32))


# --------------------------------------------------------------------------------------------------------------- codecs
def test_e4m3_all_codes() -> None:
    codes = np.delete(np.arange(256), [0x7F, 0xFF]).astype(np.uint8)
    exponent, mantissa = (codes >> 3 & 15).astype(int), (codes & 7).astype(int)
    value = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    value = np.where(codes >= 128, -value, value)
    np.testing.assert_array_equal(em.e4m3_decode(codes), value)
    np.testing.assert_array_equal(em.e4m3_encode(value).view(np.uint8), codes)
    assert em.e4m3_encode(np.float32([449, 464.5, 1e9, np.inf])).astype(np.float32).tolist() == [448] * 4


def test_e4m3_rounds_to_nearest_even() -> None:
    low = np.arange(0x7E, dtype=np.uint8)
    a, b = em.e4m3_decode(low), em.e4m3_decode(low + np.uint8(1))
    middle = (a + b) / 2  # exact in float32
    even = np.where(low % 2 == 0, low, low + 1)
    np.testing.assert_array_equal(em.e4m3_encode(middle).view(np.uint8), even)
    np.testing.assert_array_equal(em.e4m3_encode(np.nextafter(middle, b)).view(np.uint8), low + 1)
    np.testing.assert_array_equal(em.e4m3_encode(np.nextafter(middle, a)).view(np.uint8), low)


def test_ue8m0_is_the_ceiling() -> None:
    exponent = np.arange(1, 254, dtype=np.uint32)[:, None]
    s = (exponent << 23 | np.uint32([0, 1, 2, 0x3FFFFF, 0x400000, 0x7FFFFF])).view(np.float32)
    power = em.ue8m0_decode(em.ue8m0_encode(s)).astype(np.float64)
    assert np.all(power >= s) and np.all(power / 2 < s)
    assert np.all(np.frexp(power)[0] == 0.5)
    assert em.ue8m0_encode(np.float32([2.0**127, 1.5 * 2.0**127, 1e-40])).tolist() == [254, 255, 1]


def test_ue8m0_decodes_all_codes() -> None:
    codes = np.arange(256, dtype=np.uint8)
    expected = np.append(2.0 ** np.arange(-127, 128), np.nan)
    np.testing.assert_array_equal(em.ue8m0_decode(codes), expected)
    np.testing.assert_array_equal(em.ue8m0_decode(codes.view(ml_dtypes.float8_e8m0fnu)), expected)


@pytest.mark.parametrize(
    ("amax", "scale", "power"),
    [(1e-4, 2.2321e-7, -22), (0.5, 0.00111607, -9), (1, 0.00223214, -8), (3.5, 0.0078125, -7), (448, 1, 0),
     (449, 1.0022, 1), (896, 2, 1), (0, 2.2321e-7, -22)],
)  # fmt: skip
def test_act_quant_goldens(amax: float, scale: float, power: int) -> None:
    x = np.zeros((1, 128), np.float32)
    x[0, 5] = -amax
    assert em.act_quant(x)[1][0, 0] == pytest.approx(scale, rel=5e-5)
    codes, scales = em.act_quant(x, "ue8m0")
    assert scales[0, 0] == 2.0**power
    assert abs(em.e4m3_decode(codes)[0, 5]) <= 448


@pytest.mark.parametrize("scale_fmt", ["float32", "ue8m0"])
def test_quantisation_of_odd_sizes(scale_fmt: str) -> None:
    x, w = bf16_noise(3, 2, 200), bf16_noise(144, 200, seed=1)
    codes, scales = em.act_quant(x, scale_fmt)
    assert codes.shape == x.shape and scales.shape == (3, 2, 2)
    padded = np.zeros((3, 2, 256), np.float32)
    padded[..., :200] = x
    np.testing.assert_array_equal(em.act_quant(padded, scale_fmt)[1], scales)
    w_codes, w_scales = em.weight_quant(w, scale_fmt=scale_fmt)
    assert w_scales.shape == (2, 2)
    tail = em.scale_from_amax(np.abs(w[128:, 128:]).max(), scale_fmt)
    assert w_scales[1, 1] == tail
    error = np.abs(em.dequantise(w_codes, w_scales) - w)
    assert np.all(error <= np.maximum(np.abs(w) / 16, em.expand(w_scales, (128, 128), w.shape) * 2.0**-10) * 1.0001)


def test_second_quantisation_changes_nothing() -> None:
    """With the same kind of scale both times (2.4); UE8M0 then float32 scales would change values."""
    x = bf16_noise(4000, 128) * np.exp2(np.random.default_rng(1).integers(-10, 10, (4000, 1))).astype(np.float32)
    for scale_fmt in ("float32", "ue8m0"):
        codes, scales = em.act_quant(x, scale_fmt)
        once = em.e4m3_decode(codes) * scales
        codes, scales = em.act_quant(once, scale_fmt)
        np.testing.assert_array_equal(em.e4m3_decode(codes) * scales, once)


# ------------------------------------------------------------------------------------------------------------ operators
@pytest.mark.parametrize("scale_fmt", ["float32", "ue8m0"])
def test_fp8_gemm_equals_its_definition(scale_fmt: str) -> None:
    a, w = em.act_quant(bf16_noise(5, 3, 328), scale_fmt), em.weight_quant(bf16_noise(200, 328, seed=1))
    x = em.e4m3_decode(a[0]).astype(np.float64) * a[1].repeat(128, -1)[..., :328]
    y = em.e4m3_decode(w[0]).astype(np.float64) * em.expand(w[1], (128, 128), (200, 328))
    assert distance(em.fp8_gemm(*a, *w), x @ y.T) < 3e-7
    assert distance(em.fp8_gemm(*a, *w, replace(em.NATIVE, accumulate=np.float64)), x @ y.T) < 5e-8


def test_yarn_goldens() -> None:
    f = em.yarn_frequencies(V3_ROPE)
    golden = {
        0: 1, 1: 0.749894202, 10: 0.0562341288, 11: 0.0390069261, 15: 0.0083345091, 16: 0.00550000044,
        20: 0.000790569407, 22: 0.00017782794, 23: 3.33380376e-5, 31: 3.33380376e-6,
    }  # fmt: skip
    np.testing.assert_allclose(f[list(golden)], list(golden.values()), rtol=1e-6)
    assert em.softmax_scale(V3_ROPE) == pytest.approx(0.1352337789, rel=1e-7)
    assert em.softmax_scale({**V3_ROPE, "rope_scaling": None}) == pytest.approx(0.0721687836, rel=1e-7)


def test_rope_is_a_complex_rotation_of_neighbours() -> None:
    x, positions, f = bf16_noise(6, 2, 64), np.array([0, 1, 7, 4095, 4096, 163839]), em.yarn_frequencies(V3_ROPE)
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * (positions.astype(np.float32)[:, None] * f))[:, None]
    y = em.rope(x, positions, f, em.PLAIN)
    np.testing.assert_allclose(y[..., 0::2] + 1j * y[..., 1::2], turned, atol=1e-6)
    np.testing.assert_array_equal(em.rope(x, positions, f)[0], x[0])


def test_gate_prefers_the_lowest_index_and_drops_groups() -> None:
    config = {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "routed_scaling_factor": 2.5}
    x, w = np.ones((1, 1), np.float32), np.zeros((6, 1), np.float32)
    assert em.moe_gate(x, w, np.zeros(6), config)[0].tolist() == [[0, 1]]
    indices, gates = em.moe_gate(x, w, np.float32([0, 0, 9, -3, -3, 8]), config)
    assert indices.tolist() == [[2, 0]] and gates.tolist() == [[1.25, 1.25]]
    indices, _ = em.moe_gate(x, w, np.float32([-9, -9, -9, -8, -8, -8]), config)  # all negative: masked must be -inf
    assert indices.tolist() == [[3, 4]]


@pytest.mark.parametrize("config", [TINY_V3, TINY_V2])
def test_naive_equals_absorbed_in_plain(config: dict[str, Any]) -> None:
    weights, tokens = synthesise(config), np.random.default_rng(1).integers(0, 512, 24)
    naive, _ = em.model(tokens, weights, config, mla="naive", policy=em.PLAIN)
    absorbed, _ = em.model(tokens, weights, config, policy=em.PLAIN)
    assert np.abs(naive - absorbed).max() < 1e-5 * np.abs(naive).max()


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_native_against_float64_accumulation(scale_fmt: str | None) -> None:
    """Noise of the order of summation against what wrong choices cost (11)."""
    weights = quantised(synthesise(TINY_V3), scale_fmt)
    rows = np.random.default_rng(2).integers(0, 512, (8, 12))
    exact = replace(em.NATIVE, accumulate=np.float64)
    noise, plain, other = [], [], []
    for tokens in rows:
        logits, _ = em.model(tokens, weights, TINY_V3, scale_fmt=scale_fmt)
        noise.append(distance(em.model(tokens, weights, TINY_V3, scale_fmt=scale_fmt, policy=exact)[0], logits))
        plain.append(distance(em.model(tokens, weights, TINY_V3, policy=em.PLAIN)[0], logits))
        wrong = "float32" if scale_fmt else "ue8m0"
        other.append(distance(em.model(tokens, weights, TINY_V3, scale_fmt=wrong)[0], logits))
    assert np.median(noise) < 1e-3 and max(noise) < 1e-1
    assert np.median(plain) > 3e-2 and np.median(other) > 3e-2


def test_v32_rounds_the_latent() -> None:
    """Only the absorbed form can tell: the naive one quantises the latent anyway (2.4)."""
    weights, tokens = quantised(synthesise(TINY_V3), "ue8m0"), np.arange(12)
    for form, equal in (("naive", True), ("absorbed", False)):
        a, b = (
            em.model(tokens, weights, {**TINY_V3, "model_type": kind}, mla=form, scale_fmt="ue8m0")[0]
            for kind in ("deepseek_v3", "deepseek_v32")
        )
        assert np.array_equal(a, b) == equal


# ---------------------------------------------------------------------------------------------------------- checkpoints
def test_load_folder(tmp_path: Path) -> None:
    w = bf16_noise(144, 200)
    codes, scales = em.weight_quant(w, scale_fmt="ue8m0")
    parts = {"head.weight": ("BF16", w.astype(ml_dtypes.bfloat16))}
    for i, (kind, stored) in enumerate(
        [("F32", scales), ("U8", em.ue8m0_encode(scales)), ("F8_E8M0", em.ue8m0_encode(scales))]
    ):
        parts |= {f"{i}.weight": ("F8_E4M3", codes), f"{i}.weight_scale_inv": (kind, stored)}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (kind, array) in parts.items():
        header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": [len(data), len(data) + array.nbytes]}
        data += array.tobytes()
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    (tmp_path / "config.json").write_text(json.dumps(TINY_V3))
    weights, config = em.load_folder(tmp_path)
    assert config == TINY_V3
    np.testing.assert_array_equal(weights["head.weight"].astype(np.float32), w)
    for i in range(3):
        np.testing.assert_array_equal(em.dequantise(*em.stored(weights, f"{i}.weight")), em.dequantise(codes, scales))


# --------------------------------------------------------------------------------------------------------- Hugging Face
def to_torch(weights: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, Any]:
    """The same weights under transformers 5's names: experts stacked, gate and up fused."""
    torch = pytest.importorskip("torch")
    state = {name: w for name, w in weights.items() if ".experts." not in name}
    for prefix in {name.split("experts.")[0] + "experts." for name in weights if ".experts." in name}:
        gate, up, down = (
            np.stack([weights[f"{prefix}{e}.{part}_proj.weight"] for e in range(config["n_routed_experts"])])
            for part in ("gate", "up", "down")
        )
        state |= {prefix + "gate_up_proj": np.concatenate([gate, up], 1), prefix + "down_proj": down}
    return {name: torch.from_numpy(w) for name, w in state.items()}


@pytest.mark.parity
@pytest.mark.parametrize("config", [TINY_V3, TINY_V2], ids=["v3", "v2"])
def test_plain_matches_hugging_face(config: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    family = "DeepseekV2" if config is TINY_V2 else "DeepseekV3"
    hf_config = getattr(transformers, family + "Config")(**config)
    weights, tokens = synthesise(config), np.random.default_rng(3).integers(0, 512, 32)
    reference = getattr(transformers, family + "ForCausalLM")(hf_config).eval()
    reference.load_state_dict(to_torch(weights, config))
    with torch.no_grad():
        expected = reference(torch.from_numpy(tokens)[None]).logits[0].numpy()
    saved = json.loads(json.dumps(hf_config.to_dict()))  # rope_parameters inside; must read the same
    for form, read in (("naive", config), ("absorbed", saved)):
        logits, _ = em.model(tokens, weights, read, mla=form, policy=em.PLAIN)
        assert np.abs(logits - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.parity
def test_mtp_matches_hugging_face() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    v3 = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    layers = pytest.importorskip("transformers.modeling_layers")
    config = {**TINY_V3, "num_hidden_layers": 2}
    weights, tokens = synthesise(config, mtp=True), np.random.default_rng(4).integers(0, 512, 20)
    _, hidden = em.model(tokens, weights, config, policy=em.PLAIN)
    logits, _ = em.mtp(hidden[:-1], tokens[1:], weights, config, policy=em.PLAIN)

    hf_config = transformers.DeepseekV3Config(**config, attn_implementation="sdpa")
    module = layers.MtpLayer(hf_config, v3.DeepseekV3DecoderLayer, v3.DeepseekV3RMSNorm, 2).eval()
    state = {}
    for name, w in to_torch(em.scope(weights, "model.layers.2."), config).items():
        own = name.startswith(("enorm", "hnorm", "eh_proj", "shared_head"))
        state[name.replace("shared_head.norm", "post_norm") if own else "mtp_block." + name] = w
    module.load_state_dict(state)
    embedded = torch.from_numpy(weights["model.embed_tokens.weight"][tokens[1:]])[None]
    positions = torch.arange(len(tokens) - 1)[None]
    with torch.no_grad():
        angles = v3.DeepseekV3RotaryEmbedding(hf_config)(embedded, positions)
        out = module(embedded, torch.from_numpy(hidden[:-1])[None], angles, None, positions, None)[0].numpy()
    expected = out @ weights["lm_head.weight"].T
    assert np.abs(logits - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.parity
def test_gates_match_hugging_face() -> None:
    torch = pytest.importorskip("torch")
    v2 = pytest.importorskip("transformers.models.deepseek_v2.modeling_deepseek_v2")
    v3 = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    transformers = pytest.importorskip("transformers")
    x, w, bias = bf16_noise(500, 256), bf16_noise(16, 256, seed=1) / 16, bf16_noise(16, seed=2)
    cases = [
        (TINY_V3, v3.DeepseekV3TopkRouter, transformers.DeepseekV3Config),
        (TINY_V2, v2.DeepseekV2TopkRouter, transformers.DeepseekV2Config),
        ({**TINY_V2, "topk_method": "greedy"}, v2.DeepseekV2TopkRouter, transformers.DeepseekV2Config),
    ]
    for config, router, make in cases:
        module = router(make(**config))
        state = {"weight": torch.from_numpy(w)}
        if config is TINY_V3:
            state["e_score_correction_bias"] = torch.from_numpy(bias)
        module.load_state_dict(state)
        with torch.no_grad():
            _, gates, indices = module(torch.from_numpy(x))
        mine, weight = em.moe_gate(x, w, bias, config)
        np.testing.assert_array_equal(np.sort(mine, -1), np.sort(indices.numpy(), -1))
        np.testing.assert_allclose(np.sort(weight, -1), np.sort(gates.numpy(), -1), rtol=2e-6)
