"""Compiles true-size steps for TPU topologies, without a TPU, and writes docs/aot.md.

    .venv/bin/pip install libtpu==0.0.42.1
    .venv/bin/python scripts/aot_table.py [--cases v3-64,pro-256] [--out docs/aot.md]

Each case is one `dsjax plan ... --aot ... --json`, in a process of its own, so that its memory is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

CASES = {
    "v3-64": "deepseek-v3 --cards 64 --chip tpu-v5p --mesh ep=16,tp=4 --batch 16 --context 32760 --aot v5p:4x4x4",
    "v3-256": "deepseek-v3 --cards 256 --chip tpu-v5p --mesh ep=64,tp=4 --attention slots --batch 64 --context 32760 "
    "--aot v5p:8x8x4",
    "pro-64": "deepseek-v4-pro --cards 64 --chip tpu-v5p --mesh ep=16,tp=4 --batch 4 --context 1048560 --aot v5p:4x4x4",
    "pro-256": "deepseek-v4-pro --cards 256 --chip tpu-v5p --mesh ep=64,tp=4 --attention slots --batch 64 "
    "--context 1048560 --aot v5p:8x8x4",
}
CHUNK = "256"

HEAD = """# 671B and 1.6T, compiled for chips that are not here

Made by `scripts/aot_table.py`: `dsjax plan ... --aot TOPOLOGY` compiles the sampled step of the whole model through
libtpu, from shapes, with no chip present. Bytes are of one device. "Counted" is our own count of parameters and cache;
arguments are what XLA says they take, its padding included. The bound of temporaries is the planner's, activations and
workspace without its reserve. "Largest array" is the largest that the program writes to the chip's memory, without
what is updated in place. "Sent" is per device and step; the largest collective is beside the largest planned one.
(XLA:TPU makes an all-reduce of a reduce-scatter of few bytes: the same array, twice the bytes sent.) Products are in
the tiled form (`quant.TILED`). Compile times are wall-clock, of two shared cores.

"""

COLUMNS = (
    "case",
    "step",
    "arguments, counted",
    "in place (cache)",
    "temporary, bound",
    "largest array",
    "sent, planned",
    "largest collective, planned",
    "compiled in, memory",
)


def run(command: str) -> dict[str, Any]:
    """One planner's answer, with its compiled steps."""
    arguments = [sys.executable, "-m", "dsjax", "plan", *command.split(), "--chunk", CHUNK, "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command}: {done.stderr.strip().splitlines()[-1]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def rows(answer: dict[str, Any]) -> list[str]:
    """Two rows of the table."""
    found = []
    for step in ("decode", "prefill"):
        a = answer["aot"][step]
        collective, array = a["largest_collective"], a["largest_array"]
        name = f"{answer['model']}, {answer['aot']['topology']}, `{answer['mesh']}`, {answer['attention']}"
        cells = [
            f"{name}, {answer['batch']} x {answer['context']:,}" if step == "decode" else "",
            f"{step}, T = {a['tokens']}",
            f"{_gb(a['argument_bytes'])}, {_gb(a['counted_bytes'])}",
            f"{_gb(a['alias_bytes'])} ({_gb(a['cache_bytes'])})",
            f"{_gb(a['temp_bytes'])}, {_gb(a['temp_bound_bytes'])}",
            f"{_gb(array['bytes'])} `{array['type']}`" if array else "-",
            f"{_gb(sum(a['sent_bytes'].values()))}, {_gb(a['planned_sent_bytes'])}",
            f"{collective['kind']} {_gb(collective['bytes'])}, {_gb(a['largest_planned_collective_bytes'])}"
            if collective
            else "-",
            f"{a['seconds']:.0f} s, {a['peak_rss_bytes'] / 1e9:.1f} GB",
        ]
        found.append("| " + " | ".join(cells) + " |")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "aot.md")
    options = parser.parse_args()
    table = []
    for case in options.cases.split(","):
        table += rows(run(CASES[case]))
        print(*table[-2:], sep="\n", flush=True)
    commands = "\n".join(f"    dsjax plan {CASES[case]} --chunk {CHUNK}" for case in options.cases.split(","))
    head = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    options.out.write_text(HEAD + "\n".join([*head, *table]) + f"\n\n{commands}\n")


if __name__ == "__main__":
    main()
