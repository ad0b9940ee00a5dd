"""What operators gave, call by call: taps, and the file that holds them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsjax.align.inputs import bad_input
from dsjax.checkpoint.safetensors_writer import write_file
from dsjax.errors import InputError
from dsjax.export.standalone.arrays import read_safetensors
from dsjax.files import new_file

SCHEMA = 1
_KEY = "dsjax.taps"
_NAME = re.compile(r"(\d{5,})\.(-|\d+)\.([^./]+?)(?:\.(\d+))?")


@dataclass(frozen=True)
class Tap:
    """One result of one call of a named operator.

    order: the call's number, from 0 in the order of execution.
    layer: None outside layers.
    result: which of the call's results.
    """

    order: int
    layer: int | None
    operator: str
    result: int
    value: np.ndarray


@dataclass(frozen=True)
class Place:
    """What a tap's name says: `<order>.<layer or ->.<operator>[.<result>]`."""

    order: int
    layer: int | None
    operator: str
    result: int


def parse(name: str) -> Place | None:
    """The place that a tap's name tells, such as `00012.3.rms_norm` or `00013.3.mla.0`; None of another name."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    order, layer, operator, result = found.groups()
    return Place(int(order), None if layer == "-" else int(layer), operator, int(result or 0))


def names(taps: Sequence[Tap]) -> list[str]:
    """A name for each; those of calls with several results end with the result's number."""
    results = Counter(tap.order for tap in taps)
    made = []
    for tap in taps:
        name = f"{tap.order:05d}.{'-' if tap.layer is None else tap.layer}.{tap.operator}"
        made.append(f"{name}.{tap.result}" if results[tap.order] > 1 or tap.result else name)
    return made


def arrays(taps: Sequence[Tap]) -> dict[str, np.ndarray]:
    """By name, as `compare` takes them.

    Raises:
      ValueError: if two taps have one name, or an operator's name has a dot or slash.
    """
    found = {name: np.asarray(tap.value) for name, tap in zip(names(taps), taps, strict=True)}
    if len(found) < len(taps) or any(parse(name) is None for name in found):
        raise ValueError("expected taps of different calls and results, and operators' names without '.' and '/'")
    return found


def save(path: Path, taps: Sequence[Tap], about: Mapping[str, Any] | None = None) -> None:
    """Writes a .safetensors file of taps, whole or not at all; `about` (JSON) says what run they are of.

    Raises:
      InputError: if it cannot be written.
      ValueError: see `arrays`; or of an element type that safetensors files have no name for.
    """
    metadata = {_KEY: json.dumps({"schema": SCHEMA, "about": dict(about or {})})}
    with new_file(path) as temporary:
        temporary.unlink()
        write_file(temporary, arrays(taps), metadata)


def load(path: Path) -> tuple[list[Tap], dict[str, Any]]:
    """The taps of a file in their order, BF16 and FP8 as float32, and what was said about them.

    Raises:
      InputError: if it is damaged, not a file of taps, or of a newer schema.
    """
    with bad_input(path):
        tensors, metadata = read_safetensors(path)
    try:
        head = json.loads(metadata[_KEY])
        schema, about = head["schema"], dict(head["about"])
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path}: expected taps, found a file without what says so") from None
    if schema != SCHEMA:
        raise InputError(f"{path}: expected taps of schema {SCHEMA}, found {schema}")
    taps = []
    for name, stored in tensors.items():
        place = parse(name)
        if place is None:
            raise InputError(f"{path}: expected tensors named ORDER.LAYER.OPERATOR, found {name[:80]!r}")
        taps.append(Tap(place.order, place.layer, place.operator, place.result, stored.values()))
    return sorted(taps, key=lambda tap: (tap.order, tap.result)), about
