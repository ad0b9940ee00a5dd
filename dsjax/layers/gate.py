"""Which experts a token goes to, and with what weight."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from dsjax.config import V3Config, V4Config
from dsjax.layers.top_k import top_k
from quant.operator import operator


@operator("sqrtsoftplus_gate")
def sqrtsoftplus_gate(
    scores: Float32[Array, "T E"],
    bias: Float32[Array, " E"] | None,
    choices: Int32[Array, "T k"] | None,
    config: V4Config,
) -> tuple[Int32[Array, "T k"], Float32[Array, "T k"]]:
    """V4's routing in float32 (spec V4 2.7): no groups; weights are shares of sqrt(softplus(score)).

    Args:
      scores: float32 [T, E], router logits.
      bias: float32 [E], added for the choice only; None where experts are chosen by token id.
      choices: int32 [T, k], the experts chosen by token id; None where scores choose.

    Returns:
      choices int32 [T, k] and weights float32 [T, k].
    """
    g = jnp.sqrt(jax.nn.softplus(scores.astype(jnp.float32)))
    if choices is None:
        assert bias is not None
        choices = top_k(g + bias, config.num_experts_per_tok)[1]
    weights = jnp.take_along_axis(g, choices, axis=-1)
    return choices, weights / weights.sum(axis=-1, keepdims=True) * config.routed_scaling_factor


@operator("moe_gate")
def moe_gate(
    scores: Float32[Array, "T E"], bias: Float32[Array, " E"] | None, config: V3Config
) -> tuple[Int32[Array, "T k"], Float32[Array, "T k"]]:
    """Group-limited top-k routing in float32 (spec V3 2.6).

    "noaux_tc" (V3) adds a bias for the choice only and ranks groups by the sum of their two best experts;
    "group_limited_greedy" (V2) ranks groups by their best expert; "greedy" (V2-Lite) has no groups. Dropped groups
    are masked with -inf: a kept group's biased score may be negative.

    Args:
      scores: float32 [T, E], router logits.
      bias: float32 [E] for noaux_tc, else None.

    Returns:
      choices int32 [T, k] and weights float32 [T, k]; the weights come from the scores without the bias.
    """
    score = jax.nn.sigmoid if config.scoring_func == "sigmoid" else jax.nn.softmax
    probabilities = score(scores.astype(jnp.float32))
    ranking = probabilities if bias is None else probabilities + bias
    if config.topk_method != "greedy" and config.n_group > 1:
        groups = ranking.reshape(-1, config.n_group, config.n_routed_experts // config.n_group)
        best = 2 if config.topk_method == "noaux_tc" else 1
        group_score = top_k(groups, best)[0].sum(axis=-1)
        kept = top_k(group_score, config.topk_group)[1]
        mask = jax.nn.one_hot(kept, config.n_group, dtype=jnp.bool_).any(axis=1)
        ranking = jnp.where(mask[:, :, None], groups, -jnp.inf).reshape(ranking.shape)
    choices = top_k(ranking, config.num_experts_per_tok)[1]
    weights = jnp.take_along_axis(probabilities, choices, axis=-1)
    if config.norm_topk_prob:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return choices, weights * config.routed_scaling_factor
