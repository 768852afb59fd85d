"""Progress on stderr: a bar with bytes, rate and time left on a terminal, plain lines otherwise."""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING

import click

from surgery.cli.formats import size

if TYPE_CHECKING:
    from rich.progress import Progress

    from surgery.execute import Progress as ProgressLike

# A line at most this often where there is no terminal: a log is read later, by someone who wants to see it move.
_SECONDS_BETWEEN_LINES = 5.0


def make_progress(quiet: bool) -> ProgressLike:
    """What fits where stderr goes to."""
    from surgery.execute import NoProgress

    if quiet:
        return NoProgress()
    return Bar() if sys.stderr.isatty() else Lines()


class Bar:
    """A bar drawn with rich."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._mutex = threading.Lock()
        self._left = 0

    def start(self, total: int, label: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self._left = total
        self._progress = RichProgress(*columns, console=Console(stderr=True), expand=True, transient=True)
        self._task = self._progress.add_task(label, total=total)
        self._progress.start()

    def advance(self, count: int) -> None:
        # What differs is read a second time to see by how much; the bar does not go past its end for that.
        with self._mutex:
            count = min(count, self._left)
            self._left -= count
        if self._progress is not None and count:
            self._progress.advance(self._task, count)

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class Lines:
    """A line now and then."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._total = self._done = 0
        self._label = ""
        self._begun = self._last = 0.0

    def start(self, total: int, label: str) -> None:
        self._total, self._done, self._label = total, 0, label
        self._begun = self._last = time.monotonic()

    def advance(self, count: int) -> None:
        with self._mutex:  # also while a line is written: another thread's, which is further, is to come after it
            self._done = min(self._done + count, self._total)
            now = time.monotonic()
            if now - self._last < _SECONDS_BETWEEN_LINES or not self._total:
                return
            self._last = now
            rate = self._done / (now - self._begun)
            left = (self._total - self._done) / rate if rate else 0.0
            share = self._done / self._total
            click.echo(f"{self._label}: {share:.0%} of {size(self._total)}, {left:.0f} s left", err=True)

    def stop(self) -> None: ...
