"""From what came of the passes to the lines of the report and the files beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from surgery.evaluation import metrics
from surgery.evaluation.generate import Prompt
from surgery.evaluation.lines import Line
from surgery.evaluation.measure import Outcomes
from surgery.evaluation.report import EvalLine


@dataclass(frozen=True)
class Found:
    """What came of a line.

    Attributes:
        line: which.
        together: whether it shared its passes.
        outcomes: of its items.
        prompts: that it answered.
        answers: to each.
    """

    line: Line
    together: bool
    outcomes: Outcomes
    prompts: Sequence[Prompt] = ()
    answers: Sequence[str] = ()


def line_of(found: Found) -> EvalLine:
    """The figures of a line."""
    line, outcomes, subject = found.line, found.outcomes, found.line.subject
    made = EvalLine(line.name, line.kind, found.together, line.reason, len(line.items))
    if not len(outcomes.losses):
        return made
    if subject.labels is None:
        nbytes = int(outcomes.nbytes.sum()) if subject.widths is not None else None
        values = metrics.of_tokens(outcomes.losses, outcomes.counts, outcomes.right, nbytes)
    elif subject.labels.continuous:
        values = metrics.of_numbers(outcomes.losses, outcomes.predicted, outcomes.labels)
    else:
        predicted, labels = outcomes.predicted.astype(np.int64), outcomes.labels.astype(np.int64)
        values = metrics.of_classes(outcomes.losses, predicted, labels, len(subject.labels.names))
    if found.answers:
        values |= metrics.of_answers(list(found.answers), [prompt.reference for prompt in found.prompts])
    values |= {name: value for name, value in outcomes.routers.get(line.adapter, {}).items() if value}
    return replace(made, **values)


def total_of(found: Sequence[Found]) -> Found:
    """All lines as one: every row on the adapter of its own."""
    first = found[0].line
    items = [item for one in found for item in one.line.items]
    line = Line("all rows", "total", first.subject, items)
    outcomes = Outcomes.joined([one.outcomes for one in found])
    prompts = [prompt for one in found for prompt in one.prompts]
    return Found(
        line, all(one.together for one in found), outcomes, prompts, [text for one in found for text in one.answers]
    )


def answers_file(found: Sequence[Found]) -> bytes:
    """A line of JSON for each answer: the row it belongs to, the model, prompt, reference and answer."""
    lines = [
        json.dumps(
            {
                "row": prompt.row + 1,
                "model": one.line.name,
                "prompt": prompt.text,
                "reference": prompt.reference,
                "answer": text,
            },
            ensure_ascii=False,
        )
        for one in found
        for prompt, text in zip(one.prompts, one.answers, strict=True)
    ]
    return "".join(f"{line}\n" for line in lines).encode(errors="surrogatepass")
