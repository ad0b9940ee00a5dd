"""What operators gave, call by call: taps, and the file that holds those of a run."""

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
from dsjax.export.standalone.arrays import Stored, read_safetensors
from dsjax.files import new_file

SCHEMA = 1
_KEY = "dsjax.taps"
_WORD = r"[^./\d][^./]*"
_NAME = re.compile(rf"(\d{{5,}})\.(-|\d+)(?:\.({_WORD}))??\.({_WORD})(?:\.(\d+))?")


@dataclass(frozen=True)
class Tap:
    """One result of one call of a named operator.

    order: the call's number, from 0 in the order of execution.
    layer: None outside layers.
    result: which of the call's results.
    block: the part of the layer that calls it, such as "queries"; "" where that has no name.
    """

    order: int
    layer: int | None
    operator: str
    result: int
    value: np.ndarray
    block: str = ""


@dataclass(frozen=True)
class Place:
    """What a tap's name says: `<order>.<layer or ->.[<block>.]<operator>[.<result>]`."""

    order: int
    layer: int | None
    operator: str
    result: int
    block: str = ""


def parse(name: str) -> Place | None:
    """The place that a tap's name tells, such as `00012.3.norm.rms_norm` or `00013.3.mla.0`; None of another name."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    order, layer, block, operator, result = found.groups()
    return Place(int(order), None if layer == "-" else int(layer), operator, int(result or 0), block or "")


def names(taps: Sequence[Tap]) -> list[str]:
    """A name for each; those of calls with several results end with the result's number."""
    results = Counter(tap.order for tap in taps)
    made = []
    for tap in taps:
        where = (f"{tap.order:05d}", "-" if tap.layer is None else str(tap.layer), tap.block, tap.operator)
        numbered = results[tap.order] > 1 or tap.result
        made.append(".".join(filter(None, (*where, str(tap.result) if numbered else ""))))
    return made


def arrays(taps: Sequence[Tap]) -> dict[str, np.ndarray]:
    """By name, as `compare` takes them.

    Raises:
      ValueError: if two taps have one name, or a block's or an operator's name has a dot or slash, or a digit first.
    """
    found = {name: np.asarray(tap.value) for name, tap in zip(names(taps), taps, strict=True)}
    places = [Place(tap.order, tap.layer, tap.operator, tap.result, tap.block) for tap in taps]
    if len(found) < len(taps) or [parse(name) for name in found] != places:
        raise ValueError("expected taps of different calls and results, and operators' names without '.' and '/'")
    return found


def save(path: Path, results: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Writes a .safetensors file of one run's results, whole or not at all; `about` (JSON) says what run it is.

    Args:
      results: taps by their names (`arrays`), and others such as "logits".

    Raises:
      InputError: if it cannot be written.
      ValueError: of an element type that safetensors files have no name for.
    """
    metadata = {_KEY: json.dumps({"schema": SCHEMA, "about": dict(about)})}
    with new_file(path) as temporary:
        temporary.unlink()
        write_file(temporary, dict(results), metadata)


def load(path: Path) -> tuple[dict[str, Stored], dict[str, Any] | None]:
    """The arrays of a .safetensors file by name, and what it says of its run; None if it is no file of taps.

    Raises:
      InputError: if it is damaged, or of a newer schema.
    """
    with bad_input(path):
        tensors, metadata = read_safetensors(path)
    if _KEY not in metadata:
        return tensors, None
    try:
        head = json.loads(metadata[_KEY])
        schema, about = head["schema"], dict(head["about"])
    except (KeyError, TypeError, ValueError, RecursionError):
        raise InputError(f"{path}: expected metadata of taps, found {str(metadata[_KEY])[:80]!r}") from None
    if schema != SCHEMA:
        raise InputError(f"{path}: expected taps of schema {SCHEMA}, found {schema}")
    return tensors, about
