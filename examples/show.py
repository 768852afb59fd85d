"""What the examples show on the console: headings, the commands they run, and how far a long piece of work has come."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from surgery.cli.main import run

# Without a terminal there is no width to fit, and a line now and then takes the place of a bar.
_IS_TERMINAL = sys.stdout.isatty()
_SECONDS_BETWEEN_LINES = 5.0

console = Console(highlight=False, width=None if _IS_TERMINAL else 120)


def heading(text: str) -> None:
    """Begin a part of the example."""
    console.print(f"\n[bold]{text}[/bold]")


def command(line: str) -> None:
    """Run one `surgery` command as a shell would, and show it. The function called is the one that `surgery` calls."""
    console.print(f"\n[bold green]$[/bold green] [green]surgery {line}[/green]")
    status = run(shlex.split(line))
    if status:
        raise SystemExit(status)


@contextmanager
def steps(label: str, count: int) -> Iterator[Callable[[str], None]]:
    """Show `count` steps of work going by. What is yielded is to be called after each, with a word on how it went."""
    show = _bar if _IS_TERMINAL else _lines
    begun = time.monotonic()
    with show(label, count) as step:
        yield step
    console.print(f"{label}: {count} steps in {time.monotonic() - begun:.0f} s")


@contextmanager
def _bar(label: str, count: int) -> Iterator[Callable[[str], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[word]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, expand=True, transient=True) as progress:
        task = progress.add_task(label, total=count, word="")
        yield lambda word: progress.update(task, advance=1, word=word)


@contextmanager
def _lines(label: str, count: int) -> Iterator[Callable[[str], None]]:
    begun = last = time.monotonic()
    done = 0

    def step(word: str) -> None:
        nonlocal last, done
        done += 1
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            left = (now - begun) / done * (count - done)
            print(f"{label}: {done} of {count}, {word}, {left:.0f} s left", flush=True)

    yield step
