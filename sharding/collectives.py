"""What a compiled program moves between devices: its collectives, how often they run, the bytes each device sends."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from sharding.hlo import Computation, Instruction, Program, parse
from sharding.runs import Run, runs

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: one of KINDS. Asynchronous forms count once, under the plain name.
      name: of the instruction.
      dtypes: XLA's names of its operands' element types, each once ("f32", "bf16", "u8").
      operand_bytes: bytes of its operands on one device. Of a ragged all-to-all, whose sizes are data, all of them.
      group: numbers of the devices in the first group that takes part together; of a permute, the first pair.
      count: how often it runs in one run of the program.
      scope: the named scopes that it was traced in, "moe/dispatch"; "" where XLA does not say.
      unbounded: whether it is in a loop whose number of trips depends on data; `count` takes that loop once.
      promoted: whether XLA:CPU sums or moves it in float32 though the program says bfloat16: twice the bytes asked for.
    """

    kind: str
    name: str
    dtypes: tuple[str, ...]
    operand_bytes: int
    group: tuple[int, ...]
    count: int
    scope: str
    unbounded: bool = False
    promoted: bool = False

    @property
    def group_size(self) -> int:
        return len(self.group)

    @property
    def array_bytes(self) -> int:
        """Bytes of the whole array that one run works on: of an all-gather the result, of all others the operands."""
        return self.operand_bytes * (self.group_size if self.kind == "all-gather" else 1)

    @property
    def result_bytes(self) -> int:
        """Bytes of the result on one device."""
        return self.array_bytes // (self.group_size if self.kind == "reduce-scatter" else 1)

    @property
    def sent(self) -> float:
        """Bytes that a device sends in one run of the collective, under the usual ring model.

        All-reduce 2 (n - 1)/n of the array; all-gather, reduce-scatter and all-to-all (n - 1)/n of it; permute and
        broadcast all of it.
        """
        if self.kind in ("collective-permute", "collective-broadcast"):
            return float(self.array_bytes)
        n = self.group_size
        return (2 if self.kind == "all-reduce" else 1) * self.array_bytes * (n - 1) / n

    @property
    def total_sent(self) -> float:
        """Bytes that a device sends in one run of the program."""
        return self.count * self.sent


@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over collectives: how many run, bytes that a device sends in one run of the program, and the largest one.

    Attributes:
      count: runs of collectives in one run of the program.
      sent: bytes per device.
      largest: bytes of the largest array that one of them works on.
      unbounded: whether a loop of unknown length is among them, so that `count` and `sent` are lower bounds.
    """

    count: int
    sent: float
    largest: int
    unbounded: bool


_MESH = re.compile(r"mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}")
"""Groups as axes of a mesh: sizes by name, the order of its devices if not counted up, axes or parts of axes."""


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _mesh_group(text: str) -> tuple[int, ...] | None:
    """Members of the first group in mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b','a':(2)2}; None if it is none.

    'a':(2)2 is the part of extent 2 of axis a that has a part of extent 2 outside it.
    """
    found = _MESH.fullmatch(text)
    if found is None:
        return None
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
    names = list(sizes)
    devices = np.arange(math.prod(sizes.values()))
    if found[2]:
        devices = devices.reshape(_numbers(found[2])).transpose(_numbers(found[3]) if found[3] else None).reshape(-1)
    places = np.zeros(1, int)  # in the mesh, of the group's members
    for name, outside, extent in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", found[4]):
        size = int(extent) if extent else sizes[name]
        stride = math.prod(sizes[n] for n in names[names.index(name) + 1 :])
        stride *= sizes[name] // (int(outside) * size) if extent else 1
        places = (places[:, None] + stride * np.arange(size)).reshape(-1)
    return tuple(int(n) for n in devices[places])


def first_group(text: str, devices: int) -> tuple[int, ...]:
    """Members of the first of the largest groups in `replica_groups=`.

    Written as {{0,1},{2,3}}, {}, [2,4]<=[4,2]T(1,0), or mesh['a'=4,'b'=2] {'b'}, as the partitioner does.

    Raises:
      ValueError: for any other syntax.
    """
    text = text.strip()
    if (named := _mesh_group(text)) is not None:
        return named
    if text.startswith("{"):
        groups = [tuple(map(int, g.split(","))) for g in re.findall(r"\{([\d,\s]+)\}", text) if g.strip()]
        return max(groups, key=len) if groups else tuple(range(devices))
    iota = re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota is None:
        raise ValueError(f"compiled program: expected replica groups, found {text!r}")
    shape, reshape, order = ([int(n) for n in part.split(",")] if part else None for part in iota.groups())
    assert shape is not None and reshape is not None
    numbers = np.arange(int(np.prod(reshape))).reshape(reshape).transpose(order)
    return tuple(int(n) for n in numbers.reshape(-1, shape[-1])[0])


def _attribute(instruction: Instruction, key: str) -> str:
    """An attribute's text, up to the comma that ends it."""
    start = instruction.attributes.find(f"{key}=")
    if start < 0:
        return ""
    depth, at = 0, start + len(key) + 1
    for end in range(at, len(instruction.attributes)):
        letter = instruction.attributes[end]
        depth += (letter in "{[(") - (letter in "}])")
        if (depth == 0 and letter in ", ") or depth < 0:
            return instruction.attributes[at:end]
    return instruction.attributes[at:]


def _group(instruction: Instruction, kind: str, devices: int) -> tuple[int, ...]:
    if kind != "collective-permute":
        named = re.search(r"\breplica_groups=(mesh\[.*?\{[^}]*\})", instruction.attributes)
        return first_group(named[1] if named else _attribute(instruction, "replica_groups") or "{}", devices)
    pairs = re.findall(r"\{(\d+),(\d+)\}", _attribute(instruction, "source_target_pairs"))
    return next(((int(a), int(b)) for a, b in pairs if a != b), (0,))


_STEPS = re.compile(
    r"(?:p?jit|vmap|jvp|transpose|remat|checkpoint)\(.*\)|shard_map|while|cond|body|closed_call|branch_\d+_fun|scan|remat"
)
"""Parts of an `op_name` that tracing adds."""


def scope_of(op_name: str) -> str:
    """The named scopes in an `op_name`: "jit(step)/shard_map/while/body/closed_call/moe/psum" -> "moe".

    What tracing adds by itself is left out, a scope of the same name with it; the last part is the primitive.
    """
    return "/".join(part for part in op_name.split("/")[:-1] if part and not _STEPS.fullmatch(part))


def _scope(instruction: Instruction, program: Program) -> str:
    """Of the instruction, or of the sum that it applies where XLA has made the instruction anew."""
    if instruction.op_name:
        return scope_of(instruction.op_name)
    for name in instruction.called("to_apply"):
        for inner in program.computations[name]:
            if inner.op_name:
                return scope_of(inner.op_name)
    return ""


_MOVES = ("all-gather", "all-to-all", "collective-permute", "collective-broadcast")


def _widened(name: str, computation: Computation, program: Program) -> bool:
    """Whether an array is one of bfloat16 made float32, and nothing more is done with it before it is moved."""
    at = computation.instructions[name]
    while at.opcode in ("fusion", "bitcast", "copy", "reshape", "transpose"):
        if at.opcode == "fusion":
            computation = program.computations[at.called("calls")[0]]
            at = computation.instructions[computation.root]
        else:
            at = computation.instructions[at.operands[0]]
    if at.opcode != "convert" or at.arrays[0].dtype != "f32":
        return False
    return computation.instructions[at.operands[0]].arrays[0].dtype == "bf16"


def _read(instruction: Instruction, computation: Computation, program: Program) -> Collective | None:
    """The collective that an instruction is or starts; None for anything else, and where nobody takes part but one."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    # Ragged: input, output, then offsets and sizes. A permute in place: input, output, offsets.
    taken = instruction.operands[:1] if kind in ("ragged-all-to-all", "collective-permute") else instruction.operands
    arrays = [array for name in taken for array in computation.instructions[name].arrays]
    group = _group(instruction, kind, program.devices)
    if len(group) < 2:
        return None
    return Collective(
        kind,
        instruction.name,
        tuple(dict.fromkeys(array.dtype for array in arrays)),
        sum(array.nbytes for array in arrays),
        group,
        1,
        _scope(instruction, program),
        promoted=any(name.endswith("_promoted") for name in instruction.called("to_apply"))
        or (kind in _MOVES and all(_widened(name, computation, program) for name in taken)),
    )


def _scatters(computation: Computation) -> bool:
    """Whether a fused computation keeps a slice of what it all-reduces, as the TPU compiler writes a reduce-scatter."""
    root = computation.instructions.get(computation.root)
    while root is not None and root.opcode in ("bitcast", "copy", "convert"):
        root = computation.instructions.get(root.operands[0])
    return root is not None and root.opcode == "dynamic-slice"


def of_program(program: Program) -> list[Collective]:
    """`collectives` of a program that was read already."""

    def collective(run: Run) -> Collective | None:
        found = _read(run.instruction, run.computation, program)
        if found is None:
            return None
        scattered = run.caller is not None and run.caller.opcode == "fusion" and _scatters(run.computation)
        return dataclasses.replace(
            found,
            kind="reduce-scatter" if scattered and found.kind == "all-reduce" else found.kind,
            scope=found.scope or scope_of(run.caller.op_name if run.caller else ""),
            count=run.count,
            unbounded=run.unbounded,
        )

    def sent(branch: Sequence[Run]) -> float:
        return sum(c.total_sent for c in map(collective, branch) if c is not None)

    kept = runs(program, lambda i: i.opcode.removesuffix("-start") in KINDS, sent)
    return [c for c in map(collective, kept) if c is not None]


def collectives(text: str) -> list[Collective]:
    """The collectives in one run of a compiled program, in the order that it holds them.

    Loops count as often as they run, nested ones too. Of a conditional the branch that sends most counts. Groups of
    one device move nothing and are left out.

    Args:
      text: `jax.stages.Compiled.as_text()`, of any backend.

    Raises:
      ValueError: if the text is no compiled program, or writes replica groups in a way not known here.
    """
    return of_program(parse(text))


def summary(found: Iterable[Collective], key: Callable[[Collective], str] = lambda c: c.kind) -> dict[str, Totals]:
    """Totals by kind, or by any other `key` of a collective, the largest sender first."""
    parts: dict[str, list[Collective]] = {}
    for collective in found:
        parts.setdefault(key(collective), []).append(collective)
    totals = {
        name: Totals(
            sum(c.count for c in part),
            sum(c.total_sent for c in part),
            max(c.array_bytes for c in part),
            any(c.unbounded for c in part),
        )
        for name, part in parts.items()
    }
    return dict(sorted(totals.items(), key=lambda item: -item[1].sent))


def by_scope(found: Iterable[Collective], depth: int = 1) -> dict[str, Totals]:
    """Totals by the outermost `depth` named scopes."""
    return summary(found, lambda c: "/".join(c.scope.split("/")[:depth]))
