"""Before a model is loaded: are weights and cache more than its devices have?"""

from __future__ import annotations

import os
from collections.abc import Sequence

import jax

from dsjax.errors import InputError
from dsjax.plan.answer import answer
from dsjax.plan.memory import Load
from dsjax.plan.placement import Model
from dsjax.plan.search import Cards
from sharding import Plan

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


def check_memory(
    model: Model, load: Load, devices: Sequence[jax.Device], plan: Plan | None = None, attention: str = "heads"
) -> None:
    """Refuses a model that the devices cannot hold, with the planner's reason.

    Args:
      model: what is to run.
      load: positions and sequences of its cache.
      devices: of the mesh.
      plan, attention: how it lies on them; on one device by default.

    Raises:
      InputError: if weights and cache are more than a device has.
    """
    here = [device for device in devices if device.process_index == jax.process_index()]
    limit = device_memory(here[0], len(here)) if here else None
    if limit is None:
        return
    result = answer(model, Cards(len(devices), limit, 0), load, plan or Plan(), attention)
    if sum(result["bytes_per_card"][part] for part in HELD) > limit:
        raise InputError(f"not enough memory: {result['reason']}")
