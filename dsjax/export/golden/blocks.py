"""Every named operator by itself: the function that a program's call was traced as, and what that very call made of
what it was given.

Where inputs can be varied, the same module stands once more, as `block-<operator>-<k>-edges`, with inputs of `edges`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxlib.mlir import ir

from dsjax.export.golden import recorded
from dsjax.export.golden.edges import edge_inputs
from dsjax.export.program.exporter import PLATFORM, Program, Shape
from dsjax.export.stablehlo import artifact
from dsjax.params import Tree
from quant.operator import PREFIX, Tap, tapping

MOST_BYTES = 64 << 20
"""Numbers of a block are kept in files up to this size."""

Function = Callable[..., list[jax.Array]]
Specs = list[jax.ShapeDtypeStruct]
Numbers = tuple[list[np.ndarray], list[np.ndarray]]
"""What an operator was given, and what it gave."""


@dataclasses.dataclass
class Call:
    """A call of an operator as it was traced.

    Attributes:
      operator: its name.
      function: what it computes, of arrays like `inputs`.
      module: the same, stripped.
      inputs, outputs: shapes and types.
      shape: of the program that it was met in.
      numbers: of its first run; None where it did not run, or they are too large.
      ran: whether it did.
    """

    operator: str
    function: Function
    module: ir.Module
    inputs: Specs
    outputs: Specs
    shape: Shape
    numbers: Numbers | None = None
    ran: bool = False

    def keep(self, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> None:
        """Takes a run: copies, as the arrays are the runtime's."""
        if not self.ran and sum(a.nbytes for a in (*inputs, *outputs)) <= MOST_BYTES:
            self.numbers = [a.copy() for a in inputs], [a.copy() for a in outputs]
        self.ran = True


class Recorder:
    """Keeps the first call of each operator and body: two that take and give the same may still compute otherwise."""

    def __init__(self) -> None:
        self.calls: dict[tuple[str, str], Call] = {}
        self.shape = Shape("", 0, 0, 0)

    def layer(self, number: int) -> None:
        """Blocks are of no layer in particular."""

    def traced(self, operator: str, function: Function, inputs: Sequence[Any]) -> Tap:
        """Lowers a call by itself."""
        given = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in inputs]

        def alone(*arrays: jax.Array) -> list[jax.Array]:
            return function(*arrays)

        alone.__name__ = alone.__qualname__ = PREFIX + operator
        lowered = jax.jit(alone, keep_unused=True).trace(*given).lower(lowering_platforms=(PLATFORM,))
        module = artifact.strip(lowered.compiler_ir("stablehlo"))
        key = operator, artifact.text(module)
        if key not in self.calls:
            gave = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in lowered.out_info]
            self.calls[key] = Call(operator, function, artifact.as_read(module), given, gave, self.shape)
        return self.calls[key].keep

    def run(self, program: Program, params: Tree | None) -> None:
        """Traces a program of one device, and runs it on what goldens are made of if there are parameters.

        Where that leaves a call out, as of V3.2's attention to chosen keys while there are few, it runs once more at
        the sequences' other end.
        """
        self.shape, step = program.shape, jax.jit(program.function, compiler_options=recorded.options())
        if params is None:
            with program.exporter.chosen(), tapping(self):
                step.trace(*(v.spec for v in program.arguments))
            return
        weights = recorded.weights_of(program, params)
        for other_end in (False, True):
            inputs = recorded.inputs_of(program, params, other_end)
            with program.exporter.chosen(), tapping(self):
                jax.block_until_ready(step(*weights, *inputs))
            jax.effects_barrier()
            if all(call.ran for call in self.calls.values()):
                break


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
    numbers: recorded.Golden | None
    entry: dict[str, Any]


def blocks(programs: Sequence[Program], params: Tree | None) -> Iterator[Block]:
    """Each operator of the programs once for each body, and some once more on edges of their inputs.

    Of sharded programs the operators of one device's program.

    Args:
      programs: in which operators are looked for.
      params: loaded, or None, which gives no numbers.
    """
    recorder = Recorder()
    for program in programs:
        recorder.run(program.exporter.whole.program(program.shape), params)
    counts: dict[str, int] = {}
    edged: set[tuple[Any, ...]] = set()
    for call in recorder.calls.values():
        number = counts[call.operator] = counts.get(call.operator, -1) + 1
        label = f"block-{call.operator}-{number}"
        yield _block(label, call, call.numbers)
        kind = call.operator, tuple(spec.dtype for spec in call.inputs)
        if kind not in edged and (numbers := at_edges(call)) is not None:
            edged.add(kind)  # once for each kind of weights: shapes differ in nothing else
            yield _block(f"{label}-edges", call, numbers)


def at_edges(call: Call) -> Numbers | None:
    """The call on inputs with edges in them, and what its function gives; None where there are none."""
    inputs = None if call.numbers is None else edge_inputs(call.operator, call.numbers[0])
    if inputs is None or sum(a.nbytes for a in inputs) > MOST_BYTES:
        return None
    outputs = jax.jit(call.function, compiler_options=recorded.options())(*inputs)
    return inputs, [np.asarray(a) for a in outputs]


def _block(label: str, call: Call, numbers: Numbers | None) -> Block:
    sides = ("in", "out")
    arrays = None
    if numbers is not None:
        named = ({f"{side}{i}": a for i, a in enumerate(found)} for side, found in zip(sides, numbers, strict=True))
        arrays = recorded.Golden(*named)

    def values(specs: Specs, kind: str, side: str) -> list[dict[str, Any]]:
        return [
            {
                "index": i,
                "kind": kind,
                "name": f"{side}{i}",
                "shape": list(spec.shape),
                "dtype": np.dtype(spec.dtype).name,
                "global_shape": list(spec.shape),
                "slice": None,
            }
            for i, spec in enumerate(specs)
        ]

    entry = {
        "name": label,
        "kind": "block",
        **dataclasses.asdict(call.shape),
        "rank": None,
        "function": "main",
        "operator": call.operator,
        "arguments": values(call.inputs, "input", sides[0]),
        "results": [{**v, "alias": None} for v in values(call.outputs, "output", sides[1])],
    }
    return Block(label, call.module, arrays, entry)
