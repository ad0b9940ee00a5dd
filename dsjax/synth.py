"""Checkpoints of any preset at any depth or width, random weights, in the official file format."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsjax.checkpoint.agreement import SCALE_SUFFIX
from dsjax.checkpoint.safetensors import DTYPES
from dsjax.checkpoint.safetensors_writer import Spec, write_checkpoint_files
from dsjax.config import Config, parse_config
from dsjax.errors import InputError
from dsjax.files import check_space, new_folder
from dsjax.params import VECTOR, Row, accounting, matrix_shape, official_storage, scale_grid, table
from dsjax.presets import PRESETS, preset
from dsjax.synth_tokenizer import write_tokenizer
from quant import E4M3, quantise
from quant.qarray import scale_values

_OPTIONAL_KEYS = {"quantization_config.scale_fmt"}


def override(config: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key of a config.json in place.

    Raises:
      InputError: for a key that no preset has; a misspelt one would change nothing.
    """
    *path, last = key.split(".")
    node: Any = config
    for part in path:
        node = node.get(part) if isinstance(node, dict) else None
    known = any(last in preset(name) for name in PRESETS) if not path else isinstance(node, dict) and last in node
    if not isinstance(node, dict) or not (known or key in _OPTIONAL_KEYS):
        raise InputError(f"--set {key}: expected a field of config.json, found no such field")
    node[last] = value


def synth_config(name: str, *, layers: int | None = None, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    """The config.json of a synthetic checkpoint.

    Args:
      name: a preset.
      layers: depth; the dense prefix shrinks where needed, so that one mixture-of-experts layer remains.
      settings: dotted keys to override.
    """
    config = preset(name)
    config["bos_token_id"], config["eos_token_id"] = 0, 1  # the synthetic tokenizer's
    if layers is not None:
        config["num_hidden_layers"] = layers
        config["first_k_dense_replace"] = min(config["first_k_dense_replace"], max(layers - 1, 0))
    for key, value in (settings or {}).items():
        override(config, key, value)
    return config


def _random(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Standard normal float32; a tensor's values depend on its name, shape and the seed only."""
    generator = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
    return generator.standard_normal(shape, dtype=np.float32)


@partial(jax.jit, static_argnames=("block", "pow2"))
def _quantise(w: jax.Array, block: tuple[int, int], pow2: bool) -> tuple[jax.Array, jax.Array]:
    """E4M3 codes and float32 scales; V3.1 too publishes its powers of two in float32."""
    q = quantise(w, E4M3, block, pow2=pow2)
    return q.codes, scale_values(q.scales)


def _values(row: Row, name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Weights that keep activations near one: matrices by fan-in, gains around one, small router biases."""
    x = _random(name, shape, seed)
    if row.storage == VECTOR:
        return x * 0.05 if row.path[-1] == "bias" else 1 + x * 0.1
    return x if row.path[-1] == "embed" else x * shape[-1] ** -0.5


def _tensors(config: Config) -> Iterator[tuple[int, Row, str, str]]:
    """(layer, row, name, source name) of every weight; a copy is drawn under its original's name."""
    originals = {row.path: row for row in table(config)}
    for row in originals.values():
        for index, name in row.tensors():
            layer = row.layers[index[0]] if row.layers else -1
            yield layer, row, name, originals[row.copy_of].name if row.copy_of else name


def synthesise(out: Path, config_json: dict[str, Any], *, template: str = "deepseek-v3", seed: int = 0) -> None:
    """Writes a checkpoint folder: config.json, shards, index, and a tokenizer where the vocabulary has room.

    Args:
      out: the folder.
      config_json: from `synth_config`.
      template: the preset whose chat template the tokenizer gets.
      seed: of the weights.

    Memory is bounded by one tensor. The folder appears whole or not at all.

    Raises:
      InputError: for an impossible config, or a folder that cannot be written.
    """
    config = parse_config(config_json, "--set")
    check_space(out, accounting(config)["bytes"])  # before listing what may be millions of tensors
    order = sorted(_tensors(config), key=lambda t: t[0])
    specs: list[Spec] = []
    for _, row, name, _ in order:
        shape = matrix_shape(row, config)
        stored = official_storage(row, config)
        names = {"e4m3": "F8_E4M3", "bf16": "BF16", "f32": "F32"}
        specs.append(Spec(name, DTYPES[names[stored.format]], shape))
        if stored.scales and config.quantization:
            specs.append(Spec(name + SCALE_SUFFIX, DTYPES["F32"], scale_grid(shape, config.quantization.block)))

    def arrays() -> Iterator[np.ndarray]:
        for _, row, _, source in order:
            values = _values(row, source, matrix_shape(row, config), seed)
            stored = official_storage(row, config)
            if stored.scales and config.quantization:
                codes, scales = _quantise(values, config.quantization.block, config.quantization.pow2)
                yield np.asarray(codes).view(DTYPES["F8_E4M3"])
                yield np.asarray(scales)
            else:
                yield values.astype(DTYPES["F32" if stored.format == "f32" else "BF16"])

    with new_folder(out) as folder:
        write_checkpoint_files(folder, specs, arrays())
        write_tokenizer(folder, config.vocab_size, template)
        (folder / "config.json").write_text(json.dumps(config_json, indent=2) + "\n", encoding="utf-8")
