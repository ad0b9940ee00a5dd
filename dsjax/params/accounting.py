"""Counts and bytes, from the table."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import jax

from dsjax.cache import per_token, v4
from dsjax.config import Config, V3Config, V4Config
from dsjax.config.v4 import CSA
from dsjax.numerics import Numerics
from dsjax.params.row import INTEGER, Row, Tree
from dsjax.params.table import is_mtp, leaf_shape, leaves, official_storage, scale_grid, table


def _stored_bytes(row: Row, config: Config) -> int:
    """Of the row's tensors in the official checkpoint, scales included."""
    stored, shape = official_storage(row, config), leaf_shape(row, config)
    if stored.scales is not None:
        scales = math.prod(scale_grid(shape, stored.block)) * (1 if stored.scales == "e8m0" else 4)
        shapes = 16 * math.prod(row.stacking) if stored.format == "int4" else 0  # weight_shape, beside packed codes
        return math.prod(shape) // (2 if stored.packed else 1) + scales + shapes
    # Ids are int64 in the files.
    return math.prod(shape) * {"i32": 8, "f32": 4}.get(stored.format, 2)


def tree_bytes(params: Any) -> int:
    """Bytes of all leaves of a tree as they are held; of arrays, or of shapes from `abstract_params`."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(params))


def active_bytes(params: Tree, config: Config, batch: int) -> int:
    """Weight bytes that one decode step must read at least once, as they are held, scales included.

    All leaves of the main model, except: of the embedding, and of tables by token id, one row per slot; of the routed
    experts the expected number of distinct ones under uniform, independent routing, E (1 - (1 - k/E)^B) a layer with k
    experts per token, which is k for one slot. Trained routers are less even, so real batches read less. MTP modules
    are left out: decoding does not use them. The cache is no weight and is not counted.

    Args:
      params: arrays, or shapes from `abstract_params`.
      config: the architecture.
      batch: slots B, one new token each.
    """
    total = 0.0
    for row, leaf in leaves(params, config):
        if is_mtp(row):
            continue
        share = 1.0
        if (row.path == ("embed",) and not config.tie_word_embeddings) or row.storage == INTEGER:
            share = min(batch / config.vocab_size, 1.0)
        elif row.experts:
            share = 1 - (1 - config.num_experts_per_tok / row.experts) ** batch
        total += share * tree_bytes(leaf)
    return round(total)


def kv_bytes_per_token(config: Config) -> int:
    """What the cache grows by with each token of the main model, rounded up to a byte.

    In native numerics. V2, V3: the latent in bfloat16; V3.2: its codes, and indexer keys (spec V3 7). Dense models:
    keys and values in bfloat16. V4: compressed entries and indexer keys (spec V4 7.2), without the pad byte of other
    engines' layouts.
    """
    numerics = Numerics("native")
    if not isinstance(config, V4Config):
        row = per_token.row_format(config, numerics).nbytes
        if isinstance(config, V3Config) and config.indexer:
            row += per_token.index_format(config, numerics).nbytes
        return row * config.num_hidden_layers
    entry, key = v4.kv_format(config, numerics).nbytes, v4.index_format(config, numerics).nbytes
    return math.ceil(sum(Fraction(entry + (key if r == CSA else 0), r) for r in config.compress_ratios if r))


def accounting(config: Config) -> dict[str, int]:
    """Parameter counts and bytes (spec V3 7, V4 7).

    Returns:
      parameters: main model.
      active_parameters: used per token, without the embedding table (which a tied head uses).
      mtp_parameters: MTP modules, without their copies of embedding and head.
      bytes: tensor bytes of the official checkpoint, MTP and copies included.
      kv_bytes_per_token: see `kv_bytes_per_token`.
    """
    rows = table(config)
    count = {row.path: math.prod(leaf_shape(row, config)) for row in rows if row.storage != INTEGER}
    main = sum(n for path, n in count.items() if path[0] != "mtp")
    routed = sum(count[r.path] for r in rows if r.experts and not is_mtp(r))
    idle = routed - routed * config.num_experts_per_tok // max(config.n_routed_experts, 1)
    return {
        "parameters": main,
        "active_parameters": main - idle - (0 if config.tie_word_embeddings else count["embed",]),
        "mtp_parameters": sum(count[r.path] for r in rows if is_mtp(r) and r.copy_of is None),
        "bytes": sum(_stored_bytes(r, config) for r in rows),
        "kv_bytes_per_token": kv_bytes_per_token(config),
    }
