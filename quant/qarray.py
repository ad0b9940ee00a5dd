"""QArray: a quantised array, held in its stored bytes."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import export, lax

from quant.formats import E8M0, FORMATS, Format, decode, unpack
from quant.operator import operator

WHOLE = 0
"""Block size that stands for the whole axis: (1, WHOLE) is one scale per output channel."""


@partial(jax.tree_util.register_dataclass, data_fields=["codes", "scales"], meta_fields=["format", "block"])
@dataclasses.dataclass(frozen=True)
class QArray:
    """Codes and scales that stand for `decode(codes) * scales`, scale per block of the last two axes.

    A pytree of two leaves with static format data, so that it can be jitted over, scanned over, donated, sharded
    (scales follow codes) and replaced by shapes. `N` and `K` are the logical last two axes.

    Attributes:
      codes: unsigned integers [..., N, K], or [..., N, K/2] for 4-bit formats (low nibble = even index).
      scales: [..., ceil(N/bn), ceil(K/bk)]; float32, or uint8 holding E8M0 codes; None where the format needs no
        scale (bf16 held as its bits).
      format: the elements' format.
      block: (bn, bk), the block that shares one scale; WHOLE spans an axis. Edge blocks may be partial.
    """

    codes: Any
    scales: Any
    format: Format
    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape [..., N, K]."""
        *lead, k = self.codes.shape
        return (*lead, k * 2 if self.format.packed else k)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales as they are held."""
        return sum(math.prod(a.shape) * a.dtype.itemsize for a in (self.codes, self.scales) if a is not None)

    def __getitem__(self, index: Any) -> QArray:
        """Indexes leading axes (all but the last two); `...` is the array itself."""
        if index is Ellipsis:
            return self
        indices = index if isinstance(index, tuple) else (index,)
        if len(indices) > self.ndim - 2 or any(i is Ellipsis for i in indices):
            raise IndexError(
                f"a QArray is indexed on its leading {self.ndim - 2} axes only; use `tile` inside a matrix"
            )
        return dataclasses.replace(
            self, codes=self.codes[index], scales=None if self.scales is None else self.scales[index]
        )

    def tile(self, index: tuple[Any, ...], start: Any, rows: int, *, stride: int) -> QArray:
        """Rows `start : start + rows` of the matrix at leading `index`, as a QArray [rows, K].

        Slices the codes where they lie, so that a scan over layers, experts or tiles copies nothing larger than the
        tile. Its row block is a block, the part of one that it covers, or one row where its start may cut a block.

        Args:
          index: one (possibly traced) index per leading axis.
          start: first row, static or traced.
          rows: static row count.
          stride: a number that divides every `start` (0 if start is 0); it tells whether a tile cuts a block, and
            where none is cut a gather is saved.
        """
        lead = len(index)

        def take(array: jax.Array, first: Any, count: int) -> jax.Array:
            width = array.shape[-1]
            return lax.dynamic_slice(array, (*index, first, 0), (1,) * lead + (count, width)).reshape(count, width)

        codes = take(self.codes, start, rows)
        if self.scales is None:
            return dataclasses.replace(self, codes=codes)
        bn = self.block[0] or self.shape[-2]
        if stride % bn == 0:  # starts where a block starts
            block, scales = min(bn, rows), take(self.scales, start // bn, -(-rows // bn))
        elif bn % rows == 0 and stride % rows == 0:  # lies inside a block
            block, scales = rows, take(self.scales, start // bn, 1)
        else:
            block, scales = 1, take(self.scales, 0, self.scales.shape[-2])[(start + jnp.arange(rows)) // bn]
        return dataclasses.replace(self, codes=codes, scales=scales, block=(block, self.block[1]))

    def gather(self, index: tuple[Any, ...]) -> QArray:
        """Several matrices at once: index arrays broadcast together over the leading axes, [*indices, N, K].

        A fusion that follows reads the codes where they lie. Indices must be within bounds.
        """

        def take(array: jax.Array) -> jax.Array:
            return array.at[index].get(mode="promise_in_bounds")

        return dataclasses.replace(
            self, codes=take(self.codes), scales=None if self.scales is None else take(self.scales)
        )


@operator("look_up")
def look_up(q: QArray, rows: jax.Array) -> jax.Array:
    """Rows of a matrix by their numbers: q [N, K], rows int [...] -> float32 [..., K]."""
    codes = q.codes[rows]
    values = decode(unpack(codes) if q.format.packed else codes, q.format)
    if q.scales is None:
        return values
    scales = scale_values(q.scales)[rows // (q.block[0] or q.shape[-2])]
    return values * expand_scales(scales[..., None, :], (1, q.block[1]), (1, values.shape[-1]))[..., 0, :]


def scale_values(scales: jax.Array) -> jax.Array:
    """Scales as float32: decodes E8M0 codes (uint8), passes float32 through."""
    return decode(scales, E8M0) if scales.dtype == jnp.uint8 else scales


def expand_scales(scales: jax.Array, block: tuple[int, int], shape: tuple[int, int]) -> jax.Array:
    """Repeats block scales [..., ceil(N/bn), ceil(K/bk)] to every element of [..., N, K]; edge blocks are cut."""
    n, k = shape
    bn, bk = block[0] or n, block[1] or k
    if bk > 1:
        scales = jnp.repeat(scales, bk, axis=-1)[..., :k]
    if bn > 1:
        scales = jnp.repeat(scales, bn, axis=-2)[..., :n, :]
    return scales


def retile(q: QArray, block: tuple[int, int]) -> QArray:
    """The same numbers with finer scale blocks; exact. Needed where a shard's width cuts a block.

    Raises:
      ValueError: if `block` does not divide the present one.
    """
    if q.scales is None:
        return q
    n, k = q.shape[-2:]
    old = (q.block[0] or n, q.block[1] or k)
    new = (block[0] or n, block[1] or k)
    if old[0] % new[0] or old[1] % new[1]:
        raise ValueError(f"block {new} does not divide block {old}")
    grid = (math.ceil(n / new[0]), math.ceil(k / new[1]))
    scales = expand_scales(q.scales, (old[0] // new[0], old[1] // new[1]), grid)
    return dataclasses.replace(q, scales=scales, block=new)


def split_rows(w: jax.Array | QArray, parts: int) -> jax.Array | QArray:
    """[..., N, K] -> [..., parts, N / parts, K]: a matrix as many. Scale blocks that are cut become finer.

    Raises:
      ValueError: if `parts` does not divide N.
    """
    n = w.shape[-2]
    if n % parts:
        raise ValueError(f"{n} rows do not split into {parts} parts")

    def split(a: jax.Array) -> jax.Array:
        return a.reshape(*a.shape[:-2], parts, -1, a.shape[-1])

    if not isinstance(w, QArray):
        return split(w)
    if w.scales is None:
        return dataclasses.replace(w, codes=split(w.codes))
    bn = w.block[0] or n
    if (n // parts) % bn:
        w = retile(w, (math.gcd(bn, n // parts), w.block[1]))
    return dataclasses.replace(w, codes=split(w.codes), scales=split(w.scales))


def dequantise(q: QArray) -> jax.Array:
    """float32 [..., N, K] = decode(codes) * scales, each product rounded once. Differentiable in float32 scales."""
    codes = unpack(q.codes) if q.format.packed else q.codes
    values = decode(codes, q.format)
    if q.scales is None:
        return values
    return values * expand_scales(scale_values(q.scales), q.block, (q.shape[-2], q.shape[-1]))


def _static_data(data: tuple[Format, tuple[int, int]]) -> bytes:
    fmt, block = data
    return f"{fmt.name},{block[0]},{block[1]}".encode()


def _read_static_data(blob: bytes) -> tuple[Format, tuple[int, int]]:
    name, bn, bk = blob.decode().split(",")
    return FORMATS[name], (int(bn), int(bk))


export.register_pytree_node_serialization(
    QArray,
    serialized_name="dsjax.QArray",
    serialize_auxdata=_static_data,
    deserialize_auxdata=_read_static_data,
)
