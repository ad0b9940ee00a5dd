"""Plain regular expressions over module names: those that can be matched in time pattern x name.

A config.json is not trusted, and Python's `re` may take exponential time for what it holds. Here all ways through an
expression are followed at once, character by character (Thompson, "Regular expression search algorithm", 1968).
"""

from __future__ import annotations

import re
from functools import lru_cache

_ESCAPED = r"\\[^A-Za-z0-9]"
_MEMBER = rf"(?:[\w./:]|{_ESCAPED})"
_CLASS = rf"\[\^?-?(?:\\[dw]|{_MEMBER}(?:-{_MEMBER})?)+-?\]"
_ITEM = re.compile(rf"([^\\^$.|?*+()\[\]{{}}]|\.|\\[dw]|{_ESCAPED}|{_CLASS})([*+?]?)")
_OPEN = re.compile(r"\((?:\?:)?")

_MEMORY = 4096  # moves of an expression that are remembered: names have much in common


class PlainExpression:
    """Characters, `.`, `\\d`, `\\w`, escaped punctuation and `[...]`, each with `*`, `+`, `?` or none; `^` in front,
    `$` behind; groups of alternatives `(a|b)` or `(?:a|b)`, not within one another and not repeated.

    Places are numbered from left to right; the last one is reached by what matches. From a place, one may get to later
    ones for nothing (`free`), or by a character that its item accepts to the next one, with `*` and `+` also to itself.
    """

    def __init__(self, pattern: str) -> None:
        """Reads an expression.

        Raises:
          ValueError: for any other.
        """
        self._items: list[re.Pattern[str] | None] = []
        self._again: set[int] = set()
        self._free: dict[int, list[int]] = {}
        body = pattern.removeprefix("^")
        end = self._read(body)
        self._whole = body[end:] == "$"
        if end < len(body) and not self._whole:
            raise ValueError(f"not a plain expression: {pattern}")
        self._last = len(self._items)
        self._after = lru_cache(_MEMORY)(self._moved)

    def _read(self, body: str) -> int:
        """Lays out places; where it stopped reading."""
        at, ends = 0, list[int]()  # ends: places behind alternatives
        split = -1  # the place before alternatives; -1 outside
        while at < len(body):
            place = len(self._items)
            if found := _ITEM.match(body, at):
                self._add(*found.groups())
                at = found.end()
            elif split < 0 and (found := _OPEN.match(body, at)):
                split, ends, at = place, [], found.end()
                self._items.append(None)
                self._free[split] = [place + 1]
            elif split >= 0 and body[at] in "|)":
                ends.append(place)
                self._items.append(None)
                if body[at] == "|":
                    self._free[split].append(place + 1)
                else:
                    self._free |= {end: [place + 1] for end in ends}
                    split = -1
                    if body[at + 1 : at + 2] in ("*", "+", "?"):
                        return at
                at += 1
            else:
                break
        return at if split < 0 else 0

    def _add(self, item: str, quantifier: str) -> None:
        place = len(self._items)
        try:
            self._items.append(re.compile(item))
        except re.error as e:
            raise ValueError(f"not a plain expression: {item}") from e
        if quantifier in ("*", "+"):
            self._again.add(place)
        if quantifier in ("*", "?"):
            self._free[place] = [place + 1]

    def _spread(self, places: set[int]) -> frozenset[int]:
        """With every place that is reached for nothing; such ways lead forward."""
        waiting = list(places)
        while waiting:
            fresh = [place for place in self._free.get(waiting.pop(), ()) if place not in places]
            places.update(fresh)
            waiting += fresh
        return frozenset(places)

    def _moved(self, places: frozenset[int], character: str) -> frozenset[int]:
        moved: set[int] = set()
        for place in places:
            item = self._items[place] if place < self._last else None
            if item is not None and item.match(character):
                moved.update((place, place + 1) if place in self._again else (place + 1,))
        return self._spread(moved)

    def match(self, name: str) -> bool:
        """Whether the name begins with what the expression says; with `$`, whether all of it is that."""
        places = self._spread({0})
        for character in name:
            if not places or (self._last in places and not self._whole):
                break
            places = self._after(places, character)
        return self._last in places


@lru_cache(maxsize=1024)
def plain_expression(pattern: str) -> PlainExpression:
    """An expression, read once. Raises: ValueError, as PlainExpression."""
    return PlainExpression(pattern)
