"""The two ways in which products with stored weights are written, and which compilers like which."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Form:
    """How products with stored weights are written for a compiler. Static; sums differ in their order only, and in when
    bfloat16 activations round the weight, too.

    Attributes:
      fused_tokens: up to this many tokens take the fused form, and several experts at once. It decodes once per token,
        which stays cheaper than memory traffic.
      tile_rows: tiles that are not all of a matrix have a multiple of this many rows.
      block_rows: rows of a block of assignments to one expert, at least (`quant.grouped`).
      spread: scales of row groups are spread over channels by "repeat", or by a "product" with a matrix of ones and
        zeros, which gives the same numbers.
    """

    fused_tokens: int
    tile_rows: int
    block_rows: int
    spread: str


FUSED = Form(fused_tokens=3, tile_rows=1, block_rows=1, spread="repeat")
"""For compilers that fuse decoding, product and sum in one loop: XLA:CPU."""

TILED = Form(fused_tokens=0, tile_rows=32, block_rows=8, spread="product")
"""For compilers that fuse decoding into the operand of a matrix unit: XLA:TPU. There, the fused form's sums are written
as float32 tiles, a gather of several experts copies their whole stack, rows that are no multiple of 32 re-tile it, and
repeated scales turn it over."""
