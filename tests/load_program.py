"""Loads a checkpoint onto a mesh of many processes. Run by test_sharded_load.py.

usage: load_program.py HOST:PORT PROCESSES PROCESS_ID CHECKPOINT PLAN OUT; OUT gets one JSON object: bytes read and
needed, and a checksum of every shard on this process's devices.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsjax.checkpoint.load import load
from dsjax.config import load_config
from dsjax.numerics import Numerics
from dsjax.parallel import parallel
from dsjax.params import Tree
from sharding import parse_plan


def checksums(params: Tree) -> dict[str, int]:
    """Of the shards on this process's devices, by leaf, array and device."""
    found = {}
    for path, array in jax.tree_util.tree_leaves_with_path(params):
        for shard in array.addressable_shards:
            name = f"{jax.tree_util.keystr(path)} {shard.device.id}"
            found[name] = zlib.crc32(np.ascontiguousarray(shard.data).tobytes())
    return found


def main(coordinator: str, count: str, index: str, folder: str, plan: str, out: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, int(count), int(index))
    config = load_config(Path(folder))
    meshed = parallel(config, parse_plan(plan), Numerics("plain", "float32"))
    _, params, stats = load(folder, mtp=None, sharding=meshed.sharding, cut=meshed.cut)
    result: dict[str, Any] = {"read": stats.read_bytes, "needed": stats.needed_bytes, "shards": checksums(params)}
    Path(out).write_text(json.dumps(result))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
