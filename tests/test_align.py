"""`dsjax align`: a toy mixture of experts in NumPy with faults in it, and the files and flags of the command."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import ml_dtypes
import numpy as np
import pytest
from bundles import GOLDEN, outputs, safetensors_bytes, save_tensors, write_bundle
from damage import refused
from helpers import SEED, rng

from dsjax.align import Tap, compare, taps
from dsjax.align.plot import Point, html_page, svg_scatter
from dsjax.align.show import report_plot, report_text
from dsjax.cli.main import main
from dsjax.errors import InputError

Capture = pytest.CaptureFixture[str]
LAYERS, EXPERTS, WIDTH, TOKENS = 3, 6, 16, 12


def toy(*, swap: tuple[int, int, int] | None = None, fault: Any = None, extra: bool = False) -> list[Tap]:
    """Taps of a mixture of experts: norm, gate and the two experts that it picks for each token, layer after layer.

    Args:
      swap: layer, and the two experts whose weights are exchanged.
      fault: function of (layer, the experts' output), to change it.
      extra: one more operator in every layer.
    """
    r = np.random.default_rng(11)
    x = r.normal(size=(TOKENS, WIDTH))
    found: list[Tap] = []

    def tap(layer: int | None, operator: str, *values: np.ndarray) -> None:
        order = found[-1].order + 1 if found else 0
        kinds = {"f": np.float32, "i": np.int32}
        found.extend(Tap(order, layer, operator, i, v.astype(kinds[v.dtype.kind])) for i, v in enumerate(values))

    for layer in range(LAYERS):
        router, experts = r.normal(size=(WIDTH, EXPERTS)), r.normal(size=(EXPERTS, WIDTH, WIDTH)) / WIDTH**0.5
        if swap and swap[0] == layer:
            experts[[swap[1], swap[2]]] = experts[[swap[2], swap[1]]]
        y = x / np.sqrt((x**2).mean(-1, keepdims=True))
        tap(layer, "rms_norm", y)
        if extra:
            tap(layer, "act_quant", y)
        scores = np.exp(y @ router)
        picked = np.argsort(-scores, axis=-1)[:, :2]
        weights = np.take_along_axis(scores, picked, -1)
        weights /= weights.sum(-1, keepdims=True)
        tap(layer, "moe_gate", picked, weights)
        out = np.einsum("tk,tkd->td", weights, np.einsum("td,tkde->tke", y, experts[picked]))
        out = fault(layer, out) if fault else out
        tap(layer, "grouped_matmul", out)
        x = x + out
    tap(None, "head", x)
    return found


def report_of(candidate: list[Tap], **options: Any) -> dict[str, Any]:
    return compare(taps.arrays(toy()), taps.arrays(candidate), **options)


def test_equal_runs() -> None:
    report = report_of(toy())
    assert report["within_bound"] and report["within_strict"]
    assert report["first_departure"] == {"bound": None, "strict": None}
    assert [row["error"] for row in report["results"]] == [0] * (4 * LAYERS + 1)
    assert [(g["operator"], g["results"]) for g in report["operators"]] == [
        *(("rms_norm", LAYERS), ("moe_gate", 2 * LAYERS), ("grouped_matmul", LAYERS), ("head", 1)),
    ]
    assert sorted((g["layer"], g["results"]) for g in report["layers"]) == [(layer, 4) for layer in range(LAYERS)]


def test_two_experts_swapped() -> None:
    """The first call that departs is the grouped matmul of that layer; everything before is equal."""
    report = report_of(toy(swap=(1, 2, 5)))
    assert not report["within_bound"]
    assert report["first_departure"] == {"bound": "00005.1.grouped_matmul", "strict": "00005.1.grouped_matmul"}
    rows = {row["name"]: row for row in report["results"]}
    assert rows["00005.1.grouped_matmul"]["error"] > 0.05
    assert all(row["error"] == 0 for row in report["results"] if row["order"] < 5)
    assert report["layers"][-1]["layer"] == 0 and report["layers"][-1]["error"] == 0
    assert report["operators"][0]["beyond_bound"] >= 1
    text = report_text(report)
    assert "first beyond strict: 00005.1.grouped_matmul; beyond 5%: 00005.1.grouped_matmul" in text
    assert text.splitlines()[-1] == "5%: FAIL; strict (1e-05): FAIL"


@pytest.mark.parametrize(("factor", "bound"), [(1.04, True), (1.06, False)])
def test_4_and_6_percent(factor: float, bound: bool) -> None:
    """Of one operator in the last layer."""
    report = report_of(toy(fault=lambda layer, out: out * factor if layer == LAYERS - 1 else out))
    name = "00008.2.grouped_matmul"
    row = next(row for row in report["results"] if row["name"] == name)
    assert row["error"] == pytest.approx(factor - 1, rel=1e-4)
    assert (row["within_bound"], row["within_strict"]) == (bound, False)
    assert report["within_bound"] == bound and not report["within_strict"]
    assert report["first_departure"] == {"bound": None if bound else name, "strict": name}


def test_nan() -> None:
    def fault(layer: int, out: np.ndarray) -> np.ndarray:
        return np.where(np.arange(out.size).reshape(out.shape) == 5, np.nan, out) if layer == 0 else out

    report = report_of(toy(fault=fault))
    assert not report["within_bound"] and report["first_departure"]["bound"] == "00002.0.grouped_matmul"
    assert "are NaN or Inf where the golden is finite, first at [0, 5]" in report_text(report)
    ElementTree.fromstring(report_plot(report, "NaN"))


def test_other_operators_in_between() -> None:
    """Calls are matched by layer and operator: a configuration that calls one more is still compared call by call."""
    report = report_of(toy(extra=True))
    assert report["within_strict"] and len(report["extra"]) == LAYERS and report["missing"] == []
    assert "not compared: 3 results of the candidate that the reference lacks: act_quant 3\n" in report_text(report)
    other = compare(taps.arrays(toy(extra=True)), taps.arrays(toy()))
    assert not other["within_bound"] and len(other["missing"]) == LAYERS
    common = compare(taps.arrays(toy(extra=True)), taps.arrays(toy()), common=True)
    assert common["within_strict"] and len(common["missing"]) == LAYERS and len(common["results"]) == 4 * LAYERS + 1
    assert "not compared: 3 results of the reference that the candidate lacks: act_quant 3\n" in report_text(common)


def test_any_calls_in_between() -> None:
    """More calls anywhere, some of operators that both have: what is compared is equal, the rest is counted."""
    random = rng(110)
    for _ in range(20):
        candidate, added, order = [], [], 0
        for call in range(toy()[-1].order + 1):
            for tap in (tap for tap in toy() if tap.order == call):
                candidate.append(dataclasses.replace(tap, order=order))
            order += 1
            if random.random() < 0.4:
                operator, layer = (
                    str(random.choice(["act_quant", "rms_norm", "moe_gate"])),
                    int(random.integers(LAYERS)),
                )
                added.append((layer, operator))
                candidate.append(Tap(order, layer, operator, 0, random.normal(size=(TOKENS, WIDTH))))
                order += 1
        report = report_of(candidate, common=True)
        lost = {place for place in added if place[1] != "act_quant"}  # which of several calls is which is not known
        results = {"rms_norm": 1, "moe_gate": 2}
        assert [row["error"] for row in report["results"]] == [0] * len(report["results"]), f"seed {SEED}"
        assert {(group["layer"], group["operator"]) for group in report["uneven"]} == lost
        assert len(report["missing"]) == sum(results[operator] for _, operator in lost)
        assert len(report["results"]) + len(report["missing"]) == 4 * LAYERS + 1 and report["unlike"] == []
        assert len(report["extra"]) == len(added) + len(report["missing"])
        assert not lost or "not paired, since not called equally often: " in report_text(report)


def test_blocks_tell_calls_apart() -> None:
    """A router's product in floats is paired with itself where all others are of another operator."""
    x = np.arange(8, dtype=np.float32)
    reference = [Tap(i, 0, "dot", 0, x + i, block) for i, block in enumerate(("queries", "queries", "router"))]
    candidate = [Tap(0, 0, "int8_dot", 0, x, "queries"), Tap(1, 0, "dot", 0, x + 2, "router")]
    report = compare(taps.arrays(reference), taps.arrays(candidate), common=True)
    assert [(row["name"], row["error"]) for row in report["results"]] == [("00002.0.router.dot", 0)]
    assert report["missing"] == ["00000.0.queries.dot", "00001.0.queries.dot"]
    assert report["extra"] == ["00000.0.queries.int8_dot"] and report["uneven"] == []
    assert [(group["block"], group["results"]) for group in report["blocks"]] == [("router", 1)]


def test_results_in_another_form() -> None:
    """Codes where the other run has numbers, or other shapes: told if what is common is asked for, else a failure."""
    reference = [Tap(0, 0, "write_rows", 0, np.ones((2, 4), np.float32)), Tap(1, 0, "mla", 0, np.ones(3, np.float32))]
    for other in (np.ones((2, 4), np.uint8), np.ones((2, 5), np.float32)):
        candidate = taps.arrays([dataclasses.replace(reference[0], value=other), reference[1]])
        report = compare(taps.arrays(reference), candidate, common=True)
        assert report["within_strict"] and report["unlike"] == ["00000.0.write_rows"] and len(report["results"]) == 1
        assert "not compared: 1 results held in another form" in report_text(report)
        strict = compare(taps.arrays(reference), candidate)
        assert not strict["within_bound"] and strict["unlike"] == []
        assert strict["first_departure"]["bound"] == "00000.0.write_rows"
        with pytest.raises(InputError, match="expected results of the same names"):
            compare({"00000.0.a": np.ones((2, 4), np.float32)}, {"00000.0.a": other}, common=True)
    assert not compare({"y": np.ones(2)}, {"y": np.ones(3)}, common=True)["within_bound"]  # no tap: a vendor's result


def test_one_result_of_a_call_is_missing() -> None:
    """It alone: later calls of that operator are not taken for it."""
    candidate = taps.arrays(toy())
    del candidate["00001.0.moe_gate.1"]
    report = compare(taps.arrays(toy()), candidate)
    assert report["missing"] == ["00001.0.moe_gate.1"] == [r["name"] for r in report["results"] if r["error"] > 0]
    again = [
        *toy()[:3],
        Tap(3, 0, "moe_gate", 0, np.ones(2, np.float32)),
        Tap(3, 0, "moe_gate", 1, np.ones(2, np.float32)),
    ]
    lacking = taps.arrays(again)
    del lacking["00001.0.moe_gate.1"]
    assert compare(taps.arrays(again), lacking)["missing"] == ["00001.0.moe_gate.1"]


def test_integers_are_equal_or_not() -> None:
    """Picked experts in another order: few unequal ones pass at 5%, none at the strict bound."""
    ids = np.arange(100, dtype=np.int32)
    other = ids.copy()
    other[:3] = -1
    report = compare({"ids": ids, "codes": ids.astype(np.uint8)}, {"ids": other, "codes": other.astype(np.uint8)})
    ids_row, codes = report["results"]
    assert (ids_row["equal_share"], ids_row["within_bound"], ids_row["within_strict"]) == (0.97, True, False)
    assert (codes["within_bound"], codes["within_strict"]) == (True, None)


def save(path: Path, found: list[Tap], **about: Any) -> None:
    taps.save(path, taps.arrays(found), about)


def test_taps_file(tmp_path: Path) -> None:
    written = [
        *toy(),
        Tap(99, None, "mla", 0, np.ones((2, 3), ml_dtypes.bfloat16)),
        Tap(100, 61, "mla", 1, np.asarray(np.int32(7)), "attend"),
    ]
    save(tmp_path / "t.safetensors", written, model="toy", numerics="plain")
    found, about = taps.load(tmp_path / "t.safetensors")
    assert about == {"model": "toy", "numerics": "plain"}
    names = taps.names(written)
    assert names[:4] == ["00000.0.rms_norm", "00001.0.moe_gate.0", "00001.0.moe_gate.1", "00002.0.grouped_matmul"]
    assert names[-2:] == ["00099.-.mla", "00100.61.attend.mla.1"]
    for name, tap in zip(names, written, strict=True):
        np.testing.assert_array_equal(found[name].values(), np.asarray(tap.value).astype(found[name].values().dtype))
        assert taps.parse(name) == taps.Place(tap.order, tap.layer, tap.operator, tap.result, tap.block)
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


def test_bad_taps(tmp_path: Path) -> None:
    for wrong in (
        [Tap(0, None, "a.b", 0, np.zeros(1))],
        [Tap(0, None, "a", 0, np.zeros(1), "b/c")],
        [Tap(0, 1, "mla", 0, np.zeros(1))] * 2,
    ):
        with pytest.raises(ValueError, match="expected taps"):
            taps.arrays(wrong)
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"x": np.zeros(2, np.float32)})
    assert taps.load(path)[1] is None
    for head, message in (
        ({"schema": 2, "about": {}}, "schema 1"),
        ({"schema": 1}, "metadata of taps"),
        ([], "metadata"),
    ):
        metadata = {"dsjax.taps": json.dumps(head)}
        tensor = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
        path.write_bytes(safetensors_bytes({"__metadata__": metadata, "00000.-.a": tensor}, b"\0"))
        with pytest.raises(InputError, match=message):
            taps.load(path)
    assert taps.parse("00012.3.rms_norm") == taps.Place(12, 3, "rms_norm", 0)
    assert taps.parse("00013.-.mla.2") == taps.Place(13, None, "mla", 2)
    assert taps.parse("00013.-.attend.mla.2") == taps.Place(13, None, "mla", 2, "attend")
    for name in ("logits", "cache.latent", "12.3.mla", "00012.x.mla", "00012.3.a.mla.y", "00012.3", "00012.3.mla.0.1"):
        assert taps.parse(name) is None


def run(capsys: Capture, *arguments: Any) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    status = main(["align", *map(str, arguments), "--json"])
    last = capsys.readouterr().out.splitlines()
    assert len(last) == 1
    return status, json.loads(last[0], parse_constant=pytest.fail)


def test_command_with_taps(tmp_path: Path, capsys: Capture) -> None:
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save(a, toy(), tokens_sha256="of both")
    save(b, toy(swap=(0, 0, 1)), tokens_sha256="of both")
    status, report = run(capsys, a, b, "--report", tmp_path / "r.json", "--plot", tmp_path / "p.html")
    assert status == 1 and report["first_departure"]["bound"] == "00002.0.grouped_matmul"
    assert report["first_layer"] == {"bound": 0, "strict": 0}
    assert report["runs"] == {"reference": {"tokens_sha256": "of both"}, "candidate": {"tokens_sha256": "of both"}}
    assert json.loads((tmp_path / "r.json").read_text()) == report
    page = (tmp_path / "p.html").read_text()
    assert page.count("<path") >= len(report["results"]) and "00002.0.grouped_matmul" in page
    assert run(capsys, a, a, "--plot", tmp_path / "p.svg")[0] == 0
    assert main(["align", str(a), str(b)]) == 1
    table = capsys.readouterr().out
    assert len(table.splitlines()) < 40 and "... 1 more results, no worse" in table
    worst = [line.split()[0] for line in table.split("\n\n")[-1].splitlines()[1:13]]
    errors = {row["name"]: row["error"] for row in report["results"]}
    assert worst[:12] == sorted(worst[:12], key=lambda name: -errors[name])


def test_command_with_every_kind_of_side(tmp_path: Path, capsys: Capture) -> None:
    """A bundle, a candidate's folder, .safetensors, .npz and the .npy of `dsjax score`."""
    bundle = write_bundle(tmp_path / "bundle", {GOLDEN: outputs()})
    chip = tmp_path / "chip" / GOLDEN
    chip.mkdir(parents=True)
    changed = {n: a.astype(np.float32) if n == "hidden" else a for n, a in outputs().items()}
    changed["logits"] = changed["logits"] * np.float32(1.04)
    np.savez(chip / "outputs.npz", **changed)
    status, report = run(capsys, bundle, tmp_path / "chip")
    assert status == 0 and report["within_bound"] and not report["within_strict"]
    assert set(report["logits"]) == {f"{GOLDEN}/logits"} and report["logits"][f"{GOLDEN}/logits"]["top1"] == 1
    assert run(capsys, bundle, tmp_path / "chip", "--gate", "strict")[0] == 1
    assert run(capsys, bundle, tmp_path / "chip", "--bound", "0.03")[0] == 1
    assert run(capsys, bundle, tmp_path / "chip", "--strict", "0.045", "--gate", "strict")[0] == 0
    assert run(capsys, bundle / "golden" / GOLDEN, chip)[0] == 0

    np.save(tmp_path / "a.npy", changed["logits"])
    np.save(tmp_path / "b.npy", outputs()["logits"] + np.float32(0.3))
    status, report = run(capsys, tmp_path / "a.npy", tmp_path / "b.npy")
    assert status == 1 and [row["name"] for row in report["results"]] == ["logits"]
    assert run(capsys, tmp_path / "a.npy", chip / "outputs.npz")[0] == 0  # the others are only extra
    del changed["hidden"]
    save_tensors(tmp_path / "c.safetensors", changed)
    status, report = run(capsys, chip / "outputs.npz", tmp_path / "c.safetensors")
    assert status == 1 and report["missing"] == ["hidden"]
    assert run(capsys, chip / "outputs.npz", tmp_path / "c.safetensors", "--common")[0] == 0


def test_command_refuses(tmp_path: Path, capsys: Capture) -> None:
    good, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save(good, toy(), tokens_sha256="a")
    save(other, toy(), tokens_sha256="b")
    refused(capsys, ["align", good, other], "b.safetensors: expected taps of the same tokens", "a.safetensors")
    other.unlink()
    save_tensors(other, {"x": np.zeros(3, np.float32)})
    refused(capsys, ["align", good, other], "expected results of the same names", "x")
    refused(capsys, ["align", good, tmp_path / "none.npz"], "none.npz")
    (tmp_path / "empty").mkdir()
    refused(capsys, ["align", good, tmp_path / "empty"], "empty: expected outputs.safetensors")
    for text in ("0", "-1", "nan", "inf", "x"):
        refused(capsys, ["align", good, good, f"--bound={text}"], "--bound")
    refused(capsys, ["align", good, good, "--plot", tmp_path / "p.png"], "p.png", ".svg")
    refused(capsys, ["align", good, good, "--plot", tmp_path / "no" / "p.svg"], "p.svg", "existing folder")
    refused(capsys, ["align", good, good, "--plot", tmp_path / "x.svg", "--report", tmp_path / "x.svg"], "another file")
    other.write_bytes(good.read_bytes()[:-1])
    refused(capsys, ["align", good, other], "b.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors", "empty"]


SVG = "{http://www.w3.org/2000/svg}"


def test_plot() -> None:
    """Every point has a mark with its own words, larger errors stand higher, and bounds lie between them."""
    values = [0.0, 1e-7, 1e-3, 0.2, float("inf"), float("nan")]
    points = [Point(i, y, f"op{i % 2}", f"<{i}> & more") for i, y in enumerate(values)]
    svg = svg_scatter(points, {"5%": 0.05, "strict": 1e-5}, "A & <B>", "call", "error", joined=True)
    root = ElementTree.fromstring(svg)
    marks = {
        str(path.findtext(f"{SVG}title")): [float(v) for v in re.findall(r"[-\d.]+", path.get("transform") or "")]
        for path in root.iter(f"{SVG}path")
        if path.find(f"{SVG}title") is not None
    }
    assert list(marks) == [f"<{i}> & more" for i in (0, 2, 4, 1, 3, 5)]  # group by group
    heights = [-marks[f"<{i}> & more"][1] for i in range(6)]
    assert heights[:5] == sorted(heights[:5]) and heights[4] == heights[5]
    across = [marks[f"<{i}> & more"][0] for i in range(6)]
    assert across == sorted(across) and len(set(across)) == 6
    lines = [-float(line.get("y1") or 0) for line in root.iter(f"{SVG}line") if line.get("stroke-dasharray")]
    assert heights[2] < lines[0] < heights[3] and heights[1] < lines[1] < heights[2]
    texts = {text.text for text in root.iter(f"{SVG}text")}
    assert {"A & <B>", "call", "error", "5%", "strict", "op0", "op1", "equal", "not finite", "1e-3"} <= texts
    assert len(list(root.iter(f"{SVG}polyline"))) == 2
    assert html_page("a<b", svg, "<pre>").count("<pre") == 1


def test_plot_of_little_and_of_much() -> None:
    for points in ([], [Point(3, 0, "g", "l")], [Point(3, 2e-5, "g", "l")]):
        ElementTree.fromstring(svg_scatter(points, {}, "t", "x", "y"))
    many = svg_scatter([Point(i, 10.0**-i, f"op{i}", "") for i in range(60)], {}, "t", "x", "y")
    assert "and 38 more" in many and "1e-59" in many
