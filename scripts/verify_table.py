#!/usr/bin/env python3
"""What independent compilers make of exported bundles: small twins of every model, in every target, run from files.

For each case MODEL/TARGET/NUMERICS it exports a twin with random weights and goldens and runs whole programs by every
consumer; with --blocks also each named operator by itself, of the cases in `BLOCKS`. Results are kept in --work, a file
for each case, so that a run may be cut off and taken up again; --write puts the tables of all that are there between
the markers of a Markdown file. Status 1 where a gate is missed: XLA:CPU gives the jitted model's bits, the interpreter
and IREE float32 programs within the strict bounds, and every block within its own.

    .venv/bin/python scripts/verify_table.py --only 'deepseek-v3/*' [--with jax,interpreter,iree,pjrt]
    .venv/bin/python scripts/verify_table.py --only none --write docs/consumers.md
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from helpers_export import TWINS, twin_flags  # noqa: E402

from dsjax.cli.main import main as dsjax  # noqa: E402
from dsjax.errors import InputError  # noqa: E402
from dsjax.export.program.targets import TARGETS  # noqa: E402
from dsjax.export.standalone.arrays import read_safetensors  # noqa: E402
from dsjax.export.standalone.errors import row_errors  # noqa: E402
from dsjax.export.verify import verify  # noqa: E402

CONSUMERS = ("jax", "interpreter", "iree", "pjrt")
NUMERICS = {
    "float32": ("--dtype", "float32"),
    "bfloat16": (),
    "native": ("--numerics", "native"),
}
STORED = ("typed", "typed-fp8", "portable")
BLOCKS = ("*/portable/native", "deepseek-v4-flash/typed/native", "*/w8a8/bfloat16", "*/bfloat16/bfloat16")
"""Whose whole programs are not judged strictly."""
SMALL = ("--chunk", "8")
LENGTH = {"deepseek-v4-flash": "144", "deepseek-v4-pro": "144"}
"""At which decoding ends, 32 of others: V4's rings have wrapped, and an entry of 128 tokens is there."""
MARK = "<!-- consumers: {} -->"


def cases() -> Iterator[str]:
    """MODEL/TARGET/NUMERICS, what is judged strictly first."""
    for numerics in NUMERICS:
        for target in ("portable", *(t for t in TARGETS if t != "portable")):
            for model in TWINS:
                if numerics == "native" and (target not in STORED or "distill" in model):
                    continue
                if numerics == "float32" and target in ("w8a8", "w4a8"):
                    continue
                yield f"{model}/{target}/{numerics}"


def plugin() -> str:
    """The consumer that is pip's XLA:CPU behind the PJRT interface."""
    found = importlib.util.find_spec("xla_plugins")
    folders = [] if found is None else list(found.submodule_search_locations or [])
    if not folders:
        raise InputError("pjrt: expected xla-cpu-pjrt (the extra verify), found none")
    return f"pjrt:{Path(folders[0]) / 'xla_cpu_pjrt' / 'xla_cpu_pjrt.so'}"


def measure(case: str, consumers: list[str], blocks: bool, work: Path, time_limit: float) -> None:
    """Adds what is not yet known of a case to its file."""
    model, target, numerics = case.split("/")
    path = work / f"{case.replace('/', '+')}.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"whole": {}, "blocks": {}}
    blocks = blocks and any(fnmatch.fnmatch(case, pattern) for pattern in BLOCKS)
    missing = [
        (part, name) for part in ("whole", *["blocks"] * blocks) for name in consumers if name not in known[part]
    ]
    if not missing:
        return
    with tempfile.TemporaryDirectory(prefix="dsjax-table-") as folder:
        bundle = Path(folder) / "bundle"
        flags = [*twin_flags(model), *SMALL, "--length", LENGTH.get(model, "32"), "--target", target]
        flags += ["--batch", "2" if numerics == "float32" else "4", *NUMERICS[numerics]]
        flags += ["--blocks"] if any(part == "blocks" for part, _ in missing) else []
        if dsjax(["export", *flags, "--synthetic-golden", "--out", str(bundle)]) != 0:
            raise SystemExit(f"{case}: no bundle")
        for part, name in missing:
            start = time.perf_counter()
            chosen = plugin() if name == "pjrt" else name
            given, pattern = Path(folder) / f"{part}-{name}", "block-*" if part == "blocks" else "[!b]*"
            report = verify(bundle, [chosen], modules=pattern, time_limit=time_limit, say=lambda line: None, out=given)
            found = known[part][name] = {p: summary(by[chosen]) for p, by in report["programs"].items()}
            for program, facts in found.items():
                golden, candidate = (f / program / "outputs.safetensors" for f in (bundle / "golden", given))
                if part == "whole" and candidate.exists():
                    arrays = (read_safetensors(f)[0]["logits"].values() for f in (golden, candidate))
                    facts["rows"] = row_errors(*arrays)
            write_text(path, json.dumps(known, indent=1))
            print(f"{case}: {name}, {part}: {time.perf_counter() - start:.0f} s", file=sys.stderr)


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """What the table needs of a program's report."""
    errors = [row["error"] for row in report.get("results", ())]
    worst = None if not errors else max(math.inf if e is None or math.isnan(e) else e for e in errors)
    return {"state": report["state"], "why": report.get("why", ""), "error": worst}


def tables(work: Path) -> tuple[list[str], list[str]]:
    """Markdown of all that was measured, and the gates that were missed."""
    lines = ["| model | target | numerics | " + " | ".join(CONSUMERS) + " |", "|---" * (3 + len(CONSUMERS)) + "|"]
    lines_blocks, missed = list(lines), []
    notes: dict[str, list[str]] = {}
    for case in cases():
        path = work / f"{case.replace('/', '+')}.json"
        if not path.exists():
            continue
        known = json.loads(path.read_text())
        cells, block_cells = [], []
        for name in CONSUMERS:
            whole, parts = (known[part].get(name, {}) for part in ("whole", "blocks"))
            programs = {**whole, **parts}
            cells.append(whole_cell(whole, case.endswith("/float32")))
            block_cells.append(block_cell(parts))
            missed += [f"{case}: {name}: {p}: {why}" for p, r in programs.items() if (why := fault(case, name, p, r))]
            for p, r in programs.items():
                if r["why"]:
                    notes.setdefault(f"{name}: {reason(r['why'])}", []).append(f"{case} {p.split('-b')[0]}")
        start = f"| {' | '.join(case.split('/'))} | "
        lines.append(start + " | ".join(cells) + " |")
        if any(block_cells):
            lines_blocks.append(start + " | ".join(block_cells) + " |")
    text = ["### Whole programs", "", *lines, "", "### Named operators", "", *lines_blocks, ""]
    told = [f"- {why}: {', '.join(sorted(set(programs)))}" for why, programs in notes.items()]
    return [*text, *(["### Refusals", "", *told, ""] if told else [])], missed


def reason(why: str) -> str:
    """What a compiler complains of, without its command line and the types that it met."""
    complaint = why.partition("error: ")[2] or why
    return re.split(r" Invoked with:| <unknown>:| from \(| that remained", complaint)[0].strip()


def fault(case: str, name: str, program: str, report: dict[str, Any]) -> str:
    """How a report misses its gate, or nothing."""
    numerics = case.split("/")[2]
    if name == "jax" and report["error"] != 0:
        return f"{report['state']}, {report['error']}"
    if report["state"] in ("agreed", "told", "excepted", "accepted") or "f4E2M1FN" in report["why"]:  # IREE has none
        return ""
    strict = program.startswith("block-") or numerics == "float32"
    return f"{report['state']} {report['why'] or report['error']}" if strict and name in ("interpreter", "iree") else ""


def amount(error: float | None) -> str:
    """An error, short."""
    return "" if error is None else "0" if error == 0 else f"{error:.1e}"


def whole_cell(programs: dict[str, Any], strict: bool) -> str:
    """Of prefill and decode the largest error, or what else became of it; where it is not judged strictly, also the
    median over slots of the logits' errors."""
    found = []
    for report in programs.values():
        known = report["state"] in ("agreed", "told", "departed")
        found.append(amount(report["error"]) if known else report["state"])
    rows = [error for report in programs.values() for error in report.get("rows", ())]
    median = "" if strict or not rows or not any(rows) else f"; median {amount(statistics.median(rows))}"
    return " / ".join(found) + median


def block_cell(programs: dict[str, Any]) -> str:
    """How many agreed, the worst of them; then others by name."""
    if not programs:
        return ""
    good = [r["error"] for r in programs.values() if r["state"] == "agreed"]
    bad = [
        f"{p.removeprefix('block-')} {r['state']} {amount(r['error'])}"
        for p, r in programs.items()
        if r["state"] != "agreed"
    ]
    return "; ".join([f"{len(good)} of {len(programs)}, {amount(max(good, default=None))}", *bad])


def main() -> int:
    """See the top of this file."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", default="*", metavar="MODEL/TARGET/NUMERICS", help="shell pattern of cases")
    p.add_argument("--with", dest="consumers", default=",".join(CONSUMERS), help=f"some of {', '.join(CONSUMERS)}")
    p.add_argument("--blocks", action="store_true", help="each named operator by itself, too, of some cases")
    p.add_argument("--work", type=Path, default=ROOT / "build" / "verify_table", help="where results are kept")
    p.add_argument("--time-limit", type=float, default=300.0, metavar="SECONDS", help="of one program")
    p.add_argument("--write", type=Path, metavar="FILE.md", help="put the tables between its markers")
    options = p.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for case in cases():
        if fnmatch.fnmatch(case, options.only):
            measure(case, options.consumers.split(","), options.blocks, options.work, options.time_limit)
    lines, missed = tables(options.work)
    if options.write is None:
        print("\n".join(lines))
    else:
        start, end = MARK.format("start"), MARK.format("end")
        head, _, rest = options.write.read_text(encoding="utf-8").partition(start)
        tail = rest.partition(end)[2]
        write_text(options.write, "\n".join([head + start, "", *lines, end]) + tail)
    for line in missed:
        print(line, file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
