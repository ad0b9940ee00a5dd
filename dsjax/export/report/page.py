"""Pages of tables for people: one description, written as Markdown and as HTML with bars and without scripts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d00", "#333333")  # Okabe and Ito's
_STYLE = (
    "body{font:14px/1.45 sans-serif;max-width:1180px;margin:2em auto;padding:0 1em;background:#fff;color:#222}"
    "table{border-collapse:collapse;margin:.6em 0}th,td{border:1px solid #ccc;padding:3px 8px;text-align:left;"
    "vertical-align:top}th{background:#f3f3f3}td.n{text-align:right;white-space:nowrap}div{overflow-x:auto}"
    "code{font-size:92%;overflow-wrap:anywhere}nav a{margin-right:1em}h2{margin-top:1.6em}"
)


class Amount(float):
    """A number that is shown in its own way, and that bars are drawn of."""

    text: str

    def __new__(cls, value: float, text: str) -> Amount:
        made = super().__new__(cls, value)
        made.text = text
        return made


Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """A table; text may have `code` in it.

    Attributes:
      head: of its columns.
      rows: cells; None stands for nothing.
      bars: so many of its rows are drawn as bars, too, in HTML: numbers by the first column's names.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    bars: int = 0


@dataclass(frozen=True)
class Section:
    """A heading, and the paragraphs and tables below it."""

    title: str
    parts: Sequence[str | Table]


def scaled(value: float, unit: str, step: str = "kMGTP") -> Amount:
    """A number with a decimal prefix: 802,780 bytes are 802.8 kB."""
    shown, prefix = float(value), ""
    for found in step:
        if abs(shown) < 1000:
            break
        shown, prefix = shown / 1000, found
    return Amount(value, f"{shown:,.4g} {prefix}{unit}")


def _shown(cell: Cell) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, Amount):
        return cell.text
    return cell if isinstance(cell, str) else f"{cell:,}"


def markdown(title: str, sections: Sequence[Section]) -> str:
    """The page as Markdown."""
    lines = [f"# {title}", ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        for part in section.parts:
            if isinstance(part, str):
                lines += [part, ""]
                continue
            rows = [part.head, *part.rows]
            cells = [[_shown(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
            cells.insert(1, ["---"] * len(part.head))
            lines += [*(f"| {' | '.join(row)} |" for row in cells), ""]
    return "\n".join(lines)


def html(title: str, sections: Sequence[Section]) -> str:
    """The page as HTML that stands by itself."""
    links = "".join(f'<a href="#s{i}">{escape(s.title)}</a> ' for i, s in enumerate(sections))
    parts = [
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
        f"<style>{_STYLE}</style></head><body>\n<h1>{escape(title)}</h1>\n<nav>{links}</nav>",
    ]
    for i, section in enumerate(sections):
        parts.append(f'<h2 id="s{i}">{escape(section.title)}</h2>')
        parts += [_table(part) if isinstance(part, Table) else f"<p>{_inline(part)}</p>" for part in section.parts]
    return "\n".join([*parts, "</body></html>\n"])


def _inline(text: str) -> str:
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))


def _table(table: Table) -> str:
    def cell(value: Cell) -> str:
        number = value is not None and not isinstance(value, str)
        return f"<td{' class=n' if number else ''}>{_inline(_shown(value))}</td>"

    head = "".join(f"<th>{_inline(name)}</th>" for name in table.head)
    rows = [f"<tr>{''.join(map(cell, row))}</tr>" for row in table.rows]
    drawn = svg_bars(table) if table.bars else ""
    return f"{drawn}<div><table><tr>{head}</tr>\n" + "\n".join(rows) + "\n</table></div>"


def svg_bars(table: Table) -> str:
    """An SVG of a table's first rows: for each a group of bars, one of every column of numbers, from zero on."""
    rows = table.rows[: table.bars]
    columns = [j for j in range(1, len(table.head)) if any(isinstance(row[j], int | float) for row in rows)]
    most = max((float(row[j] or 0) for row in rows for j in columns if not isinstance(row[j], str)), default=0.0)
    if not columns or most <= 0:
        return ""
    labels = [_shown(row[0]).replace("`", "") for row in rows]
    left, width, thick = 12 + 7 * min(max(map(len, labels)), 44), 1120, 15
    scale = (width - left - 200) / most
    top = 20 * len(columns) + 6 if len(columns) > 1 else 4
    height = top + len(rows) * (thick * len(columns) + 6)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img" '
        f'style="max-width:100%" font-family="sans-serif" font-size="12" fill="#222"><title>{escape(table.head[0])}'
        "</title>"
    ]
    if len(columns) > 1:
        for i, j in enumerate(columns):
            name = escape(table.head[j].replace("`", ""))
            parts.append(f'<rect x="{left}" y="{20 * i + 4}" width="12" height="12" fill="{_colour(i)}"/>')
            parts.append(f'<text x="{left + 18}" y="{20 * i + 14}">{name}</text>')
    for n, (label, row) in enumerate(zip(labels, rows, strict=True)):
        y = top + n * (thick * len(columns) + 6)
        short = label if len(label) <= 44 else label[:43] + "…"
        middle = y + thick * len(columns) / 2 + 4
        parts.append(f'<text x="{left - 8}" y="{middle:.1f}" text-anchor="end">{escape(short)}</text>')
        for i, j in enumerate(columns):
            value = row[j]
            if value is None or isinstance(value, str):
                continue
            size, at = scale * float(value), y + thick * i
            bar = f'<rect x="{left}" y="{at}" width="{size:.1f}" height="{thick - 2}" fill="{_colour(i)}"/>'
            parts += [bar, f'<text x="{left + size + 6:.1f}" y="{at + 11}">{escape(_shown(value))}</text>']
    return "\n".join([*parts, "</svg>\n"])


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]
