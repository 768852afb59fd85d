"""Progress of training on stderr: a bar with loss, tokens a second and time left on a terminal, lines otherwise."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.progress import Bar, Lines, count_columns

if TYPE_CHECKING:
    from surgery.training.work import TrainProgress


def make_train_progress(quiet: bool) -> TrainProgress:
    """What fits where stderr goes to."""
    if quiet:
        from surgery.training.work import Silent

        return Silent()
    if sys.stderr.isatty():
        return Steps(Bar(count_columns))
    return Steps(Lines(lambda done, total: f"step {done} of {total}", last=True))


class Steps:
    """Tells a bar, or lines, about steps and their figures."""

    def __init__(self, shown: Bar | Lines) -> None:
        self._shown = shown
        self._done = 0

    def start(self, steps: int, done: int) -> None:
        if done:
            click.echo(f"training: goes on after step {done} of {steps}", err=True)
        self._done = done
        self._shown.start(steps, "training", done)

    def step(self, line: dict[str, Any]) -> None:
        figures = f"loss {line['loss']:.4f}, {line['tokens_per_second']:,.0f} tokens/s"
        self._shown.advance(line["step"] - self._done, figures)
        self._done = line["step"]

    def note(self, text: str) -> None:
        click.echo(text, err=True)

    def stop(self) -> None:
        self._shown.stop()
