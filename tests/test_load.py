"""Loaded leaves are the file's own bytes, moved a bounded region at a time."""

from __future__ import annotations

import math
from typing import Any

import emulator as em
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from helpers import GOLDENS, SEED, V3_NAMES, emulated, golden, sampled
from hypothesis import given, seed, settings
from jax.sharding import NamedSharding, PartitionSpec

from dsjax.checkpoint import load as loading
from dsjax.checkpoint.load import load, split_region
from dsjax.params import FLOAT32, VECTOR, Row, is_mtp, leaf_shape, table
from quant import BF16, E4M3, QArray
from sharding import Rules, make_mesh, parse_plan

WIDENED = (VECTOR, FLOAT32)
"""Held in float32, whatever float the file has: Hugging Face writes V3.2's norm of index keys in bfloat16."""


def _leaf(tree: Any, row: Row) -> Any:
    for key in row.path:
        tree = tree[key]
    return tree


def _rows(name: str) -> list[Row]:
    """Of what is held: a file may lack the MTP module that its config counts."""
    model = golden(name)
    return [r for r in table(model.config) if r.copy_of is None and ("mtp" in model.params or not is_mtp(r))]


def _file_bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view({1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


@pytest.mark.parametrize("name", V3_NAMES)
def test_leaves_are_the_files_bytes(name: str) -> None:
    """Codes and bfloat16 bit for bit; scales as stored; vectors widened; in the right place of every stack."""
    weights, _ = emulated(name)
    model, used = golden(name), set()
    for row in _rows(name):
        leaf = _leaf(model.params, row)
        for index, tensor in row.tensors():
            stored, scales = weights[tensor], weights.get(tensor + "_scale_inv")
            used |= {tensor, tensor + "_scale_inv"} & set(weights)
            if not isinstance(leaf, QArray):
                assert leaf.dtype == np.float32
                assert row.storage in WIDENED or stored.dtype == np.float32
                np.testing.assert_array_equal(_file_bytes(np.asarray(leaf[index])), _file_bytes(em.f32(stored)))
                continue
            codes = np.asarray(leaf.codes[index])
            np.testing.assert_array_equal(codes, _file_bytes(stored))
            assert leaf.format == (E4M3 if stored.dtype == em.E4M3 else BF16)
            assert (leaf.scales is None) == (scales is None)
            if scales is not None:
                assert leaf.block == (128, 128)
                found = np.asarray(leaf.scales[index])
                if found.dtype == np.uint8:
                    np.testing.assert_array_equal(em.ue8m0_decode(found), scales)
                else:
                    np.testing.assert_array_equal(_file_bytes(found), _file_bytes(scales))
    left = {n for n in weights if n not in used}
    mtp = f"model.layers.{model.config.num_hidden_layers}."
    assert left <= {mtp + "embed_tokens.weight", mtp + "shared_head.head.weight"}, left


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("v3-fp8-partial", "float32"),
        ("v3-fp8-ue8m0", "float32"),
        ("v31-terminus", "float32"),
        ("v3-fp8-e8m0", "uint8"),
        ("v3-fp8-u8", "uint8"),
    ],
)
def test_scales_stay_as_stored(name: str, dtype: str) -> None:
    """float32 stays float32 even where every scale is a power of two; E8M0, also as plain bytes, stays a byte."""
    leaves = jax.tree.leaves(golden(name).params, is_leaf=lambda x: isinstance(x, QArray))
    kinds = {leaf.scales.dtype.name for leaf in leaves if isinstance(leaf, QArray) and leaf.scales is not None}
    assert kinds == {dtype}


def test_terminus_is_mixed() -> None:
    """V3.1-Terminus: o_proj's scales are no powers of two, all others are; no bit of either is touched."""
    model = golden("v31-terminus")
    mantissas = {
        row.path[-1]: np.asarray(_leaf(model.params, row).scales).view(np.uint32) & 0x7FFFFF
        for row in _rows("v31-terminus")
        if row.path[1:2] == ("attention",) and row.storage != VECTOR
    }
    assert set(mantissas) == {"q_a", "q_b", "kv_a", "kv_b", "o"}
    for name, bits in mantissas.items():
        assert bits.any() == (name == "o"), name


@pytest.mark.parametrize("name", V3_NAMES)
def test_nothing_is_inflated(name: str) -> None:
    """Bytes on the device = bytes in the file, plus 2 for each value of a vector that bfloat16 stores."""
    weights, _ = emulated(name)
    model = golden(name)
    wanted = {n for row in _rows(name) for _, tensor in row.tensors() for n in (tensor, tensor + "_scale_inv")}
    # The emulator holds every scale as float32; where the leaf holds bytes, the file did.
    bytes_saved = sum(
        3 * leaf.scales.size
        for leaf in jax.tree.leaves(model.params, is_leaf=lambda x: isinstance(x, QArray))
        if isinstance(leaf, QArray) and leaf.scales is not None and leaf.scales.dtype == np.uint8
    )
    in_file = sum(w.nbytes for n, w in weights.items() if n in wanted) - bytes_saved
    widened = sum(
        2 * weights[tensor].size
        for row in _rows(name)
        if row.storage in WIDENED
        for _, tensor in row.tensors()
        if weights[tensor].dtype == em.BF16
    )
    on_device = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    assert on_device == in_file + widened


@pytest.mark.parametrize("name", sampled(V3_NAMES, 2, 60))
def test_staging_is_bounded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a limit of 1000 bytes: equal leaves, no region above the limit but single rows, all bytes moved once."""
    monkeypatch.setattr(loading, "STAGING_BYTES", 1000)
    model = golden(name)
    mtp = model.mtp_logits is not None
    staged: list[int] = []
    original = loading.LoadStats.staged

    def staged_too(self: loading.LoadStats, nbytes: int) -> None:
        staged.append(nbytes)
        original(self, nbytes)

    monkeypatch.setattr(loading.LoadStats, "staged", staged_too)
    _, params, stats = load(model.folder, mtp=mtp, in_place=False)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(model.params), strict=True):
        np.testing.assert_array_equal(a, b)
    leaves = jax.tree.leaves(params)
    longest_row = max(leaf.shape[-1] * leaf.dtype.itemsize for leaf in leaves)
    assert stats.peak_staging_bytes == max(staged) <= max(1000, longest_row)
    assert stats.bytes == sum(staged) == sum(leaf.nbytes for leaf in leaves)
    assert stats.regions == len(staged) > stats.bytes // max(1000, longest_row)


@pytest.mark.parametrize("name", sampled(V3_NAMES, 2, 61))
def test_filled_in_place(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU nothing is staged; regions of 1000 bytes and staged ones give the same leaves, to the bit."""
    monkeypatch.setattr(loading, "STAGING_BYTES", 1000)
    model = golden(name)
    _, params, stats = load(model.folder, mtp=model.mtp_logits is not None)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(model.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (stats.peak_staging_bytes, stats.regions) == (0, 0)
    assert stats.bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(params))


_REGIONS = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 7)), min_size=1, max_size=4)


@seed(SEED)
@settings(max_examples=200, deadline=None, database=None)
@given(_REGIONS, st.sampled_from([1, 2, 4]), st.integers(1, 600))
def test_regions_tile_the_leaf(bounds: list[tuple[int, int]], itemsize: int, limit: int) -> None:
    """Every element exactly once, each region at most the limit unless it is one row (or less) of the last axis."""
    region = tuple((start, start + size) for start, size in bounds)
    count = np.zeros([stop for _, stop in region], np.int64)
    for part in split_region(region, itemsize, limit):
        extents = [stop - start for start, stop in part]
        assert part[-1] == region[-1]  # a row is never cut
        assert all(n > 0 for n in extents)
        assert math.prod(extents) * itemsize <= limit or math.prod(extents[:-1]) == 1
        count[tuple(slice(a, b) for a, b in part)] += 1
    inside = np.zeros_like(count)
    inside[tuple(slice(a, b) for a, b in region)] = 1
    np.testing.assert_array_equal(count, inside)


@pytest.mark.parametrize("in_place", [True, False])
def test_replicated_over_a_mesh(in_place: bool) -> None:
    """Every device holds every byte; nothing is staged in larger pieces for it."""
    name, mesh = "v3-fp8-e8m0", make_mesh(parse_plan("dp=2,ep=2,tp=2"))
    where = NamedSharding(mesh, PartitionSpec())
    _, params, stats = load(GOLDENS / name, sharding=where, in_place=in_place)
    one = jax.tree.leaves(golden(name).params)
    for a, b in zip(jax.tree.leaves(params), one, strict=True):
        assert len(a.addressable_shards) == 8
        for shard in (a.addressable_shards[0], a.addressable_shards[-1]):
            np.testing.assert_array_equal(shard.data, b)
    assert stats.bytes == 8 * sum(leaf.nbytes for leaf in one)
    assert stats.peak_staging_bytes == (0 if in_place else max(leaf.nbytes for leaf in one))


def test_without_the_mtp_module() -> None:
    """It is left out unless asked for; the rest is the same."""
    config, params, _ = load(GOLDENS / "v3-mtp")
    assert "mtp" not in params
    assert config.num_nextn_predict_layers == 1
    full = golden("v3-mtp").params
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves({k: full[k] for k in params}), strict=True):
        np.testing.assert_array_equal(a, b)
    mtp = [r for r in table(config) if is_mtp(r) and r.copy_of is None]
    assert all(tuple(_leaf(full, r).shape) == leaf_shape(r, config) for r in mtp)


@pytest.mark.parametrize("in_place", [True, False])
def test_experts_are_split_as_they_are_loaded(in_place: bool) -> None:
    """Experts over eight devices by the table's logical axes, codes and scales alike, each device holding its part."""
    model = golden("v3-fp8-e8m0")
    mesh = make_mesh(parse_plan("ep=8"))

    def sharding(row: Row, part: str) -> NamedSharding:
        return NamedSharding(mesh, Rules({"experts": ("ep",)}, mesh.shape).spec(row.logical_axes))

    _, params, _ = load(model.folder, sharding=sharding, in_place=in_place)
    for row in _rows("v3-fp8-e8m0"):
        if is_mtp(row):
            continue
        whole, split = _leaf(model.params, row), _leaf(params, row)
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(split), strict=True):
            np.testing.assert_array_equal(a, b)
            parts = {shard.data.nbytes for shard in b.addressable_shards}
            assert parts == {b.nbytes // (8 if row.experts else 1)}
