"""Bundles that are damaged or not as the schema says, for `dsjax verify`: one line says what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import save_tensors
from verify_bundles import decode, recursive, rehash, typed, write_bundle

from dsjax.checkpoint.safetensors import Files, read_tensors
from dsjax.errors import InputError
from dsjax.export.verify import verify


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("plain") / "bundle", [decode(), typed()])


def _copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def _run(bundle: Path, by: str = "jax", **more: Any) -> dict[str, Any]:
    return verify(bundle, by.split(","), say=lambda line: None, **more)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    files = Files(path.parent, {t.name: t for t in read_tensors(path)})
    return {name: np.array(files.read(name)) for name in files}


@pytest.mark.parametrize("name", ["params/params.safetensors", "modules/decode-b2-s8.vhlo.bc"])
def test_a_tampered_file_is_named(plain: Path, tmp_path: Path, name: str) -> None:
    path = _copy(plain, tmp_path) / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"{name}: expected SHA-256 .*the file was changed"):
        _run(tmp_path / "copy")


def test_a_tampered_weight_with_a_new_manifest_is_named(plain: Path, tmp_path: Path) -> None:
    """The hash of each array in params.json tells, where somebody has hashed the files anew."""
    bundle = _copy(plain, tmp_path)
    arrays = _arrays(bundle / "params" / "params.safetensors")
    arrays["layers.codes"][0, 0, 0] ^= 1
    save_tensors(bundle / "params" / "params.safetensors", arrays)
    with pytest.raises(InputError, match=r"layers\.codes: expected sha256"):
        _run(rehash(bundle))


def test_a_missing_file_is_named(plain: Path, tmp_path: Path) -> None:
    (_copy(plain, tmp_path) / "golden" / "block-decode-0" / "inputs.safetensors").unlink()
    with pytest.raises(InputError, match=r"block-decode-0/inputs\.safetensors: expected a file"):
        _run(tmp_path / "copy")


def test_a_newer_schema_is_refused(plain: Path, tmp_path: Path) -> None:
    bundle = rehash(_copy(plain, tmp_path), lambda m: m.update(schema=2))
    with pytest.raises(InputError, match="schema: expected at most 1, found 2"):
        _run(bundle)


def test_a_golden_has_the_results_that_modules_give(tmp_path: Path, plain: Path) -> None:
    bundle = _copy(plain, tmp_path)
    path = bundle / "golden" / "decode-b2-s8" / "outputs.safetensors"
    arrays = _arrays(path)
    for names in ((), ("top", "kv")):
        save_tensors(path, {name: arrays[name] for name in names})
        found = _run(rehash(bundle), modules="decode-*")
        assert not found["passed"]
        problems = found["programs"]["decode-b2-s8"]["jax"]["problems"]
        assert "logits: modules give this result, the golden has none" in problems
        assert len(problems) == 5 - len(names)
    save_tensors(path, arrays | {"more": arrays["logits"]})
    problems = _run(rehash(bundle), modules="decode-*")["programs"]["decode-b2-s8"]["jax"]["problems"]
    assert problems == ["more: the golden has this result, modules give none"]


def test_a_damaged_artifact_ends_its_own_reading(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One that jaxlib 0.10.2 crashes on, one whose function calls itself; the third is read all the same."""
    crashing, endless = decode(), typed()
    crashing.name, endless.name = "decode-b1-s8", "block-endless-0"
    data = bytearray(crashing.modules[0])
    data[1606] ^= 82
    crashing.modules = [bytes(data)]
    endless.modules = [recursive()]
    bundle = write_bundle(tmp_path / "bundle", [crashing, endless, decode()])
    found = _run(bundle, "jax,interpreter")
    states = {name: {r["state"] for r in by.values()} for name, by in found["programs"].items()}
    assert states == {"decode-b1-s8": {"refused"}, "block-endless-0": {"refused"}, "decode-b2-s8": {"agreed"}}
    assert found["programs"]["block-endless-0"]["jax"]["why"] == "the function again calls itself"
    assert any(p.startswith("decode-b1-s8: ") for p in found["problems"])
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda e: e.update(bytes=-5), "sources: expected file, offset, bytes"),
        (lambda e: e.update(bytes=2**70), "sources: expected file, offset, bytes"),
        (lambda e: e.update(offset=2**70), "sources: expected file, offset, bytes"),
        (lambda e: e.update(bytes=2**40), r"sources: expected \d+ bytes, found"),
        (lambda e: e.update(file="../model.safetensors"), "expected the path of a file inside"),
        (lambda e: e.update(file=3), "expected the path of a file inside"),
    ],
)
def test_sources_that_are_none(tmp_path: Path, change: Any, expected: str) -> None:
    bundle = write_bundle(tmp_path / "bundle", [decode()], checkpoint=tmp_path / "model")
    params = json.loads((bundle / "params.json").read_text())
    change(params["arguments"][0]["sources"][0])
    (bundle / "params.json").write_text(json.dumps(params))
    with pytest.raises(InputError, match=expected):
        _run(rehash(bundle), checkpoint=tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: m.update(modules=3), "expected files and a list of modules"),
        (lambda m: m["modules"][0].update(name="../x"), "expected a name of letters"),
        (lambda m: m["modules"][0].update(golden="/etc"), "golden: expected golden/NAME"),
        (lambda m: m["modules"][0]["arguments"][0].update(dtype="float99"), "dtype: expected a type"),
        (lambda m: m["modules"][0]["arguments"][0].update(shape=[-1]), "expected a shape"),
        (lambda m: m["modules"][0]["arguments"][0].update(slice=[[0, 99], [0, 1]]), r"slice: expected \[start"),
        (lambda m: m["modules"][0]["arguments"][1].update(name="embed"), "arguments: expected each name once"),
        (lambda m: m.update(mesh={"ranks": "x"}), "expected a number of ranks"),
        (lambda m: m["modules"][0].update(rank=0), "expected ranks 0 to"),
        (lambda m: m["modules"][0].update(name="..-rank0", rank=0), "expected a name of letters"),
        (lambda m: m["modules"][0].update(golden="golden/.."), "golden: expected golden/NAME"),
        (lambda m: m["modules"][0].update(golden="golden/other"), "files: expected golden/other/outputs.safetensors"),
        (lambda m: m["files"].pop("golden/decode-b2-s8/tolerance.json"), "files: expected golden/decode-b2-s8/tol"),
        (lambda m: m["modules"][0]["arguments"][0].update(dtype="(3,f4"), "dtype: expected a type"),
        (lambda m: (m["modules"][0].update(rank=0), m.update(mesh={"ranks": 10**15})), "expected ranks 0 to"),
    ],
)
def test_a_manifest_that_is_not_as_the_schema_says(plain: Path, tmp_path: Path, change: Any, expected: str) -> None:
    bundle = rehash(_copy(plain, tmp_path), lambda m: m.update(mesh={"ranks": 2}))
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=expected):
        _run(bundle)


def test_files_stay_inside(plain: Path, tmp_path: Path) -> None:
    bundle = _copy(plain, tmp_path)
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../secret"] = {"bytes": 1, "sha256": "0"}
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="expected the path of a file inside"):
        _run(bundle)
