"""Feed-forward layers: dense SwiGLU, and routed plus shared experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from dsjax.config import ExpertConfig
from dsjax.numerics import Numerics
from dsjax.params import Tree
from quant import QArray, block_scaled_dot, expert_dot, experts_at_once, group_size, group_tokens, grouped_map, ungroup
from sharding import UNSPLIT, Rules


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


class SwiGLU(nnx.Module):
    """down(silu(gate x) * up x): dense layers and the shared expert.

    Leaves, stacked over layers: gate, up [L, F, D] and down [L, D, F] (W for F in the shared expert), F split as the
    rules say for `axis`.
    """

    def __init__(
        self, numerics: Numerics, params: Tree, limit: float | None = None, rules: Rules = UNSPLIT, axis: str = "ffn"
    ) -> None:
        self.numerics = numerics
        self.limit = limit
        self.rules = rules
        self.axis = axis
        self.gate = nnx.Param(params["gate"])
        self.up = nnx.Param(params["up"])
        self.down = nnx.Param(params["down"])

    def partial_sum(self, x: Float[Array, "*batch D"], layer: Any) -> Float32[Array, "*batch D"]:
        """[..., D] -> float32 [..., D], this device's part of the sum over F."""
        numerics, down = self.numerics, self.down[...]
        gate, up = (numerics.linear(x, w[...], (layer,)) for w in (self.gate, self.up))
        inner = swiglu(gate, up, numerics, self.limit)
        return block_scaled_dot(numerics.operand(inner, down), down, (layer,))

    def __call__(self, x: Float[Array, "*batch D"], layer: Any) -> Float[Array, "*batch D"]:
        """[..., D] -> [..., D]."""
        return self.numerics.round(self.rules.sum(self.axis, self.partial_sum(x, layer)))


class Experts(nnx.Module):
    """The routed experts. Leaves: gate, up [L, E, M, D] and down [L, E, D, M].

    Routing weights multiply an expert's output in V2 and V3, and what its down projection takes in V4.
    """

    def __init__(self, config: ExpertConfig, numerics: Numerics, params: Tree) -> None:
        self.config = config
        self.numerics = numerics
        self.gate = nnx.Param(params["gate"])
        self.up = nnx.Param(params["up"])
        self.down = nnx.Param(params["down"])

    def __call__(
        self,
        x: Float[Array, "T D"],
        choices: Int32[Array, "T k"],
        weights: Float32[Array, "T k"],
        valid: Bool[Array, " T"],
        layer: Any,
    ) -> Float32[Array, "T D"]:
        """sum_j weights[t, j] * expert(choices[t, j])(x[t]), float32 [T, D].

        Args:
          x: [T, D].
          choices, weights: [T, k] from the gate.
          valid: bool [T]; other tokens get zero and cost nothing.
          layer: index into the stack.
        """
        tokens, k = choices.shape
        experts = self.gate[...].shape[-3]  # of this device
        groups = group_tokens(choices, experts, valid, group_size(tokens, k, experts))
        gate, up, down = self.gate[...], self.up[...], self.down[...]
        numerics = self.numerics
        limit = self.config.swiglu_limit

        def expert(rows: jax.Array, chosen: jax.Array, weight: jax.Array | None = None) -> jax.Array:
            def dot(x: jax.Array, w: jax.Array | QArray) -> jax.Array:
                return numerics.round(expert_dot(x, w, chosen, (layer,)))

            weight = None if weight is None else weight[..., None]
            inner = swiglu(dot(rows, gate), dot(rows, up), numerics, limit, weight)
            return dot(numerics.operand(inner, down), down)

        operand = numerics.operand(x, gate)
        at_once = experts_at_once(groups, (gate, up, down), operand.dtype)
        early = self.config.weights_before_down
        outputs = grouped_map(expert, operand, groups, at_once, weights if early else None)
        picked = ungroup(outputs, groups).astype(jnp.float32)
        # As a product, not a sum of products: XLA:CPU hands that reduction to a thread pool, at 0.4 ms a layer.
        late = jnp.ones_like(weights) if early else weights
        return jnp.einsum("tkd,tk->td", picked, late, precision=lax.Precision.HIGHEST)


Gate = Callable[[jax.Array], tuple[jax.Array, jax.Array]]
"""Router logits, float32 [T, E] -> choices int32 [T, k] and weights float32 [T, k]."""


class MoE(nnx.Module):
    """Routed experts plus the shared expert, which has weight one (spec V3 2.6, V4 2.8).

    No data flows between the two until they are added, so a scheduler may run them side by side. The router is on every
    device.
    """

    def __init__(self, config: ExpertConfig, numerics: Numerics, params: Tree, rules: Rules = UNSPLIT) -> None:
        self.numerics = numerics
        self.rules = rules
        self.router = nnx.Param(params["router"]["weight"])
        self.shared = SwiGLU(numerics, params["shared"], config.swiglu_limit, rules, "shared_ffn")
        self.experts = Experts(config, numerics, params["experts"])

    def _routed(self, x: jax.Array, choices: jax.Array, weights: jax.Array, valid: jax.Array, layer: Any) -> jax.Array:
        """float32 [T, D], still to be summed over "routed": what this device's experts give for its tokens."""
        here = self.experts.gate[...].shape[-3]
        local = choices - self.rules.rank("experts") * here
        local = jnp.where((local >= 0) & (local < here), local, -1)
        return self.experts(x, local, weights, valid, layer)

    def __call__(
        self, x: Float[Array, "B T D"], valid: Bool[Array, "B T"], layer: Any, gate: Gate
    ) -> Float[Array, "B T D"]:
        """[B, T, D] -> [B, T, D], rounded once after everything is added in float32."""
        flat = x.reshape(-1, x.shape[-1])
        with jax.named_scope("router"):
            choices, weights = gate(block_scaled_dot(flat, self.router[...], (layer,)))
        with jax.named_scope("experts"):
            routed = self._routed(flat, choices, weights, valid.reshape(-1), layer)
        numerics, rules = self.numerics, self.rules
        with jax.named_scope("shared"):
            if not numerics.native and rules.axes("routed") == rules.axes("shared_ffn"):  # one sum for both
                total = rules.sum("routed", routed + self.shared.partial_sum(flat, layer))
            elif not numerics.native:
                shared = rules.sum("shared_ffn", self.shared.partial_sum(flat, layer))
                total = rules.sum("routed", routed) + shared
            else:  # the shared expert's output is rounded by itself
                total = rules.sum("routed", routed) + self.shared(flat, layer).astype(jnp.float32)
            return numerics.round(total).reshape(x.shape)
