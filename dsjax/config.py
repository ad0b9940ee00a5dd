"""What a model is: its architecture, read from config.json or a preset. No mesh, no dtype policy."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import reprlib
from pathlib import Path
from typing import Any

from dsjax.errors import InputError
from dsjax.presets import PRESETS, preset

MODEL_TYPES = ("deepseek_v2", "deepseek_v3")
_MAX_SIZE = 1 << 24  # far above any axis of any model; keeps products inside 64 bits
_MAX_EXPERTS = 1 << 16
_MIN_NUMBER, _MAX_NUMBER = 1e-30, 1e30  # what float32 holds with room to compute


@dataclasses.dataclass(frozen=True)
class Yarn:
    """Static YaRN scaling of RoPE (spec V3 2.2). `mscale*` is None where the file has no such field."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How the checkpoint's linear weights are stored: E4M3 with one scale per block (spec V3 3.3)."""

    block: tuple[int, int]
    scale_fmt: str | None

    @property
    def pow2(self) -> bool:
        """Whether scales, of activations too, are powers of two."""
        return self.scale_fmt == "ue8m0"


@dataclasses.dataclass(frozen=True)
class Config:
    """Architecture of a V2/V3-family model, in Hugging Face's field names (spec V3 1.1)."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_nextn_predict_layers: int
    first_k_dense_replace: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    scoring_func: str
    topk_method: str
    norm_topk_prob: bool
    routed_scaling_factor: float
    rms_norm_eps: float
    rope_theta: float
    yarn: Yarn | None
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    quantization: Quantization | None

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def latent_dim(self) -> int:
        """Values cached per token and layer: the latent and the shared rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """qk_head_dim^-0.5, times m^2 under YaRN (spec V3 2.2)."""
        m = 1.0
        if self.yarn is not None and self.yarn.mscale_all_dim:
            m = yarn_magnitude(self.yarn.factor, self.yarn.mscale_all_dim)
        return self.qk_head_dim**-0.5 * m * m


def yarn_magnitude(factor: float, mscale: float) -> float:
    """m(f, a) = 0.1 a ln f + 1, or 1 where f <= 1 (spec V3 2.2)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


class _Fields:
    """Typed access to a JSON object, with errors that name file, field, expected and found."""

    def __init__(self, data: dict[str, Any], where: str) -> None:
        self.data = data
        self.where = where

    def fail(self, name: str, expected: str) -> InputError:
        value = self.data.get(name)
        # reprlib stops at a depth; json.dumps would recurse into whatever nesting the file has.
        text = (reprlib.repr(value) if isinstance(value, dict | list) else json.dumps(value))[:80]
        found = text if name in self.data else "nothing"
        return InputError(f"{self.where}: field {name!r}: expected {expected}, found {found}")

    def integer(self, name: str, *, low: int = 1, high: int = _MAX_SIZE, default: int | None = None) -> int:
        value = self.data.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.fail(name, f"an integer from {low} to {high}")
        return value

    def number(self, name: str, *, low: float = _MIN_NUMBER, default: float | None = None) -> float:
        value = self.data.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= _MAX_NUMBER:
            raise self.fail(name, f"a number from {low:g} to {_MAX_NUMBER:g}")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        return None if self.data.get(name) is None else self.number(name, low=0.0)

    def choice(self, name: str, choices: tuple[Any, ...], default: Any = None) -> Any:
        value = self.data.get(name, default)
        if not any(value is c or (type(value) is type(c) and value == c) for c in choices):
            raise self.fail(name, " or ".join(json.dumps(c) for c in choices))
        return value

    def section(self, name: str) -> _Fields | None:
        value = self.data.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.fail(name, "an object")
        return _Fields(value, f"{self.where}: {name}")


def _yarn(fields: _Fields) -> Yarn | None:
    """RoPE scaling in any of its spellings: rope_scaling.type, .rope_type, or transformers 5's rope_parameters."""
    section = fields.section("rope_scaling") or fields.section("rope_parameters")
    if section is None:
        return None
    key = "rope_type" if "rope_type" in section.data else "type"
    if section.choice(key, ("yarn", "default"), default="default") == "default":
        return None
    return Yarn(
        factor=section.number("factor"),
        original_max_position_embeddings=section.integer("original_max_position_embeddings"),
        beta_fast=section.number("beta_fast", default=32.0),
        beta_slow=section.number("beta_slow", default=1.0),
        mscale=section.optional_number("mscale"),
        mscale_all_dim=section.optional_number("mscale_all_dim"),
    )


def _quantization(fields: _Fields) -> Quantization | None:
    section = fields.section("quantization_config")
    if section is None:
        return None
    section.choice("quant_method", ("fp8",))
    section.choice("fmt", ("e4m3",), default="e4m3")
    section.choice("activation_scheme", ("dynamic",), default="dynamic")
    scale_fmt = section.choice("scale_fmt", (None, "ue8m0"))
    block = section.data.get("weight_block_size")
    if block != [128, 128]:
        raise section.fail("weight_block_size", "[128, 128]")
    return Quantization((128, 128), scale_fmt)


def token_ids(data: dict[str, Any], name: str, vocab_size: int, where: str) -> tuple[int, ...]:
    """The ids in a field that holds an id, a list of ids, or nothing.

    Raises:
      InputError: for anything else, or ids outside the vocabulary.
    """
    return _token_ids(_Fields(data, where), name, vocab_size)


def _token_ids(fields: _Fields, name: str, vocab_size: int) -> tuple[int, ...]:
    value = fields.data.get(name)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < vocab_size for i in ids):
        raise fields.fail(name, f"token ids below vocab_size {vocab_size}")
    return tuple(ids)


def parse_config(data: dict[str, Any], where: str = "config.json") -> Config:
    """Config from the content of a config.json.

    Args:
      data: the JSON object, in Hugging Face's spelling.
      where: what to call it in messages.

    Raises:
      InputError: naming the field, what was expected and what was found.
    """
    fields = _Fields(data, where)
    model_type = fields.choice("model_type", MODEL_TYPES)
    v3 = model_type == "deepseek_v3"
    for name, value in (
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("tie_word_embeddings", False),
        ("moe_layer_freq", 1),
        ("mlp_bias", False),
        ("rope_interleave", True),
    ):
        fields.choice(name, (value,), default=value)
    layers = fields.integer("num_hidden_layers", high=4096)
    dense = fields.integer("first_k_dense_replace", low=0, high=layers, default=0)
    moe = dense < layers or bool(fields.data.get("num_nextn_predict_layers"))
    vocab_size = fields.integer("vocab_size")
    rope = fields.section("rope_parameters")
    theta_in = rope if rope is not None and "rope_theta" in rope.data else fields
    for name in ("n_group", "topk_group"):  # null in V2 files that do not group
        if fields.data.get(name, 0) is None:
            fields = _Fields({k: v for k, v in fields.data.items() if k != name}, where)
    bos = _token_ids(fields, "bos_token_id", vocab_size)
    config = Config(
        model_type=model_type,
        vocab_size=vocab_size,
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        moe_intermediate_size=fields.integer("moe_intermediate_size", default=None if moe else 1),
        num_hidden_layers=layers,
        num_nextn_predict_layers=fields.integer("num_nextn_predict_layers", low=0, high=1, default=0),
        first_k_dense_replace=dense,
        num_attention_heads=fields.integer("num_attention_heads"),
        q_lora_rank=None if fields.data.get("q_lora_rank") is None else fields.integer("q_lora_rank"),
        kv_lora_rank=fields.integer("kv_lora_rank"),
        qk_nope_head_dim=fields.integer("qk_nope_head_dim"),
        qk_rope_head_dim=fields.integer("qk_rope_head_dim"),
        v_head_dim=fields.integer("v_head_dim"),
        n_routed_experts=fields.integer("n_routed_experts", high=_MAX_EXPERTS, default=None if moe else 1),
        n_shared_experts=fields.integer("n_shared_experts", default=None if moe else 1),
        num_experts_per_tok=fields.integer("num_experts_per_tok", default=None if moe else 1),
        n_group=fields.integer("n_group", default=1),
        topk_group=fields.integer("topk_group", default=1),
        scoring_func=fields.choice("scoring_func", ("sigmoid", "softmax"), default="sigmoid" if v3 else "softmax"),
        topk_method=fields.choice(
            "topk_method", ("noaux_tc", "greedy", "group_limited_greedy"), default="noaux_tc" if v3 else "greedy"
        ),
        norm_topk_prob=fields.choice("norm_topk_prob", (True, False), default=v3),
        routed_scaling_factor=fields.number("routed_scaling_factor", default=2.5 if v3 else 1.0),
        rms_norm_eps=fields.number("rms_norm_eps", default=1e-6),
        rope_theta=theta_in.number("rope_theta", low=1.0 + 1e-6, default=10000.0),
        yarn=_yarn(fields),
        max_position_embeddings=fields.integer("max_position_embeddings", default=163840),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=_token_ids(fields, "eos_token_id", vocab_size),
        quantization=_quantization(fields),
    )
    _check_consistency(config, fields, moe)
    return config


def _check_consistency(c: Config, fields: _Fields, moe: bool) -> None:
    if c.qk_rope_head_dim % 2:
        raise fields.fail("qk_rope_head_dim", "an even number")
    if (c.topk_method == "noaux_tc") != (c.scoring_func == "sigmoid"):
        raise fields.fail("scoring_func", 'sigmoid with topk_method "noaux_tc", softmax with the greedy ones')
    if not moe:
        return
    if c.num_experts_per_tok > c.n_routed_experts:
        raise fields.fail("num_experts_per_tok", f"at most n_routed_experts {c.n_routed_experts}")
    if c.n_routed_experts % c.n_group:
        raise fields.fail("n_group", f"a divisor of n_routed_experts {c.n_routed_experts}")
    if c.topk_group > c.n_group:
        raise fields.fail("topk_group", f"at most n_group {c.n_group}")
    per_group = c.n_routed_experts // c.n_group
    if c.topk_method == "noaux_tc" and per_group < 2:
        raise fields.fail("n_group", "groups of at least two experts, whose two best scores are added")
    if c.topk_method != "greedy" and c.num_experts_per_tok > c.topk_group * per_group:
        raise fields.fail("num_experts_per_tok", f"at most the {c.topk_group * per_group} experts of the kept groups")


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      InputError: if the file is missing, not UTF-8 JSON, or not an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: expected a JSON file, found none") from None
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path}: expected a JSON object, found something unreadable: {e}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


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
