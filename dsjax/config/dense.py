"""The architecture of the R1 distills: Qwen2 and Llama."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from dsjax.config.fields import Fields, Quantization, field_token_ids, parse_rope_theta
from dsjax.config.integers import IntegerQuantization, parse_quantization

MODEL_TYPES = ("qwen2", "llama")


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """Llama 3's scaling of RoPE frequencies by their wavelength (spec V3 2.9)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class DenseConfig:
    """Architecture of a dense model with grouped queries, in Hugging Face's field names (spec V3 1.2).

    Attributes:
      qkv_bias: whether queries, keys and values have biases: Qwen2's do.
      tie_word_embeddings: whether the head is the embedding.
      quantization: of a converted model; the distills are published in BF16.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    qkv_bias: bool
    tie_word_embeddings: bool
    rms_norm_eps: float
    rope_theta: float
    llama3: Llama3Rope | None
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    quantization: Quantization | IntegerQuantization | None = None

    num_nextn_predict_layers: ClassVar[int] = 0
    num_experts_per_tok: ClassVar[int] = 0
    n_routed_experts: ClassVar[int] = 0

    @property
    def softmax_scale(self) -> float:
        return self.head_dim**-0.5


def _parse_llama3(section: Fields | None) -> Llama3Rope | None:
    """RoPE scaling in either spelling of its type; None where it is absent or "default"."""
    if section is None:
        return None
    key = "rope_type" if "rope_type" in section.data else "type"
    if section.choice(key, ("llama3", "default"), default="default") == "default":
        return None
    rope = Llama3Rope(
        factor=section.number("factor"),
        low_freq_factor=section.number("low_freq_factor"),
        high_freq_factor=section.number("high_freq_factor"),
        original_max_position_embeddings=section.integer("original_max_position_embeddings"),
    )
    if rope.high_freq_factor <= rope.low_freq_factor:
        raise section.fail("high_freq_factor", f"a number above low_freq_factor {rope.low_freq_factor:g}")
    return rope


def parse_dense(data: dict[str, Any], where: str) -> DenseConfig:
    """DenseConfig from the content of a config.json.

    Args:
      data: the JSON object, in Hugging Face's spelling.
      where: what to call it in messages.

    Raises:
      InputError: naming the field, what was expected and what was found.
    """
    fields = Fields(data, where)
    model_type = fields.choice("model_type", MODEL_TYPES)
    for name, value in (
        ("hidden_act", "silu"),
        ("attention_bias", False),  # Llama's; Qwen2's biases are not an option
        ("mlp_bias", False),
        ("use_sliding_window", False),
    ):
        fields.choice(name, (value,), default=value)
    kinds = data.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise fields.fail("layer_types", '"full_attention" for every layer')
    heads, hidden = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    rope = fields.section("rope_parameters")
    vocab_size = fields.integer("vocab_size")
    bos = field_token_ids(fields, "bos_token_id", vocab_size)
    whole = None if hidden % heads else hidden // heads
    config = DenseConfig(
        model_type=model_type,
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=fields.integer("num_hidden_layers", high=4096),
        num_attention_heads=heads,
        num_key_value_heads=fields.integer("num_key_value_heads", default=heads),
        head_dim=whole if whole and data.get("head_dim") is None else fields.integer("head_dim"),
        qkv_bias=model_type == "qwen2",
        tie_word_embeddings=fields.choice("tie_word_embeddings", (True, False), default=False),
        rms_norm_eps=fields.number("rms_norm_eps", default=1e-6),
        rope_theta=parse_rope_theta(fields, rope),
        llama3=_parse_llama3(fields.section("rope_scaling") or rope),
        max_position_embeddings=fields.integer("max_position_embeddings", default=131072),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=field_token_ids(fields, "eos_token_id", vocab_size),
        quantization=parse_quantization(fields),
    )
    if config.head_dim % 2:
        raise fields.fail("head_dim", "an even number")
    if heads % config.num_key_value_heads:
        raise fields.fail("num_key_value_heads", f"a divisor of num_attention_heads {heads}")
    return config
