"""Which plan: the best one for so many cards, the most that fits it, and what would fit where it does not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import cached_property

from dsjax.errors import InputError
from dsjax.layout import ATTENTION, Layout, layout, working_plans
from dsjax.params import abstract_params, tree_bytes
from dsjax.plan.chips import Chip
from dsjax.plan.memory import RESERVE, Load, memory
from dsjax.plan.placement import Model, Placement
from dsjax.plan.roofline import decode_times, lacking
from sharding import Plan


@dataclasses.dataclass(frozen=True, eq=False)
class Cards:
    """What there is.

    Attributes:
      count: cards.
      memory_bytes: of each.
      reserve: bytes of each that are left to drivers and runtime.
      chip: their figures, if known.
    """

    count: int
    memory_bytes: float
    reserve: int = RESERVE
    chip: Chip | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Candidate:
    """One way to lay the model out on the cards."""

    placement: Placement
    load: Load
    cards: Cards

    @cached_property
    def parts(self) -> dict[str, int]:
        """Bytes of one card by part."""
        return memory(self.placement, self.load, self.cards.reserve)

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.cards.memory_bytes

    @cached_property
    def tpot(self) -> float | None:
        """Seconds of a decode step at best; None without figures."""
        chip = self.cards.chip
        if chip is None or lacking(chip, self.placement):
            return None
        return decode_times(self.placement, chip, self.load).total

    @cached_property
    def bytes_per_token(self) -> float:
        """What one card's cache grows by with a token of every sequence."""
        batch, step = self.load.batch, 16384
        one, two = (sum(self.placement.cache_bytes(batch, step * i)) for i in (1, 2))
        return (two - one) / step

    @property
    def room(self) -> float:
        """Tokens that every sequence could have beside those asked for; negative where it does not fit."""
        return (self.cards.memory_bytes - self.total) / max(self.bytes_per_token, 1)

    def largest_context(self) -> int:
        """The longest context that fits with this batch, up to the model's; 0 if none."""
        limit = self.placement.config.max_position_embeddings
        return _largest(limit, lambda n: self._with(context=n).fits)

    def largest_batch(self) -> int:
        """The most sequences that fit with this context; 0 if none."""
        return _largest(1 << 20, lambda n: self._with(batch=n).fits)

    def _with(self, **changes: int) -> Candidate:
        return Candidate(self.placement, dataclasses.replace(self.load, **changes), self.cards)


def _largest(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest n up to `limit` that fits, where all smaller ones do too; 0 if none."""
    low, high = 0, 1
    while high < limit and fits(high):
        low, high = high, high * 2
    high = min(high, limit) + 1 if high >= limit else high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _layouts(model: Model, count: int, attention: str | None) -> Iterator[Layout]:
    for kind in (attention,) if attention else ATTENTION:
        for plan in working_plans(model.config, count, kind, model.numerics):
            placed = layout(model.config, plan, kind, model.numerics)
            try:
                if model.numerics.activations != "float":  # INT4, two channels a byte, may not be cut as others are
                    model.params(placed)
            except InputError:
                continue
            yield placed


def candidates(
    model: Model, cards: Cards, load: Load, plan: Plan | None = None, attention: str | None = None
) -> list[Candidate]:
    """The ways to lay the model out: the plan asked for; or all that use every card, or, where none of these fits but
    one for fewer cards does, those.

    Args:
      plan: None for any.
      attention: None for either; of a given plan, heads.

    Raises:
      InputError: if the plan asks for more cards than there are, or cannot work.
    """
    if plan is not None:
        if plan.devices > cards.count:
            raise InputError(f"--mesh {plan}: expected at most {cards.count} cards, found a plan for {plan.devices}")
        placed = layout(model.config, plan, attention or "heads", model.numerics)
        return [Candidate(Placement(model, placed), load, cards)]
    tried: list[Candidate] = []
    for count in _rounder(cards.count):
        found = [Candidate(Placement(model, each), load, cards) for each in _layouts(model, count, attention)]
        if any(each.fits for each in found):
            return found
        tried = tried or found
    return tried


def _rounder(count: int) -> list[int]:
    """Numbers of cards that more and more of a model's axes divide by: 12, then 8; 24, then 16."""
    return sorted({count >> k << k for k in range(count.bit_length())}, reverse=True)


def _order(candidate: Candidate) -> tuple[float, ...]:
    """The smallest is the best: of those that fit the fastest, then the roomiest; of others the closest to fitting."""
    plan = candidate.placement.layout.plan
    slots = float(candidate.placement.layout.attention == "slots")
    if not candidate.fits:
        return (1.0, candidate.total, plan.tp, slots)
    # What differs by a hundredth is alike; so are all plans where there are no figures. Fewer ways inside an expert are
    # kinder to its products.
    speed = math.inf if candidate.tpot is None else round(100 * math.log(candidate.tpot))
    return (0.0, speed, -round(100 * math.log(candidate.room + 1)), plan.tp, slots)


def best(found: list[Candidate]) -> Candidate:
    """The best of these, see `_order`."""
    return min(found, key=_order)


# --- what would fit instead ------------------------------------------------------------------------------------------


def alternatives(model: Model, cards: Cards, load: Load, tried: list[Candidate], *, free: bool) -> list[str]:
    """What to change, one thing at a time, so that it fits: flags, most convenient first.

    Args:
      tried: what was compared, none of which fits.
      free: whether those are all plans; else another one may fit.
    """
    found: list[str] = []
    if not free and (other := _fitting(model, cards, load)) is not None:
        found.append(_flags(other))
    if (n := max(each.largest_context() for each in tried)) > 0:
        found.append(f"--context {n}")
    if load.batch > 1 and (n := max(each.largest_batch() for each in tried)) > 0:
        found.append(f"--batch {n}")
    for weights in ("fp8", "int8"):
        held = dataclasses.replace(model, weights=weights)
        if _allowed(held) and _smaller(held, model) and (other := _fitting(held, cards, load)) is not None:
            found.append(f"--weights {weights} {_flags(other)}")
            break
    if (more := _more_cards(model, cards, load)) is not None:
        found.append(more)
    return found


def _smaller(held: Model, model: Model) -> bool:
    """Whether weights held so take at least a tenth less."""
    return model_bytes(held) < 0.9 * model_bytes(model)


def model_bytes(model: Model) -> int:
    """Of all parameters, as they are held on one device."""
    return tree_bytes(abstract_params(model.config, stored=model.stored, weights=model.weights))


def _flags(candidate: Candidate) -> str:
    placed = candidate.placement.layout
    return f"--mesh {placed.plan} --attention {placed.attention}"


def _fitting(model: Model, cards: Cards, load: Load) -> Candidate | None:
    """The best plan, if it fits."""
    chosen = best(candidates(model, cards, load))
    return chosen if chosen.fits else None


def _allowed(model: Model) -> bool:
    """Whether these numerics allow these weights."""
    try:
        model.numerics.for_checkpoint(model.config, model.weights)
    except InputError:
        return False
    return True


def _more_cards(model: Model, cards: Cards, load: Load) -> str | None:
    """The smallest multiple of eight (or, below, of the cards) that fits, up to sixteen times as many."""
    step = 8 if cards.count >= 8 else cards.count
    for count in range(cards.count // step * step + step, max(16 * cards.count, 64) + 1, step):
        if count > 64 and count & (count - 1):  # beyond, powers of two only
            continue
        more = dataclasses.replace(cards, count=count)
        if (other := _fitting(model, more, load)) is not None:
            return f"{other.placement.layout.plan.devices} cards ({_flags(other)})"
    return None
