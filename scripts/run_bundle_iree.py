#!/usr/bin/env python3
"""Runs a bundle's programs by IREE's command line, and leaves a candidate folder for the bundle's verify.py.

    python scripts/run_bundle_iree.py BUNDLE CANDIDATE [PATTERN ...]

A template for any compiler that is called from outside: only `compile_program` and `run_program` know IREE. It needs
Python 3.9 and nothing else, takes programs that have goldens and run on one device, and goes on after one that fails.
"""

import argparse
import fnmatch
import json
import subprocess
import sys
import tempfile
from pathlib import Path

# Element types: how the manifest, safetensors files and IREE's command line call them.
TYPES = {
    "float32": ("F32", "f32"),
    "bfloat16": ("BF16", "bf16"),
    "float16": ("F16", "f16"),
    "int32": ("I32", "i32"),
    "uint32": ("U32", "i32"),
    "int8": ("I8", "i8"),
    "uint8": ("U8", "i8"),
    "uint16": ("U16", "i16"),
    "bool": ("BOOL", "i8"),
    "float8_e4m3fn": ("F8_E4M3", "f8E4M3FN"),
    "float8_e8m0fnu": ("F8_E8M0", "f8E8M0FNU"),
}
COMPILE = (
    "--iree-input-type=stablehlo",
    "--iree-hal-target-device=local",
    "--iree-hal-local-target-device-backends=llvm-cpu",
    "--iree-llvmcpu-target-cpu=host",
)


def compile_program(module, code):
    """modules/NAME.vhlo.bc to a program that IREE's runtime takes."""
    call(["iree-compile", *COMPILE, module, "-o", code])


def run_program(code, function, arguments, results, scratch):
    """Raw row-major bytes in, in the order of the manifest; raw bytes out.

    A donated argument is given like any other; what replaces it comes back as a result of its own.
    """
    flags = [f"--module={code}", f"--function={function}", "--device=local-sync"]
    for i, (entry, raw) in enumerate(arguments):
        (scratch / f"in{i}.bin").write_bytes(raw)
        shape = "x".join([*map(str, entry["shape"]), TYPES[entry["dtype"]][1]])
        flags.append(f"--input={shape}=@{scratch}/in{i}.bin")
    call(["iree-run-module", *flags, *(f"--output=@{scratch}/out{i}.bin" for i in range(len(results)))])
    return [(scratch / f"out{i}.bin").read_bytes() for i in range(len(results))]


def call(command):
    """Runs a command; if it fails, raises with the first line that says why."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        why = next((line for line in done.stderr.splitlines() if "error" in line.lower()), done.stderr.strip())
        raise RuntimeError(f"{command[0]}: status {done.returncode}: {why[:200]}")


def read_tensors(path):
    """The tensors of a safetensors file, raw bytes by name; {} if there is no file."""
    if not path.exists():
        return {}
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    spans = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {name: data[start + a : start + b] for name, (a, b) in spans.items()}


def write_tensors(path, entries, pieces):
    """Writes results under their names."""
    header, at = {}, 0
    for entry, raw in zip(entries, pieces):  # noqa: B905 (Python 3.9)
        span = [at, at + len(raw)]
        header[entry["name"]] = {"dtype": TYPES[entry["dtype"]][0], "shape": entry["shape"], "data_offsets": span}
        at += len(raw)
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(pieces))


def main():
    """Status 1 if a program failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("candidate", type=Path)
    parser.add_argument("patterns", nargs="*", default=["*"], help="names of modules, as 'block-*'")
    options = parser.parse_args()
    manifest = json.loads((options.bundle / "manifest.json").read_text())
    parameters = read_tensors(options.bundle / "params" / "params.safetensors")
    failed = 0
    for module in manifest["modules"]:
        name, golden = module["name"], module["golden"]
        if golden is None or module["rank"] is not None or not any(fnmatch.fnmatch(name, p) for p in options.patterns):
            continue
        given = {**parameters, **read_tensors(options.bundle / golden / "inputs.safetensors")}
        arguments = [(entry, given[entry["name"]]) for entry in module["arguments"]]
        with tempfile.TemporaryDirectory() as scratch:
            code = Path(scratch) / "program.vmfb"
            try:
                compile_program(options.bundle / "modules" / f"{name}.vhlo.bc", code)
                found = run_program(code, module["function"], arguments, module["results"], Path(scratch))
            except RuntimeError as e:
                print(f"{name}: {e}")
                failed += 1
                continue
        place = options.candidate / Path(golden).relative_to("golden")
        write_tensors(place / "outputs.safetensors", module["results"], found)
        print(f"{name}: done")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
