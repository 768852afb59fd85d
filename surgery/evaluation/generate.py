"""Answers to prompts: greedy, or drawn by the seed."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.errors import InputError, OptionError
from surgery.evaluation.measure import in_order
from surgery.evaluation.subject import EvalSubject
from surgery.training.text import transformers_package

if TYPE_CHECKING:
    from surgery.evaluation.mixed import MixedAdapters
    from surgery.execute import Progress


@dataclass(frozen=True)
class Prompt:
    """What a model is asked.

    Attributes:
        row: of the data, from 0.
        text: as a reader sees it.
        ids: as the model does.
        reference: the answer in the data.
    """

    row: int
    text: str
    ids: tuple[int, ...]
    reference: str


def find_prompts(subject: EvalSubject) -> list[Prompt]:
    """The prompts in the data, with their references.

    Raises:
        OptionError: data without prompts.
        InputError: prompts that leave no room for an answer.
    """
    rows, task = subject.examples.rows, subject.task
    if task.classifies or rows.kind not in ("completion", "chat"):
        raise OptionError(
            f"Answers need prompts, and {rows.label} holds examples of the kind {rows.kind!r}; give 'prompt' and "
            "'completion', or 'messages'."
        )
    numbers = sorted({subject.row_of(item) for item in range(len(subject.examples))})
    made = _completion if rows.kind == "completion" else _chat
    found = [made(subject, number, rows.dataset[number]) for number in numbers]
    room = _room(subject)
    long = [prompt for prompt in found if room is not None and len(prompt.ids) > room]
    if long and subject.options.over_length != "skip":
        worst = max(long, key=lambda prompt: len(prompt.ids))
        raise InputError(
            f"{len(long)} of {len(found)} prompts leave no room for {subject.options.max_new_tokens} new tokens, the "
            f"longest has {len(worst.ids)} ({rows.place(worst.row)}); lower --max-new-tokens, or pass --over-length "
            "skip."
        )
    return [prompt for prompt in found if prompt not in long]


def answer(
    model: Any,
    subject: EvalSubject,
    questions: Sequence[tuple[Prompt, str | None]],
    progress: Progress,
    mixed: MixedAdapters | None = None,
) -> list[str]:
    """What a model says to prompts, each under the adapter named beside it. Answers come in the order of questions."""
    import torch

    answers, size = [""] * len(questions), subject.options.batch_size
    order = in_order([(name, len(prompt.ids)) for prompt, name in questions], mixed)
    torch.manual_seed(subject.options.seed)
    device = next(model.parameters()).device
    config = _generation(model, subject)
    with torch.inference_mode():
        for first in range(0, len(order), size):
            chosen = order[first : first + size]
            ids = _padded([questions[index][0].ids for index in chosen], config.pad_token_id, subject)
            inputs = {name: tensor.to(device) for name, tensor in ids.items()}
            names = [questions[index][1] for index in chosen]
            with mixed.rows(names) if mixed is not None else contextlib.nullcontext():
                said = model.generate(**inputs, generation_config=config)
            if subject.task.name == "causal-lm" and not hasattr(model, "infix"):
                said = said[:, inputs["input_ids"].shape[1] :]
            texts = subject.tokenizer.batch_decode(said, skip_special_tokens=True)
            for index, text in zip(chosen, texts, strict=True):
                answers[index] = text
            progress.advance(len(chosen))
    return answers


def _completion(subject: EvalSubject, number: int, row: dict[str, Any]) -> Prompt:
    ids = subject.tokenizer(row["prompt"])["input_ids"]
    if subject.task.name == "causal-lm" and ids and ids[-1] == subject.tokenizer.eos_token_id:
        ids = ids[:-1]  # as for training: a tokenizer that ends every text would end the prompt
    if not ids:
        raise InputError(f"{subject.examples.rows.place(number)}: 'prompt' has no tokens.")
    return Prompt(number, row["prompt"], tuple(ids), row["completion"])


def _chat(subject: EvalSubject, number: int, row: dict[str, Any]) -> Prompt:
    turns = [{key: value for key, value in turn.items() if value is not None} for turn in row["messages"]]
    last = next((i for i in reversed(range(len(turns))) if turns[i]["role"] == "assistant"), None)
    if not last:  # none, or nothing before it
        raise InputError(
            f"{subject.examples.rows.place(number)}: there is no turn of the assistant that answers another."
        )
    before = turns[:last]
    found = subject.tokenizer.apply_chat_template(before, tokenize=True, return_dict=True, add_generation_prompt=True)
    text = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in before)
    return Prompt(number, text, tuple(found["input_ids"]), str(turns[last]["content"]))


def _room(subject: EvalSubject) -> int | None:
    """Tokens that a prompt may have."""
    text = subject.config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    if limit is None or subject.task.name != "causal-lm":
        return limit
    return int(limit) - subject.options.max_new_tokens


def _generation(model: Any, subject: EvalSubject) -> Any:
    """What the options say, and of the checkpoint's own settings only the tokens that begin and end."""
    options, tokenizer, own = subject.options, subject.tokenizer, model.generation_config
    ends = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    ends = [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [ends]
    if options.end_token is not None:
        ends.append(tokenizer.convert_tokens_to_ids(options.end_token))
    padding = next((t for t in (tokenizer.pad_token_id, own.pad_token_id, *ends) if t is not None), 0)
    drawn = {"do_sample": True, "temperature": options.temperature, "top_k": 0, "top_p": 1.0}
    return transformers_package().GenerationConfig(
        max_new_tokens=options.max_new_tokens,
        **(drawn if options.temperature else {"do_sample": False}),
        num_beams=1,
        eos_token_id=ends or None,
        pad_token_id=padding,
        bos_token_id=own.bos_token_id,
        decoder_start_token_id=own.decoder_start_token_id
        if own.decoder_start_token_id is not None
        else getattr(subject.config, "decoder_start_token_id", None),
    )


def _padded(rows: Sequence[Sequence[int]], padding: int, subject: EvalSubject) -> dict[str, Any]:
    """`input_ids` and `attention_mask` [B, n], padded on the left; for an encoder on the right."""
    import torch

    width = max(map(len, rows))
    ids = torch.full((len(rows), width), padding)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for number, row in enumerate(rows):
        where = slice(width - len(row), width) if subject.task.name == "causal-lm" else slice(0, len(row))
        ids[number, where], mask[number, where] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}
