"""A compiled program's text (`jax.stages.Compiled.as_text()`) as computations and instructions.

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
    """Type of an array in a program.

    Attributes:
      dtype: as XLA writes it: "f32", "bf16", "u8".
      shape: its dimensions, dynamic ones at their bound.
      space: number of the memory that it lies in; 0 is the device's large one.
    """

    dtype: str
    shape: tuple[int, ...]
    space: int = 0

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
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<= ]*)\](?:\{[^}]*?(?:S\((\d+)\))?\})?")
_HEADER = re.compile(r"^(ENTRY )?%?(\S+) \(.*\) -> .*\{\s*$")
_COMMENT = re.compile(r"/\*.*?\*/")


def _arrays(text: str) -> tuple[Array, ...]:
    """Leaves of a type: `(f32[2,3]{1,0:T(8,128)S(1)}, u8[<=4])`."""
    return tuple(
        Array(dtype, tuple(int(n.strip(" <=")) for n in shape.split(",") if n.strip()), int(space or 0))
        for dtype, shape, space in _ARRAY.findall(text)
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
