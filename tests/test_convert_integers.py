"""INT8 and INT4 checkpoints as sources: pairs judged by the oracle, results loaded, others refused."""

from __future__ import annotations

import json
import shutil
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
from conversion_oracle import check_certificate, values
from damage import refused, rewrite
from helpers import DENSE_SETTINGS, GOLDENS, V4_SETTINGS, V32_SETTINGS, rng
from helpers_integers import KINDS, bfloat16, integer_checkpoint
from test_convert_load import made, tensors

from dsjax.checkpoint.load import load
from dsjax.config import IntegerQuantization, load_config
from dsjax.convert import TARGETS, verify
from dsjax.convert.plan import CARRIED
from dsjax.params import EXPERT, LINEAR, leaves, table
from dsjax.synth import synth_config, synthesise

INTEGERS = ("int8-channel", "int8-block", "int4-group")
V3 = GOLDENS / "v3-fp8-partial"
ALIKE = {"int4-group": ("int4-group", "w4a8")}
"""Targets that keep a source's tensors, where they are not itself alone."""


@lru_cache
def plain(family: str) -> Path:
    """A checkpoint in DeepSeek's formats; widths are no multiples of blocks and groups."""
    if family == "v3":
        return V3
    preset, settings = {
        "v4": ("deepseek-v4-flash", {**V4_SETTINGS, "n_routed_experts": 3}),
        "v32": ("deepseek-v3.2", {**V32_SETTINGS, "num_nextn_predict_layers": 0}),
        "dense": ("deepseek-r1-distill-qwen-1.5b", DENSE_SETTINGS | {"intermediate_size": 264}),
    }[family]
    folder = Path(mkdtemp(prefix="dsjax-convert-")) / family
    synthesise(folder, synth_config(preset, layers=1 if family == "dense" else 3, settings=settings), template=preset)
    return folder


@lru_cache
def source(family: str, form: str) -> Path:
    """The same in integers, by `convert`."""
    out = Path(mkdtemp(prefix="dsjax-convert-")) / form
    made(plain(family), out, form)
    return out


def _edges(tensors_: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    """Every code that a file can hold, also those that are never written here, -128 and -8."""
    for name, array in tensors_.items():
        if array.dtype == np.int8:
            array.flat[:2] = -128, 127
        elif array.dtype == np.int32:
            array[:, 0] = rng(810).integers(-(1 << 31), 1 << 31, len(array), dtype=np.int64).astype(np.int32)
            assert name.endswith("_packed")


@lru_cache
def foreign(kind: str, scales: str = "float32") -> Path:
    """As others write it: no `quantization_status`, no index, other scales, mixed formats."""
    out = Path(mkdtemp(prefix="dsjax-convert-")) / kind
    dtype = {"float32": np.float32, "float16": np.float16, "bfloat16": bfloat16()}[scales]
    integer_checkpoint(V3, out, kind, scales=dtype, change=_edges)
    return out


def judged(folder: Path, out: Path, to: str, **more: Any) -> dict[str, Any]:
    certificate = made(folder, out, to, **more)
    assert check_certificate(folder, out) == []
    assert not (out / CARRIED).exists()
    return certificate


def check_loaded(out: Path) -> None:
    """The loader finds the values that the oracle does, each rounded to float32 once."""
    config, params, _ = load(out, weights="float32")
    for row, leaf in leaves(params, config):
        if row.storage in (LINEAR, EXPERT):
            found = np.asarray(leaf)
            for index, name in row.tensors():
                np.testing.assert_array_equal(found[index], np.float32(values(out, name)), err_msg=name)


def quantised(certificate: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for one in certificate["tensors"].values() if one["class"] in ("linear", "expert")]


# --- pairs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", INTEGERS)
@pytest.mark.parametrize("family", ["v3", "v4", "dense", pytest.param("v4-all", marks=pytest.mark.full)])
def test_every_target(family: str, form: str, tmp_path: Path) -> None:
    """Hashes, formats, names, exactness and errors of every tensor; what has the format already is not touched."""
    targets = [to for to in TARGETS if to != "mxfp4"]
    if "v4" in family:
        targets = list(TARGETS) if family == "v4-all" else ["mxfp4", "fp8", form]
        family = "v4"
    folder = source(family, form)
    before = tensors(folder)
    for to in targets:
        certificate = judged(folder, tmp_path / to, to)
        kept = to in ALIKE.get(form, (form,))
        assert {one["action"] for one in quantised(certificate)} == {"kept" if kept else "converted"}
        assert certificate["exact"] == (kept or to == "f32" or (form, to, family) in F16_EXACT), to
        assert (tensors(tmp_path / to) == before) == kept
        assert any(name.endswith("_shape") for name in tensors(tmp_path / to)) == (to in ALIKE["int4-group"])
        if to in LOADED and family != "dense":
            check_loaded(tmp_path / to)
        config = load_config(tmp_path / to)
        assert isinstance(config.quantization, IntegerQuantization) == (TARGETS[to].kind == "int")
        assert (config.quantization is None) == (TARGETS[to].kind == "float")


LOADED = ("bf16", "fp8", "mxfp4", "int8-block", "w4a8")
F16_EXACT = {("int4-group", "f16", family) for family in ("v3", "dense")}
"""Codes of three bits times bfloat16's eight; V4's experts are too small for float16."""


@pytest.mark.parametrize("kind", KINDS)
def test_foreign(kind: str, tmp_path: Path) -> None:
    """All codes, formats side by side, scales of three types; into fewer formats, one at a time."""
    for scales, to in (("bfloat16", "bf16"), ("float16", "fp8-ue8m0"), ("float32", "w4a8"), ("float16", "int8-block")):
        folder, out = foreign(kind, scales), tmp_path / to
        certificate = judged(folder, out, to)
        found = {one["source"]["format"] for one in quantised(certificate)}
        assert found == ({"int8"} if "int8" in kind else {"int4", "int8"} if "mixed" in kind else {"int4"})
        assert {one["source"]["scales"] for one in quantised(certificate)} == {
            {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[scales]
        }
        check_loaded(out)


@pytest.mark.parametrize(("kind", "to"), [("int8-channel", "int8-channel"), ("w4a8", "int4-group")])
def test_other_scales_are_kept(kind: str, to: str, tmp_path: Path) -> None:
    """The format asked for, with scales in float16: byte for byte, codes -128 and -8 included."""
    certificate = judged(foreign(kind, "float16"), tmp_path / "out", to)
    assert certificate["exact"] and tensors(tmp_path / "out") == tensors(foreign(kind, "float16"))
    check_loaded(tmp_path / "out")


def test_w8a8_int8(tmp_path: Path) -> None:
    """SGLang's, which names no layers: tensors of `int8-channel`, described anew; V3.2's indexer too."""
    folder = tmp_path / "source"
    made(plain("v32"), folder, "int8-channel")
    path = folder / "config.json"
    data = json.loads(path.read_text())
    ignored = data["quantization_config"]["ignore"]
    data["quantization_config"] = {"quant_method": "w8a8_int8", "ignore": ignored}
    path.write_text(json.dumps(data))
    (folder / "certificate.json").unlink()
    judged(folder, tmp_path / "same", "int8-channel")
    assert tensors(tmp_path / "same") == tensors(folder)
    assert load_config(tmp_path / "same").quantization == load_config(source("v32", "int8-channel")).quantization
    judged(folder, tmp_path / "fp8", "fp8")
    check_loaded(tmp_path / "fp8")


def test_names(tmp_path: Path) -> None:
    """V4 to Hugging Face's modules and back, kept or converted; stacks of integers have no names."""
    int8 = source("v4", "int8-channel")
    made(int8, tmp_path / "plain", "bf16")
    made(int8, tmp_path / "hf", "bf16", names="hf")
    made(tmp_path / "hf", tmp_path / "back", "bf16", names="official")
    assert tensors(tmp_path / "back") == tensors(tmp_path / "plain")
    judged(source("v4", "int4-group"), tmp_path / "same", "w4a8", names="official")
    assert tensors(tmp_path / "same") == tensors(source("v4", "int4-group"))


def test_unused_codes_are_carried(tmp_path: Path) -> None:
    """The shape of packed codes that nobody runs, a later draft's, stays beside them."""
    folder = Path(shutil.copytree(source("v4", "int4-group"), tmp_path / "source"))
    draft = "mtp.1.attn.wq_a.weight_"
    extra = {"packed": np.ones((4, 2), np.int32), "scale": np.ones((4, 1), bfloat16()), "shape": np.int64([4, 16])}
    rewrite(folder, lambda found: found.update({draft + name: array for name, array in extra.items()}))
    made(folder, tmp_path / "out", "bf16")
    after = tensors(tmp_path / "out")
    assert {n for n in after if ".weight_" in n} == {draft + name for name in extra}
    assert all(after[n] == tensors(folder)[n] for n in after if n.startswith(draft))


# --- a part ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8-block", "w4a8-mixed"])
def test_only_to_floats(kind: str, tmp_path: Path) -> None:
    """What becomes floats is added to what the source's config leaves alone; the rest is as it was."""
    folder, out = foreign(kind), tmp_path / "out"
    certificate = judged(folder, out, "bf16", only="*.experts.*")
    assert {one["class"] for one in quantised(certificate) if one["action"] == "converted"} <= {"linear", "expert"}
    before, after = (json.loads((f / "config.json").read_text())["quantization_config"] for f in (folder, out))
    key = "ignored_layers" if kind == "int8-block" else "ignore"
    assert set(after[key]) - set(before[key]) == {n.removesuffix(".weight") for n in values_of(folder, ".experts.")}
    assert {k: v for k, v in after.items() if k != key} == {k: v for k, v in before.items() if k != key}
    check_loaded(out)
    held = {row.path: leaf for row, leaf in leaves(load(out)[1], load_config(out))}
    assert held["moe", "attention", "o"].format.name == "int8" and held["moe", "experts", "up"].format.name == "bf16"


def values_of(folder: Path, part: str) -> list[str]:
    """Names of weights that are linear layers and have `part` in theirs."""
    rows = table(load_config(folder))
    return [n for row in rows if row.storage in (LINEAR, EXPERT) for _, n in row.tensors() if part in n]


def test_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line that names the flag, the tensor, what is there; nothing is left behind."""
    int8, block = source("v3", "int8-channel"), source("v3", "int8-block")

    def fails(folder: Path, to: str, *names: str, **flags: str) -> None:
        more = [x for name, value in flags.items() for x in (f"--{name}", value)]
        refused(capsys, ["convert", folder, "--to", to, "--out", tmp_path / "out", *more], *names)
        assert not list(tmp_path.glob("*out*"))

    fails(int8, "fp8", "--only", "e4m3 and int8", only="*.mlp.*")
    fails(int8, "w4a8", "--only", "int4 and int8", only="*.experts.*")
    fails(block, "int8-channel", "--only", "int8-block in model.", "calls int8", only="*.mlp.*")
    fails(int8, "bf16", "--only", "alike", only="*.experts.1.*")
    fails(int8, "bf16", "--only", "gate and up", only="*.experts.*.gate_proj.*")
    fails(int8, "mxfp4", "--to mxfp4", "deepseek_v4")
    fails(source("v4", "int8-channel"), "int8-channel", "stack", "--names official", names="hf")
    damaged = tmp_path / "damaged"
    integer_checkpoint(V3, damaged, "int4-group", change=lambda t, _: t.pop("model.layers.0.mlp.up_proj.weight_shape"))
    fails(damaged, "bf16", "model.layers.0.mlp.up_proj.weight_shape", "found none")
    lone = tmp_path / "lone"
    integer_checkpoint(V3, lone, "int8-channel", change=_lone_shape)
    fails(lone, "bf16", "o_proj.weight_shape", "no such tensor")
    nan = tmp_path / "nan"
    integer_checkpoint(V3, nan, "int8-channel", change=_nan)
    refused(capsys, ["convert", nan, "--to", "bf16", "--out", tmp_path / "out"], "o_proj.weight_scale", "finite")
    other = tmp_path / "other"
    integer_checkpoint(V3, other, "int8-channel", change=lambda _, c: c["quantization_config"].update(format="int4"))
    refused(capsys, ["convert", other, "--to", "bf16", "--out", tmp_path / "out2"], "format", "int4")


def _lone_shape(tensors_: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    tensors_["model.layers.0.self_attn.o_proj.weight_shape"] = np.zeros(2, np.int64)


def _nan(tensors_: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    tensors_["model.layers.1.self_attn.o_proj.weight_scale"][3] = np.nan


def test_verify_finds_changes(tmp_path: Path) -> None:
    """With the source at hand: a scale of it, a code of the result, a verdict."""
    folder, out = Path(tmp_path / "source"), tmp_path / "out"
    integer_checkpoint(V3, folder, "w4a8-mixed")
    made(folder, out, "fp8")
    path = out / "certificate.json"
    text = path.read_text()
    said = json.loads(text)
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    assert said["tensors"][name]["source"]["format"] == "int4"
    said["tensors"][name]["max_abs_error"] *= 2
    path.write_text(json.dumps(said))
    assert any(name in line and "max_abs_error" in line for line in verify(out, folder))
    path.write_text(text)
    assert not verify(out, folder)

    def change(found: dict[str, np.ndarray]) -> None:
        found["model.layers.1.mlp.experts.0.up_proj.weight_packed"].view(np.uint8)[0, 0] ^= 1

    rewrite(folder, change)
    assert any("source" in line for line in verify(out, folder))
