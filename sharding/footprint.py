"""What a compiled program computes and holds on one device: operations of its matrix products, its largest arrays."""

from __future__ import annotations

import dataclasses
import math
import re

from sharding.hlo import Computation, Instruction, Program
from sharding.runs import CALLS, Run, runs


@dataclasses.dataclass(frozen=True)
class Products:
    """Multiplications and additions of a program's matrix products.

    Attributes:
      flops: two for each multiply-add, loops as often as they run.
      unbounded: whether some are in a loop whose number of trips depends on data, which is taken once.
    """

    flops: float
    unbounded: bool


def _shape(name: str, computation: Computation) -> tuple[int, ...]:
    return computation.instructions[name].arrays[0].shape


def _contracted(instruction: Instruction, computation: Computation) -> int:
    """Multiply-adds for each element of a product's result."""
    if instruction.opcode == "dot":
        found = re.search(r"\blhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        shape = _shape(instruction.operands[0], computation)
        return math.prod(shape[int(n)] for n in found[1].split(",") if n) if found else 1
    # The TPU compiler writes products as convolutions: their contracted axis is the kernel's input features. A batch is
    # an axis of space, with a window of one; or with a dilated one, of which a single position meets the input.
    labels = re.search(r"\bdim_labels=\w+_(\w+)->", instruction.attributes)
    if labels is None:
        return 1
    features = _shape(instruction.operands[1], computation)[labels[1].index("i")]
    window = re.search(r"\bwindow=\{size=([\dx]+)([^}]*)\}", instruction.attributes)
    if window is None or "lhs_dilate" in window[2]:
        return features
    return features * math.prod(map(int, window[1].split("x")))


def products(program: Program) -> Products:
    """The matrix products in one run of a program, on one device.

    Those that a backend has handed to a library (custom calls) are not seen: of XLA:CPU's programs some are missing.
    """

    def flops(run: Run) -> float:
        per_element = _contracted(run.instruction, run.computation)
        return 2.0 * run.count * per_element * math.prod(run.instruction.arrays[0].shape)

    found = runs(program, lambda i: i.opcode in ("dot", "convolution"), lambda branch: sum(map(flops, branch)))
    return Products(sum(map(flops, found)), any(run.unbounded for run in found))


@dataclasses.dataclass(frozen=True)
class Held:
    """An array, or several, that a program writes.

    Attributes:
      nbytes: without padding.
      opcode: of what writes it; of a fusion "fusion".
      types: as XLA writes them, "u8[61,24,768,224]".
      op_name: see `Instruction.op_name`.
    """

    nbytes: int
    opcode: str
    types: tuple[str, ...]
    op_name: str


_NOTHING_NEW = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "custom-call"),
    *("optimization-barrier", "copy-done", "call-start", "call-done", "async-start", "async-update", "async-done"),
    *("all-gather-done", "all-reduce-done", "collective-permute-done", "partition-id", "replica-id", "after-all"),
)
"""What writes no array of its own: names for what is there, results of what is listed beside them, what was begun."""

_IN_PLACE = ("dynamic-update-slice", "scatter")


def _updates(instruction: Instruction, computation: Computation, program: Program) -> bool:
    """Whether an instruction, or the fusion that it is, writes a part of one of its operands, where that lies."""
    if instruction.opcode in _IN_PLACE:
        return True
    if instruction.opcode != "fusion":
        return False
    operands = [a for name in instruction.operands for a in computation.instructions[name].arrays]
    inner = program.computations[instruction.called("calls")[0]]
    same = all(any(a.dtype == b.dtype and math.prod(a.shape) == math.prod(b.shape) for b in operands)
               for a in instruction.arrays)  # fmt: skip
    return same and any(i.opcode in _IN_PLACE for i in inner)


def largest(program: Program, count: int = 10, memory_space: int = 0) -> list[Held]:
    """The largest arrays that a program writes, each kind once, the largest first.

    This is where to look for a stack that is copied, or a matrix that is decoded whole. Arrays inside a fusion are in
    no memory, and what is updated in place is not written anew: both are left out. The bytes say nothing about what
    lives at the same time.

    Args:
      count: how many.
      memory_space: XLA's number; 0 is the device's large memory, on TPU 1 is the vector memory on the chip.
    """
    fused = {
        name for c in program.computations.values() for i in c if i.opcode in CALLS[:1] for name in i.called("calls")
    }
    found: dict[Held, None] = {}
    for computation in program.computations.values():
        if computation.name in fused:
            continue
        for i in computation:
            # What begins a copy has its result, then its operand and marks, in a tuple.
            arrays = i.arrays[:1] if i.opcode == "copy-start" else i.arrays
            arrays = tuple(a for a in arrays if a.space == memory_space)
            if i.opcode in _NOTHING_NEW or not arrays or _updates(i, computation, program):
                continue
            types = tuple(f"{a.dtype}[{','.join(map(str, a.shape))}]" for a in arrays)
            found[Held(sum(a.nbytes for a in arrays), i.opcode, types, i.op_name)] = None
    return sorted(found, key=lambda held: -held.nbytes)[:count]
