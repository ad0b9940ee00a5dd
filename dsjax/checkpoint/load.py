"""Bytes on disk -> arrays on devices, in their stored format or another, a bounded region at a time.

A stack of all layers' experts is hundreds of gigabytes, so no leaf is ever assembled beside the device. Each device's
shard is allocated once and filled region by region; a region holds at most STAGING_BYTES, or one matrix row where a
row is larger than that. A CPU device's memory is the host's: its shard is filled where it will stay, with no staging.
A leaf held in another format is converted as its regions are filled (see `resident`).
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from tqdm import tqdm

from dsjax.checkpoint import orbax
from dsjax.checkpoint.agreement import agree, check_copies, check_values, has_block_draft
from dsjax.checkpoint.manifest import leaf_parts
from dsjax.checkpoint.names import open_files
from dsjax.checkpoint.resident import Source, fill, new_scales
from dsjax.checkpoint.safetensors import Files
from dsjax.config import Config, Quantization, V4Config, load_config
from dsjax.errors import InputError
from dsjax.params import (
    FP8_BLOCK,
    INTEGER,
    Path,
    Row,
    Stored,
    Tree,
    abstract_leaf,
    abstract_params,
    build_tree,
    is_mtp,
    resident,
    table,
    tree_bytes,
)
from quant import QArray

FOUND = Quantization(FP8_BLOCK, "ue8m0")
"""How quantised files are read whose config.json says nothing of it."""

STAGING_BYTES = 64 << 20
MAX_THREADS = 8
"""That read and check tensors side by side."""

ArraySharding = Callable[[Row, str], Sharding]
"""Where a leaf's "codes" or "scales" go."""

Region = tuple[tuple[int, int], ...]
"""(start, stop) on every axis of a leaf."""


@dataclasses.dataclass
class LoadStats:
    """What a load did: bytes put on devices, the most that was staged on the host at once, and regions staged."""

    bytes: int = 0
    peak_staging_bytes: int = 0
    regions: int = 0

    def staged(self, nbytes: int) -> None:
        """Counts one region that passed through host memory on its way to a device."""
        self.regions += 1
        self.peak_staging_bytes = max(self.peak_staging_bytes, nbytes)


def split_region(region: Region, itemsize: int, limit: int) -> Iterator[Region]:
    """Cuts a region into regions of at most `limit` bytes, along leading axes first, never inside a row."""
    extents = [stop - start for start, stop in region]
    if math.prod(extents) * itemsize <= limit:
        yield region
        return
    axis = next((i for i, n in enumerate(extents[:-1]) if n > 1), None)
    if axis is None:
        yield region
        return
    per_index = math.prod(extents[axis + 1 :]) * itemsize
    step = max(1, limit // per_index)
    start, stop = region[axis]
    for at in range(start, stop, step):
        part = (*region[:axis], (at, min(at + step, stop)), *region[axis + 1 :])
        yield from split_region(part, itemsize, limit)


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
                    nbytes = math.prod(b - a for a, b in region) * array.dtype.itemsize
                    stats.staged(nbytes)
                    stats.bytes += nbytes
    return stats


_ALIGNMENT = 64  # bytes; XLA:CPU adopts a NumPy array so aligned instead of copying it


def host_buffer(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """Memory that XLA:CPU can adopt as a device's array."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


@partial(jax.jit, donate_argnums=0)
def _fill(buffer: jax.Array, piece: jax.Array, start: list[jax.Array]) -> jax.Array:
    return lax.dynamic_update_slice(buffer, piece, start)


def _scales_per_row(sharding: Sharding, shape: tuple[int, ...]) -> Sharding:
    """Where one scale per matrix row goes: to every device that holds a part of the row."""
    if isinstance(sharding, NamedSharding) and len(sharding.spec) == len(shape):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:-1]), memory_kind=sharding.memory_kind)
    return sharding


class _Loader:
    def __init__(
        self,
        files: Files,
        config: Config,
        stored: Mapping[Path, Stored],
        held: Mapping[Path, Stored],
        stats: LoadStats,
        progress: tqdm[Any],
        in_place: bool,
    ) -> None:
        self.in_place = in_place
        self.files = files
        self.config = config
        self.stored = stored
        self.held = held
        self.stats = stats
        self.progress = progress
        self.threads = min(MAX_THREADS, os.cpu_count() or 1)
        self.pool = ThreadPoolExecutor(self.threads)
        self.checked: set[str] = set()
        self.new_scales: dict[str, np.ndarray | None] = {}  # of the present leaf's tensors

    def _view(self, row: Row, part: str, name: str, dtype: np.dtype | None) -> np.ndarray:
        """A tensor of a row, or its scales, as `dtype` or as the file has it."""
        if name not in self.checked:
            check_values(self.files, self.config, row, part, name)
            self.checked.add(name)
        view = self.files.read(name)
        if dtype is None:
            return view
        if dtype == np.float32 and view.dtype != np.float32:
            if part == "scales":  # E8M0, perhaps held as plain bytes
                view = view.view(np.dtype("float8_e8m0fnu"))
            return view.astype(np.float32)
        return view.astype(dtype) if row.storage == INTEGER else view.view(dtype)

    def _read(self, row: Row, part: str, region: Region, out: np.ndarray) -> None:
        """Copies one region of a leaf from the files into `out`, of the region's shape."""
        lead = len(row.stacking)
        inner = tuple(slice(a, b) for a, b in region[lead:])
        as_stored = self.held[row.path] == self.stored[row.path]

        def tensor(offset: tuple[int, ...], share: int, shares: int) -> None:
            """Fills one tensor's place; where its bytes go there as they are, one of several shares of its rows."""
            index = tuple(a + o for (a, _), o in zip(region, offset, strict=False))
            name = row.tensor_name(index)
            name = row.scale_name(name) if part == "scales" else name
            into = out[offset]
            if as_stored and self._goes_as_it_is(name, inner, into):
                first, last = (into.shape[0] * i // shares for i in (share, share + 1))
                width = into.nbytes // into.shape[0]
                self.files.read_into(name, into[first:last], (inner[0].start + first) * width)
                check_values(self.files, self.config, row, part, name, into[first:last])
            elif share:
                return  # the first share does it all
            elif as_stored:
                into[...] = self._view(row, part, name, out.dtype)[inner]
                self.files.release(name)
            else:
                self._fill(row, row.tensor_name(index), part, inner, into)

        def some(jobs: list[tuple[tuple[int, ...], int, int]]) -> None:
            for job in jobs:
                tensor(*job)

        # Reading and copying let other threads run; what costs is often the kernel, finding fresh memory.
        offsets = list(np.ndindex(out.shape[:lead]))
        shares = 1 if len(offsets) >= self.threads else self.threads
        jobs = [(offset, i, shares) for offset in offsets for i in range(shares)]
        for _ in self.pool.map(some, [jobs[i :: self.threads] for i in range(self.threads)]):
            pass
        self.stats.bytes += out.nbytes
        self.progress.update(out.nbytes)

    def _goes_as_it_is(self, name: str, inner: tuple[slice, ...], into: np.ndarray) -> bool:
        """Whether rows `inner` of a tensor are the bytes of `into`, in one piece."""
        found = self.files[name]
        whole = all(s == slice(0, n) for s, n in zip(inner[1:], found.shape[1:], strict=True))
        same = into.dtype.itemsize == found.dtype.itemsize and into.shape[1:] == found.shape[1:]
        return whole and same and into.size > 0 and into.flags.c_contiguous

    def _fill(self, row: Row, name: str, part: str, inner: tuple[slice, ...], out: np.ndarray) -> None:
        """Fills `out` with a part of one tensor in its resident format, or of its new scales."""
        held, stored = self.held[row.path], self.stored[row.path]
        scales = None
        if stored.scales is not None:
            scales = self._view(row, "scales", row.scale_name(name), np.dtype(np.float32))
        source = Source(self._view(row, "codes", name, None), scales, stored.block, stored.format == "e2m1")
        if name not in self.new_scales:
            # Of the whole tensor, whatever part of it is wanted, and once, however many devices and parts want it.
            self.new_scales[name] = new_scales(source, held)
        scales = self.new_scales[name]
        if part == "scales":
            assert scales is not None
            out[...] = scales[inner]
        else:
            rows, columns = inner
            fill(out, source, rows, columns, held, scales)
        self.files.release(name)

    def _in_place(self, row: Row, part: str, bounds: Region, dtype: np.dtype) -> np.ndarray:
        """A host device's part of an array, filled where it will stay."""
        buffer = host_buffer([b - a for a, b in bounds], dtype)
        for region in split_region(bounds, dtype.itemsize, STAGING_BYTES):
            inside = tuple(slice(a - low, b - low) for (a, b), (low, _) in zip(region, bounds, strict=True))
            self._read(row, part, region, buffer[inside])
        return buffer

    def _staged(self, row: Row, part: str, bounds: Region, dtype: np.dtype, where: Sharding) -> jax.Array:
        """Another device's part, filled through host memory a region at a time."""
        buffer = jnp.zeros([b - a for a, b in bounds], dtype, device=where)
        for region in split_region(bounds, dtype.itemsize, STAGING_BYTES):
            piece = np.empty([b - a for a, b in region], dtype)
            self._read(row, part, region, piece)
            self.stats.staged(piece.nbytes)
            start = [jnp.int32(a - low) for (a, _), (low, _) in zip(region, bounds, strict=True)]
            # Waiting keeps one staging buffer alive at a time.
            buffer = jax.block_until_ready(_fill(buffer, jax.device_put(piece, where), start))
        return buffer

    def array(self, row: Row, part: str, spec: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.Array:
        """One array of a leaf, shard by shard."""
        shards = []
        parts: Mapping[Any, Any] = sharding.addressable_devices_indices_map(spec.shape)
        for device, index in parts.items():
            bounds = tuple(s.indices(n)[:2] for s, n in zip(index or (), spec.shape, strict=True))
            dtype, where = np.dtype(spec.dtype), SingleDeviceSharding(device)
            if self.in_place and device.platform == "cpu":
                host = self._in_place(row, part, bounds, dtype)
                shards.append(jax.device_put(host, where, may_alias=True))
            else:
                shards.append(self._staged(row, part, bounds, dtype, where))
        return jax.make_array_from_single_device_arrays(spec.shape, sharding, shards)

    def leaf(self, row: Row, sharding: ArraySharding) -> Any:
        held = self.held[row.path]
        built = {}
        for part, spec in leaf_arrays(row, self.config, held).items():
            where = sharding(row, part)
            if (held.format, part) == ("int8", "scales"):
                where = _scales_per_row(where, spec.shape)
            built[part] = self.array(row, part, spec, where)
        self.new_scales.clear()
        template = abstract_leaf(row, self.config, held)
        if isinstance(template, QArray):
            return dataclasses.replace(template, codes=built["codes"], scales=built.get("scales"))
        return built["codes"]


def _wants_mtp(folder: FilePath, config: Config, mtp: bool | None, found: bool, instead: str = "none") -> bool:
    if mtp and not found:
        where = "mtp.0" if isinstance(config, V4Config) else f"layer {config.num_hidden_layers}"
        raise InputError(f"{folder}: expected an MTP module ({where}), found {instead}")
    return found if mtp is None else mtp


def _load_converted(
    folder: FilePath, config: Config, mtp: bool | None, where: ArraySharding, progress: bool, in_place: bool
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

        tree = converted.load(where, seen, mtp=mtp, in_place=in_place)
    return config, tree, stats


def load(
    folder: FilePath | str,
    *,
    mtp: bool | None = False,
    weights: str = "stored",
    sharding: Sharding | ArraySharding | None = None,
    progress: bool = False,
    in_place: bool = True,
) -> tuple[Config, Tree, LoadStats]:
    """Loads a checkpoint folder.

    Args:
      folder: with config.json and safetensors files as DeepSeek publishes them; or a converted one, see `orbax`.
      mtp: load the MTP module too; None where there is one.
      weights: what matrices are held as, one of `params.WEIGHTS`: "stored" touches no byte of them; "float32" and
        "bfloat16" are their values, rounded once; "int8" has one float32 scale per row and leaves embedding and router
        as stored; "fp8" has one per 128 x 128 block, of the matrices that DeepSeek quantises.
      sharding: where arrays go: one sharding for all, or a function of (row, "codes" or "scales"); the first device by
        default. Each device reads only its part, and of what is quantised anew once more the whole, for its scales.
      progress: show a progress bar on standard error.
      in_place: fill a CPU device's arrays where they stay; False goes through staging as for any other device.

    Returns:
      The config; the parameters, held as asked for (see `params.abstract_params`); what the load did.

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
        if weights != "stored":
            raise InputError(f"{folder}: expected --weights stored with a converted folder, found {weights}")
        return _load_converted(folder, config, mtp, where, progress, in_place)
    with open_files(folder, config) as files:
        stored = agree(files, config)
        found = any(s.scales is not None for s in stored.values())
        if isinstance(config, V4Config) and config.quantization is None and found:
            config = dataclasses.replace(config, quantization=FOUND)  # V4's config may not say so
        instead = "a head that drafts blocks (DSpark)" if has_block_draft(files, config) else "none"
        mtp = _wants_mtp(folder, config, mtp, any(path[0] == "mtp" for path in stored), instead)
        rows = {r.path: r for r in table(config) if mtp or not is_mtp(r)}
        for row in rows.values():
            if row.copy_of is not None:
                check_copies(files, row, rows[row.copy_of])
        stats = LoadStats()
        held = {path: resident(row, stored[path], weights) for path, row in rows.items()}
        total = tree_bytes(abstract_params(config, mtp=mtp, stored=stored, weights=weights))
        with tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=not progress) as bar:
            loader = _Loader(files, config, stored, held, stats, bar, in_place)
            with loader.pool:
                tree = build_tree(tuple(rows.values()), lambda row: loader.leaf(row, where))
    return config, tree, stats
