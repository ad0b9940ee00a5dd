"""What a compiler takes: profiles as data (profiles/*.toml), and what of a module's inventory violates one.

A profile is a list of rules, each with its source and date. A violation says what, where in the model, and which switch
of `dsjax export` removes it, or that none does.
"""

from __future__ import annotations

import dataclasses
import itertools
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any

from dsjax.config import read_json_object
from dsjax.errors import InputError
from dsjax.export.profiles.vocabulary import known, near
from dsjax.export.program.switches import SWITCHES
from dsjax.export.stablehlo.artifact import parse_version
from dsjax.export.stablehlo.inventory import SCHEMA
from dsjax.operators import operators

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
    """What of a module a profile does not take; as text, one line.

    Attributes:
      kind: the rule's.
      name: of what is there or lacking; None for limits.
      what: the same for a person.
      where: in the model, outermost named operators first; ("whole module",) where that cannot be told.
      switch, source, reason, level, date: the rule's.
      written, executed: how often; None for what is not counted.
    """

    kind: str
    name: str | None
    what: str
    where: tuple[str, ...]
    switch: str
    source: str
    reason: str
    level: str
    date: str
    written: int | None = None
    executed: int | None = None

    def __str__(self) -> str:
        counts = "" if self.written is None else f" ({self.written} written, {self.executed} executed)"
        where = ", ".join(self.where)
        return (
            f"{self.level}: {self.what}{counts}: {self.reason}; where: {where}; {remedy(self.switch)} "
            f"[{self.source}, {self.date}]"
        )


def remedy(switch: str) -> str:
    """What a switch does, in words."""
    return "no switch removes it" if switch == "none" else f"{switch} removes it"


def names() -> tuple[str, ...]:
    """The profiles that come with dsjax."""
    folder = resources.files(__package__)
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
    keys = {"title", "note", "extends", "takes", "rule"}
    _expect(name, set(table) <= keys, "title, note, extends, takes and rules", sorted(table))
    _expect(name, isinstance(table.get("title"), str), "a title", table.get("title"))
    rules = table.get("rule", [])
    _expect(name, isinstance(rules, list) and bool(rules or table.get("extends")), "rules", rules)
    own = [_rule(f"{name}: rule {i + 1}", rule) for i, rule in enumerate(rules)]
    takes = _texts(name, table, "takes")
    inherited = [rule for other in _texts(name, table, "extends") for rule in _load(other, (*within, name)).rules]
    for pattern in takes:
        forbidden = any(_matches(pattern, rule.forbid) for rule in inherited)
        _expect(f"{name}: takes", forbidden, "what the profiles that it extends forbid", pattern)
    excused = [
        dataclasses.replace(rule, but=(*rule.but, *(p for p in takes if _matches(p, rule.forbid))))
        for rule in inherited
    ]
    return Profile(Path(name).stem, table["title"], (*own, *excused), table.get("note", ""))


def _read(name: str) -> dict[str, Any]:
    try:
        if name.endswith(".toml"):
            return tomllib.loads(Path(name).read_text(encoding="utf-8"))
        if name not in names():
            raise InputError(f"profile: expected one of {', '.join(names())} or a .toml file, found {name!r}")
        file = resources.files(__package__).joinpath(f"{name}.toml")
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
    patterns["but"] = _texts(where, table, "except")
    for pattern in itertools.chain(*patterns.values()):
        if not known(kind, pattern):
            raise InputError(f"{where}: expected the name of some {kind}, found {pattern!r}{near(kind, pattern)}")
    inside = table.get("switch_in", {})
    _expect(f"{where}: switch_in", isinstance(inside, dict), "a table", inside)
    known_operators = {operator.name for operator in operators()} if inside else set()
    for name in inside:
        _expect(f"{where}: switch_in", name in known_operators, "named operators (dsjax ops)", name)
    for switch in (table["switch"], *inside.values()):
        flag, _, value = str(switch).partition(" ")
        right = switch == "none" or value in SWITCHES.get(flag, ())
        _expect(f"{where}: switch", right, f"none or one of {', '.join(SWITCHES)} with its value", switch)
    told: dict[str, Any] = {key: table[key] for key in ("reason", "source", "date", "switch")} | patterns
    return Rule(kind, **told, most=most, level=level, switch_in=dict(inside))


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, p) for p in patterns)


def _place(place: Mapping[str, Any]) -> str:
    return " > ".join(place["operators"]) or place["place"]


def _violation(rule: Rule, what: str, where: Sequence[str] = ("whole module",), **more: Any) -> Violation:
    told = {key: getattr(rule, key) for key in ("kind", "switch", "source", "reason", "level", "date")}
    return Violation(**{**told, "name": None, "what": what, "where": tuple(dict.fromkeys(where)), **more})


def _counted(rule: Rule, inventory: Mapping[str, Any]) -> Iterator[Violation]:
    """Violations of a rule about names: one for each name and remedy."""
    found = dict(inventory[_COUNTED[rule.kind]])
    if rule.kind == "operator":
        for inner in inventory["bodies"].values():
            found |= {name: {"text": n, "executed": 0} for name, n in inner.items() if name not in found}
    if rule.require:
        if not any(_matches(name, rule.require) for name in found):
            lacking = " or ".join(rule.require)
            yield _violation(rule, f"no {lacking}", name=lacking)
        return
    for name in sorted(found):
        bad = _matches(name, rule.forbid) if rule.forbid else not _matches(name, rule.allow)
        if not bad or _matches(name, rule.but):
            continue
        by_switch: dict[str, list[str]] = {}
        for place in inventory["where"].get(name, ()):
            remedies = [rule.switch_in[o] for o in reversed(place["operators"]) if o in rule.switch_in]
            by_switch.setdefault(remedies[0] if remedies else rule.switch, []).append(_place(place))
        counts = {"written": found[name].get("text"), "executed": found[name].get("executed")}
        for switch, places in (by_switch or {rule.switch: ["whole module"]}).items():
            yield _violation(rule, f"{rule.kind} {name}", places, name=name, switch=switch, **counts)


def check(profile: Profile, inventory: Mapping[str, Any]) -> list[Violation]:
    """What of a module (`dsjax.export.inventory`) the profile does not take, refusals first; [] if nothing.

    Dead functions count: a compiler reads them too.
    """
    found: list[Violation] = []
    for rule in profile.rules:
        if rule.kind in _COUNTED:
            found += _counted(rule, inventory)
            continue
        value, where = inventory[_LIMITED[rule.kind]], "whole module"
        if rule.kind == "version":
            if parse_version(value) > parse_version(str(rule.most)):
                found.append(_violation(rule, f"StableHLO {value}, above {rule.most}"))
            continue
        if rule.kind == "constant":
            value, where = value["bytes"], f"a constant {value['type']}"
        if value > int(rule.most or 0):
            found.append(_violation(rule, f"{rule.kind} of {value:,}, above {rule.most:,}", [where]))
    return sorted(dict.fromkeys(found), key=lambda v: _LEVELS.index(v.level))


def check_bundle(profile: Profile, folder: Path) -> dict[str, list[Violation]]:
    """The same of a bundle's programs, by name, as its inventory.json tells them.

    Raises:
      InputError: if there is no such file, or it is damaged.
    """
    path = folder / "inventory.json"
    content = read_json_object(path)
    if content.get("schema") != SCHEMA:
        raise InputError(f"{path}: expected schema {SCHEMA}, found {content.get('schema')!r}")
    try:
        return {name: check(profile, found) for name, found in content["modules"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise InputError(f"{path}: expected an inventory, found one without {e}") from None


def describe(rule: Rule) -> str:
    """A rule in words, without what stands behind it."""
    if rule.most is not None:
        return f"{rule.kind} of at most {rule.most}"
    verb = "forbid" if rule.forbid else "allow only" if rule.allow else "require"
    but = f" but {', '.join(rule.but)}" if rule.but else ""
    return f"{verb} {rule.kind} {', '.join(rule.forbid or rule.allow or rule.require)}{but}"
