"""What each target of a conversion makes of a tensor: element format, scales, blocks, and the tensors that hold them.

docs/conversion.md is this table in words.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from dsjax.checkpoint.safetensors import DTYPES
from dsjax.convert.names import is_stack
from dsjax.errors import InputError
from dsjax.params import EXPERT, FP4_BLOCK, FP8_BLOCK, LINEAR, MATRIX

INT4_GROUP = 128
"""Channels of a row that share an INT4 scale."""

PER_WORD = 8
"""INT4 codes in an I32."""


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How a matrix [N, K] is stored.

    Attributes:
      element: "e4m3", "e2m1", "int8", "int4", "bf16", "f16" or "f32".
      scales: "f32", "bf16", "f16" or "e8m0", what holds a scale; None for floats.
      block: rows and channels that share a scale; 0 channels are a whole row.
      pow2: whether scales are powers of two.
    """

    element: str
    scales: str | None = None
    block: tuple[int, int] = (1, 0)
    pow2: bool = False

    @property
    def integers(self) -> bool:
        """Whether codes are INT8 or INT4."""
        return self.element in ("int8", "int4")

    @property
    def codes(self) -> tuple[np.dtype, int]:
        """The file's element type, and how many codes it holds."""
        name, count = {
            "e4m3": ("F8_E4M3", 1),
            "e2m1": ("I8", 2),
            "int8": ("I8", 1),
            "int4": ("I32", PER_WORD),
            "bf16": ("BF16", 1),
            "f16": ("F16", 1),
            "f32": ("F32", 1),
        }[self.element]
        return DTYPES[name], count

    @property
    def scale_dtype(self) -> np.dtype:
        """The file's type of a scale."""
        return DTYPES[{"f32": "F32", "bf16": "BF16", "f16": "F16", "e8m0": "F8_E8M0"}[self.scales or "f32"]]

    def codes_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Of the codes of a matrix [N, K] in the file."""
        return shape[0], -(-shape[1] // self.codes[1])

    def grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Of the scales of a matrix [N, K]."""
        bn, bk = self.block
        return -(-shape[0] // bn), -(-shape[1] // (bk or shape[1]))

    def same(self, other: Encoding) -> bool:
        """Whether nothing need be converted: integers are what they are with scales of any type."""
        if self.integers:
            return (self.element, self.block) == (other.element, other.block)
        return self == other

    def describe(self, shape: tuple[int, int]) -> dict[str, Any]:
        """As a certificate says it."""
        block = None if self.scales is None else [self.block[0], self.block[1] or shape[1]]
        return {"format": self.element, "scales": self.scales, "block": block}


@dataclasses.dataclass(frozen=True)
class Target:
    """A `--to`.

    Attributes:
      name: as the flag says it.
      kind: "float", "fp8" (E4M3 or E2M1, one family of loaders) or "int".
    """

    name: str
    kind: str

    def encoding(self, storage: str, v4: bool) -> Encoding | None:
        """What a tensor of a storage class becomes; None: it is kept byte for byte.

        Args:
          storage: the class of its row in the table of parameters.
          v4: whether the family publishes its powers of two as E8M0.
        """
        if self.kind == "float":
            return Encoding(self.name) if storage in (LINEAR, EXPERT, MATRIX) else None
        if storage not in (LINEAR, EXPERT):
            return None
        if self.name == "mxfp4" and storage == EXPERT:
            return Encoding("e2m1", "e8m0", FP4_BLOCK, True)
        pow2 = Encoding("e4m3", "e8m0" if v4 else "f32", FP8_BLOCK, True)
        int4 = Encoding("int4", "bf16", (1, INT4_GROUP))
        return {
            "fp8": Encoding("e4m3", "f32", FP8_BLOCK),
            "fp8-ue8m0": pow2,
            "mxfp4": pow2,
            "int8-channel": Encoding("int8", "f32", (1, 0)),
            "int8-block": Encoding("int8", "f32", FP8_BLOCK),
            "int4-group": int4,
            "w4a8": int4,
        }[self.name]


TARGETS = {
    target.name: target
    for target in (
        *(Target(name, "float") for name in ("bf16", "f16", "f32")),
        *(Target(name, "fp8") for name in ("fp8", "fp8-ue8m0", "mxfp4")),
        *(Target(name, "int") for name in ("int8-channel", "int8-block", "int4-group", "w4a8")),
    )
}

_SUFFIXES = {
    ("int8", (1, 0)): (".weight", ".weight_scale"),
    ("int8", FP8_BLOCK): (".weight", ".weight_scale_inv"),
    ("int4", (1, INT4_GROUP)): (".weight_packed", ".weight_scale"),
}


def tensor_names(encoding: Encoding, target: Target, weight: str, scale: str) -> tuple[str, str]:
    """Names of the codes and of the scales in the result.

    Args:
      encoding: what they are.
      target: for messages.
      weight: the weight's own name there.
      scale: what its scales are called in E4M3.

    Raises:
      InputError: for a stack of experts, which has no name for the scales of an integer format.
    """
    if not encoding.integers:
        return weight, scale
    if is_stack(weight):
        raise InputError(
            f"--to {target.name}: tensor {weight}: expected one tensor per expert, found a stack: --names official"
        )
    codes, scales = _SUFFIXES[encoding.element, encoding.block]
    base = weight.removesuffix(".weight")
    return base + codes, base + scales


def shape_name(codes: str) -> str:
    """Of the tensor that holds N and K of INT4 codes."""
    return codes.removesuffix("_packed") + "_shape"
