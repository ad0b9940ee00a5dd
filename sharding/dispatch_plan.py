"""What an expert dispatch moves, from shapes alone: capacities, bytes, and which way is worth it.

Routing is taken as uniform: each token goes to any k of E experts, E / n of which lie on each of n ranks. What does not
come that way costs more rounds, never a token.
"""

from __future__ import annotations

import dataclasses
import math

DISPATCHES = ("replicated", "all-to-all", "ragged")
"""See `sharding.dispatch`."""

ROWS = 8
"""Capacities are multiples of this: the rows of a tile of 32-bit values on TPUs."""

DEVIATIONS = 4
"""Standard deviations of slack in a capacity: with up to a few hundred ranks, the fullest of all pairs of them rarely
has more under uniform routing."""

IMBALANCE = 1 / 8
"""Slack in a capacity at least, as a share of the mean: gates are only roughly balanced."""


def destinations(choices: int, experts: int, ranks: int) -> float:
    """Expected number of distinct ranks that a token's k distinct experts lie on: n (1 - C(E - E/n, k) / C(E, k)).

    Args:
      choices: k.
      experts: E, a multiple of `ranks`.
      ranks: n.
    """
    return ranks * (1 - math.comb(experts - experts // ranks, choices) / math.comb(experts, choices))


def _with_slack(rows: int, share: float) -> int:
    """Capacity for what is left of `rows` if each is there with probability `share`, at most all of them."""
    mean = rows * share
    slack = max(mean * IMBALANCE, DEVIATIONS * math.sqrt(mean * (1 - share)))
    return min(rows, ROWS * math.ceil((mean + slack) / ROWS))


def capacity(tokens: int, choices: int, experts: int, ranks: int) -> int:
    """Rows that a rank sends to each rank in one round of "all-to-all".

    Args:
      tokens: of a rank.
      choices, experts, ranks: as for `destinations`.
    """
    return _with_slack(tokens, destinations(choices, experts, ranks) / ranks)


def arrivals(tokens: int, choices: int, experts: int, ranks: int) -> int:
    """Rows that a rank receives from all in one round of "ragged", at most; arguments as for `capacity`."""
    return _with_slack(tokens * ranks, destinations(choices, experts, ranks) / ranks)


def choose_dispatch(tokens: int, choices: int, experts: int, ranks: int) -> str:
    """ "all-to-all" where its planned bytes are at most three quarters of those of "replicated", else that one.

    Few tokens never get there, as capacities are multiples of ROWS: their capacity is all of them. "ragged" is never
    chosen, only asked for. Arguments as for `capacity`.
    """
    planned = capacity(tokens, choices, experts, ranks)
    return "all-to-all" if 4 * planned <= 3 * tokens else "replicated"


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that a device sends to others, on the way to the experts and on the way back."""

    out: int
    back: int


def dispatch_bytes(
    how: str, tokens: int, choices: int, experts: int, ranks: int, *, row_bytes: int, sum_bytes: int
) -> Traffic:
    """Bytes that a device sends to others in a round. A token's k ids and weights, 8 k bytes, go with its row.

    "replicated", one round: (n - 1) T rows each way, as an all-gather and a reduce-scatter over a ring send them.
    "all-to-all", in each round: (n - 1) C rows each way, C the capacity. "ragged", in all rounds: (n - 1) / n of the
    expected T * destinations rows, rounded up. Left out are what tells the ranks how many rounds there will be: one
    number, for "ragged" n of them.

    Args:
      how: one of DISPATCHES.
      tokens: T, of a rank.
      choices, experts, ranks: as for `destinations`.
      row_bytes: of what a token's experts take.
      sum_bytes: of a partial sum, as it travels back.

    Raises:
      ValueError: for another `how`.
    """
    if how not in DISPATCHES:
        raise ValueError(f"expert dispatch: expected one of {', '.join(DISPATCHES)}, found {how!r}")
    if how == "ragged":
        rows = math.ceil((ranks - 1) * tokens * destinations(choices, experts, ranks) / ranks)
    else:
        each = tokens if how == "replicated" else capacity(tokens, choices, experts, ranks)
        rows = (ranks - 1) * each
    return Traffic(rows * (row_bytes + 8 * choices), rows * sum_bytes)
