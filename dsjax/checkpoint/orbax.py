"""Converted folders: parameters as an Orbax checkpoint, bit for bit as they are resident.

    O/config.json, tokenizer files, ...    copied from the source folder byte for byte
    O/dsjax.json                           what each leaf is: path, shape, format, block, types
    O/params/                              the Orbax checkpoint: nested dictionaries, a QArray as its codes and scales

The tree is rebuilt from dsjax.json alone, so any resident format comes back as it was. Orbax is imported only where it
is used: that takes a quarter of a second, which other verbs need not spend.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path as FilePath
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from dsjax.checkpoint.manifest import (
    MANIFEST,
    VERSION,
    check_leaves,
    describe,
    flatten,
    leaf_parts,
    nest,
    parse_entry,
    read_manifest,
    total_bytes,
)
from dsjax.checkpoint.values import all_finite
from dsjax.config import Config, load_config
from dsjax.errors import InputError
from dsjax.files import check_space, new_folder
from dsjax.params import Row, Tree, build_tree, is_mtp, table
from quant import QArray

PARAMS = "params"
CHUNK_BYTES = 32 << 20  # the least that a reader fetches at once

_COPIED = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "tokenizer.model", "chat_template.jinja", "chat_template.json"),
)


def is_converted(folder: FilePath) -> bool:
    """Whether the folder is one that `save` wrote, perhaps damaged."""
    return os.path.lexists(folder / MANIFEST) or os.path.isfile(folder / PARAMS / "_CHECKPOINT_METADATA")


# --- saving ----------------------------------------------------------------------------------------------------------


def _storage(key: Any, array: Any) -> Any:
    """Chunks of whole layers, or of whole matrices where a layer is above CHUNK_BYTES."""
    from orbax.checkpoint.experimental.v1.options import ArrayOptions

    shape, cut = array.sharding.shard_shape(array.shape), 0
    size = math.prod(shape) * array.dtype.itemsize
    while size > CHUNK_BYTES and cut < array.ndim - 2:
        size //= shape[cut]
        cut += 1
    return ArrayOptions.Saving.StorageOptions(chunk_byte_size=CHUNK_BYTES, shard_axes=tuple(range(cut)))


def _why(error: BaseException) -> str:
    """The root cause in one short line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__


class Saving:
    """A save under way. The folder appears, whole, when `result` is called; without it nothing does.

    Attributes:
      nbytes: of the parameters.
    """

    def __init__(self, out: FilePath, nbytes: int, response: Any, folder: ExitStack) -> None:
        self.nbytes = nbytes
        self._out, self._response, self._folder = out, response, folder

    def result(self) -> None:
        """Waits for the writers and puts the folder in its place.

        Raises:
          InputError: if it could not be written; nothing remains then.
        """
        with self._folder.pop_all():
            try:
                self._response.result()
            except BaseException as e:
                with suppress(Exception):  # interrupted: the folder cannot go while others write to it
                    self._response.result()
                if isinstance(e, Exception):
                    raise InputError(f"{self._out}: cannot be written: {_why(e)}") from None
                raise


def save(out: FilePath | str, source: FilePath | str, params: Tree, *, wait: bool = True) -> Saving:
    """Writes a converted folder.

    Args:
      out: the folder; must not exist, or be empty.
      source: checkpoint folder whose config and tokenizer files are copied.
      params: parameters in any resident format: float32 arrays and QArrays by the table's paths.
      wait: False returns as soon as the arrays are safe from being changed or donated; call `result` later.

    Raises:
      InputError: if the parameters are not the config's, the disk is too small, or `out` cannot be written.
    """
    import orbax.checkpoint.experimental.v1 as ocp

    out, source = FilePath(out), FilePath(source)
    leaves = dict(flatten(params))
    entries = [describe(path, leaf) for path, leaf in leaves.items()]
    try:
        check_leaves(dict(map(parse_entry, entries)), load_config(source), source)
    except (ValueError, KeyError) as e:
        raise e if isinstance(e, InputError) else InputError(f"parameters cannot be saved: {e}") from None
    size = total_bytes(leaves.values())
    check_space(out, size)
    context = ocp.Context()
    context.array.saving.use_compression = False  # quantised codes hardly shrink, and loading would take twice as long
    context.array.saving.scoped_storage_options_creator = _storage
    with ExitStack() as stack:
        folder = stack.enter_context(new_folder(out))
        for name in _COPIED:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        text = json.dumps({"version": VERSION, "leaves": entries}, indent=1)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
        try:
            with context:
                response = ocp.save_async((folder / PARAMS).absolute(), nest(leaves.items()))
        except Exception as e:
            raise InputError(f"{out}: cannot be written: {_why(e)}") from None
        saving = Saving(out, size, response, stack.pop_all())
    if wait:
        saving.result()
    return saving


# --- loading ---------------------------------------------------------------------------------------------------------


class Converted:
    """A converted folder whose dsjax.json, config and Orbax metadata agree. Nothing of its arrays is read yet.

    Attributes:
      leaves: every parameter's leaf, abstract, by path.
    """

    def __init__(self, folder: FilePath, config: Config) -> None:
        """Raises InputError where they do not."""
        import orbax.checkpoint.experimental.v1 as ocp

        self.config = config
        self.leaves = read_manifest(folder)
        check_leaves(self.leaves, config, folder / MANIFEST)
        self._ocp, self._params = ocp, (folder / PARAMS).absolute()
        if not os.path.isdir(self._params):
            raise InputError(f"{self._params}: expected an Orbax checkpoint, found none")
        try:
            stored = dict(flatten(ocp.metadata(self._params).metadata))
        except Exception as e:
            raise InputError(f"{self._params}: expected an Orbax checkpoint, found: {_why(e)}") from None
        for path, array in flatten(nest(self.leaves.items())):
            found = stored.get(path)
            shown = f"{found.dtype} {list(found.shape)}" if found is not None else "none"
            if shown != f"{array.dtype} {list(array.shape)}":
                name, wanted = ".".join(path), f"{array.dtype} {list(array.shape)}"
                raise InputError(f"{self._params}: array {name}: expected {wanted}, found {shown}")

    @property
    def has_mtp(self) -> bool:
        """Whether the MTP module is there."""
        return any(path[0] == "mtp" for path in self.leaves)

    def leaf(self, row: Row, sharding: Callable[[Row, str], Sharding], *, in_place: bool = True) -> Any:
        """Reads one leaf straight into its shardings; each device's part alone is read.

        Args:
          row: of the table.
          sharding: a function of (row, "codes" or "scales").
          in_place: look for NaN on the host where the array lies there; False does it on the device.

        Raises:
          InputError: if data is missing or damaged, or holds NaN.
        """
        template, where = self.leaves[row.path], f"{self._params}: parameter {'.'.join(row.path)}"
        wanted: dict[str, Any] = {
            part: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding(row, part))
            for part, a in leaf_parts(template).items()
        }
        leaf = dataclasses.replace(template, **wanted) if isinstance(template, QArray) else wanted["codes"]
        context = self._ocp.Context()
        context.pytree.loading.partial_load = True
        try:
            with context:
                found = self._ocp.load(self._params, nest([(row.path, leaf)]), checkpointable_name="state")
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as e:
            raise InputError(f"{where}: cannot be read: {_why(e)}") from None
        for key in row.path:
            found = found[key]
        loaded = dataclasses.replace(template, **found) if isinstance(template, QArray) else found
        for part, array in leaf_parts(loaded).items():
            fmt = "f32" if not isinstance(loaded, QArray) else loaded.format.name if part == "codes" else None
            fmt = fmt or ("e8m0" if array.dtype == np.uint8 else "f32")
            if not all_finite(array, fmt, on_host=in_place):
                raise InputError(f"{where}: expected finite {part}, found NaN or infinity")
        return loaded

    def rows(self, *, mtp: bool) -> tuple[Row, ...]:
        """The table's rows that are loaded."""
        return tuple(r for r in table(self.config) if r.copy_of is None and (mtp or not is_mtp(r)))

    def load(self, sharding: Callable[[Row, str], Sharding], seen: Callable[[Any], None], **options: Any) -> Tree:
        """The parameters, one leaf read at a time; `seen` is told each. Options: `mtp` of `rows`, others of `leaf`."""

        def leaf(row: Row) -> Any:
            loaded = self.leaf(row, sharding, **options)
            seen(loaded)
            return loaded

        return build_tree(self.rows(mtp=options.pop("mtp")), leaf)


def problems(folder: FilePath, config: Config) -> Iterator[str]:
    """Everything that is wrong with the values, one line each; for `inspect --check`."""
    converted, device = Converted(folder, config), SingleDeviceSharding(jax.devices()[0])
    for row in converted.rows(mtp=converted.has_mtp):
        try:
            converted.leaf(row, lambda row, part: device)
        except InputError as e:
            yield str(e)
