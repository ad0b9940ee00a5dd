"""Where a program calls its named operators: by which functions, how often, and with which of its own arguments."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxlib.mlir import ir

from dsjax.export.stablehlo.inventory import operator_name
from dsjax.export.stablehlo.loops import callee, functions, terminator

Names = frozenset[str]
Origins = tuple[Names, ...]

_NONE: Names = frozenset()
_PASSED = {
    f"stablehlo.{name}"
    for name in ("reshape", "slice", "dynamic_slice", "convert", "bitcast_convert", "broadcast_in_dim", "transpose")
} | {"stablehlo.gather", "stablehlo.pad", "stablehlo.dynamic_update_slice", "stablehlo.scatter"}
"""Operations whose first result is their first operand, or a part of it, or that written into."""


def digests(module: ir.Module) -> dict[str, str]:
    """By function, what it computes: the hash of its text and of the functions that it calls, whatever their names."""
    known, done = functions(module), dict[str, str]()

    def digest(name: str) -> str:
        if name not in done:
            done[name] = ""  # a function that calls itself
            head, _, body = known[name].get_asm(use_local_scope=True).partition("\n")
            head = re.sub(r"func\.func (public |private )?@[\w.$-]+", "", head)
            head = re.sub(r" \{jax\.result_info = \"[^\"]*\"\}", "", head)
            text = re.sub(r"-> \((tensor<[^()]*?>)\) \{$", r"-> \1 {", head) + body
            text = re.sub(r"@([\w.$-]+)", lambda m: f"@{digest(m[1]) if m[1] in known else m[1]}", text)
            done[name] = hashlib.sha256(text.encode()).hexdigest()
        return done[name]

    return {name: digest(name) for name in known}


class _Walker:
    """Follows a program's arguments to the named operators that take them as they are."""

    def __init__(self, module: ir.Module) -> None:
        self.functions = functions(module)
        self.sites: dict[str, list[set[str]]] = {}
        self.done: dict[tuple[str, Origins], Origins] = {}

    def function(self, name: str, origins: Origins) -> Origins:
        """Origins of the results."""
        if (name, origins) not in self.done:
            self.done[name, origins] = ()
            block = self.functions[name].regions[0].blocks[0]
            scope = dict(zip(block.arguments, origins, strict=True))
            self.done[name, origins] = self._block(block, scope)
        return self.done[name, origins]

    def _block(self, block: Any, scope: dict[Any, Names]) -> Origins:
        for inner in block.operations:
            operation = inner.operation
            given = tuple(scope.get(v, _NONE) for v in operation.operands)
            scope.update(zip(operation.results, self._results(operation, given, scope), strict=False))
        return tuple(scope.get(v, _NONE) for v in terminator(block).operands)

    def _results(self, operation: Any, given: Origins, scope: dict[Any, Names]) -> Origins:
        if operation.name in _PASSED:
            return given[:1]
        if operation.name == "stablehlo.optimization_barrier":
            return given
        if operation.name == "stablehlo.while":
            condition, body = (region.blocks[0] for region in operation.regions)
            self._block(condition, scope | dict(zip(condition.arguments, given, strict=True)))
            left = self._block(body, scope | dict(zip(body.arguments, given, strict=True)))
            return tuple(a if a == b else _NONE for a, b in zip(given, left, strict=True))
        if operation.name in ("func.call", "stablehlo.composite"):
            return self._call(operation, given)
        if operation.name in ("stablehlo.case", "stablehlo.if", "sdy.manual_computation"):
            for region in operation.regions:
                block = region.blocks[0]
                self._block(block, scope | dict(zip(block.arguments, given, strict=False)))
        return ()

    def _call(self, operation: Any, given: Origins) -> Origins:
        name = callee(operation)
        operator = operator_name(name)
        if operator is None:
            return self.function(name, given)
        for found, names in zip(self.sites.setdefault(name, [set() for _ in given]), given, strict=True):
            found.update(names)
        self.function(name, given)
        return given[:1] if operator == "write_rows" else ()


def sites(module: ir.Module, names: Sequence[str], counts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every named operator's functions in a program.

    Args:
      module: with a `main`.
      names: of its arguments.
      counts: `functions` of its inventory.

    Returns:
      `function`, `operator`, `text` and `executed`, how often it is called; `takes`: by input (in0, in1, ...) the
      program's arguments that come in there, whole or in part, without what was computed; and its `digest`.
    """
    walker = _Walker(module)
    walker.function("main", tuple(frozenset([name]) for name in names))
    found = digests(module)
    return [
        {
            "function": name,
            "operator": operator_name(name),
            "text": counts[name]["text"],
            "executed": counts[name]["executed"],
            "takes": {f"in{i}": sorted(names) for i, names in enumerate(takes) if names},
            "digest": found[name],
        }
        for name, takes in walker.sites.items()
    ]


def stands_for(
    module: ir.Module, operator: str, found: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    """For a block's entry in the manifest: functions of programs that compute what its `main` does.

    Args:
      module: the block's.
      operator: its name.
      found: `sites` by program.
    """
    digest = digests(module)["main"]
    return [
        {"program": program, **{key: site[key] for key in ("function", "text", "executed", "takes")}}
        for program, several in found.items()
        for site in several
        if (site["operator"], site["digest"]) == (operator, digest)
    ]


_ROUTING = ("num_experts_per_tok", "n_group", "topk_group", "scoring_func", "norm_topk_prob", "routed_scaling_factor")
_STREAMS = ("hc_mult", "hc_sinkhorn_iters", "hc_eps")
_HEADS = ("num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_SPARSE = ("num_attention_heads", "head_dim", "sliding_window", "compress_ratios", "index_topk")
_ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "rms_norm": ("rms_norm_eps",),
    "head_norm": ("rms_norm_eps",),
    "moe_gate": _ROUTING,
    "sqrtsoftplus_gate": _ROUTING,
    "grouped_matmul": ("num_experts_per_tok", "swiglu_limit"),
    "swiglu": ("swiglu_limit",),
    "mla": _HEADS,
    "sparse_mla": (*_HEADS, "index_topk"),
    "sparse_attention": _SPARSE,
    "lightning_indexer": ("index_n_heads", "index_head_dim", "index_topk"),
    "gqa": ("num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window"),
    "compressor": ("compress_ratios", "rms_norm_eps"),
    "hyper_connection_pre": _STREAMS,
    "hyper_connection_post": _STREAMS,
    "hyper_connection_head": _STREAMS,
}
"""Keys of config.json that an operator depends on beside its arguments."""


def attributes(entry: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """What of the model's config.json a block depends on, as far as it has it; of products with codes the block of a
    scale."""
    operator = entry["operator"]
    found = {key: config[key] for key in _ATTRIBUTES.get(operator, ()) if config.get(key) is not None}
    block = (config.get("quantization_config") or {}).get("weight_block_size")
    codes = any(a["dtype"] in ("uint8", "int8") or a["dtype"].startswith("float8") for a in entry["arguments"])
    if block and codes and operator in ("block_scaled_dot", "grouped_matmul", "mla"):
        found["weight_block_size"] = block
    return found
