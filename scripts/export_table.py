"""Every full-size model exported from shapes, for one device and for ranks, and given to libtpu's compiler.

    python scripts/export_table.py [--only deepseek-v3] [--ranks 1,8,16,32] [--no-compile] [--out FILE.md]

Rows are kept in OUT.json beside the table, so that it can be made in pieces.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODELS = ("deepseek-v3", "deepseek-v3.2", "deepseek-v4-flash", "deepseek-v4-pro")
TOPOLOGIES = {8: "v5p:2x2x2", 16: "v5p:4x2x2", 32: "v5p:4x4x2"}

HEAD = """# Full-size models as StableHLO

Made by `scripts/export_table.py`: `dsjax export --model MODEL --mesh ep=RANKS` (4096 positions, one slot, prefill of
512 and decode, target `portable`), from shapes: no weights, no devices. Time and peak memory are of the whole command,
on two CPU cores. The program of rank 0 is then compiled *from its file* by libtpu for as many v5p chips as there are
ranks (`dsjax verify BUNDLE --with tpu-aot:TOPOLOGY`), which says what memory it takes. The program of one device is
not compiled: no chip holds these models.

"""


def export(model: str, ranks: int, out: Path) -> dict[str, Any]:
    """One bundle, and what it took to make."""
    mesh = ["--mesh", f"ep={ranks}"] if ranks > 1 else []
    command = [sys.executable, "-m", "dsjax", "export", "--model", model, *mesh, "--out", str(out)]
    start = time.perf_counter()
    timed = f"import resource, subprocess, sys; s = subprocess.call({command!r}); " + (
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024); sys.exit(s)"
    )
    said = subprocess.run([sys.executable, "-c", timed], check=True, capture_output=True, text=True).stdout
    seconds = time.perf_counter() - start
    manifest = json.loads((out / "manifest.json").read_text())
    params = json.loads((out / "params.json").read_text())
    memory = json.loads((out / "memory.json").read_text())["modules"]
    sizes = [entry["bytes"] for name, entry in manifest["files"].items() if name.endswith(".bc")]
    official = json.loads(
        subprocess.run(
            [sys.executable, "-m", "dsjax", "inspect", model, "--json"], check=True, capture_output=True, text=True
        ).stdout.splitlines()[-1]
    )
    return {
        "seconds": seconds,
        "peak": int(said.splitlines()[-1]),
        "modules": len(sizes),
        "largest": max(sizes),
        "least": sorted(set(manifest["stablehlo"]["minimum"].values())),
        "checkpoint_bytes": params["checkpoint_bytes"],
        "inspect_bytes": official["bytes"],
        "rank_bytes": next(iter(memory.values()))["parameters"],
    }


def compiled(bundle: Path, topology: str) -> dict[str, Any]:
    """What libtpu says of every program."""
    command = [sys.executable, "-m", "dsjax", "verify", str(bundle), "--with", f"tpu-aot:{topology}", "--json"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = json.loads(said.splitlines()[-1])["programs"]
    return {name.split("-")[0]: next(iter(by.values())) for name, by in found.items()}


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:,.2f} GB"


def table(rows: dict[str, Any]) -> str:
    """The Markdown."""
    lines = [
        "| model | ranks | exported in, memory | modules, largest | parameters in files | of a rank | topology "
        "| decode: arguments, in place, temporaries | prefill |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for key, r in rows.items():
        model, ranks = key.split("@")
        cells = []
        for phase in ("decode", "prefill"):
            found = r.get("compiled", {}).get(phase)
            if found is None or found["state"] != "accepted":
                cells.append("-" if found is None else f"{found['state']}: {found.get('why', '')[:120]}")
                continue
            m = found["memory"]
            cells.append(f"{_gb(m['argument_bytes'])}, {_gb(m['alias_bytes'])}, {_gb(m['temp_bytes'])}")
        lines.append(
            f"| {model} | {ranks} | {r['seconds']:.0f} s, {_gb(r['peak'])} | {r['modules']}, {r['largest']:,} bytes "
            f"| {r['checkpoint_bytes']:,} | {_gb(r['rank_bytes'])} | {TOPOLOGIES.get(int(ranks), '-')} "
            f"| {cells[0]} | {cells[1]} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("docs/full_size_export.md"))
    parser.add_argument("--only", choices=MODELS)
    parser.add_argument("--ranks", default="1,8,16,32")
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    kept = options.out.with_suffix(".json")
    rows: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    for model in (options.only,) if options.only else MODELS:
        for ranks in map(int, options.ranks.split(",")):
            with tempfile.TemporaryDirectory() as folder:
                bundle = Path(folder) / "bundle"
                row = export(model, ranks, bundle)
                if ranks > 1 and not options.no_compile:
                    row["compiled"] = compiled(bundle, TOPOLOGIES[ranks])
                elif "compiled" in rows.get(f"{model}@{ranks}", {}):
                    row["compiled"] = rows[f"{model}@{ranks}"]["compiled"]
            rows[f"{model}@{ranks}"] = row
            order = {f"{m}@{r}": None for m in MODELS for r in (1, 8, 16, 32)}
            rows = {key: rows[key] for key in order if key in rows}
            kept.write_text(json.dumps(rows, indent=1) + "\n")
            options.out.write_text(HEAD + table(rows))
            print(model, ranks, f"{row['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
