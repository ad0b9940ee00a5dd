"""A small program in many processes: they add up a one per device. Run by test_processes.py.

usage: process_program.py HOST:PORT PROCESSES PROCESS_ID TIMEOUT_S MODE FOLDER; what it prints is one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding.channel import ChannelError
from sharding.cluster import find_place
from sharding.processes import Group, guard_stdout, start


def main(group: Group, mode: str, folder: Path) -> None:
    devices = np.array(jax.devices())
    mesh = Mesh(devices, ("x",))
    spec = PartitionSpec("x")
    ones = jax.make_array_from_callback(
        devices.shape, NamedSharding(mesh, spec), lambda i: np.ones(devices.shape, np.float32)[i]
    )
    add = jax.jit(jax.shard_map(lambda v: jax.lax.psum(v, "x"), mesh=mesh, in_specs=spec, out_specs=PartitionSpec()))
    total = float(add(ones).addressable_shards[0].data[0])
    (folder / f"ready-{group.place.process_id}").touch()
    while mode == "collectives":
        add(ones).block_until_ready()
    if mode == "compute":  # minutes inside one compiled program
        endless = jax.jit(lambda v: jax.lax.fori_loop(0, 1 << 40, lambda _, u: jnp.sin(u), v))
        endless(jnp.ones(1000)).block_until_ready()
    if mode == "slow-last" and group.place.process_id == group.place.processes - 1:
        time.sleep(2)
    if mode == "bug" and group.place.process_id == 1:
        raise AssertionError("a bug")
    print(json.dumps({"total": total, "devices": len(devices)}))
    group.finish()


if __name__ == "__main__":
    coordinator, count, index, timeout_s, mode, folder = sys.argv[1:]
    try:
        place = find_place(coordinator, int(count), int(index), {})
        assert place is not None
        group = start(place, float(timeout_s), "program")
    except ChannelError as e:
        print(f"program: {e}", file=sys.stderr)
        sys.exit(2)
    guard_stdout(place.process_id == 0)
    try:
        dtype = "float32" if mode == "differ" and place.process_id == 1 else "bfloat16"
        group.agree({"--dtype": dtype, "--model": "contents 12"})
        if mode == "input-error" and place.process_id == 1:
            raise ValueError("prompts.jsonl: line 3: expected JSON")
        main(group, mode, Path(folder))
    except ValueError as e:
        group.fail(str(e))
    except Exception as e:
        group.crash(f"{type(e).__name__}: {e}", traceback.format_exc())
