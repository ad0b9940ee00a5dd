"""Results of ranks: whole results made of their parts, and whether ranks stand in each other's places."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dsjax.export.standalone.arrays import Stored
from dsjax.export.standalone.errors import distance

Shards = Mapping[int, Mapping[str, Stored]]
Places = Mapping[int, Mapping[str, tuple[slice, ...]]]  # by rank and result: its part of the whole result


def assemble(name: str, golden: Stored, shards: Shards, places: Places) -> tuple[Stored | None, float, list[str]]:
    """A whole result from the ranks' parts of it; how far ranks differ that should hold the same; what is missing."""
    whole, seen, spread = np.zeros(golden.shape, golden.values().dtype), np.zeros(golden.shape, bool), 0.0
    for rank, parts in places.items():
        if name not in parts:
            continue
        if name not in shards[rank]:
            return None, 0.0, [f"{name}: no such result of rank {rank}"]
        part, values = parts[name], shards[rank][name].like(golden).values()
        again, held = seen[part], whole[part]
        if values.shape != held.shape or (values.dtype.kind == "f") != (whole.dtype.kind == "f"):
            expected = f"{golden.code} {list(held.shape)}"
            found = f"{shards[rank][name].code} {list(values.shape)}"
            return None, 0.0, [f"{name}: rank {rank}: expected {expected}, found {found}"]
        whole = whole.astype(np.promote_types(whole.dtype, values.dtype), copy=False)
        spread = max(spread, distance(held[again], values[again]))
        whole[part] = np.where(again, whole[part], values)
        seen[part] = True
    return (Stored.of(whole), spread, []) if seen.all() else (None, 0.0, [f"{name}: the ranks leave some of it out"])


def rank_order(expected: Mapping[str, Stored], shards: Shards, places: Places, bound: float) -> str | None:
    """Whether all would fit if ranks changed places, and which; None if not, or if none has to move."""

    def fits(place: int, rank: int) -> bool:
        parts = [(expected[n], part, shards[rank].get(n)) for n, part in places[place].items() if n in expected]
        return all(s is not None and distance(g.values()[p], s.like(g).values()) <= bound for g, p, s in parts)

    ranks = sorted(places)
    fitting = {place: sorted((r for r in ranks if fits(place, r)), key=lambda r: (r != place, r)) for place in ranks}
    owner: dict[int, int] = {}

    def seat(place: int, tried: set[int]) -> bool:  # Kuhn's matching of ranks to places
        for rank in fitting[place]:
            if rank not in tried:
                tried.add(rank)
                if rank not in owner or seat(owner[rank], tried):
                    owner[rank] = place
                    return True
        return False

    if not all(seat(place, set()) for place in ranks):
        return None
    moved = sorted((place, rank) for rank, place in owner.items() if rank != place)
    text = ", ".join(f"rank {rank}'s in place of rank {place}'s" for place, rank in moved)
    return f"wrong rank order: all would fit with {text}" if moved else None
