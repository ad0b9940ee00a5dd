"""Reports: one description, two renderings; blocks say what they stand for; accounts are whole numbers."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import pytest
from helpers_export import export_twin
from jax import lax

from dsjax.cache.rows import round_capacity
from dsjax.export.report.page import Amount, Section, Table, html, markdown, scaled, svg_bars
from dsjax.export.stablehlo.inventory import inventory
from dsjax.export.stablehlo.sites import attributes, digests, sites, stands_for

TABLE = Table(["part", "`a|b`", "c"], [["x<y", scaled(802_780, "B"), 7], ["`z`", Amount(0, "none"), None]], bars=2)
PAGE = [Section("One & two", ["All of `x<y`.", TABLE])]


class _Text(HTMLParser):
    """Cells and tags of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.rows: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1] and self.get_starttag_text() != "<tr>":
            self.rows[-1][-1] += data


def cells(page: str) -> list[list[str]]:
    parser = _Text()
    parser.feed(re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL))
    return [[cell.strip() for cell in row] for row in parser.rows]


def test_markdown_and_html_have_the_same_table() -> None:
    text, page = markdown("t", PAGE), html("t", PAGE)
    assert "| part | `a\\|b` | c |\n| --- | --- | --- |\n| x<y | 802.8 kB | 7 |\n| `z` | none | - |" in text
    assert cells(page) == [["part", "a|b", "c"], ["x<y", "802.8 kB", "7"], ["z", "none", "-"]]
    assert "<code>x&lt;y</code>" in page and '<h2 id="s0">One &amp; two</h2>' in page and "<pre" not in page
    assert "<script" not in page and re.findall(r"(?:href|src)=\"(?!#)", page) == []


def test_bars_are_as_long_as_their_numbers_and_labelled() -> None:
    svg = ElementTree.fromstring(svg_bars(Table(["p", "n"], [["a", 100], ["b", 25], ["c", None], ["d", 1]], bars=3)))
    space = "{http://www.w3.org/2000/svg}"
    widths = [float(rect.attrib["width"]) for rect in svg.iter(f"{space}rect")]
    assert len(widths) == 2 and widths[0] == pytest.approx(4 * widths[1], abs=0.3)
    assert [text.text for text in svg.iter(f"{space}text")] == ["a", "100", "b", "25", "c"]
    drawn = svg_bars(Table(["p", "`a<b`", "c"], [["x<y", 1, 2]], bars=1))  # names are escaped once
    assert "x&lt;y" in drawn and "a&lt;b" in drawn and "&amp;" not in drawn
    assert svg_bars(Table(["p", "n"], [["a", 0]], bars=1)) == svg_bars(Table(["p", "n"], [["a", "x"]], bars=1)) == ""


@pytest.mark.parametrize(("value", "text"), [(0, "0 B"), (999, "999 B"), (1e3, "1 kB"), (2.56e12, "2.56 TB")])
def test_numbers_have_decimal_prefixes(value: float, text: str) -> None:
    assert scaled(value, "B").text == text


def _operator(name: str, f):
    f.__name__ = f"dsjax.{name}"
    return jax.jit(f)


def test_sites_follow_arguments_through_loops_and_calls_and_know_equal_functions() -> None:
    def norm(eps: float):
        return _operator("rms_norm", lambda x, w: x * w * lax.rsqrt(jnp.mean(x * x) + eps))

    first, second = norm(1e-6), norm(1e-5)

    def f(x, stacked, other):
        def layer(c, i):
            return first(c, lax.dynamic_index_in_dim(stacked, i, keepdims=False)), None

        return second(lax.scan(layer, x, jnp.arange(3))[0], other)

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((4,), (3, 4), (4,))]
    module = jax.jit(f).lower(*shapes).compiler_ir("stablehlo")
    found = sites(module, ["x", "layers.norm", "norm"], inventory(module)["functions"])
    assert [(s["operator"], s["text"], s["executed"]) for s in found] == [("rms_norm", 1, 3), ("rms_norm", 1, 1)]
    assert [s["takes"] for s in found] == [{"in0": ["x"], "in1": ["layers.norm"]}, {"in1": ["norm"]}]
    alone = norm(1e-5).lower(*[jax.ShapeDtypeStruct((4,), jnp.float32)] * 2).compiler_ir("stablehlo")
    (same,) = stands_for(alone, "rms_norm", {"decode": found})  # the one with the same constant
    assert (same["program"], same["function"]) == ("decode", found[1]["function"]) and "digest" not in same
    assert stands_for(alone, "layer_norm", {"decode": found}) == []
    assert digests(alone)["main"] == found[1]["digest"] != found[0]["digest"]


def test_attributes_are_the_configs() -> None:
    config = {"rms_norm_eps": 1e-6, "n_group": 8, "quantization_config": {"weight_block_size": [128, 128]}}
    codes, floats = [{"dtype": "uint8"}], [{"dtype": "bfloat16"}]
    assert attributes({"operator": "rms_norm", "arguments": floats}, config) == {"rms_norm_eps": 1e-6}
    assert attributes({"operator": "block_scaled_dot", "arguments": floats}, config) == {}
    assert attributes({"operator": "block_scaled_dot", "arguments": codes}, config) == {"weight_block_size": [128, 128]}


def _whole(numbers: object) -> bool:
    if isinstance(numbers, dict):
        return all(_whole(n) for key, n in numbers.items() if key != "notes")
    return numbers is None or isinstance(numbers, int)


def test_a_bundles_report_and_accounts(tmp_path: Path) -> None:
    manifest = export_twin(tmp_path / "b", "deepseek-r1-distill-qwen-1.5b", "--phases", "decode", "--blocks")
    folder = tmp_path / "b"
    text, page = (folder / "REPORT.md").read_text(), (folder / "report.html").read_text()
    rows = cells(page)
    blocks = [m for m in manifest["modules"] if m["kind"] == "block"]
    assert all(m["stands_for"] and m["variant"] for m in blocks)
    named = json.loads((folder / "inventory.json").read_text())["modules"]["decode-b1-s32"]["named"]
    plain = [m for m in blocks if not m["name"].endswith("-edges")]
    for operator, entry in named.items():  # every call of every operator has its block
        mine = [m for m in plain if m["operator"] == operator]
        assert sum(s["executed"] for m in mine for s in m["stands_for"]) == entry["executed"]
        assert sorted(s["function"] for m in mine for s in m["stands_for"]) == sorted(entry["functions"])
    head = next(m for m in plain if any(s["takes"].get("in1") == ["head"] for s in m["stands_for"]))
    assert head["operator"] == "block_scaled_dot"
    assert all(any(m["name"] in row[0] for row in rows if row) and f"`{m['name']}`" in text for m in plain)
    assert page.count("<svg") >= 6 and page.count("<table") == text.count("| --- |\n") > 8
    memory, cost, cache = (json.loads((folder / f"{n}.json").read_text()) for n in ("memory", "cost", "cache"))
    assert memory["notes"] and cost["notes"] and _whole(memory["modules"]) and _whole(cost["modules"])
    held, work, kept = (found["modules"]["decode-b1-s32"] for found in (memory, cost, cache))
    assert sum(held["parameters_by_module"].values()) == held["parameters"]
    assert sum(work["weight_bytes_by_module"].values()) == pytest.approx(work["weight_bytes"], abs=8)
    assert kept["capacity"] == round_capacity(32) == 64 and "power of two" in kept["capacity_rule"]
    assert held["smallest_card_gb"] == 1
