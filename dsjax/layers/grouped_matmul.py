"""The routed experts' products: tokens times the matrices of the experts that they chose."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from dsjax.layers.swiglu import swiglu
from dsjax.numerics import Largest, Numerics, Operand, Rows
from quant import Int8Rows, QArray, dequantise, group_size, group_tokens, grouped_sum
from quant.grouped import sort_assignments
from quant.operator import VariantError, operator

Matrices: TypeAlias = tuple[Any, Any, Any]
"""Stacks gate, up [L, E, M, D] and down [L, E, D, M]."""

Dot = Callable[[Operand, Any], jax.Array]
"""(rows [..., K], a stack) -> rows times the matrix of their expert, float32 [..., N]."""


@dataclasses.dataclass(frozen=True)
class Expert:
    """What one expert computes, but for its matrices.

    Attributes:
      numerics: how.
      limit: of V4's clamp.
      early: routing weights multiply what the down projection takes, not what it gives.
      whole: each output is an expert's whole output, not a part of its sum: it is rounded.
      largest: maxima of whole rows, where M is split over devices.
    """

    numerics: Numerics
    limit: float | None
    early: bool
    whole: bool
    largest: Largest

    def __call__(self, rows: Operand, matrices: Matrices, weight: jax.Array, dot: Dot) -> jax.Array:
        """Rows [..., D] -> what they add to the layer's output [..., D], weight [..., 1] included."""
        numerics, (gate, up, down) = self.numerics, matrices
        gated, linear = (numerics.round(dot(rows, w)) for w in (gate, up))
        inner = swiglu(gated, linear, numerics, self.limit, weight if self.early else None)
        out = dot(numerics.operand(inner, down, self.largest), down)
        out = numerics.round(out) if self.whole else out
        return out if self.early else out.astype(jnp.float32) * weight


@operator("grouped_matmul", first="loop")
def grouped_matmul(
    matrices: Matrices,
    rows: Rows,
    choices: Int32[Array, "T k"],
    weights: Float32[Array, "T k"],
    present: Bool[Array, " T"] | Bool[Array, "T k"],
    layer: Any,
    assignments: int,
    expert: Expert,
) -> Float32[Array, "T D"]:
    """A loop over blocks of tokens of one expert each, its matrices read where they lie.

    Args:
      matrices: of these experts, in all layers.
      rows: [T, ...], from `Experts.rows`, or the activations that those stand for.
      choices: int32 [T, k], indices into the matrices, -1 for none.
      weights: float32 [T, k].
      present: bool [T, k], which of them count; [T] where that is the same for all of a token.
      layer: index into the stacks.
      assignments: how many are expected, which decides how they are grouped and multiplied (`group_size`).
      expert: what each computes.

    Returns:
      sum_j weights[t, j] * expert(choices[t, j])(rows[t]), float32 [T, D].
    """
    numerics, experts = expert.numerics, matrices[0].shape[1]
    operand = numerics.dequantised(rows)
    groups = group_tokens(choices, experts, present, group_size(assignments, experts, numerics.form))

    def block(rows: Operand, chosen: jax.Array, weight: jax.Array) -> jax.Array:
        def dot(x: Operand, w: jax.Array | QArray) -> jax.Array:
            return numerics.expert_dot(x, w, chosen, (layer,))

        return expert(rows, matrices, weight[..., None], dot)

    at_once = numerics.experts_at_once(groups, matrices, operand, assignments)
    return grouped_sum(block, operand, groups, at_once, weights)


def _present(present: jax.Array, choices: jax.Array) -> jax.Array:
    """bool [T, k]"""
    return (present if present.ndim == 2 else present[:, None]) & (choices >= 0)


@grouped_matmul.variant("dense", bound=1e-5)
def _dense(
    matrices: Matrices,
    rows: Rows,
    choices: jax.Array,
    weights: jax.Array,
    present: jax.Array,
    layer: Any,
    assignments: int,
    expert: Expert,
) -> jax.Array:
    """Every expert for every token, most of them with weight zero: static loops, no sort, no gather of tokens."""
    numerics, experts = expert.numerics, matrices[0].shape[1]
    operand = numerics.dequantised(rows)
    kept = jnp.where(_present(present, choices), weights, 0)

    def add(number: Any, total: jax.Array) -> jax.Array:
        weight = jnp.where(choices == number, kept, 0).sum(axis=1)

        def dot(x: Operand, w: jax.Array | QArray) -> jax.Array:
            one = jax.tree.map(lambda a: a[None], x)
            return numerics.expert_dot(one, w, jnp.asarray(number, jnp.int32)[None], (layer,))[0]

        out = expert(operand, matrices, weight[:, None], dot)
        # Not zero times what a token that did not choose it gives: that may be infinite.
        return total + jnp.where((weight != 0)[:, None], out.astype(jnp.float32), 0)

    total = jnp.zeros((choices.shape[0], matrices[2].shape[-2]), jnp.float32)
    return lax.fori_loop(0, experts, add, total)


@grouped_matmul.variant("ragged", bound=1e-5)
def _ragged(
    matrices: Matrices,
    rows: Rows,
    choices: jax.Array,
    weights: jax.Array,
    present: jax.Array,
    layer: Any,
    assignments: int,
    expert: Expert,
) -> jax.Array:
    """`lax.ragged_dot` over assignments sorted by expert, a layer's experts decoded whole for it."""
    numerics, experts = expert.numerics, matrices[0].shape[1]
    operand = numerics.dequantised(rows)
    if isinstance(operand, Int8Rows):
        raise VariantError("operator grouped_matmul: variant ragged: expected float activations, found INT8")
    (tokens, k), kept = choices.shape, _present(present, choices)
    flat = jnp.where(kept, choices, experts).reshape(-1)
    order = sort_assignments(flat, experts)
    sizes = (flat[:, None] == jnp.arange(experts, dtype=jnp.int32)).sum(axis=0, dtype=jnp.int32)
    there = jnp.arange(tokens * k) < sizes.sum()

    def dot(x: Operand, w: jax.Array | QArray) -> jax.Array:
        assert isinstance(x, jax.Array)
        matrix = dequantise(w[layer]) if isinstance(w, QArray) else w[layer]
        kind = x.dtype if x.dtype == jnp.bfloat16 else jnp.float32
        return lax.ragged_dot(
            x.astype(kind),
            jnp.swapaxes(matrix, -1, -2).astype(kind),
            sizes,
            precision=None if kind == jnp.bfloat16 else lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )

    weight = jnp.where(kept, weights, 0).reshape(-1)[order]
    out = expert(operand[order // k], matrices, weight[:, None], dot)
    out = jnp.where(there[:, None], out.astype(jnp.float32), 0)
    return jnp.zeros((tokens, out.shape[-1]), jnp.float32).at[order // k].add(out)
