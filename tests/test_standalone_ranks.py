"""verify.py on results of ranks: put together by their slices, in the right order or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import GOLDEN, Arrays, candidate_of, row_of, run_alone, save_tensors, write_bundle

from dsjax.export.standalone.verify import verify

RANKS = 4


def rank_slices() -> dict[int, dict[str, list[list[int]] | None]]:
    """ep=4: experts' rows and the vocabulary are split, `hidden` is on every rank."""
    return {
        rank: {"logits": [[0, 2], [8 * rank, 8 * rank + 8]], "cache.latent": [[rank, rank + 1], [0, 6]], "hidden": None}
        for rank in range(RANKS)
    }


def ranks_golden() -> Arrays:
    r = np.random.default_rng(7)
    shapes = {"logits": (2, 8 * RANKS), "cache.latent": (RANKS, 6), "hidden": (2, 5)}
    return {name: r.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def save_ranks(
    chip: Path, golden: Arrays, order: list[int], change: Callable[[int, Arrays], Any] | None = None
) -> None:
    """Writes each rank's results, `order[r]`'s in the folder of rank r."""
    for place, rank in enumerate(order):
        parts = {
            name: golden[name][tuple(slice(*bounds) for bounds in part)] if part else golden[name].copy()
            for name, part in rank_slices()[rank].items()
        }
        if change:
            change(place, parts)
        save_tensors(chip / GOLDEN / f"rank{place}" / "outputs.safetensors", parts)


@pytest.fixture
def ranks_bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle", {GOLDEN: ranks_golden()}, ranks=rank_slices())


def test_ranks(ranks_bundle: Path, tmp_path: Path) -> None:
    save_ranks(tmp_path / "chip", ranks_golden(), [0, 1, 2, 3])
    done = run_alone(ranks_bundle, tmp_path / "chip", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["within_strict"] and report["goldens"][0]["source"] == "4 ranks"
    assert report["goldens"][0]["notes"] == [] and all(
        "rank_difference" not in r for r in report["goldens"][0]["results"]
    )


@pytest.mark.parametrize("order", [[1, 0, 2, 3], [1, 2, 3, 0]])
def test_wrong_rank_order(ranks_bundle: Path, tmp_path: Path, order: list[int]) -> None:
    save_ranks(tmp_path / "chip", ranks_golden(), order)
    report = verify(ranks_bundle, tmp_path / "chip")
    (problem,) = report["goldens"][0]["problems"]
    assert not report["within_bound"] and "wrong rank order" in problem
    for place, rank in enumerate(order):  # what lies in folder `place` belongs in the place of `rank`
        assert (f"rank {place}'s in place of rank {rank}'s" in problem) == (place != rank)


def test_wrong_rank_order_of_whole_results(ranks_bundle: Path, tmp_path: Path) -> None:
    """A candidate put together from its ranks in the wrong order."""
    golden = ranks_golden()
    golden["logits"] = np.concatenate([golden["logits"][:, 8 * r : 8 * r + 8] for r in (0, 2, 1, 3)], axis=1)
    golden["cache.latent"] = golden["cache.latent"][[0, 2, 1, 3]]
    report = verify(ranks_bundle, candidate_of(tmp_path, golden))
    (problem,) = report["goldens"][0]["problems"]
    assert "wrong rank order" in problem and "rank 1's in place of rank 2's" in problem and "rank 3" not in problem


def test_no_rank_order_helps(ranks_bundle: Path, tmp_path: Path) -> None:
    save_ranks(tmp_path / "chip", ranks_golden(), [1, 0, 2, 3], lambda _, parts: parts.update(logits=-parts["logits"]))
    report = verify(ranks_bundle, tmp_path / "chip")
    assert not report["within_bound"] and report["goldens"][0]["problems"] == []


@pytest.mark.parametrize(("factor", "bound", "strict"), [(1.0001, True, False), (1.2, False, False)])
def test_ranks_that_differ(ranks_bundle: Path, tmp_path: Path, factor: float, bound: bool, strict: bool) -> None:
    def change(place: int, parts: Arrays) -> None:
        if place == RANKS - 1:
            parts["hidden"] *= np.float32(factor)

    save_ranks(tmp_path / "chip", ranks_golden(), [0, 1, 2, 3], change)
    report = verify(ranks_bundle, tmp_path / "chip")
    row = row_of(report, "hidden")
    assert row["norm"] == 0  # of the first rank's
    assert row["rank_difference"] == pytest.approx(factor - 1, rel=1e-2)
    assert (row["within_bound"], row["within_strict"]) == (bound, strict)
    assert "hidden: ranks differ by" in report["goldens"][0]["notes"][0]


def test_missing_ranks(ranks_bundle: Path, tmp_path: Path) -> None:
    chip = tmp_path / "chip"
    save_ranks(chip, ranks_golden(), [0, 1, 2, 3], lambda place, parts: parts.pop("logits") if place == 3 else None)
    report = verify(ranks_bundle, chip)
    assert report["goldens"][0]["problems"] == ["logits: no such result of rank 3"] and not report["within_bound"]
    save_ranks(chip, ranks_golden(), [0, 1, 2, 3], lambda _, parts: parts.update(logits=parts["logits"][:, :3]))
    assert (
        "logits: rank 0: expected F32 [2, 8], found F32 [2, 3]" in verify(ranks_bundle, chip)["goldens"][0]["problems"]
    )
    for rank in (1, 2):
        (chip / GOLDEN / f"rank{rank}" / "outputs.safetensors").unlink()
    assert verify(ranks_bundle, chip)["goldens"][0]["problems"] == ["no results of ranks 1, 2"]
