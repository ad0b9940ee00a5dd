"""memory.json, cost.json and cache.json against counts by hand, and against the products that programs have."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import jax
import pytest
from helpers_export import TWINS, twin_flags

from dsjax.cli.main import main
from dsjax.config import Config, load_config, parse_config
from dsjax.export.program import account
from dsjax.export.program.exporter import Exporter, Program, Shape
from dsjax.export.program.targets import find_target
from dsjax.layout import layout
from dsjax.numerics import Numerics
from dsjax.params import VECTOR, table
from dsjax.plan import Model
from dsjax.plan.placement import module_of
from dsjax.presets import PRESETS
from dsjax.synth import synth_config
from sharding import parse_plan

CONTEXT = "attention over the context"


def twin(preset: str) -> Config:
    layers, settings = TWINS[preset]
    return parse_config(synth_config(preset, layers=layers, settings=settings))


def planned(
    config: Config,
    shape: Shape,
    *,
    target: str = "typed",
    mla: str = "auto",
    mesh: str = "",
    attention: str = "heads",
    op: Mapping[str, str] | None = None,
) -> tuple[Program, Model]:
    """A program, which is not traced, and the same model for the planner."""
    as_target = find_target(target)
    numerics = Numerics("plain", "bfloat16", mla, products="tiled").for_checkpoint(config, as_target.weights)
    split = layout(config, parse_plan(mesh), attention, numerics)
    exporter = Exporter(config, numerics, as_target, split, choices=op or {})
    return exporter.program(shape), Model("test", config, numerics, as_target.weights)


def cost(config: Config, shape: Shape, **kw: Any) -> dict[str, Any]:
    return account.cost(*planned(config, shape, **kw))


MOE_ROWS = {"loop": 2, "dense": 8, "ragged": 16}
"""Rows of experts' products for each token: chosen; all; all for each of two choices."""

DECODE, PREFILL = Shape("decode", 2, 1, 32), Shape("prefill", 2, 8, 32)
DRAFT, DRAFTS = Shape("mtp", 2, 1, 32), Shape("mtp-prefill", 2, 8, 32)


# --- operators' variants ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "tokens"), [(DECODE, 2), (PREFILL, 16)])
@pytest.mark.parametrize(("mesh", "ranks"), [("", 1), ("ep=2", 2)])
def test_experts_count_as_they_are_multiplied(shape: Shape, tokens: int, mesh: str, ranks: int) -> None:
    """Of 8 experts a token chooses 2, three matrices of 128 x 128 each; there is one such layer."""
    found = {moe: cost(twin("deepseek-v3"), shape, mesh=mesh, op={"grouped_matmul": moe}) for moe in MOE_ROWS}
    matrices = 3 * 128 * 128
    for moe, rows in MOE_ROWS.items():
        assert found[moe]["flops_by_module"]["routed experts"] == 2 * matrices * rows * tokens // ranks
    held = matrices * 8 // ranks + 3 * 8 // ranks * 4  # FP8, one float32 scale a matrix
    reads = {moe: work["weight_bytes_by_module"]["routed experts"] for moe, work in found.items()}
    assert reads["dense"] == reads["ragged"] == held > reads["loop"]
    for moe in MOE_ROWS:
        rest = {name: n for name, n in found[moe]["flops_by_module"].items() if name != "routed experts"}
        assert rest.items() <= found["loop"]["flops_by_module"].items()


def test_experts_that_tokens_travel_to_are_multiplied_with_all_that_arrive() -> None:
    """Slots and experts split two ways: a rank's 4 experts see the 16 tokens of both ranks."""
    program = {"mesh": "ep=2", "attention": "slots", "op": {"grouped_matmul": "dense"}}
    found = cost(twin("deepseek-v3"), PREFILL, **program)
    assert found["tokens"] == 8
    assert found["flops_by_module"]["routed experts"] == 2 * 3 * 128 * 128 * 4 * 16


@pytest.mark.parametrize("shape", [DECODE, PREFILL, DRAFT])
@pytest.mark.parametrize("form", ["absorbed", "naive"])
def test_a_variant_of_mla_counts_as_the_numerics_one(shape: Shape, form: str) -> None:
    config = load_config("deepseek-v3")
    by_op, by_numerics = (cost(config, shape, **kw) for kw in ({"op": {"mla": form}}, {"mla": form}))
    assert by_op == by_numerics
    layers = 1 if shape is DRAFT else 61
    width = {"absorbed": 576 + 512, "naive": 192 + 128}[form]
    seen = sum(range(32 - shape.tokens + 1, 33))  # by the queries of a slot together
    assert by_op["flops_by_module"][CONTEXT] == 2 * layers * seen * 2 * 128 * width
    if form == "naive":  # and not the form that numerics would have chosen
        absorbed = cost(config, shape, op={"mla": "absorbed"})
        again = 2 * layers * (32 - shape.tokens) * 2 * 128 * 256 * 512  # kv_b for positions that were there before
        assert by_op["flops_by_module"]["attention"] - absorbed["flops_by_module"]["attention"] == again


def test_v32_attends_to_few_positions_as_v3_does() -> None:
    """A prefill step of at most index_topk positions goes through `mla`: naive, where tokens are many."""
    shape = Shape("prefill", 1, 512, 512)
    sparse, dense = (cost(load_config(name), shape)["flops_by_module"] for name in ("deepseek-v3.2", "deepseek-v3"))
    assert sparse[CONTEXT] == dense[CONTEXT] == 61 * sum(range(1, 513)) * 2 * 128 * (192 + 128)


# --- the draft module ------------------------------------------------------------------------------------------------


def test_v3s_draft_module_by_hand() -> None:
    """A step of one token at 4,096 positions: its layer has experts, the projection takes two vectors."""
    found = cost(load_config("deepseek-v3"), Shape("mtp", 1, 1, 4096))
    attention = 7168 * (1536 + 576) + 1536 * 128 * 192 + 512 * 128 * 256 + 128 * 128 * 7168
    expert = 3 * 2048 * 7168
    assert found["flops_by_module"] == {
        "draft projections": 2 * 7168 * 2 * 7168,
        "attention": 2 * attention,
        "routers": 2 * 256 * 7168,
        "shared experts": 2 * expert,
        "routed experts": 2 * 8 * expert,
        "head": 2 * 129280 * 7168,
        CONTEXT: 4096 * 2 * 128 * (576 + 512),
    }
    assert found["cache_bytes"] == 4096 * 2 * 576
    assert found["flops_per_token"] == sum(found["flops_by_module"].values()) == sum(found["flops"].values())


def _products(jaxpr: Any, times: int = 1) -> Iterator[int]:
    """Operations of every product with weights in a program, loops counted."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general" and "..." in str(equation.source_info.name_stack):
            (contracted, _), _ = equation.params["dimension_numbers"]
            width = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            yield 2 * times * math.prod(equation.outvars[0].aval.shape) * width
        inner = times * (equation.params["length"] if equation.primitive.name == "scan" else 1)
        for value in equation.params.values():
            for part in value if isinstance(value, list | tuple) else [value]:
                part = getattr(part, "jaxpr", part)
                if hasattr(part, "eqns"):
                    yield from _products(part, inner)


@pytest.mark.parametrize("shape", [PREFILL, DRAFT, DRAFTS])
@pytest.mark.parametrize("preset", ["deepseek-v3", "deepseek-v4-flash"])
def test_operations_are_those_of_the_program(preset: str, shape: Shape) -> None:
    """Every product with a weight, found in the traced program; attention absorbed, all experts multiplied."""
    op = {"grouped_matmul": "dense", "block_scaled_dot": "whole", "mla": "absorbed"}
    program, model = planned(twin(preset), shape, op=op)
    with program.exporter.chosen():
        traced = jax.make_jaxpr(program.function)(*(value.spec for value in program.arguments))
    counted = account.cost(program, model)["flops_by_module"]
    assert sum(_products(traced.jaxpr)) == sum(n for name, n in counted.items() if name != CONTEXT)


# --- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_only_vectors_are_norms(name: str) -> None:
    rows = [row for row in table(load_config(name)) if row.copy_of is None and module_of(row) == "norms"]
    assert rows and all(row.storage == VECTOR and len(row.dims) == 1 for row in rows)


def test_the_drafts_projections_are_a_module() -> None:
    shape = Shape("mtp", 1, 1, 4096)
    v3 = account.memory(*planned(load_config("deepseek-v3"), shape))["parameters_by_module"]
    assert v3["draft projections"] == 2 * 7168 * 2 * 7168
    assert v3["norms"] < 100_000
    config = load_config("deepseek-v4-flash")
    v4 = account.memory(*planned(config, shape))["parameters_by_module"]
    assert v4["draft projections"] == 2 * (config.hidden_size**2 + (config.hidden_size // 128) ** 2)


@pytest.mark.parametrize(
    ("preset", "target", "shape", "mesh"),
    [
        ("deepseek-r1-distill-qwen-1.5b", "typed", DECODE, ""),  # has neither experts nor a draft module
        *product(["deepseek-v3", "deepseek-v4-flash"], ["typed", "portable"], [DECODE, DRAFT], ["", "ep=2"]),
        ("deepseek-v4-flash", "typed-fp8", DECODE, ""),  # whose experts are twice as large as they are stored
    ],
)
def test_weights_are_read_as_they_are_held(preset: str, target: str, shape: Shape, mesh: str) -> None:
    program, model = planned(twin(preset), shape, target=target, mesh=mesh, op={"grouped_matmul": "dense"})
    held = account.memory(program, model)
    read = account.cost(program, model)["weight_bytes_by_module"]
    looked_up = {"embedding", "routers"}  # of tables of experts, too, only rows are read
    assert read.keys() == held["parameters_by_module"].keys()
    for module, nbytes in held["parameters_by_module"].items():
        assert read[module] == nbytes or (module in looked_up and 0 < read[module] < nbytes)
    assert sum(held["parameters_by_module"].values()) == held["parameters"]


def test_temporaries_are_called_an_estimate() -> None:
    """libtpu took 557,545,888 bytes for this program (docs/vendor.md): what is said is no bound."""
    found = account.memory(
        *planned(load_config("deepseek-v3"), Shape("decode", 8, 1, 4096), mesh="ep=8", attention="slots")
    )
    assert found["temporaries_estimate"] < 557_545_888
    parts = ("parameters", "cache", "inputs", "outputs", "temporaries_estimate")
    assert found["total"] == sum(found[part] for part in parts)
    assert not any("bound" in key for key in found) and "No bound" in account.MEMORY_NOTES["temporaries_estimate"]


# --- the cache -------------------------------------------------------------------------------------------------------


def test_a_cache_of_ranks_says_each_ranks_part() -> None:
    """Four slots in two parts by ep; heads of keys and values in two by tp."""
    config = twin("deepseek-r1-distill-qwen-1.5b")
    found = account.cache(planned(config, Shape("decode", 4, 1, 32), mesh="dp=2,tp=2")[0])
    by_name = {entry["name"].rsplit(".", 1)[-1]: entry for entry in found["arguments"]}
    length = by_name["length"]
    assert (length["global_shape"], length["shape"]) == ([4], [2])
    assert (length["global_bytes"], length["bytes"]) == (16, 8)
    assert length["slices"] == [[[0, 2]], [[0, 2]], [[2, 4]], [[2, 4]]]
    for entry in found["arguments"]:
        for bounds in entry["slices"]:
            assert [stop - start for start, stop in bounds] == entry["shape"]
        share = math.prod(entry["global_shape"]) // math.prod(entry["shape"])
        assert entry["global_bytes"] == share * entry["bytes"]
    assert found["bytes"] == sum(entry["bytes"] for entry in found["arguments"])
    assert found["global_bytes"] == sum(entry["global_bytes"] for entry in found["arguments"]) > found["bytes"]


def test_a_cache_of_one_device_is_whole(tmp_path: Path) -> None:
    """In a bundle, with the draft module's phases, whose work has its place in the report."""
    flags = ["--phases", "decode,mtp", "--length", "32", "--out", str(tmp_path / "b")]
    assert main(["export", *twin_flags("deepseek-v3"), *flags]) == 0
    cache, work = (json.loads((tmp_path / "b" / f"{name}.json").read_text()) for name in ("cache", "cost"))
    assert cache["notes"].keys() >= {"global_shape", "slices"}
    for module in cache["modules"].values():
        for entry in module["arguments"]:
            assert entry["slices"] is None and entry["shape"] == entry["global_shape"]
            assert entry["bytes"] == entry["global_bytes"]
    assert work["modules"]["mtp-b1-s32"]["flops_by_module"]["draft projections"] == 2 * 128 * 256
    report = (tmp_path / "b" / "REPORT.md").read_text()
    assert "draft projections" in report
    row = next(line for line in report.splitlines() if line.startswith("| `mtp-b1-s32` |"))
    assert row.split("|")[-3].strip().endswith("FLOP")
