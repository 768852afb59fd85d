"""What the loop is given: data, model and task, and whom to tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from surgery.training.batches import Batch, Schedule
from surgery.training.examples import Examples
from surgery.training.methods.prepared import Prepared
from surgery.training.options import TrainOptions
from surgery.training.tasks import Task

Line = dict[str, Any]


class TrainProgress(Protocol):
    """Told how many steps there are and how many are done, and then about each."""

    def start(self, steps: int, done: int) -> None: ...
    def step(self, line: Line) -> None: ...
    def note(self, text: str) -> None: ...
    def stop(self) -> None: ...


class Silent:
    """Says nothing."""

    def start(self, steps: int, done: int) -> None: ...
    def step(self, line: Line) -> None: ...
    def note(self, text: str) -> None: ...
    def stop(self) -> None: ...


@dataclass(frozen=True)
class Work:
    """What to train on what.

    Attributes:
        task: gives the loss.
        prepared: the model and what of it is trained.
        examples: to train on.
        held_out: to evaluate on; None for none.
        batch: makes the tensors of some items.
        steps: of the optimiser, in all.
        root: the folder of the state.
        options: as given.
        progress: told about each step.
    """

    task: Task
    prepared: Prepared
    examples: Examples
    held_out: Examples | None
    batch: Callable[[Examples, Sequence[int]], Batch]
    steps: int
    root: Path
    options: TrainOptions
    progress: TrainProgress = field(default_factory=Silent)


def schedule_of(examples: Examples, options: TrainOptions, processes: int) -> Schedule:
    """The order in which examples are gone through."""
    return Schedule(len(examples), options.batch_size * processes, options.gradient_accumulation, options.seed)
