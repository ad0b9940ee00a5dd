"""XLA on the platform that JAX has, with the options that the model itself is compiled with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from dsjax.backend import compiler_options
from dsjax.export.consumers import xla
from dsjax.export.consumers.base import Arrays, Ran
from dsjax.export.consumers.lockstep import merge, run_merged


class Jax:
    """See the top of this file."""

    name = "jax"
    executes = True

    def __init__(self, time_limit: float = 600.0) -> None:
        self._time_limit = time_limit  # not kept: XLA runs in this process

    def available(self) -> str | None:
        """None: JAX has a device, or the command would not have started."""
        return None

    def run(self, module: bytes, arguments: Arrays) -> Arrays:
        """See `Consumer.run`."""
        device = jax.local_devices()[0]
        return xla.run(device, module, arguments, compiler_options(device.platform))

    def run_ranks(self, modules: Sequence[bytes], arguments: Sequence[Arrays]) -> Ran:
        """See `Consumer.run_ranks`: each rank on a device if they run the same program and there are enough."""
        return ranks_on_devices(self, modules, arguments, jax.local_devices())

    def compile(self, modules: Sequence[bytes]) -> dict[str, Any]:
        """See `Consumer.compile`."""
        device = jax.local_devices()[0]
        module = modules[0] if len(modules) == 1 else merge(modules)
        return memory(xla.compiled([device], module, compiler_options(device.platform)))

    def exception(self, arguments: Sequence[Arrays]) -> str | None:
        """None is documented."""
        return None


def ranks_on_devices(consumer: Any, modules: Sequence[bytes], arguments: Sequence[Arrays], devices: xla.Devices) -> Ran:
    """The programs of all ranks on devices, else as one program on the first of them."""
    program = xla.as_replica(modules) if len(devices) >= len(modules) else None
    if program is None:
        return run_merged(consumer, modules, arguments)
    used = devices[: len(modules)]
    results = xla.run_replicas(used, program, arguments, compiler_options(used[0].platform))
    return Ran(results, f"on {len(used)} devices")


def memory(executable: Any) -> dict[str, Any]:
    """XLA's own account of a program's memory, bytes of one device."""
    try:
        stats = executable.get_compiled_memory_stats()
    except jax.errors.JaxRuntimeError:  # a backend need not have one
        return {}
    return {
        "argument_bytes": stats.argument_size_in_bytes,
        "output_bytes": stats.output_size_in_bytes,
        "alias_bytes": stats.alias_size_in_bytes,
        "temp_bytes": stats.temp_size_in_bytes,
        "code_bytes": stats.generated_code_size_in_bytes,
    }
