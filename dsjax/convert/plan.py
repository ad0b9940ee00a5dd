"""What a conversion will write: every tensor of the result, from which matrices, and in which shard. Headers alone."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from dsjax.checkpoint.agreement import agree, has_block_draft, tensor_format
from dsjax.checkpoint.integers import integer_types, rename
from dsjax.checkpoint.names import official, official_name
from dsjax.checkpoint.safetensors import DTYPES, Files, Tensor
from dsjax.checkpoint.safetensors_writer import Spec
from dsjax.config import Config, V4Config
from dsjax.convert.names import hugging_face_name, is_stack, scale_name, stack_of
from dsjax.convert.targets import Encoding, Target, shape_name, tensor_names
from dsjax.errors import InputError
from dsjax.params import EXPERT, INTEGERS, LINEAR, Row, Stored, is_mtp, matrix_shape, table

UNUSED = "unused"
"""The class of what is recognised, carried along and run by nobody."""

CARRIED = "original_scales"
"""The folder, beside a result in other formats, that holds the scales of the source, by the weights' names."""

_APART = ": --names official, which takes stacks apart"

_FLOATS = ("bf16", "f16", "f32")

_SCALES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
"""Other types of scales are E8M0's."""

_SHAPE_BYTES = 16
"""Of N and K beside packed INT4 codes, two int64."""


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
      block: rows and channels that share a scale; 0 channels are a whole row.
    """

    name: str
    official: str
    tensor: Tensor
    scales: Tensor | None
    row: Row | None
    element: str
    shape: tuple[int, ...]
    block: tuple[int, int] = (1, 0)

    @property
    def storage(self) -> str:
        return UNUSED if self.row is None else self.row.storage

    @property
    def source(self) -> Encoding:
        """Of a matrix with an element format."""
        if self.scales is None:
            return Encoding(self.element)
        scales = _SCALES.get(self.scales.dtype.name, "e8m0")
        return Encoding(self.element, scales, self.block, scales == "e8m0")

    @property
    def nbytes(self) -> int:
        """In the files, with what belongs to it."""
        scales = 0 if self.scales is None else self.scales.nbytes
        return self.tensor.nbytes + scales + (_SHAPE_BYTES if self.element == "int4" else 0)


@dataclasses.dataclass(frozen=True)
class Job:
    """One weight of the result, perhaps a stack of many: its tensors, and what they are made of.

    Attributes:
      parts: in the order of their rows.
      encoding: what matrices become; None: their bytes are kept, and their scales'.
      codes, scales, shape: the tensors; `shape` holds N and K of packed INT4 codes.
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
            if scales.get(name) in named or name.removesuffix("_shape") in rows:
                continue
            yield Part(_own_name(tensor, name), name, tensor, None, None, _file_type(tensor), tensor.shape)
            continue
        integers = integer_types(named, row, name, config)
        fmt = tensor_format(row, tensor.dtype, config) if integers is None else integers[tensor.dtype]
        own, shape = _own_name(tensor, name), matrix_shape(row, config)
        if fmt in ("e4m3", "e2m1", *INTEGERS):
            element = fmt.removesuffix("-block")
            yield Part(own, name, tensor, named[row.scale_name(name)], row, element, shape, Stored(fmt).block)
        else:
            yield Part(own, name, tensor, None, row, fmt if fmt in _FLOATS else _file_type(tensor), shape)


def _file_type(tensor: Tensor) -> str:
    return next(name for name, dtype in DTYPES.items() if dtype == tensor.dtype).lower()


def _own_name(tensor: Tensor, name: str) -> str:
    """The file's name; of a stack's part, the official one; of packed codes, the weight's."""
    own = _unpacked(tensor, name)
    if is_stack(own):
        return name
    return own if official_name(own) in (name, own) else name


def _unpacked(tensor: Tensor, name: str) -> str:
    """The file's name for a weight, of whose packed codes the table's `name` says nothing."""
    return tensor.name.removesuffix("_packed") if name.endswith(".weight") else tensor.name


def _single_name(part: Part, options: Options, v4: bool) -> str:
    if part.row is None:
        return part.tensor.name
    if options.names is None or not v4:
        return _unpacked(part.tensor, part.official)
    return hugging_face_name(part.official) if options.names == "hf" else part.official


def _groups(parts: Iterable[Part], options: Options, v4: bool) -> Iterator[tuple[str, list[Part]]]:
    """(name in the result, parts) of each weight; a stack stands where its first part was found."""
    stacks: dict[str, dict[tuple[int, int], Part]] = {}
    order: list[tuple[str, Part | None]] = []
    for part in parts:
        stacked = stack_of(part.official) if v4 else None
        if options.names == "hf" and stacked is not None:
            name, place = stacked
        elif is_stack(part.tensor.name) and (options.names is None or part.row is None):
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
    """Of a tensor that holds all parts, each of this shape; of a matrix of its own, that."""
    if not is_stack(name):
        return matrix
    per_expert = 2 if "gate_up_proj" in name else 1
    return (len(parts) // per_expert, matrix[0] * per_expert, *matrix[1:])


def _check_alike(name: str, parts: list[Part], options: Options) -> None:
    """Refuses a stack of parts that differ in format, in the type of their scales, or in what is wanted of them.

    Raises:
      InputError: naming two of them.
    """

    def kind(part: Part) -> tuple[object, ...]:
        return part.element, part.block, part.scales and part.scales.dtype, options.wants(part.name)

    for part in parts:
        if kind(part) != kind(parts[0]):
            raise InputError(
                f"tensor {name}: expected experts of one format, found {parts[0].name} and {part.name} apart"
            )


def _job(name: str, parts: list[Part], options: Options, v4: bool, carried: Files | None) -> Job:
    first = parts[0]
    _check_alike(name, parts, options)
    encoding = options.target.encoding(first.storage, v4) if options.wants(first.name) else None
    if len(first.shape) != 2:
        encoding = None
    if first.row is not None and encoding is not None and first.source.same(encoding):
        encoding = None
    if len(first.shape) == 2 and is_stack(name) and "gate_up_proj" in name:
        block, n = (encoding or first.source).block[0], first.shape[0]
        if n % block:
            flag, way = ("--names hf", "") if options.names == "hf" else (f"--to {options.target.name}", _APART)
            raise InputError(
                f"{flag}: tensor {name}: expected a width that is a multiple of {block}, found {n}: "
                f"no block may hold rows of gate and of up{way}"
            )
    scale = scale_name(name, v4)
    if first.scales is not None and options.names is None and (encoding is None or not first.source.integers):
        scale = first.scales.name
    if encoding is None:
        shape = _stack_shape(name, parts, first.tensor.shape)
        if first.scales is None:
            return Job(tuple(parts), None, Spec(name, first.tensor.dtype, shape))
        code_name = first.tensor.name
        if options.names is not None:
            code_name, scale = tensor_names(first.source, options.target, name, scale)
        codes = Spec(code_name, first.tensor.dtype, shape)
        old_scales = _scales_spec(scale, name, parts, first.scales.dtype, first.scales.shape)
        return Job(tuple(parts), None, codes, old_scales, _shape_spec(code_name, first.source))
    n, k = first.shape
    if encoding.element == "e2m1" and k % 2:
        raise InputError(f"--to {options.target.name}: tensor {name}: expected an even width for FP4, found {[n, k]}")
    code_name, new_scale = tensor_names(encoding, options.target, name, scale)
    codes = Spec(code_name, encoding.codes[0], _stack_shape(name, parts, encoding.codes_shape((n, k))))
    scales = kept = None
    if encoding.scales:
        scales = _scales_spec(new_scale, name, parts, encoding.scale_dtype, encoding.grid((n, k)))
    origin = _carried_tensor(first, carried)
    if len({(o.dtype, o.shape) if (o := _carried_tensor(part, carried)) else None for part in parts}) > 1:
        origin = None  # which no stack can hold
    if origin is not None and (encoding.scales is None or (first.element == "e2m1" and encoding.element == "e4m3")):
        kept = Spec(name, origin.dtype, _stack_shape(name, parts, origin.shape))
    return Job(tuple(parts), encoding, codes, scales, _shape_spec(code_name, encoding), kept)


def _shape_spec(codes: str, encoding: Encoding) -> Spec | None:
    """Of N and K, which packed codes do not say."""
    return Spec(shape_name(codes), DTYPES["I64"], (2,)) if encoding.element == "int4" else None


def _scales_spec(scale: str, name: str, parts: list[Part], dtype: np.dtype, grid: tuple[int, ...]) -> Spec:
    return Spec(scale, dtype, _stack_shape(name, parts, grid))


def _carried_tensor(part: Part, carried: Files | None) -> Tensor | None:
    """The scales that a matrix first came with: what is carried beside it, else its own; those of integers stay."""
    if part.storage not in (LINEAR, EXPERT) or part.source.integers:
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
    named = rename(official(files) if v4 else files, config)
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
    parts = [part for job in plan.jobs for part in job.parts if options.target.encoding(part.storage, v4) is not None]
    if options.only is not None and not any(options.wants(part.name) for part in parts):
        raise InputError(
            f"--only {options.only}: expected a pattern of some weights' names that --to {options.target.name} "
            "converts, found none that match"
        )
    return plan
