"""Judges a converted checkpoint from its files alone: NumPy and the standard library, nothing of the code it judges.

Sources: OCP's 8-bit and microscaling specifications (E4M3FN, E8M0, E2M1); DeepSeek's layouts, in which a scale
multiplies; compressed-tensors' `int-quantized` and `pack-quantized`. A weight is code x scale. Codes have at most 8
bits, scales and unscaled floats 24, so float64 holds every weight exactly.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from plain_safetensors import Array, Tensor, no_twins, read

BLOCK, GROUP, MICRO = 128, 128, 32
"""Rows and columns of an FP8 or INT8 block; channels of an INT4 group; channels of an MXFP4 scale."""
SLAB = 1 << 21
"""Elements decoded at a time."""


@dataclass(frozen=True)
class Weight:
    """A logical weight. `format`: e4m3, e2m1, int8, int4 or a plain dtype; a scale holds for `block` rows, columns."""

    format: str
    shape: tuple[int, ...]
    codes: Tensor
    scale: Tensor | None = None
    block: tuple[int, int] = (1, 1)

    def described(self) -> dict[str, Any]:
        """What a certificate calls it."""
        if self.scale is None:
            return {"format": self.format, "scales": None, "block": None}
        scales = "e8m0" if self.scale.dtype == "U8" else self.scale.dtype.lower().removeprefix("f8_")
        return {"format": self.format, "scales": scales, "block": list(self.block)}

    def stored(self) -> list[tuple[str, bytes]]:
        """Dtypes and bytes of codes and scales."""
        return [(tensor.dtype, tensor.raw.tobytes()) for tensor in (self.codes, self.scale) if tensor is not None]


@dataclass(frozen=True)
class Difference:
    """What a conversion made of one weight. `exact`: all values equal; `signed_zeros`: the signs of zeros too.
    `max_relative`: of |difference| / |source| per element; `relative_norm`: of whole arrays (Frobenius). `saturated`:
    elements at the largest code with a source beyond what rounds to it; `beyond`: with a source beyond the code itself;
    `flushed`: zeros where the source has none."""

    exact: bool
    signed_zeros: bool
    max_absolute: float
    max_relative: float
    mean_absolute: float
    relative_norm: float
    saturated: int
    beyond: int
    flushed: int


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
        return Weight(codes.dtype.lower(), shape, codes)
    elif codes.dtype == "I8" and scale.dtype in ("F8_E8M0", "U8"):
        shape, options = (*shape[:-1], 2 * shape[-1]), {"e2m1": (1, MICRO)}
    elif codes.dtype == "I8":
        options = {"int8": (1, shape[-1]) if scale.shape[-2:] == (shape[-2], 1) else (BLOCK, BLOCK)}
    elif codes.dtype == "F8_E4M3":
        options = {"e4m3": (BLOCK, BLOCK)}
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
    rows = math.prod(weight.shape) // columns
    step = max(1, SLAB // columns)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def decode_rows(weight: Weight, rows: slice) -> tuple[Array, Array]:
    """(values, scales), both float64 [rows, K], of a range of rows as `slabs` counts them."""
    columns = weight.shape[-1] if weight.shape else 1
    stride = len(weight.codes.raw) // max(1, math.prod(weight.shape[:-1]))
    raw = weight.codes.raw[rows.start * stride : rows.stop * stride]
    count = rows.stop - rows.start
    if weight.format == "e2m1":
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

TOP = {"e4m3": (448.0, 16.0), "e2m1": (6.0, 1.0), "int8": (127.0, 0.5), "int4": (7.0, 0.5), "f16": (65504.0, 16.0)}
"""Of each format: the largest code, and half the distance to the next if there were one."""


def difference(source: Weight, target: Weight, dtype: type = np.float64) -> Difference:
    """How `target` differs from `source`, both of one shape; ValueError otherwise. NaN equals NaN, and is infinitely
    far from a number; so is anything but zero, relatively, from zero. With `dtype` float32, values are code x scale
    rounded to float32 once, as a program that multiplies in float32 has them; with float64 they are exact."""
    if source.shape != target.shape:
        raise ValueError(f"shape {source.shape} became {target.shape}")
    top, half = TOP.get(target.format, (np.inf, 0.0))
    exact = signed = True
    absolute = relative = total = square = norm = 0.0
    saturated = beyond = flushed = 0
    for rows in slabs(source):
        (a, _), (b, scales) = decode_rows(source, rows), decode_rows(target, rows)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            a, b = a.astype(dtype).astype(np.float64), b.astype(dtype).astype(np.float64)
            same = (a == b) | (np.isnan(a) & np.isnan(b))
            delta = np.where(same, 0.0, np.where(np.isnan(a - b), np.inf, np.abs(a - b)))
            fraction = np.where(np.isnan(a), np.inf, delta / np.abs(a))
            high, excess = np.abs(b) >= (top * scales).astype(dtype), np.abs(a) - np.abs(b)
        exact &= bool(same.all())
        signed &= bool((same & ((a != 0) | (np.signbit(a) == np.signbit(b)))).all())
        absolute, total = max(absolute, float(delta.max())), total + float(delta.sum())
        relative = max(relative, float(np.where(same, 0.0, fraction).max()))
        square, norm = square + float((delta**2).sum()), norm + float((a[np.isfinite(a)] ** 2).sum())
        infinite = np.isinf(b) & np.isfinite(a)
        saturated += int(np.count_nonzero(high & (excess > half * scales) | infinite))
        beyond += int(np.count_nonzero(high & (excess > 0) | infinite))
        flushed += int(np.count_nonzero((b == 0) & (a != 0) & ~np.isnan(a)))
    mean = total / max(1, math.prod(source.shape))
    ratio = 0.0 if square == 0 else math.sqrt(square / norm) if norm else math.inf
    return Difference(exact, signed, absolute, relative, mean, ratio, saturated, beyond, flushed)


def compare(source: Path, target: Path, dtype: type = np.float64) -> dict[str, Difference]:
    """The difference of every logical weight. ValueError if the two do not hold the same weights."""
    before, after = weights(read(source)), weights(read(target))
    if before.keys() != after.keys():
        raise ValueError(f"only in one of the two: {sorted(before.keys() ^ after.keys())}")
    return {name: difference(before[name], after[name], dtype) for name in sorted(before)}


# ------------------------------------------------------------------------------------------------------- certificates


def _sums(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def check_certificate(source: Path, target: Path) -> list[str]:
    """What `certificate.json` in `target` says that the files do not; empty if it is right. Its values are code x scale
    in float32. Errors agree within 1e-6 of themselves; a count of saturated values is between those of values beyond
    what rounds to the largest code, and of values beyond that code."""
    said = json.loads((target / "certificate.json").read_text(), object_pairs_hook=no_twins)
    before, after = read(source), read(target)
    shards = {source / tensor.shard for tensor in before.values()}
    others = {path for path in target.rglob("*") if path.is_file() and path != target / "certificate.json"}
    found: list[str] = [] if said["version"] == 2 else [f"version {said['version']}"]

    def expect(what: str, claim: object, truth: object) -> None:
        near = isinstance(truth, float) and isinstance(claim, int | float)
        if not (math.isclose(claim, truth, rel_tol=1e-6) if near else claim == truth):  # type: ignore[arg-type]
            found.append(f"{what}: the certificate says {claim}, the files {truth}")

    for key, folder, files, tensors in (("source", source, shards, before), ("result", target, others, after)):
        sums = {str(path.relative_to(folder)): _sums(path) for path in files}
        digests = {name: f"{zlib.crc32(tensor.raw.tobytes()):08x}" for name, tensor in tensors.items()}
        for kind, truth in (("files", sums), ("tensors", digests)):
            for name in sorted(truth.keys() | said[key][kind].keys()):
                expect(f"{key}: {kind}: {name}", said[key][kind].get(name), truth.get(name))

    old, new, entries = weights(before), weights(after), said["tensors"]
    expect("weights", sorted(entries), sorted(old))
    expect("results", sorted(entry["result"] for entry in entries.values()), sorted(new))
    for name in sorted(entries.keys() & old.keys()):
        entry, weight, result = entries[name], old[name], new.get(entries[name]["result"])
        if result is None or result.shape != weight.shape:
            found.append(f"{name}: {weight.shape} became {result and result.shape}")
            continue
        real = difference(weight, result, np.float32)
        truths = {
            "shape": list(weight.shape),
            "source": weight.described(),
            "target": result.described(),
            "exact": real.exact and real.signed_zeros,
            "max_abs_error": real.max_absolute,
            "max_rel_error": real.max_relative,
            "mean_abs_error": real.mean_absolute,
            "relative_norm": real.relative_norm,
            "saturated": min(max(entry["saturated"], real.saturated), real.beyond),
            "flushed": real.flushed,
        }
        for field, value in truths.items():
            expect(f"{name}: {field}", entry.get(field), value)
        if entry["action"] == "kept":
            expect(f"{name}: kept", True, weight.stored() == result.stored())
        expect(f"{name}: reasons", bool(entry["reasons"]), not truths["exact"])
    classes: dict[str, list[dict[str, Any]]] = {}
    for entry in entries.values():
        classes.setdefault(entry["class"], []).append(entry)
    expect("summary: classes", sorted(said["summary"]), sorted(classes))
    for kind, row in said["summary"].items():
        members = classes.get(kind, [])
        expect(f"summary: {kind}: tensors", row["tensors"], len(members))
        expect(f"summary: {kind}: exact", row["exact"], sum(entry["exact"] for entry in members))
        expect(f"summary: {kind}: converted", row["converted"], sum(e["action"] == "converted" for e in members))
        expect(f"summary: {kind}: parameters", row["parameters"], sum(math.prod(e["shape"]) for e in members))
    for field, held in (("source_bytes", before), ("result_bytes", after)):
        size = sum(len(tensor.raw) for tensor in held.values())
        expect(f"summary: {field}", sum(row[field] for row in said["summary"].values()), size)
    expect("exact", said["exact"], all(entry["exact"] for entry in entries.values()))
    return found


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
    return exact_scales(np.array([np.ldexp(E2M1[code], exponent) for exponent, code in pairs]), odd)


def exact_scales(block: Array, odd: int = 1) -> list[int]:
    """All k in -127 .. 127 for which every value of the block is (odd * 2^k) times an E4M3 value."""
    powers = np.arange(-127, 128)
    codes = np.unique(np.abs(block)) / np.ldexp(float(odd), powers)[:, None]
    return [int(k) for k in powers[np.isin(codes, E4M3).all(axis=1)]]


def blocks_not_in_fp8(folder: Path, name: str) -> list[tuple[int, int]]:
    """The 128 x 128 blocks (row, column) of a weight [N, K] that are not E4M3 under any power of two."""
    array = values(folder, name)
    grid = np.ndindex(-(-array.shape[0] // BLOCK), -(-array.shape[1] // BLOCK))
    return [(i, j) for i, j in grid if not exact_scales(array[i * BLOCK :, j * BLOCK :][:BLOCK, :BLOCK])]
