"""What is in a StableHLO module: operators, types, calls, loops, collectives, and where in the model each is.

Everything is read from the program, not from its text. Counts come in two kinds: `text`, how often a thing is written,
and `executed`, how often it happens in one run, which follows calls and multiplies by the trips of loops. A loop whose
trips cannot be read counts as one trip and marks what is inside as `dynamic`; every branch of a choice counts as taken;
a composite counts as itself and its decomposition as called.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from jaxlib.mlir import ir

from dsjax.export.stablehlo.artifact import attribute_names, minimum_version
from dsjax.export.stablehlo.loops import Known, Loops, Scope, callee, functions
from dsjax.export.stablehlo.operations import COLLECTIVES, collective, elements, features, scopes, tensor_bytes

SCHEMA = 1
PLACES = 12
"""At most so many places are told for one thing."""


_CONTROL = ("stablehlo.while", "stablehlo.case", "stablehlo.if", "sdy.manual_computation")
_TERMINATORS = ("stablehlo.return", "func.return", "sdy.return")
_OPERATOR = re.compile(r"dsjax\.(.+?)(?:_\d+)?")


def operator_name(symbol: str) -> str | None:
    """The named operator that a function or composite stands for: `dsjax.rms_norm_0` is `rms_norm`; None if none."""
    found = _OPERATOR.fullmatch(symbol)
    return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class _Thing:
    """Something that is counted, at one place: `path` are the named operators around it, `place` its name scopes."""

    kind: str
    name: Any
    path: tuple[str, ...] = ()
    place: str = ""

    def within(self, path: tuple[str, ...], place: str) -> _Thing:
        """The same thing, seen from a caller: named operators say where it is, else scopes do."""
        whole = path + self.path
        scopes = "/".join(p for p in (place, self.place) if p and not p.startswith("@")) or self.place or place
        return dataclasses.replace(self, path=whole, place="" if whole else scopes)


@dataclasses.dataclass
class _Times:
    executed: int = 0
    dynamic: bool = False

    def add(self, times: int, dynamic: bool) -> None:
        self.executed += times
        self.dynamic |= dynamic


_Tally = dict[_Thing, _Times]


class _Walker:
    """Counts what one run executes, once for each function and what is known of its arguments."""

    def __init__(self, functions: dict[str, Any]) -> None:
        self.functions = functions
        self.loops = Loops({symbol: f.regions[0].blocks[0] for symbol, f in functions.items() if f.regions[0].blocks})
        self.dynamic: set[int] = set()
        self.done: dict[tuple[str, tuple[Known | None, ...]], _Tally] = {}

    def function(self, symbol: str, known: tuple[Known | None, ...]) -> _Tally:
        key = symbol, known
        if key not in self.done:
            tally: _Tally = {}
            self.done[key] = tally
            block = self.loops.functions[symbol]
            self._block(block, symbol, {block: known}, 1, False, tally)
        return self.done[key]

    def _block(self, block: Any, symbol: str, scope: Scope, times: int, dynamic: bool, tally: _Tally) -> None:
        for inner in block.operations:
            operation = inner.operation
            if operation.name not in _TERMINATORS:
                self._operation(operation, symbol, scope, times, dynamic, tally)

    def _operation(self, operation: Any, symbol: str, scope: Scope, times: int, dynamic: bool, tally: _Tally) -> None:
        place = scopes(operation.location, whole=operation.name == "func.call")

        def note(kind: str, name: Any) -> None:
            tally.setdefault(_Thing(kind, name, (), place or f"@{symbol}"), _Times()).add(times, dynamic)

        note("operator", operation.name)
        for feature in features(operation):
            note("feature", feature)
        for element in sorted({str(t.element_type) for t in elements(r.type for r in operation.results)}):
            note("type", element)
        if operation.name.removeprefix("stablehlo.") in COLLECTIVES:
            note("collective", collective(operation))
        if target := callee(operation):
            named = operator_name(target)
            if operation.name == "stablehlo.composite":
                name = operation.attributes["name"].value
                named = operator_name(name) or name
            known = tuple(self.loops.value(o, scope) for o in operation.operands)
            self._call(target, named, known, (times, dynamic), place, tally)
        elif operation.name == "stablehlo.while":
            self._while(operation, symbol, scope, times, dynamic, tally, note)
        elif operation.name in _CONTROL or not operation.name.startswith("stablehlo."):
            for block in (b for region in operation.regions for b in region.blocks):
                self._block(block, symbol, scope, times, dynamic, tally)

    def _while(self, loop: Any, symbol: str, scope: Scope, times: int, dynamic: bool, tally: _Tally, note: Any) -> None:
        trips = self.loops.trips(loop, scope)
        note("loop", (symbol, trips))
        if trips is None:
            note("feature", "while:dynamic")
            self.dynamic.add(hash(loop))
        carried = self.loops.invariants(loop, scope)
        condition, body = (region.blocks[0] for region in loop.regions)
        inside, unsure = times * (1 if trips is None else trips), dynamic or trips is None
        self._block(condition, symbol, {**scope, condition: carried}, times + inside, unsure, tally)
        self._block(body, symbol, {**scope, body: carried}, inside, unsure, tally)

    def _call(
        self,
        target: str,
        operator: str | None,
        known: tuple[Known | None, ...],
        times: tuple[int, bool],
        place: str,
        tally: _Tally,
    ) -> None:
        count, dynamic = times
        path = (operator,) if operator else ()
        if operator:
            tally.setdefault(_Thing("named", operator, (), place), _Times()).add(count, dynamic)
        tally.setdefault(_Thing("function", target), _Times()).add(count, dynamic)
        for thing, inner in self.function(target, known).items():
            seen = thing.within(path, place)
            tally.setdefault(seen, _Times()).add(count * inner.executed, dynamic or inner.dynamic)


def _text(functions: dict[str, Any], module: ir.Module) -> tuple[dict[str, Counter[Any]], dict[str, Any]]:
    """(how often each thing is written, largest constant and highest rank)."""
    written: dict[str, Counter[Any]] = {k: Counter() for k in ("operator", "feature", "collective", "site", "body")}
    constants: dict[str, Counter[str]] = {"constants": Counter(), "inside": Counter()}
    largest: dict[str, Any] = {"bytes": 0, "type": None}
    rank = 0
    top = (o.operation for o in module.body.operations if o.operation.name != "func.func")
    written["operator"].update(o.name for o in top)
    for function in functions.values():
        for operation, body in _with_bodies(function):
            name = operation.name
            types = elements(r.type for r in operation.results)
            rank = max([rank, *(t.rank for t in types if t.has_rank)])
            constants["constants" if name == "stablehlo.constant" else "inside"].update(
                str(t.element_type) for t in types
            )
            if name in _TERMINATORS:
                continue
            if body:
                written["body"][body, name] += 1
                continue
            written["operator"][name] += 1
            written["feature"].update(features(operation))
            if name.removeprefix("stablehlo.") in COLLECTIVES:
                written["collective"][collective(operation)] += 1
            if target := callee(operation):
                written["site"][target] += 1
            if name == "stablehlo.constant" and not operation.attributes["value"].is_splat:
                size = tensor_bytes(types[0])
                if size > largest["bytes"]:
                    largest = {"bytes": size, "type": str(types[0])}
    return written, {"largest_constant": largest, "max_rank": rank, **constants}


def _with_bodies(function: Any) -> Iterator[tuple[Any, str]]:
    """(operation, "") for all of a function; (operation, owner) for those that only say what another one computes."""

    def inside(operation: Any, owner: str) -> Iterator[tuple[Any, str]]:
        for block in (b for region in operation.regions for b in region.blocks):
            for inner in block.operations:
                mine = inner.operation
                yield mine, owner
                scalar = mine.name.startswith("stablehlo.") and mine.name not in _CONTROL
                yield from inside(mine, owner or (mine.name if scalar else ""))

    return inside(function, "")


def _signature(function: Any, names: Sequence[str] | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The arguments with their aliases, and the results."""
    block, type_ = function.regions[0].blocks[0], function.attributes["function_type"].value
    if names is None:
        names = [a.location.name_str if isinstance(a.location, ir.NameLoc) else "" for a in block.arguments]

    def side(key: str, types: Any) -> list[dict[str, Any]]:
        attributes: list[dict[str, Any]] = [{}] * len(types)
        if key in attribute_names(function):
            attributes = [{a.name: a.attr for a in d} for d in function.attributes[key]]
        return [
            {
                "index": i,
                "element": str(t.element_type) if isinstance(t, ir.ShapedType) else str(t),
                "shape": [d if d >= 0 else None for d in t.shape] if isinstance(t, ir.RankedTensorType) else None,
                "attributes": {name: str(v) for name, v in sorted(attributes[i].items())},
            }
            for i, t in enumerate(types)
        ]

    arguments, results = side("arg_attrs", type_.inputs), side("res_attrs", type_.results)
    for argument, name in zip(arguments, names, strict=True):
        attributes = argument["attributes"]
        alias = attributes.get("tf.aliasing_output")
        argument["name"] = name
        argument["alias"] = int(alias.split()[0]) if alias else None
        argument["donated"] = alias is not None or "jax.buffer_donor" in attributes
    return arguments, results


def inventory(module: ir.Module, names: Sequence[str] | None = None) -> dict[str, Any]:
    """The inventory of a module's `main`, ready for JSON.

    Args:
      module: with one function that is called from outside.
      names: of its arguments; as their locations say if None.

    Keys: `operators`, `features` (things a compiler may stumble over, as `sort:stable` or `dot_general:i8xi8->i32`),
    `functions` and `named` (operators outlined as `dsjax.<name>`) map a name to its `text` and `executed` counts;
    `bodies` are the operators inside reductions and comparators; `types` says where each element type occurs;
    `collectives` have groups and bytes on one device; `loops` have `trips`, a number or "dynamic"; `where` maps
    operators, features and types to places: the named operators around, outermost first, else name scopes if the module
    still has its locations, else the function.
    """
    found = functions(module)
    main = "main" if "main" in found else next(iter(found))
    walker = _Walker(found)
    tally = walker.function(main, (None,) * len(found[main].regions[0].blocks[0].arguments))
    written, facts = _text(found, module)
    written["feature"]["while:dynamic"] = len(walker.dynamic)
    written["feature"] += Counter()  # without what is there zero times
    arguments, results = _signature(found[main], names)
    for entry in (*arguments, *results):
        written["feature"].update(f"attribute:{name}" for name in entry["attributes"])
    for operation in (module.operation, *(o.operation for o in module.body.operations)):
        written["feature"].update(f"attribute:{a}" for a in attribute_names(operation) if "." in a)

    totals: dict[tuple[str, Any], _Times] = {}
    where: dict[str, list[dict[str, Any]]] = {}
    for thing, times in tally.items():
        totals.setdefault((thing.kind, thing.name), _Times()).add(times.executed, times.dynamic)
        if thing.kind in ("operator", "feature", "type"):
            place = {"operators": list(thing.path), "place": thing.place, "executed": times.executed}
            where.setdefault(thing.name, []).append(place)

    def counted(kind: str, text: Counter[Any]) -> dict[Any, dict[str, Any]]:
        names = sorted({*text, *(name for k, name in totals if k == kind)})
        return {n: {"text": text[n], **dataclasses.asdict(totals.get((kind, n), _Times()))} for n in names}

    called = counted("function", written["site"])
    for symbol, entry in called.items():
        entry["operator"] = operator_name(symbol)
    named: dict[str, dict[str, Any]] = {}
    for (kind, name), times in totals.items():
        if kind == "named" and any(e["operator"] == name for e in called.values()):
            symbols = [s for s, e in called.items() if e["operator"] == name]
            text = sum(called[s]["text"] for s in symbols)
            named[name] = {"functions": symbols, "text": text, **dataclasses.asdict(times)}
    stumbling = counted("feature", written["feature"])
    bodies: dict[str, dict[str, int]] = {}
    for (owner, name), n in sorted(written["body"].items()):
        bodies.setdefault(owner, {})[name] = n
    return {
        "schema": SCHEMA,
        "function": main,
        "minimum_version": minimum_version(module),
        "arguments": arguments,
        "results": results,
        "aliases": {str(a["index"]): a["alias"] for a in arguments if a["alias"] is not None},
        "donated": [a["index"] for a in arguments if a["donated"]],
        "operators": counted("operator", written["operator"]),
        "bodies": bodies,
        "features": stumbling,
        "types": _types(arguments, results, facts, where),
        "functions": called,
        "named": dict(sorted(named.items())),
        "composites": _part(stumbling, "composite:"),
        "custom_calls": _part(stumbling, "custom_call:"),
        "collectives": _collectives(counted("collective", written["collective"])),
        "loops": [
            {"function": thing.name[0], "trips": "dynamic" if thing.name[1] is None else thing.name[1]}
            | {"operators": list(thing.path), "place": thing.place, **dataclasses.asdict(times)}
            for thing, times in tally.items()
            if thing.kind == "loop"
        ],
        "largest_constant": facts["largest_constant"],
        "max_rank": max([facts["max_rank"], *(len(e["shape"] or ()) for e in arguments)]),
        "dynamic_shapes": "dynamic shape" in stumbling,
        "where": {name: places[:PLACES] for name, places in sorted(where.items())},
    }


def _part(entries: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): entry for name, entry in entries.items() if name.startswith(prefix)}


def _collectives(entries: dict[Any, dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "kind": kind,
            "pairs" if kind == "collective_permute" else "groups": [list(g) for g in groups],
            "element": element,
            "operand_bytes": operand,
            "result_bytes": result,
            **entry,
        }
        for (kind, groups, element, operand, result), entry in entries.items()
    ]


def _types(arguments: Any, results: Any, facts: Any, where: Any) -> dict[str, dict[str, Any]]:
    """Where each element type occurs; arguments and results are places too."""
    sides = {"arguments": arguments, "results": results}
    found = {e["element"] for side in sides.values() for e in side} | set(facts["constants"]) | set(facts["inside"])
    types = {}
    for element in sorted(found):
        at = {key: [e["index"] for e in side if e["element"] == element] for key, side in sides.items()}
        types[element] = {**at, "constants": facts["constants"][element], "inside": facts["inside"][element]}
        ends = [f"argument {i} {arguments[i]['name']}".strip() for i in at["arguments"]]
        ends += [f"result {i}" for i in at["results"]]
        places = [{"operators": [], "place": place, "executed": 1} for place in ends]
        where[element] = places[: PLACES // 2] + where.get(element, [])
    return types
