"""Regions of leaves from a checkpoint's files, as they are held: read, checked for NaN, and put in their place.

Of the files, what a region is made of is read and nothing else: rows of full width in one piece, columns out of a
mapping, the scales of the blocks that the region touches. Only where a matrix is quantised anew, all that shares a new
scale with the region is read beside it, for that scale.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import ml_dtypes
import numpy as np

from dsjax.checkpoint.agreement import check_values
from dsjax.checkpoint.integers import OFFSET, as_bytes
from dsjax.checkpoint.placing import Region
from dsjax.checkpoint.resident import Narrowed, Overflow, Source, fill, new_scales, pieces
from dsjax.checkpoint.safetensors import Files
from dsjax.config import Config
from dsjax.errors import InputError
from dsjax.params import INTEGER, INTEGERS, Path, Row, Stored, matrix_shape, scale_grid, table

MAX_THREADS = 8
"""That read and check tensors side by side."""

Part = tuple[slice, ...]
"""Of one tensor: a slice with start and stop on every axis."""

_E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)


def _covering(part: Part, block: tuple[int, ...]) -> Part:
    """The blocks that a part touches."""
    return tuple(slice(s.start // b, -(-s.stop // b)) for s, b in zip(part, block, strict=True))


def _repeat(scales: np.ndarray, inner: Part, factors: tuple[int, ...]) -> np.ndarray:
    """Scales of the blocks that `inner`, in finer blocks, touches: each repeated for all that it was cut into."""
    for axis, (s, factor) in enumerate(zip(inner, factors, strict=True)):
        if factor > 1:
            scales = scales.take(np.arange(s.start, s.stop) // factor - s.start // factor, axis)
    return scales


def _size(part: Part) -> int:
    return math.prod(s.stop - s.start for s in part)


def _cast(raw: np.ndarray, dtype: np.dtype, row: Row, part: str) -> np.ndarray:
    """A tensor's elements, or scales, as they are held."""
    if dtype == np.float32 and raw.dtype != np.float32:
        if part == "scales" and raw.dtype.itemsize == 1:  # E8M0, perhaps held as plain bytes
            raw = raw.view(_E8M0)
        return raw.astype(np.float32)
    return raw.astype(dtype) if row.storage == INTEGER else raw.view(dtype)


class Reader:
    """Fills regions of leaves, several tensors at a time."""

    def __init__(
        self, files: Files, config: Config, stored: Mapping[Path, Stored], held: Mapping[Path, Stored]
    ) -> None:
        """`stored`: from `agreement.agree`; `held`: what `params.resident` makes of it, blocks perhaps finer."""
        rows = {row.path: row for row in table(config)}
        self._files = as_bytes(files, stored, rows)
        self._own = self._files is not files
        self._config = config
        self._stored = stored
        self._held = held
        self._threads = min(MAX_THREADS, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(self._threads)
        self._sizes: dict[tuple[Path, str], np.ndarray] = {}
        self._narrowed: list[Narrowed] = []
        self._new_scales: dict[str, np.ndarray] = {}  # of the present leaf's tensors; NaN where not yet known

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        if self._own:
            self._files.close()

    @property
    def narrowed(self) -> Narrowed:
        """What became float16 so far."""
        return sum(self._narrowed, Narrowed())

    def end_leaf(self) -> None:
        """Forgets what was kept for other regions of the same leaf."""
        self._new_scales.clear()

    # --- what a region is made of ---

    def _base(self, row: Row) -> Stored:
        """How a row is held, but for blocks made finer, which changes no number."""
        return dataclasses.replace(self._held[row.path], finer=None)

    def _coarse(self, row: Row, part: str, inner: Part) -> tuple[Part, tuple[int, ...]]:
        """A part of a leaf's codes, or of its scales as they were before they were made finer; and how much finer."""
        finer = self._held[row.path].finer
        if part == "codes" or finer is None:
            return inner, (1,) * len(inner)
        factors = tuple(b // f for b, f in zip(self._base(row).block, finer, strict=True))
        return _covering(inner, factors), factors

    def _block(self, row: Row) -> tuple[int, ...]:
        """Rows and channels that share a new scale."""
        return tuple(b or n for b, n in zip(self._base(row).block, matrix_shape(row, self._config), strict=True))

    def _matrix(self, row: Row, blocks: Part) -> Part:
        """Rows and channels of a part of the new scales."""
        found = zip(blocks, self._block(row), matrix_shape(row, self._config), strict=True)
        return tuple(slice(s.start * b, min(s.stop * b, n)) for s, b, n in found)

    def _origin(self, row: Row, matrix: Part) -> dict[str, Part]:
        """What of a tensor's codes and scales some rows and channels are made of."""
        stored = self._stored[row.path]
        if stored.scales is None:
            return {"codes": matrix}
        rows, columns = matrix
        packed = _covering((columns,), (2,)) if stored.packed else (columns,)
        return {"codes": (rows, *packed), "scales": _covering(matrix, self._stored_block(row))}

    def _stored_block(self, row: Row) -> tuple[int, int]:
        """Rows and channels that share a scale in the file."""
        (bn, bk), (n, k) = self._stored[row.path].block, matrix_shape(row, self._config)
        return bn or n, bk or k

    def _channels(self, row: Row, codes: Part) -> Part:
        """Rows and channels of a part of a matrix's codes as it is held."""
        if not self._base(row).packed:
            return codes
        rows, columns = codes
        return rows, slice(2 * columns.start, 2 * columns.stop)

    def needed(self, row: Row, part: str, region: Region) -> int:
        """Bytes of the files that a region of a leaf's codes or scales is made of.

        Of new scales: of all that they are computed from, which is read for the codes once more.
        """
        lead = len(row.stacking)
        stacked, inner = (tuple(slice(a, b) for a, b in r) for r in (region[:lead], region[lead:]))
        coarse, _ = self._coarse(row, part, inner)
        if self._base(row) == self._stored[row.path]:
            origin = {part: coarse}
        else:
            origin = self._origin(row, self._channels(row, inner) if part == "codes" else self._matrix(row, coarse))
        return sum(int(self._itemsizes(row, name)[stacked].sum()) * _size(found) for name, found in origin.items())

    def _itemsizes(self, row: Row, part: str) -> np.ndarray:
        """Bytes of an element of each tensor of a row, or of its scales, int [*stacking]."""
        if (row.path, part) not in self._sizes:
            names = (row.scale_name(name) if part == "scales" else name for _, name in row.tensors())
            sizes = np.fromiter((self._files[name].dtype.itemsize for name in names), int)
            self._sizes[row.path, part] = sizes.reshape(row.stacking)
        return self._sizes[row.path, part]

    # --- reading ---

    def fill(self, row: Row, part: str, region: Region, out: np.ndarray) -> int:
        """Fills `out`, contiguous, with a region of a leaf's "codes" or "scales".

        Returns:
          The bytes that were taken from files.

        Raises:
          InputError: for NaN among what is read, or if the files cannot be read.
        """
        lead = len(row.stacking)
        inner = tuple(slice(a, b) for a, b in region[lead:])
        as_stored = self._base(row) == self._stored[row.path]

        def tensor(offset: tuple[int, ...], share: int, shares: int) -> int:
            """One tensor's place, or one of several shares of its rows."""
            name = row.tensor_name(tuple(a + o for (a, _), o in zip(region, offset, strict=False)))
            into = out[offset]
            first, last = (into.shape[0] * i // shares for i in (share, share + 1))
            if into[first:last].size == 0:
                return 0
            mine = (slice(inner[0].start + first, inner[0].start + last), *inner[1:])
            take = self._read if as_stored else self._convert
            return take(row, part, name, mine, into[first:last])

        def some(jobs: list[tuple[tuple[int, ...], int, int]]) -> int:
            return sum(tensor(*job) for job in jobs)

        # Reading and copying let other threads run; what costs is often the kernel, finding fresh memory.
        offsets = list(np.ndindex(out.shape[:lead]))
        shares = self._threads if len(offsets) < self._threads and part == "codes" and as_stored else 1
        jobs = [(offset, i, shares) for offset in offsets for i in range(shares)]
        return sum(self._pool.map(some, [jobs[i :: self._threads] for i in range(self._threads)]))

    def _read(self, row: Row, part: str, name: str, inner: Part, out: np.ndarray) -> int:
        """Fills `out` with a part of one tensor that is held as it is stored."""
        name = row.scale_name(name) if part == "scales" else name
        source, factors = self._coarse(row, part, inner)
        stored = self._files[name].dtype
        as_it_is = source == inner and stored.itemsize == out.dtype.itemsize
        raw = out if as_it_is else np.empty([s.stop - s.start for s in source], stored)
        self._files.read_part(name, source, raw)
        check_values(self._files, self._config, row, part, name, raw)
        if part == "codes" and self._stored[row.path].format == "int4":
            raw ^= OFFSET
        if not as_it_is:
            out[...] = _repeat(_cast(raw, out.dtype, row, part), inner, factors)
        return raw.nbytes

    def _convert(self, row: Row, part: str, name: str, inner: Part, out: np.ndarray) -> int:
        """Fills `out` with a part of one tensor in another format, or of its new scales."""
        base = self._base(row)
        if part == "scales":
            blocks, factors = self._coarse(row, part, inner)
            scales, nbytes = self._scales(row, name, blocks)
            out[...] = _repeat(scales[blocks], inner, factors)
        elif base.scales is not None:
            matrix = self._channels(row, inner)
            scales, nbytes = self._scales(row, name, _covering(matrix, self._block(row)))
            source, taken = self._source(row, name, matrix)
            fill(out, source, matrix[0], matrix[1], base, scales)
            nbytes += taken
        else:
            source, nbytes = self._source(row, name, inner, check=True)
            try:
                self._narrowed.append(fill(out, source, inner[0], inner[1], base))
            except Overflow as e:
                tensor = self._files[name]
                raise InputError(
                    f"{tensor.path}: tensor {tensor.name}: expected values within float16's 65504, found {e}; "
                    "bfloat16 holds it"
                ) from None
        self._files.release(name)
        return nbytes

    def _scales(self, row: Row, name: str, blocks: Part) -> tuple[np.ndarray, int]:
        """All new scales of a tensor, those of `blocks` known, and the bytes that were read for them.

        They are kept while the leaf is loaded: codes need them, too, and devices that hold other columns.
        """
        base, shape = self._base(row), matrix_shape(row, self._config)
        scales = self._new_scales.setdefault(name, np.full(scale_grid(shape, base.block), np.nan, np.float32))
        missing = np.flatnonzero(np.isnan(scales[blocks]).any(axis=1))
        if not missing.size:
            return scales, 0
        first, last = (blocks[0].start + int(missing[i]) for i in (0, -1))
        wanted = (slice(first, last + 1), blocks[1])
        rows, columns = self._matrix(row, wanted)
        source, nbytes = self._source(row, name, (rows, columns), check=True)
        scales[wanted] = new_scales(source, base, rows, columns)
        return scales, nbytes

    def _source(self, row: Row, name: str, matrix: Part, check: bool = False) -> tuple[Source, int]:
        """A tensor as the file has it, and the bytes of it that some rows and channels are made of.

        Args:
          matrix: the rows and channels.
          check: refuse NaN among these bytes; where it has been done, there is no need to do it again.
        """
        stored, nbytes = self._stored[row.path], 0
        views: dict[str, np.ndarray] = {}
        for part, (rows, columns) in self._origin(row, matrix).items():
            tensor = row.scale_name(name) if part == "scales" else name
            views[part] = view = self._files.read(tensor)
            nbytes += view.itemsize * _size((rows, columns))
            for piece in pieces(rows, columns.stop - columns.start) if check else ():
                check_values(self._files, self._config, row, part, tensor, view[piece, columns])
        scales = views.get("scales")
        if scales is not None and scales.dtype == np.uint8:  # E8M0 as plain bytes
            scales = scales.view(_E8M0)
        integers = stored.format in INTEGERS
        return Source(
            views["codes"], scales, self._stored_block(row), stored.packed, integers, self._width(row)
        ), nbytes

    def _width(self, row: Row) -> int:
        return matrix_shape(row, self._config)[-1]
