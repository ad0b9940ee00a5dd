#!/usr/bin/env python3
"""What a decoded token of V4 costs as its context grows: step time and cache bytes beside what the formulas predict.

One model (a small geometry of V4's layers, random weights), one step of one token, at several numbers of cached tokens.
The cache is filled with random rows and its length set; nothing is prefilled. A step's cost beyond that at the shortest
context should grow as the work that depends on it does:

    indexer         T / 4 keys in each layer with ratio 4:        2 I X operations and a key's bytes, each
    sparse          min(T / 4, index_topk) entries in each:       4 H U operations and an entry's bytes, each
    heavy           T / 128 entries in each layer with ratio 128: 4 H U operations and an entry's bytes, each

(I index heads of width X, H heads of width U.) The window is the same at every length. One rate of operations is fitted
to all lengths' growth (its geometric mean); `ratio` is measured over predicted growth. Each length is timed at the
capacity that just holds it and at the largest, which tells whether cost follows context or capacity, and for a step
that completes an entry of both ratios, which one step in 128 does. All programs are compiled beforehand and take turns;
medians over rounds.

    .venv/bin/python scripts/bench_context.py [--numerics plain|native] [--plot FILE] [--json]

`--plot` needs matplotlib.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.backend import compiler_options
from dsjax.cache.v4 import V4Cache, index_format, kv_format
from dsjax.config import V4Config, parse_config
from dsjax.config.v4 import CSA, HCA
from dsjax.models import v4
from dsjax.numerics import Numerics
from dsjax.params import Tree, abstract_params, tree_bytes
from dsjax.presets import preset

GEOMETRY = {
    "num_hidden_layers": 7,
    "compress_ratios": [0, 0, 4, 128, 4, 128, 4, 0],
    "vocab_size": 1024,
    "hidden_size": 512,
    "num_attention_heads": 16,
    "q_lora_rank": 256,
    "o_lora_rank": 128,
    "o_groups": 4,
    "moe_intermediate_size": 256,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "index_n_heads": 16,
}
CONTEXTS = (1 << 10, 8 << 10, 64 << 10, 256 << 10, 1 << 20)


@dataclasses.dataclass(frozen=True)
class Work:
    """What one decoded token does with its context.

    Attributes:
      operations: multiplications and additions.
      bytes: read from the cache.
    """

    operations: int
    bytes: int


def context_work(config: V4Config, numerics: Numerics, tokens: int) -> Work:
    """The part of a step's work that depends on how many tokens are cached, from the formulas above."""
    csa, hca = len(config.layers_of(CSA)), len(config.layers_of(HCA))
    keys, heavy = csa * (tokens // CSA), hca * (tokens // HCA)
    entries = csa * min(tokens // CSA, config.index_topk) + heavy
    per_entry = 4 * config.num_attention_heads * config.head_dim
    return Work(
        keys * 2 * config.index_n_heads * config.index_head_dim + entries * per_entry,
        keys * index_format(config, numerics).nbytes + entries * kv_format(config, numerics).nbytes,
    )


def random_params(config: V4Config, seed: int = 0) -> Tree:
    """Parameters of any shapes and no meaning: small bytes, which are finite numbers in every format."""
    draw = np.random.default_rng(seed)

    def leaf(a: jax.ShapeDtypeStruct) -> jax.Array:
        if a.dtype == jnp.float32:
            return jnp.asarray(draw.standard_normal(a.shape, np.float32) * 0.05)
        if a.dtype == jnp.int32:
            return jnp.asarray(draw.integers(0, config.n_routed_experts, a.shape, np.int32))
        return jnp.asarray(draw.integers(0, 0x3C if a.dtype == jnp.uint8 else 0x3C00, a.shape, np.dtype(a.dtype)))

    return jax.tree.map(leaf, abstract_params(config))


def random_cache(config: V4Config, numerics: Numerics, capacity: int) -> V4Cache:
    """A cache full of rows that differ."""
    cache = v4.new_cache(config, numerics, 1, capacity)

    @partial(jax.jit, donate_argnums=0)
    def fill(a: jax.Array, key: jax.Array) -> jax.Array:
        if a.dtype == jnp.float32:
            return jax.random.normal(key, a.shape)
        return jax.random.bits(key, a.shape, a.dtype) & a.dtype.type(0x3BFF if a.dtype == jnp.uint16 else 0x77)

    leaves, tree = jax.tree.flatten(dataclasses.replace(cache, length=None))
    filled = [fill(a, jax.random.key(i)) for i, a in enumerate(leaves)]
    return dataclasses.replace(jax.tree.unflatten(tree, filled), length=cache.length)


class Step:
    """A compiled step of one token, at one capacity."""

    def __init__(self, config: V4Config, numerics: Numerics, params: Tree, capacity: int) -> None:
        self.params = params
        self.cache = random_cache(config, numerics, capacity)
        self.token, self.one = jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32)
        step = jax.jit(partial(v4.step, config, numerics), donate_argnums=1)
        lowered = step.lower(params, self.cache, self.token, self.one)
        self.compiled = lowered.compile(compiler_options(jax.devices()[0].platform))
        memory = self.compiled.memory_analysis()
        self.temporary_bytes = int(memory.temp_size_in_bytes)
        self.aliased_bytes = int(memory.alias_size_in_bytes)
        self.cache_bytes = tree_bytes(self.cache)

    def seconds(self, tokens: int) -> float:
        """Of one step after `tokens` tokens."""
        cache = dataclasses.replace(self.cache, length=jnp.full(1, tokens, jnp.int32))
        jax.block_until_ready(cache)
        start = time.perf_counter()
        logits, _, self.cache = self.compiled(self.params, cache, self.token, self.one)
        jax.block_until_ready((logits, self.cache))
        return time.perf_counter() - start


def measure(numerics: Numerics, contexts: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """One row per context."""
    config = parse_config({**preset("deepseek-v4-flash"), **GEOMETRY})
    assert isinstance(config, V4Config)
    numerics = numerics.for_checkpoint(config)
    params = random_params(config)
    steps = {tokens: Step(config, numerics, params, tokens + 512) for tokens in contexts}
    largest = steps[max(contexts)]
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds + 1):  # the first warms up
        for tokens, step in steps.items():
            # Of steps that complete no entry; one in four does.
            times.setdefault(("own", tokens), []).append(min(step.seconds(tokens + i) for i in range(3)))
            times.setdefault(("largest", tokens), []).append(min(largest.seconds(tokens + i) for i in range(3)))
            times.setdefault(("completing", tokens), []).append(min(step.seconds(tokens + 127) for _ in range(2)))
    medians = {key: statistics.median(values[1:]) for key, values in times.items()}
    base = min(contexts)
    rows = []
    for tokens, step in steps.items():
        work, least = (context_work(config, numerics, t) for t in (tokens, base))
        rows.append(
            {
                "tokens": tokens,
                "step_ms": 1e3 * medians["own", tokens],
                "step_ms_at_largest_capacity": 1e3 * medians["largest", tokens],
                "step_ms_completing_entries": 1e3 * medians["completing", tokens],
                "growth_ms": 1e3 * (medians["own", tokens] - medians["own", base]),
                "predicted_operations": work.operations,
                "predicted_bytes": work.bytes,
                "predicted_growth_operations": work.operations - least.operations,
                "cache_bytes": step.cache_bytes,
                "aliased_bytes": step.aliased_bytes,
                "temporary_bytes": step.temporary_bytes,
            }
        )
    grown = [r for r in rows if r["predicted_growth_operations"]]
    rate = statistics.geometric_mean(r["predicted_growth_operations"] / max(r["growth_ms"], 1e-3) for r in grown)
    for row in rows:
        row["predicted_growth_ms"] = row["predicted_growth_operations"] / rate
        row["ratio"] = row["growth_ms"] / row["predicted_growth_ms"] if row in grown else None
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    head = (
        "| cached tokens | step, ms | in a cache for the largest | completing entries | growth, ms | predicted |"
        " ratio | MFLOP on the context | MB read of it | cache, MB | temporaries, MB |"
    )
    lines = [head, "|" + "---:|" * 11]
    for r in rows:
        lines.append(
            f"| {r['tokens']:,} | {r['step_ms']:.2f} | {r['step_ms_at_largest_capacity']:.2f} |"
            f" {r['step_ms_completing_entries']:.2f} | {r['growth_ms']:.2f} | {r['predicted_growth_ms']:.2f} |"
            f" {'' if r['ratio'] is None else format(r['ratio'], '.2f')} | {r['predicted_operations'] / 1e6:,.1f} |"
            f" {r['predicted_bytes'] / 1e6:,.2f} | {r['cache_bytes'] / 1e6:,.1f} | {r['temporary_bytes'] / 1e6:.2f} |"
        )
    return "\n".join(lines)


def plot(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Step time and cache bytes over context, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (name, rows) in enumerate(results.items()):
        tokens = [r["tokens"] for r in rows]
        left.plot(tokens, [r["step_ms"] for r in rows], "o-", color=f"C{i}", label=f"{name}, measured")
        base = rows[0]["step_ms"]
        predicted = [base + r["predicted_growth_ms"] for r in rows]
        left.plot(tokens, predicted, "--", color=f"C{i}", label=f"{name}, predicted")
        right.plot(tokens, [r["cache_bytes"] for r in rows], "o-", color=f"C{i}", label=name)
    for axes, title in ((left, "milliseconds a step"), (right, "bytes of cache")):
        axes.set(xscale="log", yscale="log", xlabel="cached tokens", title=title)
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--numerics", choices=("plain", "native", "both"), default="both")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--contexts", type=lambda s: tuple(int(n) for n in s.split(",")), default=CONTEXTS)
    parser.add_argument("--plot", type=Path, help="write a figure (.svg, .png)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    modes = ("plain", "native") if options.numerics == "both" else (options.numerics,)
    results = {mode: measure(Numerics(mode), options.contexts, options.rounds) for mode in modes}
    if options.plot:
        plot(results, options.plot)
    if options.json:
        print(json.dumps(results))
    else:
        for mode, rows in results.items():
            print(f"\n{mode}, bfloat16\n\n{table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
