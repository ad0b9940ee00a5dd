"""How fast a checkpoint loads, prefills and decodes on the machine at hand."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from dsjax.checkpoint.load import load
from dsjax.config import load_config
from dsjax.errors import InputError
from dsjax.generate import Engine
from dsjax.numerics import Numerics
from dsjax.params import tree_bytes


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far; pages of mapped files count."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def bench(
    folder: Path,
    numerics: Numerics,
    *,
    weights: str = "stored",
    prompt_length: int,
    new_tokens: int,
    batch: int,
    runs: int = 3,
) -> dict[str, Any]:
    """Times a checkpoint on random prompts; medians over `runs`, after one run that is not counted.

    Args:
      folder: checkpoint.
      numerics: how to compute; `pow2` is taken from the checkpoint.
      weights: what they are held as, one of `params.WEIGHTS`.
      prompt_length: tokens per prompt.
      new_tokens: decoded per prompt.
      batch: prompts at once.
      runs: counted runs.

    Returns:
      load_s, compile_s, ttft_s, tpot_s in seconds; prefill_tokens_per_s and decode_tokens_per_s over all slots;
      weight_bytes, as held; peak_rss_bytes; and what was run.

    Raises:
      InputError: before anything is loaded, if the model has fewer positions than prompt_length + new_tokens, or if
        `weights` does not go with `numerics`.
    """
    config = load_config(folder)
    numerics = numerics.for_checkpoint(config, weights)
    positions = config.max_position_embeddings
    if prompt_length + new_tokens > positions:
        raise InputError(
            f"--prompt-length {prompt_length} and --new-tokens {new_tokens}: expected at most {positions} together"
        )
    start = time.perf_counter()
    config, params, stats = load(folder, weights=weights)
    load_s = time.perf_counter() - start
    engine = Engine(config, params, numerics)
    random = np.random.default_rng(0)
    prompts = random.integers(0, config.vocab_size, (batch, prompt_length)).tolist()
    timings = [engine.generate(prompts, new_tokens)[1] for _ in range(runs + 1)]
    ttft = statistics.median(t.ttft_s for t in timings[1:])
    steps = [s for t in timings[1:] for s in t.token_s]
    tpot = statistics.median(steps) if steps else None
    return {
        "model": str(folder),
        "numerics": numerics.mode,
        "dtype": numerics.dtype,
        "weights": weights,
        "batch": batch,
        "prompt_length": prompt_length,
        "new_tokens": new_tokens,
        "load_s": load_s,
        "load_bytes": stats.bytes,
        "weight_bytes": tree_bytes(params),
        "peak_staging_bytes": stats.peak_staging_bytes,
        "compile_s": timings[0].compile_s,
        "ttft_s": ttft,
        "tpot_s": tpot,
        "prefill_tokens_per_s": batch * prompt_length / ttft,
        "decode_tokens_per_s": batch / tpot if tpot else None,
        "peak_rss_bytes": peak_rss_bytes(),
    }
