"""What merged adapters mean beyond the weights: a head that is no longer tied, another vocabulary, another task.

Each function looks at the changes that the adapters make and returns settings for `config.json`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from surgery.adapter import Adapter
from surgery.checkpoint import Checkpoint, StoredTensor
from surgery.errors import MismatchError
from surgery.families import part_of
from surgery.hashing import hash_tensor
from surgery.names import split_parameter
from surgery.ops.fitting import HEAD, Change, head_tied_to

_TASK_CLASSES = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "CAUSAL_LM": "ForCausalLM",
}
_TASK_SUFFIX = re.compile(r"(For[A-Z]\w+|LMHeadModel|Model)$")
TOKENIZER_FILES = (
    "tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "spiece", "sentencepiece", "chat_template",
)  # fmt: skip


def settle_tying(
    base: Checkpoint, adapters: Sequence[Adapter], changes: Mapping[str, Change]
) -> tuple[dict[str, Change], dict[str, object], list[str]]:
    """Keep a tied head tied where both ends change alike, and untie it where only one does.

    An adapter that was trained on the embedding alone, or on the head alone, of a tied model saw the other end
    unchanged; adding it to the one stored matrix would change both. PEFT's `merge_and_unload` does that, and warns.
    Returns the changes, config settings, and notes.
    """
    tied = head_tied_to(base)
    changed = dict(changes)
    if tied is None or not {tied.name, HEAD} & changed.keys():
        return changed, {}, []
    embedding, head = changed.get(tied.name), changed.get(HEAD)
    if head is not None and embedding is not None and _same(embedding, head):
        del changed[HEAD]
        return changed, {}, []
    together = any(adapter.config.get("ensure_weight_tying") for adapter in adapters)
    if together:
        changed.pop(HEAD, None)
        return changed, {}, []
    if head is None:
        assert embedding is not None
        module = split_parameter(tied.name)[0]
        wrapped = any(module.endswith(name) for adapter in adapters for name in _modules_to_save(adapter))
        resized = embedding.start.shape != tied.shape
        if resized or not (embedding.blocks or wrapped):
            return changed, {}, []  # stored under its own key, it goes into the model itself, and the head follows
        changed[HEAD] = Change(HEAD, None, tied)
    note = f"The head was tied to {tied.name!r} and only one of the two changes, so {HEAD!r} is stored on its own."
    return changed, {"tie_word_embeddings": False}, [note]


def _same(embedding: Change, head: Change) -> bool:
    plain = not (embedding.blocks or head.blocks or embedding.rows or head.rows)
    return (
        plain and embedding.start.shape == head.start.shape and hash_tensor(embedding.start) == hash_tensor(head.start)
    )


def _modules_to_save(adapter: Adapter) -> list[str]:
    value = adapter.config.get("modules_to_save")
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []


def settle_vocabulary(base: Checkpoint, changes: Mapping[str, Change]) -> dict[str, object]:
    """`vocab_size`, if an adapter brings another number of rows. Raises where embedding and head would disagree."""
    rows: dict[str, int] = {}
    resized = False
    for name, tensor in {**base.tensors, **{n: c.start for n, c in changes.items()}}.items():
        if part_of(name, tensor.shape) not in ("embeddings", "head") or len(tensor.shape) != 2:
            continue
        old = base.tensors.get(name)
        if old is not None and old.shape[0] == _vocabulary(base):
            rows[name] = tensor.shape[0]
            resized = resized or tensor.shape != old.shape
    if not resized:
        return {}
    if len(set(rows.values())) > 1:
        listed = ", ".join(f"{name!r} has {count}" for name, count in rows.items())
        raise MismatchError(
            f"The vocabulary would differ between matrices: {listed} rows; the adapter must bring all of them."
        )
    return {"vocab_size": next(iter(rows.values()))}


def _vocabulary(base: Checkpoint) -> object:
    return base.text_config.get("vocab_size")


def settle_task(
    base: Checkpoint, adapters: Sequence[Adapter], changes: Mapping[str, Change]
) -> tuple[dict[str, object], list[str]]:
    """The class and the number of labels, if an adapter brings a head that the base does not have."""
    added = {name: change for name, change in changes.items() if change.base is None and name != HEAD}
    if not added:
        return {}, []
    task = next((str(a.config["task_type"]) for a in adapters if a.config.get("task_type") in _TASK_CLASSES), None)
    settings: dict[str, object] = {}
    notes = [f"New in the output, from an adapter: {', '.join(repr(name) for name in added)}."]
    if task is not None and base.architecture:
        name = _TASK_SUFFIX.sub("", base.architecture) + _TASK_CLASSES[task]
        if name != base.architecture:
            settings["architectures"] = [name]
            notes.append(f"The output is a {name}.")
    labels = _labels(added)
    if labels and task in ("SEQ_CLS", "TOKEN_CLS"):
        known = base.config.get("id2label")
        if not isinstance(known, dict) or len(known) != labels:
            settings["id2label"] = {str(number): f"LABEL_{number}" for number in range(labels)}
            settings["label2id"] = {f"LABEL_{number}": number for number in range(labels)}
    return settings, notes


def _labels(added: Mapping[str, Change]) -> int | None:
    """Rows of the last new matrix: the output features of a classifier."""
    matrices: list[StoredTensor] = [change.start for change in added.values() if len(change.start.shape) == 2]
    return matrices[-1].shape[0] if matrices else None


def with_settings(config: Mapping[str, object], settings: Mapping[str, object]) -> dict[str, object]:
    """A config with settings put where it keeps them: in its text model's part, if that has the key, and at the top."""
    merged = dict(config)
    nested = merged.get("text_config")
    if isinstance(nested, dict):
        merged["text_config"] = nested | {key: value for key, value in settings.items() if key in nested}
        settings = {key: value for key, value in settings.items() if key in config or key not in nested}
    return merged | dict(settings)
