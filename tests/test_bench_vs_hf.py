"""The comparison's scripts: sides run the same model; the file for llama.cpp is read back by its own package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT, SYNTH_SETTINGS, V4_SETTINGS

from dsjax.checkpoint.load import load
from dsjax.synth import synth_config, synthesise


def _run(script: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts" / script), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_help() -> None:
    """Without PyTorch or llama.cpp."""
    assert "--columns" in _run("bench_vs_hf.py", "--help")


@pytest.mark.parity
@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("deepseek-v3", SYNTH_SETTINGS),
        ("deepseek-v4-flash", {**V4_SETTINGS, "index_n_heads": 16}),  # with few heads many scores are zero: a tie
    ],
)
def test_same_model_as_hugging_face(preset: str, settings: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    changes = {**settings, "num_nextn_predict_layers": 0}
    synthesise(tmp_path / "model", synth_config(preset, layers=4, settings=changes))
    arguments = ("--columns", "dsjax-all-float32,hf-float32", "--cases", "prefill-128", "--rounds", "1")
    *rows, last = _run("bench_vs_hf.py", "--model", str(tmp_path / "model"), *arguments).splitlines()
    assert any(row.startswith("| prefill of 128 |") for row in rows)
    result = json.loads(last)["columns"]["dsjax-all-float32"]
    assert result["tokens_per_s"]["prefill-128"] > 0 and result["logits_off_by"]["typical"] < 1e-4


@pytest.mark.parity
def test_gguf_is_the_checkpoint(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "q_lora_rank": 32}
    sizes |= {"kv_lora_rank": 32, "qk_nope_head_dim": 32, "v_head_dim": 32}
    settings = {**SYNTH_SETTINGS, **sizes, "num_nextn_predict_layers": 0}
    synthesise(tmp_path / "model", synth_config("deepseek-v3", layers=3, settings=settings))
    _run("make_bench_gguf.py", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "model.gguf"))

    config, params, _ = load(tmp_path / "model", weights="float32")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert reader.fields["general.architecture"].contents() == "deepseek2"
    assert reader.fields["deepseek2.block_count"].contents() == config.num_hidden_layers
    assert reader.fields["deepseek2.attention.key_length"].contents() == config.latent_dim
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    last = config.num_hidden_layers - 1
    attention, experts = params["moe"]["attention"], params["moe"]["experts"]
    kv_b = np.asarray(attention["kv_b"][-1]).reshape(config.num_attention_heads, -1, config.kv_lora_rank)
    for name, values in (
        ("token_embd.weight", params["embed"]),
        (f"blk.{last}.attn_q_b.weight", attention["q_b"][-1]),
        (f"blk.{last}.attn_k_b.weight", kv_b[:, : config.qk_nope_head_dim].transpose(0, 2, 1)),
        (f"blk.{last}.attn_v_b.weight", kv_b[:, config.qk_nope_head_dim :]),
        (f"blk.{last}.ffn_down_exps.weight", experts["down"][-1]),
        (f"blk.{last}.exp_probs_b.bias", params["moe"]["router"]["bias"][-1]),
    ):
        expected = np.asarray(values)
        assert tensors[name].shape == expected.shape, name
        # Half a step of a block's 127 either way, and the scale's own rounding to float16.
        np.testing.assert_allclose(tensors[name], expected, rtol=0, atol=np.abs(expected).max() / 200, err_msg=name)
