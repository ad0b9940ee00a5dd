"""A result checked against its certificate: hashes, and, with the source at hand, every verdict anew.

Verdicts are recomputed by decoding what the files hold; nothing that made them is asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dsjax.checkpoint.safetensors import Files, read_tensors
from dsjax.config import Config, load_config, read_json_object
from dsjax.convert.certificate import CERTIFICATE, VERSION, entry
from dsjax.convert.encode import decode, expand, unpack_words, widen
from dsjax.convert.errors import Errors, compare
from dsjax.convert.hashing import hash_file
from dsjax.convert.matrix import explain
from dsjax.convert.plan import Job, Options, make_plan
from dsjax.convert.shard import Matrix, measured, strips
from dsjax.convert.targets import TARGETS, Encoding
from dsjax.errors import InputError

_TOLERANCE = 1e-6
"""Relative, of sums, which may be added up in another order elsewhere."""

_NUMBERS = ("max_abs_error", "max_rel_error", "mean_abs_error", "relative_norm", "flushed")


def _read_certificate(folder: Path) -> dict[str, Any]:
    path = folder / CERTIFICATE
    found = read_json_object(path)
    if found.get("version") != VERSION:
        raise InputError(f"{path}: expected version {VERSION}, found {str(found.get('version'))[:40]!r}")
    for name in ("source", "result", "tensors"):
        section = found.get(name)
        inside = section if name == "tensors" else (section or {}).get("files")
        if not isinstance(section, dict) or not isinstance(inside, dict):
            raise InputError(f"{path}: expected an object {name!r} as convert writes it, found something else")
    if found.get("to") not in TARGETS:
        raise InputError(f"{path}: expected 'to' among {', '.join(TARGETS)}, found {str(found.get('to'))[:40]!r}")
    return found


def _hash_problems(folder: Path, section: dict[str, Any], what: str) -> Iterator[str]:
    """Files that are missing, or not the ones that were hashed; of a shard, the tensors that differ."""
    for name, wanted in section["files"].items():
        path = folder / name
        if not path.is_file():
            yield f"{path}: expected a file of the {what}, of {wanted['bytes']} bytes, found none"
            continue
        try:
            tensors = read_tensors(path) if name.endswith(".safetensors") and "/" not in name else []
        except InputError as e:
            yield str(e)
            tensors = []
        found = hash_file(path, tensors)
        if found["sha256"] == wanted["sha256"]:
            continue
        changed = [t for t, h in found["tensors"].items() if section["tensors"].get(t) != h]
        where = f", in tensor {', '.join(changed[:3])}{' and others' if len(changed) > 3 else ''}" if changed else ""
        yield f"{path}: expected the {what}'s bytes as certified, found others{where}"


class _Result:
    """Decodes the matrices of a result."""

    def __init__(self, folder: Path) -> None:
        self._files = Files.open(folder)

    def _rows(self, name: str, start: int, count: int) -> np.ndarray:
        """Rows of a tensor, those of a stack counted through."""
        tensor = self._files[name]
        out = np.empty((count, tensor.shape[-1]), tensor.dtype)
        self._files.read_into(name, out, start * tensor.shape[-1] * tensor.dtype.itemsize)
        return out

    def values(self, job: Job, place: int, encoding: Encoding, rows: slice) -> tuple[np.ndarray, np.ndarray | None]:
        """float32 values of some rows of a part, and scales that broadcast against them."""
        n, k = job.parts[place].shape
        shape = (rows.stop - rows.start, k)
        codes = self._rows(job.codes.name, place * n + rows.start, shape[0])
        if job.scales is None:
            return decode(codes.view(np.uint16) if encoding.element == "bf16" else codes, None, encoding.element), None
        bn = encoding.block[0]
        first = place * encoding.grid((n, k))[0] + rows.start // bn
        raw = self._rows(job.scales.name, first, -(-shape[0] // bn))
        scales = widen(raw.view(np.uint16)) if raw.dtype == ml_dtypes.bfloat16 else raw.astype(np.float32)
        if encoding.element == "int4":
            codes = unpack_words(codes, k)
        elif encoding.element == "e2m1":
            packed = codes.view(np.uint8)
            codes = np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(shape)
        elif encoding.element == "e4m3":
            codes = codes.view(np.uint8)
        spread = expand(scales, encoding.block, shape)
        return decode(codes, spread, encoding.element), spread

    def bytes_of(self, name: str, start: int, count: int) -> np.ndarray:
        out = np.empty(count, np.uint8)
        self._files.read_into(name, out, start)
        return out


def _errors(result: _Result, source: Files, config: Config, job: Job, place: int) -> Errors:
    """Of a part, from the files alone."""
    total, part = Errors(), job.parts[place]
    assert job.encoding is not None
    matrix = Matrix(source, config, part)
    for rows in strips(part):
        strip = matrix.read(rows)
        old = strip.values(slice(0, rows.stop - rows.start), slice(0, part.shape[1]))
        new, scales = result.values(job, place, job.encoding, rows)
        errors, differ = compare(old, new, job.encoding, scales)
        if differ is not None:
            explain(errors, strip, job.encoding, differ, slice(0, part.shape[1]))
        total.add(errors)
    return measured(matrix, total)


def _kept_problem(result: _Result, source: Files, job: Job, place: int) -> bool:
    part, step = job.parts[place], 1 << 22
    for start in range(0, part.tensor.nbytes, step):
        count = min(step, part.tensor.nbytes - start)
        old = np.empty(count, np.uint8)
        source.read_into(part.official, old, start)
        if not np.array_equal(old, result.bytes_of(job.codes.name, place * part.tensor.nbytes + start, count)):
            return True
    return False


def _unlike(wanted: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Fields of an entry that another one does not have so."""
    plain = ("result", "class", "shape", "source", "target", "action", "exact")
    unlike = [name for name in plain if wanted.get(name) != found[name]]
    for name in _NUMBERS:
        value = wanted.get(name)
        if not isinstance(value, int | float) or not math.isclose(value, found[name], rel_tol=_TOLERANCE):
            unlike.append(name)
    return unlike


def _verdict_problems(folder: Path, source: Path, made: dict[str, Any]) -> Iterator[str]:
    config = load_config(source)
    options = Options(TARGETS[made["to"]], made.get("only"), made.get("names"))
    plan = make_plan(Files.open(source), config, options, 1 << 62)
    result, seen = _Result(folder), set()
    for job in plan.jobs:
        for place, part in enumerate(job.parts):
            seen.add(part.name)
            wanted = made["tensors"].get(part.name)
            if wanted is None:
                yield f"{folder / CERTIFICATE}: tensor {part.name}: expected an entry, found none"
                continue
            if job.encoding is None and _kept_problem(result, plan.files, job, place):
                yield f"{folder}: tensor {job.codes.name}: expected the source's bytes, found others"
                continue
            errors = Errors() if job.encoding is None else _errors(result, plan.files, config, job, place)
            unlike = _unlike(wanted, found := entry(job, part, errors))
            if unlike:
                told = ", ".join(f"{name} {wanted.get(name)} (certified) and {found[name]}" for name in unlike)
                yield f"{folder / CERTIFICATE}: tensor {part.name}: expected the verdict that its values give: {told}"
    for name in made["tensors"].keys() - seen:
        yield f"{folder / CERTIFICATE}: tensor {name}: expected entries of the source's tensors, found another"


def verify(folder: Path, source: Path | None = None) -> list[str]:
    """Everything about a result that is not as its certificate says, one line each.

    Args:
      folder: the result.
      source: what it was made from; then the verdicts on all tensors are found again, too.

    Raises:
      InputError: if there is no certificate, or one that cannot be read.
    """
    made = _read_certificate(folder)
    problems = list(_hash_problems(folder, made["result"], "result"))
    for path in sorted(folder.rglob("*.safetensors")):
        name = str(path.relative_to(folder))
        if name not in made["result"]["files"]:
            problems.append(f"{path}: expected no such file, found one")
    if source is None:
        return problems
    theirs = list(_hash_problems(source, made["source"], "source"))
    problems += theirs
    if theirs:
        return problems
    try:
        problems += _verdict_problems(folder, source, made)
    except InputError as e:
        problems.append(str(e))
    return problems
