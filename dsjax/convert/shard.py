"""One shard of a result: its tensors read, converted and written, piece by piece, on a few threads."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dsjax.checkpoint.agreement import check_values
from dsjax.checkpoint.resident import Source
from dsjax.checkpoint.safetensors import Files, Tensor
from dsjax.config import Config
from dsjax.convert.errors import Errors, squares
from dsjax.convert.hashing import SourceHashes
from dsjax.convert.matrix import STRIP, Origin, convert_strip
from dsjax.convert.output import Output
from dsjax.convert.plan import Job, Part, Plan
from dsjax.convert.targets import Encoding
from dsjax.errors import InputError

_TASK_VALUES = 1 << 22
_TASK_BYTES = 1 << 23

_E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)

Wrote = Callable[[int], None]
"""Is told how many bytes have been written."""


class Memory(threading.local):
    """Arrays that are used again and again: the system takes longer to find new memory than a conversion does."""

    def __init__(self) -> None:
        self._buffers: dict[str, np.ndarray] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array of this thread's, until the next one of the same name."""
        nbytes = math.prod(shape) * dtype.itemsize
        if name not in self._buffers or self._buffers[name].size < nbytes:
            self._buffers[name] = np.empty(nbytes, np.uint8)
        return self._buffers[name][:nbytes].view(dtype).reshape(shape)


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A matrix of the source that can be decoded strip by strip; what it reads it also checks.

    Attributes:
      files: under the table's names.
      config: of the source.
      part: which matrix.
    """

    files: Files
    config: Config
    part: Part

    def _rows(self, tensor: Tensor, name: str, what: str, rows: slice, memory: Memory) -> np.ndarray:
        out = memory.array(what, (rows.stop - rows.start, *tensor.shape[1:]), tensor.dtype)
        self.files.read_into(name, out, rows.start * (tensor.nbytes // max(tensor.shape[0], 1)))
        assert self.part.row is not None
        check_values(self.files, self.config, self.part.row, what, name, out)
        return out

    def read(self, rows: slice, memory: Memory | None = None) -> Source:
        """Rows that begin with a block and end with one or with the matrix.

        Args:
          rows: which.
          memory: that the result may lie in until the next call.

        Raises:
          InputError: for NaN or infinity, naming the tensor.
        """
        part, memory = self.part, memory or Memory()
        elements = self._rows(part.tensor, part.official, "codes", rows, memory)
        if part.scales is None:
            return Source(elements, None, (1, 0))
        assert part.row is not None
        bn, bk = part.source.block
        blocks = slice(rows.start // bn, -(-rows.stop // bn))
        scales = self._rows(part.scales, part.row.scale_name(part.official), "scales", blocks, memory)
        scales = scales.view(_E8M0) if scales.dtype == np.uint8 else scales
        packed = part.element in ("e2m1", "int4")
        if packed:
            elements = elements.view(np.uint8)
        width = part.shape[1]
        return Source(elements, scales, (bn, bk or width), packed, part.source.integers, width)


def _strip(source: Source, rows: slice) -> Source:
    """Some of the rows of a source, which begin with a block."""
    bn = source.block[0]
    scales = None if source.scales is None else source.scales[rows.start // bn : -(-rows.stop // bn)]
    return dataclasses.replace(source, elements=source.elements[rows], scales=scales)


def measured(matrix: Matrix, errors: Errors) -> Errors:
    """Errors with the norm of the whole matrix, of which exact parts were not measured while nothing asked for it."""
    if not errors.exact and errors.unmeasured:
        total = 0.0
        for rows in strips(matrix.part):
            values = matrix.read(rows).values(slice(0, rows.stop - rows.start), slice(0, matrix.part.shape[1]))
            total += squares(values)
        errors.norm_squares, errors.unmeasured = total, 0
    return errors


def strips(part: Part) -> Iterator[slice]:
    """Rows of a matrix that are converted together."""
    n, _ = part.shape
    for start in range(0, n, STRIP):
        yield slice(start, min(start + STRIP, n))


def _old_scales(plan: Plan, part: Part, encoding: Encoding, rows: slice) -> np.ndarray | None:
    """float32 scales that the values of some rows came from, in the grid of the target's blocks; None: none fit."""
    if encoding.element not in ("e4m3", "e2m1"):
        return None
    origin = plan.old_scales(part, encoding.grid((part.shape[0], part.shape[1])))
    if origin is None:
        return None
    bn = encoding.block[0]
    first, last = rows.start // bn, -(-rows.stop // bn)
    return _read_scales(plan, part, origin, first, last).astype(np.float32)


def _read_scales(plan: Plan, part: Part, origin: Tensor, first: int, last: int) -> np.ndarray:
    out = np.empty((last - first, *origin.shape[1:]), origin.dtype)
    start = first * (origin.nbytes // max(origin.shape[0], 1))
    if origin is part.scales:
        assert part.row is not None
        plan.files.read_into(part.row.scale_name(part.official), out, start)
    else:
        assert plan.carried is not None
        plan.carried.read_into(part.official, out, start)
    return out.view(_E8M0) if out.dtype == np.uint8 else out


@dataclasses.dataclass(frozen=True)
class _Task:
    job: int
    part: int
    start: int  # row of a matrix, byte of what is kept
    stop: int


def _tasks(jobs: tuple[Job, ...]) -> Iterator[_Task]:
    for i, job in enumerate(jobs):
        for j, part in enumerate(job.parts):
            if job.encoding is None:
                size = part.tensor.nbytes
                step = _TASK_BYTES
            else:
                size, width = part.shape
                step = max(STRIP, _TASK_VALUES // max(width, 1) // STRIP * STRIP)
            for start in range(0, size, step):
                yield _Task(i, j, start, min(start + step, size))


class ShardWriter:
    """Converts the jobs of one shard."""

    def __init__(
        self, plan: Plan, config: Config, jobs: tuple[Job, ...], wrote: Wrote, sources: SourceHashes | None = None
    ) -> None:
        self._plan, self._config, self._jobs, self._wrote = plan, config, jobs, wrote
        self._sources = sources or SourceHashes()
        self._memory = Memory()

    def write(self, descriptor: int, path: Path, threads: int) -> tuple[list[list[Errors]], dict[str, Any]]:
        """Fills a file; returns the errors of each part of each job, and what `hash_file` would say of the file.

        Raises:
          InputError: naming the tensor that is bad, or could not be written.
        """
        found: list[list[list[tuple[int, Errors]]]] = [[[] for _ in job.parts] for job in self._jobs]
        with Output(descriptor, path, [spec for job in self._jobs for spec in job.specs]) as file:
            pool = ThreadPoolExecutor(threads)
            try:
                running = {pool.submit(self._run, file, task): task for task in _tasks(self._jobs)}
                for future in as_completed(running):
                    task = running.pop(future)
                    found[task.job][task.part].append((task.start, future.result()))
            finally:
                pool.shutdown(cancel_futures=True)
            hashed = file.hashed()
        return [
            [self._measured(part, _joined(errors)) for part, errors in zip(job.parts, row, strict=True)]
            for job, row in zip(self._jobs, found, strict=True)
        ], hashed

    def _measured(self, part: Part, errors: Errors) -> Errors:
        return measured(Matrix(self._plan.files, self._config, part), errors)

    def _rest(self, file: Output, job: Job, place: int) -> int:
        """What of a part no matrix makes: the shape of INT4 codes, the scales of what is kept."""
        part, written = job.parts[place], 0
        if job.shape is not None and place == 0:
            written += file.put(job.shape, 0, np.array(part.shape, np.int64))
        if job.encoding is None and job.scales is not None:
            assert part.scales is not None and part.row is not None
            raw = np.empty(part.scales.nbytes, np.uint8)
            name = part.row.scale_name(part.official)
            self._plan.files.read_into(name, raw)
            check_values(self._plan.files, self._config, part.row, "scales", name, raw)
            written += file.put(job.scales, place * raw.size, raw)
        return written

    def carried(self, descriptor: int, path: Path) -> dict[str, Any]:
        """Fills the file of the scales that these jobs leave behind; returns what `hash_file` would say of it."""
        jobs = [job for job in self._jobs if job.carried is not None]
        with Output(descriptor, path, [job.carried for job in jobs if job.carried is not None]) as file:
            for job in jobs:
                start = 0
                for part in job.parts:
                    origin = self._plan.carried_scales(part)
                    assert origin is not None and job.carried is not None
                    scales = _read_scales(self._plan, part, origin, 0, origin.shape[0])
                    start += file.put(job.carried, start, scales)
            return {**file.hashed(), "tensors": {}}

    def _run(self, file: Output, task: _Task) -> Errors:
        job = self._jobs[task.job]
        part = job.parts[task.part]
        if task.start == 0:
            self._wrote(self._rest(file, job, task.part))
        if job.encoding is None:
            return self._keep(file, job, task, part)
        try:
            return self._convert(file, job, job.encoding, task, part)
        except ValueError as e:
            if isinstance(e, InputError):
                raise
            raise InputError(f"{part.tensor.path}: tensor {part.name}: expected finite values, found {e}") from None

    def _keep(self, file: Output, job: Job, task: _Task, part: Part) -> Errors:
        raw = self._memory.array("codes", (task.stop - task.start,), np.dtype(np.uint8))
        self._plan.files.read_into(part.official, raw, task.start)
        self._sources.put(part.tensor, task.start, raw)
        if part.row is not None:
            check_values(self._plan.files, self._config, part.row, "codes", part.official, raw)
        self._wrote(file.put(job.codes, task.part * part.tensor.nbytes + task.start, raw))
        return Errors()

    def _convert(self, file: Output, job: Job, encoding: Encoding, task: _Task, part: Part) -> Errors:
        whole = slice(task.start, task.stop)
        source = Matrix(self._plan.files, self._config, part).read(whole, self._memory)
        self._sources.put(part.tensor, task.start * (part.tensor.nbytes // part.shape[0]), source.elements)
        shape = (part.shape[0], part.shape[1])
        n, width = encoding.codes_shape(shape)
        codes = self._memory.array("new codes", (task.stop - task.start, width), encoding.codes[0])
        old = _old_scales(self._plan, part, encoding, whole)
        scales, total = [], Errors()
        for start in range(0, len(codes), STRIP):
            rows = slice(start, min(start + STRIP, len(codes)))
            bn = encoding.block[0]
            mine = None if old is None else old[rows.start // bn : -(-rows.stop // bn)]
            strip = convert_strip(_strip(source, rows), Origin(part.element, mine), encoding, codes[rows])
            if strip.scales is not None:
                scales.append(strip.scales)
            total.add(strip.errors)
        written = file.put(job.codes, (task.part * n + task.start) * width * codes.dtype.itemsize, codes)
        if job.scales is not None:
            blocks, per_row = encoding.grid(shape)
            first = task.part * blocks + task.start // encoding.block[0]
            array = np.concatenate(scales)
            written += file.put(job.scales, first * per_row * array.dtype.itemsize, array)
        self._wrote(written)
        return total


def _joined(found: list[tuple[int, Errors]]) -> Errors:
    """In the order of rows, whatever threads came first: sums are then the same to the bit."""
    total = Errors()
    for _, errors in sorted(found, key=lambda item: item[0]):
        total.add(errors)
    return total
