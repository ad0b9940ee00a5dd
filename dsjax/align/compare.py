"""Two sets of results against each other: every result's errors, by operator and by layer, and what departs first."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from dsjax.align.taps import Place, parse
from dsjax.errors import InputError
from dsjax.export.standalone.arrays import FLOATS, Stored
from dsjax.export.standalone.errors import judge, strict_bound

Report = dict[str, Any]
Key = tuple[Any, ...]


def _place(name: str) -> tuple[str, Place | None]:
    """The golden that a result's name begins with, if any, and its place among taps, if it is one."""
    golden, _, last = name.rpartition("/")
    return golden, parse(last)


def _keys(names: Iterable[str]) -> dict[Key, str]:
    """Names by what they mean in both runs: taps by (golden, layer, block, operator, call, result), in their order.

    Calls are numbered within an operator of a block of a layer: between two configurations of a model, other operators
    may be called in between, which shifts the order of all that follow.
    """
    places = {name: _place(name) for name in names}
    taps = [(golden, place, name) for name, (golden, place) in places.items() if place is not None]
    keys: dict[Key, str] = {}
    calls: dict[Key, list[int]] = {}
    for golden, place, name in sorted(taps, key=lambda tap: (tap[0], tap[1].order, tap[1].result)):
        group = golden, place.layer, place.block, place.operator
        orders = calls.setdefault(group, [])
        if place.order not in orders[-1:]:
            orders.append(place.order)
        keys[*group, len(orders), place.result] = name
    return keys | {(name,): name for name, (_, place) in places.items() if place is None}


def _uneven(ours: Iterable[Key], theirs: Iterable[Key]) -> dict[Key, tuple[int, int]]:
    """Groups of calls that both have, but not equally many of: which of them correspond is not known."""
    a, b = ({key[:-2]: key[-2] for key in side if len(key) > 1} for side in (ours, theirs))
    return {group: (count, b[group]) for group, count in a.items() if b.get(group, count) != count}


def _unlike(golden: Stored, other: Stored) -> bool:
    """Whether they are of different forms: shapes, or codes and numbers, as rows are cached in."""
    other = other.like(golden)
    return other.shape != golden.shape or (other.code in FLOATS) != (golden.code in FLOATS)


def _group(rows: list[Report], by: str) -> list[Report]:
    """Rows with the same `by` together: how many, how many beyond each bound, their errors; the worst group first."""
    groups: dict[Any, list[Report]] = {}
    for row in rows:
        groups.setdefault(row[by], []).append(row)
    made = []
    for key, members in groups.items():
        worst = max(members, key=lambda row: row["error"])
        made.append(
            {
                by: key,
                "results": len(members),
                "beyond_bound": sum(row["within_bound"] is False for row in members),
                "beyond_strict": sum(row["within_strict"] is False for row in members),
                "error": worst["error"],
                "median_error": statistics.median(row["error"] for row in members),
                "max_relative": max((row["max_relative"] for row in members if "max_relative" in row), default=None),
                "norm": max((row["norm"] for row in members if "norm" in row), default=None),
                "worst": worst["name"],
            }
        )
    return sorted(made, key=lambda group: -group["error"])


def compare(
    reference: Mapping[str, Any],
    candidate: Mapping[str, Any],
    *,
    bound: float = 0.05,
    strict: float = 1e-5,
    common: bool = False,
) -> Report:
    """The precision report of a candidate's results against a reference's.

    Args:
      reference, candidate: arrays (NumPy's, ml_dtypes' or `Stored`) by name; see `taps` for those of operators.
      bound, strict: of the error of each result, which is the larger of max |a - b| / max |a| and ||a - b|| / ||a||,
        a the reference; of integers the share of unequal ones, and those have to be equal for the strict verdict
        (codes, uint8, have none).
      common: compare what both have, of taps only what is of one form; otherwise a result that the candidate lacks,
        or has in another shape or kind, is a negative verdict.

    Returns:
      `within_bound`, `within_strict`; `results`, taps first and in their order, each with its errors and verdicts (of
      `judge`) and its `order`, `layer`, `block` and `operator`; `operators`, `blocks` and `layers`, which group those;
      `first_departure` beyond either bound among taps, and its `first_layer`; `logits` by name. What is not compared:
      `missing` and `extra` names, which have no partner, and `unlike` ones (if `common`); `uneven` says which operators
      are called more often on one side, whose results are among `missing` and `extra`.

    Raises:
      InputError: if they have nothing that can be compared.
    """
    ours, theirs = _keys(reference), _keys(candidate)
    uneven = _uneven(ours, theirs)
    partners = {key: name for key, name in theirs.items() if key in ours and key[:-2] not in uneven}
    missing = [name for key, name in ours.items() if key not in partners]
    unlike, rows = [], []
    for key, name in ours.items():
        if common and key not in partners:
            continue
        golden = _stored(name, reference[name])
        other = _stored(partners[key], candidate[partners[key]]) if key in partners else None
        _, place = _place(name)
        if common and place and other and _unlike(golden, other):
            unlike.append(name)
            continue
        where = {
            "order": place.order if place else None,
            "layer": place.layer if place else None,
            "block": place.block if place else "",
            "operator": place.operator if place else name.rpartition("/")[2],
        }
        rows.append(where | judge(name, golden, other, bound, strict_bound(golden, strict)))
    if not partners or not rows:
        a, b = (", ".join(list(side)[:3]) or "nothing" for side in (reference, candidate))
        raise InputError(f"reference and candidate: expected results of the same names, found {a} and {b}")
    taps = [row for row in rows if row["order"] is not None]
    verdicts = ("within_bound", "within_strict")
    return {
        "bound": bound,
        "strict": strict,
        **{verdict: all(row[verdict] is not False for row in rows) for verdict in verdicts},
        "first_departure": {v.removeprefix("within_"): _first(taps, v, "name") for v in verdicts},
        "first_layer": {v.removeprefix("within_"): _first(taps, v, "layer") for v in verdicts},
        "logits": {row["name"]: row["logits"] for row in rows if "logits" in row},
        "operators": _group(rows, "operator"),
        "blocks": _group([row for row in taps if row["block"]], "block"),
        "layers": _group([row for row in taps if row["layer"] is not None], "layer"),
        "common": common,
        "missing": missing,
        "extra": [name for key, name in theirs.items() if key not in partners],
        "unlike": unlike,
        "uneven": [
            {"layer": layer, "block": block, "operator": operator, "reference": a, "candidate": b}
            for (_, layer, block, operator), (a, b) in uneven.items()
        ],
        "results": rows,
    }


def _first(taps: list[Report], verdict: str, what: str) -> Any:
    """What the first of them has that departs and has it."""
    return next((row[what] for row in taps if row[verdict] is False and row[what] is not None), None)


def _stored(name: str, value: Any) -> Stored:
    try:
        return value if isinstance(value, Stored) else Stored.of(value)
    except ValueError as e:
        raise InputError(f"{name}: {e}") from None
