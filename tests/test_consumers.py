"""Each consumer by itself: element types, ranks, refusals, and how long the interpreter says that it will take."""

from __future__ import annotations

import importlib.util
import os
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import func, stablehlo
from verify_bundles import RANKS, Example, Item, decode, lift, portable, ranked, typed, write_bundle

from dsjax.export.consumers import consumer
from dsjax.export.consumers.base import Refused, copy_functions, main_function, new_context, parse
from dsjax.export.consumers.estimate import estimate_module
from dsjax.export.consumers.exchange import dtype_of
from dsjax.export.consumers.interpreter import Interpreter, evaluate
from dsjax.export.consumers.iree import WITHOUT_BARRIERS, execute
from dsjax.export.consumers.lockstep import merge
from dsjax.export.consumers.tpu_aot import TpuAot
from dsjax.export.consumers.worker import isolated
from dsjax.export.consumers.xla import as_replica, lay_out_rows
from dsjax.export.stablehlo.artifact import of_ranks, serialise
from dsjax.export.verify import verify


def _plugin() -> Path:
    found = importlib.util.find_spec("xla_plugins")
    folders = [] if found is None else list(found.submodule_search_locations or [])
    return Path(next(iter(folders), ".")) / "xla_cpu_pjrt" / "xla_cpu_pjrt.so"


def _quiet(_: str) -> None:
    pass


MARKED = [
    "interpreter",
    "jax",
    pytest.param("iree", marks=pytest.mark.verify),
    pytest.param("pjrt", marks=pytest.mark.verify),
]


@pytest.fixture(params=MARKED)
def name(request: pytest.FixtureRequest) -> str:
    if request.param == "pjrt":
        return f"pjrt:{_plugin()}"
    return str(request.param)


def test_element_types_in_and_out(name: str) -> None:
    """Arrays of every type that a bundle has come back as they went in, one of no dimensions among them."""
    floats = ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e8m0fnu"]
    names = [*floats, "bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32))]
    given = [np.arange(1, 5).astype(dtype_of(n)) for n in names] + [np.array(7, np.int32)]

    def turn(*arrays: Any) -> Any:  # an identity would be no program at all
        return [jnp.concatenate([x[1:], x[:1]]) if x.ndim else x + 1 for x in arrays]

    found = consumer(name).run(portable(jax.jit(turn).lower(*given)), given)
    for x, y in zip(given, found, strict=True):
        assert y.dtype == x.dtype and y.shape == x.shape
        np.testing.assert_array_equal(y.astype(np.float32), np.roll(x.astype(np.float32), -1) if x.ndim else 8)


@pytest.mark.verify
def test_iree_names_the_target_that_it_takes() -> None:
    """It has no FP4: that is said before its compiler is asked, with or without arguments."""
    codes = np.zeros(4, dtype_of("float4_e2m1fn"))
    module = portable(jax.jit(lambda x: x.astype(jnp.float32)).lower(codes))
    for ask in (lambda: consumer("iree").run(module, [codes]), lambda: consumer("iree").compile([module])):
        with pytest.raises(Refused, match=r"^it has no f4E2M1FN; --target typed-fp8 or portable have none$"):
            ask()


@pytest.mark.verify
def test_iree_is_asked_again_without_barriers(monkeypatch: pytest.MonkeyPatch) -> None:
    import iree.compiler

    ask, asked = iree.compiler.compile_str, list[bool]()

    def compile_str(*args: Any, extra_args: list[str], **kwargs: Any) -> bytes:
        asked.append(WITHOUT_BARRIERS in extra_args)
        if not asked[-1]:
            complaint = iree.compiler.CompilerToolError.__new__(iree.compiler.CompilerToolError)
            complaint.args = ("error: failed to solve for timepoint coverage",)
            raise complaint
        return ask(*args, extra_args=extra_args, **kwargs)

    monkeypatch.setattr(iree.compiler, "compile_str", compile_str)
    x = np.ones(4, np.float32)
    module = portable(jax.jit(lambda x: jax.lax.optimization_barrier(x) / 3).lower(x))
    [[found]], _ = execute([module], [[x]], {})
    assert asked == [False, True] and np.allclose(found, x / 3)


def test_bundles_agree(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bundle = write_bundle(tmp_path / "bundle", [decode(), typed(), ranked(), ranked_apart()])
    report = verify(bundle, [name], say=_quiet)
    assert report["passed"], report
    assert {r["state"] for by in report["programs"].values() for r in by.values()} == {"agreed"}
    assert capfd.readouterr().err == ""


def ranked_apart() -> Any:
    """The program of four ranks in which each has its number as a constant."""
    example = ranked(constant_rank=True)
    example.name = "decode-b3-s4"
    return example


def _two_ranks(body: Callable[[Any], Any], shape: tuple[int, ...]) -> tuple[bytes, np.ndarray]:
    """The artifact of a function of two ranks, and a whole argument, split by its first axis."""
    mesh = jax.make_mesh((2,), ("r",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(body, mesh=mesh, in_specs=P("r"), out_specs=P("r"), check_vma=False)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return serialise(lift(jax.jit(mapped).lower(x), {}), "1.1.0"), x


def _in_parallel(modules: list[bytes], arguments: list[np.ndarray]) -> list[np.ndarray]:
    """What the interpreter's own collectives give: `interpreter.run_parallel`, a thread for each rank."""
    context = new_context()
    parsed = [parse(m, context) for m in modules]
    with context, ir.Location.unknown():
        program = ir.Module.create()
        kinds = [main_function(m).type for m in parsed]
        for rank, module in enumerate(parsed):
            copy_functions(module, program, f"rank{rank}_")
        inputs, outputs = [t for k in kinds for t in k.inputs], [t for k in kinds for t in k.results]
        with ir.InsertionPoint(program.body):
            entry = func.FuncOp("main", (inputs, outputs))
        with ir.InsertionPoint(entry.add_entry_block()):
            names = ir.ArrayAttr.get([ir.FlatSymbolRefAttr.get(f"rank{rank}_main") for rank in range(len(parsed))])
            programs = {"programs": ir.ArrayAttr.get([names])}
            given = list(entry.arguments)
            run = ir.Operation.create("interpreter.run_parallel", outputs, given, attributes=programs)
            func.ReturnOp(list(run.results))
        return [np.array(a) for a in stablehlo.eval_module(program, [ir.DenseElementsAttr.get(a) for a in arguments])]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a core for each rank")
def test_collectives_written_out_are_the_interpreters_own() -> None:
    code, x = _two_ranks(lambda x: jax.lax.psum(x, "r") + jax.lax.axis_index("r"), (4, 3))
    given = [x[:2], x[2:]]
    merged, own = evaluate([merge([code] * 2)], [given], {})[0][0], _in_parallel([code] * 2, given)
    for rank in range(2):
        np.testing.assert_array_equal(merged[rank], x[:2] + x[2:] + rank)
        np.testing.assert_array_equal(merged[rank], own[rank])


def test_collectives_in_loops_are_met_again() -> None:
    """Twice the sum of all ranks, three times over: each meeting has what ranks bring to it."""

    def body(x: Any) -> Any:
        return jax.lax.fori_loop(0, 3, lambda i, x: jax.lax.psum(x, "r") * (jax.lax.axis_index("r") + 1), x)

    code, x = _two_ranks(body, (4, 3))
    ran = Interpreter().run_ranks([code] * 2, [[x[:2]], [x[2:]]])
    total = (x[:2] + x[2:]) * 9
    for rank in range(2):
        np.testing.assert_allclose(ran.results[rank][0], total * (rank + 1), rtol=1e-6)


def test_ranks_that_meet_in_different_collectives_are_refused() -> None:
    one, _ = _two_ranks(lambda x: jax.lax.psum(x, "r"), (4, 3))
    other, _ = _two_ranks(lambda x: jax.lax.ppermute(x, "r", [(0, 1)]), (4, 3))
    none, _ = _two_ranks(lambda x: x + 1, (4, 3))
    with pytest.raises(Refused, match=r"ranks meet in different instructions: stablehlo.all_reduce, stablehlo.coll"):
        merge([one, other])
    with pytest.raises(Refused, match="expected each to take part in the same collectives, found 1 in all"):
        merge([one, none])


SUM = """
func.func public @main(%x: tensor<2xf32>) -> tensor<2xf32> {
  %0 = "stablehlo.all_reduce"(%x) <{replica_groups = dense<GROUPS> : tensor<SHAPExi64>,
      channel_handle = #stablehlo.channel_handle<handle = 1, type = 1>, use_global_device_ids}> ({
  ^bb0(%a: tensor<f32>, %b: tensor<f32>):
    %1 = stablehlo.ADD LEFT, RIGHT : tensor<f32>
    stablehlo.return %1 : tensor<f32>
  }) : (tensor<2xf32>) -> tensor<2xf32>
  return %0 : tensor<2xf32>
}"""


def _sum(groups: str, shape: str = "2x2", add: str = "add", left: str = "%a", right: str = "%b") -> bytes:
    """A sum over groups of four ranks, or what looks like one."""
    text = SUM.replace("GROUPS", groups).replace("SHAPE", shape).replace("ADD", add)
    return serialise(ir.Module.parse(text.replace("LEFT", left).replace("RIGHT", right), new_context()), "1.1.0")


def test_collectives_that_differ_between_ranks_are_refused() -> None:
    one, other = _sum("[[0, 1], [2, 3]]"), _sum("[[0, 2], [1, 3]]")
    x = np.ones(2, np.float32)
    np.testing.assert_array_equal(evaluate([one] * 4, [[x]] * 4, {})[0], np.full((4, 1, 2), 2))
    for others, what in ((other, "attributes"), (_sum("[[0, 1], [2, 3]]", add="maximum"), "reductions")):
        with pytest.raises(Refused, match=f"stablehlo.all_reduce: expected the same {what} of all ranks"):
            merge([one, others, others, others])
    with pytest.raises(Refused, match=r"expected the same types of all ranks, found \(tensor<2xf32>"):
        merge([one, *[_wide(one)] * 3])


def _wide(code: bytes) -> bytes:
    """The same of four numbers."""
    text = str(parse(code, new_context())).replace("tensor<2xf32>", "tensor<4xf32>")
    return serialise(ir.Module.parse(text, new_context()), "1.1.0")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (
            _sum("[[0, 1], [2, 3], [4, 5]]", "3x2"),
            r"replica_groups: expected ranks 0 to 3, found \[\[0, 1\], ",
        ),
        (_sum("[[0, 1]]", "1x2"), "expected every rank in one group"),
        (_sum("[[0, 1], [2, 3]]", right="%a"), "stablehlo.all_reduce by .* cannot be written out"),
    ],
)
def test_collectives_that_make_no_sense_are_refused(code: bytes, expected: str) -> None:
    with pytest.raises(Refused, match=expected):
        merge([code] * 4)


def test_ranks_are_one_program_only_if_their_number_alone_differs() -> None:
    """Whatever the files are: one that is not its rank's has them joined instead."""
    text = "module {{ func.func public @main() -> tensor<ui32> {{ {} return %0 : tensor<ui32> }} }}"
    program = text.format("%0 = stablehlo.partition_id : tensor<ui32>\n")
    a, b, c = (code for _, code in of_ranks(program, "1.1.0", 3))
    assert as_replica([a, b, c]) is not None
    for others in ([a, c, b], [a, b, a], [a, a, b], [a, b, c[:-1]]):
        assert as_replica(others) is None


def test_groups_of_ranks_are_kept_apart() -> None:
    """Two groups on a mesh of two axes: each is summed by itself."""
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), axis_types=(AxisType.Auto,) * 2)
    both = P(("dp", "tp"))
    mapped = jax.shard_map(lambda x: jax.lax.psum(x, "dp"), mesh=mesh, in_specs=both, out_specs=both, check_vma=False)
    x = np.arange(4, dtype=np.float32)
    code = serialise(lift(jax.jit(mapped).lower(x), {}), "1.1.0")
    ran = consumer("jax").run_ranks([code] * 4, [[x[r : r + 1]] for r in range(4)])
    merged = evaluate([merge([code] * 4)], [[x[r : r + 1] for r in range(4)]], {})[0][0]
    for found in ([r[0] for r in ran.results], merged):
        np.testing.assert_array_equal(np.concatenate(found), [2, 4, 2, 4])


def test_a_process_that_dies_costs_one_line() -> None:
    code, x = _two_ranks(lambda x: jax.lax.psum(x, "r"), (4, 3))
    with pytest.raises(Refused, match="signal SIGABRT: LLVM ERROR: all_reduce is only supported") as e:
        Interpreter().run(code, [x[:2]])
    assert "\n" not in str(e.value)


def test_a_process_that_takes_too_long_is_ended() -> None:
    with pytest.raises(Refused, match=r"not done within --time-limit 0\.01 s") as e:
        isolated("dsjax.export.consumers.interpreter:evaluate", [], time_limit=0.01)
    assert e.value.state == "too slow"


def test_what_a_process_has_started_ends_with_it(tmp_path: Path) -> None:
    """As compilers do that run another program: it is not left behind when the time is over."""
    text = """
        import pathlib, subprocess
        def start(modules, arguments, options):
            child = subprocess.Popen(["sleep", "120"])
            pathlib.Path(options["file"]).write_text(str(child.pid))
            child.wait()
        """
    (tmp_path / "task.py").write_text(textwrap.dedent(text))
    options, path = {"file": str(tmp_path / "pid")}, os.pathsep.join([str(Path(__file__).parents[1]), str(tmp_path)])
    with pytest.raises(Refused, match="not done within"):
        isolated("task:start", [], options=options, environment={"PYTHONPATH": path}, time_limit=8)
    child = Path("/proc") / (tmp_path / "pid").read_text() / "stat"
    for _ in range(50):  # whoever takes in orphans may take a moment
        if not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the program that the task has started still runs")


def test_rows_are_laid_out_beside_what_is_there() -> None:
    """A program whose arguments and results have no attributes; one whose results have a sharding."""
    text = """func.func public @main(%x: tensor<4x4096xbf16> ARG) -> (tensor<4x4096xbf16> RESULT) {
        return %x : tensor<4x4096xbf16>
    }"""
    for argument, result in (("", ""), ("{tf.aliasing_output = 0 : i32}", '{mhlo.sharding = "{replicated}"}')):
        module = ir.Module.parse(text.replace("ARG", argument).replace("RESULT", result), new_context())
        lay_out_rows(module)
        main = main_function(module)
        assert 'mhlo.layout_mode = "{1,0}"' in str(main.attributes["arg_attrs"])
        found = str(main.attributes["res_attrs"])
        assert ("mhlo.sharding" in found, "mhlo.layout_mode" in found) == (bool(result), bool(argument))
        assert module.operation.verify()


@pytest.mark.parametrize("data", [b"", b"ML\xefR", b"ML\xefR\rStableHLO_v1.8.0\x00", b"module {}"])
def test_what_is_no_artifact_is_refused(data: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Refused, match="expected a portable StableHLO artifact"):
        parse(data, new_context())
    assert capfd.readouterr().err == ""


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (lambda a, b: a @ b, [_normal(64, 128), _normal(128, 128)]),
        (
            lambda x, w: jax.lax.scan(lambda c, wi: (jnp.tanh(c @ wi), c.sum()), x, w),
            [_normal(16, 64), _normal(12, 64, 64)],
        ),
        (lambda a: jnp.sort(a, axis=1), [_normal(8, 1024)]),
    ],
)
def test_the_estimate_is_near(function: Callable[..., Any], arguments: list[np.ndarray]) -> None:
    """Within a factor of five, on a machine that does other things too."""
    code = portable(jax.jit(function).lower(*arguments))
    estimate = estimate_module(parse(code, new_context()))
    start = time.perf_counter()
    evaluate([code], [arguments], {})
    assert estimate.exact
    assert 0.2 < estimate.seconds / (time.perf_counter() - start) < 5


def test_the_estimate_says_where_it_is_a_lower_bound() -> None:
    code = portable(
        jax.jit(lambda n, x: jax.lax.fori_loop(0, n, lambda i, x: x @ x, x)).lower(np.int32(3), _normal(100, 100))
    )
    assert str(estimate_module(parse(code, new_context()))) == "at least 1 s"


@pytest.mark.verify
def test_the_documented_exceptions_of_iree(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", [typed(codes=[1, 0xFF], scales=[0, 127])])
    found = verify(bundle, ["iree"], say=_quiet)["programs"]["block-decode-0"]["iree"]
    assert found["state"] == "excepted"
    assert "0xff as -480" in found["note"] and "0x00 as 0" in found["note"]


@pytest.mark.verify
def test_codes_in_bytes_are_excepted_like_those_in_arguments(tmp_path: Path) -> None:
    """Of typed programs activations' codes are bytes that become FP8 inside."""
    codes = np.arange(256, dtype=np.uint8)
    step = jax.jit(lambda x: jax.lax.bitcast_convert_type(x, jnp.float8_e4m3fn).astype(jnp.float32))
    sides = [Item("input", "in0", codes)], [Item("output", "out0", np.asarray(step(codes)))]
    bundle = write_bundle(tmp_path / "bundle", [Example("block-decode-0", [portable(step.lower(codes))], *sides)])
    found = verify(bundle, ["iree", "jax"], say=_quiet)["programs"]["block-decode-0"]
    assert (found["iree"]["state"], found["jax"]["state"]) == ("excepted", "agreed")
    assert "0xff as -480" in found["iree"]["note"] and "note" not in found["jax"]


@pytest.mark.aot
def test_tpu_compilers_take_the_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bundle = write_bundle(tmp_path / "bundle", [decode(), ranked()])
    report = verify(bundle, ["tpu-aot:v5e:2x2", "tpu-aot:tpu7x:2x2x1"], say=_quiet)
    assert report["passed"], report
    for by in report["programs"].values():
        for found in by.values():
            assert found["state"] == "accepted"
            assert found["memory"]["argument_bytes"] > 0 and found["memory"]["alias_bytes"] > 0
    assert capfd.readouterr().err == ""


@pytest.mark.aot
def test_tpu_topologies_that_do_not_fit_are_refused() -> None:
    with pytest.raises(Refused, match=r"expected 8 devices, found 4 in v5e:2x2"):
        TpuAot("v5e:2x2").compile(ranked().modules * 2)
    with pytest.raises(Refused, match=r"^tpu-aot:v7x:2x2: expected a topology"):
        TpuAot("v7x:2x2").compile(decode().modules)


@pytest.mark.aot
def test_a_global_program_is_split_by_the_compiler() -> None:
    """What `--spmd auto` exports: one program with shardings, for four devices; each holds a quarter."""
    mesh = jax.make_mesh((RANKS,), ("tp",), axis_types=(AxisType.Auto,))
    where = NamedSharding(mesh, P(None, "tp"))
    function = jax.jit(lambda a, b: a @ b, in_shardings=where, out_shardings=where)
    shape = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    code = serialise(function.lower(shape, shape).compiler_ir("stablehlo"), "1.8.0")
    found = TpuAot("v5e:2x2").compile([code], partitions=RANKS)
    assert found["argument_bytes"] == 2 * 1024 * 1024 * 4 // RANKS
