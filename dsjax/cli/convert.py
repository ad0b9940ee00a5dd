"""`dsjax convert`: a checkpoint in another format, or a look at one that was converted."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from dsjax.checkpoint import orbax
from dsjax.checkpoint.load import load
from dsjax.cli.common import note, print_json, show_progress
from dsjax.convert import TARGETS, Options, Share, verify
from dsjax.convert import convert as run_convert
from dsjax.errors import InputError
from dsjax.files import check_new_file, check_new_folder, new_file

FORMATS = (*TARGETS, "orbax")


def add_flags(p: argparse.ArgumentParser) -> None:
    """What only this verb takes."""
    p.add_argument("model", type=Path, nargs="?", metavar="DIR")
    p.add_argument("--to", choices=FORMATS, help="format of the matrices that DeepSeek quantises")
    p.add_argument("--out", type=Path, metavar="DIR")
    p.add_argument("--only", metavar="PATTERN", help="convert weights with such names, e.g. '*.mlp.experts.*'")
    p.add_argument("--names", choices=("hf", "official"), help="of V4's tensors; default: the source's")
    p.add_argument("--report", type=Path, metavar="FILE", help="also write the certificate's summary here")
    p.add_argument("--force", action="store_true", help="replace a finished result")
    p.add_argument("--process-id", type=int, default=0, metavar="I")
    p.add_argument("--processes", type=int, default=1, metavar="P", help="share the shards out among P runs")
    p.add_argument("--verify", type=Path, metavar="RESULT", help="check a result; with DIR also every verdict")


_OF_SAFETENSORS = {"only": None, "names": None, "report": None, "force": False, "process_id": 0, "processes": 1}
"""Flags that mean something with a conversion to safetensors alone, and their defaults."""


def _refuse_flags(options: argparse.Namespace, expected: str, found: str) -> None:
    for name, default in _OF_SAFETENSORS.items():
        if getattr(options, name) != default:
            raise InputError(f"--{name.replace('_', '-')}: expected {expected} with it, found {found}")


def _to_orbax(options: argparse.Namespace) -> int:
    _refuse_flags(options, "a format of safetensors", "--to orbax")
    check_new_folder(options.out)
    start = time.perf_counter()
    _, params, _ = load(options.model, mtp=None, weights=options.weights, progress=show_progress())
    saved = orbax.save(options.out, options.model, params).nbytes
    result = {"model": str(options.out), "bytes": saved, "seconds": time.perf_counter() - start}
    if options.json:
        print_json(result)
    else:
        print(f"{options.out}: {saved:,} bytes in {result['seconds']:.1f} s")
    return 0


def _verify(options: argparse.Namespace) -> int:
    if options.to or options.out:
        raise InputError("--verify: expected a result and perhaps its source, found --to or --out too")
    _refuse_flags(options, "a conversion", "--verify")
    problems = verify(options.verify, options.model)
    result = {"result": str(options.verify), "verdicts": options.model is not None, "passed": not problems}
    if options.json:
        print_json({**result, "problems": problems})
    else:
        checked = "hashes and verdicts" if options.model is not None else "hashes"
        print(f"{options.verify}: {checked}: {'as certified' if not problems else f'{len(problems)} problems'}")
    for problem in problems:
        note(f"dsjax: {problem}")
    return 1 if problems else 0


def _show(summary: dict[str, Any]) -> None:
    for name, one in summary.items():
        line = f"{name:9} {one['tensors']:7,} tensors, {one['converted']:7,} converted, {one['exact']:7,} exact"
        if one["exact"] < one["tensors"]:
            reasons = ", ".join(f"{reason} ({count})" for reason, count in one["reasons"].items())
            line += f"; relative error at most {one['max_rel_error']:.2g}, norm {one['relative_norm']:.2g}: {reasons}"
        print(line)


def _check_report(path: Path, *folders: Path) -> None:
    """Refuses a report that cannot be written, or would change the source or be no part of a certified result."""
    for folder in folders:
        if folder.resolve() in (path.resolve(), *path.resolve().parents):
            raise InputError(f"--report {path}: expected a file apart from {folder}, found one inside it")
    check_new_file(path)


def _write_report(path: Path, result: dict[str, Any]) -> None:
    import json

    with new_file(path) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def convert(options: argparse.Namespace) -> int:
    """`dsjax convert`."""
    if options.verify is not None:
        return _verify(options)
    for flag, value in (("DIR", options.model), ("--to", options.to), ("--out", options.out)):
        if value is None:
            raise InputError(f"{flag}: expected with convert, found none")
    if options.to == "orbax":
        return _to_orbax(options)
    if options.weights != "stored":
        raise InputError(f"--weights {options.weights}: expected with --to orbax, found --to {options.to}")
    if options.processes < 1:
        raise InputError(f"--processes {options.processes}: expected at least 1")
    if not 0 <= options.process_id < options.processes:
        raise InputError(
            f"--process-id {options.process_id}: expected 0 .. {options.processes - 1}, one below --processes"
        )
    if options.report is not None:
        _check_report(options.report, options.model, options.out)
    wanted = Options(TARGETS[options.to], options.only, options.names)
    share = Share(options.process_id, options.processes)
    outcome = run_convert(
        options.model, options.out, wanted, share=share, force=options.force, progress=show_progress()
    )
    result: dict[str, Any] = {
        "model": str(options.out),
        "finished": outcome.finished,
        "bytes": outcome.bytes,
        "seconds": outcome.seconds,
    }
    if outcome.certificate is not None:
        result |= {key: outcome.certificate[key] for key in ("to", "only", "names", "exact", "summary")}
        if options.report is not None:
            _write_report(options.report, {k: v for k, v in result.items() if k not in ("bytes", "seconds")})
    if options.json:
        print_json(result)
        return 0
    print(f"{options.out}: {outcome.bytes:,} bytes in {outcome.seconds:.1f} s")
    if outcome.certificate is None:
        print("other processes have shards to finish")
    else:
        _show(result["summary"])
        print("exact" if result["exact"] else "not exact: certificate.json says where and why")
    return 0
