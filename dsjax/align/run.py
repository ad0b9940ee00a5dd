"""Two configurations of one model, run on the same tokens, every operator tapped."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.align.taps import Tap, arrays
from dsjax.backend import compiler_options
from dsjax.config import Config
from dsjax.errors import InputError
from dsjax.export.targets import TARGETS
from dsjax.models import family
from dsjax.numerics import Numerics
from dsjax.params import WEIGHTS, Tree
from quant.operator import OPERATORS, choosing, tapping


@dataclasses.dataclass(frozen=True)
class Configuration:
    """How a checkpoint is run.

    Attributes:
      numerics: before `for_checkpoint`.
      weights: what they are held as, one of `params.WEIGHTS`.
      choices: variants of operators.
    """

    numerics: Numerics
    weights: str = "stored"
    choices: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def but(self, text: str) -> Configuration:
        """This one, changed as a comma-separated list says.

        Args:
          text: of numerics (plain, native), activations (float32, bfloat16 after "dtype="), products (fused, tiled),
            weights (`params.WEIGHTS`), targets of export that only decode otherwise (typed, portable), and variants
            (top_k=loop).

        Raises:
          InputError: for anything else.
        """
        numerics, weights, choices = self.numerics, self.weights, dict(self.choices)
        for word in text.split(","):
            name, found, value = word.partition("=")
            if word in ("plain", "native"):
                dtype = "bfloat16" if word == "native" else numerics.dtype
                numerics = dataclasses.replace(numerics, mode=word, dtype=dtype)
            elif name == "dtype" and value in ("float32", "bfloat16"):
                numerics = dataclasses.replace(numerics, dtype=value)
            elif word in ("fused", "tiled"):
                numerics = dataclasses.replace(numerics, products=word)
            elif word in WEIGHTS:
                weights = word
            elif word in TARGETS and TARGETS[word].weights == "stored":
                choices |= TARGETS[word].choices
            elif found and name in OPERATORS and value in OPERATORS[name].variants:
                choices[name] = value
            else:
                known = (
                    f"plain, native, dtype=float32, dtype=bfloat16, fused, tiled, {', '.join(WEIGHTS)}, typed, portable"
                )
                raise InputError(f"--against {word}: expected {known} or OPERATOR=VARIANT")
        return Configuration(numerics, weights, choices)


class _Keeper:
    """Keeps what every operator gave."""

    def __init__(self) -> None:
        self.taps: list[Tap] = []
        self._layer: int | None = None
        self._calls = 0

    def layer(self, number: int) -> None:
        self._layer = number if number >= 0 else None

    def call(self, operator: str, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> None:
        bits = (a.view(jnp.bfloat16) if a.dtype == np.uint16 else a for a in outputs)  # as caches hold bfloat16
        found = (Tap(self._calls, self._layer, operator, i, a.copy()) for i, a in enumerate(bits))
        self.taps.extend(found)
        self._calls += 1


def tapped(config: Config, params: Tree, configuration: Configuration, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """What every operator gives on these tokens, by tap name, and "logits" of every position, float32 [B, T, V].

    Args:
      config, params: of a checkpoint, held as the configuration says.
      configuration: how it is run, on one device.
      tokens: int32 [B, T].

    Raises:
      InputError: for a configuration that the checkpoint cannot have.
    """
    device = next(iter(jax.tree.leaves(params)[0].devices()))
    numerics = configuration.numerics.for_checkpoint(config, configuration.weights).for_platform(device.platform)
    cache = family(config).new_cache(config, numerics, *tokens.shape)
    counts = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)
    keeper = _Keeper()

    def step(params: object, cache: object, tokens: jax.Array, counts: jax.Array) -> jax.Array:
        logits: jax.Array = family(config).step(config, numerics, params, cache, tokens, counts, "all")[0]
        return logits

    with choosing(configuration.choices, device.platform), tapping(keeper):
        compiled = jax.jit(step, compiler_options=compiler_options(device.platform))
        logits = np.asarray(compiled(params, cache, jnp.asarray(tokens), counts))
    jax.effects_barrier()
    return {**arrays(keeper.taps), "logits": logits}


def same_kind(reference: dict[str, np.ndarray], candidate: dict[str, np.ndarray]) -> list[str]:
    """Drops what the two hold in different forms, such as cached rows as codes and as numbers; the dropped names."""

    def form(array: np.ndarray) -> tuple[object, ...]:
        return array.shape, jnp.issubdtype(array.dtype, jnp.floating)

    dropped = [n for n in reference if n in candidate and form(reference[n]) != form(candidate[n])]
    for name in dropped:
        del reference[name], candidate[name]
    return dropped


def random_tokens(config: Config, length: int, seed: int = 0) -> np.ndarray:
    """int32 [1, length], any ids."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, (1, length), dtype=np.int32)
