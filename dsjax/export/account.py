"""memory.json and cost.json: what one rank holds and does, by the planner's formulas."""

from __future__ import annotations

import math
from typing import Any

from dsjax.export.program import Program, is_draft
from dsjax.plan.memory import activation_bytes, workspace_bytes
from dsjax.plan.placement import Model, Placement
from dsjax.plan.roofline import work

CARDS = (16, 24, 32, 64, 80, 96, 128, 141, 192)
"""GB of memory that cards come with."""


def _local_bytes(program: Program, kind: str, results: bool = False) -> int:
    """Of one rank."""
    exporter, total = program.exporter, 0
    for value in program.results if results else program.arguments:
        if value.kind == kind:
            bounds = value.slice(0, exporter.layout.rules.extents) if exporter.ranks > 1 else None
            part = value.spec.shape if bounds is None else [b - a for a, b in bounds]
            total += value.nbytes * math.prod(part) // math.prod(value.spec.shape)
    return total


def memory(program: Program, model: Model) -> dict[str, Any]:
    """Bytes of one rank.

    Parameters, caches, inputs and outputs are exact. Temporaries are a bound by formula (`dsjax.plan.memory`): what a
    compiler makes of a program is its own affair.
    """
    shape, placement = program.shape, Placement(model, program.exporter.layout)
    slots = placement.slots(shape.batch)
    temporary = activation_bytes(placement, slots, shape.tokens) + workspace_bytes(placement, slots, shape.tokens)
    found: dict[str, Any] = {
        "parameters": _local_bytes(program, "param"),
        "cache": _local_bytes(program, "cache"),
        "inputs": _local_bytes(program, "input"),
        "outputs": _local_bytes(program, "output", results=True),
        "temporaries_bound": temporary,
        "aliased": _local_bytes(program, "cache"),
    }
    found["total"] = sum(found[name] for name in ("parameters", "cache", "inputs", "outputs", "temporaries_bound"))
    found["smallest_card_gb"] = next((gb for gb in CARDS if found["total"] <= gb * 1_000_000_000), None)
    return found


def cost(program: Program, model: Model) -> dict[str, Any]:
    """One rank's operations and bytes in a step whose sequences then hold `length` tokens, by closed forms."""
    shape, placement = program.shape, Placement(model, program.exporter.layout)
    slots = placement.slots(shape.batch)
    if is_draft(shape.phase):
        return {"note": "not counted: the draft module is one layer and the head"}
    found = work(placement, slots, shape.tokens, shape.length)
    return {
        "tokens": slots * shape.tokens,
        "flops": found.flops,
        "flops_by_module": found.parts,
        "flops_per_token": sum(found.flops.values()) / (slots * shape.tokens),
        "weight_bytes": found.weight_bytes,
        "cache_bytes": found.cache_bytes,
        "bytes_per_token": (found.weight_bytes + found.cache_bytes) / (slots * shape.tokens),
    }
