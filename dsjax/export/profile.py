"""What a compiler takes: profiles as data (profiles/*.toml), and what of a module's inventory violates one.

A profile is a list of rules, each with its source and date. A violation says what, where in the model, and which switch
of `dsjax export` removes it, or that none does.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any

from dsjax.errors import InputError
from dsjax.export.artifact import parse_version

SWITCHES: Mapping[str, tuple[str, ...]] = {
    "--target": ("typed", "typed-fp8", "portable", "bfloat16", "float16", "float32", "w8a8", "w4a8"),
    "--topk": ("chlo", "sort", "loop"),
    "--moe": ("loop", "ragged", "dense"),
    "--spmd": ("manual", "auto"),
    "--numerics": ("plain", "native"),
}
"""What a rule may name as remedy, besides "none"."""

_COUNTED = {"operator": "operators", "type": "types", "feature": "features"}
_LIMITED = {"version": "minimum_version", "constant": "largest_constant", "rank": "max_rank"}
_LEVELS = ("refused", "doubtful")
_KEYS = {
    "kind",
    "forbid",
    "allow",
    "require",
    "except",
    "most",
    "level",
    "reason",
    "source",
    "date",
    "switch",
    "switch_in",
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """One thing that a compiler refuses, demands, or takes with doubtful results.

    Attributes:
      kind: "operator", "type" or "feature", matched by patterns; or "version", "constant" (bytes) or "rank", which
        have a greatest value.
      forbid, allow, require: patterns ("f8*"): names that may not occur, the only ones that may, and of which one must.
      but: patterns of names that the rule leaves alone.
      most: the greatest value.
      level: "refused", or "doubtful" where it compiles and the numbers or the speed are known to suffer.
      reason, source, date: why, who says so, and when that was looked up.
      switch: what removes it, "none" where nothing does.
      switch_in: named operator -> what removes it there.
    """

    kind: str
    reason: str
    source: str
    date: str
    switch: str
    forbid: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()
    require: tuple[str, ...] = ()
    but: tuple[str, ...] = ()
    most: str | int | None = None
    level: str = "refused"
    switch_in: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Profile:
    """A compiler's rules, those of the profiles that it extends last; a user's file is called without its folder."""

    name: str
    title: str
    rules: tuple[Rule, ...]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Violation:
    """What of a module a profile does not take; as text, one line."""

    what: str
    where: str
    switch: str
    source: str
    reason: str = ""
    level: str = "refused"
    date: str = ""

    def __str__(self) -> str:
        remedy = "no switch removes it" if self.switch == "none" else f"{self.switch} removes it"
        reason = f": {self.reason}" if self.reason else ""
        return f"{self.level}: {self.what}{reason}; where: {self.where}; {remedy} [{self.source}, {self.date}]"


def names() -> tuple[str, ...]:
    """The profiles that come with dsjax."""
    folder = resources.files("dsjax.export").joinpath("profiles")
    return tuple(sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")))


def load(name: str) -> Profile:
    """A profile by its name, or a user's own file of the same form (`*.toml`).

    Raises:
      InputError: for an unknown name, with the known ones, or for a damaged file, with the rule at fault.
    """
    return _load(name, ())


def _load(name: str, within: tuple[str, ...]) -> Profile:
    if name in within:
        raise InputError(f"{name}: extends: expected no circle, found {' > '.join((*within, name))}")
    table = _read(name)
    _expect(name, set(table) <= {"title", "note", "extends", "rule"}, "title, note, extends and rules", sorted(table))
    _expect(name, isinstance(table.get("title"), str), "a title", table.get("title"))
    rules = table.get("rule", [])
    _expect(name, isinstance(rules, list) and bool(rules or table.get("extends")), "rules", rules)
    own = [_rule(f"{name}: rule {i + 1}", rule) for i, rule in enumerate(rules)]
    inherited = [r for other in _texts(name, table, "extends") for r in _load(other, (*within, name)).rules]
    return Profile(Path(name).stem, table["title"], (*own, *inherited), table.get("note", ""))


def _read(name: str) -> dict[str, Any]:
    try:
        if name.endswith(".toml"):
            return tomllib.loads(Path(name).read_text(encoding="utf-8"))
        if name not in names():
            raise InputError(f"profile: expected one of {', '.join(names())} or a .toml file, found {name!r}")
        file = resources.files("dsjax.export").joinpath("profiles", f"{name}.toml")
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"{name}: cannot be read: {e.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise InputError(f"{name}: expected TOML, found {e}") from None


def _expect(where: str, right: bool, expected: str, found: Any) -> None:
    if not right:
        raise InputError(f"{where}: expected {expected}, found {found!r}")


def _texts(where: str, table: Mapping[str, Any], key: str) -> tuple[str, ...]:
    found = table.get(key, [])
    _expect(f"{where}: {key}", isinstance(found, list) and all(isinstance(x, str) for x in found), "texts", found)
    return tuple(found)


def _rule(where: str, table: Any) -> Rule:
    _expect(where, isinstance(table, dict), "a table", table)
    _expect(where, set(table) <= _KEYS, f"only {', '.join(sorted(_KEYS))}", sorted(set(table) - _KEYS))
    for key in ("kind", "reason", "source", "date", "switch"):
        found = table.get(key)
        _expect(f"{where}: {key}", isinstance(found, str) and bool(found), "a text", found)
    kind, most, level = table["kind"], table.get("most"), table.get("level", "refused")
    _expect(f"{where}: kind", kind in _COUNTED or kind in _LIMITED, f"one of {', '.join([*_COUNTED, *_LIMITED])}", kind)
    _expect(f"{where}: level", level in _LEVELS, f"one of {', '.join(_LEVELS)}", level)
    if kind == "version":
        _expect(f"{where}: most", isinstance(most, str), "a version", most)
        parse_version(str(most))
    elif kind in _LIMITED:
        _expect(f"{where}: most", isinstance(most, int) and not isinstance(most, bool), "a number", most)
    patterns = {key: _texts(where, table, key) for key in ("forbid", "allow", "require")}
    given = [key for key, found in patterns.items() if found]
    _expect(where, len(given) == (kind in _COUNTED), "one of forbid, allow and require, or most for limits", given)
    inside = table.get("switch_in", {})
    _expect(f"{where}: switch_in", isinstance(inside, dict), "a table", inside)
    for switch in (table["switch"], *inside.values()):
        flag, _, value = str(switch).partition(" ")
        known = switch == "none" or value in SWITCHES.get(flag, ())
        _expect(f"{where}: switch", known, f"none or one of {', '.join(SWITCHES)} with its value", switch)
    told: dict[str, Any] = {key: table[key] for key in ("reason", "source", "date", "switch")} | patterns
    return Rule(kind, **told, but=_texts(where, table, "except"), most=most, level=level, switch_in=dict(inside))


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, p) for p in patterns)


def _place(place: Mapping[str, Any]) -> str:
    return " > ".join(place["operators"]) or place["place"]


def _violation(rule: Rule, what: str, where: str, switch: str) -> Violation:
    return Violation(what, where, switch, rule.source, rule.reason, rule.level, rule.date)


def _counted(rule: Rule, inventory: Mapping[str, Any]) -> Iterator[Violation]:
    """Violations of a rule about names: one for each name and remedy."""
    found = dict(inventory[_COUNTED[rule.kind]])
    if rule.kind == "operator":
        for inner in inventory["bodies"].values():
            found |= {name: {"text": n, "executed": 0} for name, n in inner.items() if name not in found}
    if rule.require:
        if not any(_matches(name, rule.require) for name in found):
            yield _violation(rule, f"no {' or '.join(rule.require)}", "whole module", rule.switch)
        return
    for name in sorted(found):
        bad = _matches(name, rule.forbid) if rule.forbid else not _matches(name, rule.allow)
        if not bad or _matches(name, rule.but):
            continue
        entry = found[name]
        counts = f" ({entry['text']} written, {entry['executed']} executed)" if "text" in entry else ""
        by_switch: dict[str, list[str]] = {}
        for place in inventory["where"].get(name, ()):
            remedies = [rule.switch_in[o] for o in reversed(place["operators"]) if o in rule.switch_in]
            by_switch.setdefault(remedies[0] if remedies else rule.switch, []).append(_place(place))
        for switch, places in (by_switch or {rule.switch: ["whole module"]}).items():
            yield _violation(rule, f"{rule.kind} {name}{counts}", ", ".join(dict.fromkeys(places)), switch)


def check(profile: Profile, inventory: Mapping[str, Any]) -> list[Violation]:
    """What of a module (`dsjax.export.inventory`) the profile does not take, refusals first; [] if nothing.

    Dead functions count: a compiler reads them too.
    """
    found: list[Violation] = []
    for rule in profile.rules:
        if rule.kind in _COUNTED:
            found += _counted(rule, inventory)
            continue
        value = inventory[_LIMITED[rule.kind]]
        if rule.kind == "version":
            if parse_version(value) > parse_version(str(rule.most)):
                found.append(_violation(rule, f"StableHLO {value}, above {rule.most}", "whole module", rule.switch))
        else:
            where = "whole module"
            if rule.kind == "constant":
                value, where = value["bytes"], f"a constant {value['type']}"
            if value > int(rule.most or 0):
                found.append(_violation(rule, f"{rule.kind} of {value:,}, above {rule.most:,}", where, rule.switch))
    return sorted(dict.fromkeys(found), key=lambda v: _LEVELS.index(v.level))
