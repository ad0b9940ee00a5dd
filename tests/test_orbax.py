"""Converted folders: every bit comes back, wherever it is loaded to; every damage is told in one line."""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GOLDENS, SYNTH_SETTINGS, golden, one_shot
from helpers_sharded import assert_cut
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from dsjax.checkpoint import load as loading
from dsjax.checkpoint import orbax
from dsjax.checkpoint.load import load
from dsjax.checkpoint.values import all_finite
from dsjax.cli.main import main
from dsjax.errors import InputError
from dsjax.numerics import Numerics
from dsjax.parallel import parallel
from dsjax.params import LINEAR, Row, Tree, build_tree, leaf_shape, table
from quant import FORMATS, INT8, WHOLE, QArray
from sharding import Rules, make_mesh, parse_plan

Capture = pytest.CaptureFixture[str]


def same(a: Tree, b: Tree) -> None:
    """Structure, static data, types and every bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A golden, converted by the verb once; tests that change it copy it."""
    made: dict[str, Path] = {}
    folder = tmp_path_factory.mktemp("converted")

    def get(name: str) -> Path:
        if name not in made:
            made[name] = folder / name
            assert main(["convert", str(GOLDENS / name), "--to", "orbax", "--out", str(made[name])]) == 0
        return made[name]

    return get


# --- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["v3-fp8-partial", "v3-fp8-e8m0", "v3-bf16", "v3-mtp", "v32-fp8", "qwen2-untied", "qwen2-tied"]
)
def test_every_bit_comes_back(name: str, converted: Callable[[str], Path]) -> None:
    """FP8 with float32 and with E8M0 scales, bfloat16, float32 vectors, MTP module, V3.2's indexers, Qwen2's biases;
    no file but known ones."""
    folder, model = converted(name), golden(name)
    mtp = model.mtp_logits is not None
    config, params, stats = load(folder, mtp=mtp)
    assert config == model.config
    same(params, model.params)
    assert stats.bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "dsjax.json", "params"]
    assert (folder / "config.json").read_bytes() == (GOLDENS / name / "config.json").read_bytes()


def test_logits_are_the_same_bits(converted: Callable[[str], Path]) -> None:
    model = golden("v3-fp8-e8m0")
    _, params, _ = load(converted("v3-fp8-e8m0"))
    again = type(model)(model.folder, model.config, params, model.tokens, model.logits, None)
    base = type(model)(
        model.folder, model.config, {k: model.params[k] for k in params}, model.tokens, model.logits, None
    )
    np.testing.assert_array_equal(one_shot(again, model.tokens)[0], one_shot(base, model.tokens)[0])


def test_mtp_leaves_are_not_read(converted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless they are asked for; None asks where there are some."""
    read: list[str] = []
    original = orbax.Converted.leaf

    def leaf(self: orbax.Converted, row: Row, *args: Any, **kwargs: Any) -> Any:
        read.append(row.path[0])
        return original(self, row, *args, **kwargs)

    monkeypatch.setattr(orbax.Converted, "leaf", leaf)
    _, params, _ = load(converted("v3-mtp"))
    assert "mtp" not in params and "mtp" not in read
    same(params, {k: golden("v3-mtp").params[k] for k in params})
    assert "mtp" in load(converted("v3-mtp"), mtp=None)[1]
    assert "mtp" not in load(converted("v3-bf16"), mtp=None)[1]
    with pytest.raises(InputError, match="expected an MTP module"):
        load(converted("v3-bf16"), mtp=True)


def test_onto_another_mesh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved with experts over eight devices, in small chunks; loaded with other axes split, codes unlike scales."""
    monkeypatch.setattr(orbax, "CHUNK_BYTES", 20_000)
    model = golden("v3-fp8-e8m0")
    before, after = make_mesh(parse_plan("ep=8")), make_mesh(parse_plan("ep=2,tp=4"))

    def saved(row: Row, part: str) -> NamedSharding:
        return NamedSharding(before, Rules({"experts": ("ep",)}, before.shape).spec(row.logical_axes))

    def wanted(row: Row, part: str) -> NamedSharding:
        codes = {"experts": ("ep",), "expert_ffn": ("tp",), "vocab": ("tp",)}
        found = codes if part == "codes" else {"experts": ("ep", "tp")}
        return NamedSharding(after, Rules(found, after.shape).spec(row.logical_axes))

    orbax.save(tmp_path / "O", model.folder, load(model.folder, sharding=saved)[1])
    _, params, stats = load(tmp_path / "O", sharding=wanted)
    same(params, model.params)
    gate = params["moe"]["experts"]["gate"]
    assert {s.data.nbytes for s in gate.codes.addressable_shards} == {gate.codes.nbytes // 8}
    assert {s.data.nbytes for s in gate.scales.addressable_shards} == {gate.scales.nbytes // 8}
    assert stats.bytes > sum(leaf.nbytes for leaf in jax.tree.leaves(params))  # replicas count


@pytest.mark.parametrize(
    ("name", "plan", "attention"),
    [
        ("v3-fp8-partial", "tp=4", "heads"),
        ("v3-fp8-e8m0", "ep=4,tp=2", "slots"),
        ("v4-flash", "tp=4", "heads"),
        ("qwen2-tied", "dp=2,tp=2", "heads"),
    ],
)
def test_onto_shards_that_cut_blocks(
    name: str, plan: str, attention: str, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    """Scales become finer on the devices; saved again so, they come back so, and are cut once more."""
    folder, model = converted(name), golden(name)
    meshed = parallel(model.config, parse_plan(plan), Numerics("plain"), attention=attention)
    _, params, stats = load(folder, mtp=None, sharding=meshed.sharding, cut=meshed.cut)
    finer = assert_cut(params, model.params, meshed)
    assert (finer > 0) == (name != "qwen2-tied")
    assert stats.bytes == sum(s.data.nbytes for a in jax.tree.leaves(params) for s in a.addressable_shards)
    assert stats.needed_bytes <= stats.read_bytes
    if name == "v3-fp8-partial":
        orbax.save(tmp_path / "O", folder, params)
        same(load(tmp_path / "O", mtp=None)[1], params)
        twice = parallel(model.config, parse_plan("tp=2"), Numerics("plain"))
        again = load(tmp_path / "O", mtp=None, sharding=twice.sharding, cut=twice.cut)[1]
        same(again, params)  # already as fine as two devices need
        assert again["dense"]["ffn"]["down"].codes.sharding.mesh.size == 2


def test_scales_per_row_onto_a_mesh(tmp_path: Path) -> None:
    """INT8: where a row is split, each device that holds a part has the row's scale."""
    params = other_format("v3-fp8-partial")
    orbax.save(tmp_path / "O", GOLDENS / "v3-fp8-partial", params)
    meshed = parallel(golden("v3-fp8-partial").config, parse_plan("tp=2"), Numerics("plain"))
    loaded = load(tmp_path / "O", sharding=meshed.sharding, cut=meshed.cut)[1]
    assert assert_cut(loaded, params, meshed) == 0


def other_format(name: str) -> Tree:
    """A golden's tree in another resident format: INT8 with one scale a row, all else float32; one leaf of zeros."""
    random = np.random.default_rng(0)

    def leaf(row: Row) -> Any:
        shape = leaf_shape(row, golden(name).config)
        if row.storage != LINEAR or row.path[-1] == "q_b":
            return jnp.asarray(random.normal(size=shape) * (row.path[-1] != "q_b"), jnp.float32)
        scales = jnp.asarray(random.random((*shape[:-1], 1)), jnp.float32)
        return QArray(jnp.asarray(random.integers(0, 256, shape), jnp.uint8), scales, INT8, (1, WHOLE))

    return build_tree(tuple(r for r in table(golden(name).config) if r.path[0] != "mtp"), leaf)


def test_other_resident_formats(tmp_path: Path) -> None:
    """dsjax.json alone says what the leaves are."""
    params = other_format("v3-fp8-partial")
    orbax.save(tmp_path / "O", GOLDENS / "v3-fp8-partial", params)
    same(load(tmp_path / "O")[1], params)


def test_saving_in_the_background(tmp_path: Path) -> None:
    """The caller may overwrite the arrays at once; the folder appears with `result`, and not before."""
    params = other_format("v3-fp8-partial")
    expected = jax.tree.map(np.array, params)
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0).lower(params).compile()
    saving = orbax.save(tmp_path / "O", GOLDENS / "v3-fp8-partial", params, wait=False)
    jax.block_until_ready(step(params))
    assert not (tmp_path / "O").exists()
    saving.result()
    saving.result()  # again: nothing
    assert [p.name for p in tmp_path.iterdir()] == ["O"]
    same(load(tmp_path / "O")[1], expected)


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2", "e8m0", "bf16", "f16", "f32", "int8"])
def test_all_finite(fmt: str) -> None:
    """Every code of every format, on the host and on the device."""
    dtype = np.dtype(np.float32) if fmt == "f32" else FORMATS[fmt].dtype
    bits = np.dtype(f"uint{8 * dtype.itemsize}")
    codes = np.arange(1 << min(8 * dtype.itemsize, 16), dtype=bits) << (16 if fmt == "f32" else 0)
    finite = np.isfinite(codes.astype(bits).view(dtype).astype(np.float32))
    assert finite.all() == (fmt == "int8")

    def held(values: np.ndarray) -> jax.Array:
        return jnp.asarray(values.astype(bits).view(dtype) if fmt == "f32" else values.astype(bits))

    for on_host in (True, False):
        assert all_finite(held(codes[finite]), fmt, on_host=on_host)
    for code in codes[~finite][:: max(1, (~finite).sum() // 16)]:
        one = np.where(np.arange(300) == 299, code, codes[finite][0])
        assert not all_finite(held(one), fmt)
        assert not all_finite(held(one), fmt, on_host=False)


# --- the command line ------------------------------------------------------------------------------------------------


def test_the_verbs_take_it(tmp_path: Path, capfd: Capture) -> None:
    """Tokenizer files are copied byte for byte; generate takes it; nothing of Orbax's is printed."""
    source, out = tmp_path / "S", tmp_path / "O"
    values = [f"{key}={json.dumps(value)}" for key, value in SYNTH_SETTINGS.items()]
    flags = [part for value in values for part in ("--set", value)]
    assert main(["synth", "deepseek-v3", "--layers", "2", "--out", str(source), *flags]) == 0
    capfd.readouterr()
    assert main(["convert", str(source), "--to", "orbax", "--out", str(out), "--json"]) == 0
    printed, err = capfd.readouterr()
    result = json.loads(printed)
    assert (result["model"], err) == (str(out), "") and result["seconds"] > 0
    copied = {p.name for p in out.iterdir()} - {"params", "dsjax.json"}
    assert copied == {p.name for p in source.iterdir() if "safetensors" not in p.name} >= {"tokenizer.json"}
    for name in copied:
        assert (out / name).read_bytes() == (source / name).read_bytes()

    (source / "encoding" / "folder").mkdir(parents=True)  # as V4's; files in it are copied, folders not
    (source / "encoding" / "encoding_dsv4.py").write_bytes(b"A = 'x'\r\n")
    again = tmp_path / "again"
    assert main(["convert", str(source), "--to", "orbax", "--out", str(again)]) == 0
    assert [p.name for p in (again / "encoding").iterdir()] == ["encoding_dsv4.py"]
    assert (again / "encoding" / "encoding_dsv4.py").read_bytes() == b"A = 'x'\r\n"
    capfd.readouterr()

    assert main(["inspect", str(out), "--check", "--json"]) == 0
    inspected, err = capfd.readouterr()
    assert json.loads(inspected)["bytes"] == result["bytes"] and err == ""
    assert main(["generate", "--model", str(out), "--prompt", "Hello", "--max-new-tokens", "1", "--json"]) == 0
    printed, err = capfd.readouterr()
    assert len(json.loads(printed)["sequences"][0]["output_ids"]) == 1 and err == ""


def refused(capfd: Capture, arguments: list[Any], *names: str) -> None:
    capfd.readouterr()
    status = main([str(a) for a in arguments])
    out, err = capfd.readouterr()
    assert (status, out) == (2, ""), (status, out, err)
    assert err.startswith("dsjax: ") and len(err.splitlines()) == 1 and len(err) < 1500, err
    for name in names:
        assert name in err, f"{name!r} not in {err!r}"


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads((folder / "dsjax.json").read_text())
    change(data)
    (folder / "dsjax.json").write_text(json.dumps(data))


def entry(data: dict[str, Any], path: str = "moe.experts.up") -> dict[str, Any]:
    return next(e for e in data["leaves"] if e["path"] == path)


def truncate(folder: Path) -> None:
    for path in folder.glob("params/state/**/d/*"):
        path.write_bytes(path.read_bytes()[:200])


def same_size(path: Path, text: str) -> None:
    path.write_text(text.ljust(path.stat().st_size))


def garble(folder: Path) -> None:
    for path in folder.glob("params/state/**/d/*"):
        path.write_bytes(bytes(path.stat().st_size))


def without_arrays(folder: Path) -> None:
    for path in folder.glob("params/state/**/d"):
        shutil.rmtree(path)


DAMAGES: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "no params": (lambda f: shutil.rmtree(f / "params"), ("params", "expected a file of", "found none")),
    "no params nor files": (
        lambda f: (shutil.rmtree(f / "params"), edit(f, lambda d: d.update(files={}))),
        ("params", "expected an Orbax checkpoint, found none"),
    ),
    "empty params": (lambda f: (shutil.rmtree(f / "params"), (f / "params").mkdir()), ("params",)),
    "params a file": (lambda f: (shutil.rmtree(f / "params"), (f / "params").touch()), ("params",)),
    "no _METADATA": (lambda f: (f / "params/state/_METADATA").unlink(), ("params",)),
    "bad _METADATA": (lambda f: same_size(f / "params/state/_METADATA", "{"), ("params",)),
    "strange _METADATA": (lambda f: same_size(f / "params/state/_METADATA", '{"tree_metadata": 3}'), ("params",)),
    "no manifest.ocdbt": (lambda f: (f / "params/state/manifest.ocdbt").unlink(), ("params",)),
    "truncated data": (truncate, ("params", "expected", "bytes, found 200")),
    "garbled data": (garble, ("params",)),
    "files": (lambda f: edit(f, lambda d: d.update(files=[])), ("dsjax.json", "files")),
    "strange file": (lambda f: edit(f, lambda d: d["files"].update({"a\0": 1})), ("a", "expected a file of 1 bytes")),
    "no data": (without_arrays, ("params",)),
    "no dsjax.json": (lambda f: (f / "dsjax.json").unlink(), ("dsjax.json", "found none")),
    "bad dsjax.json": (lambda f: (f / "dsjax.json").write_text("{"), ("dsjax.json",)),
    "a list": (lambda f: (f / "dsjax.json").write_text("[]"), ("dsjax.json", "list")),
    "version": (lambda f: edit(f, lambda d: d.update(version=2)), ("dsjax.json", "expected version 1", "'2'")),
    "no leaves": (lambda f: edit(f, lambda d: d.pop("leaves")), ("dsjax.json", "leaves")),
    "leaf a string": (lambda f: edit(f, lambda d: d["leaves"].append("x")), ("dsjax.json", '"x"')),
    "leaf missing": (lambda f: edit(f, lambda d: d["leaves"].remove(entry(d))), ("moe.experts.up", "found none")),
    "leaf twice": (lambda f: edit(f, lambda d: d["leaves"].append(entry(d))), ("moe.experts.up", "found two")),
    "unknown leaf": (
        lambda f: edit(f, lambda d: d["leaves"].append({"path": "x.y", "shape": [2], "dtype": "float32"})),
        ("x.y", "no such parameter"),
    ),
    "unknown format": (lambda f: edit(f, lambda d: entry(d).update(format="e3m4")), ("moe.experts.up", "e3m4")),
    "block": (lambda f: edit(f, lambda d: entry(d).update(block=[-1, 128])), ("moe.experts.up", "block")),
    "block is no pair": (lambda f: edit(f, lambda d: entry(d).update(block=128)), ("moe.experts.up",)),
    "another block": (lambda f: edit(f, lambda d: entry(d).update(block=[1, 0])), ("moe.experts.up", "scales")),
    "codes": (lambda f: edit(f, lambda d: entry(d).update(codes="float8")), ("moe.experts.up", "float8")),
    "scales": (lambda f: edit(f, lambda d: entry(d).update(scales="uint8")), ("moe.experts.up", "scales", "uint8")),
    "shape": (lambda f: edit(f, lambda d: entry(d).update(shape=[1, 2, 3])), ("moe.experts.up", "[1, 2, 3]")),
    "huge shape": (lambda f: edit(f, lambda d: entry(d, "embed").update(shape=[1 << 60, 9])), ("embed",)),
    "no shape": (lambda f: edit(f, lambda d: entry(d, "embed").update(shape=[])), ("embed", "shape")),
    "vector": (
        lambda f: edit(f, lambda d: entry(d, "moe.input_norm").update(format="bf16", block=[1, 0], codes="uint16")),
        ("moe.input_norm", "expected float32", "bf16"),
    ),
    "dtype": (lambda f: edit(f, lambda d: entry(d, "norm").update(dtype="int32")), ("norm", "int32")),
}


LATE = {"garbled data", "bad _METADATA", "strange _METADATA", "another block", "scales"}
"""Damages that only the reading of an array shows."""


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage(damage: str, converted: Callable[[str], Path], tmp_path: Path, capfd: Capture) -> None:
    folder = Path(shutil.copytree(converted("v3-fp8-partial"), tmp_path / "O"))
    change, names = DAMAGES[damage]
    change(folder)
    refused(capfd, ["generate", "--model", folder, "--prompt-ids", "1,2", "--max-new-tokens", "2"], *names)
    if damage in LATE:  # told once per array; `test_another_checkpoint` sees to that
        return
    assert main(["inspect", str(folder), "--check"]) == 1
    err = capfd.readouterr().err
    for name in names:
        assert name in err


def test_another_checkpoint(converted: Callable[[str], Path], tmp_path: Path, capfd: Capture) -> None:
    """Arrays unlike dsjax.json: told by load and --check. A dsjax.json unlike the config: told at once."""
    folder = Path(shutil.copytree(converted("v3-fp8-partial"), tmp_path / "O"))
    shutil.rmtree(folder / "params")
    shutil.copytree(converted("v3-fp8-e8m0") / "params", folder / "params")
    edit(folder, lambda d: d.update(files={}))
    refused(capfd, ["bench", "--model", folder], "params: array embed.codes: expected uint16")
    assert main(["inspect", str(folder), "--check", "--json"]) == 1
    assert len(json.loads(capfd.readouterr().out)["problems"]) > 10
    shutil.copy(converted("v3-fp8-e8m0") / "dsjax.json", folder / "dsjax.json")
    refused(capfd, ["inspect", folder], "dsjax.json", "parameter", "expected")


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        (
            "moe.experts.up",
            {"format": "f16", "codes": "uint16"},
            "moe.experts.up.codes: expected uint16 .* found uint8",
        ),
        ("head", {"scales": "uint8"}, "head.scales: expected uint8 .* found none"),
    ],
)
def test_another_type(
    path: str, change: dict[str, str], message: str, converted: Callable[[str], Path], tmp_path: Path
) -> None:
    """Arrays that dsjax.json describes as what they are not; Orbax by itself would convert them."""
    folder = Path(shutil.copytree(converted("v3-fp8-e8m0"), tmp_path / "O"))
    edit(folder, lambda d: entry(d, path).update(change))
    with pytest.raises(InputError, match=message):
        load(folder)


@pytest.mark.parametrize(("part", "in_place"), [("codes", True), ("scales", False)])
def test_nan(part: str, in_place: bool, tmp_path: Path, capfd: Capture) -> None:
    model = golden("v3-fp8-e8m0")
    q = model.params["moe"]["experts"]["down"]
    bad = np.array(getattr(q, part))
    bad[0, 1, -1, -1] = 0xFF
    spoilt = dataclasses.replace(q, **{part: jnp.asarray(bad)})
    experts = model.params["moe"]["experts"] | {"down": spoilt}
    orbax.save(tmp_path / "O", model.folder, model.params | {"moe": model.params["moe"] | {"experts": experts}})
    with pytest.raises(InputError, match=f"moe.experts.down.{part}: expected finite"):
        load(tmp_path / "O", in_place=in_place)
    assert main(["inspect", str(tmp_path / "O"), "--check", "--json"]) == 1
    assert len(json.loads(capfd.readouterr().out)["problems"]) == 1


@pytest.mark.parametrize("sharded", [False, True])
def test_nothing_else_is_printed(
    sharded: bool, converted: Callable[[str], Path], tmp_path: Path, capfd: Capture
) -> None:
    """Where many reads fail at once, too: Orbax's later errors have nobody to answer to."""
    folder = Path(shutil.copytree(converted("v3-fp8-e8m0"), tmp_path / "O"))
    garble(folder)
    mesh = make_mesh(parse_plan("ep=8"))
    split = NamedSharding(mesh, PartitionSpec("ep"))
    for _ in range(3):
        with pytest.raises(InputError, match=r"embed\.codes"):
            load(folder, sharding=split if sharded else None)
    assert capfd.readouterr() == ("", "")


# --- saving that fails -----------------------------------------------------------------------------------------------


def test_out_exists(tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told before anything is loaded."""
    monkeypatch.setattr(loading, "load_config", None)
    (tmp_path / "O").mkdir()
    (tmp_path / "O" / "mine").touch()
    refused(capfd, ["convert", GOLDENS / "v3-bf16", "--to", "orbax", "--out", tmp_path / "O"], str(tmp_path / "O"))
    assert [p.name for p in (tmp_path / "O").iterdir()] == ["mine"]


def test_bad_flags(tmp_path: Path, capfd: Capture) -> None:
    out = tmp_path / "O"
    refused(capfd, ["convert", GOLDENS / "v3-bf16", "--to", "pickle", "--out", out], "--to", "pickle", "orbax")
    refused(capfd, ["convert", GOLDENS / "v3-bf16", "--out", out], "--to")
    refused(capfd, ["convert", GOLDENS / "v3-bf16", "--to", "orbax"], "--out")
    refused(capfd, ["convert", tmp_path / "none", "--to", "orbax", "--out", out], "none")
    (tmp_path / "file").touch()
    refused(capfd, ["convert", GOLDENS / "v3-bf16", "--to", "orbax", "--out", tmp_path / "file" / "O"], "file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_disk_full(tmp_path: Path, capfd: Capture) -> None:
    """Half-way through the data files (as far as a process can have that alone): one line, and nothing remains."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        refused(capfd, ["convert", GOLDENS / "v3-fp8-e8m0", "--to", "orbax", "--out", tmp_path / "O"], "O", "written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(InputError, match="free on the disk, found 1,000"):
        orbax.save(tmp_path / "O", GOLDENS / "v3-bf16", golden("v3-bf16").params)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wait", [True, False])
def test_interrupted(wait: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the writers work: they are waited for, then everything goes."""
    from orbax.checkpoint.experimental.v1._src.saving import execution

    calls, original = [], execution._SaveResponse.result

    def result(self: Any, timeout: float | None = None) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        original(self, timeout)

    monkeypatch.setattr(execution._SaveResponse, "result", result)
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        saving = orbax.save(tmp_path / "O", GOLDENS / "v3-bf16", golden("v3-bf16").params, wait=wait)
        saving.result()
    assert len(calls) == 2
    assert list(tmp_path.iterdir()) == []


def test_trees_that_are_no_parameters(tmp_path: Path) -> None:
    params = other_format("v3-fp8-partial")
    device = SingleDeviceSharding(jax.devices()[0])
    for change, message in (
        ({"norm": jax.device_put(jnp.zeros((3,)), device)}, "norm: expected"),
        ({"norm": params["norm"].astype(jnp.bfloat16)}, "bfloat16"),
        ({"extra": params["norm"]}, "extra: expected no such parameter"),
    ):
        with pytest.raises(InputError, match=message):
            orbax.save(tmp_path / "O", GOLDENS / "v3-fp8-partial", params | change)
    assert list(tmp_path.iterdir()) == []
