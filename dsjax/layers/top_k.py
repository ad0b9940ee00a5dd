"""The k largest of a row, and where they are: of equal ones the first."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32

from quant.operator import operator


@operator("top_k", first="chlo")
def top_k(x: Float32[Array, "*batch n"], k: int) -> tuple[Float32[Array, "*batch k"], Int32[Array, "*batch k"]]:
    """`lax.top_k`, which StableHLO carries as a composite of `chlo.top_k` over a sort.

    Args:
      x: float32 [..., n], no NaN, no -0: XLA's own top-k puts 0 before -0, a sort or a maximum takes them for equal.
        Sums of products start at 0 and do not give -0.
      k: at most n.

    Returns:
      Values in descending order, and their int32 places; of equal values the one at the lowest place first.
    """
    values, places = lax.top_k(x, k)
    return values, places


@top_k.variant("sort", bound=0.0)
def _sorted(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """A stable sort of all, of which the first k are kept: no composite."""
    places = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    negated, places = lax.sort((-x, places), dimension=-1, is_stable=True, num_keys=1)
    return -negated[..., :k], places[..., :k]


@top_k.variant("loop", bound=0.0)
def _by_maxima(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The maximum, k times: two reductions and a select each, and no sort."""
    n = x.shape[-1]
    everywhere = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    column = lax.broadcasted_iota(jnp.int32, (*x.shape[:-1], k), x.ndim - 1)

    def take(j: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        values, places, taken = state
        left = jnp.where(taken, -jnp.inf, x)  # a row may hold -inf itself: `taken` tells
        best = left.max(axis=-1, keepdims=True)
        place = jnp.where((left == best) & ~taken, everywhere, n).min(axis=-1, keepdims=True)
        now = column == j
        return jnp.where(now, best, values), jnp.where(now, place, places), taken | (everywhere == place)

    start = jnp.zeros(column.shape, x.dtype), jnp.zeros(column.shape, jnp.int32), jnp.zeros(x.shape, bool)
    values, places, _ = lax.fori_loop(0, k, take, start)
    return values, places
