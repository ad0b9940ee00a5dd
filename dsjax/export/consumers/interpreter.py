"""The reference interpreter of StableHLO, which is part of jaxlib: slow, and the closest there is to the specification.

All ranks of a program are made one program first: see `lockstep`. Its own way to run ranks (`interpreter.run_parallel`)
gives wrong numbers where a collective is met twice, as in any loop: jaxlib 0.10.2 keeps what was brought to the first
meeting, and so does not wait at the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from dsjax.export.consumers.base import Arrays, Misread, Ran, Refused, main_function, new_context, parse
from dsjax.export.consumers.lockstep import HOW, run_as_one
from dsjax.export.consumers.worker import isolated
from dsjax.export.stablehlo.operations import numpy_dtype

_TASK = "dsjax.export.consumers.interpreter:evaluate"


class Interpreter:
    """See the top of this file."""

    name = "interpreter"
    executes = True
    misreads: Sequence[Misread] = (Misread("float8_e8m0fnu", 0xFF, "infinity, not NaN", 0x7F),)

    def __init__(self, time_limit: float = 600.0) -> None:
        self._time_limit = time_limit

    def available(self) -> str | None:
        """None: it comes with jaxlib."""
        return None

    def run(self, module: bytes, arguments: Arrays) -> Arrays:
        """See `Consumer.run`."""
        return isolated(_TASK, [module], [arguments], time_limit=self._time_limit)[0][0]

    def run_ranks(self, modules: Sequence[bytes], arguments: Sequence[Arrays]) -> Ran:
        """See `Consumer.run_ranks`: as one program."""
        return Ran(isolated(_TASK, modules, arguments, time_limit=self._time_limit)[0], HOW)

    def compile(self, modules: Sequence[bytes]) -> dict[str, Any]:
        """See `Consumer.compile`.

        Raises:
          Refused: always, since it compiles nothing.
        """
        raise Refused("it only runs programs, and the bundle has no golden of this one", "not run")


def evaluate(modules: list[bytes], arguments: list[Arrays], _: dict[str, Any]) -> tuple[list[Arrays], dict[str, Any]]:
    """A `Task`: one program, or those of all ranks."""
    return run_as_one(_evaluate, modules, arguments), {}


def _evaluate(code: bytes, arguments: Arrays) -> Arrays:
    module = parse(code, new_context())
    with module.context, ir.Location.unknown():
        main = main_function(module)
        kinds = main.type.inputs
        wanted = [numpy_dtype(ir.RankedTensorType(kind).element_type) for kind in main.type.results]
        _plain_results(main)
        given = [_attribute(array, kind) for array, kind in zip(arguments, kinds, strict=True)]
        results = stablehlo.eval_module(module, given)
        return [_typed(np.array(result), dtype) for result, dtype in zip(results, wanted, strict=True)]


def _typed(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A result as `_plain_results` gave it, in its own type."""
    if array.dtype == dtype or dtype.kind in "iub":
        return array
    return array.astype(dtype) if array.dtype == np.float32 else array.view(dtype)


def _attribute(array: np.ndarray, kind: Any) -> Any:
    """An argument as MLIR takes it: types that Python's buffers do not have as their bits, with the type named."""
    element = ir.RankedTensorType(kind).element_type
    plain = array.dtype.kind in "iub" or array.dtype.name in ("float16", "float32", "float64")
    bits: Any = array if plain else array.view(f"u{array.dtype.itemsize}")
    # Not ascontiguousarray: an array of no dimensions must stay one.
    bits = np.asarray(bits, order="C")
    return ir.DenseElementsAttr.get(bits, type=element, shape=array.shape)


def _plain_results(main: Any) -> None:
    """Makes a function give float types that NumPy has not as their bits, those of less than a byte as float32."""
    block = main.regions[0].blocks[0]
    end = list(block.operations)[-1]
    with ir.InsertionPoint(end):
        for i, value in enumerate(list(end.operands)):
            kind = ir.RankedTensorType(value.type)
            element = kind.element_type
            plain = ir.F16Type, ir.F32Type, ir.F64Type
            if isinstance(element, ir.FloatType) and not any(isinstance(element, t) for t in plain):
                if element.width < 8:
                    cast: Any = stablehlo.ConvertOp(ir.RankedTensorType.get(kind.shape, ir.F32Type.get()), value)
                else:
                    bits = ir.IntegerType.get_unsigned(element.width)
                    cast = stablehlo.BitcastConvertOp(ir.RankedTensorType.get(kind.shape, bits), value)
                end.operands[i] = cast.result
    results = [v.type for v in end.operands]
    main.attributes["function_type"] = ir.TypeAttr.get(ir.FunctionType.get(main.type.inputs, results))
