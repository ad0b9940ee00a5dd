"""verify.py as a bundle holds it: run alone, every fault gets the verdict that it should."""

from __future__ import annotations

import ast
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from bundles import (
    GOLDEN,
    Arrays,
    candidate_of,
    outputs,
    row_of,
    run_alone,
    safetensors_bytes,
    save_tensors,
    write_bundle,
)

from dsjax.export.standalone import source
from dsjax.export.standalone.arrays import BadInput, read_arrays
from dsjax.export.standalone.verify import main, read_golden, verify


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle", {GOLDEN: outputs()})


def test_alone_with_numpy(bundle: Path, tmp_path: Path) -> None:
    chip = candidate_of(tmp_path, outputs())
    done = run_alone(bundle, chip, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["within_bound"] and report["within_strict"]
    assert report["files"] == {"checked": 4, "problems": {}}
    assert row_of(report, "logits")["norm"] == 0 and row_of(report, "logits")["logits"]["top1"] == 1

    candidate_of(tmp_path, outputs() | {"logits": outputs()["logits"] * np.float32(1.06)})
    done = run_alone(bundle, chip)
    assert done.returncode == 1 and done.stdout.splitlines()[-1] == "5%: FAIL; strict: FAIL"
    assert run_alone(bundle, tmp_path / "none").returncode == 2


def test_one_file_for_python_3_9() -> None:
    """What is joined for a bundle: 3.9's grammar, an import once and in front, no name defined twice."""
    tree = ast.parse(source(), feature_version=(3, 9))
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports]
    assert set(modules) <= {"numpy", "__future__", *sys.stdlib_module_names, "collections.abc"}
    assert len(set(modules)) == len(modules) and tree.body[1 : len(imports) + 1] == imports
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert len(set(names)) == len(names) > 20


def test_alone_really_is_alone(bundle: Path) -> None:
    (bundle / "verify.py").write_text("import ml_dtypes\n")
    assert "only NumPy is here" in run_alone(bundle).stderr


@pytest.mark.parametrize(
    ("factor", "bound", "status"), [(1.04, True, 0), (1.06, False, 1), (0.96, True, 0), (0.94, False, 1)]
)
def test_4_and_6_percent(
    bundle: Path, tmp_path: Path, factor: float, bound: bool, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    chip = candidate_of(tmp_path, outputs() | {"logits": outputs()["logits"] * np.float32(factor)})
    report = verify(bundle, chip)
    row = row_of(report, "logits")
    assert (row["within_bound"], row["within_strict"]) == (bound, False)
    assert (report["within_bound"], report["within_strict"]) == (bound, False)
    assert row["norm"] == pytest.approx(abs(factor - 1), rel=1e-5) == pytest.approx(row["max_relative"], rel=1e-5)
    assert row["cosine"] == pytest.approx(1) and row["logits"]["top1"] == 1  # which scaling does not show in
    assert main([str(chip), "--bundle", str(bundle)]) == status
    assert main([str(chip), "--bundle", str(bundle), "--gate", "strict"]) == 1
    assert main([str(chip), "--bundle", str(bundle), "--bound", "0.07"]) == 0
    assert "logits: top-1 100.00%" in capsys.readouterr().out


def test_one_large_error_is_not_averaged_away(bundle: Path, tmp_path: Path) -> None:
    logits = outputs()["logits"].copy()
    logits[0, 0, 0] += 0.06 * np.abs(logits).max()
    row = row_of(verify(bundle, candidate_of(tmp_path, outputs() | {"logits": logits})), "logits")
    assert row["norm"] < 0.05 < row["max_relative"] and not row["within_bound"]


def test_many_small_errors_do_not_hide_behind_a_large_value(tmp_path: Path) -> None:
    golden = np.ones(301, np.float32)
    golden[7] = 100
    bundle = write_bundle(tmp_path / "bundle", {GOLDEN: {"logits": golden}})
    row = row_of(verify(bundle, candidate_of(tmp_path, {"logits": golden + 3})), "logits")
    assert row["max_relative"] < 0.05 < row["norm"] and not row["within_bound"]


def put(name: str, index: tuple[int, ...], value: float) -> Callable[[Arrays], None]:
    def change(arrays: Arrays) -> None:
        arrays[name] = arrays[name].copy()
        arrays[name][index] = value

    return change


def swap_rows(arrays: Arrays) -> None:
    arrays["hidden"] = arrays["hidden"][::-1]


FAULTS: dict[str, tuple[Callable[[Arrays], Any], str, str]] = {
    "NaN": (
        put("logits", (1, 2, 7), np.nan),
        "logits",
        "1 of 300 are NaN or Inf where the golden is finite, first at [1, 2, 7]",
    ),
    "Inf": (put("hidden", (0, 0, 0), np.inf), "hidden", "1 of 96 are NaN or Inf"),
    "rows swapped": (swap_rows, "hidden", ""),
    "shape": (lambda a: a.update(logits=a["logits"][:, :2]), "logits", "expected shape [2, 3, 50], found [2, 2, 50]"),
    "kind": (lambda a: a.update(logits=a["logits"].astype(np.int32)), "logits", "expected F32, found I32"),
    "missing": (lambda a: a.pop("hidden"), "hidden", "no such result"),
    "length": (put("cache.length", (1,), 6), "cache.length", ""),
    "codes": (lambda a: a.update({"cache.latent": a["cache.latent"] ^ 1}), "cache.latent", ""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(bundle: Path, tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    change, name, problem = FAULTS[fault]
    arrays = outputs()
    change(arrays)
    chip = candidate_of(tmp_path, arrays)
    report = verify(bundle, chip)
    assert row_of(report, name)["within_bound"] is False and not report["within_bound"]
    assert problem in " ".join(row_of(report, name)["problems"])
    assert all(row["within_bound"] for row in report["goldens"][0]["results"] if row["name"] != name)
    assert main([str(chip), "--bundle", str(bundle), "--json"]) == 1
    json.loads(capsys.readouterr().out, parse_constant=pytest.fail)  # no NaN, which is not JSON


def test_a_goldens_own_nan(tmp_path: Path) -> None:
    golden = outputs()
    put("hidden", (0, 0, 0), -np.inf)(golden)
    put("hidden", (0, 0, 1), np.nan)(golden)
    bundle = write_bundle(tmp_path / "bundle", {GOLDEN: golden})
    assert verify(bundle, candidate_of(tmp_path, golden))["within_strict"]
    put("hidden", (0, 0, 0), np.inf)(golden)
    report = verify(bundle, candidate_of(tmp_path, golden))
    assert row_of(report, "hidden")["problems"] == ["1 of 96 are not its NaN or Inf, first at [0, 0, 0]"]


def test_codes_and_integers(tmp_path: Path) -> None:
    """A code in a hundred differs: within 5%, and strict only where tolerance.json says so."""
    golden = {"cache.latent": np.arange(100, dtype=np.uint8), "ids": np.arange(100, dtype=np.int32)}
    other = {name: array.copy() for name, array in golden.items()}
    for array in other.values():
        array[7] = 0
    chip = candidate_of(tmp_path, other)
    cases: list[tuple[Any, Any, Any]] = [
        (None, True, None),
        ({"strict": 0}, True, False),
        ({"strict": 0.02}, True, True),
        ({"strict": None, "bound": None}, None, None),
    ]
    for number, (tolerance, bound, strict) in enumerate(cases):
        given = {} if tolerance is None else {"cache.latent": tolerance}
        report = verify(write_bundle(tmp_path / f"b{number}", {GOLDEN: golden}, tolerance=given), chip)
        row = row_of(report, "cache.latent")
        assert (row["within_bound"], row["within_strict"], row["equal_share"]) == (bound, strict, 0.99)
        assert (row_of(report, "ids")["within_bound"], row_of(report, "ids")["within_strict"]) == (True, False)


def test_npz_with_bits(tmp_path: Path) -> None:
    """An .npz cannot name BF16 and FP8: NumPy saves ml_dtypes' arrays as nameless bytes, others save the bits."""
    r = np.random.default_rng(0)
    golden = {
        name: r.normal(size=(4, 5)).astype(dtype)
        for name, dtype in (("a", ml_dtypes.bfloat16), ("b", ml_dtypes.float8_e4m3fn), ("c", np.float16))
    }
    golden["scalar"] = np.float32(3).reshape(())
    bundle = write_bundle(tmp_path / "bundle", {GOLDEN: golden})
    (tmp_path / "chip" / "golden" / GOLDEN).mkdir(parents=True)
    for bits in (True, False):
        arrays = {n: a.view(f"u{a.itemsize}") if bits and a.dtype.kind == "V" else a for n, a in golden.items()}
        np.savez(tmp_path / "chip" / "golden" / GOLDEN / "outputs.npz", **arrays)
        report = verify(bundle, tmp_path / "chip")
        assert report["within_strict"], report


@pytest.mark.parametrize(
    "path", ["golden/decode-b1-s64/outputs.safetensors", "golden/decode-b1-s64/inputs.safetensors", "verify.py"]
)
@pytest.mark.parametrize("how", ["bit", "cut", "gone"])
def test_tampered_file(bundle: Path, tmp_path: Path, path: str, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    chip = candidate_of(tmp_path, outputs())
    data = bytearray((bundle / path).read_bytes())
    data[-1] ^= 1
    if how == "gone":
        (bundle / path).unlink()
    else:
        (bundle / path).write_bytes(data if how == "bit" else data[:-1])
    assert main([str(chip), "--bundle", str(bundle)]) == 1
    out = capsys.readouterr().out
    expected = {"bit": "SHA-256", "cut": "bytes, found", "gone": "expected a file, found none"}[how]
    assert any(line.startswith(f"{path}: ") and expected in line for line in out.splitlines()), out


def edit_manifest(bundle: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


BAD_MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "newer schema": (lambda m: m.update(schema=2), "schema: expected at most 1, found 2"),
    "no schema": (lambda m: m.pop("schema"), "schema: expected an integer"),
    "bool schema": (lambda m: m.update(schema=True), "schema: expected an integer"),
    "no files": (lambda m: m.pop("files"), "expected files and a list of modules"),
    "file outside": (lambda m: m["files"].update({"../x": {}}), "expected the path of a file inside"),
    "absolute file": (lambda m: m["files"].update({"/etc/passwd": {}}), "expected the path of a file inside"),
    "golden outside": (lambda m: m["modules"][0].update(golden="golden/../.."), "expected golden/NAME"),
    "golden up": (lambda m: m["modules"][0].update(golden="golden/.."), "expected golden/NAME"),
    "NUL in a file": (lambda m: m["files"].update({"a\0b": {}}), "expected the path of a file inside"),
    "half a character": (lambda m: m["files"].update({"a\ud800": {}}), "expected the path of a file inside"),
    "infinite rank": (lambda m: m["modules"][0].update(rank=math.inf), "Infinity"),
    "rank of floats": (lambda m: m["modules"][0].update(rank=1.5), "rank: expected a number"),
    "slice of floats": (
        lambda m: m["modules"][0].update(rank=0, results=[{"name": "hidden", "slice": [[0, 2.0], [0, 3], [0, 16]]}]),
        "hidden: slice: expected [start, stop]",
    ),
    "no results": (lambda m: m["modules"][0].pop("results"), "results: expected objects with names"),
    "golden not listed": (lambda m: m["files"].pop("golden/decode-b1-s64/outputs.safetensors"), "found no entry"),
    "tolerance not listed": (lambda m: m["files"].pop("golden/decode-b1-s64/tolerance.json"), "found no entry"),
    "no golden": (lambda m: m["modules"][0].update(golden=None), "expected golden results"),
    "slice too large": (
        lambda m: m["modules"][0].update(rank=0, results=[{"name": "logits", "slice": [[0, 2], [0, 3], [0, 51]]}]),
        "logits: slice: expected [start, stop] by axis of [2, 3, 50]",
    ),
}


@pytest.mark.parametrize("case", BAD_MANIFESTS)
def test_bad_manifest(bundle: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    change, expected = BAD_MANIFESTS[case]
    edit_manifest(bundle, change)
    assert main([str(candidate_of(tmp_path, outputs())), "--bundle", str(bundle)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and expected in err


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HOSTILE = {
    "empty": b"",
    "short": b"\x01\x00",
    "huge length": (2**63).to_bytes(8, "little") + b"{}",
    "length beyond the file": (3).to_bytes(8, "little") + b"{}",
    "not UTF-8": safetensors_bytes(b'{"\xff": 1}'),
    "not JSON": safetensors_bytes(b"{"),
    "deep JSON": safetensors_bytes(b"[" * 200_000),
    "long number": safetensors_bytes(b'{"a": ' + b"9" * 10_000 + b"}"),
    "array": safetensors_bytes([]),
    "a key twice": safetensors_bytes(b'{"a": {}, "a": {}}'),
    "no object": safetensors_bytes({"a": 3}),
    "half a character": safetensors_bytes({"a\ud800": entry()}, bytes(8)),
    "unknown dtype": safetensors_bytes({"a": entry("F7")}, bytes(8)),
    "dtype of no text": safetensors_bytes({"a": entry(["F32"])}, bytes(8)),
    "negative shape": safetensors_bytes({"a": entry(shape=[-2])}, bytes(8)),
    "bool shape": safetensors_bytes({"a": entry(shape=[True], offsets=[0, 4])}, bytes(4)),
    "huge shape": safetensors_bytes({"a": entry(shape=[2**40, 2**40])}, bytes(8)),
    "huge shape of nothing": safetensors_bytes({"a": entry(shape=[0, 2**61, 2**61], offsets=[0, 0])}),
    "many dimensions": safetensors_bytes({"a": entry(shape=[1] * 40, offsets=[0, 4])}, bytes(4)),
    "negative offset": safetensors_bytes({"a": entry(offsets=[-8, 0])}, bytes(8)),
    "backward": safetensors_bytes({"a": entry(offsets=[8, 0])}, bytes(8)),
    "beyond the end": safetensors_bytes({"a": entry(offsets=[8, 16])}, bytes(8)),
    "overlap": safetensors_bytes({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)),
    "hole": safetensors_bytes({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)),
    "tail": safetensors_bytes({"a": entry()}, bytes(9)),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_safetensors(bundle: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    chip = candidate_of(tmp_path, {})
    path = chip / GOLDEN / "outputs.safetensors"
    path.write_bytes(HOSTILE[case])
    assert main([str(chip), "--bundle", str(bundle)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and str(path) in err and len(err) < 600


def test_hostile_npz(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "chip" / GOLDEN
    folder.mkdir(parents=True)
    np.savez(folder / "outputs.npz", logits=np.array([print], dtype=object))
    good = (folder / "outputs.npz").read_bytes()
    for data, word in (
        (good, "allow_pickle"),
        (good[:40], "outputs.npz"),
        (b"", "outputs.npz"),
        (b"\x80\x04.", "pickle"),
    ):
        (folder / "outputs.npz").write_bytes(data)
        assert main([str(tmp_path / "chip"), "--bundle", str(bundle)]) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and word in err
    np.savez(folder / "outputs.npz", logits=np.array(["text"]))
    assert main([str(tmp_path / "chip"), "--bundle", str(bundle)]) == 2
    save_tensors(folder / "outputs.safetensors", outputs())
    assert main([str(tmp_path / "chip"), "--bundle", str(bundle)]) == 2  # which of the two is meant?
    assert "found both" in capsys.readouterr().err


def test_damaged_npz(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every byte of a packed file turned, and of an .npy's header: whatever NumPy makes of it, there is one line."""
    folder = tmp_path / "chip" / GOLDEN
    folder.mkdir(parents=True)
    path = folder / "outputs.npz"
    np.savez_compressed(path, logits=np.zeros(3, np.float32))
    good = path.read_bytes()
    for i in range(len(good)):
        path.write_bytes(good[:i] + bytes([good[i] ^ 0xFF]) + good[i + 1 :])
        assert main([str(tmp_path / "chip"), "--bundle", str(bundle)]) in (1, 2)
        assert len(capsys.readouterr().err.splitlines()) <= 1
    for descr in ("'(3,f4'", "(3,", "'O'", "[('a', ("):
        header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': (3,), }}\n".encode()
        (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(12))
        with pytest.raises(BadInput, match=r"x\.npy: expected"):
            read_arrays(tmp_path / "x.npy")


@pytest.mark.parametrize("bound", ["strict", "bound"])
@pytest.mark.parametrize("value", ["9" * 400, "-1", "NaN", "true", '"1"', "[]"])
def test_bounds_that_are_none(tmp_path: Path, bound: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = write_bundle(tmp_path / "bundle", {GOLDEN: outputs()}, tolerance={"logits": {bound: "VALUE"}})
    path = bundle / "golden" / GOLDEN / "tolerance.json"
    path.write_text(path.read_text().replace('"VALUE"', value))
    with pytest.raises(BadInput, match=r"tolerance\.json: expected"):
        read_golden(bundle, f"golden/{GOLDEN}", json.loads((bundle / "manifest.json").read_text())["modules"], 0.05)


def test_of_a_cache_what_the_step_changes_counts(tmp_path: Path) -> None:
    """One row of a hundred: left as it was, half of it wrong, and written elsewhere."""
    before = np.zeros((100, 8), np.uint8)
    golden, half, elsewhere = before.copy(), before.copy(), before.copy()
    golden[7], half[7], elsewhere[8] = range(1, 9), [1, 2, 3, 4, 0, 0, 0, 0], range(1, 9)
    cases = [(golden, 0.0, True), (before, 1.0, False), (half, 0.5, True), (elsewhere, 1.0, False)]
    given = {"inputs": {"cache": before}, "tolerance": {"cache": {"strict": None, "bound": 0.5}}}
    bundle = write_bundle(tmp_path / "bundle", {GOLDEN: {"cache": golden}}, **given)
    for array, error, within in cases:
        row = row_of(verify(bundle, candidate_of(tmp_path, {"cache": array})), "cache")
        assert (row["error"], row["within_bound"]) == (error, within)


def test_a_golden_of_nan_is_none(tmp_path: Path) -> None:
    golden = {"logits": np.full((1, 4), np.nan, np.float32)}
    bundle = write_bundle(tmp_path / "bundle", {GOLDEN: golden})
    row = row_of(verify(bundle, candidate_of(tmp_path, golden)), "logits")
    assert row["problems"] == ["the golden itself has NaN"] and row["within_bound"] is False


def test_told_and_exact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a bound errors are told, but a NaN or a shape fails; with bounds of 0 one wrong element of many fails."""
    golden = {"logits": outputs()["logits"], "ids": np.zeros(1000, np.int32)}
    told, exact = {"bound": None}, {"bound": 0, "strict": 0}
    bundle = write_bundle(tmp_path / "bundle", {GOLDEN: golden}, tolerance={"logits": told, "ids": exact})
    twice = golden | {"logits": golden["logits"] * 2}
    chip = candidate_of(tmp_path, twice)
    assert main([str(chip), "--bundle", str(bundle), "--gate", "strict"]) == 0
    shown = capsys.readouterr().out
    assert "median of rows 1\n" in shown and shown.endswith("5%: pass; strict: pass; told, not judged: 1 results\n")
    row = row_of(verify(bundle, chip), "logits")
    assert (row["within_bound"], row["within_strict"], row["median_row"]) == (None, None, pytest.approx(1))
    ids, logits = golden["ids"].copy(), twice["logits"].copy()
    ids[7], logits[0, 0, 0] = 1, np.nan
    for wrong in ({"ids": ids}, {"logits": logits}, {"logits": logits[:1]}):
        report = verify(bundle, candidate_of(tmp_path, twice | wrong))
        assert not report["within_bound"] and not report["within_strict"]
        assert row_of(report, next(iter(wrong)))["within_bound"] is False


def test_a_golden_has_the_results_that_modules_give(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", {GOLDEN: outputs()})
    edit_manifest(bundle, lambda m: m["modules"][0]["results"].append({"name": "more", "slice": None}))
    report = verify(bundle, candidate_of(tmp_path, outputs()))
    assert report["goldens"][0]["problems"] == ["more: modules give this result, the golden has none"]
    assert not report["within_bound"]
    bundle = write_bundle(tmp_path / "empty", {GOLDEN: {}})
    assert not verify(bundle, candidate_of(tmp_path, {"x": np.zeros(1, np.float32)}))["within_bound"]


def test_some_goldens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A chip that runs a part: what is missing is a negative verdict, unless only that part is asked for."""
    bundle = write_bundle(tmp_path / "bundle", {GOLDEN: outputs(), "block-rms_norm-0": {"y": outputs()["logits"]}})
    chip = candidate_of(tmp_path, {"y": outputs()["logits"], "more": np.zeros(3, np.float32)}, "block-rms_norm-0")
    assert main([str(chip), "--bundle", str(bundle)]) == 1
    assert f"{GOLDEN}: no results: expected" in capsys.readouterr().out
    assert main([str(chip), "--bundle", str(bundle), "--only", "block-*"]) == 0
    assert "block-rms_norm-0: more: the golden has no such result" in capsys.readouterr().out
    assert main([str(chip), "--bundle", str(bundle), "--only", "mtp*"]) == 2
    assert main([str(chip), "--bundle", str(bundle), "--only", "block-*,mtp*"]) == 2
