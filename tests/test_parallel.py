"""Whole models on meshes of virtual devices: the answer of one device, whatever the plan."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import rng, worst
from helpers_parallel import MODELS, PLANS, PROMPTS, TOKENS, engine_on, folder, one_engine, part, scored

from dsjax.config import load_config
from dsjax.generate import Engine
from dsjax.layout import working_plans
from dsjax.sampling import Sampling

BOUND = {"v4": 2e-5}
"""Of the largest logit; 1e-5 for the others."""


def _drawn(name: str) -> str:
    """A plan that works, by the run's seed."""
    attention = str(rng(61, len(name)).choice(["heads", "slots"] if name.startswith("v") else ["heads"]))
    devices = int(rng(62, len(name)).choice([4, 6, 8, 12, 16]))
    plans = [p for p in working_plans(load_config(folder(name)), devices, attention) if p.devices == devices]
    return f"{plans[rng(63, len(name)).integers(len(plans))]}{'/slots' if attention == 'slots' else ''}"


def _check(name: str, engine: Engine) -> None:
    """Prefill in two chunks, then token by token; the draft as well."""
    found = {}
    for chunk in (8, 1):
        logits, drafts = engine.score(part(chunk), mtp=name.startswith("v"), chunk=chunk)
        expected, expected_drafts = scored(name, chunk)
        found[f"T = {chunk}"] = worst(logits, expected)
        np.testing.assert_array_equal(logits.argmax(axis=-1), expected.argmax(axis=-1))
        if expected_drafts is not None and drafts is not None:
            found[f"draft, T = {chunk}"] = worst(drafts, expected_drafts)
    print(f"{name}:", ", ".join(f"{what}: {error:.1e}" for what, error in found.items()))
    assert max(found.values()) <= BOUND.get(name, 1e-5), found


_CASES = [
    pytest.param(name, plan, marks=() if i == rng(60, len(name)).integers(len(plans)) else pytest.mark.full)
    for name, plans in PLANS.items()
    for i, plan in enumerate(plans)
]


@pytest.mark.parametrize(("name", "plan"), _CASES)
def test_a_plan_gives_the_logits_of_one_device(name: str, plan: str) -> None:
    _check(name, engine_on(name, plan))


@pytest.mark.parametrize("name", MODELS)
def test_any_plan_gives_the_logits_of_one_device(name: str) -> None:
    """Drawn from all that work, for 4 to 16 devices."""
    plan = _drawn(name)
    print(f"{name}: {plan}")
    _check(name, engine_on(name, plan))


_AUTO = [("v3", "ep=2,tp=2"), ("v32", "tp=2"), ("v4", "tp=8"), ("qwen2", "dp=2,tp=4"), ("v3", "dp=2,ep=2/slots")]


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        pytest.param(*c, marks=() if i == rng(64).integers(len(_AUTO)) else pytest.mark.full)
        for i, c in enumerate(_AUTO)
    ],
)
def test_the_partitioner_gives_the_logits_of_one_device(name: str, plan: str) -> None:
    """`--spmd auto`: the same body without named axes, an independent check of the collectives."""
    _check(name, engine_on(name, plan, spmd="auto"))


_HELD = [
    ("v3", "ep=2,tp=2", "int8"),
    ("v3", "ep=4/slots", "bfloat16"),
    ("v32", "tp=4", "int8"),
    ("v4", "ep=2,tp=4", "bfloat16"),
    ("qwen2", "tp=8", "fp8"),
    ("qwen2", "tp=4", "int8"),
]


@pytest.mark.parametrize(
    ("name", "plan", "weights"),
    [
        pytest.param(*c, marks=() if i == rng(65).integers(len(_HELD)) else pytest.mark.full)
        for i, c in enumerate(_HELD)
    ],
)
def test_converted_weights_on_a_mesh(name: str, plan: str, weights: str) -> None:
    """`--weights`: each device converts its own part, to what one device holds."""
    found, _ = engine_on(name, plan, weights=weights).score(part(8), chunk=8)
    expected, _ = one_engine(name, weights=weights).score(part(8), chunk=8)
    print(f"{name} {plan} {weights}: {worst(found, expected):.1e}")
    assert worst(found, expected) <= BOUND.get(name, 1e-5)
    np.testing.assert_array_equal(found.argmax(axis=-1), expected.argmax(axis=-1))


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(0.8, seed=3), Sampling(0.9, top_k=7, seed=4), Sampling(1.1, top_p=0.7, seed=5)],
    ids=["greedy", "temperature", "top-k", "top-p"],
)
def test_sampling_from_a_split_vocabulary(sampling: Sampling) -> None:
    """The same tokens as one device draws, three prompts of unequal length in four slots of a mesh."""
    many = _slots_engine()
    expected, _ = one_engine("v3").generate(PROMPTS, 5, sampling)
    found, _ = many.generate(PROMPTS, 5, sampling)
    assert [o.ids for o in found] == [o.ids for o in expected]


_KEPT: dict[str, Engine] = {}


def _slots_engine() -> Engine:
    if "slots" not in _KEPT:
        _KEPT["slots"] = engine_on("v3", "dp=2,ep=2,tp=2/slots")
    return _KEPT["slots"]


def test_a_sequence_goes_on_elsewhere() -> None:
    """Taken out of a mesh's cache, put into one device's and another mesh's: the tokens that would have come."""
    from dsjax.cache import extract, insert

    many, one = _slots_engine(), one_engine("v3")
    step, _ = many._scoring(many.cache(4, 24), None)
    prompt = np.pad(TOKENS[:, :8], [(0, 1), (0, 0)]).astype(np.int32)
    _, _, cache = step(many.params, many.cache(4, 24), prompt, np.array([8, 8, 8, 0], np.int32))
    state = extract(cache, 1)
    there, _ = one._scoring(None, None)
    here = insert(one.cache(2, 40), 1, state)
    rest = np.pad(TOKENS[1:2, 8:], [(1, 0), (0, 0)]).astype(np.int32)
    logits, _, _ = there(one.params, here, rest, np.array([0, 8], np.int32))
    back = insert(many.cache(4, 24), 3, state)
    again, _, _ = step(many.params, back, np.pad(rest[1:], [(3, 0), (0, 0)]), np.array([0, 0, 0, 8], np.int32))
    expected = scored("v3", 8)[0][1, 8:]
    assert worst(np.asarray(logits)[1], expected) <= 1e-5
    assert worst(np.asarray(again)[3], expected) <= 1e-5
