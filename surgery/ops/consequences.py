"""What merged adapters mean beyond the weights: a head that is no longer tied, another vocabulary, another task.

Each function looks at the changes that the adapters make and returns settings for `config.json`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from surgery.adapter import Adapter
from surgery.checkpoint import Checkpoint, StoredTensor
from surgery.errors import MismatchError
from surgery.families import part_of
from surgery.hashing import hash_tensor
from surgery.names import split_parameter
from surgery.ops.directory import HEAD, embedding_of_tied
from surgery.ops.fitting import Change

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
    base: Checkpoint,
    adapters: Sequence[Adapter],
    changes: Mapping[str, Change],
    base_hash: Callable[[StoredTensor], str],
) -> tuple[dict[str, Change], dict[str, object], list[str]]:
    """Keep a tied head tied where both ends change alike, and untie it where only one does.

    An adapter that was trained on the embedding alone, or on the head alone, of a tied model saw the other end
    unchanged; adding it to the one matrix would change both. PEFT's `merge_and_unload` does that, and warns. A tied
    model may store its matrix once or twice. Returns the changes, config settings, and notes.
    """
    tied = embedding_of_tied(base)
    changed = dict(changes)
    if tied is None or not {tied.name, HEAD} & changed.keys():
        return changed, {}, []
    stored = base.tensors.get(HEAD)
    if stored is not None and (stored.shape != tied.shape or base_hash(stored) != base_hash(tied)):
        return changed, {}, []  # the config ties what is not the same
    embedding, head = changed.get(tied.name), changed.get(HEAD)
    if embedding is not None and head is not None and _same(embedding, head):
        if stored is None:
            del changed[HEAD]
        return changed, {}, []
    if embedding is not None and _both_follow(embedding, head, tied, adapters):
        changed.pop(HEAD, None)
        if stored is not None:
            start = stored if embedding.start is tied else embedding.start
            changed[HEAD] = Change(HEAD, stored, start, embedding.rows, embedding.blocks)
        return changed, {}, []
    if head is None:
        assert embedding is not None
        resized = embedding.start.shape != tied.shape
        if stored is None or resized:
            changed[HEAD] = Change(HEAD, stored, embedding.start if resized else tied)
    elif embedding is None and head.start.shape != tied.shape and ".base_layer." in head.start.name:
        changed[tied.name] = Change(tied.name, tied, head.start)  # what the resized embedding was, tied to its head
    note = f"The head was tied to {tied.name!r} and only one of the two changes, so {HEAD!r} is stored on its own."
    return changed, {"tie_word_embeddings": False}, [note]


def _both_follow(embedding: Change, head: Change | None, tied: StoredTensor, adapters: Sequence[Adapter]) -> bool:
    """Whether what changes the embedding changes the head with it: it was trained so, or is loaded by key."""
    if any(adapter.config.get("ensure_weight_tying") for adapter in adapters):
        return True
    module = split_parameter(tied.name)[0]
    wrapped = any(module.endswith(name) for adapter in adapters for name in _modules_to_save(adapter))
    # Stored under its own key a matrix goes into the model itself, and the head follows.
    return head is None and not embedding.blocks and (embedding.start.shape != tied.shape or not wrapped)


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
        if (old is not None and old.shape[0] == _vocabulary(base)) or (old is None and name == HEAD):
            rows[name] = tensor.shape[0]
            resized = resized or tensor.shape[0] != _vocabulary(base)
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


def notes_on(base: Checkpoint, adapters: Sequence[Adapter], changes: Mapping[str, Change]) -> list[str]:
    """What may surprise about these adapters: a weight that part of one ignores, a copy that is not the base's."""
    notes = []
    for adapter in adapters:
        dora = sum(lora.magnitude is not None for lora in adapter.loras)
        whole = len(adapter.saved) + len(adapter.tokens)
        if adapter.weight != 1.0 and dora:
            notes.append(f"The magnitudes of a DoRA have no weight: those of {adapter.label} apply in full.")
        if adapter.weight != 1.0 and whole:
            notes.append(f"What {adapter.label} stores whole ({whole} tensors) has no weight and is taken as it is.")
    for name, change in changes.items():
        copied = change.base is not None and ".base_layer.weight" in change.start.name
        if copied and change.base is not None and change.start.shape == change.base.shape:
            notes.append(
                f"An adapter holds a copy of {name!r} that is not {base.label}'s; it is used. Was it trained "
                "on another base?"
            )
    return notes
