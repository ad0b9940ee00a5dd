"""`dsjax plan`: the question from flags, the answer as a short table and one sentence."""

from __future__ import annotations

import argparse
import re
from typing import Any

import jax

from dsjax.aot import ahead_of_time
from dsjax.cli.common import numerics_of, print_json
from dsjax.errors import InputError
from dsjax.operators import report
from dsjax.plan import Cards, Load, answer, load_chip, load_model
from sharding import parse_plan

_UNITS = {"B": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def size(text: str) -> int:
    """Bytes from "96GB", "64GiB", "1.5 TB"; GB is 1e9. A flag's type."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)", text.strip())
    if found is None or found[2] not in _UNITS:
        raise ValueError
    return round(float(found[1]) * _UNITS[found[2]])


size.__name__ = "size like 96GB or 64GiB"


def plan(options: argparse.Namespace) -> int:
    """`dsjax plan`. Status 0 whether it fits or not."""
    chip = None if options.chip is None else load_chip(options.chip)
    if options.memory is None and chip is None:
        raise InputError("--memory: expected it, or --chip, which says how much a card has; found neither")
    memory = options.memory if options.memory is not None else chip.memory_bytes if chip is not None else 0
    if memory <= 0:
        raise InputError(f"--memory {memory}: expected more than nothing")
    if options.op and options.aot is None:
        raise InputError("--op: expected --aot, which compiles a step; without it nothing depends on operators")
    model = load_model(options.model, numerics_of(options), options.weights)
    cards = Cards(options.cards, memory, options.reserve, chip)
    load = Load(options.context, options.batch, options.chunk)
    result = answer(model, cards, load, options.mesh, options.attention)
    if options.aot is not None:
        result["operators"] = report("tpu")
        jax.config.update("jax_platforms", "cpu")  # no device is wanted, only a compiler
        result["aot"] = ahead_of_time(model, parse_plan(result["mesh"]), result["attention"], load, options.aot)
    if options.json:
        print_json(result)
    else:
        print(plan_table(result))
    return 0


def _gb(count: float) -> str:
    return f"{count / 1e9:,.1f} GB"


def _time(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{seconds * 1e3:,.1f} ms"


def plan_table(result: dict[str, Any]) -> str:
    """The answer as aligned lines: what, how much, and what belongs to it; the verdict last."""
    r, card = result, result["bytes_per_card"]
    total = sum(r["weights_per_card"].values())
    modules = ", ".join(
        f"{name}{' replicated' if name in r['replicated'] else ''} {count / 1e9:.1f}"
        for name, count in r["weights_per_card"].items()
        if count * 100 >= total
    )
    choice = f"the best of {r['plans_compared']}" if r["plans_compared"] > 1 else "as asked"
    used = f", {r['cards_used']} of them used" if r["cards_used"] < r["cards"] else ""
    rows = [
        ("model", r["model"], f"weights {r['weights']}, {r['numerics']}, {r['dtype']}"),
        (
            "cards",
            f"{r['cards']} x {r['memory_bytes'] / 1e9:g} GB",
            f"{_gb(r['left_bytes'])} more than the model{used}",
        ),
        ("plan", r["mesh"], f"attention by {r['attention']}; {choice}"),
        ("one card", _gb(card["total"]), f"context {r['context']:,}, batch {r['batch']:,}"),
        ("  weights", _gb(card["weights"]), modules),
        ("  scales", _gb(card["scales"]), ""),
        ("  kv", _gb(card["kv"]), f"{r['cache_bytes_per_token']:,.0f} bytes a token of each sequence it has"),
        ("  indexer", _gb(card["indexer"]), ""),
        ("  activations", _gb(card["activations"]), "of a prefill step"),
        ("  workspace", _gb(card["workspace"]), f"{_gb(r['reserve_bytes'])} of it reserved"),
    ]
    rows += _estimate_rows(r["estimate"]) if "estimate" in r else []
    rows += _aot_rows(r["aot"]) if "aot" in r else []
    width = max(len(value) for _, value, _ in rows)
    lines = [f"{name:16} {value:{width}}  {note}".rstrip() for name, value, note in rows if value != _gb(0)]
    return "\n".join([*lines, r["reason"]])


def _aot_rows(aot: dict[str, Any]) -> list[tuple[str, str, str]]:
    rows = [("compiled for", aot["topology"], aot["device"])]
    for name in ("decode", "prefill"):
        step = aot[name]
        note = (
            f"arguments, {_gb(step['counted_bytes'])} as counted; {_gb(step['temp_bytes'])} temporary, "
            f"{_gb(step['alias_bytes'])} in place; sends {sum(step['sent_bytes'].values()) / 1e6:,.1f} MB, "
            f"{step['planned_sent_bytes'] / 1e6:,.1f} planned; compiled in {_time(step['seconds'])}"
        )
        rows.append((f"  {name}", _gb(step["argument_bytes"]), note))
    return rows


def _estimate_rows(estimate: dict[str, Any]) -> list[tuple[str, str, str]]:
    e = estimate
    known = f"; unverified: {', '.join(e['unverified'])}" if e["unverified"] else ""
    rows = [("at best", e["chip"], e["title"] + known)]
    if e["lacking"]:
        return [
            *rows,
            ("  no estimate", "-", f"no figure is known for {', '.join(e['lacking'])}; --chip FILE gives one"),
        ]
    for name, key, time in (("  first token", "prefill", e["ttft_s"]), ("  each further", "decode", e["tpot_s"])):
        times = e[key]
        parts = ", ".join(f"{part} {_time(times[part + '_s'])}" for part in ("compute", "memory", "links"))
        rate = f"; {e['tokens_per_s']:,.0f} tokens/s" if key == "decode" else ""
        rows.append((name, _time(time), f"bound by {times['bound']}: {parts}{rate}"))
    return rows
