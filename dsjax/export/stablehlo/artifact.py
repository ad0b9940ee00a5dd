"""StableHLO modules as files: stripped text, and portable artifacts of a chosen version.

A module is `jaxlib.mlir.ir.Module`, as `jax.jit(f).lower(...).compiler_ir("stablehlo")` gives it. Every function here
leaves the module it is given as it was. The portable artifact (VHLO bytecode) is the contract: StableHLO promises
to read it for five years and to be read two years back; text has no such promise.
"""

from __future__ import annotations

import dataclasses
import io
import re
import socket
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from jax._src.interpreters.mlir import make_ir_context
from jax.extend.mlir import serialize_portable_artifact
from jaxlib.mlir import ir, passmanager
from jaxlib.mlir.dialects import stablehlo

from dsjax.errors import InputError

_LAST_MINOR_BEFORE_1 = 20
"""StableHLO went from 0.20 to 1.0."""

_DEFAULTS = {"mhlo.num_partitions": "1 : i32", "mhlo.num_replicas": "1 : i32", "jax.uses_shape_polymorphism": "false"}
"""Attributes that JAX puts on every module and that say nothing where they have these values."""

_NAMES = ("jax.result_info", "jax.arg_info")
"""What JAX calls an argument or result: a path in a pytree, harmless unless a key of it is a path on disk."""

_PATH = re.compile(r"(?:^|[^\w.])(?:/[\w.+-]+){2}|\b[A-Za-z]:\\\\?\w")
_HEADER = re.compile(rb"ML\xefR.StableHLO_v(\d+\.\d+\.\d+)\x00", re.DOTALL)
_ILLEGAL = re.compile(r"failed to legalize operation '(?:vhlo\.)?([\w.]+?)(?:_v\d+)?'")
_SYMBOL = re.compile(r'sym_name = #vhlo\.string_v1<"([^"]+)">')


def _bytecode(module: ir.Module) -> bytes:
    out = io.BytesIO()
    module.operation.write_bytecode(file=out)
    return out.getvalue()


def _copy(module: ir.Module) -> ir.Module:
    return ir.Module.parse(_bytecode(module), module.context)


def _run(module: ir.Module, passes: str) -> None:
    """Runs passes in place.

    Raises:
      InputError: with MLIR's first complaint.
    """
    stablehlo.register_stablehlo_passes()
    with module.context:
        manager = passmanager.PassManager.parse(f"builtin.module({passes})")
        try:
            manager.run(module.operation)
        except ir.MLIRError as e:
            found = e.error_diagnostics[0].message if e.error_diagnostics else str(e)
            raise InputError(f"module: expected passes {passes} to run, found: {found[:300]}") from None


def walk(operation: Any) -> Iterator[Any]:
    """An operation and all operations inside it, in the order of the text."""
    yield operation
    for region in operation.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield from walk(inner.operation)


def text(module: ir.Module) -> str:
    """The module as MLIR text without locations."""
    return str(module.operation.get_asm(enable_debug_info=False)) + "\n"


def attribute_names(operation: Any) -> list[str]:
    """Names of an operation's attributes, its own and those that other dialects hang on it ("mhlo.sharding")."""
    return [item if isinstance(item, str) else item.name for item in operation.attributes]


def strip(module: ir.Module) -> ir.Module:
    """A copy without source locations, without attributes that say nothing, and without names that hold a path.

    Arguments lose the names that locations gave them (take those from the inventory, before); `jax.result_info` and
    `jax.arg_info` stay unless they hold a slash.

    Raises:
      InputError: if a path or this host's name remains, in the configuration of a custom call for instance.
    """
    out = _copy(module)
    _run(out, "strip-debuginfo")
    with out.context:
        for name, value in _DEFAULTS.items():
            if name in attribute_names(out.operation) and str(out.operation.attributes[name]) == value:
                del out.operation.attributes[name]
        for function in out.body.operations:
            for key in ("arg_attrs", "res_attrs"):
                if function.operation.name == "func.func" and key in attribute_names(function.operation):
                    each: Any = function.attributes[key]
                    function.attributes[key] = ir.ArrayAttr.get([_without_paths(d) for d in each])
    for found in leaks(out):
        raise InputError(f"module: expected no path and no host name in it, found {found}")
    return out


def _without_paths(attributes: Any) -> Any:
    """A dictionary of an argument's attributes without the names that hold a slash."""
    kept = {item.name: item.attr for item in attributes}
    for name in _NAMES:
        if name in kept and re.search(r"[/\\]", str(kept[name])):
            del kept[name]
    return ir.DictAttr.get(kept)


def leaks(module: ir.Module) -> list[str]:
    """Strings in the module's text that look like an absolute path or hold this host's name."""
    host = socket.gethostname()
    strings = re.findall(r'"((?:[^"\\]|\\.)*)"', text(module))
    return [s for s in strings if _PATH.search(s) or (len(host) > 3 and host in s)]


def current_version() -> str:
    """The newest StableHLO version that this jaxlib writes."""
    return stablehlo.get_current_version()


def parse_version(version: str) -> tuple[int, int, int]:
    """`"1.8.0"` as numbers that compare.

    Raises:
      InputError: if it is not three numbers.
    """
    found = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)", version)
    if not found:
        raise InputError(f"StableHLO version: expected three numbers as in 1.8.0, found {version!r}")
    return int(found[1]), int(found[2]), int(found[3])


@lru_cache
def versions() -> tuple[str, ...]:
    """The minor releases that this jaxlib can write, oldest first, ending with its own version."""
    least, most = (parse_version(v) for v in (stablehlo.get_minimum_version(), current_version()))
    minors = [(0, n, 0) for n in range(_LAST_MINOR_BEFORE_1 + 1)]
    minors += [(major, n, 0) for major in range(1, most[0] + 1) for n in range(100)]
    inside = [v for v in minors if least < v < most]
    return tuple(".".join(map(str, v)) for v in (least, *inside, most))


def check_version(version: str) -> None:
    """Refuses a version that this jaxlib does not write.

    Raises:
      InputError: if it is none, or outside.
    """
    least, most = versions()[0], versions()[-1]
    if not parse_version(least) <= parse_version(version) <= parse_version(most):
        raise InputError(f"StableHLO version: expected {least} to {most}, found {version}")


_SOUGHT = 0x9E3779B9
"""A rank's number in an artifact before it has one."""


@dataclasses.dataclass(frozen=True)
class _Ready:
    """A module as bytecode: given a module itself, jaxlib 0.10.2 ends the process.

    Attributes:
      shardy: whether it speaks of Shardy, which then stays as it is: else it would become custom calls.
    """

    bytecode: bytes
    shardy: bool

    @classmethod
    def of(cls, module: ir.Module) -> _Ready:
        return cls(_bytecode(module), "sdy." in text(module))

    def portable(self, version: str) -> tuple[bytes, str]:
        """(artifact, "") or (b"", MLIR's complaint)."""
        try:
            return serialize_portable_artifact(self.bytecode, version, self.shardy), ""
        except Exception as e:  # jaxlib raises its own kinds, and they differ between versions
            return b"", str(e)

    def least(self) -> str | None:
        """The first version that can express the module: newer ones only add, so halve. None where none can."""
        known = versions()
        low, high = 0, len(known)
        while low < high:
            middle = (low + high) // 2
            if self.portable(known[middle])[0]:
                high = middle
            else:
                low = middle + 1
        return known[low] if low < len(known) else None


def serialise(module: ir.Module, version: str) -> bytes:
    """The portable artifact of the stripped module. The same module gives the same bytes.

    CHLO operators that StableHLO has no operator for are carried as composites with a decomposition.

    Args:
      module: StableHLO, CHLO and functions; Shardy is kept as it is.
      version: of StableHLO, `"1.8.0"`: what the reader understands.

    Raises:
      InputError: if that version is outside of what jaxlib writes, or cannot express the module: with the operation at
        fault, and the least version that can.
    """
    check_version(version)
    stripped = strip(module)
    ready = _Ready.of(stripped)
    artifact, complaint = ready.portable(version)
    if artifact:
        return artifact
    needed, fault = ready.least(), _fault(stripped, complaint, version)
    if needed is None:
        raise InputError(f"module: expected what StableHLO can express, found {fault}")
    raise InputError(f"StableHLO {version}: expected operations of that version, found {fault}; needs {needed}")


def portable(stripped: ir.Module, version: str | None, least: str | None = None) -> tuple[bytes, str]:
    """(artifact, least version that it could have) of a stripped module, which is prepared once for both.

    Args:
      version: the artifact's; the least one if None.
      least: where it is known.

    Raises:
      InputError: as `serialise` does.
    """
    if version is not None:
        return serialise(stripped, version), least or minimum_version(stripped)
    ready = _Ready.of(stripped)
    least = least or ready.least()
    made = ready.portable(least)[0] if least else b""
    return made or serialise(stripped, versions()[-1]), least or versions()[-1]


def of_ranks(stripped_text: str, version: str, ranks: int) -> Iterator[tuple[str, bytes]]:
    """(text, artifact) of each rank's program, from the text of the stripped program of all and a version that fits.

    A rank's number is a constant in it and nothing else differs. So one artifact is made, with a number that is found
    again among its bytes; else, in the seldom case that they hold it elsewhere, too, one for each rank.
    """

    def numbered(rank: int) -> str:
        text_ = stripped_text.replace("stablehlo.partition_id :", f"stablehlo.constant dense<{rank}> :")
        # Written otherwise, all ranks would get one program, which asks its device.
        assert "partition_id" not in text_ and "replica_id" not in text_, "expected a rank's number to be replaced"
        return text_

    sought = _SOUGHT.to_bytes(4, "little")
    first = serialize_portable_artifact(numbered(_SOUGHT), version, False)
    once = first.count(sought) == int(numbered(0) != stripped_text) and str(_SOUGHT) not in stripped_text
    for rank in range(ranks):
        text_ = numbered(rank)
        if once:
            yield text_, first.replace(sought, rank.to_bytes(4, "little"))
        else:
            yield text_, serialize_portable_artifact(text_, version, False)


def as_read(module: ir.Module) -> ir.Module:
    """The module as readers of its artifact see it, locations kept.

    What StableHLO has no operator for, CHLO's top-k, is a composite there, whose decomposition is a function.

    The module itself where no artifact can express it, which `serialise` says.
    """
    artifact, _ = _Ready.of(module).portable(current_version())
    if not artifact:
        return module
    with module.context:
        return stablehlo.deserialize_portable_artifact(module.context, artifact)


def _fault(stripped: ir.Module, complaint: str, version: str) -> str:
    """The illegal operation, the function it is, and the element types that the version does not know."""
    illegal = _ILLEGAL.search(complaint)
    if not illegal:
        first = re.search(r"error: (.*)", complaint)
        return first[1][:300] if first else complaint[:300] or "no reason given"
    symbol = _SYMBOL.search(complaint.partition("see current operation")[0]) if illegal[1] == "func" else None
    name = f"function @{symbol[1]}" if symbol else f"operation stablehlo.{illegal[1]}"
    young = [t for t in sorted(element_types(stripped)) if parse_version(type_floor(t)) > parse_version(version)]
    return name + (f" (type {', '.join(young)})" if young else "")


def element_types(module: ir.Module) -> set[str]:
    """The element types of all tensors in the module, in MLIR's names (`f8E4M3FN`, `ui8`, `i1`)."""
    found = set()
    for operation in walk(module.operation):
        for region in operation.regions:
            for block in region.blocks:
                found |= {_element(a.type) for a in block.arguments}
        found |= {_element(r.type) for r in operation.results}
    return found - {""}


def _element(type_: Any) -> str:
    return str(type_.element_type) if isinstance(type_, ir.ShapedType) else ""


@lru_cache
def type_floor(element: str) -> str:
    """The least StableHLO version that knows an element type, found by trying."""
    context = make_ir_context()
    source = f"func.func @main(%x: tensor<2x{element}>) -> tensor<2x{element}> {{ return %x : tensor<2x{element}> }}"
    try:
        with context, _quiet(context):
            return _Ready.of(ir.Module.parse(source, context)).least() or versions()[-1]
    except ir.MLIRError:
        return versions()[-1]


def minimum_version(module: ir.Module) -> str:
    """The least StableHLO version whose readers understand the module's artifact.

    Raises:
      InputError: if none that jaxlib writes can express it.
    """
    found = _Ready.of(strip(module)).least()
    if found is None:
        serialise(module, versions()[-1])  # says what is at fault
    return found or versions()[-1]


class _quiet:
    """Keeps what MLIR says about a context's modules, instead of letting it write to standard error."""

    def __init__(self, context: Any) -> None:
        self.context, self.said = context, list[str]()

    def __enter__(self) -> list[str]:
        self.handler = self.context.attach_diagnostic_handler(self._take)
        return self.said

    def _take(self, diagnostic: Any) -> bool:
        self.said.append(str(diagnostic.message))
        return True

    def __exit__(self, *_: object) -> None:
        self.handler.detach()


def artifact_version(artifact: bytes) -> str:
    """The StableHLO version that an artifact's header names.

    Raises:
      InputError: if it is not a portable artifact, or of a newer version than this jaxlib's.
    """
    found = _HEADER.match(artifact)
    if not found:
        raise InputError(f"portable artifact: expected its header (StableHLO_v...), found {artifact[:16]!r}")
    version = found[1].decode()
    if parse_version(version) > parse_version(current_version()):  # MLIR reads it if it can, whatever the header says
        raise InputError(f"portable artifact: expected StableHLO {current_version()} or older, found {version}")
    return version
