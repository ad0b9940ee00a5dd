"""The architecture of DeepSeek-V4 (Flash and Pro)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from dsjax.config.fields import (
    MAX_EXPERTS,
    Fields,
    Quantization,
    Yarn,
    field_token_ids,
    parse_yarn,
)
from dsjax.config.integers import IntegerQuantization, parse_quantization

MODEL_TYPE = "deepseek_v4"

WINDOW, CSA, HCA = 0, 4, 128
"""An attention layer's compression ratio: sliding window only, compressed sparse, heavily compressed (spec V4 1.1)."""

RATIOS = (WINDOW, CSA, HCA)

_LAYER_TYPES = {
    "sliding_attention": WINDOW,
    "compressed_sparse_attention": CSA,
    "heavily_compressed_attention": HCA,
}


@dataclasses.dataclass(frozen=True)
class V4Config:
    """Architecture of a V4 model, in Hugging Face's field names (spec V4 1.1).

    Attributes:
      compress_ratios: of each main layer, 0, 4 or 128; what config.json lists beyond them belongs to draft modules.
      num_hash_layers: layers 0 .. num_hash_layers - 1 choose their experts by token id.
      yarn: of the layers with a compressor; the others' RoPE is never scaled.
      expert_dtype: "fp4" or "fp8", what config.json says of the routed experts, if anything; the tensors decide.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_nextn_predict_layers: int
    compress_ratios: tuple[int, ...]
    num_hash_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_lora_rank: int
    o_groups: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    routed_scaling_factor: float
    swiglu_limit: float
    sliding_window: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    rope_theta: float
    compress_rope_theta: float
    yarn: Yarn | None
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    quantization: Quantization | IntegerQuantization | None
    expert_dtype: str | None

    tie_word_embeddings: ClassVar[bool] = False
    weights_before_down: ClassVar[bool] = True
    """Routing weights multiply what an expert's down projection takes (spec V4 2.8)."""

    def layers_of(self, ratio: int) -> tuple[int, ...]:
        """Numbers of the main layers with this compression ratio."""
        return tuple(i for i, r in enumerate(self.compress_ratios) if r == ratio)

    @property
    def softmax_scale(self) -> float:
        """head_dim^-0.5 (spec V4 2.3)."""
        return self.head_dim**-0.5

    @property
    def index_scale(self) -> float:
        """index_head_dim^-0.5 * index_n_heads^-0.5 (spec V4 2.5)."""
        return self.index_head_dim**-0.5 * self.index_n_heads**-0.5


def _compress_ratios(fields: Fields, layers: int) -> tuple[int, ...]:
    """Of the main layers, from DeepSeek's compress_ratios or Hugging Face's layer_types."""
    name = "compress_ratios" if fields.data.get("compress_ratios") is not None else "layer_types"
    value = fields.data.get(name)
    known: dict[Any, int] = {r: r for r in RATIOS} if name == "compress_ratios" else dict(_LAYER_TYPES)
    # Without a list Hugging Face falls back to a schedule that no released model has.
    if not isinstance(value, list) or len(value) < layers:
        raise fields.fail(name, f"a list of at least num_hidden_layers {layers} entries")
    bad = [v for v in value if not isinstance(v, int | str) or isinstance(v, bool) or v not in known]
    if bad:
        raise Fields({name: bad[0]}, fields.where).fail(name, f"entries {', '.join(map(str, known))}")
    return tuple(known[v] for v in value[:layers])


def _num_hash_layers(fields: Fields, layers: int) -> int:
    types = fields.data.get("mlp_layer_types")
    if types is None or "num_hash_layers" in fields.data:
        return fields.integer("num_hash_layers", low=0, high=1 << 24, default=3)
    count = types[:layers].count("hash_moe") if isinstance(types, list) else -1
    if not isinstance(types, list) or types[:layers] != ["hash_moe"] * count + ["moe"] * (layers - count):
        raise fields.fail("mlp_layer_types", f"hash_moe layers, then moe layers, {layers} in all")
    return count


def _check_rates(fields: Fields) -> None:
    """Hugging Face's compress_rates and its older spellings, which may only repeat what the released models have."""
    section = fields.section("compress_rates")
    for name, ratio in _LAYER_TYPES.items():
        if section is not None and ratio:
            section.choice(name, (ratio,), default=ratio)
    fields.choice("compress_rate_csa", (CSA,), default=CSA)
    fields.choice("compress_rate_hca", (HCA,), default=HCA)


def _rope_head_dim(fields: Fields, head_dim: int) -> int:
    if "qk_rope_head_dim" in fields.data:
        return fields.integer("qk_rope_head_dim", low=2, high=head_dim)
    factor = fields.number("partial_rotary_factor", default=0.125)
    rope = int(head_dim * factor)
    if not 2 <= rope <= head_dim:
        raise fields.fail("partial_rotary_factor", f"a share of head_dim {head_dim} that leaves 2 channels or more")
    return rope


def _rope(fields: Fields) -> tuple[float, float, Yarn | None]:
    """(theta of window layers, theta of compressed layers, the latter's scaling), in either spelling."""
    nested = fields.section("rope_parameters")
    main = nested.section("main") if nested is not None else None
    compress = nested.section("compress") if nested is not None else None
    if nested is not None and (main is None) != (compress is None):
        raise nested.fail("main" if main is None else "compress", "an object")
    if main is not None and compress is not None:
        if parse_yarn(main) is not None:
            raise main.fail("rope_type" if "rope_type" in main.data else "type", '"default"')
        compress.choice("attention_factor", (None, 1.0, 1))
        return (
            main.number("rope_theta", low=1.0 + 1e-6, default=10000.0),
            compress.number("rope_theta", low=1.0 + 1e-6, default=160000.0),
            parse_yarn(compress),
        )
    if nested is not None and "rope_theta" in nested.data:  # of which layers?
        raise nested.fail("rope_theta", "it in main and compress, or beside rope_parameters")
    theta = fields.number("rope_theta", low=1.0 + 1e-6, default=10000.0)
    compress_theta = fields.number("compress_rope_theta", low=1.0 + 1e-6, default=160000.0)
    return theta, compress_theta, parse_yarn(fields.section("rope_scaling") or nested)


def _expert_dtype(fields: Fields) -> str | None:
    """A hint, at the top level or inside quantization_config."""
    nested = fields.section("quantization_config")
    where = nested if nested is not None and nested.data.get("expert_dtype") is not None else fields
    return where.choice("expert_dtype", (None, "fp4", "fp8"))


def parse_v4(data: dict[str, Any], where: str) -> V4Config:
    """V4Config from the content of a config.json, DeepSeek's own or as Hugging Face rewrites it (spec V4 1.1, 3.3).

    Raises:
      InputError: naming the field, what was expected and what was found.
    """
    fields = Fields(data, where)
    for name, value in (
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("mlp_bias", False),
        ("tie_word_embeddings", False),
        ("scoring_func", "sqrtsoftplus"),
        ("topk_method", "noaux_tc"),
        ("norm_topk_prob", True),
        ("num_key_value_heads", 1),
    ):
        fields.choice(name, (value,), default=value)
    layers = fields.integer("num_hidden_layers", high=4096)
    vocab_size = fields.integer("vocab_size")
    head_dim = fields.integer("head_dim")
    theta, compress_theta, yarn = _rope(fields)
    _check_rates(fields)
    bos = field_token_ids(fields, "bos_token_id", vocab_size)
    config = V4Config(
        model_type=MODEL_TYPE,
        vocab_size=vocab_size,
        hidden_size=fields.integer("hidden_size"),
        moe_intermediate_size=fields.integer("moe_intermediate_size"),
        num_hidden_layers=layers,
        # Files with a DSpark head list its three stages here; only the plain draft module is run.
        num_nextn_predict_layers=min(1, fields.integer("num_nextn_predict_layers", low=0, high=3, default=0)),
        compress_ratios=_compress_ratios(fields, layers),
        num_hash_layers=min(layers, _num_hash_layers(fields, layers)),
        num_attention_heads=fields.integer("num_attention_heads"),
        head_dim=head_dim,
        qk_rope_head_dim=_rope_head_dim(fields, head_dim),
        q_lora_rank=fields.integer("q_lora_rank"),
        o_lora_rank=fields.integer("o_lora_rank"),
        o_groups=fields.integer("o_groups"),
        n_routed_experts=fields.integer("n_routed_experts", high=MAX_EXPERTS),
        n_shared_experts=fields.integer("n_shared_experts", high=MAX_EXPERTS, default=1),
        num_experts_per_tok=fields.integer("num_experts_per_tok"),
        routed_scaling_factor=fields.number("routed_scaling_factor", default=1.5),
        swiglu_limit=fields.number("swiglu_limit", default=10.0),
        sliding_window=fields.integer("sliding_window", default=128),
        index_n_heads=fields.integer("index_n_heads"),
        index_head_dim=fields.integer("index_head_dim"),
        index_topk=fields.integer("index_topk"),
        hc_mult=fields.integer("hc_mult", high=16, default=4),
        hc_sinkhorn_iters=fields.integer("hc_sinkhorn_iters", high=1000, default=20),
        hc_eps=fields.number("hc_eps", default=1e-6),
        rms_norm_eps=fields.number("rms_norm_eps", default=1e-6),
        rope_theta=theta,
        compress_rope_theta=compress_theta,
        yarn=yarn,
        max_position_embeddings=fields.integer("max_position_embeddings", default=1048576),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=field_token_ids(fields, "eos_token_id", vocab_size),
        quantization=parse_quantization(fields, (None, "ue8m0", "float")),
        expert_dtype=_expert_dtype(fields),
    )
    _check_consistency(config, fields)
    return config


def _check_consistency(c: V4Config, fields: Fields) -> None:
    if c.qk_rope_head_dim % 2:
        raise fields.fail("qk_rope_head_dim", "an even number")
    if c.num_attention_heads % c.o_groups:
        raise fields.fail("o_groups", f"a divisor of num_attention_heads {c.num_attention_heads}")
    if c.num_experts_per_tok > c.n_routed_experts:
        raise fields.fail("num_experts_per_tok", f"at most n_routed_experts {c.n_routed_experts}")
    if CSA in c.compress_ratios:
        if c.index_head_dim & (c.index_head_dim - 1):
            raise fields.fail("index_head_dim", "a power of two, which the Hadamard rotation needs")
        if c.index_head_dim < c.qk_rope_head_dim:
            raise fields.fail("index_head_dim", f"at least qk_rope_head_dim {c.qk_rope_head_dim}")
