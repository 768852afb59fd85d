"""Whether several dense checkpoints are fine-tunes of one model, so that they can give one mixture its experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from surgery.checkpoint import Checkpoint
from surgery.errors import MismatchError, several
from surgery.folder import read_json
from surgery.hashing import hash_tensor
from surgery.names import plain
from surgery.source import Source, read_bytes
from surgery.upcycling.dense_defaults import with_both_spellings, with_defaults

# Settings without which equal shapes mean different functions, as different classes and releases spell them.
_DECIDING = (
    "num_attention_heads", "num_key_value_heads", "head_dim", "n_head", "num_heads", "d_kv", "hidden_act",
    "hidden_activation", "activation_function", "feed_forward_proj", "vocab_size",
)  # fmt: skip
# Those that fine-tunes may well differ in; the mixture has the dense checkpoint's.
_NOTED = (
    "rope_parameters", "rms_norm_eps", "layer_norm_eps", "sliding_window",
    "max_position_embeddings", "tie_word_embeddings",
)  # fmt: skip


def check_kin(dense: Checkpoint, models: Sequence[Checkpoint]) -> None:
    """Raise `MismatchError` with every difference of every model that the mixture cannot bridge."""
    problems = [problem for model in models for problem in _differences(dense, model)]
    if problems:
        raise MismatchError(several(f"making experts for {dense.label}", problems), problems)


def _differences(dense: Checkpoint, model: Checkpoint) -> Iterator[str]:
    if model.model_type != dense.model_type:
        yield (
            f"{model.label} is of type {plain(model.model_type or 'unknown')!r}, expected {plain(dense.model_type)!r} "
            f"as {dense.label} is."
        )
        return
    ours, theirs = _settings(dense), _settings(model)
    for setting in _DECIDING:
        if ours.get(setting) != theirs.get(setting):
            yield (
                f"{model.label} has {setting} {theirs.get(setting)!r}, expected {ours.get(setting)!r} as in "
                f"{dense.label}."
            )
    for name in dense.tensors:
        if name not in model.tensors:
            yield f"{model.label} has no tensor {name!r}, which {dense.label} has."
    for name, tensor in model.tensors.items():
        own = dense.tensors.get(name)
        if own is None:
            yield f"{model.label} has the tensor {name!r}, which {dense.label} has not."
        elif tensor.shape != own.shape:
            yield f"{model.label} has {name!r} of shape {list(tensor.shape)}, expected {list(own.shape)}."
        elif tensor.dtype.arithmetic != own.dtype.arithmetic:
            yield f"{model.label} has {name!r} as {tensor.dtype}, expected {own.dtype}."
        elif not own.dtype.arithmetic and (tensor.dtype is not own.dtype or hash_tensor(tensor) != hash_tensor(own)):
            yield f"{model.label} has other values in {name!r} ({tensor.dtype}), which have no mean."
    for file, reading in (("tokenizer.json", _vocabulary), ("vocab.json", read_json), ("vocab.txt", _text)):
        both = _brings_files(dense, model) and all(file in item.folder.names() for item in (dense, model))
        if both and reading(dense.folder.open(file)) != reading(model.folder.open(file)):
            yield f"{model.label} has another vocabulary than {dense.label} in {file}."


def _settings(checkpoint: Checkpoint) -> dict[str, object]:
    """A config with everything said, in one spelling."""
    config = with_defaults(checkpoint.config, checkpoint.model_type)
    return with_both_spellings(config) if "rope_theta" in config or "rope_parameters" in config else config


def _brings_files(*checkpoints: Checkpoint) -> bool:
    """Whether what lies beside the weights belongs to them: a lone file brings only itself."""
    return all(checkpoint.path is None or checkpoint.path.is_dir() for checkpoint in checkpoints)


def _vocabulary(source: Source) -> object:
    """The tokens and their numbers; what was added for a chat template may differ."""
    model = read_json(source).get("model")
    return model.get("vocab") if isinstance(model, dict) else None


def _text(source: Source) -> bytes:
    return read_bytes(source, 0, source.size)


def settings_apart(dense: Checkpoint, models: Sequence[Checkpoint]) -> tuple[str, ...]:
    """A sentence for each setting that a model was trained with and the mixture will not have."""
    ours = _settings(dense)
    found = []
    for model in models:
        theirs = _settings(model)
        name = model.provenance.get("source", model.label)
        found += [
            f"{name} has {setting} {theirs.get(setting)!r}; the mixture has {ours.get(setting)!r}, as the dense "
            "checkpoint."
            for setting in _NOTED
            if theirs.get(setting) != ours.get(setting)
        ]
    return tuple(found)
