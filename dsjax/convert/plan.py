"""What a conversion will write: every tensor of the result, from which matrices, and in which shard. Headers alone."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from dsjax.checkpoint.agreement import agree, has_block_draft, tensor_format
from dsjax.checkpoint.names import official, official_name
from dsjax.checkpoint.safetensors import DTYPES, Files, Tensor
from dsjax.checkpoint.safetensors_writer import Spec
from dsjax.config import Config, V4Config
from dsjax.convert.names import hugging_face_name, scale_name, stack_of
from dsjax.convert.targets import Encoding, Target, shape_name, tensor_names
from dsjax.errors import InputError
from dsjax.params import EXPERT, FP4_BLOCK, FP8_BLOCK, LINEAR, Row, is_mtp, matrix_shape, table

UNUSED = "unused"
"""The class of what is recognised, carried along and run by nobody."""

CARRIED = "original_scales"
"""The folder, beside a result in other formats, that holds the scales of the source, by the weights' names."""

_SOURCES = {
    "e4m3": (FP8_BLOCK, "F8_E4M3"),
    "e2m1": (FP4_BLOCK, "I8"),
    **{name: (None, name.upper()) for name in ("bf16", "f16", "f32")},
}


@dataclasses.dataclass(frozen=True)
class Part:
    """One matrix, or other tensor, of the source.

    Attributes:
      name: under which it is certified: its own, or that of a stack's part.
      official: its name in the table of parameters.
      tensor, scales: where it lies.
      row: of the table; None for what is not used.
      element: "e4m3", ... for matrices that may be converted, else the type of the file in small letters.
      shape: [N, K]; of other tensors, their own.
    """

    name: str
    official: str
    tensor: Tensor
    scales: Tensor | None
    row: Row | None
    element: str
    shape: tuple[int, ...]

    @property
    def storage(self) -> str:
        return UNUSED if self.row is None else self.row.storage

    @property
    def source(self) -> Encoding:
        """Of a matrix with an element format."""
        if self.scales is None:
            return Encoding(self.element)
        scales = "f32" if self.scales.dtype == np.float32 else "e8m0"
        block, _ = _SOURCES[self.element]
        assert block is not None
        return Encoding(self.element, scales, block, scales == "e8m0")


@dataclasses.dataclass(frozen=True)
class Job:
    """One weight of the result, perhaps a stack of many: its tensors, and what they are made of.

    Attributes:
      parts: in the order of their rows.
      encoding: what matrices become; None: their bytes are kept, and their scales'.
      codes, scales, shape: the tensors; `shape` holds N and K of INT4 codes.
      carried: holds the scales of the source, in a file of its own.
    """

    parts: tuple[Part, ...]
    encoding: Encoding | None
    codes: Spec
    scales: Spec | None = None
    shape: Spec | None = None
    carried: Spec | None = None

    @property
    def specs(self) -> tuple[Spec, ...]:
        return tuple(s for s in (self.codes, self.scales, self.shape) if s is not None)

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for s in self.specs)


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user asks for.

    Attributes:
      target: of the matrices.
      only: a pattern of weights' names, or None for all.
      names: "hf", "official", or None for the source's.
    """

    target: Target
    only: str | None = None
    names: str | None = None

    def wants(self, name: str) -> bool:
        return self.only is None or fnmatch.fnmatchcase(name, self.only)


def _parts(named: Files, config: Config) -> Iterator[Part]:
    """Of the source, under the table's names, in the order of its files; scales come with their weights.

    Raises:
      InputError: if names, shapes and types are not those of the config, or a format cannot be converted.
    """
    agree(named, config)
    unused = has_block_draft(named, config)
    rows = {name: row for row in table(config) if not (unused and is_mtp(row)) for _, name in row.tensors()}
    scales = {row.scale_name(name): name for name, row in rows.items()}
    order = {path: i for i, path in enumerate(sorted({t.path for t in named.values()}))}
    for name, tensor in sorted(named.items(), key=lambda item: (order[item[1].path], item[1].offset, item[0])):
        row = rows.get(name)
        if row is None:
            if scales.get(name) in named:
                continue
            yield Part(_own_name(tensor, name), name, tensor, None, None, _file_type(tensor), tensor.shape)
            continue
        element = tensor_format(row, tensor.dtype, config)
        shape = matrix_shape(row, config)
        if element in ("e4m3", "e2m1"):
            yield Part(_own_name(tensor, name), name, tensor, named[row.scale_name(name)], row, element, shape)
        elif row.storage in (LINEAR, EXPERT) and element not in _SOURCES:
            raise InputError(f"{tensor.path}: tensor {tensor.name}: expected a float, FP8 or FP4, found {element}")
        else:
            element = element if element in _SOURCES else _file_type(tensor)
            yield Part(_own_name(tensor, name), name, tensor, None, row, element, shape)


def _file_type(tensor: Tensor) -> str:
    return next(name for name, dtype in DTYPES.items() if dtype == tensor.dtype).lower()


def _own_name(tensor: Tensor, name: str) -> str:
    """The file's name; of a stack's part, the official one."""
    return tensor.name if official_name(tensor.name) in (name, tensor.name) else name


def _is_stacked(part: Part) -> bool:
    return part.row is not None and bool(part.row.experts) and not part.tensor.name.endswith(".weight")


def _single_name(part: Part, options: Options, v4: bool) -> str:
    if options.names is None or part.row is None or not v4:
        return part.tensor.name
    return hugging_face_name(part.official) if options.names == "hf" else part.official


def _groups(parts: Iterable[Part], options: Options, v4: bool) -> Iterator[tuple[str, list[Part]]]:
    """(name in the result, parts) of each weight; a stack stands where its first part was found."""
    stacks: dict[str, dict[tuple[int, int], Part]] = {}
    order: list[tuple[str, Part | None]] = []
    for part in parts:
        stacked = stack_of(part.official) if v4 else None
        if options.names == "hf" and stacked is not None:
            name, place = stacked
        elif options.names is None and _is_stacked(part):
            name, place = part.tensor.name, (0, part.tensor.offset)
        else:
            order.append((_single_name(part, options, v4), part))
            continue
        if name not in stacks:
            order.append((name, None))
        stacks.setdefault(name, {})[place] = part
    for name, single in order:
        yield name, [single] if single is not None else [p for _, p in sorted(stacks[name].items())]


def _stack_shape(name: str, parts: list[Part], matrix: tuple[int, ...]) -> tuple[int, ...]:
    """Of a tensor that holds all parts, each of this shape; of one part, the part's."""
    if name.endswith(".weight") or len(parts) == 1:
        return matrix
    per_expert = 2 if name.endswith("gate_up_proj") else 1
    return (len(parts) // per_expert, matrix[0] * per_expert, *matrix[1:])


def _job(name: str, parts: list[Part], options: Options, v4: bool, carried: Files | None) -> Job:
    first = parts[0]
    encoding = options.target.encoding(first.storage, v4) if options.wants(first.name) else None
    if len(first.shape) != 2:
        encoding = None
    if first.row is not None and encoding is not None and first.source == encoding:
        encoding = None
    for part in parts[1:]:
        if (part.element, part.scales is None) != (first.element, first.scales is None) or (
            options.wants(part.name) != options.wants(first.name)
        ):
            raise InputError(f"tensor {name}: expected experts of one format, found {first.name} and {part.name} apart")
    scale = first.scales.name if first.scales is not None and options.names is None else scale_name(name, v4)
    if encoding is None:
        codes = Spec(name, first.tensor.dtype, _stack_shape(name, parts, first.tensor.shape))
        if first.scales is None:
            return Job(tuple(parts), None, codes)
        return Job(tuple(parts), None, codes, _scales_spec(scale, name, parts, first.scales.dtype, first.scales.shape))
    n, k = first.shape
    if encoding.element == "e2m1" and k % 2:
        raise InputError(f"--to {options.target.name}: tensor {name}: expected an even width for FP4, found {[n, k]}")
    if len(parts) > 1 and encoding.block[0] > 1 and n % encoding.block[0] and name.endswith("gate_up_proj"):
        raise InputError(
            f"--names hf: tensor {name}: expected a width that is a multiple of {encoding.block[0]}, found {n}: "
            "no block may hold rows of gate and of up"
        )
    code_name, new_scale = tensor_names(options.target, name, scale)
    codes = Spec(code_name, encoding.codes[0], _stack_shape(name, parts, encoding.codes_shape((n, k))))
    scales = shape = kept = None
    if encoding.scales:
        scales = _scales_spec(new_scale, name, parts, encoding.scale_dtype, encoding.grid((n, k)))
    if encoding.element == "int4":
        shape = Spec(shape_name(code_name), DTYPES["I64"], (2,))
    origin = _carried_tensor(first, carried)
    if origin is not None and (encoding.scales is None or (first.element == "e2m1" and encoding.element == "e4m3")):
        kept = Spec(name, origin.dtype, _stack_shape(name, parts, origin.shape))
    return Job(tuple(parts), encoding, codes, scales, shape, kept)


def _scales_spec(scale: str, name: str, parts: list[Part], dtype: np.dtype, grid: tuple[int, ...]) -> Spec:
    return Spec(scale, dtype, _stack_shape(name, parts, grid))


def _carried_tensor(part: Part, carried: Files | None) -> Tensor | None:
    """The scales that a matrix first came with: what is carried beside it, else its own."""
    if part.storage not in (LINEAR, EXPERT):
        return None
    found = carried.get(part.official) if carried is not None else None
    return part.scales if found is None else found


@dataclasses.dataclass(frozen=True)
class Plan:
    """A whole conversion.

    Attributes:
      files: the source's tensors under the table's names, which read its bytes.
      shards: the jobs of each.
      carried: the scales that the source carries, by official names of weights; None if it carries none.
    """

    files: Files
    shards: tuple[tuple[Job, ...], ...]
    carried: Files | None

    @property
    def jobs(self) -> Iterator[Job]:
        for shard in self.shards:
            yield from shard

    def shard_name(self, index: int) -> str:
        return f"model-{index + 1:05d}-of-{len(self.shards):06d}.safetensors"

    def carried_scales(self, part: Part) -> Tensor | None:
        """The scales that a matrix first came with, to be carried on."""
        return _carried_tensor(part, self.carried)

    def old_scales(self, part: Part, grid: tuple[int, int]) -> Tensor | None:
        """Scales that its values may be codes of: its own, else those carried beside it, whichever have this grid."""
        found = [part.scales, _carried_tensor(part, self.carried)]
        return next((tensor for tensor in found if tensor is not None and tensor.shape == grid), None)

    @property
    def nbytes(self) -> int:
        return sum(job.nbytes + (job.carried.nbytes if job.carried else 0) for job in self.jobs)


def open_carried(folder: Path, config: Config) -> Files | None:
    """The scales that a folder carries beside its weights.

    Raises:
      InputError: if they are damaged.
    """
    if not (folder / CARRIED).is_dir():
        return None
    files = Files.open(folder / CARRIED)
    return official(files) if isinstance(config, V4Config) else files


def make_plan(files: Files, config: Config, options: Options, shard_bytes: int) -> Plan:
    """Plans a conversion.

    Args:
      files: of the source, under their own names.
      config: of the source.
      options: what is asked for.
      shard_bytes: a shard is full when the next weight would exceed this.

    Raises:
      InputError: if the source is damaged, or cannot become this.
    """
    v4 = isinstance(config, V4Config)
    if options.target.name == "mxfp4" and not v4:
        raise InputError(f"--to mxfp4: expected a deepseek_v4, whose experts are FP4, found a {config.model_type}")
    carried = open_carried(files.folder, config)
    named = official(files) if v4 else files
    shards: list[list[Job]] = []
    used, seen = 0, {"__metadata__"}
    for name, parts in _groups(_parts(named, config), options, v4):
        job = _job(name, parts, options, v4, carried)
        for spec in job.specs:
            if spec.name in seen:
                raise InputError(f"{parts[0].tensor.path}: tensor {spec.name}: expected one of that name, found two")
            seen.add(spec.name)
        if not shards or used + job.nbytes > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(job)
        used += job.nbytes
    plan = Plan(named, tuple(map(tuple, shards)), carried)
    if options.only is not None and not any(options.wants(part.name) for job in plan.jobs for part in job.parts):
        raise InputError(f"--only {options.only}: expected a pattern of some weights' names, found none that match")
    return plan
