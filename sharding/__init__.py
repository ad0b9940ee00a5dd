"""Meshes, axis rules and collectives. Knows no model."""

from sharding.mesh import AXES, Plan, inner_axes, make_mesh, mesh_axes, parse_plan
from sharding.rules import UNSPLIT, Axes, Rules, gather, scatter_sum

__all__ = [
    "AXES",
    "UNSPLIT",
    "Axes",
    "Plan",
    "Rules",
    "gather",
    "inner_axes",
    "make_mesh",
    "mesh_axes",
    "parse_plan",
    "scatter_sum",
]
