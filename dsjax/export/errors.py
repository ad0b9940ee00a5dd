"""How far a result is from its golden."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np


def is_float(dtype: np.dtype) -> bool:
    """Whether a type is one of floating point, those of ml_dtypes included."""
    try:
        ml_dtypes.finfo(dtype)
    except ValueError:
        return False
    return True


def errors(golden: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """The errors of one result.

    Args:
      golden, found: arrays of one shape and type.

    Returns:
      Of floats, where both are finite: `max` = max |found - golden| / max |golden| and `norm` = ||found - golden|| /
      ||golden||; both are infinite if NaN or infinity is not at the same places in both. Of others: `unequal`, the
      share of elements.
    """
    if not is_float(golden.dtype):
        return {"unequal": float((golden != found).mean()) if golden.size else 0.0}
    a, b = golden.astype(np.float64).reshape(-1), found.astype(np.float64).reshape(-1)
    finite = np.isfinite(a) & np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return {"max": math.inf, "norm": math.inf}
    a, d = a[finite], np.abs(a[finite] - b[finite])
    return {
        "max": _ratio(float(d.max(initial=0.0)), float(np.abs(a).max(initial=0.0))),
        "norm": _ratio(float(np.linalg.norm(d)), float(np.linalg.norm(a))),
    }


def _ratio(error: float, size: float) -> float:
    return error / size if size else (math.inf if error else 0.0)
