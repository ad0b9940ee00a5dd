"""What tests of sharded loading share: what was loaded onto a mesh, held against what was loaded whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from dsjax.config import Config
from dsjax.layout import Layout
from dsjax.parallel import Parallel
from dsjax.params import Row, Stored, Tree, leaves
from quant import QArray, retile


def cut(params: Tree, found: Layout, config: Config) -> Iterator[tuple[Row, Any]]:
    """Rows and leaves of whole parameters, made finer by `retile` where the layout asks for it."""
    for row, leaf in leaves(params, config):
        if isinstance(leaf, QArray) and leaf.scales is not None:
            kind = "e8m0" if leaf.scales.dtype == np.uint8 else "f32"
            block = found.held(row, Stored(leaf.format.name, kind), config).block
            leaf = leaf if block == leaf.block else retile(leaf, block)
        yield row, leaf


def assert_cut(params: Tree, whole: Tree, meshed: Parallel) -> int:
    """Every shard on every device has the bits of its part of the whole, and the shape that the layout says.

    Returns:
      How many leaves have finer scale blocks than the whole ones.
    """
    found, config, finer = meshed.layout, meshed.config, 0
    specs = found.param_specs(params, config)
    local = found.local(params, specs)
    shapes = {row.path: leaf for row, leaf in leaves(local, config)}
    where = {row.path: leaf for row, leaf in leaves(meshed.place(specs), config)}
    loaded = dict(leaves(params, config))
    expected = dict(cut(whole, found, config))
    assert list(loaded) == list(expected)
    for row, leaf in loaded.items():
        assert jax.tree.structure(leaf) == jax.tree.structure(expected[row]), row.path
        finer += isinstance(leaf, QArray) and leaf.block != dict(leaves(whole, config))[row].block
        parts = zip(*map(jax.tree.leaves, (leaf, expected[row], shapes[row.path], where[row.path])), strict=True)
        for array, reference, shape, sharding in parts:
            assert array.sharding.is_equivalent_to(sharding, array.ndim), row.path
            assert len(array.addressable_shards) == meshed.mesh.size
            reference = np.asarray(reference)
            for shard in array.addressable_shards:
                assert (shard.data.shape, shard.data.dtype) == (shape.shape, shape.dtype)
                data = np.asarray(shard.data).view(np.uint8)
                np.testing.assert_array_equal(data, np.ascontiguousarray(reference[shard.index]).view(np.uint8))
    return finer
