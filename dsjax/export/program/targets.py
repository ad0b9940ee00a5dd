"""What a compiler is to see: which element types a program's weights have, and how products with them are written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from dsjax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Target:
    """One choice of `--target`.

    Attributes:
      name: of the flag.
      weights: what matrices are held as, one of `params.WEIGHTS`.
      typed: formats (`quant.Format` names) whose codes are arguments of that type; others are bytes.
      expand_fp4: FP4 codes become E4M3 codes beforehand, their scales unchanged; exact.
      choices: variants that the target stands for.
      says: for whom.
    """

    name: str
    weights: str
    typed: frozenset[str]
    expand_fp4: bool
    choices: Mapping[str, str]
    says: str


_FLOATS = frozenset({"bf16", "f16"})
_INTEGERS = frozenset({"int8"})  # two INT4 codes share a byte


def _target(name: str, says: str, weights: str = "", typed: frozenset[str] = _FLOATS, decode: str = "bits") -> Target:
    return Target(name, weights or name, typed, decode == "fp8", {"decode": decode}, says)


_ALL = (
    _target("typed", "FP8, E8M0 and FP4 as types", "stored", _FLOATS | {"e4m3", "e8m0", "e2m1"}, "convert"),
    _target("typed-fp8", "FP8 as a type, E8M0 scales as bytes, FP4 as FP8", "stored", _FLOATS | {"e4m3"}, "fp8"),
    _target("portable", "every code and scale as bytes, decoded by integer operations", "stored"),
    _target("bfloat16", "matrices dequantised to bfloat16"),
    _target("float16", "matrices dequantised to float16"),
    _target("float32", "matrices dequantised to float32"),
    _target("w8a8", "INT8 weights and activations, int8 x int8 -> int32", typed=_FLOATS | _INTEGERS),
    _target("w4a8", "INT4 experts (of a dense model all linear layers), else as w8a8", typed=_FLOATS | _INTEGERS),
)

TARGETS: dict[str, Target] = {target.name: target for target in _ALL}


def find_target(name: str) -> Target:
    """The target of that name.

    Raises:
      InputError: if there is none.
    """
    if name not in TARGETS:
        raise InputError(f"--target {name}: expected {', '.join(TARGETS)}")
    return TARGETS[name]
