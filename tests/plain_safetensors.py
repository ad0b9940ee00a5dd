"""Reads safetensors files with NumPy and the standard library, from the format's description: eight bytes of header
length, a JSON header (name: dtype, shape, data_offsets), one buffer."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E8M0": 8, "BF16": 16, "F16": 16, "I32": 32, "F32": 32, "I64": 64}


@dataclass(frozen=True)
class Tensor:
    """A tensor of a safetensors file: its dtype as written there, its shape, its bytes (uint8, memory-mapped)."""

    dtype: str
    shape: tuple[int, ...]
    raw: Array
    shard: str


def read_shard(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file. ValueError if the header is not what the format allows: tensors must cover
    the buffer from first to last byte, without gap or overlap, each as long as its dtype and shape say."""
    data = np.memmap(path, np.uint8, mode="r")
    (length,) = struct.unpack("<Q", data[:8].tobytes())
    header = json.loads(data[8 : 8 + length].tobytes(), object_pairs_hook=no_twins)
    header.pop("__metadata__", None)
    buffer, end, tensors = data[8 + length :], 0, {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        (start, stop), shape = entry["data_offsets"], tuple(entry["shape"])
        size = math.prod(shape) * BITS[entry["dtype"]] // 8
        if start != end or stop - start != size:
            raise ValueError(f"{path.name}: {name}: expected bytes {end} to {end + size}, found {start} to {stop}")
        tensors[name], end = Tensor(entry["dtype"], shape, buffer[start:stop], path.name), stop
    if end != len(buffer):
        raise ValueError(f"{path.name}: {end} bytes of tensors, {len(buffer)} in the file")
    return tensors


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint: of the shards that the index names, or of its only file. ValueError where the index
    and the shards do not hold the same names, or `total_size` is not the sum of the bytes."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return read_shard(folder / "model.safetensors")
    content = json.loads(index.read_text(), object_pairs_hook=no_twins)
    places, tensors = content["weight_map"], {}
    for shard in sorted(set(places.values())):
        for name, tensor in read_shard(folder / shard).items():
            if places.get(name) != shard:
                raise ValueError(f"{shard}: {name}: the index has it in {places.get(name)}")
            tensors[name] = tensor
    if missing := sorted(set(places) - set(tensors)):
        raise ValueError(f"{places[missing[0]]}: {missing[0]} is not there, though the index has it")
    total = sum(len(tensor.raw) for tensor in tensors.values())
    if content.get("metadata", {}).get("total_size", total) != total:
        raise ValueError(f"index: total_size {content['metadata']['total_size']}, found {total}")
    return tensors


def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object (`object_pairs_hook`) whose names are all different; ValueError otherwise."""
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name occurs twice in one JSON object")
    return dict(pairs)
