"""How one cached vector is held: as it is, as bfloat16 bits, or as DeepSeek's FP8 and FP4 codes with their scales.

A row is one stretch of one unsigned type, so that a cache array is written by one scatter and read by one slice or
gather, and no backend widens more of it than is read.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from quant.formats import BF16, E2M1, E4M3, E8M0, decode, encode
from quant.transforms import dequantise_rows, quantise_rows

KV_GROUP = 64
"""Channels of a V4 key that share a scale (spec V4 4.2)."""

LATENT_GROUP = 128
"""Channels of a V3.2 latent, or of its indexer key, that share a scale (spec V3 4.4)."""

INDEX_GROUP = 32
"""Channels of an indexer key that share a scale (spec V4 4.3)."""


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """One way to hold vectors of `channels` values, of which the last `rope` are rotary.

    Attributes:
      kind: "float32"; "bfloat16" (its bits); "fp8": E4M3 codes and power-of-two scales, the rotary channels bfloat16;
        "fp4": E2M1 codes and UE8M0 scales per 32 channels, 68 bytes for 128.
      channels, rope: sizes.
      group: of fp8, channels that share a scale.
      wide_scales: of fp8, whether scales are float32 (V3.2: 656 bytes for 512 + 64 channels, 132 for 128) instead of
        UE8M0 bytes (V4: 583 bytes for 448 + 64).
    """

    kind: str
    channels: int
    rope: int = 0
    group: int = KV_GROUP
    wide_scales: bool = False

    @property
    def nope(self) -> int:
        return self.channels - self.rope

    @property
    def dtype(self) -> jnp.dtype:
        """Of the row's elements. Bits are signed: IREE 3.13 cannot put unsigned ones into a loop's array."""
        return jnp.dtype({"float32": jnp.float32, "bfloat16": jnp.int16}.get(self.kind, jnp.int8))

    @property
    def width(self) -> int:
        """Elements in a row."""
        if self.kind == "fp8":
            return self.nope + 2 * self.rope + -(-self.nope // self.group) * (4 if self.wide_scales else 1)
        if self.kind == "fp4":
            return self.channels // 2 + -(-self.channels // INDEX_GROUP)
        return self.channels

    @property
    def nbytes(self) -> int:
        """Bytes of a row."""
        return self.width * self.dtype.itemsize

    def encode(self, x: Float[Array, "*batch channels"]) -> Shaped[Array, "*batch width"]:
        """Values, already rounded to the activation dtype, as rows."""
        if self.kind == "float32":
            return x.astype(jnp.float32)
        return lax.bitcast_convert_type(self._encode(x), self.dtype)

    def _encode(self, x: Float[Array, "*batch channels"]) -> Shaped[Array, "*batch width"]:
        """The same as unsigned codes."""
        if self.kind == "bfloat16":
            return encode(x, BF16)
        if self.kind == "fp4":
            return jnp.concatenate(quantise_rows(x, E2M1, INDEX_GROUP), axis=-1)
        codes, scales = quantise_rows(x[..., : self.nope], E4M3, self.group)
        if self.wide_scales:
            scales = lax.bitcast_convert_type(decode(scales, E8M0), jnp.uint8).reshape(*x.shape[:-1], -1)
        bits = encode(x[..., self.nope :], BF16)
        rope = lax.bitcast_convert_type(bits, jnp.uint8).reshape(*x.shape[:-1], 2 * self.rope)
        return jnp.concatenate([codes, rope, scales], axis=-1)

    def decode(self, rows: Shaped[Array, "*batch width"]) -> Float[Array, "*batch channels"]:
        """What rows stand for: float32, or bfloat16 for everything narrower, which holds it exactly."""
        if self.kind == "float32":
            return rows
        if self.kind == "bfloat16":
            return lax.bitcast_convert_type(rows, jnp.bfloat16)
        rows = lax.bitcast_convert_type(rows, jnp.uint8)
        if self.kind == "fp4":
            at = self.channels // 2
            return dequantise_rows(rows[..., :at], rows[..., at:], E2M1, INDEX_GROUP).astype(jnp.bfloat16)
        end = self.nope + 2 * self.rope
        scales = rows[..., end:]
        if self.wide_scales:
            words = lax.bitcast_convert_type(scales.reshape(*rows.shape[:-1], -1, 4), jnp.uint32)
            scales = (words >> 23).astype(jnp.uint8)  # the exponent of a power of two
        nope = dequantise_rows(rows[..., : self.nope], scales, E4M3, self.group).astype(jnp.bfloat16)
        pairs = rows[..., self.nope : end].reshape(*rows.shape[:-1], self.rope, 2)
        return jnp.concatenate([nope, lax.bitcast_convert_type(pairs, jnp.bfloat16)], axis=-1)
