"""Both ends of every family: ids to vectors, vectors to logits."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dsjax.numerics import Numerics
from quant import QArray, block_scaled_dot, look_up


@jax.named_scope("embed")
def embed(table: jax.Array | QArray, tokens: jax.Array, numerics: Numerics) -> jax.Array:
    """Rows of the embedding table, [B, T, D] in the activation dtype."""
    return numerics.round(look_up(table, tokens) if isinstance(table, QArray) else table[tokens])


@jax.named_scope("head")
def logits(
    hidden: jax.Array,
    head: jax.Array | QArray,
    n_new: jax.Array,
    want: str,
    finish: Callable[[jax.Array], jax.Array] = lambda hidden: hidden,
) -> jax.Array | None:
    """float32 logits of the "last" real position [B, V], of "all" [B, T, V], or "none".

    Args:
      hidden: [B, T, ...].
      head: [V, D].
      n_new: int32 [B].
      want: which positions.
      finish: what is left to do with hidden, [B, t, ...] -> [B, t, D], done for the wanted positions only.
    """
    if want == "none":
        return None
    if want == "all":
        return block_scaled_dot(finish(hidden), head)
    last = jnp.maximum(n_new - 1, 0).reshape(-1, *[1] * (hidden.ndim - 1))
    return block_scaled_dot(finish(jnp.take_along_axis(hidden, last, axis=1)), head)[:, 0]
