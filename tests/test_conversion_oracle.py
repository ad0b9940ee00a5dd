"""The oracle of conversions itself, on cases worked out by hand."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import conversion_oracle as oracle
import numpy as np
import pytest
from plain_safetensors import Array, read, read_shard

Entry = tuple[str, tuple[int, ...], bytes]
Files = dict[str, Entry]


def write_shard(path: Path, tensors: Mapping[str, Entry]) -> None:
    """A safetensors file, written out here: length, header, buffer."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    buffer = b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(buffer), len(buffer) + len(raw)]}
        buffer += raw
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + buffer)


def write(folder: Path, tensors: Mapping[str, Entry]) -> Path:
    write_shard(folder / "model.safetensors", tensors)
    return folder


def floats(*numbers: float) -> bytes:
    return struct.pack(f"<{len(numbers)}f", *numbers)


# ---------------------------------------------------------------------------------------------------------- decoders


def test_e4m3_codes() -> None:
    for code in range(256):
        sign, exponent, fraction = (-1) ** (code >> 7), code >> 3 & 15, code & 7
        if exponent == 15 and fraction == 7:
            expected = float("nan")
        elif exponent == 0:
            expected = sign * 2.0**-6 * (fraction / 8)
        else:
            expected = sign * 2.0 ** (exponent - 7) * (1 + fraction / 8)
        found = oracle.E4M3[code]
        assert struct.pack("<d", found)[:7] == struct.pack("<d", expected)[:7] or np.isnan([found, expected]).all()
        assert np.isnan(found) or np.signbit(found) == (code >= 128)
    anchors = {0x01: 2.0**-9, 0x07: 7 * 2.0**-9, 0x08: 2.0**-6, 0x38: 1.0, 0x3C: 1.5, 0x7E: 448.0, 0xFE: -448.0}
    assert {code: oracle.E4M3[code] for code in anchors} == anchors
    assert list(np.flatnonzero(np.isnan(oracle.E4M3))) == [0x7F, 0xFF]


def test_e8m0_codes() -> None:
    found = oracle.decode_e8m0(np.arange(256, dtype=np.uint8))
    assert [found[0], found[1], found[127], found[128], found[254]] == [2.0**-127, 2.0**-126, 1.0, 2.0, 2.0**127]
    assert np.array_equal(found[1:255] / found[:254], np.full(254, 2.0)) and np.isnan(found[255])


def test_e2m1_codes() -> None:
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert oracle.E2M1.tolist() == magnitudes + [-m for m in magnitudes]
    assert np.signbit(oracle.E2M1).tolist() == [False] * 8 + [True] * 8


def test_bfloat16_and_float16_codes() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    raw = bits.astype("<u2").view(np.uint8)
    for dtype, expected in (("F16", bits.view(np.float16)), ("BF16", (bits.astype(np.uint32) << 16).view(np.float32))):
        same_numbers(oracle.decode(raw, dtype), expected)


def test_float32_codes() -> None:
    """Random bits of every exponent, and the first and last codes of each kind."""
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, np.uint32)
    edges = [0, 1, 0x007FFFFF, 0x00800000, 0x3F800000, 0x7F7FFFFF, 0x7F800000, 0x7FC00000]
    bits = np.concatenate([bits, np.array(edges, np.uint32), np.array(edges, np.uint32) | 1 << 31]).astype(np.uint32)
    same_numbers(oracle.decode(bits.astype("<u4").view(np.uint8), "F32"), bits.view(np.float32))


def same_numbers(found: Array, expected: Array) -> None:
    numbers = ~np.isnan(expected)
    assert np.array_equal(np.isnan(found), ~numbers)
    assert np.array_equal(found[numbers], expected[numbers].astype(np.float64))
    assert np.array_equal(np.signbit(found[numbers]), np.signbit(expected[numbers]))


def test_integers() -> None:
    assert oracle.decode(np.frombuffer(b"\x80\xff\x00\x7f", np.uint8), "I8").tolist() == [-128, -1, 0, 127]
    assert oracle.decode(np.frombuffer(struct.pack("<q", -(1 << 53)), np.uint8), "I64").tolist() == [-(2.0**53)]
    with pytest.raises(ValueError, match="beyond"):
        oracle.decode(np.frombuffer(struct.pack("<q", (1 << 53) + 1), np.uint8), "I64")


# ----------------------------------------------------------------------------------------------------- logical weights


def test_fp8_blocks(tmp_path: Path) -> None:
    """[130, 129] in 128x128 blocks, the last ones partial; the same with scales as F32, E8M0 and U8, and V4's name."""
    codes = np.full((130, 129), 0x38, np.uint8)  # 1.0
    codes[129, 128], codes[0, 0] = 0xC4, 0x80  # -3.0, -0.0
    expected = np.empty((130, 129))
    expected[:128, :128], expected[:128, 128:], expected[128:, :128], expected[128:, 128:] = 1.0, 2.0, 0.25, 2.0**-20
    expected[129, 128], expected[0, 0] = -3.0 * 2.0**-20, -0.0
    weight = ("F8_E4M3", codes.shape, codes.tobytes())
    grids = {
        "w.weight_scale_inv": ("F32", (2, 2), floats(1.0, 2.0, 0.25, 2.0**-20)),
        "w.scale": ("F8_E8M0", (2, 2), bytes([127, 128, 125, 107])),
        "w.weight_scale": ("U8", (2, 2), bytes([127, 128, 125, 107])),
    }
    for name, grid in grids.items():
        folder = write(tmp_path / name, {"w.weight": weight, name: grid})
        found = oracle.values(folder, "w.weight")
        assert np.array_equal(found, expected) and np.signbit(found[0, 0])
        assert list(oracle.weights(read(folder))) == ["w.weight"]


def test_fp8_times_a_float32_scale_is_exact(tmp_path: Path) -> None:
    scale = struct.unpack("<f", floats(0.1))[0]
    folder = write(
        tmp_path, {"w.weight": ("F8_E4M3", (1, 1), b"\x7d"), "w.weight_scale_inv": ("F32", (1, 1), floats(0.1))}
    )
    numerator, denominator = scale.as_integer_ratio()
    assert oracle.values(folder, "w.weight").item().as_integer_ratio() == (416 * numerator // 32, denominator // 32)


def test_mxfp4_packing(tmp_path: Path) -> None:
    """[2, 64]: the low nibble is the even channel; a scale per row and 32 channels."""
    packed = np.zeros((2, 32), np.uint8)
    packed[0, 0], packed[0, 16], packed[1, 31] = 0x72, 0x1F, 0x81
    scales = bytes([127, 129, 127, 0])
    folder = write(tmp_path, {"e.weight": ("I8", (2, 32), packed.tobytes()), "e.scale": ("F8_E8M0", (2, 2), scales)})
    expected = np.zeros((2, 64))
    expected[0, 0], expected[0, 1] = 1.0, 6.0
    expected[0, 32], expected[0, 33] = -24.0, 2.0
    expected[1, 62], expected[1, 63] = 0.5 * 2.0**-127, -0.0
    found = oracle.values(folder, "e.weight")
    assert np.array_equal(found, expected) and np.signbit(found).sum() == 2


def test_int8_channels_and_blocks(tmp_path: Path) -> None:
    codes = np.array([[127, -127, 0], [1, -1, 2]], np.int8)
    weight = ("I8", (2, 3), codes.tobytes())
    folder = write(tmp_path / "c", {"w.weight": weight, "w.weight_scale": ("F32", (2, 1), floats(0.5, 4.0))})
    assert oracle.values(folder, "w.weight").tolist() == [[63.5, -63.5, 0.0], [4.0, -4.0, 8.0]]
    bfloat = struct.pack("<2H", 0x3F00, 0x4080)  # 0.5, 4
    folder = write(tmp_path / "h", {"w.weight": weight, "w.weight_scale": ("BF16", (2, 1), bfloat)})
    assert oracle.values(folder, "w.weight").tolist() == [[63.5, -63.5, 0.0], [4.0, -4.0, 8.0]]
    blocks = np.ones((129, 256), np.int8)
    folder = write(
        tmp_path / "b",
        {
            "w.weight": ("I8", blocks.shape, blocks.tobytes()),
            "w.weight_scale_inv": ("F32", (2, 2), floats(1.0, 2.0, 3.0, 4.0)),
        },
    )
    found = oracle.values(folder, "w.weight")
    assert found[127:129, 127:129].tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_int4_groups(tmp_path: Path) -> None:
    """[1, 130], padded to 17 words of eight codes; code + 8 is stored, the first channel in the lowest four bits."""
    channels = [0] * 136
    channels[:8] = [-8, -7, -1, 0, 1, 2, 6, 7]
    channels[128], channels[129] = 5, -3
    words = [sum((channels[8 * i + j] + 8) << 4 * j for j in range(8)) for i in range(17)]
    assert words[0] == 0xFEA98710
    folder = write(
        tmp_path,
        {
            "w.weight_packed": ("I32", (1, 17), struct.pack("<17I", *words)),
            "w.weight_scale": ("F32", (1, 2), floats(1.0, 0.5)),
            "w.weight_shape": ("I64", (2,), struct.pack("<2q", 1, 130)),
        },
    )
    assert list(oracle.weights(read(folder))) == ["w.weight"]
    assert oracle.values(folder, "w.weight").tolist() == [[*channels[:128], 2.5, -1.5]]


def test_stacked_experts(tmp_path: Path) -> None:
    """[2, 129, 129] with scales [2, 2, 2]: a block never reaches into the next expert."""
    codes = np.full((2, 129, 129), 0x38, np.uint8)
    scales = floats(*range(1, 9))
    folder = write(
        tmp_path,
        {
            "experts.down_proj": ("F8_E4M3", codes.shape, codes.tobytes()),
            "experts.down_proj_scale_inv": ("F32", (2, 2, 2), scales),
        },
    )
    found = oracle.values(folder, "experts.down_proj")
    assert found[:, 127:, 127:].tolist() == [[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]]
    assert np.array_equal(found[1, :128, :128], np.full((128, 128), 5.0))


def test_slabs_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    codes = generator.integers(0, 0x7F, (300, 70), np.uint8)
    scales = generator.random((3, 1), np.float32)
    tensors: Files = {
        "w.weight": ("F8_E4M3", codes.shape, codes.tobytes()),
        "w.weight_scale_inv": ("F32", (3, 1), scales.tobytes()),
        "b": ("F32", (), floats(7.0)),
    }
    folder = write(tmp_path, tensors)
    whole = oracle.values(folder, "w.weight")
    monkeypatch.setattr(oracle, "SLAB", 1000)
    assert np.array_equal(oracle.values(folder, "w.weight"), whole)
    assert oracle.values(folder, "b").shape == () and oracle.values(folder, "b") == 7.0


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"w.weight": ("F8_E4M3", (1, 1), b"\x00")}, "without scales"),
        ({"w.weight": ("BF16", (1, 1), b"\x00\x00"), "w.scale": ("F8_E8M0", (1, 1), b"\x00")}, "with scales"),
        ({"w.weight": ("F8_E4M3", (1, 1), b"\x00"), "w.scale": ("F8_E8M0", (1, 2), b"\x00\x00")}, "needs scales"),
    ],
)
def test_what_is_no_format(tmp_path: Path, tensors: Files, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        oracle.weights(read(write(tmp_path, tensors)))


# ------------------------------------------------------------------------------------------------------------- files


def header_of(path: Path, offsets: list[int], trailing: bytes = b"") -> Path:
    text = json.dumps({"a": {"dtype": "U8", "shape": [2], "data_offsets": offsets}}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\x01\x02" + trailing)
    return path


def test_headers(tmp_path: Path) -> None:
    tensor = read_shard(header_of(tmp_path / "good", [0, 2]))["a"]
    assert (tensor.dtype, tensor.shape, tensor.raw.tolist()) == ("U8", (2,), [1, 2])
    for name, offsets, trailing in (("gap", [1, 3], b"\x03"), ("size", [0, 1], b""), ("rest", [0, 2], b"\x03")):
        with pytest.raises(ValueError, match=r"expected bytes|in the file"):
            read_shard(header_of(tmp_path / name, offsets, trailing))
    wrong = {"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 1]}}  # one byte too few, and one too many
    text = json.dumps(wrong | {"b": {"dtype": "U8", "shape": [1], "data_offsets": [1, 3]}}).encode()
    (tmp_path / "sizes").write_bytes(struct.pack("<Q", len(text)) + text + bytes(3))
    with pytest.raises(ValueError, match="a: expected bytes 0 to 2, found 0 to 1"):
        read_shard(tmp_path / "sizes")
    twins = b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    (tmp_path / "twins").write_bytes(struct.pack("<Q", len(twins)) + twins)
    with pytest.raises(ValueError, match="twice"):
        read_shard(tmp_path / "twins")


@pytest.mark.parametrize(
    ("places", "total", "message"),
    [
        ({"a": "1.safetensors", "b": "2.safetensors"}, 12, None),
        ({"a": "1.safetensors"}, 4, None),
        ({"a": "2.safetensors", "b": "2.safetensors"}, 8, "is not there"),
        ({"a": "1.safetensors", "b": "1.safetensors"}, 4, "is not there"),
        ({"b": "2.safetensors", "c": "1.safetensors"}, 12, "the index has it in None"),
        ({"a": "1.safetensors", "b": "2.safetensors"}, 13, "total_size"),
    ],
)
def test_index(tmp_path: Path, places: dict[str, str], total: int, message: str | None) -> None:
    write_shard(tmp_path / "1.safetensors", {"a": ("F32", (1,), floats(1.0))})
    write_shard(tmp_path / "2.safetensors", {"b": ("F32", (2,), floats(2.0, 3.0))})
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    if message is None:
        assert read(tmp_path).keys() == places.keys()
    else:
        with pytest.raises(ValueError, match=message):
            read(tmp_path)


# -------------------------------------------------------------------------------------------------------- comparison


def compared(tmp_path: Path, source: Mapping[str, Entry], target: Mapping[str, Entry]) -> oracle.Difference:
    (found,) = oracle.compare(write(tmp_path / "source", source), write(tmp_path / "target", target)).values()
    return found


def f32(*numbers: float) -> Files:
    return {"w.weight": ("F32", (1, len(numbers)), floats(*numbers))}


def test_equal_and_almost(tmp_path: Path) -> None:
    e4m3 = {"w.weight": ("F8_E4M3", (1, 3), b"\x38\x80\x44"), "w.weight_scale_inv": ("F32", (1, 1), floats(2.0))}
    assert compared(tmp_path, e4m3, f32(2.0, -0.0, 6.0)) == oracle.Difference(True, True, 0.0, 0.0, 0.0, 0.0, 0, 0, 0)
    assert compared(tmp_path, e4m3, f32(2.0, 0.0, 6.0)) == oracle.Difference(True, False, 0.0, 0.0, 0.0, 0.0, 0, 0, 0)
    found = compared(tmp_path, f32(3.0, 4.0, 0.0), f32(3.0, 3.0, 0.0))
    assert found == oracle.Difference(False, False, 1.0, 0.25, 1 / 3, 0.2, 0, 0, 0)


def test_products_in_float32_and_exactly(tmp_path: Path) -> None:
    """7 times the float32 0.1 has 27 bits: a float32 holds the rounded product, and not the weight."""
    e4m3 = {"w.weight": ("F8_E4M3", (1, 1), b"\x4e"), "w.weight_scale_inv": ("F32", (1, 1), floats(0.1))}
    product = 7 * struct.unpack("<f", floats(0.1))[0]
    source, target = write(tmp_path / "source", e4m3), write(tmp_path / "target", f32(product))
    exactly = oracle.compare(source, target)["w.weight"]
    assert not exactly.exact and 0 < exactly.max_relative <= 2.0**-24
    assert oracle.compare(source, target, np.float32)["w.weight"].exact


def test_zeros_saturation_and_nan(tmp_path: Path) -> None:
    found = compared(tmp_path, f32(0.0, 3.0, 4.0), f32(1.0, 0.0, 4.0))
    assert (found.max_relative, found.max_absolute, found.flushed) == (np.inf, 3.0, 1)
    assert found.relative_norm == pytest.approx(np.sqrt(10) / 5, rel=1e-15)
    top = {"w.weight": ("F8_E4M3", (1, 3), b"\x7e\x7e\xfe"), "w.weight_scale_inv": ("F32", (1, 1), floats(2.0))}
    assert compared(tmp_path, f32(896.0, 928.0, -929.0), top).saturated == 1  # 464 still rounds to 448
    top = {"w.weight": ("I8", (1, 3), b"\x7f\x7f\x81"), "w.weight_scale": ("F32", (1, 1), floats(2.0))}
    assert compared(tmp_path, f32(255.0, 256.0, -256.0), top).saturated == 2
    half = struct.pack("<3H", 0x7BFF, 0x7C00, 0x7BFF)  # 65504, infinity, 65504
    found = compared(tmp_path, f32(65504.0, 70000.0, 70000.0), {"w.weight": ("F16", (1, 3), half)})
    assert found.saturated == 2 and found.max_absolute == np.inf
    nan = float("nan")
    assert compared(tmp_path, f32(nan, 1.0), f32(nan, 1.0)).exact
    assert compared(tmp_path, f32(nan, 1.0), f32(2.0, 1.0)).max_absolute == np.inf


def test_saturation_is_relative_to_the_scale(tmp_path: Path) -> None:
    top: Files = {"w.weight": ("F8_E4M3", (1, 1), b"\x7e"), "w.weight_scale_inv": ("F32", (1, 1), floats(0.5))}
    assert compared(tmp_path, f32(500.0), top).saturated == 1
    top["w.weight_scale_inv"] = ("F32", (1, 1), floats(0.9))  # 448 times it is rounded down in float32
    source, target = write(tmp_path / "source", f32(500.0)), write(tmp_path / "target", top)
    assert oracle.compare(source, target, np.float32)["w.weight"].saturated == 1


def test_all_slabs_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "SLAB", 1)
    inf = float("inf")
    source = {"w.weight": ("F32", (5, 1), floats(1.0, 2.0, 3.0, -0.0, 4.0))}
    found = compared(tmp_path, source, {"w.weight": ("F32", (5, 1), floats(inf, inf, 0.0, 0.0, 4.0))})
    assert (found.exact, found.signed_zeros, found.saturated, found.flushed) == (False, False, 2, 1)
    found = compared(tmp_path, source, {"w.weight": ("F32", (5, 1), floats(1.5, 2.0, 3.5, 0.0, 4.0))})
    assert (found.max_absolute, found.max_relative) == (0.5, 0.5)
    assert found.relative_norm == pytest.approx(np.sqrt(0.5 / 30), rel=1e-15)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only in one"):
        compared(tmp_path, f32(1.0), {"v.weight": ("F32", (1, 1), floats(1.0))})
    with pytest.raises(ValueError, match="became"):
        compared(tmp_path, f32(1.0), f32(1.0, 2.0))


# -------------------------------------------------------------------------------------------------------- FP4 in FP8


def test_fp4_in_fp8() -> None:
    """All codes in both sub-blocks: exact up to a ratio of 2^14; at 15 only .5 and 1.5 are lost, at 16 also 1 and 3."""
    every, even = list(range(16)), [2, 4, 5, 6, 7, 10, 12, 13, 14, 15]  # without .5 and 1.5
    for ratio in range(20):
        assert bool(oracle.fp4_to_fp8_exact([0, -ratio], [every, every])) == (ratio <= 14)
        assert bool(oracle.fp4_to_fp8_exact([0, -ratio], [every, even])) == (ratio <= 15)
        assert bool(oracle.fp4_to_fp8_exact([0, -ratio], [every, [4, 6, 7]])) == (ratio <= 16)
    assert oracle.fp4_to_fp8_exact([0, -14], [every, every]) == [-6]
    assert oracle.fp4_to_fp8_exact([5], [every]) == list(range(-1, 14))  # 6 <= 14 * 2^5 / 2^k, .5 >= 2^-9
    assert len(oracle.fp4_to_fp8_exact([0, -100], [every, [0, 8]])) == 15  # zeros ask for nothing
    assert oracle.fp4_to_fp8_exact([0, -14], [[1], [7]])[0] == -9  # .5 as 2^8: a rule with offset 6 need not be the end


def test_blocks_that_fp8_does_not_hold(tmp_path: Path) -> None:
    """[130, 256]: all codes everywhere; the ratio of scales is 2^14 in the first block, 2^15 in the next, 1 below."""
    packed = np.tile(np.arange(16, dtype=np.uint8) * 0x11, (130, 8))
    scales = np.full((130, 8), 127, np.uint8)
    scales[3, 1], scales[5, 7], scales[128:] = 113, 142, 200
    tensors: Files = {"e.weight": ("I8", (130, 128), packed.tobytes())}
    folder = write(tmp_path, tensors | {"e.scale": ("F8_E8M0", (130, 8), scales.tobytes())})
    assert oracle.blocks_not_in_fp8(folder, "e.weight") == [(0, 1)]


def test_where_three_times_a_power_of_two_is_the_only_scale() -> None:
    three = [3, 5, 7]  # 1.5, 3, 6
    assert oracle.fp4_to_fp8_exact([15, 0], [[7], [3]]) == [] != oracle.fp4_to_fp8_exact([15, 0], [[7], [3]], odd=3)
    for ratio in range(20):
        powers = oracle.fp4_to_fp8_exact([ratio, 0], [[7], [3]])
        threes = oracle.fp4_to_fp8_exact([ratio, 0], [[7], [3]], odd=3)
        assert (bool(powers), bool(threes)) == (ratio <= 14, ratio <= 15)  # 6 / 1.5 = 2^2
        assert not oracle.fp4_to_fp8_exact([ratio, 0], [[7, 2], three], odd=3)
    others = [o for o in range(5, 31, 2) if oracle.fp4_to_fp8_exact([0, 0], [[1, 2, 3], three], odd=o)]
    assert others == []


def test_no_other_scale_is_needed() -> None:
    """All scales that map the first value to any E4M3 code, as fractions, against powers of two and 3 times them."""
    codes = {Fraction(float(code)) for code in oracle.E4M3[1:0x7F]}
    generator, seen = np.random.default_rng(0), set()
    for _ in range(200):
        size = int(generator.integers(2, 5))
        exponents = [0, *(-int(r) for r in generator.integers(11, 19, size - 1))]
        magnitudes = generator.choice([[3, 5, 7, 3], [1, 2, 3, 7], [1, 2, 4, 6]][size % 3], size)
        values = [
            Fraction(float(oracle.E2M1[m])) * Fraction(2) ** e for m, e in zip(magnitudes, exponents, strict=True)
        ]
        some = any(all(value * code / values[0] in codes for value in values) for code in codes)
        rows = [[int(m)] for m in magnitudes]
        powers, threes = (bool(oracle.fp4_to_fp8_exact(exponents, rows, odd=o)) for o in (1, 3))
        assert some == (powers or threes)
        seen.add((powers, threes))
    assert seen == {(True, True), (True, False), (False, True), (False, False)}
