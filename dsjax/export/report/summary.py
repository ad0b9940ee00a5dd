"""REPORT.md and report.html: what is in a bundle, for a person."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsjax.export.profiles.rules import Violation, remedy
from dsjax.export.report.page import Amount, Cell, Section, Table, html, markdown, scaled

_HOW = (
    "Run the programs on `golden/*/inputs.safetensors`, write the results as "
    "`CANDIDATE/<program>/outputs.safetensors`, and call `python verify.py CANDIDATE`."
)
_GOLDEN = {
    "none": "None: the bundle was made without weights.",
    "model": f"Made by the model itself from its checkpoint. {_HOW}",
    "synthetic": f"Made by the model itself with random weights. {_HOW}",
}
_MOST_BARS = 24

Entries = dict[str, Any]


def write_report(folder: Path, manifest: Entries, violations: Mapping[str, Sequence[Violation]]) -> None:
    """Writes both files from what is in the folder already.

    Args:
      folder: the bundle's.
      manifest: without its list of files.
      violations: what the profile doubts, by program.
    """
    title, sections = f"{manifest['model']['name']} as StableHLO", report(folder, manifest, violations)
    (folder / "REPORT.md").write_text(markdown(title, sections), encoding="utf-8")
    (folder / "report.html").write_text(html(title, sections), encoding="utf-8")


def report(folder: Path, manifest: Entries, violations: Mapping[str, Sequence[Violation]]) -> list[Section]:
    """The same as sections."""
    memory, cost, inventories = (_read(folder, f"{name}.json") for name in ("memory", "cost", "inventory"))
    first = {name: _first(manifest, name) for name in memory}
    sections = [
        Section("What it is", [Table(["", ""], _facts(manifest))]),
        _programs(folder, manifest, first, memory, cost),
        _layout(first),
        _memory(memory),
        _work(cost),
        _named(inventories),
        _blocks(manifest),
        _collectives(inventories),
        _types(inventories),
        _operators(inventories),
        _loops(inventories),
        _profile(manifest, violations),
        Section("Golden numbers", [_GOLDEN[manifest["golden"]]]),
    ]
    return [section for section in sections if section.parts]


def _read(folder: Path, name: str) -> Entries:
    found: Entries = json.loads((folder / name).read_text(encoding="utf-8"))["modules"]
    return found


def _first(manifest: Entries, program: str) -> Entries:
    """The module of a program's first rank."""
    names = (program, f"{program}-rank0")
    found: Entries = next(m for m in manifest["modules"] if m["name"] in names)
    return found


def _facts(manifest: Entries) -> list[list[Cell]]:
    producer, mesh = manifest["producer"], manifest["mesh"]
    where = "one device" if mesh is None else f"{mesh['ranks']} ranks: {mesh['plan']}"
    by = ", partitioned by the compiler" if mesh and manifest["spmd"] == "auto" else ""
    return [
        ["weights as", f"`{manifest['target']}`"],
        ["numerics", f"`{manifest['numerics']}`, activations `{manifest['dtype']}`"],
        ["for", where + by],
        ["variants chosen", ", ".join(f"`{k}={v}`" for k, v in manifest["switches"].items()) or "none"],
        ["profile", manifest["profile"] or "none"],
        ["made by", ", ".join(f"{name} {version}" for name, version in producer.items())],
    ]


def _programs(folder: Path, manifest: Entries, first: Entries, memory: Entries, cost: Entries) -> Section:
    rows: list[list[Cell]] = []
    for name, module in first.items():
        ranks = sum(m["name"].split("-rank")[0] == name for m in manifest["modules"])
        size = (folder / "modules" / f"{module['name']}.vhlo.bc").stat().st_size
        card, work = memory[name]["smallest_card_gb"], cost[name]
        rows.append(
            [
                f"`{name}`",
                ranks,
                module["batch"],
                module["tokens"],
                module["length"],
                size,
                manifest["stablehlo"]["minimum"][module["name"]],
                scaled(memory[name]["total"], "B"),
                f"{card} GB" if card else "none",
                scaled(work["flops_per_token"], "FLOP"),
                scaled(work["bytes_per_token"], "B"),
            ]
        )
    head = ["program", "ranks", "slots", "new tokens", "positions", "artifact's bytes", "least StableHLO"]
    table = Table([*head, "memory a rank", "smallest card", "a token's work", "a token's reading"], rows)
    says = (
        "Each is `modules/NAME.vhlo.bc`, a portable StableHLO artifact with a function `main`, and the same as text "
        "beside it; of several ranks `NAME-rankR`."
    )
    return Section("Programs", [table, says])


def _layout(first: Entries) -> Section:
    rows: list[list[Cell]] = []
    for name, module in first.items():
        for side in ("arguments", "results"):
            kinds = dict.fromkeys(value["kind"] for value in module[side])
            for kind in kinds:
                values = [value for value in module[side] if value["kind"] == kind]
                at = f"{values[0]['index']} to {values[-1]['index']}" if len(values) > 1 else f"{values[0]['index']}"
                several = ", ".join(f"`{v['name']}` {_typed(v)}{_alias(v)}" for v in values)
                told = "see `params.json`" if kind == "param" else several
                rows.append([f"`{name}`", side, at, kind, told])
    says = "A result that replaces an argument takes its memory. Shapes are those of one rank; `manifest.json` has all."
    return Section("Arguments and results", [Table(["program", "", "numbers", "kind", ""], rows), says])


def _typed(value: Entries) -> str:
    return f"{value['dtype']}[{', '.join(map(str, value['shape']))}]"


def _alias(value: Entries) -> str:
    return f" in place of argument {value['alias']}" if value.get("alias") is not None else ""


def _across(parts: Mapping[str, Mapping[str, Cell]], label: str, bars: int = _MOST_BARS) -> Table:
    """A table with a column for each program, its rows by size: {program: {row: cell}}."""
    names = dict.fromkeys(name for found in parts.values() for name in found)
    size = {name: max(float(found.get(name) or 0) for found in parts.values()) for name in names}
    rows = [[name, *(found.get(name) for found in parts.values())] for name in sorted(names, key=lambda n: -size[n])]
    return Table([label, *(f"`{program}`" for program in parts)], rows, bars)


def _amounts(found: Mapping[str, float], unit: str) -> dict[str, Cell]:
    return {name: scaled(value, unit) for name, value in found.items()}


def _memory(memory: Entries) -> Section:
    parts = ("parameters", "cache", "inputs", "outputs", "temporaries_estimate")
    by_part = {p: _amounts({part.replace("_", ", "): held[part] for part in parts}, "B") for p, held in memory.items()}
    modules = {p: _amounts(held["parameters_by_module"], "B") for p, held in memory.items()}
    says = "Bytes of one rank. Temporaries are an estimate by formula; a compiler may need less, or more."
    return Section("Memory", [says, _across(by_part, "part"), "Parameters:", _across(modules, "module")])


def _work(cost: Entries) -> Section:
    flops = {p: _amounts(work["flops_by_module"], "FLOP") for p, work in cost.items()}
    kinds = {p: _amounts(work["flops"], "FLOP") for p, work in cost.items()}
    reads = {
        p: _amounts(work["weight_bytes_by_module"] | {"cache": work["cache_bytes"]}, "B") for p, work in cost.items()
    }
    says = (
        "Of one rank, by closed forms; a multiply-add is two operations, and every slot holds `length` tokens after "
        "the step. Of the experts those are read that the step's tokens are expected to choose under uniform routing, "
        "or all where all are multiplied; `cost.json` states all assumptions."
    )
    return Section(
        "Work of a step",
        [
            says,
            "Operations:",
            _across(flops, "module"),
            _across(kinds, "element type"),
            "Bytes read at least once:",
            _across(reads, "module"),
        ],
    )


def _runs(entry: Entries) -> Amount:
    """How often something runs; at least so often where a loop's trips are only known to the program."""
    least = "at least " if entry["dynamic"] else ""
    return Amount(entry["executed"], f"{least}{entry['executed']:,} ({entry['text']:,} written)")


def _named(inventories: Entries) -> Section:
    counts = {
        program: {f"`dsjax.{name}`": _runs(entry) for name, entry in found["named"].items()}
        for program, found in inventories.items()
    }
    rows: list[list[Cell]] = [
        [f"`dsjax.{name}`", f"`{program}`", _symbols(name, entry["functions"])]
        for program, found in inventories.items()
        for name, entry in found["named"].items()
    ]
    says = (
        "Each is a private function of that name, to be recognised and replaced as a whole. Runs in a step, and calls "
        "in the text:"
    )
    where = "Their functions in `modules/NAME.mlir`, a number behind the name:"
    return Section(
        "Named operators",
        [says, _across(counts, "operator"), where, Table(["operator", "program", "functions"], rows)],
    )


def _symbols(operator: str, functions: Sequence[str]) -> str:
    """Functions of an operator, the name of the first alone in full: `dsjax.rope`, _4, _26."""
    endings = sorted((f.removeprefix(f"dsjax.{operator}") for f in functions), key=lambda e: int(e[1:] or -1))
    return ", ".join([f"`dsjax.{operator}{endings[0]}`", *endings[1:]])


def _blocks(manifest: Entries) -> Section:
    found = [m for m in manifest["modules"] if m["kind"] == "block"]
    if not found:
        return Section("Operators by themselves", [])
    rows: list[list[Cell]] = []
    edges = {m["name"].removesuffix("-edges") for m in found if m["name"].endswith("-edges")}
    for block in found:
        if block["name"].endswith("-edges"):
            continue
        stands = block["stands_for"]
        takes = sorted({name for site in stands for names in site["takes"].values() for name in names})
        rows.append(
            [
                f"`{block['name']}`" + (", also `-edges`" if block["name"] in edges else ""),
                ", ".join(_typed(v) for v in block["arguments"]),
                ", ".join(_typed(v) for v in block["results"]),
                sum(site["executed"] for site in stands) if stands else None,
                "; ".join(_site(program, block) for program in dict.fromkeys(s["program"] for s in stands)),
                ", ".join(f"`{name}`" for name in takes),
                ", ".join(f"{key}={value}" for key, value in block["attributes"].items()),
                block["variant"] + (f", within {block['bound']:g} of the formula" if block["bound"] else ""),
            ]
        )
    head = ["block", "takes", "gives", "runs", "stands for", "with the program's", "of the model", "variant"]
    says = (
        "Operators alone, each with its own inputs and results in `golden/`: `modules/BLOCK.vhlo.bc`. A block stands "
        "for functions of a program that compute the same; those of ranks have other shapes and are not listed. "
        "`manifest.json` says which argument comes in where."
    )
    return Section("Operators by themselves", [says, Table(head, rows)])


def _site(program: str, block: Entries) -> str:
    functions = [site["function"] for site in block["stands_for"] if site["program"] == program]
    return f"`{program}`: {_symbols(block['operator'], functions)}"


def _collectives(inventories: Entries) -> Section:
    rows: list[list[Cell]] = []
    total: dict[str, dict[str, Cell]] = {}
    for program, found in inventories.items():
        bytes_: dict[str, int] = {}
        for c in found["collectives"]:
            bytes_[c["kind"]] = bytes_.get(c["kind"], 0) + c["executed"] * c["operand_bytes"]
            groups = c.get("groups", c.get("pairs"))
            rows.append([f"`{program}`", c["kind"], c["element"], _groups(groups), c["operand_bytes"], _runs(c)])
        if bytes_:
            total[program] = _amounts(bytes_ | {"all": sum(bytes_.values())}, "B")
    if not rows:
        return Section("Collectives", ["None."])
    says = "Bytes that one rank hands to collectives in a step:"
    head = [
        "program",
        "kind",
        "element type",
        "groups, or pairs of source and target",
        "operand bytes",
        "runs in a step",
    ]
    return Section("Collectives", [says, _across(total, "kind"), Table(head, rows)])


def _groups(groups: Sequence[Sequence[int]]) -> str:
    shown = ", ".join(map(str, groups[:4]))
    return shown if len(groups) <= 4 else f"{shown} and {len(groups) - 4} more"


def _types(inventories: Entries) -> Section:
    size = {p: _amounts(_argument_bytes(found), "B") for p, found in inventories.items()}
    rows: list[list[Cell]] = [
        [f"`{p}`", f"`{t}`", len(e["arguments"]), len(e["results"]), e["constants"], e["inside"]]
        for p, found in inventories.items()
        for t, e in found["types"].items()
    ]
    head = ["program", "type", "arguments", "results", "constants", "results of other operations"]
    return Section("Element types", ["Bytes of arguments:", _across(size, "type"), "Occurrences:", Table(head, rows)])


def _argument_bytes(found: Entries) -> dict[str, int]:
    """Of a program, by element type."""
    size: dict[str, int] = {}
    for argument in found["arguments"]:
        digits = re.search(r"\d+", argument["element"])
        bits = max(int(digits[0]) if digits else 0, 8 if argument["element"] == "i1" else 1)
        key = f"`{argument['element']}`"
        size[key] = size.get(key, 0) + -(-math.prod(argument["shape"] or ()) * bits // 8)
    return size


def _operators(inventories: Entries) -> Section:
    counts = {
        program: {f"`{name}`": _runs(entry) for name, entry in found["operators"].items()}
        for program, found in inventories.items()
    }
    return Section(
        "Operators of StableHLO", ["Runs in a step, and how often in the text:", _across(counts, "operator")]
    )


def _loops(inventories: Entries) -> Section:
    rows: list[list[Cell]] = [
        [f"`{p}`", f"`{e['function']}`", " in ".join(reversed(e["operators"])) or "-", str(e["trips"]), e["executed"]]
        for p, found in inventories.items()
        for e in found["loops"]
    ]
    says = "Trips are `dynamic` where only the program's inputs tell them."
    head = ["program", "function", "within", "trips", "times a step"]
    return Section("Loops", [says, Table(head, rows)] if rows else ["None."])


def _profile(manifest: Entries, violations: Mapping[str, Sequence[Violation]]) -> Section:
    title = f"Profile {manifest['profile'] or ''}".rstrip()
    if not manifest["profile"]:
        return Section(title, ["None was asked for (`--profile`)."])
    rows: list[list[Cell]] = [
        [
            f"`{p}`",
            v.level,
            v.what,
            None if v.written is None else f"{v.executed:,} ({v.written:,} written)",
            ", ".join(v.where),
            v.reason,
            remedy(v.switch),
            f"{v.source}, {v.date}",
        ]
        for p, found in violations.items()
        for v in found
    ]
    head = ["program", "level", "what", "runs", "where", "why", "remedy", "source"]
    return Section(title, [Table(head, rows)] if rows else ["Nothing to say."])
