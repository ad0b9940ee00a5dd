"""Inventories against numbers derived by hand from small programs."""

from __future__ import annotations

import json
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jaxlib.mlir import ir

from dsjax.export.consumers.base import new_context, parse
from dsjax.export.stablehlo import artifact
from dsjax.export.stablehlo.inventory import inventory, operator_name
from dsjax.export.stablehlo.loops import count

F32, I32 = jnp.float32, jnp.int32


def named(name, f):
    """`f` outlined as the operator `dsjax.<name>`."""
    f.__name__ = f"dsjax.{name}"
    return jax.jit(f)


def lowered(f, *shapes, **options):
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    return jax.jit(f, **options).lower(*arguments).compiler_ir("stablehlo")


def parsed(source: str) -> ir.Module:
    return ir.Module.parse(source, lowered(lambda x: x, ((1,), F32)).context)


def counts(found, part, name):
    return found[part][name]["text"], found[part][name]["executed"], found[part][name]["dynamic"]


def test_calls_are_multiplied_by_trips_through_calls_and_nested_loops() -> None:
    norm = named("rms_norm", lambda x: x * lax.rsqrt((x * x).mean()))
    experts = named("grouped_matmul", lambda x: lax.fori_loop(0, 3, lambda i, y: norm(jnp.sin(y)), x))

    def layer(x, w):
        x = norm(x) + norm(w)  # two sites
        return experts(x) @ w, None

    def f(x, stack):
        x, _ = lax.scan(layer, norm(x), stack)  # one more site, before 7 trips
        return norm(x[:2])  # another shape: another function

    found = inventory(lowered(f, ((4, 4), F32), ((7, 4, 4), F32)))
    large, small = found["named"]["rms_norm"]["functions"]
    assert large == "dsjax.rms_norm" and small.startswith("dsjax.rms_norm_")
    assert counts(found, "named", "rms_norm") == (2 + 1 + 1 + 1, 1 + 7 * (2 + 3) + 1, False)
    assert counts(found, "named", "grouped_matmul") == (1, 7, False)
    assert counts(found, "functions", small) == (1, 1, False)
    assert counts(found, "operators", "stablehlo.sine") == (1, 21, False)
    assert counts(found, "operators", "stablehlo.dot_general") == (1, 7, False)
    assert counts(found, "operators", "stablehlo.rsqrt") == (2, 37, False)
    assert counts(found, "operators", "stablehlo.compare") == (2, 8 + 7 * 4, False)  # conditions: one more than trips
    loops = {entry["trips"]: entry for entry in found["loops"]}
    assert set(loops) == {3, 7}
    assert (loops[7]["executed"], loops[7]["operators"]) == (1, [])
    assert (loops[3]["executed"], loops[3]["operators"]) == (7, ["grouped_matmul"])
    places = {tuple(p["operators"]): p["executed"] for p in found["where"]["stablehlo.rsqrt"]}
    assert places == {("rms_norm",): 1 + 14 + 1, ("grouped_matmul", "rms_norm"): 21}
    json.dumps(found)


def test_a_loop_whose_end_depends_on_data_is_dynamic_and_marks_what_is_inside() -> None:
    def f(x, n):
        with jax.named_scope("search"):
            x = lax.fori_loop(0, n, lambda i, y: lax.fori_loop(0, 5, lambda j, z: jnp.sin(z), y), x)
        return jnp.cos(x)

    found = inventory(lowered(f, ((4,), F32), ((), I32)))
    assert counts(found, "operators", "stablehlo.sine") == (1, 5, True)
    assert counts(found, "operators", "stablehlo.cosine") == (1, 1, False)
    assert counts(found, "features", "while:dynamic") == (1, 1, False)
    assert [(e["trips"], e["dynamic"]) for e in found["loops"]] == [("dynamic", False), (5, True)]
    assert found["where"]["while:dynamic"] == [{"operators": [], "place": "search", "executed": 1}]
    assert [p["place"] for p in found["where"]["stablehlo.sine"]] == ["search"]


def test_trips_are_found_where_bound_and_body_are_outlined_and_carried() -> None:
    source = """
    func.func @main(%x: tensor<4xf32>) -> tensor<4xf32> {
      %zero = stablehlo.constant dense<2> : tensor<i32>
      %end = stablehlo.constant dense<17> : tensor<i32>
      %0:3 = stablehlo.while(%i = %zero, %bound = %end, %y = %x) : tensor<i32>, tensor<i32>, tensor<4xf32>
        cond { %t = func.call @test(%bound, %i) : (tensor<i32>, tensor<i32>) -> tensor<i1>
               stablehlo.return %t : tensor<i1> }
        do { %n:2 = func.call @body(%i, %y) : (tensor<i32>, tensor<4xf32>) -> (tensor<i32>, tensor<4xf32>)
             stablehlo.return %n#0, %bound, %n#1 : tensor<i32>, tensor<i32>, tensor<4xf32> }
      return %0#2 : tensor<4xf32> }
    func.func private @test(%bound: tensor<i32>, %i: tensor<i32>) -> tensor<i1> {
      %0 = stablehlo.compare GT, %bound, %i : (tensor<i32>, tensor<i32>) -> tensor<i1>
      return %0 : tensor<i1> }
    func.func private @body(%i: tensor<i32>, %y: tensor<4xf32>) -> (tensor<i32>, tensor<4xf32>) {
      %step = stablehlo.constant dense<4> : tensor<i32>
      %next = stablehlo.add %step, %i : tensor<i32>
      %z = stablehlo.tanh %y : tensor<4xf32>
      return %next, %z : tensor<i32>, tensor<4xf32> }"""
    assert [e["trips"] for e in inventory(parsed(source))["loops"]] == [4]  # 2, 6, 10, 14
    swapped = source.replace("return %n#0, %bound, %n#1 : tensor<i32>", "return %bound, %n#0, %n#1 : tensor<i32>", 1)
    swapped = swapped.replace("stablehlo.return %n#0, %bound", "stablehlo.return %bound, %n#0")
    assert [e["trips"] for e in inventory(parsed(swapped))["loops"]] == ["dynamic"]


def test_one_function_has_other_trips_at_another_call() -> None:
    source = """
    func.func @main(%x: tensor<4xf32>) -> tensor<4xf32> {
      %a = stablehlo.constant dense<3> : tensor<i32>
      %b = stablehlo.constant dense<5> : tensor<i32>
      %0 = call @repeat(%a, %x) : (tensor<i32>, tensor<4xf32>) -> tensor<4xf32>
      %1 = call @repeat(%b, %0) : (tensor<i32>, tensor<4xf32>) -> tensor<4xf32>
      return %1 : tensor<4xf32> }
    func.func private @repeat(%end: tensor<i32>, %x: tensor<4xf32>) -> tensor<4xf32> {
      %zero = stablehlo.constant dense<0> : tensor<i32>
      %0:2 = stablehlo.while(%i = %end, %y = %x) : tensor<i32>, tensor<4xf32>
        cond { %t = stablehlo.compare NE, %i, %zero : (tensor<i32>, tensor<i32>) -> tensor<i1>
               stablehlo.return %t : tensor<i1> }
        do { %one = stablehlo.constant dense<1> : tensor<i32>
             %n = stablehlo.subtract %i, %one : tensor<i32>
             %z = stablehlo.tanh %y : tensor<4xf32>
             stablehlo.return %n, %z : tensor<i32>, tensor<4xf32> }
      return %0#1 : tensor<4xf32> }"""
    found = inventory(parsed(source))
    assert sorted(e["trips"] for e in found["loops"]) == [3, 5]
    assert counts(found, "operators", "stablehlo.tanh") == (1, 8, False)


def test_trip_counts_equal_running_the_loop() -> None:
    tests = {"LT": int.__lt__, "LE": int.__le__, "GT": int.__gt__, "GE": int.__ge__, "NE": int.__ne__}
    for direction, test in tests.items():
        for start in range(-5, 6):
            for bound in range(-5, 6):
                for step in range(-3, 4):
                    i, trips = start, 0
                    while test(i, bound) and trips < 40:
                        i, trips = i + step, trips + 1
                    assert count(direction, start, bound, step) == (trips if trips < 40 else None)


def test_trip_counts_are_those_that_xla_finds_in_the_compiled_program() -> None:
    def inner(x, w):
        return lax.fori_loop(2, 13, lambda i, y: jnp.tanh(y @ w), x), None

    def f(x, stack, n):
        x, _ = lax.scan(inner, x, stack)
        return lax.fori_loop(0, n, lambda i, y: jnp.tanh(y @ y), x)

    step = jax.jit(f).lower(*(jax.ShapeDtypeStruct(s, t) for s, t in (((8, 8), F32), ((9, 8, 8), F32), ((), I32))))
    known = re.findall(r'"known_trip_count":\{"n":"(\d+)"\}', step.compile().as_text())
    found = [e["trips"] for e in inventory(step.compiler_ir("stablehlo"))["loops"]]
    assert sorted(map(int, known)) == [9, 11] and sorted(map(str, found)) == ["11", "9", "dynamic"]


def test_types_are_told_by_where_they_occur() -> None:
    def f(codes, scale):
        return (codes.astype(F32) * scale.astype(F32)).astype(jnp.float8_e5m2), jnp.int8(3) * jnp.ones(4, jnp.int8)

    types = inventory(lowered(f, ((4,), jnp.float8_e4m3fn), ((), jnp.float8_e8m0fnu)))["types"]
    assert types["f8E4M3FN"] == {"arguments": [0], "results": [], "constants": 0, "inside": 0}
    assert types["f8E8M0FNU"]["arguments"] == [1]
    assert types["f8E5M2"] == {"arguments": [], "results": [0], "constants": 0, "inside": 1}
    assert types["i8"]["results"] == [1] and types["i8"]["constants"] >= 1
    assert types["f32"]["arguments"] == types["f32"]["results"] == [] and types["f32"]["inside"] >= 3


def test_signature_aliases_and_names() -> None:
    found = inventory(
        lowered(lambda cache, x: (x.sum(), cache.at[0].set(x)), ((4, 8), F32), ((8,), F32), donate_argnums=0)
    )
    cache, x = found["arguments"]
    assert (cache["name"], cache["shape"], cache["element"], cache["alias"]) == ("cache", [4, 8], "f32", 1)
    assert (x["name"], x["alias"], x["donated"]) == ("x", None, False)
    assert found["aliases"] == {"0": 1} and found["donated"] == [0]
    assert [r["shape"] for r in found["results"]] == [[], [4, 8]]


def test_sorts_top_k_composites_and_bodies() -> None:
    def f(x):
        top = named("moe_gate", lambda y: lax.top_k(y, 2))(x)
        return top, lax.sort((x, -x), num_keys=2), lax.composite(lambda y: jnp.tanh(y), "dsjax.norm")(x)

    module = lowered(f, ((4, 8), F32))
    found = inventory(module)
    assert counts(found, "operators", "chlo.top_k") == (1, 1, False)
    assert found["where"]["chlo.top_k"] == [{"operators": ["moe_gate"], "place": "", "executed": 1}]
    assert counts(found, "features", "sort:compare other") == (1, 1, False)  # by two keys
    assert counts(found, "composites", "dsjax.norm") == (1, 1, False)
    assert found["named"]["norm"]["executed"] == 1
    assert found["where"]["stablehlo.tanh"] == [{"operators": ["norm"], "place": "", "executed": 1}]
    assert "stablehlo.compare" in found["bodies"]["stablehlo.sort"] and "stablehlo.compare" not in found["operators"]
    read = inventory(parse(artifact.serialise(module, "1.9.0"), new_context()))  # top-k is a composite over a sort now
    assert counts(read, "composites", "chlo.top_k") == (1, 1, False)
    assert {tuple(p["operators"]) for p in read["where"]["stablehlo.sort"]} == {(), ("moe_gate", "chlo.top_k")}
    assert counts(read, "features", "sort:compare GT") == (1, 1, False)


def test_ragged_dot_and_integer_dot() -> None:
    def f(x, w, sizes, a, b):
        return lax.ragged_dot(x, w, sizes), lax.dot(a, b, preferred_element_type=I32)

    found = inventory(lowered(f, ((6, 4), F32), ((2, 4, 3), F32), ((2,), I32), ((4, 4), jnp.int8), ((4, 4), jnp.int8)))
    assert counts(found, "features", "dot_general:i8xi8->i32") == (1, 1, False)
    assert counts(found, "features", "dot_general:f32xf32->f32") == (1, 1, False)
    assert found["custom_calls"] == {} and found["max_rank"] == 3


def test_constants_count_where_they_take_room() -> None:
    weight = jnp.arange(512 * 512, dtype=F32).reshape(512, 512)
    inside = inventory(lowered(lambda x: x @ weight + jnp.ones((512, 512), F32), ((512, 512), F32)))
    assert inside["largest_constant"] == {"bytes": 1048576, "type": "tensor<512x512xf32>"}
    outside = inventory(lowered(lambda x, w: x @ w, ((512, 512), F32), ((512, 512), F32)))
    assert outside["largest_constant"]["bytes"] == 0


def test_choices_custom_calls_and_dynamic_shapes() -> None:
    def f(x, n):
        return lax.cond(n > 0, jnp.sin, jnp.cos, jnp.linalg.cholesky(x))

    found = inventory(lowered(f, ((4, 4), F32), ((), I32)))
    assert found["operators"]["stablehlo.case"]["executed"] == 1
    assert found["operators"]["stablehlo.sine"]["executed"] == found["operators"]["stablehlo.cosine"]["executed"] == 1
    assert len(found["custom_calls"]) == 1 and not found["dynamic_shapes"]
    source = """func.func @main(%x: tensor<?x4xf32>) -> tensor<?x4xf32> {
      %0 = stablehlo.tanh %x : tensor<?x4xf32>
      return %0 : tensor<?x4xf32> }"""
    assert inventory(parsed(source))["dynamic_shapes"]


RANK = """
module attributes {mhlo.num_partitions = 4 : i32} {
  func.func public @main(%x: tensor<8x4xbf16>) -> tensor<8x8xbf16> {
    %c = stablehlo.constant dense<0> : tensor<i32>
    %end = stablehlo.constant dense<6> : tensor<i32>
    %0:2 = stablehlo.while(%i = %c, %y = %x) : tensor<i32>, tensor<8x4xbf16>
      cond { %t = stablehlo.compare LT, %i, %end : (tensor<i32>, tensor<i32>) -> tensor<i1>
             stablehlo.return %t : tensor<i1> }
      do { %r = "stablehlo.all_reduce"(%y) <{replica_groups = dense<[[0, 1], [2, 3]]> : tensor<2x2xi64>}> ({
             ^bb0(%a: tensor<bf16>, %b: tensor<bf16>):
               %s = stablehlo.add %a, %b : tensor<bf16>
               stablehlo.return %s : tensor<bf16>
           }) : (tensor<8x4xbf16>) -> tensor<8x4xbf16>
           %one = stablehlo.constant dense<1> : tensor<i32>
           %n = stablehlo.add %i, %one : tensor<i32>
           stablehlo.return %n, %r : tensor<i32>, tensor<8x4xbf16> }
    %g = "stablehlo.all_gather"(%0#1) <{all_gather_dim = 1 : i64, replica_groups = dense<[[0, 2], [1, 3]]> : tensor<2x2xi64>}> : (tensor<8x4xbf16>) -> tensor<8x8xbf16>
    %p = "stablehlo.collective_permute"(%g) <{source_target_pairs = dense<[[0, 1], [1, 0]]> : tensor<2x2xi64>}> : (tensor<8x8xbf16>) -> tensor<8x8xbf16>
    return %p : tensor<8x8xbf16>
  }
}"""  # noqa: E501


def test_collectives_of_a_rank() -> None:
    found = {c["kind"]: c for c in inventory(parsed(RANK))["collectives"]}
    expected = {
        "all_reduce": ("groups", [[0, 1], [2, 3]], 64, 64, 6),
        "all_gather": ("groups", [[0, 2], [1, 3]], 64, 128, 1),
        "collective_permute": ("pairs", [[0, 1], [1, 0]], 128, 128, 1),
    }
    for kind, (key, groups, operand, result, executed) in expected.items():
        entry = found.pop(kind)
        assert (entry[key], entry["operand_bytes"], entry["result_bytes"]) == (groups, operand, result)
        assert (entry["text"], entry["executed"], entry["element"]) == (1, executed, "bf16")
    assert not found
    assert inventory(parsed(RANK))["bodies"] == {"stablehlo.all_reduce": {"stablehlo.add": 1}}


def test_the_whole_program_of_a_sharded_step_shows_its_collectives_and_its_shardy() -> None:
    mesh = jax.make_mesh((4,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    over = jax.sharding.PartitionSpec("a")

    def body(x):
        return lax.fori_loop(0, 3, lambda i, y: lax.psum(y, "a") * 0.25, x)

    found = inventory(
        lowered(jax.shard_map(body, mesh=mesh, in_specs=over, out_specs=over, check_vma=False), ((16,), F32))
    )
    (entry,) = found["collectives"]
    assert (entry["groups"], entry["operand_bytes"], entry["executed"]) == ([[0, 1, 2, 3]], 16, 3)
    assert found["operators"]["sdy.manual_computation"]["text"] == 1


@pytest.mark.parametrize(
    ("symbol", "operator"),
    [("dsjax.rms_norm", "rms_norm"), ("dsjax.rms_norm_12", "rms_norm"), ("dsjax.top_k", "top_k"), ("rms_norm", None)],
)
def test_operator_names(symbol: str, operator: str | None) -> None:
    assert operator_name(symbol) == operator
