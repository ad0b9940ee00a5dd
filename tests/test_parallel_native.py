"""Native numerics on meshes of virtual devices, against one device that rounds what a mesh rounds.

Devices' parts are added in float32 before a sum is rounded, so that a mesh differs from one device by the order of
float32 sums alone: a token's logits are equal to 1e-6, but where a rounding to bfloat16 or E4M3 falls the other way.
There are two exceptions, and for each the program of one device can be made to do the same:

- Where tp cuts the experts' width, an expert's output is not rounded by itself: parts are added over experts first.
- Where tokens are sent to their experts, what a rank's experts give a token comes back in bfloat16: a rounding more. It
  is a rank's: where tp cuts experts, too, each of the devices that share a rank's experts sends back its own part of
  their sum, rounded by itself, and the parts are added in float32 after that.

Either is one rounding, of 2^-9 at most, of something that is added to a residual stream larger than itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_parallel import arrange, engine_on, folder, one_engine
from jax.sharding import PartitionSpec as P

from dsjax.cache import Cache
from dsjax.cli.main import main
from dsjax.config import load_config
from dsjax.generate import Engine
from dsjax.layers.ffn import Experts, MoE
from dsjax.layers.gate import moe_gate
from dsjax.numerics import Numerics
from dsjax.parallel import load_onto
from sharding import Rules, parse_plan

NATIVE = Numerics("native")
TOKENS = np.random.default_rng(31).integers(2, 320, (8, 16))
MEDIAN, SAME = 1e-6, 1e-4
"""Of tokens' relative distances, the median's bound; below the other a token counts as the same."""
ROUNDING = 2.0**-8
"""What leaving out, or adding, one rounding to bfloat16 may come to."""

full = pytest.mark.full


def _distances(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """|found - expected| / |expected| of every token."""
    assert found.shape == expected.shape
    norms = np.linalg.norm(expected.astype(np.float64), axis=-1)
    return np.linalg.norm(found.astype(np.float64) - expected, axis=-1) / norms


def _scores(engine: Engine, chunk: int = 16) -> np.ndarray:
    """Logits of all TOKENS; of a chunk of one, of the first few, as decode."""
    return engine.score(TOKENS if chunk > 1 else TOKENS[:, :4], chunk=chunk)[0]


def _narrow(experts: Experts, parts: int) -> list[Experts]:
    """The experts' width, M, in so many parts of whole scale blocks."""

    def split(w: Any, axis: int) -> list[Any]:
        leaves, structure = jax.tree.flatten(w)
        return [structure.unflatten(part) for part in zip(*(jnp.split(a, parts, axis) for a in leaves), strict=True)]

    stacks = {"gate": split(experts.gate[...], 2), "up": split(experts.up[...], 2), "down": split(experts.down[...], 3)}
    return [Experts(experts.config, experts.numerics, {name: stacks[name][i] for name in stacks}) for i in range(parts)]


def _rounded_by_device(
    ranks: int, tp: int, self: MoE, x: jax.Array, choices: jax.Array, weights: jax.Array, valid: jax.Array, layer: Any
) -> jax.Array:
    """`MoE._routed` of one device: device after device of ranks x tp, what each gives a token rounded to bfloat16."""
    size = self.experts.gate[...].shape[1] // ranks
    rows = self.numerics.operand(x, self.experts.gate[...])
    total = jnp.zeros(x.shape, jnp.float32)
    for experts in _narrow(self.experts, tp):
        for rank in range(ranks):
            here = valid[:, None] & (choices // size == rank)
            part = experts.partial_sums(rows, choices, weights, here, layer, choices.size)
            total += self.numerics.round(part).astype(jnp.float32)
    return total


@contextmanager
def _as_on_a_mesh(tp: int, ranks: int) -> Iterator[None]:
    """One device does what a mesh does that cuts experts tp ways, and sends tokens to so many ranks."""
    start = Experts.__init__

    def begin(self: Experts, *args: Any) -> None:
        start(self, *args)
        self.whole = tp == 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Experts, "__init__", begin)
        if ranks > 1:
            patch.setattr(MoE, "_routed", lambda self, *args: _rounded_by_device(ranks, tp, self, *args))
        yield


@lru_cache
def _one(name: str, form: str, chunk: int, tp: int = 1, ranks: int = 1) -> np.ndarray:
    """One device's logits, its experts as `_as_on_a_mesh` says."""
    engine = one_engine(name, Numerics("native", mla=form))
    if tp == ranks == 1:
        return _scores(engine, chunk)
    with _as_on_a_mesh(tp, ranks):
        return _scores(Engine(engine.config, engine.params, engine.numerics), chunk)


def _check(engine: Engine, name: str, form: str, plan: str, chunk: int) -> np.ndarray:
    """Holds a mesh's logits to those of the same roundings; returns tokens' distances from them."""
    rules, sent = engine.rules, "/s" in plan
    ranks = rules.ways("experts") if sent and rules.axes("experts") else 1
    tp = 1 if name.endswith("dense") else rules.ways("expert_ffn")
    found = _scores(engine, chunk)
    distances = _distances(found, _one(name, form, chunk, tp, ranks))
    same, median = (distances <= SAME).mean(), np.median(distances)
    print(f"{name} {form} {plan} T = {chunk}: median {median:.1e}, the same {same:.3f}, most {distances.max():.1e}")
    assert median <= MEDIAN
    assert same >= 0.8
    if tp > 1 or ranks > 1:  # the exception is no more than what it is said to be, and would be noticed
        far = np.median(_distances(found, _one(name, form, chunk)))
        print(f"  from one device as it is: {far:.1e}")
        assert 10 * MEDIAN < far <= ROUNDING
    return distances


CASES = [
    ("v3-wide", "absorbed", "ep=4"),
    pytest.param("v3-wide", "naive", "ep=4", marks=full),
    pytest.param("v3-wide", "absorbed", "ep=2,tp=2", marks=full),
    pytest.param("v3-wide", "naive", "tp=2", marks=full),
    pytest.param("v3-wide", "absorbed", "dp=2,ep=4", marks=full),
    ("v3-wide-dense", "absorbed", "tp=4"),
    pytest.param("v3-wide-dense", "naive", "tp=4", marks=full),
    pytest.param("v32-wide", "auto", "ep=4", marks=full),
    pytest.param("v32-wide", "auto", "ep=2,tp=2", marks=full),
    pytest.param("v32-wide", "auto", "ep=4/slots", marks=full),
    pytest.param("v4-wide", "auto", "tp=2", marks=full),
    pytest.param("v4-wide", "auto", "tp=4", marks=full),
    pytest.param("v3-wide", "absorbed", "ep=4/slots", marks=full),
    ("v3-wide", "absorbed", "ep=4/sent"),
    pytest.param("v3-wide", "absorbed", "dp=2,ep=2,tp=2/slots", marks=full),
    pytest.param("v4-wide", "auto", "ep=4/slots", marks=full),
    pytest.param("v4-wide", "auto", "ep=4/sent", marks=full),
]


@pytest.mark.parametrize(("name", "form", "plan"), CASES)
def test_a_layer_on_a_mesh_gives_what_one_device_gives(name: str, form: str, plan: str) -> None:
    """Prefill of 16 tokens in 8 slots, and one token at a time."""
    engine = engine_on(name, plan, Numerics("native", mla=form))
    for chunk in (16, 1):
        _check(engine, name, form, plan, chunk)


LONG = np.random.default_rng(33).integers(2, 320, (4, 136)).astype(np.int32)


def _beyond_an_entry(engine: Engine) -> np.ndarray:
    """Logits of the tokens of LONG that see V4's first heavily compressed entry, the last two fed one by one."""
    cache, n_new = engine.cache(len(LONG), LONG.shape[1]), partial(np.full, len(LONG), dtype=np.int32)
    step, _ = engine._scoring(cache, None)
    found = []
    for start, end in ((0, 134), (134, 135), (135, 136)):
        logits, _, cache = step(engine.params, cache, LONG[:, start:end], n_new(end - start))
        found.append(np.asarray(logits))
    return np.concatenate(found, axis=1)[:, 128:]


@full
@pytest.mark.parametrize("plan", ["tp=2", "ep=4", "ep=4/slots"])
def test_a_heavily_compressed_layer_gives_what_one_device_gives(plan: str) -> None:
    """V4's layers that compress 128 tokens to one entry, in prefill and decode behind the first."""
    many, one = engine_on("v4-wide-hca", plan, NATIVE), one_engine("v4-wide-hca", NATIVE)
    tp, ranks = many.rules.ways("expert_ffn"), many.rules.ways("experts") if "/s" in plan else 1
    with _as_on_a_mesh(tp, ranks):
        expected = _beyond_an_entry(Engine(one.config, one.params, one.numerics))
    distances = _distances(_beyond_an_entry(many), expected)
    print(f"v4-wide-hca {plan}: median {np.median(distances):.1e}, the same {(distances <= SAME).mean():.3f}")
    assert np.median(distances) <= MEDIAN and (distances <= SAME).mean() >= 0.8


@pytest.mark.parametrize("plan", [pytest.param("ep=4", marks=full), "tp=4"])
def test_copied_output_groups_are_nearest(plan: str) -> None:
    """Two output groups over four devices: each group's products as on one device, or added up from two parts."""
    apart = []
    for how in ("gather", "split"):
        shown = plan if how == "split" else f"{plan}/gather"
        apart.append(_check(engine_on("v4-wide", shown, NATIVE), "v4-wide", "auto", shown, 16))
    assert (apart[0] > SAME).sum() <= (apart[1] > SAME).sum()
    assert apart[0].mean() <= apart[1].mean()


@pytest.mark.parametrize(("name", "plan"), [("v3-wide", "ep=2,tp=2"), pytest.param("v4-wide", "tp=4", marks=full)])
def test_the_partitioner_rounds_where_one_device_does(name: str, plan: str) -> None:
    """`--spmd auto`: it adds up an expert's whole output, so there is no exception."""
    found = _distances(_scores(engine_on(name, plan, NATIVE, spmd="auto")), _one(name, "auto", 16))
    print(f"{name} {plan} auto: median {np.median(found):.1e}, the same {(found <= SAME).mean():.3f}")
    assert np.median(found) <= MEDIAN and (found <= SAME).mean() >= 0.8


def test_sums_of_rounded_parts_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: devices' parts rounded to bfloat16 before they are added are farther than any bound here allows."""
    total = Rules.sum

    def rounded(self: Rules, name: str, x: jax.Array) -> jax.Array:
        return total(self, name, NATIVE.round(x).astype(x.dtype) if x.dtype == jnp.float32 else x)

    monkeypatch.setattr(Rules, "sum", rounded)
    found = _distances(_scores(engine_on("v3-wide-dense", "tp=4", NATIVE)), _one("v3-wide-dense", "auto", 16))
    print(f"rounded parts: median {np.median(found):.1e}, the same {(found <= SAME).mean():.3f}")
    assert np.median(found) > 100 * MEDIAN and (found <= SAME).mean() < 0.1


@full
@pytest.mark.parametrize(("name", "plan"), [("v3-wide", "ep=4"), ("v4-wide", "ep=4")])
def test_the_draft_on_a_mesh(name: str, plan: str) -> None:
    """The draft module on equal hidden states: what the step gives on one device."""
    one = one_engine(name, NATIVE)
    many = engine_on(name, plan, NATIVE)
    counts = np.full(len(TOKENS), TOKENS.shape[1], np.int32)
    caches = [(e.cache(8, 16), e.cache(8, 16, draft=True)) for e in (one, many)]
    (step, draft), (_, other) = one._scoring(*caches[0]), many._scoring(*caches[1])
    _, hidden, _ = step(one.params, caches[0][0], TOKENS.astype(np.int32), counts)
    following = np.roll(TOKENS, -1, axis=1).astype(np.int32)
    expected, _, _ = draft(one.params, caches[0][1], hidden, following, counts)
    found, _, _ = other(many.params, caches[1][1], np.asarray(hidden), following, counts)
    apart = _distances(np.asarray(found), np.asarray(expected))
    print(f"draft {name} {plan}: median {np.median(apart):.1e}, the same {(apart <= SAME).mean():.3f}")
    assert np.median(apart) <= MEDIAN and (apart <= SAME).mean() >= 0.8


# --- what travels to experts -----------------------------------------------------------------------------------------


class _Seen:
    """What experts were given: (token's values, which of all experts are to be computed for it), a row each."""

    def __init__(self) -> None:
        self.rows: list[tuple[bytes, tuple[int, ...]]] = []

    def add(self, first: Any, values: Any, choices: Any, present: Any) -> None:
        present = np.broadcast_to(np.asarray(present).reshape(len(values), -1), np.shape(choices))
        for row, chosen, there in zip(np.asarray(values), np.asarray(choices), present, strict=True):
            if there.any():
                self.rows.append((row.tobytes(), tuple(sorted(int(first) + chosen[there]))))


def _seen(plan: str | None, x: np.ndarray) -> tuple[_Seen, bool]:
    """What the experts of "v3-wide" see of activations [B, T, D], and whether it came as codes."""
    seen, codes, compute = _Seen(), [], Experts.partial_sums
    rules = arrange(load_config(folder("v3-wide")), plan, NATIVE).rules if plan else Rules()

    def record(self: Experts, rows: Any, choices: Any, weights: Any, present: Any, *rest: Any) -> jax.Array:
        codes.append(isinstance(rows, tuple) and rows[0].dtype == jnp.uint8)
        first = rules.rank("experts") * self.gate[...].shape[1]
        jax.debug.callback(seen.add, first, self.numerics.dequantised(rows), choices, present)
        return compute(self, rows, choices, weights, present, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Experts, "partial_sums", record)
        _moe(plan, x)
        jax.effects_barrier()
    return seen, all(codes)


def _moe(plan: str | None, x: np.ndarray) -> np.ndarray:
    """The mixture-of-experts layer of "v3-wide" on activations [B, T, D], on one device or on a mesh."""
    config = load_config(folder("v3-wide"))
    numerics = NATIVE.for_checkpoint(config)
    many = arrange(config, plan, numerics) if plan else None
    config, params, _ = load_onto(many, folder("v3-wide"))
    rules = many.rules if many else Rules()

    def body(params: Any, cache: Cache, x: jax.Array) -> tuple[jax.Array, Cache]:
        x = rules.part("slots", x)
        stack = params["moe"]
        gate = partial(moe_gate, bias=stack["router"]["bias"][0], config=config)
        return MoE(config, numerics, stack, rules)(x, jnp.ones(x.shape[:2], bool), 0, gate), cache

    cache = Cache(jnp.zeros((1, 8, 1, 1)), None, jnp.zeros(8, jnp.int32))
    run = many.program(body, params, cache, [P()], [many.layout.hidden_spec()]) if many else jax.jit(body)
    return np.asarray(run(params, cache, jnp.asarray(x).astype(jnp.bfloat16))[0], np.float32)


@pytest.mark.parametrize("plan", ["ep=4/sent", pytest.param("ep=8/sent", marks=full)])
def test_what_experts_see_is_what_one_device_quantises(plan: str) -> None:
    """Tokens travel as E4M3 codes and scales: to each rank once, what its experts take of them bit for bit."""
    x = np.random.default_rng(32).standard_normal((8, 16, 256)).astype(np.float32)
    (here, _), (there, codes) = _seen(None, x), _seen(plan, x)
    assert codes and len(here.rows) == 128
    ranks = int(plan[3])
    size = 16 // ranks
    expected = []
    for values, chosen in here.rows:
        by_rank = [tuple(e for e in chosen if e // size == rank) for rank in range(ranks)]
        expected += [(values, experts) for experts in by_rank if experts]
    assert sorted(there.rows) == sorted(expected)
    assert len({values for values, _ in here.rows}) == 128  # tokens can be told apart


# --- the command line ------------------------------------------------------------------------------------------------


def test_a_plan_that_cuts_groups_is_refused_and_the_nearest_works(capsys: pytest.CaptureFixture[str]) -> None:
    """`--numerics native --mesh tp=4`: the reason, and a plan for as many devices, which then gives the same tokens."""
    command = ["generate", "--model", str(folder("v3-wide")), "--numerics", "native", "--json"]
    command += ["--prompt-ids", "5,6,7,8", "--max-new-tokens", "3", "--temperature", "0"]
    assert main([*command, "--mesh", "tp=4"]) == 2
    error = capsys.readouterr().err.strip()
    reason = "256 channels of moe.experts.down make parts of 64, which cut the groups of 128 that native quantises"
    assert reason in error and len(error.splitlines()) == 1
    nearest = error.rpartition("the nearest that works is ")[2]
    assert parse_plan(nearest).devices == 4
    ids = []
    for mesh in (["--mesh", nearest], []):
        assert main([*command, *mesh]) == 0
        ids.append([s["output_ids"] for s in json.loads(capsys.readouterr().out)["sequences"]])
    print(nearest, ids)
    assert ids[0] == ids[1]
