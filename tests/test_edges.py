"""Edge inputs of operators, and their goldens in a bundle."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from helpers_export import export_twin

from dsjax.export.golden.edges import edge_inputs, every_code
from dsjax.export.standalone.arrays import read_safetensors
from dsjax.export.verify import verify


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_weights_hold_every_code_but_nan() -> None:
    codes, scales = np.zeros((1, 64, 128), np.uint8), np.ones((1, 1, 1), np.float32)
    x = _normal(1, 8, 128)
    found = edge_inputs("block_scaled_dot", [x, codes, scales, np.int32(0)])
    assert found is not None
    assert set(found[1].reshape(-1).tolist()) == set(range(256)) - {0x7F, 0xFF}
    assert (found[0][0, 0] == 0).all() and not np.signbit(found[0][0, 0]).any() and np.signbit(found[0][0, 1]).all()
    np.testing.assert_array_equal(found[2], scales)
    np.testing.assert_array_equal(x, _normal(1, 8, 128))  # what was recorded stays as it was
    values = every_code(np.zeros(512, ml_dtypes.float8_e4m3fn))
    assert np.isfinite(values.astype(np.float32)).all() and len(set(values.view(np.uint8).tolist())) == 254
    assert set(every_code(np.zeros(512, np.int8)).tolist()) == set(range(-127, 128))


def test_decode_is_given_nan_too() -> None:
    found = edge_inputs("decode", [np.zeros((8, 64), np.uint8)])
    assert found is not None and set(found[0].reshape(-1).tolist()) == set(range(256))


def test_scores_tie() -> None:
    found = edge_inputs("moe_gate", [_normal(8, 8), _normal(8)])
    assert found is not None
    scores, bias = found
    assert not bias.any() and (scores[:2] == scores[:2, :1]).all()
    assert all(len(set(row.tolist())) < 8 for row in scores[2:])
    assert not (np.signbit(scores) & (scores == 0)).any()  # top_k's own condition
    levels = set(scores[2:].reshape(-1).tolist())  # sigmoids of x and -x add up to 1, and groups' sums would tie
    assert len(levels) > 3 and not levels & {-x for x in levels}


@pytest.mark.parametrize(
    ("operator", "inputs"),
    [("mla", [_normal(8, 8)]), ("rms_norm", [_normal(1, 1, 8), _normal(8)]), ("decode", [np.zeros(8, np.uint8)])],
)
def test_others_have_none(operator: str, inputs: list[np.ndarray]) -> None:
    assert edge_inputs(operator, inputs) is None


def test_a_bundle_has_goldens_of_them(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    manifest = export_twin(bundle, "deepseek-v3.2", "--numerics", "native", "--blocks", "--phases", "prefill")
    # Of both attentions, too: that to chosen keys does not run from the first position on.
    assert not [m["name"] for m in manifest["modules"] if m["golden"] is None]
    assert {"mla", "sparse_mla", "lightning_indexer"} <= {m["operator"] for m in manifest["modules"]}
    edges = {m["operator"]: m["name"] for m in manifest["modules"] if m["name"].endswith("-edges")}
    assert set(edges) >= {"rms_norm", "rope", "block_scaled_dot", "moe_gate", "grouped_matmul", "act_quant"}
    for name in edges.values():
        plain = bundle / "modules" / f"{name.removesuffix('-edges')}.mlir"
        assert plain.read_bytes() == (bundle / "modules" / f"{name}.mlir").read_bytes()
    report = verify(bundle, ["jax"], modules="block-*-edges")
    assert report["passed"], report
    assert all(row["error"] == 0 for by in report["programs"].values() for row in by["jax"]["results"])
    choices = read_safetensors(bundle / "golden" / edges["moe_gate"] / "outputs.safetensors")[0]["out0"].values()
    assert sorted(np.asarray(choices)[0].tolist()) == [0, 1]  # of equal ones the first: two experts of the first group
    assert json.loads((bundle / "golden" / edges["rope"] / "tolerance.json").read_text())


def test_decoding_goldens_end_at_the_last_position(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    export_twin(bundle, "deepseek-v3", "--batch", "2", "--phases", "prefill,decode")
    lengths = {}
    for phase in ("prefill", "decode"):
        arrays = read_safetensors(bundle / "golden" / f"{phase}-b2-s32" / "inputs.safetensors")[0]
        lengths[phase] = np.asarray(arrays["cache.length"].values()).tolist()
    assert lengths == {"prefill": [0, 0], "decode": [31, 28]}
