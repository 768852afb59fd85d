"""A page of HTML with everything in it: tables whose cells are coloured, curves as SVG. No script, no network.

Colours follow the reader's light or dark setting; every number that a colour stands for is printed in its cell, and
every curve has its own dashes and its end values in a table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from surgery.analysis.panels import Curves, Grid, panels
from surgery.analysis.report import AnalyzeReport
from surgery.names import plain

_WIDTH, _HEIGHT = 720, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 10, 44
_DASHES = ("", "8 3", "2 3", "10 3 2 3", "5 5", "1 2")
_HUES = 6

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --faint: #6a737d; --rule: #d0d7de;
  --cold: 244, 248, 252; --hot: 9, 105, 178; --on-hot: #ffffff;
  --h0: #0a58a5; --h1: #a84300; --h2: #146c3a; --h3: #7a2d9a; --h4: #8a6100; --h5: #b3124e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --faint: #9aa4af; --rule: #30363d;
  --h0: #6cb6ff; --h1: #ffa657; --h2: #7ee787; --h3: #d2a8ff; --h4: #e3c14d; --h5: #ff9bb3; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2.5rem 0 0; }
p.note { color: var(--faint); margin: .2rem 0 .6rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th { font-weight: 600; text-align: right; padding: .15rem .5rem; }
thead th { border-bottom: 1px solid var(--rule); vertical-align: bottom; }
td { text-align: right; padding: .15rem .5rem; }
svg { width: 100%; height: auto; } svg text { fill: var(--ink); font-size: 12px; }
.axis { stroke: var(--rule); } .curve { fill: none; stroke-width: 2; }
.key { display: inline-block; width: 2.2rem; height: .8rem; vertical-align: middle; }
"""


def page(report: AnalyzeReport) -> str:
    """The page, as text."""
    title = f"Analysis of {plain(report.label.rstrip('/').rpartition('/')[2])}"
    adapters = ", ".join(plain(name) for name in report.adapters)
    about = f"Adapters: {adapters}. " if adapters else "The weights themselves. "
    body = "\n".join(_section(panel) for panel in panels(report))
    said = "".join(f"<p class='note'>{escape(plain(note))}</p>" for note in report.notes)
    return (
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f"<p>{escape(about)}{len(report.modules)} matrices. Where a cell stands for several, it holds their median.</p>"
        f"\n{said}\n{body}\n</body>\n</html>\n"
    )


def _section(panel: Grid | Curves) -> str:
    drawn = _table(panel) if isinstance(panel, Grid) else _svg(panel)
    head = f"<h2>{escape(panel.title)}</h2>\n<p class='note'>{escape(panel.note)}</p>"
    return f"<section>\n{head}\n<div class='scroll'>{drawn}</div>\n</section>"


def _table(grid: Grid) -> str:
    head = "".join(f"<th scope='col'>{escape(name)}</th>" for name in (grid.corner, *grid.columns))
    rows = "\n".join(
        f"<tr><th scope='row'>{escape(name)}</th>{''.join(_cell(grid, value) for value in values)}</tr>"
        for name, values in zip(grid.rows, grid.values, strict=True)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table>"


def _cell(grid: Grid, value: float | None) -> str:
    if value is None:
        return "<td>-</td>"
    red, green, blue, ink = cell_colours(value, grid.low, grid.high)
    return f"<td style='background:rgb({red},{green},{blue});color:{ink}'>{told(value, grid.share)}</td>"


def cell_colours(value: float, low: float, high: float) -> tuple[int, int, int, str]:
    """Background of a cell, from pale to deep blue, and black or white, whichever has the greater contrast on it."""
    place = min(max((value - low) / (high - low), 0.0), 1.0) if high > low else 0.0
    red, green, blue = (round(pale + place * (deep - pale)) for pale, deep in ((240, 8), (246, 69), (252, 148)))
    # WCAG 2: contrast is (lighter + 0.05) / (darker + 0.05) of the relative luminances.
    luminance = _luminance(red, green, blue)
    return red, green, blue, "#ffffff" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "#000000"


def _luminance(*channels: int) -> float:
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def told(value: float, share: bool) -> str:
    """A number as a cell has it: three significant digits, a share in percent.

    >>> told(0.0512, True), told(21.53, False), told(12345.6, False)
    ('5.12%', '21.5', '1.23e+04')
    """
    return f"{100 * value:.3g}%" if share else f"{value:.3g}"


def _svg(curves: Curves) -> str:
    points = [(x, y) for curve in curves.curves for x, y in zip(curve.x, curve.y, strict=True)]
    if not points:
        return "<p>Nothing but zeros.</p>"
    left, right = _decades([x for x, _ in points])
    low, high = _decades([y for _, y in points])

    def across(x: float) -> float:
        return _LEFT + (math.log10(x) - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT)

    def down(y: float) -> float:
        return _TOP + (high - math.log10(y)) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in _ticks(left, right):
        x = across(tick)
        parts.append(f"<line class='axis' x1='{x:.1f}' x2='{x:.1f}' y1='{_TOP}' y2='{_HEIGHT - _BOTTOM}'/>")
        parts.append(f"<text x='{x:.1f}' y='{_HEIGHT - 26}' text-anchor='middle'>{tick:g}</text>")
    for tick in _ticks(low, high):
        y = down(tick)
        parts.append(f"<line class='axis' x1='{_LEFT}' x2='{_WIDTH - _RIGHT}' y1='{y:.1f}' y2='{y:.1f}'/>")
        parts.append(f"<text x='{_LEFT - 6}' y='{y + 4:.1f}' text-anchor='end'>{tick:g}</text>")
    for number, curve in enumerate(curves.curves):
        line = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in zip(curve.x, curve.y, strict=True))
        parts.append(
            f"<polyline class='curve' points='{line}' {_pen(number)}><title>{escape(curve.label)}</title></polyline>"
        )
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(
        f"<text x='{(_LEFT + _WIDTH) / 2}' y='{_HEIGHT - 6}' text-anchor='middle'>{escape(curves.x_label)}</text>"
    )
    turned = f"transform='rotate(-90 14 {middle})'"
    parts.append(f"<text x='14' y='{middle}' text-anchor='middle' {turned}>{escape(curves.y_label)}</text>")
    label = escape(
        f"{curves.title}: {curves.y_label} by {curves.x_label}, one line for each row of the table below", quote=True
    )
    drawn = f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' aria-label='{label}'>{''.join(parts)}</svg>"
    return drawn + _ends(curves)


def _ends(curves: Curves) -> str:
    """A key to the lines that says what they begin, pass through half way, and end with."""
    head = "".join(f"<th scope='col'>{name}</th>" for name in ("", "line", "first", "middle", "last"))
    rows = []
    for number, curve in enumerate(curves.curves):
        stroke = f"<line x1='0' x2='35' y1='6' y2='6' stroke-width='2.5' {_pen(number)}/>"
        sample = f"<svg class='key' viewBox='0 0 35 12' aria-hidden='true'>{stroke}</svg>"
        cells = "".join(f"<td>{told(curve.y[place], False)}</td>" for place in (0, len(curve.y) // 2, -1))
        rows.append(f"<tr><td>{sample}</td><th scope='row'>{escape(curve.label)}</th>{cells}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _pen(number: int) -> str:
    dash = _DASHES[(number // _HUES + number) % len(_DASHES)]
    return f"style='stroke:var(--h{number % _HUES})' stroke-dasharray='{dash}'"


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """The range of an axis in powers of ten, a little wider than the values."""
    low, high = math.log10(min(values)), math.log10(max(values))
    room = 0.04 * (high - low) or 0.5
    return low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers on an axis between two powers of ten: 1, 10, 100, and 2 and 5 as well where these are few."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    for steps in ((1,), (1, 2, 5), range(1, 10)):
        found = [
            step * 10.0**power for power in powers for step in steps if low <= math.log10(step * 10.0**power) <= high
        ]
        if len(found) >= 3:
            break
    return found
