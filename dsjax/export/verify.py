"""A bundle's files, run by independent consumers and compared with its goldens."""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxlib.mlir import ir

from dsjax.checkpoint.safetensors_writer import write_file
from dsjax.errors import InputError
from dsjax.export.bundle_arrays import NoWeights, arguments
from dsjax.export.bundle_reader import Bundle, Module, Program, open_bundle
from dsjax.export.consumers import consumer
from dsjax.export.consumers.base import Consumer, Ran, Refused, main_function, new_context, parse
from dsjax.export.consumers.estimate import Estimate, estimate_seconds
from dsjax.export.consumers.tpu_aot import TpuAot
from dsjax.export.standalone.arrays import BadInput
from dsjax.export.standalone.verify import compare_golden, passes
from dsjax.files import check_new_folder, new_folder

NEGATIVE = ("departed", "refused", "too slow")
"""States of a program that make the whole verdict negative."""


def verify(
    folder: Path,
    consumers: Sequence[str] = ("interpreter",),
    *,
    checkpoint: Path | None = None,
    modules: str | None = None,
    bound: float = 0.05,
    gate: str = "strict",
    out: Path | None = None,
    time_limit: float = 600.0,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> dict[str, Any]:
    """Runs a bundle's modules and compares what they give.

    Args:
      folder: the bundle.
      consumers: names as `dsjax.export.consumers.consumer` takes them.
      checkpoint: where weights lie that the bundle refers to.
      modules: shell patterns of names, between commas; None for all.
      bound: of relative errors; gate: "strict" judges by the goldens' own strict bounds, too, "bound" by this one only.
      out: new folder for what consumers gave, as `dsjax align` and verify.py read it; in a folder for each consumer if
        there are several.
      time_limit: seconds that a module may take; one that the interpreter would take longer for is not started.
      say: called with what a person waits for.

    Returns:
      passed: whether no module has a problem, every program was run or compiled by one consumer at least, and none
      departed, refused a program or was too slow for it;
      problems: what is wrong with the modules' own text; programs: {program: {consumer: report}}. A report has `state`:
      "agreed", "departed", "excepted" (it departed, for a documented reason), "accepted" (compiled, with nothing to
      compare), "refused", "too slow", "not run"; and `why`, `seconds`, `how` ranks ran together, `note`, the verdicts
      `within_bound` and `within_strict`, `problems`, `results` (the errors of each) or `memory`, where there are any.

    Raises:
      InputError: of a damaged bundle, or a consumer that is not installed.
    """
    chosen = [consumer(name, time_limit) for name in dict.fromkeys(consumers)]
    for one in chosen:
        missing = one.available()
        if missing:
            raise InputError(f"--with {one.name}: {missing}")
    if out is not None:
        check_new_folder(out)
    bundle = open_bundle(folder)
    programs = bundle.select(modules)
    problems = [p for program in programs for module in program.modules for p in module_problems(bundle, module)]
    check = _Check(bundle, checkpoint, bound, gate, time_limit, say)
    results: dict[str, dict[str, dict[str, Any]]] = {p.name: {} for p in programs}
    with tempfile.TemporaryDirectory(prefix="dsjax-verify-") as scratch:
        for i, one in enumerate(chosen):
            for program in programs:
                results[program.name][one.name] = check.judge(program, one, Path(scratch) / str(i) / program.name)
        if out is not None:
            _publish(Path(scratch), out, [one.name for one in chosen])
    states = [[r["state"] for r in by_consumer.values()] for by_consumer in results.values()]
    unproven = any(set(found) <= {"not run"} or set(found) & set(NEGATIVE) for found in states)
    passed = not problems and not unproven
    report = {"bundle": str(folder), "passed": passed, "bound": bound, "gate": gate, "problems": problems}
    return {**report, "programs": results}


def _publish(scratch: Path, out: Path, names: Sequence[str]) -> None:
    """What consumers gave, as a candidate folder, or as one of each."""
    with new_folder(out) as folder:
        for i, name in enumerate(names):
            where = folder / re.sub(r"[^\w.-]+", "_", name) if len(names) > 1 else folder
            for given in sorted((scratch / str(i)).glob("*")):
                shutil.copytree(given, where, dirs_exist_ok=True)


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
    found += _type_problems(module, "arguments", main) + _type_problems(module, "results", main)
    aliases = _aliases(main)
    for value in module.results:
        if value.alias is not None and aliases.get(value.index) != value.alias:
            where = aliases.get(value.index)
            shown = "none" if where is None else f"argument {where}"
            found.append(
                f"{module.name}: {value.name}: expected tf.aliasing_output on argument {value.alias}, found {shown}"
            )
    return found


def _type_problems(module: Module, what: str, main: Any) -> list[str]:
    """Where types of the program's "arguments" or "results" are not those of the manifest."""
    values = module.arguments if what == "arguments" else module.results
    kinds = list(main.type.inputs if what == "arguments" else main.type.results)
    if len(values) != len(kinds):
        return [f"{module.name}: expected {len(values)} {what}, found {len(kinds)}"]
    pairs = [(v.name, type_text(v.shape, v.dtype), str(kind)) for v, kind in zip(values, kinds, strict=True)]
    return [f"{module.name}: {name}: expected {a}, found {b}" for name, a, b in pairs if a != b]


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


def _aliases(main: Any) -> dict[int, int]:
    """Which argument's memory each result takes."""
    found = {}
    each: Any = main.attributes.get("arg_attrs", [])
    for i, attributes in enumerate(each):
        if "tf.aliasing_output" in attributes:
            found[ir.IntegerAttr(attributes["tf.aliasing_output"]).value] = i
    return found


@dataclasses.dataclass(frozen=True)
class _Check:
    """What every program is checked with; see `verify`."""

    bundle: Bundle
    checkpoint: Path | None
    bound: float
    gate: str
    time_limit: float
    say: Callable[[str], None]

    def _refuse_other_arguments(self, program: Program, modules: Sequence[bytes]) -> None:
        """Raises Refused for a program that does not take what the manifest says, before anybody is given it."""
        for module, code in zip(program.modules, modules, strict=True):
            parsed = parse(code, new_context())
            for problem in _type_problems(module, "arguments", main_function(parsed)):
                raise Refused(problem)

    def judge(self, program: Program, one: Consumer, folder: Path) -> dict[str, Any]:
        """The report of one program by one consumer, whose results are left in a folder."""
        modules = [self.bundle.module_bytes(m) for m in program.modules]
        start = time.perf_counter()
        try:
            self._refuse_other_arguments(program, modules)
            if not one.executes or program.golden is None or self.bundle.partitioned:
                return _compile(self.bundle, program, one, modules)
            given = arguments(self.bundle, program, self.checkpoint)
            if one.name == "interpreter":
                estimates = [estimate_seconds(m) for m in modules]
                total = Estimate(sum(e.seconds for e in estimates), all(e.exact for e in estimates))
                self.say(f"{program.name}: the interpreter will take {total}")
                if total.seconds > self.time_limit:
                    return {"state": "too slow", "why": f"{total}, beyond --time-limit {self.time_limit:g} s"}
            start = time.perf_counter()
            if program.modules[0].rank is None:
                ran = Ran([one.run(modules[0], given[0])])
            else:
                ran = one.run_ranks(modules, given)
            seconds = time.perf_counter() - start
            report = _compare(self.bundle, program, ran.results, self.bound, folder)
        except NoWeights as e:
            return {"state": "not run", "why": str(e)}
        except Refused as e:
            return {"state": e.state, "why": str(e), "seconds": time.perf_counter() - start}
        report |= {"state": "agreed" if passes(report, self.gate) else "departed", "seconds": seconds}
        if ran.how:
            report["how"] = ran.how
        exception = one.exception(given)
        if exception:
            report["note"] = f"documented: it {exception}"
            if report["state"] == "departed":
                report["state"] = "excepted"
        return report


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
    bundle: Bundle, program: Program, ran: Sequence[Sequence[np.ndarray]], bound: float, folder: Path
) -> dict[str, Any]:
    """The report of what a program gave, by the very check that the bundle carries for others' results."""
    for module, arrays in zip(program.modules, ran, strict=True):
        if len(arrays) != len(module.results):
            raise Refused(f"expected {len(module.results)} results of {module.name}, found {len(arrays)}")
        where = folder / str(program.golden) / ("" if module.rank is None else f"rank{module.rank}")
        where.mkdir(parents=True)
        named = {v.name: np.asarray(array) for v, array in zip(module.results, arrays, strict=True)}
        write_file(where / "outputs.safetensors", named)
    names = {m.name for m in program.modules}
    entries = [entry for entry in bundle.manifest["modules"] if entry["name"] in names]
    try:
        found = compare_golden(bundle.folder, folder, f"golden/{program.golden}", entries, bound)
    except BadInput as e:
        raise InputError(str(e)) from None
    within = {
        verdict: not found["problems"] and all(row[verdict] is not False for row in found["results"])
        for verdict in ("within_bound", "within_strict")
    }
    return {**within, "results": found["results"], "problems": found["problems"]}
