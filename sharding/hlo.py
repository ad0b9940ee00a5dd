"""A compiled program's text (`jax.stages.Compiled.as_text()`) as instructions, and how often its loops run.

Reads what XLA prints for CPU, GPU and TPU: types with tilings and memory spaces ({1,0:T(8,128)(2,1)S(1)}), tuples,
fusions and calls that run beside the program (`call-start`, `async-start`).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

ELEMENT_BITS: dict[str, int] = {"pred": 8, "token": 0, "opaque": 0} | {
    f"{kind}{bits}": bits for kind in "su" for bits in (1, 2, 4, 8, 16, 32, 64)
}
"""Bits of one element by the name that XLA gives its type; floats other than bf16 carry theirs in the name."""


@dataclasses.dataclass(frozen=True)
class Array:
    """Type of an array in a program: `dtype` as XLA writes it ("f32", "bf16", "u8"), and its dimensions."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes without padding, whatever the tiling."""
        bits = ELEMENT_BITS.get(self.dtype)
        if bits is None:  # f32, bf16, f8e4m3fn, f4e2m1fn, c64
            found = re.match(r"(?:b?f|c)(\d+)", self.dtype)
            if found is None:
                raise ValueError(f"compiled program: expected an element type, found {self.dtype!r}")
            bits = int(found[1])
        return -(-math.prod(self.shape) * bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: unique in the program.
      opcode: "add", "fusion", "all-reduce-start", ...
      arrays: types of the result's leaves; one unless it is a tuple.
      operands: names.
      argument: what stands between the parentheses, as it is: a constant's value, a parameter's number.
      attributes: the rest of the line.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    argument: str
    attributes: str

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    @property
    def op_name(self) -> str:
        """The path of named scopes that the operation was traced in, and its primitive; "" where XLA made it."""
        found = re.search(r'\bop_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return found[1].replace('\\"', '"') if found else ""

    def called(self, *keys: str) -> tuple[str, ...]:
        """Computations named by these attributes: "calls", "to_apply", "body", "branch_computations", ..."""
        names: list[str] = []
        for key in keys:
            for many, one in re.findall(rf"(?:^|[ ,]){key}=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", self.attributes):
                names += [name.strip().lstrip("%") for name in many.split(",")] if many else [one]
        return tuple(names)


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in order; `root` is the name of the one whose value is the result."""

    name: str
    instructions: Mapping[str, Instruction]
    root: str

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program: computations by name, where it starts, and the devices that run it together."""

    computations: Mapping[str, Computation]
    entry: str
    devices: int


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if not depth:
            return at
    return len(text)


_LINE = re.compile(r"^\s+(ROOT )?%?([^\s=]+) = (?=\S)")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<= ]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?(\S+) \(.*\) -> .*\{\s*$")
_COMMENT = re.compile(r"/\*.*?\*/")


def _arrays(text: str) -> tuple[Array, ...]:
    """Leaves of a type: `(f32[2,3]{1,0}, u8[<=4])`, dynamic dimensions at their bound."""
    return tuple(
        Array(dtype, tuple(int(n.strip(" <=")) for n in shape.split(",") if n.strip()))
        for dtype, shape in _ARRAY.findall(text)
    )


def _instruction(line: str) -> tuple[Instruction, bool] | None:
    """A line's instruction and whether it is the root; None where the line is none."""
    start = _LINE.match(line)
    if start is None:
        return None
    at = start.end()
    end = _closing(line, at) + 1 if line[at] == "(" else line.find(" ", at)
    opcode = _OPCODE.match(line, end) if end > 0 else None
    if opcode is None:
        return None
    close = _closing(line, opcode.end() - 1)
    argument = line[opcode.end() : close]
    # Operands may be printed with their types: the name comes last.
    parts = [p.split()[-1].lstrip("%") for p in _COMMENT.sub("", argument).split(",") if p.strip()]
    name, kind = start[2], opcode[1]
    operands = () if kind in ("constant", "parameter", "iota") else tuple(parts)
    return Instruction(name, kind, _arrays(line[at:end]), operands, argument, line[close + 1 :]), bool(start[1])


def parse(text: str) -> Program:
    """The program that `jax.stages.Compiled.as_text()` prints.

    Raises:
      ValueError: if the text holds no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, name, root = "", "", ""
    instructions: dict[str, Instruction] = {}
    for line in text.splitlines():
        header = None if line.startswith(" ") else _HEADER.match(line)
        if header is not None:
            name, root, instructions = header[2], "", {}
            entry = name if header[1] else entry
        elif line.startswith("}") and name:
            computations[name] = Computation(name, instructions, root)
            name = ""
        elif name and (found := _instruction(line)) is not None:
            instructions[found[0].name] = found[0]
            root = found[0].name if found[1] else root
    if entry not in computations:
        raise ValueError("compiled program: expected an ENTRY computation, found none")
    sizes = [int(n) for n in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", text[: text.find("\n")])]
    return Program(computations, entry, math.prod(sizes))


# --- loops ----------------------------------------------------------------------------------------------------------

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
