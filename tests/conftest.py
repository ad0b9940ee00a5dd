"""Eight virtual CPU devices, and shapes and dtypes of public functions checked at run time. Both before JAX starts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

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
