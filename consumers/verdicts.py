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

SAME, WRONG, REFUSED, UNTRIED = "same", "silently wrong", "refused", "untried"
# What lint cannot see, and why. It reads headers and configs alone; `push` and `merge` read the numbers.
_UNLISTED = "lint has no list of a family's tensors"
BLIND = {
    "llama/nan": "lint reads no values",
    "llama/checkpoint-extra": _UNLISTED,
    "llama/checkpoint-missing": _UNLISTED,
    "llama/checkpoint-biases": _UNLISTED,
}
# Where an engine computes a family a little differently from transformers, whatever the checkpoint.
OWN = {("mlx", "gemma"): (2e-3, "its GELU is not transformers' tanh")}


# What only the build of an engine that runs here gets wrong, by reading its source.
BUILD = {("vllm", "ernie4_5_moe"): "its CPU build leaves out the router's bias"}


@dataclass(frozen=True)
class Outcome:
    """What came of one artefact in one engine.

    Attributes:
        artefact: its name.
        engine: the engine's name.
        what: `same`, `silently wrong`, `refused`, or `untried` where the engine cannot be run on this at all.
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
        if self.what == UNTRIED or self.artefact in BLIND:
            return True
        if self.setting:
            return bool(self.rules)
        return (self.what == SAME) == (self.lint not in (REFUSED, WRONG))

    @property
    def same_kind(self) -> bool:
        """Whether lint also told refusals from silent faults."""
        return self.what in (SAME, UNTRIED, self.lint)

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def reference(truth: Answer | None, peft: Answer | None, untouched: Answer | None, by_peft: bool) -> LogProbs | None:
    """What an artefact means, if anything: there is no right reading of a damaged one.

    Args:
        truth: of its weights, merged.
        peft: of PEFT, which decides on adapters that it wrote and that cannot be merged.
        untouched: of the base; PEFT's answer if it loaded nothing, which then has no say.
        by_peft: whether PEFT wrote it.
    """
    merged, unmerged = _numbers(truth), _numbers(peft)
    if unmerged is None:
        return merged
    if merged is None and by_peft:
        return unmerged
    if _near(unmerged, _numbers(untouched)):
        return merged
    if merged is None:
        return unmerged if truth is not None and truth.refusal.startswith("UnsupportedError") else None
    return merged if _near(unmerged, merged) else None


def _numbers(answer: Answer | None) -> LogProbs | None:
    return answer.logprobs if is_sound(answer) and answer is not None else None


def _near(left: LogProbs, right: LogProbs | None) -> bool:
    return right is not None and float(np.abs(left - right).max()) < 1e-3


def judge(
    artefact: Artefact, engine: Engine, answer: Answer, right: LogProbs | None, lint: Linted, setting: str = ""
) -> Outcome:
    """Compare an engine's answer with the reference and with lint."""
    difference, text = None, answer.refusal
    if answer.logprobs is None:
        what = UNTRIED if any(words in answer.refusal for words in engine.unfit) else REFUSED
    elif right is None:
        what, text = WRONG, "loads, though nobody can say what it means"
    elif not is_sound(answer):
        what, text = WRONG, "NaN"
    else:
        difference = float(np.abs(answer.logprobs - right).max())
        place = engine.name, artefact.family
        tolerance, text = OWN.get(place, (engine.tolerance, ""))
        what = SAME if difference <= tolerance else UNTRIED if place in BUILD else WRONG
        text = BUILD.get(place, text) if difference > engine.tolerance else ""
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
