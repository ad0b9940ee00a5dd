"""A model's step as one rank calls it: ids and counts are whole on every device, all else is the rank's own part."""

from __future__ import annotations

from typing import Any

import jax

from dsjax.config import Config
from dsjax.models import family
from dsjax.numerics import Numerics
from dsjax.params import Tree
from sharding import Rules


def rank_step(
    config: Config, numerics: Numerics, rules: Rules, want: str, params: Tree, cache: Any, *inputs: jax.Array
) -> tuple[Any, Any, Any]:
    """`step`: (logits, hidden, cache) of the rank, from tokens int32 [B, T] and n_new int32 [B] of all."""
    tokens, n_new = (rules.part("slots", a) for a in inputs)
    found: tuple[Any, Any, Any] = family(config).step(config, numerics, params, cache, tokens, n_new, want, rules)
    return found


def rank_draft(
    config: Config,
    numerics: Numerics,
    rules: Rules,
    want: str,
    params: Tree,
    cache: Any,
    hidden: jax.Array,
    *inputs: jax.Array,
) -> tuple[Any, Any, Any]:
    """`draft` likewise; hidden is the rank's."""
    tokens, n_new = (rules.part("slots", a) for a in inputs)
    model = family(config)
    found: tuple[Any, Any, Any] = model.draft(config, numerics, params, cache, hidden, tokens, n_new, want, rules)
    return found
