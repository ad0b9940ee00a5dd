"""The model families. Each module has `step`, `draft` and `new_cache`, with one signature."""

from __future__ import annotations

from types import ModuleType

from dsjax.config import Config, V4Config
from dsjax.models import v3, v4


def family(config: Config) -> ModuleType:
    """The module that runs a model of this architecture."""
    return v4 if isinstance(config, V4Config) else v3
