"""XLA for TPUs that are not there: libtpu compiles for any topology, and says what memory the program takes."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from dsjax.errors import InputError
from dsjax.export.consumers import xla
from dsjax.export.consumers.base import Arrays, Misread, Ran, Refused
from dsjax.export.consumers.jax import memory
from dsjax.export.consumers.worker import isolated

_TASK = "dsjax.export.consumers.tpu_aot:compile_for"


class TpuAot:
    """See the top of this file. Compiles only."""

    executes = False
    misreads: Sequence[Misread] = ()

    def __init__(self, topology: str, time_limit: float = 600.0) -> None:
        self.name = f"tpu-aot:{topology}"
        self._topology = topology
        self._time_limit = time_limit

    def available(self) -> str | None:
        """None, or that libtpu is missing."""
        from dsjax.aot import LIBTPU  # here, since it brings the models, which no other consumer's process needs

        return None if importlib.util.find_spec("libtpu") else f"expected {LIBTPU}, found none installed"

    def run(self, module: bytes, arguments: Arrays) -> Arrays:
        """Not possible; raises Refused."""
        raise Refused("compiles only")

    def run_ranks(self, modules: Sequence[bytes], arguments: Sequence[Arrays]) -> Ran:
        """Not possible; raises Refused."""
        raise Refused("compiles only")

    def compile(self, modules: Sequence[bytes], partitions: int = 1) -> dict[str, Any]:
        """Compiles the program, or rank 0's for as many devices as there are ranks.

        Args:
          modules: of all ranks.
          partitions: devices that the compiler itself is to split one global program over.

        Returns:
          Bytes of one device, by XLA's memory analysis.

        Raises:
          Refused: with the compiler's reason, or for a topology with too few devices.
        """
        options = {"topology": self._topology, "devices": max(len(modules), partitions), "partitions": partitions > 1}
        return isolated(_TASK, [modules[0]], options=options, time_limit=self._time_limit)[1]


def compile_for(modules: list[bytes], _: list[Arrays], options: dict[str, Any]) -> tuple[list[Arrays], dict[str, Any]]:
    """A `Task`: compiles the program for the first devices of a topology."""
    from dsjax.aot import topology_devices

    try:
        devices = topology_devices(options["topology"])
    except InputError as e:
        raise Refused(str(e).replace("--aot ", "tpu-aot:", 1)) from None
    if len(devices) < options["devices"]:
        raise Refused(f"expected {options['devices']} devices, found {len(devices)} in {options['topology']}")
    used = devices[: options["devices"]]
    ranks = len(used) > 1 and not options["partitions"]
    program = xla.to_replica(modules[0]) if ranks else modules[0]
    executable = xla.compiled(used, program, {}, partitions=options["partitions"], row_major=True)
    return [], {"device": devices[0].device_kind, **memory(executable)}
