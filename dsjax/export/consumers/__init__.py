"""Those who run a bundle's modules, one a file, by the name that `dsjax verify --with` gives."""

from __future__ import annotations

from pathlib import Path

from dsjax.errors import InputError
from dsjax.export.consumers.base import Consumer
from dsjax.export.consumers.interpreter import Interpreter
from dsjax.export.consumers.iree import Iree
from dsjax.export.consumers.jax import Jax
from dsjax.export.consumers.pjrt import Pjrt
from dsjax.export.consumers.tpu_aot import TpuAot

NAMES = "interpreter, iree, jax, pjrt:PLUGIN.so, tpu-aot:TOPOLOGY"


def consumer(name: str, time_limit: float = 600.0) -> Consumer:
    """A consumer by its name: "interpreter", "iree", "jax", "pjrt:/path/to/plugin.so" or "tpu-aot:v5e:2x2".

    Args:
      name: of it, with what it needs after a colon.
      time_limit: seconds that one module may take in a process of its own.

    Raises:
      InputError: of another name.
    """
    kind, colon, rest = name.partition(":")
    if kind == "pjrt" and rest:
        return Pjrt(Path(rest), time_limit)
    if kind == "tpu-aot" and rest:
        return TpuAot(rest, time_limit)
    plain: dict[str, type[Interpreter] | type[Iree] | type[Jax]] = {
        "interpreter": Interpreter,
        "iree": Iree,
        "jax": Jax,
    }
    if kind not in plain or colon:
        raise InputError(f"--with {name}: expected a list of {NAMES}")
    return plain[kind](time_limit)
