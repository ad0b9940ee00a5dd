"""Collectives counted in compiled programs, against closed forms worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sharding.collectives import Collective, by_scope, collectives, first_group, scope_of, summary
from sharding.hlo import Array, parse

ROWS, WIDTH = 16, 24  # of one device's float32 array
BYTES = ROWS * WIDTH * 4


def compiled(body: Callable[[Any], Any], shape: tuple[int, ...] = (2, 2, 2), dtype: Any = jnp.float32) -> str:
    """The text of a manual program on 8 devices, axes a, b and c, whose body gets [ROWS, WIDTH] on each."""
    mesh = jax.make_mesh(shape, ("a", "b", "c"), axis_types=(AxisType.Auto,) * 3)
    spec = P(("a", "b", "c"))
    step = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    return step.lower(jax.ShapeDtypeStruct((8 * ROWS, WIDTH), dtype)).compile().as_text()


def found(body: Callable[[Any], Any], **settings: Any) -> list[Collective]:
    return collectives(compiled(body, **settings))


def tile(x: jax.Array, n: int, axis: int) -> jax.Array:
    """x, n times: an array whose every part is used."""
    return jnp.concatenate([x * (i + 1) for i in range(n)], axis=axis)


# kind, body, bytes of the operand, size of the group, bytes sent
CASES = [
    ("all-reduce", lambda x: lax.psum(x, "c"), BYTES, 2, 2 * BYTES / 2),
    ("all-reduce", lambda x: lax.psum(x, ("b", "c")), BYTES, 4, 2 * BYTES * 3 / 4),
    ("all-reduce", lambda x: lax.pmax(x, ("a", "b", "c")), BYTES, 8, 2 * BYTES * 7 / 8),
    ("all-gather", lambda x: lax.all_gather(x, "b").sum(0), BYTES, 2, BYTES),
    ("all-gather", lambda x: lax.all_gather(x, ("a", "c"), tiled=True)[::4], BYTES, 4, 3 * BYTES),
    ("reduce-scatter", lambda x: tile(lax.psum_scatter(x, ("b", "c"), tiled=True), 4, 0), BYTES, 4, BYTES * 3 / 4),
    ("all-to-all", lambda x: lax.all_to_all(x, "b", 0, 1, tiled=True).reshape(x.shape), BYTES, 2, BYTES / 2),
    ("all-to-all", lambda x: lax.all_to_all(x, ("a", "b", "c"), 0, 0, tiled=True), BYTES, 8, BYTES * 7 / 8),
    ("collective-permute", lambda x: lax.ppermute(x, "a", [(0, 1), (1, 0)]), BYTES, 2, BYTES),
]


@pytest.mark.parametrize(("kind", "body", "operand", "group", "sent"), CASES)
def test_one_collective(kind: str, body: Any, operand: int, group: int, sent: float) -> None:
    """Kind, operand, group and bytes of the ring model."""
    (one,) = found(lambda x: body(jnp.sin(x)))
    assert (one.kind, one.operand_bytes, one.group_size, one.count) == (kind, operand, group, 1)
    assert (one.dtypes, one.unbounded, one.promoted) == (("f32",), False, False)
    assert one.sent == one.total_sent == sent
    factor = {"all-gather": group, "reduce-scatter": 1 / group}.get(kind, 1)
    assert one.result_bytes == operand * factor


def test_groups_are_the_mesh_axis() -> None:
    """Devices are numbered with the last axis fastest."""
    groups = [found(lambda x, axes=axes: lax.psum(jnp.sin(x), axes))[0].group for axes in ("a", "b", "c", ("a", "c"))]
    assert groups == [(0, 4), (0, 2), (0, 1), (0, 1, 4, 5)]


def test_a_group_of_one_counts_nothing() -> None:
    assert found(lambda x: lax.psum(jnp.sin(x), "a") + lax.all_gather(x, "a").sum(0), shape=(1, 4, 2)) == []


def test_bytes_follow_the_element_type() -> None:
    """An exchange of bytes is a quarter of one of float32; XLA:CPU sums bfloat16 in float32, which is said."""
    (one,) = found(lambda x: lax.all_to_all(x + 1, "c", 0, 0, tiled=True), dtype=jnp.uint8)
    assert (one.dtypes, one.operand_bytes) == (("u8",), ROWS * WIDTH)
    (one,) = found(lambda x: lax.psum(jnp.sin(x), "c"), dtype=jnp.bfloat16)
    assert one.operand_bytes == ROWS * WIDTH * (4 if one.promoted else 2)
    assert one.promoted == (one.dtypes == ("f32",))


def test_a_tuple_is_one_collective() -> None:
    """Arrays that XLA joins are summed; the number of collectives is then XLA's choice, the bytes are not."""
    joined = found(lambda x: sum(lax.psum((jnp.sin(x), jnp.cos(x)), "b")))
    assert sum(c.operand_bytes for c in joined) == 2 * BYTES
    assert sum(c.total_sent for c in joined) == 2 * BYTES


# --- how often -------------------------------------------------------------------------------------------------------


def nested(x: jax.Array) -> jax.Array:
    """Five layers of: one sum over c; three times an exchange over b, and in that twice a gather over a."""

    def layer(x: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        with jax.named_scope("attention"):
            x = lax.psum(jnp.sin(x * i), "c")

        def inner(j: jax.Array, x: jax.Array) -> jax.Array:
            with jax.named_scope("moe"), jax.named_scope("dispatch"):
                x = lax.all_to_all(jnp.tanh(x + j), "b", 0, 0, tiled=True)

            def innermost(k: jax.Array, x: jax.Array) -> jax.Array:
                with jax.named_scope("moe"):
                    return lax.all_gather(jnp.cos(x * k), "a").sum(0)

            return lax.fori_loop(0, 2, innermost, x)

        return lax.fori_loop(4, 7, inner, x), None

    return lax.scan(layer, x, jnp.arange(5.0))[0]


def test_loops_count_as_often_as_they_run() -> None:
    counts = {c.kind: (c.count, c.scope) for c in found(nested)}
    assert counts == {
        "all-reduce": (5, "attention"),
        "all-to-all": (5 * 3, "moe/dispatch"),
        "all-gather": (5 * 3 * 2, "moe"),
    }


def test_summaries() -> None:
    """By kind and by scope, the largest sender first."""
    kinds = summary(found(nested))
    assert list(kinds) == ["all-gather", "all-to-all", "all-reduce"]
    assert {k: (t.count, t.sent) for k, t in kinds.items()} == {
        "all-reduce": (5, 5 * BYTES),
        "all-to-all": (15, 15 * BYTES / 2),
        "all-gather": (30, 30 * BYTES),
    }
    assert (kinds["all-gather"].largest, kinds["all-reduce"].largest) == (2 * BYTES, BYTES)
    scopes = {k: t.sent for k, t in by_scope(found(nested)).items()}
    assert scopes == {"moe": 37.5 * BYTES, "attention": 5 * BYTES}
    assert set(by_scope(found(nested), depth=2)) == {"moe", "moe/dispatch", "attention"}


def test_a_loop_of_unknown_length_is_flagged_and_counted_once() -> None:
    """Its length is data; a loop of known length inside it still multiplies."""

    def body(x: jax.Array) -> jax.Array:
        trips = jnp.abs(x[0, 0]).astype(jnp.int32)
        x = lax.psum(jnp.sin(x), "a")

        def inner(i: jax.Array, x: jax.Array) -> jax.Array:
            return lax.fori_loop(0, 3, lambda j, x: lax.psum(jnp.cos(x * j), "c"), x * i)

        return lax.fori_loop(0, trips, inner, x)

    flags = {c.group: (c.count, c.unbounded) for c in found(body)}
    assert flags == {(0, 4): (1, False), (0, 1): (3, True)}
    assert summary(found(body))["all-reduce"].unbounded


def test_the_branch_that_sends_most_counts() -> None:
    def body(x: jax.Array) -> jax.Array:
        few, many = (lambda x: lax.psum(x, "c") + 1), (lambda x: lax.psum(x, ("a", "b", "c")) * 2)
        return lax.switch(jnp.int32(x[0, 0]), [few, many, jnp.sin], jnp.cos(x))

    (one,) = found(body)
    assert (one.group_size, one.count) == (8, 1)


# --- what the text may hold ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("{{0,1},{2,3}}", (0, 1)),
        ("{{0},{1,3}}", (1, 3)),
        ("{}", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("[2,4]<=[8]", (0, 1, 2, 3)),
        ("[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("[2,4]<=[2,2,2]T(1,0,2)", (0, 1, 4, 5)),
        ("mesh['a'=8,'b'=1] {'a'}", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("mesh['a'=4,'b'=2] {'a'}", (0, 2, 4, 6)),
        ("mesh['a'=4,'b'=2] {'b','a'}", (0, 2, 4, 6, 1, 3, 5, 7)),
        ("mesh['a'=4,'b'=2] {'a':(1)2}", (0, 4)),
        ("mesh['a'=4,'b'=2] {'a':(2)2,'b'}", (0, 1, 2, 3)),
        ("mesh['a'=1,'b'=2,'c'=4], device_ids=([4,2]T(1,0)) {'b'}", (0, 1)),
        ("mesh['a'=1,'b'=2,'c'=4], device_ids=([4,2]T(1,0)) {'c'}", (0, 2, 4, 6)),
    ],
)
def test_replica_groups(text: str, group: tuple[int, ...]) -> None:
    assert first_group(text, 8) == group


def test_unknown_replica_groups_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected replica groups, found '@mesh'"):
        first_group("@mesh", 8)


def test_text_that_is_no_program_is_refused() -> None:
    with pytest.raises(ValueError, match="expected an ENTRY computation"):
        collectives("HloModule nothing\n")


@pytest.mark.parametrize(
    ("op_name", "scope"),
    [
        ("jit(step)/shard_map/while/body/closed_call/moe/dispatch/all_to_all", "moe/dispatch"),
        ("jit(step)/jit(main)/cond/branch_1_fun/head/psum", "head"),
        ("moe/add", "moe"),
        ("psum", ""),
        ("", ""),
    ],
)
def test_scope(op_name: str, scope: str) -> None:
    assert scope_of(op_name) == scope


@pytest.mark.parametrize(
    ("dtype", "nbytes"), [("pred", 6), ("u8", 6), ("bf16", 12), ("f8e4m3fn", 6), ("s4", 3), ("f32", 24), ("c64", 48)]
)
def test_bytes_of_types(dtype: str, nbytes: int) -> None:
    assert Array(dtype, (2, 3)).nbytes == nbytes


# What the TPU compiler writes, cut down: loops without a printed length, whose bound may stand outside; tilings and
# memory spaces; a sum over more than one array; collectives that run beside the program; a reduce-scatter as a fusion.
TPU = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[64,512]{1,0:T(8,128)})->f32[]}, num_partitions=8

%region_1.0 (psum.1: f32[], psum.2: f32[]) -> f32[] {
  %psum.1 = f32[]{:T(128)} parameter(0), metadata={op_name="while/body/attention/psum"}
  %psum.2 = f32[]{:T(128)} parameter(1), metadata={op_name="while/body/attention/psum"}
  ROOT %add.1 = f32[]{:T(128)} add(%psum.1, %psum.2), metadata={op_name="attention/add" stack_frame_id=12}
}

%called_computation (param_0.1: f32[64,512], param_1.1: token[]) -> f32[64,512] {
  %param_0.1 = f32[64,512]{1,0:T(8,128)} parameter(0)
  %param_1.1 = token[] parameter(1)
  ROOT %all-gather.1 = f32[64,512]{0,1:T(8,128)} all-gather(%param_0.2), channel_id=1, replica_groups=[4,2]<=[8], \
dimensions={1}, use_global_device_ids=true
  %param_0.2 = f32[64,256]{1,0:T(8,128)S(1)} bitcast(%param_0.1)
}

%scattering (param_0.5: bf16[4,256]) -> bf16[1,256] {
  %param_0.5 = bf16[4,256]{1,0:T(4,128)(2,1)} parameter(0)
  %all-reduce.9 = bf16[4,256]{1,0:T(4,128)(2,1)} all-reduce(%param_0.5), channel_id=4, \
replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%region_1.0
  %constant.9 = s32[]{:T(128)} constant(0)
  %dynamic-slice.9 = bf16[1,256]{1,0:T(4,128)(2,1)} dynamic-slice(%all-reduce.9, %constant.9, %constant.9), \
dynamic_slice_sizes={1,256}
  ROOT %bitcast.9 = bf16[1,256]{1,0:T(4,128)(2,1)} bitcast(%dynamic-slice.9)
}

%inner_body (wide.param.2: (s32[], f32[64,512], s32[])) -> (s32[], f32[64,512], s32[]) {
  %wide.param.2 = (s32[]{:T(128)}, f32[64,512]{1,0:T(8,128)}, s32[]{:T(128)}) parameter(0)
  %gte.20 = s32[]{:T(128)} get-tuple-element(%wide.param.2), index=0
  %constant.20 = s32[]{:T(128)} constant(1)
  %add.20 = s32[]{:T(128)} add(%gte.20, %constant.20), backend_config={"flag_configs":[],"lists":[{"indices":["0"]}]}
  %gte.21 = f32[64,512]{1,0:T(8,128)} get-tuple-element(%wide.param.2), index=1
  %gte.22 = s32[]{:T(128)} get-tuple-element(%wide.param.2), index=2
  %token.1 = token[] custom-call(), custom_call_target="PrepareAsyncCallDone"
  %start.1 = ((f32[64,512]{1,0:T(8,128)}, token[]), f32[64,512]{0,1:T(8,128)}) call-start(%gte.21, %token.1), \
async_execution_thread="sparsecore", to_apply=%called_computation, \
metadata={op_name="jit(step)/shard_map/while/body/closed_call/moe/all_gather" stack_frame_id=31}
  %done.1 = f32[64,512]{0,1:T(8,128)} call-done(%start.1), metadata={op_name="jit(step)/shard_map/moe/all_gather"}
  ROOT %tuple.20 = (s32[]{:T(128)}, f32[64,512]{1,0:T(8,128)}, s32[]{:T(128)}) tuple(%add.20, %done.1, %gte.22)
}

%inner_condition (wide.param.3: (s32[], f32[64,512], s32[])) -> pred[] {
  %wide.param.3 = (s32[]{:T(128)}, f32[64,512]{1,0:T(8,128)}, s32[]{:T(128)}) parameter(0)
  %gte.30 = s32[]{:T(128)} get-tuple-element(%wide.param.3), index=0
  %gte.31 = s32[]{:T(128)} get-tuple-element(%wide.param.3), index=2
  ROOT %lt.30 = pred[]{:T(512)} compare(%gte.30, %gte.31), direction=LT
}

%outer_body (param.4: (s32[], f32[64,512], s32[])) -> (s32[], f32[64,512], s32[]) {
  %param.4 = (s32[]{:T(128)}, f32[64,512]{1,0:T(8,128)S(1)}, /*index=2*/s32[]{:T(128)}) parameter(0)
  %gte.40 = s32[]{:T(128)} get-tuple-element(%param.4), index=0
  %constant.40 = s32[]{:T(128)} constant(-2)
  %add.40 = s32[]{:T(128)} add(%constant.40, %gte.40)
  %gte.41 = f32[64,512]{1,0:T(8,128)S(1)} get-tuple-element(%param.4), index=1
  %gte.42 = s32[]{:T(128)} get-tuple-element(%param.4), index=2
  %copy.42 = s32[]{:T(128)} copy(%gte.42)
  %constant.41 = s32[]{:T(128)} constant(0)
  %half = bf16[64,512]{1,0:T(8,128)(2,1)S(1)} convert(%gte.41)
  %all-reduce.2 = (f32[64,512]{1,0:T(8,128)S(1)}, bf16[64,512]{1,0:T(8,128)(2,1)S(1)}) \
all-reduce(%gte.41, /*index=1*/%half), channel_id=2, replica_groups=[2,4]<=[4,2]T(1,0), use_global_device_ids=true, \
to_apply=%region_1.0, backend_config={"barrier_config":{"id":"3"},"debug":"\\nStrategyND{cores:{4 4},{4 4}"}
  %gte.43 = f32[64,512]{1,0:T(8,128)S(1)} get-tuple-element(%all-reduce.2), index=0
  %tuple.41 = (s32[]{:T(128)}, f32[64,512]{1,0:T(8,128)}, s32[]{:T(128)}) tuple(%constant.41, %gte.43, %copy.42)
  %while.41 = (s32[]{:T(128)}, f32[64,512]{1,0:T(8,128)}, s32[]{:T(128)}) while(%tuple.41), \
condition=%inner_condition, body=%inner_body
  %gte.44 = f32[64,512]{1,0:T(8,128)} get-tuple-element(%while.41), index=1
  ROOT %tuple.42 = (s32[]{:T(128)}, f32[64,512]{1,0:T(8,128)}, s32[]{:T(128)}) tuple(%add.40, %gte.44, %gte.42)
}

%outer_condition (param.5: (s32[], f32[64,512], s32[])) -> pred[] {
  %param.5 = (s32[]{:T(128)}, f32[64,512]{1,0:T(8,128)}, s32[]{:T(128)}) parameter(0)
  %gte.50 = s32[]{:T(128)} get-tuple-element(%param.5), index=0
  %constant.50 = s32[]{:T(128)} constant(0)
  ROOT %lt.50 = pred[]{:T(512)} compare(%constant.50, %gte.50), direction=LT
}

ENTRY %main (x.1: f32[64,512], w.1: bf16[4,256]) -> f32[64,512] {
  %x.1 = f32[64,512]{1,0:T(8,128)} parameter(0), metadata={op_name="x"}
  %w.1 = bf16[4,256]{1,0:T(4,128)(2,1)} parameter(1), metadata={op_name="params[\\'experts\\'].codes"}
  %constant.60 = s32[]{:T(128)} constant(9)
  %constant.61 = s32[]{:T(128)} constant(3)
  %permuted = (f32[64,512]{1,0:T(8,128)}, f32[64,512]{1,0:T(8,128)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%x.1), channel_id=3, source_target_pairs={{0,2},{2,0}}, \
metadata={op_name="jit(step)/shard_map/perm/ppermute"}
  %arrived = f32[64,512]{1,0:T(8,128)S(1)} collective-permute-done(%permuted)
  %scattered = bf16[1,256]{1,0:T(4,128)(2,1)} fusion(%w.1), kind=kCustom, calls=%scattering, \
metadata={op_name="jit(step)/shard_map/head/reduce_scatter"}
  %alone = f32[64,512]{1,0:T(8,128)} all-reduce(%arrived), replica_groups=[8,1]<=[8], to_apply=%region_1.0
  %tuple.60 = (s32[]{:T(128)}, f32[64,512]{1,0:T(8,128)}, s32[]{:T(128)}) tuple(%constant.60, %alone, %constant.61)
  %while.60 = (s32[]{:T(128)}, f32[64,512]{1,0:T(8,128)}, s32[]{:T(128)}) while(%tuple.60), \
condition=%outer_condition, body=%outer_body, metadata={op_name="jit(step)/shard_map/while" stack_frame_id=20}
  ROOT %gte.60 = f32[64,512]{1,0:T(8,128)} get-tuple-element(%while.60), index=1
}
"""


def test_tpu_programs() -> None:
    """The outer loop counts down from 9 by 2: five trips; the inner one runs to 3, a number from outside both."""
    rows = [(c.kind, c.dtypes, c.operand_bytes, c.group, c.count, c.scope) for c in collectives(TPU)]
    assert rows == [
        ("collective-permute", ("f32",), 64 * 512 * 4, (0, 2), 1, "perm"),
        ("reduce-scatter", ("bf16",), 4 * 256 * 2, (0, 1, 2, 3), 1, "attention"),
        ("all-reduce", ("f32", "bf16"), 64 * 512 * 6, (0, 2, 4, 6), 5, "attention"),
        ("all-gather", ("f32",), 64 * 256 * 4, (0, 1), 15, "moe"),
    ]
    assert not any(c.unbounded for c in collectives(TPU))


@pytest.mark.parametrize(
    ("old", "new", "count"),
    [
        ("compare(%constant.50, %gte.50), direction=LT", "compare(%gte.50, %constant.50), direction=GE", 5),
        ("compare(%constant.50, %gte.50), direction=LT", "compare(%gte.50, %constant.60), direction=NE", None),
        ("constant(-2)", "constant(-3)", 3),
        ("constant(-2)", "constant(2)", None),
        ("%constant.60 = s32[]{:T(128)} constant(9)", "%constant.60 = s32[]{:T(128)} constant(-1)", 0),
        ("add(%constant.40, %gte.40)", "multiply(%constant.40, %gte.40)", None),
        ("body=%outer_body", 'body=%outer_body, backend_config={"known_trip_count":{"n":"7"}}', 7),
    ],
)
def test_lengths_of_loops(old: str, new: str, count: int | None) -> None:
    """Of the outer loop: steps, directions, XLA's own number; None where it cannot be told."""
    assert old in TPU
    found = [c for c in collectives(TPU.replace(old, new)) if c.kind == "all-reduce"]
    assert [(c.count, c.unbounded) for c in found] == ([] if count == 0 else [(count or 1, count is None)])


def test_reading_a_program() -> None:
    """Names with quotes, comments between operands, tuples of tilings."""
    program = parse(TPU)
    assert program.devices == 8
    main = program.computations[program.entry]
    assert main.instructions["w.1"].op_name == "params[\\'experts\\'].codes"
    rows, arrived, mark, _ = main.instructions["permuted"].arrays
    assert (rows, arrived) == (Array("f32", (64, 512)), Array("f32", (64, 512), space=1))
    assert mark == Array("u32", (), space=2)
    assert program.computations["outer_body"].instructions["all-reduce.2"].operands == ("gte.41", "half")
