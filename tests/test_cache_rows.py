"""Rows written into caches, against a loop in NumPy: padding, places beyond the end, rings that wrap."""

from __future__ import annotations

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.cache.rows import write_rows
from dsjax.cache.v4 import write_ring
from quant.operator import choosing

LAYERS, SLOTS, PLACES, WIDTH = 3, 2, 6, 4


@pytest.fixture(autouse=True, params=write_rows.variants)
def variant(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every way to write."""
    with choosing({"write_rows": request.param}):
        yield


def _given(tokens: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(tokens)
    rows = random.standard_normal((LAYERS, SLOTS, PLACES, WIDTH)).astype(np.float32)
    return rows, random.standard_normal((SLOTS, tokens, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("counts", [(4, 1), (0, 3), (0, 0)])
@pytest.mark.parametrize("starts", [(0, 2), (5, 6)])
def test_rows_that_do_not_count_change_nothing(counts: tuple[int, int], starts: tuple[int, int]) -> None:
    """Their numbers may lie beyond the last place."""
    rows, new = _given(4)
    numbers = np.array(starts, np.int32)[:, None] + np.arange(4, dtype=np.int32)
    counts_there = [min(c, max(PLACES - s, 0)) for c, s in zip(counts, starts, strict=True)]
    valid = np.arange(4) < np.array(counts_there)[:, None]
    expected = rows.copy()
    for slot, count in enumerate(counts_there):
        for t in range(count):
            expected[1, slot, starts[slot] + t] = new[slot, t]
    np.testing.assert_array_equal(write_rows(jnp.asarray(rows), 1, *map(jnp.asarray, (numbers, valid, new))), expected)


@pytest.mark.parametrize("tokens", [1, 4, PLACES, PLACES + 1, 3 * PLACES])
@pytest.mark.parametrize("start", [0, 5, 16])
def test_a_ring_keeps_the_last(tokens: int, start: int) -> None:
    rows, new = _given(tokens)
    positions = np.array([[start], [start + 3]], np.int32) + np.arange(tokens, dtype=np.int32)
    for counts in ((tokens, tokens // 2), (0, tokens - 1)):
        valid = np.arange(tokens) < np.array(counts)[:, None]
        expected = rows.copy()
        for slot, count in enumerate(counts):
            for t in range(count):
                expected[2, slot, positions[slot, t] % PLACES] = new[slot, t]
        np.testing.assert_array_equal(
            write_ring(jnp.asarray(rows), 2, *map(jnp.asarray, (positions, valid, new))), expected
        )
