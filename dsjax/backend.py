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
def _accepted(backend: str) -> bool:
    try:
        jax.jit(lambda: 0).lower().compile(_CPU_OPTIONS)
    except jax.errors.JaxRuntimeError:
        return False
    return True


def compiler_options() -> dict[str, Any]:
    """Options for `jax.jit(..., compiler_options=)` and `Lowered.compile()`; none but for XLA:CPU, and none there if
    this version of it does not know them. They change speed and temporary memory, not results' meaning."""
    backend = jax.default_backend()
    return dict(_CPU_OPTIONS) if backend == "cpu" and _accepted(backend) else {}
