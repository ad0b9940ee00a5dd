"""The programs of all ranks as one program without collectives, for whom cannot run several together.

Every rank's instructions stay what they are. Where all ranks meet at a collective, `collectives` writes it out. Loops
that hold collectives become one loop, whose count is that of the first rank; others stay each rank's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import func, stablehlo

from dsjax.export.consumers.base import (
    Arrays,
    Refused,
    copy_functions,
    main_function,
    new_context,
    parse,
    serialise,
)
from dsjax.export.consumers.collectives import COLLECTIVES, check_alike, defined, is_collective
from dsjax.export.consumers.worker import isolated
from dsjax.export.stablehlo.loops import callee

HOW = "with collectives written out"


def run_as_one(
    run: Callable[[bytes, Arrays], Arrays], modules: Sequence[bytes], arguments: Sequence[Arrays]
) -> list[Arrays]:
    """The results of all ranks, by who runs one program."""
    program, counts = _merged(modules) if len(modules) > 1 else (modules[0], None)
    results = run(program, [a for arrays in arguments for a in arrays])
    return [results] if counts is None else by_rank(results, counts)


def by_rank(results: Arrays, counts: Sequence[int]) -> list[Arrays]:
    """Results of one program as those of the ranks that it was made of."""
    each = iter(results)
    return [[next(each) for _ in range(n)] for n in counts]


def as_one(modules: Sequence[bytes]) -> bytes:
    """A program, or those of all ranks as one; raises as `merge` does."""
    return modules[0] if len(modules) == 1 else merge(modules)


def as_one_isolated(modules: Sequence[bytes], time_limit: float) -> tuple[bytes, list[int]]:
    """`merge` in a process of its own; also how many results each rank has."""
    task = f"{__name__}:merge_task"
    (results,), facts = isolated(task, modules, time_limit=time_limit)
    return results[0].tobytes(), facts["counts"]


def merge_task(modules: list[bytes], _: list[Arrays], __: dict[str, Any]) -> tuple[list[Arrays], dict[str, Any]]:
    """A `Task`: see `as_one_isolated`."""
    program, counts = _merged(modules)
    return [[np.frombuffer(program, np.uint8)]], {"counts": counts}


def merge(modules: Sequence[bytes]) -> bytes:
    """One portable artifact that takes the arguments of rank 0, then of rank 1, ..., and gives results likewise.

    Raises:
      Refused: if ranks do not meet at the same collectives, of the same types and attributes.
    """
    return _merged(modules)[0]


def _merged(modules: Sequence[bytes]) -> tuple[bytes, list[int]]:
    """See `merge`; also how many results each rank has."""
    context = new_context()
    parsed = [parse(m, context) for m in modules]
    counts = [len(main_function(m).type.results) for m in parsed]
    with context, ir.Location.unknown():
        program = _side_by_side(parsed)
        _fuse(main_function(program).regions[0].blocks[0], len(parsed))
        try:
            program.operation.verify()
        except ir.MLIRError as e:
            found = e.error_diagnostics[0].message if e.error_diagnostics else str(e)
            raise Refused(f"ranks do not fit together: {found}") from None
        return serialise(program), counts


def _side_by_side(modules: list[ir.Module]) -> ir.Module:
    """One function with the instructions of rank 0, then of rank 1, ...; ranks are known by number."""
    program = ir.Module.create()
    program.operation.attributes["sym_name"] = ir.StringAttr.get("all_ranks")  # XLA's clients ask for it
    mains = [main_function(m) for m in modules]
    inputs = [t for main in mains for t in main.type.inputs]
    outputs = [t for main in mains for t in main.type.results]
    with ir.InsertionPoint(program.body):
        main: Any = func.FuncOp("main", (inputs, outputs))
    block = main.add_entry_block()
    arguments = iter(block.arguments)
    returned: list[Any] = []
    for rank, module in enumerate(modules):
        calls = _Calls()
        start = f"rank{rank}_{mains[rank].attributes['sym_name'].value}"
        calls.entries = copy_functions(module, program, f"rank{rank}_")
        for copy in calls.entries.values():
            _number(copy.regions[0].blocks[0], rank)
        body = calls.entries[start].regions[0].blocks[0]
        calls.inline(body)
        returned += _pour(body, block, arguments)
        for name, copy in calls.entries.items():
            if name == start or calls.meets(name):
                copy.operation.erase()
    with ir.InsertionPoint(block):
        func.ReturnOp(returned)
    return program


class _Calls:
    """The functions of one rank, of which those with collectives are put where they are called.

    MLIR's own inliner leaves calls inside of StableHLO's regions alone.
    """

    def __init__(self) -> None:
        self.entries: dict[str, Any] = {}
        self._known: dict[str, bool] = {}

    def meets(self, name: str) -> bool:
        """Whether ranks meet in a function, or in one that it calls."""
        if name not in self._known:
            self._known[name] = any(map(self._op_meets, self.entries[name].regions[0].blocks[0].operations))
        return self._known[name]

    def _op_meets(self, op: Any) -> bool:
        inner = (o for region in op.regions for block in region.blocks for o in block.operations)
        name = callee(op)
        return is_collective(op) or any(map(self._op_meets, inner)) or bool(name and self.meets(name))

    def inline(self, block: Any) -> None:
        """Replaces calls of functions with collectives, and composites of them, by what they do."""
        for op in list(block.operations):
            for region in op.regions:
                for inner in region.blocks:
                    self.inline(inner)
            name = callee(op)
            if name and self.meets(name):
                self._replace(op.operation, name)

    def _replace(self, call: Any, name: str) -> None:
        copy = self.entries[name].operation.clone(ir.InsertionPoint(self.entries[name].operation))
        body = copy.regions[0].blocks[0]
        self.inline(body)
        for argument, value in zip(body.arguments, call.operands, strict=True):
            argument.replace_all_uses_with(value)
        operations = list(body.operations)
        returned = list(operations[-1].operands)
        for op in operations[:-1]:
            op.operation.move_before(call)
        for old, new in zip(call.results, returned, strict=True):
            old.replace_all_uses_with(new)
        call.erase()
        copy.operation.erase()


def _number(block: Any, rank: int) -> None:
    """Makes a rank's number a constant."""
    for op in list(block.operations):
        for region in op.regions:
            for inner in region.blocks:
                _number(inner, rank)
        if op.operation.name in ("stablehlo.partition_id", "stablehlo.replica_id"):
            value: Any = np.array(rank if op.operation.name == "stablehlo.partition_id" else 0, np.uint32)
            kind = ir.IntegerType.get_unsigned(32)
            with ir.InsertionPoint(op):
                constant = stablehlo.ConstantOp(ir.DenseElementsAttr.get(value, type=kind, shape=()))
            op.operation.results[0].replace_all_uses_with(constant.result)
            op.operation.erase()


def _pour(source: Any, target: Any, arguments: Any) -> list[Any]:
    """Moves a block's instructions to the end of another's, its arguments taken from an iterator.

    Returns:
      What its terminator, which is dropped, gave on.
    """
    for argument in source.arguments:
        argument.replace_all_uses_with(next(arguments))
    operations = list(source.operations)
    returned = list(operations[-1].operands)
    operations[-1].operation.erase()
    for op in operations[:-1]:
        target.append(op.operation)
    return returned


def _meets(op: Any) -> bool:
    """Whether ranks meet in an instruction: it is a collective, or holds one."""
    inner = (o for region in op.regions for block in region.blocks for o in block.operations)
    return is_collective(op) or any(map(_meets, inner))


def _fuse(block: Any, ranks: int) -> None:
    """Writes out a block's collectives, and joins its loops that hold some.

    The block has the instructions of one rank after the other's; each rank has the same number of meeting points.
    """
    points = [op.operation for op in block.operations if _meets(op)]
    if len(points) % ranks:
        raise Refused(f"{ranks} ranks: expected each to take part in the same collectives, found {len(points)} in all")
    each = len(points) // ranks
    for i in range(each):
        met = points[i::each]
        names = {op.operation.name for op in met}
        if len(names) > 1:
            raise Refused(f"ranks meet in different instructions: {', '.join(sorted(names))}")
        if met[0].name == "stablehlo.while":
            _join_loops(met)
        elif met[0].name in COLLECTIVES:
            check_alike(met)
            _write_out(met)
        else:
            raise Refused(f"a collective inside {met[0].name} cannot be written out")
    _sort(block)


def _write_out(met: list[Any]) -> None:
    """Replaces one collective of all ranks by what it is defined to give."""
    with ir.InsertionPoint(met[-1]):
        results = defined(met)
    for op, values in zip(met, results, strict=True):
        for old, new in zip(op.results, values, strict=True):
            old.replace_all_uses_with(new)
        op.erase()


def _join_loops(met: list[Any]) -> None:
    """One loop that carries what those of all ranks carry; it goes on as long as the first rank's would."""
    carried = [value for op in met for value in op.operands]
    kinds = [value.type for value in carried]
    with ir.InsertionPoint(met[-1]):
        loop = stablehlo.WhileOp(kinds, carried).operation
    locations = [ir.Location.unknown()] * len(kinds)
    for i, region in enumerate(loop.regions):
        block = ir.Block.create_at_start(region, kinds, locations)
        arguments = iter(block.arguments)
        returned = [_pour(op.regions[i].blocks[0], block, arguments) for op in met]
        values = returned[0] if i == 0 else [v for part in returned for v in part]
        with ir.InsertionPoint(block):
            stablehlo.ReturnOp(values)
    results = iter(loop.results)
    for op in met:
        for old in op.results:
            old.replace_all_uses_with(next(results))
        op.erase()
    _fuse(loop.regions[1].blocks[0], len(met))


def _sort(block: Any) -> None:
    """Puts a block's instructions in an order in which all is computed before it is used.

    A collective was put where the last rank meets it; what other ranks do with its result stood before that.
    """
    operations = [op.operation for op in block.operations]
    place = {op: i for i, op in enumerate(operations)}
    needed = [{place[owner] for owner in _owners(op, block) if owner in place} for op in operations]
    done: set[int] = set()
    order: list[int] = []
    for first in range(len(operations)):
        stack = [first]
        while stack:
            i = stack[-1]
            missing = sorted(needed[i] - done - {i}, reverse=True) if i not in done else []
            if i in done or not missing:
                stack.pop()
                if i not in done:
                    done.add(i)
                    order.append(i)
            else:
                stack += missing
    end = order.index(len(operations) - 1)
    order.append(order.pop(end))
    for i in order:
        block.append(operations[i])


def _owners(op: Any, block: Any) -> list[Any]:
    """The instructions of a block whose results one of them, or what it holds, uses."""
    found = []
    for value in op.operands:
        if isinstance(value, ir.OpResult):
            found.append(ir.OpResult(value).owner.operation)
    for region in op.regions:
        for inner_block in region.blocks:
            for inner in inner_block.operations:
                found += _owners(inner.operation, block)
    return found
