#!/usr/bin/env python3
"""Compares what a chip computed with a bundle's golden results: `python verify.py CANDIDATE`.

Needs Python 3.9 and NumPy, nothing else; every bundle holds a copy of this file as verify.py.

CANDIDATE is a folder with, for each golden, `<golden>/outputs.safetensors` or `.npz`: arrays under the names that the
golden's outputs have. Of a program that is split over ranks, `<golden>/rank<r>/outputs.*` may hold each rank's own
results; these are judged where there are both. Errors of a result, with a = golden and b = candidate:

  max relative   max |a - b| / max |a|                   norm   ||a - b|| / ||a||
  mean relative  mean |a - b| / mean |a|                 cosine, PCC
  of logits, by row: top-1 agreement, top-5 overlap, KL(softmax a || softmax b) in nats, mean and largest
  of integers and codes: the share of elements that are not equal, in a cache of those that the step changes

A result is within a bound if both its max relative and its norm error are (integers: the share of unequal ones).
There are two verdicts: at --bound (5%) unless tolerance.json has another for the result, and at the golden's own strict
bound. Codes (uint8) have a strict verdict only where tolerance.json gives one. Where that says {"bound": null} the
errors are told, not judged (of logits also the median over rows of ||a - b|| / ||a||), but a NaN or another shape
fails; {"bound": 0, "strict": 0} asks for equality.

Exit status: 0 passed, 1 negative verdict (of the bound; of both with --gate strict), 2 bad input.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dsjax.export.standalone.arrays import BadInput, Stored, find_arrays, read_arrays, read_json
from dsjax.export.standalone.errors import judge, strict_bound
from dsjax.export.standalone.manifest import SCHEMA, check_files, places_of, read_manifest
from dsjax.export.standalone.ranks import Places, assemble, rank_order

STRICT = 1e-5
GATES = ("bound", "strict")
VERDICTS = ("within_bound", "within_strict")


class Golden(NamedTuple):
    """What a program's results are held against."""

    name: str
    expected: dict[str, Stored]
    limits: dict[str, tuple[float | None, float | None]]  # by result, its bound and its strict bound
    places: Places
    bound: float
    problems: list[str]  # of the golden itself
    before: dict[str, Stored]  # what results of these names replace


class Found(NamedTuple):
    """What somebody gives for a golden: whole results, also those made of ranks' parts, and how far ranks differ."""

    source: str
    results: dict[str, Stored]
    shards: dict[int, dict[str, Stored]]
    spread: dict[str, float]
    problems: list[str]


def _limit(value: Any) -> float | None:
    """A bound of tolerance.json."""
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 <= value < 1e30:
        raise ValueError
    return float(value)


def _limits(entry: Any, golden: Stored, bound: float, path: Path) -> tuple[float | None, float | None]:
    """A result's bound and strict bound, as tolerance.json has them: a null is no verdict, 0 asks for equality."""
    try:
        own = _limit(entry.get("bound", bound))
        return own, _limit(entry.get("strict", None if own is None else strict_bound(golden, STRICT)))
    except (AttributeError, ValueError):
        raise BadInput(f"{path}: expected bounds, numbers or null, found {str(entry)[:80]}") from None


def read_golden(bundle: Path, golden: str, modules: Sequence[Mapping[str, Any]], bound: float) -> Golden:
    """One golden, by the manifest's entries of the modules that give its results.

    Raises:
      BadInput: of a damaged file.
    """
    path = bundle / golden
    expected = read_arrays(path / "outputs.safetensors")
    tolerance = read_json(path / "tolerance.json") if (path / "tolerance.json").exists() else {}
    limits = {n: _limits(tolerance.get(n, {}), g, bound, path / "tolerance.json") for n, g in expected.items()}
    given = {result["name"]: None for module in modules for result in module["results"]}
    problems = [f"{n}: modules give this result, the golden has none" for n in given if n not in expected]
    problems += [f"{n}: the golden has this result, modules give none" for n in expected if n not in given]
    problems += [] if given or expected else ["expected results, found none in the golden, none of modules"]
    places = places_of(modules, expected, bundle / "manifest.json")
    inputs = read_arrays(path / "inputs.safetensors") if (path / "inputs.safetensors").exists() else {}
    before = {n: a for n, a in inputs.items() if n in expected}
    return Golden(golden[7:], expected, limits, places, bound, problems, before)


def find(folder: Path, golden: Golden) -> Found:
    """The results in a candidate's folder: of ranks where there are such folders, else whole ones."""
    places, expected = golden.places, golden.expected
    spread = dict.fromkeys(expected, 0.0)
    by_rank = {rank: find_arrays(folder / f"rank{rank}") for rank in places}
    shards = {rank: arrays for rank, arrays in by_rank.items() if arrays is not None}
    if not shards:
        whole = find_arrays(folder) or {}
        fit = {n: a for n, a in whole.items() if n in expected and a.shape == expected[n].shape}
        for rank, parts in places.items() if whole else ():
            shards[rank] = {n: Stored(a.raw[parts[n]], a.code) for n, a in fit.items() if n in parts}
        none = [f"no results: expected {folder / 'outputs.safetensors'} or .npz"]
        return Found("whole results", whole, shards, spread, [] if whole else none)
    missing = [str(rank) for rank in by_rank if rank not in shards]
    if missing:
        return Found("whole results", {}, {}, spread, [f"no results of ranks {', '.join(missing)}"])
    results, problems = {}, []
    for name, array in expected.items():
        made, spread[name], wrong = assemble(name, array, shards, places)
        problems += wrong
        if made is not None:
            results[name] = made
    return Found(f"{len(shards)} ranks", results, shards, spread, problems)


def compare(golden: Golden, found: Found) -> dict[str, Any]:
    """All results of one golden: rows of `judge`, problems, notes and verdicts."""
    expected, places = golden.expected, golden.places
    results = [
        judge(n, g, found.results.get(n), *golden.limits[n], found.spread[n], golden.before.get(n))
        for n, g in expected.items()
    ]
    problems = golden.problems + found.problems
    notes = [f"{n}: the golden has no such result" for n in found.results if n not in expected]
    if found.shards and any(row["within_bound"] is False for row in results):
        order = rank_order(expected, found.shards, places, golden.bound)
        problems += [order] if order else []
    for row in results:
        if "rank_difference" in row:
            notes.append(f"{row['name']}: ranks differ by {row['rank_difference']:.2g} where they should hold the same")
    within = {v: not problems and all(row[v] is not False for row in results) for v in VERDICTS}
    report = {"golden": golden.name, "source": found.source, "results": results, "problems": problems, "notes": notes}
    return {**report, **within}


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
        if module.get("golden") is not None:
            by_golden.setdefault(module["golden"], []).append(module)
    patterns = only.split(",")
    for pattern in patterns:
        if not any(fnmatch.fnmatch(golden[7:], pattern) for golden in by_golden):
            raise BadInput(f"{bundle}: expected golden results named {pattern or 'by a pattern'}, found none")
    goldens: list[dict[str, Any]] = []
    for path, modules in by_golden.items():
        name = path[7:]
        if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            continue
        bad = [f"{file}: {what}" for file, what in damaged.items() if file.startswith(f"{path}/")]
        if bad:  # numbers that mean nothing
            report = {"golden": name, "source": "", "results": [], "problems": bad, "notes": []}
            goldens.append({**report, **dict.fromkeys(VERDICTS, False)})
            continue
        golden = read_golden(bundle, path, modules, bound)
        folder = next((f for f in (candidate / name, candidate / path) if f.is_dir()), candidate / name)
        goldens.append(compare(golden, find(folder, golden)))
    return {
        "schema": SCHEMA,
        "bundle": str(bundle),
        "candidate": str(candidate),
        "bound": bound,
        "files": {"checked": len(manifest["files"]), "problems": damaged},
        **{verdict: not damaged and all(one[verdict] for one in goldens) for verdict in VERDICTS},
        "goldens": goldens,
    }


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


def judged(row: Mapping[str, Any]) -> str:
    """A result's verdict at the bound; where it has none it is told, not judged."""
    return "told" if row["within_bound"] is None else word(row["within_bound"])


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
            verdicts = [judged(row), word(row["within_strict"]), strict]
            rows.append([f"{golden['golden']}/{row['name']}", *errors, *verdicts])
            lines += [f"{golden['golden']}/{row['name']}: {p}" for p in row["problems"]]
            if "logits" in row:
                median = f"median of rows {row['median_row']:.3g}"
                lines.append(f"{golden['golden']}/{row['name']}: {logits_line(row['logits'])}; {median}")
        lines += [f"{golden['golden']}: {text}" for text in golden["problems"] + golden["notes"]]
    lines += [f"{name}: {what}" for name, what in report["files"]["problems"].items()]
    print(table(rows), *lines, sep="\n")
    good = report["files"]["checked"] - len(report["files"]["problems"])
    print(f"files: {good} of {report['files']['checked']} as the manifest says")
    told = sum(row["within_bound"] is None for golden in report["goldens"] for row in golden["results"])
    more = f"; told, not judged: {told} results" if told else ""
    print(f"{bound}: {word(report['within_bound'])}; strict: {word(report['within_strict'])}{more}")


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
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names in files may be any text
    sys.exit(main())
