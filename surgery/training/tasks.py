"""What a model is trained to do: told from checkpoint and data, with the class that loads it and the loss.

B: rows of a batch     n: tokens of a row     V: vocabulary     K: classes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import InputError, OptionError
from surgery.names import plain
from surgery.training.batches import Batch
from surgery.training.methods.prepared import Prepared
from surgery.training.options import TrainOptions
from surgery.training.reading import Rows
from surgery.training.text import UNSAID, transformers_package

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Task:
    """A kind of work.

    Attributes:
        name: as `--task` has it.
        auto: the auto class of transformers that loads a model for it.
        kinds: of rows that it can learn from, see `reading.KINDS`.
    """

    name: str
    auto: str
    kinds: tuple[str, ...]

    @property
    def classifies(self) -> bool:
        """Whether an example has one label."""
        return self.name.endswith("classification")

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The sum over all predictions of their loss: cross-entropy in nats, or for numbers the squared error.

        Args:
            logits: [B, n, V], or [B, K] for classification; with more than n positions the last n count.
            labels: int64 [B, n] with `UNSAID` where there is nothing to predict, int64 [B], or float32 [B].
        """
        from torch.nn import functional

        if labels.dtype.is_floating_point:
            given = ~labels.isnan()
            return functional.mse_loss(logits.squeeze(-1).float()[given], labels[given], reduction="sum")
        if not self.classifies:
            logits = logits[:, -labels.shape[1] :]
        if self.name == "causal-lm":
            # The logits after a token are about the next one.
            labels = functional.pad(labels[:, 1:], (0, 1), value=UNSAID)
        flat = logits.reshape(-1, logits.shape[-1]).float()
        return functional.cross_entropy(flat, labels.reshape(-1), ignore_index=UNSAID, reduction="sum")

    def right(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """How many of the predictions of `loss` are what the label says."""
        if not self.classifies:
            logits = logits[:, -labels.shape[1] :]
        if self.name == "causal-lm":
            logits, labels = logits[:, :-1], labels[:, 1:]
        return (logits.argmax(-1) == labels).sum()


_TEXT = ("text", "completion", "chat", "tokens")
TASKS = {
    task.name: task
    for task in (
        Task("causal-lm", "AutoModelForCausalLM", _TEXT),
        Task("seq2seq", "AutoModelForSeq2SeqLM", ("completion", "tokens")),
        Task("classification", "AutoModelForSequenceClassification", ("label",)),
        Task("image-classification", "AutoModelForImageClassification", ("image",)),
    )
}


def find_task(config: Any, kind: str, label: str, data: str, asked: str | None) -> Task:
    """The task for a model's config and data of a kind.

    Args:
        config: of the model, as transformers has it.
        kind: of the rows.
        label: what the user called the checkpoint.
        data: what the user called the data.
        asked: the task that was asked for, if any was.

    Raises:
        InputError: the checkpoint is for another task than the data.
    """
    if asked is not None:
        task = TASKS[asked]
    elif kind == "image":
        task = TASKS["image-classification"]
    elif kind == "label":
        task = TASKS["classification"]
    else:
        task = TASKS["seq2seq" if getattr(config, "is_encoder_decoder", False) else "causal-lm"]
    if kind not in task.kinds:
        raise InputError(f"{data} holds examples of the kind {kind!r}, and {task.name} learns from {_or(task.kinds)}.")
    architectures = getattr(config, "architectures", None) or []
    written = plain(str(architectures[0])) if architectures else config.model_type
    # A language model may get a head for classes; nothing else may get a head that it was not trained with.
    foreign = "SequenceClassification" in written or "ImageClassification" in written
    if task.name == "causal-lm" and "ForMaskedLM" in written and not getattr(config, "is_decoder", False):
        raise InputError(
            f"{label} is a checkpoint of {written}, whose tokens see what comes after them, so that nothing is left to "
            f"foretell in {data}; it can learn classification, from text and label."
        )
    mapping = getattr(transformers_package(), task.auto)._model_mapping
    if type(config) not in mapping or (foreign and not task.classifies):
        raise InputError(f"{label} is a checkpoint of {written}, which cannot learn {task.name} from {data}.")
    return task


@dataclass(frozen=True)
class Labels:
    """The labels of a classification.

    Attributes:
        names: of the classes, in order; empty for numbers.
        by_number: whether the data have numbers of classes, not names.
        stored: the names that the data number, where the head has them in another order.
    """

    names: tuple[str, ...]
    by_number: bool = False
    stored: tuple[str, ...] = ()

    @property
    def continuous(self) -> bool:
        """Whether labels are numbers to come near to."""
        return not self.names

    def __call__(self, value: Any) -> float:
        """The number of a stored label. Raises `ValueError` for one that there is not."""
        if value is None:
            raise ValueError("it has no 'label'")
        if self.continuous:
            if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
                raise ValueError(f"'label' is {value!r}, expected a number")
            return float(value)
        if self.by_number:
            if isinstance(value, bool):
                value = int(value)
            known = self.stored or self.names
            if not isinstance(value, int) or not 0 <= value < len(known):
                raise ValueError(f"'label' is {value!r}, expected 0 to {len(known) - 1}")
            return self.names.index(self.stored[value]) if self.stored else value
        if value not in self.names:
            raise ValueError(f"'label' is {value!r}, which is none of {_or(self.names[:8])}")
        return self.names.index(value)


def find_labels(rows: Rows, config: Any) -> Labels:
    """The labels that data and config speak of: the config's where it has those of the data, else the data's.

    Raises:
        InputError: no labels, or one class only.
    """
    found = _labels(rows, config)
    if len(found.names) == 1:
        raise InputError(
            f"{rows.label} has one class only, {found.names[0]!r}, so there is nothing to tell apart; pictures lie in "
            "a folder for each class."
            if rows.kind == "image"
            else f"{rows.label} has one class only, {found.names[0]!r}, so there is nothing to tell apart."
        )
    return found


def _labels(rows: Rows, config: Any) -> Labels:
    feature = rows.dataset.features["label"]
    known = {int(number): str(name) for number, name in (getattr(config, "id2label", None) or {}).items()}
    ordered = tuple(known[number] for number in sorted(known))
    if names := getattr(feature, "names", None):
        return _by_name(tuple(names), ordered)
    values = {value for value in rows.dataset["label"] if value is not None}
    if not values:
        raise InputError(f"{rows.label} has no labels.")
    if all(isinstance(value, int) for value in values):
        if min(values) < 0:
            raise InputError(f"{rows.label} has the label {min(values)}, expected numbers from 0.")
        number = max(values) + 1
        return Labels(ordered if number <= len(ordered) else tuple(f"LABEL_{i}" for i in range(number)), by_number=True)
    if all(isinstance(value, int | float) for value in values):
        return Labels(())
    if all(isinstance(value, str) for value in values):
        return Labels(ordered if values <= set(ordered) else tuple(sorted(values)))
    raise InputError(f"{rows.label} has labels that are neither all text nor all numbers.")


def _by_name(names: tuple[str, ...], ordered: tuple[str, ...]) -> Labels:
    """Labels of data that number their classes (folders of pictures do by the alphabet), as a head has them by name.

    >>> _by_name(("bee", "cow"), ("Cow", "Ant", "Bee"))
    Labels(names=('Cow', 'Ant', 'Bee'), by_number=True, stored=('Bee', 'Cow'))
    """
    heads = {name.casefold(): name for name in ordered}
    if len(heads) < len(ordered) or not {name.casefold() for name in names} <= set(heads):
        return Labels(names, by_number=True)
    stored = tuple(heads[name.casefold()] for name in names)
    return Labels(ordered, by_number=True, stored=() if stored == ordered else stored)


def set_padding(config: Any, tokenizer: Any) -> None:
    """Give a classifier's config the token that pads, if it has none.

    Decoders classify by the last token that is no padding, and refuse batches where they are not told what padding is.
    """
    text = config.get_text_config()
    if text.pad_token_id is None:
        known = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
        text.pad_token_id = next((token for token in known if token is not None and token < text.vocab_size), 0)
    if config.pad_token_id is None:
        config.pad_token_id = text.pad_token_id


def load_model(folder: Path, label: str, config: Any, task: Task, labels: Labels | None, options: TrainOptions) -> Any:
    """The model of a checkpoint, in float32, with a fresh head where the task needs one that it has not got.

    Raises:
        InputError: weights that are missing, or a head for other labels.
    """
    import torch

    transformers = transformers_package()
    settings: dict[str, Any] = {}
    if labels is not None:
        number = 1 if labels.continuous else len(labels.names)
        if _has_head(config) and config.num_labels != number and not options.new_head:
            raise InputError(
                f"{label} has a head for {config.num_labels} labels, and the data have {number}; pass --new-head for a "
                "fresh one."
            )
        settings["num_labels"] = number
        settings["problem_type"] = "regression" if labels.continuous else "single_label_classification"
        if not labels.continuous:
            settings["id2label"] = dict(enumerate(labels.names))
            settings["label2id"] = {name: number for number, name in enumerate(labels.names)}
        for name, value in settings.items():
            setattr(config, name, value)
    torch.manual_seed(options.seed)  # of a fresh head
    model, found = getattr(transformers, task.auto).from_pretrained(
        folder, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=options.new_head
    )
    fresh = {name.partition(".")[0] for name in found["missing_keys"]}
    body = model.base_model_prefix
    missing = [name for name in found["missing_keys"] if not task.classifies or name.startswith(f"{body}.")]
    # BERT's pooler belongs to its classifiers, and its language models are stored without.
    missing = [name for name in missing if ".pooler." not in name]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{label} lacks the weights {plain(missing[0])}{more} of {type(model).__name__}.")
    if fresh and options.new_head is False and _has_head(config):
        raise InputError(f"{label} lacks the weights of its head; pass --new-head for a fresh one.")
    return model


def _has_head(config: Any) -> bool:
    return any("Classification" in name for name in getattr(config, "architectures", None) or [])


def model_inputs(prepared: Prepared, task: Task, batch: Batch) -> dict[str, Any]:
    """What a model is called with: the batch, and for an encoder-decoder what its decoder reads.

    Labels are not in it, as the loss is ours, but where the model must know from them where completions begin.
    """
    inputs: dict[str, Any] = {n: tensor for n, tensor in batch.items() if n != "labels" or prepared.needs_labels}
    if not task.classifies:
        inputs["use_cache"] = False
    if task.name == "seq2seq":
        inputs["decoder_input_ids"] = prepared.model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    return inputs


def longest(config: Any, options: TrainOptions) -> int:
    """Tokens that an example may have."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    if config.model_type in ("roberta", "upcycled_roberta") and limit:
        limit -= text.pad_token_id + 1  # its positions are numbered from there
    if options.max_length is None:
        return min(limit or 2048, 2048)
    if limit is not None and options.max_length > limit:
        raise OptionError(f"--max-length is {options.max_length}, and the model has {limit} positions.")
    return options.max_length


def _or(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + f" or {names[-1]}" if len(names) > 1 else names[0]
