"""Both ends of every family: ids to vectors, vectors to logits.

Where the vocabulary is split over devices that have different slots, their tokens are put together for the one and the
other: ids and vectors travel, never the tables.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from dsjax.numerics import Numerics
from quant import QArray, block_scaled_dot, look_up
from sharding import UNSPLIT, Axes, Rules, gather, scatter_sum


def vocabulary_axes(rules: Rules) -> tuple[Axes, Axes]:
    """Mesh axes that split the vocabulary: those along which slots differ, and the others."""
    axes, slots = rules.axes("vocab"), rules.axes("slots")
    return tuple(a for a in axes if a in slots), tuple(a for a in axes if a not in slots)


@jax.named_scope("embed")
def embed(table: jax.Array | QArray, tokens: jax.Array, numerics: Numerics, rules: Rules = UNSPLIT) -> jax.Array:
    """Rows of the embedding table, [B, T, D] in the activation dtype."""
    differ, same = vocabulary_axes(rules)
    tokens = gather(tokens, differ)
    size = table.shape[-2]
    here = tokens - rules.rank("vocab") * size
    mine = (here >= 0) & (here < size) if differ or same else None
    rows = tokens if mine is None else jnp.clip(here, 0, size - 1)
    x = numerics.round(look_up(table, rows) if isinstance(table, QArray) else table[rows])
    if mine is None:
        return x
    x = jnp.where(mine[..., None], x, 0)  # one device has the row: the sum is exact in any dtype
    return scatter_sum(lax.psum(x, same) if same else x, differ)


@jax.named_scope("head")
def logits(
    hidden: jax.Array,
    head: jax.Array | QArray,
    n_new: jax.Array,
    want: str,
    numerics: Numerics,
    rules: Rules = UNSPLIT,
    finish: Callable[[jax.Array], jax.Array] = lambda hidden: hidden,
) -> jax.Array | None:
    """float32 logits of the "last" real position [B, V], of "all" [B, T, V], or "none".

    Args:
      hidden: [B, T, ...].
      head: [V, D].
      n_new: int32 [B].
      want: which positions.
      numerics: which say how the product is written.
      rules: where the vocabulary is split, the logits are of this device's part of it, for all slots of the devices
        that have the other parts.
      finish: what is left to do with hidden, [B, t, ...] -> [B, t, D], done for the wanted positions only.
    """
    if want == "none":
        return None
    differ, _ = vocabulary_axes(rules)
    if want == "all":
        return block_scaled_dot(gather(finish(hidden), differ), head, (), numerics.form)
    last = jnp.maximum(n_new - 1, 0).reshape(-1, *[1] * (hidden.ndim - 1))
    found = gather(finish(jnp.take_along_axis(hidden, last, axis=1)), differ)
    return block_scaled_dot(found, head, (), numerics.form)[:, 0]
