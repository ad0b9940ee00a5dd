"""Attention with grouped queries: a few key-value heads, each shared by several query heads (spec V3 2.9)."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsjax.cache import Cache
from dsjax.cache.per_token import row_format
from dsjax.cache.rows import Rows, read_rows, row_block, write_rows
from dsjax.config import DenseConfig
from dsjax.layers.attend import Call, attend, einsum, slice_queries
from dsjax.layers.rope import rope_halves
from dsjax.numerics import Numerics
from dsjax.params import Tree
from quant.operator import operator
from sharding import UNSPLIT, Rules


@operator("gqa")
def gqa(
    q: Float[Array, "B T P G U"], rows: Rows, layer: Any, call: Call, config: DenseConfig, numerics: Numerics
) -> Float[Array, "B T H U"]:
    """Attention on all cached keys and values (spec V3 2.9).

    Args:
      q: [B, T, P, G, U], rotated: G query heads of each of P key-value heads.
      rows: the cache's, the new ones already written.
      layer: index into them.

    Returns:
      [B, T, P G, U] in the activation dtype.
    """
    b, _, heads, group, width = q.shape
    row, size = row_format(config, numerics), row_block(rows.shape[2])

    def load(j: Any) -> jax.Array:
        return row.decode(read_rows(rows, layer, j, size, call.end)).reshape(b, size, heads, 2 * width)

    def score(keys: jax.Array, first: Any, size: int) -> jax.Array:
        s = einsum("btpgu,bspu->bpgts", slice_queries(q, first, size), keys[..., :width]) * config.softmax_scale
        return s.reshape(b, -1, *s.shape[3:])

    def value(p: jax.Array, keys: jax.Array) -> jax.Array:
        grouped = p.reshape(b, heads, -1, *p.shape[2:])
        out = einsum("bpgts,bspu->bpgtu", grouped, keys[..., width:])
        return out.reshape(b, -1, *out.shape[3:])

    return numerics.round(attend(load, score, value, call, size, heads * group, width, numerics))


class GroupedQueryAttention(nnx.Module):
    """Leaves, stacked over layers: q [HU, D], k and v [PU, D], o [D, HU]; biases q_bias, k_bias, v_bias if it has.

    A cached row holds of each of the P heads its rotated key, then its value; so it is cut where heads are. With more
    devices than key-value heads, neighbours have the same one.
    """

    def __init__(self, config: DenseConfig, numerics: Numerics, params: Tree, rules: Rules = UNSPLIT) -> None:
        self.config = config
        self.numerics = numerics
        self.rules = rules
        self.q = nnx.Param(params["q"])
        self.k = nnx.Param(params["k"])
        self.v = nnx.Param(params["v"])
        self.o = nnx.Param(params["o"])
        self.biases = nnx.data({name: params[f"{name}_bias"] for name in "qkv" if f"{name}_bias" in params})

    def _project(self, x: jax.Array, name: str, layer: Any) -> jax.Array:
        """[B, T, D] -> [B, T, heads, U], with its bias, rounded once."""
        y = self.numerics.dot(x, getattr(self, name)[...], (layer,))
        if name in self.biases:
            y = y + self.biases[name][layer]
        return self.numerics.round(y).reshape(*x.shape[:2], -1, self.config.head_dim)

    def __call__(
        self, x: Float[Array, "B T D"], cache: Cache, layer: Any, call: Call
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Writes the new rows, then attends.

        Args:
          x: [B, T, D].
          cache: of all layers.
          layer: index into weights and cache.

        Returns:
          [B, T, D], and the cache with the new rows; its length is the caller's to advance.
        """
        config, numerics = self.config, self.numerics
        b, t = x.shape[:2]
        width = config.head_dim
        heads = self.k[...].shape[-2] // width  # of this device
        row = row_format(config, numerics)
        with jax.named_scope("queries"):
            q = numerics.round(rope_halves(self._project(x, "q", layer), call.table))
            q = q.reshape(b, t, heads, -1, width)
        with jax.named_scope("keys"):
            k = numerics.round(rope_halves(self._project(x, "k", layer), call.table))
            new = jnp.concatenate([k, self._project(x, "v", layer)], axis=-1).reshape(b, t, -1)
            rows = write_rows(cache.rows, layer, call.positions, call.valid, row.encode(new))

        with jax.named_scope("attend"):
            out = gqa(q, rows, layer, call, config, numerics)
        with jax.named_scope("output"):
            total, largest = partial(self.rules.sum, "heads"), partial(self.rules.largest, "heads")
            out = numerics.linear(out.reshape(b, t, -1), self.o[...], (layer,), total, largest)
        return out, dataclasses.replace(cache, rows=rows)
