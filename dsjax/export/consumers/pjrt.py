"""A PJRT plugin: a shared library by which JAX reaches a vendor's compiler and chip, in a process of its own.

pip's xla_cpu_pjrt holds such a library for the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from dsjax.export.consumers import xla
from dsjax.export.consumers.base import Arrays, Ran
from dsjax.export.consumers.lockstep import merge, run_merged
from dsjax.export.consumers.worker import isolated

_TASK = "dsjax.export.consumers.pjrt:execute"
_PLATFORM = "verified_plugin"


class Pjrt:
    """See the top of this file."""

    executes = True

    def __init__(self, plugin: Path, time_limit: float = 600.0) -> None:
        self.name = f"pjrt:{plugin}"
        self._plugin = plugin
        self._time_limit = time_limit

    def available(self) -> str | None:
        """None, or that there is no such library."""
        return None if self._plugin.is_file() else f"expected a plugin's shared library {self._plugin}, found no file"

    def _call(self, module: bytes, arguments: list[Arrays]) -> tuple[list[Arrays], dict[str, Any]]:
        environment = {
            "JAX_PLATFORMS": _PLATFORM,
            "PJRT_NAMES_AND_LIBRARY_PATHS": f"{_PLATFORM}:{self._plugin.resolve()}",
        }
        return isolated(_TASK, [module], arguments, environment=environment, time_limit=self._time_limit)

    def run(self, module: bytes, arguments: Arrays) -> Arrays:
        """See `Consumer.run`."""
        return self._call(module, [arguments])[0][0]

    def run_ranks(self, modules: Sequence[bytes], arguments: Sequence[Arrays]) -> Ran:
        """See `Consumer.run_ranks`: as one program on one device."""
        return run_merged(self, modules, arguments)

    def compile(self, modules: Sequence[bytes]) -> dict[str, Any]:
        """See `Consumer.compile`."""
        return self._call(modules[0] if len(modules) == 1 else merge(modules), [])[1]

    def exception(self, arguments: Sequence[Arrays]) -> str | None:
        """None is documented."""
        return None


def execute(modules: list[bytes], arguments: list[Arrays], _: dict[str, Any]) -> tuple[list[Arrays], dict[str, Any]]:
    """A `Task`: compiles the program, and runs it if there are arguments."""
    device = jax.local_devices()[0]
    if arguments:
        return [xla.run(device, modules[0], arguments[0], {})], {}
    xla.compiled([device], modules[0], {})
    return [], {}
