"""Steps of true size, compiled for TPUs that are not there: what XLA:TPU makes of them."""

from __future__ import annotations

import importlib.util
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.layout import Format

from dsjax.aot import Shape, account, compile_step, topology_devices
from dsjax.backend import weight_placement
from dsjax.cli.main import main
from dsjax.errors import InputError
from dsjax.numerics import Numerics
from dsjax.parallel import parallel
from dsjax.plan.placement import Placement, load_model
from quant import E2M1, E4M3, TILED, QArray, block_scaled_dot
from sharding import parse_plan
from sharding.footprint import largest
from sharding.hlo import parse

pytestmark = pytest.mark.aot


def _account(name: str, plan: str, topology: str, shape: Shape, attention: str = "heads") -> dict[str, Any]:
    model = load_model(name, Numerics())
    many = parallel(
        model.config, parse_plan(plan), model.numerics, attention=attention, devices=topology_devices(topology)
    )
    return account(compile_step(model, many, shape), Placement(model, many.layout), shape)


def _check(found: dict[str, Any], expert_bytes: int, sent: float = 1.03) -> None:
    """Nothing is copied but activations; what is sent is what is planned; the cache stays where it is."""
    assert found["argument_bytes"] == pytest.approx(found["counted_bytes"], rel=0.1)
    assert found["alias_bytes"] >= found["cache_bytes"]
    assert found["temp_bytes"] <= found["temp_bound_bytes"]
    assert found["largest_array"]["bytes"] < expert_bytes
    assert 0.97 <= sum(found["sent_bytes"].values()) / found["planned_sent_bytes"] <= sent
    assert found["largest_collective"]["bytes"] <= found["largest_planned_collective_bytes"]
    assert found["peak_rss_bytes"] < 8e9


def test_v3_decodes_on_64_chips_without_a_copy() -> None:
    """671B: no array as large as one dequantised matrix of a device's part of an expert."""
    found = _account("deepseek-v3", "ep=16,tp=4", "v5p:4x4x4", Shape(16, 1, 32760))
    _check(found, 512 * 7168 * 4)


@pytest.mark.full
@pytest.mark.parametrize("attention", ["heads", "slots"])
def test_v4_pro_decodes_on_64_chips_without_a_copy(attention: str) -> None:
    """1.6T, four sequences of a million tokens by heads, one for each of 16 devices by slots."""
    shape = Shape(4 if attention == "heads" else 16, 1, 1048560)
    found = _account("deepseek-v4-pro", "ep=16,tp=4", "v5p:4x4x4", shape, attention)
    _check(found, 768 * 7168 * 4, sent=1.03 if attention == "heads" else 2.0)  # a small reduce-scatter is an all-reduce


def _stack(fp4: bool, layers: int, experts: int, n: int, k: int) -> QArray:
    """Shapes of a stack on one chip, as `backend.weight_placement` places it."""
    where = jax.sharding.SingleDeviceSharding(topology_devices("v5p:2x2x1")[0])

    def shape(*sizes: int, dtype: Any) -> jax.ShapeDtypeStruct:
        placed = weight_placement(where, jax.ShapeDtypeStruct(sizes, dtype), "tpu")
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=placed)

    lead = (layers, experts)
    if fp4:
        codes, scales = shape(*lead, n, k // 2, dtype=jnp.uint8), shape(*lead, n, k // 32, dtype=jnp.uint8)
        return QArray(codes, scales, E2M1, (1, 32))
    grid = (-(-n // 128), -(-k // 128))
    return QArray(shape(*lead, n, k, dtype=jnp.uint8), shape(*lead, *grid, dtype=jnp.float32), E4M3, (128, 128))


@pytest.mark.parametrize(
    ("fp4", "layers", "experts", "n", "k", "tokens"),
    [
        (False, 58, 16, 512, 7168, 1),
        (False, 58, 16, 7168, 512, 128),
        (True, 61, 24, 768, 7168, TILED.block_rows),
        (True, 61, 24, 7168, 768, TILED.block_rows),
        pytest.param(False, 58, 16, 512, 7168, 128, marks=pytest.mark.full),
        pytest.param(False, 58, 16, 7168, 512, 1, marks=pytest.mark.full),
        pytest.param(True, 61, 24, 768, 7168, 128, marks=pytest.mark.full),
        pytest.param(True, 61, 24, 7168, 768, 128, marks=pytest.mark.full),
    ],
)
def test_experts_are_read_where_they_lie(fp4: bool, layers: int, experts: int, n: int, k: int, tokens: int) -> None:
    """Chosen experts of a scanned stack, one by one: nothing is written that is as large as a matrix in float32.

    V3's and Pro's gate and down projections; FP4 occurs in blocks of eight rows and more.
    """
    w = _stack(fp4, layers, experts, n, k)
    where = w.codes.sharding.sharding if isinstance(w.codes.sharding, Format) else w.codes.sharding
    x = jax.ShapeDtypeStruct((tokens, k), jnp.bfloat16, sharding=where)
    chosen = jax.ShapeDtypeStruct((16,), jnp.int32, sharding=where)

    def run(w: QArray, x: jax.Array, chosen: jax.Array) -> jax.Array:
        def layer(x: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
            def add(j: Any, y: jax.Array) -> jax.Array:
                return y + block_scaled_dot(x, w, (i, chosen[j]), TILED)

            y = jax.lax.fori_loop(0, chosen[0], add, jnp.zeros((tokens, n)))
            return x + y[:, :1].astype(x.dtype), None

        return jax.lax.scan(layer, x, jnp.arange(layers))[0]

    compiled = jax.jit(run).lower(w, x, chosen).compile()
    assert largest(parse(compiled.as_text()))[0].nbytes < math.prod((n, k)) * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 4 * n * k


def test_the_command_line_says_both(capsys: pytest.CaptureFixture[str]) -> None:
    """A dense model, which compiles soonest: our figures and XLA's, as a table and as JSON."""
    command = ["plan", "deepseek-r1-distill-qwen-1.5b", "--cards", "4", "--memory", "16GB", "--mesh", "tp=2"]
    command += ["--context", "1000", "--chunk", "32", "--aot", "v5e:2x2"]
    assert main([*command, "--json"]) == 0
    aot = json.loads(capsys.readouterr().out.splitlines()[-1])["aot"]
    assert aot["topology"] == "v5e:2x2" and "TPU v5" in aot["device"]
    for step, tokens in (("decode", 1), ("prefill", 32)):
        assert aot[step]["tokens"] == tokens
        _check(aot[step], 8960 * 1536 * 4)


def test_what_cannot_be_compiled_for() -> None:
    with pytest.raises(InputError, match="--aot v99:1x1: expected a topology like v5p:4x4x4, found none of that name"):
        topology_devices("v99:1x1")
    with pytest.raises(InputError, match="devices"):
        _account("deepseek-v3", "ep=16,tp=4", "v5e:2x2", Shape(1, 1, 100))


def test_without_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="expected libtpu, of the version that jax\\[tpu\\] names, found none"):
        topology_devices("v5p:2x2x1")
