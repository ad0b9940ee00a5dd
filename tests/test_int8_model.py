"""Models with INT8 activations: laws of the step, plans of devices, bytes of the planner, the command line."""

from __future__ import annotations

import dataclasses
import json
import re
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import (
    DENSE_SETTINGS,
    SEED,
    SYNTH_SETTINGS,
    V4_SETTINGS,
    V32_SETTINGS,
    Golden,
    counts,
    one_shot,
    relative_norm,
    rng,
    step_of,
    worst,
)
from helpers_parallel import TOKENS, arrange, engine_on, folder, one_engine
from test_integer_checkpoints import SETTINGS, written

from dsjax.checkpoint.load import load
from dsjax.checkpoint.resident import Overflow, Source, fill
from dsjax.checkpoint.safetensors import Files
from dsjax.cli.main import main
from dsjax.config import load_config, parse_config
from dsjax.errors import InputError
from dsjax.layout import layout
from dsjax.models import family
from dsjax.numerics import Numerics
from dsjax.parallel import load_onto
from dsjax.params import Stored, abstract_params, is_mtp, leaf_shape, table, tree_bytes
from dsjax.plan import load_model
from dsjax.plan.placement import Model, Placement
from dsjax.synth import synth_config, synthesise
from quant import INT4, INT8, Int8Rows, QArray
from sharding import parse_plan

FLOAT32 = Numerics("plain", "float32")
FAMILIES = {
    "v3": ("deepseek-v3", 2, SETTINGS),
    "v32": ("deepseek-v3.2", 1, V32_SETTINGS),
    "v4": ("deepseek-v4-flash", 3, V4_SETTINGS),
    "qwen2": ("deepseek-r1-distill-qwen-1.5b", 2, DENSE_SETTINGS),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each family."""
    found = {}
    for name, (preset, layers, settings) in FAMILIES.items():
        found[name] = tmp_path_factory.mktemp("int8") / name
        synthesise(found[name], synth_config(preset, layers=layers, settings=settings), seed=SEED)
    return found


def model_of(where: Path, weights: str) -> tuple[Golden, Numerics]:
    config, params, _ = load(where, weights=weights)
    tokens = rng(30).integers(2, 320, (2, 13)).astype(np.int32)
    return Golden(where, config, params, tokens, tokens, None), FLOAT32.for_checkpoint(config, weights)


@pytest.mark.parametrize("name", ["v3", "qwen2", *(pytest.param(n, marks=pytest.mark.full) for n in ("v4", "v32"))])
def test_any_chunks_give_the_same(name: str, folders: dict[str, Path]) -> None:
    """All at once, or in chunks of one to six: every token is quantised by itself. Both integer formats and both forms
    of latent attention (six tokens at once take another than one)."""
    weights = "w8a8" if name == "v32" else "w4a8"
    model, numerics = model_of(folders[name], weights)
    whole, _, _ = one_shot(model, model.tokens, numerics)
    cache = family(model.config).new_cache(model.config, numerics, 2, 13)
    step, at, found = step_of(model.config, numerics), 0, []
    for size in (6, 1, 6):
        part = np.asarray(model.tokens[:, at : at + size])
        logits, _, cache = step(model.params, cache, part, counts(size, size))
        found.append(np.asarray(logits))
        at += size
    # A code that rounds the other way, next to a half, moves what follows by less than a hundredth.
    errors = np.abs(np.concatenate(found, axis=1) - whole).max(-1) / np.abs(whole).max()
    assert np.median(errors) <= 2e-6 and errors.max() <= 1e-2, f"seed {SEED}: {errors}"


def test_what_is_quantised(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of integers are those of all linear layers but kv_b, whose latents are not quantised, and V4's o_a."""
    operand = Numerics.operand
    seen: set[str] = set()

    def spy(self: Numerics, x: Any, w: Any, *rest: Any) -> Any:
        out = operand(self, x, w, *rest)
        if isinstance(out, Int8Rows):
            seen.add(str(w.shape))
        return out

    monkeypatch.setattr(Numerics, "operand", spy)
    for name, left in (("v3", {"kv_b"}), ("v4", {"o_a"}), ("qwen2", set()), ("v32", {"kv_b"})):
        model, numerics = model_of(folders[name], "w8a8")
        seen.clear()
        cache = family(model.config).new_cache(model.config, numerics, 2, 13)
        step = partial(family(model.config).step, model.config, numerics)
        jax.eval_shape(step, model.params, cache, np.asarray(model.tokens), counts(13, 13))
        held = {row.path: _leaf(model.params, row.path) for row in table(model.config) if not is_mtp(row)}
        integers = {path for path, leaf in held.items() if isinstance(leaf, QArray) and leaf.format == INT8}
        expected = {str(held[path].shape) for path in integers if path[-1] not in left}
        assert seen == expected


def _leaf(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


# --- devices ---------------------------------------------------------------------------------------------------------


@lru_cache
def _alone(name: str, weights: str) -> np.ndarray:
    return one_engine(name, FLOAT32, weights).score(TOKENS, chunk=16)[0]


@pytest.mark.parametrize(
    ("name", "plan", "weights"),
    [
        ("v3-wide", "tp=2", "w8a8"),
        ("qwen2", "tp=4", "w4a8"),
        pytest.param("v3-wide", "ep=2,tp=2", "w4a8", marks=pytest.mark.full),
        pytest.param("v3-wide", "ep=4/sent", "w8a8", marks=pytest.mark.full),
        pytest.param("v3-wide-dense", "tp=4", "w8a8", marks=pytest.mark.full),
        pytest.param("v4-wide", "ep=2,tp=2", "w8a8", marks=pytest.mark.full),
    ],
)
def test_any_plan_gives_what_one_device_gives(name: str, plan: str, weights: str) -> None:
    """Rows that are split over devices are quantised by the whole row's maximum; groups may be cut; tokens travel as
    codes. Half of the tokens agree within summation order, the others but for a code that rounds the other way."""
    found = engine_on(name, plan, FLOAT32, weights).score(TOKENS, chunk=16)[0]
    alone = _alone(name, weights)
    errors = np.abs(found - alone).max(-1) / np.abs(alone).max()
    assert np.median(errors) <= 1e-5 and errors.max() <= 2e-2, f"seed {SEED}: {errors}"


def test_local_maxima_would_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above sees it when each device takes its own part's maximum."""
    from sharding import Rules

    monkeypatch.setattr(Rules, "largest", lambda self, name, x: x)
    found = engine_on("v3-wide", "tp=2", FLOAT32, "w8a8").score(TOKENS, chunk=16)[0]
    alone = _alone("v3-wide", "w8a8")
    assert np.median(np.abs(found - alone).max(-1) / np.abs(alone).max()) > 1e-3


def test_plans_that_cut_groups_are_refused() -> None:
    """Activations in groups of 128 channels; two INT4 codes a byte."""
    folder_of_blocks = written("int8-block")[0]
    config = load_config(folder_of_blocks)
    blocks = FLOAT32.for_checkpoint(config)
    with pytest.raises(InputError, match="cut the groups of 128 that block-wise INT8 quantises activations in"):
        layout(config, parse_plan("tp=2"), "heads", blocks)
    layout(config, parse_plan("tp=2"), "heads", FLOAT32)
    odd = parse_config(synth_config("deepseek-v3", layers=2, settings={**SYNTH_SETTINGS, "moe_intermediate_size": 6}))
    placed = Placement(Model("test", odd, FLOAT32, "w4a8"), layout(odd, parse_plan("tp=2")))
    with pytest.raises(InputError, match="make parts of 3, which two to a byte do not fit"):
        placed.scale_bytes  # noqa: B018


# --- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["w8a8", "w4a8", "float16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_planned_bytes_are_held(name: str, weights: str, folders: dict[str, Path]) -> None:
    """On one device, from shapes alone; and by hand: 1 or half a byte, and 4 for a row or 128 channels."""
    config, params, stats = load(folders[name], weights=weights)
    placed = Placement(load_model(str(folders[name]), FLOAT32, weights), layout(config, parse_plan("tp=1")))
    assert sum(placed.modules.values()) == tree_bytes(params) == stats.bytes
    for row in table(config):
        leaf = _leaf(params, row.path)
        if isinstance(leaf, QArray) and leaf.format in (INT8, INT4):
            *lead, n, k = leaf_shape(row, config)
            rows = int(np.prod(lead, dtype=int)) * n
            assert leaf.nbytes == (rows * (k + 4) if leaf.format == INT8 else rows * (k // 2 + 4 * -(-k // 128)))
    formats = {
        leaf.format
        for leaf in jax.tree.leaves(params, is_leaf=lambda a: isinstance(a, QArray))
        if isinstance(leaf, QArray)
    }
    assert (INT4 in formats) == (weights == "w4a8") and (INT8 in formats) == (
        weights != "float16" and (name, weights) != ("qwen2", "w4a8")
    )


@pytest.mark.parametrize(("name", "plan"), [("v3", "ep=4,tp=4"), ("v4", "tp=8")])
def test_devices_hold_what_is_planned(name: str, plan: str) -> None:
    """INT4 experts whose groups are cut by the split, to the byte on every device."""
    model = load_model(str(folder(name)), FLOAT32, "w4a8")
    parted = arrange(model.config, plan, model.numerics)
    _, params, _ = load_onto(parted, folder(name), mtp=False, weights="w4a8")
    planned = sum(Placement(model, parted.layout).modules.values())
    for device in parted.mesh.devices.flat:
        shards = [shard for a in jax.tree.leaves(params) for shard in a.addressable_shards if shard.device == device]
        assert sum(shard.data.nbytes for shard in shards) == planned


def test_plan_at_full_size(capsys: pytest.CaptureFixture[str]) -> None:
    """671 B parameters on eight cards of 96 GB: INT8 fits, and half of it with INT4 experts."""
    totals = {}
    for weights in ("w8a8", "w4a8", "float16"):
        assert main(["plan", "deepseek-v3", "--cards", "8", "--memory", "96GB", "--weights", weights, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["fits"] == (weights != "float16") and found["weights"] == weights
        totals[weights] = tree_bytes(abstract_params(load_config("deepseek-v3"), weights=weights))
    assert totals["w8a8"] == pytest.approx(673e9, rel=0.01)
    assert totals["w4a8"] == pytest.approx(673e9 - 653.9e9 / 2 + 653.9e9 / 32, rel=0.01)
    assert (
        main(["plan", "deepseek-v3", "--cards", "8", "--memory", "96GB", "--weights", "w8a8", "--numerics", "native"])
        == 2
    )
    assert "--weights w8a8 cannot be combined with --numerics native" in capsys.readouterr().err


# --- float16 ---------------------------------------------------------------------------------------------------------


def test_float16_counts_what_it_loses() -> None:
    """Rounded to nearest even; below 2^-14 fewer bits are left, below 2^-25 none; above 65504 there is an error."""
    w = np.float32([[1 + 2.0**-11, 65504, -65504, 2.0**-14, 1.5 * 2.0**-15, 2.0**-24, 2.0**-25, 2.0**-26, 0, -0.0]])
    out = np.empty(w.shape, np.uint16)
    lost = fill(out, Source(w, None, (1, 1)), slice(0, 1), slice(0, 10), Stored("f16"))
    assert out.view(np.float16).tolist() == w.astype(np.float16).tolist()
    assert (lost.subnormal, lost.flushed) == (2, 2)
    for value in (65505.0, -7e4, 1e30):
        w[0, 3] = value
        with pytest.raises(Overflow, match=f"{value:g}".replace("+", r"\+")):
            fill(out, Source(w, None, (1, 1)), slice(0, 1), slice(0, 10), Stored("f16"))


def test_float16_overflow_names_the_tensor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And the value; bfloat16 holds it. What is lost without an error is said."""
    where = tmp_path / "model"
    settings = {**SYNTH_SETTINGS, "quantization_config": None}
    synthesise(where, synth_config("deepseek-v3", layers=1, settings=settings))
    name = "model.layers.0.self_attn.o_proj.weight"
    flags = ["generate", "--model", str(where), "--prompt-ids", "5", "--max-new-tokens", "1", "--weights", "float16"]
    with Files.open(where) as files:
        tensor = files[name]
    lost = []
    for code in (b"\x80\x3f", b"\x80\x33"):  # bfloat16 1, 2^-24
        with tensor.path.open("r+b") as file:
            file.seek(tensor.offset)
            file.write(code)
        assert main(flags) == 0
        said = re.search(r"float16: (\d+) values below 2\^-14 keep fewer bits, 0 became zero", capsys.readouterr().err)
        assert said
        lost.append(int(said.group(1)))
    assert lost[1] == lost[0] + 1
    with tensor.path.open("r+b") as file:
        file.seek(tensor.offset + 8)
        file.write(b"\x80\xc7")  # bfloat16 -65536
    assert main(flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and f"tensor {name}" in err and "65504, found -65536" in err
    assert main([*flags[:-1], "bfloat16"]) == 0
    capsys.readouterr()


# --- command line ----------------------------------------------------------------------------------------------------


def test_verbs(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`score` computes what the library does; a converted folder keeps what was asked for."""
    (tmp_path / "ids.json").write_text(json.dumps(rng(30).integers(2, 320, (2, 13)).tolist()))
    model, numerics = model_of(folders["qwen2"], "w8a8")
    expected = one_shot(model, np.asarray(model.tokens), numerics)[0]

    def score(where: Path, weights: str) -> np.ndarray:
        out = tmp_path / f"{where.name}-{weights}.npy"
        flags = ("--model", str(where), "--tokens", str(tmp_path / "ids.json"), "--logits", str(out))
        assert main(["score", *flags, "--weights", weights, "--dtype", "float32"]) == 0
        return np.asarray(np.load(out))

    found = score(folders["qwen2"], "w8a8")
    assert worst(found, expected) <= 1e-5
    alone = score(folders["qwen2"], "int8")
    assert 1e-3 < relative_norm(found, alone) < 0.1
    saved = tmp_path / "saved"
    assert main(["convert", str(folders["qwen2"]), "--to", "orbax", "--weights", "w8a8", "--out", str(saved)]) == 0
    np.testing.assert_array_equal(score(saved, "w8a8"), found)
    capsys.readouterr()
    assert main(["generate", "--model", str(saved), "--weights", "w4a8", "--prompt-ids", "5"]) == 2
    assert "expected --weights stored with a converted folder, found w4a8" in capsys.readouterr().err
    assert dataclasses.replace(numerics, activations="float") == FLOAT32.for_checkpoint(model.config, "int8")
    with pytest.raises(InputError, match="numerics activations: expected float or int8 or int8-group"):
        Numerics(activations="int4")
    capsys.readouterr()
