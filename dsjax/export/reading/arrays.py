"""What a bundle's modules are run on: a golden's inputs and the parameters, and of both each rank's part."""

from __future__ import annotations

import hashlib
import re
import reprlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dsjax.errors import InputError
from dsjax.export.consumers.exchange import dtype_of
from dsjax.export.reading.reader import Bundle, Program, Value, byte_count, open_arrays
from dsjax.export.standalone.arrays import BadInput
from dsjax.export.standalone.manifest import inside


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
    where, raw = _copied(bundle, path, entry) if entry.get("copy") else _joined(path, entry, value, checkpoint)
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
    if copy["file"] not in bundle.manifest["files"]:
        raise InputError(f"{path}: {entry['path']}: copy: expected a file of the manifest, found {copy['file'][:80]!r}")
    file = bundle.folder / copy["file"]
    return file, np.ascontiguousarray(open_arrays(file).read(copy["tensor"])).reshape(-1).view(np.uint8)


def _joined(path: Path, entry: dict[str, Any], value: Value, checkpoint: Path | None) -> tuple[Path, np.ndarray]:
    """The bytes of tensors in a checkpoint one after the other: an array stacked along a leading axis lies so.

    Where the recipe is "stack, then X to Y", they are of dtype X, and cast.
    """
    name, recipe = value.name, str(entry.get("recipe"))
    if checkpoint is None:
        raise NoWeights("the bundle refers to a checkpoint's weights, and --checkpoint names no folder")
    cast = _cast(recipe)
    if cast is None and recipe != "stack":
        raise NoWeights(f"{name} is made by {recipe!r}; only --weights copy, at export, keeps the result")
    expected = byte_count(value.global_shape, value.dtype if cast is None else cast[0])
    sources = entry.get("sources")
    if not isinstance(sources, list) or not sources:
        raise InputError(f"{path}: {name}: sources: expected a list, found {reprlib.repr(sources)}")
    for source in sources:
        if not isinstance(source, dict) or not all(_is_size(source.get(k)) for k in ("offset", "bytes")):
            raise InputError(f"{path}: {name}: sources: expected file, offset, bytes, found {reprlib.repr(source)}")
    found = sum(source["bytes"] for source in sources)
    if found != expected:
        raise InputError(f"{path}: {name}: sources: expected {expected} bytes, found {found}")
    pieces = []
    for source in sources:
        try:
            file = checkpoint / inside(path, source.get("file"))
            with file.open("rb") as stream:
                stream.seek(source["offset"])
                piece = stream.read(source["bytes"])
        except BadInput as e:
            raise InputError(str(e)) from None
        except OSError as e:
            raise InputError(f"{file}: expected a file of the checkpoint, found: {e.strerror}") from None
        if len(piece) != source["bytes"]:
            raise InputError(f"{file}: {source.get('tensor')}: expected {source['bytes']} bytes, found {len(piece)}")
        pieces.append(piece)
    raw = np.frombuffer(b"".join(pieces), np.uint8)
    return checkpoint, raw if cast is None else raw.view(cast[0]).astype(cast[1]).view(np.uint8)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _cast(recipe: str) -> tuple[np.dtype, np.dtype] | None:
    """From and to what a recipe casts stacked numbers; None if it does not, or is more than a cast."""
    found = re.fullmatch(r"stack, then (b?float\w+|u?int\d+) to (b?float\w+|u?int\d+)", recipe)
    try:
        return (dtype_of(found[1]), dtype_of(found[2])) if found else None
    except TypeError:
        return None


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
