"""A row of the table: one parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

Path = tuple[str, ...]
Tree = dict[str, Any]
"""Parameters as nested dictionaries, leaves float32 arrays or QArrays, by `Row.path`."""

LINEAR = "linear"  # E4M3 with block scales where the checkpoint is quantised, else a float matrix
EXPERT = "expert"  # E2M1 with a scale per 32 channels of a row, or as LINEAR
MATRIX = "matrix"  # a float matrix, never quantised
VECTOR = "vector"  # norm gains and biases; float32 once loaded
FLOAT32 = "float32"  # of any rank; float32 in the file and once loaded
INTEGER = "integer"  # ids; int32 once loaded, and no parameter in any count


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter, stacked over the layers (and experts) that repeat it.

    Attributes:
      path: where it stands in the tree, e.g. ("moe", "attention", "q_b").
      dims: its own axes as products of letters, e.g. ("HK", "Q"); always [out, in] for matrices.
      axes: a logical axis name for each of `dims`, which the sharding rules map to mesh axes.
      storage: LINEAR, EXPERT, MATRIX, VECTOR, FLOAT32 or INTEGER.
      name: checkpoint name, with {layer} and {expert} where it is stacked.
      layers: checkpoint layer numbers it is stacked over; empty if it stands alone.
      experts: number of experts it is stacked over; 0 if none.
      scale_suffix: (what the tensor's name loses, what it gets instead) in the name of its scales.
      narrow: held in INT4 by `--weights w4a8`, as routed experts are.
      copy_of: the path of the parameter that the checkpoint repeats here; such a row is checked, not loaded.
    """

    path: Path
    dims: tuple[str, ...]
    axes: tuple[str, ...]
    storage: str
    name: str
    layers: tuple[int, ...] = ()
    experts: int = 0
    scale_suffix: tuple[str, str] = ("", "_scale_inv")
    copy_of: Path | None = None
    narrow: bool = False

    @property
    def module(self) -> str:
        """What a config calls the first of the row's tensors: its name without `.weight`."""
        return self.tensor_name((0,) * len(self.stacking)).removesuffix(".weight")

    @property
    def stacking(self) -> tuple[int, ...]:
        """The leading axes: (layers, experts), each only where present."""
        return (len(self.layers),) * bool(self.layers) + (self.experts,) * bool(self.experts)

    @property
    def logical_axes(self) -> tuple[str, ...]:
        """Names of all axes of the leaf."""
        return ("layers",) * bool(self.layers) + ("experts",) * bool(self.experts) + self.axes

    def tensors(self) -> Iterator[tuple[tuple[int, ...], str]]:
        """(leading index, checkpoint name) of every tensor of this leaf."""
        for index in np.ndindex(self.stacking):
            yield index, self.tensor_name(index)

    def tensor_name(self, index: tuple[int, ...]) -> str:
        """Checkpoint name of the tensor at a leading index (layer, expert), as far as the row is stacked."""
        layer = self.layers[index[0]] if self.layers else None
        return self.name.format(layer=layer, expert=index[1] if self.experts else None)

    def scale_name(self, tensor: str) -> str:
        """Checkpoint name of the scales of the tensor with this name."""
        removed, added = self.scale_suffix
        return tensor.removesuffix(removed) + added
