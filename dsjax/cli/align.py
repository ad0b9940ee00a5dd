"""`dsjax align`: the precision report between two sets of results."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsjax.align import compare, taps
from dsjax.align.inputs import read_results
from dsjax.align.plot import html_page
from dsjax.align.run import Configuration, random_tokens, tapped
from dsjax.align.show import report_plot, report_text
from dsjax.backend import platform_of
from dsjax.cli.common import checkpoint_config, load_model, numerics_of, print_json
from dsjax.cli.ops import note_operators, reported
from dsjax.cli.prompts import read_tokens
from dsjax.config import Config
from dsjax.errors import InputError
from dsjax.export.standalone.verify import GATES, STRICT, passes, plain, positive
from dsjax.files import check_new_file, new_file
from dsjax.generate import check_ids

_SIDE = "results: .safetensors (also of --taps), .npz, .npy (logits), or a folder of goldens' results"


def add_flags(p: argparse.ArgumentParser) -> None:
    """What only this verb takes."""
    p.add_argument("reference", type=Path, nargs="?", metavar="REFERENCE", help=_SIDE)
    p.add_argument("candidate", type=Path, nargs="?", metavar="CANDIDATE", help="the same, to be judged")
    p.add_argument("--model", type=Path, metavar="DIR", help="instead: run a checkpoint, with --against or --taps")
    p.add_argument(
        "--against", metavar="native|int8|top_k=loop|...", help="run it twice: what differs then, comma-separated"
    )
    p.add_argument("--taps", type=Path, metavar="OUT.safetensors", help="run it once: write what every operator gave")
    p.add_argument("--tokens", type=Path, metavar="FILE", help="int [B, T], .npy or .json (default: random ones)")
    p.add_argument("--length", type=int, default=16, metavar="N", help="of the random tokens (default 16)")
    p.add_argument("--bound", type=positive, default=0.05, help="of the first verdict (default 0.05)")
    p.add_argument("--strict", type=positive, default=STRICT, help="of the second (default 1e-5)")
    p.add_argument("--gate", choices=GATES, default="bound", help="which verdict the exit status is")
    p.add_argument("--common", action="store_true", help="compare what both have; default: a missing result fails")
    p.add_argument("--report", type=Path, metavar="FILE.json", help="also write the whole report here")
    p.add_argument("--plot", type=Path, metavar="FILE.html|.svg", help="errors in the order of calls")


def before_jax(options: argparse.Namespace) -> None:
    """What taps need that has to be said before JAX starts.

    A CPU device, which they pass through; on a mesh of CPUs threads for them beside those that wait for each other,
    without which XLA:CPU hangs.
    """
    if options.model is None:
        return
    platforms: str | None = jax.config.values["jax_platforms"]
    if platforms and "cpu" not in platforms.split(","):
        jax.config.update("jax_platforms", f"{platforms},cpu")
    if options.mesh is not None:
        os.environ.setdefault("NPROC", str(4 * options.mesh.devices + (os.cpu_count() or 1)))


def _check_platform() -> None:
    """Refuses to run on the CPU instead: of a list of platforms JAX takes the first that it finds."""
    platform = (jax.config.values["jax_platforms"] or "").split(",")[0]
    try:
        jax.devices(platform or None)
    except RuntimeError as e:
        raise InputError(f"--platform {platform}: expected a platform with a device, found none: {e}") from None


def _check_outputs(options: argparse.Namespace) -> None:
    """Refuses files that cannot be written, before the work."""
    given = [path for path in (options.taps, options.report, options.plot) if path is not None]
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
    given = (options.reference, options.candidate)
    if options.model is not None:
        if any(given) or (options.against is None) == (options.taps is None):
            raise InputError("--model: expected with --against or --taps and without files, found otherwise")
        _check_outputs(options)
        _check_platform()
        return _two_configurations(options) if options.taps is None else _one_run(options)
    if None in given or options.against or options.taps or options.mesh:
        raise InputError("align: expected REFERENCE and CANDIDATE, or --model and --against or --taps")
    _check_outputs(options)
    runs = {side: _run_of(path) for side, path in zip(("reference", "candidate"), given, strict=True)}
    tokens = {run.get("tokens_sha256") for run in runs.values() if run is not None}
    if None not in runs.values() and len(tokens) > 1:
        raise InputError(f"{options.candidate}: expected taps of the same tokens as {options.reference}, found others")
    reference, candidate = read_results(options.reference), read_results(options.candidate)
    report = compare(reference, candidate, bound=options.bound, strict=options.strict, common=options.common)
    names = {"reference": str(options.reference), "candidate": str(options.candidate), "runs": runs}
    title = f"{options.candidate.name} against {options.reference.name}"
    return give_report(options, names | {"gate": options.gate} | report, title)


def _run_of(path: Path) -> dict[str, Any] | None:
    """What a file of --taps says of its run; None of anything else."""
    return taps.load(path)[1] if path.is_file() and path.suffix == ".safetensors" else None


def _tokens(options: argparse.Namespace, config: Config) -> np.ndarray:
    """int32 [B, T]: those of --tokens, or random ones."""
    limit = config.max_position_embeddings
    if options.tokens is None:
        if not 1 <= options.length <= limit:
            raise InputError(f"--length {options.length}: expected 1 to {limit}")
        return random_tokens(config, options.length)
    tokens = read_tokens(options.tokens)
    for i, row in enumerate(tokens.tolist()):
        check_ids(row, config, f"{options.tokens}: row {i}")
    if tokens.shape[1] > limit:
        raise InputError(f"{options.tokens}: expected rows of at most {limit} tokens, found {tokens.shape[1]}")
    return tokens


def _run(options: argparse.Namespace, how: Configuration, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """What a configuration gives, on the mesh of the flags."""
    held = argparse.Namespace(**{**vars(options), "weights": how.weights})
    config = checkpoint_config(options.model)
    numerics = how.numerics.for_checkpoint(config, how.weights)
    config, params, many = load_model(held, config, numerics, *tokens.shape)
    return tapped(config, params, how, tokens, many)


def _one_run(options: argparse.Namespace) -> int:
    """`--model DIR --taps OUT`: what every operator gives, into a file."""
    for flag, path in (("--report", options.report), ("--plot", options.plot)):
        if path is not None:
            raise InputError(f"{flag} {path}: expected it where two runs are compared, found --taps")
    tokens = _tokens(options, checkpoint_config(options.model))
    results = _run(options, Configuration(numerics_of(options), options.weights), tokens)
    platform = platform_of(jax.devices()[0])
    about = {
        "model": options.model.resolve().name,
        "platform": platform,
        "mesh": None if options.mesh is None else f"{options.mesh} {options.attention} {options.spmd}",
        **{flag: getattr(options, flag) for flag in ("numerics", "dtype", "mla", "kv", "weights")},
        "tokens": list(tokens.shape),
        "tokens_sha256": hashlib.sha256(np.ascontiguousarray(tokens, "<i8").tobytes()).hexdigest(),
    }
    about = reported(about, platform)
    taps.save(options.taps, results, about)
    if options.json:
        print_json({"taps": str(options.taps), "results": len(results)} | about)
    else:
        note_operators(platform)
        print(f"{options.taps}: {len(results)} results, {options.taps.stat().st_size:,} bytes")
    return 0


def _two_configurations(options: argparse.Namespace) -> int:
    """`--model DIR --against X`: every operator of both, in order."""
    tokens = _tokens(options, checkpoint_config(options.model))
    first = Configuration(numerics_of(options), options.weights)
    second = first.but(options.against)
    reference, candidate = (_run(options, how, tokens) for how in (first, second))
    report = compare(reference, candidate, bound=options.bound, strict=options.strict, common=True)
    about = {"model": str(options.model), "against": options.against, "tokens": list(tokens.shape)}
    title = f"{options.model.name}: {options.against} against {options.numerics}"
    return give_report(options, about | {"gate": options.gate} | report, title)
