"""Resident formats: what `--weights` makes of a checkpoint, bit for bit; and what that does to logits."""

from __future__ import annotations

import json
import shutil
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import emulator as em
import jax
import ml_dtypes
import numpy as np
import pytest
from helpers import (
    GOLDENS,
    SEED,
    SYNTH_SETTINGS,
    Golden,
    emulated,
    golden,
    one_shot,
    one_shot_draft,
    relative_norm,
    rng,
    worst,
)
from jax.sharding import Mesh, NamedSharding

from dsjax import bandwidth
from dsjax.checkpoint import load as loading
from dsjax.checkpoint.agreement import agree
from dsjax.checkpoint.load import STAGING_BYTES, load, load_plan
from dsjax.checkpoint.resident import Source, fill, new_scales
from dsjax.checkpoint.safetensors import Files
from dsjax.cli.main import main
from dsjax.config import load_config
from dsjax.errors import InputError
from dsjax.numerics import Numerics
from dsjax.params import (
    LINEAR,
    VECTOR,
    WEIGHTS,
    Row,
    Stored,
    abstract_params,
    is_mtp,
    official_storage,
    table,
    tree_bytes,
)
from dsjax.synth import synth_config, synthesise
from quant import BF16, E4M3, F16, INT4, INT8, WHOLE, QArray, dequantise, quantise
from sharding import Rules, make_mesh, parse_plan

CONVERTED = ("float32", "bfloat16", "float16", "int8", "w8a8", "w4a8")
TINY = np.float32(2.0**-126)

Parts = dict[str, np.ndarray]


@lru_cache
def held(name: str, weights: str) -> Any:
    """(parameters, stats) of a golden, its MTP module included where it has one."""
    return load(GOLDENS / name, mtp=_has_mtp(name), weights=weights)[1:]


def _has_mtp(name: str) -> bool:
    return bool(load_config(GOLDENS / name).num_nextn_predict_layers)


def _rows(name: str) -> list[Row]:
    return [r for r in table(load_config(GOLDENS / name)) if r.copy_of is None]


def _leaf(tree: Any, row: Row) -> Any:
    for key in row.path:
        tree = tree[key]
    return tree


def _assert_same(a: Any, b: Any) -> None:
    """Equal trees, to the bit and to the formats."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x.view(np.uint8), y.view(np.uint8))


# --- leaves ----------------------------------------------------------------------------------------------------------


def numpy_convert(w: np.ndarray, weights: str) -> Parts:
    """float32 [N, K] as each format holds it."""
    if weights == "float32":
        return {"codes": w}
    if weights in ("bfloat16", "float16"):
        return {"codes": w.astype(ml_dtypes.bfloat16 if weights == "bfloat16" else np.float16).view(np.uint16)}
    if weights == "int4":
        groups = range(0, w.shape[1], 128)
        amax = np.stack([np.abs(w[:, i : i + 128]).max(1) for i in groups], axis=1)
        scales = np.maximum(amax / np.float32(7), TINY)
        codes = np.rint(w / np.repeat(scales, 128, 1)[:, : w.shape[1]]).astype(np.int8).view(np.uint8)
        return {"codes": codes[:, 0::2] & 15 | codes[:, 1::2] << 4, "scales": scales}
    if weights == "fp8":
        scales = _block_amax(w) / np.float32(448)
        codes = np.clip(w / np.kron(scales, np.ones((128, 128), np.float32))[: w.shape[0], : w.shape[1]], -448, 448)
        return {"codes": codes.astype(ml_dtypes.float8_e4m3fn).view(np.uint8), "scales": scales}
    scales = np.maximum(np.abs(w).max(1, keepdims=True) / np.float32(127), TINY)
    return {"codes": np.rint(w / scales).astype(np.int8).view(np.uint8), "scales": scales}


def _block_amax(w: np.ndarray) -> np.ndarray:
    """max |w| of 128 x 128 blocks, those at the edges cut short; at least 1e-4."""
    (n, k), amax = w.shape, []
    for i in range(0, n, 128):
        amax.append([np.abs(w[i : i + 128, j : j + 128]).max() for j in range(0, k, 128)])
    return np.maximum(np.float32(amax), np.float32(1e-4))


@pytest.mark.parametrize("name", ["v3-float32", "v3-bf16", "v32-dense-topk", "qwen2-untied"])
def test_fp8_leaves(name: str) -> None:
    """What DeepSeek quantises becomes E4M3 with a scale per block, as NumPy and `quantise` make it; all else stays."""
    stored, (params, _) = golden(name).params, held(name, "fp8")
    values = held(name, "float32")[0]
    for row in _rows(name):
        leaf = _leaf(params, row)
        if row.storage != LINEAR:
            _assert_same(leaf, _leaf(stored, row))
            continue
        assert (leaf.format, leaf.block) == (E4M3, (128, 128))
        w = np.asarray(_leaf(values, row))
        for index in np.ndindex(w.shape[:-2]):
            for part, expected in numpy_convert(w[index], "fp8").items():
                np.testing.assert_array_equal(np.asarray(getattr(leaf, part))[index], expected)
        if row.path[-1] == "o":
            again = jax.jit(lambda w: quantise(w, E4M3, (128, 128)))(w)
            _assert_same((leaf.codes, leaf.scales), (again.codes, again.scales))


def test_fp8_leaves_fp8_alone() -> None:
    """A checkpoint in FP8 is held as it is."""
    _assert_same(held("v3-fp8-e8m0", "fp8")[0], golden("v3-fp8-e8m0").params)


@pytest.mark.parametrize("weights", CONVERTED)
@pytest.mark.parametrize("name", ["v3-fp8-partial", "v3-fp8-e8m0", "v3-fp8-u8", "v3-mtp", "v3-float32", "v3-bf16"])
def test_leaves_equal_numpy(name: str, weights: str) -> None:
    """Every matrix from the file's bytes by NumPy alone: float32 and E8M0 scales, partial blocks, stacks, floats."""
    tensors, _ = emulated(name)
    stored, (params, _) = golden(name).params, held(name, weights)
    for row in _rows(name):
        leaf = _leaf(params, row)
        kept = row.storage == VECTOR or (weights == "int8" and {"embed", "router"} & set(row.path))
        if kept or (weights in ("w8a8", "w4a8") and row.storage != LINEAR):
            _assert_same(leaf, _leaf(stored, row))
            continue
        form = (leaf.format, leaf.block) if isinstance(leaf, QArray) else None
        how = "int4" if weights == "w4a8" and row.experts else "int8" if weights in ("w8a8", "w4a8") else weights
        floats = {"float32": None, "bfloat16": (BF16, (1, WHOLE)), "float16": (F16, (1, WHOLE))}
        assert form == {**floats, "int8": (INT8, (1, WHOLE)), "int4": (INT4, (1, 128))}[how]
        for index, tensor in row.tensors():
            w = tensors[tensor]
            scales = tensors.get(tensor + "_scale_inv")
            values = em.f32(w) if scales is None else em.dequantise(w, scales)
            for part, expected in numpy_convert(values, how).items():
                found = np.asarray(getattr(leaf, part) if isinstance(leaf, QArray) else leaf)[index]
                assert found.dtype == expected.dtype
                np.testing.assert_array_equal(found.view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("name", ["v3-fp8-partial", "v3-float32"])
def test_int8_law(name: str) -> None:
    """|w - w'| <= scale / 2 for every weight, but for float32's own rounding; and it is what `quantise` makes."""
    values, (params, _) = held(name, "float32")[0], held(name, "int8")
    for row in _rows(name):
        leaf = _leaf(params, row)
        if isinstance(leaf, QArray) and leaf.format == INT8:
            w = _leaf(values, row)
            codes, scales = np.asarray(leaf.codes).view(np.int8).astype(int), np.asarray(leaf.scales, np.float64)
            error = np.abs(codes * scales - np.asarray(w, np.float64))
            assert (error <= scales / 2 + 2.0**-23 * np.abs(w)).all()
            assert (np.abs(codes).max(-1) == 127).all()
            if row.path[-1] in ("kv_b", "head"):
                again = jax.jit(lambda w: quantise(w, INT8, (1, WHOLE)))(w)
                _assert_same((leaf.codes, leaf.scales), (again.codes, again.scales))


@pytest.mark.parametrize("fp8", [True, False], ids=["fp8", "float32"])
def test_any_part_of_a_matrix(fp8: bool) -> None:
    """Rows and columns that cut blocks give what the whole gives; rows of zeros and of tiny numbers stay what they are.

    At 2^-60 a floor of 1e-4 under the amax would leave nothing.
    """
    random = rng(70, fp8)
    n, k = 300, 420
    w = random.standard_normal((n, k), np.float32)
    w[128:256] *= np.float32(2.0**-60)
    w[7] = 0
    elements, scales, values = w, None, w
    if fp8:
        grid = random.uniform(0.5, 2, (3, 4)).astype(np.float32)
        grid[1] *= np.float32(2.0**-60)
        w[128:256] *= np.float32(2.0**60)
        elements, scales = w.astype(em.E4M3), grid
        values = em.dequantise(elements, scales)
    source = Source(elements, scales, (128, 128))
    formats = ((Stored("f32"), "float32"), (Stored("bf16"), "bfloat16"), (Stored("int8", "f32"), "int8"))
    formats += ((Stored("int4", "f32"), "int4"),)
    formats += () if fp8 else ((Stored("e4m3", "f32"), "fp8"),)
    whole = {weights: numpy_convert(values, weights) for _, weights in formats}
    row_scales = source.row_scales(slice(0, n))
    np.testing.assert_array_equal(row_scales, whole["int8"]["scales"])
    assert row_scales[7] == TINY and not whole["int8"]["codes"][7].any()
    decoded = whole["int8"]["codes"].view(np.int8) * row_scales
    assert (np.abs(decoded - values).max(1) <= 0.51 * row_scales[:, 0]).all()
    assert relative_norm(decoded[128:256], values[128:256]) < 0.01
    for _ in range(40):
        (a, b), (c, d) = (sorted(random.choice(size + 1, 2, replace=False)) for size in (n, k))
        for held_as, weights in formats:
            if held_as.packed:  # two channels a byte
                c, d = c - c % 2, d - d % 2
            expected = (
                whole[weights]["codes"][a:b, c // 2 : d // 2] if held_as.packed else whole[weights]["codes"][a:b, c:d]
            )
            out = np.empty_like(expected)
            scales = None if held_as.scales is None else new_scales(source, held_as, slice(0, n), slice(0, k))
            fill(out, source, slice(a, b), slice(c, d), held_as, scales)
            np.testing.assert_array_equal(out, expected, err_msg=f"seed {SEED}: [{a}:{b}, {c}:{d}] as {weights}")


@pytest.mark.parametrize("weights", CONVERTED)
def test_nan_is_refused(weights: str, tmp_path: Path) -> None:
    """As in a checkpoint that is held as stored: before it could be scaled into an ordinary number."""
    folder = tmp_path / "model"
    shutil.copytree(GOLDENS / "v3-mtp", folder)
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    with Files.open(folder) as files:
        tensor = files[name]
    with tensor.path.open("r+b") as file:
        file.seek(tensor.offset + 5)
        file.write(b"\xff")
    with pytest.raises(InputError, match=f"tensor {name}: expected no NaN code"):
        load(folder, weights=weights)


def test_bfloat16_never_rounds_to_infinity() -> None:
    """Nor does a tie go anywhere but to even."""
    top = np.finfo(np.float32).max
    w = np.float32([[top, -top, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 2.0**-133, -0.0]])
    out = np.empty(w.shape, np.uint16)
    fill(out, Source(w, None, (1, 1)), slice(0, 1), slice(0, 6), Stored("bf16"))
    found = out.view(ml_dtypes.bfloat16).astype(np.float32)[0]
    limit = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    assert found.tolist() == [limit, -limit, 1.0, 1 + 2.0**-6, 2.0**-133, 0.0] and np.signbit(found[-1])


def test_bfloat16_is_exact_for_powers_of_two() -> None:
    """E4M3 has four significant bits; with UE8M0 scales its values are bfloat16 numbers."""
    wide, narrow = held("v3-fp8-e8m0", "float32")[0], held("v3-fp8-e8m0", "bfloat16")[0]
    for row in _rows("v3-fp8-e8m0"):
        if isinstance(_leaf(golden("v3-fp8-e8m0").params, row), QArray):
            np.testing.assert_array_equal(dequantise(_leaf(narrow, row)), _leaf(wide, row))


# --- shapes, bytes, regions, shards ----------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", ["v3-mtp", "v3-fp8-e8m0", "v3-float32"])
def test_abstract_params_are_what_is_loaded(name: str, weights: str) -> None:
    """Tree, formats, shapes, dtypes, and the bytes that the load and its plan count."""
    config = load_config(GOLDENS / name)
    with Files.open(GOLDENS / name) as files:
        stored = agree(files, config)
    params, stats = held(name, weights)
    abstract = abstract_params(config, mtp=_has_mtp(name), stored=stored, weights=weights)
    assert jax.tree.structure(abstract) == jax.tree.structure(params)
    shapes = [[(a.shape, a.dtype) for a in jax.tree.leaves(tree)] for tree in (abstract, params)]
    assert shapes[0] == shapes[1]
    plan = load_plan(config, stored, mtp=_has_mtp(name), weights=weights)
    assert tree_bytes(abstract) == tree_bytes(params) == stats.bytes == plan.bytes


@pytest.mark.parametrize("weights", WEIGHTS)
def test_bytes_at_full_size(weights: str) -> None:
    """DeepSeek-V3 by hand: 4, 2 or 1 bytes a weight, vectors in float32; and no more is staged for it."""
    config = load_config("deepseek-v3")
    rows = [r for r in table(config) if not is_mtp(r)]
    stored = {row.path: official_storage(row, config) for row in table(config)}
    shapes = abstract_params(config)
    found = tree_bytes(abstract_params(config, weights=weights))
    matrices = [r for r in rows if r.storage != VECTOR]
    vectors = 4 * sum(_leaf(shapes, r).size for r in rows if r.storage == VECTOR)
    sizes = {r.path: int(np.prod(_leaf(shapes, r).shape)) for r in matrices}
    if weights in ("float32", "bfloat16", "float16"):
        assert found == vectors + {"float32": 4, "bfloat16": 2, "float16": 2}[weights] * sum(sizes.values())
    elif weights == "w8a8":  # embedding, head and routers as stored, one scale a row
        rest = [r for r in matrices if r.path[-1] not in ("embed", "head") and "router" not in r.path]
        kept_bytes = sum(2 * sizes[r.path] for r in matrices if r not in rest)
        assert found == vectors + kept_bytes + sum(sizes[r.path] // k * (k + 4) for r, k in _widths(rest, shapes))
    elif weights == "w4a8":  # the same; experts four bits a weight and a scale for 128
        experts = sum(sizes[r.path] for r in matrices if r.experts)
        as_int8 = tree_bytes(abstract_params(config, weights="w8a8"))
        rows_of_experts = sum(sizes[r.path] // k for r, k in _widths([r for r in matrices if r.experts], shapes))
        assert found == as_int8 - experts // 2 - 4 * rows_of_experts + 4 * experts // 128
    elif weights == "int8":
        kept = [r.path for r in matrices if r.path[0] == "embed" or "router" in r.path]
        assert len(kept) == 2
        scales = sum(4 * size // _leaf(shapes, r).shape[-1] for r in matrices if (size := sizes[r.path]))
        scales -= sum(4 * sizes[p] // 7168 for p in kept)
        assert found == vectors + sum(sizes.values()) + sum(sizes[p] for p in kept) + scales
    plan = load_plan(config, stored, weights=weights)
    assert plan.bytes == found
    assert plan.peak_staging_bytes <= STAGING_BYTES


def _widths(rows: list[Row], shapes: Any) -> list[tuple[Row, int]]:
    """Rows with their channels."""
    return [(row, _leaf(shapes, row).shape[-1]) for row in rows]


@pytest.mark.parametrize("weights", [w for w in CONVERTED if w != "w4a8"])  # whose groups these rules would cut
def test_staged_in_place_and_sharded_are_one(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small regions, of shards that cut rows, columns and 128-blocks: the bits of the whole, loaded in place.

    Scales of rows that are split are those of the whole rows, on every device that holds a part.
    """
    name = "v3-fp8-partial"
    one, _ = held(name, weights)
    rules = {"hidden": ("tp",), **dict.fromkeys(("heads", "experts"), ("ep",))}
    rules |= dict.fromkeys(("ffn", "expert_ffn", "shared_ffn"), ("dp",))

    def split(mesh: Mesh, row: Row, part: str) -> NamedSharding:
        return NamedSharding(mesh, Rules(rules, mesh.shape).spec(row.logical_axes))

    longest_row = max(leaf.shape[-1] * leaf.dtype.itemsize for leaf in jax.tree.leaves(one))
    # Staged, each shape on each device is compiled: fewer of both.
    for in_place, limit, plan in ((True, 1000, "dp=2,ep=2,tp=2"), (False, 5000, "tp=2")):
        mesh = make_mesh(parse_plan(plan))
        monkeypatch.setattr(loading, "STAGING_BYTES", limit)
        _, params, stats = load(GOLDENS / name, weights=weights, sharding=partial(split, mesh), in_place=in_place)
        _assert_same(params, one)
        assert stats.peak_staging_bytes <= (0 if in_place else max(limit, longest_row))
        down = params["moe"]["experts"]["down"]
        codes = down.codes if isinstance(down, QArray) else down
        part = (1, 3, 68, 36) if mesh.size == 8 else (1, 6, 68, 72)
        assert codes.addressable_shards[0].data.shape == part
        if weights in ("int8", "w8a8"):
            kv_a = params["dense"]["attention"]["kv_a"]
            assert kv_a.codes.addressable_shards[1].data.shape == (1, 144, 68)
            assert kv_a.scales.addressable_shards[1].data.shape == (1, 144, 1)


# --- logits ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer and the MTP module, FP8. Every expert is chosen, so that no rounding changes who is.

    Where some are chosen, a choice that flips moves a small random model's logits far more than any rounding.
    """
    chosen = {"n_routed_experts": 4, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1}
    settings = {**SYNTH_SETTINGS, **chosen, "hidden_size": 160, "num_attention_heads": 4, "first_k_dense_replace": 0}
    folder = tmp_path_factory.mktemp("weights") / "model"
    synthesise(folder, synth_config("deepseek-v3", layers=1, settings=settings), seed=SEED)
    return folder


TOKENS = np.arange(12).reshape(2, 6) * 23 % 320


def _logits(folder: Path, weights: str) -> tuple[np.ndarray, np.ndarray]:
    """Of the main model with absorbed attention, and of its MTP module with naive attention."""
    config, params, _ = load(folder, mtp=True, weights=weights)
    loaded = Golden(folder, config, params, TOKENS, TOKENS, None)
    logits, hidden, _ = one_shot(loaded, TOKENS, Numerics("plain", "float32", "absorbed"))
    return logits, one_shot_draft(loaded, hidden, TOKENS, Numerics("plain", "float32", "naive"))


# float32: summation order. The others were measured on 20 seeds, |logits - stored's| / |stored's|: bfloat16 at most
# 0.0053, int8 at most 0.0224 (of single matrices 0.0018 and 0.0056); the bounds are twice that.
BOUNDS = {"float32": 1e-5, "bfloat16": 0.0106, "int8": 0.0448}


def test_logits(model: Path) -> None:
    """Both forms of attention, experts, head and MTP module take every format."""
    expected = _logits(model, "stored")
    for weights, bound in BOUNDS.items():
        for found, reference in zip(_logits(model, weights), expected, strict=True):
            distance = worst(found, reference) if weights == "float32" else relative_norm(found, reference)
            assert distance <= bound, f"seed {SEED}: {weights}: {distance}"


# --- command line ----------------------------------------------------------------------------------------------------


def test_native_takes_stored_weights_only(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """On an FP8 checkpoint: one line, status 2, before anything is loaded. One of floats has no FP8 products."""
    (tmp_path / "ids.json").write_text("[[1, 2]]")
    score = ("score", "--tokens", str(tmp_path / "ids.json"), "--logits", str(tmp_path / "out.npy"))
    for verb in (("generate", "--prompt-ids", "1"), score, ("bench",)):
        for weights in CONVERTED:
            flags = ("--model", str(GOLDENS / "v3-mtp"), "--numerics", "native", "--weights", weights)
            assert main([*verb, *flags]) == 2
            out, err = capsys.readouterr()
            assert out == "" and len(err.splitlines()) == 1
            assert f"--weights {weights}" in err and "--numerics native" in err
    assert not (tmp_path / "out.npy").exists()
    native = Numerics("native")
    assert native.for_checkpoint(load_config(GOLDENS / "v3-mtp"), "stored") == native
    assert native.for_checkpoint(load_config(GOLDENS / "v3-float32"), "int8") == native


def test_unknown_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--model", str(GOLDENS / "v3-mtp"), "--weights", "int4"]) == 2
    assert "'int4'" in capsys.readouterr().err
    with pytest.raises(
        InputError, match="expected stored, float32, bfloat16, float16, fp8, int8, w8a8, w4a8, found 'int4'"
    ):
        load(GOLDENS / "v3-mtp", weights="int4")


def test_verbs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`score` computes what the library does with the same weights, and `bench` says what it held."""
    monkeypatch.setattr(bandwidth, "BUFFER_BYTES", 1 << 20)
    (tmp_path / "ids.json").write_text(json.dumps(TOKENS.tolist()))
    flags = ("--model", str(model), "--weights", "int8", "--json")
    files = ("--tokens", str(tmp_path / "ids.json"), "--logits", str(tmp_path / "out.npy"))
    assert main(["score", *flags, *files, "--dtype", "float32", "--mla", "absorbed"]) == 0
    assert worst(np.load(tmp_path / "out.npy"), _logits(model, "int8")[0]) <= 1e-5
    capsys.readouterr()
    assert main(["bench", *flags, "--prompt-length", "4", "--new-tokens", "1"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["weights"] == "int8"
    assert result["weight_bytes"] == result["load_bytes"] == tree_bytes(load(model, weights="int8")[1])
