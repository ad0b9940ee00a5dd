"""Arrays of any element type in a file, for a process of our own: a line of JSON, then their bytes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np

_NARROW = ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn", "int4", "uint4")
_PLAIN = ("bool", "float16", "float32", "float64", *(f"{sign}int{n}" for sign in ("", "u") for n in (8, 16, 32, 64)))
DTYPES = {n: np.dtype(n) for n in _PLAIN} | {n: np.dtype(getattr(ml_dtypes, n)) for n in _NARROW}
"""The element types of modules by the names that NumPy and ml_dtypes give them."""


def dtype_of(name: str) -> np.dtype:
    """A type by its name.

    Raises:
      TypeError: of a name that is none of `DTYPES`.
    """
    if name not in DTYPES:
        raise TypeError(f"expected a type of {', '.join(DTYPES)}, found {name[:80]!r}")
    return DTYPES[name]


def write_arrays(path: Path, arrays: list[np.ndarray]) -> None:
    """Writes arrays in row-major order; an element of less than a byte takes one."""
    with path.open("wb") as file:
        file.write(json.dumps([[a.dtype.name, list(a.shape)] for a in arrays]).encode() + b"\n")
        for array in arrays:
            file.write(array.tobytes())


def read_arrays(path: Path) -> list[np.ndarray]:
    """What `write_arrays` wrote; the arrays cannot be written to."""
    data = path.read_bytes()
    offset = data.index(b"\n") + 1
    arrays = []
    for name, shape in json.loads(data[:offset]):
        dtype, count = dtype_of(name), math.prod(shape)
        arrays.append(np.frombuffer(data, dtype, count, offset).reshape(shape) if count else np.zeros(shape, dtype))
        offset += count * dtype.itemsize
    return arrays
