"""dsjax export: what is in a bundle, and that its programs compute what the model computes."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_export import TWINS, export_twin, twin_flags

from dsjax.cli.main import main
from dsjax.config import load_config
from dsjax.export import bundle as bundles
from dsjax.export.consumers import jax as jax_consumer
from dsjax.export.consumers.base import main_function, new_context, parse
from dsjax.export.stablehlo.inventory import inventory
from dsjax.export.standalone.arrays import read_safetensors
from dsjax.export.verify import verify
from dsjax.params.accounting import _stored_bytes, is_mtp, table
from dsjax.synth import synth_config, synthesise

TARGETS = ("typed", "portable", "bfloat16", "w8a8")


def _json(bundle: Path, name: str) -> Any:
    return json.loads((bundle / name).read_text())


def _arrays(path: Path) -> dict[str, np.ndarray]:
    return {name: np.asarray(a.values()) for name, a in read_safetensors(path)[0].items()}


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Portable, float32, with blocks and the draft module."""
    out = tmp_path_factory.mktemp("v3") / "bundle"
    export_twin(out, "deepseek-v3", "--dtype", "float32", "--blocks", "--phases", "prefill,decode,mtp")
    return out


def _cases() -> list[Any]:
    """Every family in every target, plain and native where there is FP8; a few of them each time."""
    few = {
        ("deepseek-v3", "typed", "plain"),
        ("deepseek-v3.2", "portable", "native"),
        ("deepseek-v4-flash", "typed", "native"),
        ("deepseek-v4-pro", "portable", "plain"),
        ("deepseek-v4-flash", "w8a8", "plain"),
        ("deepseek-r1-distill-qwen-1.5b", "bfloat16", "plain"),
    }
    found = []
    for preset in TWINS:
        for target in (*TARGETS, "typed-fp8", "float16", "w4a8"):
            for numerics in ("plain", "native"):
                if numerics == "native" and (target not in ("typed", "typed-fp8", "portable") or "distill" in preset):
                    continue
                marks = [] if (preset, target, numerics) in few else [pytest.mark.full]
                found.append(pytest.param(preset, target, numerics, marks=marks))
    return found


def test_programs_take_what_they_use_and_params_json_is_all_of_it(v3: Path) -> None:
    """The draft module's program has no parameter of the model's layers."""
    manifest, described = _json(v3, "manifest.json"), _json(v3, "params.json")
    taken: dict[str, set[str]] = {}
    for module in manifest["modules"]:
        if module["kind"] == "model":
            program = parse((v3 / f"modules/{module['name']}.vhlo.bc").read_bytes(), new_context())
            given = zip(module["arguments"], main_function(program).arguments, strict=True)
            unused = [a["name"] for a, value in given if not list(value.uses)]
            assert unused == []
            taken[module["phase"]] = {a["name"] for a in module["arguments"] if a["kind"] == "param"}
    assert {name.split(".")[0] for name in taken["mtp"]} == {"embed", "head", "mtp"}
    assert not any(name.startswith("mtp") for name in taken["decode"])
    paths = [a["path"] for a in described["arguments"]]
    assert sorted(paths) == sorted(taken["mtp"] | taken["decode"] | taken["prefill"])


def test_a_preset_names_the_tensors_that_its_checkpoint_has(v3: Path, tmp_path: Path) -> None:
    """Without weights: the same tensors, types and recipes; only files, offsets and hashes are missing."""
    bundle, phases = tmp_path / "bundle", "prefill,decode,mtp"
    assert main(["export", *twin_flags("deepseek-v3"), "--length", "32", "--phases", phases, "--out", str(bundle)]) == 0
    described, read = (_json(folder, "params.json") for folder in (bundle, v3))
    assert described["checkpoint_bytes"] == read["checkpoint_bytes"]
    for one, other in zip(described["arguments"], read["arguments"], strict=True):
        assert one["recipe"] == other["recipe"] and one["sources"]
        given = [{**source, "file": None, "offset": None} for source in other["sources"]]
        assert one["sources"] == given


@pytest.mark.parametrize(("preset", "target", "numerics"), _cases())
def test_bundle_gives_the_jitted_models_bits(tmp_path: Path, preset: str, target: str, numerics: str) -> None:
    """XLA:CPU, from the bundle's files, against the model under `jax.jit`: the same bits."""
    bundle = tmp_path / "bundle"
    export_twin(bundle, preset, "--target", target, "--numerics", numerics, "--batch", "2")
    given = tmp_path / "given"
    report = verify(bundle, ["jax"], out=given)
    assert report["passed"], report
    for folder in (bundle / "golden").iterdir():
        expected, found = (_arrays(f / "outputs.safetensors") for f in (folder, given / folder.name))
        assert expected.keys() == found.keys() and "logits" in expected
        for name, array in expected.items():
            assert array.tobytes() == found[name].tobytes(), (folder.name, name)


def test_every_block_has_goldens_and_gives_them(v3: Path) -> None:
    blocks = [m for m in _json(v3, "manifest.json")["modules"] if m["kind"] == "block"]
    assert {m["operator"] for m in blocks} >= {
        "rms_norm",
        "rope",
        "mla",
        "moe_gate",
        "grouped_matmul",
        "block_scaled_dot",
    }
    assert all(m["golden"] for m in blocks)
    report = verify(v3, ["jax"], modules="block-*")
    assert report["passed"] and len(report["programs"]) == len(blocks)


@pytest.mark.parametrize("consumer", ["interpreter", pytest.param("iree", marks=pytest.mark.verify)])
def test_independent_consumers_agree_on_plain_float32(v3: Path, consumer: str) -> None:
    """The gate: 1e-5 of the largest, whole programs."""
    report = verify(v3, [consumer], modules="decode-*")
    assert report["passed"], report
    assert {found[consumer]["state"] for found in report["programs"].values()} == {"agreed"}


@pytest.mark.verify
@pytest.mark.parametrize("preset", ["deepseek-v3", pytest.param("deepseek-v4-flash", marks=pytest.mark.full)])
def test_nothing_is_written_out_of_bounds(tmp_path: Path, preset: str) -> None:
    """IREE does not drop such writes. A slot with padding, tokens without an expert's place, unfinished entries."""
    bundle = tmp_path / "bundle"
    export_twin(bundle, preset, "--dtype", "float32", "--batch", "2")
    report = verify(bundle, ["iree"])
    assert report["passed"], report


def test_named_operators_are_as_many_as_the_model_has(v3: Path) -> None:
    """Two layers, one dense and one of experts: counted by hand from the architecture."""
    named = _json(v3, "inventory.json")["modules"]["decode-b1-s32"]["named"]
    layers = 2
    per_layer = 5  # q_a, q_b, kv_a, o; kv_b is part of mla
    assert (
        named["mla"]["executed"] == layers and named["moe_gate"]["executed"] == named["grouped_matmul"]["executed"] == 1
    )
    assert named["rms_norm"]["executed"] == 4 * layers + 1  # before attention and ffn, of q and kv; the last
    assert named["rope"]["executed"] == 2 * layers
    # attention; gate, up and down of the dense layer and of the shared expert; the router; the head
    assert named["block_scaled_dot"]["executed"] == (per_layer - 1) * layers + 3 + 3 + 1 + 1


def test_module_bytes_do_not_depend_on_weights_or_on_the_run(tmp_path: Path, v3: Path) -> None:
    again = tmp_path / "elsewhere" / "bundle"
    flags = ("--dtype", "float32", "--blocks", "--phases", "prefill,decode,mtp", "--seed", "5")
    export_twin(again, "deepseek-v3", *flags)
    modules = sorted(path.name for path in (v3 / "modules").iterdir())
    assert modules == sorted(path.name for path in (again / "modules").iterdir())
    for name in modules:
        assert (v3 / "modules" / name).read_bytes() == (again / "modules" / name).read_bytes(), name
    before, after = (_json(bundle, "params.json")["arguments"] for bundle in (v3, again))
    assert [a["sha256"] for a in before] != [a["sha256"] for a in after]


def test_same_export_twice_is_identical(tmp_path: Path) -> None:
    for name in ("a", "b"):
        export_twin(tmp_path / name, "deepseek-r1-distill-qwen-1.5b")
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "b") for p in (tmp_path / "b").rglob("*") if p.is_file())
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_checkpoints_bytes_are_named_and_found(tmp_path: Path) -> None:
    """A bundle that refers to a checkpoint: its sources, put together by slicing files, have the hashes."""
    from helpers_export import TWINS as twins

    layers, settings = twins["deepseek-v4-flash"]
    folder, bundle = tmp_path / "model", tmp_path / "bundle"
    synthesise(
        folder, synth_config("deepseek-v4-flash", layers=layers, settings=settings), template="deepseek-v4-flash"
    )
    flags = ["--length", "32", "--chunk", "8", "--phases", "decode"]
    assert main(["export", "--model", str(folder), "--out", str(bundle), *flags]) == 0
    params = _json(bundle, "params.json")
    stacked = 0
    for argument in params["arguments"]:
        raw = b"".join((folder / s["file"]).read_bytes()[s["offset"] :][: s["bytes"]] for s in argument["sources"])
        assert argument["checkpoint_bytes"] == len(raw)
        if argument["recipe"] == "stack":
            stacked += 1
            assert hashlib.sha256(raw).hexdigest() == argument["sha256"], argument["path"]
        else:
            assert argument["recipe"] == "stack, then int64 to int32"
    assert stacked > 30
    assert verify(bundle, ["jax"], checkpoint=folder)["passed"]


RANKS = [
    pytest.param("deepseek-v3", "ep=2,tp=2", ()),
    pytest.param("deepseek-v4-flash", "tp=2", (), marks=pytest.mark.full),
    pytest.param("deepseek-v3", "ep=2", ("--attention", "slots", "--batch", "2"), marks=pytest.mark.full),
    pytest.param("deepseek-v3.2", "dp=2,tp=2", ("--batch", "2"), marks=pytest.mark.full),
]


@pytest.mark.parametrize(("preset", "mesh", "flags"), RANKS)
def test_all_ranks_together_give_one_devices_numbers(
    tmp_path: Path, preset: str, mesh: str, flags: tuple[str, ...]
) -> None:
    """Each on a device of XLA:CPU, and in the interpreter, against goldens of the unsplit model; nothing of Shardy is
    left in any rank's file. The interpreter cannot take V3.2's collectives, which stand in a branch."""
    bundle = tmp_path / "bundle"
    manifest = export_twin(bundle, preset, "--dtype", "float32", "--mesh", mesh, "--phases", "decode", *flags)
    modules = manifest["modules"]
    assert len(modules) == manifest["mesh"]["ranks"]
    for module in modules:
        source = (bundle / "modules" / f"{module['name']}.mlir").read_text()
        assert not any(word in source for word in ("sdy", "mhlo", "custom_call", "partition_id"))
        assert "replica_groups" in source
    report = verify(bundle, ["jax", *["interpreter"] * (preset != "deepseek-v3.2")])
    assert report["passed"], report
    [by] = report["programs"].values()
    assert by["jax"]["how"] == f"on {len(modules)} devices"


def test_global_program_keeps_its_shardings(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    manifest = export_twin(
        bundle, "deepseek-v3", "--mesh", "ep=2,tp=2", "--spmd", "auto", "--phases", "decode", "--blocks"
    )
    module = next(m for m in manifest["modules"] if m["kind"] == "model")
    assert manifest["spmd"] == "auto" and module["rank"] is None
    source = (bundle / "modules" / f"{module['name']}.mlir").read_text()
    assert "sdy.sharding" in source and "all_reduce" not in source
    report = verify(bundle, ["jax"], modules="decode-*,block-rms_norm-0")
    assert report["passed"], report
    programs = report["programs"]
    assert programs["decode-b1-s32"]["jax"]["how"] == "split by XLA over 4 devices"
    assert programs["block-rms_norm-0"]["jax"]["state"] == "agreed" and "how" not in programs["block-rms_norm-0"]["jax"]


def test_portable_has_no_small_floats_and_loop_has_no_sort(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    flags = ("--numerics", "native", "--topk", "loop", "--stablehlo-version", "1.1.0")
    manifest = export_twin(bundle, "deepseek-v4-flash", *flags)
    for module in manifest["modules"]:
        parsed = parse((bundle / "modules" / f"{module['name']}.vhlo.bc").read_bytes(), new_context())
        found = inventory(parsed)
        assert not [t for t in found["types"] if t.startswith(("f8", "f4"))]
        assert not [op for op in found["operators"] if "sort" in op or "top_k" in op] and not found["composites"]
        assert tuple(map(int, manifest["stablehlo"]["minimum"][module["name"]].split("."))) <= (1, 1, 0)
    assert verify(bundle, ["jax"])["passed"]


@pytest.mark.parametrize("moe", ["dense", "ragged"])
def test_other_forms_of_experts(tmp_path: Path, moe: str) -> None:
    bundle = tmp_path / "bundle"
    export_twin(bundle, "deepseek-v3", "--moe", moe, "--topk", "sort", "--dtype", "float32", "--phases", "decode")
    found = _json(bundle, "inventory.json")["modules"]["decode-b1-s32"]
    assert not [op for op in found["operators"] if op.startswith("chlo")]
    assert verify(bundle, ["jax"])["passed"]


def test_profile_says_what_where_and_which_switch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bundle"
    flags = ["--length", "32", "--chunk", "8", "--target", "typed", "--profile", "no-fp8"]
    assert main(["export", *twin_flags("deepseek-v3"), "--out", str(out), *flags]) == 1
    said = capsys.readouterr().err
    assert "f8E4M3FN" in said and "--target" in said and not out.exists()
    flags[5] = "portable"
    assert main(["export", *twin_flags("deepseek-v3"), "--out", str(out), *flags]) == 0


FULL = [
    pytest.param("deepseek-v3", None),
    pytest.param("deepseek-v4-flash", None, marks=pytest.mark.full),
    *(
        pytest.param(name, mesh, marks=pytest.mark.full)
        for name in ("deepseek-v3", "deepseek-v3.2", "deepseek-v4-flash", "deepseek-v4-pro")
        for mesh in (None, "ep=8", "ep=16", "ep=32")
        if (name, mesh) not in (("deepseek-v3", None), ("deepseek-v4-flash", None))
    ),
]


@pytest.mark.parametrize(("preset", "mesh"), FULL)
def test_full_size_from_shapes(tmp_path: Path, preset: str, mesh: str | None) -> None:
    """All parameters' bytes, modules below 1 MB, aliased caches; no weights, no devices."""
    bundle = tmp_path / "bundle"
    split = ["--mesh", mesh] if mesh else []
    assert main(["export", "--model", preset, "--out", str(bundle), *split]) == 0
    config = load_config(preset)
    official = sum(_stored_bytes(row, config) for row in table(config) if not is_mtp(row))
    params, manifest = _json(bundle, "params.json"), _json(bundle, "manifest.json")
    assert params["checkpoint_bytes"] == official
    for module in manifest["modules"]:
        path = bundle / "modules" / f"{module['name']}.vhlo.bc"
        assert path.stat().st_size < 1_000_000
        caches = [v for v in module["results"] if v["kind"] == "cache"]
        assert caches and all(v["alias"] is not None for v in caches)


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "bundle")
    for flags, said in (
        (["--model", "deepseek-v3", "--weights", "copy"], "--weights copy"),
        (["--model", "deepseek-v3", "--moe", "ragged", "--target", "w8a8"], "--moe ragged"),
        (["--model", "deepseek-v3", "--phases", "decode,decode"], "once"),
        (["--model", "deepseek-v3", "--weights", "none", "--synthetic-golden"], "--weights none"),
        (["--model", "deepseek-v3", "--topk", "loop", "--op", "top_k=sort"], "--op top_k=sort"),
        (["--model", "deepseek-v3", "--spmd", "auto"], "--mesh"),
        (["--model", "deepseek-r1-distill-qwen-1.5b", "--phases", "mtp"], "draft module"),
        (["--model", "deepseek-v3", "--profile", "nobody", "--length", "32"], "nobody"),
        (["--model", "deepseek-v3", "--stablehlo-version", "0.1.0", "--length", "32"], "StableHLO version"),
        (["--model", "deepseek-v3", "--stablehlo-version", "99.0.0", "--mesh", "tp=2"], "StableHLO version"),
        (["--model", "deepseek-v3", "--mesh", "tp=3"], "tp=3"),
        (["--model", "deepseek-v3", "--no-golden"], "--no-golden"),
        (["--model", "deepseek-v3", "--no-golden", "--synthetic-golden"], "found both"),
        (["--model", "deepseek-v3", "--seed", "5"], "--seed 5"),
        (["--model", "deepseek-v3", "--numerics", "native", "--target", "float16"], "--target float16 cannot"),
        (["--model", "deepseek-r1-distill-qwen-1.5b", "--numerics", "native", "--target", "w8a8"], "--target w8a8 ca"),
        (["--model", "nowhere"], "nowhere"),
    ):
        assert main(["export", "--out", out, *flags]) == 2, flags
        [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dsjax: ") and said in line]
        assert not Path(out).exists(), line


def test_numbers_of_flags_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bundle"
    model = ["export", "--model", "deepseek-v3", "--out", str(out)]
    for flags in (["--chunk", "0"], ["--chunk", "-5"], ["--seed", "-1"], ["--layers", "0"], ["--length", "163841"]):
        assert main([*model, *flags]) == 2, flags
        [line] = capsys.readouterr().err.splitlines()
        assert flags[0] in line and flags[1] in line and not out.exists()


def test_refusals_come_before_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_load(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(bundles, "load", no_load)
    preset = "deepseek-r1-distill-qwen-1.5b"
    model = ["export", *twin_flags(preset), "--length", "32", "--chunk", "8", "--synthetic-golden"]
    model += ["--out", str(tmp_path / "bundle")]
    for flags in (["--profile", "nobody"], ["--stablehlo-version", "1.8"], ["--stablehlo-version", "99.0.0"]):
        assert main([*model, *flags]) == 2
        assert "random weights" not in capsys.readouterr().err
    assert main([*model, "--target", "typed", "--profile", "w8a8-npu"]) == 1
    own = tmp_path / "own.toml"
    rule = 'kind = "operator"\nforbid = ["stablehlo.add"]\nreason = "r"\nsource = "s"\ndate = "2026-11"\n'
    own.write_text(f'title = "own"\n[[rule]]\n{rule}switch = "none"\n')
    assert main([*model, "--profile", str(own)]) == 1
    assert "stablehlo.add" in capsys.readouterr().err


def test_a_bundle_holds_no_path(tmp_path: Path) -> None:
    """The same checkpoint and profile elsewhere: the same bytes, and neither's folder in any of them."""
    preset = "deepseek-r1-distill-qwen-1.5b"
    layers, settings = TWINS[preset]
    profile = 'title = "mine"\nextends = ["tenstorrent"]\n'
    found = []
    for place in (tmp_path / "here", tmp_path / "somewhere" / "else"):
        model = place / "model"
        synthesise(model, synth_config(preset, layers=layers, settings=settings), template=preset)
        config = model / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"_name_or_path": str(place)}))
        (place / "mine.toml").write_text(profile)
        flags = ["--phases", "decode", "--length", "32", "--no-golden", "--profile", str(place / "mine.toml")]
        assert main(["export", "--model", str(model), "--out", str(place / "bundle"), *flags]) == 0
        manifest = _json(place / "bundle", "manifest.json")
        assert (manifest["model"]["name"], manifest["profile"]) == ("model", "mine")
        files = sorted(p for p in (place / "bundle").rglob("*") if p.is_file())
        found.append({p.relative_to(place): p.read_bytes() for p in files})
        assert not [p for p in files if str(tmp_path).encode() in p.read_bytes()]
    assert found[0] == found[1]


def test_consumer_is_not_the_model() -> None:
    """The jax consumer runs files: it imports nothing of the model."""
    imported = {
        n.module or "" for n in ast.walk(ast.parse(inspect.getsource(jax_consumer))) if isinstance(n, ast.ImportFrom)
    }
    assert not any(m.startswith(("dsjax.models", "dsjax.layers", "quant")) for m in imported)
