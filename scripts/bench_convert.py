"""Times `dsjax convert` against plainly reading the source and writing as many bytes as the result has.

    bench_convert.py [--work DIR] [--layers 3] [--other-layers 1] [--experts 256]
                     [--other-experts 160] [--rounds 1] [--targets fp8,bf16,...]

Makes a V4-Flash checkpoint of full width and few layers with `dsjax synth` (12 GB, for the FP8 targets) and one of a
third of it (4 GB, for the others), converts them in processes of their own, and prints a Markdown table; the last line
is the same as one JSON object. The sides take turns in every round, one first and then the other, on the same disk, all
flushed to it, the source dropped from the page cache before each. There are two plain copies: one that leaves memory
to the system, and one that lets go of what it has read and written, as conversion does: where a machine finds new
memory slowly, as virtual ones may, that one is much faster. What is made is deleted again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from dsjax.checkpoint.safetensors import Files
from dsjax.checkpoint.safetensors_writer import Spec, write_checkpoint_files

FP8 = ("fp8", "fp8-ue8m0")
OTHERS = ("bf16", "f16", "f32", "mxfp4", "int8-channel", "int8-block", "int4-group", "w4a8")
_CHUNK = 8 << 20

_CHILD = """
import json, resource, sys
from pathlib import Path
from dsjax.convert import TARGETS, Options, convert
outcome = convert(Path(sys.argv[1]), Path(sys.argv[2]), Options(TARGETS[sys.argv[3]]))
peak = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) * 1024
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"seconds": outcome.seconds, "bytes": outcome.bytes, "exact": outcome.certificate["exact"],
                  "peak": peak, "cpu": used.ru_utime + used.ru_stime,
                  "summary": outcome.certificate["summary"]}))
"""


def make(folder: Path, layers: int, experts: int) -> None:
    """A checkpoint; without a draft module, so that all layers are alike.

    Experts beyond the first 32 repeat their bytes: that takes a tenth of the time, and a conversion does not look.
    """
    some = min(experts, 32)
    seed = folder.with_name("seed")
    command = [sys.executable, "-m", "dsjax", "synth", "deepseek-v4-flash", "--layers", str(layers)]
    for key, value in {"num_nextn_predict_layers": 0, "n_routed_experts": some}.items():
        command += ["--set", f"{key}={value}"]
    subprocess.run([*command, "--out", str(seed)], check=True, stdout=subprocess.DEVNULL)
    if experts == some:
        seed.rename(folder)
        return
    folder.mkdir()
    config = json.loads((seed / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_routed_experts": experts}))
    with Files.open(seed) as files:
        names: dict[str, str] = {}
        for name in files:
            first = re.fullmatch(r"(.+\.experts\.)(\d+)(\..+)", name)
            for copy in range(int(first[2]), experts, some) if first else ():
                names[f"{first[1]}{copy}{first[3]}"] = name
            if not first:
                names[name] = name
        specs, arrays = [], []
        for name, source in names.items():
            array = files.read(source)
            if re.search(r"\.ffn\.gate\.(weight|bias)$", name):  # a row for each expert
                array = np.concatenate([array] * -(-experts // some))[:experts]
            specs.append(Spec(name, array.dtype, array.shape))
            arrays.append(array)
        write_checkpoint_files(folder, specs, arrays)
    shutil.rmtree(seed)


def weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def forget(folder: Path) -> None:
    """Drops the files from the page cache, so that both sides read the disk."""
    for path in weights(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def let_go(file: FileIO) -> None:
    """Gives memory back, each time that 64 MB more have been read or written; the disk is told to take what is new."""
    if file.tell() % (_CHUNK << 3) == 0:
        os.posix_fadvise(file.fileno(), 0, file.tell(), os.POSIX_FADV_DONTNEED)


def plainly(source: Path, out: Path, nbytes: int, lets_go: bool) -> float:
    """Seconds to read the source and write `nbytes`, side by side as far as the kernel does so by itself."""
    buffer = bytearray(os.urandom(_CHUNK))
    view = memoryview(bytearray(_CHUNK))
    start = time.perf_counter()
    for path in weights(source):
        with path.open("rb", buffering=0) as file:
            while file.readinto(view):
                if lets_go:
                    let_go(file)
    out.mkdir()
    with (out / "plain").open("wb", buffering=0) as file:
        for begin in range(0, nbytes, _CHUNK):
            file.write(memoryview(buffer)[: min(_CHUNK, nbytes - begin)])
            if lets_go:
                let_go(file)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    return seconds


def converted(source: Path, out: Path, to: str) -> dict[str, Any]:
    """What a conversion in a fresh process says of itself."""
    command = [sys.executable, "-c", _CHILD, str(source), str(out), to]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    found["written"] = size(out)
    shutil.rmtree(out)
    return found


def bench(source: Path, work: Path, to: str, rounds: int) -> dict[str, Any]:
    """Medians over rounds of one target."""
    runs: list[dict[str, Any]] = []
    plain: dict[bool, list[float]] = {False: [], True: []}

    def copy() -> None:
        for lets_go, seconds in plain.items():
            forget(source)
            seconds.append(plainly(source, work / "plain", runs[0]["written"], lets_go))

    for turn in range(rounds):
        if turn % 2:
            copy()
        forget(source)
        runs.append(converted(source, work / "out", to))
        if not turn % 2:
            copy()
        told = ", ".join(f"{seconds[-1]:.1f} s" for seconds in plain.values())
        load = os.getloadavg()[0]
        print(f"{to}: {runs[-1]['seconds']:.1f} s; copies {told}; load {load:.1f}", file=sys.stderr, flush=True)
    first = runs[0]
    moved = size(source) + first["written"]
    weights_count = sum(one["parameters"] for name, one in first["summary"].items() if name in ("linear", "expert"))
    seconds = [run["seconds"] for run in runs]
    return {
        "to": to,
        "source_bytes": size(source),
        "result_bytes": first["written"],
        "exact": first["exact"],
        "convert_s": statistics.median(seconds),
        "plain_s": statistics.median(plain[False]),
        "plain_let_go_s": statistics.median(plain[True]),
        "ratio": statistics.median(p / s for p, s in zip(plain[False], seconds, strict=True)),
        "ratio_let_go": statistics.median(p / s for p, s in zip(plain[True], seconds, strict=True)),
        "gb_per_s": moved / statistics.median(seconds) / 1e9,
        "cpu_s": statistics.median(run["cpu"] for run in runs),
        "cpu_ns_per_weight": statistics.median(run["cpu"] for run in runs) / weights_count * 1e9,
        "peak_rss_bytes": max(run["peak"] for run in runs),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| to | source | result | exact | convert | plain copy | of its speed | copy that lets go | of its speed "
        "| CPU time, a weight | peak memory |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| `{row['to']}` | {row['source_bytes'] / 1e9:.1f} GB | {row['result_bytes'] / 1e9:.1f} GB | "
            f"{'yes' if row['exact'] else 'no'} | {row['convert_s']:.0f} s, {row['gb_per_s']:.2f} GB/s | "
            f"{row['plain_s']:.0f} s | {row['ratio']:.0%} | "
            f"{row['plain_let_go_s']:.0f} s | {row['ratio_let_go']:.0%} | "
            f"{row['cpu_s']:.0f} s, {row['cpu_ns_per_weight']:.1f} ns | "
            f"{row['peak_rss_bytes'] / 1e9:.2f} GB |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path(".cache/bench_convert"), help="a folder on the disk in question"
    )
    parser.add_argument("--layers", type=int, default=3, help="of the checkpoint for the FP8 targets")
    parser.add_argument("--other-layers", type=int, default=1, help="of the one for the others")
    parser.add_argument("--experts", type=int, default=256, help="a layer; fewer for a quick look")
    parser.add_argument("--other-experts", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--targets", default=",".join((*FP8, *OTHERS)))
    options = parser.parse_args()
    wanted = options.targets.split(",")
    rows = []
    options.work.mkdir(parents=True)
    try:
        for layers, experts, group in (
            (options.layers, options.experts, FP8),
            (options.other_layers, options.other_experts, OTHERS),
        ):
            mine = [to for to in group if to in wanted]
            if not mine:
                continue
            source = options.work / "source"
            make(source, layers, experts)
            for to in mine:
                rows.append(bench(source, options.work, to, options.rounds))
                print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
            shutil.rmtree(source)
    finally:
        shutil.rmtree(options.work)
    print(table(rows))
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
