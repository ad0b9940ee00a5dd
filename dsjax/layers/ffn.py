"""Feed-forward layers: dense SwiGLU, and routed plus shared experts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int32

from dsjax.config import ExpertConfig
from dsjax.layers.grouped_matmul import Expert, grouped_matmul
from dsjax.layers.swiglu import swiglu
from dsjax.numerics import Numerics, Rows
from dsjax.params import Tree
from quant import block_scaled_dot
from sharding import UNSPLIT, Rules, choose_dispatch, expert_parallel


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
        numerics = self.numerics
        gate, up = (numerics.linear(x, w[...], (layer,)) for w in (self.gate, self.up))
        inner = swiglu(gate, up, numerics, self.limit)
        return numerics.dot(inner, self.down[...], (layer,), partial(self.rules.largest, self.axis))

    def __call__(self, x: Float[Array, "*batch D"], layer: Any) -> Float[Array, "*batch D"]:
        """[..., D] -> [..., D]."""
        return self.numerics.round(self.rules.sum(self.axis, self.partial_sum(x, layer)))


class Experts(nnx.Module):
    """The routed experts. Leaves: gate, up [L, E, M, D] and down [L, E, D, M].

    Routing weights multiply an expert's output in V2 and V3, and what its down projection takes in V4.

    Where M is split, each device has a part of every expert's output. The parts are not rounded: what one device would
    round is an expert's whole output, for which all k of a token would have to travel instead of their sum.
    """

    def __init__(self, config: ExpertConfig, numerics: Numerics, params: Tree, rules: Rules = UNSPLIT) -> None:
        self.config = config
        self.numerics = numerics
        self.whole = rules.ways("expert_ffn") == 1
        self.largest = partial(rules.largest, "expert_ffn")
        self.gate = nnx.Param(params["gate"])
        self.up = nnx.Param(params["up"])
        self.down = nnx.Param(params["down"])

    def rows(self, x: Float[Array, "T D"]) -> Rows:
        """What experts take of every token, as it should travel to them: in native, with FP8 or FP4 experts, E4M3 codes
        uint8 [T, D] and their float32 scales [T, D/128] (spec V3 4.2); INT8 codes and scales where experts are in
        integers and activations too; else x."""
        return self.numerics.quantised(x, self.gate[...])

    def __call__(
        self,
        x: Float[Array, "T D"],
        choices: Int32[Array, "T k"],
        weights: Float32[Array, "T k"],
        valid: Bool[Array, " T"],
        layer: Any,
    ) -> Float32[Array, "T D"]:
        """sum_j weights[t, j] * expert(choices[t, j])(x[t]), float32 [T, D], over the experts that are here.

        Args:
          x: [T, D].
          choices: int32 [T, k], indices into the leaves; -1 where an expert is on another rank.
          weights: [T, k].
          valid: bool [T]; other tokens get zero and cost nothing.
          layer: index into the stack.
        """
        here, everywhere = self.gate[...].shape[1], self.config.n_routed_experts
        present = valid if here == everywhere else valid[:, None] & (choices >= 0)
        assignments = -(-choices.size * here // everywhere)
        rows = self.numerics.operand(x, self.gate[...])
        return self.partial_sums(rows, choices, weights, present, layer, assignments)

    def partial_sums(
        self,
        rows: Rows,
        choices: Int32[Array, "T k"],
        weights: Float32[Array, "T k"],
        present: Bool[Array, " T"] | Bool[Array, "T k"],
        layer: Any,
        assignments: int,
    ) -> Float32[Array, "T D"]:
        """What the experts of these leaves, all of them or a rank's, add to every token, float32 [T, D].

        Args:
          rows: [T, ...], from `rows`, on whatever rank; or the activations that those stand for.
          choices: int32 [T, k], indices into the leaves.
          weights: float32 [T, k].
          present: bool [T, k], which of them are to be computed here; [T] where that is the same for all of a token.
          layer: index into the stack.
          assignments: how many are expected, which decides how they are grouped and multiplied (`group_size`).
        """
        matrices = self.gate[...], self.up[...], self.down[...]
        expert = Expert(
            self.numerics, self.config.swiglu_limit, self.config.weights_before_down, self.whole, self.largest
        )
        return grouped_matmul(matrices, rows, choices, weights, present, layer, assignments, expert)


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
        self.experts = Experts(config, numerics, params["experts"], rules)

    def _routed(
        self,
        x: Float[Array, "T D"],
        choices: Int32[Array, "T k"],
        weights: Float32[Array, "T k"],
        valid: Bool[Array, " T"],
        layer: Any,
    ) -> Float32[Array, "T D"]:
        """What routed experts give, [T, D], still to be summed over "routed".

        Where devices with other experts have other tokens, too, tokens go to their experts and partial sums come back.
        Else each device takes of its tokens what is for its experts.
        """
        rules, experts = self.rules, self.experts
        axes, here = rules.axes("experts"), experts.gate[...].shape[-3]
        if not set(axes) & set(rules.axes("slots")):
            local = choices - rules.rank("experts") * here
            return experts(x, jnp.where((local >= 0) & (local < here), local, -1), weights, valid, layer)
        everywhere, how = here * rules.ways("experts"), rules.dispatch
        if how == "auto":
            tokens, k = choices.shape
            how = choose_dispatch(tokens, k, everywhere, rules.ways("experts"))

        def compute(rows: Rows, local: jax.Array, shares: jax.Array) -> jax.Array:
            # As many assignments come from elsewhere as go there, where experts are equally liked.
            return experts.partial_sums(rows, local, shares, local >= 0, layer, choices.size)

        back = jnp.bfloat16 if self.numerics.native else jnp.float32
        return expert_parallel(
            compute, experts.rows(x), choices, weights, valid, axes=axes, experts=everywhere, how=how, back=back
        )

    def __call__(
        self, x: Float[Array, "B T D"], valid: Bool[Array, "B T"], layer: Any, gate: Gate
    ) -> Float[Array, "B T D"]:
        """[B, T, D] -> [B, T, D], rounded once after everything is added in float32."""
        flat = x.reshape(-1, x.shape[-1])
        with jax.named_scope("router"):
            choices, weights = gate(block_scaled_dot(flat, self.router[...], (layer,), self.numerics.form))
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
