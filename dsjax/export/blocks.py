"""Every named operator by itself: its function taken out of a program, and what it made of what it was given.

Where inputs can be varied, the same module stands once more, as `block-<operator>-<k>-edges`, with inputs of `edges`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxlib.mlir import ir

from dsjax.export import artifact, golden
from dsjax.export.edges import edge_inputs
from dsjax.export.inventory import operator_name
from dsjax.export.loops import callee
from dsjax.export.operations import numpy_dtype
from dsjax.export.program import Program
from dsjax.params import Tree
from quant.operator import tapping

MOST_BYTES = 64 << 20
"""Inputs of a block are kept in files up to this size."""


Function = Callable[..., list[jax.Array]]


@dataclasses.dataclass
class Call:
    """One call of an operator: what it was given and what it gave; the function that gives it, to be jitted."""

    operator: str
    layer: int | None
    inputs: list[np.ndarray]
    outputs: list[np.ndarray]
    function: Function | None = None


class Recorder:
    """Keeps every operator's first call of each signature."""

    def __init__(self) -> None:
        self.calls: dict[tuple[Any, ...], Call] = {}
        self._layer: int | None = None
        self._functions: dict[tuple[Any, ...], Function] = {}

    def traced(self, operator: str, function: Function, inputs: Sequence[Any]) -> None:
        """Keeps the first function of each signature."""
        self._functions.setdefault(signature(operator, [(a.shape, a.dtype) for a in inputs], []), function)

    def layer(self, number: int) -> None:
        """What follows is of this layer."""
        self._layer = number if number >= 0 else None

    def call(self, operator: str, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> None:
        """Keeps copies: the arrays are the runtime's."""
        key = signature(operator, [(a.shape, a.dtype) for a in inputs], [(a.shape, a.dtype) for a in outputs])
        if key not in self.calls:
            function = self._functions.get((*key[:2], ()))
            kept = [a.copy() for a in inputs], [a.copy() for a in outputs]
            self.calls[key] = Call(operator, self._layer, *kept, function)


def signature(operator: str, inputs: Sequence[Any], outputs: Sequence[Any]) -> tuple[Any, ...]:
    """What tells blocks apart: the operator, and shapes and types of what it takes and gives."""
    describe = lambda pairs: tuple((tuple(shape), np.dtype(dtype).name) for shape, dtype in pairs)  # noqa: E731
    return operator, describe(inputs), describe(outputs)


def functions(module: ir.Module) -> dict[str, Any]:
    """The module's functions by name."""
    return {str(op.operation.attributes["sym_name"]).strip('"'): op for op in module.body.operations}


def extract(module: ir.Module, name: str) -> ir.Module:
    """A module whose `main` is the function of that name, with the functions that it calls."""
    known = functions(module)
    wanted, waiting = {name}, [name]
    while waiting:
        for op in artifact.walk(known[waiting.pop()].operation):
            if op.operation.name == "func.call" and (called := callee(op)) not in wanted:
                wanted.add(called)
                waiting.append(called)
    copy = ir.Module.parse(str(module), module.context)
    with copy.context:
        for found, op in functions(copy).items():
            if found == name:
                op.operation.attributes["sym_name"] = ir.StringAttr.get("main")
                op.operation.attributes["sym_visibility"] = ir.StringAttr.get("public")
            elif found not in wanted:
                op.operation.erase()
    return copy


def _typed(type_: Any) -> tuple[tuple[int, ...], np.dtype]:
    tensor = ir.RankedTensorType(type_)
    return tuple(tensor.shape), numpy_dtype(tensor.element_type)


@dataclasses.dataclass(frozen=True)
class Block:
    """One operator by itself.

    Attributes:
      name: of its files.
      module: whose `main` it is.
      numbers: what it was given and gave, None where that is not known or too large.
      entry: of the manifest, but for where the goldens are.
    """

    name: str
    module: ir.Module
    numbers: golden.Golden | None
    entry: dict[str, Any]


def blocks(programs: Sequence[Program], params: Tree | None) -> Iterator[Block]:
    """Each operator of the programs once per signature, and some once more on edges of their inputs.

    Of sharded programs the operators of one device's program.

    Args:
      programs: in which operators are looked for.
      params: loaded, or None, which gives no numbers.
    """
    seen: dict[tuple[Any, ...], str] = {}
    counts: dict[str, int] = {}
    edged: set[tuple[Any, ...]] = set()
    for program in programs:
        alone = program.exporter.whole.program(program.shape)
        module = artifact.strip(alone.traced().compiler_ir("stablehlo"))
        calls = {} if params is None else _record(alone, params)
        for name, function in functions(module).items():
            operator = operator_name(name)
            if operator is None:
                continue
            type_ = ir.FunctionType(ir.TypeAttr(function.operation.attributes["function_type"]).value)
            inputs, outputs = [_typed(t) for t in type_.inputs], [_typed(t) for t in type_.results]
            key = signature(operator, inputs, outputs)
            if key in seen:
                continue
            number = counts.get(operator, 0)
            counts[operator] = number + 1
            seen[key] = label = f"block-{operator}-{number}"
            alone_module, call = extract(module, name), calls.get(key)
            yield _block(label, operator, alone_module, inputs, outputs, call, program)
            kind = operator, tuple(dtype.name for _, dtype in inputs)
            at_edges = None if call is None or kind in edged else _at_edges(call, program)
            if at_edges is not None:  # once for each kind of weights: shapes differ in nothing else
                edged.add(kind)
                yield _block(f"{label}-edges", operator, alone_module, inputs, outputs, at_edges, program)


def _record(program: Program, params: Tree) -> dict[tuple[Any, ...], Call]:
    recorder = Recorder()
    weights, inputs = golden.weights_of(program, params), golden.inputs_of(program, params)
    with program.exporter.chosen(), tapping(recorder):
        jax.block_until_ready(jax.jit(program.function, compiler_options=golden.options())(*weights, *inputs))
    jax.effects_barrier()
    return recorder.calls


def _at_edges(call: Call, program: Program) -> Call | None:
    """The same operator on inputs with edges in them, computed by the function that the model was traced with."""
    inputs = edge_inputs(call.operator, call.inputs)
    if inputs is None or call.function is None or sum(a.nbytes for a in inputs) > MOST_BYTES:
        return None
    with program.exporter.chosen():
        outputs = jax.jit(call.function, compiler_options=golden.options())(*inputs)
    return Call(call.operator, call.layer, inputs, [np.asarray(a) for a in outputs])


def _block(
    label: str,
    operator: str,
    module: ir.Module,
    inputs: list[Any],
    outputs: list[Any],
    call: Call | None,
    program: Program,
) -> Block:
    numbers = None
    if call is not None and sum(a.nbytes for a in call.inputs + call.outputs) <= MOST_BYTES:
        sides = (("in", call.inputs), ("out", call.outputs))
        given, gave = ({f"{name}{i}": a for i, a in enumerate(arrays)} for name, arrays in sides)
        numbers = golden.Golden(given, gave)

    def values(pairs: list[Any], kind: str, name: str) -> list[dict[str, Any]]:
        return [
            {
                "index": i,
                "kind": kind,
                "name": f"{name}{i}",
                "shape": list(shape),
                "dtype": dtype.name,
                "global_shape": list(shape),
                "slice": None,
            }
            for i, (shape, dtype) in enumerate(pairs)
        ]

    shape = program.shape
    entry = {
        "name": label,
        "kind": "block",
        "phase": shape.phase,
        "batch": shape.batch,
        "tokens": shape.tokens,
        "length": shape.length,
        "rank": None,
        "function": "main",
        "operator": operator,
        "arguments": values(inputs, "input", "in"),
        "results": [{**v, "alias": None} for v in values(outputs, "output", "out")],
    }
    return Block(label, module, numbers, entry)
