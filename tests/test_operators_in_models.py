"""Operators in whole models: every variant, functions of their own, taps, and branches that stay independent."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import helpers_v4
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FLOAT32, SEED, counts, golden, rng, worst
from jaxlib.mlir import ir

from dsjax.export.stablehlo.inventory import inventory
from dsjax.generate import Engine
from dsjax.layers.ffn import MoE
from dsjax.layers.norm import rms_norm
from dsjax.models import family
from dsjax.numerics import Numerics
from dsjax.plan.counted import QUICK
from dsjax.sampling import Sampling
from quant.operator import OPERATORS, choosing, find, outlining, tapping

SPARSE = ("v3-fp8-ue8m0", "v32-float32", "periods")  # V3, V3.2, V4
V4 = [pytest.param(name, marks=pytest.mark.full) for name in helpers_v4.WHOLE]  # its two schedules
MODELS = (*SPARSE, "qwen2-untied", *V4)


def summation(name: str) -> float:
    """What summation order may do to logits, of the largest (design section 6)."""
    return 2e-5 if name in helpers_v4.MODELS else 1e-5


@dataclasses.dataclass(frozen=True, eq=False)
class Twin:
    """A model of few narrow layers, and what one step takes: tokens int32 [2, T], cache."""

    config: Any
    params: Any
    tokens: jax.Array
    cache: Any

    def step(self, numerics: Numerics = FLOAT32) -> Callable[..., Any]:
        """(params, cache, tokens, n_new) -> (logits of all, hidden, cache); a new function each time."""
        return partial(family(self.config).step, self.config, numerics, want="all")

    @property
    def inputs(self) -> tuple[Any, ...]:
        return self.params, self.cache, self.tokens, counts(*[self.tokens.shape[1]] * 2)

    def run(self, quick: bool = True) -> tuple[Any, Any]:
        """Logits and the new cache, compiled here."""
        logits, _, cache = jax.jit(self.step(), compiler_options=QUICK if quick else {})(*self.inputs)
        return np.asarray(logits), jax.tree.map(np.asarray, cache)


@lru_cache
def twin(name: str) -> Twin:
    model: Any = helpers_v4.model(name) if name in helpers_v4.MODELS else golden(name)
    length = 64 if name in helpers_v4.MODELS else 20  # 16 entries of a CSA layer, of which 12 are chosen
    tokens = jnp.asarray(np.tile(model.tokens, (2, 1))[:2, :length], jnp.int32)
    cache = family(model.config).new_cache(model.config, FLOAT32, 2, tokens.shape[1] + 4)
    return Twin(model.config, model.params, tokens, cache)


@lru_cache
def reference(name: str) -> tuple[Any, Any]:
    return twin(name).run()


CHOOSE = ("moe_gate", "sqrtsoftplus_gate", "lightning_indexer")


class Recorder:
    """A Sink that counts calls, and keeps what was chosen in which order."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.layers: list[int] = []
        self.wrong: list[str] = []
        self.picks: list[tuple[str, np.ndarray]] = []

    def layer(self, number: int) -> None:
        self.layers.append(number)

    def call(self, operator: str, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> None:
        self.calls[operator] += 1
        if not inputs or not outputs or not all(isinstance(a, np.ndarray) for a in (*inputs, *outputs)):
            self.wrong.append(operator)
        if operator in CHOOSE:
            self.picks.append((operator, np.array(outputs[0])))


@lru_cache
def tapped(name: str) -> tuple[Recorder, Any]:
    recorder = Recorder()
    with tapping(recorder):
        logits, _ = twin(name).run()
    jax.effects_barrier()
    return recorder, logits


@lru_cache
def outlined(name: str) -> Any:
    with outlining():
        return jax.jit(twin(name).step()).lower(*twin(name).inputs)


# --- every variant ---------------------------------------------------------------------------------------------------


def rounds() -> Iterator[dict[str, str]]:
    """Choices such that every variant but the first is in one of them."""
    several = {name: list(o.variants)[1:] for name, o in sorted(OPERATORS.items()) if len(o.variants) > 1}
    for i in range(max(map(len, several.values()))):
        yield {name: variants[i] for name, variants in several.items() if i < len(variants)}


SINGLE = [{name: variant} for c in rounds() for name, variant in c.items()]


def agree(name: str, choices: dict[str, str]) -> None:
    """Logits are off by no more than the variants' bounds, once for every call in a row, beside summation order."""
    with choosing(choices):
        logits, _ = twin(name).run()
    assert np.isfinite(logits).all()
    calls = tapped(name)[0].calls
    bound = sum(find(o).variants[v].bound * max(1, calls[o]) for o, v in choices.items())
    assert worst(logits, reference(name)[0]) <= bound + summation(name), (choices, f"seed {SEED}")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("choices", list(rounds()), ids=lambda c: ",".join(c.values()))
def test_variants_all_at_once(name: str, choices: dict[str, str]) -> None:
    agree(name, choices)


@pytest.mark.full
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("choices", SINGLE, ids=lambda c: "".join(f"{o}={v}" for o, v in c.items()))
def test_variants_one_by_one(name: str, choices: dict[str, str]) -> None:
    agree(name, choices)


@pytest.mark.parametrize("name", [*SPARSE, *V4])
def test_without_a_sort_the_same_is_chosen(name: str) -> None:
    """`--topk loop`: experts, keys and entries are those that the sorts choose, token by token; and no sort is left."""
    choices, loop = {"top_k": "loop", "sort_assignments": "count"}, Recorder()
    with choosing(choices), tapping(loop):
        twin(name).run()
    jax.effects_barrier()
    first, second = tapped(name)[0].picks, loop.picks
    assert len(first) == len(second) > 0
    for (operator, ids), (other, same) in zip(first, second, strict=True):
        assert operator == other and ids.dtype == np.int32
        np.testing.assert_array_equal(ids, same, err_msg=operator)
    with choosing(choices):
        text = jax.jit(twin(name).step()).lower(*twin(name).inputs).as_text()
    assert "stablehlo.sort" not in text and "chlo.top_k" not in text


def test_an_engine_keeps_programs_by_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled steps, and those of scoring, each under the choice that it is called with."""
    model = golden("qwen2-untied")
    engine = Engine(model.config, model.params, FLOAT32)
    cache, new = engine.cache(1, 8), model.tokens[:1, :4]
    texts, logits = [], []
    monkeypatch.setattr(rms_norm, "variants", dict(rms_norm.variants))
    rms_norm.variant("reversed", bound=1.0)(lambda *args: rms_norm.variants["lax"].body(*args)[..., ::-1])
    for choices in ({}, {"rms_norm": "reversed"}) * 2:
        with choosing(choices):
            texts.append(engine.compiled(cache, 16, Sampling()).as_text())
            logits.append(engine.score(new)[0])
    assert texts[0] is not texts[1] and texts[0] == texts[2] != texts[1] == texts[3]
    for i in (0, 1):
        np.testing.assert_array_equal(logits[i], logits[i + 2])
    assert worst(logits[1], logits[0]) > 0.1 and len(engine._compiled) == 3  # two steps, and one function that scores


# --- functions of their own, and taps --------------------------------------------------------------------------------


BRANCHES = {"v32-float32": {"mla", "sparse_mla", "lightning_indexer"}}
"""Operators in a branch that depends on how many tokens there are: the inventory counts both sides."""


@pytest.mark.parametrize("name", MODELS)
def test_calls_in_the_text_times_trips_are_the_calls_of_a_run(name: str) -> None:
    recorder, _ = tapped(name)
    assert not recorder.wrong
    module = outlined(name).compiler_ir("stablehlo")
    named = inventory(module)["named"]
    apart = BRANCHES.get(name, set())
    text = {o: e["executed"] for o, e in named.items() if o not in apart}
    assert text == {o: n for o, n in recorder.calls.items() if o not in apart}
    assert not any(entry["dynamic"] for entry in named.values())
    layers = twin(name).config.num_hidden_layers
    for operator in apart:
        assert named[operator]["executed"] == layers
    if apart:  # 20 tokens, of which 12 may be chosen: never all
        assert (recorder.calls["mla"], recorder.calls["sparse_mla"]) == (0, layers)
    assert [n for n in recorder.layers if n >= 0] == list(range(layers))


@pytest.mark.parametrize("name", MODELS)
def test_taps_and_functions_change_no_result(name: str) -> None:
    """Functions of their own: bit for bit, the cache, too. Taps: within summation order, for XLA fuses less."""
    quick = name != "qwen2-untied"  # others take long to compile in full
    plain, cache = reference(name) if quick else twin(name).run(quick)
    with outlining():
        logits, other = twin(name).run(quick)
    np.testing.assert_array_equal(logits, plain)
    jax.tree.map(np.testing.assert_array_equal, cache, other)
    assert worst(tapped(name)[1], reference(name)[0]) <= summation(name)


# --- shared and routed experts ---------------------------------------------------------------------------------------


def operations(block: Any) -> list[tuple[Any, set[Any]]]:
    """(operation, values that it uses), of the top level of a block; what is inside an operation counts as its own."""

    def inside(operation: Any, own: set[Any]) -> Iterator[Any]:
        for inner in (b for region in operation.regions for b in region.blocks):
            own.update(inner.arguments)
            for each in inner.operations:
                yield from inside(each.operation, own)
        own.update(operation.results)
        yield from operation.operands

    found = []
    for each in block.operations:
        own: set[Any] = set()
        used = set(inside(each.operation, own))
        found.append((each.operation, used - own))
    return found


@pytest.mark.parametrize("family_name", ["v3-fp8-ue8m0", "periods"])
@pytest.mark.parametrize("mode", ["plain", "native"])
def test_shared_and_routed_experts_meet_at_one_addition(family_name: str, mode: str) -> None:
    """In the StableHLO of a mixture of experts, nothing that either computes reaches the other before they are added:
    a compiler may run them side by side."""
    numerics = FLOAT32 if mode == "plain" else Numerics("native", pow2=True)
    model = twin(family_name)
    stacks = [g for g in model.params.values() if isinstance(g, dict) and "router" in g]
    leaves = {part: stacks[0][part] for part in ("router", "shared", "experts")}
    tokens, k = 12, model.config.num_experts_per_tok

    def run(params: Any, x: jax.Array, valid: jax.Array) -> jax.Array:
        moe = MoE(model.config, numerics, params)
        gate = lambda scores: (jax.lax.top_k(scores, k)[1], jax.nn.softmax(jax.lax.top_k(scores, k)[0]))  # noqa: E731
        return moe(x, valid, 0, gate)

    x = jnp.asarray(rng(110).standard_normal((1, tokens, model.config.hidden_size)), numerics.dtype)
    with outlining():
        module = jax.jit(run, keep_unused=True).lower(leaves, x, jnp.ones((1, tokens), bool)).compiler_ir("stablehlo")
    main = next(f for f in module.body.operations if ir.StringAttr(f.attributes["sym_name"]).value == "main")
    block = main.regions[0].blocks[0]
    parts = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(leaves)]
    shared = {a for a, part in zip(block.arguments, parts, strict=False) if "shared" in part}
    routed = {a for a, part in zip(block.arguments, parts, strict=False) if "experts" in part or "router" in part}
    assert len(shared) >= 3 and len(routed) >= 4
    meeting, computed = [], Counter()
    after: set[Any] = set()
    for operation, used in operations(block):
        ours, theirs = bool(used & shared), bool(used & routed)
        if used & after or (ours and theirs):
            if not used & after:
                meeting.append(operation.name)
            after.update(operation.results)
        elif ours or theirs:
            (shared if ours else routed).update(operation.results)
            computed["shared" if ours else "routed"] += 1
    assert meeting == ["stablehlo.add"]
    assert computed["shared"] >= 4 and computed["routed"] >= 4  # four calls of operators or more on either side
