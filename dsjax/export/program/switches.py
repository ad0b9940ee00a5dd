"""Flags of `dsjax export` that change what operators a program has: what a profile may name as remedy."""

from __future__ import annotations

from collections.abc import Mapping

from dsjax.export.program.targets import TARGETS
from dsjax.parallel import SPMD

TOP_K: Mapping[str, Mapping[str, str]] = {
    "chlo": {},
    "sort": {"top_k": "sort"},
    "loop": {"top_k": "loop", "sort_assignments": "count"},
}
"""Variants of operators by value of `--topk`."""

MOE = ("loop", "ragged", "dense")
NUMERICS = ("plain", "native")

SWITCHES: Mapping[str, tuple[str, ...]] = {
    "--target": tuple(TARGETS),
    "--topk": tuple(TOP_K),
    "--moe": MOE,
    "--spmd": SPMD,
    "--numerics": NUMERICS,
}
"""All values of each."""
