"""One configuration of a model, run with every operator tapped."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.align.taps import Tap, arrays
from dsjax.config import Config
from dsjax.errors import InputError
from dsjax.export.program.targets import TARGETS
from dsjax.generate import Engine
from dsjax.numerics import Numerics
from dsjax.parallel import Parallel
from dsjax.params import WEIGHTS, Tree
from quant.operator import OPERATORS, Sink, choosing, tapping


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
            weights (`params.WEIGHTS`), targets of export that only decode otherwise (typed, typed-fp8, portable), and
            variants (top_k=loop).

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
                targets = [name for name, target in TARGETS.items() if target.weights == "stored"]
                known = ("plain", "native", "dtype=float32", "dtype=bfloat16", "fused", "tiled", *WEIGHTS, *targets)
                raise InputError(f"--against {word}: expected {', '.join(known)} or OPERATOR=VARIANT")
        return Configuration(numerics, weights, choices)


@dataclasses.dataclass
class _Device:
    """What one device's operators gave."""

    taps: list[Tap] = dataclasses.field(default_factory=list)
    current: int | None = None
    calls: int = 0


@dataclasses.dataclass(frozen=True)
class _Teller:
    """Tells of one block on one device."""

    block: str
    device: _Device

    def layer(self, number: int) -> None:
        self.device.current = number if number >= 0 else None

    def call(self, operator: str, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> None:
        rows = {np.dtype(np.int16): jnp.bfloat16, np.dtype(np.int8): np.uint8} if operator == "write_rows" else {}
        bits = (a.view(rows.get(a.dtype, a.dtype)) for a in outputs)  # as caches hold them
        order, layer = self.device.calls, self.device.current
        self.device.taps += [Tap(order, layer, operator, i, a.copy(), self.block) for i, a in enumerate(bits)]
        self.device.calls += 1


class _Keeper:
    """A `PlacedSink` that keeps what every operator gave."""

    def __init__(self) -> None:
        self.devices: dict[int, _Device] = {}

    def at(self, block: str, device: int) -> Sink:
        return _Teller(block.replace("/", "+"), self.devices.setdefault(device, _Device()))

    def layer(self, number: int) -> None:
        self.at("", 0).layer(number)

    def call(self, operator: str, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> None:
        self.at("", 0).call(operator, inputs, outputs)

    def whole(self) -> list[Tap]:
        """Taps of all devices together: values that all have bit for bit once, others with a leading axis of devices.

        Devices run one program, so that their calls are the same, in the same order.
        """
        devices = [device.taps for _, device in sorted(self.devices.items())]
        taps = []
        for same in zip(*devices, strict=True):
            values = [tap.value for tap in same]
            equal = all(v.tobytes() == values[0].tobytes() for v in values[1:])
            taps.append(dataclasses.replace(same[0], value=values[0] if equal else np.stack(values)))
        return taps


def tapped(
    config: Config,
    params: Tree,
    configuration: Configuration,
    tokens: np.ndarray,
    parallel: Parallel | None = None,
) -> dict[str, np.ndarray]:
    """What every operator gives on these tokens, by tap name, and "logits" of every position, float32 [B, T, V].

    Of a manual mesh's values, those that devices have in parts are [devices, ...] of the parts.

    Args:
      config, params: of a checkpoint, held as the configuration says.
      configuration: how it is run.
      tokens: int32 [B, T].
      parallel: the mesh that the parameters lie on; one device by default.

    Raises:
      InputError: for a configuration that the checkpoint cannot have, and on a platform that cannot call the host.
    """
    numerics = configuration.numerics.for_checkpoint(config, configuration.weights)
    engine, keeper = Engine(config, params, numerics, parallel=parallel), _Keeper()
    try:
        with choosing(configuration.choices), tapping(keeper):
            logits, _ = engine.score(tokens)
        jax.effects_barrier()
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as e:
        if "callback" not in str(e).lower():
            raise
        found = " ".join(str(e).split())[:200]
        raise InputError(
            f"platform {engine.platform}: expected calls back to the host, for taps, found: {found}"
        ) from None
    return {**arrays(keeper.whole()), "logits": logits}


def random_tokens(config: Config, length: int, seed: int = 0) -> np.ndarray:
    """int32 [1, length], any ids."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, (1, length), dtype=np.int32)
