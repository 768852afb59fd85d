"""Figures from what a model made of each example. Pure functions; scikit-learn and scipy do the statistics."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.errors import MissingExtraError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Integers = NDArray[np.int64]

# exp of more overflows.
_MOST = 700.0


def of_tokens(losses: Floats, counts: Integers, right: Integers, nbytes: int | None) -> dict[str, Any]:
    """The figures of a language model.

    Args:
        losses: [N], sum of the cross-entropy over each example's predictions, in nats.
        counts: [N], predictions of each.
        right: [N], predictions that are right.
        nbytes: of the text that the predictions stand for; None where that cannot be told.
    """
    total, predictions = math.fsum(losses), int(counts.sum())
    found = {
        "predictions": predictions,
        "nbytes": nbytes,
        "loss": total / predictions,
        "perplexity": math.exp(min(total / predictions, _MOST)),
        "accuracy": int(right.sum()) / predictions,
    }
    if nbytes:
        found["bits_per_byte"] = total / math.log(2) / nbytes
    return found


def of_classes(losses: Floats, predicted: Integers, labels: Integers, classes: int) -> dict[str, Any]:
    """The figures of a classifier: accuracy, F1, and Matthews' coefficient.

    Args:
        losses: [N], cross-entropy in nats.
        predicted: [N], classes from 0.
        labels: [N], likewise.
        classes: how many there are.
    """
    metrics = _package("sklearn.metrics", "scikit-learn")
    found = {
        "predictions": len(labels),
        "loss": math.fsum(losses) / len(labels),
        "accuracy": float(metrics.accuracy_score(labels, predicted)),
        "f1_macro": float(metrics.f1_score(labels, predicted, average="macro", zero_division=0.0)),
    }
    if len({*labels.tolist()}) > 1:
        # Undefined where all labels are alike; scikit-learn says 0.
        found["matthews"] = float(metrics.matthews_corrcoef(labels, predicted))
    if classes == 2:
        found["f1"] = float(metrics.f1_score(labels, predicted, pos_label=1, zero_division=0.0))
    return found


def of_numbers(losses: Floats, predicted: Floats, labels: Floats) -> dict[str, Any]:
    """The figures of a regression: mean squared error and correlations; these need two values that differ.

    Args:
        losses: [N], squared errors.
        predicted: [N].
        labels: [N].
    """
    stats = _package("scipy.stats", "scipy")
    found = {"predictions": len(labels), "loss": math.fsum(losses) / len(labels)}
    if len(labels) > 1 and np.ptp(labels) > 0 and np.ptp(predicted) > 0:
        found["pearson"] = float(stats.pearsonr(predicted, labels).statistic)
        found["spearman"] = float(stats.spearmanr(predicted, labels).statistic)
    return found


def of_answers(answers: list[str], references: list[str]) -> dict[str, Any]:
    """How near answers come to references: exact match, BLEU (sacrebleu) and ROUGE (rouge-score, no stemming).

    An empty answer counts as one that shares nothing.
    """
    bleu = _package("sacrebleu", "sacrebleu")
    scorer = _package("rouge_score.rouge_scorer", "rouge-score").RougeScorer(["rouge1", "rouge2", "rougeL"])
    pairs = list(zip(references, answers, strict=True))
    rouge = [scorer.score(reference, answer) for reference, answer in pairs]
    return {
        "answers": len(answers),
        "exact_match": sum(one.strip() == other.strip() for one, other in pairs) / len(pairs),
        "bleu": float(bleu.corpus_bleu(answers, [references]).score),
        **{
            name: math.fsum(score[kind].fmeasure for score in rouge) / len(rouge)
            for name, kind in (("rouge1", "rouge1"), ("rouge2", "rouge2"), ("rouge_l", "rougeL"))
        },
    }


def _package(module: str, package: str) -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtraError(package, "eval") from error
