"""How often the instructions of a compiled program run: trips of its loops, and what its calls and branches hold."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

from sharding.hlo import Computation, Instruction, Program

Known = Mapping[int, int]
"""Elements of a computation's one tuple parameter that are integers known beforehand."""

_PASSING = ("copy", "bitcast", "convert", "copy-start", "copy-done", "reshape", "optimization-barrier")


@dataclasses.dataclass(frozen=True)
class _Slot:
    """Element `index` of the parameter's tuple, plus `step`."""

    index: int
    step: int = 0


def _value(name: str, computation: Computation, known: Known) -> int | _Slot | None:
    """An integer scalar as a number, or as an element of the parameter plus a number; None for anything else."""
    instruction = computation.instructions.get(name)
    if instruction is None:
        return None
    if instruction.opcode == "constant":
        return int(instruction.argument) if re.fullmatch(r"-?\d+", instruction.argument) else None
    if instruction.opcode in _PASSING:
        return _value(instruction.operands[0], computation, known)
    if instruction.opcode == "get-tuple-element":
        source = computation.instructions.get(instruction.operands[0])
        found = re.search(r"\bindex=(\d+)", instruction.attributes)
        if source is None or found is None:
            return None
        if source.opcode == "parameter":
            return known.get(int(found[1]), _Slot(int(found[1])))
        return _value(source.operands[int(found[1])], computation, known) if source.opcode == "tuple" else None
    if instruction.opcode in ("add", "subtract") and len(instruction.operands) == 2:
        a, b = (_value(operand, computation, known) for operand in instruction.operands)
        sign = 1 if instruction.opcode == "add" else -1
        if isinstance(a, int) and isinstance(b, int):
            return a + sign * b
        if isinstance(a, _Slot) and isinstance(b, int):
            return _Slot(a.index, a.step + sign * b)
        if isinstance(a, int) and isinstance(b, _Slot) and sign > 0:
            return _Slot(b.index, b.step + a)
    return None


def _trips(first: int, bound: int, step: int, direction: str) -> int | None:
    """How often a loop runs that starts at `first`, adds `step`, and goes on while `direction` holds of `bound`."""
    if direction in ("GT", "GE"):
        first, bound, step, direction = -first, -bound, -step, {"GT": "LT", "GE": "LE"}[direction]
    if direction == "NE":
        return (
            (bound - first) // step if step and (bound - first) % step == 0 and (bound - first) // step >= 0 else None
        )
    if direction not in ("LT", "LE") or step <= 0:
        return None
    return max(0, -(-(bound - first + (direction == "LE")) // step))


_SWAPPED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE"}


def loop(
    instruction: Instruction, computation: Computation, known: Known, program: Program
) -> tuple[int | None, Known]:
    """How often a `while` runs, None if that depends on data; and what its body knows of its own parameter.

    The number is XLA's own where it prints one (CPU, GPU). The TPU compiler prints none: there it is read from the
    condition, a comparison of a counter with a number, and from the body, which adds a number to that counter.

    Args:
      instruction: the `while`, in `computation`.
      known: what is known of the computation's own parameter.
    """
    (condition_name,), (body_name,) = instruction.called("condition"), instruction.called("body")
    condition, body = program.computations[condition_name], program.computations[body_name]
    start = computation.instructions.get(instruction.operands[0])
    first = {}
    if start is not None and start.opcode == "tuple":
        first = {i: _value(operand, computation, known) for i, operand in enumerate(start.operands)}
    numbers = {i: v for i, v in first.items() if isinstance(v, int)}
    result = body.instructions.get(body.root)
    moves: dict[int, int] = {}  # counters and constants of the body: element -> what a trip adds
    if result is not None and result.opcode == "tuple":
        for i, operand in enumerate(result.operands):
            value = _value(operand, body, {})
            if isinstance(value, _Slot) and value.index == i:
                moves[i] = value.step
    inside = {i: v for i, v in numbers.items() if moves.get(i) == 0}

    printed = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', instruction.attributes)
    if printed is not None:
        return int(printed[1]), inside
    test = condition.instructions.get(condition.root)
    direction = re.search(r"\bdirection=(\w\w)", test.attributes) if test is not None else None
    if test is None or test.opcode != "compare" or direction is None:
        return None, inside
    a, b = (_value(operand, condition, inside) for operand in test.operands)
    compared = direction[1]
    if isinstance(a, int):
        a, b, compared = b, a, _SWAPPED.get(compared, "")
    if not isinstance(a, _Slot) or not isinstance(b, int) or a.index not in numbers or not moves.get(a.index):
        return None, inside
    return _trips(numbers[a.index] + a.step, b, moves[a.index], compared), inside


# --- all of a program ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """An instruction in one run of a program.

    Attributes:
      instruction: in `computation`.
      computation: where it stands.
      caller: the fusion or call that holds the computation; None where a loop, a branch or the program itself does.
      count: how often it runs.
      unbounded: whether it is in a loop whose number of trips depends on data; `count` takes that loop once.
    """

    instruction: Instruction
    computation: Computation
    caller: Instruction | None
    count: int
    unbounded: bool


CALLS = ("fusion", "call", "call-start", "async-start", "custom-call")
"""Instructions that run another computation once. (What others apply, to sum or to sort, is part of them.)"""


def runs(
    program: Program, keep: Callable[[Instruction], bool], weigh: Callable[[Sequence[Run]], float] = len
) -> list[Run]:
    """The instructions that one run of a program executes, in the order that it holds them.

    Loops count as often as they run, nested ones too. Of a conditional's branches the heaviest counts.

    Args:
      keep: which instructions.
      weigh: weight of a branch, from what is kept of it.
    """

    def within(name: str, caller: Instruction | None, known: Known) -> list[Run]:
        computation, found = program.computations[name], list[Run]()
        for instruction in computation:
            opcode = instruction.opcode
            if keep(instruction):
                found.append(Run(instruction, computation, caller, 1, False))
            if opcode == "while":
                trips, inside = loop(instruction, computation, known, program)
                for run in within(instruction.called("body")[0], None, inside):
                    count, unbounded = run.count * (1 if trips is None else trips), run.unbounded or trips is None
                    found.append(dataclasses.replace(run, count=count, unbounded=unbounded))
            elif opcode == "conditional":
                names = instruction.called("branch_computations", "true_computation", "false_computation")
                heaviest: Sequence[Run] = max((within(branch, None, {}) for branch in names), key=weigh)
                found += heaviest
            elif opcode in CALLS:
                for inner in instruction.called("calls", "to_apply", "called_computations"):
                    found += within(inner, instruction, {})
        return [run for run in found if run.count]

    return within(program.entry, None, {})
