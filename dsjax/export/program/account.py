"""memory.json, cost.json and cache.json: what one rank holds and does, by the planner's formulas."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dsjax.cache.rows import ROW_BLOCK, SPARE
from dsjax.export.program.exporter import Program, is_draft
from dsjax.export.program.signature import Slice, Value
from dsjax.plan.memory import activation_bytes, workspace_bytes
from dsjax.plan.placement import Model, Placement, draft_config, module_of
from dsjax.plan.roofline import work
from quant.operator import find

CARDS = (1, 2, 4, 8, 16, 24, 32, 64, 80, 96, 128, 141, 192)
"""GB of memory that cards come with."""

MEMORY_NOTES = {
    "unit": "bytes of one rank",
    "exact": "parameters, cache, inputs, outputs; aliased is the part of the results that takes the caches' memory",
    "temporaries_estimate": "by formula: what a step holds at its widest point. No bound: compilers have taken half of "
    "it, and twice as much",
    "total": "parameters, cache, inputs, outputs and the estimate of temporaries",
    "smallest_card_gb": f"the first of {', '.join(map(str, CARDS))} GB (10^9 bytes) that holds the total; what a "
    "compiler takes beyond the estimate comes on top",
}
COST_NOTES = {
    "unit": "operations (a multiply-add is two) and bytes of one rank and one step, rounded to whole ones",
    "context": "every slot holds `length` tokens after the step, the new ones among them",
    "flops": "products with matrices and attention, in the form (`mla`) that the program has; element-wise operations "
    "and routing are left out. Experts are multiplied with the tokens that choose them; where `grouped_matmul` is "
    "`dense`, all with every token, and where it is `ragged`, all with a row for each choice of each token, as "
    "`lax.ragged_dot` is written in StableHLO",
    "weight_bytes": "each weight once, as the program's arguments have it; of the experts, where not all are "
    "multiplied, the expected number of distinct ones that the step's tokens choose, uniformly and independently, on "
    "the rank with the most; of the embedding the rows that are looked up",
    "cache_bytes": "rows that attention reads",
    "per_token": "divided by the step's tokens",
}
CACHE_NOTES = {
    "global_shape": "the whole array, of all ranks together, and global_bytes its bytes",
    "shape": "one rank's part, the argument of its module, and bytes its bytes; the argument of a program for all "
    "ranks (`--spmd auto`) has the global shape",
    "slices": "by rank, [start, stop] of every axis; null where every rank has the whole array",
}
_CAPACITY = (
    f"length and {SPARE} more for drafts, rounded up: to a multiple of {ROW_BLOCK} if above {ROW_BLOCK}, else to a "
    "power of two, at least 32. Indexer keys and compressed entries may have more places, for blocks of equal size"
)
_RULE = (
    "donated: each result takes the memory of its argument. Arrays are [layers, slots, places, width], but for "
    "lengths [slots]. length[b] is the only truth about positions: roll back k tokens by subtracting k; an empty "
    "sequence has length 0, whatever the other arrays hold."
)
_PLACES = {
    "rows": "position p in place p",
    "index": "position p in place p",
    "window": "a ring: position p in place p mod places",
    "inputs": "a ring: position p in place p mod places",
    "entries": "entry i, of tokens i * ratio and on, in place i",
    "length": "tokens of each slot",
}


def _slices(program: Program, value: Value) -> list[Slice] | None:
    """By rank; None where each has the whole."""
    extents = program.exporter.layout.rules.extents
    found = [value.slice(rank, extents) for rank in range(program.exporter.ranks)]
    return [bounds for bounds in found if bounds is not None] or None


def _local_shape(program: Program, value: Value) -> list[int]:
    """Of one rank, and so of each."""
    exporter = program.exporter
    bounds = value.slice(0, exporter.layout.rules.extents) if exporter.ranks > 1 else None
    return list(value.spec.shape) if bounds is None else [stop - start for start, stop in bounds]


def _bytes(program: Program, value: Value) -> int:
    """Of one rank."""
    return value.nbytes * math.prod(_local_shape(program, value)) // math.prod(value.spec.shape)


def _local_bytes(program: Program, kind: str, results: bool = False) -> int:
    values = program.results if results else program.arguments
    return sum(_bytes(program, value) for value in values if value.kind == kind)


def _placed(program: Program, model: Model) -> Placement:
    """What the planner counts: the program's own arguments, computed as its operators' variants say.

    The draft module is counted as a model of one layer.
    """
    exporter, held = program.exporter, [value.file for value in program.arguments if value.kind == "param"]
    with exporter.chosen():
        form, moe = find("mla").chosen, find("grouped_matmul").chosen
    model = dataclasses.replace(
        model,
        config=draft_config(model.config) if is_draft(program.shape.phase) else model.config,
        numerics=dataclasses.replace(model.numerics, mla=form) if form in ("absorbed", "naive") else model.numerics,
        moe=moe,
        held=jax.tree.unflatten(jax.tree.structure(program.params), held),
    )
    return Placement(model, exporter.layout)


def memory(program: Program, model: Model) -> dict[str, Any]:
    """Bytes of one rank.

    Parameters, caches, inputs and outputs are exact. Temporaries are an estimate by formula (`dsjax.plan.memory`): what
    a compiler makes of a program is its own affair.
    """
    shape, placement = program.shape, _placed(program, model)
    slots = placement.slots(shape.batch)
    temporary = activation_bytes(placement, slots, shape.tokens) + workspace_bytes(placement, slots, shape.tokens)
    found: dict[str, Any] = {
        "parameters": _local_bytes(program, "param"),
        "cache": _local_bytes(program, "cache"),
        "inputs": _local_bytes(program, "input"),
        "outputs": _local_bytes(program, "output", results=True),
        "temporaries_estimate": temporary,
        "aliased": _local_bytes(program, "cache"),
    }
    found["total"] = sum(found[name] for name in ("parameters", "cache", "inputs", "outputs", "temporaries_estimate"))
    modules: dict[str, int] = {}
    for (row, _), value in zip(program.rows, program.arguments, strict=False):
        modules[module_of(row)] = modules.get(module_of(row), 0) + _bytes(program, value)
    found["parameters_by_module"] = modules
    found["smallest_card_gb"] = next((gb for gb in CARDS if found["total"] <= gb * 1_000_000_000), None)
    return found


def cost(program: Program, model: Model) -> dict[str, Any]:
    """One rank's operations and bytes in a step whose sequences then hold `length` tokens, by closed forms."""
    shape, placement = program.shape, _placed(program, model)
    slots = placement.slots(shape.batch)
    found, tokens = work(placement, slots, shape.tokens, shape.length), slots * shape.tokens
    return {
        "tokens": tokens,
        "length": shape.length,
        "flops": _whole(found.flops),
        "flops_by_module": _whole(found.parts),
        "flops_per_token": round(sum(found.flops.values()) / tokens),
        "weight_bytes": round(found.weight_bytes),
        "weight_bytes_by_module": _whole(found.reads),
        "cache_bytes": round(found.cache_bytes),
        "bytes_per_token": round((found.weight_bytes + found.cache_bytes) / tokens),
    }


def _whole(numbers: Mapping[str, float]) -> dict[str, int]:
    return {name: round(number) for name, number in numbers.items()}


def cache(program: Program) -> dict[str, Any]:
    """The cache's arguments, which result replaces which, how many positions they hold and where, and each rank's."""
    replaced = {argument: result for result, argument in program.aliases.items()}
    arguments = [
        {
            "index": i,
            "name": v.name,
            "global_shape": list(v.spec.shape),
            "shape": _local_shape(program, v),
            "dtype": np.dtype(v.spec.dtype).name,
            "bytes": _bytes(program, v),
            "global_bytes": v.nbytes,
            "slices": _slices(program, v),
            "result": replaced[i],
            "places": _PLACES[v.name.rsplit(".", 1)[-1]],
        }
        for i, v in enumerate(program.arguments)
        if v.kind == "cache"
    ]
    return {
        "arguments": arguments,
        "bytes": _local_bytes(program, "cache"),
        "global_bytes": sum(v.nbytes for v in program.arguments if v.kind == "cache"),
        "length": program.shape.length,
        "capacity": program.cache.capacity,
        "capacity_rule": _CAPACITY,
        "rule": _RULE,
    }
