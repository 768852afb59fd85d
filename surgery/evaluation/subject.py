"""A checkpoint and the data, ready for each other; whatever can be refused is refused before the first forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.checkpoint import Checkpoint
from surgery.errors import InputError, OptionError
from surgery.evaluation.options import EvalOptions
from surgery.evaluation.vocabulary import bytes_of_tokens
from surgery.training.batches import Batch
from surgery.training.examples import Examples
from surgery.training.methods import anatomy
from surgery.training.reading import Rows
from surgery.training.subject import batches_of, examples_of, has_tokenizer, read_config
from surgery.training.tasks import Labels, Task, find_labels, find_task, load_model, set_padding
from surgery.training.text import load_tokenizer

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray


@dataclass(frozen=True)
class EvalSubject:
    """A checkpoint and examples made for it.

    Attributes:
        checkpoint: a folder on disk.
        options: as given.
        config: of transformers.
        task: what the model does.
        labels: of a classification.
        has_head: whether the checkpoint itself can do the task; otherwise only adapters that bring a head can.
        tokenizer: None where none is needed.
        examples: of the data.
        batch: makes the tensors of some items.
        widths: bytes of each token; None where there is no tokenizer.
    """

    checkpoint: Checkpoint
    options: EvalOptions
    config: Any = field(repr=False)
    task: Task
    labels: Labels | None
    has_head: bool
    tokenizer: Any = field(repr=False)
    examples: Examples = field(repr=False)
    batch: Callable[[Examples, Sequence[int]], Batch] = field(repr=False)
    widths: NDArray[np.int64] | None = field(repr=False)

    @classmethod
    def of(cls, checkpoint: Checkpoint, rows: Rows, options: EvalOptions, adapters: bool) -> EvalSubject:
        """Make examples of rows for a checkpoint. `adapters` says whether some are to be laid on it.

        Raises:
            InputError: data and checkpoint that do not belong together.
        """
        folder = checkpoint.path
        if folder is None or not folder.is_dir():
            raise InputError(f"{checkpoint.label} is not a folder on disk; fetch it with `surgery pull` first.")
        training, config = options.as_training(), read_config(checkpoint)
        task = find_task(config, rows.kind, checkpoint.label, options.data, options.task)
        labels = _labels(rows, config, checkpoint.label) if task.classifies else None
        head = labels is None or _has_head(config)
        if not head and not adapters:
            raise InputError(
                f"{checkpoint.label} has no head for classes, so there is nothing to evaluate on {options.data}; train "
                "one, or name --adapters that bring one."
            )
        tokenizer = None
        if rows.kind != "image" and (rows.kind != "tokens" or has_tokenizer(folder, training)):
            tokenizer = load_tokenizer(folder, training)
        if labels is not None and tokenizer is not None:
            set_padding(config, tokenizer)
        if tokenizer is not None and options.end_token is not None:
            words = getattr(config.get_text_config(), "vocab_size", None)
            if words is not None and tokenizer.convert_tokens_to_ids(options.end_token) >= words:
                raise OptionError(f"--end-token is {options.end_token!r}, which {checkpoint.label} has not learnt.")
        examples = examples_of(rows, task, tokenizer, labels, config, training)
        batch = batches_of(task, tokenizer, folder, config, labels, training)
        widths = None if tokenizer is None or task.classifies else bytes_of_tokens(tokenizer)
        return cls(checkpoint, options, config, task, labels, head, tokenizer, examples, batch, widths)

    def load(self, device: str, dtype: torch.dtype) -> Any:
        """The model, ready to be run."""
        assert self.checkpoint.path is not None
        training = self.options.as_training()
        model = load_model(
            self.checkpoint.path, self.checkpoint.label, self.config, self.task, self.labels, training
        )  # a copy of what is on disk at each call: methods change a model in place
        return model.to(device=device, dtype=dtype).eval().requires_grad_(False)

    def row_of(self, item: int) -> int:
        """Where in the data an item comes from, from 0."""
        return int(self.examples.pieces[self.examples.items[item][0], 0])


def brings_head(names: Sequence[str], model: Any) -> bool:
    """Whether tensors that an adapter stores whole are those of the model's head."""
    heads = tuple(anatomy.head_modules(model))
    return any(name.split(".")[0] in heads for name in names)


def _labels(rows: Rows, config: Any, label: str) -> Labels:
    """The labels of data, as the head of a checkpoint has them."""
    found = find_labels(rows, config)
    if not _has_head(config):
        return found
    if config.num_labels == 1 and getattr(config, "problem_type", None) in (None, "regression"):
        return Labels(())  # a head for numbers, which may happen to be whole in these data
    number = 1 if found.continuous else len(found.names)
    if number != config.num_labels:
        what = "numbers with a fraction" if found.continuous else f"{number} labels"
        raise InputError(f"{label} has a head for {config.num_labels} labels, and {rows.label} has {what}.")
    return found


def _has_head(config: Any) -> bool:
    return any("Classification" in name for name in getattr(config, "architectures", None) or [])


def place_of(subject: EvalSubject, items: Sequence[int]) -> str:
    """Where some items lie, the first of them by name."""
    places = subject.examples.places(items)
    more = f" and {len(places) - 1} more" if len(places) > 1 else ""
    return f"{places[0]}{more}"


def folder_name(checkpoint: Checkpoint) -> str:
    """What to call a checkpoint in a report: its folder's name, without what leads there."""
    return checkpoint.provenance["source"].rpartition("/")[2]
