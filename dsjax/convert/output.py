"""A safetensors file that is filled in any order: hashed, flushed to the disk and let go of on the way."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import numpy as np

from dsjax.checkpoint.safetensors import Tensor, os_errors
from dsjax.checkpoint.safetensors_writer import Spec, plan_layout
from dsjax.convert.hashing import FileHash, forget
from dsjax.errors import InputError

_FLUSH_BYTES = 1 << 26

_flush: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)


class Output:
    """A file of the result, which has another name while it grows.

    It is flushed on the way, else the disk would idle first, and what is on the disk is let go of.

    The system tells of a write that the disk refused once for each opening of a file, to whoever flushes next; what a
    flush on the way is told is not said again at the end, so each is asked, the last one when the `with` block ends.
    """

    def __init__(self, descriptor: int, path: Path, specs: list[Spec]) -> None:
        self._flusher = ThreadPoolExecutor(1)
        self._flushing: Future[None] | None = None
        self._one_flush = threading.Lock()
        self._unflushed = 0
        header, self._offsets = plan_layout(specs, as_given=True)
        size = len(header) + sum(spec.nbytes for spec in specs)
        tensors = [Tensor(s.name, path, s.dtype, s.shape, self._offsets[s.name], s.nbytes) for s in specs]
        self._hash = FileHash(path, size, tensors, descriptor=descriptor)
        self._descriptor, self._path = descriptor, path
        os.ftruncate(descriptor, 0)
        self._write(np.frombuffer(header, np.uint8), 0, "header")
        os.ftruncate(descriptor, size)

    def _write(self, array: np.ndarray, offset: int, name: str) -> None:
        rest, start = array.data, offset
        while len(rest):
            try:
                count = os.pwrite(self._descriptor, rest, start)
            except OSError as e:
                raise InputError(f"{self._path}: tensor {name}: cannot be written: {e.strerror}") from None
            rest, start = rest[count:], start + count
        self._hash.put(offset, array)
        with self._one_flush:
            self._unflushed += array.size
            if self._unflushed > _FLUSH_BYTES and (self._flushing is None or self._flushing.done()):
                self._asked()
                self._unflushed = 0
                self._flushing = self._flusher.submit(self._put_on_disk)

    def _put_on_disk(self) -> None:
        hashed = self._hash.position
        _flush(self._descriptor)
        forget(self._descriptor, 0, hashed)

    def _asked(self) -> None:
        """Waits for the last flush, if there was one, and raises what it was told."""
        if self._flushing is not None:
            with os_errors(self._path):
                self._flushing.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._flusher.shutdown()
        if kind is None:
            self._asked()

    def put(self, spec: Spec, start: int, array: np.ndarray) -> int:
        """Writes at a byte of a tensor; returns how many bytes it was.

        Raises:
          InputError: naming the tensor, if the disk refuses it.
        """
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._write(flat, self._offsets[spec.name] + start, spec.name)
        return flat.size

    def hashed(self) -> dict[str, Any]:
        """What `hash_file` would say of it, once all has been put."""
        return self._hash.finish()
