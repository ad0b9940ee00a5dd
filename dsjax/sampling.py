"""From logits to the next token, jittable."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32

from dsjax.errors import InputError
from sharding import UNSPLIT, Axes, Rules, gather

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
    rules: Rules = UNSPLIT,
) -> Int32[Array, " B"]:
    """Draws one token per row. Where the vocabulary is split, candidates travel, not logits, and all devices that share
    it draw the same; only `top_p` without `top_k` needs all logits everywhere.

    Args:
      logits: float32 [B, V]; this device's part of them where "vocab" is split.
      sampling: static.
      vocabulary: ids from here on are padding and never drawn; static.
      key: jax.random.key(sampling.seed), passed as an array so that another seed compiles nothing.
      sequences: int32 [B], each row's sequence number.
      positions: int32 [B], the position the token will take.

    Returns:
      int32 [B].
    """
    size, axes = logits.shape[-1], rules.axes("vocab")
    ids = jnp.broadcast_to(rules.rank("vocab") * size + jnp.arange(size, dtype=jnp.int32), logits.shape)
    logits = jnp.where(ids < vocabulary, logits, -jnp.inf)
    if sampling.temperature < GREEDY_BELOW:
        return _best(logits, ids, axes)
    top = logits.max(axis=-1, keepdims=True)
    scaled = (logits - (lax.pmax(top, axes) if axes else top)) / sampling.temperature

    def noise(width: int) -> jax.Array:
        """The same on every device: float32 [B, width]."""

        def draw(sequence: jax.Array, position: jax.Array) -> jax.Array:
            return jax.random.gumbel(jax.random.fold_in(jax.random.fold_in(key, sequence), position), (width,))

        return jax.vmap(draw)(sequences, positions)

    if sampling.top_p == 1 and not sampling.top_k:
        return _best(scaled + rules.part("vocab", noise(size * rules.ways("vocab")), dim=1), ids, axes)
    # Only these need the tokens in order, which costs a sort.
    most = min(sampling.top_k or vocabulary, vocabulary)
    for part in (axes, ()) if axes else ((),):  # the best of each device, then of these
        scaled, at = lax.top_k(scaled, min(most, scaled.shape[-1]))
        ids = jnp.take_along_axis(ids, at, axis=-1)
        scaled, ids = gather(scaled, part, dim=1), gather(ids, part, dim=1)
    if sampling.top_p < 1:
        probabilities = jax.nn.softmax(scaled, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        scaled = jnp.where(before < sampling.top_p, scaled, -jnp.inf)
    return _best(scaled + noise(most), ids, ())


def _best(scores: jax.Array, ids: jax.Array, axes: Axes) -> jax.Array:
    """The id with the highest score, int32 [B]; of equal ones the first. Of all parts along `axes`."""
    for part in (axes, ()) if axes else ((),):
        at = jnp.argmax(scores, axis=-1, keepdims=True)
        scores, ids = (gather(jnp.take_along_axis(a, at, axis=-1), part, dim=1) for a in (scores, ids))
    return ids[:, 0]
