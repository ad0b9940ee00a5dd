"""safetensors files: a memory-mapped reader that trusts nothing.

A file is an 8-byte little-endian header length, a JSON header, and the tensors' raw little-endian bytes without a hole.
The safetensors library reads neither FP8 nor E8M0 into NumPy; this module does, without a copy. Opening a checkpoint
reads headers only; a tensor's bytes are touched when its view is.

Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import reprlib
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeGuard

import ml_dtypes
import numpy as np

from dsjax.errors import InputError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "BOOL": np.dtype(np.bool_),
}
"""The element types by the format's names. "F4" is read, too: see `Tensor`."""

_MAX_JSON_BYTES = 100_000_000  # the limit of the official reader for a header; far above any real index too
_MAX_RANK = 64  # NumPy's
_MAX_BYTES = 2**62  # NumPy's sizes and strides are int64, also those of an array with a zero dimension


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies: `nbytes` bytes from the absolute `offset` of the file `path`.

    F4 (two E2M1 codes a byte) has no NumPy element of half a byte: its dtype here is uint8 and the last dimension of
    its shape, which counts elements in the header, is halved to count bytes. DeepSeek's own FP4 weights are stored as
    I8 and need no such care.
    """

    name: str
    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Files(Mapping[str, Tensor]):
    """The tensors of a checkpoint folder, by name. Of a missing one `files[name]` says KeyError, `read` InputError."""

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        self._folder = folder
        self._tensors = dict(tensors)
        self._maps: dict[Path, mmap.mmap] | None = {}
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read and check the headers of a checkpoint: its index's shards, else its one safetensors file.

        Raises:
            InputError: the folder holds no checkpoint, or a file of it is damaged, unsafe or not what the index says.
        """
        folder = Path(folder)
        with os_errors(folder):
            found = os.listdir(folder)
        if INDEX_FILE in found:
            return cls(folder, _read_sharded(folder))
        files = [SINGLE_FILE] if SINGLE_FILE in found else [name for name in found if name.endswith(".safetensors")]
        if len(files) != 1:
            raise InputError(
                f"{folder}: expected {INDEX_FILE}, {SINGLE_FILE} or exactly one *.safetensors file, "
                f"found {len(files)} *.safetensors files and no index"
            )
        return cls(folder, {tensor.name: tensor for tensor in read_tensors(folder / files[0])})

    @property
    def folder(self) -> Path:
        """The checkpoint folder."""
        return self._folder

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def _tensor(self, name: str) -> tuple[Tensor, dict[Path, mmap.mmap]]:
        """A tensor's entry, and the mappings."""
        if self._maps is None:
            raise ValueError(f"read from the closed checkpoint {self._folder}")
        if name not in self._tensors:
            raise InputError(f"{self._folder}: expected a tensor {_show(name)}, found none of that name")
        return self._tensors[name], self._maps

    def read(self, name: str) -> np.ndarray:
        """A read-only view of the tensor's bytes in the file: no copy, nothing read until it is used.

        The view has the tensor's dtype and shape. It stays valid after `close`. Files written by others may store a
        tensor at an address that is not a multiple of its item size; NumPy copes.

        Raises:
            InputError: no such tensor, or the shard cannot be mapped, or shrank since it was opened.
            ValueError: after `close`.
        """
        tensor, maps = self._tensor(name)
        path, end = tensor.path, tensor.offset + tensor.nbytes
        if path not in maps:
            with _open_regular(path) as (file, size):
                if size == 0:  # mmap refuses it
                    raise _bad_tensor(path, name, f"data up to byte {end}", "the file emptied since it was opened")
                maps[path] = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        raw = np.frombuffer(maps[path], np.uint8)[tensor.offset : end]
        if raw.size != tensor.nbytes:
            raise _bad_tensor(path, name, f"{tensor.nbytes} bytes", f"{raw.size}: the file shrank since it was opened")
        return raw.view(tensor.dtype).reshape(tensor.shape)

    def read_into(self, name: str, out: np.ndarray, start: int = 0) -> None:
        """Fills `out`, contiguous, with the tensor's bytes from `start` on: one copy, and no mapping to page in.

        Raises:
            InputError: no such tensor, or the shard cannot be opened or read, or shrank since it was opened.
            ValueError: after `close`.
        """
        tensor, _ = self._tensor(name)
        rest = out.reshape(-1).view(np.uint8).data
        if not hasattr(os, "preadv"):
            rest[:] = self.read(name).reshape(-1).view(np.uint8)[start : start + len(rest)].data
            return
        with self._lock:
            if tensor.path not in self._descriptors:
                with _open_regular(tensor.path) as (file, _):
                    self._descriptors[tensor.path] = os.dup(file.fileno())
        end = tensor.offset + start + len(rest)
        while len(rest):
            with os_errors(tensor.path):
                count = os.preadv(self._descriptors[tensor.path], [rest], end - len(rest))
            if count == 0:
                found = f"{end - tensor.offset - len(rest)}: the file shrank since it was opened"
                raise _bad_tensor(tensor.path, name, f"{tensor.nbytes} bytes", found)
            rest = rest[count:]

    def read_part(self, name: str, part: tuple[slice, ...], out: np.ndarray) -> None:
        """Fills `out`, contiguous and of the part's shape, with a part of a tensor; what lies between is not copied.

        Rows of full width lie in one piece. Columns are copied out of a mapping: a call for each row takes twice as
        long with the file on disk and twelve times with it in memory (256 of 2,048 columns). Either way a disk is read
        by pages, so narrow columns cost it the whole.

        Raises:
            InputError, ValueError: see `read` and `read_into`.
        """
        tensor, _ = self._tensor(name)
        if all(s == slice(0, n) for s, n in zip(part[1:], tensor.shape[1:], strict=True)):
            start = part[0].start if part else 0
            self.read_into(name, out, start * math.prod(tensor.shape[1:]) * tensor.dtype.itemsize)
            return
        bits = np.dtype(f"u{tensor.dtype.itemsize}")  # other types than NumPy's own are copied without other threads
        out.view(bits)[...] = self.read(name).view(bits)[part]
        row = tensor.nbytes // tensor.shape[0]
        self._drop(tensor, part[0].start * row, part[0].stop * row)

    def release(self, name: str) -> None:
        """Let go of the memory pages that reading this tensor made resident; views stay valid and would read again."""
        tensor = self._tensors[name]
        self._drop(tensor, 0, tensor.nbytes)

    def _drop(self, tensor: Tensor, start: int, stop: int) -> None:
        """Lets go of the pages of some of a tensor's bytes."""
        mapping = (self._maps or {}).get(tensor.path)
        if mapping is not None and start < stop and hasattr(mmap, "MADV_DONTNEED"):
            first = tensor.offset + start
            first -= first % mmap.PAGESIZE
            mapping.madvise(mmap.MADV_DONTNEED, first, tensor.offset + stop - first)

    def close(self) -> None:
        """Forget the mappings. One that still has views is unmapped with the last of them."""
        self._maps = None
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read_sharded(folder: Path) -> dict[str, Tensor]:
    """The tensors of all shards of the index, each in exactly the shard that the index says."""
    index = folder / INDEX_FILE
    weight_map = _read_weight_map(index)
    tensors: dict[str, Tensor] = {}
    for shard in dict.fromkeys(weight_map.values()):
        for tensor in read_tensors(folder / shard):
            name = tensor.name
            if name in tensors:
                raise _bad_tensor(tensor.path, name, "it in one shard", f"it in {tensors[name].path.name} too")
            if name not in weight_map:
                raise _bad_tensor(tensor.path, name, f"it listed by {INDEX_FILE}", "no such entry")
            tensors[name] = tensor
    for name, shard in weight_map.items():
        where = tensors[name].path.name if name in tensors else "no shard"
        if where != shard:
            raise _bad_tensor(index, name, f"it in {shard}", f"it in {where}")
    return tensors


def _read_weight_map(index: Path) -> dict[str, str]:
    with _open_regular(index) as (file, size):
        if size > _MAX_JSON_BYTES:
            raise InputError(f"{index}: expected at most {_MAX_JSON_BYTES} bytes, found {size}")
        weight_map = _parse_json(file.read(size), index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError(f"{index}: expected an object 'weight_map', found {reprlib.repr(weight_map)}")
    for name, shard in weight_map.items():
        # A name, not a path: an index must not reach outside its folder. A shard may itself be a symbolic link, as in
        # the Hugging Face cache. isprintable also rules out NUL, newlines and lone surrogates.
        plain = isinstance(shard, str) and shard.isprintable() and not set(shard) & {"/", "\\"}
        if not plain or shard in ("", ".", ".."):
            raise _bad_tensor(index, name, "the name of a file in the same folder", reprlib.repr(shard))
    return weight_map


def read_tensors(path: Path) -> list[Tensor]:
    """The checked header of one safetensors file, in the order of its bytes."""
    with _open_regular(path) as (file, size):
        if size < 8:
            raise InputError(f"{path}: expected at least the 8 bytes of a header length, found a file of {size} bytes")
        length = int.from_bytes(file.read(8), "little")
        limit = min(size - 8, _MAX_JSON_BYTES)
        if length > limit:
            raise InputError(f"{path}: expected a header of at most {limit} bytes, found a header length of {length}")
        header = _parse_json(file.read(length), path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{path}: expected __metadata__ to map strings to strings, found {reprlib.repr(metadata)}")
    tensors = [_parse_tensor(path, name, entry, 8 + length, size) for name, entry in header.items()]
    # An empty tensor shares its offset with the next one; its end sorts it first.
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    end = 8 + length
    for tensor in tensors:
        if tensor.offset != end:
            what = "a hole before it" if tensor.offset > end else "an overlap with another tensor"
            raise _bad_tensor(path, tensor.name, f"its data from byte {end}", f"{what}: byte {tensor.offset}")
        end += tensor.nbytes
    if end != size:
        raise InputError(f"{path}: expected the last tensor's data to end the file of {size} bytes, found byte {end}")
    return tensors


def _parse_tensor(path: Path, name: str, entry: Any, data_start: int, size: int) -> Tensor:
    if not isinstance(entry, dict):
        raise _bad_tensor(path, name, "an object", reprlib.repr(entry))
    code, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(code, str) or (code != "F4" and code not in DTYPES):
        raise _bad_tensor(path, name, f"a dtype among {', '.join(DTYPES)}, F4", reprlib.repr(code))
    if not _are_sizes(shape) or len(shape) > _MAX_RANK:
        raise _bad_tensor(path, name, f"a shape of at most {_MAX_RANK} integers >= 0", reprlib.repr(shape))
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _bad_tensor(path, name, "data_offsets [begin, end] with 0 <= begin <= end", reprlib.repr(offsets))
    dtype = DTYPES.get(code, DTYPES["U8"])
    if code == "F4":
        if not shape or shape[-1] % 2:
            raise _bad_tensor(path, name, "a shape of whole bytes (two F4 each)", reprlib.repr(shape))
        shape = [*shape[:-1], shape[-1] // 2]
    if math.prod(max(dim, 1) for dim in shape) * dtype.itemsize > _MAX_BYTES:
        raise _bad_tensor(path, name, f"at most {_MAX_BYTES} bytes", f"shape {reprlib.repr(shape)}")
    nbytes = math.prod(shape) * dtype.itemsize
    found = f"data_offsets {reprlib.repr(offsets)}"
    if offsets[1] - offsets[0] != nbytes:
        raise _bad_tensor(path, name, f"{nbytes} bytes for {code} of shape {reprlib.repr(entry['shape'])}", found)
    if offsets[1] > size - data_start:
        raise _bad_tensor(path, name, f"data within the file's {size - data_start} bytes of it (truncated?)", found)
    return Tensor(name, path, dtype, tuple(shape), data_start + offsets[0], nbytes)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)  # a bool is no size


def _parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """A JSON object in UTF-8 in which no key of any object appears twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise InputError(f"{path}: expected each key once, found {_show(key)} twice")
            result[key] = value
        return result

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except InputError:
        raise
    except RecursionError:
        raise InputError(f"{path}: expected a flat JSON object, found one nested too deeply") from None
    except ValueError as error:  # not UTF-8, not JSON, or an integer of thousands of digits
        raise InputError(f"{path}: expected a UTF-8 JSON object, found: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {reprlib.repr(value)}")
    return value


@contextmanager
def _open_regular(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file and its size. Opening a pipe or a device could block or have effects, so look first."""
    with os_errors(path):
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{path}: expected a regular file, found something else")
        with path.open("rb") as file:
            yield file, os.fstat(file.fileno()).st_size


@contextmanager
def os_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # of another file, if it says so: a writer's input may fail, too
        where = error.filename or path
        raise InputError(f"{where}: expected a usable file or folder, found: {error.strerror or error}") from None


def _bad_tensor(path: Path, name: str, expected: str, found: str) -> InputError:
    return InputError(f"{path}: tensor {_show(name)}: expected {expected}, found {found}")


def _show(name: str) -> str:
    return repr(name if len(name) <= 200 else name[:200] + "...")
