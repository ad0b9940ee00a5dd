"""Routed experts split over devices, tokens dispatched to them, against one device with all of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SEED, relative_norm, rng
from helpers_dispatch import emulated_ragged
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from dsjax.config import ExpertConfig, parse_config
from dsjax.layers.ffn import Experts
from dsjax.numerics import Numerics
from dsjax.presets import preset
from quant import E2M1, E4M3, QArray, fake_act_quant, quantise
from sharding import DISPATCHES, expert_parallel

EXPERTS, CHOICES, HIDDEN, WIDTH, TOKENS = 16, 3, 256, 256, 40
LAYER = 1
SPLITS = {"ep": (8, 1), "ep tp": (4, 2)}
SPECS = {"gate": P(None, "ep", "tp"), "up": P(None, "ep", "tp"), "down": P(None, "ep", None, "tp")}


def _config(family: str) -> ExpertConfig:
    sizes = {"hidden_size": HIDDEN, "moe_intermediate_size": WIDTH, "n_routed_experts": EXPERTS}
    if family == "v3":
        sizes |= {"n_group": 4, "topk_group": 2}
    config = parse_config({**preset(f"deepseek-{family}"), **sizes, "num_experts_per_tok": CHOICES})
    assert isinstance(config, ExpertConfig)
    return config


def _params(family: str) -> dict[str, QArray]:
    """Two layers of experts: E4M3 with 128 x 128 blocks, or E2M1 with one scale per row and 32 channels."""
    shapes = {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    found = {}
    for i, (name, shape) in enumerate(shapes.items()):
        w = jnp.asarray(rng(20, i).standard_normal((2, EXPERTS, *shape), np.float32) / 16)
        found[name] = quantise(w, E4M3, (128, 128)) if family == "v3" else quantise(w, E2M1, (1, 32), pow2=True)
    return found


def _case(numerics: Numerics) -> tuple[jax.Array, ...]:
    """(x, choices, weights, valid) of eight devices' tokens."""
    random, total = rng(21), 8 * TOKENS
    x = jnp.asarray(random.standard_normal((total, HIDDEN), np.float32), numerics.dtype)
    choices = random.permuted(np.tile(np.arange(EXPERTS), (total, 1)), axis=1)[:, :CHOICES].astype(np.int32)
    weights = random.uniform(0.1, 1, (total, CHOICES)).astype(np.float32)
    return x, jnp.asarray(choices), jnp.asarray(weights), jnp.asarray(random.random(total) < 0.8)


def _split(config: ExpertConfig, numerics: Numerics, split: str, how: str, back: str, params: Any, case: Any) -> Any:
    """float32 [T, D], experts over ep, their width over tp, tokens over ep (and the same on all of tp)."""
    ep, tp = SPLITS[split]
    mesh = jax.make_mesh((ep, tp), ("ep", "tp"), axis_types=(AxisType.Auto,) * 2)

    def local(params: Any, x: jax.Array, choices: jax.Array, weights: jax.Array, valid: jax.Array) -> jax.Array:
        experts = Experts(config, numerics, params)

        def compute(rows: Any, choices: jax.Array, weights: jax.Array) -> jax.Array:
            return experts.partial_sums(rows, choices, weights, choices >= 0, LAYER, len(x) * CHOICES)

        args = (compute, experts.rows(x), choices, weights, valid)
        total = expert_parallel(*args, axes=("ep",), experts=EXPERTS, how=how, back=back)
        return lax.psum(total, "tp")

    tokens = P("ep")
    specs = ({name: jax.tree.map(lambda _, s=SPECS[name]: s, leaf) for name, leaf in params.items()}, *[tokens] * 4)
    run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=tokens, check_vma=False)
    return jax.jit(run)(params, *case)


def _whole(config: ExpertConfig, numerics: Numerics, params: Any, case: Any) -> jax.Array:
    return jax.jit(lambda params, *case: Experts(config, numerics, params)(*case, LAYER))(params, *case)


FULL = {("v3", "ep"), ("v4-flash", "ep tp")}


@pytest.mark.parametrize("how", DISPATCHES)
@pytest.mark.parametrize(
    ("family", "split"),
    [
        pytest.param(family, split, marks=[pytest.mark.full] if (family, split) in FULL else [])
        for family in ("v3", "v4-flash")
        for split in SPLITS
    ],
)
def test_plain(family: str, split: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Routing weights before and after the down projection; within float32 summation order of one device."""
    monkeypatch.setattr(lax, "ragged_all_to_all", emulated_ragged)
    config, numerics, params = _config(family), Numerics("plain", "float32"), _params(family)
    case = _case(numerics)
    found, expected = (
        _split(config, numerics, split, how, "float32", params, case),
        _whole(config, numerics, params, case),
    )
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max(), SEED
    assert (found[~case[3]] == 0).all() and np.abs(expected).max() > 0.1


@pytest.mark.parametrize("how", ["replicated", "all-to-all"])
@pytest.mark.parametrize("family", ["v3", "v4-flash"])
def test_native_sends_codes(family: str, how: str) -> None:
    """Quantised once, before they travel: one device's sums but for bfloat16 roundings that another order of float32
    sums turns; in bfloat16 on the way back within its rounding."""
    config, params = _config(family), _params(family)
    numerics = Numerics("native", pow2=family != "v3")
    case = _case(numerics)
    expected = np.asarray(_whole(config, numerics, params, case))
    size = np.abs(expected).max()
    found = np.asarray(_split(config, numerics, "ep", how, "float32", params, case))
    turned = np.abs(found - expected) > 1e-6 * size
    print(family, how, "turned", turned.mean(), "norm", relative_norm(found, expected))
    assert turned.mean() < 0.01 and relative_norm(found, expected) < 1e-3, SEED
    rounded = _split(config, numerics, "ep", how, "bfloat16", params, case)
    assert 1e-4 < relative_norm(rounded, expected) < 2**-8


@pytest.mark.parametrize("pow2", [False, True])
def test_travelling_rows_stand_for_what_experts_take(pow2: bool) -> None:
    """Codes and scales give the fake-quantised activations bit for bit; elsewhere rows are x."""
    numerics, config = Numerics("native", pow2=pow2), _config("v3")
    x = _case(numerics)[0]
    codes, scales = rows = Experts(config, numerics, _params("v3")).rows(x)
    assert (codes.dtype, codes.shape, scales.dtype, scales.shape) == (jnp.uint8, x.shape, jnp.float32, (len(x), 2))
    np.testing.assert_array_equal(numerics.dequantised(rows), fake_act_quant(x, pow2=pow2))
    plain = {name: jnp.zeros((1, 1, 8, 8)) for name in SPECS}
    assert Experts(config, numerics, plain).rows(x) is x
    assert Experts(config, Numerics(), _params("v3")).rows(x) is x


@pytest.mark.parametrize("tokens", [1, TOKENS])
def test_absent_choices_cost_nothing(tokens: int) -> None:
    """A rank's part of the sum, from leaves of four of sixteen experts, with choices of -1 for the others."""
    config, numerics, params = _config("v3"), Numerics("plain", "float32"), _params("v3")
    x, choices, weights, valid = (a[:tokens] for a in _case(numerics))
    valid = jnp.ones_like(valid)
    total = np.zeros(x.shape, np.float32)
    for first in range(0, EXPERTS, 4):
        part = jax.tree.map(lambda a, first=first: a[:, first : first + 4], params)
        local = jnp.where((choices >= first) & (choices < first + 4), choices - first, -1)
        total += _whole(config, numerics, part, (x, local, weights, valid))
    expected = _whole(config, numerics, params, (x, choices, weights, valid))
    assert np.abs(total - expected).max() <= 1e-5 * np.abs(expected).max(), SEED
