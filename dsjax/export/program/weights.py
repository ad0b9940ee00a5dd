"""params.json: every parameter argument, which tensors of the checkpoint it is made of, and its bytes hashed or copied.

Bytes are streamed region by region: no parameter is held whole, so any model can be described or copied.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path as FilePath
from typing import Any

import ml_dtypes
import numpy as np

from dsjax.checkpoint.agreement import agree
from dsjax.checkpoint.load import STAGING_BYTES
from dsjax.checkpoint.names import open_files
from dsjax.checkpoint.placing import extents, split_region
from dsjax.checkpoint.reading import Reader
from dsjax.checkpoint.safetensors import Files, Tensor
from dsjax.checkpoint.safetensors_writer import Spec, plan_layout
from dsjax.config import Config, IntegerQuantization
from dsjax.export.program.exporter import Exporter, Program
from dsjax.export.program.signature import E4M3_OF_E2M1, Value
from dsjax.params import Row, Stored, official_storage, resident, table
from dsjax.synth import official_specs
from quant import E2M1

COPY = "params/params.safetensors"


@dataclasses.dataclass(frozen=True)
class Parameter:
    """An argument, the row that it is of, and which of its arrays."""

    row: Row
    part: str
    value: Value


def parameters_of(programs: Sequence[Program]) -> list[Parameter]:
    """All parameters of the programs, each once."""
    found: dict[str, Parameter] = {}
    for program in programs:
        for (row, part), value in zip(program.rows, program.arguments, strict=False):  # parameters come first
            found.setdefault(value.name, Parameter(row, part, value))
    return list(found.values())


def _described(parameter: Parameter, exporter: Exporter, held: Stored) -> dict[str, Any]:
    value = parameter.value
    extents_, ranks = exporter.layout.rules.extents, exporter.ranks
    slices = {str(r): value.slice(r, extents_) for r in range(ranks)} if ranks > 1 else None
    scheme = held.format
    if held.scales is not None:
        rows, channels = held.block
        block = f"{rows or 'all'}x{channels or 'all'}"
        scheme = f"{held.format} codes, one {'E8M0' if held.scales == 'e8m0' else 'float32'} scale per {block}"
    if exporter.target.expand_fp4 and held.format == E2M1.name:
        scheme = scheme.replace("e2m1", "e4m3", 1)
    return {
        "path": value.name,
        "shape": list(value.spec.shape),
        "dtype": np.dtype(value.spec.dtype).name,
        "scheme": scheme,
        "bytes": value.nbytes,
        "checkpoint_bytes": None,
        "sha256": None,
        "slices": slices if slices and any(slices.values()) else None,
        "copy": None,
        "sources": [],
        "recipe": None,
    }


def _tensors(parameter: Parameter, files: Files) -> list[Tensor]:
    """Where an argument's numbers come from, in stacking order."""
    found = []
    for _, name in parameter.row.tensors():
        if parameter.part == "scales" and (scales := parameter.row.scale_name(name)) in files:
            name = scales
        found.append(files[name])
    return found


def _published(parameter: Parameter, config: Config) -> list[Spec]:
    """The same of a checkpoint that is not there, as DeepSeek writes it."""
    if isinstance(config.quantization, IntegerQuantization):
        return []  # written in many ways
    specs = (list(official_specs(parameter.row, name, config)) for _, name in parameter.row.tensors())
    return [found[-1] if parameter.part == "scales" else found[0] for found in specs]


def _source(tensor: Tensor | Spec, folder: FilePath | None) -> dict[str, Any]:
    file = offset = None
    if isinstance(tensor, Tensor) and folder is not None:
        file, offset = str(tensor.path.relative_to(folder)), tensor.offset
    return {
        "tensor": tensor.name,
        "file": file,
        "offset": offset,
        "bytes": tensor.nbytes,
        "dtype": tensor.dtype.name,
        "shape": list(tensor.shape),
    }


def _recipe(
    parameter: Parameter, tensors: Sequence[Tensor | Spec], stored: Stored, held: Stored, expanded: bool
) -> str:
    if stored == held and not expanded and sum(t.nbytes for t in tensors) == parameter.value.nbytes:
        return "stack"
    wanted = np.dtype(parameter.value.spec.dtype).name
    found = sorted({t.dtype.name for t in tensors})
    if (
        stored.scales is None
        and len(found) == 1
        and math.prod(parameter.value.spec.shape) == sum(math.prod(t.shape) for t in tensors)
    ):
        return f"stack, then {found[0]} to {wanted}"
    what = stored.format if stored.scales is None else f"{stored.format} codes and scales"
    return f"stack, then {what} to {'e4m3 codes' if expanded else held.format}"


Write = Callable[[memoryview], object]


def _stream(reader: Reader, parameter: Parameter, expand: bool, sinks: Sequence[Write]) -> None:
    """Gives the argument's bytes to every sink, in row-major order, a region at a time."""
    value, part = parameter.value, parameter.part or "codes"
    shape = list(value.held.shape)
    if expand:
        shape[-1] //= 2
    dtype = np.dtype(value.held.dtype)
    for region in split_region(tuple((0, n) for n in shape), dtype.itemsize, STAGING_BYTES):
        piece = np.empty(extents(region), dtype)
        reader.fill(parameter.row, part, region, piece)
        if expand:
            piece = E4M3_OF_E2M1[np.stack([piece & 0xF, piece >> 4], axis=-1)]
        if (value.held.dtype, value.spec.dtype) == (np.float32, ml_dtypes.bfloat16):
            piece = piece.astype(ml_dtypes.bfloat16)  # as it was in the file
        for sink in sinks:
            sink(piece.reshape(-1).view(np.uint8).data)


def describe(exporter: Exporter, parameters: Sequence[Parameter]) -> list[dict[str, Any]]:
    """params.json's arguments of a model without weights: made of the tensors that DeepSeek's checkpoint has."""
    held = _held(exporter, exporter.stored)
    found = []
    for parameter in parameters:
        base, kept = held(parameter.row)
        found.append(_entry(parameter, exporter, base, kept, _published(parameter, exporter.config)))
    return found


def _entry(
    parameter: Parameter,
    exporter: Exporter,
    stored: Stored,
    held: Stored,
    tensors: Sequence[Tensor | Spec],
    folder: FilePath | None = None,
) -> dict[str, Any]:
    entry = _described(parameter, exporter, held)
    if tensors:
        entry["sources"] = [_source(t, folder) for t in tensors]
        entry["checkpoint_bytes"] = sum(t.nbytes for t in tensors)
        entry["recipe"] = _recipe(parameter, tensors, stored, held, _expands(parameter, exporter, held))
    return entry


def _expands(parameter: Parameter, exporter: Exporter, held: Stored) -> bool:
    return exporter.target.expand_fp4 and held.format == E2M1.name and parameter.part == "codes"


def _held(exporter: Exporter, stored: Any) -> Callable[[Row], tuple[Stored, Stored]]:
    def find(row: Row) -> tuple[Stored, Stored]:
        base = stored[row.path] if stored else official_storage(row, exporter.config)
        return base, exporter.layout.held(row, resident(row, base, exporter.target.weights), exporter.config)

    return find


def read(
    exporter: Exporter, parameters: Sequence[Parameter], folder: FilePath, out: FilePath | None
) -> list[dict[str, Any]]:
    """The same with a checkpoint: sources, recipes and hashes; and a copy of the bytes.

    Args:
      exporter, parameters: what is to be described.
      folder: the checkpoint's.
      out: where `COPY` is written; None for no copy.

    Raises:
      InputError: for a damaged checkpoint.
    """
    config = exporter.config
    found: list[dict[str, Any]] = []
    with open_files(folder, config) as files:
        stored = agree(files, config)
        find = _held(exporter, stored)
        rows = {row.path: row for row in table(config) if row.path in stored}
        held = {path: find(row)[1] for path, row in rows.items() if row.copy_of is None}
        with Reader(files, config, stored, held) as reader, _Copy(parameters, out) as copy:
            for parameter in parameters:
                base, kept = find(parameter.row)
                entry = _entry(parameter, exporter, base, kept, _tensors(parameter, files), folder)
                digest = hashlib.sha256()
                sinks: list[Write] = [digest.update, *copy.sinks(parameter.value.name)]
                _stream(reader, parameter, _expands(parameter, exporter, kept), sinks)
                entry["sha256"] = digest.hexdigest()
                if out is not None:
                    entry["copy"] = {"file": COPY, "tensor": parameter.value.name}
                found.append(entry)
                if parameter.part != "codes":
                    reader.end_leaf()
    return found


class _Copy:
    """One safetensors file of all parameters, written as their bytes come."""

    def __init__(self, parameters: Sequence[Parameter], out: FilePath | None) -> None:
        self._specs = [_file_spec(p.value) for p in parameters]
        self._path = None if out is None else out / COPY

    def __enter__(self) -> _Copy:
        if self._path is not None:
            self._path.parent.mkdir()
            header, self._offsets = plan_layout(self._specs)
            self._file = self._path.open("xb")
            self._file.write(header)
        return self

    def __exit__(self, *_: object) -> None:
        if self._path is not None:
            self._file.close()

    def sinks(self, name: str) -> Iterator[Write]:
        """Where the tensor's bytes go, from its beginning on."""
        if self._path is not None:
            self._file.seek(self._offsets[name])
            yield self._file.write


def _file_spec(value: Value) -> Spec:
    return Spec(value.name, np.dtype(value.file.dtype), tuple(value.file.shape))
