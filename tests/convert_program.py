"""A conversion in a process of its own, slowed down so that it can be killed in the middle: SRC OUT TO DELAY [I P]."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from dsjax.convert import TARGETS, Options, Share, convert

SHARD_BYTES = 40_000


def slowed(delay: float) -> None:
    write, rename = os.pwrite, os.replace

    def slow_write(*arguments: object) -> int:
        time.sleep(delay)
        return write(*arguments)  # type: ignore[arg-type]

    def slow_rename(*arguments: object) -> None:
        time.sleep(delay)
        rename(*arguments)  # type: ignore[arg-type]
        time.sleep(delay)

    os.pwrite, os.replace = slow_write, slow_rename  # type: ignore[assignment]


if __name__ == "__main__":
    source, out, to, delay, *rest = sys.argv[1:]
    index, count = map(int, rest or ("0", "1"))
    slowed(float(delay))
    print("started", flush=True)
    options, share = Options(TARGETS[to]), Share(index, count, 2)
    outcome = convert(Path(source), Path(out), options, share=share, shard_bytes=SHARD_BYTES)
    print("finished" if outcome.finished else "waiting", flush=True)
