"""From what JAX lowers to what is shipped: one rank's program with plain collectives, its donated arguments marked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import sdy  # noqa: F401 (registers the dialect that is lifted from)

_SHARDING = ("sdy.sharding", "mhlo.sharding", "jax.buffer_donor", "tf.aliasing_output")


def lift(module: ir.Module) -> ir.Module:
    """The body of the one `sdy.manual_computation` of `main` as the whole program: what one rank runs.

    Constants that it takes from outside are moved in. Collectives name their replica groups already; nothing of Shardy
    is left.

    Args:
      module: changed in place, and returned.

    Raises:
      ValueError: if `main` is anything but a manual computation of its arguments.
    """
    with module.context, ir.Location.unknown():
        main = _main(module)
        block = main.regions[0].blocks[0]
        [manual] = [op for op in block.operations if op.operation.name == "sdy.manual_computation"]
        body = manual.regions[0].blocks[0]
        given = {argument.arg_number: i for i, argument in enumerate(block.arguments)}
        sources: list[Any] = []
        for operand in manual.operands:
            if isinstance(operand, ir.BlockArgument):
                sources.append(given[operand.arg_number])
            else:
                sources.append(operand.owner)
        order = [place for place in sources if isinstance(place, int)]
        if order != list(range(len(block.arguments))):
            raise ValueError("expected a manual computation of all arguments in order")
        inputs = [a.type for a, source in zip(body.arguments, sources, strict=True) if isinstance(source, int)]
        end = list(body.operations)[-1]
        outputs = [value.type for value in end.operands]
        type_ = ir.FunctionType.get(inputs, outputs)
        new = ir.Operation.create(
            "func.func",
            attributes={
                "sym_name": ir.StringAttr.get("main"),
                "function_type": ir.TypeAttr.get(type_),
                "sym_visibility": ir.StringAttr.get("public"),
            },
            regions=1,
            ip=ir.InsertionPoint(main),
        )
        entry = new.regions[0].blocks.append(*inputs)
        arguments = iter(entry.arguments)
        for argument, source in zip(body.arguments, sources, strict=True):
            if isinstance(source, int):
                argument.replace_all_uses_with(next(arguments))
            else:
                moved = source.operation.clone(ip=ir.InsertionPoint(entry))
                argument.replace_all_uses_with(moved.results[0])
        for op in list(body.operations)[:-1]:
            op.operation.detach_from_parent()
            entry.append(op)
        ir.Operation.create("func.return", operands=list(end.operands), ip=ir.InsertionPoint(entry))
        main.operation.erase()
        for op in list(module.body.operations):
            if op.operation.name == "sdy.mesh":
                op.operation.erase()
    return module


def _main(module: ir.Module) -> Any:
    return next(op for op in module.body.operations if str(op.operation.attributes["sym_name"]) == '"main"')


def mark_aliases(module: ir.Module, aliases: Mapping[int, int], *, keep_shardings: bool = False) -> ir.Module:
    """Says on every donated argument which result takes its memory, in place.

    Args:
      aliases: result -> argument.
      keep_shardings: of a program that a partitioner splits.
    """
    taken = {argument: result for result, argument in aliases.items()}
    with module.context:
        main = _main(module)
        count = len(main.regions[0].blocks[0].arguments)
        found = list(main.attributes["arg_attrs"]) if "arg_attrs" in main.attributes else [None] * count
        merged = []
        for i, attributes in enumerate(found):
            kept: dict[str, Any] = {}
            for named in attributes or ():
                if named.name not in _SHARDING or (keep_shardings and named.name.endswith("sharding")):
                    kept[named.name] = named.attr
            if i in taken:
                kept["tf.aliasing_output"] = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), taken[i])
            merged.append(ir.DictAttr.get(kept))
        main.attributes["arg_attrs"] = ir.ArrayAttr.get(merged)
    return module
