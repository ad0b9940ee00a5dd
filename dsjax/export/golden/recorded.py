"""Golden inputs and outputs: what the model itself, jitted for the platform that is there, makes of real tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.backend import compiler_options, platform_of
from dsjax.errors import InputError
from dsjax.export.program.exporter import Exporter, Program, Shape, is_draft, step_of
from dsjax.export.program.signature import parameters
from dsjax.generate import CHUNK
from dsjax.models import family
from dsjax.params import Tree

SEED = 7

FEW_SLOTS = 4
"""So few slots are all at work."""

Arrays = dict[str, np.ndarray]
"""By the name of an argument or a result, as files hold them."""


@dataclasses.dataclass(frozen=True)
class Golden:
    """A program's inputs but for its parameters, and its results, of all ranks together."""

    inputs: Arrays
    outputs: Arrays


def weights_of(program: Program, params: Tree) -> list[jax.Array]:
    """Loaded parameters as the program's first arguments."""
    exporter = program.exporter
    held = exporter.held(params)
    wanted = {value.name for value in program.arguments}
    specs = exporter.layout.param_specs(held, exporter.config)
    values = [value for _, _, value in parameters(held, specs, exporter.config, exporter.target, exporter.stored)]
    pairs = zip(values, jax.tree.leaves(held), strict=True)
    return [value.leave(leaf) for value, leaf in pairs if value.name in wanted]


def _fed(
    exporter: Exporter, params: Tree, shape: Shape, counts: np.ndarray, *inputs: jax.Array
) -> tuple[Any, list[jax.Array]]:
    """The cache of the model or of its draft module, fed each slot's first `counts` of inputs [B, n, ...], and every
    step's hidden. The model takes tokens int32, the draft the model's hidden and the tokens that follow."""
    config, numerics, draft = exporter.config, exporter.numerics, len(inputs) > 1
    cache = family(config).new_cache(config, numerics, shape.batch, shape.length, draft=draft)
    phase = "mtp-prefill" if draft else "prefill"
    step = jax.jit(step_of(exporter.whole, phase), donate_argnums=1, compiler_options=options())
    hidden: list[jax.Array] = []
    for at in range(0, inputs[0].shape[1], CHUNK):
        chunks = [a[:, at : at + CHUNK] for a in inputs]
        n_new = np.clip(counts - at, 0, chunks[0].shape[1]).astype(np.int32)
        with exporter.chosen():
            _, new, cache = step(params, cache, *chunks, jnp.asarray(n_new))
        hidden.append(new)
    return cache, hidden


def options() -> dict[str, Any]:
    """Of the compiler that is there."""
    return compiler_options(platform_of(jax.local_devices()[0]))


def inputs_of(program: Program, params: Tree, other_end: bool = False) -> list[jax.Array]:
    """Caches and inputs, on which the program does what it does in a run: sequences of different lengths, padding.

    Args:
      program: prefill is from the first position on, decoding up to the last; a draft follows the model. The last of
        more than `FEW_SLOTS` slots is idle.
      params: loaded.
      other_end: prefill up to the last position, decoding from the first.
    """
    exporter, shape = program.exporter, program.shape
    slots, random = np.arange(shape.batch), np.random.default_rng(SEED + 1)
    first = shape.phase.endswith("prefill") != other_end
    before = 0 if first else shape.length - shape.tokens

    def drawn(count: int) -> jax.Array:
        return jnp.asarray(random.integers(0, exporter.config.vocab_size, (shape.batch, count), dtype=np.int32))

    new = drawn(shape.tokens)
    counts = np.maximum(shape.tokens - 3 * slots, np.minimum(slots, 1)).astype(np.int32)
    counts[FEW_SLOTS:][-1:] = 0
    lengths = np.maximum(before - 3 * slots, 0).astype(np.int32)
    held = exporter.held(params)
    inputs = []
    if is_draft(shape.phase):  # the model has taken as many tokens, each of which the draft's follows
        tokens = drawn(before + shape.tokens)
        _, each = _fed(exporter, held, shape, lengths + counts, tokens)
        hidden = jnp.concatenate(each, axis=1)
        cache, _ = _fed(exporter, held, shape, lengths, hidden[:, :before], tokens[:, 1 : before + 1])
        inputs.append(hidden[slots[:, None], lengths[:, None] + np.arange(shape.tokens)])
    else:
        cache, _ = _fed(exporter, held, shape, lengths, drawn(before))
    given = [*jax.tree.leaves(cache), *inputs, new, jnp.asarray(counts)]
    values = [v for v in program.arguments if v.kind != "param"]
    return [value.leave(a) for value, a in zip(values, given, strict=True)]


def make(program: Program, params: Tree) -> Golden:
    """Runs the model on inputs that are made for it.

    Args:
      params: loaded, as `checkpoint.load` gives them.

    Raises:
      InputError: if the model gives NaN or Inf, which no golden may hold.
    """
    exporter = program.exporter.whole
    weights, inputs = weights_of(program, params), inputs_of(program, params)
    single = exporter.program(program.shape)
    with exporter.chosen():
        results = jax.jit(single.function, compiler_options=options())(*weights, *inputs)
    outputs = {v.name: np.asarray(a) for v, a in zip(program.results, results, strict=True)}
    for value in program.results:
        if value.kind == "output" and not np.isfinite(outputs[value.name].astype(np.float32)).all():
            raise InputError(f"{program.shape.name}: expected finite {value.name} of the model, found NaN or Inf")
    others = [v for v in program.arguments if v.kind != "param"]
    return Golden({v.name: np.asarray(a) for v, a in zip(others, inputs, strict=True)}, outputs)


def _kind(dtype: np.dtype) -> str:
    if dtype.kind in "iu" and dtype.itemsize <= 2:  # bits of FP8, FP4, INT8, or of bfloat16
        return "codes"
    return "integers" if dtype.kind in "iub" else "float32" if dtype == np.float32 else "bfloat16"


_OPERATORS: dict[tuple[str, str], tuple[float, str]] = {
    ("float32", ""): (1e-5, "float32: the order of sums"),
    ("bfloat16", ""): (2.0**-7, "bfloat16: one rounding more or less"),
    ("codes", ""): (1e-2, "codes: the share that may differ, by what lies next to a rounding"),
    ("codes", "write_rows"): (0.0, "codes: moved, not computed"),
    # Experts of 16,384 rows of scores: IREE chose XLA's in all, float64 in all but one.
    ("integers", ""): (0.0, "integers: exact"),
    # Against IREE and float64: none of 64 rows of 64 of 128 keys; of 32 rows of 2,048 of 4,096 up to 7e-4, all swaps.
    ("integers", "lightning_indexer"): (1e-3, "numbers of keys: the share that may swap places, as sums nearly tie"),
}
"""(kind of result, operator; "" of all others) -> what it may differ by at most where inputs are equal, and why."""


def tolerances(exporter: Exporter, outputs: Arrays) -> dict[str, Any]:
    """What a whole program's results may differ by, relative to the largest, and why; a bound of None is no verdict."""
    native = exporter.numerics.native
    if native:
        strict, reason = None, "native rounds to FP8 at every layer, where one code more or less grows: judge by block"
    elif exporter.numerics.activations != "float":
        strict, reason = 0.05, "INT8 activations: another order of sums moves a code by one"
    elif exporter.numerics.dtype == "bfloat16":
        strict, reason = 0.05, "bfloat16 activations: another order of sums moves a rounding"
    else:
        strict, reason = 1e-5, "float32: the order of sums"
    judged, told = {"strict": strict, "reason": reason}, {"strict": None, "bound": None, "reason": reason}
    written = {"strict": None, "bound": 0.5, "reason": reason + "; half of it wrong was not written, or elsewhere"}

    def limits(name: str, array: np.ndarray) -> dict[str, Any]:
        if _kind(array.dtype) == "integers":
            return block_tolerance("", "integers")
        return judged if not native else written if name.startswith("cache.") else told

    return {name: limits(name, array) for name, array in outputs.items()}


def block_tolerance(operator: str, kind: str) -> dict[str, Any]:
    """The same of a result of one operator on equal inputs."""
    strict, reason = _OPERATORS.get((kind, operator)) or _OPERATORS[kind, ""]
    bound = {"bound": strict} if kind == "integers" or not strict else {}  # of ids 5% is no agreement
    return {"strict": strict, **bound, "reason": reason}


def block_tolerances(operator: str, outputs: Arrays) -> dict[str, Any]:
    """The same of all of its results."""
    return {name: block_tolerance(operator, _kind(array.dtype)) for name, array in outputs.items()}
