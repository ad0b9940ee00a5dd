"""Small bundles of schema 1 with real programs, written from the contract by hand: a decode step, FP8 arguments, and a
program of four ranks. Their goldens are what `jax.jit` gives."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from bundles import save_tensors
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import func

from dsjax.export.consumers.base import new_context
from dsjax.export.stablehlo.artifact import serialise
from dsjax.export.standalone import source

RANKS = 4
Part = list[list[int]] | None


@dataclasses.dataclass
class Item:
    """An argument or result: its kind, its name, the whole array, and each rank's part (None: all hold the whole)."""

    kind: str
    name: str
    array: np.ndarray
    parts: list[Part] | None = None
    alias: int | None = None


@dataclasses.dataclass
class Example:
    """A program: a portable artifact for each rank, its arguments and its results."""

    name: str
    modules: list[bytes]
    arguments: list[Item]
    results: list[Item]


def _entry(index: int, item: Item, rank: int) -> dict[str, Any]:
    part = None if item.parts is None else item.parts[rank]
    shape = list(item.array.shape)
    return {
        "index": index,
        "kind": item.kind,
        "name": item.name,
        "shape": shape if part is None else [stop - start for start, stop in part],
        "dtype": item.array.dtype.name,
        "global_shape": shape,
        "slice": part,
        "alias": item.alias,
    }


def rehash(folder: Path, change: Callable[[dict[str, Any]], None] = lambda manifest: None) -> Path:
    """Writes the manifest anew: changed, and with the hashes of what now lies in the folder."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    manifest["files"] = {
        p.relative_to(folder).as_posix(): {
            "bytes": p.stat().st_size,
            "sha256": hashlib.sha256(p.read_bytes()).hexdigest(),
        }
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p != path
    }
    path.write_text(json.dumps(manifest))
    return folder


def write_bundle(
    folder: Path,
    examples: Sequence[Example],
    *,
    golden: bool = True,
    checkpoint: Path | None = None,
    tolerance: Mapping[str, Any] | None = None,
) -> Path:
    """A bundle of these programs; parameters lie in it, or in a checkpoint's file, whose layers lie apart."""
    modules, params = [], {i.name: i.array for e in examples for i in e.arguments if i.kind == "param"}
    (folder / "modules").mkdir(parents=True)
    for example in examples:
        ranks: list[int | None] = [None] if len(example.modules) == 1 else list(range(len(example.modules)))
        for rank, code in zip(ranks, example.modules, strict=True):
            name = example.name if rank is None else f"{example.name}-rank{rank}"
            (folder / "modules" / f"{name}.vhlo.bc").write_bytes(code)
            modules.append(
                {
                    "name": name,
                    "kind": "model",
                    "phase": "decode",
                    "batch": 2,
                    "tokens": 1,
                    "length": 8,
                    "rank": rank,
                    "function": "main",
                    "golden": f"golden/{example.name}" if golden else None,
                    "operator": None,
                    "arguments": [_entry(i, a, rank or 0) for i, a in enumerate(example.arguments)],
                    "results": [_entry(i, r, rank or 0) for i, r in enumerate(example.results)],
                }
            )
        if golden:
            place = folder / "golden" / example.name
            save_tensors(
                place / "inputs.safetensors", {a.name: a.array for a in example.arguments if a.kind != "param"}
            )
            save_tensors(place / "outputs.safetensors", {r.name: r.array for r in example.results})
            given = {n: b if isinstance(b, dict) else {"strict": b} for n, b in (tolerance or {}).items()}
            bounds = {n: {**b, "reason": "made up"} for n, b in given.items()}
            (place / "tolerance.json").write_text(json.dumps(bounds))
    if checkpoint is None:
        save_tensors(folder / "params" / "params.safetensors", params)
    else:
        _save_apart(checkpoint, params)
    (folder / "params.json").write_text(json.dumps({"schema": 1, "arguments": _params(params, checkpoint)}))
    (folder / "verify.py").write_text(source())
    sharded = any(len(e.modules) > 1 for e in examples)
    mesh = {"plan": f"ep={RANKS}", "axes": [["ep", RANKS]], "ranks": RANKS} if sharded else None
    manifest = {"schema": 1, "spmd": "manual", "mesh": mesh, "golden": "synthetic", "modules": modules}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return rehash(folder)


def _save_apart(checkpoint: Path, params: Mapping[str, np.ndarray]) -> None:
    layers = {f"{n}.{i}": layer for n, a in params.items() for i, layer in enumerate(a)}
    save_tensors(checkpoint / "model.safetensors", layers)


def _params(params: Mapping[str, np.ndarray], checkpoint: Path | None) -> list[dict[str, Any]]:
    entries, start = [], 0
    if checkpoint is not None:
        raw = (checkpoint / "model.safetensors").read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
    for index, (name, array) in enumerate(params.items()):
        sources = []
        for i, layer in enumerate(array) if checkpoint is not None else ():
            at = {"tensor": f"{name}.{i}", "file": "model.safetensors", "offset": start, "bytes": layer.nbytes}
            sources.append({**at, "dtype": "?", "shape": list(layer.shape)})
            start += layer.nbytes
        entries.append(
            {
                "index": index,
                "path": name,
                "shape": list(array.shape),
                "dtype": array.dtype.name,
                "bytes": array.nbytes,
                "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
                "slices": None,
                "copy": {"file": "params/params.safetensors", "tensor": name} if checkpoint is None else None,
                "sources": sources,
                "recipe": "stack",
            }
        )
    return entries


def portable(lowered: Any, version: str = "1.8.0") -> bytes:
    """The artifact of a lowered function of one device."""
    return serialise(lowered.compiler_ir("stablehlo"), version)


def _normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def decode(factor: float = 1.0) -> Example:
    """A decode step: embedding, a scan over layers of packed codes with scales, a cache, top-k.

    Args:
      factor: of the golden logits; another than 1 makes them wrong.
    """
    layers, vocabulary, width, capacity = 2, 16, 8, 8
    params = {
        "embed": _normal(0, vocabulary, width),
        "layers.codes": np.random.default_rng(1).integers(0, 256, (layers, width, width)).astype(np.uint8),
        "layers.scales": np.abs(_normal(2, layers, width)) / 64,
    }
    cache = {"kv": _normal(3, layers, 2, capacity, width), "length": np.array([3, 5], np.int32)}

    def step(embed: Any, codes: Any, scales: Any, kv: Any, length: Any, tokens: Any) -> Any:
        def layer(carry: Any, i: Any) -> Any:
            x, kv = carry
            y = x @ ((codes[i].astype(jnp.float32) - 128) * scales[i][:, None])
            row = jnp.arange(capacity)[None, :, None] == length[:, None, None]
            kv = kv.at[i].set(jnp.where(row, y[:, None], kv[i]))
            # A choice, no conversion of the bool: in a batched dot IREE 3.13 takes that for -1.
            keep = jnp.where(jnp.arange(capacity)[None] <= length[:, None], 1.0, 0.0)
            return (jnp.tanh(x + jnp.einsum("btd,bt->bd", kv[i], keep)), kv), None

        (x, kv), _ = jax.lax.scan(layer, (embed[tokens[:, 0]], kv), jnp.arange(layers))
        logits = x @ embed.T
        return logits, jax.lax.top_k(logits, 3)[1], (x * 16).astype(jnp.bfloat16), kv, length + 1

    tokens = np.array([[3], [9]], np.int32)
    given = [*params.values(), *cache.values(), tokens]
    function = jax.jit(step, donate_argnums=(3, 4), keep_unused=True)
    code = portable(function.lower(*given))
    results = [np.asarray(r) for r in jax.jit(step)(*given)]
    names = ("logits", "top", "hidden", "kv", "length")
    kinds = ("output", "output", "output", "cache", "cache")
    out = [Item(k, n, r) for k, n, r in zip(kinds, names, results, strict=True)]
    out[0].array = (out[0].array * np.float32(factor)).astype(np.float32)
    out[3].alias, out[4].alias = 3, 4
    items = [Item("param", n, a) for n, a in params.items()] + [Item("cache", n, a) for n, a in cache.items()]
    return Example("decode-b2-s8", [code], [*items, Item("input", "tokens", tokens)], out)


def typed(codes: Sequence[int] = range(16, 127), scales: Sequence[int] = range(110, 140)) -> Example:
    """FP8 and E8M0 arguments, decoded; FP8, bool and 0-d results.

    No halved code is subnormal: IREE 3.13 rounds float32 to E4M3 wrongly there.
    """
    e4m3 = np.array(codes, np.uint8).view(ml_dtypes.float8_e4m3fn)
    e8m0 = np.array(scales, np.uint8).view(ml_dtypes.float8_e8m0fnu)

    def decoded(codes: Any, scales: Any, flag: Any) -> Any:
        values = codes.astype(jnp.float32)
        return values, scales.astype(jnp.float32), (values / 2).astype(jnp.float8_e4m3fn), ~flag, values[1] > 0

    given = [e4m3, e8m0, np.array([True, False])]
    code = portable(jax.jit(decoded).lower(*given))
    names = ("values", "powers", "codes", "flags", "positive")
    results = [np.asarray(r) for r in jax.jit(decoded)(*given)]
    arguments = [Item("input", n, a) for n, a in zip(("e4m3", "e8m0", "flag"), given, strict=True)]
    return Example(
        "block-decode-0", [code], arguments, [Item("output", *nr) for nr in zip(names, results, strict=True)]
    )


def recursive() -> bytes:
    """The artifact of a program whose function calls itself."""
    text = """
    func.func public @main(%x: tensor<2xf32>) -> tensor<2xf32> {
      %0 = call @again(%x) : (tensor<2xf32>) -> tensor<2xf32>
      return %0 : tensor<2xf32>
    }
    func.func private @again(%x: tensor<2xf32>) -> tensor<2xf32> {
      %0 = call @again(%x) : (tensor<2xf32>) -> tensor<2xf32>
      return %0 : tensor<2xf32>
    }"""
    return serialise(ir.Module.parse(text, new_context()), "1.1.0")


def lift(lowered: Any, aliases: Mapping[int, int]) -> ir.Module:
    """The body of the one manual shard_map of a lowered function, as the program of each rank."""
    module = lowered.compiler_ir("stablehlo")
    functions = {op.name.value: op for op in module.body.operations if op.operation.name == "func.func"}
    main = functions.pop("main").regions[0].blocks[0]
    manual = next(op for op in main.operations if op.operation.name == "sdy.manual_computation")
    body = manual.operation.regions[0].blocks[0]
    out: Any = None
    with module.context, ir.Location.unknown():
        out = ir.Module.create()
        for function in functions.values():
            function.operation.clone(ir.InsertionPoint(out.body))
        end = list(body.operations)[-1].operation
        kinds = [a.type for a in body.arguments], [v.type for v in end.operands]
        with ir.InsertionPoint(out.body):
            entry: Any = func.FuncOp("main", kinds, visibility="public")
        block = entry.add_entry_block()
        for old, new in zip(body.arguments, block.arguments, strict=True):
            old.replace_all_uses_with(new)
        returned = list(end.operands)
        end.erase()
        for op in list(body.operations):
            block.append(op.operation)
        with ir.InsertionPoint(block):
            func.ReturnOp(returned)
        number = ir.IntegerType.get_signless(32)
        entry.arg_attrs = [
            ir.DictAttr.get({"tf.aliasing_output": ir.IntegerAttr.get(number, aliases[i])} if i in aliases else {})
            for i in range(len(block.arguments))
        ]
    return out


def ranked(constant_rank: bool = False) -> Example:
    """Four ranks: each kind of collective, one of them in a scan; a loop whose count differs between ranks; a cache.

    Args:
      constant_rank: whether each rank's number is a constant in its program; else all run the same one.
    """
    mesh = jax.make_mesh((RANKS,), ("ep",), axis_types=(AxisType.Auto,))
    specs_in, specs_out = (P("ep"), P(), P("ep")), (P("ep"), P(), P("ep"), P("ep"))

    def body(x: Any, w: Any, kv: Any, rank: Any = None) -> Any:
        rank = jax.lax.axis_index("ep") if rank is None else rank

        def layer(x: Any, i: Any) -> Any:
            return jnp.tanh(x + jax.lax.psum(x @ w[i], "ep")), x.sum()

        y, sums = jax.lax.scan(layer, x, jnp.arange(2))
        y = jax.lax.fori_loop(0, rank, lambda _, y: y * 1.5, y)
        whole = jax.lax.all_gather(y, "ep", axis=0, tiled=True)
        swapped = jax.lax.all_to_all(whole, "ep", split_axis=1, concat_axis=0, tiled=True)
        scattered = jax.lax.psum_scatter(swapped, "ep", scatter_dimension=0, tiled=True)
        shifted = jax.lax.ppermute(y, "ep", [(i, i + 1) for i in range(RANKS - 1)])
        total = jax.lax.pmax(jax.lax.pmean(sums, "ep"), "ep")
        place = jax.lax.axis_index("ep") // 2  # a function that calls another, in JAX's text
        return y + shifted + place, total, scattered, kv.at[:, 0].set(y[:, 0])

    given = [_normal(4, 8, 8), _normal(5, 2, 8, 8) / 4, _normal(6, 8, 4)]

    def mapped(rank: int | None) -> Any:
        def one(x: Any, w: Any, kv: Any) -> Any:
            return body(x, w, kv, None if rank is None else jnp.int32(rank))

        return jax.shard_map(one, mesh=mesh, in_specs=specs_in, out_specs=specs_out, check_vma=False)

    programs = [mapped(rank if constant_rank else None) for rank in range(RANKS)]
    codes = [serialise(lift(jax.jit(f).lower(*given), {2: 3}), "1.1.0") for f in programs]
    placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(given, specs_in, strict=True)]
    results = [np.asarray(r) for r in jax.jit(mapped(None))(*placed)]

    def parts(array: np.ndarray, spec: P) -> list[Part] | None:
        if spec == P():
            return None
        n = array.shape[0] // RANKS
        return [[[r * n, (r + 1) * n], *([0, m] for m in array.shape[1:])] for r in range(RANKS)]

    arguments = [
        Item(kind, name, a, parts(a, s))
        for kind, name, a, s in zip(("input", "param", "cache"), ("x", "w", "kv"), given, specs_in, strict=True)
    ]
    kinds, names = ("output", "output", "output", "cache"), ("y", "total", "scattered", "kv")
    out = [Item(k, n, r, parts(r, s)) for k, n, r, s in zip(kinds, names, results, specs_out, strict=True)]
    out[3].alias = 2
    return Example("decode-b2-s4", codes, arguments, out)
