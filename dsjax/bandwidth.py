"""What the machine itself can do, to hold a model's times against: reading memory, copying it, reading files."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsjax.backend import compiler_options, platform_of
from dsjax.checkpoint.orbax import PARAMS, is_converted
from dsjax.checkpoint.placing import host_buffer

BUFFER_BYTES = 512 << 20
"""Memory read or copied at once: more than the largest shared caches (480 MB) hold."""

PIECE_BYTES = 16 << 20
"""Read from a file at once, and the size of the buffer that is reused."""

SAMPLE_BYTES = 16 << 30
"""Plain reading is timed on this much of a checkpoint at most: a rate needs no more, however large the model is."""


# Both read every word once and keep almost nothing; which is faster depends on the compiler. Integers, because sums of
# floats in one order stay scalar.
def _sum(x: jax.Array) -> jax.Array:
    return jnp.sum(x, dtype=jnp.uint32)


def _or(x: jax.Array) -> jax.Array:
    zero = np.uint32(0)
    return lax.reduce(lax.reduce(x.reshape(-1, 16, 32), zero, lax.bitwise_or, (1,)), zero, lax.bitwise_or, (0, 1))


def _copy(out: jax.Array, x: jax.Array) -> jax.Array:
    """Into memory that is there: `out` is donated, else the first touch of the result would be timed."""
    return x ^ np.uint32(1)


def _median_s(call: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def memory_bandwidth(device: jax.Device, repeats: int = 9) -> tuple[float, float]:
    """Memory bandwidth of a device, by programs of XLA's on all its threads. Nothing stays allocated.

    The buffer that is read is made as the loader makes weights, so that it lies in pages of the same kind: on a CPU
    large pages read faster.

    Args:
      device: where to measure.
      repeats: counted runs of each program, after one that is not; medians are taken.

    Returns:
      Bytes per second: read, by the faster of two reductions; and copied, where a byte counts twice, once as it is read
      and once as it is written.
    """
    host = host_buffer([BUFFER_BYTES // 2048 * 512], np.dtype(np.uint32))
    host.fill(1)
    x = jax.block_until_ready(jax.device_put(host, device, may_alias=True))
    nbytes = host.nbytes
    del host
    options = compiler_options(platform_of(device))
    read_s = []
    for function in (_sum, _or):
        read = jax.jit(function).lower(x).compile(options)
        read_s.append(_median_s(lambda read=read: read(x), repeats))  # type: ignore[misc]
    out = jax.device_put(jnp.zeros_like(x), device)
    copy = jax.jit(_copy, donate_argnums=0, keep_unused=True).lower(out, x).compile(options)

    def copy_on() -> jax.Array:
        nonlocal out
        out = copy(out, x)
        return out

    return nbytes / min(read_s), 2 * nbytes / _median_s(copy_on, repeats)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's parameters: safetensors, or all below params/ of a converted folder."""
    found = (folder / PARAMS).rglob("*") if is_converted(folder) else folder.glob("*.safetensors")
    return sorted(path for path in found if path.is_file())


def read_files(files: Sequence[Path], out: np.ndarray, nbytes: int) -> int:
    """Reads the first `nbytes` of some files, one after another, into `out` uint8, over and over if it is smaller.

    Returns:
      Bytes read; fewer if the files hold fewer.
    """
    view, done = out.data, 0
    for path in files:
        with path.open("rb", buffering=0) as file:
            while done < nbytes:
                at = done % len(view)
                n = file.readinto(view[at : at + min(PIECE_BYTES, len(view) - at, nbytes - done)])
                if not n:
                    break
                done += n
    return done


def warm_up(files: Sequence[Path]) -> int:
    """Reads all of some files once, so that what fits the page cache is there. Returns their bytes."""
    return read_files(files, np.empty(PIECE_BYTES, np.uint8), sum(path.stat().st_size for path in files))


def read_fresh(files: Sequence[Path], nbytes: int) -> float:
    """Bytes per second of reading the first `nbytes` into freshly allocated memory of that size, as a load needs it.

    The first touch of that memory is included. Where a machine hands memory out as it is touched and takes it back when
    it has been free for a while, as many virtual machines do, this depends on what ran a second before: only equal
    histories compare.
    """
    start = time.perf_counter()
    return read_files(files, np.empty(nbytes, np.uint8), nbytes) / (time.perf_counter() - start)


def read_reused(files: Sequence[Path], nbytes: int) -> float:
    """Bytes per second of reading the first `nbytes` into one small buffer: how fast the files give their bytes."""
    small = np.zeros(PIECE_BYTES, np.uint8)
    start = time.perf_counter()
    return read_files(files, small, nbytes) / (time.perf_counter() - start)


def current_rss_bytes() -> int | None:
    """Resident memory of this process now, not its peak; None where the system does not tell (/proc/self/statm)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
