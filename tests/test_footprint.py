"""What a compiled program computes and holds, against sums worked out by hand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from sharding.footprint import Held, Products, largest, products
from sharding.hlo import Program, parse

# What the TPU compiler writes, cut down: products as convolutions, of which two have a batch; a stack that is copied; a
# tile that stays on the chip; a copy that is begun and done; updates in place, one of them in a fusion.
TPU = """\
HloModule jit_step, is_scheduled=true, num_partitions=1

%decoding (param_0: u8[4,512,256], param_1: s32[]) -> bf16[64,256] {
  %param_0 = u8[4,512,256]{2,1,0:T(8,128)(4,1)} parameter(0)
  %param_1 = s32[]{:T(128)} parameter(1)
  %whole = f32[4,512,256]{2,1,0:T(8,128)} convert(%param_0)
  ROOT %tile = bf16[64,256]{1,0:T(8,128)(2,1)} custom-call(%whole, %param_1)
}

%writing (param_2: u16[3,1024,576], param_3: u16[1,1,576]) -> u16[3,1024,576] {
  %param_2 = u16[3,1024,576]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_3 = u16[1,1,576]{2,1,0:T(2,128)(2,1)} parameter(1)
  %at = s32[]{:T(128)} constant(7)
  %updated = u16[3,1024,576]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%param_2, %param_3, %at, %at, %at)
  ROOT %same = u16[3,1024,576]{2,1,0:T(8,128)(2,1)} bitcast(%updated)
}

%body (p.1: (s32[], f32[16,64], u8[4,512,256])) -> (s32[], f32[16,64], u8[4,512,256]) {
  %p.1 = (s32[]{:T(128)}, f32[16,64]{1,0:T(8,128)}, u8[4,512,256]{2,1,0:T(32,128)(4,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %sum = f32[16,64]{1,0:T(8,128)} get-tuple-element(%p.1), index=1
  %stack = u8[4,512,256]{2,1,0:T(32,128)(4,1)} get-tuple-element(%p.1), index=2
  %retiled = u8[4,512,256]{2,1,0:T(8,128)(4,1)} copy(%stack), metadata={op_name="jit(step)/experts/slice"}
  %tile.1 = bf16[64,256]{1,0:T(8,128)(2,1)S(1)} fusion(%retiled, %i), kind=kLoop, calls=%decoding
  %x = bf16[16,256]{1,0:T(8,128)(2,1)} broadcast(%one)
  %y = f32[16,64]{1,0:T(8,128)} convolution(%x, %tile.1), dim_labels=bf_oi->bf
  ROOT %result = (s32[]{:T(128)}, f32[16,64]{1,0:T(8,128)}, u8[4,512,256]{2,1,0:T(32,128)(4,1)}) \
tuple(%next, %y, %stack)
}

%condition (p.2: (s32[], f32[16,64], u8[4,512,256])) -> pred[] {
  %p.2 = (s32[]{:T(128)}, f32[16,64]{1,0:T(8,128)}, u8[4,512,256]{2,1,0:T(32,128)(4,1)}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  %end = s32[]{:T(128)} constant(8)
  ROOT %more = pred[]{:T(512)} compare(%i.2, %end), direction=LT
}

ENTRY %main (w: u8[4,512,256], rows: u16[3,1024,576]) -> f32[16,64] {
  %w = u8[4,512,256]{2,1,0:T(32,128)(4,1)} parameter(0)
  %rows = u16[3,1024,576]{2,1,0:T(8,128)(2,1)} parameter(1)
  %new = u16[1,1,576]{2,1,0:T(2,128)(2,1)} iota(), iota_dimension=2
  %cache = u16[3,1024,576]{2,1,0:T(8,128)(2,1)} fusion(%rows, %new), kind=kLoop, calls=%writing
  %zero = s32[]{:T(128)} constant(0)
  %begun = (u16[3,1024,576]{1,2,0:T(8,128)(2,1)}, u16[3,1024,576]{2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%cache)
  %done = u16[3,1024,576]{1,2,0:T(8,128)(2,1)} copy-done(%begun)
  %q = bf16[8,16,32]{2,1,0:T(8,128)(2,1)} broadcast(%zero)
  %k = bf16[8,128,32]{2,1,0:T(8,128)(2,1)} broadcast(%zero)
  %scores = f32[8,16,128]{2,1,0:T(8,128)} convolution(%q, %k), window={size=8 stride=7 lhs_dilate=8}, \
dim_labels=0bf_0oi->0bf
  %shared = bf16[128,32,1]{1,0,2:T(8,128)(2,1)} broadcast(%zero)
  %others = f32[8,16,128]{2,1,0:T(8,128)} convolution(%q, %shared), window={size=1}, dim_labels=0bf_oi0->0bf
  %start = f32[16,64]{1,0:T(8,128)} broadcast(%zero)
  %tuple.1 = (s32[]{:T(128)}, f32[16,64]{1,0:T(8,128)}, u8[4,512,256]{2,1,0:T(32,128)(4,1)}) tuple(%zero, %start, %w)
  %loop = (s32[]{:T(128)}, f32[16,64]{1,0:T(8,128)}, u8[4,512,256]{2,1,0:T(32,128)(4,1)}) while(%tuple.1), \
condition=%condition, body=%body
  ROOT %out = f32[16,64]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def test_products_of_a_tpu_program() -> None:
    """Eight trips of 16 x 256 by 256 x 64; eight products of 16 x 32 by 32 x 128, as many that share the second one."""
    flops = 8 * 2 * 16 * 256 * 64 + 2 * (2 * 8 * 16 * 32 * 128)
    assert products(parse(TPU)) == Products(flops, False)


def test_largest_arrays_of_a_tpu_program() -> None:
    """The stack that is copied in every trip comes first; not the float32 one, which is inside a fusion, nor the cache
    that is updated in place; the copy of the cache once."""
    found = largest(parse(TPU), count=2)
    assert found == [
        Held(3 * 1024 * 576 * 2, "copy-start", ("u16[3,1024,576]",), ""),
        Held(4 * 512 * 256, "copy", ("u8[4,512,256]",), "jit(step)/experts/slice"),
    ]
    on_chip = largest(parse(TPU), memory_space=1)
    assert on_chip == [Held(64 * 256 * 2, "fusion", ("bf16[64,256]",), "")]


def compiled(f: Any, *shapes: tuple[int, ...]) -> Program:
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return parse(jax.jit(f).lower(*arrays).compile().as_text())


def test_a_loop_of_products() -> None:
    """On this backend: five layers of a product, in a scan."""

    def layers(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.scan(lambda x, i: (jnp.tanh(x @ w[i]), None), x, jnp.arange(5))[0]

    found = products(compiled(layers, (4, 64), (5, 64, 64)))
    if found.flops:  # else they went to a library
        assert found == Products(5 * 2 * 4 * 64 * 64, False)


def test_a_loop_of_unknown_length_is_flagged() -> None:
    def layers(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.fori_loop(0, x[0, 0].astype(jnp.int32), lambda i, x: jnp.tanh(x @ w), x)

    found = products(compiled(layers, (3, 8), (8, 8)))
    assert found in (Products(2 * 3 * 8 * 8, True), Products(0, False))


@pytest.mark.parametrize("copied", [False, True])
def test_a_copied_stack_is_seen(copied: bool) -> None:
    """On this backend: layers read from a stack where it lies, and from one that is turned over before."""

    def read(x: jax.Array, w: jax.Array) -> jax.Array:
        w = lax.optimization_barrier(jnp.swapaxes(w, 1, 2)) if copied else w
        return lax.scan(lambda x, i: (jnp.tanh(x + w[i]), None), x, jnp.arange(5))[0]

    (biggest,) = largest(compiled(read, (300, 300), (5, 300, 300)), 1)
    assert (biggest.nbytes >= 5 * 300 * 300 * 4) == copied
