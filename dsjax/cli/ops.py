"""`dsjax ops`, and the flags by which every verb that runs a model lets its operators be chosen."""

from __future__ import annotations

import argparse
from typing import Any

from dsjax.cli.common import note, print_json
from dsjax.operators import EXPORT, FORM, check_choices, listing, load_module, named_platforms, report


def _choice(text: str) -> tuple[str, str]:
    name, _, variant = text.partition("=")
    if not name or not variant:
        raise ValueError
    return name, variant


_choice.__name__ = "OPERATOR=VARIANT"


def operator_flags(parser: argparse.ArgumentParser) -> None:
    """--op and --op-module; `choices_of` reads them."""
    parser.add_argument(
        "--op",
        type=_choice,
        action="append",
        default=[],
        metavar="NAME=VARIANT",
        help="compute an operator by this variant; again for others (see `dsjax ops`)",
    )
    parser.add_argument(
        "--op-module",
        action="append",
        default=[],
        metavar="MODULE_OR_FILE.py",
        help="run this Python module first, which adds variants",
    )


def choices_of(options: argparse.Namespace) -> dict[str, str]:
    """Variant by operator, from the flags of `operator_flags`; none for a verb without them.

    Raises:
      InputError: naming the flag.
    """
    for module in getattr(options, "op_module", []):
        load_module(module)
    return check_choices(getattr(options, "op", []))


def reported(result: dict[str, Any], platform: str) -> dict[str, Any]:
    """A verb's result for --json with what should be said of its operators."""
    return result | {"operators": report(platform)}


def note_operators(platform: str) -> None:
    """The same for a person, if there is anything to say."""
    if found := report(platform):
        note(f"dsjax: operators on {platform}: {', '.join(f'{name}={variant}' for name, variant in found.items())}")


def ops(options: argparse.Namespace) -> int:
    """`dsjax ops`. Starts no backend."""
    platforms, platform = named_platforms(), options.platform or EXPORT
    if platform not in platforms:
        platforms = (*platforms, platform)
    found = listing(platforms, platform)
    if options.json:
        print_json({"platform": platform, "platforms": list(platforms), "operators": found})
    else:
        print(operators_table(found, platform))
    return 0


def operators_table(found: list[dict[str, Any]], platform: str) -> str:
    """The listing for a person: an operator, below it its variants, bounds, and which platforms take which."""
    lines = [f"Variants, their bounds, and which platforms take them; * is what {platform} takes with these flags."]
    for operator in found:
        lines += ["", operator["name"]]
        for variant in operator["variants"]:
            name = variant["name"]
            users = [p for p, taken in operator["platforms"].items() if taken.split(":")[0] == name]
            mark = "*" if operator["chosen"].split(":")[0] == name else " "
            bound = "formula" if variant is operator["variants"][0] else f"{variant['bound']:g}"
            shown = [f"{p} ({operator['platforms'][p]})" if name == FORM else p for p in users]
            everyone = name != FORM and len(users) == len(operator["platforms"])
            taken = "  [all]" if everyone else f"  [{', '.join(shown)}]" if shown else ""
            lines.append(f"  {mark} {name:9} {bound:7} {variant['says']}{taken}")
    return "\n".join(lines)
