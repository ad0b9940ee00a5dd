"""`dsjax align --model`: two configurations of one model call by call, and the taps of one run in a file."""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bundles import save_tensors
from damage import refused
from helpers import SYNTH_SETTINGS, V32_SETTINGS

from dsjax.align import taps
from dsjax.checkpoint.load import load
from dsjax.cli.align import before_jax
from dsjax.cli.main import main
from dsjax.export.stablehlo.inventory import inventory
from dsjax.generate import Engine
from dsjax.models import family
from dsjax.numerics import Numerics
from dsjax.synth import synth_config, synthesise
from quant.operator import choosing, outlining
from sharding import parse_plan

Capture = pytest.CaptureFixture[str]
LENGTH = 6


def synthesised(folder: Path, preset: str, settings: dict[str, Any]) -> Path:
    """Two layers: one dense, one with experts."""
    config = synth_config(preset, layers=2, settings=settings | {"first_k_dense_replace": 1})
    synthesise(folder / preset, config, template=preset)
    return folder / preset


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesised(tmp_path_factory.mktemp("align"), "deepseek-v3", SYNTH_SETTINGS)


@pytest.fixture(scope="module")
def v32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesised(tmp_path_factory.mktemp("align"), "deepseek-v3.2", V32_SETTINGS)


def run(capsys: Capture, *arguments: Any) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    status = main(["align", *map(str, arguments), "--json"])
    report: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return status, report


def calls(names: Iterable[str]) -> Counter[str]:
    """Operators by how often they are called, from the names of their results."""
    places = [place for name in names if (place := taps.parse(name))]
    return Counter(operator for _, operator in {(place.order, place.operator) for place in places})


def calls_of_program(folder: Path, mode: str) -> Counter[str]:
    """The same, as the step's StableHLO says, which knows of no tap."""
    config, params, _ = load(folder)
    numerics = Numerics(mode).for_checkpoint(config).for_platform("cpu")
    cache = family(config).new_cache(config, numerics, 1, LENGTH)
    step = partial(family(config).step, config, numerics, want="all")
    with choosing({}, "cpu"), outlining():
        lowered = jax.jit(step).lower(params, cache, jnp.zeros((1, LENGTH), jnp.int32), jnp.full(1, LENGTH, jnp.int32))
    named = inventory(lowered.compiler_ir("stablehlo"))["named"]
    return Counter({operator: counts["executed"] for operator, counts in named.items()})


# Of two layers: four products of attention and three of a feed-forward layer in each, one of the router, one of the
# head. In native an activation is quantised, and decoded again, for each of them but router and head, and for the
# routed experts together.
V3_CALLS = {"look_up": 1, "rms_norm": 9, "rope": 4, "mla": 2, "write_rows": 2, "block_scaled_dot": 16}
V3_CALLS |= {"moe_gate": 1, "grouped_matmul": 1, "swiglu": 2}
V3_NATIVE = {"act_quant": 15, "decode": 15}


@pytest.mark.parametrize("model", ["v3", "v32"])
def test_native_is_compared_call_by_call(model: str, request: pytest.FixtureRequest, capsys: Capture) -> None:
    """Every call that both have is compared with its own, or held as codes; the others are counted."""
    folder = request.getfixturevalue(model)
    plain, native = (calls_of_program(folder, mode) for mode in ("plain", "native"))
    if model == "v3":
        assert (plain, native) == (V3_CALLS, V3_CALLS | V3_NATIVE)
    else:  # the side of a branch that contexts of at most index_topk tokens take
        assert plain.pop("mla") == native.pop("mla") == plain["sparse_mla"] == 2
    _, report = run(capsys, "--model", folder, "--against", "native", "--length", LENGTH)
    unlike, extra = calls(report["unlike"]), calls(report["extra"])
    assert calls(row["name"] for row in report["results"]) + unlike == plain
    assert extra == native - plain and extra.keys() == V3_NATIVE.keys()
    assert unlike == ({"write_rows": 4} if model == "v32" else {})  # latents and the indexer's keys, of two layers
    assert report["missing"] == report["uneven"] == []
    for row in report["results"]:  # numbers of one thing: what does not belong together has a cosine about 0
        assert row["problems"] == [] and row.get("cosine", 1) > 0.7, row["name"]


def test_products_in_integers_are_other_calls(v3: Path, capsys: Capture) -> None:
    """The router's and the head's stay what they are, and are compared with themselves."""
    _, report = run(capsys, "--model", v3, "--against", "w8a8", "--length", LENGTH, "--dtype", "float32")
    dots = [row for row in report["results"] if row["operator"] == "block_scaled_dot"]
    assert [row["block"] for row in dots] == ["router", "head"] and all(row["error"] < 0.2 for row in dots)
    assert calls(report["missing"]) == {"block_scaled_dot": 14} and report["uneven"] == []
    assert calls(report["extra"]) == {"int8_dot": 14, "act_quant_int8": 15}


def test_two_configurations_of_one_model(v3: Path, capsys: Capture) -> None:
    """Equal variants agree in every operator; another resident format departs, and is named where it first does."""
    flags = ["--model", v3, "--dtype", "float32", "--length", LENGTH, "--gate", "strict"]
    assert run(capsys, *flags, "--against", "top_k=loop,sort_assignments=count")[0] == 0
    status, report = run(capsys, *flags, "--against", "int8")
    assert status == 1 and report["first_departure"]["strict"] == "00002.0.queries.block_scaled_dot"
    assert report["first_layer"]["strict"] == 0
    refused(capsys, ["align", *flags, "--against", "nothing"], "--against nothing", "typed-fp8")


def test_taps_of_two_runs(v3: Path, tmp_path: Path, capsys: Capture) -> None:
    """Another variant, another mesh, one value changed: by operator, block and layer, from files."""
    one, other, mesh, wrong = (tmp_path / f"{name}.safetensors" for name in ("one", "other", "mesh", "wrong"))
    flags = ["--model", v3, "--dtype", "float32", "--length", LENGTH, "--taps"]
    status, told = run(capsys, *flags, one)
    assert status == 0 and told["model"] == "deepseek-v3" and told["mesh"] is None and told["operators"] == {}
    assert str(tmp_path) not in json.dumps(taps.load(one)[1]) and taps.load(one)[1]["platform"] == "cpu"  # type: ignore[index]
    assert calls(taps.load(one)[0]) == V3_CALLS and told["results"] == len(taps.load(one)[0])

    told = run(capsys, *flags, other, "--mesh", "ep=2", "--spmd", "auto", "--op", "sort_assignments=count")[1]
    assert told["mesh"] == "ep=2 heads auto" and told["operators"] == {"sort_assignments": "count"}
    status, report = run(capsys, one, other, "--gate", "strict")
    assert status == 0 and len(report["results"]) == told["results"]  # every value is whole
    assert report["runs"]["candidate"]["mesh"] == "ep=2 heads auto" and report["runs"]["reference"]["mesh"] is None

    run(capsys, *flags, mesh, "--mesh", "ep=2,tp=2")
    status, report = run(capsys, one, mesh, "--gate", "strict", "--common")
    assert status == 0 and {"logits", "00017.1.norm.rms_norm"} <= {row["name"] for row in report["results"]}
    assert calls(row["name"] for row in report["results"]) + calls(report["unlike"]) == V3_CALLS
    parts = taps.load(mesh)[0]["00010.0.attend.mla"]
    assert parts.shape == (4, 1, LENGTH, 1, 8)  # heads by tp, of which each ep has the same
    whole = taps.load(one)[0]["00010.0.attend.mla"].values()
    np.testing.assert_allclose(np.concatenate(parts.values()[:2], axis=-2), whole, rtol=1e-4, atol=1e-6)

    changed = {name: stored.values() for name, stored in taps.load(one)[0].items()}
    changed["00026.1.attend.mla"] = changed["00026.1.attend.mla"] * np.float32(1.01)
    save_tensors(wrong, changed)
    status, report = run(capsys, one, wrong, "--gate", "strict")
    assert status == 1 and report["first_departure"] == {"bound": None, "strict": "00026.1.attend.mla"}
    assert report["first_layer"] == {"bound": None, "strict": 1}
    worst = [report[groups][0] for groups in ("operators", "blocks", "layers")]
    assert [worst[0]["operator"], worst[1]["block"], worst[2]["layer"]] == ["mla", "attend", 1]
    assert [group["beyond_strict"] for group in report["layers"]] == [1, 0]
    assert main(["align", str(one), str(wrong)]) == 0
    assert "first layer beyond strict: 1; beyond 5%: none" in capsys.readouterr().out.splitlines()


def test_refused(v3: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "t.safetensors"
    np.save(tmp_path / "long.npy", np.zeros((1, 163841), np.int32))
    for flags in (["--against", "int8"], ["--taps", out]):
        message = "long.npy: expected rows of at most 163840 tokens, found 163841"
        refused(capsys, ["align", "--model", v3, *flags, "--tokens", tmp_path / "long.npy"], message)
        refused(capsys, ["align", "--model", v3, *flags, "--length", 163841], "--length 163841: expected 1 to 163840")
    model = ["align", "--model", v3]
    refused(capsys, [*model, "--taps", out, "--against", "int8"], "--model: expected with --against or --taps")
    refused(capsys, model, "--model: expected with --against or --taps")
    refused(capsys, [*model, "--taps", out, "--plot", tmp_path / "p.svg"], "--plot", "found --taps")
    refused(capsys, [*model, "--taps", tmp_path / "no" / "t.safetensors"], "t.safetensors", "existing folder")
    refused(capsys, ["align", out, out, "--mesh", "ep=2"], "align: expected REFERENCE and CANDIDATE")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["long.npy"]


def test_a_platform_without_callbacks(
    v3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """As xla-cpu-pjrt says it."""

    def score(*_: Any) -> Any:
        raise jax.errors.JaxRuntimeError("NOT_FOUND: No FFI handler registered for xla_ffi_python_cpu_callback")

    monkeypatch.setattr(Engine, "score", score)
    flags = ["align", "--model", v3, "--taps", tmp_path / "t.safetensors"]
    refused(capsys, flags, "platform cpu: expected calls back to the host, for taps, found: NOT_FOUND: No FFI handler")


def test_what_taps_ask_of_jax(v3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """A CPU device beside the platform's, and more threads than devices that wait for each other."""
    monkeypatch.setenv("NPROC", "")
    monkeypatch.delenv("NPROC")
    before = jax.config.jax_platforms
    try:
        for given, platforms in (("tpu", "tpu,cpu"), ("cuda,cpu", "cuda,cpu"), ("cpu", "cpu"), (None, None)):
            jax.config.update("jax_platforms", given)
            before_jax(argparse.Namespace(model=Path("m"), mesh=parse_plan("ep=2,tp=4")))
            assert jax.config.jax_platforms == platforms
        assert int(os.environ["NPROC"]) > 2 * 8
        jax.config.update("jax_platforms", "tpu")
        before_jax(argparse.Namespace(model=None, mesh=None))
        assert jax.config.jax_platforms == "tpu"
        jax.config.update("jax_platforms", "nosuchchip,cpu")  # JAX would take the CPU without a word
        refused(
            capsys, ["align", "--model", v3, "--taps", tmp_path / "t.safetensors"], "--platform nosuchchip: expected"
        )
    finally:
        jax.config.update("jax_platforms", before)
