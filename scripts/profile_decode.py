#!/usr/bin/env python3
"""Where the milliseconds of one decode step go, by part of the model, beside the bytes that each part must read.

Runs a checkpoint's compiled step under JAX's profiler (XLA:CPU), adds up the time of every operation by the scope that
it was traced in, and prints a markdown table: time, share, weight bytes, and their rate. Scopes are set in the model
(`jax.named_scope`); an operation fused of several counts for the scope that most of them have.

    .venv/bin/python scripts/profile_decode.py --model DIR [--context 128] [--batch 1] [--tokens 1] [--steps 20]
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.checkpoint.load import load
from dsjax.config import Config
from dsjax.generate import Engine
from dsjax.numerics import Numerics
from dsjax.params import INTEGER, Tree, leaves, tree_bytes
from dsjax.sampling import Sampling

SCOPES = ("embed", "norm", "queries", "latent", "absorb", "attend", "expand", "output", "router", "experts", "shared")
SCOPES += ("dense", "head", "sample")
SCOPES += ("streams", "keys", "compressor", "indexer")  # V4

WHERE = {  # any name on a leaf's path, the last found -> scope that reads it
    "shared": "shared",
    "ffn": "dense",
    "attention_streams": "streams",
    "ffn_streams": "streams",
    "head_streams": "head",
    "compressor": "compressor",
    "indexer": "indexer",
}
PARTS = {  # leaf (last name, or last two) -> scope that reads it
    "q": "queries",
    "q_a": "queries",
    "q_b": "queries",
    "kv_a": "latent",
    "kv_b": "absorb",
    "o": "output",
    "kv": "keys",
    "o_a": "output",
    "o_b": "output",
    "router.weight": "router",
    "head": "head",
}


def scopes_of(text: str) -> dict[str, str]:
    """The scope of every operation of a compiled program: the one that most of what is fused in it was traced in."""
    bodies = dict(re.findall(r"^%(\S+) .*?\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))

    def found(lines: str) -> list[str]:
        paths = re.findall(r'op_name="([^"]*)"', lines)
        scopes = ([part for part in path.split("/") if part in SCOPES] for path in paths)
        return [parts[-1] for parts in scopes if parts]

    named = {}
    for name, line in re.findall(r"^\s+(?:ROOT )?%(\S+) = (.*)$", text, re.MULTILINE):
        fused = re.search(r"calls=%([\w.\-]+)", line)
        scopes = found(bodies.get(fused.group(1), "") if fused else "") or found(line)
        named[name] = Counter(scopes).most_common(1)[0][0] if scopes else "other"
    return named


def read_bytes(config: Config, params: Tree) -> Counter[str]:
    """Weight bytes that one token reads, by scope."""
    totals: Counter[str] = Counter()
    for row, leaf in leaves(params, config):
        if row.path[0] in ("embed", "mtp") or row.storage == INTEGER:
            continue
        nbytes = tree_bytes(leaf)
        if row.experts:
            totals["experts"] += nbytes * config.num_experts_per_tok // config.n_routed_experts
        else:
            part = next((WHERE[name] for name in reversed(row.path) if name in WHERE), None)
            totals[part or PARTS.get(row.path[-1]) or PARTS.get(".".join(row.path[-2:])) or "norm"] += nbytes
    return totals


def profile(path: Path, text: str, steps: int) -> Counter[str]:
    """Milliseconds per step by scope, from a trace: every event's own time, without that of events inside it."""
    own: Counter[str] = Counter()
    data = jax.profiler.ProfileData.from_file(str(next(path.rglob("*.xplane.pb"))))
    for line in (line for plane in data.planes for line in plane.lines if "python" not in line.name):
        stack: list[tuple[float, str]] = []
        for event in sorted(line.events, key=lambda e: (e.start_ns, -e.duration_ns)):
            while stack and stack[-1][0] <= event.start_ns:
                stack.pop()
            if stack:
                own[stack[-1][1]] -= event.duration_ns
            own[event.name] += event.duration_ns
            stack.append((event.start_ns + event.duration_ns, event.name))
    totals: Counter[str] = Counter()
    scopes = scopes_of(text)
    for name, ns in own.items():
        if "wait for completion" not in name and ("::" in name or name in scopes):
            totals[scopes.get(name, "runtime")] += ns / 1e6 / steps
    return totals


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--weights", default="stored")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--context", type=int, default=128, help="tokens before the step")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=1, help="new tokens per slot")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    config, params, _ = load(options.model, weights=options.weights)
    engine = Engine(config, params, Numerics("plain", options.dtype))
    cache = engine.cache(options.batch, options.context + options.tokens)
    compiled = engine.compiled(cache, options.tokens, Sampling())
    random, batch = np.random.default_rng(0), options.batch
    n_new, sequences = np.full(batch, options.tokens, np.int32), np.zeros(batch, np.int32)
    key = jax.random.key(0)

    def run(steps: int) -> list[float]:
        nonlocal cache
        times = []
        for _ in range(steps):
            tokens = random.integers(0, config.vocab_size, (batch, options.tokens)).astype(np.int32)
            cache = dataclasses.replace(cache, length=jnp.full(batch, options.context, jnp.int32))
            start = time.perf_counter()
            drawn, cache = compiled(params, cache, tokens, n_new, key, sequences)
            drawn.block_until_ready()
            times.append(time.perf_counter() - start)
        return times

    run(3)
    plain = statistics.median(run(options.steps)) * 1e3
    with tempfile.TemporaryDirectory() as scratch:
        with jax.profiler.trace(scratch):
            traced = statistics.mean(run(options.steps)) * 1e3
        totals = profile(Path(scratch), compiled.as_text(), options.steps)
    nbytes = read_bytes(config, params)
    named = sum(ms for scope, ms in totals.items() if scope != "other")
    print(
        f"step {plain:.2f} ms; under the profiler {traced:.2f} ms, of which {named:.2f} ms ({named / traced:.0%}) named"
    )
    print("\n| part | ms | share | weight MB | GB/s |\n|---|---|---|---|---|")
    for scope, ms in totals.most_common():
        rate = f"{nbytes[scope] / ms / 1e6:.1f}" if nbytes[scope] and batch * options.tokens == 1 else ""
        print(f"| {scope} | {ms:.2f} | {ms / traced:.1%} | {nbytes[scope] / 1e6:.1f} | {rate} |")
    total = sum(nbytes.values())
    print(f"| all | {sum(totals.values()):.2f} | {sum(totals.values()) / traced:.1%} | {total / 1e6:.1f} |  |")


if __name__ == "__main__":
    main()
