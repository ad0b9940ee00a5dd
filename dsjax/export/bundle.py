"""A bundle: programs, what their arguments are, golden numbers and a report, in one folder that needs no Python."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxlib.mlir import ir

from dsjax.checkpoint.load import load
from dsjax.checkpoint.safetensors_writer import write_file
from dsjax.errors import InputError
from dsjax.export.golden import recorded
from dsjax.export.golden.blocks import Block, blocks
from dsjax.export.profiles.rules import Profile, Violation, check
from dsjax.export.program import account, weights
from dsjax.export.program.exporter import Exporter, Program, Shape, is_draft
from dsjax.export.program.lift import lift, mark_aliases
from dsjax.export.program.signature import Value
from dsjax.export.report.summary import write_report
from dsjax.export.stablehlo import artifact, sites
from dsjax.export.stablehlo.inventory import inventory
from dsjax.export.standalone import source as verify_source
from dsjax.export.standalone.manifest import SCHEMA
from dsjax.files import check_new_folder, new_folder
from dsjax.params import Tree
from dsjax.plan.placement import Model
from quant.operator import find

LARGEST_CONSTANT = 1 << 16
"""Bytes; weights are arguments, so nothing in a module is larger."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be in a bundle.

    Attributes:
      name: of the model, without a path.
      raw: its config.json.
      shapes: programs.
      version: StableHLO's, of the artifacts; None for the lowest that each module can have.
      profile: what compilers take, or None.
      blocks: export each operator alone, too.
      weights: "reference", "copy" or "none".
      checkpoint: folder with weights; None without.
      golden: "model", "synthetic" or "none".
      flags: what else was asked for, for the manifest, so that a bundle can be made again.
    """

    name: str
    raw: dict[str, Any]
    shapes: Sequence[Shape]
    version: str | None = None
    profile: Profile | None = None
    blocks: bool = False
    weights: str = "none"
    checkpoint: Path | None = None
    golden: str = "none"
    flags: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class ProfileError(Exception):
    """Programs have what the profile does not allow; by program, `violations` say what, where, and what removes it."""

    def __init__(self, violations: Mapping[str, Sequence[Violation]]) -> None:
        super().__init__(f"{sum(map(len, violations.values()))} violations")
        self.violations = violations


def _value(value: Value, index: int, rank: int | None, exporter: Exporter) -> dict[str, Any]:
    bounds = None if rank is None else value.slice(rank, exporter.layout.rules.extents)
    shape = list(value.spec.shape) if bounds is None else [stop - start for start, stop in bounds]
    return {
        "index": index,
        "kind": value.kind,
        "name": value.name,
        "shape": shape,
        "dtype": np.dtype(value.spec.dtype).name,
        "global_shape": list(value.spec.shape),
        "slice": bounds,
    }


def _entry(program: Program, name: str, rank: int | None, golden_path: str | None) -> dict[str, Any]:
    exporter, shape = program.exporter, program.shape
    results = [_value(v, i, rank, exporter) for i, v in enumerate(program.results)]
    for result in results:
        result["alias"] = program.aliases.get(result["index"])
    return {
        "name": name,
        "kind": "model",
        "phase": shape.phase,
        "batch": shape.batch,
        "tokens": shape.tokens,
        "length": shape.length,
        "rank": rank,
        "function": "main",
        "golden": golden_path,
        "operator": None,
        "arguments": [_value(v, i, rank, exporter) for i, v in enumerate(program.arguments)],
        "results": results,
    }


def lowered(program: Program) -> ir.Module:
    """The program as it is shipped, of rank `partition_id` where there are several.

    Raises:
      InputError: if it cannot be shipped: a custom call, a dynamic shape, a large constant, something of Shardy.
    """
    module = program.traced().compiler_ir("stablehlo")
    if program.exporter.manual:
        module = lift(module)
    return artifact.as_read(mark_aliases(module, program.aliases, keep_shardings=program.exporter.spmd == "auto"))


def check_shippable(found: dict[str, Any], program: Program) -> None:
    """Refuses what no bundle may have.

    Raises:
      InputError: naming it.
    """
    name = program.shape.name
    if found["custom_calls"]:
        raise InputError(f"{name}: expected no custom call, found {', '.join(found['custom_calls'])}")
    if found["dynamic_shapes"]:
        raise InputError(f"{name}: expected static shapes, found dynamic ones")
    largest = found["largest_constant"]["bytes"]
    if largest > LARGEST_CONSTANT:
        raise InputError(f"{name}: expected constants of at most {LARGEST_CONSTANT} bytes, found one of {largest}")
    foreign = sorted(op for op in found["operators"] if op.split(".")[0] not in ("stablehlo", "func"))
    if foreign and program.exporter.spmd == "manual":
        raise InputError(f"{name}: expected StableHLO alone, found {', '.join(foreign)}")


class Writer:
    """Writes one bundle into a folder."""

    def __init__(self, folder: Path, exporter: Exporter, request: Request, say: Callable[[str], None]) -> None:
        self.folder, self.exporter, self.request, self.say = folder, exporter, request, say
        self.modules: list[dict[str, Any]] = []
        self.minimum: dict[str, str] = {}
        self.inventories: dict[str, Any] = {}
        self.violations: dict[str, list[Violation]] = {}
        self.sites: dict[str, list[dict[str, Any]]] = {}
        for name in ("modules", "golden"):
            (folder / name).mkdir()

    def json(self, name: str, content: Any) -> None:
        """Writes a JSON file, the same bytes for the same content."""
        (self.folder / name).write_text(json.dumps(content, indent=1, sort_keys=False) + "\n", encoding="utf-8")

    def _files(self, name: str, text: str, portable: bytes, least: str) -> None:
        (self.folder / "modules" / f"{name}.vhlo.bc").write_bytes(portable)
        (self.folder / "modules" / f"{name}.mlir").write_text(text, encoding="utf-8")
        self.minimum[name] = least

    def program(self, program: Program) -> None:
        """Writes one phase's modules, of every rank, unless the profile refuses them.

        Raises:
          InputError: if they cannot be shipped, or not in the version that was asked for.
        """
        exporter, shape, request = self.exporter, program.shape, self.request
        self.say(f"{shape.name}: lowering")
        module = lowered(program)
        found = inventory(module, [v.name for v in program.arguments])
        check_shippable(found, program)
        if request.profile is not None:
            violations = check(request.profile, found)
            self.violations[shape.name] = violations
            if any(v.level == "refused" for v in violations):
                return  # `refuse` tells, once all programs have been looked at
        stripped = artifact.strip(module)
        portable, least = artifact.portable(stripped, request.version, found["minimum_version"])
        self.inventories[shape.name] = found
        if request.blocks:
            names = [v.name for v in program.arguments]
            self.sites[shape.name] = sites.sites(stripped, names, found["functions"])
        where = f"golden/{shape.name}" if request.golden != "none" else None
        text = artifact.text(stripped)
        if not exporter.manual:
            self._files(shape.name, text, portable, least)
            self.modules.append(_entry(program, shape.name, None, where))
            return
        for rank, files in enumerate(artifact.of_ranks(text, request.version or least, exporter.ranks)):
            name = f"{shape.name}-rank{rank}"
            self._files(name, *files, least)
            self.modules.append(_entry(program, name, rank, where))

    def numbers(self, program: Program, params: Tree) -> None:
        """Writes one phase's goldens, which all ranks share."""
        self.say(f"{program.shape.name}: golden numbers")
        made = recorded.make(program, params)
        self.golden(f"golden/{program.shape.name}", made, recorded.tolerances(self.exporter, made.outputs))

    def refuse(self) -> None:
        """Says at once what the profile refuses of all programs.

        Raises:
          ProfileError: if there is anything.
        """
        if any(v.level == "refused" for found in self.violations.values() for v in found):
            raise ProfileError(self.violations)

    def block(self, block: Block) -> None:
        """Writes one operator by itself."""
        portable, least = artifact.portable(block.module, self.request.version)
        self._files(block.name, artifact.text(block.module), portable, least)
        where = None
        if block.numbers is not None:
            where = f"golden/{block.name}"
            limits = recorded.block_tolerances(block.entry["operator"], block.numbers.outputs)
            self.golden(where, block.numbers, limits)
        stands = sites.stands_for(block.module, block.entry["operator"], self.sites)
        self.modules.append(block.entry | {"golden": where, "stands_for": stands, **self._chosen(block.entry)})

    def _chosen(self, entry: dict[str, Any]) -> dict[str, Any]:
        """How an operator is computed, and what of the model's config it depends on."""
        with self.exporter.chosen():
            operator = find(entry["operator"])
            variant = operator.variants[operator.chosen]
        attributes = sites.attributes(entry, self.request.raw)
        return {"variant": variant.name, "bound": variant.bound, "attributes": attributes}

    def golden(self, where: str, numbers: recorded.Golden, tolerance: dict[str, Any]) -> None:
        """Writes golden inputs, outputs and what outputs may differ by."""
        folder = self.folder / where
        folder.mkdir()
        write_file(folder / "inputs.safetensors", numbers.inputs)
        write_file(folder / "outputs.safetensors", numbers.outputs)
        (folder / "tolerance.json").write_text(json.dumps(tolerance, indent=1) + "\n", encoding="utf-8")

    def finish(self, programs: Sequence[Program], model: Model) -> dict[str, Any]:
        """Writes everything else, the manifest last."""
        places = _places(programs)
        arguments = [{"index": places[entry["path"]], **entry} for entry in self._parameters(programs)]
        total = sum(a["bytes"] for a in arguments)
        held = [a["checkpoint_bytes"] for a in arguments]
        stored = None if None in held else sum(held)
        content = {"schema": SCHEMA, "bytes": total, "checkpoint_bytes": stored, "arguments": arguments}
        self.json("params.json", content)
        kept = {p.shape.name: account.cache(p) for p in programs}
        self.json("cache.json", {"schema": SCHEMA, "notes": account.CACHE_NOTES, "modules": kept})
        self.json("inventory.json", {"schema": SCHEMA, "modules": self.inventories})
        for name, notes, count in (
            ("memory", account.MEMORY_NOTES, account.memory),
            ("cost", account.COST_NOTES, account.cost),
        ):
            found = {p.shape.name: count(p, model) for p in programs}
            self.json(f"{name}.json", {"schema": SCHEMA, "notes": notes, "modules": found})
        (self.folder / "verify.py").write_text(verify_source(), encoding="utf-8")
        manifest = self._manifest()
        write_report(self.folder, manifest, self.violations)
        manifest["files"] = {
            str(path.relative_to(self.folder)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            for path in sorted(self.folder.rglob("*"))
            if path.is_file()
        }
        self.json("manifest.json", manifest)
        return manifest

    def _parameters(self, programs: Sequence[Program]) -> list[dict[str, Any]]:
        exporter, request, parameters = self.exporter, self.request, weights.parameters_of(programs)
        if request.checkpoint is None or request.weights == "none":
            return weights.describe(exporter, parameters)
        self.say("parameters: reading" if request.weights == "reference" else "parameters: copying")
        out = self.folder if request.weights == "copy" else None
        return weights.read(exporter, parameters, request.checkpoint, out)

    def _manifest(self) -> dict[str, Any]:
        exporter, request = self.exporter, self.request
        extents = exporter.layout.rules.extents
        mesh = None
        if exporter.ranks > 1:
            axes = [[name, extent] for name, extent in extents.items()]
            mesh = {"plan": str(exporter.layout.plan), "axes": axes, "ranks": exporter.ranks}
        return {
            "schema": SCHEMA,
            "producer": {name: metadata.version(name) for name in ("dsjax", "jax", "jaxlib")},
            "stablehlo": {"version": request.version, "minimum": self.minimum},
            "model": {"name": request.name, "config": request.raw},
            "target": exporter.target.name,
            "numerics": exporter.numerics.mode,
            "dtype": exporter.numerics.dtype,
            "spmd": exporter.spmd,
            "mesh": mesh,
            "switches": {**exporter.target.choices, **exporter.choices},
            "profile": request.profile.name if request.profile else None,
            "golden": request.golden,
            "flags": dict(request.flags),
            "modules": self.modules,
        }


def _places(programs: Sequence[Program]) -> dict[str, dict[str, int]]:
    """By parameter, which argument of each program that takes it."""
    found: dict[str, dict[str, int]] = {}
    for program in programs:
        for i, value in enumerate(program.arguments):
            found.setdefault(value.name, {})[program.shape.name] = i
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def export(
    out: Path, exporter: Exporter, model: Model, request: Request, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Writes a bundle, whole or not at all.

    Args:
      out: a folder that is not there yet.
      exporter: what the model is exported as.
      model: the same for the planner.
      request: what is to be in it.
      say: progress, a line at a time.

    Returns:
      Its manifest.

    Raises:
      InputError: for anything in the way.
      ProfileError: if a program has what the profile does not allow.
    """
    check_new_folder(out)
    programs = [exporter.program(shape) for shape in request.shapes]
    with new_folder(out) as folder:
        writer = Writer(folder, exporter, request, say)
        for program in programs:
            writer.program(program)
        writer.refuse()
        params = _load(exporter, request)  # the first thing that takes long: what is refused has been by now
        if params is not None:
            for program in programs:
                writer.numbers(program, params)
        if request.blocks:
            for block in blocks(programs, params):
                writer.block(block)
        return writer.finish(programs, model)


def _load(exporter: Exporter, request: Request) -> Tree | None:
    """The checkpoint on one device; None where nothing is computed."""
    if request.golden == "none":
        return None
    assert request.checkpoint is not None
    mtp = any(is_draft(shape.phase) for shape in request.shapes)
    single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return load(request.checkpoint, weights=exporter.target.weights, mtp=mtp, sharding=single, cut=exporter.cut)[1]
