"""Writing safetensors: shards of bounded size and their index, from a stream of arrays.

Shards are named as DeepSeek names them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dsjax.checkpoint.safetensors import DTYPES, INDEX_FILE, os_errors

_CODES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 64
_WIDEST = max(dtype.itemsize for dtype in _CODES)


@dataclass(frozen=True)
class Spec:
    """A tensor that is going to be written. `dtype` is one of the values of `DTYPES`."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The tensor's size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_checkpoint_files(
    folder: Path, specs: Sequence[Spec], tensors: Iterable[np.ndarray], *, shard_bytes: int = 5_000_000_000
) -> None:
    """Write shards and their index into a folder that the caller has made.

    Shards are filled in the order of `specs` up to `shard_bytes` (a larger tensor gets a shard of its own). `tensors`
    gives one array per spec, in the same order; each is written before the next is asked for, so that it may be a
    generator over a model larger than memory. On any error the folder is left with a part of a checkpoint.

    Raises:
        InputError: a file exists already or cannot be written.
        ValueError: unknown dtype, name used twice, an array unlike its spec, too few or too many arrays.
    """
    shards = _plan_shards(specs, shard_bytes)
    stream = iter(tensors)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):06d}.safetensors"
        _write_shard(folder / file_name, shard, stream)
        weight_map |= {spec.name: file_name for spec in shard}
    if next(stream, None) is not None:
        raise ValueError(f"more arrays than the {len(specs)} specs")
    index = {"metadata": {"total_size": sum(spec.nbytes for spec in specs)}, "weight_map": weight_map}
    with os_errors(folder / INDEX_FILE), (folder / INDEX_FILE).open("x", encoding="utf-8") as file:
        file.write(json.dumps(index, indent=2) + "\n")


def write_file(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Writes one new file of arrays under their names; `metadata` becomes its `__metadata__`.

    Raises:
        InputError: the file exists already or cannot be written.
        ValueError: unknown dtype.
    """
    specs = [Spec(name, array.dtype, array.shape) for name, array in tensors.items()]
    for spec in specs:
        if spec.dtype not in _CODES:
            raise ValueError(f"tensor {spec.name!r}: safetensors has no dtype for {spec.dtype!r}")
    _write_shard(path, specs, iter(tensors.values()), metadata)


def _plan_shards(specs: Sequence[Spec], shard_bytes: int) -> list[list[Spec]]:
    shards: list[list[Spec]] = []
    seen = {"__metadata__"}
    used = 0
    for spec in specs:
        if spec.name in seen:
            raise ValueError(f"tensor name {spec.name!r} is used twice or reserved")
        if spec.dtype not in _CODES:
            raise ValueError(f"tensor {spec.name!r}: safetensors has no dtype for {spec.dtype!r}")
        seen.add(spec.name)
        if not shards or used + spec.nbytes > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(spec)
        used += spec.nbytes
    return shards


def _write_shard(
    path: Path, specs: Sequence[Spec], stream: Iterator[np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    header, offsets = plan_layout(specs, metadata)
    with os_errors(path), path.open("xb") as file:
        file.write(header)
        for spec in specs:
            file.seek(offsets[spec.name])
            _write_tensor(file, spec, next(stream, None))  # holds no array while the next is made


def plan_layout(
    specs: Sequence[Spec], metadata: Mapping[str, str] | None = None, *, as_given: bool = False
) -> tuple[bytes, dict[str, int]]:
    """The length-prefixed header of a shard, and the absolute offset of each of its tensors.

    Wide elements come first, as the official writer lays them out: with the data section at a multiple of 64 bytes
    (the header is padded with spaces, which the format allows) every tensor is then aligned to its elements, without
    a hole. `as_given` keeps tensors of whole `_WIDEST`s in their order, for who fills the file in that order; only the
    others, if any, come last, wide elements first.
    """

    def place(spec: Spec) -> tuple[bool, int]:
        whole = as_given and spec.nbytes % _WIDEST == 0
        return not whole, 0 if whole else -spec.dtype.itemsize

    # transformers wants to be told the format
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"} if metadata is None else dict(metadata)}
    begins: dict[str, int] = {}
    end = 0
    for spec in sorted(specs, key=place):
        begins[spec.name], end = end, end + spec.nbytes
        offsets = [begins[spec.name], end]
        entries[spec.name] = {"dtype": _CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + begin for name, begin in begins.items()}


def _write_tensor(file: BinaryIO, spec: Spec, array: np.ndarray | None) -> None:
    if array is None:
        raise ValueError(f"fewer arrays than specs: none for tensor {spec.name!r}")
    if array.dtype != spec.dtype or array.shape != spec.shape:
        raise ValueError(f"expected {spec}, found an array of {array.dtype} {array.shape}")
    file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
