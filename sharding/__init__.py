"""Meshes, axis rules and expert dispatch. Knows no model."""

from sharding.dispatch import expert_parallel
from sharding.dispatch_plan import choose_dispatch, destinations, dispatch_bytes
from sharding.mesh import AXES, Plan, make_mesh, parse_plan
from sharding.rules import Rules, partition_spec

__all__ = [
    "AXES",
    "Plan",
    "Rules",
    "choose_dispatch",
    "destinations",
    "dispatch_bytes",
    "expert_parallel",
    "make_mesh",
    "parse_plan",
    "partition_spec",
]
