"""Before a model is loaded: are weights and cache more than its devices have?"""

from __future__ import annotations

import os
from collections.abc import Sequence

import jax

from dsjax.errors import InputError
from dsjax.layout import Layout
from dsjax.plan.answer import misfit
from dsjax.plan.memory import Load
from dsjax.plan.placement import Model, Placement
from dsjax.plan.search import Candidate, Cards, alternatives

HELD = ("weights", "scales", "kv", "indexer")
"""Parts that are counted to the byte; the planner's other ones are bounds, which a run may stay below."""


def device_memory(device: jax.Device, sharing: int) -> int | None:
    """Bytes that a device can hold, None where it does not say.

    Args:
      device: of this process.
      sharing: CPU devices that share this host's memory.
    """
    if device.platform == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // sharing
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit")


def check_memory(model: Model, load: Load, layout: Layout, devices: Sequence[jax.Device]) -> None:
    """Refuses a model that the devices cannot hold, with the planner's reason.

    Args:
      model: what is to run.
      load: positions and sequences of its cache.
      layout: how it lies on the devices.
      devices: of the mesh.

    Raises:
      InputError: if weights and cache are more than a device has.
    """
    here = [device for device in devices if device.process_index == jax.process_index()]
    limit = device_memory(here[0], len(here)) if here else None
    if limit is None:
        return
    cards = Cards(len(devices), limit, 0)
    placed = Candidate(Placement(model, layout), load, cards)
    if sum(placed.parts[part] for part in HELD) > limit:
        instead = alternatives(model, cards, load, [placed], free=False)
        share = "; JAX takes three quarters of a GPU's memory unless XLA_CLIENT_MEM_FRACTION says otherwise"
        hint = share if here[0].platform in ("gpu", "cuda", "rocm") else ""
        raise InputError(f"not enough memory: {misfit(placed, instead)}{hint}")
