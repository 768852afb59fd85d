"""The loss on held-out examples."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from surgery.training.batches import Batch, share
from surgery.training.examples import Examples
from surgery.training.tasks import Task, model_inputs
from surgery.training.text import UNSAID
from surgery.training.work import Line, Work

if TYPE_CHECKING:
    import torch


def evaluate(model: Any, work: Work, examples: Examples, accelerator: Any) -> Line:
    """The loss on held-out examples, and how many of the predictions are right. Draws no random numbers."""
    import torch

    size, processes = work.options.batch_size, accelerator.num_processes
    sums = torch.zeros(3, dtype=torch.float64)
    model.eval()
    with torch.no_grad():
        for first in range(0, len(examples), size * processes):
            rows = list(range(first, min(first + size * processes, len(examples))))
            mine = share(rows, accelerator.process_index, processes)
            batch = work.batch(examples, mine or rows[:1])
            batch = {k: v.to(accelerator.device) for k, v in (batch if mine else silenced(batch)).items()}
            logits = model(**model_inputs(work.prepared, work.task, batch)).logits
            labels = batch["labels"]
            right = 0 if labels.dtype.is_floating_point else int(work.task.right(logits, labels))
            sums += torch.tensor([float(work.task.loss(logits, labels)), right, predictions_of(labels, work.task)])
    model.train()
    loss, right, predictions = accelerator.reduce(sums.to(accelerator.device), reduction="sum").tolist()
    found: Line = {"eval_loss": loss / predictions, "eval_predictions": int(predictions)}
    if work.task.classifies and not labels.dtype.is_floating_point:
        found["eval_accuracy"] = right / predictions
    elif not work.task.classifies:
        found |= {"eval_token_accuracy": right / predictions, "eval_perplexity": math.exp(min(loss / predictions, 700))}
    return found


def predictions_of(labels: torch.Tensor, task: Task) -> int:
    """How many predictions of a batch the loss is about."""
    if labels.dtype.is_floating_point:
        return int((~labels.isnan()).sum())
    return int(((labels[:, 1:] if task.name == "causal-lm" else labels) >= 0).sum())


def silenced(batch: Batch) -> Batch:
    """A batch with nothing to learn."""
    import torch

    labels = batch["labels"]
    none = torch.full_like(labels, float("nan")) if labels.dtype.is_floating_point else torch.full_like(labels, UNSAID)
    return {**batch, "labels": none}
