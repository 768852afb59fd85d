"""Writing a picture of a report: HTML by ourselves, PNG by matplotlib. It appears whole or not at all."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.analysis.page import cell_colours, page, told
from surgery.analysis.panels import Curves, Grid, panels
from surgery.analysis.report import AnalyzeReport
from surgery.errors import MissingExtraError, OptionError, OutputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = (".png", ".html")
# Names neither the library's version nor a time.
_METADATA = {"Software": None}


def check_picture(path: str | os.PathLike[str], overwrite: bool) -> None:
    """Refuse, before any work, a picture that could not be written."""
    place = Path(path)
    if place.suffix.lower() not in KINDS:
        raise OptionError(f"--plot is {str(place)!r}, expected a name that ends in .png or .html.")
    if place.is_dir():
        raise OutputError(f"{place} is a folder; name a file for --plot.")
    if place.exists() and not overwrite:
        raise OutputError(f"{place} exists already; pass --overwrite to replace it.")
    if not place.parent.is_dir():
        raise OutputError(f"{place.parent} is no folder, so {place.name} cannot be written there; make it first.")
    if place.suffix.lower() == ".png":
        _figure_class()


def write_picture(report: AnalyzeReport, path: str | os.PathLike[str]) -> None:
    """Draw a report and put the picture at `path` in one move. Raises `OutputError` where that fails."""
    place = Path(path)
    content = _png(report) if place.suffix.lower() == ".png" else page(report).encode()
    beside = place.with_name(f".{place.name}.{os.getpid()}.partial")
    try:
        beside.write_bytes(content)
        os.replace(beside, place)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OutputError(f"{place} cannot be written: {error.strerror or error}.") from error


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "train") from error
    return Figure


def _png(report: AnalyzeReport) -> bytes:
    """All panels below each other, two to a row."""
    drawn = panels(report)
    heights = [_height(panel) for panel in drawn]
    rows = -(-len(drawn) // 2)
    ratios = [max(heights[2 * row : 2 * row + 2]) for row in range(rows)]
    figure = _figure_class()(figsize=(15, sum(ratios)), layout="constrained")
    grid = figure.add_gridspec(rows, 2, height_ratios=ratios)
    for number, panel in enumerate(drawn):
        axes = figure.add_subplot(grid[number // 2, number % 2])
        axes.set_title(f"{panel.title}\n", fontsize=11, loc="left", fontweight="bold")
        axes.text(0, 1.03, panel.note, transform=axes.transAxes, fontsize=7.5, color="#555555")
        _draw_grid(axes, panel) if isinstance(panel, Grid) else _draw_curves(axes, panel)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110, metadata=_METADATA)
    return stream.getvalue()


def _height(panel: Grid | Curves) -> float:
    """Inches."""
    return 4.2 if isinstance(panel, Curves) else 2.0 + 0.24 * len(panel.rows)


def _draw_grid(axes: Axes, grid: Grid) -> None:
    shown = len(grid.rows) * len(grid.columns) <= 1500
    image = [
        [(255, 255, 255) if value is None else cell_colours(value, grid.low, grid.high)[:3] for value in row]
        for row in grid.values
    ]
    axes.imshow(image, aspect="auto", interpolation="nearest")
    for row, values in enumerate(grid.values):
        for column, value in enumerate(values):
            if shown and value is not None:
                ink = cell_colours(value, grid.low, grid.high)[3]
                axes.text(column, row, told(value, grid.share), ha="center", va="center", fontsize=6.5, color=ink)
    axes.set_xticks(range(len(grid.columns)), grid.columns, rotation=25, ha="right", fontsize=7)
    axes.set_yticks(range(len(grid.rows)), grid.rows, fontsize=7)
    axes.set_ylabel(grid.corner, fontsize=8)


def _draw_curves(axes: Axes, curves: Curves) -> None:
    styles = ("-", "--", ":", "-.")
    for number, curve in enumerate(curves.curves):
        axes.plot(curve.x, curve.y, styles[number % len(styles)], lw=1.4, label=curve.label)
    if curves.curves and all(math.isfinite(y) for curve in curves.curves for y in curve.y):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.set_yscale("log")
        axes.legend(fontsize=7, ncols=2)
    axes.set_xlabel(curves.x_label, fontsize=8)
    axes.set_ylabel(curves.y_label, fontsize=8)
    axes.grid(alpha=0.3)
