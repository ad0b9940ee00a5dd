"""Bundles of schema 1 made by hand, file by file from the contract: no program in them, but goldens and hashes; what a
candidate gives for them, and their verify.py run alone."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dsjax.export.standalone import source

Arrays = dict[str, np.ndarray]
GOLDEN = "decode-b1-s64"
ALONE = """
import sys
class Only:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {"numpy", *sys.stdlib_module_names}:
            raise ImportError(f"{name}: only NumPy is here")
sys.meta_path.insert(0, Only())
sys.argv = sys.argv[1:]
import runpy
runpy.run_path(sys.argv[0], run_name="__main__")
"""
CODES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e8m0fnu": "F8_E8M0",
    **{f"{kind}{bits}": f"{kind[0].upper()}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
    "bool": "BOOL",
}


def safetensors_bytes(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def save_tensors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    header, data = {}, b""
    for name, array in arrays.items():
        end = len(data) + array.nbytes
        header[name] = {"dtype": CODES[array.dtype.name], "shape": array.shape, "data_offsets": [len(data), end]}
        data += array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(safetensors_bytes(header, data))


def result(index: int, name: str, array: np.ndarray, part: list[list[int]] | None = None) -> dict[str, Any]:
    shape = list(array.shape) if part is None else [stop - start for start, stop in part]
    return {
        "index": index,
        "kind": "cache" if name.startswith("cache") else "output",
        "name": name,
        "alias": None,
        "shape": shape,
        "dtype": array.dtype.name,
        "global_shape": list(array.shape),
        "slice": part,
    }


def write_bundle(
    folder: Path,
    goldens: Mapping[str, Mapping[str, np.ndarray]],
    *,
    ranks: Mapping[int, Mapping[str, list[list[int]] | None]] | None = None,
    tolerance: Mapping[str, Any] | None = None,
    inputs: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """A bundle with these goldens' outputs.

    Args:
      ranks: by rank and result, its slice (None: the whole); each golden then belongs to a module per rank.
      tolerance: by result, in place of a strict bound of 1e-5.
      inputs: of all goldens.
    """
    modules = []
    for golden, outputs in goldens.items():
        place = folder / "golden" / golden
        save_tensors(place / "outputs.safetensors", outputs)
        save_tensors(place / "inputs.safetensors", inputs or {"tokens": np.zeros((1, 1), np.int32)})
        bounds = {n: {"strict": 1e-5, "reason": "float32"} for n, a in outputs.items() if a.dtype.kind == "f"}
        (place / "tolerance.json").write_text(json.dumps({**bounds, **(tolerance or {})}))
        for rank in [None] if ranks is None else ranks:
            parts = {} if ranks is None or rank is None else ranks[rank]
            name = golden if rank is None else f"{golden}-rank{rank}"
            modules.append(
                {
                    "name": name,
                    "kind": "model",
                    "phase": "decode",
                    "batch": 1,
                    "tokens": 1,
                    "length": 64,
                    "rank": rank,
                    "function": "main",
                    "golden": f"golden/{golden}",
                    "operator": None,
                    "arguments": [],
                    "results": [result(i, n, a, parts.get(n)) for i, (n, a) in enumerate(outputs.items())],
                }
            )
    (folder / "verify.py").write_text(source())
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in files
    }
    manifest = {"schema": 1, "mesh": None, "golden": "model", "modules": modules, "files": hashes}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def outputs(seed: int = 0) -> Arrays:
    r = np.random.default_rng(seed)
    return {
        "logits": r.normal(size=(2, 3, 50)).astype(np.float32),
        "hidden": r.normal(size=(2, 3, 16)).astype(ml_dtypes.bfloat16),
        "cache.latent": r.integers(0, 127, (2, 8, 4)).astype(np.uint8),
        "cache.length": np.array([3, 5], np.int32),
    }


def candidate_of(tmp_path: Path, arrays: Arrays, golden: str = GOLDEN) -> Path:
    save_tensors(tmp_path / "chip" / golden / "outputs.safetensors", arrays)
    return tmp_path / "chip"


def row_of(report: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for golden in report["goldens"] for row in golden["results"] if row["name"] == name)


def run_alone(bundle: Path, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """verify.py of the bundle in a process that can import NumPy and the standard library only."""
    command = [sys.executable, "-I", "-W", "error", "-c", ALONE, bundle / "verify.py", *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd="/")
