"""The R1 distills, Qwen2 and Llama: equal decoder layers, run as one scan over the layer *index*.

Weight stacks are closed over and sliced at the point of use, the cache rides in the carry, updated in place.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from dsjax.cache import Cache
from dsjax.cache.per_token import init_cache
from dsjax.config import DenseConfig
from dsjax.layers.attend import new_call
from dsjax.layers.ffn import SwiGLU
from dsjax.layers.gqa import GroupedQueryAttention
from dsjax.layers.norm import add_norm
from dsjax.layers.rope import llama3_frequencies, rope_table
from dsjax.models import ends
from dsjax.numerics import Numerics
from dsjax.params import Tree
from quant.operator import enter_layer
from sharding import UNSPLIT, Rules

new_cache = init_cache


class Dense(nnx.Module):
    """The model, bound to its parameters."""

    def __init__(self, config: DenseConfig, numerics: Numerics, params: Tree, rules: Rules = UNSPLIT) -> None:
        self.config = config
        self.numerics = numerics
        self.rules = rules
        layers = params["layers"]
        self.embed = nnx.Param(params["embed"])
        self.input_norm = nnx.Param(layers["input_norm"])
        self.attention = GroupedQueryAttention(config, numerics, layers["attention"], rules)
        self.post_norm = nnx.Param(layers["post_norm"])
        self.ffn = SwiGLU(numerics, layers["ffn"], rules=rules)
        self.norm = nnx.Param(params["norm"])
        self.head = nnx.Param(params["embed" if config.tie_word_embeddings else "head"])

    def __call__(
        self, cache: Cache, tokens: jax.Array, n_new: jax.Array, want: str
    ) -> tuple[jax.Array | None, jax.Array, Cache]:
        config, numerics, eps = self.config, self.numerics, self.config.rms_norm_eps
        frequencies = llama3_frequencies(config.head_dim, config.rope_theta, config.llama3)
        call = new_call(cache, tokens.shape[1], n_new, lambda positions: rope_table(frequencies, positions))
        residual = ends.embed(self.embed[...], tokens, numerics, self.rules)

        def layer(carry: tuple[jax.Array, jax.Array, Cache], i: jax.Array) -> tuple[Any, None]:
            residual, delta, cache = carry
            enter_layer(i)
            with jax.named_scope("norm"):
                residual, x = add_norm(residual, delta, self.input_norm[...][i], eps, numerics)
            delta, cache = self.attention(x, cache, i, call)
            with jax.named_scope("norm"):
                residual, x = add_norm(residual, delta, self.post_norm[...][i], eps, numerics)
            with jax.named_scope("dense"):
                delta = self.ffn(x, i)
            return (residual, delta, cache), None

        carry = residual, jnp.zeros_like(residual), cache
        (residual, delta, cache), _ = lax.scan(layer, carry, jnp.arange(config.num_hidden_layers))
        enter_layer(-1)
        _, hidden = add_norm(residual, delta, self.norm[...], eps, numerics)
        logits = ends.logits(hidden, self.head[...], n_new, want, numerics, self.rules)
        return logits, hidden, dataclasses.replace(cache, length=cache.length + n_new)


def step(
    config: DenseConfig,
    numerics: Numerics,
    params: Tree,
    cache: Cache,
    tokens: jax.Array,
    n_new: jax.Array,
    want: str = "last",
    rules: Rules = UNSPLIT,
) -> tuple[jax.Array | None, jax.Array, Cache]:
    """Takes up to T new tokens for each of B slots; everything as in `models.v3.step`."""
    return Dense(config, numerics, params, rules)(cache, tokens, n_new, want)


def draft(config: DenseConfig, *_: Any, **__: Any) -> NoReturn:
    """These models have no draft module."""
    raise NotImplementedError(f"{config.model_type} has no draft module")
