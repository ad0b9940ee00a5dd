"""The gate of every feed-forward layer."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from dsjax.numerics import Numerics
from quant.operator import operator


@operator("swiglu")
def swiglu(
    gate: Float[Array, "*batch M"],
    up: Float[Array, "*batch M"],
    numerics: Numerics,
    limit: float | None = None,
    weight: Float32[Array, "*batch 1"] | None = None,
) -> Float[Array, "*batch M"]:
    """weight * silu(gate) * up in float32, rounded once (spec V3 2.5, V4 2.8).

    Args:
      gate, up: [..., M].
      limit: V4's clamp, from above on the gate, from both sides on the other.
      weight: float32 [..., 1], one if not given.
    """
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    if limit is not None:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    divisor = 1 + jnp.exp(-gate)
    # In native DeepSeek's order of roundings. Else the division last: XLA:CPU never repeats one inside the product that
    # follows, as it would a multiplication.
    inner = gate / divisor * up if numerics.native else gate * up / divisor
    # The weight not before the division: XLA:CPU would split gate's and up's products into two results.
    return numerics.round(inner if weight is None else inner * weight)
