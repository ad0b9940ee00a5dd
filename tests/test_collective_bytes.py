"""Closed forms held against the compiled step and real arrays: bytes that devices send, bytes that they hold."""

from __future__ import annotations

from typing import Any

import jax
import pytest
from helpers import FLOAT32, rng
from helpers_parallel import MODELS, PLANS, arrange, folder

from dsjax.config import load_config
from dsjax.generate import Engine
from dsjax.numerics import Numerics
from dsjax.parallel import load_onto
from dsjax.plan.counted import FEW, QUICK, counted_bytes, lowered_step, planned_bytes
from dsjax.plan.memory import Load, memory
from dsjax.plan.placement import Placement, load_model
from sharding.collectives import collectives

NATIVE = {"v3": ["ep=4/slots", "ep=8/sent"], "v32": ["ep=8/slots"], "v4": ["ep=4/slots", "ep=8/sent"]}
"""Plans where nothing that native quantises is cut, though all of the models' widths are below a group of channels."""


def sampled(salt: int, cases: list[tuple[Any, ...]], names: tuple[str, ...] = tuple(MODELS)) -> list[Any]:
    """One case of each of these families, by the run's seed, goes with the default run, the others are `full`."""
    own = [[case for case in cases if case[0] == name] for name in names]
    kept = [of_one[rng(salt, i).integers(len(of_one))] for i, of_one in enumerate(own)]
    return [pytest.param(*case, marks=() if case in kept else pytest.mark.full) for case in cases]


_STEPS: list[tuple[Any, ...]] = [
    (name, plan, mode, tokens)
    for mode, of_mode in (("plain", PLANS), ("native", NATIVE))
    for name, plans in of_mode.items()
    for plan in plans
    for tokens in (1, 32)
]


@pytest.mark.parametrize(("name", "plan", "mode", "tokens"), sampled(65, _STEPS, ("v3", "v4", "llama")))
def test_a_compiled_step_sends_what_is_planned(name: str, plan: str, mode: str, tokens: int) -> None:
    """Decode and prefill, by kind of collective; in bfloat16, too. Beside them ids and candidates, which are few."""
    numerics = Numerics(mode).for_checkpoint(load_config(folder(name)))
    model = load_model(str(folder(name)), numerics)
    parted = arrange(model.config, plan, numerics)
    batch = 16
    compiled = lowered_step(parted, model, batch, tokens, 64).compile(QUICK)
    counted = counted_bytes(collectives(compiled.as_text()))
    planned = planned_bytes(Placement(model, parted.layout), batch // parted.slots, tokens)
    few = counted.pop(FEW, 0)
    assert counted == pytest.approx(planned, rel=1e-9)
    # The batch's ids; a score and an id for each of a device's parts of the vocabulary, then the drawn ids; two numbers
    # of rounds in each layer.
    assert few <= 4 * batch * (tokens + 2 * parted.mesh.size + 1) + 16 * model.config.num_hidden_layers


_HELD: list[tuple[Any, ...]] = [
    (name, plan, weights)
    for name, plans in PLANS.items()
    for plan in plans
    for weights in ("stored", "int8", "fp8", "bfloat16", "float16", "w8a8")
]


@pytest.mark.parametrize(("name", "plan", "weights"), sampled(66, _HELD))
def test_devices_hold_what_is_planned(name: str, plan: str, weights: str) -> None:
    """A checkpoint loaded onto a mesh, and its cache: to the byte, on every device."""
    model = load_model(str(folder(name)), FLOAT32, weights)
    parted = arrange(model.config, plan)
    _, params, _ = load_onto(parted, folder(name), mtp=False, weights=weights)
    engine = Engine(model.config, params, FLOAT32, parallel=parted)
    batch, context = 5, 70
    cache = engine.cache(engine.slots(batch), context)
    planned = memory(Placement(model, parted.layout), Load(context, batch), reserve=0)

    def held(tree: Any, device: jax.Device) -> int:
        shards = [shard for a in jax.tree.leaves(tree) for shard in a.addressable_shards if shard.device == device]
        return sum(shard.data.nbytes for shard in shards)

    for device in parted.mesh.devices.flat:
        assert held(params, device) == planned["weights"] + planned["scales"]
        assert held(cache.index, device) == planned["indexer"]
        assert held(cache, device) == planned["kv"] + planned["indexer"]
