"""Scatter plots as SVG text, without a library: errors on a logarithmic scale, by group, against bounds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 1000, 520
_LEFT, _RIGHT, _TOP, _BOTTOM = 90, 220, 56, 64  # margins; the legend stands to the right
_BAND = 34  # above and below the scale, for what has no place on it
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d00", "#333333")  # Okabe and Ito's
_SHAPES = (
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",  # circle
    "M-3.5,-3.5h7v7h-7z",  # square
    "M0,-4.5L4.5,3.5H-4.5z",  # triangle
    "M0,-5L5,0L0,5L-5,0z",  # diamond
)
_LEGEND = 22


@dataclass(frozen=True)
class Point:
    """A mark: zero is drawn below the scale, NaN and infinity above it; `label` is shown under the pointer."""

    x: float
    y: float
    group: str
    label: str


def _decades(values: Iterable[float]) -> tuple[int, int]:
    """Whole powers of ten around positive values, at least two apart."""
    logs = [math.log10(v) for v in values if 0 < v < math.inf]
    low, high = (math.floor(min(logs)), math.ceil(max(logs))) if logs else (-1, 0)
    return (low, high) if high - low >= 2 else (low - 1, high + 1)


def _steps(low: float, high: float, count: int = 8) -> list[float]:
    """Round numbers from `low` to `high`, at most about `count`."""
    rough = max((high - low) / count, 1e-9)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _text(x: float, y: float, content: str, anchor: str = "start", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(content)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'


def svg_scatter(
    points: Sequence[Point],
    bounds: Mapping[str, float],
    title: str,
    xlabel: str,
    ylabel: str,
    *,
    joined: bool = False,
) -> str:
    """An SVG of points, y on a logarithmic scale, coloured by group in the order that groups first appear in.

    Args:
      bounds: horizontal lines by label, positive.
      joined: with a line through each group's points that are on the scale.
    """
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    low, high = _decades([p.y for p in points] + list(bounds.values()))
    first, last = min((p.x for p in points), default=0.0), max((p.x for p in points), default=1.0)
    first, last = (first - 1, last + 1) if first == last else (first, last)

    def across(x: float) -> float:
        return _LEFT + 10 + (x - first) / (last - first) * (right - _LEFT - 20)

    def up(y: float) -> float:
        if not math.isfinite(y):
            return _TOP + _BAND / 2
        if y <= 0:
            return bottom - _BAND / 2
        return bottom - _BAND - (math.log10(y) - low) / (high - low) * (bottom - _TOP - 2 * _BAND)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        'font-family="sans-serif" font-size="12" fill="#222">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
        _text(_LEFT, 28, title, more=' font-size="16" font-weight="bold"'),
        _text((_LEFT + right) / 2, _HEIGHT - 18, xlabel, "middle"),
        _text(0, 0, ylabel, "middle", f' transform="translate(22 {(_TOP + bottom) / 2:.1f}) rotate(-90)"'),
    ]
    for power in range(low, high + 1, max(1, math.ceil((high - low) / 10))):
        y = up(10.0**power)
        parts += [_line(_LEFT, y, right, y, 'stroke="#ddd"'), _text(_LEFT - 8, y + 4, f"1e{power}", "end")]
    if any(p.y == 0 for p in points):
        parts.append(_text(_LEFT - 8, bottom - _BAND / 2 + 4, "equal", "end"))
    if any(not math.isfinite(p.y) for p in points):
        parts.append(_text(_LEFT - 8, _TOP + _BAND / 2 + 4, "not finite", "end"))
    for x in _steps(first, last):
        parts += [_line(across(x), bottom, across(x), bottom + 5, 'stroke="#888"')]
        parts.append(_text(across(x), bottom + 20, f"{x:g}", "middle"))
    parts.append(
        f'<rect x="{_LEFT}" y="{_TOP}" width="{right - _LEFT}" height="{bottom - _TOP}" fill="none" stroke="#888"/>'
    )
    for label, y in bounds.items():
        parts.append(_line(_LEFT, up(y), right, up(y), 'stroke="#c00" stroke-dasharray="6 4"'))
        parts.append(
            _text(
                right - 6, up(y) - 5, label, "end", ' fill="#c00" paint-order="stroke" stroke="#fff" stroke-width="3"'
            )
        )
    groups = list(dict.fromkeys(p.group for p in points))
    for number, group in enumerate(groups):
        colour, shape = _COLOURS[number % len(_COLOURS)], _SHAPES[number // len(_COLOURS) % len(_SHAPES)]
        members = [p for p in points if p.group == group]
        if joined:
            path = " ".join(f"{across(p.x):.1f},{up(p.y):.1f}" for p in members if 0 < p.y < math.inf)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.2"/>')
        parts.append(f'<g fill="{colour}" fill-opacity="0.8">')
        for p in members:
            mark = f'<path d="{shape}" transform="translate({across(p.x):.1f} {up(p.y):.1f})">'
            parts.append(f"{mark}<title>{escape(p.label)}</title></path>")
        parts.append("</g>")
        y = _TOP + 10 + 19 * number
        if number < _LEGEND:
            parts.append(f'<path d="{shape}" fill="{colour}" transform="translate({right + 18} {y})"/>')
            parts.append(_text(right + 30, y + 4, group if len(group) <= 28 else group[:27] + "…"))
        elif number == _LEGEND:
            parts.append(_text(right + 30, y + 4, f"and {len(groups) - _LEGEND} more"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def html_page(title: str, svg: str, text: str = "") -> str:
    """A page of its own around a plot, with a table of plain text below."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title></head>\n'
        f'<body style="font-family:sans-serif;max-width:1100px;margin:2em auto;background:#fff;color:#222">\n{svg}'
        f'<pre style="overflow-x:auto">{escape(text)}</pre>\n</body></html>\n'
    )
