"""Golden numbers: what they are made of, and what results may differ from them by."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from bundles import save_tensors
from helpers_export import export_twin, twin_flags

from dsjax.cli.main import main
from dsjax.export.golden import recorded
from dsjax.export.standalone.arrays import read_safetensors
from dsjax.numerics import Numerics


def test_draft_modules_prompt_in_several_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's hidden of every chunk goes to the draft module; its programs number parameters in their own way."""
    monkeypatch.setattr(recorded, "CHUNK", 4)
    bundle = tmp_path / "bundle"
    manifest = export_twin(
        bundle, "deepseek-v3", "--phases", "decode,mtp-prefill", "--chunk", "6", "--dtype", "float32"
    )
    inputs = bundle / "golden" / "mtp-prefill-b1-s32" / "inputs.safetensors"
    hidden = np.asarray(read_safetensors(inputs)[0]["hidden"].values())
    assert hidden.shape == (1, 6, 128) and len(np.unique(hidden[0], axis=0)) == 6
    index = {entry["path"]: entry["index"] for entry in json.loads((bundle / "params.json").read_text())["arguments"]}
    told: dict[str, dict[str, int]] = {}
    for module in manifest["modules"]:
        for value in (v for v in module["arguments"] if v["kind"] == "param"):
            told.setdefault(value["name"], {})[module["name"]] = value["index"]
    assert index == told
    assert any(len(set(places.values())) == 2 for places in index.values())


def test_drafts_go_on_from_a_cache_and_the_last_of_many_slots_is_idle(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    export_twin(bundle, "deepseek-v3", "--phases", "decode,mtp", "--batch", "5", "--dtype", "float32")
    for phase in ("decode", "mtp"):
        given, gave = (
            read_safetensors(bundle / "golden" / f"{phase}-b5-s32" / f"{side}.safetensors")[0]
            for side in ("inputs", "outputs")
        )
        before, after = (np.asarray(arrays["cache.rows"].values()) for arrays in (given, gave))
        assert given["n_new"].values().tolist() == [1, 1, 1, 1, 0]
        assert given["cache.length"].values().tolist() == [31, 28, 25, 22, 19]
        assert gave["cache.length"].values().tolist() == [32, 29, 26, 23, 19]
        assert all(np.abs(before[:, slot, :length]).min(-1).all() for slot, length in enumerate((31, 28, 25, 22, 19)))
        np.testing.assert_array_equal(after[:, 4], before[:, 4])
        assert (after[:, :4] != before[:, :4]).any((0, 2, 3)).all()
    # What the draft attends to is of the model's own tokens: each position's hidden is another.
    assert len(np.unique(np.asarray(given["hidden"].values()), axis=0)) == 5


def test_a_model_that_gives_nan_has_no_golden(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = tmp_path / "model", tmp_path / "bundle"
    assert main(["synth", *twin_flags("deepseek-r1-distill-qwen-1.5b")[1:], "--out", str(model)]) == 0
    [path] = model.glob("*.safetensors")
    arrays = {name: np.asarray(stored.values()) for name, stored in read_safetensors(path)[0].items()}
    arrays["model.norm.weight"][:] = 3e38
    save_tensors(path, arrays)
    assert main(["export", "--model", str(model), "--length", "32", "--chunk", "8", "--out", str(out)]) == 2
    assert "expected finite logits of the model, found NaN or Inf" in capsys.readouterr().err and not out.exists()


def _of(numerics: Numerics) -> Any:
    return SimpleNamespace(config=None, numerics=numerics)


def test_integers_are_exact_in_whole_programs() -> None:
    arrays = {"logits": np.zeros((1, 8), np.float32), "cache.length": np.zeros(1, np.int32)}
    arrays |= {"hidden": np.zeros((1, 8), ml_dtypes.bfloat16), "cache.rows": np.zeros((1, 8), np.uint8)}
    for numerics in (Numerics("plain", "float32"), Numerics("plain", "bfloat16"), Numerics("native", "bfloat16")):
        found = recorded.tolerances(_of(numerics), arrays)
        assert (found["cache.length"]["strict"], found["cache.length"]["bound"]) == (0, 0)
        assert all(limits["reason"] for limits in found.values())
        judged = [name for name, limits in found.items() if limits.get("bound", 0.05) is not None]
        if numerics.native:  # told, not judged
            assert judged == ["cache.length", "cache.rows"] and found["logits"]["strict"] is None
        else:
            assert len(judged) == 4 and "bound" not in found["logits"] and found["logits"]["strict"] <= 0.05


def test_ids_are_exact_in_blocks_and_no_bound_is_loose() -> None:
    ids, codes = np.zeros((512, 8), np.int32), np.zeros((4, 8), np.uint8)
    flags, rows = np.zeros(3, bool), np.zeros((4, 8), ml_dtypes.bfloat16)
    for operator in ("moe_gate", "sqrtsoftplus_gate", "top_k", "sort_assignments"):
        for limits in recorded.block_tolerances(operator, {"out0": ids, "out1": flags}).values():
            assert limits["strict"] == limits["bound"] == 0
    indexer = recorded.block_tolerances("lightning_indexer", {"out0": ids})["out0"]
    assert indexer["strict"] == indexer["bound"] == 1e-3 and "swap" in indexer["reason"]
    assert recorded.block_tolerances("write_rows", {"out0": codes})["out0"]["bound"] == 0
    others = recorded.block_tolerances("act_quant", {"out0": codes, "out1": rows, "out2": rows.astype(np.float32)})
    assert [limits["strict"] for limits in others.values()] == [1e-2, 2.0**-7, 1e-5]
    assert not any("bound" in limits for limits in others.values())
    bits = recorded.block_tolerances("compressor", {"out0": np.zeros(4, np.int16)})["out0"]  # a cache's bfloat16
    assert bits["strict"] == 1e-2 and "bound" not in bits
