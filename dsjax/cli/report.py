"""What `dsjax bench` shows to a person: few lines, with units (1 GB = 1e9 bytes)."""

from __future__ import annotations

from typing import Any


def _scaled(value: float | None, factor: float, unit: str) -> str:
    return "-" if value is None else f"{value * factor:,.4g} {unit}"


def _gb(value: float | None) -> str:
    return _scaled(value, 1e-9, "GB")


def _gb_per_s(value: float | None) -> str:
    return _scaled(value, 1e-9, "GB/s")


def _ms(value: float | None) -> str:
    return _scaled(value, 1e3, "ms")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _tokens(value: float | None) -> str:
    return _scaled(value, 1, "tokens/s")


def bench_table(result: dict[str, Any]) -> str:
    """The result of `bench.bench` as aligned lines: what, how much, and what belongs to it."""
    r = result
    run = f"{r['platform']}, {r['numerics']}, {r['dtype']}, weights {r['weights']}"
    rows = [
        ("model", r["model"], run),
        ("run", f"batch {r['batch']}", f"prompt {r['prompt_length']}, new {r['new_tokens']}"),
        ("load", f"{r['load_s']:.2f} s", f"{_gb_per_s(r['load_bytes_per_s'])} of {_gb(r['load_bytes'])}"),
        ("  plain reading", _gb_per_s(r["plain_read_bytes_per_s"]), f"load reaches {_percent(r['load_ratio'])} of it"),
        ("    at first", _gb_per_s(r["plain_read_first_bytes_per_s"]), "into memory that the system had to find"),
        ("    reused", _gb_per_s(r["plain_read_reused_bytes_per_s"]), "into one small buffer"),
        ("compile", f"{r['compile_s']:.2f} s", ""),
        ("prefill", _tokens(r["prefill_tokens_per_s"]), f"first token after {_ms(r['ttft_s'])}"),
        ("decode", _tokens(r["decode_tokens_per_s"]), f"{_ms(r['tpot_s'])} a step"),
        ("  weights", _gb(r["active_bytes"]), f"read by a step, of {_gb(r['weight_bytes'])} held"),
        ("  memory read", _gb_per_s(r["read_bytes_per_s"]), f"decode uses {_percent(r['bandwidth_utilisation'])}"),
        ("  memory copy", _gb_per_s(r["copy_bytes_per_s"]), f"decode uses {_percent(r['copy_bandwidth_utilisation'])}"),
        ("peak memory", _gb(r["peak_rss_bytes"]), f"staging {_gb(r['peak_staging_bytes'])}"),
    ]
    if "soak" in r:
        s = r["soak"]
        which = "same ids in each" if s["identical"] else f"other ids first in pass {s['first_different_pass']}"
        bound = f"of at most {_scaled(s['max_rss_growth_bytes'], 1e-6, 'MB')}, to {_gb(s['rss_last_bytes'])}"
        rows += [
            ("soak", "passed" if s["passed"] else "failed", f"{s['steps']} steps in {s['passes']} passes, {which}"),
            ("  memory growth", _scaled(s["rss_growth_bytes"], 1e-6, "MB"), bound),
            ("  step", _ms(s["first_step_s"]), f"in the first tenth, {_ms(s['last_step_s'])} in the last"),
        ]
    width = max(len(value) for _, value, _ in rows)
    return "\n".join(f"{name:16} {value:{width}}  {note}".rstrip() for name, value, note in rows)
