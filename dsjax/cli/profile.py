"""`dsjax profile`: what compilers take, and whether a bundle is that."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dsjax.cli.common import print_json
from dsjax.export.profiles.rules import Profile, Violation, check_bundle, describe, load, names, remedy


def add_flags(p: argparse.ArgumentParser) -> None:
    """What this verb takes."""
    p.add_argument("profile", nargs="?", metavar="NAME_OR_FILE", help="show its rules (default: list the profiles)")
    p.add_argument("bundle", nargs="?", type=Path, metavar="BUNDLE", help="check this bundle's programs instead")


def entries(violations: Mapping[str, Sequence[Violation]]) -> list[dict[str, Any]]:
    """Violations by program, ready for JSON."""
    return [{"program": program, **asdict(found)} for program, all_ in violations.items() for found in all_]


def lines(violations: Mapping[str, Sequence[Violation]]) -> list[str]:
    """The same for a person; what several programs have alike, once."""
    programs: dict[str, list[str]] = {}
    for program, found in violations.items():
        for violation in found:
            programs.setdefault(str(violation), []).append(program)
    return [f"{', '.join(several)}: {text}" for text, several in programs.items()]


def profile(options: argparse.Namespace) -> int:
    """`dsjax profile`. Starts no backend."""
    if options.profile is None:
        titles = {name: load(name).title for name in names()}
        if options.json:
            print_json({"profiles": titles})
        else:
            print("\n".join(f"{name:17} {title}" for name, title in titles.items()))
        return 0
    found = load(options.profile)
    if options.bundle is None:
        _show(found, options.json)
        return 0
    violations = check_bundle(found, options.bundle)
    told = entries(violations)
    refused = sum(entry["level"] == "refused" for entry in told)
    if options.json:
        print_json({"profile": found.name, "bundle": str(options.bundle), "refused": refused, "violations": told})
    else:
        summary = f"{len(violations)} programs, {refused} violations, {len(told) - refused} doubts"
        print("\n".join([*lines(violations), f"profile {found.name}: {summary}"]))
    return 1 if refused else 0


def _show(found: Profile, as_json: bool) -> None:
    if as_json:
        told = {"profile": found.name, "title": found.title, "note": found.note}
        print_json(told | {"rules": [asdict(rule) for rule in found.rules]})
        return
    print(f"{found.title}\n{found.note}".strip())
    for rule in found.rules:
        where = "".join(f"; in {name} {remedy(switch)}" for name, switch in rule.switch_in.items())
        print(f"\n{rule.level}: {describe(rule)}\n  {rule.reason}\n  {remedy(rule.switch)}{where}")
        print(f"  {rule.source}, {rule.date}")
