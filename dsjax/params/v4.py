"""The parameters of V4.

Letters (used in shapes, einsums and comments everywhere; a digit is itself):

    B batch slots      T new tokens         S cached positions   L layers of a stack
    D hidden           V vocabulary         H heads              E routed experts, k of them per token
    Q q_lora_rank      U head_dim           R qk_rope_head_dim   N = U - R
    G o_groups         O o_lora_rank        J = H / G            n hc_mult, streams;  m = (2 + n) n
    M expert width     W shared experts' width together
    I index_n_heads    X index_head_dim     h = 128, the larger compression ratio (the smaller is 4)
"""

from __future__ import annotations

from collections.abc import Iterator

from dsjax.config import V4Config
from dsjax.config.v4 import CSA, HCA
from dsjax.params.row import EXPERT, FLOAT32, INTEGER, LINEAR, MATRIX, VECTOR, Row


def letters(config: V4Config) -> dict[str, int]:
    """Size of every letter that a parameter's shape uses."""
    c = config
    return {
        "V": c.vocab_size,
        "D": c.hidden_size,
        "H": c.num_attention_heads,
        "Q": c.q_lora_rank,
        "U": c.head_dim,
        "G": c.o_groups,
        "O": c.o_lora_rank,
        "J": c.num_attention_heads // c.o_groups,
        "n": c.hc_mult,
        "m": (2 + c.hc_mult) * c.hc_mult,
        "M": c.moe_intermediate_size,
        "W": c.n_shared_experts * c.moe_intermediate_size,
        "E": c.n_routed_experts,
        "k": c.num_experts_per_tok,
        "I": c.index_n_heads,
        "X": c.index_head_dim,
        "h": HCA,
    }


# (path below the stack, dims, axes, storage, checkpoint name below the layer)
_Spec = tuple[str, tuple[str, ...], tuple[str, ...], str, str]


def _hyper(where: str, prefix: str, mixes: str, scales: str) -> tuple[_Spec, ...]:
    return (
        (f"{where}.fn", (mixes, "nD"), ("mixes", "streams"), FLOAT32, f"{prefix}_fn"),
        (f"{where}.base", (mixes,), ("mixes",), FLOAT32, f"{prefix}_base"),
        (f"{where}.scale", (scales,), ("mixes",), FLOAT32, f"{prefix}_scale"),
    )


def _ffn(where: str, prefix: str, letter: str, axis: str, storage: str) -> tuple[_Spec, ...]:
    return (
        (f"{where}.gate", (letter, "D"), (axis, "hidden"), storage, f"{prefix}.w1.weight"),
        (f"{where}.up", (letter, "D"), (axis, "hidden"), storage, f"{prefix}.w3.weight"),
        (f"{where}.down", ("D", letter), ("hidden", axis), storage, f"{prefix}.w2.weight"),
    )


def _compressor(where: str, prefix: str, ratio: str, out: str) -> tuple[_Spec, ...]:
    """`out`: the letters of one token's contribution; two halves where windows overlap."""
    return (
        (f"{where}.kv", (out, "D"), ("compressed", "hidden"), MATRIX, f"{prefix}.wkv.weight"),
        (f"{where}.gate", (out, "D"), ("compressed", "hidden"), MATRIX, f"{prefix}.wgate.weight"),
        (f"{where}.position", (ratio, out), ("ratio", "compressed"), FLOAT32, f"{prefix}.ape"),
        (f"{where}.norm", (out[-1],), ("compressed",), VECTOR, f"{prefix}.norm.weight"),
    )


_LAYER: tuple[_Spec, ...] = (
    *_hyper("attention_streams", "hc_attn", "m", "3"),
    ("input_norm", ("D",), ("hidden",), VECTOR, "attn_norm.weight"),
    ("attention.q_a", ("Q", "D"), ("q_lora", "hidden"), LINEAR, "attn.wq_a.weight"),
    ("attention.q_norm", ("Q",), ("q_lora",), VECTOR, "attn.q_norm.weight"),
    ("attention.q_b", ("HU", "Q"), ("heads", "q_lora"), LINEAR, "attn.wq_b.weight"),
    ("attention.kv", ("U", "D"), ("latent", "hidden"), LINEAR, "attn.wkv.weight"),
    ("attention.kv_norm", ("U",), ("latent",), VECTOR, "attn.kv_norm.weight"),
    ("attention.sink", ("H",), ("heads",), FLOAT32, "attn.attn_sink"),
    ("attention.o_a", ("GO", "JU"), ("o_groups", "group_heads"), LINEAR, "attn.wo_a.weight"),
    ("attention.o_b", ("D", "GO"), ("hidden", "o_low"), LINEAR, "attn.wo_b.weight"),
    *_hyper("ffn_streams", "hc_ffn", "m", "3"),
    ("post_norm", ("D",), ("hidden",), VECTOR, "ffn_norm.weight"),
    ("router.weight", ("E", "D"), ("router", "hidden"), MATRIX, "ffn.gate.weight"),
    *_ffn("shared", "ffn.shared_experts", "W", "shared_ffn", LINEAR),
    *_ffn("experts", "ffn.experts.{expert}", "M", "expert_ffn", EXPERT),
)
_CSA: tuple[_Spec, ...] = (
    *_compressor("compressor", "attn.compressor", "4", "2U"),
    ("indexer.q_b", ("IX", "Q"), ("index_heads", "q_lora"), LINEAR, "attn.indexer.wq_b.weight"),
    ("indexer.weights", ("I", "D"), ("index_heads", "hidden"), MATRIX, "attn.indexer.weights_proj.weight"),
    *_compressor("indexer.compressor", "attn.indexer.compressor", "4", "2X"),
)
_HCA = _compressor("compressor", "attn.compressor", "h", "U")
_BIAS: tuple[_Spec, ...] = (("bias", ("E",), ("router",), FLOAT32, "ffn.gate.bias"),)
_TABLE: tuple[_Spec, ...] = (("table", ("V", "k"), ("ids", "choices"), INTEGER, "ffn.gate.tid2eid"),)
_MTP: tuple[_Spec, ...] = (
    ("embedding_projection", ("D", "D"), ("hidden", "mtp_input"), LINEAR, "e_proj.weight"),
    ("hidden_projection", ("D", "D"), ("hidden", "mtp_input"), LINEAR, "h_proj.weight"),
    ("embedding_norm", ("D",), ("hidden",), VECTOR, "enorm.weight"),
    ("hidden_norm", ("D",), ("hidden",), VECTOR, "hnorm.weight"),
    ("norm", ("D",), ("hidden",), VECTOR, "norm.weight"),
    *_hyper("head_streams", "hc_head", "n", "1"),
)


def _stack(
    config: V4Config, stack: str, prefix: str, layers: tuple[int, ...], specs: tuple[_Spec, ...]
) -> Iterator[Row]:
    for path, dims, axes, storage, name in specs:
        experts = config.n_routed_experts if "{expert}" in name else 0
        where = (*stack.split("."), *path.split(".")) if stack else tuple(path.split("."))
        yield Row(where, dims, axes, storage, prefix + name, layers, experts, (".weight", ".scale"))


def rows(config: V4Config) -> tuple[Row, ...]:
    """Every parameter of the model, stacked over all main layers, or over those that have it.

    Stacks: "layers" (all), "csa" and "hca" (by compression ratio), "scored" and "hashed" (by how experts are chosen),
    "mtp" (the draft module).
    """
    every = tuple(range(config.num_hidden_layers))
    hashed = config.num_hash_layers
    found = [
        Row(("embed",), ("V", "D"), ("vocab", "hidden"), MATRIX, "embed.weight"),
        *_stack(config, "layers", "layers.{layer}.", every, _LAYER),
    ]
    for stack, layers, specs in (
        ("csa", config.layers_of(CSA), _CSA),
        ("hca", config.layers_of(HCA), _HCA),
        ("scored", every[hashed:], _BIAS),
        ("hashed", every[:hashed], _TABLE),
    ):
        if layers:
            found += _stack(config, stack, "layers.{layer}.", layers, specs)
    found += _stack(config, "", "", (), _hyper("head_streams", "hc_head", "n", "1"))
    found.append(Row(("norm",), ("D",), ("hidden",), VECTOR, "norm.weight"))
    found.append(Row(("head",), ("V", "D"), ("vocab", "hidden"), MATRIX, "head.weight"))
    if config.num_nextn_predict_layers:
        found += _stack(config, "mtp", "mtp.{layer}.", (0,), _LAYER + _BIAS + _MTP)
    return tuple(found)
