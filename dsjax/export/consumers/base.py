"""What all consumers of a bundle's modules have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, Protocol

import numpy as np
from jax._src.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from dsjax.export.stablehlo.artifact import artifact_version
from dsjax.export.stablehlo.loops import functions

Arrays = list[np.ndarray]


class Refused(Exception):
    """A consumer's compiler or runtime does not take a module, or gave up on it; one line says why.

    Attributes:
      state: "refused", "too slow" or "not run".
    """

    def __init__(self, message: str, state: str = "refused") -> None:
        super().__init__(" ".join(message.split())[:400])
        self.state = state


@dataclasses.dataclass(frozen=True)
class Ran:
    """Results of all ranks, and how they ran together: "" for one rank."""

    results: list[Arrays]
    how: str = ""


@dataclasses.dataclass(frozen=True)
class Misread:
    """A code of a float type that a consumer takes for another number; a `harmless` one that it decodes rightly."""

    dtype: str
    code: int
    found: str
    harmless: int

    def within(self, array: np.ndarray, inside: Collection[str] = ()) -> np.ndarray | None:
        """Where an array has the code; None if nowhere. Bytes may stand for types that are inside of a program."""
        if array.dtype.name != self.dtype and not (array.dtype == np.uint8 and self.dtype in inside):
            return None
        where = array.view(np.uint8) == self.code
        return where if where.any() else None


def without_misreads(
    misreads: Sequence[Misread], arguments: Sequence[Arrays], inside: Collection[str] = ()
) -> tuple[list[Misread], list[Arrays]]:
    """Which of the codes arguments have, and the arguments with harmless ones in their places.

    Args:
      inside: element types of the program, by NumPy's names, which bytes may stand for.
    """
    met: list[Misread] = []

    def replaced(array: np.ndarray) -> np.ndarray:
        for one in misreads:
            where = one.within(array, inside)
            if where is not None:
                met.extend([one] * (one not in met))
                array = np.where(where, np.uint8(one.harmless), array.view(np.uint8)).view(array.dtype)
        return array

    others = [[replaced(array) for array in arrays] for arrays in arguments]
    return met, others


class Consumer(Protocol):
    """Somebody who takes portable StableHLO."""

    name: str
    executes: bool
    """Whether it runs programs; otherwise it only compiles them."""

    def available(self) -> str | None:
        """None, or what is missing, in words."""

    def run(self, module: bytes, arguments: Arrays) -> Arrays:
        """The results of one program, in order.

        Raises:
          Refused: see there.
        """

    def run_ranks(self, modules: Sequence[bytes], arguments: Sequence[Arrays]) -> Ran:
        """The results of the programs of all ranks, which run together; raises as `run` does."""

    def compile(self, modules: Sequence[bytes]) -> dict[str, Any]:
        """Only compiles the program, or those of all ranks, and gives what is known then; raises as `run` does."""

    misreads: Sequence[Misread]
    """The codes that it is known to decode wrongly."""


def new_context() -> ir.Context:
    """An MLIR context that knows StableHLO and the interpreter's own dialect."""
    context = mlir.make_ir_context()
    stablehlo.register_interpreter_dialect(context)
    return context


def parse(module: bytes, context: ir.Context) -> ir.Module:
    """A portable artifact as a module of the context.

    Raises:
      Refused: if it is none, or of a version that this jaxlib does not know.
    """
    said: list[str] = []

    def take(diagnostic: Any) -> bool:  # MLIR would write it to standard error
        said.append(str(diagnostic.message))
        return True

    handler: Any = context.attach_diagnostic_handler(take)
    try:
        artifact_version(module)
        with context:
            return stablehlo.deserialize_portable_artifact(context, module)
    except (ValueError, ir.MLIRError) as e:
        raise Refused(f"expected a portable StableHLO artifact, found: {said[0] if said else e}") from None
    finally:
        handler.detach()


def serialise(module: ir.Module) -> bytes:
    """A module as a portable artifact of this jaxlib's own version."""
    with module.context:
        return stablehlo.serialize_portable_artifact(module, stablehlo.get_current_version())


def copy_functions(module: ir.Module, program: ir.Module, prefix: str) -> dict[str, Any]:
    """Copies a module's functions into another module, private and under prefixed names; the module keeps those names.

    Returns:
      The copies by their new names.
    """
    found = functions(module)
    for name, function in found.items():  # all of them first: a copy's calls are renamed no more
        ir.SymbolTable.replace_all_symbol_uses(name, prefix + name, module.operation)
        ir.SymbolTable.set_symbol_name(function, prefix + name)
        ir.SymbolTable.set_visibility(function, "private")
    end = ir.InsertionPoint(program.body)
    return {prefix + name: function.operation.clone(end) for name, function in found.items()}


def main_function(module: ir.Module) -> Any:
    """The function that a module is run by: "main", or its only public one.

    Raises:
      Refused: if there is none.
    """
    found = functions(module)
    public = [f for f in found.values() if "sym_visibility" not in f.attributes or _visibility(f) == "public"]
    if "main" in found:
        return found["main"]
    if len(public) != 1:
        raise Refused(f"expected a function main, found {', '.join(found) or 'no function'}")
    return public[0]


def _visibility(function: Any) -> str:
    return str(function.attributes["sym_visibility"].value)
