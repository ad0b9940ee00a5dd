"""V4's files in Hugging Face's names, and in what it makes of the official ones."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from damage import Capture, Tensors, drop, edit_json, generate_arguments, put, refused, replace, rewrite
from helpers import V4_SETTINGS

from dsjax.checkpoint.load import load
from dsjax.checkpoint.names import official_name, open_files
from dsjax.checkpoint.safetensors import SINGLE_FILE, Files
from dsjax.config import Config, load_config
from dsjax.params import EXPERT, LINEAR, Tree, is_mtp, table
from dsjax.synth import synth_config, synthesise

LAYER = "model.layers.{}."
HF_NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn.wq_a": "self_attn.q_a_proj",
    "attn.q_norm.weight": "self_attn.q_a_norm.weight",
    "attn.wq_b": "self_attn.q_b_proj",
    "attn.wkv": "self_attn.kv_proj",
    "attn.kv_norm.weight": "self_attn.kv_norm.weight",
    "attn.wo_a": "self_attn.o_a_proj",
    "attn.wo_b": "self_attn.o_b_proj",
    "attn.attn_sink": "self_attn.sinks",
    "attn.compressor.wkv": "self_attn.compressor.kv_proj",
    "attn.compressor.wgate": "self_attn.compressor.gate_proj",
    "attn.compressor.ape": "self_attn.compressor.position_bias",
    "attn.compressor.norm.weight": "self_attn.compressor.kv_norm.weight",
    "attn.indexer.wq_b": "self_attn.compressor.indexer.q_b_proj",
    "attn.indexer.weights_proj": "self_attn.compressor.indexer.scorer.weights_proj",
    "attn.indexer.compressor.wkv": "self_attn.compressor.indexer.kv_proj",
    "attn.indexer.compressor.wgate": "self_attn.compressor.indexer.gate_proj",
    "attn.indexer.compressor.ape": "self_attn.compressor.indexer.position_bias",
    "attn.indexer.compressor.norm.weight": "self_attn.compressor.indexer.kv_norm.weight",
    "ffn.gate.weight": "mlp.gate.weight",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    "ffn.shared_experts.w1": "mlp.shared_experts.gate_proj",
    "ffn.shared_experts.w2": "mlp.shared_experts.down_proj",
    "ffn.shared_experts.w3": "mlp.shared_experts.up_proj",
    **{f"hc_{s}_{p}": f"{s}_hc.{p}" for s in ("attn", "ffn") for p in ("fn", "base", "scale")},
}
"""Spec V4 3.3, below the layer where there is one."""


def hugging_face_name(name: str) -> str:
    """Of any tensor but the routed experts'."""
    prefix, below = "", name
    if name.startswith("layers."):
        _, layer, below = name.split(".", 2)
        prefix = LAYER.format(layer)
    if below.endswith(".scale"):
        return prefix + HF_NAMES[below.removesuffix(".scale")] + ".weight_scale_inv"
    for ending in ("", ".weight"):
        key = below.removesuffix(ending) if ending else below
        if key in HF_NAMES and below.endswith(ending):
            return prefix + HF_NAMES[key] + ending
    raise KeyError(name)


def hugging_face(tensors: Tensors) -> None:
    """Renames the tensors of a folder without an MTP module, experts stacked as [E, gate above up, K] and [E, N, K]."""
    experts = {n: tensors.pop(n) for n in list(tensors) if ".experts." in n}
    plain = {hugging_face_name(n): tensors.pop(n) for n in list(tensors)}
    tensors.update(plain)
    count = V4_SETTINGS["n_routed_experts"]
    for layer in sorted({n.split(".")[1] for n in experts}, key=int):
        for kind, suffix in (("weight", ""), ("scale", "_scale_inv")):
            if f"layers.{layer}.ffn.experts.0.w1.{kind}" in experts:
                w1, w2, w3 = (
                    np.stack([experts[f"layers.{layer}.ffn.experts.{e}.{w}.{kind}"] for e in range(count)])
                    for w in ("w1", "w2", "w3")
                )
                prefix = LAYER.format(layer) + "mlp.experts."
                tensors[prefix + "gate_up_proj" + suffix] = np.concatenate([w1, w3], axis=1)
                tensors[prefix + "down_proj" + suffix] = w2


def without_mtp(tensors: Tensors) -> None:
    for name in [n for n in tensors if n.startswith("mtp.")]:
        del tensors[name]


@pytest.fixture
def model(v4_folder: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint in Hugging Face's names, FP4 and FP8 as they were."""
    folder = Path(shutil.copytree(v4_folder, tmp_path / "model"))
    rewrite(folder, without_mtp)
    rewrite(folder, hugging_face, shard_bytes=100_000)
    return folder


@pytest.fixture(scope="module")
def expected(v4_folder: Path) -> Tree:
    return load(v4_folder)[1]


def same(a: Tree, b: Tree) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


def test_official_names_stay(v4_folder: Path) -> None:
    for row in table(load_config(v4_folder)):
        for _, name in row.tensors():
            assert official_name(name) == name and official_name("model." + name) == name
            if row.storage in (LINEAR, EXPERT):
                assert official_name(row.scale_name(name)) == row.scale_name(name)


def test_stacked_experts_and_module_names(model: Path, expected: Tree) -> None:
    same(load(model)[1], expected)
    same(load(model, mtp=None)[1], expected)


def test_parts_of_a_stack_are_not_copied(model: Path) -> None:
    """They are ranges of the file, one after the other."""
    with open_files(model, load_config(model)) as files, Files.open(model) as own:
        whole = own["model.layers.1.mlp.experts.gate_up_proj"]
        parts = [files[f"layers.1.ffn.experts.{e}.{w}.weight"] for e in range(8) for w in ("w1", "w3")]
        assert [p.offset for p in parts] == [whole.offset + i * whole.nbytes // 16 for i in range(16)]
        assert {p.nbytes for p in parts} == {whole.nbytes // 16} and {p.path for p in parts} == {whole.path}
        assert sum(t.nbytes for t in files.values()) == sum(t.nbytes for t in own.values())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("self_attn.compressor.indexer.scorer.weights_proj", "self_attn.compressor.indexer.weights_proj"),
        ("self_attn.kv_norm", "attn.norm"),  # what Hugging Face's rules, reversed, make of it
        ("lm_head", "head"),
        ("experts.down_proj_scale_inv", "experts.down_proj.weight_scale_inv"),
        ("weight_scale_inv", "scale"),
        ("model.layers.", "layers."),
    ],
)
def test_variations(old: str, new: str, model: Path, expected: Tree) -> None:
    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if old in n]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    rewrite(model, change)
    same(load(model)[1], expected)


UP = "model.layers.1.mlp.experts.gate_up_proj"
DOWN = "model.layers.1.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (replace(UP, lambda a: a.reshape(-1, 32)), (UP, "[experts, gate and up, in]", "[640, 32]")),
        (replace(UP, lambda a: a[:, :-1]), (UP, "gate and up", "[8, 79, 32]")),
        (replace(DOWN, lambda a: a[0]), (DOWN, "[experts, out, in]", "[64, 20]")),
        (replace(UP, lambda a: a[:-1]), ("layers.1.ffn.experts.7.w1.weight", "found none")),
        (replace(UP, lambda a: a[:, :-2]), ("experts.0.w1.weight", UP, "in the file", "[40, 32]", "[39, 32]")),
        (drop(DOWN + "_scale_inv"), ("layers.1.ffn.experts.0.w2.scale", "found none")),
        (put("embed.weight", np.zeros((320, 64), np.float32)), ("embed.weight", "once", "embed_tokens")),
        (put("model.layers.1.mlp.experts.extra", np.zeros(2, np.float32)), ("experts.extra", "no such tensor")),
    ],
)
def test_bad_stacks(change: Any, names: tuple[str, ...], model: Path, capsys: Capture) -> None:
    rewrite(model, change)
    refused(capsys, generate_arguments(model), "safetensors" if "found none" not in names else "model", *names)


def test_blocks_across_gate_and_up(model: Path, capsys: Capture) -> None:
    """Where the width is no multiple of 128, a block of the stack would hold rows of both."""

    def change(tensors: Tensors) -> None:
        tensors[UP + "_scale_inv"] = tensors[UP + "_scale_inv"][:, :2]

    rewrite(model, change)
    refused(capsys, generate_arguments(model), UP + "_scale_inv", "multiple of 128", "40")


# --- written by Hugging Face -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A random DeepseekV4ForCausalLM saved both ways, and its parameters and buffers by Hugging Face's names."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    ratios = [0, 4, 128, 4, 0]
    settings = V4_SETTINGS | {"num_hidden_layers": 4, "num_hash_layers": 2, "compress_ratios": ratios}
    scaling = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536}
    config = transformers.DeepseekV4Config(**settings, rope_scaling=scaling, max_position_embeddings=1048576)
    torch.manual_seed(0)
    network = transformers.DeepseekV4ForCausalLM(config)
    state = network.state_dict()
    for name, tensor in state.items():
        if name.endswith("tid2eid"):
            tensor.copy_(torch.randint(0, 8, tensor.shape))
        else:
            tensor.copy_(torch.randn(tensor.shape))
    folder = tmp_path_factory.mktemp("hf")
    network.save_pretrained(folder / "official")
    network.save_pretrained(folder / "modules", save_original_format=False)
    return folder, {name: tensor.numpy() for name, tensor in state.items()}


def compare(config: Config, params: Tree, state: dict[str, np.ndarray]) -> set[str]:
    """Every tensor of the main model, with Hugging Face's of that name; the names it has looked at."""
    used = set()
    for row in [r for r in table(config) if not is_mtp(r)]:
        leaf: Any = params
        for key in row.path:
            leaf = leaf[key]
        for index, name in row.tensors():
            if row.experts:
                own = LAYER.format(row.layers[index[0]]) + "mlp.experts."
                own += "down_proj" if row.path[-1] == "down" else "gate_up_proj"
                part = state[own][index[1]]
                half = part.shape[0] // 2
                wanted = {"gate": part[:half], "up": part[half:], "down": part}[row.path[-1]]
            else:
                own = hugging_face_name(name)
                wanted = state[own]
            used.add(own)
            np.testing.assert_array_equal(np.asarray(leaf[index]), wanted, err_msg=name)
    return used


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["official", "modules"])
def test_saved_by_hugging_face(form: str, saved: tuple[Path, dict[str, np.ndarray]]) -> None:
    """Every tensor of the network, compared with its own memory by name."""
    folder, state = saved[0] / form, saved[1]
    with Files.open(folder) as files:
        assert any(n.endswith("gate_up_proj") for n in files) == (form == "modules")
    config, params, _ = load(folder)
    assert config.compress_ratios == (0, 4, 128, 4) and config.num_hash_layers == 2
    assert (config.rope_theta, config.compress_rope_theta, config.qk_rope_head_dim) == (10000, 160000, 4)
    assert config.yarn is not None and config.yarn.factor == 16
    assert {n for n in state if n not in compare(config, params, state) and "rotary" not in n} == set()


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_hugging_face_reads_what_is_synthesised(tmp_path: Path) -> None:
    """FP8, packed FP4, scales, ids and floats in whole blocks, all of it as Hugging Face decodes it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")  # it decodes with this alone
    whole = ("hidden_size", "moe_intermediate_size", "q_lora_rank", "o_lora_rank")
    settings = V4_SETTINGS | dict.fromkeys(whole, 128) | {"head_dim": 64, "index_head_dim": 64}
    synthesise(tmp_path / "model", synth_config("deepseek-v4-flash", layers=5, settings=settings))
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    config, params, _ = load(tmp_path / "model", weights="float32")
    compare(config, params, {name: tensor.float().numpy() for name, tensor in network.state_dict().items()})


def test_config_as_hugging_face_writes_it(v4_folder: Path, tmp_path: Path) -> None:
    """The same config from DeepSeek's spelling and from the rewritten one, but for what the latter leaves out."""
    folder = Path(shutil.copytree(v4_folder, tmp_path / "model"))
    before = load_config(folder)
    kinds = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
    edit_json(
        folder / "config.json",
        compress_ratios=...,
        layer_types=[kinds[r] for r in before.compress_ratios],
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
        num_hash_layers=...,
        mlp_layer_types=["hash_moe"] * before.num_hash_layers + ["moe"] * (5 - before.num_hash_layers),
        qk_rope_head_dim=...,
        partial_rotary_factor=4 / 16,
        rope_scaling=...,
        expert_dtype=...,
        rope_parameters={
            "main": {"partial_rotary_factor": 0.25, "rope_theta": 10000, "rope_type": "default"},
            "compress": {
                "attention_factor": 1.0,
                "factor": 16,
                "beta_fast": 32,
                "beta_slow": 1,
                "original_max_position_embeddings": 65536,
                "partial_rotary_factor": 0.25,
                "rope_theta": 160000,
                "rope_type": "yarn",
                "type": "yarn",
            },
        },
        quantization_config={
            "activation_scheme": "dynamic",
            "dequantize": False,
            "expert_dtype": "fp4",
            "modules_to_not_convert": ["lm_head"],
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        },
    )
    assert load_config(folder) == before
    assert not (folder / SINGLE_FILE).exists()
