"""How long the interpreter will take: it does about a million multiply-adds, or element operations, a second."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jaxlib.mlir import ir

from dsjax.export.consumers.base import functions, main_function, new_context, parse

SECONDS = 1.2e-6
"""Of one multiply-add, or of one element of a result, measured on one core of a small machine."""
_SORT_STEP = 8.0
_REDUCE_STEP = 2.5
_SCATTER_STEP = 4.0


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Attributes: seconds; exact: False if a loop's count depends on data: then it is counted once, a lower bound."""

    seconds: float
    exact: bool

    def __str__(self) -> str:
        return f"{'about' if self.exact else 'at least'} {self.seconds:,.0f} s"


def estimate_seconds(module: bytes) -> Estimate:
    """The interpreter's time for a portable artifact, from the sizes in it and the counts of its loops."""
    parsed = parse(module, new_context())
    walk = _Walk(functions(parsed))
    steps = walk.block(main_function(parsed).regions[0].blocks[0])
    return Estimate(steps * SECONDS, walk.exact)


class _Walk:
    """Counts steps, each function once."""

    def __init__(self, found: dict[str, Any]) -> None:
        self._functions = found
        self._known: dict[str, float] = {}
        self.exact = True

    def block(self, block: Any) -> float:
        return sum(self._op(op.operation) for op in block.operations)

    def _function(self, name: str) -> float:
        if name not in self._known:
            self._known[name] = self.block(self._functions[name].regions[0].blocks[0])
        return self._known[name]

    def _op(self, op: Any) -> float:
        name = op.name
        if name == "stablehlo.while":
            count = trip_count(op)
            self.exact &= count is not None
            return (1 if count is None else count) * sum(self.block(r.blocks[0]) for r in op.regions)
        if name in ("func.call", "stablehlo.composite"):
            attribute = op.attributes["callee" if name == "func.call" else "decomposition"]
            return self._function(str(attribute.value))
        if name in ("stablehlo.case", "stablehlo.if"):
            return max((self.block(r.blocks[0]) for r in op.regions), default=0.0)
        out = float(sum(_size(v) for v in op.results))
        if name == "stablehlo.dot_general":
            numbers = str(op.attributes["dot_dimension_numbers"])
            axes = numbers.split("lhs_contracting_dimensions = [")[1].split("]")[0] if "lhs_contracting" in numbers else ""
            shape = ir.RankedTensorType(op.operands[0].type).shape
            return out * math.prod(shape[int(axis)] for axis in axes.split(",") if axis.strip())
        if name == "stablehlo.convolution":
            kernel = ir.RankedTensorType(op.operands[1].type).shape
            return out * math.prod(kernel) / max(1, max(kernel))
        if name == "stablehlo.reduce":
            return _REDUCE_STEP * sum(_size(v) for v in op.operands)
        if name == "stablehlo.reduce_window":
            window = op.attributes["window_dimensions"]
            return _REDUCE_STEP * out * math.prod(int(n) for n in window)
        if name == "stablehlo.sort":
            kind = ir.RankedTensorType(op.operands[0].type)
            length = kind.shape[ir.IntegerAttr(op.attributes["dimension"]).value]
            return _SORT_STEP * out * max(1.0, math.log2(max(length, 2)))
        if name == "stablehlo.scatter":
            return out + _SCATTER_STEP * _size(op.operands[-1])
        return 0.0 if name in ("stablehlo.return", "func.return") else out


def _size(value: Any) -> int:
    return math.prod(ir.RankedTensorType(value.type).shape) if isinstance(value.type, ir.RankedTensorType) else 0


def trip_count(loop: Any) -> int | None:
    """How often a `stablehlo.while` runs, if it counts a carried integer up from one constant to another by one."""
    condition = [op.operation for op in loop.regions[0].blocks[0].operations]
    if len(condition) < 2:
        return None
    compare = condition[-2]
    if compare.name != "stablehlo.compare" or "LT" not in str(compare.attributes["comparison_direction"]):
        return None
    start = _constant(_carried(compare.operands[0], loop))
    stop = _constant(_carried(compare.operands[1], loop))
    return None if start is None or stop is None else max(0, stop - start)


def _carried(value: Any, loop: Any) -> Any:
    """What a loop starts a carried value with; other values are themselves."""
    if isinstance(value, ir.BlockArgument):
        return loop.operands[ir.BlockArgument(value).arg_number]
    return value


def _constant(value: Any) -> int | None:
    """The one number of a constant, seen through what keeps it."""
    if not isinstance(value, ir.OpResult):
        return None
    op = ir.OpResult(value).owner.operation
    if op.name in ("stablehlo.convert", "stablehlo.reshape", "stablehlo.optimization_barrier"):
        return _constant(op.operands[0])
    if op.name != "stablehlo.constant":
        return None
    attribute = op.attributes["value"]
    try:
        return int(ir.DenseIntElementsAttr(attribute)[0])
    except (ValueError, TypeError):
        return None
