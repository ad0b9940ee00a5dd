"""A module file given to XLA through a PJRT client: what jax, pjrt and tpu-aot have in common.

The file is what is compiled, not a function that JAX traces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import compiler
from jax._src.sharding_impls import GSPMDSharding  # what a compiled program says of its arguments
from jaxlib import _jax
from jaxlib.mlir import ir

from dsjax.backend import has_long_rows
from dsjax.export.consumers.base import Arrays, Refused, main_function, new_context, parse, serialise
from dsjax.export.consumers.collectives import COLLECTIVES

Devices = Sequence[jax.Device]


def compiled(
    devices: Devices, module: bytes, options: Mapping[str, Any], *, partitions: bool = False, row_major: bool = False
) -> Any:
    """An executable of a program, for one device or for several that run it together.

    Args:
      devices: one, or one for each rank.
      module: a portable artifact. For several devices see `as_replica`.
      options: of the compiler, as `dsjax.backend.compiler_options` gives them.
      partitions: whether the compiler splits the program over the devices by the shardings in it.
      row_major: whether weights and caches lie as files have them (`dsjax.backend.weight_placement`). XLA:TPU chooses
        for itself unless it is told, and then copies whole stacks into the order of the program's loops.

    Raises:
      Refused: with the compiler's reason.
    """
    client = devices[0].client
    ids = np.array([[d.id for d in devices]]) if partitions else np.array([[d.id] for d in devices])
    replicas, parts = ids.shape
    chosen = compiler.get_compile_options(replicas, parts, ids, env_options_overrides=dict(options), backend=client)
    parsed = parse(module, new_context())
    if "sym_name" not in parsed.operation.attributes:  # by which JAX's logs speak of it
        with parsed.context:
            parsed.operation.attributes["sym_name"] = ir.StringAttr.get("module")
    if row_major:
        lay_out_rows(parsed)
    try:
        return compiler.backend_compile_and_load(client, parsed, _jax.DeviceList(tuple(devices)), chosen, [])
    except jax.errors.JaxRuntimeError as e:
        raise Refused(f"the compiler: {e}") from None


def lay_out_rows(module: ir.Module) -> None:
    """Says of every argument with long rows, and of donated ones and what replaces them, that it is row-major."""
    main = main_function(module)
    with module.context:
        inputs, results = main.type.inputs, main.type.results
        arguments = _attributes(main, "arg_attrs", len(inputs))
        taken = {ir.IntegerAttr(a["tf.aliasing_output"]).value for a in arguments if "tf.aliasing_output" in a}
        for kind, kept in zip(inputs, arguments, strict=True):
            if "tf.aliasing_output" in kept or has_long_rows(ir.RankedTensorType(kind).shape):
                kept |= _row_major(kind)
        given = _attributes(main, "res_attrs", len(results))
        for i in taken:
            given[i] |= _row_major(results[i])
        for key, each in (("arg_attrs", arguments), ("res_attrs", given)):
            main.attributes[key] = ir.ArrayAttr.get([ir.DictAttr.get(kept) for kept in each])


def _attributes(main: Any, key: str, count: int) -> list[dict[str, Any]]:
    """The attributes of a function's arguments or results; a function without any has no such list."""
    if key not in main.attributes:
        return [{} for _ in range(count)]
    return [{named.name: named.attr for named in each} for each in main.attributes[key]]


def _row_major(kind: Any) -> dict[str, Any]:
    order = ",".join(str(axis) for axis in reversed(range(ir.RankedTensorType(kind).rank)))
    return {"mhlo.layout_mode": ir.StringAttr.get(f"{{{order}}}")}


def run(device: jax.Device, module: bytes, arguments: Arrays, options: Mapping[str, Any]) -> Arrays:
    """The results of a program on one device; raises as `compiled` does."""
    return run_replicas([device], module, [arguments], options)[0]


def run_replicas(
    devices: Devices, module: bytes, arguments: Sequence[Arrays], options: Mapping[str, Any]
) -> list[Arrays]:
    """The results of one program on each of several devices, which take part in its collectives."""
    executable = compiled(devices, module, options)
    with jax.enable_x64(True):  # an argument of 64 bits is not to be made one of 32
        given = [_across(devices, parts) for parts in zip(*arguments, strict=True)]
    try:
        columns = executable.execute_sharded(given).disassemble_into_single_device_arrays()
        return [[np.asarray(column[i]) for column in columns] for i in range(len(devices))]
    except jax.errors.JaxRuntimeError as e:
        raise Refused(f"the runtime: {e}") from None


def _across(devices: Devices, parts: Sequence[np.ndarray]) -> jax.Array:
    """One array that holds each device's own argument, along a leading axis of devices."""
    placed = [jax.device_put(part, device) for part, device in zip(parts, devices, strict=True)]
    if len(devices) == 1:
        return placed[0]
    mesh = jax.sharding.Mesh(np.array(devices), ("rank",))
    shape = (len(devices) * parts[0].shape[0], *parts[0].shape[1:]) if parts[0].ndim else ()
    spec = jax.sharding.PartitionSpec("rank") if parts[0].ndim else jax.sharding.PartitionSpec()
    return jax.make_array_from_single_device_arrays(shape, jax.sharding.NamedSharding(mesh, spec), placed)


def run_partitioned(devices: Devices, module: bytes, arguments: Arrays, options: Mapping[str, Any]) -> Arrays:
    """The results, whole, of a global program that XLA splits over the devices by the shardings in it."""
    executable = compiled(devices, module, options, partitions=True)
    kinds = [ir.RankedTensorType(kind) for kind in main_function(parse(module, new_context())).type.results]
    given = []
    for array, split in zip(arguments, executable.get_parameter_shardings(), strict=True):
        sharding = GSPMDSharding(devices, split)
        given.append(jax.make_array_from_callback(array.shape, sharding, array.__getitem__))
    try:
        columns = executable.execute_sharded(given).disassemble_into_single_device_arrays()
        found = []
        for kind, parts, split in zip(kinds, columns, executable.get_output_shardings(), strict=True):
            sharding = GSPMDSharding(devices, split)
            found.append(np.asarray(jax.make_array_from_single_device_arrays(tuple(kind.shape), sharding, parts)))
        return found
    except jax.errors.JaxRuntimeError as e:
        raise Refused(f"the runtime: {e}") from None


def as_replica(modules: Sequence[bytes]) -> bytes | None:
    """The one program that all ranks run, as a replica's, or None if theirs differ in more than the rank's number."""
    code = modules[0] if all(module == modules[0] for module in modules) else _with_number(modules)
    return None if code is None else to_replica(code)


def to_replica(code: bytes) -> bytes:
    """A rank's program as a replica's.

    A rank's collectives name the partitions of one program. XLA partitions only what is annotated for it, so here the
    same ranks are replicas of a program: collectives lose their channel, and a rank's number is the replica's.
    """
    module = parse(code, new_context())
    with module.context, ir.Location.unknown():
        for function in module.body.operations:
            for block in function.regions[0].blocks:
                _to_replica(block)
        return serialise(module)


_NUMBER = 0xD1B54A33
"""Stands for a rank's number where files of ranks are made one."""


def _with_number(modules: Sequence[bytes]) -> bytes | None:
    """The artifact of all ranks with `_NUMBER` for each one's number, if four bytes that are it alone differ."""
    first = modules[0]
    if any(len(module) != len(first) for module in modules) or _NUMBER.to_bytes(4, "little") in first:
        return None
    differs = np.flatnonzero(np.frombuffer(first, np.uint8) != np.frombuffer(modules[1], np.uint8))
    if not differs.size:
        return None
    at = int(differs[0])  # the lowest byte of 0 and 1, which comes first
    head, tail = first[:at], first[at + 4 :]
    if any(module != head + rank.to_bytes(4, "little") + tail for rank, module in enumerate(modules)):
        return None
    return head + _NUMBER.to_bytes(4, "little") + tail


def _is_number(op: Any) -> bool:
    if op.operation.name == "stablehlo.constant":
        return str(op.operation.attributes["value"]) == f"dense<{_NUMBER}> : tensor<ui32>"
    return bool(op.operation.name == "stablehlo.partition_id")


def _to_replica(block: Any) -> None:
    for op in list(block.operations):
        for region in op.regions:
            for inner in region.blocks:
                _to_replica(inner)
        name = op.operation.name
        if name in COLLECTIVES:
            for attribute in ("channel_handle", "channel_id", "use_global_device_ids"):
                if attribute in op.operation.attributes:
                    del op.operation.attributes[attribute]
        elif _is_number(op):
            with ir.InsertionPoint(op):
                number = ir.Operation.create("stablehlo.replica_id", results=[op.operation.results[0].type])
            op.operation.results[0].replace_all_uses_with(number.results[0])
            op.operation.erase()
