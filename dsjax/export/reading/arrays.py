"""What a bundle's modules are run on: a golden's inputs and the parameters, and of both each rank's part."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dsjax.errors import InputError
from dsjax.export.consumers.exchange import DTYPES
from dsjax.export.reading.reader import Bundle, Program, Value, byte_count, open_arrays
from dsjax.export.standalone.arrays import BadInput
from dsjax.export.standalone.manifest import inside

PIECE = 1 << 26
"""Bytes of a file that are read at a time; a multiple of any element."""


class NoWeights(Exception):
    """Why a program's parameters cannot be had, in words."""


def arguments(bundle: Bundle, program: Program, checkpoint: Path | None) -> list[list[np.ndarray]]:
    """The arguments of each rank's module, in order.

    Args:
      bundle, program: which has a golden.
      checkpoint: the folder that `params.json` refers to; None if the bundle holds its weights.

    Raises:
      InputError: of a missing tensor, or one that is not as the manifest says.
      NoWeights: see there.
    """
    path = bundle.folder / "golden" / str(program.golden) / "inputs.safetensors"
    files = open_arrays(path)
    whole: dict[str, np.ndarray] = {}
    for value in (v for m in program.modules for v in m.arguments):
        if value.name in whole:
            continue
        if value.name in files or value.kind != "param":
            whole[value.name] = _stored(path, files.read(value.name), value)
        else:
            whole[value.name] = parameter(bundle, value, checkpoint)
    return [[v.part(whole[v.name]) for v in m.arguments] for m in program.modules]


def parameter(bundle: Bundle, value: Value, checkpoint: Path | None) -> np.ndarray:
    """A whole parameter: from the bundle's own copy, or from the checkpoint's files; its hash is compared.

    Raises:
      InputError, NoWeights: see `arguments`.
    """
    path = bundle.folder / "params.json"
    entry = bundle.params.get(value.name)
    if entry is None:
        raise InputError(f"{path}: expected the parameter {value.name}, found no entry")
    if entry.get("copy"):
        where, raw = _copied(bundle, path, entry)
    elif checkpoint is None:
        raise NoWeights("the bundle refers to a checkpoint's weights, and --checkpoint names no folder")
    else:
        where, raw = checkpoint, _joined(_made(path, entry, value, checkpoint))
    expected = byte_count(value.global_shape, value.dtype)
    if raw.size != expected:
        raise InputError(f"{where}: {value.name}: expected {expected} bytes, found {raw.size}")
    _compare(where, value.name, entry, hashlib.sha256(raw.data).hexdigest())
    return _typed(raw, value)


def compare_checkpoint(bundle: Bundle, programs: Sequence[Program], checkpoint: Path) -> tuple[int, int]:
    """Compares the hashes of all parameters that recipes make of a checkpoint's files, a piece of a file at a time.

    Returns:
      How many were compared, and how many the programs have.

    Raises:
      InputError: of a folder that is not there, a missing file, or another hash.
    """
    if not checkpoint.is_dir():
        raise InputError(f"--checkpoint {checkpoint}: expected a folder, found none")
    path, compared = bundle.folder / "params.json", 0
    values = {v.name: v for p in programs for m in p.modules for v in m.arguments if v.kind == "param"}
    for name, value in values.items():
        entry = bundle.params.get(name, {})
        if entry.get("sha256") is None:
            continue
        digest = hashlib.sha256()
        try:
            for piece in _made(path, entry, value, checkpoint):
                digest.update(piece.data)
        except NoWeights:
            continue
        _compare(checkpoint, name, entry, digest.hexdigest())
        compared += 1
    return compared, len(values)


def _compare(where: Path, name: str, entry: dict[str, Any], found: str) -> None:
    if entry.get("sha256") not in (None, found):
        raise InputError(f"{where}: {name}: expected sha256 {entry['sha256']}, found another: the weight was changed")


def _copied(bundle: Bundle, path: Path, entry: dict[str, Any]) -> tuple[Path, np.ndarray]:
    copy = entry["copy"]
    if not isinstance(copy, dict) or not isinstance(copy.get("file"), str) or not isinstance(copy.get("tensor"), str):
        raise InputError(f"{path}: {entry['path']}: copy: expected file and tensor, found {reprlib.repr(copy)}")
    if copy["file"] not in bundle.manifest["files"]:
        raise InputError(f"{path}: {entry['path']}: copy: expected a file of the manifest, found {copy['file'][:80]!r}")
    file = bundle.folder / copy["file"]
    return file, np.ascontiguousarray(open_arrays(file).read(copy["tensor"])).reshape(-1).view(np.uint8)


def _made(path: Path, entry: dict[str, Any], value: Value, checkpoint: Path) -> Iterator[np.ndarray]:
    """The bytes of a parameter, made by its recipe of tensors in a checkpoint, one after the other: pieces in order.

    An array stacked along a leading axis lies so. What is repeated is one piece.
    """
    recipe = _Recipe.parse(str(entry.get("recipe")), value)
    if recipe is None:
        what = f"{value.name} is made by {entry.get('recipe')!r}"
        raise NoWeights(f"{what}; only --weights copy, at export, keeps the result")
    pieces = _read(path, value.name, entry.get("sources"), checkpoint, recipe)
    cast = (
        p if recipe.source == value.dtype else p.view(recipe.source).astype(value.dtype).view(np.uint8) for p in pieces
    )
    if not recipe.times:
        yield from cast
        return
    array = _joined(cast).view(value.dtype).reshape(recipe.shape)
    for axis, times in recipe.times.items():
        array = array.take(np.arange(value.global_shape[axis]) // times, axis)
    yield np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _read(path: Path, name: str, sources: Any, checkpoint: Path, recipe: _Recipe) -> Iterator[np.ndarray]:
    """The sources' bytes, as they are in the files."""
    if not isinstance(sources, list) or not sources:
        raise InputError(f"{path}: {name}: sources: expected a list, found {reprlib.repr(sources)}")
    for source in sources:
        if not isinstance(source, dict) or not all(_is_size(source.get(k)) for k in ("offset", "bytes")):
            raise InputError(f"{path}: {name}: sources: expected file, offset, bytes, found {reprlib.repr(source)}")
    expected, found = byte_count(recipe.shape, recipe.source), sum(source["bytes"] for source in sources)
    if found != expected or any(source["bytes"] % recipe.source.itemsize for source in sources):
        raise InputError(f"{path}: {name}: sources: expected {expected} bytes, found {found}")
    for source in sources:
        try:
            file = checkpoint / inside(path, source.get("file"))
            with file.open("rb") as stream:
                stream.seek(source["offset"])
                for start in range(0, source["bytes"], PIECE):
                    size = min(PIECE, source["bytes"] - start)
                    piece = np.frombuffer(stream.read(size), np.uint8)
                    if piece.size != size:
                        found = start + piece.size
                        what = f"{source.get('tensor')}: expected {source['bytes']} bytes, found {found}"
                        raise InputError(f"{file}: {what}")
                    yield piece
        except BadInput as e:
            raise InputError(str(e)) from None
        except OSError as e:
            raise InputError(f"{file}: expected a file of the checkpoint, found: {e.strerror}") from None


def _joined(pieces: Iterator[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.uint8), *pieces])


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


_CAST = re.compile(r"(b?float\w+|u?int\d+) to (b?float\w+|u?int\d+)")
_REPEATED = re.compile(r"each repeated (\d{1,4}) times along axis (\d)")


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """What is done to stacked tensors: perhaps a cast of plain types, then each element repeated along axes.

    Attributes:
      source: their type.
      shape: of the stack.
      times: by axis, how often each is repeated; the last fewer times, where the parameter ends before.
    """

    source: np.dtype
    shape: tuple[int, ...]
    times: dict[int, int]

    @classmethod
    def parse(cls, text: str, value: Value) -> _Recipe | None:
        """The recipe of a parameter by its text; None for any other."""
        first, *steps = text.split(", then ")
        source, shape, times = value.dtype, list(value.global_shape), dict[int, int]()
        for i, step in enumerate(steps):
            cast, repeated = _CAST.fullmatch(step), _REPEATED.fullmatch(step)
            if repeated and int(repeated[1]) and int(repeated[2]) < len(shape):
                times[int(repeated[2])] = int(repeated[1])
            elif cast and i == 0 and set(cast.groups()) <= set(DTYPES) and DTYPES[cast[2]] == value.dtype:
                source = DTYPES[cast[1]]
            else:
                return None
        for axis, n in times.items():
            shape[axis] = -(-shape[axis] // n)
        return cls(source, tuple(shape), times) if first == "stack" else None


def _typed(raw: np.ndarray, value: Value) -> np.ndarray:
    """Bytes of a file as an array; FP4 gets a byte for each code."""
    if value.dtype.name == "float4_e2m1fn":
        codes = np.stack([raw & 15, raw >> 4], axis=-1).astype(np.uint8)
        return codes.reshape(value.global_shape).view(ml_dtypes.float4_e2m1fn)
    return raw.view(value.dtype).reshape(value.global_shape)


def _stored(path: Path, array: np.ndarray, value: Value) -> np.ndarray:
    """A golden's array, whole, as the manifest says that it is."""
    if array.dtype == np.uint8 and value.dtype.name == "float4_e2m1fn":
        if array.size == byte_count(value.global_shape, value.dtype):
            return _typed(array.reshape(-1), value)
    elif array.dtype == value.dtype and array.shape == value.global_shape:
        return np.array(array)
    found = f"{array.dtype} {list(array.shape)}"
    raise InputError(f"{path}: {value.name}: expected {value.dtype} {list(value.global_shape)}, found {found}")
