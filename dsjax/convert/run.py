"""A conversion from beginning to end: planned, shared out, resumed, put in its place, certified."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dsjax.checkpoint.orbax import COPIED, COPIED_FOLDER, is_converted
from dsjax.checkpoint.safetensors import INDEX_FILE, Files, Tensor, os_errors
from dsjax.checkpoint.safetensors_writer import Spec
from dsjax.config import V4Config, load_config, parse_config, read_json_object
from dsjax.convert.certificate import CERTIFICATE, certificate, entry, options_of, part_bytes
from dsjax.convert.config import FLOATS, INTEGERS, check_described, rewritten
from dsjax.convert.errors import Errors
from dsjax.convert.hashing import SourceHashes, hash_file
from dsjax.convert.plan import CARRIED, Job, Options, Plan, make_plan
from dsjax.convert.shard import ShardWriter
from dsjax.convert.workspace import Growing, Workspace
from dsjax.errors import InputError
from dsjax.files import check_space
from dsjax.params import EXPERT, LINEAR
from dsjax.params import Path as Path_

SHARD_BYTES = 5_000_000_000

CONVERTER = 2
"""Raised when the same source and options give other shards or records than before: a run then goes on from none."""


@dataclasses.dataclass(frozen=True)
class Share:
    """Which of several processes this is, and how many threads convert."""

    index: int = 0
    count: int = 1
    threads: int = min(8, os.cpu_count() or 1)

    def mine(self, number: int) -> bool:
        return number % self.count == self.index


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run has done.

    Attributes:
      finished: whether the result is complete; else other processes have shards to do.
      bytes: written by this run.
      seconds: of this run.
      certificate: of a complete result.
    """

    finished: bool
    bytes: int
    seconds: float
    certificate: dict[str, Any] | None


def check_places(source: Path, out: Path) -> None:
    """Refuses to write into the source, or around it.

    Raises:
      InputError: naming both.
    """
    a, b = source.resolve(), out.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise InputError(f"--out {out}: expected a folder apart from the source {source}, found one inside the other")


def check_out(out: Path, force: bool) -> None:
    """Refuses a folder with something in it, unless it is a result that may be replaced.

    Raises:
      InputError: saying which.
    """
    if not os.path.lexists(out):
        return
    if not out.is_dir() or out.is_symlink():
        raise InputError(f"--out {out}: expected a folder, found something else")
    if not any(out.iterdir()):
        return
    if not (out / CERTIFICATE).is_file():
        raise InputError(f"--out {out}: expected no such folder, an empty one or a result, found something else in it")
    if not force:
        raise InputError(f"--out {out}: expected no finished result there (--force replaces it), found one")


def _source_files(files: Files, carried: Files | None) -> list[Path]:
    """All that hold tensors; those that the source carries along last."""
    return [p for each in (files, carried) if each is not None for p in sorted({t.path for t in each.values()})]


def _identity(plan: Plan, source: Files, options: Options, shard_bytes: int) -> dict[str, Any]:
    """What must be the same for a run to go on from another: options, and the source as far as a look tells."""
    found, headers = [], hashlib.sha256()
    for path in [source.folder / "config.json", *_source_files(source, plan.carried)]:
        stat = path.stat()
        found.append([path.relative_to(source.folder).as_posix(), stat.st_size, stat.st_mtime_ns])
    for files in (source, plan.carried):
        for name, tensor in sorted(files.items() if files is not None else ()):
            headers.update(repr((name, tensor.path.name, tensor.dtype.name, tensor.shape, tensor.offset)).encode())
        headers.update(b"\n")
    same = {"shard_bytes": shard_bytes, "source": found, "headers": headers.hexdigest(), "converter": CONVERTER}
    return {**options_of(options), **same}


def _check_stacks(plan: Plan, options: Options) -> None:
    """Refuses formats that differ among the layers and experts that a model here holds as one array; floats may.

    And integers for one of gate and up alone.

    Raises:
      InputError: naming the flag and two tensors.
    """
    seen: dict[Path_, tuple[str, str]] = {}
    for job in plan.jobs:
        for part in job.parts:
            if part.row is None or part.storage not in (LINEAR, EXPERT):
                continue
            element = job.encoding.element if job.encoding else part.element
            first, name = seen.setdefault(part.row.path, (element, part.name))
            if element != first and not {element, first} <= FLOATS:
                raise InputError(
                    f"--only {options.only}: expected layers and experts to stay alike, "
                    f"found {name} in {first}, {part.name} in {element}"
                )
    for path, (element, name) in seen.items():
        other, up = seen.get((*path[:-1], "up"), (element, name))
        if path[-1] == "gate" and other != element and {element, other} & INTEGERS:
            raise InputError(
                f"--only {options.only}: expected gate and up, which take the same activations, to stay alike, "
                f"found {name} in {element}, {up} in {other}"
            )


def _check_source(source: Path) -> None:
    """Refuses what cannot be converted from.

    Raises:
      InputError: saying what it is.
    """
    if is_converted(source):
        raise InputError(f"{source}: expected a checkpoint in safetensors, found an Orbax folder")


class _Conversion:
    """One process's part."""

    def __init__(
        self, source: Path, out: Path, options: Options, share: Share, shard_bytes: int, progress: bool
    ) -> None:
        _check_source(source)
        self._config = load_config(source)
        self._files = Files.open(source)
        self._options, self._share, self._progress = options, share, progress
        self._plan = make_plan(self._files, self._config, options, shard_bytes)
        v4 = isinstance(self._config, V4Config)
        self._config_json = rewritten(read_json_object(source / "config.json"), self._plan, options.target, v4=v4)
        _check_stacks(self._plan, options)
        check_described(parse_config(self._config_json, str(out / "config.json")), self._plan)
        self._sources = _source_files(self._files, self._plan.carried)
        with os_errors(source):
            self._identity = _identity(self._plan, self._files, options, shard_bytes)
        self._shard_bytes = shard_bytes
        self._space = Workspace(out)
        self._source = source
        self._written = 0
        self._counting = threading.Lock()

    def run(self, force: bool) -> Outcome:
        start = time.perf_counter()
        space = self._space
        try:
            if not space.begin(self._identity, lambda: check_out(space.out, force), force=force):
                self._work()
                if not self._all_done():
                    return Outcome(False, self._written, time.perf_counter() - start, None)
            space.finish(self._complete, force=force)
        finally:
            space.end()
        made = read_json_object(space.out / CERTIFICATE)
        return Outcome(True, self._written, time.perf_counter() - start, made)

    # --- shards ---

    def _work(self) -> None:
        mine = [i for i in range(len(self._plan.shards)) if self._share.mine(i)]
        todo = [i for i in mine if self._finished(i) is None]
        needed = sum(job.nbytes for i in todo for job in self._plan.shards[i])
        left_over = sum(self._space.left_over(self._space.result / self._plan.shard_name(i)) for i in todo)
        check_space(self._space.folder, needed - left_over)
        bar = tqdm(total=needed, unit="B", unit_scale=True, desc=self._options.target.name, disable=not self._progress)
        with self._begin_sources(todo) as sources, bar, ThreadPoolExecutor(1) as finisher:
            pending: Future[None] | None = None
            growing: Growing | None = None
            try:
                for i in todo:
                    if self._finished(i) is not None:  # by another process, meanwhile
                        continue
                    growing = self._space.grow(self._space.result / self._plan.shard_name(i))
                    carrying = finisher.submit(self._carry, i)
                    errors, hashed = self._convert(i, growing, bar, sources)
                    hashes = {growing.path.name: hashed, **carrying.result()}
                    if pending is not None:
                        pending.result()
                    pending = finisher.submit(self._record, i, errors, hashes, growing)
                    growing = None
                    self._put_sources(sources)
                if pending is not None:
                    pending.result()
                self._put_sources(sources, complete=False)
            except BaseException:
                if growing is not None:
                    growing.discard()
                raise

    def _finished(self, i: int) -> dict[str, Any] | None:
        """The record of a shard that is there with the size that it says; else None."""
        record = self._space.record(_shard_record(i))
        if record is None:
            return None
        for name, file in record["files"].items():
            path = self._space.result / name
            if not path.is_file() or path.stat().st_size != file["bytes"]:
                return None
        return record

    def _convert(
        self, i: int, growing: Growing, bar: Any, sources: SourceHashes
    ) -> tuple[list[list[Errors]], dict[str, Any]]:
        """Writes a shard."""

        def wrote(count: int) -> None:
            with self._counting:
                self._written += count
                bar.update(count)

        writer = ShardWriter(self._plan, self._config, self._plan.shards[i], wrote, sources)
        return writer.write(growing.descriptor, growing.path, self._share.threads)

    def _carry(self, i: int) -> dict[str, dict[str, Any]]:
        """Writes, whole, the scales that a shard leaves behind, if any; returns the file's hashes by its name."""
        jobs, space, name = self._plan.shards[i], self._space, self._plan.shard_name(i)
        if not any(job.carried for job in jobs):
            return {}
        found: dict[str, Any] = {}

        def fill(descriptor: int, path: Path) -> None:
            found.update(ShardWriter(self._plan, self._config, jobs, lambda _: None).carried(descriptor, path))

        space.put_file(space.result / CARRIED / name, fill)
        return {f"{CARRIED}/{name}": found}

    def _record(self, i: int, errors: list[list[Errors]], hashes: dict[str, dict[str, Any]], growing: Growing) -> None:
        """Waits for the disk, and notes that the shard is finished; the next is made meanwhile."""
        growing.commit()
        entries = {
            part.name: [entry(job, part, found), part_bytes(job, part)]
            for job, row in zip(self._plan.shards[i], errors, strict=True)
            for part, found in zip(job.parts, row, strict=True)
        }
        self._space.put_record(_shard_record(i), {"files": hashes, "entries": entries})

    def _begin_sources(self, todo: list[int]) -> SourceHashes:
        """Hashes of the source's files that are this process's and not known yet, to be made while they are read."""
        inside: dict[Path, list[Tensor]] = {path: [] for path in self._sources}
        coming: dict[Path, list[Tensor]] = {path: [] for path in self._sources}
        for tensor in self._files.values():
            inside[tensor.path].append(tensor)
        for job in (job for i in todo for job in self._plan.shards[i]):
            for part in job.parts:
                coming[part.tensor.path].append(part.tensor)
        sources = SourceHashes()
        for i, path in enumerate(self._sources):
            if self._share.mine(i) and self._space.record(_source_record(i)) is None:
                sources.add(path, inside[path], coming[path])
        return sources

    def _put_sources(self, sources: SourceHashes, *, complete: bool = True) -> None:
        """Notes the hashes of files that are complete, or completes all, of which other processes have read a part."""

        def note(i: int, path: Path) -> None:
            if (found := sources.take(path, complete=complete)) is not None:
                self._space.put_record(_source_record(i), {path.relative_to(self._files.folder).as_posix(): found})

        with ThreadPoolExecutor(self._share.threads) as pool:
            list(pool.map(note, range(len(self._sources)), self._sources))

    def _all_done(self) -> bool:
        records = [_shard_record(i) for i in range(len(self._plan.shards))]
        records += [_source_record(i) for i in range(len(self._sources))]
        return all((self._space.state / name).exists() for name in records) or not self._space.folder.exists()

    # --- the rest ---

    def _complete(self) -> None:
        space, plan = self._space, self._plan
        now = _identity(plan, self._files, self._options, self._shard_bytes)
        for before, after in zip(self._identity["source"], now["source"], strict=True):
            if before != after:
                path = self._files.folder / before[0]
                raise InputError(f"{path}: expected the same file from beginning to end, found it changed meanwhile")
        hashed: dict[str, dict[str, Any]] = {}
        entries: dict[str, Any] = {}
        for i in range(len(plan.shards)):
            record = self._finished(i)
            if record is None:
                raise InputError(
                    f"{space.result / plan.shard_name(i)}: expected the bytes that its record counts, "
                    "found others (the next run makes them again)"
                )
            hashed |= record["files"]
            entries |= {name: (one, tuple(sizes)) for name, (one, sizes) in record["entries"].items()}
        sources: dict[str, dict[str, Any]] = {}
        for i in range(len(self._sources)):
            sources |= space.record(_source_record(i)) or {}
        small = [INDEX_FILE, "config.json"]
        _put_index(space, space.result, plan, lambda job: job.specs)
        if any(job.carried for job in plan.jobs):
            _put_index(space, space.result / CARRIED, plan, lambda job: (job.carried,) if job.carried else ())
            small.append(f"{CARRIED}/{INDEX_FILE}")
        space.put_json(space.result / "config.json", self._config_json, indent=2)
        for name in _copied(self._source):
            space.put_copy(self._source / name, space.result / name)
            small.append(name)
        for name in small:
            hashed[name] = hash_file(space.result / name)
        made = certificate(self._options, sources, hashed, entries)
        space.put_json(space.result / CERTIFICATE, made, indent=1)


def _shard_record(i: int) -> str:
    return f"shard-{i:06d}.json"


def _source_record(i: int) -> str:
    return f"source-{i:06d}.json"


def _put_index(space: Workspace, folder: Path, plan: Plan, specs: Callable[[Job], tuple[Spec, ...]]) -> None:
    weight_map: dict[str, str] = {}
    total = 0
    for i, jobs in enumerate(plan.shards):
        for job in jobs:
            for spec in specs(job):
                weight_map[spec.name] = plan.shard_name(i)
                total += spec.nbytes
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    space.put_json(folder / INDEX_FILE, index, indent=2)


def _copied(source: Path) -> list[str]:
    """Small files that belong to the model whatever its weights are, config.json apart."""
    inside = [f"{COPIED_FOLDER}/{path.name}" for path in sorted((source / COPIED_FOLDER).glob("*")) if path.is_file()]
    return [name for name in (*COPIED, *inside) if name != "config.json" and (source / name).is_file()]


def convert(
    source: Path,
    out: Path,
    options: Options,
    *,
    share: Share | None = None,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
    progress: bool = False,
) -> Outcome:
    """Converts a checkpoint folder into another, or goes on where a run before has stopped.

    Args:
      source: a checkpoint folder; it is not touched.
      out: the result; it appears when it is whole.
      options: format, names, and which tensors.
      share: of several processes that work on the same result and need not know each other.
      shard_bytes: largest shard, unless one weight is larger.
      force: replace a finished result, throw away an unfinished one of something else.
      progress: a bar on standard error.

    Raises:
      InputError: for a source that is damaged or cannot become this, or a place that cannot be written. Finished
        shards stay for the next run.
    """
    check_places(source, out)
    return _Conversion(source, out, options, share or Share(), shard_bytes, progress).run(force)
