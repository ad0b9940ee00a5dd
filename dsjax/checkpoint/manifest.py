"""dsjax.json: what each leaf of a converted folder is, so that the tree is rebuilt without other knowledge."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path as FilePath
from typing import Any

import jax
import numpy as np

from dsjax.config import Config, read_json_object
from dsjax.errors import InputError
from dsjax.params import (
    FLOAT32,
    INT8_BLOCK,
    INTEGER,
    VECTOR,
    Path,
    Stored,
    Tree,
    is_mtp,
    leaf_shape,
    scale_grid,
    table,
)
from quant import FORMATS, INT8, QArray

MANIFEST = "dsjax.json"
VERSION = 1

Leaves = dict[Path, Any]
"""By path: a float32 or int32 array, or a QArray; abstract ones as read from dsjax.json."""

_PLAIN = {"float32": np.float32, "int32": np.int32}


def leaf_parts(leaf: Any) -> dict[str, Any]:
    """A leaf's arrays by name: "codes" and "scales" where it has them; a plain array is its own codes."""
    if not isinstance(leaf, QArray):
        return {"codes": leaf}
    return {"codes": leaf.codes} if leaf.scales is None else {"codes": leaf.codes, "scales": leaf.scales}


def stored_as(leaf: Any) -> Stored:
    """A leaf's format, as `params.resident` would name it."""
    if not isinstance(leaf, QArray):
        return Stored("i32" if leaf.dtype.name == "int32" else "f32")
    scales = None if leaf.scales is None else "e8m0" if leaf.scales.dtype.itemsize == 1 else "f32"
    name = "int8-block" if leaf.format == INT8 and leaf.block == INT8_BLOCK else leaf.format.name
    return Stored(name, scales)


def flatten(tree: Tree, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """(path, leaf) of every leaf of nested dictionaries."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, (*path, key))
        else:
            yield (*path, key), value


def nest(leaves: Iterable[tuple[Path, Any]]) -> Tree:
    """What Orbax stores: QArrays as dictionaries, so that nobody needs this class to read them."""
    tree: Tree = {}
    for path, leaf in leaves:
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf_parts(leaf) if isinstance(leaf, QArray) else leaf
    return tree


def describe(path: Path, leaf: Any) -> dict[str, Any]:
    """The entry of a leaf."""
    entry: dict[str, Any] = {"path": ".".join(path), "shape": list(leaf.shape)}
    if not isinstance(leaf, QArray):
        return entry | {"dtype": leaf.dtype.name}
    types = {name: array.dtype.name for name, array in leaf_parts(leaf).items()}
    return entry | {"format": leaf.format.name, "block": list(leaf.block), **types}


def parse_entry(entry: Any) -> tuple[Path, Any]:
    """Path and abstract leaf of an entry; ValueError, TypeError, KeyError or AttributeError where it is none."""
    path, shape = tuple(entry["path"].split(".")), tuple(entry["shape"])
    if not shape or not all(type(n) is int and n > 0 for n in shape):
        raise ValueError(f"shape {shape}")
    if "format" not in entry:
        if entry["dtype"] not in _PLAIN:
            raise ValueError(f"an array of {entry['dtype']}")
        return path, jax.ShapeDtypeStruct(shape, _PLAIN[entry["dtype"]])
    fmt, (bn, bk) = FORMATS[entry["format"]], entry["block"]
    scales = entry.get("scales")
    if len(shape) < 2 or entry["codes"] != fmt.code_dtype.name or scales not in (None, "float32", "uint8"):
        raise ValueError(f"codes {entry['codes']}, scales {scales}, {len(shape)} axes")
    if not all(type(b) is int and b >= 0 for b in (bn, bk)) or (fmt.packed and shape[-1] % 2):
        raise ValueError(f"block [{bn}, {bk}] of shape {shape}")
    codes = jax.ShapeDtypeStruct((*shape[:-1], shape[-1] // 2) if fmt.packed else shape, fmt.code_dtype)
    grid = scale_grid(shape, (bn or shape[-2], bk or shape[-1]))
    return path, QArray(codes, scales and jax.ShapeDtypeStruct(grid, np.dtype(scales)), fmt, (bn, bk))


def write_manifest(folder: FilePath, entries: list[dict[str, Any]], stored: FilePath) -> None:
    """Writes dsjax.json, with the size of every file under `stored`."""
    files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(stored.rglob("*")) if p.is_file()}
    text = json.dumps({"version": VERSION, "leaves": entries, "files": files}, indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: FilePath) -> Leaves:
    """The abstract leaves that a converted folder says it has, after a look at the sizes of its files.

    Raises:
      InputError: if dsjax.json is missing, damaged, or of another version, or a file is missing or truncated.
    """
    where = folder / MANIFEST
    data = read_json_object(where)
    if data.get("version") != VERSION:
        raise InputError(f"{where}: expected version {VERSION}, found {str(data.get('version'))[:40]!r}")
    entries, files, leaves = data.get("leaves"), data.get("files"), Leaves()
    if not isinstance(entries, list) or not isinstance(files, dict):
        raise InputError(f"{where}: expected a list 'leaves' and an object 'files', found something else")
    for entry in entries:
        try:
            path, leaf = parse_entry(entry)
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            found = f"{json.dumps(entry)[:200]}: {str(e)[:100]}"
            raise InputError(f"{where}: expected a leaf's path, shape, types, found {found}") from None
        if path in leaves:
            raise InputError(f"{where}: parameter {'.'.join(path)}: expected one entry, found two")
        leaves[path] = leaf
    for name, size in files.items():
        try:
            found = (folder / name).stat().st_size
        except (OSError, ValueError):  # ValueError: a name that cannot be one
            raise InputError(f"{folder / name!s:.300}: expected a file of {size} bytes, found none") from None
        if found != size:
            raise InputError(f"{folder / name}: expected {size} bytes, found {found}")
    return leaves


def check_leaves(leaves: Leaves, config: Config, where: FilePath) -> None:
    """Refuses leaves that are not the parameters of the config, the MTP module's all or none of them.

    Raises:
      InputError: naming `where` and the parameter.
    """
    with_mtp = any(path[0] == "mtp" for path in leaves)
    rows = {r.path: r for r in table(config) if r.copy_of is None and (with_mtp or not is_mtp(r))}
    for path in [*rows, *leaves]:
        name, leaf = ".".join(path), leaves.get(path)
        if path not in rows:
            raise InputError(f"{where}: parameter {name}: expected no such parameter, found one")
        shape = leaf_shape(rows[path], config)
        if leaf is None:
            raise InputError(f"{where}: parameter {name}: expected one of shape {list(shape)}, found none")
        kind = leaf.format.name if isinstance(leaf, QArray) else leaf.dtype.name
        plain = {VECTOR: "float32", FLOAT32: "float32", INTEGER: "int32"}.get(rows[path].storage)
        if tuple(leaf.shape) != shape or kind != (plain or kind) or (kind == "int32") != (plain == "int32"):
            wanted = plain or "shape"
            raise InputError(
                f"{where}: parameter {name}: expected {wanted} {list(shape)}, found {kind} {list(leaf.shape)}"
            )
