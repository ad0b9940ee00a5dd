"""params.json: every parameter argument, which tensors of the checkpoint it is made of, and its bytes hashed or copied.

Bytes are streamed region by region: no parameter is held whole, so any model can be described or copied.
"""

from __future__ import annotations

import dataclasses
import hashlib
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
from quant import E2M1, WHOLE

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


Of = Callable[[Row, str], Sequence[Tensor | Spec]]
"""A row and the name of one of its tensors -> that tensor, and its scales if it has any."""


def _tensors(files: Files) -> Of:
    """Of a checkpoint."""
    return lambda row, name: [files[n] for n in (name, row.scale_name(name)) if n in files]


def _published(config: Config) -> Of:
    """Of one that is not there, as DeepSeek writes it."""
    if isinstance(config.quantization, IntegerQuantization):
        return lambda row, name: []  # written in many ways
    return lambda row, name: list(official_specs(row, name, config))


def _same(stored: Stored, held: Stored) -> bool:
    """Whether codes and scales are the file's own, though scales may be repeated."""
    return dataclasses.replace(held, finer=None) == stored


def _sources(parameter: Parameter, of: Of, stored: Stored, held: Stored) -> list[Tensor | Spec]:
    """What an argument's numbers are made of, in stacking order; of what is converted codes, then their scales."""
    found = [of(parameter.row, name) for _, name in parameter.row.tensors()]
    if stored.scales is not None and not _same(stored, held):
        return [pair[i] for i in (0, 1) for pair in found if pair]
    return [pair[-1 if parameter.part == "scales" else 0] for pair in found if pair]


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
    """How an argument is made of its sources; what `reading.arrays` cannot make again it takes for that."""
    scales = parameter.part == "scales"
    if not _same(stored, held) and (stored.scales or held.scales):
        what = stored.format if stored.scales is None else f"{stored.format} codes and scales"
        if held.scales is None:
            return f"stack, then {what} dequantised to {held.format}"
        return f"stack, then {what} quantised to {'scales of ' * scales}{held.format} codes"
    if stored.scales is not None and not scales:
        if expanded:
            return "stack, then e2m1 codes to e4m3 codes"
        return "stack, then int4 codes + 8 to two's complement" if stored.format == "int4" else "stack"
    steps, wanted, types = ["stack"], np.dtype(parameter.value.spec.dtype), {t.dtype for t in tensors}
    if stored.scales != "e8m0" and types != {wanted}:  # E8M0 is bytes, whatever a file calls them
        steps.append(f"{types.pop().name if len(types) == 1 else 'several types'} to {wanted.name}")
    if scales and held.finer is not None:
        for i, (coarse, fine) in enumerate(zip(stored.block, held.finer, strict=True), len(parameter.row.stacking)):
            if coarse not in (fine, WHOLE):
                steps.append(f"each repeated {coarse // fine} times along axis {i}")
    return ", then ".join(steps)


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
    entries = _Entries(exporter, exporter.stored, _published(exporter.config))
    return [entries.make(parameter) for parameter in parameters]


class _Entries:
    """Makes params.json's arguments, one after the other.

    A tensor that several are made of counts in `checkpoint_bytes` of the first.
    """

    def __init__(self, exporter: Exporter, stored: Any, of: Of, folder: FilePath | None = None) -> None:
        self._exporter, self._of, self._folder = exporter, of, folder
        self._held = _held(exporter, stored)
        self._counted: set[tuple[str, int | None]] = set()

    def make(self, parameter: Parameter) -> dict[str, Any]:
        """The next one, without hash and copy."""
        stored, held = self._held(parameter.row)
        entry = _described(parameter, self._exporter, held)
        tensors = _sources(parameter, self._of, stored, held)
        if tensors:
            entry["sources"] = [_source(t, self._folder) for t in tensors]
            entry["checkpoint_bytes"] = sum(self._new_bytes(t) for t in tensors)
            expanded = _expands(parameter, self._exporter, held)
            entry["recipe"] = _recipe(parameter, tensors, stored, held, expanded)
        return entry

    def _new_bytes(self, tensor: Tensor | Spec) -> int:
        place = (tensor.name, tensor.offset if isinstance(tensor, Tensor) else None)
        if place in self._counted:
            return 0
        self._counted.add(place)
        return tensor.nbytes


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
        entries = _Entries(exporter, stored, _tensors(files), folder)
        with Reader(files, config, stored, held) as reader, _Copy(parameters, out) as copy:
            for parameter in parameters:
                entry = entries.make(parameter)
                digest = hashlib.sha256()
                sinks: list[Write] = [digest.update, *copy.sinks(parameter.value.name)]
                _stream(reader, parameter, _expands(parameter, exporter, find(parameter.row)[1]), sinks)
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
