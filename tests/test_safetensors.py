"""The safetensors reader and writer: every dtype byte for byte, the official library, and every kind of damage."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.checkpoint.safetensors import DTYPES, INDEX_FILE, SINGLE_FILE, Files
from dsjax.checkpoint.safetensors_writer import Spec, write_checkpoint_files
from dsjax.errors import InputError

F32 = DTYPES["F32"]


def entry(begin: Any = 0, end: Any = 8, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def file_bytes(header: Any, data_bytes: int) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(index % 256 for index in range(data_bytes))


def save_single(folder: Path, header: Any, data_bytes: int = 8) -> Path:
    path = folder / SINGLE_FILE
    path.write_bytes(file_bytes(header, data_bytes))
    return path


def save_sharded(folder: Path, shards: dict[str, dict[str, Any]], index: Any) -> None:
    for name, header in shards.items():
        (folder / name).write_bytes(file_bytes(header, 8 * len(header)))
    text = index if isinstance(index, bytes) else json.dumps(index).encode()
    (folder / INDEX_FILE).write_bytes(text)


def failure(folder: Path) -> str:
    """The message of opening a bad checkpoint: one line."""
    with pytest.raises(InputError) as caught:
        Files.open(folder)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 1000
    return message


def random_array(dtype: np.dtype, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random bytes seen as `dtype`: NaNs and subnormals included."""
    high = 2 if dtype == np.bool_ else 256
    count = int(np.prod(shape)) * dtype.itemsize
    raw = np.random.default_rng(seed).integers(0, high, count, dtype=np.uint8)
    return raw.view(dtype).reshape(shape)


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


def save_arrays(folder: Path, arrays: dict[str, np.ndarray], **options: int) -> None:
    specs = [Spec(name, array.dtype, array.shape) for name, array in arrays.items()]
    write_checkpoint_files(folder, specs, arrays.values(), **options)


# What is right -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (5, 7), (2, 0, 3)])
def test_round_trip(tmp_path: Path, code: str, shape: tuple[int, ...]) -> None:
    expected = random_array(DTYPES[code], shape)
    save_arrays(tmp_path, {"w": expected})
    with Files.open(tmp_path) as files:
        assert list(files) == ["w"]
        tensor = files["w"]
        assert (tensor.dtype, tensor.shape, tensor.nbytes) == (expected.dtype, shape, expected.nbytes)
        assert tensor.path.name == "model-00001-of-000001.safetensors"
        stored = tensor.path.read_bytes()
        assert stored[tensor.offset :][: tensor.nbytes] == expected.tobytes()
        assert_same(files.read("w"), expected)


@pytest.mark.parametrize("code", ["F8_E4M3", "F8_E5M2", "F8_E8M0"])
def test_every_code_of_a_byte_format(tmp_path: Path, code: str) -> None:
    codes = np.arange(256, dtype=np.uint8)
    save_arrays(tmp_path, {"w": codes.view(DTYPES[code])})
    with Files.open(tmp_path) as files:
        np.testing.assert_array_equal(files.read("w").view(np.uint8), codes)
        np.testing.assert_array_equal(
            files.read("w").astype(np.float32), codes.view(DTYPES[code]).astype(np.float32), strict=True
        )


def test_shards_index_and_alignment(tmp_path: Path) -> None:
    codes = ["U8", "F32", "BF16", "F8_E4M3", "I64", "BOOL", "F32"]
    arrays = {f"t{i}": random_array(DTYPES[code], (3, 5), i) for i, code in enumerate(codes)}
    save_arrays(tmp_path, arrays, shard_bytes=110)  # sizes 15 60 30 | 15 | 120 | 15 60
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    shard = "model-{:05d}-of-000004.safetensors".format
    assert index == {
        "metadata": {"total_size": 315},
        "weight_map": {f"t{i}": shard(number) for i, number in enumerate([1, 1, 1, 2, 3, 4, 4])},
    }
    assert sorted(os.listdir(tmp_path)) == sorted([INDEX_FILE, *map(shard, range(1, 5))])
    with Files.open(tmp_path) as files:
        assert set(files) == set(arrays)
        assert len(files) == len(arrays)
        assert "t0" in files
        assert "nope" not in files
        for path in {tensor.path for tensor in files.values()}:
            assert min(tensor.offset for tensor in files.values() if tensor.path == path) % 64 == 0
        for name, expected in arrays.items():
            assert files.read(name).flags.aligned
            assert_same(files.read(name), expected)


def test_views_are_read_only_not_copied_and_outlive_close(tmp_path: Path) -> None:
    expected = random_array(F32, (1000, 3))
    save_arrays(tmp_path, {"w": expected, "v": expected})
    with Files.open(tmp_path) as files:
        view = files.read("w")
        assert np.shares_memory(view, files.read("w"))
        assert not view.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 0
        files.release("w")
        files.release("v")
        assert_same(view, expected)
    files.release("w")
    files.close()
    assert_same(view, expected)
    with pytest.raises(ValueError, match="closed"):
        files.read("w")


def test_opening_reads_headers_only(tmp_path: Path) -> None:
    text = json.dumps({"w": entry(0, 2**36, (2**36,), "U8")}).encode()
    with (tmp_path / SINGLE_FILE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 2**36)  # sparse: 64 GiB of zeros
    with Files.open(tmp_path) as files:
        assert files.read("w")[-1] == 0


def test_f4_is_seen_as_bytes(tmp_path: Path) -> None:
    save_single(tmp_path, {"w": entry(0, 12, (3, 8), "F4")}, 12)
    with Files.open(tmp_path) as files:
        assert_same(files.read("w"), np.arange(12, dtype=np.uint8).reshape(3, 4))


def test_unaligned_data_of_other_writers(tmp_path: Path) -> None:
    path = save_single(tmp_path, {"a": entry(0, 1, (1,), "U8"), "b": entry(1, 9)}, 9)
    with Files.open(tmp_path) as files:
        np.testing.assert_array_equal(files.read("b"), np.frombuffer(path.read_bytes()[-8:], F32))


@pytest.mark.parametrize("code", ["F8_E4M3", "BF16", "F32", "I64"])
def test_any_part_of_a_tensor(tmp_path: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At an odd address. Rows are read in one piece, of their size; columns are copied, nothing is read for them."""
    dtype, (n, k) = DTYPES[code], (70, 90)
    expected = random_array(dtype, (n, k), 3)
    header = {"x": entry(0, 3, (3,), "U8"), "w": entry(3, 3 + expected.nbytes, (n, k), code)}
    path = save_single(tmp_path, header, 3 + expected.nbytes)
    path.write_bytes(path.read_bytes()[: -expected.nbytes] + expected.tobytes())
    taken, original = [], os.preadv

    def preadv(descriptor: int, buffers: list[Any], offset: int) -> int:
        taken.append(original(descriptor, buffers, offset))
        return taken[-1]

    monkeypatch.setattr(os, "preadv", preadv)
    random = np.random.default_rng(5)
    with Files.open(tmp_path) as files:
        for i in range(40):
            (a, b), (c, d) = (sorted(random.choice(size + 1, 2, replace=False)) for size in (n, k))
            c, d = (0, k) if i % 2 else (c, d)
            out = np.empty((b - a, d - c), dtype)
            files.read_part("w", (slice(a, b), slice(c, d)), out)
            assert_same(out, expected[a:b, c:d])
            assert sum(taken) == (out.nbytes if d - c == k else 0)
            taken.clear()
        one = np.empty(2, np.uint8)
        files.read_part("x", (slice(1, 3),), one)
        assert_same(one, files.read("x")[1:])


@pytest.mark.parametrize("metadata", [{}, {"__metadata__": {"format": "pt"}}])
def test_file_without_tensors(tmp_path: Path, metadata: dict[str, Any]) -> None:
    save_single(tmp_path, metadata, 0)
    with Files.open(tmp_path) as files:
        assert len(files) == 0


def test_which_file_is_opened(tmp_path: Path) -> None:
    (tmp_path / "other.safetensors").write_bytes(file_bytes({"other": entry()}, 8))
    assert list(Files.open(tmp_path)) == ["other"]
    save_single(tmp_path, {"single": entry()})
    assert list(Files.open(tmp_path)) == ["single"]
    save_sharded(
        tmp_path, {"shard.safetensors": {"indexed": entry()}}, {"weight_map": {"indexed": "shard.safetensors"}}
    )
    assert list(Files.open(tmp_path)) == ["indexed"]


def test_hugging_face_cache_links(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "abc123").write_bytes(file_bytes({"w": entry()}, 8))
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "a.safetensors").symlink_to("../blobs/abc123")
    (snapshot / INDEX_FILE).write_text(json.dumps({"weight_map": {"w": "a.safetensors"}}))
    with Files.open(snapshot) as files:
        assert files.read("w").shape == (2,)


# The official library ----------------------------------------------------------------------------------------------

NUMPY_CODES = ["F16", "F32", "I8", "U8", "I16", "I32", "I64", "BOOL"]


def test_official_numpy_library_both_ways(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.numpy")
    arrays = {code: random_array(DTYPES[code], (3, 5), i) for i, code in enumerate(NUMPY_CODES)}
    library.save_file(arrays, tmp_path / SINGLE_FILE, metadata={"format": "np"})
    with Files.open(tmp_path) as files:
        assert set(files) == set(arrays)
        for code, expected in arrays.items():
            assert_same(files.read(code), expected)
    ours = tmp_path / "ours"
    ours.mkdir()
    save_arrays(ours, arrays)
    loaded = library.load_file(ours / "model-00001-of-000001.safetensors")
    assert set(loaded) == set(arrays)
    for code, expected in arrays.items():
        assert_same(loaded[code], expected)


@pytest.mark.parity
def test_official_torch_library_both_ways(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("safetensors.torch")
    torch_dtypes = {
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.float8_e8m0fnu,
    }
    arrays = {code: random_array(DTYPES[code], (3, 5), i) for i, code in enumerate(torch_dtypes)}
    tensors = {
        code: torch.from_numpy(array.view(np.uint8).copy()).view(torch_dtypes[code]) for code, array in arrays.items()
    }
    library.save_file(tensors, tmp_path / SINGLE_FILE, metadata={"format": "pt"})
    with Files.open(tmp_path) as files:
        assert set(files) == set(arrays)
        for code, expected in arrays.items():
            assert_same(files.read(code), expected)
    ours = tmp_path / "ours"
    ours.mkdir()
    save_arrays(ours, arrays)
    loaded = library.load_file(ours / "model-00001-of-000001.safetensors")
    assert set(loaded) == set(arrays)
    for code, expected in arrays.items():
        assert loaded[code].dtype == torch_dtypes[code]
        assert loaded[code].view(torch.uint8).numpy().tobytes() == expected.tobytes()


@pytest.mark.parity
def test_official_library_agrees_on_f4(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("safetensors.torch")
    save_single(tmp_path, {"w": entry(0, 12, (3, 8), "F4")}, 12)
    loaded = library.load_file(tmp_path / SINGLE_FILE)["w"].view(torch.uint8).numpy()
    with Files.open(tmp_path) as files:
        assert_same(files.read("w"), loaded)


# Damaged files -----------------------------------------------------------------------------------------------------

GOOD = entry()
DEEP = b"[" * 100_000

BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "8 bytes"),
    "seven bytes": (b"\0" * 7, "7 bytes"),
    "header length beyond the file": ((100).to_bytes(8, "little") + b"{}", "length of 100"),
    "header length of 2**64 - 1": (b"\xff" * 8 + b"{}", str(2**64 - 1)),
    "empty header": (file_bytes(b"", 0), "JSON"),
    "not UTF-8": (file_bytes(b'{"\xff": 1}', 0), "utf-8"),
    "UTF-16": (file_bytes("{}".encode("utf-16"), 0), "utf-8"),
    "not JSON": (file_bytes(b"{'w': 1}", 0), "JSON"),
    "two JSON values": (file_bytes(b"{} {}", 0), "JSON"),
    "nested too deeply": (file_bytes(DEEP, 0), "deep"),
    "integer of 5000 digits": (file_bytes(b'{"w": ' + b"9" * 5000 + b"}", 0), "JSON"),
    "a list": (file_bytes([], 0), "object"),
    "a string": (file_bytes("w", 0), "object"),
    "duplicate tensor": (file_bytes(b'{"the.w": 1, "the.w": 2}', 0), "'the.w' twice"),
    "duplicate key in a tensor": (file_bytes(b'{"w": {"dtype": 1, "dtype": 2}}', 0), "'dtype' twice"),
    "metadata not an object": (file_bytes({"__metadata__": [1]}, 0), "__metadata__"),
    "metadata not strings": (file_bytes({"__metadata__": {"a": 1}}, 0), "__metadata__"),
    "trailing bytes": (file_bytes({"the.w": GOOD}, 9), "byte"),
    "data without tensors": (file_bytes({}, 1), "byte"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_damaged_file(tmp_path: Path, case: str) -> None:
    content, expected = BAD_FILES[case]
    (tmp_path / SINGLE_FILE).write_bytes(content)
    message = failure(tmp_path)
    assert SINGLE_FILE in message
    assert expected in message


def test_header_above_the_limit(tmp_path: Path) -> None:
    with (tmp_path / SINGLE_FILE).open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(200_000_000)
    assert "100000001" in failure(tmp_path)


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in GOOD.items() if name != key}


def changed(**values: Any) -> dict[str, Any]:
    return GOOD | values


BAD_TENSORS: dict[str, tuple[Any, str]] = {
    "not an object": ([1, 2], "[1, 2]"),
    "null": (None, "None"),
    "deep but parsed": (json.loads("[" * 500 + "]" * 500), "object"),
    "no dtype": (without("dtype"), "dtype"),
    "no shape": (without("shape"), "shape"),
    "no data_offsets": (without("data_offsets"), "data_offsets"),
    "dtype not a string": (changed(dtype=["F32"]), "['F32']"),
    "unknown dtype": (changed(dtype="F8_E3M4"), "F8_E3M4"),
    "dtype in lower case": (changed(dtype="f32"), "f32"),
    "shape not a list": (changed(shape=2), "shape"),
    "shape a string": (changed(shape="2"), "shape"),
    "shape of booleans": (changed(shape=[True, 2]), "[True, 2]"),
    "shape of floats": (changed(shape=[2.0]), "[2.0]"),
    "shape with NaN": (changed(shape=[float("nan")]), "nan"),
    "negative dimension": (changed(shape=[-2]), "[-2]"),
    "two negative dimensions": (changed(shape=[-1, -2]), "[-1, -2]"),
    "too many dimensions": (changed(shape=[1] * 65), "64"),
    "shape larger than the data": (changed(shape=[3]), "12 bytes"),
    "shape smaller than the data": (changed(shape=[1]), "4 bytes"),
    "product beyond 64 bits": (changed(shape=[2**40, 2**40]), "shape"),
    "product that wraps to the size": (changed(shape=[2**32, 2**32, 2]), "shape"),
    "empty with an absurd dimension": (changed(shape=[0, 2**70], data_offsets=[0, 0]), "shape"),
    "dimension of 4000 digits": (changed(shape=[10**4000]), "shape"),
    "offsets not a list": (changed(data_offsets={"begin": 0}), "begin"),
    "one offset": (changed(data_offsets=[8]), "[8]"),
    "three offsets": (changed(data_offsets=[0, 8, 8]), "[0, 8, 8]"),
    "offsets of booleans": (changed(data_offsets=[False, 8]), "[False, 8]"),
    "offsets of floats": (changed(data_offsets=[0, 8.0]), "[0, 8.0]"),
    "negative offset": (changed(data_offsets=[-8, 0]), "[-8, 0]"),
    "offsets run backwards": (changed(data_offsets=[8, 0]), "begin <= end, found [8, 0]"),
    "beyond the file": (changed(data_offsets=[1, 9]), "[1, 9]"),
    "far beyond the file": (changed(data_offsets=[2**63, 2**63 + 8]), "within"),
    "beyond by 4300 digits": (changed(data_offsets=[10**4300 - 9, 10**4300 - 1]), "within"),
    "odd F4": (entry(0, 7, (1, 15), "F4"), "two F4 each"),
    "scalar F4": (entry(0, 8, (), "F4"), "F4"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_damaged_tensor(tmp_path: Path, case: str) -> None:
    value, expected = BAD_TENSORS[case]
    save_single(tmp_path, {"the.tensor": value})
    message = failure(tmp_path)
    assert SINGLE_FILE in message
    assert "'the.tensor'" in message
    assert expected in message


BAD_LAYOUTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "overlap": ({"a": entry(0, 8), "the.tensor": entry(4, 12)}, 12, "overlap"),
    "the same bytes twice": ({"a": entry(0, 8), "the.tensor": entry(0, 8)}, 8, "overlap"),
    "hole": ({"a": entry(0, 8), "the.tensor": entry(9, 17)}, 17, "hole"),
    "hole at the start": ({"the.tensor": entry(1, 9)}, 9, "hole"),
    "empty tensor inside another": ({"a": entry(0, 8), "the.tensor": entry(4, 4, (0,))}, 8, "overlap"),
    "truncated": ({"a": entry(0, 8), "the.tensor": entry(8, 16)}, 15, "truncated"),
}


@pytest.mark.parametrize("case", BAD_LAYOUTS)
def test_damaged_layout(tmp_path: Path, case: str) -> None:
    header, data_bytes, expected = BAD_LAYOUTS[case]
    save_single(tmp_path, header, data_bytes)
    message = failure(tmp_path)
    assert SINGLE_FILE in message
    assert "'the.tensor'" in message
    assert expected in message


def test_empty_tensors_may_share_an_offset(tmp_path: Path) -> None:
    empty = {"dtype": "F32", "shape": [0, 2]}
    header = {
        "w": entry(0, 8),
        "before": empty | {"data_offsets": [0, 0]},
        "after": empty | {"data_offsets": [8, 8]},
        "after too": empty | {"data_offsets": [8, 8]},
    }
    save_single(tmp_path, header)
    with Files.open(tmp_path) as files:
        assert {name: files.read(name).shape for name in files} == {
            "w": (2,),
            "before": (0, 2),
            "after": (0, 2),
            "after too": (0, 2),
        }


# The folder and its index ------------------------------------------------------------------------------------------

A, B = "a.safetensors", "b.safetensors"
SHARDS = {A: {"the.w": GOOD}, B: {"v": GOOD}}


def index_of(**names: Any) -> dict[str, Any]:
    return {"metadata": {}, "weight_map": {name.replace("_", "."): shard for name, shard in names.items()}}


BAD_INDEXES: dict[str, tuple[dict[str, Any], Any, list[str]]] = {
    "not JSON": (SHARDS, b"{", [INDEX_FILE, "JSON"]),
    "not UTF-8": (SHARDS, b'"\xff"', [INDEX_FILE, "utf-8"]),
    "nested too deeply": (SHARDS, DEEP, [INDEX_FILE, "deep"]),
    "not an object": (SHARDS, ["a"], [INDEX_FILE, "object"]),
    "no weight_map": (SHARDS, {"metadata": {}}, [INDEX_FILE, "weight_map"]),
    "weight_map not an object": (SHARDS, {"weight_map": [A]}, [INDEX_FILE, "weight_map"]),
    "duplicate key": (SHARDS, b'{"weight_map": {"the.w": "a", "the.w": "b"}}', [INDEX_FILE, "'the.w' twice"]),
    "file not a string": (SHARDS, index_of(the_w=1, v=B), [INDEX_FILE, "'the.w'", "found 1"]),
    "missing file": (SHARDS, index_of(the_w="c.safetensors", v=B), ["c.safetensors", "No such file"]),
    "empty name": (SHARDS, index_of(the_w="", v=B), [INDEX_FILE, "'the.w'", "same folder"]),
    "dot": (SHARDS, index_of(the_w=".", v=B), [INDEX_FILE, "'the.w'", "same folder"]),
    "dot dot": (SHARDS, index_of(the_w="..", v=B), [INDEX_FILE, "'the.w'", "same folder"]),
    "parent folder": (SHARDS, index_of(the_w=f"../{A}", v=B), [INDEX_FILE, "'the.w'", f"../{A}"]),
    "folder below": (SHARDS, index_of(the_w=f"sub/{A}", v=B), [INDEX_FILE, "'the.w'", f"sub/{A}"]),
    "backslash": (SHARDS, index_of(the_w=f"..\\{A}", v=B), [INDEX_FILE, "'the.w'", "same folder"]),
    "absolute path": (SHARDS, index_of(the_w="/etc/passwd", v=B), [INDEX_FILE, "'the.w'", "/etc/passwd"]),
    "NUL in the name": (SHARDS, index_of(the_w="a\0b", v=B), [INDEX_FILE, "'the.w'", "same folder"]),
    "line break in the name": (SHARDS, index_of(the_w="a\nb", v=B), [INDEX_FILE, "'the.w'", "same folder"]),
    "lone surrogate": (SHARDS, index_of(the_w="\ud800", v=B), [INDEX_FILE, "'the.w'", "same folder"]),
    "name too long": (SHARDS, index_of(the_w="x" * 300, v=B), ["xxx", "too long"]),
    "not in its shard": (SHARDS, index_of(the_w=A, v=B, x_y=B), [INDEX_FILE, "'x.y'", B, "no shard"]),
    "in another shard": (SHARDS, index_of(the_w=B, v=A), [INDEX_FILE, "'the.w'", f"expected it in {B}", f"it in {A}"]),
    "in two shards": (
        SHARDS | {B: {"v": GOOD, "the.w": entry(8, 16)}},
        index_of(the_w=A, v=B),
        [B, "'the.w'", f"{A} too"],
    ),
    "not listed": (SHARDS | {B: {"v": GOOD, "x.y": entry(8, 16)}}, index_of(the_w=A, v=B), [B, "'x.y'", INDEX_FILE]),
    "damaged shard": (SHARDS | {B: {"v": changed(dtype="X")}}, index_of(the_w=A, v=B), [B, "'v'", "'X'"]),
}


@pytest.mark.parametrize("case", BAD_INDEXES)
def test_damaged_index(tmp_path: Path, case: str) -> None:
    shards, index, expected = BAD_INDEXES[case]
    save_sharded(tmp_path, shards, index)
    message = failure(tmp_path)
    for part in expected:
        assert part in message


def test_index_above_the_limit(tmp_path: Path) -> None:
    with (tmp_path / INDEX_FILE).open("wb") as file:
        file.truncate(100_000_001)
    assert "100000001" in failure(tmp_path)


def make_directory(path: Path) -> None:
    path.mkdir()


def make_pipe(path: Path) -> None:
    os.mkfifo(path)  # opening it would wait for ever


def make_broken_link(path: Path) -> None:
    path.symlink_to("nowhere")


def make_link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def make_device_link(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("name", [SINGLE_FILE, INDEX_FILE, A])
@pytest.mark.parametrize(
    "make",
    [make_directory, make_pipe, make_broken_link, make_link_to_itself, make_device_link],
    ids=lambda f: f.__name__,
)
def test_no_regular_file(tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    if name == A:
        (tmp_path / INDEX_FILE).write_text(json.dumps(index_of(w=A)))
    make(tmp_path / name)
    assert name in failure(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_no_permission(tmp_path: Path) -> None:
    save_single(tmp_path, {"w": GOOD}).chmod(0)
    assert "Permission denied" in failure(tmp_path)


def test_folder_without_a_checkpoint(tmp_path: Path) -> None:
    assert "found 0" in failure(tmp_path)
    for name in (A, B):
        (tmp_path / name).write_bytes(file_bytes({"w": GOOD}, 8))
    assert "found 2" in failure(tmp_path)
    assert "missing" in failure(tmp_path / "missing")
    assert A in failure(tmp_path / A)


def test_reading_a_missing_tensor(tmp_path: Path) -> None:
    save_single(tmp_path, {"w": GOOD})
    with Files.open(tmp_path) as files:
        with pytest.raises(InputError, match=r"'the\.tensor'"):
            files.read("the.tensor")
        with pytest.raises(KeyError):
            files["the.tensor"]


@pytest.mark.parametrize("keep", [0, 100])
def test_file_that_shrinks_after_opening(tmp_path: Path, keep: int) -> None:
    path = save_single(tmp_path, {"w": GOOD, "the.tensor": entry(8, 408, (100,))}, 408)
    with Files.open(tmp_path) as files:
        os.truncate(path, keep)
        part = (slice(0, 100),)
        for read in (
            files.read,
            lambda name: files.read_into(name, np.empty(400, np.uint8)),
            lambda name: files.read_part(name, part, np.empty(100, np.float32)),
        ):
            with pytest.raises(InputError, match=r"model\.safetensors: tensor 'the\.tensor'"):
                read("the.tensor")


def test_messages_stay_one_short_line(tmp_path: Path) -> None:
    save_single(tmp_path, {"a\nb\u2028\ud800" + "x" * 5000: changed(dtype="\n" * 5000)})
    assert failure(tmp_path).isprintable()


# Any damage at all -------------------------------------------------------------------------------------------------

VALID = file_bytes(
    {"__metadata__": {"format": "pt"}, "a.w": entry(0, 8), "b": entry(8, 8, (0, 3)), "c": entry(8, 11, (3, 2), "F4")},
    11,
)


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp())
    yield folder
    shutil.rmtree(folder)


def open_or_refuse(folder: Path) -> None:
    """Whatever the bytes: all tensors can be read, or there is an InputError of one line."""
    try:
        with Files.open(folder) as files:
            for name, tensor in files.items():
                assert files.read(name).nbytes == tensor.nbytes
    except InputError as error:
        assert len(str(error).splitlines()) == 1


@settings(max_examples=300, deadline=None)
@given(
    flips=st.lists(st.tuples(st.integers(0, len(VALID) - 12), st.integers(0, 255)), max_size=3),
    length=st.one_of(st.just(len(VALID)), st.integers(0, len(VALID) + 3)),
)
def test_fuzz_bytes(scratch: Path, flips: list[tuple[int, int]], length: int) -> None:
    content = bytearray(VALID)
    for where, value in flips:
        content[where] = value
    (scratch / SINGLE_FILE).write_bytes(bytes(content[:length]).ljust(length, b"\0"))
    open_or_refuse(scratch)


JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.sampled_from(["F32", "F4"])
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=5,
)
SIZES = st.one_of(st.lists(st.one_of(st.integers(0, 12), st.integers()), max_size=3), JSON)


@settings(max_examples=300, deadline=None)
@given(
    header=st.dictionaries(
        st.text(max_size=3),
        st.fixed_dictionaries(
            {"dtype": st.one_of(st.sampled_from([*DTYPES, "F4"]), JSON), "shape": SIZES, "data_offsets": SIZES}
        ),
        max_size=3,
    ),
    data_bytes=st.integers(0, 24),
)
def test_fuzz_header_values(scratch: Path, header: dict[str, Any], data_bytes: int) -> None:
    save_single(scratch, header, data_bytes)
    open_or_refuse(scratch)


# The writer's own errors -------------------------------------------------------------------------------------------


def test_writer_streams_one_tensor_at_a_time(tmp_path: Path) -> None:
    """The next array is asked for only after the one before is in the file and is held by nobody."""
    specs = [Spec(f"t{i}", F32, (100_000,)) for i in range(4)]
    alive: list[weakref.ref[np.ndarray]] = []

    def produce() -> Iterator[np.ndarray]:
        for i in range(len(specs)):
            assert all(reference() is None for reference in alive)
            array = np.full(specs[i].shape, i, F32)
            alive.append(weakref.ref(array))
            yield array
            del array

    write_checkpoint_files(tmp_path, specs, produce(), shard_bytes=800_000)
    with Files.open(tmp_path) as files:
        assert [int(files.read(spec.name)[-1]) for spec in specs] == [0, 1, 2, 3]


def test_writer_takes_strided_arrays(tmp_path: Path) -> None:
    array = random_array(DTYPES["BF16"], (6, 4))
    arrays = {"transposed": array.T, "rows": array[::2], "column": array[:, 1]}
    save_arrays(tmp_path, arrays)
    with Files.open(tmp_path) as files:
        for name, expected in arrays.items():
            assert_same(files.read(name), expected)


def test_writer_without_tensors(tmp_path: Path) -> None:
    write_checkpoint_files(tmp_path, [], [])
    assert len(Files.open(tmp_path)) == 0


GOOD_SPEC = Spec("the.tensor", F32, (2,))
GOOD_ARRAY = np.zeros(2, np.float32)

BAD_WRITES: dict[str, tuple[list[Spec], list[np.ndarray], str]] = {
    "wrong dtype": ([GOOD_SPEC], [np.zeros(2, np.int32)], "the.tensor"),
    "big-endian": ([GOOD_SPEC], [np.zeros(2, ">f4")], "the.tensor"),
    "wrong shape": ([GOOD_SPEC], [np.zeros((1, 2), np.float32)], "the.tensor"),
    "too few": ([GOOD_SPEC], [], "the.tensor"),
    "too many": ([GOOD_SPEC], [GOOD_ARRAY] * 2, "more arrays"),
    "dtype the format lacks": ([dataclasses.replace(GOOD_SPEC, dtype=np.dtype("c8"))], [GOOD_ARRAY], "complex64"),
    "name twice": ([GOOD_SPEC] * 2, [GOOD_ARRAY] * 2, "twice"),
    "reserved name": ([dataclasses.replace(GOOD_SPEC, name="__metadata__")], [GOOD_ARRAY], "reserved"),
}


@pytest.mark.parametrize("case", BAD_WRITES)
def test_writer_refuses_a_programming_error(tmp_path: Path, case: str) -> None:
    specs, arrays, expected = BAD_WRITES[case]
    with pytest.raises(ValueError, match=expected) as caught:
        write_checkpoint_files(tmp_path, specs, arrays)
    assert not isinstance(caught.value, InputError)
    assert not (tmp_path / INDEX_FILE).exists()


def test_writer_overwrites_nothing(tmp_path: Path) -> None:
    save_arrays(tmp_path, {"w": GOOD_ARRAY})
    with pytest.raises(InputError, match=r"model-00001-of-000001\.safetensors.*File exists"):
        save_arrays(tmp_path, {"w": GOOD_ARRAY + 1})
    with Files.open(tmp_path) as files:
        assert_same(files.read("w"), GOOD_ARRAY)


def test_writer_without_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing"):
        save_arrays(tmp_path / "missing", {"w": GOOD_ARRAY})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_writer_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true_open = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode="r", **options: true_open(Path("/dev/full"), "wb"))
    with pytest.raises(InputError, match=r"model-00001-of-000001\.safetensors.*No space left"):
        save_arrays(tmp_path, {"w": GOOD_ARRAY})


def test_writer_blames_the_file_that_failed(tmp_path: Path) -> None:
    def produce() -> Iterator[np.ndarray]:
        yield np.fromfile(tmp_path / "source.bin", np.float32)

    with pytest.raises(InputError, match=r"source\.bin"):
        write_checkpoint_files(tmp_path, [GOOD_SPEC], produce())
