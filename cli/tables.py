"""What reports are drawn with: tables and lines through rich, as wide as the terminal, in full where there is none."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from surgery.cli.formats import plural, size
from surgery.names import plain

if TYPE_CHECKING:
    from surgery.operation import PlanSummary
    from surgery.reports import Fetched

Justify = Literal["left", "right"]

# More rows than this are summed up or cut, unless every one is asked for.
MOST_ROWS = 60
# Where stdout is no terminal there is no width to fit.
_NO_WIDTH = 10_000
# A column of nothing longer than this is never broken; the first column and long ones fold where the terminal ends.
_SHORT = 16


class Reported(Protocol):
    """Any report."""

    def as_dict(self) -> dict[str, object]: ...


def show(report: Reported, draw: Callable[[Console], None], as_json: bool, quiet: bool) -> None:
    """Print a report: as one JSON object, as tables, or not at all.

    Notes may be warnings: where they are not among the tables they go to stderr.
    """
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=2, allow_nan=False))
    if as_json or quiet:
        for text in getattr(report, "notes", ()):
            click.echo(f"Note: {plain(text)}", err=True)
        return
    console = Console(highlight=False)
    if console.is_terminal:
        draw(console)
        return
    drawn = io.StringIO()
    draw(Console(highlight=False, width=_NO_WIDTH, file=drawn))
    # Tables fill their columns with spaces, also at the ends of lines.
    click.echo("".join(f"{text.rstrip()}\n" for text in drawn.getvalue().split("\n")[:-1]), nl=False)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> Table:
    """A table whose first `left` columns are aligned left and the others right. Cells are plain text, never markup."""
    cells = [[plain(cell) for cell in row] for row in rows]
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for position, name in enumerate(columns):
        short = all(len(row[position]) <= _SHORT for row in cells)
        justify: Justify = "left" if position < left else "right"
        drawn.add_column(name, justify=justify, no_wrap=position > 0 and short, overflow="fold")
    for row in cells:
        drawn.add_row(*(Text(cell) for cell in row))
    return drawn


def facts(pairs: Iterable[tuple[str, str]]) -> Table:
    """Names and values, one to a line."""
    drawn = Table(box=None, pad_edge=False, show_header=False)
    drawn.add_column(style="bold", no_wrap=True)
    drawn.add_column(overflow="fold")
    for name, value in pairs:
        drawn.add_row(Text(name), Text(plain(value)))
    return drawn


def line(console: Console, text: str) -> None:
    """A line of plain text; where stdout is no terminal it stays one, however long."""
    console.print(Text(plain(text)), soft_wrap=not console.is_terminal)


def notes(console: Console, texts: Iterable[str]) -> None:
    """What a report wants said beside its numbers."""
    for text in texts:
        line(console, f"Note: {text}")


def plan(console: Console, summary: PlanSummary, output: str) -> None:
    """What a dry run shows."""
    pairs = [
        ("would write", output),
        ("read", size(summary.read_bytes)),
        ("written", size(summary.write_bytes)),
        ("copied unchanged", size(summary.copied_bytes)),
        ("tensors", f"{summary.tensors}, {summary.computed_tensors} of them computed"),
    ]
    console.print(facts([*pairs, *machine(summary)]))


def network(console: Console, fetched: Iterable[Fetched]) -> None:
    """What came from a Hub, and what nothing proves."""
    for one in fetched:
        line(console, f"Fetched {size(one.nbytes)} of {one.source} at {one.revision[:12]}.")
        if one.unproved:
            line(
                console,
                f"Note: no hash proves what was read of {', '.join(one.unproved)}, since not all of it was read, or "
                "the Hub has no hash of it; `surgery pull` proves every file.",
            )


def machine(summary: PlanSummary) -> list[tuple[str, str]]:
    """What a plan needs of this computer."""
    memory, disk = size(summary.peak_memory_bytes), size(summary.free_disk_bytes)
    return [("peak memory", f"about {memory}"), ("free disk", disk)]


def resumed(steps: int) -> list[tuple[str, str]]:
    """The line that says what an interrupted run had done already, if there was one."""
    return [("resumed", f"{plural(steps, 'step')} from an earlier run")] if steps else []


def shape(sides: Sequence[int]) -> str:
    """The shape of a tensor."""
    return " x ".join(str(side) for side in sides) or "scalar"
