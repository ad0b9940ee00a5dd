"""Checkpoints with integer weights: what a config.json's quantization_config says of INT8 and INT4.

Three ways of writing it down are read: compressed-tensors (llm-compressor, vLLM) with weights per output channel
("int-quantized", INT8) or in groups of 128 channels ("pack-quantized", INT4), SGLang's `blockwise_int8` with weights in
128 x 128 blocks, and its `w8a8_int8`, which has per-channel weights and names no layers.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any, ClassVar

from dsjax.config.fields import Fields, Quantization, parse_fp8
from dsjax.config.patterns import plain_expression

METHODS = ("compressed-tensors", "blockwise_int8", "w8a8_int8")
"""Values of quant_method with integer weights."""

_LINEAR = "Linear"  # the class that stands for every matrix among targets
_GROUP = 128


@dataclasses.dataclass(frozen=True)
class IntegerGroup:
    """Modules whose weights are stored alike.

    Attributes:
      targets: module names, plain expressions (`patterns`) as `re:...`, or "Linear" for all that no other group names.
      format: "int8" (a scale per output channel), "int8-block" (per 128 x 128) or "int4" (per row and 128 channels).
    """

    targets: tuple[str, ...]
    format: str


@dataclasses.dataclass(frozen=True)
class IntegerQuantization:
    """How the checkpoint's linear weights are stored in INT8 or INT4, and what its activations are to be.

    Attributes:
      groups: in their order.
      ignore: modules that stay floats, as targets are written.
      activations: as `Numerics.activations`: "int8" per token, "int8-group" per token and 128 channels, or "float" for
        weights alone.
    """

    groups: tuple[IntegerGroup, ...]
    ignore: tuple[str, ...]
    activations: str

    pow2: ClassVar[bool] = False
    scale_fmt: ClassVar[str | None] = None

    @cached_property
    def _ignored(self) -> frozenset[str]:
        """A model of many experts may leave as many modules alone."""
        return frozenset(self.ignore)

    @cached_property
    def _ignored_patterns(self) -> tuple[str, ...]:
        return tuple(target for target in self.ignore if target.startswith("re:"))

    def format_of(self, module: str) -> str | None:
        """How a module's weight is stored; None for floats."""
        if module in self._ignored or any(_matches(module, target) for target in self._ignored_patterns):
            return None
        for group in self.groups:
            if any(_matches(module, target) for target in group.targets):
                return group.format
        return next((group.format for group in self.groups if _LINEAR in group.targets), None)


def _matches(module: str, target: str) -> bool:
    if target.startswith("re:"):
        return plain_expression(target[3:]).match(module)
    return module == target


def _targets(fields: Fields, name: str) -> tuple[str, ...]:
    value = fields.data.get(name)
    value = [] if value is None else value
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise fields.fail(name, "a list of module names")
    for target in value:
        if target.startswith("re:"):
            try:
                plain_expression(target[3:])
            except ValueError:
                raise Fields({name: target}, fields.where).fail(name, "plain expressions after re:") from None
    return tuple(value)


def _activations(fields: Fields | None) -> str:
    if fields is None:
        return "float"
    for name, value in (("num_bits", 8), ("type", "int"), ("symmetric", True), ("dynamic", True)):
        fields.choice(name, (value,))
    fields.choice("strategy", ("token",))
    return "int8"


def _weights(fields: Fields, layout: Any) -> str:
    """The format of a group's weights: one that its `format` field agrees with."""
    bits = fields.choice("num_bits", (8, 4))
    for name, values in (("type", ("int",)), ("symmetric", (True,)), ("dynamic", (False, None)), ("actorder", (None,))):
        fields.choice(name, values)
    fields.choice("strategy", ("channel",) if bits == 8 else ("group",))
    if bits == 4:
        fields.integer("group_size", low=_GROUP, high=_GROUP)
    expected = "int-quantized" if bits == 8 else "pack-quantized"
    if layout != expected:
        raise Fields({"format": layout}, fields.where).fail("format", f'"{expected}" with num_bits {bits}')
    return "int8" if bits == 8 else "int4"


def _compressed_tensors(section: Fields) -> IntegerQuantization:
    whole = section.choice("format", ("int-quantized", "pack-quantized", "mixed-precision"))
    section.choice("kv_cache_scheme", (None,))
    groups = section.section("config_groups")
    if groups is None or not groups.data:
        raise section.fail("config_groups", "an object with a group of weights")
    found: list[IntegerGroup] = []
    activations: dict[str, str] = {}
    for name in groups.data:
        group = groups.section(name)
        weights = None if group is None else group.section("weights")
        if group is None or weights is None:
            raise groups.fail(name, "an object with weights")
        group.choice("output_activations", (None,))
        targets = _targets(group, "targets")
        if not targets:
            raise group.fail("targets", "a list of module names")
        own = group.data.get("format")
        found.append(IntegerGroup(targets, _weights(weights, whole if own is None else own)))
        activations[name] = _activations(group.section("input_activations"))
    if len(set(activations.values())) > 1:
        raise section.fail("config_groups", "groups that agree in their input_activations")
    return IntegerQuantization(tuple(found), _targets(section, "ignore"), next(iter(activations.values())))


def parse_quantization(
    fields: Fields, scale_fmts: tuple[str | None, ...] = (None, "ue8m0")
) -> Quantization | IntegerQuantization | None:
    """What a config.json says in its quantization_config, if it has one.

    Args:
      fields: of the whole file.
      scale_fmts: what an FP8 checkpoint of this family may name there; none where there are no FP8 checkpoints.
    """
    section = fields.section("quantization_config")
    if section is None:
        return None
    if section.choice("quant_method", (*(("fp8",) if scale_fmts else ()), *METHODS)) == "fp8":
        return parse_fp8(section, scale_fmts)
    return parse_integers(section)


def parse_integers(section: Fields) -> IntegerQuantization:
    """The quantization_config of a checkpoint whose quant_method is one of `METHODS`.

    Raises:
      InputError: naming the field, for anything that would be read or computed otherwise than its author meant it.
    """
    method = section.choice("quant_method", METHODS)
    if method == "compressed-tensors":
        return _compressed_tensors(section)
    section.choice("activation_scheme", ("dynamic",), default="dynamic")
    ignore = _targets(section, "ignored_layers") + _targets(section, "ignore")
    if method == "w8a8_int8":
        return IntegerQuantization((IntegerGroup((_LINEAR,), "int8"),), ignore, "int8")
    if section.data.get("weight_block_size") != [_GROUP, _GROUP]:
        raise section.fail("weight_block_size", "[128, 128]")
    return IntegerQuantization((IntegerGroup((_LINEAR,), "int8-block"),), ignore, "int8-group")
