"""Two sets of results against each other: every result's errors, by operator and by layer, and what departs first."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from dsjax.align.taps import Place, parse
from dsjax.errors import InputError
from dsjax.export.standalone.arrays import Stored
from dsjax.export.standalone.errors import judge, strict_bound

Report = dict[str, Any]
Key = tuple[Any, ...]


def _place(name: str) -> tuple[str, Place | None]:
    """The golden that a result's name begins with, if any, and its place among taps, if it is one."""
    golden, _, last = name.rpartition("/")
    return golden, parse(last)


def _keys(names: Iterable[str]) -> dict[Key, str]:
    """Names by what they mean in both runs, taps in their order.

    Calls are numbered within their layer and operator: between two configurations of a model, other operators may be
    called in between, which shifts the order of all that follow.
    """
    places = {name: _place(name) for name in names}
    taps = [(golden, place, name) for name, (golden, place) in places.items() if place is not None]
    keys: dict[Key, str] = {}
    calls: dict[Key, list[int]] = {}
    for golden, place, name in sorted(taps, key=lambda tap: (tap[0], tap[1].order, tap[1].result)):
        orders = calls.setdefault((golden, place.layer, place.operator), [])
        if place.order not in orders[-1:]:
            orders.append(place.order)
        keys[golden, place.layer, place.operator, len(orders), place.result] = name
    return keys | {(name,): name for name, (_, place) in places.items() if place is None}


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
      common: compare what both have; otherwise a result that the candidate lacks is a negative verdict.

    Returns:
      `within_bound`, `within_strict`; `results`, taps first and in their order, each with its errors and verdicts (of
      `judge`) and its `order`, `layer` and `operator`; `operators` and `layers`, which group those; `first_departure`
      beyond either bound among taps; `missing` and `extra` names; `logits` by name.

    Raises:
      InputError: if they have no result in common, or one cannot be compared.
    """
    ours, theirs = _keys(reference), _keys(candidate)
    missing = [name for key, name in ours.items() if key not in theirs]
    if len(missing) == len(ours):
        a, b = (", ".join(list(side)[:3]) or "nothing" for side in (reference, candidate))
        raise InputError(f"reference and candidate: expected results of the same names, found {a} and {b}")
    rows = []
    for key, name in ours.items():
        if common and key not in theirs:
            continue
        golden = _stored(name, reference[name])
        other = _stored(theirs[key], candidate[theirs[key]]) if key in theirs else None
        _, place = _place(name)
        where = {
            "order": place.order if place else None,
            "layer": place.layer if place else None,
            "operator": place.operator if place else name.rpartition("/")[2],
        }
        rows.append(where | judge(name, golden, other, bound, strict_bound(golden, strict)))
    taps = [row for row in rows if row["order"] is not None]
    verdicts = ("within_bound", "within_strict")
    return {
        "bound": bound,
        "strict": strict,
        **{verdict: all(row[verdict] is not False for row in rows) for verdict in verdicts},
        "first_departure": {
            verdict.removeprefix("within_"): next((row["name"] for row in taps if row[verdict] is False), None)
            for verdict in verdicts
        },
        "logits": {row["name"]: row["logits"] for row in rows if "logits" in row},
        "operators": _group(rows, "operator"),
        "layers": _group([row for row in taps if row["layer"] is not None], "layer"),
        "missing": missing,
        "extra": [name for key, name in theirs.items() if key not in ours],
        "results": rows,
    }


def _stored(name: str, value: Any) -> Stored:
    try:
        return value if isinstance(value, Stored) else Stored.of(value)
    except ValueError as e:
        raise InputError(f"{name}: {e}") from None
