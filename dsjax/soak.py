"""Many decode steps in one process: does every pass give the same ids, and does memory stay where it was?"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsjax.bandwidth import current_rss_bytes
from dsjax.errors import InputError
from dsjax.generate import Engine

MAX_GROWTH_BYTES = 64 << 20
"""More resident memory than this after the first pass is a failure. Allocators keep a few MB more or less from pass to
pass, whatever the model; a leak grows with the steps, and a run that is long enough to ask for passes any bound."""


def check_soak(steps: int, new_tokens: int) -> None:
    """Refuses passes without a decode step, and fewer than two passes, which would say nothing of memory.

    Raises:
      InputError: naming the flags.
    """
    if new_tokens < 2:
        raise InputError(f"--soak: expected --new-tokens of at least 2, found {new_tokens}")
    if steps < 2 * (new_tokens - 1):
        raise InputError(f"--soak: expected at least two passes, {2 * (new_tokens - 1)} steps, found {steps}")


def soak(engine: Engine, prompts: Sequence[Sequence[int]], new_tokens: int, steps: int) -> dict[str, Any]:
    """Decodes greedily from fixed prompts, from the start again whenever a pass is at its length limit.

    A pass is a prefill and `new_tokens` - 1 decode steps; the last one may be cut short. One pass before them warms up,
    is not counted, and gives the ids that all others must give.

    Args:
      engine: the model.
      prompts: ids, none empty.
      new_tokens: per prompt and pass, 2 at least.
      steps: decode steps in total, two passes at least.

    Returns:
      steps, passes: counted.
      identical: every pass gave the ids of the warm-up, as far as it went.
      first_different_pass: from 1; None if there is none.
      rss_first_bytes, rss_last_bytes: resident memory after the first and the last counted pass, rss_growth_bytes their
        difference, max_rss_growth_bytes the bound on it; None where the system does not tell.
      first_step_s, last_step_s: median seconds of a step in the first and in the last tenth of all steps.
      passed: identical, and no growth above the bound.

    Raises:
      InputError: for fewer than 2 new tokens, which take no decode step, or fewer than two passes.
    """
    check_soak(steps, new_tokens)
    length = max(len(p) for p in prompts) + new_tokens
    reference = [output.ids for output in engine.generate(prompts, new_tokens, max_length=length)[0]]
    step_s = np.full(steps, np.nan)  # written now, so that its pages do not count as growth
    done = passes = 0
    different: int | None = None
    first: int | None = None
    last: int | None = None
    while done < steps:
        count = min(new_tokens - 1, steps - done)
        outputs, timing = engine.generate(prompts, count + 1, max_length=length)
        step_s[done : done + count] = timing.token_s
        done, passes = done + count, passes + 1
        same = all(o.ids == ids[: count + 1] for o, ids in zip(outputs, reference, strict=True))
        if not same and different is None:
            different = passes
        last = current_rss_bytes()
        first = last if passes == 1 else first
    tenth = max(1, steps // 10)
    growth = last - first if first is not None and last is not None else None
    return {
        "steps": steps,
        "passes": passes,
        "identical": different is None,
        "first_different_pass": different,
        "rss_first_bytes": first,
        "rss_last_bytes": last,
        "rss_growth_bytes": growth,
        "max_rss_growth_bytes": MAX_GROWTH_BYTES,
        "first_step_s": statistics.median(step_s[:tenth].tolist()),
        "last_step_s": statistics.median(step_s[-tenth:].tolist()),
        "passed": different is None and (growth is None or growth <= MAX_GROWTH_BYTES),
    }
