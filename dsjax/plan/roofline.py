"""How fast at best: operations, bytes and exchanges of a step against a chip's figures.

    step = max(operations / rate, bytes read / memory bandwidth) + exchanges / links

Operations by element type, each at its own rate, one after the other. Bytes are those that a step must read: weights
once, of the routed experts the distinct ones that its tokens choose, and the cached rows that it attends to. Exchanges
are not overlapped with anything. Everything else (launches, padding, activations' traffic, uneven routing) is left out,
so no machine is faster than this, and real ones are slower.
"""

from __future__ import annotations

import dataclasses
import math
from functools import lru_cache

from dsjax.cache.per_token import index_format, row_format
from dsjax.cache.v4 import index_format as v4_index_format
from dsjax.cache.v4 import kv_format
from dsjax.config import DenseConfig, V4Config
from dsjax.config.v4 import CSA, HCA
from dsjax.layers.mla import choose_form
from dsjax.params import INTEGER, VECTOR, Row, tree_bytes
from dsjax.plan.chips import Chip
from dsjax.plan.memory import Load
from dsjax.plan.placement import Placement, module_of
from dsjax.plan.traffic import collectives, dispatch_axes, expert_rows, gathered_slots, seconds
from quant import E2M1, E4M3, QArray


@dataclasses.dataclass(frozen=True)
class Work:
    """What one card does in a step.

    Attributes:
      flops: operations by element type, a multiply-add being two.
      parts: the same by module, with "attention over the context".
      weight_bytes, cache_bytes: read at least once.
      reads: the former by module.
    """

    flops: dict[str, float]
    parts: dict[str, float]
    weight_bytes: float
    cache_bytes: float
    reads: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one step, or of several: operations, reading, exchanges, and all together (see above)."""

    compute: float
    memory: float
    links: float
    total: float

    def __add__(self, other: Times) -> Times:
        return Times(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    @property
    def bound(self) -> str:
        """What takes longest."""
        times = {"compute": self.compute, "memory": self.memory, "links": self.links}
        return max(times, key=lambda name: times[name])


# --- what a step does ------------------------------------------------------------------------------------------------


def distinct_experts(here: int, ways: int, share: float) -> float:
    """Expected number of distinct experts that are chosen on the card with the most, of `here` on each of `ways` cards.

    Args:
      share: of all experts that are chosen by some token. Cards are taken as independent, each expert of them chosen
        with this probability: sum over x of P(some card has x or more).
    """
    if share >= 1:
        return float(here)
    expected, below = 0.0, 0.0
    for x in range(here):
        ways_to_choose = math.lgamma(here + 1) - math.lgamma(x + 1) - math.lgamma(here - x + 1)
        below += math.exp(ways_to_choose + x * math.log(share) + (here - x) * math.log1p(-share))
        expected += 1 - min(below, 1.0) ** ways
    return expected


def chosen_share(experts: int, chosen: int, tokens: int) -> float:
    """Of all experts, those that some of the tokens choose: 1 - (1 - k/E)^n under uniform, independent routing."""
    return 1 - (1 - chosen / experts) ** tokens


def capped_sum(first: int, last: int, ratio: int = 1, cap: int | None = None) -> int:
    """Sum of min(v // ratio, cap) for v from `first` to `last`: keys that queries see which see v tokens."""

    def up_to(n: int) -> int:
        full = n if cap is None else min(n, cap * ratio + ratio - 1)
        q = full // ratio
        total = ratio * q * (q - 1) // 2 + q * (full - q * ratio + 1)
        return total + (0 if cap is None else (n - full) * cap)

    return up_to(last) - up_to(first - 1)


def _element(row: Row, leaf: QArray | object, placement: Placement) -> str:
    """The element type that a product with this leaf is made in."""
    numerics = placement.numerics
    codes = isinstance(leaf, QArray) and leaf.format in (E4M3, E2M1)
    if isinstance(leaf, QArray) and numerics.integers(leaf) and row.path[-1] not in ("o_a", "kv_b"):
        return "int8"
    if numerics.native and codes and row.path[-1] != "o_a":  # whose weights are decoded first (spec V4 2.3)
        return "fp8"
    return "fp32" if numerics.dtype == "float32" else "bf16"


@lru_cache(maxsize=256)
def _matrices(placement: Placement, slots: int, tokens: int) -> tuple[dict[tuple[str, str], float], dict[str, float]]:
    """(operations by module and element type, weight bytes by module) of one card's products with matrices."""
    c, n = placement.config, slots * tokens
    operations: dict[tuple[str, str], float] = {}
    reads: dict[str, float] = {}
    group = n * math.prod(placement.layout.rules.extents[axis] for axis in dispatch_axes(placement))
    ends = slots * gathered_slots(placement)
    # Where all experts are multiplied with all rows, how many a token has: "ragged" as StableHLO writes `ragged_dot`.
    every = {"dense": 1, "ragged": c.num_experts_per_tok}.get(placement.model.moe)
    for row, leaf in placement.leaves:
        nbytes, module = float(tree_bytes(leaf)), module_of(row)
        if row.storage == INTEGER or (row.path == ("embed",) and not c.tie_word_embeddings):  # looked up
            reads[module] = reads.get(module, 0.0) + nbytes * min(tokens * ends / leaf.shape[-2], 1.0)
            continue
        times: float = n
        if row.experts and every:
            times = every * expert_rows(placement, n)
        elif row.experts:
            share, here = chosen_share(row.experts, c.num_experts_per_tok, group), leaf.shape[-3]
            nbytes *= distinct_experts(here, row.experts // here, share) / here
            times = group * c.num_experts_per_tok / row.experts
        elif row.path in (("head",), ("embed",)):
            times = ends
        elif "head_streams" in row.path:
            times = slots
        elif row.path[-1] == "hidden_projection" and isinstance(c, V4Config):
            times = n * c.hc_mult  # of every stream
        reads[module] = reads.get(module, 0.0) + nbytes
        if row.storage != VECTOR and len(row.dims) == 2 and row.axes[0] != "ratio":
            key = module, _element(row, leaf, placement)
            operations[key] = operations.get(key, 0.0) + 2.0 * math.prod(leaf.shape) * times
    return operations, reads


def work(placement: Placement, slots: int, tokens: int, context: int) -> Work:
    """One card's share of a step of `tokens` new ones in each of its slots, which then hold `context`.

    Logits of the last token only. `kv_b` counts once per new token where attention is absorbed, and once per cached
    position where it is naive.
    """
    matrices, reads = _matrices(placement, slots, tokens)
    operations = dict(matrices)
    naive = _naive(placement, tokens, context)
    if naive:
        row, leaf = next((row, leaf) for row, leaf in placement.leaves if row.path[-1] == "kv_b")
        rows = [leaf for row, leaf in placement.leaves if row.path[-1] == "kv_b"]
        key = module_of(row), _element(row, leaf, placement)
        operations[key] += 2.0 * slots * (context - tokens) * sum(math.prod(leaf.shape) for leaf in rows)
    attention, cache_bytes = _attention(placement, slots, tokens, context, naive)
    element = "fp32" if placement.numerics.dtype == "float32" else "bf16"
    operations["attention over the context", element] = attention
    flops: dict[str, float] = {}
    parts: dict[str, float] = {}
    for (part, element), count in operations.items():
        flops[element] = flops.get(element, 0.0) + count
        parts[part] = parts.get(part, 0.0) + count
    return Work(flops, parts, sum(reads.values()), cache_bytes, dict(reads))


def _naive(placement: Placement, tokens: int, context: int) -> bool:
    c = placement.config
    if isinstance(c, V4Config | DenseConfig) or (c.indexer is not None and context > c.indexer.topk):
        return False
    return choose_form(tokens, c, placement.numerics) == "naive"


def _attention(placement: Placement, slots: int, tokens: int, context: int, naive: bool) -> tuple[float, float]:
    """(operations, bytes read) of scores and of values weighted by them, all layers of one card."""
    c, numerics = placement.config, placement.numerics
    heads = c.num_attention_heads // placement.ways("heads")
    first = context - tokens + 1
    if isinstance(c, V4Config):
        return _v4_attention(placement, c, slots, first, context, heads)
    layers = c.num_hidden_layers
    seen = capped_sum(first, context)
    row = row_format(c, numerics).nbytes
    if isinstance(c, DenseConfig):
        row //= placement.ways("kv_heads")
        return slots * layers * seen * 4.0 * heads * c.head_dim, float(slots * layers * context * row)
    width = c.qk_head_dim + c.v_head_dim if naive else c.latent_dim + c.kv_lora_rank
    per_key = 2.0 * heads * width
    if c.indexer is None or context <= c.indexer.topk:
        return slots * layers * seen * per_key, float(slots * layers * context * row)
    index = c.indexer
    chosen = capped_sum(first, context, cap=index.topk)
    operations = chosen * per_key + seen * 2.0 * index.heads * index.head_dim
    read = context * index_format(c, numerics).nbytes + min(context, tokens * index.topk) * row
    return slots * layers * operations, float(slots * layers * read)


def _v4_attention(
    placement: Placement, c: V4Config, slots: int, first: int, context: int, heads: int
) -> tuple[float, float]:
    numerics, tokens = placement.numerics, context - first + 1
    row, index = kv_format(c, numerics).nbytes, v4_index_format(c, numerics).nbytes
    operations, read = 0.0, 0.0
    for ratio in c.compress_ratios:
        keys = capped_sum(first, context, cap=c.sliding_window)
        rows = min(context, c.sliding_window + tokens)
        if ratio == CSA:
            entries, sparse = context // CSA, context // CSA > c.index_topk
            keys += capped_sum(first, context, CSA, c.index_topk)
            rows += min(entries, tokens * c.index_topk)
            if sparse:
                operations += capped_sum(first, context, CSA) * 2.0 * c.index_n_heads * c.index_head_dim
                read += entries * index
        elif ratio == HCA:
            keys += capped_sum(first, context, HCA)
            rows += context // HCA
        operations += keys * 4.0 * heads * c.head_dim
        read += rows * row
    return slots * operations, slots * read


# --- how long that takes ---------------------------------------------------------------------------------------------


def lacking(chip: Chip, placement: Placement) -> list[str]:
    """Names of the chip's figures without which nothing can be said."""
    needed = {_element(row, leaf, placement) for row, leaf in placement.leaves}
    found = ["memory_bandwidth"] if chip.memory_bandwidth is None else []
    found += [f"flops.{element}" for element in sorted(needed) if _rate(chip, element) is None]
    for exchange in collectives(placement, 1, 1):
        if seconds(exchange, placement, chip) is None:
            found.append("scale_up" if chip.scale_up is None else "scale_out")
            break
    return found


def _rate(chip: Chip, element: str) -> float | None:
    """Operations a second: bfloat16 at float16's rate where only that is known, FP8 and INT8 at theirs if need be."""
    floats = ("bf16", "fp16")
    for name in {"fp8": ("fp8", *floats), "int8": ("int8", *floats), "bf16": floats}.get(element, (element,)):
        if name in chip.flops:
            return chip.flops[name]
    return None


@lru_cache(maxsize=256)
def _links_time(placement: Placement, chip: Chip, slots: int, tokens: int) -> float:
    exchanges = [seconds(exchange, placement, chip) for exchange in collectives(placement, slots, tokens)]
    return sum(time for time in exchanges if time is not None)


def step_times(placement: Placement, chip: Chip, slots: int, tokens: int, context: int) -> Times:
    """One step of one card; the chip must lack nothing (`lacking`)."""
    done = work(placement, slots, tokens, context)
    compute = sum(operations / (_rate(chip, element) or math.nan) for element, operations in done.flops.items())
    memory = (done.weight_bytes + done.cache_bytes) / (chip.memory_bandwidth or math.nan)
    links = _links_time(placement, chip, slots, tokens)
    return Times(compute, memory, links, max(compute, memory) + links)


def decode_times(placement: Placement, chip: Chip, load: Load) -> Times:
    """A decode step with all slots full: one token each, TPOT."""
    return step_times(placement, chip, placement.slots(load.batch), 1, load.context)


def prefill_times(placement: Placement, chip: Chip, load: Load) -> Times:
    """All slots' prompts of `context` tokens, chunk after chunk: TTFT."""
    slots, total = placement.slots(load.batch), Times(0.0, 0.0, 0.0, 0.0)
    for at in range(0, load.context, load.chunk):
        tokens = min(load.chunk, load.context - at)
        total += step_times(placement, chip, slots, tokens, at + tokens)
    return total
