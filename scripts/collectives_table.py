#!/usr/bin/env python3
"""What devices send each other in one step, per token: the planner's closed forms beside the compiled program.

Compiles the greedy step of models at their true size, from shapes alone, for 32 virtual CPU devices, once with the
collectives that the layers name (`--spmd manual`) and for some plans once more with those that XLA's partitioner finds
(`auto`), and counts both. Prints Markdown, or with --write puts it between the markers of docs/collectives.md; status 1
where a kind of collective is more than a tenth off its closed form.

    .venv/bin/python scripts/collectives_table.py [deepseek-v3 ...] [--write docs/collectives.md]
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=32"
os.environ["JAX_PLATFORMS"] = "cpu"

from dsjax.config import load_config
from dsjax.numerics import Numerics
from dsjax.parallel import parallel
from dsjax.plan.counted import FEW, QUICK, asked, counted_bytes, is_few, lowered_step, planned_bytes
from dsjax.plan.placement import Model, Placement
from sharding import parse_plan
from sharding.collectives import Collective, collectives

BATCH, CHUNK, CONTEXT = 32, 512, 4096
STEPS = {"decode": 1, "prefill": CHUNK}

# Plans: `dp=..,ep=..,tp=..`, then "slots" (attention by slots), "sent" (tokens to their experts, even few), "gather"
# (output groups copied), "native"; "auto" asks for the partitioner's decode step, too.
PLANS = {
    "deepseek-v3": [
        "tp=16/auto",
        "ep=16",
        "ep=4,tp=4/auto",
        "ep=16/slots/auto",
        "ep=16/slots/sent",
        "ep=16/slots/native",
        "dp=2,ep=4,tp=2/slots",
        "dp=2,tp=8",
    ],
    "deepseek-v4-flash": [
        "tp=8/auto",
        "tp=16/auto",
        "tp=16/gather",
        "tp=32/auto",
        "tp=32/gather",
        "ep=16/slots",
        "dp=2,ep=2,tp=4",
    ],
    "deepseek-r1-distill-llama-70b": ["tp=8/auto", "tp=16", "dp=2,tp=8"],
}
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled step.

    Attributes:
      counted: bytes that a device sends, by kind.
      planned: the same in closed form.
      temporary: bytes per device that it takes beside its arguments, as XLA:CPU says.
      largest: what sends most, scopes and kinds, with their bytes.
    """

    counted: dict[str, float]
    planned: dict[str, float]
    temporary: int
    largest: list[tuple[str, float]]


def compiled(name: str, plan: str, tokens: int, spmd: str) -> Compiled:
    """Of `PLANS`, one step."""
    mesh, *how = plan.split("/")
    config = load_config(name)
    numerics = Numerics("native" if "native" in how else "plain").for_checkpoint(config)
    parted = parallel(
        config,
        parse_plan(mesh),
        numerics,
        attention="slots" if "slots" in how else "heads",
        o_groups="gather" if "gather" in how else "split",
        dispatch="all-to-all" if "sent" in how else "auto",
        spmd=spmd,
    )
    model = Model(name, config, numerics)
    step = lowered_step(parted, model, BATCH, tokens, CONTEXT).compile(QUICK)
    found = collectives(step.as_text())
    planned = planned_bytes(Placement(model, parted.layout), BATCH // parted.slots, tokens)
    return Compiled(counted_bytes(found), planned, step.memory_analysis().temp_size_in_bytes, largest(found))


def largest(found: list[Collective]) -> list[tuple[str, float]]:
    """The two scopes and kinds that send most."""
    totals: dict[str, float] = {}
    for collective in found:
        if not is_few(collective):
            key = f"{collective.scope.rsplit('/', maxsplit=1)[-1] or 'unnamed'}, {collective.kind}"
            totals[key] = totals.get(key, 0) + asked(collective)
    return sorted(totals.items(), key=lambda item: -item[1])[:2]


def amount(nbytes: float) -> str:
    """kB, three digits at least."""
    kb = nbytes / 1e3
    return f"{kb:,.0f}" if kb >= 100 else f"{kb:.1f}" if kb >= 10 else f"{kb:.2f}"


def row(*cells: object) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def of_model(name: str) -> tuple[list[str], bool]:
    """Its two tables in Markdown, and whether every closed form holds."""
    lines = [
        f"### {name}",
        "",
        row("plan", "step", *KINDS, "closed form", "compiled", "ratio", "other"),
        "|---|---|" + "---:|" * (len(KINDS) + 4),
    ]
    auto = [
        "",
        row("plan, decode", "manual", *KINDS, "permutes", "auto", "times", "temporary, GB", "what sends most"),
        "|---|" + "---:|" * (len(KINDS) + 5) + "---|",
    ]
    holds = True
    for plan in PLANS[name]:
        for step, tokens in STEPS.items():
            start = time.perf_counter()
            manual, batch = compiled(name, plan, tokens, "manual"), BATCH * tokens
            holds &= all(
                abs(manual.counted.get(kind, 0) - manual.planned.get(kind, 0)) <= 0.1 * manual.planned.get(kind, 0)
                for kind in (manual.counted.keys() | manual.planned.keys()) - {FEW}
            )
            few = manual.counted.pop(FEW, 0)
            planned, counted = (sum(d.values()) for d in (manual.planned, manual.counted))
            cells = (amount(manual.counted[kind] / batch) if kind in manual.counted else "" for kind in KINDS)
            shown = plan.replace("/auto", "").replace("/", ", ")
            ends = amount(planned / batch), amount(counted / batch), f"{counted / planned:.4f}"
            lines.append(row(f"`{shown}`", step, *cells, *ends, f"{few / batch:,.0f} B"))
            if step == "decode" and plan.endswith("/auto"):
                found = compiled(name, plan, tokens, "auto")
                found.counted.pop(FEW, 0)
                total = sum(found.counted.values())
                kinds = (*KINDS, "collective-permute")
                cells = (amount(found.counted[kind] / batch) if kind in found.counted else "" for kind in kinds)
                most = "; ".join(f"{what} {nbytes / total:.0%}" for what, nbytes in found.largest)
                temporary = f"{manual.temporary / 1e9:.2f} / {found.temporary / 1e9:.2f}"
                times = f"{total / counted:,.0f}x"
                auto.append(row(f"`{shown}`", ends[1], *cells, amount(total / batch), times, temporary, most))
            print(f"{name} {plan} {step}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return [*lines, *(auto if len(auto) > 3 else [])], holds


def main() -> None:
    """Prints or writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(PLANS)}; all by default")
    parser.add_argument("--write", type=Path, help="a Markdown file with a pair of markers for each model")
    options = parser.parse_args()
    if unknown := set(options.models) - PLANS.keys():
        parser.error(f"expected models of {', '.join(PLANS)}, found {', '.join(sorted(unknown))}")
    holds = True
    for name in options.models or PLANS:
        lines, fine = of_model(name)
        holds &= fine
        if options.write is None:
            print("\n".join(lines), end="\n\n")
            continue
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        text = options.write.read_text()
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        options.write.write_text("".join([before, begin, "\n", "\n".join(lines), "\n\n", end, after]))
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    main()
