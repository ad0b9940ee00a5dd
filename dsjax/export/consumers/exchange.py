"""Arrays of any element type in a file, for a process of our own: a line of JSON, then their bytes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np


def dtype_of(name: str) -> np.dtype:
    """A type by the name that NumPy or ml_dtypes gives it.

    Raises:
      TypeError: of another name.
    """
    return np.dtype(getattr(ml_dtypes, name, name))


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
