"""DeepSeek-V4 (Flash, Pro): streams instead of a residual, three kinds of attention, and the draft module.

Layers differ in how they compress (ratio 0, 4, 128) and how they choose experts (by token id, by score). Their schedule
is a prefix, a period that repeats, and a rest; periods run as one scan over the period's *number*. Weight stacks are
closed over and sliced at the point of use, the cache rides in the carry, updated in place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from dsjax.cache.v4 import V4Cache, init_cache
from dsjax.config import V4Config
from dsjax.config.v4 import CSA, HCA, WINDOW
from dsjax.layers.compressor import entry_numbers
from dsjax.layers.ffn import MoE
from dsjax.layers.gate import sqrtsoftplus_gate
from dsjax.layers.norm import rms_norm
from dsjax.layers.rope import rope_frequencies, rope_table
from dsjax.layers.sparse_attention import Call, SparseAttention
from dsjax.layers.streams import hyper_connection_head, hyper_connection_post, hyper_connection_pre
from dsjax.models import ends
from dsjax.models.schedule import find_schedule
from dsjax.numerics import Numerics
from dsjax.params import Tree
from quant.operator import enter_layer
from sharding import UNSPLIT, Rules

new_cache = init_cache

Carry = tuple[jax.Array, V4Cache]
"""What passes from layer to layer: streams [B, T, n, D] and the cache."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """What tells layers of a schedule apart.

    Attributes:
      ratio: 0, 4 or 128.
      hashed: experts by token id.
    """

    ratio: int
    hashed: bool

    @property
    def compressor(self) -> str | None:
        """The stack with such a layer's compressor, if it has one."""
        return {WINDOW: None, CSA: "csa", HCA: "hca"}[self.ratio]

    @property
    def stacks(self) -> tuple[str, ...]:
        """The parameter stacks that such a layer has a part in, besides that of all layers."""
        gate = "hashed" if self.hashed else "scored"
        return (gate,) if self.compressor is None else (self.compressor, gate)


def layer_kinds(config: V4Config) -> tuple[Kind, ...]:
    """Of all main layers."""
    return tuple(Kind(ratio, i < config.num_hash_layers) for i, ratio in enumerate(config.compress_ratios))


def _call(config: V4Config, cache: V4Cache, tokens: jax.Array, n_new: jax.Array, ratios: Sequence[int]) -> Call:
    t = tokens.shape[1]
    offsets = jnp.arange(t, dtype=jnp.int32)
    positions = cache.length[:, None] + offsets
    channels = config.qk_rope_head_dim
    compress = rope_frequencies(channels, config.compress_rope_theta, config.yarn)
    return Call(
        positions=positions,
        valid=offsets < n_new[:, None],
        ids=tokens,
        main=rope_table(rope_frequencies(channels, config.rope_theta, None), positions),
        compress=rope_table(compress, positions),
        # An entry sits at the first token of its own window.
        entries={r: rope_table(compress, entry_numbers(cache.length, t, r) * r) for r in ratios if r},
    )


class Layers(nnx.Module):
    """Decoder layers, bound to their parameters.

    Args:
      params: stacks by name, as `params.v4.rows` lists them: "layers" of all, the others of those that have them.
      kinds: of the layers, in order.
    """

    def __init__(
        self, config: V4Config, numerics: Numerics, params: Tree, kinds: Sequence[Kind], rules: Rules = UNSPLIT
    ) -> None:
        self.config = config
        self.numerics = numerics
        self.rules = rules
        self.kinds = tuple(kinds)
        stacks = ("layers", "csa", "hca", "scored", "hashed")
        self.params = nnx.data({name: params[name] for name in stacks if name in params})

    def __call__(self, streams: jax.Array, cache: V4Cache, call: Call) -> tuple[jax.Array, V4Cache]:
        """[B, T, n, D] through all layers. The cache's length is the caller's to advance."""
        schedule = find_schedule(self.kinds)
        carry = (streams, cache)

        def run(carry: Carry, layers: range) -> Carry:
            for i in layers:
                carry = self._layer(carry, call, self.kinds[i], i, self._places(i))
            return carry

        def period(carry: Carry, number: jax.Array) -> tuple[Carry, None]:
            first = schedule.prefix
            for i in range(first, first + schedule.period):
                stride = self._places(i + schedule.period)
                places = {name: at + number * (stride[name] - at) for name, at in self._places(i).items()}
                carry = self._layer(carry, call, self.kinds[i], i + number * schedule.period, places)
            return carry, None

        carry = run(carry, range(schedule.prefix))
        if schedule.repeats:
            carry, _ = lax.scan(period, carry, jnp.arange(schedule.repeats))
        return run(carry, range(schedule.rest, len(self.kinds)))

    def _places(self, layer: int) -> dict[str, int]:
        """Where a layer stands in each stack that it has a part in."""
        before = [name for kind in self.kinds[:layer] for name in kind.stacks]
        return {name: before.count(name) for name in self.kinds[layer].stacks}

    def _layer(self, carry: Carry, call: Call, kind: Kind, layer: Any, places: dict[str, Any]) -> Carry:
        """One layer: attention and experts, each between a reading and a writing of the streams (spec V4 2.1)."""
        config, numerics = self.config, self.numerics
        params, index = self.params["layers"], (layer,)
        streams, cache = carry
        enter_layer(layer)

        def norm(x: jax.Array, gain: jax.Array) -> jax.Array:
            return numerics.round(rms_norm(x, gain[layer], config.rms_norm_eps))

        with jax.named_scope("streams"):
            u, post, comb = hyper_connection_pre(streams, params["attention_streams"], index, config, numerics)
            x = norm(u, params["input_norm"])
        attention = SparseAttention(
            config,
            numerics,
            params["attention"],
            self.params[kind.compressor] if kind.compressor else {},
            kind.ratio,
            layer,
            places[kind.compressor] if kind.compressor else None,
            self.rules,
        )
        out, cache = attention(x, cache, call)
        with jax.named_scope("streams"):
            streams = hyper_connection_post(out, streams, post, comb, numerics)
            u, post, comb = hyper_connection_pre(streams, params["ffn_streams"], index, config, numerics)
            x = norm(u, params["post_norm"])
        if kind.hashed:
            table, ids = self.params["hashed"]["table"], call.ids.reshape(-1)
            # Rows of the stack, not of a layer of it: XLA:TPU would fill rows of 6 up to 128, for the whole vocabulary.
            place = jnp.full_like(ids, places["hashed"])
            bias, choices = None, table.at[place, ids].get(mode="promise_in_bounds")
        else:
            bias, choices = self.params["scored"]["bias"][places["scored"]], None
        gate = partial(sqrtsoftplus_gate, bias=bias, choices=choices, config=config)
        out = MoE(config, numerics, params, self.rules)(x, call.valid, layer, gate)
        with jax.named_scope("streams"):
            return hyper_connection_post(out, streams, post, comb, numerics), cache


class V4(nnx.Module):
    """The main model, bound to its parameters."""

    def __init__(self, config: V4Config, numerics: Numerics, params: Tree, rules: Rules = UNSPLIT) -> None:
        self.config = config
        self.numerics = numerics
        self.rules = rules
        self.embed = nnx.Param(params["embed"])
        self.layers = Layers(config, numerics, params, layer_kinds(config), rules)
        self.head_streams = nnx.data(params["head_streams"])
        self.norm = nnx.Param(params["norm"])
        self.head = nnx.Param(params["head"])

    def __call__(
        self, cache: V4Cache, tokens: jax.Array, n_new: jax.Array, want: str
    ) -> tuple[jax.Array | None, jax.Array, V4Cache]:
        config, numerics = self.config, self.numerics
        call = _call(config, cache, tokens, n_new, sorted(set(config.compress_ratios)))
        x = ends.embed(self.embed[...], tokens, numerics, self.rules)
        streams = jnp.repeat(x[:, :, None], config.hc_mult, axis=2)
        streams, cache = self.layers(streams, cache, call)
        enter_layer(-1)

        def finish(streams: jax.Array) -> jax.Array:
            y = hyper_connection_head(streams, self.head_streams, (), config, numerics)
            return numerics.round(rms_norm(y, self.norm[...], config.rms_norm_eps))

        logits = ends.logits(streams, self.head[...], n_new, want, self.numerics, self.rules, finish)
        return logits, streams, dataclasses.replace(cache, length=cache.length + n_new)


class MTP(nnx.Module):
    """The draft module `mtp.0`: one window layer on the main model's streams and the next token's embedding."""

    def __init__(self, config: V4Config, numerics: Numerics, params: Tree, rules: Rules = UNSPLIT) -> None:
        self.config = config
        self.numerics = numerics
        self.rules = rules
        self.embed = nnx.Param(params["embed"])
        self.head = nnx.Param(params["head"])
        mtp = params["mtp"]
        self.params = nnx.data(mtp)
        stacks = {"layers": mtp, "scored": {"bias": mtp["bias"]}}
        self.layers = Layers(config, numerics, stacks, (Kind(WINDOW, False),), rules)

    def __call__(
        self, cache: V4Cache, hidden: jax.Array, tokens: jax.Array, n_new: jax.Array, want: str
    ) -> tuple[jax.Array | None, jax.Array, V4Cache]:
        config, numerics, params = self.config, self.numerics, self.params

        def norm(x: jax.Array, name: str) -> jax.Array:
            return numerics.round(rms_norm(x, params[name][0], config.rms_norm_eps))

        call = _call(config, cache, tokens, n_new, ())
        e = norm(ends.embed(self.embed[...], tokens, numerics, self.rules), "embedding_norm")
        e = numerics.linear(e, params["embedding_projection"], (0,))
        h = numerics.linear(norm(hidden, "hidden_norm"), params["hidden_projection"], (0,))
        streams = numerics.round(e[:, :, None].astype(jnp.float32) + h.astype(jnp.float32))
        streams, cache = self.layers(streams, cache, call)
        enter_layer(-1)

        def finish(streams: jax.Array) -> jax.Array:
            return norm(hyper_connection_head(streams, params["head_streams"], (0,), config, numerics), "norm")

        logits = ends.logits(streams, self.head[...], n_new, want, self.numerics, self.rules, finish)
        return logits, streams, dataclasses.replace(cache, length=cache.length + n_new)


def step(
    config: V4Config,
    numerics: Numerics,
    params: Tree,
    cache: V4Cache,
    tokens: jax.Array,
    n_new: jax.Array,
    want: str = "last",
    rules: Rules = UNSPLIT,
) -> tuple[jax.Array | None, jax.Array, V4Cache]:
    """Takes up to T new tokens for each of B slots: prefill, chunked prefill, decode and verification alike.

    Positions come from `cache.length`. A slot with `n_new == 0` keeps every bit of its state. The caller sees to it
    that length + n_new stays within the capacity and ids within the vocabulary; rows beyond are dropped.

    Args:
      config, numerics, want: static. `want`: logits of "none", of the "last" new token, or of "all".
      params: as `params.abstract_params` lays them out.
      cache: to be donated.
      tokens: int32 [B, T].
      n_new: int32 [B], how many of the T are real.
      rules: as in `models.v3.step`.

    Returns:
      logits: float32 [B, V] ("last"), [B, T, V] ("all"), or None.
      hidden: [B, T, n, D], the streams before the head, which the draft module takes.
      cache: with the new tokens.
    """
    return V4(config, numerics, params, rules)(cache, tokens, n_new, want)


def draft(
    config: V4Config,
    numerics: Numerics,
    params: Tree,
    cache: V4Cache,
    hidden: jax.Array,
    tokens: jax.Array,
    n_new: jax.Array,
    want: str = "last",
    rules: Rules = UNSPLIT,
) -> tuple[jax.Array | None, jax.Array, V4Cache]:
    """The draft module: from the streams at i and the token at i + 1, logits for the token at i + 2 (spec V4 2.9).

    Args:
      params: with the "mtp" branch.
      cache: the module's own, `new_cache(..., draft=True)`.
      hidden: [B, T, n, D] from `step`, or from `draft` itself for a further token.
      tokens: int32 [B, T], each the token after its hidden.
      n_new, want: as in `step`.

    Returns:
      logits, the module's own streams, and cache, as `step`.
    """
    return MTP(config, numerics, params, rules)(cache, hidden, tokens, n_new, want)
