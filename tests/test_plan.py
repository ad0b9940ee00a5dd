"""The planner: the known cases, bytes against arrays on devices, operations and exchanges against other counts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import DENSE_SETTINGS, LOOKED_AT, SYNTH_SETTINGS, V4_SETTINGS, V32_SETTINGS
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from dsjax.config import Config, DenseConfig, V3Config, V4Config, load_config, parse_config
from dsjax.config.v4 import CSA, HCA
from dsjax.layout import layout
from dsjax.models import family
from dsjax.numerics import Numerics
from dsjax.parallel import parallel
from dsjax.params import VECTOR, accounting, active_bytes, leaf_shape, table, tree_bytes
from dsjax.plan import Cards, Chip, Load, Model, answer, load_model
from dsjax.plan.chips import Link
from dsjax.plan.memory import activation_bytes, memory, workspace_bytes
from dsjax.plan.placement import Placement
from dsjax.plan.roofline import (
    capped_sum,
    chosen_share,
    decode_times,
    distinct_experts,
    lacking,
    prefill_times,
    step_times,
    work,
)
from dsjax.plan.search import model_bytes
from dsjax.plan.traffic import Collective, collectives, dispatch, hosts_of, seconds
from dsjax.presets import PRESETS
from dsjax.synth import synth_config
from sharding import Plan, expert_parallel, make_mesh, parse_plan

PLAIN = Numerics("plain")


def ask(
    name: str, count: int, gb: float, mesh: str | None = None, attention: str | None = None, **flags: Any
) -> dict[str, Any]:
    """The planner's answer; flags: weights, mode, context, batch, chip."""
    model = load_model(name, Numerics(flags.pop("mode", "plain")), flags.pop("weights", "stored"))
    cards = Cards(count, gb * 1e9, chip=flags.pop("chip", None))
    load = Load(flags.pop("context", 4096), flags.pop("batch", 1))
    assert not flags
    return answer(model, cards, load, None if mesh is None else parse_plan(mesh), attention)


def tiny(preset: str, settings: dict[str, Any], layers: int) -> Config:
    return parse_config(synth_config(preset, layers=layers, settings=settings))


TINY = {
    "v3": ("deepseek-v3", SYNTH_SETTINGS, 5),
    "v3.2": ("deepseek-v3.2", V32_SETTINGS, 5),
    "v4": ("deepseek-v4-flash", V4_SETTINGS, 5),
    "dense": ("deepseek-r1-distill-qwen-1.5b", DENSE_SETTINGS, 3),
}


def place(config: Config, mesh: str = "", attention: str = "heads", numerics: Numerics = PLAIN, **kw: Any) -> Placement:
    """A model of a config by a plan, placed."""
    return Placement(Model("test", config, numerics, **kw), layout(config, parse_plan(mesh), attention, numerics))


# --- the known cases -------------------------------------------------------------------------------------------------


def test_int8_671b_fits_eight_cards_of_96_gb() -> None:
    """About 95 GB are left over all cards, before replicas, cache and workspace: the answer says for what context."""
    found = ask("deepseek-v3", 8, 96, weights="int8")
    assert found["fits"] and found["reason"].startswith("fits: ")
    assert found["left_bytes"] == pytest.approx(95e9, rel=0.01)
    assert found["largest_context"] > 90_000
    assert f"context up to {found['largest_context']:,} at batch 1" in found["reason"]


def test_int8_671b_with_attention_replicated_does_not_fit() -> None:
    """Experts split over 8 cards, attention, dense and shared layers on every card: about 98 GB of weights of 96."""
    found = ask("deepseek-v3", 8, 96, "ep=8", "slots", weights="int8")
    assert not found["fits"]
    assert found["bytes_per_card"]["weights"] + found["bytes_per_card"]["scales"] == pytest.approx(97.6e9, rel=0.005)
    assert "routed experts 81.8, attention replicated 11.4" in found["reason"]
    assert "--attention heads" in found["instead"][0]


def test_dp_attention_with_ep8_does_not_fit_eight_cards_of_96_gb_in_fp8() -> None:
    """Spec V3 7: experts 81.7, attention 11.4, shared 2.6, dense 1.2; here embedding and head stay split."""
    found = ask("deepseek-v3", 8, 96, "ep=8", "slots", mode="native")
    assert not found["fits"]
    gb = {name: round(size / 1e9, 1) for name, size in found["weights_per_card"].items()}
    parts = ("routed experts", "attention", "shared experts", "dense layers", "embedding", "head")
    assert [gb[part] for part in parts] == [81.8, 11.4, 2.6, 1.2, 0.2, 0.2]
    assert {"attention", "shared experts", "dense layers"} <= set(found["replicated"])


def test_671b_does_not_fit_eight_cards_of_80_gb() -> None:
    for weights in ("stored", "int8"):
        found = ask("deepseek-v3", 8, 80, weights=weights)
        assert not found["fits"] and found["left_bytes"] < 0 and found["largest_context"] == 0
        assert found["reason"].startswith("does not fit: ") and "would fit: 16 cards" in found["reason"]


@pytest.mark.parametrize(
    ("name", "count", "gb", "weights", "fits"),
    [
        ("deepseek-v3", 32, 64, "bfloat16", True),
        ("deepseek-v3", 16, 64, "bfloat16", False),
        ("deepseek-v3", 24, 64, "bfloat16", False),
        ("deepseek-r1", 16, 64, "int8", True),
        ("deepseek-v4-flash", 8, 32, "stored", True),
        ("deepseek-v4-pro", 16, 64, "stored", True),
        ("deepseek-v4-pro", 8, 141, "stored", True),
        ("deepseek-v4-pro", 8, 96, "stored", False),
        ("deepseek-v3", 8, 141, "stored", True),
        ("deepseek-r1-distill-llama-70b", 8, 32, "stored", True),
        ("deepseek-r1-distill-llama-70b", 1, 141, "stored", False),
    ],
)
def test_known_cases(name: str, count: int, gb: float, weights: str, fits: bool) -> None:
    found = ask(name, count, gb, weights=weights)
    assert found["fits"] is fits, found["reason"]
    total = found["bytes_per_card"]["total"]
    assert total == sum(size for part, size in found["bytes_per_card"].items() if part != "total")
    assert (total <= gb * 1e9) is fits


def test_16_bit_671b_needs_32_cards_of_64_gb() -> None:
    """What the planner proposes where 16 cards do not do."""
    found = ask("deepseek-v3", 16, 64, weights="bfloat16")
    assert any(line.startswith("32 cards") for line in found["instead"])


def test_what_would_fit_fits() -> None:
    """A longer context than fits: every proposal, taken up, fits."""
    found = ask("deepseek-v3", 8, 96, context=60_000, batch=3)
    assert not found["fits"] and len(found["instead"]) == 3
    for proposal in found["instead"]:
        flags = proposal.split()
        changes: dict[str, Any] = {"context": 60_000, "batch": 3, "count": 8, "mesh": None, "attention": None}
        if flags[1] == "cards":
            changes |= {"count": int(flags[0]), "mesh": flags[3], "attention": flags[5].rstrip(")")}
        else:
            changes[flags[0].removeprefix("--")] = int(flags[1])
        assert ask("deepseek-v3", gb=96, **changes)["fits"], proposal


# --- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["stored", "int8", "bfloat16"])
def test_split_and_replicated_bytes_by_hand(weights: str) -> None:
    """V3 over ep=8 by heads: each part of a card is the whole's eighth, or the whole, from the config alone."""
    c = load_config("deepseek-v3")
    assert isinstance(c, V3Config)
    placed = place(c, "ep=8", weights=weights)
    d, moe = c.hidden_size, 58

    def matrix(n: int, k: int) -> float:
        if weights == "bfloat16":
            return 2 * n * k
        return n * k + 4 * (n if weights == "int8" else math.ceil(n / 128) * math.ceil(k / 128))

    expert = 2 * matrix(2048, d) + matrix(d, 2048)
    assert placed.modules["routed experts"] == moe * 256 * expert / 8
    assert placed.modules["shared experts"] == moe * (2 * matrix(256, d) + matrix(d, 256))
    assert placed.modules["dense layers"] == 3 * (2 * matrix(18432 // 8, d) + matrix(d, 18432 // 8))
    whole = matrix(1536, d) + matrix(576, d)  # compressed queries and latents: on every card
    cut = matrix(16 * 192, 1536) + matrix(16 * 256, 512) + matrix(d, 16 * 128)
    assert placed.modules["attention"] == 61 * (whole + cut + 4 * (1536 + 512))
    assert placed.modules["embedding"] == 129280 * d * 2 / 8
    assert placed.modules["routers"] == moe * (256 * d * 2 + 256 * 4)


PLANS = [
    ("ep=8", "heads"),
    ("ep=8", "slots"),
    ("tp=2", "heads"),
    ("dp=2,ep=2,tp=2", "heads"),
    ("dp=2,ep=4", "slots"),
    ("ep=4,tp=2", "slots"),
]


@pytest.mark.parametrize("family_name", TINY)
@pytest.mark.parametrize(("mesh", "attention"), PLANS)
def test_bytes_are_those_of_arrays_on_devices(family_name: str, mesh: str, attention: str) -> None:
    """Every device holds what the planner says, to the byte: parameters and cache really put on eight devices."""
    config, plan = tiny(*TINY[family_name]), parse_plan(mesh)
    if family_name == "dense":
        plan = Plan(plan.dp, 1, plan.tp)
    numerics = Numerics("plain", "float32")
    parted = parallel(config, plan, numerics, attention=attention)
    placed = Placement(Model("tiny", config, numerics), parted.layout)
    params = placed.model.params(parted.layout)
    shardings = parted.place(parted.layout.param_specs(params, config))
    arrays = jax.tree.map(lambda a, s: jax.device_put(np.zeros(a.shape, a.dtype), s), params, shardings)
    batch = 4
    slots = placed.slots(batch) * placed.ways("slots")
    cache = parted.new_cache(partial(family(config).new_cache, config, numerics, slots, 300))

    def held(tree: Any, device: jax.Device) -> int:
        shards = [s for a in jax.tree.leaves(tree) for s in a.addressable_shards if s.device == device]
        return sum(shard.data.nbytes for shard in shards)

    parts = memory(placed, Load(300, batch), 0)
    for device in parted.mesh.devices.flat:
        assert held(arrays, device) == parts["weights"] + parts["scales"]
        assert held(cache, device) == parts["kv"] + parts["indexer"]


@pytest.mark.parametrize("name", PRESETS)
def test_one_card_holds_the_model(name: str) -> None:
    """On one card the bytes are those of `abstract_params`, for every preset."""
    config = load_config(name)
    placed = place(config)
    assert sum(placed.modules.values()) == model_bytes(placed.model) == tree_bytes(placed.model.params(placed.layout))
    assert not placed.replicated


@pytest.mark.parametrize("family_name", ["v3", "v4"])
def test_a_checkpoints_own_formats_count(family_name: str, tmp_path: Any) -> None:
    """A folder's headers decide, not what DeepSeek publishes: here a converted one."""
    from dsjax.checkpoint.load import load
    from dsjax.checkpoint.orbax import save
    from dsjax.synth import synthesise

    preset, settings, layers = TINY[family_name]
    synthesise(tmp_path / "model", synth_config(preset, layers=layers, settings=settings), template=preset)
    for folder, weights in (("model", "stored"), ("model", "int8"), ("converted", "stored")):
        if folder == "converted":
            save(tmp_path / "converted", tmp_path / "model", load(tmp_path / "model", mtp=None, weights="int8")[1])
        _, params, _ = load(tmp_path / "model", weights=weights if folder == "model" else "int8")
        model = load_model(str(tmp_path / folder), PLAIN, weights)
        assert model_bytes(model) == tree_bytes(params)


# --- bounds ----------------------------------------------------------------------------------------------------------

WIDE = {"hidden_size": 512, "vocab_size": 4096, "num_attention_heads": 16, "moe_intermediate_size": 256}
V3_WIDE = WIDE | {"n_routed_experts": 32, "first_k_dense_replace": 1}
V4_WIDE = WIDE | {"n_routed_experts": 32, "o_groups": 4}


@pytest.mark.parametrize(
    ("preset", "settings", "layers", "mode", "slots", "tokens"),
    [
        pytest.param("deepseek-v3", V3_WIDE, 2, "native", 4, 512, marks=pytest.mark.full),
        ("deepseek-r1-distill-qwen-1.5b", {"vocab_size": 4096}, 2, "plain", 4, 512),
        pytest.param("deepseek-v3", V3_WIDE, 2, "plain", 4, 512, marks=pytest.mark.full),
        pytest.param("deepseek-v3", V3_WIDE, 2, "plain", 8, 1, marks=pytest.mark.full),
        pytest.param("deepseek-v4-flash", V4_WIDE, 5, "plain", 4, 512, marks=pytest.mark.full),
    ],
)
def test_a_compiled_steps_temporary_memory_stays_below_the_bound(
    preset: str, settings: dict[str, Any], layers: int, mode: str, slots: int, tokens: int
) -> None:
    """Activations and workspace against what XLA:CPU takes; and not far above it where tokens are many."""
    config = parse_config(synth_config(preset, layers=layers, settings=settings))
    numerics = Numerics(mode).for_checkpoint(config)
    placed = place(config, numerics=numerics)
    cache = jax.eval_shape(partial(family(config).new_cache, config, numerics, slots, 1024))
    step = jax.jit(partial(family(config).step, config, numerics, want="last"), donate_argnums=1)
    new = jax.ShapeDtypeStruct((slots, tokens), jnp.int32)
    n_new = jax.ShapeDtypeStruct((slots,), jnp.int32)
    compiled = step.lower(placed.model.params(placed.layout), cache, new, n_new).compile(LOOKED_AT)
    temporary = compiled.memory_analysis().temp_size_in_bytes
    bound = activation_bytes(placed, slots, tokens) + workspace_bytes(placed, slots, tokens)
    assert temporary <= bound
    assert tokens == 1 or temporary > bound / 5


# --- operations and bytes read ---------------------------------------------------------------------------------------


def _products(config: Config) -> int:
    """Parameters that a token is multiplied by, head included: what `inspect` calls active, without vectors."""
    vectors = sum(
        math.prod(leaf_shape(row, config))
        for row in table(config)
        if row.path[0] != "mtp" and (row.storage == VECTOR or len(row.dims) == 1 or row.axes[0] == "ratio")
    )
    return accounting(config)["active_parameters"] - vectors


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "deepseek-v3", "deepseek-v4-flash", "deepseek-v4-pro"])
def test_a_token_costs_two_operations_for_each_active_parameter(name: str) -> None:
    config = load_config(name)
    done = work(place(config), 1, 1, 1)
    rest = sum(count for part, count in done.parts.items() if part != "attention over the context")
    assert rest == pytest.approx(2 * _products(config), rel=1e-12)
    if name == "deepseek-v3":
        assert rest == pytest.approx(73e9, rel=0.01)  # spec V3 7


def test_absorbed_and_naive_attention_by_hand() -> None:
    """17.0 MFLOP per cached token and new token absorbed (spec V3 7); naive 61 x 128 x (192 + 128) x 2, kv_b again."""
    c = load_config("deepseek-v3")
    part = "attention over the context"

    def per_position(numerics: Numerics) -> tuple[float, float]:
        one, two = (work(place(c, numerics=numerics), 1, 1, n) for n in (1000, 1001))
        return two.parts[part] - one.parts[part], two.parts["attention"] - one.parts["attention"]

    assert per_position(Numerics("plain", mla="absorbed")) == (61 * 128 * (576 + 512) * 2, 0)
    assert per_position(Numerics("plain", mla="naive")) == (61 * 128 * (192 + 128) * 2, 61 * 2 * 32768 * 512)


def _v4_by_hand(c: V4Config, tokens: int, context: int, heads: int) -> int:
    """Operations of scores and values, query by query."""
    total = 0
    for ratio in c.compress_ratios:
        for seen in range(context - tokens + 1, context + 1):
            keys = min(seen, c.sliding_window)
            if ratio == CSA:
                keys += min(seen // 4, c.index_topk)
                if context // 4 > c.index_topk:
                    total += 2 * c.index_n_heads * c.index_head_dim * (seen // 4)
            elif ratio == HCA:
                keys += seen // 128
            total += 4 * heads * c.head_dim * keys
    return total


@pytest.mark.parametrize(("tokens", "context"), [(1, 100), (1, 5000), (512, 512), (512, 9000)])
def test_v4s_attention_by_hand(tokens: int, context: int) -> None:
    c = load_config("deepseek-v4-flash")
    assert isinstance(c, V4Config)
    done = work(place(c, "ep=8"), 3, tokens, context)
    assert done.parts["attention over the context"] == 3 * _v4_by_hand(c, tokens, context, 64 // 8)


def test_v32_reads_indexer_keys_and_the_chosen_rows() -> None:
    """A decode step above 2,048 tokens in native: 132 bytes a token and 656 of each chosen one, in 61 layers."""
    placed = place(load_config("deepseek-v3.2"), numerics=Numerics("native"))
    assert work(placed, 2, 1, 100_000).cache_bytes == 2 * 61 * (132 * 100_000 + 656 * 2048)
    assert work(placed, 2, 1, 2000).cache_bytes == 2 * 61 * 656 * 2000


@given(st.integers(1, 300), st.integers(0, 300), st.sampled_from([1, 4, 128]), st.none() | st.integers(1, 40))
def test_capped_sum_is_the_sum(first: int, more: int, ratio: int, cap: int | None) -> None:
    values = [v // ratio for v in range(first, first + more + 1)]
    assert capped_sum(first, first + more, ratio, cap) == sum(v if cap is None else min(v, cap) for v in values)


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v4-flash", "deepseek-r1-distill-qwen-7b"])
@pytest.mark.parametrize("batch", [1, 7, 256])
def test_one_cards_bytes_read_are_benchs(name: str, batch: int) -> None:
    """`dsjax bench` counts what a decode step must read in another place."""
    config = load_config(name)
    placed = place(config)
    expected = active_bytes(placed.model.params(placed.layout), config, batch)
    assert work(placed, batch, 1, 1).weight_bytes == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("ways", "tokens"), [(1, 1), (8, 1), (8, 16), (32, 4), (64, 64)])
def test_the_busiest_cards_experts_against_drawn_ones(ways: int, tokens: int) -> None:
    """256 experts, 8 a token: the expected most on one card, against 2,000 draws of real choices."""
    generator = np.random.default_rng(0)
    most = []
    for _ in range(2000):
        chosen = np.unique(generator.random((tokens, 256)).argpartition(8, axis=1)[:, :8])
        most.append(np.bincount(chosen * ways // 256, minlength=ways).max())
    found = distinct_experts(256 // ways, ways, chosen_share(256, 8, tokens))
    assert found == pytest.approx(np.mean(most), rel=0.04)  # cards are not quite independent


# --- times -----------------------------------------------------------------------------------------------------------

ROUND = Chip(
    "round", "round figures", 1e12, 1e12, {"bf16": 1e14, "fp8": 2e14}, Link(1e11, 4, 1e-5), Link(1e10, None, 2e-5)
)


def test_a_step_takes_the_longer_of_operations_and_reading_and_then_the_links() -> None:
    placed = place(load_config("deepseek-v3"), "ep=4")
    done = work(placed, 1, 1, 1000)
    times = step_times(placed, ROUND, 1, 1, 1000)
    assert times.compute == pytest.approx(done.flops["bf16"] / 1e14) and set(done.flops) == {"bf16"}
    assert times.memory == pytest.approx((done.weight_bytes + done.cache_bytes) / 1e12)
    # 61 attention outputs, 3 dense layers, 58 of experts: float32 [1, 7168] over 4 cards; the embedding bfloat16.
    sums = 122 * (2 * 3 / 4 * 4 * 7168 / 1e11 + 1e-5) + 2 * 3 / 4 * 2 * 7168 / 1e11 + 1e-5
    assert times.links == pytest.approx(sums)
    assert times.total == max(times.compute, times.memory) + times.links


def test_native_multiplies_at_fp8s_rate_and_attends_at_bfloat16s() -> None:
    placed = place(load_config("deepseek-v3"), numerics=Numerics("native"))
    done = work(placed, 1, 1, 1)
    plain = work(place(load_config("deepseek-v3")), 1, 1, 1)
    assert sum(done.flops.values()) == pytest.approx(sum(plain.flops.values()))
    assert done.flops["fp8"] > 0.9 * sum(done.flops.values())
    assert step_times(placed, ROUND, 1, 1, 1).compute == pytest.approx(
        done.flops["fp8"] / 2e14 + done.flops["bf16"] / 1e14
    )


def test_prefill_is_its_chunks() -> None:
    placed = place(load_config("deepseek-v3"), "ep=4")
    load = Load(1300, 2, 512)
    steps = [step_times(placed, ROUND, 2, t, s) for t, s in ((512, 512), (512, 1024), (276, 1300))]
    assert prefill_times(placed, ROUND, load).total == pytest.approx(sum(s.total for s in steps))
    assert decode_times(placed, ROUND, load) == step_times(placed, ROUND, 2, 1, 1300)


@pytest.mark.parametrize(
    ("mesh", "axes", "expected"),
    [
        ("ep=4,tp=4", ("tp",), (4, 1)),
        ("ep=4,tp=4", ("ep",), (1, 4)),
        ("ep=4,tp=4", ("ep", "tp"), (4, 4)),
        ("dp=2,ep=4,tp=2", ("ep",), (2, 2)),
        ("dp=8,ep=2", ("ep",), (2, 1)),
    ],
)
def test_which_cards_of_a_collective_share_a_domain(
    mesh: str, axes: tuple[str, ...], expected: tuple[int, int]
) -> None:
    """Domains of four cards, numbered as the mesh lays them, tp innermost."""
    placed = place(load_config("deepseek-v3"), mesh)
    assert hosts_of(placed, axes, 4) == expected


def test_sums_across_domains_send_only_a_part_across() -> None:
    """16 cards in domains of 4: inside 2 (3/4) of the bytes, across 2 (3/4) of a quarter of them."""
    placed = place(load_config("deepseek-v3"), "ep=16")
    total = seconds(Collective("", "all-reduce", ("ep",), 16, 4e6, 3), placed, ROUND)
    assert total == pytest.approx(3 * (6e6 / 1e11 + 1.5e6 / 1e10 + 3e-5))
    sent = seconds(Collective("", "all-to-all", ("ep",), 16, 15e6, 1), placed, ROUND)
    assert sent == pytest.approx(3e6 / 1e11 + 12e6 / 1e10 + 3e-5)
    alone = Chip("no links", "", 1e12, 1e12, {"bf16": 1e14}, Link(1e11, 4))
    assert seconds(Collective("", "all-reduce", ("ep",), 16, 4e6, 3), placed, alone) is None
    assert lacking(alone, placed) == ["scale_out"] and lacking(alone, place(load_config("deepseek-v3"), "ep=4")) == []


# --- exchanges against the step's own program ------------------------------------------------------------------------

_KINDS = {
    "psum": "all-reduce",
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
}


def _traced(
    jaxpr: Any, extents: Mapping[str, int], times: int, found: dict[tuple[str, tuple[str, ...]], float]
) -> None:
    """Adds up the bytes of every collective of a program, loops unrolled; ids and counts, signed integers, left out."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in _KINDS:
            axes = equation.params.get("axes", equation.params.get("axis_name"))
            axes = tuple(axes) if isinstance(axes, tuple | list) else (axes,)
            array = (equation.outvars if name == "all_gather" else equation.invars)[0].aval
            if not jnp.issubdtype(array.dtype, jnp.signedinteger):
                key, sent = _KINDS[name], times * array.size * array.dtype.itemsize
                if name == "all_to_all":  # one part stays
                    sent *= 1 - 1 / math.prod(extents[axis] for axis in axes)
                found[key, axes] = found.get((key, axes), 0) + sent
        inner = times * equation.params.get("length", 1) if name == "scan" else times
        for value in equation.params.values():
            for each in value if isinstance(value, tuple | list) else (value,):
                if hasattr(each, "jaxpr") or hasattr(each, "eqns"):
                    _traced(getattr(each, "jaxpr", each), extents, inner, found)


V4_FEW_GROUPS = {"o_groups": 4}
"""Fewer than the cards that heads are split over: neighbours share one."""


@pytest.mark.parametrize(
    ("preset", "settings", "mesh", "attention", "mode", "tokens"),
    [
        ("deepseek-v3", {}, "ep=4,tp=2", "heads", "plain", 3),
        ("deepseek-v3", {}, "dp=2,ep=2,tp=2", "heads", "native", 3),
        ("deepseek-v3", {}, "dp=4,tp=2", "slots", "native", 3),
        ("deepseek-v3.2", {}, "tp=8", "heads", "plain", 3),
        ("deepseek-v4-flash", {}, "dp=2,ep=2,tp=2", "heads", "native", 3),
        ("deepseek-v4-flash", V4_FEW_GROUPS, "ep=4,tp=2", "heads", "plain", 3),
        ("deepseek-r1-distill-qwen-7b", {}, "tp=4", "heads", "plain", 3),
        ("deepseek-r1-distill-qwen-7b", {}, "dp=4,tp=2", "slots", "plain", 3),
        ("deepseek-v3", {}, "dp=2,ep=4", "slots", "native", 3),
        ("deepseek-v3.2", {}, "ep=4,tp=2", "slots", "plain", 3),
        ("deepseek-v4-flash", {}, "ep=8", "slots", "plain", 256),
        ("deepseek-v4-flash", {}, "ep=8", "slots", "native", 256),
    ],
)
def test_exchanges_are_those_of_the_step(
    preset: str, settings: dict[str, Any], mesh: str, attention: str, mode: str, tokens: int
) -> None:
    """By kind and axes, the bytes of the list are those of the traced body of the step, at true widths."""
    config = parse_config(synth_config(preset, layers=5 if "v3" in preset else 3, settings=settings))
    numerics = Numerics(mode).for_checkpoint(config)
    parted = parallel(config, parse_plan(mesh), numerics, attention=attention)
    placed = Placement(Model("test", config, numerics), parted.layout)
    params = placed.model.params(parted.layout)
    slots = 2
    cache = jax.eval_shape(partial(family(config).new_cache, config, numerics, slots * placed.ways("slots"), 512))
    by_slots = parted.layout.rules.spec(("slots",))
    body = jax.shard_map(
        partial(family(config).step, config, numerics, want="last", rules=parted.rules),
        mesh=parted.mesh,
        in_specs=(parted.layout.param_specs(params, config), parted.layout.cache_specs(cache), by_slots, by_slots),
        out_specs=(parted.layout.logits_spec(False), parted.layout.hidden_spec(), parted.layout.cache_specs(cache)),
        check_vma=False,
    )
    new = jax.ShapeDtypeStruct((slots * placed.ways("slots"), tokens), jnp.int32)
    count = jax.ShapeDtypeStruct(new.shape[:1], jnp.int32)
    found: dict[tuple[str, tuple[str, ...]], float] = {}
    _traced(jax.make_jaxpr(body)(params, cache, new, count).jaxpr, parted.mesh.shape, 1, found)
    expected: dict[tuple[str, tuple[str, ...]], float] = {}
    for exchange in collectives(placed, slots, tokens):
        key = exchange.kind, exchange.axes
        expected[key] = expected.get(key, 0) + exchange.times * exchange.nbytes
    assert expected and found == expected


@pytest.mark.parametrize(
    ("preset", "mode", "tokens", "how"),
    [
        ("deepseek-v3", "plain", 6, "replicated"),
        ("deepseek-v3", "native", 6, "replicated"),
        ("deepseek-v4-flash", "plain", 512, "all-to-all"),
        ("deepseek-v4-flash", "native", 512, "all-to-all"),
    ],
)
def test_exchanges_of_a_dispatch_are_those_of_its_program(preset: str, mode: str, tokens: int, how: str) -> None:
    """Activations, or their codes and scales, with ids and weights, to eight cards' experts and back."""
    config = load_config(preset)
    assert not isinstance(config, DenseConfig)
    numerics = Numerics(mode).for_checkpoint(config)
    placed = place(config, "ep=8", "slots", numerics)
    way = dispatch(placed, tokens)
    assert way is not None and way.how == how
    gate = next(leaf for row, leaf in placed.leaves if row.path[-2:] == ("experts", "gate"))
    d, k = config.hidden_size, config.num_experts_per_tok
    x = jax.ShapeDtypeStruct((8 * tokens, d), numerics.dtype)
    rows = jax.eval_shape(numerics.quantised, x, gate)
    sums = jnp.bfloat16 if numerics.native else jnp.float32
    given, mesh = P(way.axes), make_mesh(Plan(ep=8))
    body = jax.shard_map(
        lambda rows, choices, weights, valid: expert_parallel(
            lambda rows, choices, weights: jnp.zeros((len(choices), d), jnp.float32),
            rows,
            choices,
            weights,
            valid,
            axes=way.axes,
            experts=config.n_routed_experts,
            how=how,
            back=sums,
        ),
        mesh=mesh,
        in_specs=given,
        out_specs=given,
        check_vma=False,
    )
    arrays = ((8 * tokens, k), jnp.int32), ((8 * tokens, k), jnp.float32), ((8 * tokens,), bool)
    found: dict[tuple[str, tuple[str, ...]], float] = {}
    program = jax.make_jaxpr(body)(rows, *(jax.ShapeDtypeStruct(*each) for each in arrays))
    _traced(program.jaxpr, mesh.shape, 1, found)
    expected: dict[tuple[str, tuple[str, ...]], float] = {}
    for exchange in collectives(placed, 1, tokens):
        if exchange.what.startswith("tokens"):
            key = exchange.kind, exchange.axes
            expected[key] = expected.get(key, 0) + exchange.nbytes
    assert expected and found == expected


def test_a_model_held_in_float32_has_nothing_to_decode() -> None:
    placed = place(load_config("deepseek-r1-distill-qwen-1.5b"), weights="float32")
    assert workspace_bytes(placed, 1, 1) == 0
