"""DeepSeek-V2 and V3 (R1, V3.1, V3.2): dense layers, mixture-of-experts layers, and the draft module (MTP).

Layers run as one scan per kind over the layer *index*. Weight stacks are closed over and sliced at the point of use;
passed as scan inputs they would be copied a layer at a time. The cache rides in the carry, updated in place.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from dsjax.cache import Cache
from dsjax.cache.per_token import init_cache
from dsjax.config import V3Config
from dsjax.layers.attend import Call, new_call
from dsjax.layers.ffn import MoE, SwiGLU
from dsjax.layers.gate import moe_gate
from dsjax.layers.mla import Attention, mla_rope_table
from dsjax.layers.norm import add_norm, rms_norm
from dsjax.models import ends
from dsjax.numerics import Numerics
from dsjax.params import Tree
from quant.operator import enter_layer
from sharding import UNSPLIT, Rules

new_cache = init_cache


class Stack(nnx.Module):
    """Equal decoder layers, run as one scan. `offset` is the first layer's place in the cache."""

    def __init__(self, config: V3Config, numerics: Numerics, params: Tree, offset: int, rules: Rules = UNSPLIT) -> None:
        self.config = config
        self.numerics = numerics
        self.offset = offset
        self.input_norm = nnx.Param(params["input_norm"])
        self.post_norm = nnx.Param(params["post_norm"])
        self.attention = Attention(config, numerics, params["attention"], params.get("indexer"), rules)
        self.bias = nnx.Param(params["router"]["bias"]) if "bias" in params.get("router", {}) else None
        if "experts" in params:
            self.ffn: MoE | SwiGLU = MoE(config, numerics, params, rules)
        else:
            self.ffn = SwiGLU(numerics, params["ffn"], rules=rules)

    def __call__(
        self, residual: jax.Array, delta: jax.Array, cache: Cache, call: Call
    ) -> tuple[jax.Array, jax.Array, Cache]:
        """Runs all layers. The last sub-layer's output `delta` is still to be added to `residual` (both [B, T, D])."""
        eps, input_norm, post_norm = self.config.rms_norm_eps, self.input_norm[...], self.post_norm[...]

        def layer(carry: tuple[jax.Array, jax.Array, Cache], i: jax.Array) -> tuple[Any, None]:
            residual, delta, cache = carry
            enter_layer(i + self.offset)
            with jax.named_scope("norm"):
                residual, x = add_norm(residual, delta, input_norm[i], eps, self.numerics)
            delta, cache = self.attention(x, cache, (i, i + self.offset), call)
            with jax.named_scope("norm"):
                residual, x = add_norm(residual, delta, post_norm[i], eps, self.numerics)
            if isinstance(self.ffn, MoE):
                bias = None if self.bias is None else self.bias[...][i]
                delta = self.ffn(x, call.valid, i, partial(moe_gate, bias=bias, config=self.config))
            else:
                with jax.named_scope("dense"):
                    delta = self.ffn(x, i)
            return (residual, delta, cache), None

        carry, _ = lax.scan(layer, (residual, delta, cache), jnp.arange(input_norm.shape[0]))
        return carry


class V3(nnx.Module):
    """The main model, bound to its parameters."""

    def __init__(self, config: V3Config, numerics: Numerics, params: Tree, rules: Rules = UNSPLIT) -> None:
        self.config = config
        self.numerics = numerics
        self.rules = rules
        self.embed = nnx.Param(params["embed"])
        self.norm = nnx.Param(params["norm"])
        self.head = nnx.Param(params["head"])
        dense = config.first_k_dense_replace
        self.dense = Stack(config, numerics, params["dense"], 0, rules) if "dense" in params else None
        self.moe = Stack(config, numerics, params["moe"], dense, rules) if "moe" in params else None

    def __call__(
        self, cache: Cache, tokens: jax.Array, n_new: jax.Array, want: str
    ) -> tuple[jax.Array | None, jax.Array, Cache]:
        call = new_call(cache, tokens.shape[1], n_new, partial(mla_rope_table, self.config))
        residual = ends.embed(self.embed[...], tokens, self.numerics, self.rules)
        delta = jnp.zeros_like(residual)
        for stack in (self.dense, self.moe):
            if stack is not None:
                residual, delta, cache = stack(residual, delta, cache, call)
        enter_layer(-1)
        _, hidden = add_norm(residual, delta, self.norm[...], self.config.rms_norm_eps, self.numerics)
        logits = ends.logits(hidden, self.head[...], n_new, want, self.numerics, self.rules)
        return logits, hidden, dataclasses.replace(cache, length=cache.length + n_new)


class MTP(nnx.Module):
    """The multi-token-prediction module: one decoder layer on [next token's embedding ; main model's hidden]."""

    def __init__(self, config: V3Config, numerics: Numerics, params: Tree, rules: Rules = UNSPLIT) -> None:
        self.config = config
        self.numerics = numerics
        self.rules = rules
        self.embed = nnx.Param(params["embed"])
        self.head = nnx.Param(params["head"])
        mtp = params["mtp"]
        self.embedding_norm = nnx.Param(mtp["embedding_norm"])
        self.hidden_norm = nnx.Param(mtp["hidden_norm"])
        self.projection = nnx.Param(mtp["projection"])
        self.norm = nnx.Param(mtp["norm"])
        self.stack = Stack(config, numerics, mtp, 0, rules)

    def __call__(
        self, cache: Cache, hidden: jax.Array, tokens: jax.Array, n_new: jax.Array, want: str
    ) -> tuple[jax.Array | None, jax.Array, Cache]:
        eps, numerics = self.config.rms_norm_eps, self.numerics
        call = new_call(cache, tokens.shape[1], n_new, partial(mla_rope_table, self.config))
        embedding = ends.embed(self.embed[...], tokens, numerics, self.rules)
        # Embedding first: the released weights expect it so, against the paper's equation (spec V3 2.7).
        joined = jnp.concatenate(
            [
                numerics.round(rms_norm(embedding, self.embedding_norm[...][0], eps)),
                numerics.round(rms_norm(hidden, self.hidden_norm[...][0], eps)),
            ],
            axis=-1,
        )
        residual = numerics.linear(joined, self.projection[...], (0,))
        residual, delta, cache = self.stack(residual, jnp.zeros_like(residual), cache, call)
        enter_layer(-1)
        _, out = add_norm(residual, delta, self.norm[...][0], eps, numerics)
        logits = ends.logits(out, self.head[...], n_new, want, self.numerics, self.rules)
        return logits, out, dataclasses.replace(cache, length=cache.length + n_new)


def step(
    config: V3Config,
    numerics: Numerics,
    params: Tree,
    cache: Cache,
    tokens: jax.Array,
    n_new: jax.Array,
    want: str = "last",
    rules: Rules = UNSPLIT,
) -> tuple[jax.Array | None, jax.Array, Cache]:
    """Takes up to T new tokens for each of B slots: prefill, chunked prefill, decode and verification alike.

    Positions come from `cache.length`. A slot with `n_new == 0` keeps every bit of its state. The caller sees to it
    that length + n_new stays within the capacity and ids within the vocabulary; rows beyond are dropped.

    Args:
      config, numerics, want: static. `want`: logits of "none", of the "last" new token, or of "all".
      params: as `params.abstract_params` lays them out.
      cache: to be donated.
      tokens: int32 [B, T].
      n_new: int32 [B], how many of the T are real.
      rules: of a manual body, which sees its device's part of everything and names its collectives; else nothing is
        split, or a partitioner splits it.

    Returns:
      logits: float32 [B, V] ("last"), [B, T, V] ("all"), or None. In a manual body this device's part of the
        vocabulary; of all slots that devices with other parts of the vocabulary have.
      hidden: [B, T, D] after the final norm, which the MTP module takes.
      cache: with the new tokens.
    """
    return V3(config, numerics, params, rules)(cache, tokens, n_new, want)


def draft(
    config: V3Config,
    numerics: Numerics,
    params: Tree,
    cache: Cache,
    hidden: jax.Array,
    tokens: jax.Array,
    n_new: jax.Array,
    want: str = "last",
    rules: Rules = UNSPLIT,
) -> tuple[jax.Array | None, jax.Array, Cache]:
    """The MTP module: from hidden at i and the token at i + 1, logits for the token at i + 2 (spec V3 2.7).

    Args:
      params: with the "mtp" branch.
      cache: the module's own, `new_cache(..., draft=True)`.
      hidden: [B, T, D] from `step`, or from `draft` itself for a further token.
      tokens: int32 [B, T], each the token after its hidden.
      n_new, want: as in `step`.

    Returns:
      logits, hidden (after the module's norm) and cache, as `step`.
    """
    return MTP(config, numerics, params, rules)(cache, hidden, tokens, n_new, want)
