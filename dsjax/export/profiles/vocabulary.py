"""The names that an inventory can have: what the patterns of a profile's rules are checked against."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from functools import cache
from types import ModuleType

from jaxlib.mlir.dialects import chlo, func, mhlo, mpmd, sdy, stablehlo

_DIALECTS: tuple[ModuleType, ...] = (stablehlo, chlo, func, sdy, mpmd, mhlo)

TYPES = (
    *(f"{sign}{bits}" for sign in ("i", "ui", "si") for bits in (1, 2, 4, 8, 16, 32, 64)),
    *("bf16", "f16", "f32", "f64", "tf32", "complex<f32>", "complex<f64>"),
    *("f8E3M4", "f8E4M3", "f8E4M3FN", "f8E4M3FNUZ", "f8E4M3B11FNUZ", "f8E5M2", "f8E5M2FNUZ", "f8E8M0FNU"),
    *("f6E2M3FN", "f6E3M2FN", "f4E2M1FN"),
)

_FEATURES = (
    *("dynamic shape", "while:dynamic", "gather:batching", "scatter:batching", "sort:stable"),
    *(f"sort:compare {how}" for how in ("LT", "LE", "GT", "GE", "EQ", "NE", "other")),
)
_OPEN = ("custom_call:", "composite:", "attribute:")
"""Features whose rest is anyone's name."""


@cache
def operators() -> tuple[str, ...]:
    """Of all dialects that a program may be found in."""
    classes = (value for dialect in _DIALECTS for value in vars(dialect).values() if isinstance(value, type))
    return tuple(sorted({c.OPERATION_NAME for c in classes if hasattr(c, "OPERATION_NAME")}))


def _features(pattern: str) -> Iterator[str]:
    yield from _FEATURES
    if not pattern.startswith(("sort", "while", "dynamic", "gather", "scatter")):
        yield from (f"convert:{a}->{b}" for a, b in itertools.product(TYPES, repeat=2))
        yield from (f"dot_general:{a}x{b}->{c}" for a, b, c in itertools.product(TYPES, repeat=3))


def known(kind: str, pattern: str) -> bool:
    """Whether a pattern can match any operator, type or feature, by a rule's kind."""
    if kind == "feature" and pattern.startswith(_OPEN):
        return True
    names: Iterable[str] = {"operator": operators(), "type": TYPES}.get(kind) or _features(pattern)
    return any(fnmatchcase(name, pattern) for name in names)


def near(kind: str, pattern: str) -> str:
    """What may have been meant, as the end of a message; "" where nothing is near."""
    names = {"operator": operators(), "type": TYPES}.get(kind) or (*_FEATURES, *_OPEN, "convert:", "dot_general:")
    found = difflib.get_close_matches(pattern, names, 1)
    return f" (near: {found[0]})" if found else ""
