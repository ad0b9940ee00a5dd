"""IREE: a compiler and runtime that are not XLA's, on the CPU by LLVM.

The compiler reads the portable artifact itself. Donated arguments are not aliased: its runtime makes new buffers.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsjax.export.consumers.base import Arrays, Misread, Ran, Refused, main_function, new_context, parse
from dsjax.export.consumers.exchange import dtype_of
from dsjax.export.consumers.lockstep import HOW, as_one, run_as_one
from dsjax.export.consumers.worker import isolated
from dsjax.export.stablehlo.artifact import element_types

FLAGS = (
    "--iree-hal-target-device=local",
    "--iree-hal-local-target-device-backends=llvm-cpu",
    "--iree-llvmcpu-target-cpu=host",
)
WITHOUT_BARRIERS = "--iree-preprocessing-pass-pipeline=builtin.module(iree-util-drop-compiler-hints)"
"""For programs of nested loops with many optimization barriers: each splits IREE's stream, and it gives up with this
complaint. Only then, as some programs compile with the barriers alone."""
_TOO_MANY_BARRIERS = "failed to solve for timepoint coverage"
_TASK = "dsjax.export.consumers.iree:execute"
_ELEMENTS = {
    "bool": "BOOL_8",
    "bfloat16": "BFLOAT_16",
    "float8_e4m3fn": "FLOAT_8_E4M3_FN",
    "float8_e5m2": "FLOAT_8_E5M2",
    "float8_e8m0fnu": "FLOAT_8_E8M0_FNU",
    **{f"float{n}": f"FLOAT_{n}" for n in (16, 32, 64)},
    **{f"int{n}": f"SINT_{n}" for n in (8, 16, 32, 64)},
    **{f"uint{n}": f"UINT_{n}" for n in (8, 16, 32, 64)},
}


class Iree:
    """See the top of this file."""

    name = "iree"
    executes = True
    misreads: Sequence[Misread] = (
        Misread("float8_e4m3fn", 0xFF, "-480, not NaN", 0x38),
        Misread("float8_e8m0fnu", 0x00, "0, not 2^-127", 0x7F),
    )

    def __init__(self, time_limit: float = 600.0) -> None:
        self._time_limit = time_limit

    def available(self) -> str | None:
        """None, or which package is missing."""
        found = importlib.util.find_spec("iree") and all(
            map(importlib.util.find_spec, ("iree.compiler", "iree.runtime"))
        )
        return None if found else "expected iree-base-compiler and iree-base-runtime (the extra verify), found none"

    def run(self, module: bytes, arguments: Arrays) -> Arrays:
        """See `Consumer.run`."""
        return isolated(_TASK, [module], [arguments], time_limit=self._time_limit)[0][0]

    def run_ranks(self, modules: Sequence[bytes], arguments: Sequence[Arrays]) -> Ran:
        """See `Consumer.run_ranks`: as one program, since its CPU runtime has no collectives."""
        return Ran(isolated(_TASK, modules, arguments, time_limit=self._time_limit)[0], HOW)

    def compile(self, modules: Sequence[bytes]) -> dict[str, Any]:
        """See `Consumer.compile`."""
        return isolated(_TASK, modules, time_limit=self._time_limit)[1]


def execute(modules: list[bytes], arguments: list[Arrays], _: dict[str, Any]) -> tuple[list[Arrays], dict[str, Any]]:
    """A `Task`: compiles the program, or that of all ranks, and runs it if there are arguments."""
    if not arguments:
        return [], {"code_bytes": len(_compiled(as_one(modules))[0])}
    return run_as_one(_run, modules, arguments), {}


def _compiled(module: bytes) -> tuple[bytes, str]:
    """IREE's code of a program, and its function's name."""
    import iree.compiler

    parsed = parse(module, new_context())
    main = main_function(parsed)
    if "f4E2M1FN" in element_types(parsed):
        raise Refused("it has no f4E2M1FN; --target typed-fp8 or portable have none")
    name = str(main.attributes["sym_name"].value)
    try:
        return iree.compiler.compile_str(module, input_type="stablehlo", extra_args=list(FLAGS)), name
    except iree.compiler.CompilerToolError as e:
        if _TOO_MANY_BARRIERS not in str(e):
            raise
    return iree.compiler.compile_str(module, input_type="stablehlo", extra_args=[*FLAGS, WITHOUT_BARRIERS]), name


def _run(code: bytes, arguments: Arrays) -> Arrays:
    import iree.runtime as runtime

    compiled, function = _compiled(code)
    config = runtime.Config("local-sync")
    system = runtime.SystemContext(config=config)
    module = runtime.VmModule.copy_buffer(system.instance, compiled)
    system.add_vm_module(module)
    given, results = runtime.VmVariantList(len(arguments)), runtime.VmVariantList(1)
    for array in arguments:
        given.push_ref(_view(runtime, config.device, array))
    system.vm_context.invoke(module.lookup_function(function), given, results)
    names = {value.removeprefix("S"): name for name, value in _ELEMENTS.items()}
    out = []
    for i in range(results.size):
        view = results.get_as_object(i, runtime.HalBufferView)
        dtype = dtype_of(names[runtime.HalElementType(view.element_type).name.removeprefix("S")])
        mapped = view.map().asarray(view.shape, np.dtype(f"u{dtype.itemsize}"))
        out.append(np.array(mapped).view(dtype))
    return out


def _view(runtime: Any, device: Any, array: np.ndarray) -> Any:
    """An argument as the runtime's buffer, its element type named."""
    bits = np.asarray(array.view(f"u{array.dtype.itemsize}"), order="C")
    return device.allocator.allocate_buffer_copy(
        memory_type=runtime.MemoryType.DEVICE_LOCAL,
        allowed_usage=runtime.BufferUsage.DEFAULT | runtime.BufferUsage.MAPPING,
        device=device,
        buffer=bits,
        element_type=getattr(runtime.HalElementType, _ELEMENTS[array.dtype.name]),
    )
