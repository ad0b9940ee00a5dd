"""A bundle read back: its manifest checked, its files hashed, before anything in it is used."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsjax.checkpoint.safetensors import Files, read_tensors
from dsjax.errors import InputError
from dsjax.export.consumers.exchange import dtype_of
from dsjax.export.standalone.arrays import BadInput, read_json
from dsjax.export.standalone.manifest import check_files, read_manifest

Slice = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Value:
    """An argument or a result of a module.

    Attributes:
      kind: "param", "cache", "input" or "output".
      name: of it; a cache's result has its argument's name.
      shape: of this rank's part; global_shape: of the whole.
      slice: [start, stop) of the part by axis; None for the whole.
      alias: of a result, the index of the argument whose memory it takes.
    """

    index: int
    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    global_shape: tuple[int, ...]
    slice: Slice | None
    alias: int | None = None

    def part(self, whole: np.ndarray) -> np.ndarray:
        """This rank's part of the whole array."""
        return whole if self.slice is None else whole[tuple(slice(*s) for s in self.slice)]


@dataclasses.dataclass(frozen=True)
class Module:
    """One program of a bundle; `golden` is the folder's name under golden/, or None."""

    name: str
    kind: str
    rank: int | None
    golden: str | None
    operator: str | None
    arguments: tuple[Value, ...]
    results: tuple[Value, ...]


@dataclasses.dataclass(frozen=True)
class Program:
    """What runs together: one module, or those of all ranks, by rank."""

    name: str
    modules: tuple[Module, ...]

    @property
    def golden(self) -> str | None:
        """See `Module`."""
        return self.modules[0].golden


@dataclasses.dataclass(frozen=True)
class Bundle:
    """Attributes: folder; manifest, params: as read (params by path); programs; ranks."""

    folder: Path
    manifest: dict[str, Any]
    params: dict[str, dict[str, Any]]
    programs: tuple[Program, ...]
    ranks: int

    def partitioned(self, program: Program) -> bool:
        """Whether it is a global program, for a compiler that splits it over `ranks` devices by itself."""
        return self.manifest.get("spmd") == "auto" and self.ranks > 1 and program.modules[0].kind == "model"

    def module_bytes(self, module: Module) -> bytes:
        """The portable artifact."""
        return (self.folder / "modules" / f"{module.name}.vhlo.bc").read_bytes()

    def select(self, patterns: str | None) -> list[Program]:
        """The programs whose name, or a module's name, matches one of the shell patterns between commas.

        Raises:
          InputError: of a pattern that none matches.
        """
        if patterns is None:
            return list(self.programs)
        each = patterns.split(",")
        for pattern in each:
            if not any(_matches(p, [pattern]) for p in self.programs):
                names = ", ".join(p.name for p in self.programs)
                shown = names if len(names) <= 300 else f"{names[:300]} ..."
                raise InputError(f"--modules {patterns}: {pattern!r}: expected a pattern for some of {shown}")
        return [p for p in self.programs if _matches(p, each)]


def _matches(program: Program, patterns: Sequence[str]) -> bool:
    names = (program.name, *(m.name for m in program.modules))
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


def open_bundle(folder: Path) -> Bundle:
    """Reads a bundle and checks all that can be checked without running it.

    Raises:
      InputError: naming the file and what is wrong with it: of a newer schema, of a changed or missing file, of JSON
        that is not as the schema says.
    """
    path = folder / "manifest.json"
    try:
        manifest = read_manifest(folder)
        damaged = check_files(folder, manifest["files"])
        params = read_json(folder / "params.json") if "params.json" in manifest["files"] and not damaged else None
    except BadInput as e:
        raise InputError(str(e)) from None
    for name, what in damaged.items():
        raise InputError(f"{folder / name}: {what}")
    modules = [_module(path, entry) for entry in manifest["modules"]]
    if len({m.name for m in modules}) != len(modules):
        raise InputError(f"{path}: modules: expected each name once")
    for module in modules:
        name = f"modules/{module.name}.vhlo.bc"
        if name not in manifest["files"]:
            raise InputError(f"{path}: files: expected {name}, found no entry")
    mesh = manifest.get("mesh")
    ranks = mesh.get("ranks") if isinstance(mesh, dict) else 1
    if type(ranks) is not int or ranks < 1:
        raise InputError(f"{path}: mesh: expected a number of ranks, found {reprlib.repr(ranks)}")
    entries = [] if params is None else _list(folder / "params.json", params, "arguments")
    by_path = {str(entry.get("path")): entry for entry in entries}
    return Bundle(folder, manifest, by_path, _programs(path, modules, ranks), ranks)


def _list(path: Path, owner: dict[str, Any], key: str) -> list[dict[str, Any]]:
    found = owner.get(key)
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise InputError(f"{path}: {key}: expected a list of objects, found {reprlib.repr(found)}")
    return found


def _module(path: Path, entry: dict[str, Any]) -> Module:
    """A module, of which `read_manifest` has checked name, rank and golden."""
    name, rank, golden = entry["name"], entry.get("rank"), entry.get("golden")
    lists = []
    for key in ("arguments", "results"):
        values = tuple(_value(f"{path}: {name}: {key}", i, v) for i, v in enumerate(_list(path, entry, key)))
        if len({v.name for v in values}) != len(values):
            raise InputError(f"{path}: {name}: {key}: expected each name once")
        lists.append(values)
    kind, operator = str(entry.get("kind")), entry.get("operator")
    folder = None if golden is None else golden.removeprefix("golden/")
    return Module(name, kind, rank, folder, None if operator is None else str(operator), *lists)


def _value(where: str, index: int, entry: dict[str, Any]) -> Value:
    name, alias, kind = entry.get("name"), entry.get("alias"), entry.get("kind")
    if not isinstance(name, str) or entry.get("index") != index or kind not in ("param", "cache", "input", "output"):
        raise InputError(f"{where}: expected index {index}, a name and a kind, found {reprlib.repr(entry)}")
    if not (alias is None or type(alias) is int):
        raise InputError(f"{where}: {name}: alias: expected an index or null, found {reprlib.repr(alias)}")
    try:
        dtype = dtype_of(str(entry.get("dtype")))
    except TypeError:
        raise InputError(f"{where}: {name}: dtype: expected a type, found {entry.get('dtype')!r}") from None
    shape, whole = sizes(where, name, entry.get("shape")), sizes(where, name, entry.get("global_shape"))
    part = slices(where, name, entry.get("slice"), whole)
    if tuple(stop - start for start, stop in part) != shape if part is not None else whole != shape:
        raise InputError(f"{where}: {name}: expected a shape of what slice takes of {list(whole)}, found {list(shape)}")
    return Value(index, kind, name, shape, dtype, whole, part, alias)


def sizes(where: str, name: str, value: Any) -> tuple[int, ...]:
    """A shape.

    Raises:
      InputError: of anything else.
    """
    if not isinstance(value, list) or len(value) > 32 or not all(type(n) is int and 0 <= n < 1 << 48 for n in value):
        raise InputError(f"{where}: {name}: expected a shape, found {reprlib.repr(value)}")
    return tuple(value)


def slices(where: str, name: str, value: Any, whole: tuple[int, ...]) -> Slice | None:
    """[start, stop) by axis, or None.

    Raises:
      InputError: of anything else, or of what is not inside `whole`.
    """
    if value is None:
        return None
    fits = isinstance(value, list) and len(value) == len(whole)
    if not fits or not all(_is_slice(pair, n) for pair, n in zip(value, whole, strict=True)):
        raise InputError(f"{where}: {name}: slice: expected [start, stop] by axis of {list(whole)}, found {value!r}")
    return tuple((start, stop) for start, stop in value)


def _is_slice(pair: Any, size: int) -> bool:
    two = isinstance(pair, list) and len(pair) == 2 and all(type(i) is int for i in pair)
    return two and 0 <= pair[0] <= pair[1] <= size


def _programs(path: Path, modules: list[Module], ranks: int) -> tuple[Program, ...]:
    """Modules by what runs together, in the manifest's order."""
    groups: dict[str, list[Module]] = {}
    for module in modules:
        name = module.name if module.rank is None else module.name.removesuffix(f"-rank{module.rank}")
        groups.setdefault(name, []).append(module)
    programs = []
    for name, members in groups.items():
        members.sort(key=lambda m: m.rank or 0)
        found = [m.rank for m in members]
        if found != [None] and (len(found) != ranks or found != list(range(ranks))):
            raise InputError(f"{path}: {name}: expected ranks 0 to {ranks - 1}, found {found}")
        if len({m.golden for m in members}) != 1:
            raise InputError(f"{path}: {name}: expected one golden of all ranks")
        programs.append(Program(name, tuple(members)))
    return tuple(programs)


def open_arrays(path: Path) -> Files:
    """The tensors of one safetensors file.

    Raises:
      InputError: if it is none.
    """
    return Files(path.parent, {tensor.name: tensor for tensor in read_tensors(path)})


def byte_count(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Bytes of an array in a file, in which two FP4 codes share one."""
    count = math.prod(shape)
    return count // 2 if dtype.name == "float4_e2m1fn" else count * dtype.itemsize
