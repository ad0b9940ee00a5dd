"""Agreement between a config and the files: every tensor present, rightly shaped and typed, before a byte is moved."""

from __future__ import annotations

import re
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from dsjax.checkpoint.safetensors import Files
from dsjax.checkpoint.values import host_finite
from dsjax.config import Config
from dsjax.errors import InputError
from dsjax.params import LINEAR, Path, Row, Stored, is_mtp, matrix_shape, scale_grid, table

SCALE_SUFFIX = "_scale_inv"
"""DeepSeek's name for the scales, which multiply (spec V3 3.2)."""

_FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
_E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
_FLOATS = {np.dtype(ml_dtypes.bfloat16): "bf16", np.dtype(np.float16): "f16", np.dtype(np.float32): "f32"}
_SCALES = {np.dtype(np.float32): "f32", _E8M0: "e8m0", np.dtype(np.uint8): "e8m0"}

# Buffers that some published files carry beside the parameters; they are recomputed, never read.
_IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")


def has_mtp(files: Files, config: Config) -> bool:
    """Whether the MTP module's tensors are there; published copies often leave all of them out."""
    prefix = f"model.layers.{config.num_hidden_layers}."
    return bool(config.num_nextn_predict_layers) and any(name.startswith(prefix) for name in files)


def _names(dtypes: dict[np.dtype, str]) -> str:
    return " or ".join(d.name for d in dtypes)


def _expect(files: Files, name: str, shape: tuple[int, ...], dtypes: dict[np.dtype, str]) -> str:
    """Checks one tensor and returns its storage class's name."""
    if name not in files:
        raise InputError(f"{files.folder}: tensor {name}: expected {_names(dtypes)} {list(shape)}, found none")
    tensor = files[name]
    if tensor.shape != shape or tensor.dtype not in dtypes:
        raise InputError(
            f"{tensor.path}: tensor {name}: expected {_names(dtypes)} {list(shape)}, "
            f"found {tensor.dtype.name} {list(tensor.shape)}"
        )
    return dtypes[tensor.dtype]


def agree(files: Files, config: Config) -> dict[Path, Stored]:
    """Checks names, shapes and types of every tensor, from headers only.

    Returns:
      How each leaf is stored, by path. Where the tensors of one stack differ, the wider type is taken: it holds both
      exactly. MTP rows are left out where the files have no MTP module.

    Raises:
      InputError: for a tensor that is missing, unexpected, misshapen or mistyped.
    """
    quantization = config.quantization
    with_mtp = has_mtp(files, config)
    known: set[str] = set()
    stored: dict[Path, Stored] = {}
    for row in table(config):
        if is_mtp(row) and not with_mtp:
            continue
        shape = matrix_shape(row, config)
        formats, scales = set(), set()
        quantised = row.storage == LINEAR and quantization is not None
        for _, name in row.tensors():
            formats.add(_expect(files, name, shape, {_FP8: "e4m3"} if quantised else _FLOATS))
            known.add(name)
            if quantised and quantization is not None:
                scale = name + SCALE_SUFFIX
                scales.add(_expect(files, scale, scale_grid(shape, quantization.block), _SCALES))
                known.add(scale)
        stored[row.path] = Stored(
            formats.pop() if len(formats) == 1 else "f32",
            None if not scales else scales.pop() if len(scales) == 1 else "f32",
        )
    for name in files:
        if name not in known and not _IGNORED.search(name):
            raise InputError(
                f"{files[name].path}: tensor {name}: expected no such tensor in this {config.model_type}, found one"
            )
    return stored


# --- values ----------------------------------------------------------------------------------------------------------


def check_values(files: Files, name: str, view: np.ndarray | None = None) -> None:
    """Refuses NaN codes, and scales or floats that are not finite.

    Args:
      files, name: which tensor.
      view: its bytes, where they have been read already.

    Raises:
      InputError: naming file and tensor.
    """
    view = files.read(name) if view is None else view.reshape(-1).view(files[name].dtype)
    if view.dtype == _FP8:
        fmt, expected, found = "e4m3", "no NaN code", "0x7F or 0xFF"
    elif view.dtype in _FLOATS:
        fmt, expected, found = _FLOATS[view.dtype], "finite values", "NaN or infinity"
    else:
        fmt, expected, found = _SCALES[view.dtype], "no NaN scale", "0xFF"
    if not host_finite(view, fmt):
        raise InputError(f"{files[name].path}: tensor {name}: expected {expected}, found {found}")


def check_copies(files: Files, row: Row, original: Row) -> None:
    """Refuses an MTP embedding or head that differs from the main model's, which it must repeat.

    Raises:
      InputError: naming both tensors.
    """
    (_, name), (_, source) = next(row.tensors()), next(original.tensors())
    a, b = files.read(name), files.read(source)
    same = a.dtype == b.dtype and all(
        np.array_equal(a[i : i + 4096].view(np.uint8), b[i : i + 4096].view(np.uint8))
        for i in range(0, a.shape[0], 4096)
    )
    files.release(name)
    files.release(source)
    if not same:
        raise InputError(f"{files[name].path}: tensor {name}: expected a copy of {source}, found other values")


def problems(files: Files, config: Config) -> Iterator[str]:
    """Everything that is wrong with the values, one line each; for `inspect --check`."""
    stored = agree(files, config)
    rows = {row.path: row for row in table(config) if row.path in stored}
    for row in rows.values():
        for _, name in row.tensors():
            for tensor in (name, name + SCALE_SUFFIX):
                if tensor in files:
                    try:
                        check_values(files, tensor)
                    except InputError as e:
                        yield str(e)
                    files.release(tensor)
        if row.copy_of is not None:
            try:
                check_copies(files, row, rows[row.copy_of])
            except InputError as e:
                yield str(e)
