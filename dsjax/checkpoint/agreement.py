"""Agreement between a config and the files: every tensor present, rightly shaped and typed, before a byte is moved."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np

from dsjax.checkpoint import integers
from dsjax.checkpoint.safetensors import Files
from dsjax.checkpoint.values import host_finite
from dsjax.config import Config, IntegerQuantization, V4Config
from dsjax.errors import InputError
from dsjax.params import EXPERT, INTEGER, INTEGERS, LINEAR, Path, Row, Stored, is_mtp, matrix_shape, scale_grid, table

_FP8 = {np.dtype(ml_dtypes.float8_e4m3fn): "e4m3"}
_FP4 = {np.dtype(np.int8): "e2m1", np.dtype(np.uint8): "e2m1"}  # two codes a byte, whatever the file calls it
_FLOATS = {np.dtype(ml_dtypes.bfloat16): "bf16", np.dtype(np.float16): "f16", np.dtype(np.float32): "f32"}
_INTEGERS = {np.dtype(name): "i32" for name in ("int64", "int32", "int16", "int8", "uint8")}
_SCALES = {np.dtype(np.float32): "f32", np.dtype(ml_dtypes.float8_e8m0fnu): "e8m0", np.dtype(np.uint8): "e8m0"}

# Buffers that some published files carry beside the parameters; they are recomputed, never read.
_IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")

# What a V4 file may hold beside the model that is run (spec V4 1.2, 2.10, 2.11): the draft module's copies of embedding
# and head, the block-drafting head of later releases, and what sees images.
_IGNORED_V4 = re.compile(
    r"^mtp\.0\.(emb\.tok_emb|head)\.weight$|^mtp\.[1-9]\d*\.|^mtp\.\d+\.(main_|markov_head\.|confidence_head\.)"
    r"|^(vision|aligner)\.|^image_[a-z]+$|\.ffn\.gate\.bias_vl$|\.rotary_emb\.\w*inv_freq$"
)
_DRAFT = re.compile(r"^mtp\.0\.(?!(emb\.tok_emb|head)\.weight$)")
_PLAIN_DRAFT = re.compile(r"^mtp\.0\.(e_proj|h_proj|enorm|hnorm)\.")
_BLOCK_DRAFT = re.compile(r"^mtp\.0\.main_|^mtp\.[1-9]\d*\.")


def has_block_draft(files: Files, config: Config) -> bool:
    """Whether `mtp.*` is a head that drafts blocks, which is not run, instead of a V4 MTP module (spec V4 2.10)."""
    if not isinstance(config, V4Config):
        return False
    return any(map(_BLOCK_DRAFT.match, files)) and not any(map(_PLAIN_DRAFT.match, files))


def has_mtp(files: Files, config: Config) -> bool:
    """Whether the MTP module's tensors are there; published copies often leave all of them out."""
    if not config.num_nextn_predict_layers or has_block_draft(files, config):
        return False
    if isinstance(config, V4Config):
        return any(map(_DRAFT.match, files))
    prefix = f"model.layers.{config.num_hidden_layers}."
    return any(name.startswith(prefix) for name in files)


def _ignored(name: str, config: Config, block_draft: bool) -> bool:
    if not isinstance(config, V4Config):
        return bool(_IGNORED.search(name))
    return bool(_IGNORED_V4.search(name)) or (block_draft and name.startswith("mtp."))


def _types(row: Row, config: Config) -> Mapping[np.dtype, str]:
    """Types that the row's tensors may have, and the format that each stands for.

    V3's config says whether a model is quantised, though not every matrix need be. Of V4 there are files with less in
    their config than in their tensors, so the tensors decide.
    """
    if row.storage == INTEGER:
        return _INTEGERS
    if isinstance(config.quantization, IntegerQuantization):  # those that it leaves as they are
        return _FLOATS
    if not isinstance(config, V4Config):
        return _FP8 | _FLOATS if row.storage == LINEAR and config.quantization is not None else _FLOATS
    if row.storage == EXPERT:
        return _FP4 | _FP8 | _FLOATS
    return _FP8 | _FLOATS if row.storage == LINEAR else _FLOATS


def tensor_format(row: Row, dtype: np.dtype, config: Config) -> str:
    """Name of the format of a row's tensor of this type, after `agree` has let it pass."""
    return _types(row, config).get(dtype, dtype.name)


def _names(dtypes: Mapping[np.dtype, str]) -> str:
    return " or ".join(d.name for d in dtypes)


def _expected(types: Mapping[np.dtype, str], shape: tuple[int, ...]) -> str:
    """Types and shape for a message; packed codes have a shape of their own."""
    packed, rest = ({d: f for d, f in types.items() if (f == "e2m1") == wanted} for wanted in (True, False))
    if not packed:
        return f"{_names(rest)} {list(integers.file_shape(next(iter(rest.values())), shape))}"
    if shape[-1] % 2:
        return f"{_names(rest)} {list(shape)} (of odd width, so not packed)"
    return f"{_names(packed)} {[*shape[:-1], shape[-1] // 2]} or {_names(rest)} {list(shape)}"


def _called(files: Files, name: str) -> str:
    """A tensor's name for messages, with the file's own name for it where that is another."""
    own = files[name].name
    return name if own == name else f"{name} ({own} in the file)"


def _expect(
    files: Files, name: str, shape: tuple[int, ...], types: Mapping[np.dtype, str], spelt: str | None = None
) -> str:
    """Checks one tensor, which a file may have under another name, and returns its format's name."""
    if name not in files:
        raise InputError(f"{files.folder}: tensor {spelt or name}: expected {_expected(types, shape)}, found none")
    tensor = files[name]
    fmt = types.get(tensor.dtype)
    if fmt == "e2m1":
        fits = shape[-1] % 2 == 0 and tensor.shape == (*shape[:-1], shape[-1] // 2)
    else:
        fits = tensor.shape == integers.file_shape(fmt or "", shape)
    if fmt is None or not fits:
        raise InputError(
            f"{tensor.path}: tensor {_called(files, name)}: expected {_expected(types, shape)}, "
            f"found {tensor.dtype.name} {list(tensor.shape)}"
        )
    return fmt


def _agree_row(files: Files, row: Row, config: Config) -> tuple[Stored, set[str]]:
    """How one row is stored, and the names of its tensors."""
    shape, floats = matrix_shape(row, config), _types(row, config)
    known: set[str] = set()
    formats: dict[str, str] = {}  # and the first tensor of each
    scales: set[str] = set()
    for _, name in row.tensors():
        types = integers.integer_types(files, row, name, config)
        spelt = name if types is None else integers.spelt(name, types)
        fmt = _expect(files, name, shape, floats if types is None else types, spelt)
        known.add(name)
        formats.setdefault(fmt, name)
        if len(formats) > 1 and not set(formats) <= set(_FLOATS.values()):
            (first, like), (other, _) = list(formats.items())[:2]
            raise InputError(
                f"{files[name].path}: tensor {_called(files, name)}: expected {first} as in {like}, found {other}"
            )
        if fmt in _FLOATS.values() and row.storage in (LINEAR, EXPERT) and row.scale_name(name) in files:
            raise InputError(
                f"{files[name].path}: tensor {_called(files, name)}: expected {_names(_FP8)}, "
                f"for which there are scales {row.scale_name(name)}, found {files[name].dtype.name}"
            )
        if fmt in ("e4m3", "e2m1"):
            scale = row.scale_name(name)
            scales.add(_expect(files, scale, scale_grid(shape, Stored(fmt).block), _SCALES))
            known.add(scale)
        if fmt in INTEGERS:
            scale = row.scale_name(name)
            spelt = integers.spelt(scale, {np.dtype(np.int8): fmt}, scale=True)
            _expect(files, scale, scale_grid(shape, Stored(fmt).block), integers.SCALES, spelt)
            scales.add("f32")
            known.add(scale)
        if fmt == "int4":
            known.add(integers.check_packed(files, name, shape))
    widest = next(iter(formats)) if len(formats) == 1 else "f32"
    return Stored(widest, None if not scales else scales.pop() if len(scales) == 1 else "f32"), known


def agree(files: Files, config: Config) -> dict[Path, Stored]:
    """Checks names, shapes and types of every tensor, from headers only.

    Returns:
      How each leaf is stored, by path. Where the floats or the scales of one stack differ, the wider type is taken: it
      holds both exactly. MTP rows are left out where the files have no MTP module.

    Raises:
      InputError: for a tensor that is missing, unexpected, misshapen or mistyped, or quantised unlike others of its
        stack.
    """
    with_mtp, block_draft = has_mtp(files, config), has_block_draft(files, config)
    known: set[str] = set()
    stored: dict[Path, Stored] = {}
    for row in table(config):
        if with_mtp or not is_mtp(row):
            stored[row.path], names = _agree_row(files, row, config)
            known |= names
    if isinstance(config.quantization, IntegerQuantization):
        _agree_pairs(files, config, stored)
    for name in files:
        if name not in known and not _ignored(name, config, block_draft):
            raise InputError(
                f"{files[name].path}: tensor {_called(files, name)}: "
                f"expected no such tensor in this {config.model_type}, found one"
            )
    return stored


def _agree_pairs(files: Files, config: Config, stored: Mapping[Path, Stored]) -> None:
    """Refuses gates that are stored otherwise than what they multiply: both take the same activations."""
    for row in table(config):
        up = (*row.path[:-1], "up")
        if row.path[-1] != "gate" or up not in stored or row.path not in stored:
            continue
        formats = {stored[row.path].format, stored[up].format}
        if len(formats) > 1 and formats & set(INTEGERS):
            name = next(row.tensors())[1]
            raise InputError(
                f"{files[name].path}: tensor {_called(files, name)}: expected {stored[up].format} as the projection "
                f"beside it, found {stored[row.path].format}"
            )


# --- values ----------------------------------------------------------------------------------------------------------


def check_values(files: Files, config: Config, row: Row, part: str, name: str, view: np.ndarray | None = None) -> None:
    """Refuses NaN codes, scales or floats that are not finite, and ids of no expert.

    Args:
      files, name: which tensor.
      config, row, part: what it is: the row's "codes" or "scales".
      view: its bytes, where they have been read already.

    Raises:
      InputError: naming file and tensor.
    """
    view = files.read(name) if view is None else view.reshape(-1).view(files[name].dtype)
    where = f"{files[name].path}: tensor {_called(files, name)}"
    if row.storage == INTEGER:
        limit = config.n_routed_experts
        bad = view[(view < 0) | (view >= limit)]
        if bad.size:
            raise InputError(f"{where}: expected ids of experts, below {limit}, found {int(bad[0])}")
        return
    if part == "codes" and view.dtype.kind in "iu" and isinstance(config.quantization, IntegerQuantization):
        return  # every code is a number
    types = integers.SCALES | _SCALES if part == "scales" else _types(row, config)
    fmt = types[view.dtype]
    if not host_finite(view, fmt):
        expected, found = {
            "e4m3": ("no NaN code", "0x7F or 0xFF"),
            "e8m0": ("no NaN scale", "0xFF"),
        }.get(fmt, ("finite values", "NaN or infinity"))
        raise InputError(f"{where}: expected {expected}, found {found}")


def check_copies(files: Files, row: Row, original: Row, share: int = 0, shares: int = 1) -> int:
    """Refuses an MTP embedding or head that differs from the main model's, which it must repeat.

    Args:
      files: of the checkpoint.
      row, original: the copy, and what it repeats.
      share, shares: which of so many equal parts of the rows to compare: each process has one, all of them see all.

    Returns:
      The bytes that were compared, of both.

    Raises:
      InputError: naming both tensors.
    """
    (_, name), (_, source) = next(row.tensors()), next(original.tensors())
    a, b = files.read(name), files.read(source)
    start, stop = (a.shape[0] * i // shares for i in (share, share + 1))
    same = a.dtype == b.dtype and all(
        np.array_equal(a[i : min(i + 4096, stop)].view(np.uint8), b[i : min(i + 4096, stop)].view(np.uint8))
        for i in range(start, stop, 4096)
    )
    files.release(name)
    files.release(source)
    if not same:
        raise InputError(f"{files[name].path}: tensor {name}: expected a copy of {source}, found other values")
    return a[start:stop].nbytes + b[start:stop].nbytes


def problems(files: Files, config: Config) -> Iterator[str]:
    """Everything that is wrong with the values, one line each; for `inspect --check`."""
    stored = agree(files, config)
    rows = {row.path: row for row in table(config) if row.path in stored}
    for row in rows.values():
        for _, name in row.tensors():
            for part, tensor in (("codes", name), ("scales", row.scale_name(name))):
                if tensor in files:
                    try:
                        check_values(files, config, row, part, tensor)
                    except InputError as e:
                        yield str(e)
                    files.release(tensor)
        if row.copy_of is not None:
            try:
                check_copies(files, row, rows[row.copy_of])
            except InputError as e:
                yield str(e)
