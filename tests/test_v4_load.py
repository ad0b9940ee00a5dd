"""V4's files: every kind of storage is held as it is stored, converted as NumPy does, and comes back from Orbax."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from damage import Tensors, edit_json, rewrite
from helpers import V4_SETTINGS
from helpers_sharded import assert_cut
from jax.sharding import Mesh, NamedSharding

from dsjax.checkpoint import load as loading
from dsjax.checkpoint import orbax
from dsjax.checkpoint.load import load, load_plan
from dsjax.checkpoint.names import open_files
from dsjax.checkpoint.safetensors import DTYPES, Files
from dsjax.config import load_config
from dsjax.errors import InputError
from dsjax.numerics import Numerics
from dsjax.parallel import parallel
from dsjax.params import INTEGER, VECTOR, Row, Tree, abstract_params, table, tree_bytes
from dsjax.synth import synth_config, synthesise
from quant import BF16, E2M1, E4M3, INT8, QArray
from sharding import Rules, make_mesh, parse_plan

FP4_VALUES = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
EXPERT = "layers.1.ffn.experts.3.w2.weight"


def read_all(folder: Path) -> Tensors:
    with Files.open(folder) as files:
        return {name: np.array(files.read(name)) for name in files}


def leaf_of(tree: Any, row: Row) -> Any:
    for key in row.path:
        tree = tree[key]
    return tree


def values_of(tensors: Tensors, row: Row, name: str) -> np.ndarray:
    """float32, by NumPy alone: nibbles low first, scales repeated over blocks of 1 x 32 or 128 x 128."""
    codes, scales = tensors[name], tensors.get(row.scale_name(name))
    if scales is None:
        return codes.astype(np.float32)
    scales = (scales.view(DTYPES["F8_E8M0"]) if scales.dtype == np.uint8 else scales).astype(np.float32)
    if codes.dtype in (np.int8, np.uint8):
        nibbles = np.stack([codes.view(np.uint8) & 15, codes.view(np.uint8) >> 4], -1).reshape(codes.shape[0], -1)
        return FP4_VALUES[nibbles] * np.repeat(scales, 32, 1)[:, : nibbles.shape[1]]
    n, k = codes.shape
    return codes.astype(np.float32) * np.repeat(np.repeat(scales, 128, 0), 128, 1)[:n, :k]


def same(a: Tree, b: Tree) -> None:
    """Structure, static data, types and every bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


@pytest.fixture
def model(v4_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(v4_folder, tmp_path / "model"))


@pytest.fixture(scope="module")
def stored(v4_folder: Path) -> Tree:
    return load(v4_folder, mtp=True)[1]


# --- as stored -------------------------------------------------------------------------------------------------------


def test_official_types(v4_folder: Path) -> None:
    """Spec V4 3.1, a tensor of each kind."""
    found = {name: (array.dtype.name, array.shape) for name, array in read_all(v4_folder).items()}
    for name, expected in {
        "embed.weight": ("bfloat16", (320, 64)),
        "hc_head_fn": ("float32", (4, 256)),
        "layers.0.hc_attn_base": ("float32", (24,)),
        "layers.0.attn.attn_sink": ("float32", (4,)),
        "layers.0.attn.wq_b.weight": ("float8_e4m3fn", (64, 24)),
        "layers.0.attn.wq_b.scale": ("float8_e8m0fnu", (1, 1)),
        "layers.0.ffn.gate.tid2eid": ("int64", (320, 2)),
        "layers.2.attn.compressor.ape": ("float32", (4, 32)),
        "layers.3.attn.compressor.wkv.weight": ("bfloat16", (16, 64)),
        "layers.4.attn.indexer.wq_b.weight": ("float8_e4m3fn", (16, 24)),
        "layers.3.ffn.gate.bias": ("float32", (8,)),
        "layers.1.ffn.experts.3.w1.weight": ("int8", (40, 32)),
        "layers.1.ffn.experts.3.w1.scale": ("float8_e8m0fnu", (40, 2)),
        EXPERT: ("int8", (64, 20)),
        "layers.1.ffn.experts.3.w2.scale": ("float8_e8m0fnu", (64, 2)),
        "mtp.0.e_proj.weight": ("float8_e4m3fn", (64, 64)),
        "mtp.0.ffn.gate.bias": ("float32", (8,)),
    }.items():
        assert found[name] == expected, name
    assert "layers.3.ffn.gate.tid2eid" not in found and "layers.0.ffn.gate.bias" not in found


def test_leaves_are_the_files_bytes(v4_folder: Path, stored: Tree) -> None:
    """Codes, scales and bfloat16 bit for bit, FP4 packed; vectors widened, ids narrowed; every tensor used once."""
    tensors, used = read_all(v4_folder), set()
    for row in table(load_config(v4_folder)):
        leaf = leaf_of(stored, row)
        for index, name in row.tensors():
            array, scales = tensors[name], tensors.get(row.scale_name(name))
            used |= {name, row.scale_name(name)} & set(tensors)
            if not isinstance(leaf, QArray):
                assert leaf.dtype == (np.int32 if row.storage == INTEGER else np.float32)
                np.testing.assert_array_equal(leaf[index], array.astype(leaf.dtype))
                continue
            codes = np.asarray(leaf.codes[index])
            np.testing.assert_array_equal(codes.view(np.uint8), array.view(np.uint8))
            kind = {1: E2M1 if array.dtype == np.int8 else E4M3, 2: BF16}[array.dtype.itemsize]
            assert leaf.format == kind and (leaf.scales is None) == (kind == BF16)
            if scales is not None:
                assert leaf.block == ((1, 32) if kind == E2M1 else (128, 128))
                np.testing.assert_array_equal(np.asarray(leaf.scales[index]), scales.view(np.uint8))
    assert used == set(tensors)


def test_mtp_on_request(v4_folder: Path, stored: Tree) -> None:
    without = load(v4_folder)[1]
    assert "mtp" in stored and "mtp" not in without
    same(without, {k: v for k, v in stored.items() if k != "mtp"})
    same(load(v4_folder, mtp=None)[1], stored)


def test_tables_hold_distinct_experts(stored: Tree) -> None:
    ids = np.asarray(stored["hashed"]["table"])
    assert ids.shape == (3, 320, 2) and ids.min() == 0 and ids.max() == 7
    assert (ids[..., 0] != ids[..., 1]).all()
    assert not (ids[0] == ids[1]).all()


# --- other containers ------------------------------------------------------------------------------------------------


def retype(change: Callable[[str, np.ndarray], np.ndarray]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: change(name, array) for name, array in tensors.items()})


def scales_to_f32(name: str, array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if name.endswith(".scale") else array


CONTAINERS: dict[str, Callable[[str, np.ndarray], np.ndarray]] = {
    "U8 scales": lambda name, a: a.view(np.uint8) if name.endswith(".scale") else a,
    "F32 scales": scales_to_f32,
    "F32 scales in one layer": lambda name, a: scales_to_f32(name, a) if name.startswith("layers.1.") else a,
    "U8 codes": lambda name, a: a.view(np.uint8) if a.dtype == np.int8 else a,
    "I32 ids": lambda name, a: a.astype(np.int32) if name.endswith("tid2eid") else a,
    "U8 ids in one layer": lambda name, a: a.astype(np.uint8) if name == "layers.1.ffn.gate.tid2eid" else a,
    "F32 vectors": lambda name, a: a.astype(np.float32) if "norm" in name else a,
    "F32 in one layer": lambda name, a: a.astype(np.float32) if name == "layers.2.ffn.gate.weight" else a,
}


@pytest.mark.parametrize("case", CONTAINERS)
def test_containers(case: str, model: Path, v4_folder: Path, stored: Tree) -> None:
    """The same values; and nothing but what the case is about is held otherwise."""
    rewrite(model, retype(CONTAINERS[case]))
    config, params, _ = load(model, mtp=True)
    differ = {
        row.path
        for row in table(config)
        if jax.tree.map(lambda a: a.dtype, leaf_of(params, row))
        != jax.tree.map(lambda a: a.dtype, leaf_of(stored, row))
    }
    linear = {r.path for r in table(config) if isinstance(q := leaf_of(stored, r), QArray) and q.scales is not None}
    expected = {
        "F32 scales": linear,
        "F32 scales in one layer": {path for path in linear if path[0] == "layers"},
        "F32 in one layer": {("layers", "router", "weight")},
    }
    if case in expected:
        assert differ == expected[case]
    else:
        assert not differ
        same(params, stored)
    same(load(model, weights="float32")[1], load(v4_folder, weights="float32")[1])


def test_scales_that_are_no_powers_of_two(tmp_path: Path) -> None:
    """F32 scales as a config with scale_fmt "float" has them; experts too."""
    settings = {**V4_SETTINGS, "quantization_config.scale_fmt": "float"}
    synthesise(tmp_path / "m", synth_config("deepseek-v4-flash", layers=3, settings=settings))
    tensors = read_all(tmp_path / "m")
    scale = tensors["layers.1.ffn.experts.3.w1.scale"]
    assert scale.dtype == np.float32 and (np.frexp(scale)[0] != 0.5).any()
    config, params, _ = load(tmp_path / "m", weights="float32")
    for row in table(config):
        if row.path == ("layers", "experts", "gate"):
            for index, name in row.tensors():
                np.testing.assert_array_equal(leaf_of(params, row)[index], values_of(tensors, row, name))


def test_base_and_plain_files(tmp_path: Path, v4_folder: Path) -> None:
    """FP8 experts, as the Base models have them, and floats only; the config may say nothing of it, or the wrong."""
    for name, changes in {"base": {"expert_dtype": "fp8"}, "plain": {"quantization_config": None}}.items():
        folder = tmp_path / name
        synthesise(folder, synth_config("deepseek-v4-pro", layers=3, settings=V4_SETTINGS | changes))
        _, params, _ = load(folder)
        kind = E4M3 if name == "base" else BF16
        assert params["layers"]["experts"]["down"].format == params["layers"]["shared"]["down"].format == kind
        edit_json(folder / "config.json", quantization_config=None, expert_dtype="fp4")
        same(load(folder)[1], params)
        (folder / "config.json").write_bytes((folder / "config.json").read_bytes().replace(b'"fp4"', b"null"))
        same(load(folder)[1], params)


def test_what_is_not_read(model: Path, stored: Tree) -> None:
    """Copies of embedding and head, what sees images, and the later stages of a head that drafts blocks."""
    other = np.zeros((2, 2), np.float32)
    names = (
        *("mtp.0.emb.tok_emb.weight", "mtp.0.head.weight", "mtp.1.attn.wq_a.weight", "mtp.2.markov_head.markov_w1"),
        *("mtp.2.confidence_head.proj.weight", "vision.blocks.0.w1.weight", "aligner.w1.weight", "image_start"),
        *("image_newline", "layers.1.ffn.gate.bias_vl", "layers.1.attn.rotary_emb.inv_freq"),
    )
    rewrite(model, lambda tensors: tensors.update(dict.fromkeys(names, other)))
    same(load(model, mtp=True)[1], stored)


def test_block_draft_is_no_mtp_module(model: Path, stored: Tree) -> None:
    def change(tensors: Tensors) -> None:
        for name in [
            n for n in tensors if n.startswith(("mtp.0.e_proj", "mtp.0.h_proj", "mtp.0.enorm", "mtp.0.hnorm"))
        ]:
            del tensors[name]
        tensors["mtp.0.main_proj.weight"] = np.zeros((64, 192), np.float32)
        tensors["mtp.0.main_norm.weight"] = np.zeros(64, np.float32)
        tensors["mtp.1.norm.weight"] = tensors["mtp.2.norm.weight"] = np.zeros(64, np.float32)

    rewrite(model, change)
    edit_json(model / "config.json", num_nextn_predict_layers=3, compress_ratios=[0, 0, 4, 128, 4, 0, 0, 0])
    same(load(model, mtp=None)[1], {k: v for k, v in stored.items() if k != "mtp"})
    with pytest.raises(InputError, match=r"model: expected an MTP module \(mtp.0\), found a head that drafts blocks"):
        load(model, mtp=True)


# --- conversions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_conversions_equal_numpy(weights: str, v4_folder: Path, stored: Tree) -> None:
    """FP4 and FP8 with E8M0 scales are bfloat16 numbers; INT8 leaves the indexer and compressors alone."""
    tensors = read_all(v4_folder)
    config, params, stats = load(v4_folder, mtp=True, weights=weights)
    for row in table(config):
        leaf = leaf_of(params, row)
        never = {"embed", "router", "compressor", "indexer"} & set(row.path)
        if row.storage in (VECTOR, INTEGER, "float32") or (weights == "int8" and never):
            same(leaf, leaf_of(stored, row))
            continue
        for index, name in row.tensors():
            w = values_of(tensors, row, name)
            if weights == "float32":
                np.testing.assert_array_equal(leaf[index], w)
            elif weights == "bfloat16":
                assert leaf.format == BF16
                np.testing.assert_array_equal(np.asarray(leaf.codes[index]).view(ml_dtypes.bfloat16), w)
            else:
                scales = np.maximum(np.abs(w).max(1, keepdims=True) / np.float32(127), np.float32(2.0**-126))
                assert leaf.format == INT8
                np.testing.assert_array_equal(leaf.scales[index], scales)
                np.testing.assert_array_equal(np.asarray(leaf.codes[index]).view(np.int8), np.rint(w / scales))
    with open_files(v4_folder, config) as files:
        kinds = loading.agree(files, config)
    abstract = abstract_params(config, mtp=True, stored=kinds, weights=weights)
    assert jax.tree.structure(abstract) == jax.tree.structure(params)
    plan = load_plan(config, kinds, mtp=True, weights=weights)
    assert tree_bytes(abstract) == tree_bytes(params) == stats.bytes == plan.bytes


@pytest.mark.parametrize("weights", ["stored", "bfloat16", "int8"])
def test_staged_in_place_and_sharded_are_one(weights: str, v4_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small regions and shards that cut rows, packed columns and groups."""
    one = load(v4_folder, weights=weights)[1]
    of_ep = dict.fromkeys(("heads", "experts"), ("ep",))
    of_tp = dict.fromkeys(("expert_ffn", "vocab", "shared_ffn"), ("tp",))

    def split(mesh: Mesh, row: Row, part: str) -> NamedSharding:
        axes = row.logical_axes if part == "codes" else row.logical_axes[:1]
        return NamedSharding(mesh, Rules(of_ep | of_tp, mesh.shape).spec(axes))

    monkeypatch.setattr(loading, "STAGING_BYTES", 3000)
    mesh = make_mesh(parse_plan("ep=2,tp=2"))
    same(load(v4_folder, weights=weights, sharding=partial(split, mesh))[1], one)
    if weights == "stored":
        _, params, stats = load(v4_folder, in_place=False)
        same(params, one)
        assert stats.peak_staging_bytes <= 3000


@pytest.mark.parametrize("weights", ["stored", "float32", "int8"])
@pytest.mark.parametrize(
    ("plan", "attention", "groups"),
    [
        ("tp=4", "heads", "split"),
        ("tp=4", "heads", "gather"),
        ("ep=4,tp=2", "slots", "split"),
        ("ep=2", "heads", "split"),
    ],
)
def test_onto_a_mesh(plan: str, attention: str, groups: str, weights: str, v4_folder: Path, tmp_path: Path) -> None:
    """Twice as many devices as output groups; groups of 32 channels cut to 10 and 20, the short last one, too."""
    config = load_config(v4_folder)
    whole = load(v4_folder, mtp=True, weights=weights)[1]
    meshed = parallel(config, parse_plan(plan), Numerics("plain"), attention=attention, o_groups=groups)
    params = load(v4_folder, mtp=True, weights=weights, sharding=meshed.sharding, cut=meshed.cut)[1]
    finer = assert_cut(params, whole, meshed)
    assert (finer > 0) == (weights == "stored")
    down = params["layers"]["experts"]["down"]
    if weights == "stored":
        assert down.block == {"tp=4": (1, 2), "ep=4,tp=2": (1, 4), "ep=2": (1, 32)}[plan]
    if plan != "ep=2":
        return
    orbax.save(tmp_path / "O", v4_folder, params)
    same(load(tmp_path / "O", mtp=True, sharding=meshed.sharding, cut=meshed.cut)[1], params)


def test_orbax_brings_every_bit_back(v4_folder: Path, tmp_path: Path, stored: Tree) -> None:
    """Packed FP4, E8M0 scales and ids, as stored; and INT8."""
    orbax.save(tmp_path / "stored", v4_folder, stored)
    same(load(tmp_path / "stored", mtp=True)[1], stored)
    eight = load(v4_folder, weights="int8")[1]
    orbax.save(tmp_path / "int8", v4_folder, eight)
    same(load(tmp_path / "int8")[1], eight)
    entries = {e["path"]: e for e in json.loads((tmp_path / "stored" / "dsjax.json").read_text())["leaves"]}
    assert entries["hashed.table"] == {"path": "hashed.table", "shape": [3, 320, 2], "dtype": "int32"}
    assert entries["layers.experts.down"]["format"] == "e2m1" and entries["layers.experts.down"]["block"] == [1, 32]


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("hashed.table", {"dtype": "float32"}),
        ("layers.input_norm", {"dtype": "int32"}),
        ("hashed.table", {"dtype": "int64"}),
    ],
)
def test_orbax_manifest_of_other_types(
    path: str, change: dict[str, str], v4_folder: Path, tmp_path: Path, stored: Tree
) -> None:
    orbax.save(tmp_path / "O", v4_folder, stored)
    manifest = tmp_path / "O" / "dsjax.json"
    data = json.loads(manifest.read_text())
    next(e for e in data["leaves"] if e["path"] == path).update(change)
    manifest.write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"dsjax\.json: .*expected .*found"):
        load(tmp_path / "O")


def test_orbax_ids_out_of_range(v4_folder: Path, tmp_path: Path, stored: Tree) -> None:
    bad = {**stored, "hashed": {"table": stored["hashed"]["table"].at[1, 2, 0].set(8)}}
    orbax.save(tmp_path / "O", v4_folder, bad)
    with pytest.raises(InputError, match=r"hashed\.table: expected ids of experts, below 8"):
        load(tmp_path / "O")
