"""How far converted values are from what they were: compared bit for bit, never assumed."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

import numpy as np

from dsjax.convert.targets import Encoding

_SMALLEST_NORMAL = {"bf16": 2.0**-126, "f16": 2.0**-14, "e4m3": 2.0**-6, "e2m1": 1.0}
_MAX_RATIO = 14
"""FP4 to FP8 is exact while the largest scale of a block is at most 2^14 times the smallest (spec V3 6.1)."""


@dataclasses.dataclass
class Errors:
    """Of some of a tensor's values; those of its parts are added up in their order.

    Attributes:
      count: of values.
      different: of values that are not the same, bit for bit.
      max_abs, max_rel: largest |new - old|, and of that over |old| where that is not zero.
      sum_abs, sum_squares: of |new - old|, of its square.
      norm_squares: of old values' squares, but for so many `unmeasured` values, in parts that are exact.
      saturated: values beyond the target's range.
      flushed: values other than zero that became zero.
      small: values that differ and are smaller than the target's smallest normal number (times the scale).
      signs: zeros whose sign was lost.
      ratios: FP4 to FP8: of blocks that are not exact, by the exponent of their scales' ratio.
      float_scales: blocks that differ whose scale was no power of two.
      carried, blocks: blocks whose old scales were kept; all of them.
    """

    count: int = 0
    different: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0
    sum_abs: float = 0.0
    sum_squares: float = 0.0
    norm_squares: float = 0.0
    unmeasured: int = 0
    saturated: int = 0
    flushed: int = 0
    small: int = 0
    signs: int = 0
    ratios: Counter[int] = dataclasses.field(default_factory=Counter)
    float_scales: int = 0
    carried: int = 0
    blocks: int = 0

    def add(self, other: Errors) -> None:
        """Takes another part's."""
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            joined = max(mine, theirs) if field.name.startswith("max") else mine + theirs
            setattr(self, field.name, joined)

    @property
    def exact(self) -> bool:
        return not self.different

    def summary(self) -> dict[str, Any]:
        """The numbers of a certificate's entry."""
        norm = math.sqrt(self.sum_squares / self.norm_squares) if self.norm_squares else 0.0
        return {
            "exact": self.exact,
            "max_abs_error": self.max_abs,
            "max_rel_error": self.max_rel,
            "mean_abs_error": self.sum_abs / self.count if self.count else 0.0,
            "relative_norm": norm,
            "saturated": self.saturated,
            "flushed": self.flushed,
        }

    def reasons(self, target: Encoding) -> list[str]:
        """Why values differ, in words."""
        if self.exact:
            return []
        found = []
        wide = {r: n for r, n in self.ratios.items() if r > _MAX_RATIO}
        if wide:
            blocks = sum(wide.values())
            found.append(f"scale ratio 2^{max(wide)} above 2^{_MAX_RATIO} in {blocks} block{'s' * (blocks > 1)}")
        if self.float_scales:
            found.append("float32 scales")
        if self.saturated:
            name = {"f16": "float16", "bf16": "bfloat16"}.get(target.element, target.element)
            found.append(f"{name} overflow of {self.saturated} values")
        if self.small:
            found.append(f"subnormal: {self.small} values")
        if self.signs:
            found.append(f"sign of zero lost: {self.signs} values")
        rest = self.different - self.small - self.signs - self.saturated
        if rest > 0:
            found.append(f"rounded to {target.element}: {rest} values")
        return found


def compare(
    old: np.ndarray, new: np.ndarray, target: Encoding, scales: np.ndarray | None = None, saturated: int = 0
) -> tuple[Errors, np.ndarray | None]:
    """Errors of a piece, and which values differ; None where none does.

    Args:
      old, new: float32 [r, c], finite.
      target: of `new`.
      scales: that broadcast against them, of `new`.
      saturated: values that lay beyond the target's range.
    """
    found = Errors(count=old.size)
    if np.array_equal(old.view(np.uint32), new.view(np.uint32)):
        found.unmeasured = old.size
        return found, None
    found.norm_squares = squares(old)
    differ = old.view(np.uint32) != new.view(np.uint32)
    found.different = int(np.count_nonzero(differ))
    found.saturated = saturated
    error = np.abs(new.astype(np.float64) - old)
    magnitude = np.abs(old)
    nonzero = magnitude > 0
    found.max_abs, found.sum_abs = float(error.max()), float(error.sum())
    found.sum_squares = float(np.square(error).sum())
    relative = np.divide(error, magnitude, out=np.zeros_like(error), where=nonzero)
    found.max_rel = float(relative.max())
    found.flushed = int(np.count_nonzero(nonzero & (new == 0)))
    found.signs = int(np.count_nonzero(differ & ~nonzero))
    smallest = _SMALLEST_NORMAL.get(target.element)
    if smallest is not None:
        with np.errstate(over="ignore"):
            limit = np.float32(smallest) * (np.float32(1) if scales is None else scales)
        found.small = int(np.count_nonzero(differ & nonzero & (magnitude < limit)))
    return found, differ


def squares(values: np.ndarray) -> float:
    """Sum of squares, in float64."""
    return float(np.square(values.astype(np.float64)).sum())
