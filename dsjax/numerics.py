"""Numerics: which values are rounded where. Static, explicit, chosen once per run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dsjax.config import Config, IntegerQuantization, V3Config, V4Config
from dsjax.errors import InputError
from quant import (
    E2M1,
    E4M3,
    FUSED,
    TILED,
    WHOLE,
    Form,
    Groups,
    Int8Rows,
    QArray,
    act_dequant,
    act_quant,
    act_quant_int8,
    block_scaled_dot,
    expert_dot,
    experts_at_once,
    fake_act_quant,
    int8_dot,
    int8_expert_dot,
    int8_experts_at_once,
    is_integer,
)
from quant.transforms import GROUP

Operand = jax.Array | Int8Rows
"""Activations [..., K] as a product takes them."""

Rows = Operand | tuple[jax.Array, jax.Array]
"""The same, or E4M3 codes uint8 [T, K] and float32 scales [T, K/128] that stand for them."""

Largest = Callable[[jax.Array], jax.Array]
"""Maxima of what is here -> of whole rows: `Rules.largest` where channels are split over devices."""


INT8_ACTIVATIONS = ("w8a8", "w4a8")
"""Choices of `params.WEIGHTS` that are multiplied with INT8 activations."""


def _here(amax: jax.Array) -> jax.Array:
    return amax


@dataclasses.dataclass(frozen=True)
class Numerics:
    """How a model computes.

    Attributes:
      mode: "plain" (weights dequantised, activations quantised for integer weights at most) or "native" (as DeepSeek's
        own inference: activations quantised per 1x128 group before every FP8 product, its own rounding points; spec V3
        4).
      dtype: "float32" or "bfloat16", of activations and cache; native is bfloat16.
      mla: "absorbed", "naive", or "auto". The two forms are equal in plain, where auto takes the one with fewer
        operations; they differ in native, where auto is absorbed and never depends on the number of tokens.
      pow2: native's activation scales are powers of two (UE8M0: V3.1 on) instead of float32.
      kv: how V3.2's latents and V4's keys are held: "auto", which is "fp8" in native and the activation dtype in plain,
        or "fp8" or "bfloat16" (native only: without the rounding through E4M3; spec V3 2.4, V4 4.2).
      products: how products with stored weights are written (`quant.Form`): "fused" for few tokens; always "tiled"; or
        "auto", what the platform's compiler likes (`for_platform`) or else fused.
      activations: what linear layers with INT8 or INT4 weights multiply them with: "float" activations as they are,
        the weights dequantised; or "int8", quantised per token, or "int8-group", per token and 128 channels, in
        integer products (plain only).
    """

    mode: str = "plain"
    dtype: str = "bfloat16"
    mla: str = "auto"
    pow2: bool = False
    kv: str = "auto"
    products: str = "auto"
    activations: str = "float"

    def __post_init__(self) -> None:
        for name, choices in (
            ("mode", ("plain", "native")),
            ("dtype", ("float32", "bfloat16")),
            ("mla", ("auto", "absorbed", "naive")),
            ("kv", ("auto", "fp8", "bfloat16")),
            ("products", ("auto", "fused", "tiled")),
            ("activations", ("float", "int8", "int8-group")),
        ):
            if getattr(self, name) not in choices:
                raise InputError(f"numerics {name}: expected {' or '.join(choices)}, found {getattr(self, name)!r}")
        if self.native and self.dtype != "bfloat16":
            raise InputError("--dtype float32 cannot be combined with --numerics native, which rounds to bfloat16")
        if self.kv != "auto" and not self.native:
            raise InputError(
                f"--kv {self.kv} cannot be combined with --numerics plain, which never quantises the cache"
            )

    def for_checkpoint(self, config: Config, weights: str = "stored", flag: str = "--weights") -> Numerics:
        """These numerics with the activation scales that the checkpoint was trained for.

        Args:
          config: of the checkpoint.
          weights: what its weights are held as, one of `params.WEIGHTS`.
          flag: what said so, for messages.

        Raises:
          InputError: for native on a checkpoint in integers, or on an FP8 checkpoint held as anything else: native is
            DeepSeek's own FP8 products; for a choice that this architecture does not have.
        """
        integers = config.quantization if isinstance(config.quantization, IntegerQuantization) else None
        if self.native and integers is not None:
            raise InputError("--numerics native: expected FP8 weights or floats, found a checkpoint in integers")
        if self.native and config.quantization is not None and weights != "stored":
            raise InputError(
                f"{flag} {weights} cannot be combined with --numerics native, which multiplies the stored FP8 codes"
            )
        if self.native and weights == "fp8":  # native would quantise the activations too
            raise InputError(f"{flag} fp8 cannot be combined with --numerics native: it is weight-only")
        if self.native and weights in INT8_ACTIVATIONS:
            raise InputError(
                f"{flag} {weights} cannot be combined with --numerics native, which has no INT8 activations"
            )
        indexed = isinstance(config, V3Config) and config.indexer is not None
        if self.mla != "auto" and not isinstance(config, V3Config):
            raise InputError(f"--mla {self.mla}: expected a model with latent attention, found {config.model_type}")
        if self.mla == "naive" and indexed:  # one form for short and for long contexts: native's two differ
            raise InputError("--mla naive: expected a model that attends to all tokens, found deepseek_v32")
        if self.kv != "auto" and not (indexed or isinstance(config, V4Config)):
            raise InputError(f"--kv {self.kv}: expected deepseek_v32 or deepseek_v4, found {config.model_type}")
        pow2 = isinstance(config, V4Config) or (config.quantization is not None and config.quantization.pow2)
        activations = "float"
        if integers is not None and weights == "stored":
            activations = integers.activations
        elif weights in INT8_ACTIVATIONS:
            blocks = integers is not None and any(group.format == "int8-block" for group in integers.groups)
            activations = "int8-group" if blocks else "int8"
        return dataclasses.replace(self, pow2=pow2, activations=activations)

    def for_platform(self, platform: str) -> Numerics:
        """These numerics with products, unless they are chosen, written as the platform's compiler likes them."""
        if self.products != "auto":
            return self
        return dataclasses.replace(self, products="tiled" if platform == "tpu" else "fused")

    @property
    def form(self) -> Form:
        """How products with stored weights are written."""
        return TILED if self.products == "tiled" else FUSED

    @property
    def native(self) -> bool:
        return self.mode == "native"

    @property
    def kv_format(self) -> str:
        """The `RowFormat` kind of V3.2's cached latents and V4's keys."""
        if self.kv != "auto":
            return self.kv
        return "fp8" if self.native else self.dtype

    def round(self, x: jax.Array) -> jax.Array:
        """float32 -> the activation dtype.

        The explicit reduce_precision keeps the rounding: XLA may drop a bare float32 -> bfloat16 -> float32 pair.
        """
        if self.dtype == "float32":
            return x
        return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7).astype(jnp.bfloat16)

    def operand(self, x: jax.Array, w: jax.Array | QArray, largest: Largest = _here) -> Operand:
        """Activations as the product with `w` takes them: through E4M3 in native if w is FP8 or FP4; INT8 codes and
        scales if w is in integers and `activations` says so; else unchanged.

        Args:
          x: [..., K].
          w: the weight.
          largest: where K is split over devices.
        """
        if self.integers(w):
            per_token = self.activations == "int8"
            return act_quant_int8(x, WHOLE if per_token else GROUP, largest if per_token else _here)
        return fake_act_quant(x, pow2=self.pow2) if self._quantises(w) else x

    def quantised(self, x: jax.Array, w: jax.Array | QArray) -> Rows:
        """`operand` in the fewest bytes: the codes and scales that it stands for, or x as it is."""
        return act_quant(x, pow2=self.pow2) if self._quantises(w) else self.operand(x, w)

    def dequantised(self, rows: Rows) -> Operand:
        """`operand` from `quantised`: the same numbers, wherever they were quantised."""
        return act_dequant(*rows) if isinstance(rows, tuple) else rows

    def _quantises(self, w: jax.Array | QArray) -> bool:
        return self.native and isinstance(w, QArray) and w.format in (E4M3, E2M1)

    def integers(self, w: jax.Array | QArray) -> bool:
        """Whether products with w are of integers."""
        return self.activations != "float" and is_integer(w)

    def dot(
        self, x: jax.Array, w: jax.Array | QArray, index: tuple[Any, ...] = (), largest: Largest = _here
    ) -> jax.Array:
        """x @ w[index].T, not rounded; float [..., K] -> float32 [..., N].

        In native this is DeepSeek's FP8 product (spec V3 4.3): scales are folded into the operands, which changes
        nothing beyond float32 summation order.
        """
        operand = self.operand(x, w, largest)
        if isinstance(operand, Int8Rows):
            assert isinstance(w, QArray)
            return int8_dot(operand, w, index, self.form)
        return block_scaled_dot(operand, w, index, self.form)

    def expert_dot(self, rows: Operand, w: jax.Array | QArray, experts: jax.Array, index: tuple[Any, ...]) -> jax.Array:
        """Blocks of an `operand` [C, size, K], each times its expert's matrix: float32 [C, size, N], not rounded."""
        if isinstance(rows, Int8Rows):
            assert isinstance(w, QArray)
            return int8_expert_dot(rows, w, experts, index, self.form)
        return expert_dot(rows, w, experts, index, self.form)

    def experts_at_once(
        self, groups: Groups, matrices: tuple[jax.Array | QArray, ...], rows: Operand, assignments: int
    ) -> int:
        """Blocks that one `expert_dot` takes.

        Args:
          groups, assignments: of `quant.experts_at_once`.
          matrices: stacks that a block is multiplied with.
          rows: what the first of them takes.
        """
        if isinstance(rows, Int8Rows):
            integers = [w for w in matrices if isinstance(w, QArray)]
            return int8_experts_at_once(groups, integers, rows.group, assignments, self.form)
        return experts_at_once(groups, matrices, rows.dtype, assignments, self.form)

    def linear(
        self,
        x: jax.Array,
        w: jax.Array | QArray,
        index: tuple[Any, ...] = (),
        total: Callable[[jax.Array], jax.Array] = lambda y: y,
        largest: Largest = _here,
    ) -> jax.Array:
        """`dot` rounded to the activation dtype; float [..., K] -> [..., N].

        Where K is split, `total` adds up what devices have found, in float32, before it is rounded.
        """
        return self.round(total(self.dot(x, w, index, largest)))
