"""Bytes on disk -> arrays on devices, in their stored format or another, a bounded region at a time.

A stack of all layers' experts is hundreds of gigabytes, so no leaf is ever assembled beside the device. Each part of an
array that devices of this process hold is allocated once and filled region by region (`placing`, `reading`); a region
holds at most STAGING_BYTES, or one matrix row where a row is larger than that. What other processes' devices hold is
not read.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path as FilePath
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from tqdm import tqdm

from dsjax.checkpoint import orbax
from dsjax.checkpoint.agreement import agree, check_copies, has_block_draft
from dsjax.checkpoint.manifest import leaf_parts, stored_as
from dsjax.checkpoint.names import open_files
from dsjax.checkpoint.placing import DevicePart, HostPart, Region, extents, local_parts, split_region, undivided
from dsjax.checkpoint.reading import Reader
from dsjax.checkpoint.resident import Narrowed
from dsjax.config import Config, Quantization, V4Config, load_config
from dsjax.errors import InputError
from dsjax.numerics import INT8_ACTIVATIONS
from dsjax.params import (
    FP8_BLOCK,
    Path,
    Row,
    Stored,
    Tree,
    abstract_leaf,
    build_tree,
    is_mtp,
    resident,
    table,
    tree_bytes,
)
from quant import WHOLE, QArray

FOUND = Quantization(FP8_BLOCK, "ue8m0")
"""How quantised files are read whose config.json says nothing of it."""

STAGING_BYTES = 64 << 20

ArraySharding = Callable[[Row, str], Sharding]
"""Where a leaf's "codes" or "scales" go."""

Cut = Callable[[Row, Stored], Stored]
"""How a row is held, its scale blocks made finer where a device's part would cut one (`parallel.Parallel.cut`)."""


def _uncut(row: Row, held: Stored) -> Stored:
    return held


@dataclasses.dataclass
class LoadStats:
    """What a load did in this process.

    Attributes:
      bytes: put on devices.
      peak_staging_bytes: the most that was staged on the host at once.
      regions: staged.
      read_bytes: taken from files: codes and scales, and once more what new scales were computed from.
      needed_bytes: what must be, for this process's devices, each part of an array once. Both count its share of
        comparing an MTP module's copies.
      narrowed: of what became float16, values that lost more than a rounding.
    """

    bytes: int = 0
    peak_staging_bytes: int = 0
    regions: int = 0
    read_bytes: int = 0
    needed_bytes: int = 0
    narrowed: Narrowed = dataclasses.field(default_factory=Narrowed)

    def staged(self, nbytes: int) -> None:
        """Counts one region that passed through host memory on its way to a device."""
        self.regions += 1
        self.peak_staging_bytes = max(self.peak_staging_bytes, nbytes)


def leaf_arrays(row: Row, config: Config, stored: Stored) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaf's arrays by name, held as `stored` says: "codes", and "scales" where it has them."""
    return leaf_parts(abstract_leaf(row, config, stored))


def load_plan(config: Config, stored: dict[Path, Stored], *, mtp: bool = False, weights: str = "stored") -> LoadStats:
    """The regions a one-device load would stage, from shapes alone; proves the bound at any model size."""
    stats = LoadStats()
    for row in table(config):
        if row.copy_of is None and (mtp or not is_mtp(row)):
            for array in leaf_arrays(row, config, resident(row, stored[row.path], weights)).values():
                whole = tuple((0, n) for n in array.shape)
                for region in split_region(whole, array.dtype.itemsize, STAGING_BYTES):
                    nbytes = math.prod(extents(region)) * array.dtype.itemsize
                    stats.staged(nbytes)
                    stats.bytes += nbytes
    return stats


class _Loader:
    def __init__(
        self,
        reader: Reader,
        config: Config,
        held: Mapping[Path, Stored],
        where: ArraySharding,
        stats: LoadStats,
        in_place: bool,
    ) -> None:
        self.reader = reader
        self.config = config
        self.held = held
        self.where = where
        self.stats = stats
        self.in_place = in_place

    def arrays(self, row: Row) -> Iterator[tuple[str, jax.ShapeDtypeStruct, Sharding]]:
        """A leaf's arrays: name, shape and type, and where it goes."""
        held = self.held[row.path]
        for part, spec in leaf_arrays(row, self.config, held).items():
            where = self.where(row, part)
            if part == "scales" and held.block[1] == WHOLE:  # for every device that holds a part of the row
                where = undivided(where, len(spec.shape), -1)
            yield part, spec, where

    def local_bytes(self, rows: Iterable[Row]) -> int:
        """Bytes that this process's devices will hold; counts what must be read for them."""
        total = 0
        for row in rows:
            for part, spec, where in self.arrays(row):
                for bounds, devices in local_parts(where, spec.shape).items():
                    total += math.prod(extents(bounds)) * spec.dtype.itemsize * len(devices)
                    self.stats.needed_bytes += self.reader.needed(row, part, bounds)
        return total

    def array(self, row: Row, part: str, spec: jax.ShapeDtypeStruct, where: Sharding, progress: tqdm[Any]) -> jax.Array:
        """One array of a leaf.

        Its parts are filled side by side, a region of each in turn: where they are columns of the same rows, the disk's
        pages are still in memory for the next.
        """
        dtype = np.dtype(spec.dtype)
        parts: list[tuple[Region, int, HostPart | DevicePart]] = []
        for bounds, devices in local_parts(where, spec.shape).items():
            on_host = self.in_place and all(d.platform == "cpu" for d in devices)
            parts.append((bounds, len(devices), (HostPart if on_host else DevicePart)(bounds, dtype, devices)))

        def read(region: Region, out: np.ndarray) -> None:
            self.stats.read_bytes += self.reader.fill(row, part, region, out)

        turns = zip_longest(*(split_region(bounds, dtype.itemsize, STAGING_BYTES) for bounds, _, _ in parts))
        for turn in turns:
            for region, (_, copies, target) in zip(turn, parts, strict=True):
                if region is not None:
                    if staged := target.fill(region, read):
                        self.stats.staged(staged)
                    nbytes = math.prod(extents(region)) * dtype.itemsize * copies
                    self.stats.bytes += nbytes
                    progress.update(nbytes)
        shards = [array for _, _, target in parts for array in target.arrays()]
        return jax.make_array_from_single_device_arrays(spec.shape, where, shards)

    def leaf(self, row: Row, progress: tqdm[Any]) -> Any:
        built = {part: self.array(row, part, spec, where, progress) for part, spec, where in self.arrays(row)}
        self.reader.end_leaf()
        template = abstract_leaf(row, self.config, self.held[row.path])
        if isinstance(template, QArray):
            return dataclasses.replace(template, codes=built["codes"], scales=built.get("scales"))
        return built["codes"]


def _wants_mtp(folder: FilePath, config: Config, mtp: bool | None, found: bool, instead: str = "none") -> bool:
    if mtp and not found:
        where = "mtp.0" if isinstance(config, V4Config) else f"layer {config.num_hidden_layers}"
        raise InputError(f"{folder}: expected an MTP module ({where}), found {instead}")
    return found if mtp is None else mtp


def _holds(folder: FilePath, config: Config, weights: str) -> bool:
    """Whether a converted folder's leaves are what these weights are held as."""
    leaves = orbax.Converted(folder, config).leaves
    rows = ((row, stored_as(leaves[row.path])) for row in table(config) if row.path in leaves)
    return all(resident(row, stored, weights) == stored for row, stored in rows)


def _load_converted(
    folder: FilePath, config: Config, mtp: bool | None, where: ArraySharding, cut: Cut, progress: bool, in_place: bool
) -> tuple[Config, Tree, LoadStats]:
    """`load` of a converted folder; Orbax reads, so a leaf's parts for this host's devices are staged together."""
    converted, stats = orbax.Converted(folder, config), LoadStats()
    mtp = _wants_mtp(folder, config, mtp, converted.has_mtp)
    total = tree_bytes([converted.leaves[row.path] for row in converted.rows(mtp=mtp)])
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=not progress) as bar:

        def seen(leaf: Any) -> None:
            local = sum(s.data.nbytes for a in leaf_parts(leaf).values() for s in a.addressable_shards)
            stats.bytes += local
            stats.staged(local)
            bar.update(local)

        before = orbax.bytes_read()
        tree = converted.load(where, seen, mtp=mtp, cut=cut, in_place=in_place)
        stats.read_bytes, stats.needed_bytes = orbax.bytes_read() - before, converted.needed_bytes
    return config, tree, stats


def load(
    folder: FilePath | str,
    *,
    mtp: bool | None = False,
    weights: str = "stored",
    sharding: Sharding | ArraySharding | None = None,
    cut: Cut = _uncut,
    progress: bool = False,
    in_place: bool = True,
) -> tuple[Config, Tree, LoadStats]:
    """Loads a checkpoint folder.

    Args:
      folder: with config.json and safetensors files as DeepSeek publishes them; or a converted one, see `orbax`.
      mtp: load the MTP module too; None where there is one.
      weights: what matrices are held as, one of `params.WEIGHTS`: "stored" touches no byte of them; "float32" and
        "bfloat16" are their values, rounded once, and so is "float16", which holds none above 65504; "int8" has one
        float32 scale per row and leaves embedding and router as stored; "fp8" has one per 128 x 128 block, of the
        matrices that DeepSeek quantises; "w8a8" and "w4a8" see `params.resident`.
      sharding: where arrays go: one sharding for all, or a function of (row, "codes" or "scales"); this process's first
        device by default. What this process's devices hold is read, each part once however many hold it; and of what
        is quantised anew, once more all that shares a scale with it.
      cut: makes scale blocks finer where parts need it; exact.
      progress: show a progress bar on standard error.
      in_place: fill a CPU device's arrays where they stay; False goes through staging as for any other device.

    Returns:
      The config; the parameters, held as asked for (see `params.abstract_params`); what the load did in this process.

    Raises:
      InputError: before anything is moved if config and files disagree, for another choice of `weights`, or one with a
        converted folder, which is held as it was saved; while loading if a tensor holds NaN.
    """
    folder = FilePath(folder)
    if not os.path.isdir(folder):  # False, not OSError, for a name that cannot be one
        raise InputError(f"{folder}: expected a checkpoint folder, found none")
    config = load_config(folder)
    single = sharding or SingleDeviceSharding(jax.local_devices()[0])
    where: ArraySharding = (lambda row, part: single) if isinstance(single, Sharding) else single
    if orbax.is_converted(folder):
        if weights != "stored" and not (weights in INT8_ACTIVATIONS and _holds(folder, config, weights)):
            raise InputError(f"{folder}: expected --weights stored with a converted folder, found {weights}")
        return _load_converted(folder, config, mtp, where, cut, progress, in_place)
    with open_files(folder, config) as files:
        stored = agree(files, config)
        found = any(s.scales is not None for s in stored.values())
        if isinstance(config, V4Config) and config.quantization is None and found:
            config = dataclasses.replace(config, quantization=FOUND)  # V4's config may not say so
        instead = "a head that drafts blocks (DSpark)" if has_block_draft(files, config) else "none"
        mtp = _wants_mtp(folder, config, mtp, any(path[0] == "mtp" for path in stored), instead)
        rows = {r.path: r for r in table(config) if mtp or not is_mtp(r)}
        stats = LoadStats()
        for row in rows.values():
            if row.copy_of is not None:
                share = check_copies(files, row, rows[row.copy_of], jax.process_index(), jax.process_count())
                stats.read_bytes += share
                stats.needed_bytes += share
        held = {path: cut(row, resident(row, stored[path], weights)) for path, row in rows.items()}
        with Reader(files, config, stored, held) as reader:
            loader = _Loader(reader, config, held, where, stats, in_place)
            total = loader.local_bytes(row for row in rows.values() if row.copy_of is None)
            with tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=not progress) as bar:
                tree = build_tree(tuple(rows.values()), lambda row: loader.leaf(row, bar))
            stats.narrowed = reader.narrowed
    return config, tree, stats
