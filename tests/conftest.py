"""Sixteen virtual CPU devices, programs compiled quickly; shapes and dtypes of public functions checked at run time.

All of it before JAX starts."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

# Most of the tests' time is the compiler's: a third of it with these. What the environment says comes later and holds.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 "
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=16"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from jaxtyping import install_import_hook

install_import_hook(["quant", "dsjax.layers", "dsjax.cache", "dsjax.sampling"], "beartype.beartype")


@pytest.fixture(scope="session")
def v4_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny V4 checkpoint as DeepSeek writes it, layers of all kinds and an MTP module; copy it to change it."""
    from helpers import V4_SETTINGS

    from dsjax.synth import synth_config, synthesise

    folder = tmp_path_factory.mktemp("v4") / "model"
    config = synth_config("deepseek-v4-flash", layers=5, settings=V4_SETTINGS)
    synthesise(folder, config, template="deepseek-v4-flash")
    return folder


LONG = (
    *(
        "test_parallel",
        "test_export",
        "test_v4_laws",
        "test_emulator_v4",
        "test_aot",
        "test_v4_native",
        "test_parallel_native",
        "test_v32_laws",
        "test_operators_in_models",
    ),
    *(
        "test_full_size",
        "test_v4_full_size",
        "test_int8_model",
        "test_parity_live",
        "test_laws",
        "test_many_processes",
        "test_processes",
    ),
)
"""Files of few tests that take minutes, by no means all in order."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, where several processes take a file each: else the last one runs alone at the end."""
    place = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


MAX_MAPPINGS = 30_000
"""Memory mappings of a process before compiled programs are dropped. A V4 program takes about 300 a layer; Linux gives
a process 65,530, and with none left LLVM aborts."""


@pytest.fixture(autouse=True)
def few_mappings() -> Iterator[None]:
    """Drops compiled programs before the process runs out of memory mappings; looks only after tests that compiled."""
    start = time.perf_counter()
    yield
    if time.perf_counter() - start > 1:
        maps = Path("/proc/self/maps")
        if maps.exists() and maps.read_bytes().count(b"\n") > MAX_MAPPINGS:
            jax.clear_caches()
            gc.collect()
