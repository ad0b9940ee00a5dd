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

from dsjax.checkpoint.safetensors_writer import write_file
from dsjax.errors import InputError
from dsjax.export.consumers import consumer
from dsjax.export.consumers.base import Arrays, Consumer, Misread, Ran, Refused, without_misreads
from dsjax.export.consumers.estimate import Estimate
from dsjax.export.consumers.examine import Facts, facts_of
from dsjax.export.consumers.jax import Jax
from dsjax.export.consumers.tpu_aot import TpuAot
from dsjax.export.reading.arrays import NoWeights, arguments, compare_checkpoint
from dsjax.export.reading.reader import Bundle, Module, Program, Value, open_bundle
from dsjax.export.standalone.arrays import BadInput
from dsjax.export.standalone.verify import VERDICTS, Found, Golden, compare, find, passes, read_golden
from dsjax.files import check_new_folder, new_folder

NEGATIVE = ("departed", "refused", "too slow")
"""States of a program that make the whole verdict negative."""

LEAST = 60.0
"""Seconds that reading modules may take in any case: --time-limit is for running them."""


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
      checkpoint: where weights lie that the bundle refers to; their hashes are compared first, goldens or not.
      modules: shell patterns of names, between commas; None for all.
      bound: of relative errors; gate: "strict" judges by the goldens' own strict bounds, too, "bound" by this one only.
      out: new folder for what consumers gave, as `dsjax align` and verify.py read it; in a folder for each consumer if
        there are several. Of ranks each one's results are there, and the whole ones that they make.
      time_limit: seconds that a module may take; one that the interpreter would take longer for is not started.
      say: called with what a person waits for.

    Returns:
      passed: whether no module has a problem, every program was run or compiled by one consumer at least, and none
      departed, refused a program or was too slow for it;
      problems: what is wrong with the modules' own text; programs: {program: {consumer: report}}. A report has `state`:
      "agreed", "told" (what is judged agrees, and there are results that tolerance.json gives no bound), "departed",
      "excepted" (it departed, for a documented reason, and not without that), "accepted" (compiled, with nothing to
      compare), "refused", "too slow", "not run"; and `why`, `seconds`, `how` ranks ran together, `note`, the verdicts
      `within_bound` and `within_strict`, `problems`, `notes`, `results` (the errors of each) or `memory`, where there
      are any.

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
    if checkpoint is not None:
        compared, count = compare_checkpoint(bundle, programs, checkpoint)
        say(f"{checkpoint}: {compared} of {count} parameters compared with the bundle's hashes")
    codes = [[bundle.module_bytes(m) for m in program.modules] for program in programs]
    asked = any(one.name == "interpreter" for one in chosen)
    facts = facts_of(codes, estimate=asked, time_limit=max(time_limit, LEAST))
    read = {p.name: found for p, found in zip(programs, facts, strict=True)}
    problems = [
        q for p in programs for m, f in zip(p.modules, read[p.name], strict=True) for q in module_problems(m, f)
    ]
    check = _Check(bundle, checkpoint, bound, gate, time_limit, say)
    results: dict[str, dict[str, dict[str, Any]]] = {p.name: {} for p in programs}
    with tempfile.TemporaryDirectory(prefix="dsjax-verify-") as scratch:
        for i, one in enumerate(chosen):
            for program in programs:
                results[program.name][one.name] = check.judge(
                    program, read[program.name], one, Path(scratch) / str(i) / program.name
                )
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


def module_problems(module: Module, facts: Facts) -> list[str]:
    """What in a module's file is not as the manifest says: types of arguments and results, aliases.

    A cache has to be updated in place, so each of its results names the argument whose memory it takes, there and here.
    """
    found = [
        f"{module.name}: {v.name}: expected a cache's result to take an argument's memory, found no alias"
        for v in module.results
        if v.kind == "cache" and v.alias is None
    ]
    if facts.refused is not None:
        return [*found, f"{module.name}: {facts.refused}"]
    found += _type_problems(module, "arguments", module.arguments, facts.arguments)
    found += _type_problems(module, "results", module.results, facts.results)
    for value in module.results:
        if value.alias is not None and facts.aliases.get(value.index) != value.alias:
            where = facts.aliases.get(value.index)
            shown = "none" if where is None else f"argument {where}"
            found.append(
                f"{module.name}: {value.name}: expected tf.aliasing_output on argument {value.alias}, found {shown}"
            )
    return found


def _type_problems(module: Module, what: str, values: Sequence[Value], types: Sequence[str]) -> list[str]:
    """Where types of the program are not those of the manifest."""
    if len(values) != len(types):
        return [f"{module.name}: expected {len(values)} {what}, found {len(types)}"]
    pairs = [(v.name, f"{v.dtype.name} {list(v.shape)}", found) for v, found in zip(values, types, strict=True)]
    return [f"{module.name}: {name}: expected {a}, found {b}" for name, a, b in pairs if a != b]


@dataclasses.dataclass(frozen=True)
class _Check:
    """What every program is checked with; see `verify`."""

    bundle: Bundle
    checkpoint: Path | None
    bound: float
    gate: str
    time_limit: float
    say: Callable[[str], None]

    def judge(self, program: Program, facts: Sequence[Facts], one: Consumer, folder: Path) -> dict[str, Any]:
        """The report of one program by one consumer, whose results are left in a folder."""
        start = time.perf_counter()
        try:
            for module, read in zip(program.modules, facts, strict=True):  # nobody is given another program
                problems = _type_problems(module, "arguments", module.arguments, read.arguments)
                if read.refused or problems:
                    raise Refused(read.refused or problems[0])
            modules = [self.bundle.module_bytes(m) for m in program.modules]
            runs = isinstance(one, Jax) if self.bundle.partitioned(program) else one.executes
            if not runs or program.golden is None:
                return _compile(self.bundle, program, one, modules)
            given = arguments(self.bundle, program, self.checkpoint)
            if one.name == "interpreter":
                estimates = [f.estimate for f in facts if f.estimate is not None]
                total = Estimate(sum(e.seconds for e in estimates), all(e.exact for e in estimates))
                self.say(f"{program.name}: the interpreter will take {total}")
                if total.seconds > self.time_limit:
                    return {"state": "too slow", "why": f"{total}, beyond --time-limit {self.time_limit:g} s"}
            golden = self._golden(program)
            start = time.perf_counter()
            if self.bundle.partitioned(program) and isinstance(one, Jax):
                ran = one.run_partitioned(modules[0], given[0], self.bundle.ranks)
            else:
                ran = _run(one, modules, given)
            seconds = time.perf_counter() - start
            found = _found(program, golden, ran, folder)
        except NoWeights as e:
            return {"state": "not run", "why": str(e)}
        except Refused as e:
            return {"state": e.state, "why": str(e), "seconds": time.perf_counter() - start}
        _keep_whole(found, folder / golden.name)
        compared = compare(golden, found)
        report = {key: compared[key] for key in (*VERDICTS, "results", "problems", "notes")} | {"seconds": seconds}
        told = any(row["within_bound"] is None for row in report["results"])
        report["state"] = ("told" if told else "agreed") if passes(report, self.gate) else "departed"
        if ran.how:
            report["how"] = ran.how
        inside = facts[0].inside if report["state"] == "departed" else ()
        met, others = without_misreads(one.misreads, given, inside)
        if met:
            report["note"] = (
                f"documented: it reads {' and '.join(f'{m.dtype} {m.code:#04x} as {m.found}' for m in met)}"
            )
            if report["state"] == "departed":
                fault = self._fault(program, golden, one, modules, given, others)
                report["state"] = "departed" if fault else "excepted"
                report["why"] = f"not by that alone: {fault}" if fault else f"by that alone: {_by_that(met)}"
        return report

    def _golden(self, program: Program) -> Golden:
        names = {m.name for m in program.modules}
        entries = [entry for entry in self.bundle.manifest["modules"] if entry["name"] in names]
        try:
            return read_golden(self.bundle.folder, f"golden/{program.golden}", entries, self.bound)
        except BadInput as e:
            raise InputError(str(e)) from None

    def _fault(
        self,
        program: Program,
        golden: Golden,
        one: Consumer,
        modules: list[bytes],
        given: list[Arrays],
        others: list[Arrays],
    ) -> str:
        """What departs that known misreading of codes does not explain, or nothing.

        XLA, which reads them rightly, has to agree with the golden, and with the consumer on arguments without them.
        """
        try:
            with tempfile.TemporaryDirectory(prefix="dsjax-verify-") as name:
                xla = Jax(self.time_limit)
                right = _found(program, golden, _run(xla, modules, given), Path(name) / "right")
                if not passes(compare(golden, right), self.gate):
                    return "XLA departs from the golden, too"
                without = _found(program, golden, _run(xla, modules, others), Path(name) / "without")
                found = _found(program, golden, _run(one, modules, others), Path(name) / "found")
                if not passes(compare(golden._replace(expected=without.results), found), self.gate):
                    return "without such codes it departs from XLA, too"
        except Refused as e:
            return f"with other codes: {e}"
        return ""


def _by_that(met: Sequence[Misread]) -> str:
    codes = ", ".join(f"{m.harmless:#04x} for {m.code:#04x}" for m in met)
    return f"with {codes} it agrees with XLA, which agrees with the golden"


def _run(one: Consumer, modules: list[bytes], given: list[Arrays]) -> Ran:
    return Ran([one.run(modules[0], given[0])]) if len(modules) == 1 else one.run_ranks(modules, given)


def _compile(bundle: Bundle, program: Program, one: Consumer, modules: list[bytes]) -> dict[str, Any]:
    """The report of a program that is only compiled."""
    start = time.perf_counter()
    if bundle.partitioned(program):
        if not isinstance(one, TpuAot):
            return {"state": "not run", "why": f"a global program, for a compiler that splits it over {bundle.ranks}"}
        facts = one.compile(modules, bundle.ranks)
    else:
        facts = one.compile(modules)
    report = {"state": "accepted", "seconds": time.perf_counter() - start}
    if program.golden is None and one.executes:
        report["why"] = "compiled; the bundle has no golden of it"
    return {**report, **({"memory": facts} if facts else {})}


def _found(program: Program, golden: Golden, ran: Ran, folder: Path) -> Found:
    """What a program gave, through files, as the check that the bundle carries reads others' results."""
    for module, arrays in zip(program.modules, ran.results, strict=True):
        if len(arrays) != len(module.results):
            raise Refused(f"expected {len(module.results)} results of {module.name}, found {len(arrays)}")
        where = folder / golden.name / ("" if module.rank is None else f"rank{module.rank}")
        where.mkdir(parents=True)
        named = {v.name: np.asarray(array) for v, array in zip(module.results, arrays, strict=True)}
        write_file(where / "outputs.safetensors", named)
    try:
        return find(folder / golden.name, golden)
    except BadInput as e:
        raise InputError(str(e)) from None


def _keep_whole(found: Found, folder: Path) -> None:
    """Beside the results of ranks the whole ones, which `dsjax align` compares."""
    if found.results and not (folder / "outputs.safetensors").exists():
        write_file(folder / "outputs.safetensors", {name: stored.raw for name, stored in found.results.items()})
