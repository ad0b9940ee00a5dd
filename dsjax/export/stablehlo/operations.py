"""What one operation is: its types and bytes, what a compiler may stumble over, and the name scopes it stands in."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxlib.mlir import ir

from dsjax.export.stablehlo.artifact import attribute_names
from dsjax.export.stablehlo.loops import comparison, terminator

COLLECTIVES = ("all_gather", "all_reduce", "all_to_all", "collective_broadcast", "collective_permute", "reduce_scatter")
_STRUCTURE = re.compile(r"while|body|cond|closed_call|checkpoint|shmap_body|shard_map|branch_\d+_fun|p?jit|\w+:|")


def elements(types: Any) -> list[Any]:
    """The types that have elements: tensors, not tokens."""
    return [t for t in types if isinstance(t, ir.ShapedType)]


def bits(element: Any) -> int:
    """Bits of one element of an MLIR element type; a complex one has two."""
    return 2 * bits(ir.ComplexType(element).element_type) if isinstance(element, ir.ComplexType) else element.width


_NUMPY = {
    "f32": "float32",
    "bf16": "bfloat16",
    "f16": "float16",
    "f64": "float64",
    "i1": "bool",
    "f8E4M3FN": "float8_e4m3fn",
    "f8E5M2": "float8_e5m2",
    "f8E8M0FNU": "float8_e8m0fnu",
    "f4E2M1FN": "float4_e2m1fn",
}


def numpy_dtype(element: Any) -> np.dtype:
    """The NumPy (or ml_dtypes) type of an MLIR element type."""
    name = str(element)
    found = _NUMPY.get(name) or (f"uint{name[2:]}" if name.startswith("ui") else f"int{name[1:]}")
    return np.dtype(jnp.dtype(found))


def tensor_bytes(type_: Any) -> int:
    """Bytes of a static tensor, narrow elements packed and booleans in a byte each; 0 if it is dynamic."""
    if not type_.has_static_shape:
        return 0
    width = bits(type_.element_type)
    return -(-math.prod(type_.shape) * (8 if width == 1 else width) // 8)


def _kind_of_dot(operation: Any) -> str:
    operands, results = elements(o.type for o in operation.operands), elements(r.type for r in operation.results)
    return f"{'x'.join(str(t.element_type) for t in operands)}->{results[0].element_type}"


def features(operation: Any) -> Iterator[str]:
    """What a compiler may stumble over beyond an operator's name: `sort:stable`, `dot_general:i8xi8->i32`."""
    name, attributes = operation.name, operation.attributes
    short = name.removeprefix("stablehlo.")
    if name in ("stablehlo.dot_general", "stablehlo.convert"):
        yield f"{short}:{_kind_of_dot(operation)}"
    elif name == "stablehlo.custom_call":
        yield f"custom_call:{attributes['call_target_name'].value}"
    elif name == "stablehlo.composite":
        yield f"composite:{attributes['name'].value}"
    elif name in ("stablehlo.gather", "stablehlo.scatter") and "batching_dims" in str(
        attributes["_".join((*("scatter",) * (short == "scatter"), "dimension_numbers"))]
    ):
        yield f"{short}:batching"
    elif name == "stablehlo.sort":
        if str(attributes["is_stable"]) == "true":
            yield "sort:stable"
        answer = terminator(operation.regions[0].blocks[0]).operands[0].owner
        plain = isinstance(answer, ir.OpView) and answer.operation.name == "stablehlo.compare"
        yield f"sort:compare {comparison(answer.operation) if plain else 'other'}"
    types = elements(v.type for v in (*operation.operands, *operation.results))
    if not all(t.has_rank and t.has_static_shape for t in types):
        yield "dynamic shape"
    yield from (f"attribute:{attribute}" for attribute in attribute_names(operation) if "." in attribute)


def scopes(location: Any, whole: bool) -> str:
    """The name scopes of a location, without what JAX's own loops and calls add, and without the primitive's name."""
    if not isinstance(location, ir.NameLoc):
        return ""
    parts = location.name_str.split("/")
    parts = parts if whole else parts[:-1]
    if parts and re.fullmatch(r"p?jit\(.*\)", parts[0]):
        parts = parts[1:] if len(parts) > 1 or not whole else parts
    names = [re.sub(r"^p?jit\((.*)\)$", r"\1", p) for p in parts]
    return "/".join(n for n in names if not _STRUCTURE.fullmatch(n))


def collective(operation: Any) -> tuple[Any, ...]:
    """(kind, groups or pairs, element types, bytes of its operands, bytes of its results) on one device."""
    pairs = operation.name == "stablehlo.collective_permute"
    groups = np.array(operation.attributes["source_target_pairs" if pairs else "replica_groups"])
    operands, results = (elements(v.type for v in vs) for vs in (operation.operands, operation.results))
    return (
        operation.name.removeprefix("stablehlo."),
        tuple(map(tuple, groups.tolist())),
        ", ".join(sorted({str(t.element_type) for t in operands})),
        sum(map(tensor_bytes, operands)),
        sum(map(tensor_bytes, results)),
    )
