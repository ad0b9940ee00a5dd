"""Sums of files that are made out of order and by many threads, against sums of the bytes at once."""

from __future__ import annotations

import hashlib
import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from helpers import SEED, rng

from dsjax.checkpoint.safetensors import Tensor, read_tensors
from dsjax.checkpoint.safetensors_writer import Spec, plan_layout
from dsjax.convert import hashing
from dsjax.convert.hashing import FileHash, SourceHashes, hash_file
from dsjax.convert.output import Output
from dsjax.errors import InputError

U8 = np.dtype(np.uint8)


def tensors_of(path: Path, bounds: list[int]) -> list[Tensor]:
    ends = enumerate(pairwise(bounds))
    return [Tensor(f"t{i}", path, U8, (stop - start,), start, stop - start) for i, (start, stop) in ends]


def expected(data: bytes, tensors: list[Tensor]) -> dict[str, object]:
    sums = {t.name: f"{zlib.crc32(data[t.offset : t.offset + t.nbytes]):08x}" for t in tensors}
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "tensors": sums}


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, chunk: int) -> None:
    """Some bytes lie there from the beginning, the others come in any order; tensors, some empty, begin anywhere."""
    monkeypatch.setattr(hashing, "_CHUNK", chunk)
    monkeypatch.setattr(hashing, "_FORGET", 100)
    random, path = rng(840), tmp_path / "file"
    for _ in range(20):
        size = int(random.integers(1, 1000))
        data = random.bytes(size)
        path.write_bytes(data)
        cuts = sorted({0, size, *random.integers(0, size, 12).tolist()})
        ranges = list(pairwise(cuts))
        random.shuffle(ranges)
        ready, pieces = ranges[:3], ranges[3:]
        tensors = tensors_of(path, sorted(random.integers(0, size + 1, 6).tolist()))
        found = FileHash(path, size, tensors, ready=ready, once=True)
        with ThreadPoolExecutor(threads) as pool:
            arrays = [np.frombuffer(data, U8)[start:stop] for start, stop in pieces]
            list(pool.map(found.put, [start for start, _ in pieces], arrays))
        assert found.complete or not pieces, SEED
        assert found.finish() == expected(data, tensors) == hash_file(path, tensors), SEED


def test_bytes_in_memory_are_what_counts(tmp_path: Path) -> None:
    """What comes in its turn is not read again: a source is hashed as it was converted."""
    path = tmp_path / "file"
    path.write_bytes(b"changed!")
    found = FileHash(path, 8)
    found.put(0, np.frombuffer(b"original", U8))
    assert found.finish() == expected(b"original", [])


def test_what_does_not_come_is_read(tmp_path: Path) -> None:
    """A source of which other processes take a part, and a file that nobody asked for."""
    path, data = tmp_path / "file", rng(841).bytes(300)
    path.write_bytes(data)
    tensors = tensors_of(path, [8, 100, 200, 300])
    with SourceHashes() as sources:
        sources.add(path, tensors, [tensors[0], tensors[2]])
        sources.put(tensors[2], 0, np.frombuffer(data, U8)[200:])
        other = tmp_path / "other"
        sources.put(Tensor("x", other, U8, (3,), 0, 3), 0, np.zeros(3, U8))
        assert sources.take(path) is None and sources.take(other, complete=False) is None
        sources.put(tensors[0], 0, np.frombuffer(data, U8)[8:50])
        sources.put(tensors[0], 42, np.frombuffer(data, U8)[50:60])
        assert sources.take(path) is None
        assert sources.take(path, complete=False) == expected(data, tensors)
        assert sources.take(path) is None


def test_shrunk(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(10))
    found = FileHash(path, 20)
    with pytest.raises(InputError, match="expected 20 bytes, found 10"):
        found.finish()


@pytest.mark.parametrize("threads", [1, 3])
def test_output(tmp_path: Path, threads: int) -> None:
    """A shard that is filled backwards and by many: the sums of what lies on the disk."""
    random, path = rng(842), tmp_path / "shard.safetensors"
    specs = [
        Spec("codes", np.dtype(ml_dtypes.float8_e4m3fn), (30, 40)),
        Spec("scales", np.dtype(np.float32), (3, 4)),
        Spec("odd", np.dtype(np.float32), (3, 3)),
        Spec("odder", U8, (5,)),
        Spec("more", np.dtype(ml_dtypes.bfloat16), (20, 8)),
        Spec("shape", np.dtype(np.int64), (2,)),
    ]
    pieces = [(spec, start) for spec in specs for start in range(0, spec.nbytes, 100)]
    random.shuffle(pieces)
    with path.open("w+b") as file, Output(file.fileno(), path, specs) as out:
        with ThreadPoolExecutor(threads) as pool:
            futures = [
                pool.submit(out.put, spec, start, random.integers(0, 256, min(100, spec.nbytes - start)).astype(U8))
                for spec, start in pieces
            ]
            assert sum(f.result() for f in futures) == sum(spec.nbytes for spec in specs)
        found = out.hashed()
    tensors = read_tensors(path)
    assert found == expected(path.read_bytes(), tensors)
    assert [t.name for t in tensors] == ["codes", "scales", "more", "shape", "odd", "odder"]
    assert all(t.offset % t.dtype.itemsize == 0 for t in tensors)


def test_layout_as_given_or_wide_first() -> None:
    specs = [Spec("a", U8, (16,)), Spec("b", np.dtype(np.float32), (4,)), Spec("c", U8, (8,))]
    orders = []
    for as_given in (False, True):
        header, offsets = plan_layout(specs, as_given=as_given)
        assert json.loads(header[8:]).keys() == {"__metadata__", "a", "b", "c"}
        orders.append("".join(sorted(offsets, key=lambda name: offsets[name])))
    assert orders == ["bac", "abc"]
