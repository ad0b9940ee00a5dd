"""`lax.ragged_all_to_all` for XLA:CPU, which lacks it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def emulated_ragged(
    operand: jax.Array,
    output: jax.Array,
    input_offsets: jax.Array,
    send_sizes: jax.Array,
    output_offsets: jax.Array,
    recv_sizes: jax.Array,
    *,
    axis_name: tuple[str, ...],
) -> jax.Array:
    """What is documented, by all-gathers; ones everywhere if sizes do not agree or a slice does not fit."""
    me = lax.axis_index(axis_name)
    sent, start, size, to = (lax.all_gather(a, axis_name) for a in (operand, input_offsets, send_sizes, output_offsets))
    start, size, to = start[:, me], size[:, me], to[:, me]
    row = jnp.arange(output.shape[0])[None]
    hit = (row >= to[:, None]) & (row < (to + size)[:, None])
    sender = jnp.argmax(hit, axis=0)
    source = sent.at[sender, start[sender] + row[0] - to[sender]].get(mode="clip")
    result = jnp.where(hit.any(axis=0)[:, None], source, output)
    fits = (start >= 0) & (start + size <= operand.shape[0]) & (to >= 0) & (to + size <= output.shape[0])
    right = (fits & (size == recv_sizes)).all() & (hit.sum(axis=0) <= 1).all()
    return jnp.where(right, result, jnp.ones_like(output))
