"""Inputs at the edges of what an operator may be given, from recorded ones: ties, zeros of both signs, every code.

Errors are judged relative to the largest result: rows are made large or small only where an operator normalises them.
"""

from __future__ import annotations

import numpy as np

Arrays = list[np.ndarray]

FEWEST_ROWS = 4
"""Rows that inputs need to have for these edges: prefill's have."""

_NORMS = ("rms_norm", "head_norm", "layer_norm", "act_quant")
_PRODUCTS = ("block_scaled_dot", "batched_dot", "grouped_matmul")
_GATES = ("moe_gate", "sqrtsoftplus_gate", "top_k")
_ROPES = ("rope", "rope_halves", "rope_tail")
_NAN_CODES = (0x7F, 0xFF)


def edge_inputs(operator: str, inputs: Arrays) -> Arrays | None:
    """The inputs with edges in them, or None of an operator that has none here.

    Args:
      operator: its name.
      inputs: recorded; they are left as they are.
    """
    out = [a.copy() for a in inputs]
    if operator in _PRODUCTS:
        for i in range(len(out)):
            if _is_codes(out, i):
                out[i] = every_code(out[i])
        x = next((a for a in out if _is_float(a) and _rows(a) >= FEWEST_ROWS and not _is_scales(out, a)), None)
        return None if x is None or not _zeros(x) else out
    if operator == "decode":  # of activations, which may be NaN
        if len(out) != 1 or out[0].dtype != np.uint8 or out[0].size < 256:
            return None
        return [np.resize(np.arange(256, dtype=np.uint8), out[0].shape)]
    if not _is_float(out[0]) or _rows(out[0]) < FEWEST_ROWS:
        return None
    rows = out[0].reshape(-1, out[0].shape[-1])
    if operator in _NORMS:
        _zeros(out[0])
        rows[2], rows[3] = rows[2] * rows.dtype.type(2.0**20), rows[3] * rows.dtype.type(2.0**-20)
    elif operator in _GATES:
        # Few levels, none of which is another's negative: sigmoids of such add up to 1 in any pair, but for rounding.
        rows[...] = (np.floor(rows.astype(np.float32) * 2) / 2 + 0.125).astype(rows.dtype)
        rows[0] = 0  # all tie
        rows[1] = rows[1, 0]
        if operator == "moe_gate" and len(out) > 1:
            out[1][...] = 0  # the bias would part them
    elif operator in _ROPES:
        _zeros(out[0])
        for table, value in zip(out[1:3], (1, 0), strict=True):  # all positions as the first
            table[...] = value
    elif operator == "swiglu":
        _zeros(out[0])
        rows[2], rows[3] = rows.dtype.type(-120), rows.dtype.type(120)  # exp of either overflows, or is zero
    else:
        return None
    return out


def every_code(codes: np.ndarray) -> np.ndarray:
    """An array like this one that holds each code in turn, 0x00 and 0x80 among them, without E4M3's NaN, which no
    checkpoint may have; of INT8 without -128."""
    if codes.dtype == np.int8:
        return np.resize(np.arange(-127, 128).astype(np.int8), codes.shape)
    if codes.dtype.name.startswith("float4"):
        return np.resize(np.arange(16, dtype=np.uint8), codes.shape).view(codes.dtype)
    kept = np.array([c for c in range(256) if c not in _NAN_CODES], np.uint8)
    return np.resize(kept, codes.shape).view(codes.dtype)


def _is_float(a: np.ndarray) -> bool:
    return a.ndim >= 2 and a.dtype.name in ("float32", "bfloat16", "float16")


def _is_codes(arrays: Arrays, i: int) -> bool:
    """Whether an array is a weight's codes: its scales come next, with fewer elements."""
    a = arrays[i]
    if a.dtype.name not in ("uint8", "int8", "float8_e4m3fn", "float4_e2m1fn") or i + 1 == len(arrays):
        return False
    return arrays[i + 1].ndim == a.ndim and arrays[i + 1].size < a.size


def _is_scales(arrays: Arrays, a: np.ndarray) -> bool:
    return any(_is_codes(arrays, i) and arrays[i + 1] is a for i in range(len(arrays) - 1))


def _rows(a: np.ndarray) -> int:
    return a.size // max(a.shape[-1], 1)


def _zeros(a: np.ndarray) -> bool:
    """Makes the first row zeros, the second those with a minus; True."""
    rows = a.reshape(-1, a.shape[-1])
    rows[0], rows[1] = 0, a.dtype.type(-0.0)
    return True
