"""V4's tensors under their official names, whoever wrote the file (spec V4 3.1, 3.3).

Hugging Face writes either its own module names, with the routed experts of a layer stacked into one tensor, or what its
rules make of the official ones, which is not quite what DeepSeek publishes. A stack lies in the file expert by expert,
so each expert's part of it is a tensor with an offset of its own, and nothing is copied.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from dsjax.checkpoint.integers import rename
from dsjax.checkpoint.safetensors import Files, Tensor
from dsjax.config import Config, V4Config
from dsjax.errors import InputError
from dsjax.params import FP8_BLOCK

# Applied in this order; an official name is changed by none of them.
_RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^model\.", ""),
        (r"^lm_head\.", "head."),
        (r"^embed_tokens\.", "embed."),
        (r"^hc_head\.hc_", "hc_head_"),
        (r"\.self_attn\.", ".attn."),
        (r"\.mlp\.", ".ffn."),
        (r"\.input_layernorm\.", ".attn_norm."),
        (r"\.post_attention_layernorm\.", ".ffn_norm."),
        (r"\.(attn|ffn)_hc\.", r".hc_\1_"),
        (r"\.compressor\.indexer\.(?:scorer\.)?(weights_proj|q_b_proj)\.", r".indexer.\1."),
        (r"\.compressor\.indexer\.", ".indexer.compressor."),
        (r"\.compressor\.gate_proj\.", ".compressor.wgate."),
        (r"\.compressor\.kv_norm\.", ".compressor.norm."),
        (r"\.position_bias$", ".ape"),
        (r"\.attn\.q_a_norm\.", ".attn.q_norm."),
        (r"\.attn\.norm\.", ".attn.kv_norm."),  # Hugging Face's rules do not lead back to where they came from
        (r"\.sinks$", ".attn_sink"),
        (r"\.(q_a|q_b|kv|o_a|o_b)_proj\.", r".w\1."),
        (r"\.e_score_correction_bias$", ".bias"),
        (r"(shared_experts|experts\.\d+)\.gate_proj\.", r"\1.w1."),
        (r"(shared_experts|experts\.\d+)\.down_proj\.", r"\1.w2."),
        (r"(shared_experts|experts\.\d+)\.up_proj\.", r"\1.w3."),
        (r"\.weight_scale_inv$", ".scale"),
    )
)

_STACK = re.compile(r"^(.+\.ffn\.experts)\.(gate_up_proj|down_proj)(?:\.weight)?(_scale|_scale_inv|\.scale)?$")


def official_name(name: str) -> str:
    """The official name of a tensor, from any spelling of it."""
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name


def _bad(tensor: Tensor, expected: str, found: str) -> InputError:
    return InputError(f"{tensor.path}: tensor {tensor.name}: expected {expected}, found {found}")


def _parts(tensor: Tensor, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensor under its official name; of a stack [E, 2 x width, K] or [E, N, K], every expert's part."""
    stack = _STACK.match(name)
    if stack is None:
        yield name, tensor
        return
    prefix, which, scale = stack.groups()
    weights = ("w1", "w3") if which == "gate_up_proj" else ("w2",)  # gate above up; down
    if len(tensor.shape) != 3 or tensor.shape[1] % len(weights):
        axes = "[experts, gate and up, in]" if len(weights) == 2 else "[experts, out, in]"
        raise _bad(tensor, axes, str(list(tensor.shape)))
    experts, n, k = tensor.shape
    shape, count = (n // len(weights), k), experts * len(weights)
    nbytes = tensor.nbytes // max(count, 1)
    for i in range(count):
        part = f"{prefix}.{i // len(weights)}.{weights[i % len(weights)]}.{'scale' if scale else 'weight'}"
        yield part, dataclasses.replace(tensor, shape=shape, offset=tensor.offset + i * nbytes, nbytes=nbytes)


def official(files: Files) -> Files:
    """The same tensors under official names, stacks of experts as one tensor per expert.

    Raises:
      InputError: if two tensors would have one name, or a stack has no parts.
    """
    named: dict[str, Tensor] = {}
    for tensor in files.values():
        for name, part in _parts(tensor, official_name(tensor.name)):
            if name in named:
                raise _bad(tensor, f"{name} once", f"{named[name].name} too")
            named[name] = part
    for name, part in named.items():
        # No block may hold rows of gate and of up. Other shapes than a grid of blocks are for the caller to judge.
        if name.endswith(".w1.scale") and "gate_up_proj" in part.name:
            rows = named.get(name.removesuffix("scale") + "weight", part).shape[0]
            if rows % FP8_BLOCK[0] and part.shape[0] == -(-rows // FP8_BLOCK[0]):
                raise _bad(part, f"a width that is a multiple of {FP8_BLOCK[0]}", str(rows))
    return Files(files.folder, named)


def open_files(folder: Path, config: Config) -> Files:
    """The tensors of a checkpoint folder under the names that the table of parameters uses.

    Raises:
      InputError: see `Files.open`, `official` and `integers.rename`.
    """
    files = Files.open(folder)
    return rename(official(files) if isinstance(config, V4Config) else files, config)
