"""Progress on stderr: a bar with amounts, rate and time left on a terminal, plain lines otherwise."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from surgery.cli.formats import size

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

    from surgery.execute import Progress as ProgressLike

# A line at most this often where there is no terminal: a log is read later, by someone who wants to see it move.
_SECONDS_BETWEEN_LINES = 5.0


def make_progress(quiet: bool) -> ProgressLike:
    """What fits where stderr goes to, for bytes."""
    return _made(quiet, byte_columns, byte_amounts)


def make_row_progress(quiet: bool) -> ProgressLike:
    """The same for rows and answers of an evaluation."""
    return _made(quiet, count_columns, lambda done, total: f"{done} of {total} rows")


def _made(quiet: bool, columns: Columns, amounts: Amounts) -> ProgressLike:
    from surgery.execute import NoProgress

    if quiet:
        return NoProgress()
    return Bar(columns) if sys.stderr.isatty() else Lines(amounts)


def byte_columns() -> list[ProgressColumn]:
    """Bytes and bytes a second."""
    from rich.progress import DownloadColumn, TransferSpeedColumn

    return [DownloadColumn(), TransferSpeedColumn()]


def byte_amounts(done: int, total: int) -> str:
    """The share that is done, and of how much."""
    return f"{done / total:.0%} of {size(total)}"


def count_columns() -> list[ProgressColumn]:
    """How many of how many."""
    from rich.progress import MofNCompleteColumn

    return [MofNCompleteColumn()]


Columns = Callable[[], "list[ProgressColumn]"]
Amounts = Callable[[int, int], str]


class Bar:
    """A bar drawn with rich.

    Args:
        columns: what stands between the bar and the time left.
    """

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._progress: Progress | None = None
        self._mutex = threading.Lock()
        self._left = 0

    def start(self, total: int, label: str, done: int = 0) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}"), BarColumn(bar_width=None), *self._columns(),
            TextColumn("{task.fields[figures]}"), TimeRemainingColumn(),
        )  # fmt: skip
        self._left = total - done
        self._progress = RichProgress(*columns, console=Console(stderr=True), expand=True, transient=True)
        self._task = self._progress.add_task(label, total=total, completed=done, figures="")
        self._progress.start()

    def advance(self, count: int, figures: str = "") -> None:
        # What differs is read a second time to see by how much; the bar does not go past its end for that.
        with self._mutex:
            count = min(count, self._left)
            self._left -= count
        if self._progress is not None and count:
            self._progress.update(self._task, advance=count, figures=figures)

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class Lines:
    """A line now and then.

    Args:
        amounts: how much of how much is done, in words.
        last: whether the end has a line in any case.
    """

    def __init__(self, amounts: Amounts, last: bool = False) -> None:
        self._amounts, self._always_last = amounts, last
        self._mutex = threading.Lock()
        self._total = self._done = self._first = 0
        self._label = ""
        self._begun = self._last = 0.0

    def start(self, total: int, label: str, done: int = 0) -> None:
        self._total, self._done, self._first, self._label = total, done, done, label
        self._begun = self._last = time.monotonic()

    def advance(self, count: int, figures: str = "") -> None:
        with self._mutex:  # also while a line is written: another thread's, which is further, is to come after it
            self._done = min(self._done + count, self._total)
            now = time.monotonic()
            due = now - self._last >= _SECONDS_BETWEEN_LINES or (self._always_last and self._done == self._total)
            if not due or not self._total:
                return
            self._last = now
            rate = (self._done - self._first) / (now - self._begun)
            left = (self._total - self._done) / rate if rate else 0.0
            shown = ", ".join(part for part in (self._amounts(self._done, self._total), figures) if part)
            click.echo(f"{self._label}: {shown}, {left:.0f} s left", err=True)

    def stop(self) -> None: ...
