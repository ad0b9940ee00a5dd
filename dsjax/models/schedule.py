"""A schedule of layers as a prefix, a period that repeats, and a rest, so that a program holds each only once."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

MAX_PERIOD = 16


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Layers 0 .. prefix - 1; then `repeats` times `period` layers; then the rest.

    Attributes:
      prefix: layers before the first period.
      period: layers in one period.
      repeats: how often the period occurs in a row; 0 if nothing repeats.
    """

    prefix: int
    period: int
    repeats: int

    @property
    def rest(self) -> int:
        """The first layer after the periods."""
        return self.prefix + self.period * self.repeats


def find_schedule(kinds: Sequence[Hashable]) -> Schedule:
    """The split of a list of layer kinds that leaves the fewest layers to write out; of equal ones the first found."""
    best, written = Schedule(len(kinds), 0, 0), len(kinds)
    for period in range(1, min(MAX_PERIOD, len(kinds) // 2) + 1):
        start = 0
        while start + 2 * period <= len(kinds):
            end = start + period
            while end < len(kinds) and kinds[end] == kinds[end - period]:
                end += 1
            repeats = (end - start) // period
            left = len(kinds) - (repeats - 1) * period
            if repeats > 1 and left < written:
                best, written = Schedule(start, period, repeats), left
            start = max(start + 1, end - period + 1)
    return best
