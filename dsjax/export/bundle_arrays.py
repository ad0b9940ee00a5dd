"""What a bundle's modules are run on, and what they should give: goldens, parameters, and ranks' parts of both."""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dsjax.errors import InputError
from dsjax.export.bundle_reader import Bundle, Program, Value, byte_count, inside, open_arrays, read_json

STRICT = 1e-5
"""The bound of a float result for which a golden names none."""


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
    where, raw = _copied(bundle, path, entry) if entry.get("copy") else _joined(bundle, path, entry, checkpoint)
    expected = byte_count(value.global_shape, value.dtype)
    if raw.size != expected:
        raise InputError(f"{where}: {value.name}: expected {expected} bytes, found {raw.size}")
    digest = entry.get("sha256")
    if digest is not None and hashlib.sha256(raw.data).hexdigest() != digest:
        raise InputError(f"{where}: {value.name}: expected sha256 {digest}, found another: the weight was changed")
    return _typed(raw, value)


def _copied(bundle: Bundle, path: Path, entry: dict[str, Any]) -> tuple[Path, np.ndarray]:
    copy = entry["copy"]
    if not isinstance(copy, dict) or not isinstance(copy.get("file"), str) or not isinstance(copy.get("tensor"), str):
        raise InputError(f"{path}: {entry['path']}: copy: expected file and tensor, found {reprlib.repr(copy)}")
    file = bundle.folder / inside(path, copy["file"])
    return file, np.ascontiguousarray(open_arrays(file).read(copy["tensor"])).reshape(-1).view(np.uint8)


def _joined(
    bundle: Bundle, path: Path, entry: dict[str, Any], checkpoint: Path | None
) -> tuple[Path, np.ndarray]:
    """The bytes of tensors in a checkpoint one after the other: an array stacked along a leading axis lies so."""
    name = entry["path"]
    if checkpoint is None:
        raise NoWeights("the bundle refers to a checkpoint's weights, and --checkpoint names no folder")
    if entry.get("recipe") != "stack":
        raise NoWeights(f"{name} is made by {entry.get('recipe')!r}; only --weights copy, at export, keeps the result")
    sources = entry.get("sources")
    if not isinstance(sources, list) or not sources:
        raise InputError(f"{path}: {name}: sources: expected a list, found {reprlib.repr(sources)}")
    pieces = []
    for source in sources:
        if not isinstance(source, dict) or not all(type(source.get(k)) is int for k in ("offset", "bytes")):
            raise InputError(f"{path}: {name}: sources: expected file, offset, bytes, found {reprlib.repr(source)}")
        file = checkpoint / inside(path, str(source.get("file")))
        try:
            with file.open("rb") as stream:
                stream.seek(source["offset"])
                piece = stream.read(source["bytes"])
        except OSError as e:
            raise InputError(f"{file}: expected a file of the checkpoint, found: {e.strerror}") from None
        if len(piece) != source["bytes"]:
            raise InputError(f"{file}: {source.get('tensor')}: expected {source['bytes']} bytes, found {len(piece)}")
        pieces.append(piece)
    return checkpoint, np.frombuffer(b"".join(pieces), np.uint8)


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


def golden_results(bundle: Bundle, program: Program) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """What a program should give, whole, by name; and the strict bound of each result that has one.

    Raises:
      InputError: see `arguments`.
    """
    folder = bundle.folder / "golden" / str(program.golden)
    path = folder / "outputs.safetensors"
    files = open_arrays(path)
    values = {v.name: v for m in program.modules for v in m.results}
    results = {name: _stored(path, files.read(name), value) for name, value in values.items()}
    bounds = {}
    path = folder / "tolerance.json"
    for name, entry in (read_json(path) if path.exists() else {}).items():
        strict = entry.get("strict") if isinstance(entry, dict) else None
        if not isinstance(strict, int | float) or isinstance(strict, bool) or not strict >= 0:
            raise InputError(f"{path}: {name}: strict: expected a bound, found {reprlib.repr(entry)}")
        bounds[name] = float(strict)
    return results, bounds


def whole_results(
    program: Program, results: Sequence[Sequence[np.ndarray]]
) -> tuple[dict[str, list[np.ndarray]], list[str]]:
    """What ranks gave, put together.

    Returns:
      By name, the whole array as often as ranks hold an element, so that copies can be compared: the first has the
      first rank's, and so on. And what is wrong with types, shapes or parts, in words.
    """
    wholes: dict[str, list[np.ndarray]] = {}
    filled: dict[str, list[np.ndarray]] = {}
    wrong = []
    for module, arrays in zip(program.modules, results, strict=True):
        if len(arrays) != len(module.results):
            wrong.append(f"{module.name}: expected {len(module.results)} results, found {len(arrays)}")
            continue
        for value, array in zip(module.results, arrays, strict=True):
            if array.dtype != value.dtype or array.shape != value.shape:
                expected, found = f"{value.dtype} {value.shape}", f"{array.dtype} {array.shape}"
                wrong.append(f"{module.name}: {value.name}: expected {expected}, found {found}")
                continue
            _place(value, array, wholes.setdefault(value.name, []), filled.setdefault(value.name, []))
    for name, masks in filled.items():
        if not masks[0].all():
            wrong.append(f"{name}: no rank gives {int((~masks[0]).sum())} of its {masks[0].size} elements")
    return {name: _completed(arrays, filled[name]) for name, arrays in wholes.items()}, wrong


def _place(value: Value, array: np.ndarray, wholes: list[np.ndarray], masks: list[np.ndarray]) -> None:
    """Puts a rank's part into the first copy of the whole in which it is still free."""
    where = tuple(slice(*s) for s in value.slice) if value.slice is not None else ...
    for whole, mask in zip(wholes, masks, strict=True):
        if not mask[where].any():
            whole[where], mask[where] = array, True
            return
    whole, mask = np.zeros(value.global_shape, value.dtype), np.zeros(value.global_shape, bool)
    whole[where], mask[where] = array, True
    wholes.append(whole)
    masks.append(mask)


def _completed(wholes: list[np.ndarray], masks: list[np.ndarray]) -> list[np.ndarray]:
    """Further copies, which need not be whole, filled up from the first."""
    return [wholes[0], *(np.where(mask, whole, wholes[0]) for whole, mask in zip(wholes[1:], masks[1:], strict=True))]


