"""A bundle's manifest and the hashes of its files; trusts neither."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsjax.export.standalone.arrays import BadInput, Stored, read_json
from dsjax.export.standalone.ranks import Places

SCHEMA = 1


def inside(path: Path, name: Any) -> str:
    """A relative path that stays in its folder.

    Raises:
      BadInput: of another, naming the file that says it.
    """
    plain = isinstance(name, str) and name.isprintable() and "\\" not in name
    if not plain or not name or name.startswith("/") or ".." in name.split("/"):
        raise BadInput(f"{path}: expected the path of a file inside, found {str(name)[:80]!r}")
    return str(name)


def read_manifest(bundle: Path) -> dict[str, Any]:
    """A bundle's manifest.json, of a schema that this file knows.

    Raises:
      BadInput: if the names of files, modules, goldens and results in it are not as the schema says.
    """
    path = bundle / "manifest.json"
    manifest = read_json(path)
    schema = manifest.get("schema")
    if type(schema) is not int or schema < 1:
        raise BadInput(f"{path}: schema: expected an integer, found {str(schema)[:40]!r}")
    if schema > SCHEMA:
        raise BadInput(f"{path}: schema: expected at most {SCHEMA}, found {schema}: made by a newer dsjax")
    files, modules = manifest.get("files"), manifest.get("modules")
    if not isinstance(files, dict) or not isinstance(modules, list) or not modules:
        raise BadInput(f"{path}: expected files and a list of modules, found none")
    for name, entry in files.items():
        inside(path, name)
        if not isinstance(entry, dict):
            raise BadInput(f"{path}: files: {name[:80]!r}: expected bytes and sha256, found {str(entry)[:80]!r}")
    for module in modules:
        _check_module(path, module, files)
    return manifest


def _is_name(name: Any) -> bool:
    """Whether a name is a folder's or file's that no one can mistake for a path."""
    return isinstance(name, str) and bool(re.fullmatch(r"[\w-][\w.+-]{0,199}", name, re.ASCII))


def _check_module(path: Path, module: Any, files: Mapping[str, Any]) -> None:
    if not isinstance(module, dict) or not _is_name(module.get("name")):
        raise BadInput(f"{path}: modules: expected a name of letters, digits and -, found {str(module)[:80]!r}")
    name, rank, golden, results = (module.get(key) for key in ("name", "rank", "golden", "results"))
    if rank is not None and (type(rank) is not int or not 0 <= rank < 1 << 24):
        raise BadInput(f"{path}: {name}: rank: expected a number or null, found {str(rank)[:80]!r}")
    if not isinstance(results, list) or not all(
        isinstance(r, dict) and isinstance(r.get("name"), str) for r in results
    ):
        raise BadInput(f"{path}: {name}: results: expected objects with names, found {str(results)[:80]!r}")
    if golden is None:
        return
    if not isinstance(golden, str) or not golden.startswith("golden/") or not _is_name(golden[7:]):
        raise BadInput(f"{path}: {name}: golden: expected golden/NAME or null, found {str(golden)[:80]!r}")
    for file in ("outputs.safetensors", "inputs.safetensors", "tolerance.json"):
        needed = file == "outputs.safetensors" or (path.parent / golden / file).exists()
        if needed and f"{golden}/{file}" not in files:
            raise BadInput(f"{path}: files: expected {golden}/{file}, found no entry")


def check_files(bundle: Path, files: Mapping[str, Any]) -> dict[str, str]:
    """By file of a manifest, how it differs from what that says."""
    found = {}
    for name, entry in files.items():
        digest, size = hashlib.sha256(), 0
        try:
            if not (bundle / name).is_file():
                found[name] = "expected a file, found none"
                continue
            with open(bundle / name, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
                    size += len(block)
        except OSError as e:
            found[name] = f"expected a file that can be read, found: {e.strerror}"
            continue
        if size != entry.get("bytes"):
            found[name] = f"expected {entry.get('bytes')} bytes, found {size}"
        elif digest.hexdigest() != entry.get("sha256"):
            found[name] = f"expected SHA-256 {entry.get('sha256')}, found another: the file was changed"
    return found


def places_of(modules: Sequence[Mapping[str, Any]], expected: Mapping[str, Stored], path: Path) -> Places:
    """By rank, the part that it holds of each result.

    Raises:
      BadInput: of a slice that is none of the golden's array.
    """
    places: dict[int, dict[str, tuple[slice, ...]]] = {}
    for module in modules:
        if module.get("rank") is None:
            continue
        parts = places.setdefault(module["rank"], {})
        for result in module["results"]:
            name, part = result["name"], result.get("slice")
            if name not in expected:
                continue
            shape = expected[name].shape
            if part is None:
                part = [[0, n] for n in shape]
            if not isinstance(part, list) or len(part) != len(shape) or not all(map(_is_slice, part, shape)):
                what = f"[start, stop] by axis of {list(shape)}"
                raise BadInput(f"{path}: {module['name']}: {name}: slice: expected {what}, found {str(part)[:80]}")
            parts[name] = tuple(slice(i, j) for i, j in part)
    return dict(sorted(places.items()))


def _is_slice(pair: Any, size: int) -> bool:
    two = isinstance(pair, list) and len(pair) == 2 and all(type(i) is int for i in pair)
    return two and 0 <= pair[0] <= pair[1] <= size
