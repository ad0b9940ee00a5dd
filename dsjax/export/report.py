"""REPORT.md and report.html: what is in a bundle, for a person."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsjax.align.plot import Point, html_page, svg_scatter

_HOW = (
    "Run the programs on `golden/*/inputs.safetensors`, write the results as "
    "`CANDIDATE/<program>/outputs.safetensors`, and call `python verify.py CANDIDATE`."
)
_GOLDEN = {
    "none": "None: the bundle was made without weights.",
    "model": f"Made by the model itself from its checkpoint. {_HOW}",
    "synthetic": f"Made by the model itself with random weights. {_HOW}",
}


def _read(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))["modules"]
    return found


def _mb(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.3f} MB" if nbytes < 1e9 else f"{nbytes / 1e9:,.3f} GB"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows), ""]


def _programs(folder: Path, manifest: dict[str, Any]) -> list[str]:
    memory, cost, inventories = (_read(folder, f"{name}.json") for name in ("memory", "cost", "inventory"))
    rows = []
    for name, held in memory.items():
        files = [m for m in manifest["modules"] if m["kind"] == "model" and m["name"].split("-rank")[0] == name]
        size = (folder / "modules" / f"{files[0]['name']}.vhlo.bc").stat().st_size
        card = held["smallest_card_gb"]
        per_token = cost[name].get("flops_per_token")
        rows.append(
            [
                name,
                len(files),
                f"{size:,}",
                manifest["stablehlo"]["minimum"][files[0]["name"]],
                _mb(held["parameters"]),
                _mb(held["cache"]),
                _mb(held["temporaries_bound"]),
                f"{card} GB" if card else "none",
                f"{per_token / 1e9:,.3f}" if per_token is not None else "-",
                sum(entry["executed"] for entry in inventories[name]["named"].values()),
            ]
        )
    head = (
        "program",
        "ranks",
        "bytes",
        "least StableHLO",
        "parameters a rank",
        "cache a rank",
        "temporaries, bound",
        "smallest card",
        "GFLOP a token",
        "operator calls",
    )
    return _table(head, rows)


def _operators(inventories: dict[str, Any]) -> list[str]:
    names = sorted({name for found in inventories.values() for name in found["named"]})
    rows = []
    for name in names:
        cells = []
        for found in inventories.values():
            entry = found["named"].get(name)
            cells.append("-" if entry is None else f"{entry['text']} in the text, {entry['executed']} run")
        rows.append([f"`dsjax.{name}`", *cells])
    return _table(["operator", *inventories], rows)


def _collectives(inventories: dict[str, Any]) -> list[str]:
    rows = [
        [name, c["kind"], c.get("groups", c.get("pairs")), f"{c['operand_bytes']:,}", c["executed"]]
        for name, found in inventories.items()
        for c in found["collectives"]
    ]
    return (
        _table(["program", "kind", "replica groups", "operand bytes", "times a step"], rows) if rows else ["None.", ""]
    )


def write_report(folder: Path, manifest: dict[str, Any], doubts: Sequence[str]) -> None:
    """Writes both files from what is in the folder already.

    Args:
      folder: the bundle's.
      manifest: without its list of files.
      doubts: what the profile says of its programs.
    """
    inventories = _read(folder, "inventory.json")
    producer, switches = manifest["producer"], manifest["switches"]
    mesh = manifest["mesh"]
    lines = [
        f"# {manifest['model']['name']}",
        "",
        f"Target `{manifest['target']}`, numerics `{manifest['numerics']}`, activations `{manifest['dtype']}`, "
        f"{'one device' if mesh is None else str(mesh['ranks']) + ' ranks: ' + mesh['plan']}"
        f"{', partitioned by the compiler' if mesh and manifest['spmd'] == 'auto' else ''}. "
        f"Variants chosen: {', '.join(f'{k}={v}' for k, v in switches.items()) or 'none'}. "
        f"Made by dsjax {producer['dsjax']}, jax {producer['jax']}, jaxlib {producer['jaxlib']}.",
        "",
        "## Programs",
        "",
        *_programs(folder, manifest),
        "Each is `modules/NAME.vhlo.bc`, a portable StableHLO artifact, and the same as text beside it. Arguments are "
        "in the order of `manifest.json`: parameters (`params.json`), caches (`cache.json`), inputs. Temporaries are "
        "a bound by formula; a compiler may need less.",
        "",
        "## Named operators",
        "",
        "Each is a private function of that name, to be recognised and replaced as a whole.",
        "",
        *_operators(inventories),
        "## Collectives",
        "",
        *_collectives(inventories),
        f"## Profile {manifest['profile'] or ''}".rstrip(),
        "",
        *(f"- {line}" for line in doubts),
        "" if doubts else f"{'Nothing to say.' if manifest['profile'] else 'None was asked for (`--profile`).'}\n",
        "## Golden numbers",
        "",
        _GOLDEN[manifest["golden"]],
        "",
    ]
    text = "\n".join(lines)
    (folder / "REPORT.md").write_text(text, encoding="utf-8")
    title = f"{manifest['model']['name']}: operations by kind"
    (folder / "report.html").write_text(html_page(title, _plot(inventories, title), text), encoding="utf-8")


def _plot(inventories: dict[str, Any], title: str) -> str:
    """How often each operator of StableHLO runs in a step, by program."""
    points = []
    names = sorted({op for found in inventories.values() for op in found["operators"]})
    for program, found in inventories.items():
        for op, entry in found["operators"].items():
            label = f"{op}: {entry['executed']} a step, {entry['text']} in the text"
            points.append(Point(names.index(op), float(entry["executed"]), program, label))
    return svg_scatter(points, {}, title, "operators of StableHLO, in alphabetical order", "runs a step")
