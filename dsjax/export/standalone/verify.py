#!/usr/bin/env python3
"""Compares what a chip computed with a bundle's golden results: `python verify.py CANDIDATE`.

Needs Python 3.9 and NumPy, nothing else; every bundle holds a copy of this file as verify.py.

CANDIDATE is a folder with, for each golden, `<golden>/outputs.safetensors` or `.npz`: arrays under the names that the
golden's outputs have. Of a program that is split over ranks, `<golden>/rank<r>/outputs.*` may hold each rank's own
results instead. Errors of a result, with a = golden and b = candidate:

  max relative   max |a - b| / max |a|                   norm   ||a - b|| / ||a||
  mean relative  mean |a - b| / mean |a|                 cosine, PCC
  of logits, by row: top-1 agreement, top-5 overlap, KL(softmax a || softmax b) in nats, mean and largest
  of integers and codes: the share of elements that are not equal

A result is within a bound if both its max relative and its norm error are (integers: the share of unequal ones).
There are two verdicts: at --bound (5%), and at the golden's own strict bound (tolerance.json). Codes (uint8) have a
strict verdict only where tolerance.json gives one.

Exit status: 0 passed, 1 negative verdict (of the bound; of both with --gate strict), 2 bad input.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsjax.export.standalone.arrays import BadInput, Stored, find_arrays, read_arrays, read_json
from dsjax.export.standalone.errors import judge, strict_bound
from dsjax.export.standalone.ranks import Places, assemble, rank_order

SCHEMA = 1
STRICT = 1e-5
GATES = ("bound", "strict")


def read_manifest(bundle: Path) -> dict[str, Any]:
    """A bundle's manifest.json, of a schema that this file knows."""
    path = bundle / "manifest.json"
    manifest = read_json(path)
    schema = manifest.get("schema")
    if type(schema) is not int or schema < 1:
        raise BadInput(f"{path}: expected an integer schema, found {str(schema)[:40]!r}")
    if schema > SCHEMA:
        raise BadInput(f"{path}: expected a bundle of schema {SCHEMA}, found {schema}: use that bundle's own verify.py")
    if not isinstance(manifest.get("files"), dict) or not isinstance(manifest.get("modules"), list):
        raise BadInput(f"{path}: expected files and modules, found none")
    return manifest


def check_files(bundle: Path, files: Mapping[str, Any]) -> dict[str, str]:
    """By file, how it differs from what the manifest says."""
    found = {}
    for name, entry in files.items():
        if name.startswith("/") or "\\" in name or ".." in name.split("/") or not isinstance(entry, dict):
            raise BadInput(
                f"{bundle / 'manifest.json'}: files: {name[:80]!r}: expected a file in the bundle and its hash"
            )
        digest, size = hashlib.sha256(), 0
        try:
            with open(bundle / name, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
                    size += len(block)
        except OSError as e:
            found[name] = f"cannot be read: {e.strerror}"
            continue
        if size != entry.get("bytes"):
            found[name] = f"expected {entry.get('bytes')} bytes, found {size}"
        elif digest.hexdigest() != entry.get("sha256"):
            found[name] = "changed: its SHA-256 is not the manifest's"
    return found


def _limits(entry: Any, golden: Stored, bound: float, path: Path) -> tuple[float | None, float | None]:
    """A result's bound and strict bound, as tolerance.json has them: a null is no verdict."""
    try:
        strict = entry.get("strict", strict_bound(golden, STRICT))
        return bound if entry.get("bound", bound) is not None else None, None if strict is None else float(strict)
    except (AttributeError, TypeError, ValueError):
        raise BadInput(f"{path}: expected an object with a strict bound, found {str(entry)[:80]}") from None


def _places(modules: Sequence[Mapping[str, Any]], expected: Mapping[str, Stored], path: Path) -> Places:
    """By rank, the part that it holds of each result."""
    places: dict[int, dict[str, tuple[slice, ...]]] = {}
    try:
        for module in modules:
            if module.get("rank") is None:
                continue
            parts = places.setdefault(int(module["rank"]), {})
            for result in module["results"]:
                name, shape = result["name"], expected[result["name"]].shape
                part = [[0, n] for n in shape] if result.get("slice") is None else result["slice"]
                if len(part) != len(shape) or any(not 0 <= i <= j <= n for (i, j), n in zip(part, shape)):
                    raise ValueError(f"{name}: slice {part} of {list(shape)}")
                parts[name] = tuple(slice(i, j) for i, j in part)
    except (KeyError, TypeError, ValueError) as e:
        raise BadInput(f"{path}: modules: expected ranks' results and slices, found: {e}") from None
    return dict(sorted(places.items()))


class Found:
    """What a candidate gives for one golden: whole results, also those made of its ranks' parts."""

    def __init__(self, folder: Path, expected: Mapping[str, Stored], places: Places) -> None:
        self.source, self.problems, self.spread = "whole results", [], dict.fromkeys(expected, 0.0)
        self.results = find_arrays(folder) or {}
        self.shards: dict[int, dict[str, Stored]] = {}
        if self.results:
            fit = {n: a for n, a in self.results.items() if n in expected and a.shape == expected[n].shape}
            for rank, parts in places.items():
                self.shards[rank] = {n: Stored(a.raw[parts[n]], a.code) for n, a in fit.items() if n in parts}
            return
        by_rank = {rank: find_arrays(folder / f"rank{rank}") for rank in places}
        missing = [str(rank) for rank, arrays in by_rank.items() if arrays is None]
        if len(missing) == len(by_rank):
            self.problems = [f"no results: expected {folder / 'outputs.safetensors'} or .npz"]
        elif missing:
            self.problems = [f"no results of ranks {', '.join(missing)}"]
        else:
            self.source = f"{len(by_rank)} ranks"
            self.shards = {rank: arrays for rank, arrays in by_rank.items() if arrays is not None}
            for name, golden in expected.items():
                whole, self.spread[name], problems = assemble(name, golden, self.shards, places)
                self.problems += problems
                if whole is not None:
                    self.results[name] = whole


def compare_golden(
    bundle: Path, candidate: Path, golden: str, modules: Sequence[Mapping[str, Any]], bound: float
) -> dict[str, Any]:
    """All results of one golden, whole or by rank: rows of `judge`, problems and notes."""
    path, name = bundle / golden, golden.split("/", 1)[-1]
    expected = read_arrays(path / "outputs.safetensors")
    tolerance = read_json(path / "tolerance.json") if (path / "tolerance.json").exists() else {}
    limits = {n: _limits(tolerance.get(n, {}), g, bound, path / "tolerance.json") for n, g in expected.items()}
    places = _places(modules, expected, bundle / "manifest.json")
    folder = next((f for f in (candidate / name, candidate / golden) if f.is_dir()), candidate / name)
    found = Found(folder, expected, places)
    results = [judge(n, g, found.results.get(n), *limits[n], found.spread[n]) for n, g in expected.items()]
    problems, notes = (
        found.problems,
        [f"{n}: the golden has no such result" for n in found.results if n not in expected],
    )
    if found.shards and any(row["within_bound"] is False for row in results):
        order = rank_order(expected, found.shards, places, bound)
        problems += [order] if order else []
    for row in results:
        if "rank_difference" in row:
            notes.append(f"{row['name']}: ranks differ by {row['rank_difference']:.2g} where they should hold the same")
    return {"golden": name, "source": found.source, "results": results, "problems": problems, "notes": notes}


def verify(bundle: Path, candidate: Path, bound: float = 0.05, only: str = "*") -> dict[str, Any]:
    """Checks a bundle's files, and a candidate's results against its goldens.

    Raises:
      BadInput: if either cannot be used.
    """
    manifest = read_manifest(bundle)
    if not candidate.is_dir():
        raise BadInput(f"{candidate}: expected a folder of results, found none")
    damaged = check_files(bundle, manifest["files"])
    by_golden: dict[str, list[Any]] = {}
    for module in manifest["modules"]:
        golden = module.get("golden") if isinstance(module, dict) else ""
        if golden is not None and not (isinstance(golden, str) and re.fullmatch(r"golden/[\w-][\w.-]*", golden)):
            raise BadInput(f"{bundle / 'manifest.json'}: modules: expected golden/NAME, found {str(golden)[:80]!r}")
        if golden is not None and any(fnmatch.fnmatch(golden[7:], pattern) for pattern in only.split(",")):
            by_golden.setdefault(golden, []).append(module)
    if not by_golden:
        raise BadInput(f"{bundle}: expected golden results named {only}, found none")
    goldens: list[dict[str, Any]] = []
    for golden, modules in by_golden.items():
        bad = [f"{name}: {what}" for name, what in damaged.items() if name.startswith(f"{golden}/")]
        if bad:  # numbers that mean nothing
            goldens.append({"golden": golden[7:], "source": "", "results": [], "problems": bad, "notes": []})
        else:
            goldens.append(compare_golden(bundle, candidate, golden, modules, bound))
    report: dict[str, Any] = {"schema": SCHEMA, "bundle": str(bundle), "candidate": str(candidate), "bound": bound}
    report["files"] = {"checked": len(manifest["files"]), "problems": damaged}
    for verdict in ("within_bound", "within_strict"):
        for one in goldens:
            one[verdict] = not one["problems"] and all(row[verdict] is not False for row in one["results"])
        report[verdict] = not damaged and all(one[verdict] for one in goldens)
    return {**report, "goldens": goldens}


def plain(value: Any) -> Any:
    """For JSON, which has neither NaN nor Inf: null."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def word(verdict: bool | None) -> str:
    """A verdict as people read it."""
    return "-" if verdict is None else "pass" if verdict else "FAIL"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))) for row in rows
    )


def percent(bound: float) -> str:
    """A bound as its verdict is called: 5%."""
    return f"{100 * bound:.3g}%"


def logits_line(x: Mapping[str, float]) -> str:
    """What `logits_errors` found, for people."""
    agree = f"top-1 {x['top1']:.2%}, top-5 {x['top5']:.2%}"
    return f"{agree}, KL mean {x['kl_mean']:.3g}, max {x['kl_max']:.3g} nats over {x['rows']} rows"


def show(report: Mapping[str, Any]) -> None:
    """The report for people."""
    bound, lines = percent(report["bound"]), []
    columns = ("max_relative", "norm", "mean_relative", "cosine", "pcc", "equal_share")
    rows = [["result", "max rel", "norm", "mean rel", "cosine", "PCC", "equal", bound, "strict", "at"]]
    for golden in report["goldens"]:
        for row in golden["results"]:
            errors = [f"{row[c]:.5g}" if c in row else "-" for c in columns]
            strict = "-" if row["strict_bound"] is None else f"{row['strict_bound']:.1g}"
            verdicts = [word(row["within_bound"]), word(row["within_strict"]), strict]
            rows.append([f"{golden['golden']}/{row['name']}", *errors, *verdicts])
            lines += [f"{golden['golden']}/{row['name']}: {p}" for p in row["problems"]]
            if "logits" in row:
                lines.append(f"{golden['golden']}/{row['name']}: {logits_line(row['logits'])}")
        lines += [f"{golden['golden']}: {text}" for text in golden["problems"] + golden["notes"]]
    lines += [f"{name}: {what}" for name, what in report["files"]["problems"].items()]
    print(table(rows), *lines, sep="\n")
    good = report["files"]["checked"] - len(report["files"]["problems"])
    print(f"files: {good} of {report['files']['checked']} as the manifest says")
    print(f"{bound}: {word(report['within_bound'])}; strict: {word(report['within_strict'])}")


def passes(report: Mapping[str, Any], gate: str) -> bool:
    """Whether a report has no negative verdict, of the bound or also of the strict one."""
    return bool(report["within_bound"] and (gate == "bound" or report["within_strict"]))


def positive(text: str) -> float:
    """A bound of the command line."""
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("candidate", type=Path, metavar="CANDIDATE")
    parser.add_argument(
        "--bundle", type=Path, default=Path(__file__).resolve().parent, help="default: this file's folder"
    )
    parser.add_argument("--bound", type=positive, default=0.05)
    parser.add_argument("--gate", choices=GATES, default="bound", help="which verdict the exit status is")
    parser.add_argument("--only", default="*", metavar="PATTERN,...", help="goldens to look at")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    try:
        report = verify(options.bundle, options.candidate, options.bound, options.only)
    except BadInput as e:
        print(f"verify: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(plain(report)))
    else:
        show(report)
    return 0 if passes(report, options.gate) else 1


if __name__ == "__main__":
    sys.exit(main())
