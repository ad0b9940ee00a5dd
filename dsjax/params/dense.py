"""The parameters of the R1 distills, Qwen2 and Llama.

Letters (used in shapes, einsums and comments everywhere):

    B batch slots      T new tokens         S cached positions   L layers of a stack
    D hidden           V vocabulary         F dense width
    H query heads      P key-value heads    U head_dim
"""

from __future__ import annotations

from collections.abc import Iterator

from dsjax.config import DenseConfig
from dsjax.params.row import LINEAR, MATRIX, VECTOR, Row


def letters(config: DenseConfig) -> dict[str, int]:
    """Size of every letter that a parameter's shape uses."""
    c = config
    return {
        "V": c.vocab_size,
        "D": c.hidden_size,
        "F": c.intermediate_size,
        "H": c.num_attention_heads,
        "P": c.num_key_value_heads,
        "U": c.head_dim,
    }


# (path below the stack, dims, axes, storage, checkpoint name below the layer)
_Spec = tuple[str, tuple[str, ...], tuple[str, ...], str, str]

_LAYER: tuple[_Spec, ...] = (
    ("input_norm", ("D",), ("hidden",), VECTOR, "input_layernorm.weight"),
    ("attention.q", ("HU", "D"), ("heads", "hidden"), LINEAR, "self_attn.q_proj.weight"),
    ("attention.k", ("PU", "D"), ("kv_heads", "hidden"), LINEAR, "self_attn.k_proj.weight"),
    ("attention.v", ("PU", "D"), ("kv_heads", "hidden"), LINEAR, "self_attn.v_proj.weight"),
    ("attention.o", ("D", "HU"), ("hidden", "heads"), LINEAR, "self_attn.o_proj.weight"),
    ("post_norm", ("D",), ("hidden",), VECTOR, "post_attention_layernorm.weight"),
    ("ffn.gate", ("F", "D"), ("ffn", "hidden"), LINEAR, "mlp.gate_proj.weight"),
    ("ffn.up", ("F", "D"), ("ffn", "hidden"), LINEAR, "mlp.up_proj.weight"),
    ("ffn.down", ("D", "F"), ("hidden", "ffn"), LINEAR, "mlp.down_proj.weight"),
)
_BIASES: tuple[_Spec, ...] = (
    ("attention.q_bias", ("HU",), ("heads",), VECTOR, "self_attn.q_proj.bias"),
    ("attention.k_bias", ("PU",), ("kv_heads",), VECTOR, "self_attn.k_proj.bias"),
    ("attention.v_bias", ("PU",), ("kv_heads",), VECTOR, "self_attn.v_proj.bias"),
)


def _layer_rows(config: DenseConfig) -> Iterator[Row]:
    layers = tuple(range(config.num_hidden_layers))
    for path, dims, axes, storage, name in _LAYER + (_BIASES if config.qkv_bias else ()):
        where = ("layers", *path.split("."))
        yield Row(where, dims, axes, storage, "model.layers.{layer}." + name, layers, narrow=storage == LINEAR)


def rows(config: DenseConfig) -> tuple[Row, ...]:
    """Every parameter of the model; a tied head is no parameter."""
    head = Row(("head",), ("V", "D"), ("vocab", "hidden"), MATRIX, "lm_head.weight")
    return (
        Row(("embed",), ("V", "D"), ("vocab", "hidden"), MATRIX, "model.embed_tokens.weight"),
        *_layer_rows(config),
        Row(("norm",), ("D",), ("hidden",), VECTOR, "model.norm.weight"),
        *(() if config.tie_word_embeddings else (head,)),
    )
