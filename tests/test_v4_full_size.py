"""DeepSeek-V4 at its true size, without its bytes: what the files hold, counts part by part, and the plan of a load."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import LOOKED_AT

from dsjax.checkpoint.load import STAGING_BYTES, leaf_arrays, load_plan
from dsjax.config import V4Config, load_config
from dsjax.models import v4
from dsjax.numerics import Numerics
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
from quant import reference_dot

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


_SUBPROCESS = """
import dataclasses, json, sys, time
import jax, jax.numpy as jnp
from functools import partial
from dsjax.config import load_config
from dsjax.models import v4
from dsjax.models.schedule import find_schedule
from dsjax.numerics import Numerics
from dsjax.params import abstract_params

config, sizes = load_config(sys.argv[1]), {}
schedule = find_schedule(v4.layer_kinds(config))
for layers in (config.num_hidden_layers, schedule.prefix + 2 * schedule.period):
    ratios = config.compress_ratios[:layers]
    c = dataclasses.replace(config, num_hidden_layers=layers, compress_ratios=ratios)
    params, numerics = abstract_params(c), Numerics("native").for_checkpoint(c)
    cache = jax.eval_shape(partial(v4.new_cache, c, numerics, 1, 1 << 20))
    for tokens in (1, 256):
        step = jax.jit(partial(v4.step, c, numerics), donate_argnums=1)
        new = jax.ShapeDtypeStruct((1, tokens), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
        sizes[f"{layers},{tokens}"] = len(step.lower(params, cache, *new).as_text())
    if layers == config.num_hidden_layers:
        seconds = time.process_time()
        # Not ru_maxrss, which starts at what the parent held when it forked.
        peak = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) * 1024
print(json.dumps({"seconds": seconds, "peak": peak, "sizes": sizes, "schedule": dataclasses.asdict(schedule)}))
"""


@pytest.mark.parametrize("name", [FLASH, PRO])
def test_traces_and_lowers_fast_and_small(name: str) -> None:
    """In a fresh process, imports included: decode and prefill of all layers at 1 Mi positions, in 20 s and 3 GB.

    Seconds are of all threads together: no less than they take on an idle machine. The module of all layers is as large
    as that of the layers before the period and two periods: 5 layers are written.
    """
    done = subprocess.run([sys.executable, "-c", _SUBPROCESS, name], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["seconds"] < 20, found
    assert found["peak"] < 3e9, found
    layers = config_of(name).num_hidden_layers
    schedule = found["schedule"]
    assert (schedule["prefix"], schedule["period"]) == (3, 2)
    assert schedule["prefix"] + schedule["period"] * schedule["repeats"] == layers
    for tokens in (1, 256):
        assert found["sizes"][f"{layers},{tokens}"] <= 1.01 * found["sizes"][f"7,{tokens}"], found


# --- what XLA makes of a step ----------------------------------------------------------------------------------------

SHORT, LONG = 4088, 65528  # capacities 4096 and 65536


def _narrow() -> V4Config:
    """Flash at its full width, a layer of each kind, the first one with hashed experts."""
    return dataclasses.replace(config_of(FLASH), num_hidden_layers=3, compress_ratios=(0, 4, 128, 0), num_hash_layers=1)


@lru_cache
def _decode(max_length: int) -> tuple[Any, int]:
    """One token of one slot in native, compiled, its cache donated; and the cache's bytes."""
    config = _narrow()
    numerics = Numerics("native").for_checkpoint(config)
    cache = jax.eval_shape(partial(v4.new_cache, config, numerics, 1, max_length))
    assert cache.capacity == max_length + 8
    step = jax.jit(partial(v4.step, config, numerics), donate_argnums=1)
    new, row = jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    compiled = step.lower(abstract_params(config), cache, new, row).compile(LOOKED_AT)
    return compiled, tree_bytes(cache)


@pytest.mark.full  # half a minute of compiling
def test_decode_holds_neither_cache_nor_expert() -> None:
    """All of the cache is aliased; temporaries do not grow with it, and are less than one expert's packed codes."""
    temporary = []
    for max_length in (SHORT, LONG):
        compiled, cache_bytes = _decode(max_length)
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes == cache_bytes
        temporary.append(memory.temp_size_in_bytes)
    print("temporary", temporary, "cache", cache_bytes)
    assert temporary[0] == temporary[1] < 3 * 4096 * 2048 // 2


def _whole_experts(text: str) -> list[str]:
    """Float arrays in optimised HLO with the elements of an expert's matrix, or a stack of them, in whatever split.

    Inside a loop fusion nothing is held: only its operands and results count.
    """
    text = re.sub(r"^%fused_computation.*?^}", "", text, flags=re.DOTALL | re.MULTILINE)
    found = []
    for dtype, shape in set(re.findall(r"\b(f16|bf16|f32|f64)\[([0-9,]+)\]", text)):
        dims = [n for n in map(int, shape.split(",")) if n > 1]
        if math.prod(dims) % (4096 * 2048) == 0 and any(math.prod(dims[i:]) in (4096, 2048) for i in range(len(dims))):
            found.append(f"{dtype}[{shape}]")
    return found


def test_no_expert_is_ever_decoded_whole() -> None:
    """In float32 or bfloat16; one that is would be seen."""
    assert _whole_experts(_decode(SHORT)[0].as_text()) == []
    gate = abstract_params(_narrow())["layers"]["experts"]["gate"]
    x = jax.ShapeDtypeStruct((1, gate.shape[-1]), jnp.float32)
    whole = jax.jit(lambda x, w: reference_dot(x, w, (1, 5))).lower(x, gate).compile()
    assert _whole_experts(whole.as_text())
