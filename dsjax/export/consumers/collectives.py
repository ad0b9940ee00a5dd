"""Collectives by their definition in the StableHLO specification, in one program that has the values of all ranks.

A sum in the order of ranks, a concatenation, slices.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from dsjax.export.consumers.base import Refused
from dsjax.export.stablehlo.artifact import attribute_names

_REDUCING = ("stablehlo.all_reduce", "stablehlo.reduce_scatter")
COLLECTIVES = (*_REDUCING, "stablehlo.all_gather", "stablehlo.all_to_all", "stablehlo.collective_permute")
_POINT_TO_POINT = ("stablehlo.send", "stablehlo.recv")
_REDUCTIONS = {
    "stablehlo.add": stablehlo.AddOp,
    "stablehlo.maximum": stablehlo.MaxOp,
    "stablehlo.minimum": stablehlo.MinOp,
    "stablehlo.multiply": stablehlo.MulOp,
    "stablehlo.and": stablehlo.AndOp,
    "stablehlo.or": stablehlo.OrOp,
}


def is_collective(op: Any) -> bool:
    """Whether an instruction is a collective; refuses those that cannot be written out."""
    name = op.operation.name
    if name not in COLLECTIVES and (name.startswith("stablehlo.collective") or name in _POINT_TO_POINT):
        raise Refused(f"{name} cannot be written out")
    return name in COLLECTIVES


def check_alike(met: list[Any]) -> None:
    """Refuses a collective that is not the same for all ranks, or names a rank that there is not.

    Args:
      met: the instruction of every rank, by rank.
    """
    for what, of in (("attributes", _attributes), ("types", _types), ("reductions", _body)):
        found = list(dict.fromkeys(of(op) for op in met))
        if len(found) > 1:
            raise Refused(f"{met[0].name}: expected the same {what} of all ranks, found {found[0]} and {found[1]}")
    permuted = met[0].name == "stablehlo.collective_permute"
    key = "source_target_pairs" if permuted else "replica_groups"
    named = np.array(met[0].attributes[key])
    if named.size and not -1 <= named.min() <= named.max() < len(met):
        raise Refused(f"{met[0].name}: {key}: expected ranks 0 to {len(met) - 1}, found {named.tolist()}")
    columns = named.T.tolist() if permuted else [named[named >= 0].tolist()]
    if any(len(set(ranks)) < len(ranks) for ranks in columns):
        raise Refused(f"{met[0].name}: {key}: expected each rank once, found {named.tolist()}")


def _attributes(op: Any) -> str:
    return ", ".join(f"{name} = {op.attributes[name]}" for name in sorted(attribute_names(op)))


def _types(op: Any) -> str:
    types = [", ".join(str(v.type) for v in values) for values in (op.operands, op.results)]
    return f"({types[0]}) -> ({types[1]})"


def _body(op: Any) -> str:
    blocks = [block for region in op.regions for block in region.blocks]
    return ", ".join(f"{o.operation.name} {_types(o.operation)}" for block in blocks for o in block.operations)


def defined(met: list[Any]) -> list[list[Any]]:
    """For each rank, the values of a collective's results, made at the current insertion point.

    Args:
      met: one collective of all ranks, by rank.

    Raises:
      Refused: of a reduction by anything but one operator, or ranks in no group.
    """
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
    block = op.regions[0].blocks[0]
    steps = [inner.operation for inner in block.operations]
    body = [step.name for step in steps]
    if len(body) != 2 or body[0] not in _REDUCTIONS or set(steps[0].operands) != set(block.arguments):
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
