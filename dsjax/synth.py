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

from dsjax.checkpoint.safetensors import DTYPES
from dsjax.checkpoint.safetensors_writer import Spec, write_checkpoint_files
from dsjax.config import Config, IntegerQuantization, parse_config
from dsjax.errors import InputError
from dsjax.files import check_space, new_folder
from dsjax.params import (
    INTEGER,
    Row,
    Stored,
    accounting,
    is_mtp,
    matrix_shape,
    official_storage,
    scale_grid,
    table,
)
from dsjax.presets import PRESETS, preset
from dsjax.synth_chat import write_encoding
from dsjax.synth_tokenizer import write_tokenizer
from quant import E2M1, E4M3, Format, quantise
from quant.qarray import scale_values

_OPTIONAL_KEYS = {"quantization_config.scale_fmt"}
_FORMATS = {"e4m3": E4M3, "e2m1": E2M1}
_TYPES = {"e4m3": "F8_E4M3", "e2m1": "I8", "e8m0": "F8_E8M0", "bf16": "BF16", "f32": "F32", "i32": "I64"}


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
      layers: depth; the prefix of dense or hashed layers shrinks where needed, so that one layer that scores its
        experts remains. V4's kinds of attention are the preset's first ones, and go on in turns where there are more.
      settings: dotted keys to override.
    """
    config = preset(name)
    config["bos_token_id"], config["eos_token_id"] = 0, 1  # the synthetic tokenizer's
    if layers is not None:
        for prefix in ("num_hash_layers", "first_k_dense_replace"):
            if prefix in config:
                config[prefix] = min(config[prefix], max(layers - 1, 0))
        if "compress_ratios" in config:
            config["compress_ratios"] = _ratios(config["compress_ratios"], config["num_hidden_layers"], layers)
        config["num_hidden_layers"] = layers
    for key, value in (settings or {}).items():
        override(config, key, value)
    return config


def _ratios(published: list[int], depth: int, layers: int) -> list[int]:
    """Compression ratios of `layers` layers and of the MTP module; past the published ones, the last two in turns."""
    main = published[:depth]
    while len(main) < layers:
        main.append(main[-2])
    return main[:layers] + published[depth : depth + 1]


def _generator(name: str, seed: int) -> np.random.Generator:
    """A tensor's values depend on its name, shape and the seed only."""
    return np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))


@partial(jax.jit, static_argnames=("fmt", "block", "pow2"))
def _quantise(w: jax.Array, fmt: Format, block: tuple[int, int], pow2: bool) -> tuple[jax.Array, jax.Array]:
    """Codes, packed where the format is, and scales: float32, or E8M0 codes for powers of two."""
    q = quantise(w, fmt, block, pow2=pow2)
    return q.codes, q.scales


def _ids(name: str, shape: tuple[int, ...], experts: int, seed: int) -> np.ndarray:
    """int64 ids of experts, distinct in each row; a few rows at a time are shuffled whole."""
    generator, ids = _generator(name, seed), np.empty(shape, np.int64)
    for start in range(0, shape[0], 4096):
        part = ids[start : start + 4096]
        part[...] = generator.permuted(np.tile(np.arange(experts), (len(part), 1)), axis=1)[:, : shape[1]]
    return ids


# (mean, deviation) of what is no matrix, by the last part of its path; gains are the rest of the vectors. Streams are
# mixed by what is far from both a permutation and an average: their logits have a deviation of about 0.7.
_SPREAD = {"bias": (0, 0.05), "sink": (0, 1), "position": (0, 0.5), "base": (0, 0.5), "scale": (0.5, 0.05)}


def _values(row: Row, name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Weights that keep activations near one: matrices by fan-in, gains around one, small router biases."""
    x = _generator(name, seed).standard_normal(shape, dtype=np.float32)
    kind = row.path[-1]
    if len(shape) == 1 or kind == "position":
        mean, deviation = _SPREAD.get("bias" if kind.endswith("_bias") else kind, (1, 0.1))
        return mean + x * np.float32(deviation)
    return x if kind == "embed" else x * shape[-1] ** -0.5


def _tensors(config: Config) -> Iterator[tuple[tuple[bool, int], Row, str, str]]:
    """(place in the files, row, name, source name) of every weight; a copy is drawn under its original's name."""
    originals = {row.path: row for row in table(config)}
    for row in originals.values():
        for index, name in row.tensors():
            layer = row.layers[index[0]] if row.layers else -1
            yield (is_mtp(row), layer), row, name, originals[row.copy_of].name if row.copy_of else name


def _scale_type(stored: Stored) -> np.dtype:
    return DTYPES[_TYPES[stored.scales or "f32"]]


def official_specs(row: Row, name: str, config: Config) -> Iterator[Spec]:
    """What a checkpoint as DeepSeek writes it has of one weight: itself and its scales."""
    shape, stored = matrix_shape(row, config), official_storage(row, config)
    if stored.format == "e2m1":
        if shape[-1] % 2:
            raise InputError(f"--set: tensor {name}: expected an even width for FP4, found {list(shape)}")
        yield Spec(name, DTYPES["I8"], (*shape[:-1], shape[-1] // 2))
    else:
        yield Spec(name, DTYPES[_TYPES[stored.format]], shape)
    if stored.scales:
        yield Spec(row.scale_name(name), _scale_type(stored), scale_grid(shape, stored.block))


def _arrays(row: Row, source: str, config: Config, seed: int) -> Iterator[np.ndarray]:
    """The values of `official_specs`."""
    shape, stored = matrix_shape(row, config), official_storage(row, config)
    if row.storage == INTEGER:
        yield _ids(source, shape, config.n_routed_experts, seed)
        return
    values = _values(row, source, shape, seed)
    if stored.scales and config.quantization:
        # V3.1 too has powers of two, and publishes them in float32.
        pow2 = stored.scales == "e8m0" or config.quantization.pow2
        codes, scales = _quantise(values, _FORMATS[stored.format], stored.block, pow2)
        yield np.asarray(codes).view(DTYPES[_TYPES[stored.format]])
        yield np.asarray(scales if stored.scales == "e8m0" else scale_values(scales)).view(_scale_type(stored))
    else:
        yield values.astype(DTYPES[_TYPES[stored.format]])


def synthesise(out: Path, config_json: dict[str, Any], *, template: str = "deepseek-v3", seed: int = 0) -> None:
    """Writes a checkpoint folder: config.json, shards, index, and a tokenizer where the vocabulary has room.

    Args:
      out: the folder.
      config_json: from `synth_config`.
      template: the preset whose conversation format it gets: tokens, and chat template or `encoding/` folder.
      seed: of the weights.

    Memory is bounded by one tensor. The folder appears whole or not at all.

    Raises:
      InputError: for an impossible config, or a folder that cannot be written.
    """
    config = parse_config(config_json, "--set")
    if isinstance(config.quantization, IntegerQuantization):
        raise InputError(
            "--set quantization_config: expected FP8 or null, found integers; `dsjax convert` writes those"
        )
    check_space(out, accounting(config)["bytes"])  # before listing what may be millions of tensors
    order = sorted(_tensors(config), key=lambda t: t[0])
    specs = [spec for _, row, name, _ in order for spec in official_specs(row, name, config)]
    arrays = (array for _, row, _, source in order for array in _arrays(row, source, config, seed))
    with new_folder(out) as folder:
        write_checkpoint_files(folder, specs, arrays)
        write_tokenizer(folder, config.vocab_size, template)
        write_encoding(folder, template)
        (folder / "config.json").write_text(json.dumps(config_json, indent=2) + "\n", encoding="utf-8")
