"""`dsjax align`: the precision report between two sets of results."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dsjax.align import compare
from dsjax.align.inputs import read_results
from dsjax.align.plot import html_page
from dsjax.align.run import Configuration, random_tokens, same_kind, tapped
from dsjax.align.show import report_plot, report_text
from dsjax.checkpoint.load import load
from dsjax.cli.common import checkpoint_config, note, numerics_of, print_json
from dsjax.cli.prompts import read_tokens
from dsjax.errors import InputError
from dsjax.export.standalone.verify import GATES, STRICT, passes, plain, positive
from dsjax.files import check_new_file, new_file
from dsjax.generate import check_ids

_SIDE = "results: .safetensors, .npz, .npy (logits), or a folder of goldens' results"


def add_flags(p: argparse.ArgumentParser) -> None:
    """What only this verb takes."""
    p.add_argument("reference", type=Path, nargs="?", metavar="REFERENCE", help=_SIDE)
    p.add_argument("candidate", type=Path, nargs="?", metavar="CANDIDATE", help="the same, to be judged")
    p.add_argument("--model", type=Path, metavar="DIR", help="instead: run a checkpoint in two configurations")
    p.add_argument(
        "--against", metavar="native|int8|top_k=loop|...", help="what differs in the second, comma-separated"
    )
    p.add_argument("--tokens", type=Path, metavar="FILE", help="int [B, T], .npy or .json (default: random ones)")
    p.add_argument("--length", type=int, default=16, metavar="N", help="of the random tokens (default 16)")
    p.add_argument("--bound", type=positive, default=0.05, help="of the first verdict (default 0.05)")
    p.add_argument("--strict", type=positive, default=STRICT, help="of the second (default 1e-5)")
    p.add_argument("--gate", choices=GATES, default="bound", help="which verdict the exit status is")
    p.add_argument("--common", action="store_true", help="compare what both have; default: a missing result fails")
    p.add_argument("--report", type=Path, metavar="FILE.json", help="also write the whole report here")
    p.add_argument("--plot", type=Path, metavar="FILE.html|.svg", help="errors in the order of calls")


def _check_outputs(options: argparse.Namespace) -> None:
    """Refuses files that cannot be written, before the work."""
    given = [path for path in (options.report, options.plot) if path is not None]
    for path in given:
        check_new_file(path)
    if len({path.resolve() for path in given}) < len(given):
        raise InputError(f"--plot {options.plot}: expected another file than --report, found the same")
    if options.plot is not None and options.plot.suffix not in (".html", ".svg"):
        raise InputError(f"--plot {options.plot}: expected a name that ends with .html or .svg")


def give_report(options: argparse.Namespace, report: dict[str, Any], title: str) -> int:
    """Writes the files that were asked for, prints the report, and returns the exit status."""
    result = plain(report)
    text = report_text(report)
    if options.report is not None:
        with new_file(options.report) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.plot is not None:
        svg = report_plot(report, title)
        with new_file(options.plot) as temporary:
            page = html_page(title, svg, text) if options.plot.suffix == ".html" else svg
            temporary.write_text(page, encoding="utf-8")
    if options.json:
        print_json(result)
    else:
        print(text)
    return 0 if passes(report, options.gate) else 1


def align(options: argparse.Namespace) -> int:
    """`dsjax align`."""
    _check_outputs(options)
    given = (options.reference, options.candidate)
    if options.model is not None:
        if any(given) or not options.against:
            raise InputError("--model: expected with --against and without files, found otherwise")
        return _two_configurations(options)
    if None in given or options.against:
        raise InputError("align: expected REFERENCE and CANDIDATE, or --model and --against")
    reference, candidate = read_results(options.reference), read_results(options.candidate)
    report = compare(reference, candidate, bound=options.bound, strict=options.strict, common=options.common)
    names = {"reference": str(options.reference), "candidate": str(options.candidate)}
    title = f"{options.candidate.name} against {options.reference.name}"
    return give_report(options, names | {"gate": options.gate} | report, title)


def _two_configurations(options: argparse.Namespace) -> int:
    """`--model DIR --against X`: every operator of both, in order."""
    config = checkpoint_config(options.model)
    if options.tokens is None and not 1 <= options.length <= config.max_position_embeddings:
        raise InputError(f"--length {options.length}: expected 1 to {config.max_position_embeddings}")
    tokens = random_tokens(config, options.length) if options.tokens is None else read_tokens(options.tokens)
    for i, row in enumerate(tokens.tolist()):
        check_ids(row, config, f"{options.tokens}: row {i}")
    first = Configuration(numerics_of(options), options.weights)
    second = first.but(options.against)
    config, params, _ = load(options.model, weights=first.weights)
    reference = tapped(config, params, first, tokens)
    if second.weights != first.weights:
        config, params, _ = load(options.model, weights=second.weights)
    candidate = tapped(config, params, second, tokens)
    if dropped := same_kind(reference, candidate):
        note(f"dsjax: held in different forms, not compared: {', '.join(dropped)}")
    report = compare(reference, candidate, bound=options.bound, strict=options.strict, common=True)
    about = {"model": str(options.model), "against": options.against, "tokens": list(tokens.shape)}
    title = f"{options.model.name}: {options.against} against {options.numerics}"
    return give_report(options, about | {"gate": options.gate} | report, title)
