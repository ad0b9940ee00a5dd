"""Every mistake and every damage: one line on standard error that names the culprit, status 2, nothing half-written.

Checkpoints are damaged copies of tests/goldens. Where a case is refused depends on the case only, so most of them never
reach a compiler.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from damage import (
    Capture,
    Tensors,
    drop,
    edit_json,
    generate_arguments,
    poke,
    put,
    refused,
    refused_everywhere,
    replace,
    rewrite,
    save_tokens,
    score_arguments,
    settings,
)
from helpers import SYNTH_SETTINGS

from dsjax import synth as synth_module
from dsjax.checkpoint.safetensors import DTYPES, INDEX_FILE, SINGLE_FILE, Files
from dsjax.cli import verbs
from dsjax.cli.main import main

GOLDENS = Path(__file__).parent / "goldens"

Q_A = "model.layers.0.self_attn.q_a_proj.weight"
SCALE = Q_A + "_scale_inv"
NORM = "model.norm.weight"
EXPERT = "model.layers.1.mlp.experts.1.up_proj.weight"
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
BF16 = np.dtype(ml_dtypes.bfloat16)

TINY = {**SYNTH_SETTINGS, "vocab_size": 300}


# --- helpers ---------------------------------------------------------------------------------------------------------


def copy_golden(name: str, folder: Path) -> Path:
    target = folder / "model"
    shutil.copytree(GOLDENS / name, target)
    (target / "reference.npz").unlink()
    return target


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with a tokenizer; tests that change it copy it."""
    out = tmp_path_factory.mktemp("text") / "model"
    assert main(["synth", "deepseek-v3", "--layers", "2", "--out", str(out), *settings(TINY)]) == 0
    return out


@pytest.fixture
def own_text_model(text_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(text_model, tmp_path / "model"))


# --- files -----------------------------------------------------------------------------------------------------------


def one_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def edit_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes a header, the data as it was; the header's length is kept by padding where it shrinks."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def truncate(folder: Path) -> None:
    data = one_shard(folder).read_bytes()
    one_shard(folder).write_bytes(data[:-100])


def shard_as_folder(folder: Path) -> None:
    path = one_shard(folder)
    path.unlink()
    path.mkdir()


def overlap(folder: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        a, b = (header[f"model.layers.0.{n}_layernorm.weight"] for n in ("input", "post_attention"))
        b["data_offsets"] = a["data_offsets"]

    edit_header(one_shard(folder), change)


def out_of_range(folder: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        header[Q_A]["data_offsets"] = [v + 10**9 for v in header[Q_A]["data_offsets"]]

    edit_header(one_shard(folder), change)


def negative_offset(folder: Path) -> None:
    edit_header(one_shard(folder), lambda header: header[Q_A].update(data_offsets=[-4, 0]))


def remap(name: str, shard: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = json.loads((folder / INDEX_FILE).read_text())
        data["weight_map"][name] = shard
        (folder / INDEX_FILE).write_text(json.dumps(data))

    return damage


def duplicate(folder: Path) -> None:
    """The last shard gets a tensor of the first."""
    with Files.open(folder) as files:
        name = next(n for n in files if files[n].path == one_shard(folder))
        extra = np.array(files.read(name)).reshape(-1).view(np.uint8)
    last = sorted(folder.glob("*.safetensors"))[-1]
    size = max(e["data_offsets"][1] for k, e in read_header(last).items() if k != "__metadata__")
    entry = {"dtype": "U8", "shape": [extra.size], "data_offsets": [size, size + extra.size]}
    edit_header(last, lambda header: header.update({name: entry}))
    last.write_bytes(last.read_bytes() + extra.tobytes())


def read_header(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


FILE_DAMAGE: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "truncated": (truncate, ("model-00001-of-000002.safetensors", "tensor", "truncated")),
    "empty shard": (lambda f: one_shard(f).write_bytes(b""), ("model-00001-of-000002.safetensors", "0 bytes")),
    "garbage header": (lambda f: one_shard(f).write_bytes(b"\x10" + bytes(7) + b"\xff" * 99), ("model-00001", "JSON")),
    "header length": (lambda f: one_shard(f).write_bytes(b"\xff" * 8 + b"{}"), ("model-00001", "header length")),
    "web page": (lambda f: one_shard(f).write_text("<!DOCTYPE html><html>404</html>"), ("model-00001", "header")),
    "git lfs pointer": (lambda f: one_shard(f).write_text("version https://git-lfs.github.com/spec/v1\n"), ("-00001",)),
    "missing shard": (lambda f: one_shard(f).unlink(), ("model-00001-of-000002.safetensors", "No such file")),
    "shard is a folder": (
        lambda f: (one_shard(f).unlink(), (f / "model-00001-of-000002.safetensors").mkdir()),
        ("01",),
    ),
    "index names a missing file": (remap("x", "model-00009-of-000009.safetensors"), ("model-00009-of-000009",)),
    "index names its parent": (remap(Q_A, "../model.safetensors"), (INDEX_FILE, Q_A, "../model.safetensors")),
    "index names an absolute path": (remap(Q_A, "/etc/passwd"), (INDEX_FILE, Q_A, "/etc/passwd")),
    "index names another shard": (remap(Q_A, "model-00002-of-000002.safetensors"), (INDEX_FILE, Q_A, "00002")),
    "index without a tensor": (lambda f: edit_json(f / INDEX_FILE, weight_map={NORM: one_shard(f).name}), ("tensor",)),
    "index is no JSON": (lambda f: (f / INDEX_FILE).write_text("{"), (INDEX_FILE, "JSON")),
    "index is nested deeply": (lambda f: (f / INDEX_FILE).write_text("[" * 99999), (INDEX_FILE, "nested")),
    "duplicate": (duplicate, ("model-00002-of-000002.safetensors", "in one shard", "model-00001")),
    "overlap": (overlap, ("model-00001", "layernorm.weight", "overlap")),
    "out of range": (out_of_range, ("model-00001", Q_A, "truncated")),
    "negative offset": (negative_offset, ("model-00001", Q_A, "[-4, 0]")),
    "no weights": (lambda f: [p.unlink() for p in f.glob("*.safetensors*")], ("model", "safetensors")),
}


@pytest.mark.parametrize("case", FILE_DAMAGE)
def test_damaged_file(case: str, tmp_path: Path, capsys: Capture) -> None:
    model = copy_golden("v3-fp8-partial", tmp_path)
    damage, names = FILE_DAMAGE[case]
    damage(model)
    refused_everywhere(capsys, model, tmp_path, *names)


# --- tensors ---------------------------------------------------------------------------------------------------------


ALL_MTP_BUT_ONE = "model.layers.2.eh_proj.weight"
TENSOR_DAMAGE: dict[str, tuple[str, Callable[[Tensors], None], tuple[str, ...]]] = {
    "missing": ("v3-mtp", drop(NORM), (NORM, "found none")),
    "missing expert": ("v3-mtp", drop(EXPERT), (EXPERT, "found none")),
    "misshapen": ("v3-mtp", replace(Q_A, lambda a: a[:-1]), (Q_A, "[48, 128]", "[47, 128]", ".safetensors")),
    "transposed": ("v3-mtp", replace(Q_A, lambda a: np.ascontiguousarray(a.T)), (Q_A, "[48, 128]", "[128, 48]")),
    "flat": ("v3-mtp", replace(Q_A, lambda a: a.reshape(-1)), (Q_A, "[48, 128]", "[6144]")),
    "empty": ("v3-mtp", replace(Q_A, lambda a: a[:0]), (Q_A, "[0, 128]")),
    "mistyped weight": ("v3-mtp", replace(Q_A, lambda a: a.astype(np.float32)), (Q_A, "float8_e4m3fn", "float32")),
    "other FP8": ("v3-mtp", replace(Q_A, lambda a: a.view(DTYPES["F8_E5M2"])), (Q_A, "float8_e4m3fn", "float8_e5m2")),
    "integer norm": ("v3-mtp", replace(NORM, lambda a: a.view(np.int16)), (NORM, "bfloat16", "int16")),
    "FP8 in a BF16 model": ("v3-bf16", replace(Q_A, lambda a: a.astype(FP8)), (Q_A, "bfloat16", "float8_e4m3fn")),
    "unexpected": ("v3-mtp", put("model.layers.9.norm.weight", np.zeros(3, np.float32)), ("model.layers.9.norm",)),
    "unexpected scale": ("v3-bf16", put(SCALE, np.ones((1, 1), np.float32)), (SCALE,)),
    "missing scale": ("v3-mtp", drop(SCALE), (SCALE, "found none")),
    "misshapen scale": ("v3-mtp", replace(SCALE, lambda a: np.tile(a, (2, 1))), (SCALE, "[1, 1]", "[2, 1]")),
    "mistyped scale": ("v3-mtp", replace(SCALE, lambda a: a.astype(BF16)), (SCALE, "float32", "bfloat16")),
    "NaN scale": ("v3-mtp", poke(SCALE, float("nan")), (SCALE, "NaN")),
    "infinite scale": ("v3-mtp", poke(SCALE, float("inf")), (SCALE, "infinity")),
    "NaN E8M0 scale": ("v3-fp8-e8m0", poke(SCALE, 0xFF), (SCALE, "0xFF")),
    "NaN U8 scale": ("v3-fp8-u8", poke(SCALE, 0xFF), (SCALE, "0xFF")),
    "NaN code": ("v3-mtp", poke(Q_A, 0x7F), (Q_A, "0x7F")),
    "negative NaN code": ("v3-mtp", poke(EXPERT, 0xFF), (EXPERT, "0xFF")),
    "NaN in a BF16 weight": ("v3-bf16", poke(Q_A, float("nan")), (Q_A, "finite", "NaN")),
    "infinity in the head": ("v3-bf16", poke("lm_head.weight", float("-inf")), ("lm_head.weight", "infinity")),
    "NaN in a norm": ("v3-mtp", poke(NORM, float("nan")), (NORM, "finite")),
    "NaN in a router bias": (
        "v3-mtp",
        poke("model.layers.1.mlp.gate.e_score_correction_bias", float("nan")),
        ("e_score_correction_bias", "finite"),
    ),
    "partial MTP": ("v3-mtp", drop(ALL_MTP_BUT_ONE), (ALL_MTP_BUT_ONE, "found none")),
}


@pytest.mark.parametrize("case", TENSOR_DAMAGE)
def test_damaged_tensor(case: str, tmp_path: Path, capsys: Capture) -> None:
    golden, change, names = TENSOR_DAMAGE[case]
    model = copy_golden(golden, tmp_path)
    rewrite(model, change)
    refused_everywhere(capsys, model, tmp_path, "model", *names)


@pytest.mark.parametrize("name", ["model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight"])
def test_mtp_copy_that_differs(name: str, tmp_path: Path, capsys: Capture) -> None:
    model = copy_golden("v3-mtp", tmp_path)
    rewrite(model, replace(name, lambda a: (a.astype(np.float32) + 1).astype(a.dtype)))
    refused(capsys, score_arguments(model, tmp_path, "--mtp-logits", tmp_path / "mtp.npy"), name, "copy of")
    assert not list(tmp_path.glob("*.npy"))
    assert main(["inspect", str(model), "--check"]) == 1
    assert name in capsys.readouterr().err


def test_inspect_lists_every_problem(tmp_path: Path, capsys: Capture) -> None:
    model = copy_golden("v3-mtp", tmp_path)

    def change(tensors: Tensors) -> None:
        for name in (NORM, SCALE):
            poke(name, float("nan"))(tensors)
        poke(EXPERT, 0x7F)(tensors)

    rewrite(model, change)
    assert main(["inspect", str(model), "--check"]) == 1
    out, err = capsys.readouterr()
    assert "3 problems" in out
    assert len(err.splitlines()) == 3
    assert main(["inspect", str(model)]) == 0  # headers alone are fine


def test_mtp_asked_of_a_checkpoint_without_it(tmp_path: Path, capsys: Capture) -> None:
    model = copy_golden("v3-bf16", tmp_path)
    refused(capsys, score_arguments(model, tmp_path, "--mtp-logits", tmp_path / "m.npy"), "model", "MTP", "found none")


# --- config.json -----------------------------------------------------------------------------------------------------

BAD_FIELDS: dict[str, list[Any]] = {
    "model_type": ["mixtral", None, 3, ["deepseek_v3"], ...],
    "hidden_size": ["64", True, 64.0, None, 0, -64, 10**12, 10**400, [64], {"a": 64}, ...],
    "vocab_size": [0, -1, 10**12, "128", ...],
    "num_hidden_layers": [0, -1, 10**12, 1.5, True, None, ...],
    "num_attention_heads": [0, "4", 10**12],
    "q_lora_rank": [0, -1, "48", True],
    "kv_lora_rank": [None, 0, ...],
    "qk_rope_head_dim": [7, 0, None, 8.0],
    "qk_nope_head_dim": [-16, ...],
    "v_head_dim": [False, ...],
    "intermediate_size": [0, ...],
    "moe_intermediate_size": [0, None, ...],
    "n_routed_experts": [0, 10**12, "8", ...],
    "n_shared_experts": [-1, 1.0, ...],
    "num_experts_per_tok": [9, 0, True, ...],
    "n_group": [3, 0, 8, 10**12, "4"],
    "topk_group": [5, 0, -1],
    "first_k_dense_replace": [-1, 99, 1.0],
    "num_nextn_predict_layers": [2, -1, True, "1"],
    "scoring_func": ["softplus", "softmax", 1],
    "topk_method": ["greedy", "top_p", None],
    "norm_topk_prob": [1, "true", None],
    "routed_scaling_factor": [0, -1, "2.5", 10**400],
    "rms_norm_eps": [0, -1e-6, "1e-6", True],
    "rope_theta": [1, 0, -10000, "10000", None, 10**400],
    "attention_bias": [True, "false", 1],
    "tie_word_embeddings": [True],
    "hidden_act": ["gelu", None],
    "moe_layer_freq": [2, True],
    "max_position_embeddings": [0, -1, 10**12, "many"],
    "eos_token_id": [128, -1, "1", [1, "2"], True, 1.0],
    "bos_token_id": [10**12, {}],
    "quantization_config": [{"quant_method": "gptq"}, {}, [], "fp8", 8],
    "rope_scaling": [
        {"type": "linear", "factor": 2.0},
        {"type": "yarn"},
        {"rope_type": "llama3"},
        {"type": "yarn", "factor": 0, "original_max_position_embeddings": 4096},
        {"type": "yarn", "factor": 40, "original_max_position_embeddings": "4096"},
        {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 0},
        {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 1e-320},
        {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": -1},
        [],
        "yarn",
    ],
}
BAD_QUANTIZATION: list[dict[str, Any]] = [
    {"weight_block_size": [64, 64]},
    {"weight_block_size": 128},
    {"weight_block_size": None},
    {"weight_block_size": [128, 128, 128]},
    {"fmt": "e5m2"},
    {"activation_scheme": "static"},
    {"scale_fmt": "float"},
    {"quant_method": "awq"},
]


@pytest.mark.parametrize("field", BAD_FIELDS)
def test_bad_config_field(field: str, tmp_path: Path, capsys: Capture) -> None:
    model = copy_golden("v3-mtp", tmp_path)
    original = (model / "config.json").read_text()
    for value in BAD_FIELDS[field]:
        (model / "config.json").write_text(original)
        edit_json(model / "config.json", **{field: value})
        refused(capsys, generate_arguments(model), "config.json", "expected", "found")
        message = refused(capsys, ["inspect", model], "config.json")
        assert field in message or field in ("scoring_func", "topk_method", "n_group", "topk_group"), message


def test_bad_quantization_config(tmp_path: Path, capsys: Capture) -> None:
    model = copy_golden("v3-mtp", tmp_path)
    path = model / "config.json"
    good = json.loads(path.read_text())["quantization_config"]
    for change in BAD_QUANTIZATION:
        edit_json(path, quantization_config=good | change)
        refused(capsys, score_arguments(model, tmp_path), "config.json", "quantization_config", *change)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"not JSON",
        b"[1, 2]",
        b'"text"',
        b"null",
        b"\xff\xfe{}",
        b"\xef\xbb\xbf{}",
        b'{"model_type": ' + b"[" * 100_000,
        b'{"model_type": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"vocab_size": ' + b"9" * 5000 + b"}",
        b'{"model_type": "deepseek_v3", "vocab_size": NaN}',
        b"{}",
    ],
)
def test_config_that_is_none(content: bytes, tmp_path: Path, capsys: Capture) -> None:
    model = copy_golden("v3-bf16", tmp_path)
    (model / "config.json").write_bytes(content)
    refused(capsys, generate_arguments(model), "config.json", "expected", "found")


def test_nesting_around_the_recursion_limit(tmp_path: Path, capsys: Capture) -> None:
    """Depths that the parser just takes must not break the message that shows the value."""
    model = copy_golden("v3-bf16", tmp_path)
    limit = sys.getrecursionlimit()
    for depth in range(limit - 200, limit + 10, 7):
        (model / "config.json").write_text('{"model_type": ' + "[" * depth + "]" * depth + "}")
        refused(capsys, ["inspect", model], "config.json")


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--model", "{tmp}/none"], ("none", "folder")),
        (["--model", "{tmp}/file"], ("file", "folder")),
        (["--model", "{tmp}/empty"], ("empty", "config.json")),
        (["--model", "deepseek-v3"], ("deepseek-v3", "folder")),
        (["--model", "a" * 300], ("aaa", "folder")),
        (["--model", ""], ("expected",)),
    ],
)
def test_model_that_is_none(arguments: list[str], names: tuple[str, ...], tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    flag = [a.replace("{tmp}", str(tmp_path)) for a in arguments]
    for verb in (["generate", "--prompt-ids", "1"], ["generate", "--prompt", "hello"]):
        refused(capsys, [*verb, *flag], *names)
    score = ["score", *flag, "--tokens", save_tokens(tmp_path), "--logits", tmp_path / "out.npy"]
    refused(capsys, score, *names)
    refused(capsys, ["bench", *flag], "expected")
    if arguments[1] != "deepseek-v3":
        refused(capsys, ["inspect", flag[1]], "expected")


def test_auto_map_is_never_executed(tmp_path: Path, capsys: Capture) -> None:
    model = copy_golden("v3-bf16", tmp_path)
    marker = tmp_path / "executed"
    for name in ("configuration_deepseek", "modeling_deepseek", "tokenization_deepseek"):
        (model / f"{name}.py").write_text(f"open({str(marker)!r}, 'w').close()\nraise SystemExit(77)\n")
    names = {"AutoConfig": "configuration_deepseek.C", "AutoModelForCausalLM": "modeling_deepseek.M"}
    edit_json(model / "config.json", auto_map=names)
    edit_json(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_deepseek.T", None]})
    assert main(["inspect", str(model), "--check"]) == 0
    assert main(["generate", "--model", str(model), "--prompt-ids", "1", "--max-new-tokens", "1"]) == 0
    capsys.readouterr()
    assert not marker.exists()


# --- prompts and flags -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--prompt-ids", "1,128"], ("--prompt-ids", "127", "128")),
        (["--prompt-ids=-1"], ("--prompt-ids", "-1")),
        (["--prompt-ids", "99999999999999999999999"], ("--prompt-ids", "127")),
        (["--prompt-ids", ""], ("--prompt-ids",)),
        (["--prompt-ids", "1,,2"], ("--prompt-ids",)),
        (["--prompt-ids", "1.5"], ("--prompt-ids",)),
        (["--prompt-ids", "1,2,3,4,5", "--max-length", "4"], ("--prompt-ids", "--max-length", "4", "5")),
        (["--prompt-ids", "1", "--max-length", "0"], ("--max-length", "positive")),
        (["--prompt-ids", "1", "--max-length", "-5"], ("--max-length",)),
        (["--prompt-ids", "1", "--max-new-tokens", "0"], ("--max-new-tokens", "positive")),
        (["--prompt-ids", "1", "--max-new-tokens", "many"], ("--max-new-tokens", "many")),
        (["--prompt-ids", "1", "--batch", "0"], ("--batch",)),
        (["--prompt-ids", "1", "--temperature", "nan"], ("--temperature", "nan")),
        (["--prompt-ids", "1", "--temperature=-1"], ("--temperature", "-1")),
        (["--prompt-ids", "1", "--temperature", "inf"], ("--temperature", "inf")),
        (["--prompt-ids", "1", "--temperature", "hot"], ("--temperature", "hot")),
        (["--prompt-ids", "1", "--top-p", "0"], ("--top-p", "0")),
        (["--prompt-ids", "1", "--top-p", "2"], ("--top-p", "2")),
        (["--prompt-ids", "1", "--top-p", "nan"], ("--top-p", "nan")),
        (["--prompt-ids", "1", "--top-k", "-1"], ("--top-k", "-1")),
        (["--prompt-ids", "1", "--seed", "-1"], ("--seed",)),
        (["--prompt-ids", "1", "--seed", str(2**63)], ("--seed",)),
        (["--prompt-ids", "1", "--dtype", "float32", "--numerics", "native"], ("--dtype float32", "--numerics native")),
        (["--prompt-ids", "1", "--dtype", "float16"], ("--dtype", "float16")),
        (["--prompt-ids", "1", "--numerics", "exact"], ("--numerics", "exact")),
        (["--prompt-ids", "1", "--weights", "int3"], ("--weights", "int3")),
        (["--prompt-ids", "1", "--mla", "sparse"], ("--mla", "sparse")),
        (["--prompt-ids", "1", "--chat"], ("--chat", "--prompt")),
        (["--prompt-ids", "1", "--thinking"], ("--thinking",)),
        (["--prompt-ids", "1", "--prompt", "x"], ("--prompt",)),
        (["--prompt-ids", "1", "--flag-that-is-none"], ("--flag-that-is-none",)),
        (["--prompt", ""], ("--prompt", "some text")),
        (["--prompt", "", "--chat"], ("--prompt", "some text")),
        (["--prompt", "hello"], ("--prompt", "tokenizer.json")),
        (["--prompt", "hello", "--chat"], ("--prompt", "tokenizer.json")),
        (["--prompts", "/nonexistent/prompts.jsonl"], ("/nonexistent/prompts.jsonl",)),
        (["--prompts", "/"], ("/", "JSONL")),
        ([], ("--prompt", "required")),
    ],
)
def test_bad_generate_flag(arguments: list[str], names: tuple[str, ...], capsys: Capture) -> None:
    refused(capsys, ["generate", "--model", GOLDENS / "v3-bf16", *arguments], *names)


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("", ("at least one prompt",)),
        ("\n \n", ("at least one prompt",)),
        ('{"ids": [1]}\n{"ids": [1', ("line 2", "JSON")),
        ('{"ids": [1]}\n\n[1, 2]\n', ("line 3", "prompt")),
        ('{"ids": []}', ("line 1", "at least one token")),
        ('{"ids": [1]}\n{"ids": [1, 300]}', ("line 2", "299", "300")),
        ('{"ids": [-1]}', ("line 1", "-1")),
        ('{"ids": [true]}', ("line 1", "ids")),
        ('{"ids": [1.0]}', ("line 1", "ids")),
        ('{"ids": "1,2"}', ("line 1", "ids")),
        ('{"ids": [' + "1," * 99 + "1]}", ("line 1", "max_position_embeddings", "64", "100")),
        ('{"prompt": 5}', ("line 1", "prompt")),
        ('{"prompt": ""}', ("line 1", "prompt")),
        ('{"prompt": "\\ud800"}', ("line 1", "lone surrogate")),
        ('{"prompt": "a", "ids": [1]}', ("line 1", "one of")),
        ('{"text": "a"}', ("line 1", "one of")),
        ('{"messages": []}', ("line 1", "messages")),
        ('{"messages": ["hello"]}', ("line 1", "messages")),
        ('{"messages": [{"role": "user"}]}', ("line 1", "messages[0].content")),
        ('{"messages": [{"content": "x"}, {"role": "user", "content": null}]}', ("line 1", "messages[0]", "role")),
        ("[" * 99999, ("line 1", "JSON")),
        ("\ufeff" + '{"ids": [1]}', ("line 1", "JSON")),
    ],
)
def test_bad_prompt_line(
    content: str, names: tuple[str, ...], own_text_model: Path, tmp_path: Path, capsys: Capture
) -> None:
    edit_json(own_text_model / "config.json", max_position_embeddings=64)
    path = tmp_path / "prompts.jsonl"
    path.write_text(content, encoding="utf-8")
    refused(capsys, ["generate", "--model", own_text_model, "--prompts", path], str(path), *names)


def test_prompt_file_that_is_not_utf8(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}')
    refused(capsys, ["generate", "--model", GOLDENS / "v3-bf16", "--prompts", path], str(path))


def test_prompt_longer_than_the_model(tmp_path: Path, capsys: Capture) -> None:
    model = copy_golden("v3-bf16", tmp_path)
    edit_json(model / "config.json", max_position_embeddings=2)
    arguments = ["generate", "--model", model, "--prompt-ids", "1,2,3"]
    refused(capsys, arguments, "--prompt-ids", "max_position_embeddings", "2", "3")
    refused(capsys, score_arguments(model, tmp_path), "tokens.json", "at most 2", "found 3")


def test_prompt_that_is_not_unicode(text_model: Path, capsys: Capture) -> None:
    refused(capsys, ["generate", "--model", text_model, "--prompt", "\udcff"], "--prompt", "lone surrogate")


# --- tokenizer and template ------------------------------------------------------------------------------------------


def chat_arguments(model: Path) -> list[Any]:
    return ["generate", "--model", model, "--prompt", "hello", "--chat", "--max-new-tokens", "1"]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": {"type": "Magic"}}', "\x00\x01", "[" * 99999])
def test_damaged_tokenizer(content: str, own_text_model: Path, capsys: Capture) -> None:
    (own_text_model / "tokenizer.json").write_text(content)
    refused(capsys, chat_arguments(own_text_model), "tokenizer.json")


def test_truncated_tokenizer(own_text_model: Path, capsys: Capture) -> None:
    path = own_text_model / "tokenizer.json"
    path.write_text(path.read_text()[:-500])
    refused(capsys, chat_arguments(own_text_model), "tokenizer.json")


@pytest.mark.parametrize("key", ["vocab", "merges", "continuing_subword_prefix"])
def test_tokenizer_with_a_damaged_model(key: str, own_text_model: Path, capsys: Capture) -> None:
    path = own_text_model / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"][key] = {"vocab": {"a": -1}, "merges": [["zz", "zz"]], "continuing_subword_prefix": "x"}[key]
    path.write_text(json.dumps(data))
    refused(capsys, chat_arguments(own_text_model), "tokenizer.json")


@pytest.mark.parametrize("content", ["{", "[]", '{"chat_template": 5}', '{"chat_template": {"a": 1}}'])
def test_damaged_tokenizer_config(content: str, own_text_model: Path, capsys: Capture) -> None:
    (own_text_model / "tokenizer_config.json").write_text(content)
    refused(capsys, chat_arguments(own_text_model), "tokenizer_config.json")


@pytest.mark.parametrize("value", ["1", [1, None], 10**9, -1, 1.5, True])
def test_bad_generation_config(value: Any, own_text_model: Path, capsys: Capture) -> None:
    edit_json(own_text_model / "generation_config.json", eos_token_id=value)
    refused(capsys, generate_arguments(own_text_model), "generation_config.json", "eos_token_id")


TEMPLATES = {
    "none": (None, "chat template"),
    "no default among several": ([{"name": "tools", "template": "x"}, {"name": ["default"]}, 5], "chat template"),
    "syntax": ("{% if %}", "chat template"),
    "unclosed": ("{{ messages", "chat template"),
    "raises": ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    "undefined": ("{{ messages[7]['content'] }}", "chat template"),
    "division": ("{{ 1 // 0 }}", "ZeroDivisionError"),
    "class": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "globals": ("{{ cycler.__init__.__globals__.os.popen('touch MARKER') }}", "SecurityError"),
    "namespace": ("{{ namespace.__init__.__globals__['os'].system('touch MARKER') }}", "SecurityError"),
    "format": ("{{ '{0.__class__.__mro__}'.format('') }}", "SecurityError"),
    "format_map": ("{{ '{a.__class__.__mro__}'.format_map({'a': ''}) }}", "SecurityError"),
    "attr filter": ("{{ ('' | attr('__class__')).__mro__ }}", "Error"),
    "raise_exception's insides": ("{{ raise_exception.__globals__['jinja2'] }}", "SecurityError"),
    "tojson's insides": ("{{ joiner.__init__.__builtins__.open('MARKER', 'w') }}", "SecurityError"),
    "include": ("{% include 'config.json' %}", "chat template"),
    "import": ("{% import 'os' as os %}", "chat template"),
    "change of the messages": ("{{ messages.append(1) }}", "SecurityError"),
    "huge range": ("{% for i in range(1000000000000) %}x{% endfor %}", "Range too big"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "renders nothing": ("", "left out"),
    "renders no Unicode": ("{{ messages[0].content + '\\ud800' }}", "lone surrogate"),
    "too long": ("x" * (1 << 21), "expected text"),
    "deep": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "chat template"),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_bad_template(case: str, own_text_model: Path, tmp_path: Path, capsys: Capture) -> None:
    template, expected = TEMPLATES[case]
    marker = tmp_path / "marker"
    if isinstance(template, str):
        template = template.replace("MARKER", str(marker))
    edit_json(own_text_model / "tokenizer_config.json", chat_template=template)
    refused(capsys, chat_arguments(own_text_model), expected)
    assert not marker.exists()


# --- score -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows",
    [[], [[]], [1, 2], [[1, 2], [3]], [[1.5]], [["1"]], [[True]], [[[1]]], {"a": 1}, None, 5, [[None]], [[10**30]]],
)
def test_bad_json_tokens(rows: Any, tmp_path: Path, capsys: Capture) -> None:
    path = save_tokens(tmp_path, rows)
    arguments = ["score", "--model", GOLDENS / "v3-bf16", "--tokens", path, "--logits", tmp_path / "out.npy"]
    refused(capsys, arguments, "tokens.json", "expected int [B, T]")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tokens.json"]


@pytest.mark.parametrize("rows", [[[1, 128]], [[1, -1]], [[1], [10**15]]])
def test_tokens_outside_the_vocabulary(rows: Any, tmp_path: Path, capsys: Capture) -> None:
    path = save_tokens(tmp_path, rows)
    arguments = ["score", "--model", GOLDENS / "v3-bf16", "--tokens", path, "--logits", tmp_path / "out.npy"]
    refused(capsys, arguments, "tokens.json", f"row {len(rows) - 1}", "127", str(rows[-1][-1]))


def npy(folder: Path, array: np.ndarray) -> Path:
    np.save(folder / "tokens.npy", array, allow_pickle=True)
    return folder / "tokens.npy"


def raw(folder: Path, content: bytes) -> Path:
    (folder / "tokens.npy").write_bytes(content)
    return folder / "tokens.npy"


def npy_bytes(header: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


HUGE = b"{'descr': '<i8', 'fortran_order': False, 'shape': (1000000, 100000000), }\n"
TOKEN_FILES: dict[str, Callable[[Path], Path]] = {
    "missing": lambda f: f / "tokens.npy",
    "folder": lambda f: f,
    "pickle": lambda f: npy(f, np.array([[1, "a"]], dtype=object)),
    "float": lambda f: npy(f, np.ones((1, 2), np.float32)),
    "bool": lambda f: npy(f, np.ones((1, 2), bool)),
    "text": lambda f: npy(f, np.array([["1"]])),
    "one axis": lambda f: npy(f, np.arange(3)),
    "three axes": lambda f: npy(f, np.zeros((1, 2, 3), int)),
    "no rows": lambda f: npy(f, np.zeros((0, 3), int)),
    "no columns": lambda f: npy(f, np.zeros((3, 0), int)),
    "npz": lambda f: Path(shutil.copy(GOLDENS / "v3-bf16" / "reference.npz", f / "tokens.npy")),
    "empty file": lambda f: raw(f, b""),
    "torn zip": lambda f: raw(f, b"PK\x03\x04"),
    "bare pickle": lambda f: raw(f, b"\x80\x04cos\nsystem\n."),
    "header of garbage": lambda f: raw(f, npy_bytes(b"\xff" * 64)),
    "header of brackets": lambda f: raw(f, npy_bytes(b"(" * 5000)),
    "header of a call": lambda f: raw(f, npy_bytes(b"__import__('os').system('false')")),
    "header that ends": lambda f: raw(f, npy_bytes(b"{'descr': '''")),
    "huge shape": lambda f: raw(f, npy_bytes(HUGE)),
    "truncated": lambda f: raw(f, npy(f, np.zeros((4, 4), int)).read_bytes()[:-8]),
}


@pytest.mark.parametrize("case", TOKEN_FILES)
def test_bad_token_file(case: str, tmp_path: Path, capsys: Capture) -> None:
    path = TOKEN_FILES[case](tmp_path)
    arguments = ["score", "--model", GOLDENS / "v3-bf16", "--tokens", path, "--logits", tmp_path / "out.npy"]
    refused(capsys, arguments, str(path), "expected int [B, T]")
    assert not (tmp_path / "out.npy").exists()


def test_bad_score_outputs(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before the model is loaded, not after hours of work."""
    monkeypatch.setattr(verbs, "load_model", lambda *_, **__: pytest.fail("loaded first"))
    tokens, model = save_tokens(tmp_path), GOLDENS / "v3-mtp"
    base = ["score", "--model", model, "--tokens", tokens]
    good = tmp_path / "a.npy"
    refused(capsys, [*base, "--logits", tmp_path / "none" / "a.npy"], "none/a.npy", "folder")
    refused(capsys, [*base, "--logits", tmp_path], str(tmp_path), "folder")
    refused(capsys, [*base, "--logits", good, "--mtp-logits", tmp_path / "none" / "a.npy"], "none/a.npy")
    refused(capsys, [*base, "--logits", good, "--mtp-logits", good], "--mtp-logits", "--logits")
    base[-1] = save_tokens(tmp_path, [[1], [2]])
    refused(capsys, [*base, "--logits", good, "--mtp-logits", tmp_path / "b.npy"], "tokens.json", "--mtp-logits")
    assert [p.name for p in tmp_path.iterdir()] == ["tokens.json"]


def test_failing_write_of_logits_leaves_nothing(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up at the second file: the first is not there either."""
    (tmp_path / "a.npy").write_text("old")
    calls = []

    def save(file: Any, array: np.ndarray) -> None:
        calls.append(array)
        file.write(b"part")
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(verbs.np, "save", save)
    arguments = score_arguments(GOLDENS / "v3-mtp", tmp_path, "--mtp-logits", tmp_path / "b.npy")
    arguments[arguments.index("--logits") + 1] = tmp_path / "a.npy"
    refused(capsys, arguments, "b.npy", "No space left")
    assert (tmp_path / "a.npy").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npy", "tokens.json"]


# --- synth and inspect -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["deepseek-v9"], ("deepseek-v9", "deepseek-v3")),
        (["deepseek-v3", "--layers", "0"], ("--layers", "positive")),
        (["deepseek-v3", "--layers", "99999"], ("num_hidden_layers", "99999")),
        (["deepseek-v3", "--set", "hiden_size=64"], ("hiden_size",)),
        (["deepseek-v3", "--set", "rope_scaling.facter=64"], ("rope_scaling.facter",)),
        (["deepseek-v3", "--set", "hidden_size.x=64"], ("hidden_size.x",)),
        (["deepseek-v3", "--set", "hidden_size"], ("--set", "key=value")),
        (["deepseek-v3", "--set", "=5"], ("--set", "key=value")),
        (["deepseek-v3", "--set", "hidden_size="], ("hidden_size",)),
        (["deepseek-v3", "--set", "hidden_size=abc"], ("hidden_size", "abc")),
        (["deepseek-v3", "--set", "hidden_size=" + "[" * 50000], ("--set",)),
        (["deepseek-v3", "--set", "hidden_size=0"], ("hidden_size", "0")),
        (["deepseek-v3", "--set", "n_group=7"], ("n_group", "7")),
        (["deepseek-v3", "--set", "num_experts_per_tok=999"], ("num_experts_per_tok", "999")),
        (["deepseek-v3", "--set", "quantization_config.weight_block_size=[64,64]"], ("weight_block_size",)),
        (["deepseek-v3", "--set", "vocab_size=1"], ("eos_token_id",)),
        (["deepseek-v3", "--seed", "-1"], ("--seed",)),
        (["deepseek-v3", "--seed", "x"], ("--seed", "x")),
        (["deepseek-v3", "--set", "hidden_size=16777216"], ("bytes free",)),
        (["deepseek-v3", "--set", "n_routed_experts=65536", "--layers", "4096"], ("bytes free",)),
        ([], ("PRESET",)),
    ],
)
def test_bad_synth(arguments: list[str], names: tuple[str, ...], tmp_path: Path, capsys: Capture) -> None:
    refused(capsys, ["synth", *arguments, "--out", tmp_path / "out"], *names)
    assert not list(tmp_path.iterdir())


def test_synth_where_it_cannot(tmp_path: Path, capsys: Capture) -> None:
    tiny = ["synth", "deepseek-v3", "--layers", "1", *settings(TINY), "--out"]
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("mine")
    refused(capsys, [*tiny, full], "full", "empty folder")
    refused(capsys, [*tiny, full / "file"], "file")
    refused(capsys, [*tiny, full / "file" / "below"], "below")
    refused(capsys, [*tiny, "/proc/dsjax"], "/proc/dsjax")
    refused(capsys, [*tiny, tmp_path / ("a" * 300)], "aaa")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    refused(capsys, [*tiny, tmp_path / "dangling"], "dangling")
    assert (full / "file").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["dangling", "file", "full"]
    refused(capsys, tiny[:-1], "--out")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_synth_into_a_folder_without_permission(tmp_path: Path, capsys: Capture) -> None:
    tmp_path.chmod(0o555)
    try:
        refused(capsys, ["synth", "deepseek-v3", "--layers", "1", *settings(TINY), "--out", tmp_path / "out"], "out")
    finally:
        tmp_path.chmod(0o755)


@pytest.mark.parametrize("what", ["_quantise", "write_tokenizer"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("bug")])
def test_synth_that_fails_midway_leaves_nothing(
    what: str, error: BaseException, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = getattr(synth_module, what), []

    def fail(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == (5 if what == "_quantise" else 1):
            assert any(p.name.startswith(".out.") for p in tmp_path.iterdir())
            raise error
        return original(*arguments)

    monkeypatch.setattr(synth_module, what, fail)
    arguments = ["synth", "deepseek-v3", "--layers", "1", *settings(TINY), "--out", str(tmp_path / "out")]
    if isinstance(error, RuntimeError):
        with pytest.raises(RuntimeError, match="bug"):
            main(arguments)
    elif isinstance(error, KeyboardInterrupt):
        assert main(arguments) == 130
        assert len(capsys.readouterr().err.splitlines()) == 1
    else:
        refused(capsys, arguments, "out", "No space left")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ([], ("VERB",)),
        (["fly"], ("fly",)),
        (["inspect"], ("DIR_OR_PRESET",)),
        (["inspect", "deepseek-v9"], ("deepseek-v9", "deepseek-v3")),
        (["inspect", "deepseek-v3", "--check"], ("deepseek-v3", "folder")),
        (["inspect", "deepseek-v3", "extra"], ("extra",)),
        (["--json"], ("VERB",)),
        (["score", "--model", "x"], ("--tokens", "--logits")),
        (["inspect", "deepseek-v3", "--compile-cache", "/proc/none"], ("--compile-cache", "/proc/none")),
    ],
)
def test_bad_command_line(arguments: list[str], names: tuple[str, ...], capsys: Capture) -> None:
    refused(capsys, arguments, *names)


def test_memory_error_is_one_line(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("Unable to allocate 9.00 EiB")

    monkeypatch.setattr(verbs, "load_config", fail)
    refused(capsys, ["inspect", "deepseek-v3"], "memory", "9.00 EiB")


@pytest.mark.parametrize("platform", ["nonsense", "cuda"])
def test_platform_that_is_none(platform: str) -> None:
    """In a process of its own: a platform is chosen once."""
    if platform == "cuda" and shutil.which("nvidia-smi"):
        pytest.skip("has CUDA")
    command = [sys.executable, "-m", "dsjax", "inspect", "deepseek-v3", "--platform", platform]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert f"--platform {platform}" in result.stderr


def test_single_file_and_index_together(tmp_path: Path, capsys: Capture) -> None:
    """The index rules; a damaged single file beside it is not read."""
    model = copy_golden("v3-bf16", tmp_path)
    (model / SINGLE_FILE).write_bytes(b"not a checkpoint")
    assert main(["inspect", str(model), "--check"]) == 0
    (model / INDEX_FILE).unlink()
    refused(capsys, generate_arguments(model), SINGLE_FILE)
