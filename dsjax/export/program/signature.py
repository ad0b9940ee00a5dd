"""A program's arguments and results, one by one: what they are called, what type they have, which part a rank holds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from dsjax.config import Config
from dsjax.export.program.targets import Target
from dsjax.params import VECTOR, Path, Row, Stored, Tree, leaves, official_storage
from quant import BF16, E2M1, E4M3, E8M0, FORMATS, QArray

Slice = list[list[int]]
"""[start, stop] of every axis."""


@dataclasses.dataclass(frozen=True)
class Value:
    """An argument or a result.

    Attributes:
      kind: "param", "cache" or "input" of arguments, "cache" or "output" of results.
      name: unique among a program's arguments, and among its results.
      spec: the global array's shape and type, as the program has it.
      held: as the step has it: codes are bytes there.
      partition: how ranks split it.
    """

    kind: str
    name: str
    spec: jax.ShapeDtypeStruct
    held: jax.ShapeDtypeStruct
    partition: PartitionSpec

    @property
    def file(self) -> jax.ShapeDtypeStruct:
        """As it is in files, and hashed: of the program's type, but for 4-bit elements, two of which are a byte."""
        return self.held if self.spec.dtype == E2M1.dtype else self.spec

    @property
    def nbytes(self) -> int:
        """Of the global array in a file."""
        return math.prod(self.file.shape) * self.file.dtype.itemsize

    def enter(self, x: jax.Array) -> jax.Array:
        """The argument as the step takes it: the same bits, or a vector in bfloat16 widened."""
        return _reinterpret(x, self.held)

    def leave(self, x: jax.Array) -> jax.Array:
        """What `enter` makes this of, and the step's array as the result."""
        return _reinterpret(x, self.spec)

    def slice(self, rank: int, extents: Mapping[str, int]) -> Slice | None:
        """The rank's part of the global array; None for all of it. Ranks count along axes, the last fastest."""
        place = dict(zip(extents, np.unravel_index(rank, tuple(extents.values())), strict=True))
        bounds, whole = [], True
        entries = [*self.partition, *[None] * (len(self.spec.shape) - len(self.partition))]
        for size, entry in zip(self.spec.shape, entries, strict=True):
            axes = (entry,) if isinstance(entry, str) else entry or ()
            parts, part = 1, 0
            for axis in axes:
                parts, part = parts * extents[axis], part * extents[axis] + int(place[axis])
            whole = whole and parts == 1
            bounds.append([size // parts * part, size // parts * (part + 1)])
        return None if whole else bounds


def _reinterpret(x: jax.Array, wanted: Any) -> jax.Array:
    """Bits as another type; two 4-bit elements are a byte."""
    if x.dtype == wanted.dtype:
        return x
    if {x.dtype, wanted.dtype} == {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}:
        return x.astype(wanted.dtype)
    if x.dtype == E2M1.dtype:
        x = x.reshape(*x.shape[:-1], -1, 2)
    found = lax.bitcast_convert_type(x, wanted.dtype)
    return found.reshape(*found.shape[:-2], -1) if wanted.dtype == E2M1.dtype else found


def _spec(held: jax.ShapeDtypeStruct, fmt: str | None, target: Target) -> jax.ShapeDtypeStruct:
    """Of a parameter's array, codes of a format: as the target wants to see it."""
    if fmt is None or fmt not in target.typed:
        return held
    dtype = FORMATS[fmt].dtype
    shape = (*held.shape[:-1], 2 * held.shape[-1]) if fmt == E2M1.name else held.shape
    return jax.ShapeDtypeStruct(shape, dtype)


def parameters(
    params: Tree, specs: Tree, config: Config, target: Target, stored: Mapping[Path, Stored] | None = None
) -> Iterator[tuple[Row, str, Value]]:
    """(row, "codes" or "scales" or "", value) of every array, in the order of `jax.tree.leaves(params)`.

    Vectors that are bfloat16 in the checkpoint are arguments of that type, though the step takes float32: their bytes
    are then the file's.

    Args:
      params: shapes or arrays.
      specs: PartitionSpecs (`Layout.param_specs`).
      stored: how rows are stored in the checkpoint; the official way if None.
    """
    rows = {row.path: row for row, _ in leaves(params, config)}

    def by_path(tree: Any) -> list[tuple[tuple[str, ...], Any]]:
        found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, QArray | PartitionSpec))
        return [(tuple(key.key for key in path), leaf) for path, leaf in found]

    parts = dict(by_path(specs))
    for keys, leaf in by_path(params):
        row, part = rows[keys], parts[keys]
        if not isinstance(leaf, QArray):
            held = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            file = stored[keys] if stored else official_storage(row, config)
            narrow = row.storage == VECTOR and file.format == BF16.name
            spec = jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16) if narrow else held
            yield row, "", Value("param", ".".join(keys), spec, held, part)
            continue
        arrays: list[tuple[str, Any, Any, str | None]] = [("codes", leaf.codes, part.codes, leaf.format.name)]
        if leaf.scales is not None:
            e8m0 = E8M0.name if leaf.scales.dtype == jnp.uint8 else None
            arrays.append(("scales", leaf.scales, part.scales, e8m0))
        for name, array, split, fmt in arrays:
            held = jax.ShapeDtypeStruct(array.shape, array.dtype)
            full = ".".join(keys) if leaf.scales is None else ".".join((*keys, name))
            yield row, name, Value("param", full, _spec(held, fmt, target), held, split)


def caches(cache: Any, specs: Any) -> list[Value]:
    """Every array of a cache, in the order of `jax.tree.leaves(cache)`."""
    parts = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
    found = []
    for (path, array), part in zip(jax.tree_util.tree_leaves_with_path(cache), parts, strict=True):
        name = ".".join(["cache", *(str(getattr(k, "name", getattr(k, "key", k))) for k in path)])
        held = jax.ShapeDtypeStruct(array.shape, array.dtype)
        # The cache holds bits, signed (`quant.rows`); of programs they are what they stand for.
        dtype = {"int16": jnp.bfloat16, "int8": jnp.uint8}.get(array.dtype.name, array.dtype)
        spec = jax.ShapeDtypeStruct(array.shape, dtype)
        found.append(Value("cache", name, spec, held, part))
    return found


def _e4m3_of_nibbles() -> np.ndarray:
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    signed = np.concatenate([values, np.copysign(values, -1)])
    return signed.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


E4M3_OF_E2M1 = _e4m3_of_nibbles()
"""uint8 [16]: the E4M3 code of every E2M1 code's value; all are exact."""


def expand_fp4(leaf: Any) -> Any:
    """An FP4 leaf, arrays or shapes, as E4M3 with the same scales; others as they are. Exact."""
    if not isinstance(leaf, QArray) or leaf.format != E2M1:
        return leaf
    shape = (*leaf.codes.shape[:-1], 2 * leaf.codes.shape[-1])
    if isinstance(leaf.codes, jax.ShapeDtypeStruct):
        codes: Any = jax.ShapeDtypeStruct(shape, jnp.uint8)
    else:
        packed = np.asarray(leaf.codes)
        codes = jnp.asarray(E4M3_OF_E2M1[np.stack([packed & 0xF, packed >> 4], axis=-1)].reshape(shape))
    return dataclasses.replace(leaf, codes=codes, format=E4M3)
