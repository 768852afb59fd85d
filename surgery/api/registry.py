"""The verbs of registries: push and pull."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from surgery.api.calling import CheckpointLike
    from surgery.execute import Progress
    from surgery.hub.pull import PullReport
    from surgery.hub.push import PushReport


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
