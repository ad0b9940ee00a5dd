"""Mesh plans and axis rules; and the spike: Flax modules made of local shards inside one manual shard_map."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FLOAT32, worst
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dsjax.cache import Cache
from dsjax.cache.per_token import init_cache
from dsjax.config import Config, DenseConfig, parse_config
from dsjax.layers.attend import Call
from dsjax.layers.ffn import SwiGLU
from dsjax.layers.gqa import GroupedQueryAttention
from dsjax.layers.mla import Attention, mla_rope_table
from dsjax.layers.rope import rope_frequencies, rope_table
from dsjax.numerics import Numerics
from dsjax.params import LINEAR, Row, leaf_shape, table
from dsjax.presets import preset
from quant import E4M3, QArray, quantise
from sharding import AXES, Plan, make_mesh, parse_plan, partition_spec

# --- plans and rules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "plan"),
    [("", Plan()), ("tp=4", Plan(tp=4)), ("dp=2,ep=8,tp=4", Plan(2, 8, 4)), ("tp=4,dp=2", Plan(dp=2, tp=4))],
)
def test_parse_plan(text: str, plan: Plan) -> None:
    assert parse_plan(text) == plan
    assert plan.devices == plan.dp * plan.ep * plan.tp


@pytest.mark.parametrize(
    "text", ["pp=2", "tp", "tp=", "tp=0", "tp=-1", "tp=2,tp=2", "tp=1.5", "tp=x", "tp=2;ep=2", " "]
)
def test_parse_plan_refuses(text: str) -> None:
    """And quotes what it was given."""
    with pytest.raises(ValueError, match="expected axes dp, ep, tp with positive extents") as error:
        parse_plan(text)
    assert repr(text) in str(error.value)


def test_make_mesh() -> None:
    """The first devices, all axes there, automatic."""
    mesh = make_mesh(Plan(ep=2, tp=2))
    assert mesh.axis_names == AXES == ("dp", "ep", "tp")
    assert dict(mesh.shape) == {"dp": 1, "ep": 2, "tp": 2}
    assert list(mesh.devices.reshape(-1)) == jax.devices()[:4]
    assert set(mesh.axis_types) == {AxisType.Auto}
    with pytest.raises(ValueError, match="needs 32 devices, found 16"):
        make_mesh(Plan(ep=8, tp=4))


def test_partition_spec() -> None:
    rules = {"heads": "tp", "experts": ("ep", "tp"), "vocab": "tp"}
    assert partition_spec(("layers", "heads", "q_lora"), rules) == P(None, "tp", None)
    assert partition_spec(("layers", "experts", "expert_ffn", "hidden"), rules) == P(None, ("ep", "tp"), None, None)
    assert partition_spec((), rules) == P()
    with pytest.raises(ValueError, match="would use a mesh axis twice"):
        partition_spec(("heads", "vocab"), rules)
    with pytest.raises(ValueError, match="would use a mesh axis twice"):
        partition_spec(("experts", "heads"), rules)


# --- the spike -------------------------------------------------------------------------------------------------------

RULES = {"ffn": "tp", "heads": "tp", "kv_heads": "tp"}


def _config(tp: int) -> Config:
    """Every width that is split is a multiple of 128 * tp, so that scales split with their codes."""
    return parse_config(
        {
            **preset("deepseek-v3"),
            "vocab_size": 128,
            "hidden_size": 256,
            "intermediate_size": 128 * tp,
            "num_hidden_layers": 2,
            "first_k_dense_replace": 2,
            "num_nextn_predict_layers": 0,
            "num_attention_heads": 2 * tp,
            "q_lora_rank": 128,
            "kv_lora_rank": 128,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 64,
            "v_head_dim": 64,
        }
    )


def _parameters(config: Config, part: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Random leaves of dense.<part>, a distill's layers.<part>, linear ones in FP8, and PartitionSpecs by the table."""
    random = np.random.default_rng(3)
    values: dict[str, Any] = {}
    specs: dict[str, Any] = {}
    rows: list[Row] = [r for r in table(config) if r.path[:2] in {("dense", part), ("layers", part)}]
    for row in rows:
        shape = leaf_shape(row, config)
        x = jnp.asarray(random.standard_normal(shape, np.float32) * shape[-1] ** -0.5)
        leaf = quantise(x, E4M3, (128, 128)) if row.storage == LINEAR else 1 + x
        values[row.path[-1]] = leaf
        spec = partition_spec(row.logical_axes, RULES)
        specs[row.path[-1]] = jax.tree.map(lambda _, spec=spec: spec, leaf)  # codes and scales split alike
    return values, specs


def _local(config: Config, tp: int) -> Config:
    """What a shard sees: fewer heads; widths of feed-forward layers come from the leaves."""
    fewer = {"num_attention_heads": config.num_attention_heads // tp}
    if isinstance(config, DenseConfig):
        fewer["num_key_value_heads"] = config.num_key_value_heads // tp
    return dataclasses.replace(config, **fewer)


@pytest.mark.parametrize("tp", [4, 8])
def test_swiglu_from_local_shards(tp: int) -> None:
    config, mesh = _config(tp), make_mesh(Plan(tp=tp))
    params, specs = _parameters(config, "ffn")
    x = jnp.asarray(np.random.default_rng(4).standard_normal((3, 256), np.float32))

    def local(params: dict[str, Any], x: jax.Array) -> jax.Array:
        width = config.intermediate_size // tp
        assert params["gate"].shape == (2, width, 256)
        assert params["down"].codes.shape == (2, 256, width)
        assert params["down"].scales.shape == (2, 2, width // 128)
        return jax.lax.psum(SwiGLU(FLOAT32, params)(x, 1), "tp")

    def whole(params: dict[str, Any], x: jax.Array) -> jax.Array:
        return SwiGLU(FLOAT32, params)(x, 1)

    expected = jax.jit(whole)(params, x)
    manual = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(specs, P()), out_specs=P(), check_vma=False))
    _check(manual, whole, params, specs, mesh, (x,), expected)


@pytest.mark.parametrize(
    ("tp", "form"),
    [
        (4, "absorbed"),
        (8, "naive"),
        pytest.param(8, "absorbed", marks=pytest.mark.full),
        pytest.param(4, "naive", marks=pytest.mark.full),
    ],
)
def test_attention_from_local_shards(tp: int, form: str) -> None:
    """Heads split, the latent cache replicated (spec V3 2.4); only the output product is summed."""
    config, mesh = _config(tp), make_mesh(Plan(tp=tp))
    params, specs = _parameters(config, "attention")
    assert specs["q_b"].codes == P(None, "tp", None)
    assert specs["o"].scales == P(None, None, "tp")
    assert specs["kv_a"].codes == P(None, None, None)
    numerics = Numerics("plain", "float32", form)
    x = jnp.asarray(np.random.default_rng(5).standard_normal((2, 5, 256), np.float32))
    cache = init_cache(config, numerics, 2, 5)

    def attention(config: Config, params: dict[str, Any], x: jax.Array, cache: Cache) -> Any:
        positions = jnp.broadcast_to(jnp.arange(5, dtype=jnp.int32), (2, 5))
        module = Attention(config, numerics, params)
        call = Call(positions, jnp.ones((2, 5), bool), mla_rope_table(config, positions), jnp.int32(1))
        out, cache = module(x, cache, (1, 1), call)
        return out, cache.rows

    def local(params: dict[str, Any], x: jax.Array, cache: Cache) -> Any:
        out, rows = attention(_local(config, tp), params, x, cache)
        return jax.lax.psum(out, "tp"), rows

    def whole(params: dict[str, Any], x: jax.Array, cache: Cache) -> Any:
        return attention(config, params, x, cache)

    expected = jax.jit(whole)(params, x, cache)
    assert float(jnp.abs(expected[1][1, :, :5]).min()) > 0
    shard = jax.shard_map(local, mesh=mesh, in_specs=(specs, P(), P()), out_specs=P(), check_vma=False)
    _check(jax.jit(shard), whole, params, specs, mesh, (x, cache), expected)


def test_grouped_queries_from_local_shards() -> None:
    """Key-value heads split with their query heads, and so does the cache; biases are cut like the rows they add to."""
    tp = 4
    mesh, x = make_mesh(Plan(tp=tp)), jnp.asarray(np.random.default_rng(5).standard_normal((2, 5, 256), np.float32))
    config = parse_config(
        {
            **preset("deepseek-r1-distill-qwen-1.5b"),
            "hidden_size": 256,
            "head_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2 * tp,
            "num_key_value_heads": tp,
        }
    )
    assert isinstance(config, DenseConfig)
    params, specs = _parameters(config, "attention")
    assert specs["k"].scales == P(None, "tp", None)
    assert specs["q_bias"] == P(None, "tp")
    cache = init_cache(config, FLOAT32, 2, 5)
    split = Cache(P(None, None, None, "tp"), None, P())

    def attention(config: DenseConfig, params: dict[str, Any], x: jax.Array, cache: Cache) -> Any:
        positions = jnp.broadcast_to(jnp.arange(5, dtype=jnp.int32), (2, 5))
        table_ = rope_table(rope_frequencies(128, 10000.0, None), positions)
        call = Call(positions, jnp.ones((2, 5), bool), table_, jnp.int32(1))
        out, cache = GroupedQueryAttention(config, FLOAT32, params)(x, cache, 1, call)
        return out, cache.rows

    def local(params: dict[str, Any], x: jax.Array, cache: Cache) -> Any:
        assert cache.rows.shape[-1] == 2 * 128
        out, rows = attention(_local(config, tp), params, x, cache)
        return jax.lax.psum(out, "tp"), rows

    def whole(params: dict[str, Any], x: jax.Array, cache: Cache) -> Any:
        return attention(config, params, x, cache)

    expected = jax.jit(whole)(params, x, cache)
    specs_out = (P(), P(None, None, None, "tp"))
    shard = jax.shard_map(local, mesh=mesh, in_specs=(specs, P(), split), out_specs=specs_out, check_vma=False)
    _check(jax.jit(shard), whole, params, specs, mesh, (x, cache), expected)


def _check(manual: Any, whole: Any, params: Any, specs: Any, mesh: Any, inputs: tuple[Any, ...], expected: Any) -> None:
    """Manual collectives and XLA's own partitioner both give the unsharded result, from arguments that are split."""
    placed = jax.tree.map(lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec)), params, specs)
    split = [a for a in jax.tree.leaves(placed) if not a.sharding.is_fully_replicated]
    assert len(split) >= 6  # three QArrays at least, codes and scales
    assert all(a.addressable_shards[0].data.size * mesh.size == a.size for a in split)
    automatic = jax.jit(whole, out_shardings=NamedSharding(mesh, P()))
    replicated = jax.device_put(inputs, NamedSharding(mesh, P()))
    for run in (manual, automatic):
        found = run(placed, *replicated)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert worst(a, b) <= 1e-5
    text = manual.lower(placed, *replicated).compile().as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text  # no weight travels


def test_a_qarray_leaf_keeps_its_type_in_a_shard() -> None:
    """Format and block survive the trip through shard_map's flattening."""
    q = quantise(jnp.ones((512, 256)), E4M3, (128, 128), pow2=True)

    def local(q: QArray) -> QArray:
        assert (q.format, q.block, q.shape) == (E4M3, (128, 128), (128, 256))
        return q

    mesh = make_mesh(Plan(tp=4))
    out = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("tp"), out_specs=P("tp")))(q)
    np.testing.assert_array_equal(out.codes, q.codes)
    np.testing.assert_array_equal(out.scales, q.scales)
