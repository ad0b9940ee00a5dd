"""Judges a converted checkpoint from its files alone: NumPy and the standard library, nothing of the code it judges.

Sources: the safetensors format (8 bytes of header length, a JSON header, one buffer); OCP's 8-bit and microscaling
specifications (E4M3FN, E8M0, E2M1); DeepSeek's layouts, in which a scale multiplies and a value is code x scale;
compressed-tensors' `int-quantized` and `pack-quantized`. Every format here has at most 8 bits beside a scale of at most
24, so float64 holds every weight exactly.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
BLOCK, GROUP, MICRO = 128, 128, 32
"""Rows and columns of an FP8 or INT8 block; channels of an INT4 group; channels of an MXFP4 scale."""
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E8M0": 8, "BF16": 16, "F16": 16, "I32": 32, "F32": 32, "I64": 64}
SLAB = 1 << 21
"""Elements decoded at a time."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of a safetensors file: its dtype as written there, its shape, its bytes (uint8, memory-mapped)."""

    dtype: str
    shape: tuple[int, ...]
    raw: Array
    shard: str


@dataclass(frozen=True)
class Weight:
    """A logical weight. `format` is fp8, mxfp4, int8, int4 or plain; scales stand for `block` (rows, columns)."""

    format: str
    shape: tuple[int, ...]
    codes: Tensor
    scale: Tensor | None = None
    block: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class Difference:
    """What a conversion made of one weight. `exact`: all values equal; `signed_zeros`: the signs of zeros too.
    `max_relative`: of |difference| / |source| per element; `relative_norm`: of whole arrays (Frobenius). `saturated`:
    elements at the largest code with a source beyond what rounds to it; `flushed`: zeros where the source has none."""

    exact: bool
    signed_zeros: bool
    max_absolute: float
    max_relative: float
    relative_norm: float
    saturated: int
    flushed: int


# ----------------------------------------------------------------------------------------------------------- files


def read_shard(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file. ValueError if the header is not what the format allows: tensors must cover
    the buffer from first to last byte, without gap or overlap, each as long as its dtype and shape say."""
    data = np.memmap(path, np.uint8, mode="r")
    (length,) = struct.unpack("<Q", data[:8].tobytes())
    header = json.loads(data[8 : 8 + length].tobytes(), object_pairs_hook=_no_twins)
    header.pop("__metadata__", None)
    buffer, end, tensors = data[8 + length :], 0, {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        (start, stop), shape = entry["data_offsets"], tuple(entry["shape"])
        size = int(np.prod(shape, dtype=np.int64)) * BITS[entry["dtype"]] // 8
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
    content = json.loads(index.read_text(), object_pairs_hook=_no_twins)
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


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name occurs twice in one JSON object")
    return dict(pairs)


# ---------------------------------------------------------------------------------------------------------- decoders


def decode_float(bits: Array, exponent: int, mantissa: int, specials: str) -> Array:
    """float64 of a binary float's bits: a sign, `exponent` bits with bias 2^(exponent - 1) - 1, `mantissa` bits.
    `specials`: `ieee` (all-ones exponent: infinity or NaN), `fn` (only all ones: NaN) or `none`."""
    bits = bits.astype(np.int64)
    ones = (1 << exponent) - 1
    field, fraction = bits >> mantissa & ones, bits & (1 << mantissa) - 1
    significand = np.where(field == 0, fraction, fraction + (1 << mantissa)).astype(np.float64)
    value = np.ldexp(significand, np.maximum(field, 1) - (1 << exponent - 1) + 1 - mantissa)
    if specials == "ieee":
        value[field == ones] = np.where(fraction[field == ones] == 0, np.inf, np.nan)
    elif specials == "fn":
        value[(field == ones) & (fraction == (1 << mantissa) - 1)] = np.nan
    signed: Array = np.where(bits >> exponent + mantissa & 1, -value, value)
    return signed


def decode_e8m0(bits: Array) -> Array:
    """float64 of E8M0 codes: 2^(code - 127), 0x00 too; 0xFF is NaN."""
    return np.where(bits == 0xFF, np.nan, np.ldexp(1.0, bits.astype(np.int64) - 127))


IEEE = {"F16": ("<u2", 5, 10), "BF16": ("<u2", 8, 7), "F32": ("<u4", 8, 23)}


def nibbles(raw: Array) -> Array:
    """[2 n] codes of n bytes, the low nibble of each byte first. Eight codes of a little-endian int32 lie so too."""
    return np.stack([raw & 0xF, raw >> 4], axis=-1).reshape(-1)


def decode(raw: Array, dtype: str) -> Array:
    """float64, one-dimensional, of a tensor's little-endian bytes. U8 and I64 are integers; integers must fit."""
    if dtype == "F8_E4M3":
        return decode_float(raw, 4, 3, "fn")
    if dtype == "F8_E8M0":
        return decode_e8m0(raw)
    if dtype in IEEE:
        container, exponent, mantissa = IEEE[dtype]
        return decode_float(raw.view(container), exponent, mantissa, "ieee")
    plain = raw.view({"I8": "i1", "U8": "u1", "BOOL": "u1", "I32": "<i4", "I64": "<i8"}[dtype])
    if dtype == "I64" and plain.size and max(-int(plain.min()), int(plain.max())) > 1 << 53:
        raise ValueError("an integer beyond 2^53")
    return plain.astype(np.float64)


# ----------------------------------------------------------------------------------------------------- logical weights


def weights(tensors: Mapping[str, Tensor]) -> dict[str, Weight]:
    """Logical weights by name. Scales and shapes belong to the weight they are named after; a packed INT4 weight is
    called `X.weight`, as in any other format."""
    found: dict[str, Weight] = {}
    taken: set[str] = set()
    for name in tensors:
        logical = name.removesuffix("_packed") if name.endswith(".weight_packed") else name
        stem = logical.removesuffix("weight")
        names = [f"{logical}_scale_inv", f"{logical}_scale", *([f"{stem}scale"] if logical.endswith(".weight") else [])]
        names = [scale for scale in names if scale in tensors]
        if len(names) > 1:
            raise ValueError(f"{logical}: two scales: {names}")
        found[logical] = _weight(logical, tensors[name], tensors[names[0]] if names else None, tensors)
        taken.update(names, [f"{logical}_shape"] if name != logical else [])
    return {name: weight for name, weight in found.items() if name not in taken}


def _weight(name: str, codes: Tensor, scale: Tensor | None, tensors: Mapping[str, Tensor]) -> Weight:
    """Format and block from dtypes and shapes. ValueError if they fit no format."""
    shape = codes.shape
    if f"{name}_packed" in tensors:
        shape = tuple(int(n) for n in decode(tensors[f"{name}_shape"].raw, "I64"))
        if codes.dtype != "I32" or codes.shape != (*shape[:-1], -(-shape[-1] // 8)):
            raise ValueError(f"{name}: {codes.dtype} {codes.shape} does not pack INT4 of shape {shape}")
        options = {"int4": (1, GROUP)}
    elif scale is None:
        if codes.dtype in ("F8_E4M3", "I8"):
            raise ValueError(f"{name}: {codes.dtype} without scales")
        return Weight("plain", shape, codes)
    elif codes.dtype == "I8" and scale.dtype in ("F8_E8M0", "U8"):
        shape, options = (*shape[:-1], 2 * shape[-1]), {"mxfp4": (1, MICRO)}
    elif codes.dtype == "I8":
        options = {"int8": (1, shape[-1]) if scale.shape[-2:] == (shape[-2], 1) else (BLOCK, BLOCK)}
    elif codes.dtype == "F8_E4M3":
        options = {"fp8": (BLOCK, BLOCK)}
    else:
        raise ValueError(f"{name}: {codes.dtype} with scales")
    ((kind, block),) = options.items()
    grid = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    if scale is None or scale.shape != grid:
        raise ValueError(f"{name}: {kind} of shape {shape} needs scales {grid}, found {scale and scale.shape}")
    return Weight(kind, shape, codes, scale, block)


def slabs(weight: Weight) -> Iterator[slice]:
    """Ranges of rows, all leading axes flattened, of at most about SLAB elements."""
    columns = max(1, weight.shape[-1] if weight.shape else 1)
    rows = int(np.prod(weight.shape, dtype=np.int64)) // columns
    step = max(1, SLAB // columns)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def decode_rows(weight: Weight, rows: slice) -> tuple[Array, Array]:
    """(values, scales), both float64 [rows, K], of a range of rows as `slabs` counts them."""
    columns = weight.shape[-1] if weight.shape else 1
    stride = len(weight.codes.raw) // max(1, int(np.prod(weight.shape[:-1], dtype=np.int64)))
    raw = weight.codes.raw[rows.start * stride : rows.stop * stride]
    count = rows.stop - rows.start
    if weight.format == "mxfp4":
        codes = decode_float(nibbles(raw), 2, 1, "none")
    elif weight.format == "int4":
        codes = nibbles(raw).astype(np.float64) - 8.0
    else:
        codes = decode(raw, weight.codes.dtype)
    codes = codes.reshape(count, -1)[:, :columns]
    if weight.scale is None:
        return codes, np.ones_like(codes)
    per_matrix, height = weight.shape[-2], weight.scale.shape[-2]
    row, column = np.arange(rows.start, rows.stop), np.arange(columns)
    table = decode(weight.scale.raw, "F8_E8M0" if weight.scale.dtype == "U8" else weight.scale.dtype)
    place = row // per_matrix * height + row % per_matrix // weight.block[0]
    scales = table.reshape(-1, weight.scale.shape[-1])[place[:, None], column // weight.block[1]]
    with np.errstate(invalid="ignore"):  # infinity times zero is NaN, and found as such
        return codes * scales, scales


def values(folder: Path, name: str) -> Array:
    """float64 of a logical weight's shape, exact."""
    weight = weights(read(folder))[name]
    parts = [decode_rows(weight, rows)[0] for rows in slabs(weight)]
    return np.concatenate(parts).reshape(weight.shape) if parts else np.zeros(weight.shape)


# --------------------------------------------------------------------------------------------------------- comparison

TOP = {"fp8": (448.0, 16.0), "mxfp4": (6.0, 1.0), "int8": (127.0, 0.5), "int4": (7.0, 0.5), "F16": (65504.0, 16.0)}
"""Of each format: the largest code, and half the distance to the next if there were one."""


def difference(source: Weight, target: Weight) -> Difference:
    """How `target` differs from `source`, both of one shape; ValueError otherwise. NaN equals NaN, and is infinitely
    far from a number; so is anything but zero, relatively, from zero."""
    if source.shape != target.shape:
        raise ValueError(f"shape {source.shape} became {target.shape}")
    key = target.codes.dtype if target.format == "plain" else target.format
    top, half = TOP.get(key, (np.inf, 0.0))
    exact = signed = True
    absolute = relative = square = norm = 0.0
    saturated = flushed = 0
    for rows in slabs(source):
        (a, _), (b, scales) = decode_rows(source, rows), decode_rows(target, rows)
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        exact &= bool(same.all())
        signed &= bool((same & ((a != 0) | (np.signbit(a) == np.signbit(b)))).all())
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            delta = np.where(same, 0.0, np.where(np.isnan(a - b), np.inf, np.abs(a - b)))
            absolute = max(absolute, float(delta.max()))
            fraction = np.where(np.isnan(a), np.inf, delta / np.abs(a))
            relative = max(relative, float(np.where(same, 0.0, fraction).max()))
            high = (np.abs(b) >= top * scales) & (np.abs(a) - np.abs(b) > half * scales)
        saturated += int(np.count_nonzero(high | (np.isinf(b) & np.isfinite(a))))
        flushed += int(np.count_nonzero((b == 0) & (a != 0) & ~np.isnan(a)))
        square, norm = square + float((delta**2).sum()), norm + float((a[np.isfinite(a)] ** 2).sum())
    ratio = 0.0 if square == 0 else float(np.sqrt(square / norm)) if norm else np.inf
    return Difference(exact, signed, absolute, relative, ratio, saturated, flushed)


def compare(source: Path, target: Path) -> dict[str, Difference]:
    """The difference of every logical weight. ValueError if the two do not hold the same weights."""
    before, after = weights(read(source)), weights(read(target))
    if before.keys() != after.keys():
        raise ValueError(f"only in one of the two: {sorted(before.keys() ^ after.keys())}")
    return {name: difference(before[name], after[name]) for name in sorted(before)}


# -------------------------------------------------------------------------------------------------------- FP4 in FP8

E4M3 = decode_float(np.arange(256), 4, 3, "fn")
E2M1 = decode_float(np.arange(16), 2, 1, "none")


def fp4_to_fp8_exact(exponents: Sequence[int], codes: Sequence[Sequence[int]], odd: int = 1) -> list[int]:
    """All k in -127 .. 127 for which every E2M1[codes[j][i]] * 2^exponents[j] is (odd * 2^k) times an E4M3 value, found
    by trying; empty if one block scale cannot hold the block exactly. `codes` has a row for each sub-block.

    Are powers of two enough (odd = 1), where a scale may be any float32? A nonzero value has the odd part 1 or 3 (of
    E2M1: .5, 1, 2, 4 and 1.5, 3, 6), the scale the odd part o, the E4M3 code m <= 15, all integers, and o * m must be
    the value's. So o is 1, or it is 3 and *every* nonzero value has the odd part 3, with m = 1. In that case codes are
    powers of two, 2^-9 to 2^8, and values may span 2^17; under a power of two codes are 3 * 2^-9 to 3 * 2^7 (3 * 2^8
    is above 448), a span of 2^16. There is one exception, then: values with the odd part 3 only, largest / smallest
    exactly 2^17, are exact with a scale 3 * 2^k and with no power of two. Every other block that some scale holds
    exactly, a power of two holds too."""
    pairs = {(e, c) for e, row in zip(exponents, codes, strict=True) for c in row}
    block = np.unique([np.ldexp(E2M1[code], exponent) for exponent, code in pairs])
    return [k for k in range(-127, 128) if np.isin(block / np.ldexp(float(odd), k), E4M3).all()]
