"""Mesh plans, the rules that say what is split, and how models lie on meshes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from dsjax.config import load_config
from dsjax.errors import InputError
from dsjax.layout import Layout, layout, working_plans
from dsjax.numerics import Numerics
from dsjax.params import leaves, tree_bytes
from quant import E4M3, QArray, quantise
from sharding import AXES, Plan, Rules, gather, inner_axes, make_mesh, mesh_axes, parse_plan, scatter_sum
from sharding.mesh import arranged

NATIVE = Numerics("native", "bfloat16")
MODELS = [f"deepseek-{name}" for name in ("v2-lite", "v3", "v3.2", "v4-flash", "v4-pro", "r1-distill-llama-70b")]

# --- plans and meshes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "plan"),
    [("", Plan()), ("tp=4", Plan(tp=4)), ("dp=2,ep=8,tp=4", Plan(2, 8, 4)), ("tp=4,dp=2", Plan(dp=2, tp=4))],
)
def test_parse_plan(text: str, plan: Plan) -> None:
    assert parse_plan(text) == plan
    assert plan.devices == plan.dp * plan.ep * plan.tp
    assert parse_plan(str(plan) if plan.devices > 1 else "") == plan


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


@dataclasses.dataclass(frozen=True)
class _Chip:
    """What `jax.experimental.mesh_utils` asks of a TPU's device."""

    id: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    process_index: int = 0


def test_any_extents_lie_on_a_torus() -> None:
    """Of 4 x 4 x 4 chips: also extents that are no product of its own, and numbers of chips that are no block of it."""
    chips = [_Chip(i, (i % 4, i // 4 % 4, i // 16)) for i in range(64)]
    for shape in ((2, 32), (1, 8, 8), (2, 8, 4), (1, 1, 32, 2)):
        found = arranged(shape, chips)
        assert found.shape == shape and {chip.id for chip in found.reshape(-1)} == set(range(64))
    assert [chip.id for chip in arranged((3, 2), chips[:6]).reshape(-1)] == list(range(6))


@pytest.mark.parametrize(
    ("plan", "inner", "axes", "within"),
    [
        (Plan(ep=8, tp=2), 1, {"dp": 1, "ep": 8, "tp": 2}, ()),
        (Plan(tp=16), 2, {"dp": 1, "ep": 1, "tp": 8, "tp_in": 2}, ("tp_in",)),
        (Plan(ep=16), 2, {"dp": 1, "ep": 8, "ep_in": 2, "tp": 1}, ("ep_in",)),
        (Plan(dp=2, ep=8, tp=2), 2, {"dp": 2, "ep": 8, "tp": 2}, ("tp",)),
        (Plan(ep=8, tp=2), 4, {"dp": 1, "ep": 4, "ep_in": 2, "tp": 2}, ("ep_in", "tp")),
        (Plan(ep=8, tp=2), 16, {"dp": 1, "ep": 8, "tp": 2}, ("ep", "tp")),
    ],
)
def test_neighbours_get_axes_of_their_own(
    plan: Plan, inner: int, axes: dict[str, int], within: tuple[str, ...]
) -> None:
    """The innermost devices along ep x tp, whatever axis has to be cut for it; devices stay in their order."""
    assert mesh_axes(plan, inner) == axes
    assert inner_axes(plan, inner) == within
    assert math.prod(axes[a] for a in within) == inner
    if plan.devices <= len(jax.devices()):
        assert list(make_mesh(plan, inner).devices.reshape(-1)) == jax.devices()[: plan.devices]


def test_neighbours_that_are_no_part_of_a_plan() -> None:
    with pytest.raises(ValueError, match="3 neighbours along ep x tp are no part of it"):
        mesh_axes(Plan(ep=2, tp=4), 3)


# --- rules -----------------------------------------------------------------------------------------------------------


def test_specs() -> None:
    rules = Rules(
        {"heads": ("tp",), "experts": ("ep", "tp"), "vocab": ("tp",), "slots": ("dp",)}, {"dp": 1, "ep": 2, "tp": 4}
    )
    assert rules.spec(("layers", "heads", "q_lora")) == P(None, ("tp",), None)
    assert rules.spec(("layers", "experts", "hidden")) == P(None, ("ep", "tp"), None)
    assert rules.spec(("slots",)) == P(None)  # one device is no split
    assert rules.ways("experts") == 8
    assert rules.ways("slots") == rules.ways("hidden") == 1
    with pytest.raises(ValueError, match="would use a mesh axis twice"):
        rules.spec(("heads", "vocab"))
    with pytest.raises(ValueError, match="would use a mesh axis twice"):
        rules.spec(("experts", "heads"))


def test_collectives_by_what_is_split() -> None:
    """Sums, parts and gathers over two axes of a mesh, in their order; nothing where nothing is split."""
    plan = Plan(dp=2, ep=2, tp=2)
    mesh = make_mesh(plan)
    rules = Rules({"heads": ("ep", "tp"), "slots": ("dp",)}, dict(mesh.shape))
    x = jnp.arange(16.0).reshape(2, 8)

    def body(x: jax.Array) -> Any:
        mine = rules.part("heads", rules.part("slots", x), dim=1)
        assert mine.shape == (1, 2)
        whole = gather(gather(mine, rules.axes("heads"), dim=1), rules.axes("slots"))
        total = rules.sum("heads", mine)
        some = scatter_sum(x, rules.axes("heads"), dim=1)
        assert rules.sum("hidden", mine) is mine
        return whole, gather(total, ("dp",)), gather(some, ("ep", "tp"), dim=1)

    whole, total, some = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))(x)
    np.testing.assert_array_equal(whole, x)
    np.testing.assert_array_equal(total, x.reshape(2, 4, 2).sum(axis=1))
    np.testing.assert_array_equal(some, 4 * x)


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


# --- how models lie on meshes ----------------------------------------------------------------------------------------


def _axes(found: Layout, *names: str) -> list[tuple[str, ...]]:
    return [found.rules.axes(name) for name in names]


def test_heads_over_both_axes_where_they_divide() -> None:
    """128 heads over ep x tp = 16; over tp = 8 alone where ep x tp = 256 are more than there are."""
    config = load_config("deepseek-v3")
    found = layout(config, Plan(dp=2, ep=8, tp=2))
    assert _axes(found, "heads", "experts", "expert_ffn", "slots", "vocab") == [
        ("ep", "tp"), ("ep",), ("tp",), ("dp",), ("ep", "tp"),
    ]  # fmt: skip
    found = layout(config, Plan(ep=32, tp=8))
    assert _axes(found, "heads", "experts", "ffn", "shared_ffn") == [("tp",), ("ep",), ("ep", "tp"), ("ep", "tp")]


def test_slots_split_the_batch_instead() -> None:
    found = layout(load_config("deepseek-v3"), Plan(dp=2, ep=8, tp=2), "slots")
    assert _axes(found, "slots", "heads", "ffn", "vocab") == [("dp", "ep"), ("tp",), ("tp",), ("ep", "tp")]


@pytest.mark.parametrize(
    ("model", "plan", "groups", "within"),
    [
        ("deepseek-v4-flash", Plan(tp=8), ("tp",), ()),
        ("deepseek-v4-flash", Plan(tp=16), ("tp",), ("tp_in",)),
        ("deepseek-v4-flash", Plan(tp=64), ("tp",), ("tp_in",)),
        ("deepseek-v4-flash", Plan(ep=8, tp=4), ("ep",), ("tp",)),
        ("deepseek-v4-flash", Plan(ep=32), ("ep",), ("ep_in",)),
        ("deepseek-v4-pro", Plan(tp=16), ("tp",), ()),
        ("deepseek-v4-pro", Plan(ep=64), ("ep",), ("ep_in",)),
    ],
)
def test_output_groups(model: str, plan: Plan, groups: tuple[str, ...], within: tuple[str, ...]) -> None:
    """As many devices as groups take one each; more share them; either the group's channels are split, or copied."""
    config = load_config(model)
    found = layout(config, plan)
    assert _axes(found, "o_groups", "group_heads", "heads", "o_low") == [
        groups,
        within,
        groups + within,
        groups + within,
    ]
    copied = layout(config, plan, o_groups="gather")
    assert _axes(copied, "o_groups", "group_heads", "heads", "o_low") == [groups, (), groups + within, groups]
    local = found.local_params(config)["layers"]["attention"]
    share = found.rules.ways("heads")
    assert local["o_a"].codes.size * share == math.prod(
        (config.num_hidden_layers, 8192 if "flash" in model else 16384, 4096)
    )
    if within:
        once = copied.local_params(config)["layers"]["attention"]["o_b"].codes.size
        assert once == local["o_b"].codes.size * copied.rules.ways("heads") // copied.rules.ways("o_groups")


def test_grouped_queries_share_key_value_heads() -> None:
    """12 query heads and 2 key-value heads over 4 devices: 3 and 1 each, neighbours with the same one."""
    config = load_config("deepseek-r1-distill-qwen-1.5b")
    found = layout(config, Plan(tp=4))
    assert _axes(found, "heads", "kv_heads") == [("tp", "tp_in"), ("tp",)]
    local = found.local_params(config)["layers"]["attention"]
    assert local["q"].shape[-2] == 3 * 128
    assert local["k"].shape[-2] == 128


@pytest.mark.parametrize("ways", [6, 12, 24])
@pytest.mark.parametrize("model", ["deepseek-v4-flash", "deepseek-v4-pro"])
def test_ways_that_output_groups_do_not_split(model: str, ways: int) -> None:
    with pytest.raises(InputError, match=rf"heads in \d+ o_groups do not split {ways} ways; the nearest that works is"):
        layout(load_config(model), Plan(tp=ways))


@pytest.mark.parametrize(
    ("model", "plan", "attention", "numerics", "reason"),
    [
        ("deepseek-v3", Plan(ep=3), "heads", None, "256 experts do not split 3 ways"),
        ("deepseek-v3", Plan(tp=3), "heads", None, "128 heads do not split 3 ways"),
        ("deepseek-v3", Plan(tp=256), "heads", None, "128 heads do not split 256 ways"),
        ("deepseek-v3", Plan(tp=32), "heads", NATIVE, r"moe\.experts\.down make parts of 64, which cut"),
        ("deepseek-v4-pro", Plan(tp=16), "heads", NATIVE, r"experts\.down make parts of 192, which cut"),
        ("deepseek-r1-distill-qwen-7b", Plan(tp=8), "heads", None, "28 heads in 4 key-value heads do not split 8 ways"),
        ("deepseek-r1-distill-qwen-7b", Plan(ep=2), "heads", None, "qwen2 has no experts to split 2 ways"),
    ],
)  # fmt: skip
def test_plans_that_cannot_work(model: str, plan: Plan, attention: str, numerics: Any, reason: str) -> None:
    """Each with its reason, and with the nearest plan for as many devices that works, which then does work."""
    config = load_config(model)
    with pytest.raises(InputError, match=reason) as error:
        layout(config, plan, attention, numerics)
    nearest = str(error.value).rpartition("nearest that works is ")[2]
    if nearest != str(error.value):
        assert layout(config, parse_plan(nearest), attention, numerics).plan.devices == plan.devices


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("attention", ["heads", "slots"])
@pytest.mark.parametrize("weights", ["stored", "int8"])
def test_local_shapes_add_up(model: str, attention: str, weights: str) -> None:
    """Of every plan for 16 devices: parts times ways are the whole, codes and scales, at blocks that no shard cuts."""
    config = load_config(model)
    plans = list(working_plans(config, 16, attention))
    assert len(plans) >= 3
    for plan in plans:
        found = layout(config, plan, attention)
        params = found.abstract_params(config, weights=weights)
        local = found.local_params(config, weights=weights)
        for (row, whole), (_, part) in zip(leaves(params, config), leaves(local, config), strict=True):
            ways = math.prod(found.rules.ways(axis) for axis in row.logical_axes)
            if not isinstance(whole, QArray):
                assert math.prod(whole.shape) == math.prod(part.shape) * ways
                continue
            assert math.prod(whole.codes.shape) == math.prod(part.codes.shape) * ways
            if whole.scales is not None and whole.block[1]:
                n, k = part.shape[-2:]
                assert part.scales.shape[-2:] == (-(-n // part.block[0]), -(-k // part.block[1]))
                assert math.prod(whole.scales.shape) == math.prod(part.scales.shape) * ways
        assert tree_bytes(local) * plan.devices >= tree_bytes(params)
