"""Data and model, made ready for each other: whatever can be refused is refused here, before the first step."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from surgery.checkpoint import Checkpoint
from surgery.errors import InputError, OptionError, first_line
from surgery.training import batches
from surgery.training.dropout import add_residual_dropout
from surgery.training.examples import Examples, hold_out, image_examples, text_examples
from surgery.training.images import Pictures
from surgery.training.methods import MethodOptions, Prepared, apply_method, continue_method
from surgery.training.options import TrainOptions, option
from surgery.training.reading import Rows, read_rows
from surgery.training.starting import Start
from surgery.training.tasks import Labels, Task, find_labels, find_task, load_model, longest, set_padding
from surgery.training.text import Encoder, load_tokenizer, transformers_package
from surgery.training.work import schedule_of

# Methods that store what is trained beside an unchanged base, and have a place for more than their own parameters.
_BESIDE = ("lora", "lora+prompt", "lora+prefix", "adapter-h", "adapter-l")


@dataclass(frozen=True)
class Subject:
    """Data and model, ready for each other."""

    checkpoint: Checkpoint
    task: Task
    prepared: Prepared
    tokenizer: Any
    examples: Examples
    held_out: Examples | None
    batch: Any
    steps: int
    parameters: int
    grown: bool = False


def make_subject(start: Start, options: TrainOptions, accelerator: Any) -> Subject:
    """Read data, load the model, and refuse whatever can be refused before the first step."""
    checkpoint = start.checkpoint
    assert checkpoint.path is not None
    folder = checkpoint.path
    config = read_config(checkpoint)
    with accelerator.main_process_first():  # which leaves tokens in the cache of `datasets` for the others
        rows = read_rows(options.data)
        task = find_task(config, rows.kind, checkpoint.label, options.data, options.task)
        if options.packing and task.name != "causal-lm":
            raise OptionError(f"--packing is for causal language models, and the task is {task.name}; leave it out.")
        labels = find_labels(rows, config) if task.classifies else None
        tokenizer = None
        if rows.kind != "image" and not (rows.kind == "tokens" and not has_tokenizer(folder, options)):
            tokenizer = load_tokenizer(folder, options)
        if labels is not None and tokenizer is not None:
            set_padding(config, tokenizer)
        read = partial(examples_of, task=task, tokenizer=tokenizer, labels=labels, config=config, options=options)
        examples, held_out = read(rows), None
        if options.eval_data is not None:
            other = read_rows(options.eval_data)
            find_task(config, other.kind, checkpoint.label, options.eval_data, task.name)
            held_out = read(other)
        elif options.eval_split:
            examples, held_out = hold_out(examples, options.eval_split, options.seed)
    model = load_model(folder, checkpoint.label, config, task, labels, options)
    if options.packing:
        refuse_leaks(model, checkpoint.label)
    words = 0 if tokenizer is None else len(tokenizer)
    grown = tokenizer is not None and words > model.get_input_embeddings().num_embeddings
    if grown:
        model.resize_token_embeddings(words, mean_resizing=False)
    if options.residual_dropout:
        add_residual_dropout(model, options.residual_dropout)
    prepared = _prepare(model, start, options)
    if grown and prepared.kind == "adapter":
        raise OptionError(
            f"The end token {options.end_token!r} is not in the vocabulary, and an adapter has no place for the "
            "embedding of a new token; name one of the vocabulary's, or use --method full."
        )
    if options.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    schedule = schedule_of(examples, options, accelerator.num_processes)
    steps = options.steps or math.ceil((options.epochs or 1.0) * schedule.steps_per_epoch)
    parameters = sum(parameter.numel() for parameter in prepared.model.parameters())
    batch = batches_of(task, tokenizer, folder, config, labels, options)
    return Subject(checkpoint, task, prepared, tokenizer, examples, held_out, batch, steps, parameters, grown)


def _prepare(model: Any, start: Start, options: TrainOptions) -> Prepared:
    """The method's parameters on the model, or those of the adapter that is trained on."""
    import torch

    torch.manual_seed(options.seed)  # of what the method draws
    if start.adapter is None:
        name = options.base_name or start.checkpoint.provenance["source"]
        beside = tuple((f"^{re.escape(fresh)}$", 1.0) for fresh in _fresh_pooler(model, start.checkpoint))
        if beside and options.kind in ("prompt", "prefix"):
            raise OptionError(
                f"{start.checkpoint.label} lacks the weights of its pooler, which are drawn anew, and --method "
                f"{options.name} has no place to store them; use --method lora or full."
            )
        if options.kind not in _BESIDE:
            beside = ()  # the whole model is stored
        options = replace(options, method=options.name, base_name=name, train=(*options.train, *beside))
        return apply_method(model, options, options.rate)
    fresh = MethodOptions()
    given = [item.name for item in fields(fresh) if getattr(options, item.name) != getattr(fresh, item.name)]
    given = [name for name in given if name not in ("seed", "base_name")]
    if given:
        raise OptionError(
            f"{option(given[0])} is for a fresh adapter, and {start.adapter} is trained on as it is; leave it out."
        )
    return continue_method(model, start.adapter, options.learning_rate)


def _fresh_pooler(model: Any, checkpoint: Checkpoint) -> list[str]:
    """The parameters of a pooler that the checkpoint lacks: an adapter that did not store them would not be whole."""
    names = [name for name, _ in model.named_parameters() if ".pooler." in name]
    return [name for name in names if not any(stored.endswith(name.partition(".")[2]) for stored in checkpoint.tensors)]


def examples_of(
    rows: Rows, task: Task, tokenizer: Any, labels: Labels | None, config: Any, options: TrainOptions
) -> Examples:
    """Examples for a task of rows as they are stored."""
    if rows.kind == "image":
        assert labels is not None
        return image_examples(rows, labels)
    if options.packing:
        _refuse_packing(config)
    words = getattr(config.get_text_config(), "vocab_size", None)
    encoder = Encoder.of(tokenizer, rows.kind, task.name, options, words)
    return text_examples(rows, encoder, longest(config, options), options, labels)


def _refuse_packing(config: Any) -> None:
    """Under expert choice the tokens of a row compete: packed examples would see each other."""
    stacks = (getattr(config, "moe_stacks", None) or {}).values()
    if any(stack.get("router") == "expert-choice" for stack in stacks):
        raise OptionError("--packing puts examples into one row, and with expert choice the tokens of a row compete.")


def refuse_leaks(model: Any, label: str) -> None:
    """Raise if what stands in one piece of a packed row changes what a model says to the next one.

    transformers makes a mask of `position_ids` that begin again at 0 only for models that have these, and whose masks
    it makes itself: not for OPT, Falcon, BLOOM, MPT or state spaces, which take no notice of them.
    """
    import torch

    ids = torch.arange(8)[None] % model.get_input_embeddings().num_embeddings
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    others = torch.cat([ids[:, :4].flip(1), ids[:, 4:]], dim=1)
    before = model.training
    model.eval()
    try:
        with torch.no_grad():
            said = [
                model(input_ids=row, position_ids=positions, use_cache=False).logits[:, 4:] for row in (ids, others)
            ]
        leaks = bool((said[0] - said[1]).abs().max() > 1e-5 * said[0].abs().max())
    except TypeError:  # it takes no positions
        leaks = True
    model.train(before)
    if leaks:
        raise OptionError(
            f"--packing puts examples into one row, and {label} ({type(model).__name__}) takes no notice of where one "
            "ends, so that they would see each other; leave it out."
        )


def batches_of(
    task: Task, tokenizer: Any, folder: Path, config: Any, labels: Labels | None, options: TrainOptions
) -> Any:
    """What makes the tensors of some items."""
    if task.name == "image-classification":
        assert labels is not None
        return Pictures.of(folder, config, labels).batch
    if labels is not None:
        return partial(batches.label_batch, padding=config.pad_token_id, number=labels.continuous)
    padding = next((t for t in (getattr(tokenizer, "pad_token_id", None), config.pad_token_id) if t is not None), 0)
    return partial(batches.text_batch, padding=padding, packed=options.packing)


def read_config(checkpoint: Checkpoint) -> Any:
    """The config of a checkpoint on disk, as transformers has it. Raises `InputError` for a model it does not know."""
    transformers = transformers_package()
    if checkpoint.model_type.startswith("upcycled_"):
        import surgery.moe  # noqa: F401 - registers the classes
    try:
        return transformers.AutoConfig.from_pretrained(checkpoint.path)
    except (OSError, ValueError, KeyError) as error:
        reason = first_line(error)
        raise InputError(f"{checkpoint.label} cannot be run: transformers has no model for it ({reason}).") from error


def has_tokenizer(folder: Path, options: TrainOptions) -> bool:
    """Whether there is a tokenizer, in the checkpoint or by the options."""
    return options.tokenizer is not None or (folder / "tokenizer_config.json").is_file()
