"""A result checked against its certificate: hashes, and, with the source at hand, every verdict anew.

Verdicts are recomputed by decoding what the files hold; nothing that made them is asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dsjax.checkpoint.safetensors import Files, read_tensors
from dsjax.checkpoint.safetensors_writer import Spec
from dsjax.config import Config, load_config
from dsjax.convert.certificate import CERTIFICATE, entry, part_bytes, read_certificate, summary
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

_UNVERIFIED = "scales_from"
"""What conversion did, of which values say nothing."""

_BEYOND = {
    "bf16": np.uint32(0x7F7F8000).view(np.float32),
    "f16": np.float32(65520),
    "e4m3": np.nextafter(np.float32(464), np.float32(np.inf)),
    "e2m1": np.float32(7),
    "int8": np.float32(127.5),
    "int4": np.float32(7.5),
}
"""The least number, in scales, that would be rounded to more than a format's largest; ties go to even codes."""


def _hash_problems(folder: Path, section: dict[str, Any], what: str) -> Iterator[str]:
    """Files that are missing, or not the ones that were hashed; of a shard, the tensors that differ."""
    hashed: set[str] = set()
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
        hashed |= found["tensors"].keys()
        changed = [t for t, h in found["tensors"].items() if section["tensors"].get(t) != h]
        if (found["sha256"], found["bytes"]) == (wanted["sha256"], wanted["bytes"]) and not changed:
            continue
        where = f", in tensor {', '.join(changed[:3])}{' and others' if len(changed) > 3 else ''}" if changed else ""
        yield f"{path}: expected the {what}'s bytes as certified, found others{where}"
    for name in section["tensors"].keys() - hashed:
        yield f"{folder}: tensor {name}: expected it in a file of the {what}, found none"


class _Result:
    """Decodes the matrices of a result."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = Files.open(folder)

    def check(self, expected: Iterable[Spec]) -> None:
        """Raises InputError for a tensor that is missing, or of another type or shape."""
        for spec in expected:
            tensor = self._files.get(spec.name)
            found = "none" if tensor is None else f"{tensor.dtype.name} {list(tensor.shape)}"
            wanted = f"{spec.dtype.name} {list(spec.shape)}"
            if tensor is None or (tensor.dtype, tensor.shape) != (spec.dtype, tuple(spec.shape)):
                raise InputError(f"{self.folder}: tensor {spec.name}: expected {wanted}, found {found}")

    def names(self) -> set[str]:
        return set(self._files)

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


def _saturated(old: np.ndarray, encoding: Encoding, scales: np.ndarray | None) -> int:
    """How many values are beyond what the format can say."""
    if encoding.element == "f32":
        return 0
    scaled = np.abs(old) if scales is None else np.abs(old / scales)
    return int(np.count_nonzero(scaled >= _BEYOND[encoding.element]))


def _errors(result: _Result, source: Files, config: Config, job: Job, place: int) -> Errors:
    """Of a part, from the files alone."""
    total, part = Errors(), job.parts[place]
    assert job.encoding is not None
    matrix = Matrix(source, config, part)
    with np.errstate(all="ignore"):  # the result may hold anything
        for rows in strips(part):
            strip = matrix.read(rows)
            old = strip.values(slice(0, rows.stop - rows.start), slice(0, part.shape[1]))
            new, scales = result.values(job, place, job.encoding, rows)
            errors, differ = compare(old, new, job.encoding, scales, _saturated(old, job.encoding, scales))
            if differ is not None:
                explain(errors, strip, job.encoding, differ, slice(0, part.shape[1]))
            total.add(errors)
        return measured(matrix, total)


def _check_kept(result: _Result, source: Files, job: Job, place: int) -> None:
    """Raises InputError for a tensor that has not the source's bytes."""
    part, step = job.parts[place], 1 << 22
    pairs = [(job.codes.name, part.official, part.tensor.nbytes)]
    if job.scales is not None and part.scales is not None and part.row is not None:
        pairs.append((job.scales.name, part.row.scale_name(part.official), part.scales.nbytes))
    for name, official, size in pairs:
        for start in range(0, size, step):
            old = np.empty(min(step, size - start), np.uint8)
            source.read_into(official, old, start)
            if not np.array_equal(old, result.bytes_of(name, place * size + start, old.size)):
                raise InputError(f"{result.folder}: tensor {name}: expected the source's bytes, found others")


def _verdict(result: _Result, source: Files, config: Config, job: Job, place: int) -> dict[str, Any]:
    """The entry of a part, made anew.

    Raises:
      InputError: naming the tensor, if the files hold no such thing.
    """
    result.check(job.specs)
    if job.shape is not None:
        shape = np.array(job.parts[0].shape, np.int64).view(np.uint8)
        if not np.array_equal(result.bytes_of(job.shape.name, 0, shape.size), shape):
            raise InputError(f"{result.folder}: tensor {job.shape.name}: expected {list(job.parts[0].shape)}, not so")
    if job.encoding is None:
        _check_kept(result, source, job, place)
        return entry(job, job.parts[place], Errors())
    return entry(job, job.parts[place], _errors(result, source, config, job, place))


def _agree(claim: Any, truth: Any) -> bool:
    """Whether what is certified is so; floats may differ by `_TOLERANCE`."""
    if isinstance(truth, dict):
        return (
            isinstance(claim, dict) and claim.keys() == truth.keys() and all(_agree(claim[k], truth[k]) for k in truth)
        )
    if isinstance(truth, float):
        try:
            return type(claim) in (int, float) and math.isclose(claim, truth, rel_tol=_TOLERANCE)
        except OverflowError:  # an integer that no float holds
            return False
    return type(claim) is type(truth) and bool(claim == truth)


def _differences(claim: dict[str, Any], truth: dict[str, Any]) -> str:
    """What is certified otherwise than it is, in words; empty if nothing is."""
    unlike = [name for name in truth if name != _UNVERIFIED and not _agree(claim.get(name), truth[name])]
    return ", ".join(f"{name} {claim.get(name)!r:.200} (certified) and {truth[name]!r:.200}" for name in unlike)


def _verdict_problems(folder: Path, source: Path, made: dict[str, Any]) -> Iterator[str]:
    config, path = load_config(source), folder / CERTIFICATE
    options = Options(TARGETS[made["to"]], made.get("only"), made.get("names"))
    plan = make_plan(Files.open(source), config, options, 1 << 62)
    result = _Result(folder)
    entries: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {}
    whole = True
    for job in plan.jobs:
        for place, part in enumerate(job.parts):
            try:
                found = _verdict(result, plan.files, config, job, place)
            except InputError as e:
                yield str(e)
                whole = False
                continue
            entries[part.name] = found, part_bytes(job, part)
            wanted = made["tensors"].get(part.name)
            if wanted is None:
                yield f"{path}: tensor {part.name}: expected an entry, found none"
            elif told := _differences(wanted, found):
                yield f"{path}: tensor {part.name}: expected the verdict that its values give: {told}"
    for name in result.names() - {spec.name for job in plan.jobs for spec in job.specs}:
        yield f"{folder}: tensor {name}: expected no such tensor, found one"
    for name in made["tensors"].keys() - {part.name for job in plan.jobs for part in job.parts}:
        yield f"{path}: tensor {name}: expected entries of the source's tensors, found another"
    if whole:
        exact = all(found["exact"] for found, _ in entries.values())
        if told := _differences(made, {"exact": exact, "summary": summary(entries.values())}):
            yield f"{path}: expected what follows from the entries: {told}"


def verify(folder: Path, source: Path | None = None) -> list[str]:
    """Everything about a result that is not as its certificate says, one line each.

    Args:
      folder: the result.
      source: what it was made from; then the verdicts on all tensors are found again, too.

    Raises:
      InputError: if there is no certificate, or one that cannot be read.
    """
    made = read_certificate(folder)
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
