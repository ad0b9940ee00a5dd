"""The step compiled for chips that are not there: XLA's own account of memory, operations and collectives.

libtpu compiles for any TPU topology on any x86-64 Linux machine (`jax.experimental.topologies`). Nothing is loaded and
nothing runs: parameters, cache and tokens are shapes with shardings.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import resource
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from dsjax.errors import InputError
from dsjax.generate import sampled_step
from dsjax.models import family
from dsjax.parallel import EVERYWHERE, Parallel, padded, parallel
from dsjax.params import tree_bytes
from dsjax.plan.memory import Load, activation_bytes, workspace_bytes
from dsjax.plan.placement import Model, Placement
from dsjax.plan.traffic import collectives as planned_collectives
from dsjax.sampling import Sampling
from quant.operator import choosing
from sharding import Plan
from sharding.collectives import Collective, collectives, summary
from sharding.footprint import Held, largest
from sharding.hlo import parse

LIBTPU = "libtpu, of the version that jax[tpu] names"


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a compiled step is for.

    Attributes:
      batch: sequences; filled up to what the plan splits.
      tokens: new ones per sequence, T.
      context: positions of the cache.
    """

    batch: int
    tokens: int
    context: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What XLA says of a compiled step; bytes are of one device.

    Attributes:
      argument_bytes, output_bytes, temp_bytes, alias_bytes: XLA's memory analysis. Outputs that are donated arguments
        are in `alias_bytes`.
      counted_bytes: parameters and cache by our own count, without a backend's padding.
      cache_bytes: of that, the cache.
      flops: XLA's own figure, in which a loop counts once on TPU.
      collectives: of the program, loops counted.
      largest: arrays that the program writes, the largest first.
      seconds: of lowering and compiling; peak_rss_bytes: of the process, so far.
    """

    argument_bytes: int
    output_bytes: int
    temp_bytes: int
    alias_bytes: int
    counted_bytes: int
    cache_bytes: int
    flops: float
    collectives: list[Collective]
    largest: list[Held]
    seconds: float
    peak_rss_bytes: int


def topology_devices(name: str) -> list[jax.Device]:
    """The devices of a TPU topology such as "v5p:4x4x4" (64 chips) or "tpu7x:4x4x4" (64 chips, two devices each).

    Raises:
      InputError: without libtpu, or if it knows no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(f"--aot {name}: expected {LIBTPU}, found none installed")
    # libtpu asks a cloud machine's metadata server, and for its neighbours, unless told not to.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is taken, so no lock need be
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        return list(topologies.get_topology_desc(name, "tpu").devices)
    except Exception as e:  # of several types, by version
        reason = " ".join(str(e).split())[:200]
        raise InputError(
            f"--aot {name}: expected a topology like v5p:4x4x4, found none of that name: {reason}"
        ) from None


def compile_step(model: Model, many: Parallel, shape: Shape) -> Compiled:
    """The sampled step, compiled from shapes.

    Raises:
      InputError: with the compiler's reason, if it refuses the program.
    """
    config, numerics = model.config, model.numerics.for_platform("tpu")
    params = model.params(many.layout)
    batch = padded(shape.batch, many.slots)
    cache = jax.eval_shape(partial(family(config).new_cache, config, numerics, batch, shape.context))
    param_specs, cache_specs = many.layout.param_specs(params, config), many.layout.cache_specs(cache)
    body = partial(sampled_step, config, numerics, Sampling(), config.vocab_size, many.rules)
    start = time.perf_counter()
    function = many.program(body, params, cache, [EVERYWHERE] * 4, [EVERYWHERE], donate_argnums=1)
    row = jax.ShapeDtypeStruct((batch,), jnp.int32)
    new = jax.ShapeDtypeStruct((batch, shape.tokens), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    try:
        with choosing({}, "tpu"):
            compiled = function.lower(params, cache, new, row, key, row).compile()
    except jax.errors.JaxRuntimeError as e:
        raise InputError(f"the compiler: {' '.join(str(e).split())[:300]}") from None
    seconds = time.perf_counter() - start
    text = compiled.as_text()
    analysis, cost = compiled.memory_analysis(), compiled.cost_analysis()
    local, local_cache = many.layout.local(params, param_specs), many.layout.local(cache, cache_specs)
    return Compiled(
        argument_bytes=analysis.argument_size_in_bytes,
        output_bytes=analysis.output_size_in_bytes,
        temp_bytes=analysis.temp_size_in_bytes,
        alias_bytes=analysis.alias_size_in_bytes,
        counted_bytes=tree_bytes(local) + tree_bytes(local_cache),
        cache_bytes=tree_bytes(local_cache),
        flops=cost.get("flops", 0.0),
        collectives=collectives(text),
        largest=largest(parse(text)),
        seconds=seconds,
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def account(found: Compiled, placement: Placement, shape: Shape) -> dict[str, Any]:
    """A compiled step beside what the planner says of it."""
    slots = placement.slots(shape.batch)
    planned = planned_collectives(placement, slots, shape.tokens)
    top = max(found.collectives, key=lambda c: c.array_bytes, default=None)
    array = found.largest[0] if found.largest else None
    bound = activation_bytes(placement, slots, shape.tokens) + workspace_bytes(placement, slots, shape.tokens)
    return {
        "tokens": shape.tokens,
        "argument_bytes": found.argument_bytes,
        "counted_bytes": found.counted_bytes,
        "cache_bytes": found.cache_bytes,
        "alias_bytes": found.alias_bytes,
        "temp_bytes": found.temp_bytes,
        "temp_bound_bytes": bound,
        "flops": found.flops,
        "sent_bytes": {kind: round(total.sent) for kind, total in summary(found.collectives).items()},
        "planned_sent_bytes": round(sum(c.sent for c in planned)),
        "largest_collective": None if top is None else {"kind": top.kind, "bytes": top.array_bytes},
        "largest_planned_collective_bytes": round(max((c.nbytes for c in planned), default=0)),
        "largest_array": None if array is None else {"bytes": array.nbytes, "type": ", ".join(array.types)},
        "seconds": found.seconds,
        "peak_rss_bytes": found.peak_rss_bytes,
    }


def ahead_of_time(model: Model, plan: Plan, attention: str, load: Load, topology: str) -> dict[str, Any]:
    """A prefill step and a decode step, compiled for the first devices of a topology: see `Compiled`.

    Args:
      model, plan, attention, load: as the planner has them.
      topology: see `topology_devices`.

    Raises:
      InputError: see `topology_devices` and `compile_step`; for a topology with fewer devices than the plan.
    """
    many = parallel(model.config, plan, model.numerics, attention=attention, devices=topology_devices(topology))
    placement = Placement(model, many.layout)
    result: dict[str, Any] = {"topology": topology, "device": many.mesh.devices.flat[0].device_kind}
    for name, tokens in (("decode", 1), ("prefill", load.tokens)):
        shape = Shape(load.batch, tokens, load.context)
        result[name] = account(compile_step(model, many, shape), placement, shape)
    return result
