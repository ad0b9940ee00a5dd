"""How often a loop runs, read out of the program: counter, bound and step that are constants.

Values are followed through calls of outlined functions and through what a loop carries unchanged, because JAX puts a
loop's bound, its condition and its body there. What cannot be read is None: a dynamic loop.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxlib.mlir import ir

_SAME_VALUE = ("stablehlo.convert", "stablehlo.reshape", "stablehlo.broadcast_in_dim", "stablehlo.optimization_barrier")
_ARITHMETIC = {"stablehlo.add": 1, "stablehlo.subtract": -1}
_SWAPPED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE"}


@dataclasses.dataclass(frozen=True)
class Known:
    """A scalar integer that is known: `offset`, or what a loop carries plus `offset`.

    Attributes:
      offset: the constant, or what is added to the argument.
      argument: (loop, which of its carried values) that it is based on, None for a constant.
    """

    offset: int
    argument: tuple[int, int] | None = None


Scope = Mapping[Any, Sequence[Known | None]]
"""What is known of the arguments of the blocks around an operation."""


def terminator(block: Any) -> Any:
    """The last operation of a block, which names its results."""
    return block.operations[len(block.operations) - 1].operation


def is_scalar_integer(type_: Any) -> bool:
    """Whether a type is a tensor of rank 0 whose elements are integers of any kind."""
    return isinstance(type_, ir.RankedTensorType) and type_.rank == 0 and isinstance(type_.element_type, ir.IntegerType)


def result_index(value: Any) -> int:
    """Which result of its operation a value is."""
    return value.result_number


def functions(module: ir.Module) -> dict[str, Any]:
    """The module's functions by name; who keeps one of them has to keep the module."""
    operations: Any = module.body.operations
    return {op.attributes["sym_name"].value: op for op in operations if op.operation.name == "func.func"}


def callee(operation: Any) -> str:
    """The function that an operation calls, or that a composite stands for; "" of others."""
    key = {"func.call": "callee", "stablehlo.composite": "decomposition"}.get(operation.operation.name)
    return operation.attributes[key].value if key else ""


class Loops:
    """Reads trip counts in one module.

    Attributes:
      functions: entry block of each function, by symbol.
    """

    def __init__(self, functions: Mapping[str, Any]) -> None:
        self.functions = functions

    def value(self, value: Any, scope: Scope) -> Known | None:
        """What is known of a scalar integer; None for any other value."""
        if not is_scalar_integer(value.type):
            return None
        if isinstance(value.owner, ir.Block):
            known = scope.get(value.owner)
            return known[value.arg_number] if known is not None else None
        operation = value.owner.operation
        name = operation.name
        if name == "stablehlo.constant":
            return Known(int(next(iter(operation.attributes["value"]))))
        if name in _SAME_VALUE:
            return self.value(operation.operands[result_index(value)], scope)
        if name in _ARITHMETIC:
            left, right = (self.value(o, scope) for o in operation.operands)
            return self._sum(left, right, _ARITHMETIC[name])
        if name == "func.call":
            inner = self._enter(operation, scope)
            return self._returned(self.functions[callee(operation)], result_index(value), inner)
        if name == "stablehlo.while":
            return self.invariants(operation, scope)[result_index(value)]
        return None

    @staticmethod
    def _sum(left: Known | None, right: Known | None, sign: int) -> Known | None:
        if left is None or right is None:
            return None
        if right.argument is None:
            return Known(left.offset + sign * right.offset, left.argument)
        if left.argument is None and sign > 0:
            return Known(left.offset + right.offset, right.argument)
        return None

    def _enter(self, call: Any, scope: Scope) -> Scope:
        return {self.functions[callee(call)]: [self.value(o, scope) for o in call.operands]}

    def _returned(self, block: Any, index: int, scope: Scope) -> Known | None:
        return self.value(terminator(block).operands[index], scope)

    def _steps(self, loop: Any, scope: Scope) -> list[Known | None]:
        """What the body returns for each carried value, in terms of what it was given."""
        body = loop.regions[1].blocks[0]
        inner = {**scope, body: self._symbols(loop)}
        return [self.value(o, inner) for o in terminator(body).operands]

    @staticmethod
    def _symbols(loop: Any) -> list[Known | None]:
        return [Known(0, (hash(loop), i)) for i in range(len(loop.operands))]

    def invariants(self, loop: Any, scope: Scope) -> list[Known | None]:
        """The constants among what a loop carries: those it starts with and passes on unchanged."""
        kept = zip(loop.operands, self._steps(loop, scope), self._symbols(loop), strict=True)
        return [self.value(start, scope) if step == symbol else None for start, step, symbol in kept]

    def trips(self, loop: Any, scope: Scope) -> int | None:
        """How often a `stablehlo.while` runs its body: counter, bound and step are constants; None if not."""
        condition, symbols = loop.regions[0].blocks[0], self._symbols(loop)
        test = self._test(terminator(condition).operands[0], {**scope, condition: symbols})
        if test is None:
            return None
        direction, left, right = test
        steps = dict(zip(symbols, zip(loop.operands, self._steps(loop, scope), strict=True), strict=True))

        def settled(side: Known) -> int | None:
            """A side of the comparison that is the same in every trip."""
            if side.argument is None:
                return side.offset
            carried, step = steps.get(Known(0, side.argument), (None, None))
            start = self.value(carried, scope) if step == Known(0, side.argument) else None
            return start.offset + side.offset if start and start.argument is None else None

        bound = settled(right)
        if bound is None:
            direction, left, bound = _SWAPPED.get(direction, ""), right, settled(left)
        start, step = steps.get(Known(0, left.argument), (None, None))
        first = self.value(start, scope) if start is not None else None
        if bound is None or first is None or step is None or step.argument != left.argument or first.argument:
            return None
        return count(direction, first.offset + left.offset, bound, step.offset)

    def _test(self, value: Any, scope: Scope) -> tuple[str, Known, Known] | None:
        """(direction, left, right) of the comparison that a condition returns, also of an outlined one."""
        if isinstance(value.owner, ir.Block):
            return None
        operation = value.owner.operation
        if operation.name == "func.call":
            inner = terminator(self.functions[callee(operation)]).operands[result_index(value)]
            return self._test(inner, self._enter(operation, scope))
        if operation.name in _SAME_VALUE:
            return self._test(operation.operands[0], scope)
        if operation.name != "stablehlo.compare":
            return None
        left, right = (self.value(o, scope) for o in operation.operands)
        if left is None or right is None:
            return None
        return comparison(operation), left, right


def comparison(compare: Any) -> str:
    """The direction of a `stablehlo.compare`: LT, GE, ..."""
    return str(compare.attributes["comparison_direction"]).split()[-1].rstrip(">")


def count(direction: str, start: int, bound: int, step: int) -> int | None:
    """Trips of `for (i = start; i <direction> bound; i += step)`; None if it does not end, or not by that test."""
    if direction in ("LE", "GE"):
        bound += 1 if direction == "LE" else -1
        direction = {"LE": "LT", "GE": "GT"}[direction]
    if direction == "NE":
        if start == bound:
            return 0
        return (bound - start) // step if step and (bound - start) % step == 0 and (bound - start) // step > 0 else None
    if direction == "LT":
        return 0 if start >= bound else -((start - bound) // step) if step > 0 else None
    if direction == "GT":
        return 0 if start <= bound else -((bound - start) // -step) if step < 0 else None
    return None
