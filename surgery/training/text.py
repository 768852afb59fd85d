"""From stored examples to tokens: which of them are to be said, by kind of example. A function of one row each."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.errors import InputError, MissingExtraError, OptionError, first_line
from surgery.hashing import new_hash
from surgery.training.options import TrainOptions

# Labels of tokens that are read and not to be said.
UNSAID = -100
_GENERATION = re.compile(r"\{%-?\s*generation\b")

Row = Mapping[str, Any]
Tokens = dict[str, list[int]]


def transformers_package() -> Any:
    """The package, or the error that names the extra."""
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "train") from error
    return transformers


def load_tokenizer(folder: Path, options: TrainOptions) -> Any:
    """The tokenizer of a checkpoint, or the one that the options name, with the options' template and end token."""
    transformers = transformers_package()
    place = options.tokenizer or str(folder)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    except Exception as error:  # transformers raises whatever it stumbles over
        reason = first_line(error)
        raise InputError(
            f"{place} has no tokenizer that can be loaded ({reason}); name one with --tokenizer."
        ) from error
    if options.chat_template is not None:
        try:
            tokenizer.chat_template = Path(options.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{options.chat_template} cannot be read as a chat template: {error}.") from error
    if options.end_token is not None and tokenizer.convert_tokens_to_ids(options.end_token) in (
        None,
        tokenizer.unk_token_id,
    ):
        tokenizer.add_special_tokens({"additional_special_tokens": [options.end_token]})
    return tokenizer


@dataclass(frozen=True)
class Encoder:
    """Makes tokens of rows: `encode(row)` gives `input_ids` and, where not all of them are to be said, `labels`.

    Attributes:
        tokenizer: of the checkpoint.
        kind: of the rows, see `reading.KINDS`.
        seq2seq: whether prompts and completions are two sequences.
        everything: whether the loss is on prompts too.
        end: id of the token that ends a text; None for none.
        words: of the vocabulary, where tokens come as they are.
    """

    tokenizer: Any = field(repr=False)
    kind: str
    seq2seq: bool
    everything: bool
    end: int | None
    words: int | None = None

    @classmethod
    def of(cls, tokenizer: Any, kind: str, task: str, options: TrainOptions, words: int | None = None) -> Encoder:
        """The encoder for rows of a kind and a task, checked."""
        if kind == "tokens":
            return cls(tokenizer, kind, task == "seq2seq", options.loss == "all", None, words)
        end = tokenizer.eos_token_id
        if options.end_token is not None:
            if kind == "chat":
                raise OptionError(
                    "--end-token is for text and completions; the turns of a chat end as its template says."
                )
            end = tokenizer.convert_tokens_to_ids(options.end_token)
        encoder = cls(tokenizer, kind, task == "seq2seq", options.loss == "all", end)
        if kind == "chat":
            encoder.check_template()
        return encoder

    def check_template(self) -> None:
        """Raise unless there is a chat template, and one that marks what the assistant says, where that matters."""
        template = self.tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        if not template:
            raise InputError(
                "The tokenizer has no chat template, and the data are chats; give one with --chat-template FILE."
            )
        if not self.everything and not _GENERATION.search(template):
            raise InputError(
                "The chat template does not mark what the assistant says with {% generation %} and "
                "{% endgeneration %}; give one that does with --chat-template FILE, or train on all turns with "
                "--loss all."
            )

    def __call__(self, row: Row) -> Tokens:
        """The tokens of a row. Raises `ValueError` with what is wrong with it."""
        encode: Callable[[Row], Tokens] = getattr(self, f"_{self.kind}")
        return encode(row)

    def fingerprint(self) -> str:
        """What tells this encoder from every other that gives other tokens."""
        vocabulary = template = None
        if self.kind != "tokens":
            backend, template = getattr(self.tokenizer, "backend_tokenizer", None), self.tokenizer.chat_template
            vocabulary = backend.to_str() if backend is not None else repr(sorted(self.tokenizer.get_vocab().items()))
        parts = (vocabulary, template, self.kind, self.seq2seq, self.everything, self.end, self.words)
        hasher = new_hash()
        hasher.update(repr(parts).encode(errors="surrogatepass"))
        return hasher.hexdigest()

    def _text(self, row: Row) -> Tokens:
        return {"input_ids": self._ended(self.tokenizer(_string(row, "text"))["input_ids"])}

    def _label(self, row: Row) -> Tokens:
        pair = _string(row, "text_pair") if row.get("text_pair") is not None else None
        return {"input_ids": self.tokenizer(_string(row, "text"), pair)["input_ids"]}

    def _completion(self, row: Row) -> Tokens:
        prompt, completion = _string(row, "prompt"), _string(row, "completion")
        if self.seq2seq:
            target = self.tokenizer(text_target=completion)["input_ids"]
            return {"input_ids": self.tokenizer(prompt)["input_ids"], "labels": self._ended(target)}
        before = self.tokenizer(prompt)["input_ids"]
        if before and before[-1] == self.tokenizer.eos_token_id:
            before = before[:-1]  # a tokenizer that ends every text does so in the middle, too
        whole = self._ended(self.tokenizer(prompt + completion)["input_ids"])
        if whole[: len(before)] != before:
            # The last token of the prompt would run into the completion; while generating, it cannot.
            whole = self._ended(before + self.tokenizer(completion, add_special_tokens=False)["input_ids"])
        if self.everything:
            return {"input_ids": whole}
        return {"input_ids": whole, "labels": [UNSAID] * len(before) + whole[len(before) :]}

    def _chat(self, row: Row) -> Tokens:
        messages = row.get("messages")
        if not isinstance(messages, list) or not messages:
            raise ValueError("'messages' is no list of turns")
        for turn in messages:
            if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or "content" not in turn:
                raise ValueError("a turn of 'messages' has no 'role' and 'content'")
        # datasets fills up what only some rows have with None.
        turns = [{key: value for key, value in turn.items() if value is not None} for turn in messages]
        try:
            found = self.tokenizer.apply_chat_template(
                turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=not self.everything
            )
        except Exception as error:  # templates raise what they like
            raise ValueError(f"the chat template refuses it ({str(error).strip() or type(error).__name__})") from error
        ids = list(found["input_ids"])
        if self.everything:
            return {"input_ids": ids}
        said = found["assistant_masks"]
        if not any(said):
            raise ValueError("the assistant says nothing in it")
        return {"input_ids": ids, "labels": [i if mask else UNSAID for i, mask in zip(ids, said, strict=True)]}

    def _tokens(self, row: Row) -> Tokens:
        ids, labels = row.get("input_ids"), row.get("labels")
        if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
            raise ValueError("'input_ids' is no list of integers")
        if any(not 0 <= token < (self.words or token + 1) for token in ids):
            raise ValueError(f"'input_ids' has a token outside of the vocabulary of {self.words}")
        if labels is None:
            if self.seq2seq:
                raise ValueError("it has no 'labels'")
            return {"input_ids": ids}
        if not isinstance(labels, list) or (not self.seq2seq and len(labels) != len(ids)):
            raise ValueError("'labels' is no list as long as 'input_ids'")
        words = self.words
        for label in labels:
            if type(label) is not int or (label != UNSAID and not 0 <= label < (words or label + 1)):
                raise ValueError(
                    f"'labels' has {label!r}, expected {UNSAID} or a token" + f" below {words}" * bool(words)
                )
        return {"input_ids": ids, "labels": labels}

    def _ended(self, ids: list[int]) -> list[int]:
        if self.end is None or (ids and ids[-1] == self.end):
            return ids
        if ids and ids[-1] == self.tokenizer.eos_token_id:
            ids = ids[:-1]
        return [*ids, self.end]


def _string(row: Row, column: str) -> str:
    value = row.get(column)
    if value is None:
        raise ValueError(f"it has no {column!r}")
    if not isinstance(value, str):
        raise ValueError(f"{column!r} is {type(value).__name__}, expected text")
    if not value:
        raise ValueError(f"{column!r} is empty")
    return value
