"""The next token: greedy, and drawn with the probabilities that temperature, top-k and top-p leave."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.sampling import Sampling, sample

LOGITS = np.array([1.0, 5.0, 3.0, -1.0, 4.0, 9.0], np.float32)
VOCABULARY = 5  # the last id is padding


def draw(sampling: Sampling, count: int, logits: np.ndarray = LOGITS, vocabulary: int = VOCABULARY) -> np.ndarray:
    """`count` draws, as so many sequences."""
    rows = jnp.broadcast_to(jnp.asarray(logits), (count, logits.size))
    sequences, positions = jnp.arange(count, dtype=jnp.int32), jnp.full(count, 3, jnp.int32)
    return np.asarray(sample(rows, sampling, vocabulary, jax.random.key(sampling.seed), sequences, positions))


def probabilities(temperature: float, top_k: int = 0, top_p: float = 1.0) -> np.ndarray:
    """What should come out, in float64 from the definitions."""
    x = LOGITS[:VOCABULARY].astype(np.float64) / temperature
    p = np.exp(x - x.max())
    p /= p.sum()
    order = np.argsort(-p)
    kept = order[: top_k or VOCABULARY]
    q = p[kept] / p[kept].sum()
    kept = kept[np.cumsum(q) - q < top_p]
    out = np.zeros(LOGITS.size)
    out[kept] = p[kept] / p[kept].sum()
    return out


@pytest.mark.parametrize("temperature", [0.0, 1e-46, 1e-38, 1e-37, 1e-6, 1e-4])
def test_a_small_temperature_takes_the_most_likely(temperature: float) -> None:
    for scale in (1, 100):
        assert set(draw(Sampling(temperature), 4, LOGITS * scale)) == {1}


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1.0), Sampling(3.0, seed=2), Sampling(2.0, top_k=3), Sampling(3.0, top_p=0.7), Sampling(3.0, 0.8, 4, 5)],
)
def test_frequencies(sampling: Sampling) -> None:
    """20,000 draws: each frequency within five standard deviations, what is cut off never, padding never."""
    count = 20_000
    found = np.bincount(draw(sampling, count), minlength=LOGITS.size) / count
    expected = probabilities(sampling.temperature, sampling.top_k, sampling.top_p)
    assert (found[expected == 0] == 0).all()
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / count)).all()


def test_top_p_one_cuts_nothing() -> None:
    """The float32 cumulative sum reaches one before the last tokens, which must stay possible all the same."""
    logits = np.zeros(4096, np.float32)
    logits[0] = 20.0
    free = draw(Sampling(20.0, seed=1), 3000, logits, 4096)
    np.testing.assert_array_equal(draw(Sampling(20.0, top_p=1.0, seed=1), 3000, logits, 4096), free)
    assert len(set(free)) > 1000
