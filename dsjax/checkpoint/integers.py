"""INT8 and INT4 tensors of a checkpoint: their names, what a config says of each, and packed codes as bytes.

compressed-tensors calls the scales of `X.weight` `X.weight_scale`, and packs eight INT4 codes of a row into an int32
`X.weight_packed`, each as code + 8, the first channel in the lowest bits, beside their shape `X.weight_shape`. A row's
words are read as bytes, in each of which the low nibble is the even channel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from dsjax.checkpoint.safetensors import Files, Tensor
from dsjax.config import Config, IntegerQuantization, V4Config
from dsjax.errors import InputError
from dsjax.params import EXPERT, LINEAR, Path, Row, Stored

OFFSET = 0x88
"""What turns two codes + 8 of a byte into two's complement, by exclusive or."""

SCALES = {np.dtype(np.float32): "f32", np.dtype(ml_dtypes.bfloat16): "bf16", np.dtype(np.float16): "f16"}
"""Types of the scales of integers."""

_TYPES: Mapping[str, Mapping[np.dtype, str]] = {
    "int8": {np.dtype(np.int8): "int8"},
    "int8-block": {np.dtype(np.int8): "int8-block"},
    "int4": {np.dtype(np.int32): "int4"},
}


def rename(files: Files, config: Config) -> Files:
    """The same tensors, packed codes and scales called as the table of parameters calls codes and scales.

    Raises:
      InputError: if two tensors would have one name.
    """
    if not isinstance(config.quantization, IntegerQuantization):
        return files
    scale = ".scale" if isinstance(config, V4Config) else ".weight_scale_inv"
    named: dict[str, Tensor] = {}
    for name, tensor in files.items():
        for ending, other in ((".weight_packed", ".weight"), (".weight_scale", scale)):
            if name.endswith(ending):
                name = name.removesuffix(ending) + other
        if name in named:
            raise InputError(
                f"{tensor.path}: tensor {tensor.name}: expected it or {named[name].name}, found both in one checkpoint"
            )
        named[name] = tensor
    return Files(files.folder, named)


def integer_types(files: Files, row: Row, name: str, config: Config) -> Mapping[np.dtype, str] | None:
    """The type that a tensor must have as its config says, and the format it stands for; None for what is no integer.

    The config's own name for it is the file's.
    """
    if not isinstance(config.quantization, IntegerQuantization) or row.storage not in (LINEAR, EXPERT):
        return None
    own = files[name].name if name in files else name
    found = config.quantization.format_of(own.removesuffix("_packed").removesuffix(".weight"))
    return None if found is None else _TYPES[found]


def spelt(name: str, types: Mapping[np.dtype, str], scale: bool = False) -> str:
    """What a file calls a weight of these types, or its scales, by the name that the table has for them."""
    module, fmt = name.removesuffix(".weight_scale_inv").removesuffix(".scale"), next(iter(types.values()))
    if scale:
        return f"{module}.weight_scale" + ("_inv" if fmt == "int8-block" else "")
    return name + ("_packed" if fmt == "int4" else "")


def file_shape(fmt: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a matrix's codes in the file."""
    return (*shape[:-1], -(-shape[-1] // 8)) if fmt == "int4" else shape


def check_packed(files: Files, name: str, shape: tuple[int, ...]) -> str:
    """Checks what says the shape of packed codes; returns its name.

    Raises:
      InputError: if it is missing, or says something else, or rows are of odd width.
    """
    told = name.removesuffix(".weight") + ".weight_shape"
    own = files[name].name.removesuffix("_packed") + "_shape"
    where = f"{files[name].path}: tensor {own}: expected int64 {list(shape)}"
    if told not in files:
        raise InputError(f"{where}, found none")
    if files[told].dtype != np.int64 or files[told].shape != (2,):
        raise InputError(f"{where}, found {files[told].dtype.name} of shape {list(files[told].shape)}")
    if tuple(files.read(told).tolist()) != shape:
        raise InputError(f"{where}, found {files.read(told).tolist()}")
    if shape[-1] % 2:
        raise InputError(f"{files[name].path}: tensor {files[name].name}: expected an even width, found {shape[-1]}")
    return told


def as_bytes(files: Files, stored: Mapping[Path, Stored], rows: Mapping[Path, Row]) -> Files:
    """The same tensors, packed INT4 codes as uint8 [N, 4 x words], two a byte."""
    packed = [row for path, row in rows.items() if path in stored and stored[path].format == "int4"]
    if not packed:
        return files
    named = dict(files)
    for row in packed:
        for _, name in row.tensors():
            n, words = files[name].shape
            named[name] = dataclasses.replace(files[name], dtype=np.dtype(np.uint8), shape=(n, 4 * words))
    return Files(files.folder, named)
