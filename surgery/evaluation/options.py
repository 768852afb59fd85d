"""What can be said about an evaluation, checked in itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from surgery.errors import OptionError, several
from surgery.execute import NoProgress, Progress
from surgery.training.options import LOSSES, OVER_LENGTH, PRECISIONS, TASKS, TrainOptions, option

# The column that names each row's adapter where no other is named.
ADAPTER_FIELD = "adapter"


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What to evaluate and how. Whatever is here can change the figures; see `EvalSettings` for what cannot.

    Attributes:
        data: a file, a folder, or a data set on the Hub, `name/repo[:split]`.
        task: one of `TASKS`; told from checkpoint and data where it is None.
        adapter_field: the column that names each row's adapter; where it is None, `adapter` if there is one, and where
            it is empty, none.
        loss: `auto` for figures of what the model is to say (completions, the assistant's turns), `all` for all.
        tokenizer: a folder or id to take the tokenizer from, instead of the checkpoint.
        chat_template: a Jinja file instead of the tokenizer's template.
        end_token: ends each completion and each text, instead of the tokenizer's end token.
        max_length: tokens of an example at most; what the model can take, and at most 2048, where it is None.
        over_length: what becomes of longer ones; `split` is for plain text only.
        batch_size: rows of a forward pass.
        precision: of weights and arithmetic; `auto` is bf16 on a GPU that has it, fp32 elsewhere.
        max_new_tokens: of an answer.
        temperature: of drawing tokens; 0 takes the likeliest.
        seed: of drawing tokens, and of the order within pairs.
    """

    data: str
    task: str | None = None
    adapter_field: str | None = None
    loss: str = "auto"
    tokenizer: str | None = None
    chat_template: str | None = None
    end_token: str | None = None
    max_length: int | None = None
    over_length: str = "error"
    batch_size: int = 8
    precision: str = "auto"
    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise OptionError(several("the options", problems), problems)

    def _problems(self) -> Iterator[str]:
        choices = (("task", TASKS), ("loss", LOSSES), ("over_length", OVER_LENGTH), ("precision", PRECISIONS))
        for name, known in choices:
            value = getattr(self, name)
            if value is not None and value not in known:
                yield f"{option(name)} is {value!r}, expected {', '.join(known[:-1])} or {known[-1]}."
        for name in ("batch_size", "max_length", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"{option(name)} is {value}, expected at least 1."
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            yield f"--temperature is {self.temperature:g}, expected 0 or more."

    def as_training(self) -> TrainOptions:
        """The same for the functions of `surgery.training` that read data and load models."""
        return TrainOptions(
            data=self.data,
            task=self.task,
            loss=self.loss,
            tokenizer=self.tokenizer,
            chat_template=self.chat_template,
            end_token=self.end_token,
            max_length=self.max_length,
            over_length=self.over_length,
            batch_size=self.batch_size,
            precision=self.precision,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """Where to run and what to write.

    Attributes:
        output: a file for the report as JSON; None for none.
        generate: a file for answers; None for no answers.
        pairwise: a file for pairs of answers for a judge; None for none.
        key: the file that says whose answers those are; beside `pairwise` where it is None.
        overwrite: replace files that exist.
        dry_run: look at data, models and adapters, evaluate nothing.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        progress: told about rows and answers as they are done.
    """

    output: Path | None = None
    generate: Path | None = None
    pairwise: Path | None = None
    key: Path | None = None
    overwrite: bool = False
    dry_run: bool = False
    device: str = "auto"
    progress: Progress = field(default_factory=NoProgress)

    @property
    def key_file(self) -> Path | None:
        """Where the key of the pairs goes."""
        if self.pairwise is None or self.key is not None:
            return self.key
        return self.pairwise.with_name(f"{self.pairwise.stem}.key.json")

    @property
    def answers(self) -> bool:
        """Whether models are to answer."""
        return self.generate is not None or self.pairwise is not None

    def files(self) -> dict[str, Path]:
        """Every file to be written, by the option that asks for it."""
        found = {"--output": self.output, "--generate": self.generate, "--pairwise": self.pairwise}
        found["--key"] = self.key_file
        return {name: path for name, path in found.items() if path is not None}
