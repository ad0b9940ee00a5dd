"""What modules say of themselves, read in a process of its own: a damaged file may crash whoever parses it."""

from __future__ import annotations

import dataclasses
import graphlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxlib.mlir import ir

from dsjax.export.consumers.base import Arrays, Refused, main_function, new_context, parse
from dsjax.export.consumers.estimate import Estimate, estimate_module
from dsjax.export.consumers.worker import isolated
from dsjax.export.stablehlo.artifact import element_types, walk
from dsjax.export.stablehlo.loops import callee, functions
from dsjax.export.stablehlo.operations import numpy_dtype

_TASK = "dsjax.export.consumers.examine:examine"


@dataclasses.dataclass(frozen=True)
class Facts:
    """Of one module.

    Attributes:
      arguments, results: types, as "float32 [2, 3]".
      aliases: by result, the argument whose memory it takes.
      estimate: of the interpreter's time; None if nobody asked.
      inside: element types of all values, by NumPy's names.
      refused: why nobody should be given the module; then there is nothing else.
    """

    arguments: tuple[str, ...] = ()
    results: tuple[str, ...] = ()
    aliases: Mapping[int, int] = dataclasses.field(default_factory=dict)
    estimate: Estimate | None = None
    inside: tuple[str, ...] = ()
    refused: str | None = None


def facts_of(programs: Sequence[Sequence[bytes]], *, estimate: bool, time_limit: float = 600.0) -> list[list[Facts]]:
    """The facts of each module of each program.

    Args:
      programs: the modules of each.
      estimate: whether to estimate the interpreter's time.
    """
    modules = [module for program in programs for module in program]
    try:
        answer = isolated(_TASK, modules, options={"estimate": estimate}, time_limit=time_limit)[1]["modules"]
    except Refused as e:
        if len(programs) > 1:  # one of them ended the process: which?
            return [facts_of([p], estimate=estimate, time_limit=time_limit)[0] for p in programs]
        return [[Facts(refused=str(e))] * len(modules)]
    each = iter(map(_facts, answer))
    return [[next(each) for _ in program] for program in programs]


def _facts(found: dict[str, Any]) -> Facts:
    if "refused" in found:
        return Facts(refused=found["refused"])
    aliases = {int(result): argument for result, argument in found["aliases"].items()}
    estimated = None if found["estimate"] is None else Estimate(*found["estimate"])
    return Facts(tuple(found["arguments"]), tuple(found["results"]), aliases, estimated, tuple(found["inside"]))


def examine(modules: list[bytes], _: list[Arrays], options: dict[str, Any]) -> tuple[list[Arrays], dict[str, Any]]:
    """A `Task`: see `facts_of`."""
    return [], {"modules": [_examined(module, options["estimate"]) for module in modules]}


def _examined(code: bytes, estimate: bool) -> dict[str, Any]:
    try:
        module = parse(code, new_context())
        _refuse_recursion(module)
        main = main_function(module)
        inputs, outputs = (list(map(_type, types)) for types in (main.type.inputs, main.type.results))
        aliases = _aliases(main, inputs, outputs)
        found = estimate_module(module) if estimate else None
        inside = sorted(map(_element, element_types(module)))
    except Refused as e:
        return {"refused": str(e)}
    except Exception as e:  # whatever MLIR and its bindings raise of a file that is not as others are
        return {"refused": f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"}
    estimated = None if found is None else dataclasses.astuple(found)
    return {"arguments": inputs, "results": outputs, "aliases": aliases, "estimate": estimated, "inside": inside}


def _type(kind: Any) -> str:
    if not isinstance(kind, ir.RankedTensorType):
        return str(kind)
    try:
        return f"{numpy_dtype(kind.element_type).name} {list(kind.shape)}"
    except TypeError:
        return str(kind)


def _element(name: str) -> str:
    """NumPy's name of MLIR's element type; that itself of one that NumPy has not."""
    try:
        return numpy_dtype(name).name
    except TypeError:
        return name


def _refuse_recursion(module: ir.Module) -> None:
    """A function that calls itself: StableHLO has none, and those who follow calls would not end."""
    calls = {name: list(map(callee, walk(f.operation))) for name, f in functions(module).items()}
    try:
        graphlib.TopologicalSorter({name: [c for c in found if c] for name, found in calls.items()}).prepare()
    except graphlib.CycleError as e:
        raise Refused(f"the function {e.args[1][0]} calls itself") from None


def _aliases(main: Any, inputs: Sequence[str], outputs: Sequence[str]) -> dict[int, int]:
    """Which argument's memory each result takes."""
    found: dict[int, int] = {}
    each: Any = main.attributes.get("arg_attrs", [])
    for i, attributes in enumerate(each):
        if "tf.aliasing_output" not in attributes:
            continue
        result = ir.IntegerAttr(attributes["tf.aliasing_output"]).value
        if not 0 <= result < len(outputs) or outputs[result] != inputs[i] or result in found:
            raise Refused(f"argument {i}: tf.aliasing_output: expected a result of its type, each once, found {result}")
        found[result] = i
    return found
