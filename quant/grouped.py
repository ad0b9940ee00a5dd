"""Products with many experts: assignments sorted by expert into blocks, a few experts' matrices at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32, PyTree, Shaped

from quant.form import FUSED, Form
from quant.matmul import (
    FUSED_ELEMENTS,
    Index,
    Weight,
    block_scaled_dot,
    can_fuse,
    tile_dot,
    tile_elements,
)
from quant.operator import operator
from quant.qarray import QArray

MAX_GROUP_ROWS = 128


@partial(jax.tree_util.register_dataclass, data_fields=["assignment", "expert", "used"], meta_fields=["size"])
@dataclasses.dataclass(frozen=True)
class Groups:
    """Assignments (token, choice) sorted by expert into blocks of `size` rows, each block of one expert.

    P = T * k assignments, G blocks (a static bound; only the first `used` hold work). A single token's assignments in
    blocks of one row stay in the order of its choices.

    Attributes:
      assignment: int32 [G * size], token * k + choice of each row, P where the row is empty.
      expert: int32 [G], the expert of each block.
      used: int32 [], number of blocks that hold work.
      size: rows per block.
    """

    assignment: Any
    expert: Any
    used: Any
    size: int


def group_size(assignments: int, experts: int, form: Form = FUSED) -> int:
    """Rows per block.

    Up to the form's `fused_tokens` per expert on average, 1: the fused product, which re-reads an expert's bytes from
    cache where two blocks share it. Beyond, whole tiles of a matrix unit (16 rows, or the form's `block_rows`), half
    above the mean load: larger blocks compute more padding, smaller ones decode an expert more often.

    Args:
      assignments: how many are expected.
      experts: among which.
      form: how products are written.
    """
    mean = assignments / experts
    if mean <= form.fused_tokens:
        return 1
    if 1.5 * mean <= form.block_rows:
        return form.block_rows
    return 16 * min(math.ceil(1.5 * mean / 16), MAX_GROUP_ROWS // 16)


def group_tokens(
    choices: Int32[Array, "T k"], experts: int, valid: Bool[Array, " T"] | Bool[Array, "T k"], size: int
) -> Groups:
    """Sorts assignments by expert into blocks, in static shapes.

    Args:
      choices: int32 [T, k], expert of each assignment, -1 for none.
      experts: E.
      valid: bool [T], or [T, k] where tokens have assignments elsewhere: they are then sorted even if there is but one
        token. What is not valid gets no row.
      size: rows per block.
    """
    t, k = choices.shape
    p = t * k
    if t == 1 and size == 1 and valid.ndim == 1:  # one token: its choices are distinct blocks as they come
        assignment = jnp.where(valid & (choices[0] >= 0), jnp.arange(k, dtype=jnp.int32), k)
        return Groups(assignment, jnp.maximum(choices[0], 0), jnp.where(valid[0], k, 0).astype(jnp.int32), 1)
    blocks = min(p, experts + p // size)
    present = (valid if valid.ndim == 2 else valid[:, None]) & (choices >= 0)
    flat = jnp.where(present, choices, experts).reshape(p)
    order = sort_assignments(flat, experts)
    counts = jnp.zeros(experts + 1, jnp.int32).at[flat].add(1)[:experts]
    per_expert = (counts + size - 1) // size
    last_block = jnp.cumsum(per_expert)
    block = jnp.arange(blocks, dtype=jnp.int32)
    expert = jnp.minimum(jnp.searchsorted(last_block, block, side="right"), experts - 1).astype(jnp.int32)
    # A row's rank among its expert's assignments, and from there its place in the order of all.
    rank = (block - (last_block - per_expert)[expert])[:, None] * size + jnp.arange(size, dtype=jnp.int32)
    full = (rank < counts[expert][:, None]) & (block < last_block[-1])[:, None]
    place = jnp.where(full, (jnp.cumsum(counts) - counts)[expert][:, None] + rank, p).reshape(-1)
    assignment = order.at[place].get(mode="fill", fill_value=p)
    return Groups(assignment, expert, last_block[-1], size)


@operator("sort_assignments", first="sort")
def sort_assignments(experts_of: Int32[Array, " P"], experts: int) -> Int32[Array, " P"]:
    """The order that sorts assignments by expert, stable: int32 [P], the assignment at each place.

    Args:
      experts_of: int32 [P], the expert of each, `experts` for none.
      experts: E.
    """
    return jnp.argsort(experts_of, stable=True).astype(jnp.int32)


@sort_assignments.variant("count", bound=0.0)
def _count_assignments(experts_of: jax.Array, experts: int) -> jax.Array:
    """By counting how many come before each: sums and one scatter, no sort."""
    same = experts_of[:, None] == jnp.arange(experts + 1, dtype=jnp.int32)
    ones = same.astype(jnp.int32)
    counts = ones.sum(axis=0)
    before = jnp.cumsum(ones, axis=0) - ones + jnp.cumsum(counts) - counts
    place = jnp.where(same, before, 0).sum(axis=1)
    return jnp.zeros_like(place).at[place].set(jnp.arange(len(place), dtype=jnp.int32), unique_indices=True)


def expert_dot(
    x: Float[Array, "C size K"], w: Weight, experts: Int32[Array, " C"], index: Index = (), form: Form = FUSED
) -> Float32[Array, "C size N"]:
    """Blocks of rows, each times its expert's matrix w[*index, experts[c]]; float32 [C, size, N].

    Args:
      x: float [C, size, K].
      w: [*lead, E, N, K].
      experts: int32 [C]; more than one only where C matrices fit a tile (`experts_at_once`).
      index: indices of the `lead` axes.
      form: how the product is written.
    """
    if x.shape[0] == 1:
        return block_scaled_dot(x, w, (*index, experts[0]), form)
    tile = w.gather((*index, experts)) if isinstance(w, QArray) else w.at[(*index, experts)].get(mode="clip")
    return tile_dot(tile, x, form)


@operator("batched_dot", first="form")
def batched_dot(x: Float[Array, "G T K"], w: Weight, index: Index = (), form: Form = FUSED) -> Float32[Array, "G T N"]:
    """x[g] times the transpose of w[*index, g] for every g.

    Of few tokens many matrices at a time; else one by one, for XLA:CPU takes a product of several, whose operand was
    moved there, to float32.

    Args:
      x: float [G, T, K].
      w: [*lead, G, N, K].
      index: indices of the `lead` axes.
      form: how the products are written.
    """
    matrices, tokens = x.shape[:2]
    fit = FUSED_ELEMENTS // math.prod(w.shape[-2:]) if can_fuse(w.shape[-2:], w, tokens, form) else 1
    at_once = max(n for n in range(1, matrices + 1) if matrices % n == 0 and n <= max(1, fit))

    def run(first: Any) -> jax.Array:
        rows = lax.dynamic_slice_in_dim(x, first, at_once, axis=0)
        return expert_dot(rows, w, first + jnp.arange(at_once, dtype=jnp.int32), index, form)

    if at_once == matrices:
        return run(0)
    trips = jnp.arange(0, matrices, at_once)
    return lax.scan(lambda _, first: (None, run(first)), None, trips)[1].reshape(matrices, tokens, -1)


def experts_at_once(
    groups: Groups, matrices: Sequence[Weight], dtype: Any, assignments: int, form: Form = FUSED
) -> int:
    """Blocks that one `expert_dot` takes: as many of the largest matrix as fit a tile, at most those that are expected
    to hold work; one where the form never fuses.

    Args:
      groups: from `group_tokens`.
      matrices: stacks that a block is multiplied with.
      dtype: of activations.
      assignments: how many are expected.
      form: how products are written.
    """
    if not form.fused_tokens:
        return 1
    blocks = max(1, min(groups.expert.shape[0], assignments))
    fit = min(tile_elements(w.shape[-2:], w, groups.size, dtype, form) // math.prod(w.shape[-2:]) for w in matrices)
    trips = -(-blocks // max(1, fit))
    return -(-blocks // trips)


def grouped_sum(
    f: Callable[[Any, jax.Array, jax.Array], jax.Array],
    x: PyTree[Shaped[Array, "T ..."]],
    groups: Groups,
    at_once: int,
    weights: Float[Array, "T k"],
) -> Float32[Array, "T N"]:
    """Adds up f over every token's assignments, a few blocks at a time, and only those that hold work.

    Work grows with the routed tokens, not with the number of experts; memory with the tokens and one step's rows, not
    with the assignments that there could be.

    Args:
      f: (rows [C, size, ...], experts int32 [C], weights float32 [C, size]) -> [C, size, N], which contains the weights
        already. Rows, and weights, of places without an assignment are zero; what comes out of them is dropped.
      x: arrays [T, ...], of which f takes rows.
      groups: from `group_tokens`.
      at_once: C.
      weights: float [T, k], of the assignments.

    Returns:
      float32 [T, N]; zero for tokens without an assignment.
    """
    t, k = weights.shape
    blocks = groups.expert.shape[0]
    rows = at_once * groups.size
    pad = -blocks % at_once
    assignment = jnp.pad(groups.assignment, (0, pad * groups.size), constant_values=t * k)
    experts = jnp.pad(groups.expert, (0, pad))
    flat = weights.astype(jnp.float32).reshape(-1)

    def run(i: Any) -> tuple[jax.Array, jax.Array]:
        """(tokens [rows], what to add to them [rows, N])"""
        source = lax.dynamic_slice_in_dim(assignment, i * rows, rows)
        token = source // k

        def take(array: jax.Array, index: jax.Array) -> jax.Array:
            picked = array.at[index].get(mode="fill", fill_value=0)
            return picked.reshape(at_once, groups.size, *array.shape[1:])

        chosen = lax.dynamic_slice_in_dim(experts, i * at_once, at_once)
        out = f(jax.tree.map(lambda a: take(a, token), x), chosen, take(flat, source))
        return token, out.reshape(rows, -1).astype(jnp.float32)

    def add(i: Any, total: jax.Array) -> jax.Array:
        token, out = run(i)
        if t == 1:  # as a product, not a sum: XLA:CPU hands that reduction to a thread pool, at 0.4 ms a layer
            held = jnp.where(token == 0, 1.0, 0.0)  # IREE 3.13 miscompiles a boolean's cast inside a product
            return total + jnp.einsum("r,rn->n", held, out, precision=lax.Precision.HIGHEST)
        # Rows without an assignment add zeros to the last token: not every compiler drops what is out of bounds.
        out = jnp.where((token < t)[:, None], out, 0)
        return total.at[jnp.minimum(token, t - 1)].add(out, mode="promise_in_bounds")

    total = jnp.zeros((t, jax.eval_shape(run, 0)[1].shape[-1]), jnp.float32)
    if blocks == at_once:
        return add(0, total)
    return lax.fori_loop(0, (groups.used + at_once - 1) // at_once, add, total)
