"""The config.json of a result, so that this project, Hugging Face's and vLLM-like loaders know what the tensors are."""

from __future__ import annotations

from typing import Any

from dsjax.config import Config, IntegerQuantization
from dsjax.convert.plan import Job, Plan
from dsjax.convert.targets import INT4_GROUP, Target
from dsjax.errors import InputError
from dsjax.params import EXPERT, FP8_BLOCK, LINEAR, MATRIX

_DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}

FLOATS = frozenset(_DTYPES)
INTEGERS = frozenset(("int8", "int4"))

_TOKENS = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
"""Activations quantised for each token, as they come."""


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _formats(plan: Plan) -> tuple[dict[str, set[str]], list[str]]:
    """Element formats in the result, by storage class, and what is left in floats of the quantised classes."""
    formats: dict[str, set[str]] = {LINEAR: set(), EXPERT: set()}
    floats = []
    for job in plan.jobs:
        part = job.parts[0]
        if part.storage in formats:
            element = job.encoding.element if job.encoding else part.element
            formats[part.storage].add(element)
            if element in _DTYPES:
                floats.append(_module(job.codes.name))
    return formats, floats


def _matrices(plan: Plan) -> list[str]:
    """Modules with a matrix that no target quantises, but for the embedding, which is looked up."""
    found = []
    for job in plan.jobs:
        part = job.parts[0]
        if part.row is not None and part.storage == MATRIX and part.row.path[-1] != "embed":
            found.append(_module(job.codes.name))
    return found


def _with_head(modules: list[str], plan: Plan) -> list[str]:
    """A list of modules left in floats: loaders leave the head alone by themselves only where no list is given.

    Of a model whose head is its embedding, under the name that loaders give the module.
    """
    rows = ((job, job.parts[0].row) for job in plan.jobs)
    head = next((_module(job.codes.name) for job, row in rows if row and row.path == ("head",)), "lm_head")
    return modules if head in modules else [head, *modules]


def _pow2(job: Job, old: dict[str, Any]) -> bool:
    """Whether a weight's scales, if it has any, are known to be powers of two."""
    if job.encoding is not None:
        return job.encoding.pow2 or job.encoding.scales is None
    return all(p.scales is None or p.source.pow2 or old.get("scale_fmt") == "ue8m0" for p in job.parts)


def _compressed_tensors(target: Target, ignore: list[str]) -> dict[str, Any]:
    weights: dict[str, Any] = {"num_bits": 8, "type": "int", "strategy": "channel", "group_size": None}
    if target.name != "int8-channel":
        weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": INT4_GROUP}
    group = {
        "targets": ["Linear"],
        "weights": {**weights, "symmetric": True, "dynamic": False},
        "input_activations": None if target.name == "int4-group" else dict(_TOKENS),
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if target.name == "int8-channel" else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
        "kv_cache_scheme": None,
    }


def _fp8(target: Target, floats: list[str], v4: bool, old: dict[str, Any], plan: Plan) -> dict[str, Any]:
    section: dict[str, Any] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": list(FP8_BLOCK),
    }
    pow2 = target.name in ("fp8-ue8m0", "mxfp4") or (target.kind == "float" and old.get("scale_fmt") == "ue8m0")
    if pow2 and all(_pow2(job, old) for job in plan.jobs):
        section["scale_fmt"] = "ue8m0"
    elif v4:
        section["scale_fmt"] = "float"
    if floats:
        section["modules_to_not_convert"] = _with_head(floats, plan)
    return section


def _undescribed(found: set[str]) -> InputError:
    return InputError(
        f"--only: expected formats that one quantization_config describes, found {' and '.join(sorted(found))}"
    )


def check_described(config: Config, plan: Plan) -> None:
    """Refuses integers that a result's config does not describe, and floats that it takes for integers.

    Args:
      config: parsed from the result's config.json.
      plan: what is written.

    Raises:
      InputError: naming a tensor.
    """
    said = config.quantization
    for job in plan.jobs:
        part = job.parts[0]
        if part.storage not in (LINEAR, EXPERT):
            continue
        held = job.encoding or part.source
        found = held.element + "-block" * (held.element == "int8" and held.block == FP8_BLOCK)
        wanted = None
        if isinstance(said, IntegerQuantization):
            wanted = said.format_of(_module(job.codes.name.removesuffix("_packed")))
        if found != wanted and (held.integers or wanted is not None):
            raise InputError(
                f"--only: expected formats that one quantization_config describes, "
                f"found {found} in {job.codes.name}, which it calls {wanted or 'floats'}"
            )


def rewritten(data: dict[str, Any], plan: Plan, target: Target, *, v4: bool) -> dict[str, Any]:
    """The source's config.json, changed to describe the result.

    Args:
      data: the source's.
      plan, target: what is written.
      v4: whether experts may be FP4, and E8M0 the type of scales.

    Raises:
      InputError: if one config cannot describe the formats that would be left side by side.
    """
    formats, floats = _formats(plan)
    found = formats[LINEAR] | formats[EXPERT]
    integers = found & INTEGERS
    result = {k: v for k, v in data.items() if k not in ("quantization_config", "expert_dtype")}
    old = data.get("quantization_config") or {}
    quantised = found - set(_DTYPES)
    if integers and (integers != quantised or (target.kind == "int" and len(integers) > 1)):
        raise _undescribed(found)
    if target.kind == "int":
        if target.name == "int8-block":
            section: dict[str, Any] = {
                "activation_scheme": "dynamic",
                "quant_method": "blockwise_int8",
                "weight_block_size": list(FP8_BLOCK),
            }
            if floats:
                section["ignored_layers"] = _with_head(floats, plan)
        else:
            section = _compressed_tensors(target, _with_head(_matrices(plan) + floats, plan))
        return {**result, "quantization_config": section}
    if target.kind == "float":
        key = "dtype" if "dtype" in data else "torch_dtype"
        result[key] = _DTYPES[target.name]
    if not quantised:
        return result
    if integers:
        key = "ignored_layers" if old.get("quant_method") == "blockwise_int8" else "ignore"
        ignored = list(old.get(key) or [])
        more = [name for name in floats if name not in set(ignored)]
        listed = _with_head(ignored + more, plan) if more else ignored
        return {**result, "quantization_config": {**old, key: listed}}
    if not v4 and not any(name in data for name in ("first_k_dense_replace", "kv_lora_rank")):
        floats = _with_head(floats, plan)  # of a dense model, whose loaders do not take that for granted
    section = _fp8(target, floats, v4, old, plan)
    if v4 and formats[EXPERT]:
        nested = "expert_dtype" in old
        value = "fp4" if "e2m1" in formats[EXPERT] else "fp8" if "e4m3" in formats[EXPERT] else None
        if value is not None:
            (section if nested else result)["expert_dtype"] = value
    return {**result, "quantization_config": section}
