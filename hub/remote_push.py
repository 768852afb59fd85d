"""Pushing to a Hub, through huggingface_hub: what is checked here is committed there in one commit.

The stock client (2.x) uploads weights through Xet only; a Hub without it needs `HF_HUB_DISABLE_XET=1`. Both are the
client's affair.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from surgery.errors import InputError, OutputError, first_line
from surgery.execute import NoProgress
from surgery.folder import LocalFolder
from surgery.hub.interfaces import FileEntry
from surgery.hub.naming import MAIN, RepositoryName
from surgery.hub.network import network_errors, patiently
from surgery.hub.parcel import CARD, pack, scan
from surgery.hub.push import PushedFile, PushOptions, PushReport, default_message
from surgery.source import BytesSource

# Made by the Hub itself, and kept where a folder has none.
_KEPT = {".gitattributes"}


def push_remote(
    folder: LocalFolder, name: RepositoryName, branch: str, endpoint: str, options: PushOptions
) -> PushReport:
    """Check a folder and commit it to a repository on a Hub, which is made if it is not there."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint)
    try:
        full = str(name) if name.namespace else f"{_user(api, endpoint)}/{name}"
        head, before, created = _head(api, full, branch)
        parcel = pack(folder, full, _card(api, full, head, before))
        entries, facts = scan(parcel, options.allow_nonfinite, options.progress)
        files = _changes(entries, before)
        unchanged = head is not None and all(file.state == "same" for file in files)
        commit = head
        if not options.dry_run and not unchanged:
            commit = _commit(api, full, branch, head, created, parcel.sources, files, facts, options)
    except network_errors() as error:
        raise OutputError(f"{folder.label} cannot be pushed to {name} on {endpoint}: {_reason(error)}.") from error
    except RuntimeError as error:  # the client's word for a file that could not be uploaded
        raise OutputError(f"{folder.label} cannot be pushed to {name} on {endpoint}: {first_line(error)}.") from error
    return PushReport(
        name=full,
        branch=branch,
        endpoint=endpoint,
        commit=None if options.dry_run else commit,
        created=created and not options.dry_run,
        unchanged=unchanged,
        files=files,
        nbytes=parcel.nbytes,
        stored_bytes=None,
        facts=facts,
        card=parcel.card,
        dry_run=options.dry_run,
        notes=parcel.found.notes,
    )


def _user(api: Any, endpoint: str) -> str:
    """The namespace of a name without one, as on the Hub: the user's own."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise InputError(f"You are not logged in to {endpoint}; log in with `surgery hub login`, or set HF_TOKEN.")
    return str(patiently(api.whoami)["name"])


def _head(api: Any, name: str, branch: str) -> tuple[str | None, dict[str, FileEntry], bool]:
    """The newest commit of a branch with its files, and whether the repository has yet to be made."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = patiently(lambda: api.model_info(name, revision=branch, files_metadata=True))
    except RevisionNotFoundError:
        return None, {}, False
    except RepositoryNotFoundError:
        return None, {}, True
    files = {
        item.rfilename: FileEntry(
            item.rfilename,
            item.size or 0,
            item.lfs.sha256 if item.lfs is not None else "",
            item.blob_id or "",
            item.lfs is not None,
        )
        for item in info.siblings or []
    }
    return info.sha, files, False


def _card(api: Any, name: str, head: str | None, before: Mapping[str, FileEntry]) -> str | None:
    if head is None or CARD not in before or before[CARD].size > 1_000_000:
        return None
    path = patiently(lambda: api.hf_hub_download(name, CARD, revision=head))
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return file.read()
    except UnicodeDecodeError:
        return None


def _changes(after: Mapping[str, FileEntry], before: Mapping[str, FileEntry]) -> tuple[PushedFile, ...]:
    """As `push.changes`, by whichever hash the Hub has on record for a file."""
    found = []
    for path in sorted(after.keys() | before.keys()):
        entry, old = after.get(path), before.get(path)
        if entry is None:
            assert old is not None
            if path not in _KEPT and path != CARD:
                found.append(PushedFile(path, old.size, old.sha256, "removed"))
            continue
        same = old is not None and (old.sha256 == entry.sha256 if old.sha256 else old.oid == entry.oid)
        state = "added" if old is None else "same" if same else "changed"
        found.append(PushedFile(path, entry.size, entry.sha256, state))
    return tuple(found)


@contextlib.contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Let the client draw its bars of an upload, or keep it from that."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _commit(
    api: Any,
    name: str,
    branch: str,
    head: str | None,
    created: bool,
    sources: Mapping[str, Any],
    files: tuple[PushedFile, ...],
    facts: Mapping[str, object],
    options: PushOptions,
) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    if created:
        # A name that two pushes make at once is made by one of them.
        patiently(lambda: api.create_repo(name, private=options.private, exist_ok=True))
    if head is None and branch != MAIN:
        patiently(lambda: api.create_branch(name, branch=branch, exist_ok=True))
    operations: list[Any] = []
    for file in files:
        if file.state == "removed":
            operations.append(CommitOperationDelete(file.path))
        elif file.state != "same":
            source = sources[file.path]
            data = source.content if isinstance(source, BytesSource) else str(source.path)
            operations.append(CommitOperationAdd(file.path, data))
    message = options.message or default_message(facts)
    title, _, body = message.partition("\n")
    with _bars(not isinstance(options.progress, NoProgress)):
        done = api.create_commit(
            name, operations, commit_message=title, commit_description=body.strip(), revision=branch, parent_commit=head
        )
    return str(done.oid)


def _reason(error: Exception) -> str:
    """The server's own words where it has any, else the client's first line."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    said = getattr(error, "server_message", None)
    if status == 412:
        return "somebody else has committed meanwhile; run the same command again"
    if status in (401, 403):
        return f"you may not write there ({status}); log in with `surgery hub login`"
    return first_line(Exception(said)) if said else first_line(error)
