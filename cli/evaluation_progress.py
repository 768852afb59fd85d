"""Progress of an evaluation on stderr: rows and answers done, as a bar on a terminal and as lines otherwise."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.progress import Progress

    from surgery.execute import Progress as ProgressLike

_SECONDS_BETWEEN_LINES = 5.0


def make_row_progress(quiet: bool) -> ProgressLike:
    """What fits where stderr goes to."""
    from surgery.execute import NoProgress

    if quiet:
        return NoProgress()
    return RowBar() if sys.stderr.isatty() else RowLines()


class RowBar:
    """A bar drawn with rich."""

    def __init__(self) -> None:
        self._progress: Progress | None = None

    def start(self, total: int, label: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (TextColumn(label), BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = RichProgress(*columns, console=Console(stderr=True), expand=True, transient=True)
        self._task = self._progress.add_task(label, total=total)
        self._progress.start()

    def advance(self, count: int) -> None:
        if self._progress is not None:
            self._progress.advance(self._task, count)

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class RowLines:
    """A line now and then."""

    def __init__(self) -> None:
        self._total = self._done = 0
        self._label = ""
        self._begun = self._last = 0.0

    def start(self, total: int, label: str) -> None:
        self._total, self._done, self._label = total, 0, label
        self._begun = self._last = time.monotonic()

    def advance(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last = now
        left = (now - self._begun) / self._done * (self._total - self._done)
        click.echo(f"{self._label}: {self._done} of {self._total} rows, {left:.0f} s left", err=True)

    def stop(self) -> None: ...
