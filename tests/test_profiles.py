"""Profiles as data: each file is whole, and a violation says what, where and which switch removes it."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from helpers_export import twin_flags
from jax import lax

from dsjax.cli.export import add_flags
from dsjax.cli.main import main
from dsjax.errors import InputError
from dsjax.export.profiles.rules import Violation, check, load, names
from dsjax.export.profiles.vocabulary import known
from dsjax.export.program.switches import SWITCHES
from dsjax.export.stablehlo.inventory import inventory

F32 = jnp.float32
ALL = {"generic", "tpu", "iree", "tenstorrent", "neuron", "no-fp8", "no-sort", "no-while-dynamic", "w8a8-npu"}


def named(name, f):
    f.__name__ = f"dsjax.{name}"
    return jax.jit(f)


def found(f, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    return inventory(jax.jit(f).lower(*arguments).compiler_ir("stablehlo"))


def violations(profile: str, inventory_) -> dict[str, Violation]:
    return {v.what: v for v in check(load(profile), inventory_)}


def test_every_profile_is_whole() -> None:
    assert set(names()) == ALL
    for name in names():
        profile = load(name)
        assert profile.title and profile.rules
        for rule in profile.rules:
            assert len(rule.source) > 10 and re.fullmatch(r"20\d\d-\d\d", rule.date) and rule.reason


def test_plain_arithmetic_passes_everywhere_but_where_integers_are_demanded() -> None:
    plain = found(lambda x, w: jax.nn.softmax(x @ w), ((4, 4), F32), ((4, 4), F32))
    for name in ALL - {"w8a8-npu"}:
        assert check(load(name), plain) == []
    (missing,) = check(load("w8a8-npu"), plain)
    assert (missing.what, missing.switch) == ("no dot_general:i8xi8->i32", "--target w8a8")
    integers = found(lambda a, b: lax.dot(a, b, preferred_element_type=jnp.int32), *[((4, 4), jnp.int8)] * 2)
    assert check(load("w8a8-npu"), integers) == []


def test_a_sort_is_told_with_its_place_and_the_switch_for_that_place() -> None:
    gate = named("moe_gate", lambda x: lax.top_k(x, 2))
    grouped = named("grouped_matmul", lambda x: jnp.take_along_axis(x, jnp.argsort(x, stable=True), -1))

    def f(x):
        return lax.scan(lambda c, _: (grouped(c), gate(c)[0]), x, None, length=5)

    bad = violations("no-sort", found(f, ((4, 8), F32)))
    assert bad["operator chlo.top_k"].where == ("moe_gate",)
    assert bad["operator chlo.top_k"].switch == "--topk loop"
    assert bad["operator stablehlo.sort"].where == ("grouped_matmul",)
    assert bad["operator stablehlo.sort"].switch == "--moe dense"
    line = str(bad["operator stablehlo.sort"])
    assert line.startswith("refused: operator stablehlo.sort (1 written, 5 executed): no sort")
    assert "where: grouped_matmul; --moe dense removes it [tt-xla issues 442" in line and "\n" not in line
    tenstorrent = violations("tenstorrent", found(f, ((4, 8), F32)))
    assert tenstorrent["feature sort:stable"].level == "refused"
    assert tenstorrent["operator stablehlo.sort"].level == "doubtful"


def test_types_are_told_by_argument_and_operator() -> None:
    decode = named("block_scaled_dot", lambda x, w: x @ w.astype(jnp.float8_e4m3fn).astype(F32))

    def f(x, codes):
        return decode(x, codes.astype(F32))

    found_ = found(f, ((4, 4), F32), ((4, 4), jnp.float8_e4m3fn))
    for profile in ("no-fp8", "neuron"):
        bad = violations(profile, found_)["type f8E4M3FN"]
        assert bad.where == ("argument 1 codes", "block_scaled_dot") and bad.switch == "--target portable"
    assert violations("iree", found_)["type f8E4M3FN"].level == "doubtful"
    assert check(load("tpu"), found_) == []
    five = found(lambda x: x.astype(F32), ((4,), jnp.float8_e5m2))
    assert check(load("neuron"), five) == [] and violations("no-fp8", five)["type f8E5M2"]
    assert (
        violations("iree", found(lambda x: x.astype(F32), ((4,), jnp.float4_e2m1fn)))["type f4E2M1FN"].level
        == "refused"
    )


def test_loops_choices_and_comparators() -> None:
    def f(x, n):
        with jax.named_scope("attend"):
            x = lax.fori_loop(0, n, lambda i, y: jnp.sin(y), x)
        return lax.cond(n > 1, jnp.sin, jnp.cos, x), lax.reduce_precision(x, 8, 7), lax.sort((x, x), num_keys=2)

    found_ = found(f, ((4,), F32), ((), jnp.int32))
    bad = violations("neuron", found_)
    assert {"feature while:dynamic", "operator stablehlo.case", "feature sort:compare other"} <= set(bad)
    assert bad["feature while:dynamic"].where == ("attend",) and bad["feature while:dynamic"].switch == "none"
    assert str(bad["feature while:dynamic"]).count("no switch removes it") == 1
    assert bad["operator stablehlo.reduce_precision"].switch == "--target float32"
    assert set(violations("no-while-dynamic", found_)) == {"feature while:dynamic", "operator stablehlo.case"}
    assert check(load("tpu"), found_) == []
    static = found(lambda x: lax.fori_loop(0, 4, lambda i, y: jnp.sin(y), x), ((4,), F32))
    assert check(load("neuron"), static) == []


def test_what_no_vendor_takes() -> None:
    weight = jnp.arange(1 + (1 << 18), dtype=F32)
    generic = violations("generic", found(lambda x: x + weight, (weight.shape, F32)))
    assert list(generic) == ["constant of 1,048,580, above 1,048,576"]
    cholesky = violations("generic", found(jnp.linalg.cholesky, ((4, 4), F32)))
    (call,) = (what for what in cholesky if "custom_call:" in what)
    assert call.startswith("feature custom_call:lapack") and cholesky[call].switch == "none"
    mesh = jax.make_mesh((4,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    over = jax.sharding.PartitionSpec("a")
    sharded = found(jax.shard_map(lambda x: lax.psum(x, "a"), mesh=mesh, in_specs=over, out_specs=over), ((8,), F32))
    bad = violations("generic", sharded)
    assert bad["operator sdy.manual_computation"].switch == "--spmd manual"
    assert check(load("tpu"), sharded) == []  # libtpu reads Shardy: what --spmd auto is for


def write(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


REQUIRED = ["--model", "deepseek-v3", "--out", "bundle"]
RULE = 'reason = "r"\nsource = "s"\ndate = "2026-11"\nswitch = "none"\n'


def test_a_users_own_profile_with_limits(tmp_path: Path) -> None:
    limits = f'[[rule]]\nkind = "version"\nmost = "1.0.0"\n{RULE}[[rule]]\nkind = "rank"\nmost = 2\n{RULE}'
    allowed = (
        f'[[rule]]\nkind = "operator"\nallow = ["stablehlo.convert", "stablehlo.reshape"]\nexcept = ["func.*"]\n{RULE}'
    )
    profile = load(write(tmp_path, f'title = "mine"\n{limits}{allowed}'))
    bad = check(profile, found(lambda x: jnp.tanh(x.astype(F32).reshape(2, 2, 2)), ((8,), jnp.float8_e8m0fnu)))
    assert [v.what for v in bad] == [
        "StableHLO 1.8.0, above 1.0.0",
        "rank of 3, above 2",
        "operator stablehlo.tanh",
    ]
    assert [(v.kind, v.name, v.written, v.executed) for v in bad] == [
        ("version", None, None, None),
        ("rank", None, None, None),
        ("operator", "stablehlo.tanh", 1, 1),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title = ", "expected TOML"),
        ('note = "x"', "expected a title"),
        ('title = "x"\nsurprise = 1', "expected title, note, extends, takes and rules"),
        (f'title = "x"\n[[rule]]\nkind = "operator"\nforbid = ["stablehlo.sotr"]\n{RULE}', r"near: stablehlo.sort\)"),
        (f'title = "x"\n[[rule]]\nkind = "type"\nforbid = ["fp8*"]\n{RULE}', "the name of some type, found 'fp8"),
        (f'title = "x"\n[[rule]]\nkind = "feature"\nforbid = ["sort:stabel"]\n{RULE}', "near: sort:stable"),
        (f'title = "x"\n[[rule]]\nkind = "feature"\nrequire = ["dot_general:i8xi8->s32"]\n{RULE}', "of some feature"),
        (f'title = "x"\n[[rule]]\nkind = "type"\nallow = ["*"]\nexcept = ["f31"]\n{RULE}', "of some type, found 'f31"),
        (
            f'title = "x"\n[[rule]]\nkind = "type"\nforbid = ["f8*"]\n{RULE}switch_in = {{ gruped = "none" }}',
            "named operators",
        ),
        ('title = "x"\nextends = ["generic"]\ntakes = ["stablehlo.sort"]', "extends forbid, found 'stablehlo.sort'"),
        (f'title = "x"\n[[rule]]\nkind = "colour"\nforbid = ["a"]\n{RULE}', "rule 1: kind: expected one of operator"),
        (f'title = "x"\n[[rule]]\nkind = "type"\n{RULE}', "rule 1: expected one of forbid, allow and require"),
        (f'title = "x"\n[[rule]]\nkind = "type"\nforbid = "f8"\n{RULE}', "forbid: expected texts, found 'f8'"),
        (f'title = "x"\n[[rule]]\nkind = "version"\nmost = "1.x"\n{RULE}', "expected three numbers"),
        (f'title = "x"\n[[rule]]\nkind = "rank"\nmost = "2"\n{RULE}', "most: expected a number"),
        (f'title = "x"\n[[rule]]\nkind = "rank"\nmost = 2\nlevel = "bad"\n{RULE}', "level: expected one of refused"),
        (f'title = "x"\n[[rule]]\nkind = "rank"\nmost = 2\n{RULE}'.replace('"none"', '"--topk magic"'), "switch: exp"),
        (
            'title = "x"\n[[rule]]\nkind = "rank"\nmost = 2\nreason = "r"\nsource = "s"\nswitch = "none"',
            "date: expected",
        ),
        (f'title = "x"\n[[rule]]\nkind = "rank"\nmost = 2\ncolour = 1\n{RULE}', r"found \['colour'\]"),
        ('title = "x"\nextends = ["nobody"]', "expected one of generic, iree"),
    ],
)
def test_a_damaged_profile_is_told(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(write(tmp_path, text))


def test_an_unknown_or_circular_profile_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected one of generic, iree, .* or a \.toml file, found 'gpu'"):
        load("gpu")
    with pytest.raises(InputError, match="cannot be read: No such file"):
        load(str(tmp_path / "absent.toml"))
    own = str(tmp_path / "mine.toml")
    with pytest.raises(InputError, match="expected no circle"):
        load(write(tmp_path, f'title = "x"\nextends = ["{own}"]'))


def test_remedies_are_switches_of_export() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    for flag, values in SWITCHES.items():
        assert all(getattr(parser.parse_args([*REQUIRED, flag, value]), flag[2:]) == value for value in values)
    for name in names():
        for rule in load(name).rules:
            for switch in (rule.switch, *rule.switch_in.values()):
                flag, _, value = switch.partition(" ")
                assert switch == "none" or value in SWITCHES[flag]


def test_the_vocabulary_has_what_inventories_have(tmp_path: Path) -> None:
    f = found(lambda x: lax.top_k(jnp.sort(x.astype(jnp.float8_e5m2).astype(F32) @ x, stable=True), 2), ((4, 4), F32))
    for kind, names_ in {"operator": f["operators"], "type": f["types"], "feature": f["features"]}.items():
        assert [name for name in names_ if not known(kind, name)] == []


def test_a_bundle_is_checked_and_rules_are_listed_by_the_command(tmp_path: Path, capsys) -> None:
    sorted_ = found(lambda x: jnp.sort(x, stable=False), ((4,), F32))
    content = {"schema": 1, "modules": {"prefill": sorted_, "decode": sorted_}}
    (tmp_path / "inventory.json").write_text(json.dumps(content))
    assert main(["profile", "no-sort", str(tmp_path), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    entry = next(e for e in told["violations"] if e["name"] == "stablehlo.sort" and e["program"] == "decode")
    assert told["refused"] == 2 and (entry["kind"], entry["written"], entry["switch"]) == ("operator", 1, "--topk loop")
    assert entry["source"].startswith("tt-xla") and entry["date"] == "2026-11" and entry["where"] == ["sort"]
    assert main(["profile", "no-sort", str(tmp_path)]) == 1  # what programs share is told once
    assert capsys.readouterr().out.count("prefill, decode: refused: operator stablehlo.sort (1 written") == 1
    assert main(["profile", "tpu", str(tmp_path)]) == 0
    assert main(["profile"]) == 0 and main(["profile", "no-sort"]) == 0
    text = capsys.readouterr().out
    assert (
        "refused: forbid operator stablehlo.sort, chlo.top_k" in text
        and "in grouped_matmul --moe dense removes" in text
    )
    for damaged in ({"schema": 2}, {"schema": 1, "modules": {"x": {"operators": {}}}}, {"schema": 1}):
        (tmp_path / "inventory.json").write_text(json.dumps(damaged))
        assert main(["profile", "tpu", str(tmp_path)]) == 2


def test_all_programs_are_checked_before_a_profile_refuses(tmp_path: Path, capsys) -> None:
    flags = [*twin_flags("deepseek-r1-distill-qwen-1.5b"), "--length", "32", "--chunk", "8"]
    profile = write(tmp_path, f'title = "x"\n[[rule]]\nkind = "operator"\nforbid = ["stablehlo.rsqrt"]\n{RULE}')
    assert main(["export", *flags, "--profile", profile, "--json", "--out", str(tmp_path / "out")]) == 1
    told = json.loads(capsys.readouterr().out)
    assert [(e["program"], e["name"]) for e in told["violations"]] == [
        ("prefill-b1-s32", "stablehlo.rsqrt"),
        ("decode-b1-s32", "stablehlo.rsqrt"),
    ]
    assert not (tmp_path / "out").exists()
