"""What all verbs share: what a checkpoint and an adapter may be given as, and how keywords become options."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, Unpack

from surgery.errors import OptionError
from surgery.keywords import RunKeywords

if TYPE_CHECKING:
    from surgery.adapter import Adapter
    from surgery.checkpoint import Checkpoint
    from surgery.operation import RunOptions
    from surgery.reports import Report

    CheckpointLike = str | os.PathLike[str] | Checkpoint
    AdapterLike = str | os.PathLike[str] | tuple[str | os.PathLike[str], float] | Adapter


def run_options(**keywords: Unpack[RunKeywords]) -> RunOptions:
    """How to run an operation: the keywords that all functions share which write."""
    from surgery.execute import NoProgress, Settings, default_threads, resolve_device
    from surgery.operation import RunOptions

    threads = keywords.get("threads")
    if threads is not None and threads < 1:
        raise OptionError(f"--threads is {threads}, expected at least 1.")
    settings = Settings(
        threads=threads or default_threads(),
        device=resolve_device(keywords.get("device", "cpu")),
        hash=keywords.get("hash", True),
        progress=keywords.get("progress") or NoProgress(),
    )
    return RunOptions(keywords.get("overwrite", False), keywords.get("dry_run", False), settings)


def split(keywords: Mapping[str, Any]) -> tuple[RunOptions, dict[str, Any]]:
    """Separate how to run (`RunKeywords`) from the fields of an operation's options."""
    run = {name: value for name, value in keywords.items() if name in RunKeywords.__optional_keys__}
    return run_options(**run), {name: value for name, value in keywords.items() if name not in run}


def check_keywords(verb: str, keywords: Mapping[str, object], known: type) -> None:
    """Raise `TypeError` for a keyword that a verb does not have, naming those that it has."""
    names = sorted(known.__optional_keys__)  # type: ignore[attr-defined]  # every TypedDict has it
    for name in keywords:
        if name not in names:
            from difflib import get_close_matches

            near = "".join(f" Did you mean {match!r}?" for match in get_close_matches(name, names, 1))
            raise TypeError(f"{verb}() has no keyword {name!r}.{near} It takes {', '.join(names)}.")


Arguments = ParamSpec("Arguments")
Made = TypeVar("Made", bound="Report")


def counted(verb: Callable[Arguments, Made]) -> Callable[Arguments, Made]:
    """A verb whose report says what came over the network."""

    @functools.wraps(verb)
    def run(*arguments: Arguments.args, **keywords: Arguments.kwargs) -> Made:
        from surgery.hub.traffic import counting, summary

        with counting() as remotes:
            report = verb(*arguments, **keywords)
        return replace(report, fetched=summary(remotes)) if remotes else report

    return run


def resolved(
    role: str, checkpoint: CheckpointLike, adapters: Sequence[AdapterLike]
) -> tuple[Checkpoint, list[Adapter]]:
    """Open a checkpoint, which the command line calls `role`, and adapters."""
    from surgery.adapter import Adapter, refuse_virtual_tokens
    from surgery.checkpoint import Checkpoint
    from surgery.errors import InputError
    from surgery.hub.resolve import is_adapter, resolve_adapter, resolve_checkpoint

    try:
        found = [resolve_adapter(adapter) for adapter in adapters]
    except InputError as error:
        if not isinstance(checkpoint, Checkpoint | Adapter) and is_adapter(checkpoint):
            raise InputError(
                f"{os.fspath(checkpoint)} is an adapter; {role} comes first; did you swap them?"
            ) from error
        raise
    for adapter in found:
        refuse_virtual_tokens(adapter)
    return resolve_checkpoint(checkpoint), found
