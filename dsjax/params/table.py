"""The one table: every parameter's path, shape letters, logical axes, storage class and checkpoint name.

Abstract parameters, counts, bytes, shardings, synthesis and loading are derived from it; no shape is written elsewhere.
Rows and their letters are listed family by family, in `params.v3`, `params.v4` and `params.dense`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from dsjax.config import Config, DenseConfig, IntegerQuantization, V4Config
from dsjax.errors import InputError
from dsjax.numerics import INT8_ACTIVATIONS
from dsjax.params import dense, v3, v4
from dsjax.params.row import EXPERT, FLOAT32, INTEGER, LINEAR, VECTOR, Path, Row, Tree
from quant import BF16, E2M1, E4M3, F16, INT4, INT8, WHOLE, QArray

FP8_BLOCK = (128, 128)
"""Rows and channels that share a scale of an E4M3 matrix (weight_block_size)."""

FP4_BLOCK = (1, 32)
"""The same of an E2M1 matrix (spec V4 3.1)."""

INT8_BLOCK = (128, 128)
"""The same of an INT8 matrix that has no scale per row (spec V3 6.4)."""

INT4_BLOCK = (1, 128)
"""The same of an INT4 matrix."""

_BLOCKS = {"e4m3": FP8_BLOCK, "e2m1": FP4_BLOCK, "int8-block": INT8_BLOCK, "int4": INT4_BLOCK}

INTEGERS = ("int8", "int8-block", "int4")
"""Formats of `Stored` that INT8 activations are multiplied with."""


def _family(config: Config) -> ModuleType:
    """The module that lists the family's rows and letters."""
    match config:
        case V4Config():
            return v4
        case DenseConfig():
            return dense
    return v3


def letters(config: Config) -> dict[str, int]:
    """Size of every letter that a parameter's shape uses."""
    sizes: dict[str, int] = _family(config).letters(config)
    return sizes


@lru_cache(maxsize=32)
def table(config: Config) -> tuple[Row, ...]:
    """Every parameter of the model, MTP modules included (their rows start with "mtp")."""
    rows: tuple[Row, ...] = _family(config).rows(config)
    return rows


def matrix_shape(row: Row, config: Config) -> tuple[int, ...]:
    """Shape of one of the row's tensors in the checkpoint."""
    size = letters(config)
    return tuple(math.prod(int(x) if x.isdigit() else size[x] for x in dim) for dim in row.dims)


def leaf_shape(row: Row, config: Config) -> tuple[int, ...]:
    """Shape of the stacked leaf: [layers, experts, *dims], each leading axis only where present."""
    return row.stacking + matrix_shape(row, config)


def is_mtp(row: Row) -> bool:
    """Whether the row belongs to a multi-token-prediction module."""
    return row.path[0] == "mtp"


# --- storage ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stored:
    """How a row's tensors are stored in a checkpoint, or held in memory.

    Attributes:
      format: "e4m3", "e2m1", "bf16", "f16", "f32", "i32" (ids, of any integer type in the file), or one of `INTEGERS`.
      scales: for e4m3 and e2m1: "f32" or "e8m0", per block; for integers: "f32" (in files also narrower floats), one
        per matrix row for int8, else per block.
      finer: in memory, blocks that divide the format's own, so that no shard cuts one.
    """

    format: str
    scales: str | None = None
    finer: tuple[int, int] | None = None

    @property
    def block(self) -> tuple[int, int]:
        """Rows and channels that share a scale; WHOLE spans an axis."""
        return self.finer or _BLOCKS.get(self.format, (1, WHOLE))

    @property
    def packed(self) -> bool:
        """Whether two codes share a byte."""
        return self.format in ("e2m1", "int4")


def official_storage(row: Row, config: Config) -> Stored:
    """The storage DeepSeek publishes (spec V3 3.2, V4 3.1), or what a config says of integers.

    Where the model is quantised, E4M3 for linear layers, with float32 scales (V3) or E8M0 ones (V4, unless its config
    asks for scales that are no powers of two), whose experts are E2M1 where the config says so. Norms and other
    matrices are bfloat16.
    """
    if row.storage == INTEGER:
        return Stored("i32")
    if isinstance(config.quantization, IntegerQuantization):
        found = config.quantization.format_of(row.module) if row.storage in (LINEAR, EXPERT) else None
        if found is not None:
            return Stored(found, "f32")
    elif row.storage in (LINEAR, EXPERT) and config.quantization is not None:
        if not isinstance(config, V4Config):
            return Stored("e4m3", "f32")
        scales = "f32" if config.quantization.scale_fmt == "float" else "e8m0"
        return Stored("e2m1" if row.storage == EXPERT and config.expert_dtype == "fp4" else "e4m3", scales)
    return Stored("f32" if row.storage == FLOAT32 or row.path[-1] == "bias" else "bf16")


WEIGHTS = ("stored", "float32", "bfloat16", "float16", "fp8", "int8", "w8a8", "w4a8")
"""What weights may be held as; chosen when they are loaded."""

# Not held as INT8: the embedding, whose rows are looked up, and the router, whose rounding would change who is chosen.
# Nor what decides which cached entries are read, and what is summed in float32 (spec V4 2.4, 2.5).
_NEVER_INT8 = ("embed", "router", "compressor", "indexer")


def resident(row: Row, stored: Stored, weights: str = "stored") -> Stored:
    """How a row is held in memory. What it equals in `stored` is not converted.

    Vectors are float32 always, ids int32. "fp8" and "int8" are weight-only: E4M3 with a float32 scale per 128 x 128
    block for what DeepSeek quantises and the file does not, INT8 with one scale per output channel. "w8a8" is INT8
    likewise, but of what DeepSeek quantises alone, the head left out; "w4a8" has INT4 with a scale per 128 channels
    for routed experts (for all linear layers where there are none) and is "w8a8" for the rest. What a file has in
    integers stays as it is, but for INT8 where INT4 is asked for.

    Args:
      row: of the table.
      stored: how the checkpoint stores it.
      weights: one of `WEIGHTS`.

    Raises:
      InputError: for another choice.
    """
    if weights not in WEIGHTS:
        raise InputError(f"weights: expected {', '.join(WEIGHTS)}, found {weights!r}")
    if weights == "stored" or row.storage in (VECTOR, FLOAT32, INTEGER):
        return stored
    if weights == "fp8":
        return Stored("e4m3", "f32") if row.storage in (LINEAR, EXPERT) and stored.scales is None else stored
    kept = any(name in row.path for name in _NEVER_INT8)
    if weights in INT8_ACTIVATIONS:
        kept = kept or row.storage not in (LINEAR, EXPERT)
        if weights == "w4a8" and not kept and (row.experts or row.narrow):
            return Stored("int4", "f32")
    if weights in ("int8", *INT8_ACTIVATIONS):
        return stored if kept or stored.format in INTEGERS else Stored("int8", "f32")
    return Stored({"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[weights])


def scale_grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scales of a matrix [..., N, K]: [..., ceil(N/bn), ceil(K/bk)]; WHOLE spans an axis."""
    *lead, n, k = shape
    return (*lead, -(-n // (block[0] or n)), -(-k // (block[1] or k)))


def abstract_leaf(row: Row, config: Config, stored: Stored) -> Any:
    """The leaf as shapes, held as `stored` says (see `resident`): a float32 or int32 ShapeDtypeStruct, or a QArray."""
    shape = leaf_shape(row, config)
    if stored.format == "i32":
        return jax.ShapeDtypeStruct(shape, jnp.int32)
    if stored.scales is not None:
        fmt = {"int8": INT8, "int8-block": INT8, "int4": INT4, "e4m3": E4M3, "e2m1": E2M1}[stored.format]
        scale_dtype = jnp.uint8 if stored.scales == "e8m0" else jnp.float32
        scales = jax.ShapeDtypeStruct(scale_grid(shape, stored.block), scale_dtype)
        *lead, k = shape
        codes = jax.ShapeDtypeStruct((*lead, k // 2 if fmt.packed else k), jnp.uint8)
        return QArray(codes, scales, fmt, stored.block)
    if row.storage in (VECTOR, FLOAT32) or stored.format == "f32":
        return jax.ShapeDtypeStruct(shape, jnp.float32)
    fmt = {"bf16": BF16, "f16": F16}[stored.format]
    return QArray(jax.ShapeDtypeStruct(shape, jnp.uint16), None, fmt, (1, WHOLE))


def build_tree(rows: tuple[Row, ...], leaf: Callable[[Row], Any]) -> Tree:
    """Nested dictionaries with `leaf(row)` at each row's path, copies left out."""
    tree: Tree = {}
    for row in rows:
        if row.copy_of is None:
            node = tree
            for key in row.path[:-1]:
                node = node.setdefault(key, {})
            node[row.path[-1]] = leaf(row)
    return tree


def abstract_params(
    config: Config,
    *,
    mtp: bool = False,
    stored: Mapping[Path, Stored] | None = None,
    weights: str = "stored",
    cut: Callable[[Row, Stored], Stored] = lambda row, held: held,
) -> Tree:
    """The model's parameters as shapes; nothing is allocated.

    Args:
      config: the architecture.
      mtp: include the MTP module.
      stored: storage by path, from a checkpoint's headers; DeepSeek's official one by default.
      weights: what they are held as, one of `WEIGHTS`.
      cut: makes scale blocks finer where shards need it (`layout.Layout.held`).

    Raises:
      InputError: for another choice of `weights`.
    """

    def leaf(row: Row) -> Any:
        held = resident(row, stored[row.path] if stored else official_storage(row, config), weights)
        return abstract_leaf(row, config, cut(row, held))

    return build_tree(tuple(r for r in table(config) if mtp or not is_mtp(r)), leaf)


def leaves(params: Tree, config: Config) -> Iterator[tuple[Row, Any]]:
    """(row, leaf) of every parameter that the tree holds: no copies, and no MTP module if none was loaded."""
    for row in table(config):
        leaf: Any = params
        for key in row.path:
            leaf = leaf.get(key) if isinstance(leaf, dict) else None
        if leaf is not None:
            yield row, leaf
