"""How long the interpreter will take: it does about a million multiply-adds, or element operations, a second."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jaxlib.mlir import ir

from dsjax.export.consumers.base import main_function
from dsjax.export.stablehlo.loops import Known, Loops, Scope, callee, functions

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


def estimate_module(module: ir.Module) -> Estimate:
    """The interpreter's time for a module in which no function calls itself, by sizes and the counts of loops."""
    walk = _Walk({name: f.regions[0].blocks[0] for name, f in functions(module).items()})
    steps = walk.block(main_function(module).regions[0].blocks[0], {})
    return Estimate(steps * SECONDS, walk.exact)


class _Walk:
    """Counts steps, each function once for what is known of its arguments."""

    def __init__(self, entries: dict[str, Any]) -> None:
        self._entries = entries
        self._loops = Loops(entries)
        self._done: dict[tuple[str, tuple[Known | None, ...]], float] = {}
        self.exact = True

    def block(self, block: Any, scope: Scope) -> float:
        """Steps of a block's instructions."""
        return sum(self._op(op.operation, scope) for op in block.operations)

    def _call(self, name: str, op: Any, scope: Scope) -> float:
        known = tuple(self._loops.value(o, scope) for o in op.operands)
        if (name, known) not in self._done:
            block = self._entries[name]
            self._done[name, known] = self.block(block, {block: known})
        return self._done[name, known]

    def _loop(self, op: Any, scope: Scope) -> float:
        count = self._loops.trips(op, scope)
        self.exact &= count is not None
        kept = self._loops.invariants(op, scope)
        inner = {**scope, **{region.blocks[0]: kept for region in op.regions}}
        return (1 if count is None else count) * sum(self.block(region.blocks[0], inner) for region in op.regions)

    def _op(self, op: Any, scope: Scope) -> float:
        name = op.name
        if name == "stablehlo.while":
            return self._loop(op, scope)
        called = callee(op)
        if called:
            return self._call(called, op, scope)
        if name in ("stablehlo.case", "stablehlo.if"):
            return max((self.block(r.blocks[0], scope) for r in op.regions), default=0.0)
        out = float(sum(_size(v) for v in op.results))
        if name == "stablehlo.dot_general":
            numbers = str(op.attributes["dot_dimension_numbers"])
            axes = (
                numbers.split("lhs_contracting_dimensions = [")[1].split("]")[0] if "lhs_contracting" in numbers else ""
            )
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
