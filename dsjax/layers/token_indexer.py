"""V3.2's indexer beside MLA: which tokens a query attends to (spec V3 2.8)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from dsjax.cache import Cache
from dsjax.cache.per_token import index_format
from dsjax.cache.rows import write_rows
from dsjax.config import V3Config
from dsjax.layers.attend import Call
from dsjax.layers.indexer import lightning_indexer
from dsjax.layers.norm import layer_norm
from dsjax.layers.rope import rope_halves
from dsjax.numerics import Numerics
from dsjax.params import Tree
from quant import block_scaled_dot, fake_act_quant, hadamard

_NORM_EPS = 1e-6  # of the key's LayerNorm; in no config


class TokenIndexer(nnx.Module):
    """Leaves, stacked over layers: q_b [IX, Q], k [X, D], k_norm and k_bias [X], weights [I, D]."""

    def __init__(self, config: V3Config, numerics: Numerics, params: Tree) -> None:
        assert config.indexer is not None
        self.sizes = config.indexer
        self.numerics = numerics
        self.row = index_format(config, numerics)
        self.q_b = nnx.Param(params["q_b"])
        self.k = nnx.Param(params["k"])
        self.k_norm = nnx.Param(params["k_norm"])
        self.k_bias = nnx.Param(params["k_bias"])
        self.weights = nnx.Param(params["weights"])

    def _turned(self, x: Float[Array, "B T *H X"], call: Call) -> Float[Array, "B T *H X"]:
        """With RoPE on the first channels, by halves; in native with the Hadamard rotation, which spreads outliers
        before they share a scale and in plain would change no score."""
        x = self.numerics.round(rope_halves(x, call.table))
        return self.numerics.round(hadamard(x)) if self.numerics.native else x

    @jax.named_scope("indexer")
    def remember(self, x: Float[Array, "B T D"], cache: Cache, layer: tuple[Any, Any], call: Call) -> Cache:
        """The cache with the new tokens' keys.

        Args:
          x: [B, T, D], the normalised input of the attention.
          layer: (index into the weight stack, index into the cache).
        """
        index, place = layer
        key = self.numerics.linear(x, self.k[...], (index,))
        key = self.numerics.round(layer_norm(key, self.k_norm[...][index], self.k_bias[...][index], _NORM_EPS))
        new = self.row.encode(self._turned(key, call))
        return dataclasses.replace(cache, index=write_rows(cache.index, place, call.positions, call.valid, new))

    def queries(
        self, x: Float[Array, "B T D"], low: Float[Array, "B T Q"], layer: Any, call: Call
    ) -> tuple[Float[Array, "B T I X"], Float32[Array, "B T I"]]:
        """Queries, in native the values of their E4M3 codes, and float32 head weights, which may be negative."""
        q = self.numerics.linear(low, self.q_b[...], (layer,))
        q = self._turned(q.reshape(*x.shape[:2], self.sizes.heads, self.sizes.head_dim), call)
        if self.numerics.native:
            # Scales are powers of two: bfloat16 holds the values exactly, and it is the same to scale before the sum.
            q = fake_act_quant(q, pow2=True, group=self.sizes.head_dim).astype(jnp.bfloat16)
        return q, block_scaled_dot(x, self.weights[...], (layer,), self.numerics.form) * self.sizes.scale

    @jax.named_scope("indexer")
    def choose(
        self, x: Float[Array, "B T D"], low: Float[Array, "B T Q"], cache: Cache, layer: tuple[Any, Any], call: Call
    ) -> Int32[Array, "B T k"]:
        """Positions that each query attends to, -1 for none.

        Args:
          x: [B, T, D], the normalised input of the attention; low: [B, T, Q], its compressed queries.
          cache: with the new tokens' keys.
          layer: (index into the weight stack, index into the cache).
        """
        index, place = layer
        q, weights = self.queries(x, low, index, call)
        visible = jnp.minimum(call.positions + 1, call.end[:, None])
        return lightning_indexer(q, weights, cache.index, place, visible, self.sizes.topk, self.row, rounded=False)
