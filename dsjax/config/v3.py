"""The architecture of DeepSeek-V2 and V3 (R1, V3.1, V3.2)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

from dsjax.config.fields import (
    MAX_EXPERTS,
    Fields,
    Quantization,
    Yarn,
    field_token_ids,
    parse_rope_theta,
    parse_yarn,
)
from dsjax.config.integers import IntegerQuantization, parse_quantization

MODEL_TYPES = ("deepseek_v2", "deepseek_v3", "deepseek_v32")


@dataclasses.dataclass(frozen=True)
class Indexer:
    """V3.2's lightning indexer, which chooses the tokens that a query attends to (spec V3 2.8).

    Attributes:
      heads, head_dim: index_n_heads and index_head_dim.
      topk: index_topk, tokens chosen.
    """

    heads: int
    head_dim: int
    topk: int

    @property
    def scale(self) -> float:
        """Of the heads' weights: heads^-0.5 head_dim^-0.5."""
        return self.heads**-0.5 * self.head_dim**-0.5


@dataclasses.dataclass(frozen=True)
class V3Config:
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
    quantization: Quantization | IntegerQuantization | None
    indexer: Indexer | None

    tie_word_embeddings: ClassVar[bool] = False
    swiglu_limit: ClassVar[float | None] = None
    """SwiGLU is not clamped."""
    weights_before_down: ClassVar[bool] = False
    """Routing weights multiply an expert's output."""

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


def parse_v3(data: dict[str, Any], where: str) -> V3Config:
    """V3Config from the content of a config.json.

    Args:
      data: the JSON object, in Hugging Face's spelling.
      where: what to call it in messages.

    Raises:
      InputError: naming the field, what was expected and what was found.
    """
    fields = Fields(data, where)
    model_type = fields.choice("model_type", MODEL_TYPES)
    v3 = model_type != "deepseek_v2"
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
    for name in ("n_group", "topk_group"):  # null in V2 files that do not group
        if fields.data.get(name, 0) is None:
            fields = Fields({k: v for k, v in fields.data.items() if k != name}, where)
    bos = field_token_ids(fields, "bos_token_id", vocab_size)
    config = V3Config(
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
        n_routed_experts=fields.integer("n_routed_experts", high=MAX_EXPERTS, default=None if moe else 1),
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
        rope_theta=parse_rope_theta(fields, rope),
        yarn=parse_yarn(fields.section("rope_scaling") or rope),
        max_position_embeddings=fields.integer("max_position_embeddings", default=163840),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=field_token_ids(fields, "eos_token_id", vocab_size),
        quantization=parse_quantization(fields),
        indexer=_parse_indexer(fields) if model_type == "deepseek_v32" else None,
    )
    _check_consistency(config, fields, moe)
    return config


def _parse_indexer(fields: Fields) -> Indexer:
    return Indexer(
        heads=fields.integer("index_n_heads"),
        head_dim=fields.integer("index_head_dim"),
        topk=fields.integer("index_topk"),
    )


def _check_consistency(c: V3Config, fields: Fields, moe: bool) -> None:
    if c.qk_rope_head_dim % 2:
        raise fields.fail("qk_rope_head_dim", "an even number")
    if c.indexer is not None:
        if c.q_lora_rank is None:
            raise fields.fail("q_lora_rank", "an integer, for the indexer takes the compressed queries")
        width = c.indexer.head_dim
        if width & (width - 1) or width < c.qk_rope_head_dim:
            raise fields.fail("index_head_dim", f"a power of two, at least qk_rope_head_dim {c.qk_rope_head_dim}")
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
