"""DeepSeek-V4 at its true size, without its bytes: what the files hold, counts part by part, and the plan of a load."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
import pytest

from dsjax.checkpoint.load import STAGING_BYTES, leaf_arrays, load_plan
from dsjax.config import V4Config, load_config
from dsjax.params import (
    INTEGER,
    VECTOR,
    WEIGHTS,
    Row,
    abstract_params,
    accounting,
    is_mtp,
    leaf_shape,
    matrix_shape,
    official_storage,
    scale_grid,
    table,
    tree_bytes,
)

FLASH, PRO = "deepseek-v4-flash", "deepseek-v4-pro"


def config_of(name: str) -> V4Config:
    config = load_config(name)
    assert isinstance(config, V4Config)
    return config


def tensors_of(row: Row, config: V4Config) -> tuple[int, int, int]:
    """Of a row in the official files: tensors, their elements (a byte of packed codes is one), their bytes."""
    shape, stored = matrix_shape(row, config), official_storage(row, config)
    size = {"e2m1": 1, "e4m3": 1, "bf16": 2, "f32": 4, "i32": 8}[stored.format]  # ids are int64 there
    elements = math.prod(shape) // (2 if stored.format == "e2m1" else 1)
    scales = math.prod(scale_grid(shape, stored.block)) if stored.scales else 0
    count = math.prod(row.stacking)
    return count * (1 + bool(scales)), count * (elements + scales), count * (elements * size + scales)


@pytest.mark.parametrize(
    ("name", "tensors", "elements", "nbytes"),
    [(FLASH, 69_187, 158_069_433_298, 159_609_485_896), (PRO, 145_116, 861_608_274_846, 864_704_792_696)],
)
def test_stored_totals(name: str, tensors: int, elements: int, nbytes: int) -> None:
    """The published files' headers: every tensor counts, the MTP module's, scales and ids too (spec V4, sources)."""
    config = config_of(name)
    totals = np.sum([tensors_of(row, config) for row in table(config)], axis=0, dtype=np.int64)
    assert tuple(totals) == (tensors, elements, nbytes)
    assert accounting(config)["bytes"] == nbytes


# Spec V4 7.1: first parts of the path below the stack -> parameters of Flash and Pro.
PARTS: dict[tuple[str, ...], tuple[int, int]] = {
    ("embed",): (529_530_880, 926_679_040),
    ("head",): (529_530_880, 926_679_040),
    ("attention",): (4_599_123_136, 18_293_589_632),
    ("compressor",): (261_464_576, 670_128_640),
    ("indexer",): (225_730_176, 501_384_960),
    ("attention_streams", "ffn_streams"): (33_818_898, 83_954_910),
    ("router",): (45_088_768, 167_903_232),
    ("bias",): (10_240, 22_272),
    ("experts",): (277_025_390_592, 1_547_396_186_112),
    ("shared",): (1_082_130_432, 4_029_677_568),
    ("input_norm", "post_norm", "norm", "head_streams"): (421_893, 996_357),
}


@pytest.mark.parametrize(("i", "name"), [(0, FLASH), (1, PRO)])
def test_totals_by_part(i: int, name: str) -> None:
    config = config_of(name)
    rows = [r for r in table(config) if not is_mtp(r) and r.storage != INTEGER]
    stacks = ("layers", "csa", "hca", "scored", "hashed")
    found: dict[tuple[str, ...], int] = dict.fromkeys(PARTS, 0)
    for row in rows:
        part = row.path[1] if row.path[0] in stacks else row.path[0]
        (key,) = [k for k in PARTS if part in k]
        found[key] += math.prod(leaf_shape(row, config))
    assert found == {part: counts[i] for part, counts in PARTS.items()}
    assert sum(found.values()) == accounting(config)["parameters"]
    ids = [math.prod(leaf_shape(r, config)) for r in table(config) if r.storage == INTEGER]
    assert sum(ids) == 2_327_040


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("mtp", [False, True])
def test_load_plan(mtp: bool, weights: str) -> None:
    """Loading Pro's 865 GB stages no more than STAGING_BYTES at a time, whatever it is held as."""
    config = config_of(PRO)
    rows = [r for r in table(config) if mtp or not is_mtp(r)]
    stored = {row.path: official_storage(row, config) for row in rows}
    stats = load_plan(config, stored, mtp=mtp, weights=weights)
    assert stats.peak_staging_bytes <= STAGING_BYTES
    abstract = abstract_params(config, mtp=mtp, weights=weights)
    assert stats.bytes == tree_bytes(abstract)
    assert stats.regions <= 2 * stats.bytes / STAGING_BYTES + 64 * len(jax.tree.leaves(abstract))
    if weights == "stored":
        # The files' own bytes; gains widened from bfloat16, ids narrowed from int64.
        gains = sum(2 * math.prod(leaf_shape(r, config)) for r in rows if r.storage == VECTOR)
        ids = sum(4 * math.prod(leaf_shape(r, config)) for r in rows if r.storage == INTEGER)
        assert stats.bytes == sum(tensors_of(r, config)[2] for r in rows) + gains - ids


def test_fp4_stays_packed() -> None:
    """Leaves of the routed experts: two codes a byte, a scale for 32 of them; one leaf for all layers and experts."""
    config = config_of(PRO)
    gate: Any = abstract_params(config)["layers"]["experts"]["gate"]
    assert gate.shape == (61, 384, 3072, 7168) and gate.codes.shape == (61, 384, 3072, 3584)
    assert gate.scales.shape == (61, 384, 3072, 224) and gate.block == (1, 32)
    assert gate.codes.dtype == gate.scales.dtype == np.uint8
    leaves = sum(len(leaf_arrays(r, config, official_storage(r, config))) for r in table(config) if not is_mtp(r))
    assert leaves == len(jax.tree.leaves(abstract_params(config)))
