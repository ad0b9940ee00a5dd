"""Arrays of safetensors and NumPy files with NumPy alone, BF16 and FP8 among them; trusts no file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

# Element types by safetensors' names; what NumPy has no type for is kept as its bits.
FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E8M0": "u1"}
_SIGNED = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1"}
_UNSIGNED = {"U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?"}
DTYPES = {**FLOATS, **_SIGNED, **_UNSIGNED}
_BITS = {"BF16": 2, "F8_E4M3": 1, "F8_E8M0": 1}
_NAMES = {"bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e8m0fnu": "F8_E8M0"}
_MAX_HEADER = 100_000_000


class BadInput(ValueError):
    """A file or folder that cannot be used, told in one line."""


class Stored:
    """An array and its element type by safetensors' name; BF16, F8_E4M3 and F8_E8M0 are held as their bits."""

    def __init__(self, raw: np.ndarray, code: str) -> None:
        self.raw, self.code, self.shape = raw, code, raw.shape

    @classmethod
    def of(cls, array: Any) -> Stored:
        """Any NumPy array of numbers, ml_dtypes' types included.

        Raises:
          BadInput: of another type.
        """
        array = np.asarray(array)
        code = _NAMES.get(array.dtype.name)
        if code:
            return cls(array.view(DTYPES[code]), code)
        for code, dtype in DTYPES.items():
            if code not in _BITS and np.dtype(dtype) == array.dtype.newbyteorder("="):
                return cls(array, code)
        if array.dtype.kind == "V" and array.dtype.itemsize in (1, 2) and array.dtype.fields is None:
            return cls(
                array.view(f"u{array.dtype.itemsize}"), f"U{8 * array.dtype.itemsize}"
            )  # bits, as NumPy saves them
        raise BadInput(f"expected an array of numbers, found {array.dtype}")

    def like(self, golden: Stored) -> Stored:
        """Itself, or where these are plain bits of the golden's element type, as an .npz has to hold them, as such."""
        size = _BITS.get(golden.code)
        return Stored(self.raw, golden.code) if size and self.code == f"U{8 * size}" else self

    def values(self) -> np.ndarray:
        """The numbers: float32 for BF16 and FP8, which is exact."""
        if self.code == "BF16":
            return np.asarray(self.raw.astype(np.uint32) << 16).view(np.float32)
        table = {"F8_E4M3": e4m3_table, "F8_E8M0": e8m0_table}.get(self.code)
        return np.asarray(table()[self.raw]) if table else self.raw


def e4m3_table() -> np.ndarray:
    """The 256 values of E4M3 without infinities: 0x7f and 0xff are NaN."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    value = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(8 + mantissa, exponent - 10))
    value[code & 127 == 127] = np.nan
    return np.where(code < 128, value, -value).astype(np.float32)


def e8m0_table() -> np.ndarray:
    """The 256 values of E8M0: 2^(code - 127), 0xff is NaN."""
    value = np.ldexp(1.0, np.arange(256) - 127)
    value[255] = np.nan
    return value.astype(np.float32)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        return parse_json(path.read_bytes(), path)
    except OSError as e:
        raise BadInput(f"{path}: expected a readable file, found: {e.strerror}") from None


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """A JSON object in UTF-8, without a key twice, and without NaN and Infinity, which are no JSON."""

    def constant(text: str) -> None:
        raise ValueError(text)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key twice")
        return dict(pairs)

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as e:
        raise BadInput(f"{path}: expected JSON in UTF-8, found: {str(e)[:200]}") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 62 for v in value)


def read_safetensors(path: Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    """The tensors, memory-mapped and in the order of the file's bytes, and the metadata of a safetensors file."""
    size = path.stat().st_size
    data = np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)
    length = int.from_bytes(data[:8].tobytes(), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER):
        raise BadInput(f"{path}: expected a header inside the file of {size} bytes, found a length of {length}")
    header = parse_json(data[8 : 8 + length].tobytes(), path)
    metadata = header.pop("__metadata__", {})
    body, end, found = data[8 + length :], 0, []
    for name, entry in header.items():
        fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
        code: Any = fields.get("dtype")
        shape: Any = fields.get("shape")
        offsets: Any = fields.get("data_offsets")
        if not name.isprintable():
            raise BadInput(f"{path}: expected names that can be printed, found {name[:80]!r}")
        if not isinstance(code, str) or code not in DTYPES:
            raise BadInput(f"{path}: {name[:80]!r}: expected a dtype of {', '.join(DTYPES)}, found {str(code)[:40]!r}")
        if not _sizes(shape) or len(shape) > 32 or math.prod(max(n, 1) for n in shape) >= 1 << 59:
            raise BadInput(f"{path}: {name[:80]!r}: expected a shape, found {str(shape)[:80]}")
        nbytes = math.prod(shape) * np.dtype(DTYPES[code]).itemsize
        if not _sizes(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != nbytes or offsets[1] > body.size:
            what = f"data_offsets of {nbytes} bytes within {body.size}"
            raise BadInput(f"{path}: {name[:80]!r}: expected {what}, found {str(offsets)[:80]}")
        found.append((offsets, name, code, shape))
    tensors = {}
    for (begin, stop), name, code, shape in sorted(found):
        if begin != end:
            raise BadInput(f"{path}: {name[:80]!r}: expected its data from byte {end}, found {begin}: overlap or hole")
        end = stop
        raw = body[begin:stop].view(np.ndarray)
        tensors[name] = Stored(raw.view(DTYPES[code]).reshape(shape), code)
    if end != body.size:
        raise BadInput(f"{path}: expected {end} bytes of data, found {body.size}")
    return tensors, metadata if isinstance(metadata, dict) else {}


def read_arrays(path: Path) -> dict[str, Stored]:
    """The arrays of a .safetensors, .npz or .npy file (the last holds one, called logits).

    Raises:
      BadInput: naming the file and what is wrong with it.
    """
    try:
        if not path.is_file():
            raise BadInput(f"{path}: expected a file, found none")
        if path.suffix == ".safetensors":
            return read_safetensors(path)[0]
        with open(path, "rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return {"logits": Stored.of(loaded)}
            return {name: Stored.of(loaded[name]) for name in loaded.files}
    except BadInput as e:
        raise e if str(path) in str(e) else BadInput(f"{path}: {e}") from None
    except Exception as e:  # of a damaged .npz whatever zipfile, zlib, tokenize and NumPy have, by version
        found = " ".join(str(e).split())[:200] or type(e).__name__
        raise BadInput(f"{path}: expected .safetensors, .npz or .npy, found: {found}") from None


def find_arrays(folder: Path) -> dict[str, Stored] | None:
    """The arrays of `outputs.safetensors` or `outputs.npz` in a folder; None without such a file."""
    files = [f for f in (folder / "outputs.safetensors", folder / "outputs.npz") if f.exists()]
    if len(files) > 1:
        raise BadInput(f"{folder}: expected outputs.safetensors or outputs.npz, found both")
    return read_arrays(files[0]) if files else None
