"""XLA on the platform that JAX has, with the options that the model itself is compiled with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from dsjax.backend import compiler_options, platform_of
from dsjax.export.consumers import xla
from dsjax.export.consumers.base import Arrays, Misread, Ran, Refused
from dsjax.export.consumers.lockstep import HOW, as_one_isolated, by_rank


class Jax:
    """See the top of this file."""

    name = "jax"
    executes = True
    misreads: Sequence[Misread] = ()

    def __init__(self, time_limit: float = 600.0) -> None:
        self._time_limit = time_limit  # of what is done before: XLA runs in this process

    def available(self) -> str | None:
        """None: JAX has a device, or the command would not have started."""
        return None

    def run(self, module: bytes, arguments: Arrays) -> Arrays:
        """See `Consumer.run`."""
        device = jax.local_devices()[0]
        return xla.run(device, module, arguments, compiler_options(platform_of(device)))

    def run_ranks(self, modules: Sequence[bytes], arguments: Sequence[Arrays]) -> Ran:
        """See `Consumer.run_ranks`: each rank on a device if they run the same program and there are enough."""
        devices = jax.local_devices()
        program = xla.as_replica(modules) if len(devices) >= len(modules) else None
        if program is None:
            program, counts = as_one_isolated(modules, self._time_limit)
            return Ran(by_rank(self.run(program, [a for arrays in arguments for a in arrays]), counts), HOW)
        used = devices[: len(modules)]
        results = xla.run_replicas(used, program, arguments, compiler_options(platform_of(used[0])))
        return Ran(results, f"on {len(used)} devices")

    def run_partitioned(self, module: bytes, arguments: Arrays, ranks: int) -> Ran:
        """A global program on as many devices, split by XLA; results are whole.

        Raises:
          Refused: as `run` does; and, with the state "not run", where there are too few devices.
        """
        devices = jax.local_devices()
        if len(devices) < ranks:
            raise Refused(
                f"a global program: expected {ranks} devices to split it over, found {len(devices)}", "not run"
            )
        used = devices[:ranks]
        results = xla.run_partitioned(used, module, arguments, compiler_options(platform_of(used[0])))
        return Ran([results], f"split by XLA over {ranks} devices")

    def compile(self, modules: Sequence[bytes]) -> dict[str, Any]:
        """See `Consumer.compile`."""
        device = jax.local_devices()[0]
        module = modules[0] if len(modules) == 1 else as_one_isolated(modules, self._time_limit)[0]
        return memory(xla.compiled([device], module, compiler_options(platform_of(device))))


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
