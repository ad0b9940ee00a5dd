"""The programs of all ranks as one program without collectives, for whom cannot run several together.

Every rank's instructions stay what they are. Where all ranks meet at a collective, it is written out by its definition
in the StableHLO specification: a sum in the order of ranks, a concatenation, slices. Loops that hold collectives become
one loop, whose count is that of the first rank; others stay each rank's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import func, stablehlo
from jaxlib.mlir.passmanager import PassManager

from dsjax.export.consumers.base import (
    Arrays,
    Consumer,
    Ran,
    Refused,
    functions,
    main_function,
    new_context,
    parse,
    serialise,
)

_REDUCING = ("stablehlo.all_reduce", "stablehlo.reduce_scatter")
COLLECTIVES = (*_REDUCING, "stablehlo.all_gather", "stablehlo.all_to_all", "stablehlo.collective_permute")
_REDUCTIONS = {
    "stablehlo.add": stablehlo.AddOp,
    "stablehlo.maximum": stablehlo.MaxOp,
    "stablehlo.minimum": stablehlo.MinOp,
    "stablehlo.multiply": stablehlo.MulOp,
    "stablehlo.and": stablehlo.AndOp,
    "stablehlo.or": stablehlo.OrOp,
}


def run_merged(consumer: Consumer, modules: Sequence[bytes], arguments: Sequence[Arrays]) -> Ran:
    """Runs the programs of all ranks as one; raises as `Consumer.run` does."""
    results = iter(consumer.run(merge(modules), [a for arrays in arguments for a in arrays]))
    parsed = [parse(m, new_context()) for m in modules]
    counts = [len(main_function(m).type.results) for m in parsed]
    return Ran([[next(results) for _ in range(n)] for n in counts], "collectives written out")


def merge(modules: Sequence[bytes]) -> bytes:
    """One portable artifact that takes the arguments of rank 0, then of rank 1, ..., and gives results likewise.

    Raises:
      Refused: if ranks do not meet at the same collectives.
    """
    stablehlo.register_stablehlo_passes()
    context = new_context()
    parsed = [_inlined(parse(m, context), context) for m in modules]
    with context, ir.Location.unknown():
        program = _side_by_side(parsed)
        _fuse(main_function(program).regions[0].blocks[0], len(parsed))
        program.operation.verify()
        return serialise(program)


def _inlined(module: ir.Module, context: ir.Context) -> ir.Module:
    """The module with all in its main function, so that a collective is not out of sight."""
    with context:
        passes = "func.func(stablehlo-legalize-composite-to-call),inline"
        PassManager.parse(f"builtin.module({passes})").run(module.operation)
    return module


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
        kept = mains[rank].attributes["sym_name"].value
        for name, function in functions(module).items():
            if name != kept:  # of no collective: what called it could not be inlined
                ir.SymbolTable.replace_all_symbol_uses(name, f"rank{rank}_{name}", module.operation)
                ir.SymbolTable.set_symbol_name(function, f"rank{rank}_{name}")
                function.operation.clone(ir.InsertionPoint(program.body))
        body = mains[rank].operation.clone(ir.InsertionPoint(program.body))
        inner = body.regions[0].blocks[0]
        _number(inner, rank)
        returned += _pour(inner, block, arguments)
        body.erase()
    with ir.InsertionPoint(block):
        func.ReturnOp(returned)
    return program


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
    if op.operation.name in COLLECTIVES:
        return True
    if op.operation.name.startswith("stablehlo.collective") or op.operation.name in (
        "stablehlo.send",
        "stablehlo.recv",
    ):
        raise Refused(f"{op.operation.name} cannot be written out")
    return any(_meets(inner) for region in op.regions for block in region.blocks for inner in block.operations)


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
            _write_out(met)
        else:
            raise Refused(f"a collective inside {met[0].name} cannot be written out")
    _sort(block)


def _write_out(met: list[Any]) -> None:
    """Replaces one collective of all ranks by what it is defined to give."""
    with ir.InsertionPoint(met[-1]):
        results = _defined(met)
    for op, values in zip(met, results, strict=True):
        for old, new in zip(op.results, values, strict=True):
            old.replace_all_uses_with(new)
        op.erase()


def _defined(met: list[Any]) -> list[list[Any]]:
    """For each rank, the values of a collective's results."""
    operands = [list(op.operands) for op in met]
    if met[0].name == "stablehlo.collective_permute":
        return _permuted(met, operands)
    out: list[list[Any]] = [[] for _ in met]
    for group in np.array(met[0].attributes["replica_groups"]).tolist():
        group = [rank for rank in group if rank >= 0]
        for k in range(len(operands[0])):
            parts = [operands[rank][k] for rank in group]
            kind = ir.RankedTensorType(met[group[0]].results[k].type)
            for rank, value in zip(group, _of_group(met[group[0]], parts, kind), strict=True):
                out[rank].append(value)
    if any(len(values) != len(operands[0]) for values in out):
        raise Refused(f"{met[0].name}: expected every rank in one group, found {met[0].attributes['replica_groups']}")
    return out


def _of_group(op: Any, parts: list[Any], kind: Any) -> list[Any]:
    """What each member of a group gets of its members' operands."""
    n = len(parts)
    if op.operation.name in _REDUCING:
        total = _reduced(op, parts)
        if op.operation.name == "stablehlo.all_reduce":
            return [total] * n
        return _split(total, ir.IntegerAttr(op.attributes["scatter_dimension"]).value, n)
    if op.operation.name == "stablehlo.all_gather":
        dimension = ir.IntegerAttr(op.attributes["all_gather_dim"])
        return [stablehlo.ConcatenateOp(parts, dimension, results=[kind]).result] * n
    split = ir.IntegerAttr(op.attributes["split_dimension"]).value
    pieces = [_split(part, split, n) for part in parts]
    concat = ir.IntegerAttr(op.attributes["concat_dimension"])
    return [stablehlo.ConcatenateOp([p[i] for p in pieces], concat, results=[kind]).result for i in range(n)]


def _reduced(op: Any, parts: list[Any]) -> Any:
    body = [inner.operation.name for inner in op.regions[0].blocks[0].operations]
    if len(body) != 2 or body[0] not in _REDUCTIONS:
        raise Refused(f"{op.operation.name} by {', '.join(body)} cannot be written out")
    total = parts[0]
    for part in parts[1:]:
        total = _REDUCTIONS[body[0]](total, part).result
    return total


def _split(value: Any, axis: int, n: int) -> list[Any]:
    """Equal parts along an axis."""
    shape = list(ir.RankedTensorType(value.type).shape)
    width = shape[axis] // n
    parts = []
    for i in range(n):
        start, stop = [0] * len(shape), list(shape)
        start[axis], stop[axis] = i * width, (i + 1) * width
        parts.append(stablehlo.SliceOp(value, _dense(start), _dense(stop), _dense([1] * len(shape))).result)
    return parts


def _dense(values: list[int]) -> Any:
    return ir.DenseI64ArrayAttr.get(values)


def _permuted(met: list[Any], operands: list[list[Any]]) -> list[list[Any]]:
    """Each rank's operand at its target; zeros where none is sent."""
    sources = {target: source for source, target in np.array(met[0].attributes["source_target_pairs"]).tolist()}
    out = []
    for rank, op in enumerate(met):
        if rank in sources:
            out.append([operands[sources[rank]][0]])
            continue
        kind = ir.RankedTensorType(op.results[0].type)
        whole = isinstance(kind.element_type, ir.IntegerType)
        zero: Any = ir.IntegerAttr.get(kind.element_type, 0) if whole else ir.FloatAttr.get(kind.element_type, 0.0)
        out.append([stablehlo.ConstantOp(ir.DenseElementsAttr.get_splat(kind, zero)).result])
    return out


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
