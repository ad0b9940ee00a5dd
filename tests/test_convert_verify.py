"""What --verify finds: every line of a certificate that is not so, whoever forged it, and files that do not fit it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import Capture
from helpers import SYNTH_SETTINGS, rng

from dsjax.checkpoint.safetensors import Files, read_tensors
from dsjax.cli.main import main
from dsjax.convert import TARGETS, Options, convert, verify
from dsjax.convert.hashing import hash_file
from dsjax.convert.targets import Encoding
from dsjax.convert.verify import _saturated
from dsjax.synth import synth_config, synthesise

Made = dict[str, Any]
ATTENTION = "model.layers.0.self_attn.o_proj.weight"


def poked(folder: Path, name: str, data: bytes) -> None:
    """Overwrites the first bytes of a tensor."""
    with Files.open(folder) as files:
        tensor = files[name]
    with tensor.path.open("r+b") as file:
        file.seek(tensor.offset)
        file.write(data)


def certified(folder: Path, change: Callable[[Made], object]) -> None:
    """Forges a certificate, with right hashes of all that lies there."""
    path = folder / "certificate.json"
    made = json.loads(path.read_text())
    for name in made["result"]["files"]:
        tensors = read_tensors(folder / name) if name.endswith(".safetensors") and "/" not in name else []
        found = hash_file(folder / name, tensors)
        made["result"]["tensors"] |= found.pop("tensors")
        made["result"]["files"][name] = found
    change(made)
    path.write_text(json.dumps(made))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A V3 checkpoint of two layers, with some values that float16 does not hold."""
    folder = tmp_path_factory.mktemp("source") / "model"
    synthesise(folder, synth_config("deepseek-v3", layers=2, settings=SYNTH_SETTINGS))
    poked(folder, f"{ATTENTION}_scale_inv", np.float32(500.0).tobytes())
    return folder


@pytest.fixture(scope="module")
def result(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its attention in float16, the rest kept."""
    out = tmp_path_factory.mktemp("result") / "out"
    convert(source, out, Options(TARGETS["f16"], "*self_attn*"))
    return out


@pytest.fixture
def copy(result: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(result, tmp_path / "copy"))


@pytest.mark.parametrize("to", ["bf16", "f16", "f32", "fp8-ue8m0", "int8-channel", "int8-block", "int4-group"])
def test_as_certified(source: Path, tmp_path: Path, to: str) -> None:
    """Numbers of saturated values and reasons among what is found anew."""
    convert(source, tmp_path / "out", Options(TARGETS[to]))
    made = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert (made["summary"]["linear"]["saturated"] > 0) == (to == "f16")
    assert verify(tmp_path / "out", source) == []


@pytest.mark.parametrize("name", ["e4m3", "e2m1", "int8", "int4", "f16", "bf16"])
def test_saturated(name: str) -> None:
    """As many as have a magnitude nearer to the next number, had the format one more; ties are even."""
    top, next_one, even = {
        "e4m3": (448, 480, True),
        "e2m1": (6, 8, False),
        "int8": (127, 128, False),
        "int4": (7, 8, False),
        "f16": (65504, 65536, False),
        "bf16": (255 * 2.0**120, 2.0**128, False),
    }[name]
    middle = np.float32((top + next_one) / 2)
    values = np.array([[top, np.nextafter(middle, np.float32(0)), -middle, np.nextafter(middle, np.float32(np.inf))]])
    scales = None if name in ("f16", "bf16") else np.float32([[0.25]])
    values = values.astype(np.float32) * (1 if scales is None else scales)
    assert _saturated(values, Encoding(name), scales) == (1 if even else 2)


FORGED: dict[str, tuple[Callable[[Made], object], str]] = {
    "exact": (lambda c: c.update(exact=True), "exact True (certified) and False"),
    "summary": (lambda c: c.update(summary={}), "summary {} (certified)"),
    "summary's count": (lambda c: c["summary"]["linear"].update(exact=1), "summary"),
    "saturated": (lambda c: c["tensors"][ATTENTION].update(saturated=1), "saturated 1 (certified)"),
    "saturated, of many": (lambda c: c["tensors"]["lm_head.weight"].update(saturated=5), "saturated 5 (certified)"),
    "reasons": (lambda c: c["tensors"][ATTENTION].update(reasons=[]), "reasons [] (certified)"),
    "huge": (lambda c: c["tensors"][ATTENTION].update(max_abs_error=10**400), "max_abs_error"),
    "true": (lambda c: c["tensors"]["lm_head.weight"].update(exact=1), "exact 1 (certified) and True"),
    "no fields": (lambda c: c["tensors"].update({ATTENTION: {}}), ATTENTION),
    "only": (lambda c: c.update(only="*.mlp.*"), ATTENTION),
    "to": (lambda c: c.update(to="int8-channel"), "expected"),
    "to bf16": (lambda c: c.update(to="bf16"), f"tensor {ATTENTION}: expected bfloat16"),
    "tensor's hash": (lambda c: c["result"]["tensors"].update({"lm_head.weight": "0"}), "lm_head.weight"),
    "hash of nothing": (lambda c: c["result"]["tensors"].update(other="0"), "tensor other"),
    "size": (lambda c: c["result"]["files"]["config.json"].update(bytes=1), "config.json"),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged(name: str, source: Path, copy: Path) -> None:
    assert verify(copy, source) == []
    change, expected = FORGED[name]
    certified(copy, change)
    problems = verify(copy, source)
    assert any(expected in line for line in problems), problems
    assert not any("\n" in line for line in problems)


@pytest.mark.parametrize("end", ["weight", "weight_scale_inv"])
def test_kept(end: str, source: Path, copy: Path) -> None:
    """Codes and scales that were to be kept, changed and hashed anew."""
    name = f"model.layers.0.mlp.up_proj.{end}"
    with Files.open(source) as files:
        first = files.read(name).tobytes()[0]
    poked(copy, name, bytes([first ^ 1]))
    certified(copy, lambda made: None)
    (line,) = verify(copy, source)
    assert f"tensor {name}: expected the source's bytes" in line


MALFORMED: dict[str, tuple[Callable[[Made], object], str]] = {
    "source": (lambda c: c.update(source=[1]), "'source'"),
    "no tensors": (lambda c: c["result"].pop("tensors"), "'result'"),
    "file": (lambda c: c["result"]["files"].update({"config.json": 3}), "'result'"),
    "hash": (lambda c: c["result"]["files"].update({"config.json": {"bytes": 3, "sha256": 3}}), "'result'"),
    "only": (lambda c: c.update(only=3), "'only'"),
    "names": (lambda c: c.update(names=["hf"]), "'names'"),
    "entry": (lambda c: c["tensors"].update({ATTENTION: 3}), "'tensors'"),
    "to": (lambda c: c.update(to=[1]), "'to'"),
    "version": (lambda c: c.update(version=[2]), "'version'"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(name: str, copy: Path, capsys: Capture) -> None:
    """One line, status 2."""
    change, expected = MALFORMED[name]
    certified(copy, change)
    assert main(["convert", "--verify", str(copy)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and "certificate.json" in err and expected in err


def test_anything_in_the_result(source: Path, tmp_path: Path) -> None:
    """Bytes of all sorts where codes and scales should be: problems, no errors."""
    out = tmp_path / "out"
    convert(source, out, Options(TARGETS["fp8-ue8m0"]))
    for name in (ATTENTION, f"{ATTENTION}_scale_inv"):
        with Files.open(out) as files:
            size = files[name].nbytes
        for data in (bytes(size), b"\xff" * size, rng(830).bytes(size), np.full(size // 4, np.inf, "<f4").tobytes()):
            poked(out, name, data)
            certified(out, lambda made: None)
            assert any(ATTENTION in line for line in verify(out, source))
