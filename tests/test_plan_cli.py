"""`dsjax plan` from the command line, chips' figures and files, and every mistake in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

from dsjax import bench
from dsjax.cli import common
from dsjax.cli.main import main
from dsjax.cli.plan import size
from dsjax.config import load_config
from dsjax.errors import InputError
from dsjax.layout import layout
from dsjax.numerics import Numerics
from dsjax.plan import Cards, Load, answer, check, chip_names, load_chip, load_model
from dsjax.plan.check import HELD
from dsjax.plan.chips import ELEMENTS
from dsjax.plan.memory import memory
from dsjax.plan.placement import Placement
from dsjax.plan.search import Candidate, candidates
from sharding import Plan

Capture = pytest.CaptureFixture[str]
EIGHT = ("plan", "deepseek-v3", "--cards", "8", "--memory", "96GB")


def run(capsys: Capture, *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    status = main([*arguments, "--json"])
    out, err = capsys.readouterr()
    assert status == 0, err
    assert out.endswith("\n") and len(out.splitlines()) == 1, out
    result = json.loads(out)
    assert isinstance(result, dict)
    return result


# --- the verb --------------------------------------------------------------------------------------------------------


def test_json(capsys: Capture) -> None:
    """What the design promises, for what fits and what does not, both with status 0."""
    for gb, fits in (("96GB", True), ("80GB", False)):
        found = run(capsys, "plan", "deepseek-v3", "--weights", "int8", "--cards", "8", "--memory", gb)
        assert found["fits"] is fits and found["reason"].startswith("fits" if fits else "does not fit")
        card = found["bytes_per_card"]
        parts = ("weights", "scales", "kv", "indexer", "activations", "workspace")
        assert card["total"] == sum(card[part] for part in parts)
        assert found["free_bytes"] == found["memory_bytes"] - card["total"]
        assert "estimate" not in found


def test_human_output_ends_with_the_verdict(capsys: Capture) -> None:
    assert main([*EIGHT, "--weights", "int8", "--chip", "h20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("fits: ") and len(lines) < 16
    assert max(map(len, lines[:-1])) < 180
    text = "\n".join(lines)
    for part in ("weights", "kv", "workspace", "first token", "each further", "unverified"):
        assert part in text


def test_an_asked_plan_is_kept(capsys: Capture) -> None:
    found = run(capsys, *EIGHT, "--mesh", "dp=2,ep=2,tp=2", "--attention", "slots")
    assert (found["mesh"], found["attention"], found["plans_compared"]) == ("dp=2,ep=2,tp=2", "slots", 1)
    assert run(capsys, *EIGHT, "--mesh", "ep=4")["cards_used"] == 4


def test_a_config_alone_can_be_planned(capsys: Capture, tmp_path: Path) -> None:
    """A folder with nothing but DeepSeek's config.json is the preset."""
    from dsjax.presets import preset

    (tmp_path / "config.json").write_text(json.dumps(preset("deepseek-v3")))
    found = run(capsys, "plan", str(tmp_path), *EIGHT[2:])
    assert found["bytes_per_card"] == run(capsys, *EIGHT)["bytes_per_card"]


def test_planning_starts_no_backend_and_takes_no_time() -> None:
    """No platform of that name exists: whoever asked JAX for a device would fail. 1.6 T parameters on 256 cards."""
    arguments = ["plan", "deepseek-v4-pro", "--cards", "256", "--chip", "tpu-v5p", "--context", "131072", "--json"]
    environment = os.environ | {"JAX_PLATFORMS": "nonsense", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "dsjax", *arguments], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fits"]
    start = time.process_time()
    model = load_model("deepseek-v4-pro", Numerics("native"))
    answer(model, Cards(256, 95e9, chip=load_chip("tpu-v5p")), Load(131072, 256))
    assert time.process_time() - start < 5  # about one


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--cards", "0"), "--cards"),
        (("--memory", "96"), "--memory"),
        (("--memory", "96 gigabytes"), "--memory"),
        (("--memory", "0GB"), "--memory"),
        (("--reserve", "-1GB"), "--reserve"),
        (("--chip", "h1000"), "--chip h1000: expected a TOML file or a known chip"),
        (("--mesh", "ep=16"), "--mesh ep=16: expected at most 8 cards"),
        (("--mesh", "xp=2"), "--mesh: mesh plan 'xp=2'"),
        (("--mesh", "tp=3"), "3 ways"),
        (("--context", "200000"), "--context 200000: expected at most the 163840 positions"),
        (("--batch", "0"), "--batch"),
        (("--attention", "both"), "--attention"),
        (("--numerics", "native", "--weights", "int8"), "--weights int8"),
        (("--dtype", "float32", "--numerics", "native"), "--dtype float32"),
        (("--kv", "fp8"), "--kv fp8"),
    ],
)
def test_mistakes_get_one_line(capsys: Capture, arguments: tuple[str, ...], said: str) -> None:
    assert main([*EIGHT, *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1
    assert said in err


def test_a_memory_is_needed(capsys: Capture, tmp_path: Path) -> None:
    assert main(["plan", "deepseek-v3", "--cards", "8"]) == 2
    assert "--memory" in capsys.readouterr().err
    assert main(["plan", str(tmp_path), *EIGHT[2:]]) == 2
    assert "config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"), [("96GB", 96_000_000_000), ("64GiB", 1 << 36), ("1.5 TB", 1_500_000_000_000), ("7B", 7)]
)
def test_sizes(text: str, expected: int) -> None:
    assert size(text) == expected


# --- the search ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "batch"), [("deepseek-v3", 1), ("deepseek-v3", 3), ("deepseek-v4-flash", 2)])
def test_the_largest_is_the_largest(name: str, batch: int) -> None:
    """It fits, and one more does not, unless the model has no more positions."""
    memory = 92e9 if name == "deepseek-v3" else 25e9
    model = load_model(name, Numerics("plain"))

    def fits(context: int, batch: int) -> bool:
        (found,) = candidates(model, Cards(8, memory), Load(context, batch), Plan(1, 8, 1))
        return found.fits

    (found,) = candidates(model, Cards(8, memory), Load(4096, batch), Plan(1, 8, 1))
    context, most = found.largest_context(), found.largest_batch()
    assert 0 < context < model.config.max_position_embeddings and most > 0
    assert fits(context, batch) and not fits(context + 1, batch)
    assert fits(4096, most) and not fits(4096, most + 1)


def test_more_cards_never_hold_less() -> None:
    """Of the best plans, what one card holds shrinks, and what is left grows."""
    model = load_model("deepseek-v3", Numerics("plain"))
    free = [answer(model, Cards(n, 96e9), Load(4096, 1))["free_bytes"] for n in (8, 16, 32, 64, 128)]
    assert free == sorted(free)


def test_with_figures_the_best_plan_is_the_fastest() -> None:
    model, chip = load_model("deepseek-v3", Numerics("plain")), load_chip("h200")
    cards, load = Cards(16, 141e9, chip=chip), Load(8192, 32)
    every: list[Candidate] = [c for c in candidates(model, cards, load) if c.fits]
    found = answer(model, cards, load)
    fastest = min(c.tpot for c in every if c.tpot is not None)
    assert found["plans_compared"] > 20
    assert found["estimate"]["tpot_s"] <= 1.02 * fastest


def test_cards_that_no_axis_divides_by() -> None:
    """A small model goes side by side on 7 cards; of 12 cards V3 can be cut over 4 only, so that 8 of them fit it."""
    found = answer(load_model("deepseek-v2-lite", Numerics("plain")), Cards(7, 80e9), Load(4096, 1))
    assert found["fits"] and found["cards_used"] == 7 and found["mesh"] == "dp=7"
    model = load_model("deepseek-v3", Numerics("plain"), "int8")
    found = answer(model, Cards(12, 96e9), Load(4096, 1))
    assert found["fits"] and found["cards_used"] == 8
    found = answer(model, Cards(12, 80e9), Load(4096, 1))
    assert not found["fits"] and found["instead"] == ["16 cards (--mesh ep=16 --attention heads)"]


@pytest.mark.parametrize("verb", ["generate", "score", "bench"])
def test_too_little_memory_is_found_before_anything_is_read(
    verb: str, v4_folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layout that runs is counted, here with copied output groups, which are more than split ones."""
    (tmp_path / "tokens.json").write_text("[[5, 6, 7]]")
    command = {
        "generate": ["generate", "--prompt-ids", "5,6,7", "--max-new-tokens", "5"],
        "score": ["score", "--tokens", str(tmp_path / "tokens.json"), "--logits", str(tmp_path / "logits.npy")],
        "bench": ["bench", "--prompt-length", "3", "--new-tokens", "5"],
    }[verb]
    command += ["--model", str(v4_folder), "--mesh", "tp=4"]
    model, load = load_model(str(v4_folder), Numerics("plain")), Load(8, 1)
    held = {
        how: sum(memory(Placement(model, layout(model.config, Plan(tp=4), o_groups=how)), load)[part] for part in HELD)
        for how in ("split", "gather")
    }
    assert held["split"] < held["gather"]
    monkeypatch.setattr(check, "device_memory", lambda device, sharing: held["split"])

    def read(*_: Any, **__: Any) -> Any:
        raise AssertionError("loaded")

    for module in (common, bench):
        monkeypatch.setattr(module, "load_onto", read)
    assert main([*command, "--o-groups", "gather"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dsjax: not enough memory: does not fit: ") and "GB per card" in line
    with pytest.raises(AssertionError, match="loaded"):
        main(command)


# --- chips -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", chip_names())
def test_the_tables_figures_are_sane_and_sourced(name: str) -> None:
    """Every figure has a source; sizes are those of cards that exist, in the units that the table promises."""
    chip = load_chip(name)
    assert 16e9 <= chip.memory_bytes <= 300e9
    assert chip.memory_bandwidth is None or 0.5e12 <= chip.memory_bandwidth <= 10e12
    assert set(chip.flops) <= set(ELEMENTS) and all(50e12 <= rate <= 20e15 for rate in chip.flops.values())
    figures = ["memory_bytes", *(f"flops.{element}" for element in chip.flops)]
    figures += ["memory_bandwidth"] if chip.memory_bandwidth else []
    for level, link in (("scale_up", chip.scale_up), ("scale_out", chip.scale_out)):
        if link is not None:
            assert 1e9 <= link.bandwidth <= 2e12 and 0 <= link.latency < 1e-4
            figures += [f"{level}.bandwidth"] + ([f"{level}.cards"] if level == "scale_up" else [])
            figures += [f"{level}.latency"] if link.latency else []
    assert set(figures) <= set(chip.sources), set(figures) - set(chip.sources)
    assert set(chip.unverified) <= set(chip.sources)
    rates = chip.flops
    assert rates.get("fp8", 0) == 0 or rates["fp8"] >= rates["bf16"]


def test_the_chips_that_were_asked_for_are_there() -> None:
    wanted = (
        "910b-32gb 910b-64gb 910c 950 mlu590 k100-ai s5000 p800 zhenwu c550 bi-v150 "
        "h100 h200 h20 b200 mi300x v5p v6e tpu7x"
    )
    for part in wanted.split():
        assert any(part in name for name in chip_names()), part


OWN = """
title = "our card"
memory_bytes = 48e9
memory_bandwidth = [1.0e12, "sheet"]
flops = { bf16 = 200e12 }
scale_up = { bandwidth = 100e9, cards = 8 }
[sources.sheet]
at = "our data sheet"
"""


def test_a_users_own_chip(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "card.toml"
    path.write_text(OWN)
    chip = load_chip(str(path))
    assert (chip.title, chip.memory_bytes, chip.flops) == ("our card", 48e9, {"bf16": 200e12})
    assert chip.scale_up is not None and (chip.scale_up.cards, chip.scale_up.latency) == (8, 0)
    assert chip.unverified == ("memory_bandwidth",) and chip.sources == {"memory_bandwidth": "our data sheet"}
    found = run(capsys, "plan", "deepseek-v4-flash", "--cards", "8", "--chip", str(path))
    assert found["memory_bytes"] == 48e9 and found["fits"]
    assert found["estimate"]["tpot_s"] > 0 and found["estimate"]["lacking"] == []
    # A decode step reads at least its weights: no estimate is faster.
    assert found["estimate"]["tpot_s"] > found["estimate"]["decode"]["weight_bytes"] / 1e12
    beyond = run(capsys, "plan", "deepseek-v3", "--cards", "32", "--chip", str(path))
    assert beyond["estimate"]["lacking"] == ["scale_out"] and "tpot_s" not in beyond["estimate"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("memory_bytes = 48e9", "", "memory_bytes: expected a positive number of bytes, found None"),
        ("48e9", "-48e9", "memory_bytes: expected a positive number of bytes"),
        ("48e9", '"48GB"', "memory_bytes: expected a positive number of bytes"),
        ("48e9", "nan", "memory_bytes"),
        ("48e9", "true", "memory_bytes"),
        ('"sheet"]', '"shoot"]', "memory_bandwidth: expected a source out of [sources] (sheet)"),
        ("bf16 = 200e12", "bf17 = 200e12", "flops: expected only fp32, bf16"),
        ("flops = { bf16 = 200e12 }", "flops = 200e12", "flops: expected a table"),
        ("cards = 8", "cards = 7.5", "scale_up.cards: expected a whole number"),
        (", cards = 8", "", "scale_up.cards: expected it"),
        ("title =", "titel =", "titel: expected one of title, memory_bytes"),
        ("title = ", "title == ", "expected TOML, found a mistake"),
        ('title = "our card"', "title = 7", "title: expected a text"),
        ('at = "our data sheet"', "at = 1", "sources.sheet: expected a text `at`"),
    ],
)
def test_a_chip_files_mistakes_are_named(tmp_path: Path, old: str, new: str, said: str) -> None:
    path = tmp_path / "card.toml"
    assert old in OWN
    path.write_text(OWN.replace(old, new, 1))
    with pytest.raises(InputError) as error:
        load_chip(str(path))
    assert said in str(error.value) and str(path) in str(error.value)


def test_a_chip_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "card.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="expected a readable TOML file"):
        load_chip(str(path))


def test_a_chip_without_a_bandwidth_still_says_what_fits(capsys: Capture) -> None:
    found = run(capsys, "plan", "deepseek-v3", "--weights", "int8", "--cards", "8", "--chip", "kunlun-p800")
    assert found["fits"] and "memory_bandwidth" in found["estimate"]["lacking"]
    assert load_config("deepseek-v3").max_position_embeddings >= found["largest_context"]
