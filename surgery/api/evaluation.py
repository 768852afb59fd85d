"""The verbs that evaluate, and the batches of many adapters that they are built on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from surgery.api.calling import check_keywords
from surgery.errors import InputError
from surgery.keywords import EvaluateKeywords

if TYPE_CHECKING:
    from surgery.adapter import Adapter
    from surgery.api.calling import AdapterLike, CheckpointLike
    from surgery.evaluation.mixed import MixedAdapters
    from surgery.evaluation.report import EvalReport, VerdictsReport
    from surgery.evaluation.sources import AdapterSource


def evaluate(
    checkpoint: CheckpointLike,
    *,
    data: str | os.PathLike[str],
    adapters: Sequence[AdapterLike] = (),
    against: CheckpointLike | Adapter | Sequence[CheckpointLike | Adapter] = (),
    **keywords: Unpack[EvaluateKeywords],
) -> EvalReport:
    """Evaluate `checkpoint` on `data`, and `adapters` on it: all that can in one pass over the frozen base.

    Args:
        checkpoint: the model, a folder.
        data: a file, a folder, or a data set on the Hub, `name/repo[:split]`.
        adapters: every row is evaluated under the base and under each of them, unless rows name their own.
        against: other checkpoints, or more adapters on this one: a line of the report each, and a single one is the
            other side of `pairwise`.
        **keywords:
            task: one of `TASKS`; told from checkpoint and data where it is None.
            adapter_field: the column that names each row's adapter; where it is None, `adapter` if there is one, and
                where it is empty, none.
            loss: `auto` for figures of what the model is to say (completions, the assistant's turns), `all` for all.
            tokenizer: a folder or id to take the tokenizer from, instead of the checkpoint.
            chat_template: a Jinja file instead of the tokenizer's template.
            end_token: ends each completion and each text, instead of the tokenizer's end token.
            max_length: tokens of an example at most; what the model can take, and at most 2048, where it is None.
            over_length: what becomes of longer ones: `error`, `truncate`, `skip`, or for plain text `split`.
            batch_size: rows of a forward pass.
            precision: `fp32`, `bf16` or `fp16`, of weights and arithmetic; `auto` is bf16 on a GPU that has it.
            max_new_tokens: of an answer.
            temperature: of drawing tokens; 0 takes the likeliest.
            seed: of drawing tokens, and of the order within pairs.
            output: a file for the report as JSON.
            generate: a file for answers, JSONL; their figures go into the report.
            pairwise: a file for blinded pairs of answers, JSONL, for a judge; needs `against`.
            key: the file that says whose answers those are; `NAME.key.json` beside `pairwise` where it is None.
            overwrite: replace files that exist.
            dry_run: look at data, models and adapters, evaluate nothing.
            device: `cpu`, `cuda`, `cuda:N`, or `auto` (the default): a GPU where there is one.
            progress: told about rows and answers as they are done.
    """
    from surgery.adapter import Adapter
    from surgery.checkpoint import Checkpoint
    from surgery.evaluation.options import EvalOptions, EvalSettings
    from surgery.evaluation.run import evaluate as run_evaluate
    from surgery.execute import NoProgress
    from surgery.hub.resolve import resolve_checkpoint, stored

    check_keywords("evaluate", keywords, EvaluateKeywords)
    given: dict[str, Any] = dict(keywords)
    paths = ("output", "generate", "pairwise", "key")
    run: dict[str, Any] = {name: given.pop(name) for name in ("overwrite", "dry_run", "device") if name in given}
    run |= {name: Path(path) for name in paths if (path := given.pop(name, None)) is not None}
    settings = EvalSettings(progress=given.pop("progress", None) or NoProgress(), **run)
    options = EvalOptions(data=os.fspath(data), **given)
    if _is_adapter(checkpoint):
        raise InputError(
            f"{checkpoint} is an adapter, and its base comes first: `surgery eval BASE --adapters {checkpoint} ...`."
        )
    sources = [_adapter_source(adapter) for adapter in adapters]
    several = (against,) if isinstance(against, str | os.PathLike | Checkpoint | Adapter) else against
    others = [
        stored(resolve_checkpoint(one))
        if isinstance(one, Checkpoint) or not (isinstance(one, Adapter) or _is_adapter(one))
        else _adapter_source(one)
        for one in several
    ]
    return run_evaluate(stored(resolve_checkpoint(checkpoint)), options, sources, others, settings)


def verdicts(file: str | os.PathLike[str], *, key: str | os.PathLike[str]) -> VerdictsReport:
    """Count a judge's verdicts on the pairs that `evaluate(pairwise=...)` wrote: won, tied and lost, with intervals.

    Args:
        file: JSONL with `id` and `verdict` (`a`, `b` or `tie`); the file of pairs itself will do, filled in.
        key: written beside the pairs.
    """
    from surgery.evaluation.pairs import read_verdicts

    return read_verdicts(Path(file), Path(key))


def mixed_adapters(model: Any, adapters: Sequence[AdapterLike], names: Sequence[str] | None = None) -> MixedAdapters:
    """Lay LoRA adapters on a transformers model, so that each row of a batch has its own, or none.

    >>> with surgery.mixed_adapters(model, ["a", "b"]) as mixed, mixed.rows(["a", None, "b"]):  # doctest: +SKIP
    ...     model.generate(**batch)

    Args:
        model: the base, on its device and in its dtype.
        adapters: for it.
        names: what `rows` calls them; the names of their folders by default.
    """
    from surgery.evaluation.mixed import MixedAdapters
    from surgery.hub.resolve import resolve_adapter

    return MixedAdapters(model, [resolve_adapter(adapter) for adapter in adapters], names)


def _adapter_source(reference: AdapterLike) -> AdapterSource:
    """An adapter of any kind, as `evaluate` takes it."""
    from surgery.adapter import Adapter, read_adapter
    from surgery.evaluation.sources import AdapterSource
    from surgery.hub.resolve import adapter_on_disk, resolve_adapter, split_weight

    if isinstance(reference, Adapter):
        return AdapterSource.of(reference.label, reference.weight, lambda: reference)
    name, weight = reference if isinstance(reference, tuple) else split_weight(reference)
    if (folder := adapter_on_disk(name)) is not None:
        return AdapterSource.of(os.fspath(name), weight, lambda: read_adapter(folder, weight), folder.path)
    return AdapterSource.of(os.fspath(name), weight, lambda: resolve_adapter((name, weight)))


def _is_adapter(reference: object) -> bool:
    """Whether a path or id means an adapter of any kind, those of our own methods too."""
    from surgery.hub.resolve import is_adapter, split_weight
    from surgery.training.starting import holds_method

    if not isinstance(reference, str | os.PathLike):
        return False
    name = split_weight(reference)[0]
    return holds_method(Path(name)) or is_adapter(name)
