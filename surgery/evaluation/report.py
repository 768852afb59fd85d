"""What `eval` and `verdicts` report. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from surgery.training.report import DataReport


@dataclass(frozen=True)
class EvalLine:
    """The figures of one model: the base, the base with an adapter, or another checkpoint. None where one is undefined.

    Attributes:
        name: of the checkpoint or adapter.
        kind: `base`, `adapter`, `checkpoint` (what --against names) or `total` (all rows, each on its own adapter).
        together: whether it shared its forward passes with others.
        reason: why an adapter had a pass of its own.
        examples: that the figures are about.
        predictions: tokens or labels foretold.
        nbytes: of the text foretold.
        loss: mean of the predictions: cross-entropy in nats, or for numbers the squared error.
        perplexity: exp(loss), of tokens.
        bits_per_byte: loss in bits, by the bytes of the text foretold.
        accuracy: share of predictions whose likeliest outcome is right.
        matthews: Matthews' correlation coefficient.
        f1: of class 1, where there are two classes.
        f1_macro: mean of the classes' F1.
        pearson: correlation of numbers.
        spearman: of their ranks.
        answers: written by the model.
        exact_match: share of answers that are the reference, spaces at the ends aside.
        bleu: of the corpus, 0 to 100.
        rouge1, rouge2, rouge_l: mean F-measures, 0 to 1.
        load: by sparse layer, each expert's share of all choices.
        router_entropy: by sparse layer, in nats.
        uncovered: by sparse layer, the share of tokens that no expert took.
    """

    name: str
    kind: str
    together: bool
    reason: str | None = None
    examples: int = 0
    predictions: int = 0
    nbytes: int | None = None
    loss: float | None = None
    perplexity: float | None = None
    bits_per_byte: float | None = None
    accuracy: float | None = None
    matthews: float | None = None
    f1: float | None = None
    f1_macro: float | None = None
    pearson: float | None = None
    spearman: float | None = None
    answers: int | None = None
    exact_match: float | None = None
    bleu: float | None = None
    rouge1: float | None = None
    rouge2: float | None = None
    rouge_l: float | None = None
    load: Mapping[str, list[float]] | None = field(default=None, repr=False)
    router_entropy: Mapping[str, float] | None = field(default=None, repr=False)
    uncovered: Mapping[str, float] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class EvalReport:
    """What `eval` found.

    Attributes:
        checkpoint: what was evaluated, a name without its path.
        task: what it does.
        device: where it ran.
        precision: of weights and arithmetic.
        data: what it was evaluated on.
        adapter_field: the column that named each row's adapter; None where every row was for every adapter.
        lines: the figures of each model.
        files: written, by the option that asked for them.
        dry_run: whether nothing was evaluated.
        notes: sentences about what to know.
    """

    checkpoint: str
    task: str
    device: str
    precision: str
    data: DataReport
    adapter_field: str | None
    lines: tuple[EvalLine, ...]
    files: Mapping[str, str] = field(default_factory=dict)
    dry_run: bool = False
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class Tally:
    """A share with its interval of 95%, Wilson's.

    Attributes:
        count: how many.
        share: of all that were judged.
        low, high: ends of the interval.
    """

    count: int
    share: float
    low: float
    high: float


@dataclass(frozen=True)
class VerdictsReport:
    """What a judge made of pairs of answers.

    Attributes:
        model: whose wins are counted.
        against: the other.
        pairs: in the key.
        judged: of them, those with a verdict.
        win, tie, lose: for `model`.
        p_value: of the sign test, two-sided, ties left out: how likely a split at least as uneven is between equals;
            None where all are ties.
        notes: sentences about what to know.
    """

    model: str
    against: str
    pairs: int
    judged: int
    win: Tally
    tie: Tally
    lose: Tally
    p_value: float | None
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, object]:
        return asdict(self)
