"""Meshes, axis rules, collectives and expert dispatch. Knows no model."""

from sharding.dispatch import expert_parallel
from sharding.dispatch_plan import DISPATCHES, choose_dispatch, destinations, dispatch_bytes
from sharding.mesh import AXES, Plan, inner_axes, make_mesh, mesh_axes, parse_plan
from sharding.rules import UNSPLIT, Axes, Rules, gather, scatter_sum

__all__ = [
    "AXES",
    "DISPATCHES",
    "UNSPLIT",
    "Axes",
    "Plan",
    "Rules",
    "choose_dispatch",
    "destinations",
    "dispatch_bytes",
    "expert_parallel",
    "gather",
    "inner_axes",
    "make_mesh",
    "mesh_axes",
    "parse_plan",
    "scatter_sum",
]
