"""Operators by themselves: a block's module is the very call whose numbers it is judged by."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from dsjax.export.consumers import consumer
from dsjax.export.golden.blocks import Recorder, at_edges
from dsjax.export.stablehlo.artifact import serialise, text
from quant.operator import Operator, tapping


def _scaled(x: jax.Array, stack: jax.Array, layer: int) -> jax.Array:
    """Of a layer that is a number in the text: calls of all layers have the same signature."""
    return jax.nn.sigmoid(x) * stack[layer]


SWIGLU = Operator("swiglu", _scaled, "lax")
"""Under a name that has edges; not in the list of operators."""


def test_calls_of_one_signature_stand_apart_with_their_own_numbers() -> None:
    x, stack = np.random.default_rng(0).standard_normal((2, 4, 8)).astype(np.float32)
    recorder = Recorder()

    @jax.jit
    def step(x: jax.Array, stack: jax.Array) -> jax.Array:
        def body(i: jax.Array, y: jax.Array) -> jax.Array:
            return jax.lax.cond(i % 2 == 1, lambda y: SWIGLU(y, stack, 0), lambda y: SWIGLU(y, stack, 2), y)

        return SWIGLU(jax.lax.fori_loop(0, 3, body, x), stack, 0)  # layer 2 runs first, its text does not stand first

    with tapping(recorder):
        jax.block_until_ready(step(x, stack))
    jax.effects_barrier()
    calls = list(recorder.calls.values())
    assert len(calls) == 2 and len({str(call.inputs) for call in calls}) == 1  # layer 0's two calls are one block
    interpreter = consumer("interpreter", 60.0)
    for call in calls:
        assert call.numbers is not None
        for inputs, outputs in (call.numbers, at_edges(call) or ([], [])):
            [found] = interpreter.run(serialise(call.module, "1.0.0"), inputs)
            np.testing.assert_allclose(found, outputs[0], rtol=1e-6)
    layers = {text(call.module).split("stablehlo.slice")[1][:40] for call in calls}
    assert len(layers) == 2


def test_without_parameters_calls_are_traced_alone() -> None:
    recorder = Recorder()
    given = [jax.ShapeDtypeStruct(shape, np.float32) for shape in ((4, 8), (3, 8))]
    with tapping(recorder):
        jax.jit(lambda x, stack: SWIGLU(x, stack, 1)).trace(*given)
    [call] = recorder.calls.values()
    assert call.numbers is None and at_edges(call) is None
    assert [(s.shape, s.dtype) for s in call.outputs] == [((4, 8), np.dtype(np.float32))]
    assert "@main" in text(call.module) and "callback" not in text(call.module)


def test_large_numbers_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsjax.export.golden.blocks.MOST_BYTES", 100)
    recorder = Recorder()
    with tapping(recorder):
        jax.block_until_ready(jax.jit(lambda x: SWIGLU(x, x, 0))(np.ones((4, 8), np.float32)))
    jax.effects_barrier()
    [call] = recorder.calls.values()
    assert call.numbers is None
