"""A bundle's files, run by independent consumers and compared with its goldens."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxlib.mlir import ir

from dsjax.checkpoint.safetensors_writer import Spec, write_file
from dsjax.errors import InputError
from dsjax.export.bundle_arrays import STRICT, NoWeights, arguments, golden_results, whole_results
from dsjax.export.bundle_reader import Bundle, Module, Program, open_bundle
from dsjax.export.consumers import consumer
from dsjax.export.consumers.base import Consumer, Refused, main_function, new_context, parse
from dsjax.export.consumers.estimate import Estimate, estimate_seconds
from dsjax.export.consumers.tpu_aot import TpuAot
from dsjax.export.errors import errors, is_float
from dsjax.files import new_folder

BOUND = 0.05
NEGATIVE = ("departed", "refused", "too slow")
"""States of a program that make the whole verdict negative."""


def verify(
    folder: Path,
    consumers: Sequence[str] = ("interpreter",),
    *,
    checkpoint: Path | None = None,
    modules: str | None = None,
    bound: float | None = None,
    out: Path | None = None,
    time_limit: float = 600.0,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> dict[str, Any]:
    """Runs a bundle's modules and compares what they give.

    Args:
      folder: the bundle.
      consumers: names as `dsjax.export.consumers.consumer` takes them.
      checkpoint: where weights lie that the bundle refers to.
      modules: shell pattern of names; None for all.
      bound: of relative errors, in place of the goldens' own strict bounds; of these is told anyway.
      out: new folder for what consumers gave, as `dsjax align` and verify.py read it; in a folder for each consumer if
        there are several.
      time_limit: seconds that a module may take; one that the interpreter would take longer for is not started.
      say: called with what a person waits for.

    Returns:
      passed: whether no module has a problem and no consumer departed, refused a module or was too slow for it;
      problems: what is wrong with the files themselves; programs: {name: {consumer: {state, why, seconds, how, note,
      errors of each result, strict, within_bound, memory}}}. States: "agreed", "departed", "accepted" (compiled; there
      is nothing to compare with), "refused", "too slow", "not run".

    Raises:
      InputError: of a damaged bundle, or a consumer that is not installed.
    """
    chosen = [consumer(name, time_limit) for name in dict.fromkeys(consumers)]
    for one in chosen:
        missing = one.available()
        if missing:
            raise InputError(f"--with {one.name}: {missing}")
    bundle = open_bundle(folder)
    programs = bundle.select(modules)
    problems = [p for program in programs for module in program.modules for p in module_problems(bundle, module)]
    for problem in problems:
        say(problem)
    results: dict[str, dict[str, dict[str, Any]]] = {p.name: {} for p in programs}
    given: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for one in chosen:
        for program in programs:
            report, arrays = _judge(bundle, program, one, checkpoint, bound, time_limit, say)
            results[program.name][one.name] = report
            if arrays and program.golden is not None:
                given.setdefault((one.name, program.golden), arrays)
    if out is not None:
        _write(out, given, len(chosen) > 1)
    states = [r["state"] for by_consumer in results.values() for r in by_consumer.values()]
    passed = not problems and not any(state in NEGATIVE for state in states)
    shown = BOUND if bound is None else bound
    return {"bundle": str(folder), "passed": passed, "bound": shown, "problems": problems, "programs": results}


def module_problems(bundle: Bundle, module: Module) -> list[str]:
    """What in a module's file is not as the manifest says: types of arguments and results, aliases.

    A cache has to be updated in place, so each of its results names the argument whose memory it takes, there and here.
    """
    found = [
        f"{module.name}: {v.name}: expected a cache's result to take an argument's memory, found no alias"
        for v in module.results
        if v.kind == "cache" and v.alias is None
    ]
    try:
        parsed = parse(bundle.module_bytes(module), new_context())
        main = main_function(parsed)
    except Refused as e:
        return [*found, f"{module.name}: {e}"]
    for what, values, kinds in (
        ("arguments", module.arguments, list(main.type.inputs)),
        ("results", module.results, list(main.type.results)),
    ):
        if len(values) != len(kinds):
            found.append(f"{module.name}: expected {len(values)} {what}, found {len(kinds)}")
            continue
        for value, kind in zip(values, kinds, strict=True):
            expected = type_text(value.shape, value.dtype)
            if str(kind) != expected:
                found.append(f"{module.name}: {value.name}: expected {expected}, found {kind}")
    aliases = _aliases(main, len(module.arguments))
    for value in module.results:
        if value.alias is not None and aliases.get(value.index) != value.alias:
            where = aliases.get(value.index)
            shown = "none" if where is None else f"argument {where}"
            found.append(
                f"{module.name}: {value.name}: expected tf.aliasing_output on argument {value.alias}, found {shown}"
            )
    return found


_TYPES = {"float8_e4m3fn": "f8E4M3FN", "float8_e5m2": "f8E5M2", "float8_e8m0fnu": "f8E8M0FNU", "bool": "i1"}


def type_text(shape: tuple[int, ...], dtype: np.dtype) -> str:
    """A tensor's type as StableHLO writes it."""
    name = dtype.name
    if name in _TYPES:
        element = _TYPES[name]
    elif name == "float4_e2m1fn":
        element = "f4E2M1FN"
    else:
        element = re.sub(r"^bfloat", "bf", name) if name.startswith("bf") else re.sub(r"^float", "f", name)
        element = re.sub(r"^(u?)int", r"\1i", element)
    return f"tensor<{''.join(f'{n}x' for n in shape)}{element}>"


def _aliases(main: Any, count: int) -> dict[int, int]:
    """Which argument's memory each result takes."""
    found = {}
    for i in range(count if len(main.arguments) >= count else len(main.arguments)):
        attributes = ir.DictAttr(main.arg_attrs[i])
        if "tf.aliasing_output" in attributes:
            found[ir.IntegerAttr(attributes["tf.aliasing_output"]).value] = i
    return found


def _judge(
    bundle: Bundle,
    program: Program,
    one: Consumer,
    checkpoint: Path | None,
    bound: float | None,
    time_limit: float,
    say: Callable[[str], None],
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """One program by one consumer: the report, and what it gave."""
    modules = [bundle.module_bytes(m) for m in program.modules]
    start = time.perf_counter()
    try:
        if not one.executes or program.golden is None or bundle.partitioned:
            return _compile(bundle, program, one, modules), {}
        given = arguments(bundle, program, checkpoint)
        if one.name == "interpreter":
            estimates = [estimate_seconds(m) for m in modules]
            total = Estimate(sum(e.seconds for e in estimates), all(e.exact for e in estimates))
            say(f"{program.name}: {one.name}: {total}")
            if total.seconds > time_limit:
                return {"state": "too slow", "why": f"{total}, beyond --time-limit {time_limit:g} s"}, {}
        start = time.perf_counter()
        if len(modules) == 1 and program.modules[0].rank is None:
            ran, how = [one.run(modules[0], given[0])], ""
        else:
            together = one.run_ranks(modules, given)
            ran, how = together.results, together.how
    except NoWeights as e:
        return {"state": "not run", "why": str(e)}, {}
    except Refused as e:
        state = "too slow" if "--time-limit" in str(e) else "refused"
        return {"state": state, "why": str(e), "seconds": time.perf_counter() - start}, {}
    seconds = time.perf_counter() - start
    report, wholes = _compare(bundle, program, ran, bound)
    report |= {"seconds": seconds, **({"how": how} if how else {})}
    exception = one.exception(given)
    if exception:
        report["note"] = f"documented: {exception}"
        if report["state"] == "departed" and not report.get("why"):
            report["state"] = "excepted"
    return report, wholes


def _compile(bundle: Bundle, program: Program, one: Consumer, modules: list[bytes]) -> dict[str, Any]:
    """The report of a program that is only compiled."""
    start = time.perf_counter()
    if bundle.partitioned:
        if not isinstance(one, TpuAot):
            return {"state": "not run", "why": f"a global program, for a compiler that splits it over {bundle.ranks}"}
        facts = one.compile(modules, bundle.ranks)
    else:
        facts = one.compile(modules)
    report = {"state": "accepted", "seconds": time.perf_counter() - start}
    if program.golden is None and one.executes:
        report["why"] = "compiled; the bundle has no golden of it"
    return {**report, **({"memory": facts} if facts else {})}


def _compare(
    bundle: Bundle, program: Program, ran: Sequence[Sequence[np.ndarray]], bound: float | None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The report of what a program gave; and that, whole."""
    golden, bounds = golden_results(bundle, program)
    found, wrong = whole_results(program, ran)
    by_result: dict[str, dict[str, Any]] = {}
    for name in golden.keys() & found.keys():
        copies = [errors(golden[name], array) for array in found[name]]
        worst = {key: max(c[key] for c in copies) for key in copies[0]}
        strict = bounds.get(name, STRICT if is_float(golden[name].dtype) else 0.0)
        by_result[name] = {
            **worst,
            "strict_bound": strict,
            "strict": max(worst.values()) <= strict,
            "within_bound": max(worst.values()) <= (BOUND if bound is None else bound),
        }
    report: dict[str, Any] = {
        "strict": not wrong and all(r["strict"] for r in by_result.values()),
        "within_bound": not wrong and all(r["within_bound"] for r in by_result.values()),
        "results": {name: by_result[name] for name in golden if name in by_result},
    }
    agreed = report["strict"] if bound is None else report["within_bound"]
    report["state"] = "agreed" if agreed else "departed"
    if wrong:
        report["why"] = "; ".join(wrong)[:400]
    return report, {name: arrays[0] for name, arrays in found.items()}


def _write(out: Path, given: dict[tuple[str, str], dict[str, np.ndarray]], several: bool) -> None:
    """The candidate folder, whole or not at all."""
    with new_folder(out) as folder:
        for (name, golden), arrays in given.items():
            where = folder / re.sub(r"[^\w.-]+", "_", name) / golden if several else folder / golden
            where.mkdir(parents=True)
            specs = [Spec(key, array.dtype, array.shape) for key, array in arrays.items()]
            write_file(where / "outputs.safetensors", specs, iter(arrays.values()))
