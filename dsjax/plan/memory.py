"""Bytes of one card by part.

Weights, scales, keys and indexer keys are those of the shapes that run: exact. Activations are the arrays that a step
holds at its widest point, and workspace what compilers, exchanges between cards and the runtime take beside them: both
are estimates by formula, and `reserve` is the user's.
"""

from __future__ import annotations

import dataclasses

from dsjax.cache.rows import ROW_BLOCK
from dsjax.config import DenseConfig, V3Config, V4Config
from dsjax.generate import CHUNK, bucket
from dsjax.layers.mla import choose_form
from dsjax.layers.query_blocks import GATHER_BYTES, QUERY_BLOCK
from dsjax.plan.placement import Placement
from dsjax.plan.traffic import dispatch, expert_rows, gathered_slots
from quant import QArray

RESERVE = 3_000_000_000
"""Bytes of a card that are left to drivers, runtime and fragmentation by default (spec V3 7 says 3 - 6 GB)."""

PARTS = ("weights", "scales", "kv", "indexer", "activations", "workspace")


@dataclasses.dataclass(frozen=True)
class Load:
    """What is asked of a plan.

    Attributes:
      context: positions of every sequence.
      batch: sequences at once.
      chunk: new tokens per sequence in one prefill step, at most.
    """

    context: int
    batch: int
    chunk: int = CHUNK

    @property
    def tokens(self) -> int:
        """New tokens of a prefill step, as compiled."""
        return bucket(min(self.context, self.chunk), self.chunk)


def memory(placement: Placement, load: Load, reserve: int = RESERVE) -> dict[str, int]:
    """Bytes of one card by part, see `PARTS`."""
    kv, index = placement.cache_bytes(load.batch, load.context)
    scales = placement.scale_bytes
    slots = placement.slots(load.batch)
    return {
        "weights": sum(placement.modules.values()) - scales,
        "scales": scales,
        "kv": kv,
        "indexer": index,
        "activations": activation_bytes(placement, slots, load.tokens),
        "workspace": workspace_bytes(placement, slots, load.tokens) + reserve,
    }


def activation_bytes(placement: Placement, slots: int, tokens: int) -> int:
    """Of a step of `tokens` new ones in each of a card's slots: what passes between layers, and the widest sub-layer.

    Counted as the layers are written: values in the activation dtype, what products give in float32, softmax over a
    block of keys. A sub-layer counts twice, for the copies that compilers make of what they turn over: of this and the
    workspace a step compiled by XLA:CPU takes a half to four fifths where tokens are many, less where they are few.
    Other compilers may take more: libtpu took twice as much for a decode step of V3 that was exported for eight ranks.
    """
    c, item = placement.config, 4 if placement.numerics.dtype == "float32" else 2
    n, d = slots * tokens, c.hidden_size
    between = 3 * n * d * item  # residual, what is to be added, normalised
    if isinstance(c, V4Config):
        between = n * d * ((2 * c.hc_mult + 2) * item + 2 * 4 * c.hc_mult)  # streams, mixed in float32; a site's input
    sums = 2 * 4 * n * d  # this card's part of a float32 sum, and the sum
    ends = 4 * slots * gathered_slots(placement) * (c.vocab_size // placement.ways("vocab"))
    widest = max(_attention_bytes(placement, slots, tokens, item), _ffn_bytes(placement, n, item), ends)
    return between + sums + 2 * widest


def _attention_bytes(placement: Placement, slots: int, tokens: int, item: int) -> int:
    c, n = placement.config, slots * tokens
    heads = c.num_attention_heads // placement.ways("heads")
    scores = 3 * 4 * slots * heads * min(tokens, QUERY_BLOCK) * ROW_BLOCK
    if isinstance(c, V4Config):
        # Queries as a product gives them, normalised and rotated; outputs.
        held = n * heads * c.head_dim * (3 * 4 + 3 * item)
        return held + scores + 2 * GATHER_BYTES + 8 * slots * heads * min(tokens, QUERY_BLOCK) * c.head_dim
    if isinstance(c, DenseConfig):
        return n * heads * c.head_dim * (2 * item + 2 * 4 + item) + scores
    queries = n * heads * c.qk_head_dim * (4 + 2 * item)
    if choose_form(tokens, c, placement.numerics) == "naive":
        keys = 2 * slots * ROW_BLOCK * heads * (c.qk_head_dim + c.v_head_dim) * item
        return queries + keys + n * heads * c.v_head_dim * (3 * 4 + item) + scores
    # Queries against latents and sums of latents, each as a product gives it and rounded; the sums a loop carries.
    latent = n * heads * (c.latent_dim * item + c.kv_lora_rank * (4 * 4 + 3 * item))
    gathered = GATHER_BYTES if c.indexer is not None else 0
    return queries + latent + n * heads * c.v_head_dim * item + scores + gathered


def _ffn_bytes(placement: Placement, n: int, item: int) -> int:
    c = placement.config
    width = 0
    if isinstance(c, DenseConfig) or (isinstance(c, V3Config) and c.first_k_dense_replace):
        width = c.intermediate_size // placement.ways("ffn")
    if isinstance(c, DenseConfig):
        return n * width * (2 * item + 4)
    shared = c.n_shared_experts * c.moe_intermediate_size // placement.ways("shared_ffn")
    rows = expert_rows(placement, n)
    # Scores of all experts, weighted sums of the chosen ones, one expert's gate and up.
    one = c.moe_intermediate_size // placement.ways("expert_ffn")
    routed = n * 3 * 4 * c.n_routed_experts + rows * 2 * 4 * c.hidden_size + n * one * (2 * item + 4)
    return max(n * width * (2 * item + 4), n * shared * (2 * item + 4) + routed)


def workspace_bytes(placement: Placement, slots: int, tokens: int) -> int:
    """Beside activations: the largest matrix, decoded for its product, and rows on their way to experts and back."""
    item = 4 if placement.numerics.dtype == "float32" else 2
    matrices = [
        leaf.shape[-2] * leaf.shape[-1] * item
        for row, leaf in placement.leaves
        if isinstance(leaf, QArray) and (row.path != ("embed",) or placement.config.tie_word_embeddings)
    ]
    decoded = max(matrices, default=0)  # a model held in float32 decodes none
    way = dispatch(placement, slots * tokens)
    return decoded + (0 if way is None else 2 * way.rows * (way.row_bytes + way.sum_bytes))
