"""Number formats and quantised arrays. Knows no model and no mesh."""

from quant.formats import BF16, E2M1, E4M3, E5M2, E8M0, F16, FORMATS, INT4, INT8, Format
from quant.grouped import (
    Groups,
    expert_dot,
    experts_at_once,
    group_size,
    group_tokens,
    grouped_map,
    grouped_matmul,
    ungroup,
)
from quant.matmul import (
    FUSED_TOKENS,
    block_scaled_dot,
    reference_block_scaled_dot,
    reference_dot,
    take_tile,
    tile_dot,
    transposed_tile_dot,
)
from quant.qarray import WHOLE, QArray, dequantise, look_up, retile, split_rows
from quant.transforms import act_quant, fake_act_quant, fake_quantise, hadamard, quantise

__all__ = [
    "BF16",
    "E2M1",
    "E4M3",
    "E5M2",
    "E8M0",
    "F16",
    "FORMATS",
    "FUSED_TOKENS",
    "INT4",
    "INT8",
    "WHOLE",
    "Format",
    "Groups",
    "QArray",
    "act_quant",
    "block_scaled_dot",
    "dequantise",
    "expert_dot",
    "experts_at_once",
    "fake_act_quant",
    "fake_quantise",
    "group_size",
    "group_tokens",
    "grouped_map",
    "grouped_matmul",
    "hadamard",
    "look_up",
    "quantise",
    "reference_block_scaled_dot",
    "reference_dot",
    "retile",
    "split_rows",
    "take_tile",
    "tile_dot",
    "transposed_tile_dot",
    "ungroup",
]
