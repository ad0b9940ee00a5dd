"""params.json: what arguments are made of, of which bytes, and that recipes and hashes are true."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers_export import TWINS

from dsjax.checkpoint.names import open_files
from dsjax.cli.main import main
from dsjax.config import load_config
from dsjax.errors import InputError
from dsjax.export.consumers.exchange import dtype_of
from dsjax.export.program import weights
from dsjax.export.program.exporter import Exporter, Shape
from dsjax.export.program.targets import TARGETS
from dsjax.export.reading.arrays import NoWeights, compare_checkpoint, parameter
from dsjax.export.reading.reader import Bundle, Module, Program, Value
from dsjax.layout import layout
from dsjax.numerics import Numerics
from dsjax.plan.placement import load_model
from dsjax.synth import synth_config, synthesise
from sharding import parse_plan

QWEN = "deepseek-r1-distill-qwen-1.5b"


def _model(folder: Path, preset: str, **settings: Any) -> Path:
    layers, small = TWINS[preset]
    synthesise(folder, synth_config(preset, layers=layers, settings={**small, **settings}), template=preset)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small checkpoints. `cut` has matrices of one and a half blocks; `int4` is what `dsjax convert` writes."""
    place = tmp_path_factory.mktemp("models")
    cut = {"q_lora_rank": 192, "moe_intermediate_size": 192}
    found = {
        "v3": _model(place / "v3", "deepseek-v3"),
        "cut": _model(place / "cut", "deepseek-v3", **cut),
        "v4": _model(place / "v4", "deepseek-v4-flash"),
        "qwen": _model(place / "qwen", QWEN),
        "int4": place / "int4",
    }
    assert main(["convert", str(found["qwen"]), "--to", "int4-group", "--out", str(found["int4"])]) == 0
    return found


def _described(folder: Path, target: str, mesh: str = "dp=1") -> list[dict[str, Any]]:
    """params.json's arguments of a decoding step."""
    config, held = load_config(str(folder)), TARGETS[target]
    model = load_model(str(folder), Numerics("plain"), held.weights)
    split = layout(config, parse_plan(mesh), "heads", model.numerics)
    exporter = Exporter(config, model.numerics, held, split, stored=model.stored)
    program = exporter.program(Shape("decode", 1, 1, 32))
    return weights.read(exporter, weights.parameters_of([program]), folder, None)


def _bundle(folder: Path, entries: list[dict[str, Any]]) -> Bundle:
    values = []
    for i, entry in enumerate(entries):
        shape = tuple(entry["shape"])
        values.append(Value(i, "param", entry["path"], shape, dtype_of(entry["dtype"]), shape, None))
    module = Module("decode", "model", None, None, None, tuple(values), ())
    return Bundle(folder, {}, {e["path"]: e for e in entries}, (Program("decode", (module,)),), 1)


@pytest.mark.parametrize(
    ("model", "target", "mesh", "recipes"),
    [
        ("v3", "typed", "dp=1", {"stack"}),
        ("v3", "portable", "ep=2,tp=2", {"stack", "stack, then each repeated 2 times along axis 1"}),
        ("cut", "typed", "tp=2", {"stack, then each repeated 4 times along axis 2"}),
        ("v4", "typed", "tp=2", {"stack", "stack, then int64 to int32"}),
        ("v4", "typed-fp8", "dp=1", {"stack", "stack, then e2m1 codes to e4m3 codes"}),
        ("v3", "w8a8", "dp=1", {"stack", "stack, then e4m3 codes and scales quantised to scales of int8 codes"}),
        ("v3", "bfloat16", "dp=1", {"stack", "stack, then e4m3 codes and scales dequantised to bf16"}),
        ("qwen", "float16", "dp=1", {"stack", "stack, then bfloat16 to float16"}),
        ("qwen", "w8a8", "dp=1", {"stack", "stack, then bf16 quantised to int8 codes"}),
        ("int4", "w4a8", "dp=1", {"stack, then int4 codes + 8 to two's complement", "stack, then bfloat16 to float32"}),
    ],
)
def test_recipes_are_true(models: dict[str, Path], model: str, target: str, mesh: str, recipes: set[str]) -> None:
    """What can be made again of the files has the hash of what the program takes, and each byte of them counts once."""
    folder = models[model]
    entries = _described(folder, target, mesh)
    found = {entry["recipe"] for entry in entries}
    assert recipes <= found, found
    bundle = _bundle(folder, entries)
    made = [e for e in entries if not any(word in e["recipe"] for word in ("codes", "scales"))]
    assert compare_checkpoint(bundle, bundle.programs, folder) == (len(made), len(entries))
    for value in bundle.programs[0].modules[0].arguments:
        if value.name in {e["path"] for e in made}:
            assert parameter(bundle, value, folder).shape == value.global_shape
    config = load_config(str(folder))
    draft = ("mtp.", f"model.layers.{config.num_hidden_layers}.")
    files = open_files(folder, config)
    held = sum(t.nbytes for n, t in files.items() if not n.startswith(draft) and not n.endswith("weight_shape"))
    assert sum(entry["checkpoint_bytes"] for entry in entries) == held


def test_what_is_no_cast_is_not_made_and_what_is_has_to_be_right(models: dict[str, Path]) -> None:
    entries = _described(models["qwen"], "w8a8")
    bundle = _bundle(models["qwen"], entries)
    by_name = {value.name: value for value in bundle.programs[0].modules[0].arguments}
    with pytest.raises(NoWeights, match="made by 'stack, then bf16 quantised to int8 codes'"):
        parameter(bundle, by_name["layers.ffn.up.codes"], models["qwen"])
    for folder, said in ((models["v4"], "expected"), (models["qwen"] / "nowhere", "expected a folder, found none")):
        with pytest.raises(InputError, match=said):
            compare_checkpoint(bundle, bundle.programs, folder)


def _refused(capsys: pytest.CaptureFixture[str], folder: Path, *flags: str) -> str:
    out = folder.parent / "refused"
    assert main(["export", "--model", str(folder), "--length", "32", "--out", str(out), *flags]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert not out.exists()
    return line


def test_a_folder_without_weights_or_in_another_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    layers, settings = TWINS[QWEN]
    (folder / "config.json").write_text(json.dumps(synth_config(QWEN, layers=layers, settings=settings)))
    for flags in (["--weights", "copy"], ["--weights", "reference", "--no-golden"], []):
        assert "*.safetensors" in _refused(capsys, folder, *flags)
    flags = ["--length", "32", "--phases", "decode", "--out", str(tmp_path / "bundle"), "--weights", "none"]
    assert main(["export", "--model", str(folder), *flags]) == 0
    capsys.readouterr()
    (folder / "dsjax.json").write_text("{}")
    for flags in (["--weights", "copy"], ["--weights", "none"], []):
        assert "Orbax" in _refused(capsys, folder, *flags)
