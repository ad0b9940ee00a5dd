"""What chips can do: the table of public figures (chips.toml), and a user's own file of the same form."""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from dsjax.errors import InputError

ELEMENTS = ("fp32", "bf16", "fp16", "fp8", "int8", "fp4")
"""Element types that rates of matrix products are given for."""

_KEYS = ("title", "memory_bytes", "memory_bandwidth", "flops", "scale_up", "scale_out", "note")


@dataclasses.dataclass(frozen=True)
class Link:
    """Links of one level.

    Attributes:
      bandwidth: bytes per second, per card and direction.
      cards: in one domain; None where the level has no end (scale-out).
      latency: seconds that one collective takes however little it moves; 0 where no source gives it.
    """

    bandwidth: float
    cards: int | None = None
    latency: float = 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class Chip:
    """One card's figures; None for those that no source gives.

    Attributes:
      name: in the table, or the file's path.
      title: for people.
      memory_bytes: of one card.
      memory_bandwidth: bytes per second.
      flops: dense operations per second by element type, one of `ELEMENTS`; a multiply-add is two.
      scale_up, scale_out: links inside a domain, and between domains.
      note: a caution, or "".
      sources: where each figure is from, by its name in the file ("flops.fp8").
      unverified: names of figures that were not read in the vendor's own words.
    """

    name: str
    title: str
    memory_bytes: float
    memory_bandwidth: float | None = None
    flops: Mapping[str, float] = dataclasses.field(default_factory=dict)
    scale_up: Link | None = None
    scale_out: Link | None = None
    note: str = ""
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unverified: tuple[str, ...] = ()


class _Reader:
    """Takes a chip's figures out of a TOML table and remembers where each is from."""

    def __init__(self, where: str, table: Any, sources: Any) -> None:
        self.where = where
        if not isinstance(table, dict):
            raise InputError(f"{where}: expected a table of figures, found {table!r}")
        self.table, self.known = table, self._known(sources)
        self.sources: dict[str, str] = {}
        self.unverified: list[str] = []

    def fail(self, name: str, expected: str, found: Any) -> InputError:
        return InputError(f"{self.where}: {name}: expected {expected}, found {found!r}")

    def _known(self, sources: Any) -> dict[str, tuple[str, bool]]:
        """(where it is, whether it is the vendor's own) by a source's name."""
        if not isinstance(sources, dict):
            raise self.fail("sources", "a table", sources)
        found = {}
        for name, source in sources.items():
            at = source.get("at") if isinstance(source, dict) else None
            verified = source.get("verified", False) if isinstance(source, dict) else None
            if not isinstance(at, str) or not isinstance(verified, bool):
                raise self.fail(f"sources.{name}", "a text `at`, and perhaps `verified` true or false", source)
            found[name] = (at, verified)
        return found

    def text(self, name: str) -> str:
        value = self.table.get(name, "")
        if not isinstance(value, str):
            raise self.fail(name, "a text", value)
        return value

    def section(self, name: str, keys: tuple[str, ...]) -> dict[str, Any]:
        """A table inside the table, {} if absent."""
        value = self.table.get(name, {})
        if not isinstance(value, dict):
            raise self.fail(name, f"a table of {', '.join(keys)}", value)
        for key in value:
            if key not in keys:
                raise self.fail(name, f"only {', '.join(keys)}", key)
        return value

    def figure(self, name: str, value: Any, unit: str, *, zero: bool = False) -> float:
        """A positive number, or [number, source]."""
        number, source = value if isinstance(value, list) and len(value) == 2 else (value, None)
        expected = f"a positive number{unit}" if not zero else f"a number{unit}, zero or more"
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < float("inf"):
            raise self.fail(name, f"{expected}, or [number, source]", value)
        if number == 0 and not zero:
            raise self.fail(name, expected, value)
        if source is not None:
            if not isinstance(source, str) or source not in self.known:
                raise self.fail(
                    name, f"a source out of [sources] ({', '.join(self.known) or 'which has none'})", source
                )
            self.sources[name], verified = self.known[source]
            if not verified:
                self.unverified.append(name)
        return float(number)

    def link(self, name: str, *, domain: bool) -> Link | None:
        keys = ("bandwidth", "cards", "latency") if domain else ("bandwidth", "latency")
        table = self.section(name, keys)
        if not table:
            return None
        for key in keys[:-1]:
            if key not in table:
                raise self.fail(f"{name}.{key}", "it, as links were given", None)
        cards = self.figure(f"{name}.cards", table["cards"], " of cards") if domain else None
        if cards is not None and cards != int(cards):
            raise self.fail(f"{name}.cards", "a whole number of cards", table["cards"])
        return Link(
            bandwidth=self.figure(f"{name}.bandwidth", table["bandwidth"], " of bytes per second"),
            cards=None if cards is None else int(cards),
            latency=self.figure(f"{name}.latency", table.get("latency", 0), " of seconds", zero=True),
        )

    def chip(self, name: str) -> Chip:
        for key in self.table:
            if key not in _KEYS:
                raise self.fail(key, f"one of {', '.join(_KEYS)}", self.table[key])
        if "memory_bytes" not in self.table:
            raise self.fail("memory_bytes", "a positive number of bytes", None)
        flops = self.section("flops", ELEMENTS)
        bandwidth = self.table.get("memory_bandwidth")
        return Chip(
            name=name,
            title=self.text("title") or name,
            memory_bytes=self.figure("memory_bytes", self.table["memory_bytes"], " of bytes"),
            memory_bandwidth=None
            if bandwidth is None
            else self.figure("memory_bandwidth", bandwidth, " of bytes per second"),
            flops={key: self.figure(f"flops.{key}", flops[key], " of operations per second") for key in flops},
            scale_up=self.link("scale_up", domain=True),
            scale_out=self.link("scale_out", domain=False),
            note=self.text("note"),
            sources=self.sources,
            unverified=tuple(self.unverified),
        )


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise InputError(f"{where}: expected TOML, found a mistake: {e}") from None


@lru_cache(maxsize=1)
def _table() -> tuple[dict[str, Any], dict[str, Any]]:
    """(chips, sources) of the project's own table."""
    data = _parse((resources.files("dsjax.plan") / "chips.toml").read_text(encoding="utf-8"), "chips.toml")
    return data["chips"], data["sources"]


def chip_names() -> tuple[str, ...]:
    """Names of the chips in the table."""
    return tuple(_table()[0])


def load_chip(name_or_file: str) -> Chip:
    """A chip of the table by its name, or the one that a TOML file describes.

    Raises:
      InputError: if it is neither; naming the file, the figure, what was expected and what was found.
    """
    chips, sources = _table()
    if name_or_file in chips:
        return _Reader(f"chips.toml: {name_or_file}", chips[name_or_file], sources).chip(name_or_file)
    if not os.path.isfile(name_or_file):
        names = ", ".join(chips)
        raise InputError(f"--chip {name_or_file}: expected a TOML file or a known chip ({names}), found neither")
    try:
        text = Path(name_or_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"--chip {name_or_file}: expected a readable TOML file, found: {e}") from None
    data = _parse(text, name_or_file)
    own = data.pop("sources", {})
    return _Reader(name_or_file, data, own).chip(name_or_file)
