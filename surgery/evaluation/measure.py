"""Forward passes over examples, and what comes of each example.

B: rows of a batch     n: tokens of a row     V: vocabulary     K: classes
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.errors import InputError, NonFiniteError
from surgery.evaluation.subject import EvalSubject, place_of
from surgery.training.batches import Batch
from surgery.training.methods import Prepared
from surgery.training.routers import Routers
from surgery.training.tasks import Task, model_inputs
from surgery.training.text import UNSAID

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from surgery.evaluation.mixed import MixedAdapters
    from surgery.execute import Progress


@dataclass(frozen=True)
class Job:
    """One item under one adapter; under the base where `adapter` is None."""

    item: int
    adapter: str | None = None


@dataclass
class Outcomes:
    """What came of some jobs, in their order.

    Attributes:
        losses: float64 [N], sums over each job's predictions.
        counts, right: int64 [N], predictions, and those that are right.
        nbytes: int64 [N], of the text that the predictions stand for.
        predicted, labels: float64 [N], of a classification: class or number.
        routers: figures of the routers by adapter; empty for a dense model.
    """

    losses: NDArray[np.float64]
    counts: NDArray[np.int64]
    right: NDArray[np.int64]
    nbytes: NDArray[np.int64]
    predicted: NDArray[np.float64]
    labels: NDArray[np.float64]
    routers: dict[str | None, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def empty(cls, number: int) -> Outcomes:
        """For so many jobs that have not been run."""
        counts, right, nbytes = (np.zeros(number, np.int64) for _ in range(3))
        return cls(np.zeros(number), counts, right, nbytes, np.zeros(number), np.zeros(number))

    @classmethod
    def joined(cls, parts: Sequence[Outcomes]) -> Outcomes:
        """Several after one another, without the routers' figures."""
        made = cls.empty(0)
        for name in _ARRAYS:
            setattr(made, name, np.concatenate([getattr(part, name) for part in parts]))
        return made

    def part(self, begin: int, end: int) -> Outcomes:
        """Those of some jobs that stand together; the routers' figures are kept by adapter."""
        return replace(self, **{name: getattr(self, name)[begin:end] for name in _ARRAYS})


_ARRAYS = ("losses", "counts", "right", "nbytes", "predicted", "labels")


def measure(
    model: Any,
    subject: EvalSubject,
    jobs: Sequence[Job],
    progress: Progress,
    mixed: MixedAdapters | None = None,
    watch_routers: bool = True,
) -> Outcomes:
    """Run every job once, rows of one adapter together and of like length together.

    Args:
        model: on its device, in its precision; with `mixed` the model that carries its adapters.
        subject: the data, and what makes batches of them.
        jobs: items, each with the adapter it is for.
        progress: told about each job.
        mixed: the adapters that jobs name; without it jobs name none.
        watch_routers: whether to keep figures of a mixture's routers.

    Raises:
        NonFiniteError: a loss that is no number.
    """
    import torch

    found, size = Outcomes.empty(len(jobs)), subject.options.batch_size
    device = next(model.parameters()).device
    routers = _Watch(model) if watch_routers else None
    # An infix stands where the labels begin.
    ready = Prepared(model, "", "checkpoint", [], 0, needs_labels=hasattr(model, "infix"))
    order = in_order([(job.adapter, subject.examples.size([job.item])) for job in jobs], mixed)
    with torch.inference_mode():
        for first in range(0, len(order), size):
            chosen = order[first : first + size]
            names = [jobs[index].adapter for index in chosen]
            items = [jobs[index].item for index in chosen]
            batch = subject.batch(subject.examples, items)
            _check_tokens(model, subject, batch, items)
            placed = {name: tensor.to(device) for name, tensor in batch.items()}
            inputs = model_inputs(ready, subject.task, placed)
            if "pixel_values" in inputs:
                inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
            with mixed.rows(names) if mixed is not None else contextlib.nullcontext():
                outputs = model(**inputs, **(routers.call if routers else {}))
            if routers is not None:
                routers.observe(outputs, placed, names)
            _put(found, np.array(chosen), subject, outputs.logits, batch)
            if not np.isfinite(found.losses[chosen]).all():
                bad = [items[i] for i, index in enumerate(chosen) if not np.isfinite(found.losses[index])]
                raise NonFiniteError(
                    f"{names[0] or subject.checkpoint.label} gives a loss that is no number on "
                    f"{place_of(subject, bad)}; look at its weights with `surgery lint`, or try --precision fp32."
                )
            progress.advance(len(chosen))
    if routers is not None:
        found.routers = routers.figures()
    return found


def in_order(rows: Sequence[tuple[str | None, int]], mixed: MixedAdapters | None) -> list[int]:
    """The order to go through rows of (adapter, length): one adapter after another, with the least padding.

    Lengths fall within one adapter and rise within the next, so that batches which two share have like rows.
    """
    slots: dict[str | None, int] = {None: -1}
    slots |= {name: slot for slot, name in enumerate(mixed.names if mixed is not None else ())}
    turned = [(slots[name], length if slots[name] % 2 == 0 else -length) for name, length in rows]
    return sorted(range(len(rows)), key=lambda index: turned[index])


def token_losses(task: Task, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of a language model's predictions by row.

    Args:
        task: says whether labels are foretold from the tokens before them.
        logits: [B, m, V], of which the last n positions count.
        labels: int64 [B, n], `UNSAID` where nothing is foretold.

    Returns:
        Sums in nats, numbers of predictions, and how many are right: float64, int64 and int64 [B].
    """
    from torch.nn import functional

    logits = logits[:, -labels.shape[1] :]
    if task.name == "causal-lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    said = labels != UNSAID
    chosen, wanted = logits[said].float(), labels[said]  # [P, V], [P]
    each = logits.new_zeros(labels.shape, dtype=chosen.dtype)
    each[said] = functional.cross_entropy(chosen, wanted, reduction="none")
    hits = said.new_zeros(labels.shape)
    hits[said] = chosen.argmax(-1) == wanted
    return each.double().sum(1), said.sum(1), hits.sum(1)


def _put(found: Outcomes, places: NDArray[np.int64], subject: EvalSubject, logits: Tensor, batch: Batch) -> None:
    """Write what came of a batch to its places."""
    from torch.nn import functional

    labels, task = batch["labels"], subject.task
    if not task.classifies:
        parts = token_losses(task, logits, labels.to(logits.device))
        found.losses[places], found.counts[places], found.right[places] = (part.cpu().numpy() for part in parts)
        if subject.widths is not None:
            said = (labels[:, 1:] if task.name == "causal-lm" else labels).numpy()
            # Tokens that the tokenizer does not know are padding of the vocabulary, and stand for nothing.
            known = (said >= 0) & (said < len(subject.widths))
            found.nbytes[places] = np.where(known, subject.widths[np.where(known, said, 0)], 0).sum(1)
        return
    logits = logits.float().cpu()
    found.counts[places], found.labels[places] = 1, labels.double().numpy()
    if labels.dtype.is_floating_point:
        predicted = logits.squeeze(-1).double()
        found.predicted[places] = predicted.numpy()
        found.losses[places] = (predicted - labels.double()).square().numpy()
    else:
        predicted = logits.argmax(-1)
        found.predicted[places] = predicted.numpy()
        found.right[places] = (predicted == labels).numpy()
        found.losses[places] = functional.cross_entropy(logits, labels, reduction="none").double().numpy()


def _check_tokens(model: Any, subject: EvalSubject, batch: Batch, items: Sequence[int]) -> None:
    """Raise for tokens that the model has no embedding for, which would end in an index error."""
    ids = batch.get("input_ids")
    if ids is None:
        return
    rows = model.get_input_embeddings().weight.shape[0]
    if int(ids.max()) >= rows:
        bad = items[int((ids >= rows).any(dim=1).int().argmax())]
        raise InputError(
            f"{place_of(subject, [bad])} has token {int(ids.max())}, and {subject.checkpoint.label} has {rows}; is the "
            "tokenizer that of another model?"
        )


class _Watch:
    """Figures of the routers, by adapter; nothing for a dense model."""

    def __init__(self, model: Any) -> None:
        whole = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._model = whole
        self._seen: dict[str | None, Routers] = {}
        self._first = Routers.of(whole, 0.0, 0.0)

    @property
    def call(self) -> dict[str, bool]:
        """What the model is to be called with so that it tells."""
        return self._first.call if self._first is not None else {}

    def observe(self, outputs: Any, batch: Batch, names: Sequence[str | None]) -> None:
        if self._first is None:
            return
        from surgery.moe import Routing

        routings = self._first.routings(outputs, batch.get("attention_mask"))
        for layer, routing in routings.items():
            if layer.startswith("decoder.") and routing.real is None:  # it reads the labels, one place later
                routings[layer] = replace(routing, real=batch["labels"] != UNSAID)
        for name in dict.fromkeys(names):
            rows = [index for index, other in enumerate(names) if other == name]
            own = {
                layer: Routing(r.logits[rows], r.taken[rows], None if r.real is None else r.real[rows])
                for layer, r in routings.items()
                if r.logits.shape[0] == len(names)  # where tokens of all rows lie flat nobody can tell whose they are
            }
            if name not in self._seen:
                self._seen[name] = Routers(self._model, 0.0, 0.0)
            self._seen[name].observe(own)

    def figures(self) -> dict[str | None, dict[str, Any]]:
        return {name: routers.figures() for name, routers in self._seen.items()}
