"""A PJRT plugin: a shared library by which JAX reaches a vendor's compiler and chip, in a process of its own.

pip's xla_cpu_pjrt holds such a library for the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from dsjax.export.consumers import xla
from dsjax.export.consumers.base import Arrays, Misread, Ran
from dsjax.export.consumers.lockstep import HOW, as_one, run_as_one
from dsjax.export.consumers.worker import isolated

_TASK = "dsjax.export.consumers.pjrt:execute"
_PLATFORM = "verified_plugin"


class Pjrt:
    """See the top of this file."""

    executes = True
    misreads: Sequence[Misread] = ()

    def __init__(self, plugin: Path, time_limit: float = 600.0) -> None:
        self.name = f"pjrt:{plugin}"
        self._plugin = plugin
        self._time_limit = time_limit

    def available(self) -> str | None:
        """None, or that there is no such library."""
        return None if self._plugin.is_file() else f"expected a plugin's shared library {self._plugin}, found no file"

    def _call(self, modules: Sequence[bytes], arguments: Sequence[Arrays]) -> tuple[list[Arrays], dict[str, Any]]:
        environment = {
            "JAX_PLATFORMS": _PLATFORM,
            "PJRT_NAMES_AND_LIBRARY_PATHS": f"{_PLATFORM}:{self._plugin.resolve()}",
        }
        return isolated(_TASK, modules, arguments, environment=environment, time_limit=self._time_limit)

    def run(self, module: bytes, arguments: Arrays) -> Arrays:
        """See `Consumer.run`."""
        return self._call([module], [arguments])[0][0]

    def run_ranks(self, modules: Sequence[bytes], arguments: Sequence[Arrays]) -> Ran:
        """See `Consumer.run_ranks`: as one program on one device."""
        return Ran(self._call(modules, arguments)[0], HOW)

    def compile(self, modules: Sequence[bytes]) -> dict[str, Any]:
        """See `Consumer.compile`."""
        return self._call(modules, [])[1]


def execute(modules: list[bytes], arguments: list[Arrays], _: dict[str, Any]) -> tuple[list[Arrays], dict[str, Any]]:
    """A `Task`: compiles the program, or that of all ranks, and runs it if there are arguments."""
    device = jax.local_devices()[0]
    if arguments:
        return run_as_one(lambda module, given: xla.run(device, module, given, {}), modules, arguments), {}
    xla.compiled([device], as_one(modules), {})
    return [], {}
