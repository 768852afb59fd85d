"""`eval CHECKPOINT --data F`: everything around the passes.

Lines of the report that can share forward passes do; each of the others is a pass over a model loaded for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.checkpoint import Checkpoint
from surgery.errors import OptionError
from surgery.evaluation.figures import Found, answers_file, line_of, total_of
from surgery.evaluation.files import check_files, write_files
from surgery.evaluation.generate import Prompt, answer, find_prompts
from surgery.evaluation.lines import Line, find_adapter_field, find_lines, other_line, sort_out
from surgery.evaluation.measure import Job, Outcomes, measure
from surgery.evaluation.mixed import MixedAdapters
from surgery.evaluation.options import EvalOptions, EvalSettings
from surgery.evaluation.pairs import make_pairs
from surgery.evaluation.report import EvalReport
from surgery.evaluation.sources import AdapterSource, unique_names
from surgery.evaluation.subject import EvalSubject, folder_name
from surgery.execute import resolve_device
from surgery.training.examples import Examples
from surgery.training.machine import quiet_transformers
from surgery.training.methods import load_method
from surgery.training.methods.lora import known_warnings
from surgery.training.reading import read_rows
from surgery.training.run import describe_data

if TYPE_CHECKING:
    import torch


def evaluate(
    checkpoint: Checkpoint,
    options: EvalOptions,
    adapters: Sequence[AdapterSource],
    against: Sequence[Checkpoint | AdapterSource],
    settings: EvalSettings,
) -> EvalReport:
    """Evaluate `checkpoint`, adapters on it, and others. Writes the files that `settings` names, all or none."""
    files = settings.files()
    check_files(files, settings.overwrite, {"data": Path(options.data)})
    _check_pairs(adapters, against, settings)
    device = resolve_device(settings.device)
    precision, dtype = _precision(options.precision, device)
    sources = unique_names([*adapters, *(one for one in against if isinstance(one, AdapterSource))])
    with quiet_transformers():
        rows = read_rows(options.data)
        subject = EvalSubject.of(checkpoint, rows, options, bool(sources))
        column = find_adapter_field(rows, options, bool(sources))
        if column is not None and against:
            raise OptionError(f"--against has no place where {column!r} names the adapter of each row; leave it out.")
        lines = list(find_lines(subject, rows, column, sources))
        others: list[Line] = []
        for one in against:
            if isinstance(one, Checkpoint):
                others.append(other_line(one, subject, rows, options, [*lines, *others]))
        work = Work(settings, device, dtype)
        found, notes = work.run(subject, lines, others)
    shown = found if column is None else [*found, total_of(found)]
    report = EvalReport(
        checkpoint=folder_name(checkpoint),
        task=subject.task.name,
        device=device,
        precision=precision,
        data=describe_data(subject.examples, options.data),
        adapter_field=column,
        lines=tuple(line_of(one) for one in shown),
        files={name: str(path) for name, path in files.items()},
        dry_run=settings.dry_run,
        notes=(*_data_notes(subject.examples, options), *notes),
    )
    if not settings.dry_run:
        write_files(_contents(report, found, options, settings, bool(adapters)))
    return report


@dataclass(frozen=True)
class Work:
    """Goes through the passes, on one device in one precision."""

    settings: EvalSettings
    device: str
    dtype: torch.dtype

    def run(self, subject: EvalSubject, lines: Sequence[Line], others: Sequence[Line]) -> tuple[list[Found], list[str]]:
        """Every line in order, those of other checkpoints last, and sentences about what to know."""
        prompts = self._prompts(lines, others)
        model = subject.load(self.device, self.dtype)
        kept, notes = sort_out(lines, model, subject)
        shared = [line for line in kept if line.reason is None]
        every = [*kept, *others]
        if self.settings.dry_run:
            alike = len(shared) > 1
            return [
                Found(line, alike and line.kind != "checkpoint" and line.reason is None, Outcomes.empty(0))
                for line in every
            ], notes
        found: dict[str, Found] = {}
        progress = self.settings.progress
        progress.start(sum(len(line.items) + len(prompts[line.name]) for line in every), "evaluating")
        try:
            if shared:
                found |= {one.line.name: one for one in self._together(model, subject, shared, prompts)}
            del model  # before another is loaded
            for line in kept:
                if line.reason is None:
                    continue
                assert line.source is not None
                assert line.source.path is not None
                wrapped = load_method(subject.load(self.device, self.dtype), line.source.path).to(self.device).eval()
                # Virtual tokens, which routers see and masks do not, are of methods without factors.
                watch = line.source.adapter is not None
                found[line.name] = self._alone(wrapped, line, prompts[line.name], watch)
            for other in others:
                found[other.name] = self._alone(other.subject.load(self.device, self.dtype), other, prompts[other.name])
        finally:
            progress.stop()
        return [found[line.name] for line in every], notes

    def _together(
        self, model: Any, subject: EvalSubject, lines: Sequence[Line], prompts: Mapping[str, Sequence[Prompt]]
    ) -> Iterator[Found]:
        """All lines in passes that they share."""
        opened = [line.source.adapter for line in lines if line.source is not None and line.source.adapter is not None]
        names = [line.name for line in lines if line.source is not None]
        jobs = [Job(item, line.adapter) for line in lines for item in line.items]
        questions = [(prompt, line.adapter) for line in lines for prompt in prompts[line.name]]
        with MixedAdapters(model, opened, names) as mixed:
            outcomes = measure(model, subject, jobs, self.settings.progress, mixed)
            answers = answer(model, subject, questions, self.settings.progress, mixed) if questions else []
        first = asked = 0
        for line in lines:
            own = slice(asked, asked := asked + len(prompts[line.name]))
            part = outcomes.part(first, first := first + len(line.items))
            yield Found(line, len(lines) > 1, part, prompts[line.name], answers[own])

    def _alone(self, model: Any, line: Line, prompts: Sequence[Prompt], watch: bool = True) -> Found:
        """One line in a pass of its own."""
        jobs = [Job(item) for item in line.items]
        outcomes = measure(model, line.subject, jobs, self.settings.progress, None, watch)
        if line.adapter is not None and None in outcomes.routers:
            outcomes.routers[line.adapter] = outcomes.routers.pop(None)
        questions = [(prompt, None) for prompt in prompts]
        with known_warnings():  # with virtual tokens PEFT leaves positions to the model, and says so
            answers = answer(model, line.subject, questions, self.settings.progress) if questions else []
        return Found(line, False, outcomes, prompts, answers)

    def _prompts(self, lines: Sequence[Line], others: Sequence[Line]) -> dict[str, list[Prompt]]:
        """For each line the prompts of its rows; none where no answers are asked for."""
        if not self.settings.answers:
            return {line.name: [] for line in (*lines, *others)}
        found = {}
        asked = find_prompts(lines[0].subject)
        for line in lines:
            rows = {line.subject.row_of(item) for item in line.items}
            found[line.name] = [prompt for prompt in asked if prompt.row in rows]
        for other in others:
            found[other.name] = find_prompts(other.subject)
        return found


def _check_pairs(
    adapters: Sequence[AdapterSource], against: Sequence[Checkpoint | AdapterSource], settings: EvalSettings
) -> None:
    """Raise where pairs are asked for and two models are not named."""
    if settings.pairwise is not None and (len(against) != 1 or len(adapters) > 1):
        raise OptionError(
            "--pairwise compares two models' answers: those of CHECKPOINT, or of the one adapter of --adapters, with "
            "those of what --against names."
        )
    if settings.key is not None and settings.pairwise is None:
        raise OptionError("--key says where the key of --pairwise goes; give --pairwise.")


def _contents(
    report: EvalReport, found: Sequence[Found], options: EvalOptions, settings: EvalSettings, adapter: bool
) -> dict[Path, bytes]:
    """The bytes of each file."""
    made: dict[Path, bytes] = {}
    if settings.output is not None:
        made[settings.output] = (json.dumps(report.as_dict(), indent=2, allow_nan=False) + "\n").encode()
    if settings.generate is not None:
        made[settings.generate] = answers_file(found)
    if settings.pairwise is not None and (key := settings.key_file) is not None:
        # Lines are the base, the adapter if there is one, and what --against names.
        one, two = found[1 if adapter else 0], found[-1]
        answers = [{prompt.row: text for prompt, text in zip(f.prompts, f.answers, strict=True)} for f in (one, two)]
        prompts = [prompt for prompt in one.prompts if prompt.row in answers[1]]
        made[settings.pairwise], made[key] = make_pairs(
            [prompt.text for prompt in prompts],
            [answers[0][prompt.row] for prompt in prompts],
            [answers[1][prompt.row] for prompt in prompts],
            (one.line.name, two.line.name),
            options.seed,
        )
    return made


def _precision(asked: str, device: str) -> tuple[str, torch.dtype]:
    import torch

    if asked == "auto":
        asked = "bf16" if device != "cpu" and torch.cuda.is_bf16_supported() else "fp32"
    return asked, {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[asked]


def _data_notes(examples: Examples, options: EvalOptions) -> Iterator[str]:
    if examples.longer:
        what = {"truncate": "cut", "skip": "left out", "split": "split"}[options.over_length]
        yield f"{examples.longer} examples were too long and have been {what}."
    if examples.skipped and options.over_length != "skip":
        yield f"{examples.skipped} examples have nothing to foretell and take no part."
