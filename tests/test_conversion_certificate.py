"""The oracle's judgement of certificates: a right one, written by hand, passes; every wrong line is found."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conversion_oracle import check_certificate
from test_conversion_oracle import Files, floats, write

Certificate = dict[str, Any]


def bf16(*bits: int) -> bytes:
    return struct.pack(f"<{len(bits)}H", *bits)


def packed(**channels: int) -> bytes:
    """[1, 64] E2M1 codes, two a byte; zero but where said (c5=7: channel 5 has code 7)."""
    codes = [0] * 64
    for channel, code in channels.items():
        codes[int(channel[1:])] = code
    return bytes(codes[2 * i] | codes[2 * i + 1] << 4 for i in range(32))


KEPT: Files = {"n.weight": ("BF16", (2,), bf16(0x3F80, 0x0000)), "t": ("I64", (2,), struct.pack("<2q", 5, -7))}
SOURCE: Files = KEPT | {
    "e.weight": ("I8", (1, 32), packed(c0=2, c1=8, c32=7)),  # 1, -0 and 6 / 8
    "e.scale": ("F8_E8M0", (1, 2), bytes([127, 124])),
    "w.weight": ("F8_E4M3", (1, 2), b"\x38\xc4"),  # 1, -3 times 0.1
    "w.scale": ("F32", (1, 1), floats(0.1)),
    "i.weight": ("F32", (1, 4), floats(1.0, 0.3, 0.001, 0.995)),
}
RESULT: Files = KEPT | {
    "e.weight": ("F8_E4M3", (1, 64), bytes([0x68, 0x80]) + bytes(30) + b"\x64" + bytes(31)),  # 64, -0, 48
    "e.scale": ("F32", (1, 1), floats(2.0**-6)),
    "w.weight": ("BF16", (1, 2), bf16(0x3DCD, 0xBE9A)),  # 205 / 2048, -77 / 256
    "i.weight": ("I8", (1, 4), bytes([127, 38, 0, 127])),
    "i.weight_scale": ("F32", (1, 1), floats(2.0**-7)),
}


def single(x: float) -> float:
    return float(struct.unpack("<f", floats(x))[0])


def digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def crc32(raw: bytes) -> str:
    """By division, bit by bit: the reflected polynomial of IEEE 802.3, ones at both ends."""
    rest = 0xFFFFFFFF
    for byte in raw:
        rest ^= byte
        for _ in range(8):
            rest = rest >> 1 ^ (0xEDB88320 if rest & 1 else 0)
    return f"{rest ^ 0xFFFFFFFF:08x}"


def entry(
    name: str, shape: list[int], source: object, target: object, errors: list[float], **more: object
) -> Certificate:
    fields = ["max_abs_error", "max_rel_error", "mean_abs_error", "relative_norm", "saturated", "flushed"]
    exact = not any(errors)
    action = "kept" if name in ("n.weight", "t") else "converted"
    entry = {
        "result": name,
        "class": "other" if action == "kept" else "linear",
        "shape": shape,
        "source": source,
        "target": target,
        "action": action,
    }
    return (
        entry
        | {"exact": exact, "reasons": [] if exact else ["rounded"]}
        | dict(zip(fields, errors, strict=True))
        | more
    )


def form(kind: str, scales: str | None = None, block: list[int] | None = None) -> Certificate:
    return {"format": kind, "scales": scales, "block": block}


def certificate(source: Path, target: Path) -> Certificate:
    """Of SOURCE and RESULT, with errors worked out here in Python's floats."""
    tenth, three = single(0.1), single(3 * single(0.1))
    a, b = 205 / 2048 - tenth, 77 / 256 - three
    w = [b, b / three, (a + b) / 2, ((a * a + b * b) / (tenth**2 + three**2)) ** 0.5, 0, 0]
    x, y, z = single(0.3), single(0.001), single(0.995)
    deltas = [1 / 128, x - 38 / 128, y, z - 127 / 128]
    norm = (sum(d * d for d in deltas) / (1 + x * x + y * y + z * z)) ** 0.5
    i = [1 / 128, 1.0, sum(deltas) / 4, norm, 1, 1]  # 1 is 128 codes, beyond 127.5; 0.001 became 0
    none: list[float] = [0.0, 0.0, 0.0, 0.0, 0, 0]
    block = [128, 128]
    tensors = {
        "e.weight": entry("e.weight", [1, 64], form("e2m1", "e8m0", [1, 32]), form("e4m3", "f32", block), none),
        "w.weight": entry("w.weight", [1, 2], form("e4m3", "f32", block), form("bf16"), w),
        "i.weight": entry("i.weight", [1, 4], form("f32"), form("int8", "f32", [1, 4]), i),
        "n.weight": entry("n.weight", [2], form("bf16"), form("bf16"), none),
        "t": entry("t", [2], form("i64"), form("i64"), none),
    }
    sides: dict[str, Certificate] = {}
    for key, folder, files in (("source", source, SOURCE), ("result", target, RESULT)):
        shard = (folder / "model.safetensors").read_bytes()
        sides[key] = {
            "files": {"model.safetensors": {"bytes": len(shard), "sha256": digest(shard)}},
            "tensors": {name: crc32(raw) for name, (_, _, raw) in files.items()},
        }
    sides["result"]["files"]["config.json"] = {"bytes": 2, "sha256": digest(b"{}")}
    linear = {"tensors": 3, "exact": 1, "converted": 3, "parameters": 70, "source_bytes": 56, "result_bytes": 80}
    other = {"tensors": 2, "exact": 2, "converted": 0, "parameters": 4, "source_bytes": 20, "result_bytes": 20}
    summary = {"linear": linear, "other": other}
    return {"version": 2, "exact": False, "tensors": tensors, "summary": summary} | sides


def judged(tmp_path: Path, change: Callable[[Certificate], object] = lambda said: None) -> list[str]:
    source, target = write(tmp_path / "source", SOURCE), write(tmp_path / "target", RESULT)
    (source / "config.json").write_text("{}")
    (target / "config.json").write_text("{}")
    said = certificate(source, target)
    change(said)
    (target / "certificate.json").write_text(json.dumps(said))
    return check_certificate(source, target)


def test_a_right_certificate(tmp_path: Path) -> None:
    assert judged(tmp_path) == []


def test_values_between_the_largest_code_and_what_rounds_to_it(tmp_path: Path) -> None:
    """0.995 is 127.36 codes of 1 / 128: a certificate may count it as saturated, or not."""
    assert judged(tmp_path, lambda said: said["tensors"]["i.weight"].update(saturated=2)) == []


def test_a_zero_that_lost_its_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = bytes([0x68, 0x00]) + bytes(30) + b"\x64" + bytes(31)
    monkeypatch.setitem(RESULT, "e.weight", ("F8_E4M3", (1, 64), codes))
    (line, _) = judged(tmp_path)
    assert line == "e.weight: exact: the certificate says True, the files False"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("exact", True),
        ("tensors/e.weight/exact", False),
        ("tensors/w.weight/exact", True),
        ("tensors/w.weight/max_abs_error", 0.00078),
        ("tensors/w.weight/max_rel_error", 0.0026),
        ("tensors/w.weight/mean_abs_error", 0.0),
        ("tensors/w.weight/relative_norm", 0.0024),
        ("tensors/i.weight/saturated", 0),
        ("tensors/i.weight/saturated", 3),
        ("tensors/i.weight/flushed", 0),
        ("tensors/i.weight/shape", [4, 1]),
        ("tensors/i.weight/reasons", []),
        ("tensors/e.weight/reasons", ["rounded"]),
        ("tensors/e.weight/source", form("e2m1", "e8m0", [1, 16])),
        ("tensors/e.weight/target", form("e4m3", "e8m0", [128, 128])),
        ("tensors/w.weight/result", "n.weight"),
        ("tensors/w.weight/action", "kept"),
        ("version", 1),
        ("source/tensors/e.scale", crc32(b"")),
        ("result/tensors/e.scale", crc32(b"")),
        ("source/files/model.safetensors", {"bytes": 1, "sha256": digest(b"")}),
        ("result/files/config.json", {"bytes": 2, "sha256": digest(b"[]")}),
        ("result/files/extra.json", {"bytes": 2, "sha256": digest(b"[]")}),
        ("tensors/u.weight", None),
        ("summary/linear/tensors", 4),
        ("summary/linear/exact", 3),
        ("summary/other/converted", 1),
        ("summary/linear/parameters", 69),
        ("summary/linear/source_bytes", 55),
        ("summary/linear/result_bytes", 81),
    ],
)
def test_a_wrong_line_is_found(tmp_path: Path, path: str, value: object) -> None:
    *parents, last = path.split("/")

    def change(said: Certificate) -> None:
        for parent in parents:
            said = said[parent]
        said[last] = value or dict(said["t"]) if last == "u.weight" else value

    also = ("results", "summary", "exact")  # what follows from the line
    found = judged(tmp_path, change)
    assert found and all(any(word in line for word in (*parents, last, *also)) for line in found), found


@pytest.mark.parametrize("path", ["tensors/t", "source/tensors/t", "result/tensors/t", "result/files/config.json"])
def test_a_missing_line_is_found(tmp_path: Path, path: str) -> None:
    *parents, last = path.split("/")

    def change(said: Certificate) -> None:
        for parent in parents:
            said = said[parent]
        del said[last]

    assert judged(tmp_path, change)


def test_a_changed_bit_is_found(tmp_path: Path) -> None:
    assert judged(tmp_path) == []
    shard = tmp_path / "target" / "model.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-16] ^= 1
    shard.write_bytes(raw)
    lines = check_certificate(tmp_path / "source", tmp_path / "target")
    assert any("files: model.safetensors" in line for line in lines) and any("tensors: " in line for line in lines)
