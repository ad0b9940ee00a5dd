"""`dsjax verify`: bundles that are right agree, and every fault is caught and named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import save_tensors
from verify_bundles import RANKS, decode, ranked, rehash, typed, write_bundle

from dsjax.checkpoint.safetensors import Files, read_tensors
from dsjax.cli.main import main
from dsjax.errors import InputError
from dsjax.export.consumers.jax import Jax
from dsjax.export.standalone.verify import verify as standalone_verify
from dsjax.export.verify import verify


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("plain") / "bundle", [decode(), typed()])


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("sharded") / "bundle", [ranked(constant_rank=True)])


def _copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def _quiet(_: str) -> None:
    pass


def _run(bundle: Path, by: str = "jax", **more: Any) -> dict[str, Any]:
    return verify(bundle, by.split(","), say=_quiet, **more)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    files = Files(path.parent, {t.name: t for t in read_tensors(path)})
    return {name: np.array(files.read(name)) for name in files}


def test_a_right_bundle_agrees(plain: Path) -> None:
    said: list[str] = []
    report = verify(plain, ["interpreter", "jax"], say=said.append)
    assert report["passed"] and not report["problems"]
    for program in ("decode-b2-s8", "block-decode-0"):
        for name in ("interpreter", "jax"):
            assert report["programs"][program][name]["state"] == "agreed", (program, name)
    assert len(said) == 2 and all("the interpreter will take about" in line for line in said)


def test_xla_gives_the_jitted_results_bit_for_bit(plain: Path) -> None:
    for row in _run(plain, modules="decode-*")["programs"]["decode-b2-s8"]["jax"]["results"]:
        assert row["error"] == 0, row


def test_ranks_agree_by_both(sharded: Path) -> None:
    report = _run(sharded, "interpreter,jax")
    assert report["passed"]
    assert {r["state"] for r in report["programs"]["decode-b2-s4"].values()} == {"agreed"}


def test_weights_are_read_from_the_checkpoint(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", [decode()], checkpoint=tmp_path / "model")
    report = _run(bundle)
    assert not report["passed"]  # nothing is proven
    assert report["programs"]["decode-b2-s8"]["jax"] == {
        "state": "not run",
        "why": "the bundle refers to a checkpoint's weights, and --checkpoint names no folder",
    }
    assert _run(bundle, checkpoint=tmp_path / "model")["programs"]["decode-b2-s8"]["jax"]["state"] == "agreed"
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    with pytest.raises(InputError, match=r"layers\.scales.*weight was changed"):
        _run(bundle, checkpoint=tmp_path / "model")


def test_weights_of_another_type_are_cast(tmp_path: Path) -> None:
    """Codes that the checkpoint holds as int64, layer by layer; of what is no cast the reason is told."""
    checkpoint, bundle = tmp_path / "model", tmp_path / "bundle"
    write_bundle(bundle, [decode()], checkpoint=checkpoint)
    params = json.loads((bundle / "params.json").read_text())
    (entry,) = [e for e in params["arguments"] if e["path"] == "layers.codes"]
    (raw,) = [(checkpoint / s["file"]).read_bytes() for s in entry["sources"][:1]]
    pieces = [raw[s["offset"] :][: s["bytes"]] for s in entry["sources"]]
    wide = b"".join(np.frombuffer(p, np.uint8).astype(np.int64).tobytes() for p in pieces)
    (checkpoint / "wide.bin").write_bytes(wide)
    size = len(wide) // len(pieces)
    for i, source in enumerate(entry["sources"]):
        source |= {"file": "wide.bin", "offset": i * size, "bytes": size}
    states = {}
    for what in ("int64 to uint8", "int64 to uint7", "e4m3 codes and scales to bf16"):
        recipe = f"stack, then {what}"
        entry["recipe"] = recipe
        (bundle / "params.json").write_text(json.dumps(params))
        found = _run(rehash(bundle), checkpoint=checkpoint)["programs"]["decode-b2-s8"]["jax"]
        states[recipe] = found["state"]
        assert found["state"] == "agreed" or recipe in found["why"]
    assert list(states.values()) == ["agreed", "not run", "not run"]


def test_a_checkpoints_hashes_are_compared_without_goldens_too(tmp_path: Path) -> None:
    """The right one passes, as do weights that the bundle has a copy of; another, or none, is refused."""
    checkpoint, said = tmp_path / "model", list[str]()
    bundle = write_bundle(tmp_path / "bundle", [decode()], checkpoint=checkpoint, golden=False)
    report = verify(bundle, ["jax"], checkpoint=checkpoint, say=said.append)
    assert report["passed"] and report["programs"]["decode-b2-s8"]["jax"]["state"] == "accepted"
    params = json.loads((bundle / "params.json").read_text())["arguments"]
    assert said == [f"{checkpoint}: {len(params)} of {len(params)} parameters compared with the bundle's hashes"]
    with pytest.raises(InputError, match=r"--checkpoint .*nowhere: expected a folder, found none"):
        _run(bundle, checkpoint=tmp_path / "nowhere")
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    with pytest.raises(InputError, match=r"layers\.scales.*weight was changed"):
        _run(bundle, checkpoint=checkpoint)


def test_modules_are_chosen_by_patterns(plain: Path) -> None:
    assert _run(plain, modules="block-*")["programs"].keys() == {"block-decode-0"}
    with pytest.raises(InputError, match=r"'nothing-\*': expected a pattern for some of decode-b2-s8, block-decode-0"):
        _run(plain, modules="nothing-*,block-*")
    assert len(_run(plain, modules="decode-*,block-*")["programs"]) == 2


def test_what_it_keeps_passes_the_bundles_own_check(sharded: Path, tmp_path: Path) -> None:
    _run(sharded, out=tmp_path / "one")
    assert standalone_verify(sharded, tmp_path / "one")["within_strict"]
    assert (tmp_path / "one" / "decode-b2-s4" / f"rank{RANKS - 1}" / "outputs.safetensors").is_file()
    assert main(["align", str(sharded), str(tmp_path / "one"), "--gate", "strict"]) == 0
    _run(sharded, "jax,interpreter", out=tmp_path / "two")
    assert {p.name for p in (tmp_path / "two").iterdir()} == {"jax", "interpreter"}
    with pytest.raises(InputError, match="found something there"):
        _run(sharded, out=tmp_path / "one")


def test_without_goldens_it_still_compiles(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", [decode(), ranked()], golden=False)
    report = _run(bundle, "jax,interpreter")
    assert report["passed"]
    for by_consumer in report["programs"].values():
        assert {name: r["state"] for name, r in by_consumer.items()} == {"jax": "accepted", "interpreter": "not run"}
    assert not _run(bundle, "interpreter")["passed"]  # which can do nothing with them
    assert report["programs"]["decode-b2-s8"]["jax"]["memory"]["alias_bytes"] > 0


def _swap(bundle: Path, a: int, b: int) -> Path:
    files = [bundle / "modules" / f"decode-b2-s4-rank{r}.vhlo.bc" for r in (a, b)]
    first, second = (f.read_bytes() for f in files)
    files[0].write_bytes(second)
    files[1].write_bytes(first)
    return rehash(bundle)


@pytest.mark.parametrize("by", ["interpreter", "jax"])
def test_swapped_ranks_depart(sharded: Path, tmp_path: Path, by: str) -> None:
    report = _run(_swap(_copy(sharded, tmp_path), 1, 2), by)
    assert not report["passed"]
    assert report["programs"]["decode-b2-s4"][by]["state"] == "departed"


def test_wrong_parts_of_arguments_depart(sharded: Path, tmp_path: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        parts = [m["arguments"][0] for m in manifest["modules"]]
        parts[0]["slice"], parts[3]["slice"] = parts[3]["slice"], parts[0]["slice"]

    report = _run(rehash(_copy(sharded, tmp_path), change))
    assert report["programs"]["decode-b2-s4"]["jax"]["state"] == "departed"


def test_a_missing_alias_is_a_negative_verdict(tmp_path: Path) -> None:
    example = decode()
    example.results[3].alias = None
    bundle = write_bundle(tmp_path / "bundle", [example])
    report = _run(bundle)
    assert not report["passed"]
    assert report["problems"] == [
        "decode-b2-s8: kv: expected a cache's result to take an argument's memory, found no alias"
    ]


def test_an_alias_that_the_program_lacks_is_a_negative_verdict(tmp_path: Path) -> None:
    example = decode()
    example.results[2].alias = 5
    report = _run(write_bundle(tmp_path / "bundle", [example]))
    assert report["problems"] == ["decode-b2-s8: hidden: expected tf.aliasing_output on argument 5, found none"]
    assert not report["passed"]


def test_types_that_differ_from_the_programs_are_named(plain: Path, tmp_path: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["modules"][0]["results"][0]["dtype"] = "bfloat16"

    report = _run(rehash(_copy(plain, tmp_path), change))
    assert report["problems"] == ["decode-b2-s8: logits: expected bfloat16 [2, 16], found float32 [2, 16]"]


@pytest.mark.parametrize("key", ["arguments", "results"])
def test_values_that_the_program_lacks_are_named(plain: Path, tmp_path: Path, key: str) -> None:
    def change(manifest: dict[str, Any]) -> None:
        last = manifest["modules"][0][key][-1]
        manifest["modules"][0][key].append(last | {"index": last["index"] + 1, "name": "more", "alias": None})

    report = _run(rehash(_copy(plain, tmp_path), change), modules="decode-*")
    count = {"arguments": 6, "results": 5}[key]
    assert f"decode-b2-s8: expected {count + 1} {key}, found {count}" in report["problems"]
    assert report["programs"]["decode-b2-s8"]["jax"]["state"] == "refused"


@pytest.mark.parametrize(("factor", "within_bound"), [(1.0001, True), (1.04, True), (1.06, False)])
def test_wrong_golden_logits_depart(tmp_path: Path, factor: float, within_bound: bool) -> None:
    bundle = write_bundle(tmp_path / "bundle", [decode(factor)])
    report = _run(bundle)["programs"]["decode-b2-s8"]["jax"]
    assert report["state"] == "departed" and report["within_bound"] is within_bound
    rows = {row["name"]: row for row in report["results"]}
    assert rows["logits"]["error"] == pytest.approx((factor - 1) / factor, rel=0.01)
    assert all(row["within_strict"] is not False for name, row in rows.items() if name != "logits")
    assert _run(bundle, gate="bound")["passed"] is within_bound


def test_a_nan_in_a_golden_departs(plain: Path, tmp_path: Path) -> None:
    bundle = _copy(plain, tmp_path)
    path = bundle / "golden" / "decode-b2-s8" / "outputs.safetensors"
    arrays = _arrays(path)
    arrays["logits"][1, 2] = np.nan
    save_tensors(path, arrays)
    report = _run(rehash(bundle))["programs"]["decode-b2-s8"]["jax"]
    assert report["state"] == "departed"
    assert any("NaN" in p for row in report["results"] for p in row["problems"])


def test_the_goldens_own_bound_counts(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", [decode(1.01)], tolerance={"logits": 0.02})
    assert _run(bundle)["passed"]


def test_what_would_take_too_long_is_not_started(plain: Path) -> None:
    report = _run(plain, "interpreter", modules="decode-*", time_limit=1e-3)
    assert not report["passed"]
    found = report["programs"]["decode-b2-s8"]["interpreter"]
    assert found["state"] == "too slow" and "beyond --time-limit 0.001 s" in found["why"]


def test_the_documented_exception_of_the_interpreter(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", [typed(scales=[127, 255])])
    report = _run(bundle, "interpreter,jax")
    found = report["programs"]["block-decode-0"]
    assert found["jax"]["state"] == "agreed"
    assert found["interpreter"]["state"] == "excepted" and "0xff" in found["interpreter"]["note"]
    assert report["passed"]


def test_an_exception_excuses_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A golden that is wrong besides, which XLA tells, and a consumer that is wrong besides."""
    example = typed(scales=[127, 127, 127, 255])
    bundle = write_bundle(tmp_path / "right", [example])
    example.results[1].array = np.array([1000, -7, 3, np.nan], np.float32)
    found = _run(write_bundle(tmp_path / "wrong", [example]), "interpreter")
    assert not found["passed"] and found["programs"]["block-decode-0"]["interpreter"]["state"] == "departed"
    why = found["programs"]["block-decode-0"]["interpreter"]["why"]
    assert why == "not by that alone: XLA departs from the golden, too"

    def run(self: Any, module: bytes, arguments: list[np.ndarray]) -> list[np.ndarray]:
        results = Jax().run(module, arguments)
        return [results[0] * 2, *results[1:]]

    monkeypatch.setattr("dsjax.export.consumers.interpreter.Interpreter.run", run)
    report = _run(bundle, "interpreter")["programs"]["block-decode-0"]["interpreter"]
    assert report["state"] == "departed"
    assert report["why"] == "not by that alone: without such codes it departs from XLA, too"


TOLD = {name: {"strict": None, "bound": None} for name in ("logits", "hidden", "kv")}
EXACT = {name: {"strict": 0, "bound": 0} for name in ("length", "top")}


def test_what_has_no_bound_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong golden of logits does not fail, and is shown; a NaN fails, and so does one wrong length."""
    example = decode(1.2)
    bundle = write_bundle(tmp_path / "bundle", [example], tolerance=TOLD | EXACT)
    assert main(["verify", str(bundle), "--with", "jax", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])["programs"]["decode-b2-s8"]["jax"]
    rows = {row["name"]: row for row in report["results"]}
    assert report["state"] == "told" and rows["logits"]["within_bound"] is None
    assert rows["logits"]["median_row"] == pytest.approx(1 / 6, rel=1e-4)
    assert rows["length"]["within_bound"] and rows["length"]["within_strict"]
    assert main(["verify", str(bundle), "--with", "jax"]) == 0
    shown = capsys.readouterr().out
    assert "logits: told, not judged: error 0.17, median of rows 0.17" in shown and " told " in shown
    for name, change in (("kv", np.nan), ("length", 9)):
        wrong = decode()
        item = next(r for r in wrong.results if r.name == name)
        item.array = item.array.copy()
        item.array.flat[0] = change
        found = _run(write_bundle(tmp_path / name, [wrong], tolerance=TOLD | EXACT))
        assert not found["passed"] and found["programs"]["decode-b2-s8"]["jax"]["state"] == "departed"


def test_command(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(plain), "--with", "jax", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["passed"] and set(report["programs"]) == {"decode-b2-s8", "block-decode-0"}
    assert main(["verify", str(plain), "--with", "jax", "--modules", "block-*"]) == 0
    shown = capsys.readouterr().out
    assert "agreed" in shown and "decode-b2-s8" not in shown and shown.endswith("verdict: passed\n")
    bundle = _copy(plain, tmp_path)
    path = bundle / "golden" / "block-decode-0" / "outputs.safetensors"
    arrays = _arrays(path)
    arrays["flags"] = ~arrays["flags"]
    save_tensors(path, arrays)
    assert main(["verify", str(rehash(bundle)), "--with", "jax", "--modules", "block-*"]) == 1
    assert "departed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--with", "tvm"], "--with tvm: expected a list of interpreter, iree"),
        (["--with", "pjrt:/no/such.so"], "--with pjrt:/no/such.so: expected a plugin's shared library"),
        (["--with", ","], "--with : expected a list of interpreter, iree"),
        (["--modules", "x*"], "--modules x*: 'x*': expected a pattern for some of decode-b2-s8"),
    ],
)
def test_wrong_flags_get_one_line(
    plain: Path, capsys: pytest.CaptureFixture[str], flags: list[str], expected: str
) -> None:
    assert main(["verify", str(plain), *flags]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and expected in lines[0]


def test_a_consumer_that_is_not_installed_gets_one_line(
    plain: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("iree", "tpu-aot:v5e:2x2"):
        assert main(["verify", str(plain), "--with", name]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and f"--with {name}: expected" in lines[0]
