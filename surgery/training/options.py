"""What can be said about a training run, checked in itself. Data and model are looked at elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from surgery.errors import OptionError, several
from surgery.training.methods.options import MethodOptions

TASKS = ("causal-lm", "seq2seq", "classification", "image-classification")
SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
OVER_LENGTH = ("error", "truncate", "skip", "split")
LOSSES = ("auto", "all")
KEPT = ("best", "last")
OPTIMIZERS = ("adamw", "adamw-8bit")


@dataclass(frozen=True, kw_only=True)
class TrainOptions(MethodOptions):
    """What and how to train: a method with its options, and these.

    Whatever is here can change the result; see `TrainSettings` for what cannot.

    Attributes:
        data: a file, a folder, or a data set on the Hub, `name/repo[:split]`.
        eval_data: the same, to measure the loss on.
        eval_split: instead, the share of `data` to hold out, or from 1 on the number of examples.
        task: one of `TASKS`; told from checkpoint and data where it is None.
        loss: `auto` for the loss on what the model is to say (completions, the assistant's turns), `all` for all.
        tokenizer: a folder or id to take the tokenizer from, instead of the checkpoint.
        chat_template: a Jinja file instead of the tokenizer's template.
        end_token: ends each completion and each text, instead of the tokenizer's end token; added to the vocabulary if
            it is not in it.
        max_length: tokens of an example at most; what the model can take, and at most 2048, where it is None.
        over_length: what becomes of longer ones; `split` is for plain text only.
        packing: several examples to a row, which do not see each other.
        new_head: put a fresh head on a checkpoint whose own is for other labels.
        steps: of the optimiser; instead of `epochs`.
        epochs: times to go through the data; 1 where neither is given.
        batch_size: examples to a forward pass, on each device.
        gradient_accumulation: forward passes to a step.
        learning_rate: at its highest; the method's own where it is None.
        schedule: how it falls after the warm-up.
        warmup: steps of it; below 1, the share of all steps.
        final_rate: what the rate falls to, as a share of the highest.
        optimizer: `adamw`, or `adamw-8bit` with bitsandbytes.
        beta1, beta2, epsilon: of AdamW.
        weight_decay: of matrices; vectors and virtual tokens have none.
        max_grad_norm: gradients are scaled down to this norm; 0 for never.
        precision: of the forward and backward pass; weights and optimiser are float32. `auto` is bf16 on a GPU that has
            it, fp32 elsewhere.
        activation_checkpointing: compute activations again in the backward pass instead of keeping them.
        residual_dropout: dropout before each residual addition, rising linearly from 0 at the bottom layer to this at
            the top (LIMA, section 3).
        router_aux_loss: the load-balancing loss of a mixture of experts; what its config says where it is None.
        router_z_loss: that loss; what its config says where it is None.
        eval_every: steps between evaluations; a tenth of the run where it is None.
        save_every: steps between saves of the state; a tenth of the run where it is None.
        log_every: steps between lines of the log.
        keep: the weights that are written: of the evaluation with the least loss, or the last.
        patience: stop after so many evaluations that are no better; None for never.
        save_dtype: of the weights written: `auto` for that of the checkpoint, `float32`, `bfloat16`, `float16`.
    """

    data: str
    eval_data: str | None = None
    eval_split: float = 0.0
    task: str | None = None
    loss: str = "auto"
    tokenizer: str | None = None
    chat_template: str | None = None
    end_token: str | None = None
    max_length: int | None = None
    over_length: str = "error"
    packing: bool = False
    new_head: bool = False
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 8
    gradient_accumulation: int = 1
    learning_rate: float | None = None
    schedule: str = "cosine"
    warmup: float = 0.0
    final_rate: float = 0.0
    optimizer: str = "adamw"
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    precision: str = "auto"
    activation_checkpointing: bool = False
    residual_dropout: float = 0.0
    router_aux_loss: float | None = None
    router_z_loss: float | None = None
    eval_every: int | None = None
    save_every: int | None = None
    log_every: int = 1
    keep: str = "best"
    patience: int | None = None
    save_dtype: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = list(self._problems())
        if problems:
            raise OptionError(several("the options", problems), problems)

    @property
    def rate(self) -> float:
        """The highest learning rate."""
        return self.default_rate if self.learning_rate is None else self.learning_rate

    def _problems(self) -> Iterator[str]:
        choices = (
            ("task", TASKS), ("loss", LOSSES), ("over_length", OVER_LENGTH), ("schedule", SCHEDULES),
            ("optimizer", OPTIMIZERS), ("precision", PRECISIONS), ("keep", KEPT),
            ("save_dtype", ("auto", "float32", "bfloat16", "float16")),
        )  # fmt: skip
        for name, known in choices:
            value = getattr(self, name)
            if value is not None and value not in known:
                yield f"{option(name)} is {value!r}, expected {', '.join(known[:-1])} or {known[-1]}."
        for name in ("batch_size", "gradient_accumulation", "log_every"):
            if getattr(self, name) < 1:
                yield f"{option(name)} is {getattr(self, name)}, expected at least 1."
        for name in ("steps", "max_length", "eval_every", "save_every", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"{option(name)} is {value}, expected at least 1."
        for name in ("final_rate", "residual_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                yield f"{option(name)} is {getattr(self, name):g}, expected between 0 and 1."
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                yield f"{option(name)} is {getattr(self, name):g}, expected 0 to below 1."
        if not 0 <= self.seed < 2**32:  # as numpy has it
            yield f"--seed is {self.seed}, expected 0 to {2**32 - 1}."
        sizes = (
            "eval_split", "epochs", "learning_rate", "warmup", "epsilon", "weight_decay", "max_grad_norm",
            "router_aux_loss", "router_z_loss",
        )  # fmt: skip
        for name in sizes:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                yield f"{option(name)} is {value:g}, expected 0 or more."
        if self.steps is not None and self.epochs is not None:
            yield "--steps and --epochs both say how long to train; give one of them."
        if self.epochs == 0:
            yield "--epochs is 0, expected more."
        if self.eval_data is not None and self.eval_split:
            yield "--eval-data and --eval-split both say what to evaluate on; give one of them."
        if self.patience is not None and self.eval_data is None and not self.eval_split:
            yield "--patience needs evaluations; give --eval-data or --eval-split."
        if self.packing and self.task not in (None, "causal-lm"):
            yield "--packing is for causal language models."
        if self.packing and ("prompt" in self.kind or "prefix" in self.kind):
            yield f"--packing puts examples into one row, and --method {self.name} begins each row with its own tokens."


def option(name: str) -> str:
    """A field as the command line spells it."""
    return "--" + name.replace("_", "-")
