"""SHA-256 of a file and CRC-32 of the tensors in it, in one pass over its bytes.

SHA-256 says whether a file is the one that was certified; CRC-32, at a third of the cost, which of its tensors is not.
"""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from collections.abc import Iterable, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, Self

import numpy as np

from dsjax.checkpoint.safetensors import Tensor, os_errors
from dsjax.errors import InputError

_CHUNK = 1 << 20
"""Bytes of which both sums are made while they are in a core's cache."""

_FORGET = 1 << 26


def forget(descriptor: int, start: int, stop: int) -> None:
    """Gives back the memory that the system has some bytes of a file in, where they are on the disk already.

    A file that is read or written once would else take all of the memory, and finding that costs more than the disk.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_DONTNEED)


class FileHash:
    """Sums of a file, made while its bytes pass through memory, in pieces that come in almost any order.

    A piece whose turn it is is taken from memory. One that came early is read from the file when its turn comes, by
    the thread that is at it; the others do not wait.

    Attributes:
      position: up to here all has been taken.
    """

    def __init__(
        self,
        path: Path,
        size: int,
        tensors: Iterable[Tensor] = (),
        *,
        descriptor: int | None = None,
        ready: Iterable[tuple[int, int]] = (),
        once: bool = False,
    ) -> None:
        """Begins.

        Args:
          path: of the file.
          size: in bytes.
          tensors: that lie in it without overlap.
          descriptor: to read it from while it grows under another name.
          ready: ranges of bytes (start, stop) that are in the file and will not come.
          once: nobody reads the file again soon.
        """
        self.position = 0
        self._path, self._size, self._descriptor, self._once = path, size, descriptor, once
        self._whole = hashlib.sha256()
        self._tensors: Sequence[Tensor] = sorted(tensors, key=lambda t: (t.offset, t.nbytes))
        self._sums = dict.fromkeys((t.name for t in self._tensors), 0)
        self._next = 0  # of the tensors, the one at or after `position`
        self._ready = {start: stop for start, stop in ready if start < stop}
        self._lock, self._busy = threading.Lock(), False
        self._file: FileIO | None = None
        self._buffer: memoryview | None = None
        self._forgotten = 0

    @property
    def complete(self) -> bool:
        return self.position == self._size

    def put(self, start: int, array: np.ndarray) -> None:
        """Takes a contiguous piece that the file holds; pieces neither overlap each other nor what was `ready`.

        Raises:
          InputError: if the file cannot be read.
        """
        data = array.reshape(-1).view(np.uint8).data
        with self._lock:
            if len(data):
                self._ready[start] = start + len(data)
            if self._busy:
                return
            self._busy = True
        while (stop := self._reach()) is not None:
            self._take(stop, start, data)

    def finish(self) -> dict[str, Any]:
        """{"bytes", "sha256", "tensors": {name: CRC-32}}, after the last piece; what did not come is read.

        Raises:
          InputError: if the file cannot be read, or is not as large as it was.
        """
        try:
            self._take(self._size, 0, memoryview(b""))
        finally:
            self.close()
        sums = {name: f"{value:08x}" for name, value in self._sums.items()}
        return {"bytes": self._size, "sha256": self._whole.hexdigest(), "tensors": sums}

    def close(self) -> None:
        """Ends it early."""
        if self._file is not None:
            self._file.close()

    def _reach(self) -> int | None:
        """Up to where bytes are there; None, and another thread may go on, if there are no more."""
        with self._lock:
            stop = self.position
            while stop in self._ready:
                stop = self._ready.pop(stop)
            if stop == self.position:
                self._busy = False
                return None
            return stop

    def _take(self, stop: int, start: int, data: memoryview) -> None:
        """Goes on to a byte; `data` lies from `start` on."""
        while self.position < stop:
            at = self.position
            if start <= at < start + len(data):
                chunk = data[at - start : min(at + _CHUNK, stop) - start]
            else:
                end = min(at + _CHUNK, stop, start if start > at else stop)
                chunk = self._read(at, end - at)
            self._whole.update(chunk)
            self._add(at, chunk)
            self.position = at + len(chunk)
            if self._once and (self.complete or self.position - self._forgotten >= _FORGET):
                with os_errors(self._path):
                    forget(self._opened().fileno(), self._forgotten, self.position)
                self._forgotten = self.position

    def _add(self, at: int, chunk: memoryview) -> None:
        """Adds bytes that lie at a place to the sums of their tensors."""
        end = at + len(chunk)
        while self._next < len(self._tensors):
            tensor = self._tensors[self._next]
            stop = tensor.offset + tensor.nbytes
            part = chunk[max(tensor.offset - at, 0) : max(min(stop, end) - at, 0)]
            self._sums[tensor.name] = zlib.crc32(part, self._sums[tensor.name])
            if stop > end:
                return
            self._next += 1

    def _opened(self) -> FileIO:
        if self._file is None:
            own = self._descriptor is None
            self._file = FileIO(self._path if self._descriptor is None else self._descriptor, closefd=own)
        return self._file

    def _read(self, at: int, count: int) -> memoryview:
        if self._buffer is None:
            self._buffer = memoryview(bytearray(_CHUNK))
        with os_errors(self._path):
            file = self._opened()
            file.seek(at)
            found = file.readinto(self._buffer[:count])
        if not found:
            raise InputError(f"{self._path}: expected {self._size} bytes, found {at}: it shrank since it was opened")
        return self._buffer[:found]


def hash_file(path: Path, tensors: Iterable[Tensor] = ()) -> dict[str, Any]:
    """{"bytes", "sha256", "tensors": {name: CRC-32}} of a file, of which `tensors` lie without overlap.

    Raises:
      InputError: if it cannot be read.
    """
    with os_errors(path):
        size = path.stat().st_size
    return FileHash(path, size, tensors).finish()


class SourceHashes:
    """Sums of a source's files, made while they are read for a conversion. A context manager: it closes them."""

    def __init__(self) -> None:
        self._hashes: dict[Path, FileHash] = {}

    def add(self, path: Path, tensors: Iterable[Tensor], coming: Iterable[Tensor]) -> None:
        """Begins a file.

        Args:
          path: of it.
          tensors: that lie in it.
          coming: those of them that will be `put`, whole.

        Raises:
          InputError: if it is not there.
        """
        with os_errors(path):
            size = path.stat().st_size
        ready, end = [], 0
        for tensor in sorted(coming, key=lambda t: t.offset):
            ready.append((end, tensor.offset))
            end = tensor.offset + tensor.nbytes
        self._hashes[path] = FileHash(path, size, tensors, ready=[*ready, (end, size)], once=True)

    def put(self, tensor: Tensor, start: int, array: np.ndarray) -> None:
        """Takes the bytes of a tensor from `start` on."""
        found = self._hashes.get(tensor.path)
        if found is not None:
            found.put(tensor.offset + start, array)

    def take(self, path: Path, *, complete: bool = True) -> dict[str, Any] | None:
        """What `hash_file` says of a file, once; None if it was not begun, or is not complete where it has to be."""
        found = self._hashes.get(path)
        if found is None or (complete and not found.complete):
            return None
        del self._hashes[path]
        return found.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for found in self._hashes.values():
            found.close()
