"""Expert parallelism inside a manual shard_map: every token to the ranks that hold its experts, partial sums back.

Tokens differ on every rank, each rank holds E / n of the experts. Three ways, all without dropping a token whatever the
routing, and with the same result but for the order of float32 sums:

- "replicated": all ranks get all tokens; for few tokens.
- "all-to-all": a token goes once to each rank that has any of its experts. Every rank sends every rank C rows a round,
  where C is what uniform routing needs (`dispatch_plan.capacity`), and rounds go on until the fullest pair is done.
- "ragged": the same with exactly the rows that there are, where the backend has `ragged_all_to_all` (CPU has not).

What travels are unsigned integers of 1, 2 and 4 bytes, one array of each that is needed: a rank's rows, ids and weights
are one or two collectives. (XLA:CPU widens bfloat16 to float32 before it sends it.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32, PyTree, Shaped

from sharding.dispatch_plan import DISPATCHES, arrivals, capacity

Compute = Callable[[Any, jax.Array, jax.Array], jax.Array]
"""(rows [R, ...], choices int32 [R, k], weights float32 [R, k]) -> float32 [R, D]: the weighted sums over this rank's
experts. Choices count from this rank's first expert and are -1 where an expert is elsewhere or the row is empty; rows
without any give zero, whatever they hold."""

Bits = dict[int, jax.Array]
"""What travels, by bytes per element: unsigned integers [..., words]."""


def expert_parallel(
    compute: Compute,
    rows: PyTree[Shaped[Array, "T ..."]],
    choices: Int32[Array, "T k"],
    weights: Float32[Array, "T k"],
    valid: Bool[Array, " T"],
    *,
    axes: Sequence[str],
    experts: int,
    how: str,
    back: Any,
) -> Float32[Array, "T D"]:
    """sum_j weights[t, j] * expert(choices[t, j])(rows[t]), float32 [T, D], experts split over ranks.

    Runs inside a fully manual `jax.shard_map` with check_vma=False. Other axes of the mesh need not know: ranks that
    agree in `axes` but not in them do the same, on whatever tokens they have.

    Args:
      compute: the experts of this rank.
      rows: arrays [T, ...], what a token's experts take: activations, or codes and their scales.
      choices: int32 [T, k], experts of all ranks, distinct in each token; -1 for none.
      weights: float32 [T, k].
      valid: bool [T]; other tokens are computed nowhere and get zero.
      axes: mesh axes that experts and tokens are split over, n ranks. Rank r, counted with the last axis fastest, has
        experts r E / n to (r + 1) E / n - 1.
      experts: E.
      how: one of DISPATCHES; `dispatch_plan.choose_dispatch` names one.
      back: dtype that partial sums are rounded to on their way back, float32 or bfloat16. They are added in float32.

    Raises:
      ValueError: for another `how` or `back`, or if experts do not divide among the ranks.
    """
    axes = tuple(axes)
    ranks = math.prod(lax.axis_size(axis) for axis in axes)
    if how not in DISPATCHES:
        raise ValueError(f"expert dispatch: expected one of {', '.join(DISPATCHES)}, found {how!r}")
    if jnp.dtype(back) not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"expert dispatch: expected partial sums in float32 or bfloat16, found {jnp.dtype(back)}")
    if experts % ranks:
        raise ValueError(f"expert dispatch: {experts} experts do not divide among {ranks} ranks")
    if ranks == 1:
        return compute(rows, jnp.where(valid[:, None], choices, -1), weights)
    # Ids count from one: what is empty, or filled with zeros on the way, is nobody's.
    message = (rows, jnp.where(valid[:, None], choices + 1, 0), jnp.where(valid[:, None], weights, 0))
    first = lax.axis_index(axes) * (experts // ranks)

    def run(received: Bits) -> jax.Array:
        """[R, words] -> float32 [R, D]"""
        here, ids, shares = _unpack(received, message)
        local = ids - 1 - first
        mine = (ids > 0) & (local >= 0) & (local < experts // ranks)
        return compute(here, jnp.where(mine, local, -1), shares)

    if how == "replicated":
        return _replicated(run, _pack(message), axes, back)
    route = _Route(choices, valid, ranks, experts)
    return (_all_to_all if how == "all-to-all" else _ragged)(run, _pack(message), route, axes, experts, back)


# --- bits -----------------------------------------------------------------------------------------------------------


def _bits(x: jax.Array) -> jax.Array:
    """The same bytes as unsigned integers."""
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


def _pack(tree: Any) -> Bits:
    """Arrays [T, ...] as one of unsigned integers, [T, words], for each size of elements."""
    parts: dict[int, list[jax.Array]] = {}
    for leaf in jax.tree.leaves(tree):
        parts.setdefault(leaf.dtype.itemsize, []).append(_bits(leaf.reshape(leaf.shape[0], -1)))
    return {size: jnp.concatenate(arrays, axis=1) for size, arrays in parts.items()}


def _unpack(bits: Bits, like: Any) -> Any:
    """Arrays [R, ...] from [R, words], as `_pack` laid out those of `like`, [T, ...]."""
    used = dict.fromkeys(bits, 0)

    def take(leaf: jax.Array) -> jax.Array:
        size, width = leaf.dtype.itemsize, math.prod(leaf.shape[1:])
        part = bits[size][:, used[size] : used[size] + width]
        used[size] += width
        return lax.bitcast_convert_type(part, leaf.dtype).reshape(-1, *leaf.shape[1:])

    return jax.tree.map(take, like)


def _exchange(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """[n, ...] by receiver -> [n, ...] by sender."""
    return lax.all_to_all(x, axes, 0, 0, tiled=True)


# --- replicated -----------------------------------------------------------------------------------------------------


def _replicated(run: Callable[[Bits], jax.Array], message: Bits, axes: tuple[str, ...], back: Any) -> jax.Array:
    total = run(jax.tree.map(lambda bits: lax.all_gather(bits, axes, tiled=True), message))
    if jnp.dtype(back) == jnp.float32:
        return lax.psum_scatter(total, axes, scatter_dimension=0, tiled=True)
    # As many bytes as a reduce-scatter, but added in float32.
    tokens = next(iter(message.values())).shape[0]
    parts = _exchange(_bits(total.astype(back)).reshape(-1, tokens, total.shape[-1]), axes)
    return lax.bitcast_convert_type(parts, back).astype(jnp.float32).sum(axis=0)


# --- by destination -------------------------------------------------------------------------------------------------


class _Route:
    """Where a rank's tokens go.

    Attributes:
      tokens, ranks: T, n.
      counts: int32 [n], rows for each rank.
      queue: int32 [n, T], the tokens for each rank in order; what lies behind its count is no one's.
      home: int32 [T, k], the rank of each choice, n where an earlier choice of the token has the same or there is none.
      place: int32 [T, k], the token's place in that rank's queue.
    """

    def __init__(self, choices: jax.Array, valid: jax.Array, ranks: int, experts: int) -> None:
        self.tokens, self.ranks = choices.shape[0], ranks
        rank = jnp.where(valid[:, None] & (choices >= 0), choices // (experts // ranks), ranks)
        wanted = (rank[:, :, None] == jnp.arange(ranks)).any(axis=1)
        running = jnp.cumsum(wanted, axis=0, dtype=jnp.int32)
        self.counts = running[-1]
        self.queue = jnp.argsort(~wanted, axis=0, stable=True).astype(jnp.int32).T
        earlier = jnp.tril(rank[:, :, None] == rank[:, None, :], -1).any(axis=-1)
        self.home = jnp.where(earlier, ranks, rank)
        self.place = jnp.take_along_axis(running, jnp.minimum(rank, ranks - 1), axis=1) - 1

    def collect(self, returned: jax.Array, index: jax.Array) -> jax.Array:
        """Adds up, for every token, the returned rows at index [T, k]; those beyond the last are zero. float32 [T, D].

        Gathered, not scattered: the order of a sum is that of the token's choices on every backend.
        """
        parts = [returned.at[at].get(mode="fill", fill_value=0).astype(jnp.float32) for at in index.T]
        return sum(parts[1:], parts[0])


def _all_to_all(
    run: Callable[[Bits], jax.Array], message: Bits, route: _Route, axes: tuple[str, ...], experts: int, back: Any
) -> jax.Array:
    tokens, ranks = route.tokens, route.ranks
    size = capacity(tokens, route.home.shape[1], experts, ranks)
    beyond = jnp.arange(tokens) >= route.counts[:, None]
    queue = jnp.pad(jnp.where(beyond, tokens, route.queue), ((0, 0), (0, -tokens % size)), constant_values=tokens)

    def one_round(i: Any) -> jax.Array:
        """What the rows from i * size on, in every queue, add to the tokens: float32 [T, D]"""
        index = lax.dynamic_slice_in_dim(queue, i * size, size, axis=1)
        sent = jax.tree.map(lambda bits: bits.at[index].get(mode="fill", fill_value=0), message)
        received = jax.tree.map(lambda bits: _exchange(bits, axes).reshape(ranks * size, -1), sent)
        sums = run(received).astype(back)
        parts = _exchange(_bits(sums).reshape(ranks, size, -1), axes).reshape(ranks * size, -1)
        place = route.place - i * size
        now = (route.home < ranks) & (place >= 0) & (place < size)
        at = jnp.where(now, route.home * size + place, ranks * size)
        return route.collect(lax.bitcast_convert_type(parts, back), at)

    if size == tokens:
        return one_round(0)
    rounds = lax.pmax(route.counts.max(), axes) + size - 1
    total = jnp.zeros(jax.eval_shape(one_round, 0).shape, jnp.float32)
    return lax.fori_loop(0, rounds // size, lambda i, total: total + one_round(i), total)


def _ragged(
    run: Callable[[Bits], jax.Array], message: Bits, route: _Route, axes: tuple[str, ...], experts: int, back: Any
) -> jax.Array:
    tokens, ranks = route.tokens, route.ranks
    choices = route.home.shape[1]
    size = arrivals(tokens, choices, experts, ranks)
    me = lax.axis_index(axes)
    # Every rank knows all counts, [sender, receiver], hence where every row lies in its sender's rows, sorted by
    # receiver, and in the receiver's queue, sorted by sender.
    counts = lax.all_gather(route.counts, axes)
    in_sender = jnp.cumsum(counts, axis=1) - counts
    in_queue = jnp.cumsum(counts, axis=0) - counts

    sent = jnp.arange(tokens * min(choices, ranks), dtype=jnp.int32)
    receiver = jnp.searchsorted(jnp.cumsum(route.counts), sent, side="right").astype(jnp.int32)
    token = route.queue.at[receiver, sent - in_sender[me].at[receiver].get(mode="clip")].get(mode="clip")
    token = jnp.where(receiver < ranks, token, tokens)
    operand = jax.tree.map(lambda bits: bits.at[token].get(mode="fill", fill_value=0), message)

    def one_round(i: Any, returned: jax.Array) -> jax.Array:
        """Rows from i * size on, of every receiver's queue, there and back: bits [rows sent, D]"""
        start, end = (jnp.clip(at - in_queue, 0, counts) for at in (i * size, (i + 1) * size))
        amount = end - start
        from_sender = in_sender + start
        at_receiver = jnp.clip(in_queue - i * size, 0, size)

        def there(bits: jax.Array) -> jax.Array:
            empty = jnp.zeros((size, bits.shape[1]), bits.dtype)
            places = (from_sender[me], amount[me], at_receiver[me], amount[:, me])
            return lax.ragged_all_to_all(bits, empty, *places, axis_name=axes)

        sums = _bits(run(jax.tree.map(there, operand)).astype(back))
        places = (at_receiver[:, me], amount[:, me], from_sender[:, me], amount[me])
        return lax.ragged_all_to_all(sums, returned, *places, axis_name=axes)

    width = jax.eval_shape(lambda: run({n: jnp.zeros((size, b.shape[1]), b.dtype) for n, b in operand.items()})).shape[
        1
    ]
    returned = jnp.zeros((len(sent), width), jnp.dtype(f"uint{8 * jnp.dtype(back).itemsize}"))
    rounds = (counts.sum(axis=0).max() + size - 1) // size
    returned = lax.fori_loop(0, rounds, one_round, returned)
    begin = in_sender[me].at[route.home].get(mode="clip")
    at = jnp.where(route.home < ranks, begin + route.place, len(sent))
    return route.collect(lax.bitcast_convert_type(returned, back), at)
