"""What a compiled step exchanges between devices, beside what the planner says it does (`plan.traffic`).

The step is compiled from shapes alone, at any size, for devices that may be virtual.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dsjax.generate import sampled_step
from dsjax.models import family
from dsjax.parallel import EVERYWHERE, Parallel
from dsjax.plan.placement import Model, Placement
from dsjax.plan.traffic import collectives as planned_collectives
from dsjax.sampling import Sampling
from sharding.collectives import Collective

FEW = "other"
"""Name of what closed forms leave out: ids, numbers of rounds, drawn candidates."""

QUICK: dict[str, Any] = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Options of XLA:CPU for a program that is only to be looked at: the same collectives, machine code made sooner."""


def lowered_step(parted: Parallel, model: Model, batch: int, tokens: int, context: int) -> jax.stages.Lowered:
    """The greedy step as `generate` compiles it, from shapes.

    Args:
      parted: the mesh, and who places collectives.
      model: what is to run.
      batch: slots of all devices.
      tokens: new ones of every slot, T.
      context: positions of every slot's cache.
    """
    config, numerics = model.config, model.numerics
    params = model.params(parted.layout)
    cache = jax.eval_shape(partial(family(config).new_cache, config, numerics, batch, context))
    body = partial(sampled_step, config, numerics, Sampling(), config.vocab_size, parted.rules)
    step = parted.program(body, params, cache, [EVERYWHERE] * 4, [EVERYWHERE], donate_argnums=1)
    new, row = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((batch, tokens), (batch,)))
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    lowered: jax.stages.Lowered = step.lower(params, cache, new, row, key, row)
    return lowered


def planned_bytes(placement: Placement, slots: int, tokens: int) -> dict[str, float]:
    """Bytes that one device sends in a step, by kind of collective: the closed forms.

    Args:
      slots: of one device.
      tokens: new ones of every slot.
    """
    return _added((c.kind, c.sent) for c in planned_collectives(placement, slots, tokens))


def counted_bytes(found: Iterable[Collective]) -> dict[str, float]:
    """The same, counted in a compiled program; what closed forms leave out under FEW.

    Rounds of an exchange, whose number is data, count once, as in the closed forms. What XLA:CPU widens from bfloat16
    to float32 counts as bfloat16.
    """
    return _added((FEW if is_few(c) else c.kind, asked(c)) for c in found)


def is_few(collective: Collective) -> bool:
    """Whether it moves ids, numbers of rounds or drawn candidates."""
    signed = all(dtype.startswith("s") for dtype in collective.dtypes)
    return signed or collective.scope.split("/")[0] == "sample"


def asked(collective: Collective) -> float:
    """Bytes that a device sends in a run of the program, in the width that the program asks for."""
    return collective.total_sent / (2 if collective.promoted else 1)


def _added(parts: Iterable[tuple[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for name, nbytes in parts:
        total[name] = total.get(name, 0.0) + nbytes
    return total
