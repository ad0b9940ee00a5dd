"""What cards send each other in one step: every collective of the step's body, with the bytes it is made for.

The list follows the layers as they are written: a sum after each product whose inner width is split (float32), the
embedding's rows and the last hidden vectors where the vocabulary is split, and tokens on their way to routed experts
and back where cards that share the experts have other tokens. Ids, counts, drawn candidates and, with INT8 activations,
the maxima of split rows are left out: they are few.
"""

from __future__ import annotations

import dataclasses
import math
from itertools import product

import jax

from dsjax.config import DenseConfig, V3Config, V4Config
from dsjax.models.ends import vocabulary_axes
from dsjax.params import tree_bytes
from dsjax.plan.chips import Chip
from dsjax.plan.placement import Placement
from sharding import Axes, choose_dispatch, dispatch_bytes
from sharding.dispatch_plan import Traffic, arrivals, capacity


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of exchange in a step.

    Attributes:
      what: which sums or rows.
      kind: "all-reduce", "all-gather", "reduce-scatter" or "all-to-all".
      axes: mesh axes of the cards that take part.
      cards: how many those are.
      nbytes: of the whole array, as one card has it before (all-reduce, reduce-scatter) or after (all-gather), or of
        what one card sends to all destinations (all-to-all, itself left out).
      times: in a step.
    """

    what: str
    kind: str
    axes: Axes
    cards: int
    nbytes: float
    times: int

    @property
    def sent(self) -> float:
        """Bytes that one card sends in a step, under the ring algorithm."""
        share = (self.cards - 1) / self.cards
        return self.times * self.nbytes * {"all-reduce": 2 * share, "all-to-all": 1.0}.get(self.kind, share)


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """Tokens on their way to experts on other cards and back, in one layer.

    Attributes:
      axes: mesh axes of the cards that take part.
      how: one of `sharding.DISPATCHES`.
      rows: that a card computes on, in one round; under uniform routing one round is enough.
      row_bytes: of one of them, with its ids and weights.
      sum_bytes: of its partial sum, as it travels back.
      sent: bytes that a card sends to others.
    """

    axes: Axes
    how: str
    rows: int
    row_bytes: int
    sum_bytes: int
    sent: Traffic


def dispatch_axes(placement: Placement) -> Axes:
    """Mesh axes along which tokens travel to their experts: those that split both experts and slots."""
    rules = placement.layout.rules
    return tuple(axis for axis in rules.axes("experts") if axis in rules.axes("slots"))


def dispatch(placement: Placement, tokens: int) -> Dispatch | None:
    """How so many tokens of a card get to their experts; None where every card that has experts has all tokens.

    Args:
      tokens: new ones of all of a card's slots.
    """
    axes, c, numerics = dispatch_axes(placement), placement.config, placement.numerics
    if not axes or isinstance(c, DenseConfig):
        return None
    ranks = math.prod(placement.layout.rules.extents[axis] for axis in axes)
    shape = c.num_experts_per_tok, c.n_routed_experts, ranks
    how = placement.layout.rules.dispatch
    how = choose_dispatch(tokens, *shape) if how == "auto" else how
    if how == "ragged":
        rows = arrivals(tokens, *shape)
    else:
        rows = ranks * (tokens if how == "replicated" else capacity(tokens, *shape))
    gate = next(leaf for row, leaf in placement.leaves if row.experts and row.path[-1] == "gate")
    x = jax.ShapeDtypeStruct((1, c.hidden_size), numerics.dtype)
    row_bytes = tree_bytes(jax.eval_shape(numerics.quantised, x, gate))
    sum_bytes = c.hidden_size * (2 if numerics.native else 4)
    sent = dispatch_bytes(how, tokens, *shape, row_bytes=row_bytes, sum_bytes=sum_bytes)
    return Dispatch(axes, how, rows, row_bytes + 8 * c.num_experts_per_tok, sum_bytes, sent)


def expert_rows(placement: Placement, tokens: int) -> int:
    """Rows of activations that a card has for its experts, of so many tokens; places that stay empty count."""
    way = dispatch(placement, tokens)
    return tokens if way is None else way.rows


def gathered_slots(placement: Placement) -> int:
    """How many cards' slots one card makes logits for, its part of the vocabulary."""
    rules = placement.layout.rules
    return math.prod(rules.extents[axis] for axis in vocabulary_axes(rules)[0])


def collectives(placement: Placement, slots: int, tokens: int) -> list[Collective]:
    """All of a step of `tokens` new ones in each of a card's slots, logits of the last."""
    c, rules, numerics = placement.config, placement.layout.rules, placement.numerics
    item = 4 if numerics.dtype == "float32" else 2
    n, d, layers = slots * tokens, c.hidden_size, c.num_hidden_layers
    found: list[Collective] = []

    def add(what: str, kind: str, axes: Axes, nbytes: float, times: int) -> None:
        cards = math.prod(rules.extents[axis] for axis in axes)
        if cards > 1 and times:
            found.append(Collective(what, kind, axes, cards, nbytes, times))

    differ, same = vocabulary_axes(rules)
    gathered = gathered_slots(placement)
    add("embedding", "all-reduce", same, n * gathered * d * item, 1)
    add("embedding", "reduce-scatter", differ, n * gathered * d * item, 1)
    add("last hidden", "all-gather", differ, slots * gathered * d * item, 1)
    if isinstance(c, V4Config):
        here = rules.axes("o_groups", "group_heads")
        apart = tuple(axis for axis in rules.axes("heads") if axis not in here)
        heads = c.num_attention_heads // rules.ways("o_groups", "group_heads")
        add("heads of a group", "all-gather", apart, n * heads * c.head_dim * item, layers)
        low = c.o_groups // rules.ways("o_groups") * c.o_lora_rank
        add("parts of a group", "reduce-scatter", rules.axes("group_heads"), 4 * n * low, layers)
    add(
        "attention output", "all-reduce", rules.axes("o_low" if isinstance(c, V4Config) else "heads"), 4 * n * d, layers
    )
    if isinstance(c, DenseConfig):
        add("dense layers", "all-reduce", rules.axes("ffn"), 4 * n * d, layers)
        return found
    dense = c.first_k_dense_replace if isinstance(c, V3Config) else 0
    add("dense layers", "all-reduce", rules.axes("ffn"), 4 * n * d, dense)
    sparse = layers - dense
    routed = rules.axes("routed")
    if (way := dispatch(placement, n)) is not None:
        gathers = way.how == "replicated"
        out = way.rows * way.row_bytes if gathers else way.sent.out
        add("tokens to experts", "all-gather" if gathers else "all-to-all", way.axes, out, sparse)
        if gathers and way.sum_bytes == 4 * d:
            add("tokens back", "reduce-scatter", way.axes, way.rows * way.sum_bytes, sparse)
        else:  # in bfloat16 every card adds up itself, in float32
            add("tokens back", "all-to-all", way.axes, way.sent.back, sparse)
    together = not numerics.native and routed == rules.axes("shared_ffn")
    add("routed experts", "all-reduce", routed, 4 * n * d, sparse)
    if not together:
        add("shared experts", "all-reduce", rules.axes("shared_ffn"), 4 * n * d, sparse)
    return found


def hosts_of(placement: Placement, axes: Axes, domain: int) -> tuple[int, int]:
    """(cards of one domain, domains) that a collective along `axes` joins, cards numbered as the mesh lays them."""
    extents = placement.layout.rules.extents
    stride, strides = 1, {}
    for axis in reversed(list(extents)):
        strides[axis] = stride
        stride *= extents[axis]
    numbers = [
        sum(at * strides[axis] for at, axis in zip(place, axes, strict=True))
        for place in product(*(range(extents[axis]) for axis in axes))
    ]
    inside = sum(number < domain for number in numbers)
    return inside, -(-len(numbers) // inside)


def seconds(collective: Collective, placement: Placement, chip: Chip) -> float | None:
    """Time of one kind of exchange in a step; None where the chip's figures lack a link that it needs.

    Inside a domain the ring's bytes over the scale-up links. Across domains by levels: a sum is first made inside, so
    that only a part of it crosses, over every card's own scale-out link.
    """
    if chip.scale_up is None:
        return None
    inside, outside = hosts_of(placement, collective.axes, chip.scale_up.cards or 1)
    if outside > 1 and chip.scale_out is None:
        return None
    up = chip.scale_up
    factor = {"all-reduce": 2.0}.get(collective.kind, 1.0)
    if collective.kind == "all-to-all":
        others = collective.cards - 1
        within = collective.nbytes * (inside - 1) / others
        across = collective.nbytes * (collective.cards - inside) / others
    elif collective.kind == "all-gather":  # first across, then inside
        within = collective.nbytes * (inside - 1) / inside
        across = collective.nbytes / inside * (outside - 1) / outside
    else:
        within = factor * collective.nbytes * (inside - 1) / inside
        across = factor * collective.nbytes / inside * (outside - 1) / outside
    time = within / up.bandwidth + (up.latency if inside > 1 else 0.0)
    if outside > 1 and chip.scale_out is not None:
        time += across / chip.scale_out.bandwidth + chip.scale_out.latency
    return collective.times * time
