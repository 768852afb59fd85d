"""Options that change nothing in a run: a person who gave one should hear of it."""

from __future__ import annotations

from collections.abc import Iterator

from surgery.training.options import TrainOptions, option
from surgery.training.routers import has_routers
from surgery.training.subject import Subject

_OF_TEXT = ("tokenizer", "chat_template", "end_token", "max_length")
_OF_ROUTERS = ("router_aux_loss", "router_z_loss")


def without_effect(subject: Subject, options: TrainOptions) -> Iterator[str]:
    """A sentence for each option that was given, by hand or by a recipe, and has nothing to act on."""
    task, kind = subject.task, subject.examples.rows.kind
    if options.new_head and not task.classifies:
        yield f"--new-head has no effect: it is for classification, and the task is {task.name}."
    if not has_routers(subject.prepared.model):
        for name in _given(options, _OF_ROUTERS):
            yield f"{option(name)} has no effect: {subject.checkpoint.label} has no routers."
    if kind == "image":
        for name in _given(options, _OF_TEXT):
            yield f"{option(name)} has no effect on pictures."
    if kind == "tokens" and options.end_token is not None:
        yield "--end-token has no effect: the data are tokens already."


def _given(options: TrainOptions, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if getattr(options, name) not in (None, False, 0.0)]
