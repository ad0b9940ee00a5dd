"""Meshes and axis rules. Knows no model."""

from sharding.mesh import AXES, Plan, make_mesh, parse_plan
from sharding.rules import Rules, partition_spec

__all__ = ["AXES", "Plan", "Rules", "make_mesh", "parse_plan", "partition_spec"]
