"""The library's verbs: what each command does, as a function that returns the report the command prints.

A checkpoint is given as a path, a Hub id `name/repo[@revision]`, or an open `Checkpoint`; an adapter likewise, with a
weight as `path=0.5` or as a pair. Keywords beyond those named here are the fields of the operation's options
(`ExtractOptions` for `extract`, `MergeOptions` for the others) and the arguments of `run_options`.

Everything is imported when it is used, so that `import surgery` costs next to nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from surgery.errors import OptionError

if TYPE_CHECKING:
    from surgery.adapter import Adapter
    from surgery.checkpoint import Checkpoint
    from surgery.execute import Progress
    from surgery.hub.pull import PullReport
    from surgery.hub.push import PushReport
    from surgery.operation import RunOptions
    from surgery.ops.inspection import AdapterReport, CheckpointReport
    from surgery.ops.lint import LintReport
    from surgery.ops.verify import CompareReport, VerifyReport
    from surgery.reports import CombineReport, ConvertReport, ExtractReport, MergeReport, RestoreReport

    CheckpointLike = str | os.PathLike[str] | Checkpoint
    AdapterLike = str | os.PathLike[str] | tuple[str | os.PathLike[str], float] | Adapter

_RUN_OPTIONS = ("overwrite", "dry_run", "device", "threads", "hash", "progress")


def run_options(
    overwrite: bool = False,
    dry_run: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    hash: bool = True,  # noqa: A002 - the name of the option
    progress: Progress | None = None,
) -> RunOptions:
    """How to run an operation: the keywords that all functions here share.

    Args:
        overwrite: replace an existing output.
        dry_run: plan and check everything, write nothing.
        device: `cpu`, `cuda`, `cuda:N`, or `auto`.
        threads: tensors at a time; one for each processor by default.
        hash: hash every input and output tensor for `surgery.json`.
        progress: told about the bytes as they pass.
    """
    from surgery.execute import NoProgress, Settings, default_threads, resolve_device
    from surgery.operation import RunOptions

    settings = Settings(threads or default_threads(), resolve_device(device), hash, progress or NoProgress())
    return RunOptions(overwrite, dry_run, settings)


def _split(keywords: dict[str, Any]) -> tuple[RunOptions, dict[str, Any]]:
    """Separate the arguments of `run_options` from the fields of an operation's options."""
    run = {name: keywords.pop(name) for name in _RUN_OPTIONS if name in keywords}
    return run_options(**run), keywords


def extract(
    base: CheckpointLike, tuned: CheckpointLike, *, output: str | os.PathLike[str], **keywords: Any
) -> ExtractReport:
    """Write the adapter that takes `base` to `tuned` to the folder `output`.

    Factors on a GPU where there is one, unless `device` says otherwise.
    """
    from surgery.hub.resolve import resolve_checkpoint
    from surgery.ops.extract import ExtractOptions
    from surgery.ops.extract import extract as run_extract

    run, options = _split({"device": "auto", **keywords})
    return run_extract(resolve_checkpoint(base), resolve_checkpoint(tuned), output, ExtractOptions(**options), run)


def restore(
    base: CheckpointLike, adapter: AdapterLike, *, output: str | os.PathLike[str], **keywords: Any
) -> RestoreReport:
    """Write the fine-tune that `adapter` was extracted from, with `exact=True`, to the folder `output`, bit for bit."""
    from surgery.hub.resolve import resolve_adapter, resolve_checkpoint
    from surgery.ops.restore import restore as run_restore

    return run_restore(resolve_checkpoint(base), resolve_adapter(adapter), output, run_options(**keywords))


def merge(base: CheckpointLike, *adapters: AdapterLike, output: str | os.PathLike[str], **keywords: Any) -> MergeReport:
    """Write `base` with `adapters` added, in the order given, to the folder `output`."""
    from surgery.hub.resolve import resolve_adapter, resolve_checkpoint
    from surgery.ops.merge import MergeOptions
    from surgery.ops.merge import merge as run_merge

    run, options = _split(keywords)
    found = [resolve_adapter(adapter) for adapter in adapters]
    return run_merge(resolve_checkpoint(base), found, output, MergeOptions(**options), run)


def subtract(
    merged: CheckpointLike, *adapters: AdapterLike, output: str | os.PathLike[str], **keywords: Any
) -> MergeReport:
    """Write `merged` without `adapters` to the folder `output`; without any, if none is named and it has a record."""
    from surgery.hub.resolve import resolve_adapter, resolve_checkpoint
    from surgery.ops.merge import MergeOptions
    from surgery.ops.subtract import subtract as run_subtract

    run, options = _split(keywords)
    found = [resolve_adapter(adapter) for adapter in adapters]
    return run_subtract(resolve_checkpoint(merged), found, output, MergeOptions(**options), run)


def switch(
    merged: CheckpointLike, old: AdapterLike, new: AdapterLike, *, output: str | os.PathLike[str], **keywords: Any
) -> MergeReport:
    """Write `merged` with `old` taken out and `new` put in to the folder `output`, in one pass."""
    from surgery.hub.resolve import resolve_adapter, resolve_checkpoint
    from surgery.ops.merge import MergeOptions
    from surgery.ops.subtract import switch as run_switch

    run, options = _split(keywords)
    pair = resolve_adapter(old), resolve_adapter(new)
    return run_switch(resolve_checkpoint(merged), *pair, output, MergeOptions(**options), run)


def combine(*adapters: AdapterLike, output: str | os.PathLike[str], **keywords: Any) -> CombineReport:
    """Write one adapter made of `adapters`, each at its weight, to the folder `output`; see `CombineOptions`."""
    from surgery.hub.resolve import resolve_adapter
    from surgery.ops.combine import CombineOptions
    from surgery.ops.combine import combine as run_combine

    run, options = _split(keywords)
    return run_combine([resolve_adapter(adapter) for adapter in adapters], output, CombineOptions(**options), run)


def resize(adapter: AdapterLike, *, output: str | os.PathLike[str], **keywords: Any) -> CombineReport:
    """Write `adapter` at a lower `rank`, or at the least rank that keeps a share of its `energy`, to `output`."""
    from surgery.hub.resolve import resolve_adapter
    from surgery.ops.combine import CombineOptions
    from surgery.ops.combine import resize as run_resize

    run, options = _split(keywords)
    return run_resize(resolve_adapter(adapter), output, CombineOptions(**options), run)


def inspect(path: CheckpointLike | Adapter, *, tensors: bool = False) -> CheckpointReport | AdapterReport:
    """Describe a checkpoint or an adapter from its headers; with `tensors`, list every tensor."""
    from surgery.adapter import Adapter
    from surgery.hub.resolve import resolve
    from surgery.ops.inspection import inspect_adapter, inspect_checkpoint

    found = resolve(path)
    return inspect_adapter(found, tensors) if isinstance(found, Adapter) else inspect_checkpoint(found, tensors)


def verify(
    left: CheckpointLike, right: CheckpointLike | None = None, *, logits: bool = False, seed: int = 0, **keywords: Any
) -> VerifyReport | CompareReport:
    """Check an output against its `surgery.json`, or compare two checkpoints; with `logits`, as functions too."""
    from surgery.adapter import Adapter
    from surgery.hub.resolve import resolve, resolve_checkpoint
    from surgery.ops.verify import compare, verify_output, with_logits

    run, _ = _split(keywords)
    if right is None and logits:
        raise OptionError("--logits compares two checkpoints; name the second.")
    if right is None:
        found = resolve(left)
        return verify_output(found.files if isinstance(found, Adapter) else found, run.settings)
    pair = resolve_checkpoint(left), resolve_checkpoint(right)
    report = compare(*pair, run.settings)
    return with_logits(report, *pair, seed) if logits else report


def convert(
    adapter: str | os.PathLike[str],
    *,
    to: str,
    output: str | os.PathLike[str],
    base: CheckpointLike | None = None,
    **keywords: Any,
) -> ConvertReport:
    """Write `adapter`, in any known format, in the format `to` to the folder `output`.

    `base` is the model it belongs to, or a pipeline's folder; some names cannot be told without it.
    """
    from surgery.hub.resolve import resolve_bases, resolve_folder
    from surgery.ops.convert import ConvertOptions
    from surgery.ops.convert import convert as run_convert

    run, options = _split(keywords)
    place, bases = resolve_folder(adapter), resolve_bases(base)
    return run_convert(place, bases, output, ConvertOptions(to=to, **options), run)


def lint(
    path: str | os.PathLike[str],
    *,
    consumers: str | Sequence[str] = ("peft", "vllm", "llama.cpp"),
    base: CheckpointLike | None = None,
) -> LintReport:
    """Say what each of `consumers` would refuse, or silently get wrong, about the adapter or checkpoint at `path`."""
    from surgery.hub.resolve import resolve_checkpoint, resolve_folder
    from surgery.ops.lint import lint as run_lint

    names = [name.strip() for name in consumers.split(",") if name.strip()] if isinstance(consumers, str) else consumers
    return run_lint(resolve_folder(path), tuple(names), None if base is None else resolve_checkpoint(base))


def push(
    folder: str | os.PathLike[str],
    name: str,
    *,
    endpoint: str | None = None,
    message: str | None = None,
    private: bool = False,
    allow_nonfinite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> PushReport:
    """Check a folder and commit it to `name[@branch]`.

    Args:
        folder: a checkpoint or an adapter on disk; it stays as it is.
        name: the repository, which is made if it is not there, and a branch, `main` by default.
        endpoint: a Hub's address, `hf`, or `local`; by default `HF_ENDPOINT` if it is set, else the local registry.
        message: of the commit.
        private: whether a repository that this push makes is private.
        allow_nonfinite: let NaN and infinity pass.
        dry_run: check everything, write nothing.
        progress: told about the bytes as they pass.
    """
    from surgery.execute import NoProgress
    from surgery.hub.endpoint import for_writing
    from surgery.hub.push import PushOptions
    from surgery.hub.push import push as run_push

    options = PushOptions(
        message=message,
        private=private,
        allow_nonfinite=allow_nonfinite,
        dry_run=dry_run,
        progress=progress or NoProgress(),
    )
    return run_push(folder, name, for_writing(endpoint), options)


def pull(
    name: str,
    *,
    output: str | os.PathLike[str],
    endpoint: str | None = None,
    check_base: CheckpointLike | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> PullReport:
    """Fetch `name[@revision]` into the folder `output`, every file proved by its hash.

    Args:
        name: the repository, and a branch, tag or commit; `main` by default.
        output: the folder; appears whole or not at all.
        endpoint: a Hub's address, `hf`, or `local`; by default the local registry, then `HF_ENDPOINT`.
        check_base: refuse unless hashes prove that the adapter belongs to this checkpoint.
        overwrite: replace a folder that is there.
        dry_run: say what would be fetched, write nothing.
        progress: told about the bytes as they pass.
    """
    from surgery.execute import NoProgress
    from surgery.hub.endpoint import endpoint_of
    from surgery.hub.pull import PullOptions
    from surgery.hub.pull import pull as run_pull
    from surgery.hub.resolve import resolve_checkpoint

    options = PullOptions(
        overwrite=overwrite,
        dry_run=dry_run,
        check_base=None if check_base is None else resolve_checkpoint(check_base),
        progress=progress or NoProgress(),
    )
    return run_pull(name, output, endpoint_of(endpoint), options)
