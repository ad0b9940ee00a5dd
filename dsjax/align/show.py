"""The precision report for people: a table, worst first, and a plot in the order of calls."""

from __future__ import annotations

from collections import Counter
from typing import Any

from dsjax.align.plot import Point, svg_scatter
from dsjax.align.taps import parse
from dsjax.export.standalone.verify import logits_line, percent, table, word

Report = dict[str, Any]
_ROWS = 12


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _layer(row: Report) -> str:
    return "-" if row["layer"] is None else str(row["layer"])


def _groups(groups: list[Report], by: str, bound: str) -> list[str]:
    head = [by, "results", "max rel", "norm", "median", f">{bound}", ">strict", "worst"]
    rows = [
        [
            str(group[by]),
            str(group["results"]),
            *(_number(group[column]) for column in ("max_relative", "norm", "median_error")),
            *(str(group[column]) for column in ("beyond_bound", "beyond_strict")),
            group["worst"],
        ]
        for group in groups[:_ROWS]
    ]
    return [table([head, *rows]), *_rest(len(groups), f"{by}s")]


def _rest(count: int, what: str) -> list[str]:
    return [f"... {count - _ROWS} more {what}, no worse"] if count > _ROWS else []


def _not_compared(report: Report) -> list[str]:
    """What was left out, by operator and with how many results."""
    lines = []
    for found, what in (
        (report["missing"] if report["common"] else [], "of the reference that the candidate lacks"),
        (report["extra"], "of the candidate that the reference lacks"),
        (report["unlike"], "held in another form (a shape, parts on a mesh, codes against numbers)"),
    ):
        if found:
            counts = Counter(_operator(name) for name in found)
            told = ", ".join(f"{operator} {count}" for operator, count in counts.most_common(_ROWS))
            more = f", and of {len(counts) - _ROWS} others" if len(counts) > _ROWS else ""
            lines.append(f"not compared: {len(found)} results {what}: {told}{more}")
    if report["uneven"]:
        of = Counter(
            f"{group['operator']} ({group['reference']} and {group['candidate']})" for group in report["uneven"]
        )
        places = ", ".join(f"{what} in {count} places" for what, count in of.most_common(_ROWS))
        lines.append(f"not paired, since not called equally often: {places}")
    return lines


def _operator(name: str) -> str:
    place = parse(name.rpartition("/")[2])
    return place.operator if place else name


def report_text(report: Report) -> str:
    """Tables by operator, block, layer and call, each worst first, what is left out, what departs first, verdicts."""
    bound, rows = percent(report["bound"]), report["results"]
    taps = any(row["order"] is not None for row in rows)
    lines: list[str] = []
    if taps:
        lines += [*_groups(report["operators"], "operator", bound), ""]
    for groups, by in ((report["blocks"], "block"), (report["layers"], "layer")):
        lines += [*_groups(groups, by, bound), ""] if groups else []
    columns = ("max_relative", "norm", "mean_relative", "cosine", "pcc", "equal_share")
    shown = [["result", "max rel", "norm", "mean rel", "cosine", "PCC", "equal", bound, "strict"]]
    worst = sorted(rows, key=lambda row: -row["error"])
    for row in worst[:_ROWS]:
        errors = [f"{row[column]:.5g}" if column in row else "-" for column in columns]
        shown.append([row["name"], *errors, word(row["within_bound"]), word(row["within_strict"])])
    lines += [table(shown), *_rest(len(rows), "results")]
    lines += [f"{row['name']}: {problem}" for row in worst[:_ROWS] for problem in row["problems"]]
    lines += [f"{name}: {logits_line(logits)}" for name, logits in report["logits"].items()]
    lines += _not_compared(report)
    if taps:
        for what, first in (("first", report["first_departure"]), ("first layer", report["first_layer"])):
            strict, loose = ("none" if first[v] is None else first[v] for v in ("strict", "bound"))
            lines.append(f"{what} beyond strict: {strict}; beyond {bound}: {loose}")
    verdicts = f"{bound}: {word(report['within_bound'])}; strict ({report['strict']:.1g}): "
    return "\n".join([*lines, verdicts + word(report["within_strict"])])


def report_plot(report: Report, title: str) -> str:
    """Each result's error in the order of calls, coloured by operator, with the lines of both bounds, as SVG."""
    points = []
    for index, row in enumerate(report["results"]):
        label = f"{row['name']}\nlayer {_layer(row)}, {row['operator']}\nerror {row['error']:.3g}"
        points.append(Point(index, row["error"], row["operator"], "\n".join([label, *row["problems"]])))
    bounds = {f"strict {report['strict']:.3g}": report["strict"], percent(report["bound"]): report["bound"]}
    ylabel = "error: larger of max relative and norm"
    return svg_scatter(points, bounds, title, "results in the order of operators' calls", ylabel)
