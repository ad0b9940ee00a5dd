"""The switchboard: every named operator, its variants, and which of them a program takes."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from dsjax.errors import InputError
from dsjax.numerics import Numerics
from dsjax.plugin import KNOWN
from quant.operator import OPERATORS, Operator, find

_MODULES = (
    "quant.formats",
    "quant.qarray",
    "quant.matmul",
    "quant.int8",
    "quant.transforms",
    "quant.grouped",
    "dsjax.cache.rows",
    "dsjax.layers.norm",
    "dsjax.layers.rope",
    "dsjax.layers.mla",
    "dsjax.layers.indexer",
    "dsjax.layers.gqa",
    "dsjax.layers.streams",
    "dsjax.layers.compressor",
    "dsjax.layers.sparse_attention",
    "dsjax.layers.top_k",
    "dsjax.layers.gate",
    "dsjax.layers.swiglu",
    "dsjax.layers.grouped_matmul",
)
"""Those that define operators."""

PLATFORMS = ("cpu", "cuda", "tpu")
"""Whose choices are shown without being asked for."""

EXPORT = "generic"
"""The platform of exported programs, which is none in particular."""

FORM = "form"
"""Name of the first variant of products with stored weights: they are written in the form that a platform's compiler
likes (`quant.Form`), which `Numerics.for_platform` says."""


def operators() -> list[Operator[Any, Any]]:
    """All named operators, by name."""
    for module in _MODULES:
        importlib.import_module(module)
    return [OPERATORS[name] for name in sorted(OPERATORS)]


def form_of(platform: str) -> str:
    """How products are written for a platform unless a variant is chosen: "fused" or "tiled"."""
    return "tiled" if platform == EXPORT else Numerics().for_platform(platform).products


def describe(variant: str, platform: str) -> str:
    """A variant's name, and what it means where that depends on the platform: "form: tiled"."""
    return f"{FORM}: {form_of(platform)}" if variant == FORM else variant


def report(platform: str) -> dict[str, str]:
    """What a run should say of its operators: those with another variant than the first; all on a plugin's platform."""
    variants = {operator.name: operator.chosen_for(platform) for operator in operators()}
    every = platform not in KNOWN
    return {
        name: describe(variant, platform)
        for name, variant in variants.items()
        if every or variant != next(iter(find(name).variants))
    }


def listing(platforms: Iterable[str], platform: str) -> list[dict[str, Any]]:
    """Every operator for JSON: `name`, `says`, `variants` (`name`, `bound`, `says`), the variant that each of the
    `platforms` takes, and what is `chosen` here for `platform`."""
    return [
        {
            "name": operator.name,
            "says": next(iter(operator.variants.values())).says,
            "variants": [
                {"name": v.name, "bound": v.bound, "says": v.says, "from": v.body.__module__}
                for v in operator.variants.values()
            ],
            "platforms": {name: describe(operator.default(name), name) for name in platforms},
            "chosen": describe(operator.chosen_for(platform), platform),
        }
        for operator in operators()
    ]


def named_platforms() -> tuple[str, ...]:
    """Those of `PLATFORMS`, that of exports, and every other for which an operator takes a variant of its own."""
    own = {platform for operator in operators() for platform in operator.platforms}
    return (*PLATFORMS, EXPORT, *sorted(own - {*PLATFORMS, EXPORT}))


def check_choices(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Variant by operator.

    Raises:
      InputError: for an operator or a variant that is not known, and for two variants of one operator.
    """
    operators()
    choices: dict[str, str] = {}
    for name, variant in pairs:
        try:
            find(name).check(variant)
        except ValueError as e:
            raise InputError(f"--op {name}={variant}: {e}") from None
        if choices.setdefault(name, variant) != variant:
            raise InputError(f"--op {name}={variant}: expected one variant of {name}, found {choices[name]}, too")
    return choices


def load_module(where: str) -> ModuleType:
    """Imports a module that the user names, which registers variants (docs/operators.md). A file is run once.

    Args:
      where: the name of a module that Python finds, or a path that ends in .py.

    Raises:
      InputError: if there is no such module, or for what it raises.
    """
    operators()  # the names that it adds to
    is_file = where.endswith(".py")
    if is_file and not Path(where).is_file():
        raise InputError(f"--op-module {where}: expected a file, found none")
    try:
        return _run_file(Path(where)) if is_file else importlib.import_module(where)
    except (Exception, SystemExit) as e:
        if isinstance(e, ModuleNotFoundError) and e.name and f"{where}.".startswith(f"{e.name}."):
            raise InputError(
                f"--op-module {where}: expected a module, or a path that ends in .py, found none"
            ) from None
        raise InputError(f"--op-module {where}: {type(e).__name__}: {str(e)[:300]}") from None


def _run_file(path: Path) -> ModuleType:
    name = f"operators_of_{path.stem}_{zlib.crc32(bytes(path.resolve())):08x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
