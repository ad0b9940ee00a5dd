"""The errors of a result against its golden, and the verdicts about them; verify.py's own text defines each."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np

from dsjax.export.standalone.arrays import FLOATS, Stored

_CHUNK = 1 << 20


def _pairs(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Parts of both as float64, where both are finite."""
    a, b = a.reshape(-1), b.reshape(-1)
    for i in range(0, a.size, _CHUNK):
        x, y = a[i : i + _CHUNK].astype(np.float64), b[i : i + _CHUNK].astype(np.float64)
        finite = np.isfinite(x) & np.isfinite(y)
        yield (x, y) if finite.all() else (x[finite], y[finite])


def _ratio(error: float, size: float) -> float:
    return float(error / size) if size else (math.inf if error else 0.0)


def float_errors(golden: np.ndarray, candidate: np.ndarray) -> dict[str, float]:
    """The errors of two float arrays of one shape, where both are finite; see the top of this file.

    Against a golden of zeros alone, relative errors are 0 (equal) or inf; cosine and PCC are NaN where undefined.
    """
    count = sum_a = sum_b = peak_a = peak_d = 0.0
    for a, b in _pairs(golden, candidate):
        count, sum_a, sum_b = count + a.size, sum_a + a.sum(), sum_b + b.sum()
    mean_a, mean_b, total = sum_a / max(count, 1), sum_b / max(count, 1), np.zeros(9)
    for a, b in _pairs(golden, candidate):
        d, x, y = np.abs(a - b), a - mean_a, b - mean_b
        peak_d, peak_a = max(peak_d, d.max(initial=0.0)), max(peak_a, np.abs(a).max(initial=0.0))
        total += [d.sum(), np.abs(a).sum(), d @ d, a @ a, b @ b, a @ b, x @ x, y @ y, x @ y]
    sum_d, size_a, dd, aa, bb, ab, xx, yy, xy = total.tolist()
    varies = xx > 1e-24 * aa and yy > 1e-24 * bb  # less is rounding of the means
    return {
        "max_abs": float(peak_d),
        "max_relative": _ratio(peak_d, peak_a),
        "mean_relative": _ratio(sum_d, size_a),
        "norm": math.sqrt(_ratio(dd, aa)),
        "cosine": ab / math.sqrt(aa) / math.sqrt(bb) if aa and bb else math.nan,
        "pcc": xy / math.sqrt(xx) / math.sqrt(yy) if varies else math.nan,
    }


def row_errors(golden: np.ndarray, candidate: np.ndarray) -> list[float]:
    """||a - b|| / ||a|| of each row of the last axis, of those that are finite in both."""
    size, found = golden.shape[-1], []
    for a, b in zip(golden.reshape(-1, size), candidate.reshape(-1, size)):
        x, y = a.astype(np.float64), b.astype(np.float64)
        if np.isfinite(x).all() and np.isfinite(y).all():
            found.append(_ratio(float(np.linalg.norm(x - y)), float(np.linalg.norm(x))))
    return found


def _top(x: np.ndarray, k: int) -> np.ndarray:
    """Which are the k largest of each row, of equal ones the first."""
    least = np.partition(x, -k, axis=-1)[:, -k, None]
    above, equal = x > least, x == least
    return above | (equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdims=True)))


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def logits_errors(golden: np.ndarray, candidate: np.ndarray) -> dict[str, float]:
    """How often the likeliest tokens agree, and KL(golden || candidate) in nats, over rows of the last axis.

    Rows in which either has a NaN or +Inf, or nothing finite, are left out; `rows` counts the others.
    """
    size = golden.shape[-1]
    a, b, k = golden.reshape(-1, size), candidate.reshape(-1, size), min(5, size)
    rows, top1, top5, total, worst, step = 0, 0, 0.0, 0.0, 0.0, max(1, _CHUNK // size)
    for i in range(0, len(a), step):
        x, y = a[i : i + step].astype(np.float64), b[i : i + step].astype(np.float64)
        usable = np.isfinite(x.max(-1)) & np.isfinite(y.max(-1))
        x, y = x[usable], y[usable]
        p, q = _log_softmax(x), _log_softmax(y)
        with np.errstate(invalid="ignore"):  # -inf - -inf, of what neither gives
            kl = np.where(np.isfinite(p), np.exp(p) * (p - q), 0.0).sum(-1).clip(0)
        rows, top1 = rows + len(x), top1 + int((x.argmax(-1) == y.argmax(-1)).sum())
        top5 += float((_top(x, k) & _top(y, k)).sum()) / k
        total, worst = total + float(kl.sum()), max(worst, float(kl.max(initial=0.0)))
    n = rows or math.nan
    kept = {"top1": top1 / n, "top5": top5 / n, "kl_mean": total / n, "kl_max": worst if rows else math.nan}
    return {"rows": rows, **kept}


def strangers(golden: np.ndarray, candidate: np.ndarray) -> list[str]:
    """What is wrong with the NaN and Inf of a candidate: they must be the golden's own."""
    finite, there = np.isfinite(golden), np.isfinite(candidate)
    same = (golden == candidate) | (np.isnan(golden) & np.isnan(candidate))
    found = []
    for wrong, what in (
        (finite & ~there, "NaN or Inf where the golden is finite"),
        (~finite & ~same, "not its NaN or Inf"),
    ):
        places = np.flatnonzero(wrong)
        if places.size:
            first = [int(i) for i in np.unravel_index(places[0], golden.shape)]
            found.append(f"{places.size} of {golden.size} are {what}, first at {first}")
    return found


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """The error that verdicts are about: the larger of max relative and norm; of integers the share of unequal ones."""
    if a.shape != b.shape or (a.dtype.kind == "f") != (b.dtype.kind == "f"):
        return math.inf
    if a.dtype.kind != "f":
        return float(np.mean(a != b)) if a.size else 0.0
    if strangers(a, b):
        return math.inf
    errors = float_errors(a, b)
    return max(errors["max_relative"], errors["norm"])


def strict_bound(golden: Stored, strict: float) -> float | None:
    """The strict bound of a result for which nobody gave one: integers must be equal, codes (uint8) get no verdict."""
    return strict if golden.code in FLOATS else None if golden.code == "U8" else 0.0


def unequal_codes(golden: np.ndarray, candidate: np.ndarray, before: np.ndarray | None) -> float:
    """The share of unequal integers, of what replaces `before` among those that either has changed: the rest of a cache
    says nothing about a step that should write a row of it."""
    if before is None or before.shape != golden.shape:
        return distance(golden, candidate)
    changed = (golden != before) | (candidate != before)
    return float(np.mean((golden != candidate)[changed])) if changed.any() else 0.0


def judge(
    name: str,
    golden: Stored,
    candidate: Stored | None,
    bound: float | None,
    strict: float | None,
    spread: float = 0.0,
    before: Stored | None = None,
) -> dict[str, Any]:
    """The errors and verdicts of one result.

    Args:
      candidate: None if there is none.
      bound, strict: limits of the error, None for no verdict: the error is told, not judged. 0 asks for equality.
        A result that is missing, of another shape or kind, or with another NaN or Inf fails in any case.
      spread: `distance` of ranks that should hold the same.
      before: what the result replaces, as it was given.
    """
    row: dict[str, Any] = {"name": name, "dtype": golden.code, "shape": list(golden.shape), "error": math.inf}
    problems: list[str] = []
    if candidate is None:
        problems.append("no such result")
    else:
        candidate = candidate.like(golden)
        row["candidate_dtype"] = candidate.code
        if candidate.shape != golden.shape:
            problems.append(f"expected shape {list(golden.shape)}, found {list(candidate.shape)}")
        elif (candidate.code in FLOATS) != (golden.code in FLOATS):
            problems.append(f"expected {golden.code}, found {candidate.code}")
        else:
            a, b = golden.values(), candidate.values()
            if golden.code in FLOATS:
                logits = bool(a.ndim and a.size and re.search(r"(^|[^a-z])logits$", name))
                problems += strangers(a, b) + ["the golden itself has NaN"] * (logits and bool(np.isnan(a).any()))
                row.update(float_errors(a, b))
                row["error"] = math.inf if problems else max(row["max_relative"], row["norm"], spread)
                if logits:
                    row["logits"] = logits_errors(a, b)
                    rows = row_errors(a, b)
                    row["median_row"] = statistics.median(rows) if rows else math.nan
            else:
                unequal = unequal_codes(a, b, None if before is None else before.values())
                row.update(equal_share=1 - unequal, error=max(unequal, spread))
    if spread:
        row["rank_difference"] = spread
    for verdict, limit in (("within_bound", bound), ("within_strict", strict)):
        row[verdict] = False if problems else None if limit is None else row["error"] <= limit
    return {**row, "strict_bound": strict, "problems": problems}
