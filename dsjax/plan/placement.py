"""A model on a mesh, as shapes: what one card holds of every parameter, and of a cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path as FilePath
from typing import Any

import jax

from dsjax.checkpoint import orbax
from dsjax.checkpoint.agreement import agree
from dsjax.checkpoint.manifest import stored_as
from dsjax.checkpoint.names import open_files
from dsjax.config import Config, V3Config, V4Config, load_config
from dsjax.config.v4 import WINDOW
from dsjax.layout import Layout
from dsjax.models import family
from dsjax.numerics import Numerics
from dsjax.params import Path, Row, Stored, Tree, abstract_params, leaves, tree_bytes
from quant import QArray


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """What is to run.

    Attributes:
      name: preset or folder.
      config: the architecture.
      numerics: how it computes, and what its cache holds.
      weights: what matrices are held as, one of `params.WEIGHTS`.
      stored: how each row is stored, from a checkpoint's headers; DeepSeek's official way if None.
      moe: how tokens are multiplied with their experts, a variant of the operator `grouped_matmul`.
      held: shapes of all parameters, where neither of the above says how they are held.
    """

    name: str
    config: Config
    numerics: Numerics
    weights: str = "stored"
    stored: Mapping[Path, Stored] | None = None
    moe: str = "loop"
    held: Tree | None = None

    def params(self, layout: Layout) -> Tree:
        """Shapes of all parameters, whole, scale blocks as the layout needs them; the draft module left out."""
        if self.held is not None:
            return self.held
        cut = partial(_cut, layout, self.config)
        return abstract_params(self.config, stored=self.stored, weights=self.weights, cut=cut)


def draft_config(config: Config) -> Config:
    """The draft module's one layer as a model of its own."""
    if isinstance(config, V4Config):
        return dataclasses.replace(config, num_hidden_layers=1, num_hash_layers=0, compress_ratios=(WINDOW,))
    assert isinstance(config, V3Config)  # dense models have none
    return dataclasses.replace(config, num_hidden_layers=1, first_k_dense_replace=0)


def _cut(layout: Layout, config: Config, row: Row, held: Stored) -> Stored:
    return layout.held(row, held, config)


def _stored_in(folder: FilePath, config: Config) -> Mapping[Path, Stored] | None:
    """How a folder's tensors are stored; None where it holds a config only."""
    if orbax.is_converted(folder):
        return {path: stored_as(leaf) for path, leaf in orbax.Converted(folder, config).leaves.items()}
    if not any(folder.glob("*.safetensors*")):
        return None
    with open_files(folder, config) as files:
        return agree(files, config)


def load_model(name: str, numerics: Numerics, weights: str = "stored") -> Model:
    """A preset, or a folder with a config.json and, if it has them, a checkpoint's headers.

    Raises:
      InputError: if it is neither; for numerics or weights that it cannot have; for a damaged checkpoint.
    """
    config = load_config(name)
    numerics = numerics.for_checkpoint(config, weights)
    folder = FilePath(name)
    return Model(name, config, numerics, weights, _stored_in(folder, config) if folder.is_dir() else None)


_MODULES = (
    ("shared", "shared experts"),
    ("indexer", "indexer"),
    ("compressor", "compressors"),
    ("attention", "attention"),
    ("ffn", "dense layers"),
    ("router", "routers"),
    ("bias", "routers"),
    ("table", "routers"),
    ("embed", "embedding"),
    ("head", "head"),
)


def module_of(row: Row) -> str:
    """The part of a model that a row belongs to, in a user's words."""
    if row.experts:
        return "routed experts"
    if any(name.endswith("_streams") for name in row.path):
        return "streams"
    if row.path[-1].endswith("projection"):
        return "draft projections"
    return next((module for name, module in _MODULES if name in row.path), "norms")


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """A model as a layout puts it on cards.

    Attributes:
      model: what is to run.
      layout: how it is split.
    """

    model: Model
    layout: Layout

    @property
    def config(self) -> Config:
        return self.model.config

    @property
    def numerics(self) -> Numerics:
        return self.model.numerics

    def ways(self, *axes: str) -> int:
        """Into how many parts logical axes are split together."""
        return self.layout.rules.ways(*axes)

    def slots(self, batch: int) -> int:
        """Slots of one card: a batch is filled up with empty ones to what the plan splits."""
        return -(-batch // self.ways("slots"))

    @cached_property
    def _params(self) -> Tree:
        whole = self.model.params(self.layout)
        return self.layout.local(whole, self.layout.param_specs(whole, self.config))

    @cached_property
    def leaves(self) -> tuple[tuple[Row, Any], ...]:
        """(row, leaf) of one card's parameters, leaves as shapes."""
        return tuple(leaves(self._params, self.config))

    @cached_property
    def modules(self) -> dict[str, int]:
        """Bytes of one card's parameters by module, scales with their codes; the largest first."""
        found: dict[str, int] = {}
        for row, leaf in self.leaves:
            found[module_of(row)] = found.get(module_of(row), 0) + tree_bytes(leaf)
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    @cached_property
    def replicated(self) -> frozenset[str]:
        """Modules of which every card of a replica has most of the bytes that one card alone would have."""
        plan = self.layout.plan
        if plan.ep * plan.tp == 1:
            return frozenset()
        whole: dict[str, int] = {}
        for row, leaf in leaves(self.model.params(self.layout), self.config):
            whole[module_of(row)] = whole.get(module_of(row), 0) + tree_bytes(leaf)
        return frozenset(module for module, size in self.modules.items() if 2 * size > whole[module])

    @cached_property
    def scale_bytes(self) -> int:
        """Of one card's parameters."""
        return sum(tree_bytes(leaf.scales) for _, leaf in self.leaves if isinstance(leaf, QArray))

    def cache_bytes(self, batch: int, context: int) -> tuple[int, int]:
        """(keys and values, indexer keys) of one card's cache for `batch` slots of `context` tokens."""
        slots = self.slots(batch) * self.ways("slots")
        make = partial(family(self.config).new_cache, self.config, self.numerics, slots, context)
        shapes = jax.eval_shape(make)
        local = self.layout.local(shapes, self.layout.cache_specs(shapes))
        index = tree_bytes(local.index)
        return tree_bytes(local) - index, index
