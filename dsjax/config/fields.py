"""Reading a config.json: typed fields with errors that name them, and the parts that the families share."""

from __future__ import annotations

import dataclasses
import json
import reprlib
from pathlib import Path
from typing import Any

from dsjax.errors import InputError

_MAX_SIZE = 1 << 24  # far above any axis of any model; keeps products inside 64 bits
MAX_EXPERTS = 1 << 16
_MIN_NUMBER, _MAX_NUMBER = 1e-30, 1e30  # what float32 holds with room to compute


@dataclasses.dataclass(frozen=True)
class Yarn:
    """Static YaRN scaling of RoPE (spec V3 2.2). `mscale*` is None where the file has no such field."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How the checkpoint's linear weights are stored: E4M3 with one scale per block (spec V3 3.3)."""

    block: tuple[int, int]
    scale_fmt: str | None

    @property
    def pow2(self) -> bool:
        """Whether scales, of activations too, are powers of two."""
        return self.scale_fmt == "ue8m0"


class Fields:
    """Typed access to a JSON object, with errors that name file, field, expected and found."""

    def __init__(self, data: dict[str, Any], where: str) -> None:
        self.data = data
        self.where = where

    def fail(self, name: str, expected: str) -> InputError:
        value = self.data.get(name)
        # reprlib stops at a depth; json.dumps would recurse into whatever nesting the file has.
        text = (reprlib.repr(value) if isinstance(value, dict | list) else json.dumps(value))[:80]
        found = text if name in self.data else "nothing"
        return InputError(f"{self.where}: field {name!r}: expected {expected}, found {found}")

    def integer(self, name: str, *, low: int = 1, high: int = _MAX_SIZE, default: int | None = None) -> int:
        value = self.data.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.fail(name, f"an integer from {low} to {high}")
        return value

    def number(self, name: str, *, low: float = _MIN_NUMBER, default: float | None = None) -> float:
        value = self.data.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= _MAX_NUMBER:
            raise self.fail(name, f"a number from {low:g} to {_MAX_NUMBER:g}")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        return None if self.data.get(name) is None else self.number(name, low=0.0)

    def choice(self, name: str, choices: tuple[Any, ...], default: Any = None) -> Any:
        value = self.data.get(name, default)
        if not any(value is c or (type(value) is type(c) and value == c) for c in choices):
            raise self.fail(name, " or ".join(json.dumps(c) for c in choices))
        return value

    def section(self, name: str) -> Fields | None:
        value = self.data.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.fail(name, "an object")
        return Fields(value, f"{self.where}: {name}")


def parse_rope_theta(fields: Fields, rope: Fields | None) -> float:
    """RoPE's base: in `rope`, which is `rope_parameters`, where that has it, else among the other fields."""
    where = rope if rope is not None and "rope_theta" in rope.data else fields
    return where.number("rope_theta", low=1.0 + 1e-6, default=10000.0)


def parse_yarn(section: Fields | None) -> Yarn | None:
    """RoPE scaling in any of its spellings: `type`, `rope_type`; None where it is absent or "default"."""
    if section is None:
        return None
    key = "rope_type" if "rope_type" in section.data else "type"
    if section.choice(key, ("yarn", "default"), default="default") == "default":
        return None
    return Yarn(
        factor=section.number("factor"),
        original_max_position_embeddings=section.integer("original_max_position_embeddings"),
        beta_fast=section.number("beta_fast", default=32.0),
        beta_slow=section.number("beta_slow", default=1.0),
        mscale=section.optional_number("mscale"),
        mscale_all_dim=section.optional_number("mscale_all_dim"),
    )


def parse_fp8(section: Fields, scale_fmts: tuple[str | None, ...]) -> Quantization:
    """The quantization_config of an FP8 checkpoint."""
    section.choice("quant_method", ("fp8",))
    section.choice("fmt", ("e4m3",), default="e4m3")
    section.choice("activation_scheme", ("dynamic",), default="dynamic")
    scale_fmt = section.choice("scale_fmt", scale_fmts)
    block = section.data.get("weight_block_size")
    if block != [128, 128]:
        raise section.fail("weight_block_size", "[128, 128]")
    return Quantization((128, 128), scale_fmt)


def token_ids(data: dict[str, Any], name: str, vocab_size: int, where: str) -> tuple[int, ...]:
    """The ids in a field that holds an id, a list of ids, or nothing.

    Raises:
      InputError: for anything else, or ids outside the vocabulary.
    """
    return field_token_ids(Fields(data, where), name, vocab_size)


def field_token_ids(fields: Fields, name: str, vocab_size: int) -> tuple[int, ...]:
    value = fields.data.get(name)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < vocab_size for i in ids):
        raise fields.fail(name, f"token ids below vocab_size {vocab_size}")
    return tuple(ids)


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      InputError: if the file is missing, not UTF-8 JSON, or not an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: expected a JSON file, found none") from None
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path}: expected a JSON object, found something unreadable: {e}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data
