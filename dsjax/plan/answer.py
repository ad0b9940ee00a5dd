"""The planner's whole answer to one question, as the object that `dsjax plan --json` prints."""

from __future__ import annotations

from typing import Any

from dsjax.errors import InputError
from dsjax.plan.memory import Load
from dsjax.plan.placement import Model
from dsjax.plan.roofline import Times, decode_times, lacking, prefill_times, work
from dsjax.plan.search import Candidate, Cards, alternatives, best, candidates, model_bytes
from dsjax.plan.traffic import collectives
from sharding import Plan


def answer(
    model: Model, cards: Cards, load: Load, plan: Plan | None = None, attention: str | None = None
) -> dict[str, Any]:
    """Whether a model fits, why, how much more would, and how fast at best.

    Args:
      model: what is to run.
      cards: what there is.
      load: what is asked.
      plan, attention: the best if None.

    Returns:
      `fits`, `reason`, `bytes_per_card` by part, with `total`, and what they were found with; bytes are bytes.

    Raises:
      InputError: for a plan that cannot work, or more context than the model has.
    """
    limit = model.config.max_position_embeddings
    if load.context > limit:
        raise InputError(f"--context {load.context}: expected at most the {limit} positions of {model.name}")
    found = candidates(model, cards, load, plan, attention)
    chosen = best(found)
    layout = chosen.placement.layout
    whole = model_bytes(model)
    instead = [] if chosen.fits else alternatives(model, cards, load, found, free=plan is None and attention is None)
    context, batch = chosen.largest_context(), chosen.largest_batch()
    more = f"context up to {context:,} at batch {load.batch}, batch up to {batch:,} at context {load.context:,}"
    result: dict[str, Any] = {
        "model": model.name,
        "weights": model.weights,
        "numerics": model.numerics.mode,
        "dtype": model.numerics.dtype,
        "cards": cards.count,
        "cards_used": layout.plan.devices,
        "memory_bytes": round(cards.memory_bytes),
        "reserve_bytes": cards.reserve,
        "mesh": str(layout.plan),
        "attention": layout.attention,
        "plans_compared": len(found),
        "context": load.context,
        "batch": load.batch,
        "fits": chosen.fits,
        "reason": f"{fit(chosen)}; {more}" if chosen.fits else misfit(chosen, instead),
        "bytes_per_card": {**chosen.parts, "total": chosen.total},
        "weights_per_card": chosen.placement.modules,
        "replicated": sorted(chosen.placement.replicated),
        "free_bytes": round(cards.memory_bytes) - chosen.total,
        "cache_bytes_per_token": chosen.bytes_per_token / chosen.placement.slots(load.batch),
        "model_bytes": whole,
        "left_bytes": round(cards.count * cards.memory_bytes) - whole,
        "largest_context": context,
        "largest_batch": batch,
        "instead": instead,
    }
    if cards.chip is not None:
        result["estimate"] = _estimate(chosen)
    return result


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f}"


def _of(chosen: Candidate) -> str:
    return f"{_gb(chosen.total)} of {chosen.cards.memory_bytes / 1e9:g} GB per card"


def fit(chosen: Candidate) -> str:
    """How well it fits."""
    return f"fits: {_of(chosen)}, {_gb(chosen.cards.memory_bytes - chosen.total)} free"


def misfit(chosen: Candidate, instead: list[str]) -> str:
    """Why it does not fit, in one sentence, and what would."""
    sizes = {
        f"{name} replicated" if name in chosen.placement.replicated else name: size
        for name, size in chosen.placement.modules.items()
    }
    sizes |= {name: chosen.parts[name] for name in ("kv", "indexer", "activations", "workspace")}
    largest = sorted(sizes.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{name} {_gb(size)}" for name, size in largest if size * 100 >= chosen.total)
    would = f"; would fit: {'; or '.join(instead)}" if instead else ""
    return f"does not fit: {_of(chosen)}, {_gb(chosen.total - chosen.cards.memory_bytes)} too many: {listed}{would}"


def _times(times: Times) -> dict[str, Any]:
    return {"compute_s": times.compute, "memory_s": times.memory, "links_s": times.links, "bound": times.bound}


def _estimate(chosen: Candidate) -> dict[str, Any]:
    """TTFT and TPOT, and what they are made of; only what is lacking, where the chip's figures do not suffice."""
    chip, placement, load = chosen.cards.chip, chosen.placement, chosen.load
    assert chip is not None
    result: dict[str, Any] = {
        "chip": chip.name,
        "title": chip.title,
        "note": chip.note,
        "sources": dict(chip.sources),
        "unverified": list(chip.unverified),
        "lacking": lacking(chip, placement),
    }
    if result["lacking"]:
        return result
    slots = placement.slots(load.batch)
    prefill, decode = prefill_times(placement, chip, load), decode_times(placement, chip, load)
    done = work(placement, slots, 1, load.context)
    exchanges = [
        {"what": e.what, "kind": e.kind, "cards": e.cards, "times": e.times, "sent_bytes": round(e.sent)}
        for e in collectives(placement, slots, 1)
    ]
    return result | {
        "ttft_s": prefill.total,
        "tpot_s": decode.total,
        "tokens_per_s": load.batch / decode.total,
        "prefill": _times(prefill),
        "decode": _times(decode)
        | {
            "flops": round(sum(done.flops.values())),
            "flops_by_part": {part: round(count) for part, count in done.parts.items()},
            "weight_bytes": round(done.weight_bytes),
            "cache_bytes": round(done.cache_bytes),
            "collectives": exchanges,
        },
    }
