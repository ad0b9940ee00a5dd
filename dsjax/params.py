"""The one table: every parameter's path, shape letters, logical axes, storage class and checkpoint name.

Abstract parameters, counts, bytes, shardings, synthesis and loading are derived from it; no shape is written elsewhere.

Letters (used in shapes, einsums and comments everywhere):

    B batch slots      T new tokens         S cached positions   L layers of a stack
    D hidden           V vocabulary         H heads              E routed experts
    Q q_lora_rank      C kv_lora_rank       N qk_nope_head_dim   R qk_rope_head_dim
    U v_head_dim       K = N + R            G = N + U            A = C + R (cached per token and layer)
    F dense width      M expert width       W shared experts' width together
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.config import Config
from dsjax.errors import InputError
from quant import BF16, E4M3, F16, INT8, WHOLE, QArray

Path = tuple[str, ...]
Tree = dict[str, Any]
"""Parameters as nested dictionaries, leaves float32 arrays or QArrays, by `Row.path`."""

LINEAR = "linear"  # E4M3 with block scales where the checkpoint is quantised, else a float matrix
MATRIX = "matrix"  # a float matrix, never quantised
VECTOR = "vector"  # norm gains and biases; float32 once loaded


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter, stacked over the layers (and experts) that repeat it.

    Attributes:
      path: where it stands in the tree, e.g. ("moe", "attention", "q_b").
      dims: its own axes as products of letters, e.g. ("HK", "Q"); always [out, in] for matrices.
      axes: a logical axis name for each of `dims`, which the sharding rules map to mesh axes.
      storage: LINEAR, MATRIX or VECTOR.
      name: checkpoint name, with {layer} and {expert} where it is stacked.
      layers: checkpoint layer numbers it is stacked over; empty if it stands alone.
      experts: number of experts it is stacked over; 0 if none.
      copy_of: the path of the parameter that the checkpoint repeats here; such a row is checked, not loaded.
    """

    path: Path
    dims: tuple[str, ...]
    axes: tuple[str, ...]
    storage: str
    name: str
    layers: tuple[int, ...] = ()
    experts: int = 0
    copy_of: Path | None = None

    @property
    def stacking(self) -> tuple[int, ...]:
        """The leading axes: (layers, experts), each only where present."""
        return (len(self.layers),) * bool(self.layers) + (self.experts,) * bool(self.experts)

    @property
    def logical_axes(self) -> tuple[str, ...]:
        """Names of all axes of the leaf."""
        return ("layers",) * bool(self.layers) + ("experts",) * bool(self.experts) + self.axes

    def tensors(self) -> Iterator[tuple[tuple[int, ...], str]]:
        """(leading index, checkpoint name) of every tensor of this leaf."""
        for index in np.ndindex(self.stacking):
            yield index, self.tensor_name(index)

    def tensor_name(self, index: tuple[int, ...]) -> str:
        """Checkpoint name of the tensor at a leading index (layer, expert), as far as the row is stacked."""
        layer = self.layers[index[0]] if self.layers else None
        return self.name.format(layer=layer, expert=index[1] if self.experts else None)


def letters(config: Config) -> dict[str, int]:
    """Size of every letter that a parameter's shape uses."""
    c = config
    return {
        "V": c.vocab_size,
        "D": c.hidden_size,
        "H": c.num_attention_heads,
        "Q": c.q_lora_rank or 0,
        "C": c.kv_lora_rank,
        "K": c.qk_head_dim,
        "G": c.qk_nope_head_dim + c.v_head_dim,
        "U": c.v_head_dim,
        "A": c.latent_dim,
        "F": c.intermediate_size,
        "M": c.moe_intermediate_size,
        "W": c.n_shared_experts * c.moe_intermediate_size,
        "E": c.n_routed_experts,
        "2": 2,
    }


def matrix_shape(row: Row, config: Config) -> tuple[int, ...]:
    """Shape of one of the row's tensors in the checkpoint."""
    size = letters(config)
    return tuple(math.prod(size[letter] for letter in dim) for dim in row.dims)


def leaf_shape(row: Row, config: Config) -> tuple[int, ...]:
    """Shape of the stacked leaf: [layers, experts, *dims], each leading axis only where present."""
    return row.stacking + matrix_shape(row, config)


# (path below the stack, dims, axes, storage, checkpoint name below the layer)
_Spec = tuple[str, tuple[str, ...], tuple[str, ...], str, str]

_ATTENTION: tuple[_Spec, ...] = (
    ("input_norm", ("D",), ("hidden",), VECTOR, "input_layernorm.weight"),
    ("attention.kv_a", ("A", "D"), ("latent", "hidden"), LINEAR, "self_attn.kv_a_proj_with_mqa.weight"),
    ("attention.kv_norm", ("C",), ("kv_lora",), VECTOR, "self_attn.kv_a_layernorm.weight"),
    ("attention.kv_b", ("HG", "C"), ("heads", "kv_lora"), LINEAR, "self_attn.kv_b_proj.weight"),
    ("attention.o", ("D", "HU"), ("hidden", "heads"), LINEAR, "self_attn.o_proj.weight"),
    ("post_norm", ("D",), ("hidden",), VECTOR, "post_attention_layernorm.weight"),
)
_Q_LORA: tuple[_Spec, ...] = (
    ("attention.q_a", ("Q", "D"), ("q_lora", "hidden"), LINEAR, "self_attn.q_a_proj.weight"),
    ("attention.q_norm", ("Q",), ("q_lora",), VECTOR, "self_attn.q_a_layernorm.weight"),
    ("attention.q_b", ("HK", "Q"), ("heads", "q_lora"), LINEAR, "self_attn.q_b_proj.weight"),
)
_Q_FULL: tuple[_Spec, ...] = (("attention.q", ("HK", "D"), ("heads", "hidden"), LINEAR, "self_attn.q_proj.weight"),)


def _ffn(where: str, prefix: str, letter: str, axis: str) -> tuple[_Spec, ...]:
    return (
        (f"{where}.gate", (letter, "D"), (axis, "hidden"), LINEAR, f"{prefix}.gate_proj.weight"),
        (f"{where}.up", (letter, "D"), (axis, "hidden"), LINEAR, f"{prefix}.up_proj.weight"),
        (f"{where}.down", ("D", letter), ("hidden", axis), LINEAR, f"{prefix}.down_proj.weight"),
    )


_DENSE = _ffn("ffn", "mlp", "F", "ffn")
_ROUTER: tuple[_Spec, ...] = (("router.weight", ("E", "D"), ("router", "hidden"), MATRIX, "mlp.gate.weight"),)
_ROUTER_BIAS: tuple[_Spec, ...] = (("router.bias", ("E",), ("router",), VECTOR, "mlp.gate.e_score_correction_bias"),)
_SHARED = _ffn("shared", "mlp.shared_experts", "W", "shared_ffn")
_EXPERTS = _ffn("experts", "mlp.experts.{expert}", "M", "expert_ffn")

_MTP: tuple[_Spec, ...] = (
    ("embedding_norm", ("D",), ("hidden",), VECTOR, "enorm.weight"),
    ("hidden_norm", ("D",), ("hidden",), VECTOR, "hnorm.weight"),
    ("projection", ("D", "2D"), ("hidden", "mtp_input"), MATRIX, "eh_proj.weight"),
    ("norm", ("D",), ("hidden",), VECTOR, "shared_head.norm.weight"),
)


def _stack_rows(config: Config, stack: str, layers: tuple[int, ...], moe: bool) -> Iterator[Row]:
    specs = _ATTENTION + (_Q_LORA if config.q_lora_rank else _Q_FULL)
    if moe:
        specs += _ROUTER + (_ROUTER_BIAS if config.topk_method == "noaux_tc" else ()) + _SHARED + _EXPERTS
    else:
        specs += _DENSE
    if stack == "mtp":
        specs += _MTP
    for path, dims, axes, storage, name in specs:
        experts = config.n_routed_experts if "{expert}" in name else 0
        yield Row((stack, *path.split(".")), dims, axes, storage, "model.layers.{layer}." + name, layers, experts)


def table(config: Config) -> tuple[Row, ...]:
    """Every parameter of the model, MTP modules included (their rows start with "mtp")."""
    dense, total = config.first_k_dense_replace, config.num_hidden_layers
    embed = Row(("embed",), ("V", "D"), ("vocab", "hidden"), MATRIX, "model.embed_tokens.weight")
    head = Row(("head",), ("V", "D"), ("vocab", "hidden"), MATRIX, "lm_head.weight")
    rows = [embed]
    if dense:
        rows += _stack_rows(config, "dense", tuple(range(dense)), moe=False)
    if dense < total:
        rows += _stack_rows(config, "moe", tuple(range(dense, total)), moe=True)
    rows += [Row(("norm",), ("D",), ("hidden",), VECTOR, "model.norm.weight"), head]
    if config.num_nextn_predict_layers:
        layers = (total,)
        rows += _stack_rows(config, "mtp", layers, moe=True)
        prefix = "model.layers.{layer}."
        for row, name in ((embed, "embed_tokens.weight"), (head, "shared_head.head.weight")):
            rows.append(
                dataclasses.replace(row, path=("mtp", row.path[0]), name=prefix + name, layers=layers, copy_of=row.path)
            )
    return tuple(rows)


def is_mtp(row: Row) -> bool:
    """Whether the row belongs to a multi-token-prediction module."""
    return row.path[0] == "mtp"


# --- storage ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stored:
    """How a row's tensors are stored in a checkpoint, or held in memory.

    Attributes:
      format: "e4m3", "bf16", "f16" or "f32"; in memory also "int8".
      scales: for e4m3: "f32" or "e8m0", per block; for int8: "f32", one per matrix row.
    """

    format: str
    scales: str | None = None


def official_storage(row: Row, config: Config) -> Stored:
    """The storage DeepSeek publishes: E4M3 with float32 scales where quantised, else bfloat16 (spec V3 3.2)."""
    if row.storage == LINEAR and config.quantization is not None:
        return Stored("e4m3", "f32")
    return Stored("f32" if row.path[-1] == "bias" else "bf16")


WEIGHTS = ("stored", "float32", "bfloat16", "int8")
"""What weights may be held as; chosen when they are loaded."""

# Not held as INT8: the embedding, whose rows are looked up, and the router, whose rounding would change who is chosen.
_NEVER_INT8 = ("embed", "router")


def resident(row: Row, stored: Stored, weights: str = "stored") -> Stored:
    """How a row is held in memory. What it equals in `stored` is not converted.

    Vectors are float32 always. "int8" is weight-only, with one scale per output channel.

    Args:
      row: of the table.
      stored: how the checkpoint stores it.
      weights: one of `WEIGHTS`.

    Raises:
      InputError: for another choice.
    """
    if weights not in WEIGHTS:
        raise InputError(f"weights: expected {', '.join(WEIGHTS)}, found {weights!r}")
    if weights == "stored" or row.storage == VECTOR:
        return stored
    if weights == "int8":
        return stored if any(name in row.path for name in _NEVER_INT8) else Stored("int8", "f32")
    return Stored({"float32": "f32", "bfloat16": "bf16"}[weights])


def scale_grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scales of a matrix [..., N, K]: [..., ceil(N/bn), ceil(K/bk)]; WHOLE spans an axis."""
    *lead, n, k = shape
    return (*lead, -(-n // (block[0] or n)), -(-k // (block[1] or k)))


def abstract_leaf(row: Row, config: Config, stored: Stored) -> Any:
    """The leaf as shapes, held as `stored` says (see `resident`): float32 ShapeDtypeStruct, or a QArray of them."""
    shape = leaf_shape(row, config)
    if stored.format == "int8":
        scales = jax.ShapeDtypeStruct(scale_grid(shape, (1, WHOLE)), jnp.float32)
        return QArray(jax.ShapeDtypeStruct(shape, jnp.uint8), scales, INT8, (1, WHOLE))
    if stored.format == "e4m3":
        assert config.quantization is not None
        block = config.quantization.block
        scale_dtype = jnp.uint8 if stored.scales == "e8m0" else jnp.float32
        scales = jax.ShapeDtypeStruct(scale_grid(shape, block), scale_dtype)
        return QArray(jax.ShapeDtypeStruct(shape, jnp.uint8), scales, E4M3, block)
    if row.storage == VECTOR or stored.format == "f32":
        return jax.ShapeDtypeStruct(shape, jnp.float32)
    fmt = {"bf16": BF16, "f16": F16}[stored.format]
    return QArray(jax.ShapeDtypeStruct(shape, jnp.uint16), None, fmt, (1, 0))


def build_tree(rows: tuple[Row, ...], leaf: Callable[[Row], Any]) -> Tree:
    """Nested dictionaries with `leaf(row)` at each row's path, copies left out."""
    tree: Tree = {}
    for row in rows:
        if row.copy_of is None:
            node = tree
            for key in row.path[:-1]:
                node = node.setdefault(key, {})
            node[row.path[-1]] = leaf(row)
    return tree


def abstract_params(
    config: Config, *, mtp: bool = False, stored: Mapping[Path, Stored] | None = None, weights: str = "stored"
) -> Tree:
    """The model's parameters as shapes; nothing is allocated.

    Args:
      config: the architecture.
      mtp: include the MTP module.
      stored: storage by path, from a checkpoint's headers; DeepSeek's official one by default.
      weights: what they are held as, one of `WEIGHTS`.

    Raises:
      InputError: for another choice of `weights`.
    """

    def leaf(row: Row) -> Any:
        held = resident(row, stored[row.path] if stored else official_storage(row, config), weights)
        return abstract_leaf(row, config, held)

    return build_tree(tuple(r for r in table(config) if mtp or not is_mtp(r)), leaf)


def leaves(params: Tree, config: Config) -> Iterator[tuple[Row, Any]]:
    """(row, leaf) of every parameter that the tree holds: no copies, and no MTP module if none was loaded."""
    for row in table(config):
        leaf: Any = params
        for key in row.path:
            leaf = leaf.get(key) if isinstance(leaf, dict) else None
        if leaf is not None:
            yield row, leaf


# --- accounting ------------------------------------------------------------------------------------------------------


def _stored_bytes(row: Row, config: Config) -> int:
    shape = leaf_shape(row, config)
    stored = official_storage(row, config)
    if stored.format == "e4m3":
        assert config.quantization is not None
        return math.prod(shape) + 4 * math.prod(scale_grid(shape, config.quantization.block))
    return math.prod(shape) * (4 if stored.format == "f32" else 2)


def tree_bytes(params: Any) -> int:
    """Bytes of all leaves of a tree as they are held; of arrays, or of shapes from `abstract_params`."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(params))


def active_bytes(params: Tree, config: Config, batch: int) -> int:
    """Weight bytes that one decode step must read at least once, as they are held, scales included.

    All leaves of the main model, except: of the embedding one row per slot; of the routed experts the expected number
    of distinct ones under uniform, independent routing, E (1 - (1 - k/E)^B) a layer with k experts per token, which is
    k for one slot. Trained routers are less even, so real batches read less. MTP modules are left out: decoding does
    not use them. The cache is no weight and is not counted.

    Args:
      params: arrays, or shapes from `abstract_params`.
      config: the architecture.
      batch: slots B, one new token each.
    """
    total = 0.0
    for row, leaf in leaves(params, config):
        if is_mtp(row):
            continue
        share = 1.0
        if row.path == ("embed",):
            share = min(batch / config.vocab_size, 1.0)
        elif row.experts:
            share = 1 - (1 - config.num_experts_per_tok / row.experts) ** batch
        total += share * tree_bytes(leaf)
    return round(total)


def accounting(config: Config) -> dict[str, int]:
    """Parameter counts and bytes (spec V3 7).

    Returns:
      parameters: main model.
      active_parameters: used per token, without the embedding table.
      mtp_parameters: MTP modules, without their copies of embedding and head.
      bytes: tensor bytes of the official checkpoint, MTP and copies included.
      kv_bytes_per_token: latent cache in bfloat16, main model.
    """
    rows = table(config)
    count = {row.path: math.prod(leaf_shape(row, config)) for row in rows}
    main = sum(count[r.path] for r in rows if not is_mtp(r))
    routed = sum(count[r.path] for r in rows if r.experts and not is_mtp(r))
    idle = routed - routed * config.num_experts_per_tok // config.n_routed_experts
    return {
        "parameters": main,
        "active_parameters": main - idle - count["embed",],
        "mtp_parameters": sum(count[r.path] for r in rows if is_mtp(r) and r.copy_of is None),
        "bytes": sum(_stored_bytes(r, config) for r in rows),
        "kv_bytes_per_token": 2 * config.latent_dim * config.num_hidden_layers,
    }
