"""Results: figures of processes, rows that compare two of them with a bar, and both as Markdown tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from benchmarks.measuring import Measured, Usage


@dataclass(frozen=True)
class Row:
    """One comparison. Without a bar it is reported only.

    Attributes:
        figure: what is compared.
        ours, other: both sides, with their units; `other` is a peer's figure or a limit.
        ratio: how they compare, as the bar counts it.
        bar: what was asked for, and whether it was met.
    """

    figure: str
    ours: str
    other: str = ""
    ratio: float | None = None
    bar: str = ""
    met: bool | None = None

    def cells(self) -> list[str]:
        ratio = "" if self.ratio is None else f"{self.ratio:.3g}"
        met = "" if self.met is None else "met" if self.met else "missed"
        return [self.figure, self.ours, self.other, ratio, self.bar, met]


@dataclass(frozen=True)
class Result:
    """What one benchmark found: a title, notes in prose, the processes, and the comparisons."""

    title: str
    notes: Sequence[str]
    processes: Sequence[Measured]
    rows: Sequence[Row]

    def as_dict(self) -> dict[str, object]:
        return {
            "title": self.title,
            "notes": list(self.notes),
            "processes": [process.as_dict() for process in self.processes],
            "rows": [asdict(row) for row in self.rows],
        }

    def markdown(self) -> str:
        parts = [f"### {self.title}", *self.notes]
        if self.processes:
            heads = ["process", "runs", "CPU s", "peak MB", "wall s"]
            parts.append(table(heads, [process_cells(process) for process in self.processes]))
        if self.rows:
            parts.append(table(["figure", "ours", "other", "ratio", "bar", ""], [row.cells() for row in self.rows]))
        return "\n\n".join(parts)


def fewer_times(figure: str, ours: float, peer: float, show: Callable[[float], str], least: float) -> Row:
    """A row that asks for `least` times less than a peer's figure; its ratio is peer / ours."""
    ratio = peer / ours
    return Row(figure, show(ours), show(peer), ratio, f"at least {least:g} times less", ratio >= least)


def at_most(figure: str, ours: float, peer: float, show: Callable[[float], str], most: float) -> Row:
    """A row that asks for at most `most` times a peer's figure; its ratio is ours / peer."""
    ratio = ours / peer
    return Row(figure, show(ours), show(peer), ratio, f"at most {most:g} times", ratio <= most)


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.0f} ms"


def megabytes(value: float) -> str:
    return f"{value / 1e6:.0f} MB"


def process_cells(process: Measured) -> list[str]:
    def column(pick: Callable[[Usage], float], digits: int) -> str:
        values = [pick(usage) for usage in process.usages]
        middle = f"{statistics.median(values):.{digits}f}"
        return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"

    return [
        process.name,
        str(len(process.usages)),
        column(lambda usage: usage.cpu, 2),
        column(lambda usage: usage.peak / 1e6, 0),
        column(lambda usage: usage.wall, 2),
    ]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up."""
    widths = [max(len(line[number]) for line in [heads, *rows]) for number in range(len(heads))]
    lines = [heads, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )
