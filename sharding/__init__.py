"""Meshes and axis rules; what compiled programs move between devices. Knows no model."""

from sharding.collectives import Collective, Totals, by_scope, collectives, summary
from sharding.mesh import AXES, Plan, make_mesh, parse_plan
from sharding.rules import Rules, partition_spec

__all__ = [
    "AXES",
    "Collective",
    "Plan",
    "Rules",
    "Totals",
    "by_scope",
    "collectives",
    "make_mesh",
    "parse_plan",
    "partition_spec",
    "summary",
]
