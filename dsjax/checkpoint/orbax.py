"""Converted folders: parameters as an Orbax checkpoint, bit for bit as they are resident.

    O/config.json, tokenizer files, ...    copied from the source folder byte for byte
    O/dsjax.json                           what each leaf is: path, shape, format, block, types
    O/params/                              the Orbax checkpoint: nested dictionaries, a QArray as its codes and scales

The tree is rebuilt from dsjax.json alone, so any resident format comes back as it was. Orbax is imported only where it
is used: that takes a quarter of a second, which other verbs need not spend.
"""

from __future__ import annotations

import dataclasses
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
    Leaves,
    check_leaves,
    describe,
    flatten,
    leaf_parts,
    nest,
    parse_entry,
    read_manifest,
    write_manifest,
)
from dsjax.checkpoint.placing import extents, local_parts, undivided
from dsjax.checkpoint.quiet import Failed, call
from dsjax.checkpoint.values import all_below, all_finite
from dsjax.config import Config, load_config
from dsjax.errors import InputError
from dsjax.files import check_space, new_folder
from dsjax.params import INTEGER, Path, Row, Stored, Tree, build_tree, is_mtp, table, tree_bytes
from quant import WHOLE, QArray, retile

PARAMS = "params"
CHUNK_BYTES = 32 << 20  # the least that a reader fetches at once

COPIED = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "tokenizer.model", "chat_template.jinja", "chat_template.json"),
)
COPIED_FOLDER = "encoding"  # the texts of a conversation format that has no template (dsjax.chat)


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


class Saving:
    """A save under way. The folder appears, whole, when `result` is called; without it nothing does.

    Attributes:
      nbytes: of the parameters.
    """

    def __init__(self, out: FilePath, leaves: Leaves, folder: FilePath, response: Any, cleanup: ExitStack) -> None:
        self.nbytes = tree_bytes(leaves)
        self._entries = [describe(path, leaf) for path, leaf in leaves.items()]
        self._out, self._folder, self._response, self._cleanup = out, folder, response, cleanup
        self._done = False

    def result(self) -> None:
        """Waits for the writers and puts the folder in its place; once is enough.

        Raises:
          InputError: if it could not be written; nothing remains then.
        """
        if self._done:
            return
        self._done = True
        with self._cleanup:
            try:
                call(self._response.result)
            except Failed as e:
                raise InputError(f"{self._out}: cannot be written: {e}") from None
            except BaseException:  # interrupted: the folder cannot go while others write to it
                with suppress(Failed):
                    call(self._response.result)
                raise
            write_manifest(self._folder, self._entries, self._folder / PARAMS)


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
    config = load_config(source)
    try:
        abstract = dict(parse_entry(describe(path, leaf)) for path, leaf in leaves.items())
    except (ValueError, KeyError) as e:
        raise InputError(f"parameters cannot be saved: {e}") from None
    check_leaves(abstract, config, source)
    check_space(out, tree_bytes(leaves))
    context = ocp.Context()
    context.array.saving.use_compression = False  # quantised codes hardly shrink, and loading would take twice as long
    context.array.saving.scoped_storage_options_creator = _storage
    if wait:  # then not all arrays need be copied at once; the limit must be above the largest
        largest = max(tree_bytes(array) for leaf in leaves.values() for array in leaf_parts(leaf).values())
        context.memory.write_concurrent_bytes = largest + CHUNK_BYTES
    with ExitStack() as stack:
        folder = stack.enter_context(new_folder(out))
        inside = sorted((source / COPIED_FOLDER).glob("*"))
        copied = [*COPIED, *(f"{COPIED_FOLDER}/{path.name}" for path in inside)]
        for name in copied:
            if (source / name).is_file():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(source / name, folder / name)
        try:
            with context:
                response = call(lambda: ocp.save_async((folder / PARAMS).absolute(), nest(leaves.items())))
        except Failed as e:
            raise InputError(f"{out}: cannot be written: {e}") from None
        saving = Saving(out, leaves, folder, response, stack.pop_all())
    if wait:
        saving.result()
    return saving


# --- loading ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """An array to restore, in the type that it was stored in: Orbax would convert to another without a word."""

    shape: tuple[int, ...]
    sharding: Sharding
    dtype: None = None


def bytes_read() -> int:
    """Bytes that this process has read from files, by the count of the library that reads them for Orbax."""
    import tensorstore

    found = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in found for value in metric["values"])


def _cut_block(row: Row, leaf: Any, cut: Callable[[Row, Stored], Stored]) -> tuple[int, int]:
    """The block that a saved leaf's scales are to have."""
    if not isinstance(leaf, QArray) or leaf.scales is None:
        return leaf.block if isinstance(leaf, QArray) else (1, WHOLE)
    scales = "e8m0" if leaf.scales.dtype == np.uint8 else "f32"
    return cut(row, Stored(leaf.format.name, scales, leaf.block)).block


def _finer(leaf: QArray, block: tuple[int, int], where: Sharding) -> Callable[[jax.Array], jax.Array]:
    """A program that makes the scales of such a leaf finer, each device those of its part."""
    return jax.jit(lambda scales: retile(dataclasses.replace(leaf, scales=scales), block).scales, out_shardings=where)


class Converted:
    """A converted folder whose dsjax.json agrees with config and files. Nothing of its arrays is read yet.

    Attributes:
      config: the config it was opened with.
      leaves: every parameter's leaf, abstract, by path.
      needed_bytes: of the leaves that were loaded, the saved bytes of this process's parts, each once.
    """

    def __init__(self, folder: FilePath, config: Config) -> None:
        """Raises InputError where they disagree."""
        self.config = config
        self.leaves = read_manifest(folder)
        check_leaves(self.leaves, config, folder / MANIFEST)
        self.needed_bytes = 0
        self._params = (folder / PARAMS).absolute()
        if not os.path.isdir(self._params):
            raise InputError(f"{self._params}: expected an Orbax checkpoint, found none")

    @property
    def has_mtp(self) -> bool:
        """Whether the MTP module is there."""
        return any(path[0] == "mtp" for path in self.leaves)

    def _array(self, name: Path, like: Any, where: Sharding) -> jax.Array:
        """One array, alone, so that where its data is damaged there is one error."""
        import orbax.checkpoint.experimental.v1 as ocp

        context = ocp.Context()
        context.pytree.loading.partial_load = True
        wanted, error = f"{like.dtype} {list(like.shape)}", f"{self._params}: array {'.'.join(name)}"
        tree = nest([(name, _Wanted(like.shape, where))])
        try:
            with context:
                stored = call(lambda: ocp.load(self._params, tree, checkpointable_name="state"))
        except Failed as e:
            raise InputError(f"{error}: expected {wanted}, found it unreadable: {e}") from None
        self.needed_bytes += sum(
            math.prod(extents(part)) * like.dtype.itemsize for part in local_parts(where, like.shape)
        )
        found = dict(flatten(stored)).get(name)
        if not isinstance(found, jax.Array):
            raise InputError(f"{error}: expected {wanted}, found none")
        if found.dtype != like.dtype:
            raise InputError(f"{error}: expected {wanted}, found {found.dtype}")
        return found

    def leaf(
        self,
        row: Row,
        sharding: Callable[[Row, str], Sharding],
        *,
        cut: Callable[[Row, Stored], Stored] = lambda row, held: held,
        in_place: bool = True,
    ) -> Any:
        """Reads one leaf straight into its shardings; each device's part alone is read.

        Args:
          row: of the table.
          sharding: a function of (row, "codes" or "scales").
          cut: makes scale blocks finer where a device's part would cut one. Scales are then read in whole along the
            axes where that is so, and made finer on the devices.
          in_place: look for NaN on the host where the array lies there; False does it on the device.

        Raises:
          InputError: if data is missing or damaged, or holds NaN.
        """
        template = self.leaves[row.path]
        quantised = isinstance(template, QArray)
        block = _cut_block(row, template, cut)
        loaded: dict[str, Any] = {}
        for part, like in leaf_parts(template).items():
            name = (*row.path, part) if quantised else row.path
            where = sharding(row, part)
            if part == "scales" and template.block[1] == WHOLE:  # for every device that holds a part of the row
                where = undivided(where, len(like.shape), -1)
            changed = [i - 2 for i in range(2) if part == "scales" and block[i] != template.block[i]]
            loaded[part] = array = self._array(name, like, undivided(where, len(like.shape), *changed))
            fmt = template.format.name if quantised and part == "codes" else "f32"
            fmt = "e8m0" if part == "scales" and array.dtype == np.uint8 else fmt
            if row.storage == INTEGER and not all_below(array, self.config.n_routed_experts):
                limit = self.config.n_routed_experts
                raise InputError(
                    f"{self._params}: array {'.'.join(name)}: expected ids of experts, below {limit}, found others"
                )
            if array.dtype != np.int32 and not all_finite(array, fmt, on_host=in_place):
                raise InputError(
                    f"{self._params}: array {'.'.join(name)}: expected finite values, found NaN or infinity"
                )
            if changed:
                loaded[part] = _finer(template, block, where)(array)
        return dataclasses.replace(template, **loaded, block=block) if quantised else loaded["codes"]

    def rows(self, *, mtp: bool) -> tuple[Row, ...]:
        """The table's rows that are loaded."""
        return tuple(r for r in table(self.config) if r.copy_of is None and (mtp or not is_mtp(r)))

    def load(
        self,
        sharding: Callable[[Row, str], Sharding],
        seen: Callable[[Any], None],
        *,
        mtp: bool,
        cut: Callable[[Row, Stored], Stored] = lambda row, held: held,
        in_place: bool = True,
    ) -> Tree:
        """The parameters, one leaf read at a time; `seen` is told each. Others as for `rows` and `leaf`."""

        def leaf(row: Row) -> Any:
            loaded = self.leaf(row, sharding, cut=cut, in_place=in_place)
            seen(loaded)
            return loaded

        return build_tree(self.rows(mtp=mtp), leaf)


def problems(folder: FilePath, config: Config) -> Iterator[str]:
    """Everything that is wrong with the values, one line each; for `inspect --check`."""
    converted, device = Converted(folder, config), SingleDeviceSharding(jax.local_devices()[0])
    for row in converted.rows(mtp=converted.has_mtp):
        try:
            converted.leaf(row, lambda row, part: device)
        except InputError as e:
            yield str(e)
