"""`dsjax verify`: a bundle's files through independent consumers, against its goldens."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsjax.cli.common import note, print_json
from dsjax.export.consumers import NAMES
from dsjax.export.standalone.verify import GATES, percent, plain, positive, table, word
from dsjax.export.verify import verify as run_verify


def add_flags(p: argparse.ArgumentParser) -> None:
    """What only this verb takes."""
    p.add_argument("bundle", type=Path, metavar="BUNDLE")
    p.add_argument(
        "--with", default="interpreter", metavar="NAME,...", dest="consumers", help=f"{NAMES} (default: interpreter)"
    )
    p.add_argument("--checkpoint", type=Path, metavar="DIR", help="where the weights lie that the bundle refers to")
    p.add_argument("--modules", metavar="PATTERN,...", help="names of modules, as decode-*,block-*; default: all")
    p.add_argument("--bound", type=positive, default=0.05, help="of relative errors (default 0.05)")
    p.add_argument(
        "--gate", choices=GATES, default="strict", help="whether goldens' own strict bounds count (default) or not"
    )
    p.add_argument("--out", type=Path, metavar="DIR", help="keep what consumers gave, for align and verify.py")
    p.add_argument(
        "--time-limit", type=positive, default=600.0, metavar="SECONDS", help="for one module in a process of its own"
    )


def verify(options: argparse.Namespace) -> int:
    """`dsjax verify`. Status 1 if anything departed, was refused, or was too slow."""
    report = run_verify(
        options.bundle,
        options.consumers.split(","),
        checkpoint=options.checkpoint,
        modules=options.modules,
        bound=options.bound,
        gate=options.gate,
        out=options.out,
        time_limit=options.time_limit,
        say=note,
    )
    if options.json:
        print_json(plain(report))
    else:
        print(verify_table(report))
    return 0 if report["passed"] else 1


def verify_table(report: Mapping[str, Any]) -> str:
    """A line for each program and consumer, then what else there is to say of them, then the verdict."""
    rows = [["module", "by", "", "max rel", "norm", "unequal", percent(report["bound"]), "strict", "time"]]
    lines = [*report["problems"]]
    for program, by_consumer in report["programs"].items():
        for name, r in by_consumer.items():
            short = name.split("/")[-1] if name.startswith("pjrt:") else name
            results = r.get("results", [])
            unequal = max((1 - row["equal_share"] for row in results if "equal_share" in row), default=None)
            numbers = [_largest(results, "max_relative"), _largest(results, "norm"), unequal]
            shown = ["-" if n is None else f"{n:.2g}" for n in numbers]
            verdicts = [word(r.get("within_bound")), word(r.get("within_strict"))]
            seconds = f"{r['seconds']:.1f} s" if "seconds" in r else "-"
            rows.append([program, short, r["state"], *shown, *verdicts, seconds])
            lines += [f"{program}: {short}: {text}" for text in _remarks(r)]
    return "\n".join([table(rows), *lines, f"verdict: {_verdict(report)}"])


def _verdict(report: Mapping[str, Any]) -> str:
    states = {r["state"] for by_consumer in report["programs"].values() for r in by_consumer.values()}
    if report["passed"]:
        return "passed"
    return "nothing was run" if states <= {"not run"} and not report["problems"] else "FAILED"


def _largest(results: list[dict[str, Any]], key: str) -> float | None:
    return max((row[key] for row in results if key in row), default=None)


def _remarks(r: Mapping[str, Any]) -> list[str]:
    """What a line of the table has no place for."""
    found = [r[key] for key in ("note", "why") if key in r] + r.get("problems", []) + r.get("notes", [])
    for row in r.get("results", []):
        found += [f"{row['name']}: {p}" for p in row["problems"]]
        if row["within_bound"] is None:
            median = f", median of rows {row['median_row']:.2g}" if "median_row" in row else ""
            found.append(f"{row['name']}: told, not judged: error {row['error']:.2g}{median}")
        if row["within_strict"] is False and not row["problems"]:
            found.append(f"{row['name']}: error {row['error']:.2g}, strict bound {row['strict_bound']:.2g}")
    if "how" in r:
        found.append(f"ranks ran {r['how']}")
    if "memory" in r:
        found.append(", ".join(f"{key} {value:,}" for key, value in r["memory"].items() if isinstance(value, int)))
    return found
