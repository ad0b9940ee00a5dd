"""What the compiler is told, by platform. The programs themselves are the same everywhere."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jax

_CPU_OPTIONS: dict[str, Any] = {
    # XLA:CPU prefers 256-bit vectors even where the machine has wider ones.
    "xla_cpu_prefer_vector_width": 512,
    # Its kernel library (YNN) keeps matrix products, but must not take sums: it would write every decoded weight to
    # memory to add it up there, which makes a decode step seven times slower.
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
}


@lru_cache
def _accepted(name: str, value: Any) -> bool:
    """Whether this version of XLA:CPU knows the option."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        try:
            jax.jit(lambda: 0).lower().compile({name: value})
        except jax.errors.JaxRuntimeError:
            return False
    return True


def compiler_options(platform: str) -> dict[str, Any]:
    """Options for `jax.jit(..., compiler_options=)` and `Lowered.compile()`.

    They change speed and temporary memory, not the meaning of results. None but for XLA:CPU, and there those that this
    version of it knows.

    Args:
      platform: of the devices that will run the program, as `jax.Device.platform` says.
    """
    return {k: v for k, v in _CPU_OPTIONS.items() if _accepted(k, v)} if platform == "cpu" else {}
