"""How fast a checkpoint loads, prefills and decodes on the machine at hand, and how fast the machine is."""

from __future__ import annotations

import gc
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsjax.bandwidth import SAMPLE_BYTES, memory_bandwidth, read_fresh, read_reused, warm_up, weight_files
from dsjax.config import load_config
from dsjax.errors import InputError
from dsjax.generate import Engine
from dsjax.numerics import Numerics
from dsjax.parallel import Parallel, load_onto
from dsjax.params import abstract_params, active_bytes, tree_bytes
from dsjax.soak import check_soak, soak


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
    soak_steps: int | None = None,
    parallel: Parallel | None = None,
) -> dict[str, Any]:
    """Times a checkpoint on random prompts; medians over `runs`, after one run that is not counted.

    Its files are read once before anything is timed, so that loading and plain reading find the page cache alike.
    Plain reading into fresh memory is timed once for itself, then again directly before the load and directly after the
    model is given back, and the better of these two counts: both find memory that was freed a moment ago, as the load
    does, while memory that a virtual machine must be given first can be ten times slower (load_s in a process that does
    nothing else is then longer, too). It never holds more than the weights do, and memory bandwidth is measured last,
    so that neither is in `peak_rss_bytes`.

    Args:
      folder: checkpoint, or a converted one.
      numerics: how to compute; `pow2` is taken from the checkpoint.
      weights: what they are held as, one of `params.WEIGHTS`.
      prompt_length: tokens per prompt.
      new_tokens: decoded per prompt.
      batch: prompts at once.
      runs: counted runs.
      soak_steps: also take this many decode steps as `soak.soak` does.
      parallel: the mesh to run on; one device by default.

    Returns:
      load_s, compile_s, ttft_s, tpot_s: seconds, tpot_s of one decode step.
      prefill_tokens_per_s, decode_tokens_per_s: over all slots.
      load_bytes: put in place by the load; load_bytes_per_s, over load_s.
      plain_read_bytes_per_s: the same files into freshly allocated memory of that size, first touch included, as a load
        needs it; plain_read_first_bytes_per_s: likewise, before memory was freed; plain_read_reused_bytes_per_s: into
        one small buffer again and again. Of large models, the first `bandwidth.SAMPLE_BYTES`.
      load_ratio: load_bytes_per_s over plain_read_bytes_per_s.
      weight_bytes, active_bytes: weights as held, and what a step must read of them, see `params.active_bytes`.
      read_bytes_per_s, copy_bytes_per_s: memory bandwidth, see `bandwidth.memory_bandwidth`.
      bandwidth_utilisation, copy_bandwidth_utilisation: active_bytes times steps per second over each of these.
      peak_rss_bytes: until the model is given back; peak_staging_bytes.
      soak: what `soak.soak` returns, if asked for; and what was run.
      What follows from decode steps is None if there is none (new_tokens 1).

    Raises:
      InputError: before anything is loaded, if the model has fewer positions than prompt_length + new_tokens, if
        `weights` does not go with `numerics`, or for fewer `soak_steps` than two passes.
    """
    config = load_config(folder)
    numerics = numerics.for_checkpoint(config, weights)
    positions = config.max_position_embeddings
    if prompt_length + new_tokens > positions:
        raise InputError(
            f"--prompt-length {prompt_length} and --new-tokens {new_tokens}: expected at most {positions} together"
        )
    if soak_steps:
        check_soak(soak_steps, new_tokens)
    files = weight_files(folder)
    held = tree_bytes(abstract_params(config, weights=weights))
    nbytes = max(1, min(warm_up(files), held, SAMPLE_BYTES))
    reused = read_reused(files, nbytes)
    first, before = read_fresh(files, nbytes), read_fresh(files, nbytes)
    start = time.perf_counter()
    config, params, stats = load_onto(parallel, folder, weights=weights)
    load_s = time.perf_counter() - start
    device = min(jax.tree.leaves(params)[0].addressable_shards, key=lambda shard: shard.device.id).device
    held, active = tree_bytes(params), active_bytes(params, config, batch)
    engine = Engine(config, params, numerics, parallel=parallel)
    random = np.random.default_rng(0)
    prompts = random.integers(0, config.vocab_size, (batch, prompt_length)).tolist()
    timings = [engine.generate(prompts, new_tokens)[1] for _ in range(runs + 1)]
    ttft = statistics.median(t.ttft_s for t in timings[1:])
    steps = [s for t in timings[1:] for s in t.token_s]
    tpot = statistics.median(steps) if steps else None
    soaked = {"soak": soak(engine, prompts, new_tokens, soak_steps)} if soak_steps else {}
    peak = peak_rss_bytes()
    del engine, params
    gc.collect()  # an engine and its compiled steps refer to one another
    fresh = max(before, read_fresh(files, nbytes))
    reused = max(reused, read_reused(files, nbytes))
    read, copy = memory_bandwidth(device)
    cards = parallel.mesh.size if parallel is not None and device.platform != "cpu" else 1  # CPU devices share memory
    together = tpot * cards if tpot else None
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
        "load_bytes_per_s": stats.bytes / load_s,
        "plain_read_bytes_per_s": fresh,
        "plain_read_first_bytes_per_s": first,
        "plain_read_reused_bytes_per_s": reused,
        "load_ratio": stats.bytes / load_s / fresh,
        "weight_bytes": held,
        "active_bytes": active,
        "peak_staging_bytes": stats.peak_staging_bytes,
        "compile_s": timings[0].compile_s,
        "ttft_s": ttft,
        "tpot_s": tpot,
        "prefill_tokens_per_s": batch * prompt_length / ttft,
        "decode_tokens_per_s": batch / tpot if tpot else None,
        "read_bytes_per_s": read,
        "copy_bytes_per_s": copy,
        "bandwidth_utilisation": active / together / read if together else None,
        "copy_bandwidth_utilisation": active / together / copy if together else None,
        "peak_rss_bytes": peak,
        **soaked,
    }
