"""A vendor's PJRT plugin as a platform: a shared library by which JAX reaches a compiler and a chip."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import jax
from jax._src import xla_bridge  # where plugins register themselves, by OpenXLA's own instructions

from dsjax.errors import InputError

KNOWN = ("cpu", "cuda", "rocm", "gpu", "tpu")
"""Names that JAX gives a meaning itself."""


def load_plugin(name: str, library: Path) -> None:
    """Makes a plugin's devices those of a platform of this name. The library's code is run.

    Args:
      name: to be chosen; the plugin itself may call its platform something else.
      library: its file.

    Raises:
      InputError: for a name that is taken or no name, a library that cannot be loaded or is no plugin, and after JAX
        has looked for devices.
    """
    if name in KNOWN or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
        raise InputError(
            f"--platform {name}: expected another name for a plugin than {', '.join(KNOWN)}: a letter, then letters, "
            f"digits or _"
        )
    if not library.is_file():
        raise InputError(f"--platform-plugin {library}: expected a plugin's shared library, found no file")
    if xla_bridge.backends_are_initialized():
        raise InputError(f"--platform-plugin {library}: expected it before JAX starts, found JAX started")
    try:
        xla_bridge.register_plugin(name, library_path=str(library.resolve()))
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as e:
        raise InputError(f"--platform-plugin {library}: expected a PJRT plugin: {str(e)[:300]}") from None
    # Who gives a plugin's path knows what JAX would warn of.
    said = f"Platform '{name}' is experimental"
    logging.getLogger(xla_bridge.__name__).addFilter(lambda record: not record.getMessage().startswith(said))
