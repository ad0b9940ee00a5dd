"""Portable artifacts: what is left out, which versions can express what, and damage. Floors are measured."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from dsjax.errors import InputError
from dsjax.export.consumers.base import Refused, new_context, parse
from dsjax.export.stablehlo import artifact

F32 = jnp.float32


def lowered(f, *shapes, **options):
    """The module of `f` for (shape, dtype) arguments."""
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    return jax.jit(f, **options).lower(*arguments).compiler_ir("stablehlo")


def read(portable: bytes) -> ir.Module:
    return parse(portable, new_context())


def interpreted(module, *values):
    """Results of the interpreter inside jaxlib, for float32 arguments."""
    with module.context:
        return [np.array(r) for r in stablehlo.eval_module(module, [ir.DenseElementsAttr.get(v) for v in values])]


def doubled(x):
    with jax.named_scope("double"):
        return {"a": x * 2, "/etc/b": x + 1}


def test_a_stripped_module_holds_no_path_and_the_given_one_is_left_alone() -> None:
    module = lowered(doubled, ((4,), F32))
    before = module.operation.get_asm(enable_debug_info=True)
    assert __file__ in before
    stripped = artifact.strip(module)
    assert module.operation.get_asm(enable_debug_info=True) == before
    assert __file__ not in stripped.operation.get_asm(enable_debug_info=True)
    assert "result['a']" in artifact.text(stripped)
    assert "/etc/b" in before and "/etc/b" not in artifact.text(stripped)
    assert "mhlo.num_partitions" in before and "mhlo" not in artifact.text(stripped)
    assert __file__.encode() not in artifact.serialise(module, "1.9.0")


def test_a_path_that_cannot_be_stripped_is_refused() -> None:
    source = """func.func @main(%x: tensor<2xf32>) -> tensor<2xf32> {
      %0 = stablehlo.custom_call @k(%x) {backend_config = "/home/someone/kernel.so"} : (tensor<2xf32>) -> tensor<2xf32>
      return %0 : tensor<2xf32> }"""
    module = ir.Module.parse(source, lowered(doubled, ((4,), F32)).context)
    with pytest.raises(InputError, match=r"expected no path and no host name in it, found /home/someone/kernel\.so"):
        artifact.strip(module)


FLOORS = {
    "float32": (lambda x: x + x, F32, "0.9.0"),
    "float8_e4m3fn": (lambda x: x.astype(F32), jnp.float8_e4m3fn, "0.9.0"),
    "float8_e8m0fnu": (lambda x: x.astype(F32), jnp.float8_e8m0fnu, "1.8.0"),
    "float4_e2m1fn": (lambda x: x.astype(F32), jnp.float4_e2m1fn, "1.8.0"),
    "composite": (lax.composite(lambda x: x + x, "dsjax.twice"), F32, "0.19.0"),
    "top_k": (lambda x: lax.top_k(x, 2), F32, "0.19.0"),
    "batched gather": (lambda x: jax.vmap(lambda r, j: r[j])(x, jnp.zeros(4, jnp.int32)), F32, "0.9.0"),
}


@pytest.mark.parametrize("case", FLOORS)
def test_version_floors(case: str, capfd: pytest.CaptureFixture[str]) -> None:
    f, dtype, floor = FLOORS[case]
    module = lowered(f, ((4, 4), dtype))
    assert artifact.minimum_version(module) == floor
    for version in artifact.versions():  # the search halves: every version must agree with it
        if artifact.parse_version(version) >= artifact.parse_version(floor):
            made = artifact.serialise(module, version)
            assert artifact.artifact_version(made) == version
            read(made)
        else:
            with pytest.raises(InputError, match=f"StableHLO {version}: .*needs {floor}$"):
                artifact.serialise(module, version)
    assert capfd.readouterr() == ("", "")


def test_an_old_reader_gets_what_it_knows() -> None:
    f, dtype, _ = FLOORS["batched gather"]
    module = lowered(f, ((4, 4), dtype))
    assert "operand_batching_dims" in artifact.text(module)
    old, new = (artifact.text(read(artifact.serialise(module, v))) for v in ("1.0.0", "1.1.0"))
    assert "operand_batching_dims" not in old and "operand_batching_dims" in new


def test_a_failure_names_operation_type_and_version() -> None:
    module = lowered(lambda x: x, ((4,), jnp.float8_e8m0fnu))
    with pytest.raises(InputError) as e:
        artifact.serialise(module, "1.7.0")
    expected = (
        "StableHLO 1.7.0: expected operations of that version, found function @main (type f8E8M0FNU); needs 1.8.0"
    )
    assert str(e.value) == expected
    with pytest.raises(InputError, match=r"1\.0\.0: .*found operation stablehlo\.bitcast_convert \(type f8E8M0FNU\)"):
        artifact.serialise(
            lowered(lambda x: lax.bitcast_convert_type(x, jnp.float8_e8m0fnu).astype(F32), ((4,), jnp.uint8)), "1.0.0"
        )


@pytest.mark.parametrize("version", ["0.8.0", "9.0.0"])
def test_a_version_outside_is_refused(version: str) -> None:
    with pytest.raises(InputError, match=rf"expected 0\.9\.0 to {artifact.current_version()}, found {version}"):
        artifact.serialise(lowered(doubled, ((4,), F32)), version)


@pytest.mark.parametrize("version", ["1.8", "v1.8.0", "new", ""])
def test_a_version_is_three_numbers(version: str) -> None:
    with pytest.raises(InputError, match="expected three numbers"):
        artifact.serialise(lowered(doubled, ((4,), F32)), version)


def test_the_same_program_from_another_file_gives_the_same_bytes() -> None:
    source = "import jax\n{}def f(x):\n    return jax.lax.top_k(x * 2 + jax.nn.softmax(x), 2)\n"
    made = []
    for file, blank in (("/tmp/one.py", ""), ("/srv/other/two.py", "\n\n\n")):
        scope: dict = {}
        exec(compile(source.format(blank), file, "exec"), scope)
        module = lowered(scope["f"], ((4, 8), F32))
        assert file in module.operation.get_asm(enable_debug_info=True)
        made += [artifact.serialise(module, "1.9.0"), artifact.serialise(module, "1.9.0")]
    assert len(set(made)) == 1


def test_an_artifact_read_back_computes_the_same() -> None:
    def f(x):
        return lax.scan(lambda c, w: (c @ w, c.sum()), x, jnp.full((3, 2, 2), 0.5, F32))

    module = lowered(f, ((2, 2), F32))
    x = np.arange(4, dtype=np.float32).reshape(2, 2)
    for version in ("0.9.0", artifact.current_version()):
        back = read(artifact.serialise(module, version))
        for got, expected in zip(interpreted(back, x), f(x), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_a_ranks_number_is_written_or_nothing_is() -> None:
    text = artifact.text(lowered(lambda x: x, ((4,), F32)))
    asked = text.replace("    return", "    %r = stablehlo.partition_id {} : tensor<ui32>\n    return")
    with pytest.raises(AssertionError, match="a rank's number"):
        next(artifact.of_ranks(asked, "1.9.0", 4))


@pytest.mark.parametrize("held", [False, True])
def test_ranks_differ_in_their_number_alone(held: bool) -> None:
    """Each rank's artifact, read back, is its text; also where the sought number is in the program already."""
    constant = f"%c = stablehlo.constant dense<{artifact._SOUGHT}> : tensor<ui32>\n" if held else ""
    body = f"""
      %0 = stablehlo.partition_id : tensor<ui32>
      %1 = stablehlo.partition_id : tensor<ui32>
      {constant}
      %2 = stablehlo.add %0, %1 : tensor<ui32>
      %3 = stablehlo.add %2, {"%c" if held else "%0"} : tensor<ui32>
      return %3 : tensor<ui32>"""
    program = f"module {{ func.func public @main() -> tensor<ui32> {{{body}\n}} }}"
    made = list(artifact.of_ranks(program, "1.1.0", 300))
    assert len({data for _, data in made}) == 300
    for rank in (0, 1, 299):
        text, data = made[rank]
        one_by_one = artifact.text(read(artifact.serialize_portable_artifact(text, "1.1.0", False)))
        assert f"dense<{rank}>" in one_by_one and artifact.text(read(data)) == one_by_one


def test_damage_is_told_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    whole = artifact.serialise(lowered(doubled, ((4,), F32)), "1.9.0")
    header = whole.index(b"\x00") + 1
    damages = (
        b"",
        b"not an artifact",
        whole[: len(whole) // 2],
        whole[:header] + b"x" * 64,
        whole.replace(b"v1.9.0", b"v9.9.0"),
    )
    for damaged in damages:
        with pytest.raises(Refused, match=r"expected a portable StableHLO artifact, found: \S") as e:
            read(damaged)
        assert "\n" not in str(e.value)
    assert capfd.readouterr() == ("", "")


def test_shardy_stays_shardy() -> None:
    mesh = jax.make_mesh((4,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    over = jax.sharding.PartitionSpec("a")
    module = lowered(jax.shard_map(lambda x: lax.psum(x, "a"), mesh=mesh, in_specs=over, out_specs=over), ((8,), F32))
    names = {o.name for o in artifact.walk(read(artifact.serialise(module, "1.9.0")).operation)}
    assert "sdy.manual_computation" in names and "stablehlo.custom_call" not in names


def test_what_no_version_can_express_is_told() -> None:
    source = """func.func @main(%x: tensor<2xf32>) -> tensor<2xf32> {
      %0 = "vendor.op"(%x) : (tensor<2xf32>) -> tensor<2xf32>
      return %0 : tensor<2xf32> }"""
    context = lowered(doubled, ((4,), F32)).context
    context.allow_unregistered_dialects = True
    try:
        module = ir.Module.parse(source, context)
        with pytest.raises(
            InputError, match=r"module: expected what StableHLO can express, found dialect 'vendor' is unknown"
        ):
            artifact.minimum_version(module)
    finally:
        context.allow_unregistered_dialects = False
