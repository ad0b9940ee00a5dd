"""From logits to the next token, jittable."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32

from dsjax.errors import InputError

GREEDY_BELOW = 1e-5
"""A temperature below this takes the most likely token; dividing by it would overflow."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
      temperature: 0 takes the most likely token.
      top_p: draw from the fewest most likely tokens whose probabilities add up to this.
      top_k: draw from the k most likely tokens; 0 for all.
      seed: of the draws; a sequence's draws depend on the seed, its number and the position only.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"--temperature: expected a finite number from 0 on, found {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top-p: expected a number above 0 and up to 1, found {self.top_p}")
        if self.top_k < 0:
            raise InputError(f"--top-k: expected 0 or more, found {self.top_k}")


def sample(
    logits: Float32[Array, "B V"],
    sampling: Sampling,
    vocabulary: int,
    key: jax.Array,
    sequences: Int32[Array, " B"],
    positions: Int32[Array, " B"],
) -> Int32[Array, " B"]:
    """Draws one token per row.

    Args:
      logits: float32 [B, V].
      sampling: static.
      vocabulary: ids from here on are padding and never drawn; static.
      key: jax.random.key(sampling.seed), passed as an array so that another seed compiles nothing.
      sequences: int32 [B], each row's sequence number.
      positions: int32 [B], the position the token will take.

    Returns:
      int32 [B].
    """
    logits = jnp.where(jnp.arange(logits.shape[-1]) < vocabulary, logits, -jnp.inf)
    if sampling.temperature < GREEDY_BELOW:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scaled = (logits - logits.max(axis=-1, keepdims=True)) / sampling.temperature
    ids = None
    if sampling.top_p < 1 or sampling.top_k:  # only these need the tokens in order, which costs a sort
        scaled, ids = lax.top_k(scaled, min(sampling.top_k or vocabulary, vocabulary))
    if sampling.top_p < 1:
        probabilities = jax.nn.softmax(scaled, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        scaled = jnp.where(before < sampling.top_p, scaled, -jnp.inf)

    def draw(row: jax.Array, sequence: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.fold_in(key, sequence), position), row)

    place = jax.vmap(draw)(scaled, sequences, positions)
    if ids is not None:
        place = jnp.take_along_axis(ids, place[:, None], axis=-1)[:, 0]
    return place.astype(jnp.int32)
