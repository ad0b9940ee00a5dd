"""Checkpoints in INT8 and INT4, written and emulated in NumPy from the formats' description alone."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import emulator as em
import ml_dtypes
import numpy as np

TINY = np.float32(2.0**-126)
KINDS = ("int8-channel", "int8-block", "int4-group", "w4a8", "w4a8-mixed")
ACTIVATIONS = {"int8-channel": 0, "int8-block": 128, "w4a8": 0, "w4a8-mixed": 0}
"""Channels under one scale of the activations, 0 for whole rows; weights alone where there is no entry."""

_TYPES = {
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int8": "I8",
    "uint8": "U8",
    "int32": "I32",
    "int64": "I64",
}


@dataclasses.dataclass(frozen=True)
class Integers:
    """A weight: int codes [N, K], float32 scales [ceil(N/bn), ceil(K/bk)]; as an array its values."""

    codes: np.ndarray
    scales: np.ndarray
    block: tuple[int, int]

    def spread(self) -> np.ndarray:
        """float32 [N, K]: every code's scale."""
        n, k = self.codes.shape
        return np.repeat(np.repeat(self.scales, self.block[0], 0)[:n], self.block[1], 1)[:, :k]

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return (self.codes.astype(np.float32) * self.spread()).astype(dtype or np.float32)


def integers(w: np.ndarray, kind: str, scales: Any = np.float32) -> Integers:
    """float32 [N, K] by absolute maxima: "int8-channel", "int8-block" or "int4"."""
    n, k = w.shape
    block, top = {"int8-channel": ((1, k), 127), "int8-block": ((128, 128), 127), "int4": ((1, 128), 7)}[kind]
    found = np.empty((-(-n // block[0]), -(-k // block[1])), np.float32)
    for i, j in np.ndindex(found.shape):
        found[i, j] = np.abs(w[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]).max()
    found = np.maximum(found / np.float32(top), TINY).astype(scales).astype(np.float32)
    spread = Integers(np.empty((n, k)), found, block).spread()
    return Integers(np.clip(np.rint(w / spread), -top, top).astype(np.int8), found, block)


def pack(codes: np.ndarray) -> np.ndarray:
    """INT4 codes [N, K] as int32 [N, ceil(K/8)]: code + 8, the first channel in the lowest bits; zero bits beyond K."""
    padded = np.pad(codes.astype(np.int64) + 8, ((0, 0), (0, -codes.shape[1] % 8)))
    words = (padded.reshape(len(codes), -1, 8) << (4 * np.arange(8))).sum(-1)
    return words.astype(np.uint32).view(np.int32)


def quantise_rows(x: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 [T, K] -> int codes [T, K] and float32 scales [T, K]: by |x|'s maximum over rows, or groups of them."""
    scales = np.empty_like(x)
    for start in range(0, x.shape[1], group or x.shape[1]):
        part = slice(start, start + (group or x.shape[1]))
        amax = np.abs(x[:, part]).max(1, keepdims=True)
        scales[:, part] = np.maximum(amax / np.float32(127), TINY)
    return np.rint(x / scales).astype(np.int64), scales


def product(x: np.ndarray, w: Integers, group: int) -> np.ndarray:
    """float32 [T, K] quantised, times w: integer sums of channels that share scales, scaled and added in float64."""
    codes, scales = quantise_rows(x, group)
    width = min(w.block[1], group or x.shape[1])
    total = np.zeros((len(x), len(w.codes)))
    for start in range(0, x.shape[1], width):
        part = slice(start, start + width)
        sums = codes[:, part] @ w.codes[:, part].astype(np.int64).T
        total += sums * w.spread()[:, start].astype(np.float64) * scales[:, start, None].astype(np.float64)
    return total.astype(np.float32)


@contextmanager
def emulating(group: int | None) -> Iterator[None]:
    """The emulator with activations quantised before every linear layer whose weight is in integers."""
    linear = em.linear

    def quantising(x: np.ndarray, w: Any, policy: em.Policy = em.NATIVE) -> np.ndarray:
        if group is None or not isinstance(w, Integers):
            return linear(x, w, policy)
        return policy.round(product(em.f32(x).reshape(-1, x.shape[-1]), w, group).reshape(*x.shape[:-1], -1))

    em.linear = quantising
    try:
        yield
    finally:
        em.linear = linear


# --- files -----------------------------------------------------------------------------------------------------------


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file."""
    header, at = {}, 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": _TYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(a.tobytes() for a in tensors.values()))


def _arguments(bits: int, token: bool) -> dict[str, Any]:
    strategy = "token" if token else "channel" if bits == 8 else "group"
    size = 128 if strategy == "group" else None
    return {
        "num_bits": bits,
        "type": "int",
        "strategy": strategy,
        "group_size": size,
        "symmetric": True,
        "dynamic": token,
    }


def quantization_config(kind: str, ignore: list[str]) -> dict[str, Any]:
    """What config.json says of each kind."""
    if kind == "int8-block":
        settings = {"quant_method": "blockwise_int8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
        return settings | {"ignored_layers": ignore}
    token = None if kind == "int4-group" else _arguments(8, True)

    def group(bits: int, *targets: str, **more: str) -> dict[str, Any]:
        return {"targets": list(targets), "weights": _arguments(bits, False), "input_activations": token, **more}

    if kind == "w4a8-mixed":
        packed = group(4, r"re:.*\.experts\.\d+\.", format="pack-quantized")
        groups = {"group_0": packed, "group_1": group(8, "Linear", format="int-quantized")}
        layout = "mixed-precision"
    else:
        groups = {"group_0": group(8 if kind == "int8-channel" else 4, "Linear")}
        layout = "int-quantized" if kind == "int8-channel" else "pack-quantized"
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups, "ignore": ignore}


def of_kind(name: str, kind: str) -> str:
    """How `integers` makes a tensor of a checkpoint of this kind."""
    if kind == "w4a8-mixed":
        return "int4" if re.search(r"\.experts\.\d+\.", name) else "int8-channel"
    return kind if kind.startswith("int8") else "int4"


def integer_checkpoint(
    source: Path,
    out: Path,
    kind: str,
    *,
    scales: Any = np.float32,
    change: Callable[[dict[str, np.ndarray], dict[str, Any]], None] = lambda tensors, config: None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Writes a checkpoint, E4M3 or of floats, in integers.

    Args:
      source: the checkpoint.
      out: a folder that does not exist.
      kind: one of KINDS.
      scales: type of the scales.
      change: may damage tensors and config before they are written.

    Returns:
      Weights by name for the emulator, and the config.
    """
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    weights, config = em.load_folder(source)
    suffix = "_scale_inv" if any(name.endswith("_scale_inv") for name in weights) else None
    kept: dict[str, Any] = {}
    tensors: dict[str, np.ndarray] = {}
    ignore = []
    for name, array in weights.items():
        if name.endswith("_scale_inv"):
            continue
        module = name.removesuffix(".weight")
        linear = name + suffix in weights if suffix else name.endswith("_proj.weight")
        if not linear:
            kept[name] = tensors[name] = array
            if array.ndim == 2:
                ignore.append(module)
            continue
        w = em.dequantise(array, weights[name + suffix]) if suffix else em.f32(array)
        how = of_kind(name, kind)
        kept[name] = made = integers(w, how, scales)
        written = made.scales.astype(scales)
        if how == "int4":
            tensors[f"{module}.weight_packed"], tensors[f"{module}.weight_scale"] = pack(made.codes), written
            tensors[f"{module}.weight_shape"] = np.int64(w.shape)
        else:
            tensors[name] = made.codes
            tensors[f"{module}.weight_scale" + ("_inv" if how == "int8-block" else "")] = written
    config["quantization_config"] = quantization_config(kind, ignore)
    change(tensors, config)
    write_tensors(out / "model.safetensors", tensors)
    (out / "config.json").write_text(json.dumps(config))
    return kept, config


def bfloat16() -> Any:
    """The type's NumPy name."""
    return ml_dtypes.bfloat16
