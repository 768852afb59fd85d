"""What an engine did with an artefact, what `surgery lint` had said it would do, and whether the two agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import surgery
from consumers.engines import Engine
from consumers.jobs import Answer, LogProbs, is_sound
from consumers.workshop import Artefact
from surgery.errors import SurgeryError

SAME, WRONG, REFUSED = "same", "silently wrong", "refused"
# Faults that no header shows. Lint reads headers and configs alone; push and merge read the numbers.
BLIND = ("llama/nan",)


@dataclass(frozen=True)
class Outcome:
    """What came of one artefact in one engine.

    Attributes:
        artefact: its name.
        engine: the engine's name.
        what: `same`, `silently wrong` or `refused`.
        difference: largest difference of a log-probability from the reference, in nats; None if one of them has none.
        text: why it was refused, or what is odd.
        setting: what the engine had to be told, beyond its defaults.
        lint: lint's verdict for this consumer.
        rules: the rules that found something.
    """

    artefact: str
    engine: str
    what: str
    difference: float | None
    text: str
    setting: str
    lint: str
    rules: tuple[str, ...]

    @property
    def agreed(self) -> bool:
        """Whether lint let pass what works, and named what does not."""
        if self.artefact in BLIND:
            return True
        if self.setting:
            return bool(self.rules)
        return (self.what == SAME) == (self.lint not in (REFUSED, WRONG))

    @property
    def same_kind(self) -> bool:
        """Whether lint also told refusals from silent faults."""
        return self.what == SAME or self.what == self.lint

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def reference(truth: Answer | None, peft: Answer | None) -> LogProbs | None:
    """What an artefact means, if anything.

    That is what its merged weights say; PEFT decides on adapters that cannot be merged; no reading is right for one
    that is damaged.
    """
    if truth is not None and truth.logprobs is not None:
        return truth.logprobs if is_sound(truth) else None
    unmergeable = truth is not None and truth.refusal.startswith("UnsupportedError")
    return peft.logprobs if unmergeable and peft is not None and is_sound(peft) else None


def judge(
    artefact: Artefact, engine: Engine, answer: Answer, right: LogProbs | None, lint: Linted, setting: str = ""
) -> Outcome:
    """Compare an engine's answer with the reference and with lint."""
    difference, text = None, answer.refusal
    if answer.logprobs is None:
        what = REFUSED
    elif right is None:
        what, text = WRONG, "loads, though nobody can say what it means"
    elif not is_sound(answer):
        what, text = WRONG, "NaN"
    else:
        difference = float(np.abs(answer.logprobs - right).max())
        what = SAME if difference <= engine.tolerance else WRONG
    return Outcome(artefact.name, engine.name, what, difference, text, setting, *lint)


Linted = tuple[str, tuple[str, ...]]


def lint_all(path: Path, base: Path | None, consumers: Sequence[str]) -> dict[str, Linted]:
    """Lint's verdict and rules by consumer; what lint cannot read, it refuses for all of them."""
    try:
        report = surgery.lint(path, consumers=tuple(consumers), base=base)
    except SurgeryError as error:
        return dict.fromkeys(consumers, (REFUSED, (type(error).__name__,)))
    rules = {
        name: tuple(dict.fromkeys(one.rule for one in report.findings if one.consumer == name)) for name in consumers
    }
    return {name: (report.verdicts[name], rules[name]) for name in consumers}
