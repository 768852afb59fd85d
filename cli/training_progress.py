"""Progress of training on stderr: a bar with loss, tokens a second and time left on a terminal, lines otherwise."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.progress import Progress

    from surgery.training.work import TrainProgress

_SECONDS_BETWEEN_LINES = 5.0


def make_train_progress(quiet: bool) -> TrainProgress:
    """What fits where stderr goes to."""
    if quiet:
        from surgery.training.work import Silent

        return Silent()
    return Bar() if sys.stderr.isatty() else Lines()


class Bar:
    """A bar drawn with rich."""

    def __init__(self) -> None:
        self._progress: Progress | None = None

    def start(self, steps: int, done: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
        )
        self._progress = RichProgress(*columns, console=Console(stderr=True), expand=True, transient=True)
        self._task = self._progress.add_task("training", total=steps, completed=done, figures="")
        self._progress.start()

    def step(self, line: dict[str, Any]) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=line["step"], figures=_figures(line))

    def note(self, text: str) -> None:
        click.echo(text, err=True)

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class Lines:
    """A line now and then."""

    def __init__(self) -> None:
        self._steps = self._first = 0
        self._begun = self._last = 0.0

    def start(self, steps: int, done: int) -> None:
        self._steps, self._first = steps, done
        self._begun = self._last = time.monotonic()
        if done:
            click.echo(f"training: goes on after step {done} of {steps}", err=True)

    def step(self, line: dict[str, Any]) -> None:
        now = time.monotonic()
        if now - self._last < _SECONDS_BETWEEN_LINES and line["step"] < self._steps:
            return
        self._last = now
        done = line["step"] - self._first
        left = (now - self._begun) / done * (self._steps - line["step"])
        click.echo(f"training: step {line['step']} of {self._steps}, {_figures(line)}, {left:.0f} s left", err=True)

    def note(self, text: str) -> None:
        click.echo(text, err=True)

    def stop(self) -> None: ...


def _figures(line: dict[str, Any]) -> str:
    return f"loss {line['loss']:.4f}, {line['tokens_per_second']:,.0f} tokens/s"
