"""The models of an evaluation, one to a line of its report, each with the rows that it is evaluated on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from surgery.checkpoint import Checkpoint
from surgery.errors import InputError, OptionError
from surgery.evaluation.options import ADAPTER_FIELD, EvalOptions
from surgery.evaluation.sources import AdapterSource, alone_by_model, check_modules, other_base, stored_names
from surgery.evaluation.subject import EvalSubject, brings_head, folder_name
from surgery.training.reading import Rows


@dataclass(frozen=True)
class Line:
    """One row of the report, to be filled.

    Attributes:
        name: what the report calls it.
        kind: see `EvalLine`.
        subject: the checkpoint and the data as it reads them.
        items: of the data, that it is evaluated on.
        source: its adapter; None for a checkpoint.
        reason: why it has a pass of its own.
    """

    name: str
    kind: str
    subject: EvalSubject
    items: Sequence[int]
    source: AdapterSource | None = None
    reason: str | None = None

    @property
    def adapter(self) -> str | None:
        """What `MixedAdapters` calls it."""
        return None if self.source is None else self.name


def find_lines(
    subject: EvalSubject, rows: Rows, column: str | None, sources: Sequence[AdapterSource]
) -> Iterator[Line]:
    """The base and each adapter, on every item, or on those that name them."""
    own = folder_name(subject.checkpoint)
    if own in {source.name for source in sources}:
        own = subject.checkpoint.label if subject.checkpoint.label not in {s.name for s in sources} else "base"
    every = range(len(subject.examples))
    if column is None:
        yield Line(own, "base", subject, every)
        for source in sources:
            yield Line(source.name, "adapter", subject, every, source)
        return
    known = {word: source.name for source in sources for word in (source.label, source.name)}
    items: dict[str | None, list[int]] = {}
    values = rows.dataset[column]
    for item in every:
        value = values[subject.row_of(item)]
        if value not in (None, "", "base", own) and value not in known:
            raise InputError(
                f"{rows.place(subject.row_of(item))}: {column!r} is {value!r}, which is none of the adapters "
                f"{', '.join(source.name for source in sources)}."
            )
        items.setdefault(known.get(value), []).append(item)
    if None in items:
        yield Line(own, "base", subject, items[None])
    for source in sources:
        if source.name in items:
            yield Line(source.name, "adapter", subject, items[source.name], source)


def sort_out(lines: Sequence[Line], model: Any, subject: EvalSubject) -> tuple[list[Line], list[str]]:
    """The lines that can be run, with the reasons of those that need a pass of their own; and sentences about them."""
    kept, notes = [], []
    for line in lines:
        source = line.source
        if source is None:
            if subject.has_head:
                kept.append(line)
            else:
                notes.append(f"{line.name} has no head for classes and is left out; the adapters bring theirs.")
            continue
        reason = source.reason
        if source.adapter is not None:
            if reason is not None and not source.adapter.target_parameters:
                # PEFT would leave out what it finds no module for; where experts lie is another matter.
                plain = [lora for lora in source.adapter.loras if not lora.depth and ".experts." not in lora.module]
                check_modules(source.adapter, plain, model)
            reason = reason or alone_by_model(source.adapter, model)
        notes += other_base(subject.checkpoint, source)
        if not subject.has_head and not brings_head(stored_names(source), model):
            raise InputError(f"Neither {subject.checkpoint.label} nor {source.label} has a head for classes.")
        kept.append(replace(line, reason=reason))
        if reason is not None:
            notes.append(f"{line.name} {reason}, so it has a pass of its own.")
    return kept, notes


def other_line(
    checkpoint: Checkpoint, subject: EvalSubject, rows: Rows, options: EvalOptions, lines: Sequence[Line]
) -> Line:
    """The line of another checkpoint, with its own tokenizer."""
    found = EvalSubject.of(checkpoint, rows, options, adapters=False)
    if found.task != subject.task:
        raise InputError(
            f"{checkpoint.label} does {found.task.name}, and {subject.checkpoint.label} {subject.task.name}."
        )
    name = folder_name(checkpoint)
    if name in {line.name for line in lines}:
        name = checkpoint.label if checkpoint.label not in {line.name for line in lines} else f"{name} (against)"
    return Line(name, "checkpoint", found, range(len(found.examples)))


def find_adapter_field(rows: Rows, options: EvalOptions, adapters: bool) -> str | None:
    """The column that names each row's adapter, if there is one."""
    columns = rows.dataset.column_names
    if not options.adapter_field:
        if options.adapter_field is not None:
            return None
        return ADAPTER_FIELD if adapters and ADAPTER_FIELD in columns else None
    if not adapters:
        raise OptionError("--adapter-field names a column of adapters; name them with --adapters.")
    if options.adapter_field not in columns:
        raise InputError(
            f"{rows.label} has no column {options.adapter_field!r}; it has {', '.join(map(repr, sorted(columns)))}."
        )
    return options.adapter_field
