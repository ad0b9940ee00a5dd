"""SHA-256 of files, and of the tensors in them, in one pass."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dsjax.checkpoint.safetensors import Tensor, os_errors

_CHUNK = 1 << 20


def hash_file(path: Path, tensors: Iterable[Tensor] = ()) -> dict[str, Any]:
    """{"bytes", "sha256", "tensors": {name: sha256}} of a file, of which `tensors` lie without overlap.

    Raises:
      InputError: if it cannot be read.
    """
    whole, found, size = hashlib.sha256(), {}, 0
    buffer = memoryview(bytearray(_CHUNK))
    with os_errors(path), path.open("rb", buffering=0) as file:

        def take(count: int, *others: Any) -> None:
            nonlocal size
            while count and (n := file.readinto(buffer[: min(count, _CHUNK)])):
                for each in (whole, *others):
                    each.update(buffer[:n])
                size, count = size + n, count - n

        for tensor in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
            take(tensor.offset - size)
            one = hashlib.sha256()
            take(tensor.nbytes, one)
            found[tensor.name] = one.hexdigest()
        take(1 << 62)
    return {"bytes": size, "sha256": whole.hexdigest(), "tensors": found}
