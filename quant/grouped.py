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
from jaxtyping import Array, Bool, Float, Float32, Int32, Shaped

from quant.formats import bfloat16_bits, bfloat16_of_bits
from quant.matmul import (
    FUSED_ELEMENTS,
    FUSED_TOKENS,
    Index,
    Weight,
    block_scaled_dot,
    can_fuse,
    tile_dot,
    tile_elements,
)
from quant.qarray import QArray

MAX_GROUP_ROWS = 128


@partial(jax.tree_util.register_dataclass, data_fields=["token", "place", "expert", "used"], meta_fields=["size"])
@dataclasses.dataclass(frozen=True)
class Groups:
    """Assignments (token, choice) sorted by expert into blocks of `size` rows, each block of one expert.

    P = T * k assignments, G blocks (a static bound; only the first `used` hold work). A single token's assignments in
    blocks of one row stay in the order of its choices.

    Attributes:
      token: int32 [G * size], the token in each row, T where the row is empty.
      place: int32 [T, k], the row of each assignment, G * size where it was masked out.
      expert: int32 [G], the expert of each block.
      used: int32 [], number of blocks that hold work.
      size: rows per block.
    """

    token: Any
    place: Any
    expert: Any
    used: Any
    size: int


def group_size(tokens: int, choices: int, experts: int) -> int:
    """Rows per block.

    Up to FUSED_TOKENS per expert on average, 1: the fused product, which re-reads an expert's bytes from cache where
    two blocks share it. Beyond, whole tiles of a matrix unit (16 rows), half above the mean load: larger blocks compute
    more padding, smaller ones decode an expert more often.
    """
    mean = tokens * choices / experts
    if tokens == 1 or mean <= FUSED_TOKENS:
        return 1
    return 16 * min(math.ceil(1.5 * mean / 16), MAX_GROUP_ROWS // 16)


def group_tokens(choices: Int32[Array, "T k"], experts: int, valid: Bool[Array, " T"], size: int) -> Groups:
    """Sorts assignments by expert into blocks, in static shapes.

    Args:
      choices: int32 [T, k], expert of each assignment.
      experts: E.
      valid: bool [T]; assignments of invalid tokens (padding) get no row.
      size: rows per block.
    """
    t, k = choices.shape
    p = t * k
    if t == 1 and size == 1:  # one token: its choices are distinct blocks as they come
        token = jnp.where(valid, 0, 1).astype(jnp.int32)
        place = jnp.where(valid[:, None] & (choices >= 0), jnp.arange(k, dtype=jnp.int32)[None], k)
        return Groups(jnp.tile(token, k), place, choices[0], jnp.where(valid[0], k, 0).astype(jnp.int32), 1)
    blocks = min(p, experts + p // size)
    flat = jnp.where(valid[:, None] & (choices >= 0), choices, experts).reshape(p)
    order = jnp.argsort(flat, stable=True)
    counts = jnp.zeros(experts + 1, jnp.int32).at[flat].add(1)[:experts]
    per_expert = (counts + size - 1) // size
    last_block = jnp.cumsum(per_expert)
    # Rank inside its expert and first block of its expert, for each assignment in sorted order.
    of = jnp.minimum(flat[order], experts - 1)
    rank = jnp.arange(p, dtype=jnp.int32) - (jnp.cumsum(counts) - counts)[of]
    row = jnp.where(flat[order] < experts, (last_block - per_expert)[of] * size + rank, blocks * size)
    token = jnp.full(blocks * size, t, jnp.int32).at[row].set((order // k).astype(jnp.int32), mode="drop")
    place = jnp.zeros(p, jnp.int32).at[order].set(row.astype(jnp.int32)).reshape(t, k)
    expert = jnp.searchsorted(last_block, jnp.arange(blocks), side="right").astype(jnp.int32)
    return Groups(token, place, jnp.minimum(expert, experts - 1), last_block[-1].astype(jnp.int32), size)


def expert_dot(
    x: Float[Array, "C size K"], w: Weight, experts: Int32[Array, " C"], index: Index = ()
) -> Float32[Array, "C size N"]:
    """Blocks of rows, each times its expert's matrix w[*index, experts[c]]; float32 [C, size, N].

    Args:
      x: float [C, size, K].
      w: [*lead, E, N, K].
      experts: int32 [C]; more than one only where C matrices fit a tile (`experts_at_once`).
      index: indices of the `lead` axes.
    """
    if x.shape[0] == 1:
        return block_scaled_dot(x, w, (*index, experts[0]))
    tile = w.gather((*index, experts)) if isinstance(w, QArray) else w.at[(*index, experts)].get(mode="clip")
    return tile_dot(tile, x)


def batched_dot(x: Float[Array, "G T K"], w: Weight, index: Index = ()) -> Float32[Array, "G T N"]:
    """x[g] times the transpose of w[*index, g] for every g: few tokens, many matrices at a time; else one by one, for
    XLA:CPU takes a product of several, whose operand was moved there, to float32.

    Args:
      x: float [G, T, K].
      w: [*lead, G, N, K].
      index: indices of the `lead` axes.
    """
    matrices, tokens = x.shape[:2]
    fit = FUSED_ELEMENTS // math.prod(w.shape[-2:]) if can_fuse(w.shape[-2:], w, tokens) else 1
    at_once = max(n for n in range(1, matrices + 1) if matrices % n == 0 and n <= max(1, fit))

    def run(first: Any) -> jax.Array:
        rows = lax.dynamic_slice_in_dim(x, first, at_once, axis=0)
        return expert_dot(rows, w, first + jnp.arange(at_once, dtype=jnp.int32), index)

    if at_once == matrices:
        return run(0)
    trips = jnp.arange(0, matrices, at_once)
    return lax.scan(lambda _, first: (None, run(first)), None, trips)[1].reshape(matrices, tokens, -1)


def experts_at_once(groups: Groups, matrices: Sequence[Weight], dtype: Any) -> int:
    """Blocks that one `expert_dot` takes: as many of the largest matrix as fit a tile, at most all of them."""
    blocks = groups.expert.shape[0]
    fit = min(tile_elements(w.shape[-2:], w, groups.size, dtype) // math.prod(w.shape[-2:]) for w in matrices)
    trips = -(-blocks // max(1, fit))
    return -(-blocks // trips)


def _by_row(values: Float[Array, "T k"], groups: Groups) -> Float32[Array, " rows"]:
    """The value of the assignment in every row, float32 [G * size]; zero in empty rows."""
    t, k = groups.place.shape
    rows = groups.token.shape[0]
    values = values.astype(jnp.float32)
    if t == 1 and groups.size == 1:
        return jnp.where(groups.place[0] < k, values[0], 0)  # in order
    return jnp.zeros(rows, jnp.float32).at[groups.place].set(values, mode="drop")


def grouped_map(
    f: Callable[..., jax.Array],
    x: Float[Array, "T K"],
    groups: Groups,
    at_once: int,
    row_values: Float[Array, "T k"] | None = None,
) -> Shaped[Array, "rows N"]:
    """Applies f to the blocks that hold work, `at_once` blocks at a time.

    Work grows with the routed tokens, not with the number of experts.

    Args:
      f: (rows [C, size, K], experts int32 [C]) -> [C, size, N]. Empty rows are zero. With `row_values`, f takes them as
        a third argument, float32 [C, size], zero in empty rows.
      x: float [T, K].
      groups: from `group_tokens`.
      at_once: C.
      row_values: float [T, k], one number per assignment, such as its routing weight.

    Returns:
      [>= G * size, N], a row per place in `groups`; rows of unused blocks are zero.
    """
    blocks = groups.expert.shape[0]
    trips = -(-blocks // at_once)
    pad = trips * at_once - blocks
    token = jnp.pad(groups.token, (0, pad * groups.size), constant_values=x.shape[0])
    experts = jnp.pad(groups.expert, (0, pad))
    values = None if row_values is None else jnp.pad(_by_row(row_values, groups), (0, pad * groups.size))

    def run(i: Any) -> jax.Array:
        rows = at_once * groups.size
        source = lax.dynamic_slice_in_dim(token, i * rows, rows)
        picked = x.at[source].get(mode="fill", fill_value=0).reshape(at_once, groups.size, -1)
        args = [picked, lax.dynamic_slice_in_dim(experts, i * at_once, at_once)]
        if values is not None:
            args.append(lax.dynamic_slice_in_dim(values, i * rows, rows).reshape(at_once, groups.size))
        return f(*args).reshape(rows, -1)

    if trips == 1:
        return run(0)
    shape = jax.eval_shape(run, 0)
    (rows, n), dtype = shape.shape, shape.dtype
    if dtype == jnp.bfloat16:  # XLA:CPU would widen the whole array at every update
        bits = grouped_map(lambda *a: bfloat16_bits(f(*a)), x, groups, at_once, row_values)
        return bfloat16_of_bits(bits)

    # Each trip stores the rows of the trip before: an update that is computed where it is stored takes one thread only
    # on XLA:CPU, one that was carried is a plain copy.
    def store(out: jax.Array, y: jax.Array, i: Any) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(out, y, i * rows, axis=0)

    def body(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        out, before = carry
        return store(out, before, jnp.maximum(i - 1, 0)), run(i)

    used = (groups.used + at_once - 1) // at_once
    out, last = lax.fori_loop(0, used, body, (jnp.zeros((trips * rows, n), dtype), jnp.zeros((rows, n), dtype)))
    return store(out, last, jnp.maximum(used - 1, 0))


def ungroup(rows: Float[Array, "rows N"], groups: Groups) -> Float[Array, "T k N"]:
    """The row of every assignment, zero where it was masked out; the inverse of `group_tokens`' ordering."""
    t, k = groups.place.shape
    if t == 1 and groups.size == 1:
        return rows[None, :k]  # in order, and zero where masked out; a gather would be fused with the product before it
    return bfloat16_of_bits(bfloat16_bits(rows).at[groups.place].get(mode="fill", fill_value=0))


def grouped_matmul(x: Float[Array, "T K"], w: Weight, groups: Groups, index: Index = ()) -> Float32[Array, "rows N"]:
    """Each block of rows times its expert's matrix: `grouped_map` of `expert_dot`.

    Args:
      x: float [T, K].
      w: [*lead, E, N, K], QArray or float.
      groups: from `group_tokens`.
      index: indices of the `lead` axes.

    Returns:
      float32 [>= G * size, N]; rows of unused blocks are zero.
    """
    at_once = experts_at_once(groups, [w], x.dtype)
    return grouped_map(lambda rows, experts: expert_dot(rows, w, experts, index), x, groups, at_once)
