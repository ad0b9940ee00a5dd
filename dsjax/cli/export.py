"""`dsjax export`: a model as StableHLO."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from dsjax.checkpoint import orbax
from dsjax.cli.common import note, positive, print_json, seed
from dsjax.cli.ops import operator_flags
from dsjax.cli.profile import entries, lines
from dsjax.config import Config, V4Config, load_config, parse_config, read_json_object
from dsjax.errors import InputError
from dsjax.export.bundle import ProfileError, Request, export
from dsjax.export.profiles.rules import load as load_profile
from dsjax.export.profiles.rules import names as profile_names
from dsjax.export.program.exporter import PHASES, Exporter, Shape
from dsjax.export.program.switches import MOE, NUMERICS, TOP_K
from dsjax.export.program.targets import TARGETS, find_target
from dsjax.export.stablehlo.artifact import check_version
from dsjax.generate import CHUNK
from dsjax.layout import ATTENTION, O_GROUPS, layout
from dsjax.numerics import Numerics
from dsjax.parallel import SPMD
from dsjax.plan import Load
from dsjax.plan.check import check_memory
from dsjax.plan.placement import Model
from dsjax.plan.placement import load_model as planned_model
from dsjax.presets import PRESETS
from dsjax.synth import synth_config, synthesise
from sharding import Plan

RECORDED = ("chunk", "mla", "kv", "attention", "o_groups", "topk", "moe", "weights", "seed")
"""Flags that nothing else in a manifest tells."""


def _numbers(text: str) -> list[int]:
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise ValueError
    return found


_numbers.__name__ = "list of positive integers like 1,8"


def _phases(text: str) -> list[str]:
    found = text.split(",")
    for phase in found:
        if phase not in PHASES:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(PHASES)}, found {phase!r}")
    return found


def add_flags(p: argparse.ArgumentParser) -> None:
    """What only this verb takes; `--mesh` and `--set` are added beside."""
    p.add_argument("--model", required=True, metavar="DIR_OR_PRESET", help="a checkpoint, or a preset without weights")
    p.add_argument("--out", type=Path, required=True, metavar="BUNDLE")
    p.add_argument(
        "--phases", type=_phases, default=["prefill", "decode"], metavar="prefill,decode", help=", ".join(PHASES)
    )
    p.add_argument("--batch", type=_numbers, default=[1], metavar="1,8", help="slots, one program for each (default 1)")
    p.add_argument("--length", type=_numbers, default=[4096], metavar="4096", help="positions, likewise (default 4096)")
    p.add_argument(
        "--chunk", type=positive, default=CHUNK, metavar="N", help=f"new tokens of a prefill (default {CHUNK})"
    )
    p.add_argument("--layers", type=positive, metavar="N", help="of a preset: another depth")
    p.add_argument("--target", choices=TARGETS, default="portable", help="how weights are seen (default portable)")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="activations and cache (default bfloat16)")
    p.add_argument("--numerics", choices=NUMERICS, default="plain")
    p.add_argument("--mla", choices=("auto", "absorbed", "naive"), default="auto", help="form of attention (V2, V3)")
    p.add_argument("--kv", choices=("auto", "fp8", "bfloat16"), default="auto", help="native's keys (V3.2, V4)")
    p.add_argument("--attention", choices=ATTENTION, default="heads", help="what ep splits attention by")
    p.add_argument("--o-groups", choices=O_GROUPS, default="split", help="for V4 split more ways than it has groups")
    p.add_argument("--spmd", choices=SPMD, default="manual", help="a program for each rank, or one with shardings")
    p.add_argument("--topk", choices=TOP_K, default="chlo", help="how the largest are found; loop: no sort at all")
    p.add_argument("--moe", choices=MOE, default="loop", help="how tokens are multiplied with their experts")
    p.add_argument(
        "--profile", metavar="NAME_OR_FILE", help=f"refuse what it does not take: {', '.join(profile_names())}"
    )
    p.add_argument(
        "--stablehlo-version", metavar="V", help="of artifacts (default: the least that each module can have)"
    )
    p.add_argument("--blocks", action="store_true", help="also each named operator by itself")
    p.add_argument(
        "--weights",
        choices=("reference", "copy", "none"),
        help="default: reference; none for a preset. none: of the config alone, without golden numbers",
    )
    p.add_argument("--no-golden", action="store_true", help="of a checkpoint: no golden numbers, the model is not run")
    p.add_argument("--synthetic-golden", action="store_true", help="of a preset: random weights and golden numbers")
    p.add_argument("--seed", type=seed, metavar="N", help="of --synthetic-golden's weights (default 0)")
    operator_flags(p)


def _shapes(options: argparse.Namespace) -> list[Shape]:
    found = []
    for phase in options.phases:
        for batch in options.batch:
            for length in options.length:
                tokens = min(options.chunk, length) if phase.endswith("prefill") else 1
                found.append(Shape(phase, batch, tokens, length))
    if len({shape.name for shape in found}) < len(found):
        raise InputError("--phases, --batch, --length: expected each program once")
    return found


def switches_of(options: argparse.Namespace) -> dict[str, str]:
    """The flags that choose variants of operators; --op adds to them.

    Raises:
      InputError: if they contradict each other.
    """
    chosen = dict(TOP_K[options.topk])
    if options.moe != "loop":
        chosen["grouped_matmul"] = options.moe
    if options.moe == "ragged" and options.target in ("w8a8", "w4a8"):
        raise InputError(f"--moe ragged: expected float activations, found --target {options.target}")
    for name, variant in options.op:
        if chosen.get(name, variant) != variant:
            flag = "--moe" if name == "grouped_matmul" else "--topk"
            raise InputError(f"--op {name}={variant}: expected {chosen[name]}, as {flag} says, or no {flag}")
    return {**chosen, **dict(options.op)}


def _numerics(options: argparse.Namespace) -> Numerics:
    dtype = options.dtype or ("float32" if options.target == "float32" else "bfloat16")
    return Numerics(options.numerics, dtype, options.mla, kv=options.kv, products="tiled")


def _check_length(options: argparse.Namespace, config: Config) -> None:
    if max(options.length) > config.max_position_embeddings:
        most = config.max_position_embeddings
        raise InputError(f"--length {max(options.length)}: expected at most {most} positions of {options.model}")


def _check_golden(options: argparse.Namespace) -> None:
    """Refuses flags of golden numbers that would change nothing."""
    if options.no_golden and options.synthetic_golden:
        raise InputError("--no-golden: expected it or --synthetic-golden, found both")
    if options.no_golden and options.model in PRESETS:
        raise InputError(
            "--no-golden: expected with a checkpoint, found a preset, which has no golden numbers as it is"
        )
    if options.seed is not None and not options.synthetic_golden:
        raise InputError(f"--seed {options.seed}: expected with --synthetic-golden, found no --synthetic-golden")
    options.seed = options.seed or 0


def _with_weights(options: argparse.Namespace, folder: Path) -> Path | None:
    """The folder if its weights are asked for, and are there."""
    if orbax.is_converted(folder):
        raise InputError(f"{folder}: expected a checkpoint in safetensors, found an Orbax folder: export its source")
    if options.weights == "none":
        return None
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"{folder}: expected *.safetensors, found none; --weights none exports its config alone")
    return folder


@contextmanager
def _checkpoint(options: argparse.Namespace) -> Iterator[tuple[Path | None, dict[str, Any], Config]]:
    """(folder with weights, config.json, config) of --model."""
    settings = dict(options.settings)
    folder = Path(options.model)
    if options.model not in PRESETS:
        if settings or options.layers or options.synthetic_golden:
            raise InputError("--set, --layers, --synthetic-golden: expected with a preset, found a checkpoint folder")
        config = load_config(options.model)
        _check_length(options, config)
        yield _with_weights(options, folder), read_json_object(folder / "config.json"), config
        return
    raw = synth_config(options.model, layers=options.layers, settings=settings)
    config = parse_config(raw, options.model)
    _check_length(options, config)
    if options.synthetic_golden and options.weights in ("reference", "none"):
        raise InputError(
            f"--weights {options.weights}: expected copy with --synthetic-golden: its weights are gone after"
        )
    if not options.synthetic_golden:
        if options.weights in ("reference", "copy"):
            raise InputError(f"--weights {options.weights}: expected a checkpoint folder, found a preset")
        yield None, raw, config
        return
    with tempfile.TemporaryDirectory(prefix="dsjax-") as temporary:
        made = Path(temporary) / "model"
        note("dsjax: making random weights")
        synthesise(made, raw, template=options.model, seed=options.seed)
        yield made, raw, load_config(made)


def _model(folder: Path | None, name: str, config: Config, numerics: Numerics, weights: str) -> Model:
    if folder is not None:
        return replace(planned_model(str(folder), numerics, weights), name=name)
    return Model(name, config, numerics.for_checkpoint(config, weights), weights)


def run(options: argparse.Namespace) -> int:
    """`dsjax export`."""
    target, choices, shapes = find_target(options.target), switches_of(options), _shapes(options)
    numerics = _numerics(options)
    _check_golden(options)
    profile = load_profile(options.profile) if options.profile is not None else None
    if options.stablehlo_version is not None:
        check_version(options.stablehlo_version)
    with _checkpoint(options) as (folder, raw, config):
        if options.o_groups != "split" and not isinstance(config, V4Config):
            raise InputError(f"--o-groups {options.o_groups}: expected deepseek_v4, found {config.model_type}")
        numerics.for_checkpoint(config, target.weights, "--target")
        model = _model(folder, options.model, config, numerics, target.weights)
        plan = options.mesh or Plan()
        if options.spmd == "auto" and options.mesh is None:
            raise InputError("--spmd auto: expected with --mesh, found no --mesh")
        split = layout(config, plan, options.attention, model.numerics, options.o_groups)
        exporter = Exporter(config, model.numerics, target, split, options.spmd, choices, model.stored)
        weights = options.weights or ("none" if folder is None else "copy" if options.synthetic_golden else "reference")
        golden = "none"
        if folder is not None and not options.no_golden:
            golden = "synthetic" if options.synthetic_golden else "model"
            widest = Load(max(options.length), max(options.batch), options.chunk)
            try:
                check_memory(model, widest, layout(config, Plan()), jax.local_devices()[:1])
            except InputError as e:
                raise InputError(f"golden numbers (--no-golden leaves them out): {e}") from None
        request = Request(
            options.model if options.model in PRESETS else Path(options.model).resolve().name,
            {key: value for key, value in raw.items() if key != "_name_or_path"},
            shapes,
            options.stablehlo_version,
            profile,
            options.blocks,
            weights,
            folder,
            golden,
            {name: getattr(options, name) for name in RECORDED},
        )
        try:
            manifest = export(options.out, exporter, model, request, lambda line: note(f"dsjax: {line}"))
        except ProfileError as e:
            return _refused(options, e)
    return _done(options, manifest, exporter.ranks)


def _refused(options: argparse.Namespace, error: ProfileError) -> int:
    for line in lines(error.violations):
        note(f"dsjax: profile {options.profile}: {line}")
    if options.json:
        print_json({"bundle": None, "profile": options.profile, "violations": entries(error.violations)})
    return 1


def _done(options: argparse.Namespace, manifest: dict[str, Any], ranks: int) -> int:
    modules = [m for m in manifest["modules"] if m["kind"] == "model"]
    blocks = len(manifest["modules"]) - len(modules)
    size = sum(f["bytes"] for f in manifest["files"].values())
    result = {
        "bundle": str(options.out),
        "modules": [m["name"] for m in modules],
        "blocks": blocks,
        "ranks": ranks,
        "golden": manifest["golden"],
        "bytes": size,
        "minimum_stablehlo": manifest["stablehlo"]["minimum"],
    }
    if options.json:
        print_json(result)
    else:
        print(f"{options.out}: {len(modules)} modules, {blocks} blocks, {size:,} bytes; see REPORT.md")
    return 0
