"""What a model is: its architecture, read from config.json or a preset. No mesh, no dtype policy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeAlias

from dsjax.config import dense, v3, v4
from dsjax.config.dense import DenseConfig, Llama3Rope
from dsjax.config.fields import Fields, Quantization, Yarn, read_json_object, token_ids
from dsjax.config.integers import IntegerQuantization
from dsjax.config.v3 import Indexer, V3Config
from dsjax.config.v4 import V4Config
from dsjax.errors import InputError
from dsjax.presets import PRESETS, preset

Config: TypeAlias = V3Config | V4Config | DenseConfig
ExpertConfig: TypeAlias = V3Config | V4Config
"""Of the families with routed experts."""

__all__ = [
    "Config",
    "DenseConfig",
    "ExpertConfig",
    "Indexer",
    "IntegerQuantization",
    "Llama3Rope",
    "Quantization",
    "V3Config",
    "V4Config",
    "Yarn",
    "load_config",
    "parse_config",
    "read_json_object",
    "token_ids",
]


def parse_config(data: dict[str, Any], where: str = "config.json") -> Config:
    """Config from the content of a config.json.

    Args:
      data: the JSON object, in Hugging Face's spelling.
      where: what to call it in messages.

    Raises:
      InputError: naming the field, what was expected and what was found.
    """
    types = (*v3.MODEL_TYPES, v4.MODEL_TYPE, *dense.MODEL_TYPES)
    model_type = Fields(data, where).choice("model_type", types)
    if model_type == v4.MODEL_TYPE:
        return v4.parse_v4(data, where)
    return dense.parse_dense(data, where) if model_type in dense.MODEL_TYPES else v3.parse_v3(data, where)


def load_config(model: str | Path) -> Config:
    """Config of a checkpoint folder, or of a preset by its name.

    Raises:
      InputError: if it is neither, or the config is not one this code base runs.
    """
    folder = Path(model)
    if os.path.isdir(folder):  # False, not OSError, for a name that cannot be one
        path = folder / "config.json"
        return parse_config(read_json_object(path), str(path))
    if str(model) in PRESETS:
        return parse_config(preset(str(model)), str(model))
    raise InputError(f"{model}: expected a checkpoint folder or a preset ({', '.join(PRESETS)}), found neither")
