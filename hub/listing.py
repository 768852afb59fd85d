"""One repository in detail, and its removal; in the local registry or on a Hub. Lists are in `browsing`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from surgery.errors import InputError, OutputError, first_line
from surgery.hub.endpoint import HUGGING_FACE, Endpoint, configured
from surgery.hub.index import OWNER
from surgery.hub.interfaces import BRANCHES, TAGS
from surgery.hub.naming import parse_repository, parse_target
from surgery.hub.store import Registry, Revision, existing_registry, iterate_history

# Commits that `info` shows.
MOST_COMMITS = 20


@dataclass(frozen=True)
class ListedCommit:
    """One commit of a history. `time` is in seconds since 1970."""

    id: str
    message: str
    time: int


@dataclass(frozen=True)
class ListedFile:
    """One file of a commit. `sha256` is empty where a Hub does not say."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class InfoReport:
    """One repository at one commit.

    Attributes:
        facts: what it is: kind, base, ranks, lineage (`inputs`) and so on.
        branches, tags: name: commit.
        commits: the latest, newest first.
        derived: repositories of this registry whose base, or one of whose inputs, it is.
    """

    name: str
    endpoint: str
    registry: str | None
    commit: str
    private: bool
    facts: Mapping[str, object]
    files: tuple[ListedFile, ...]
    nbytes: int
    branches: Mapping[str, str]
    tags: Mapping[str, str]
    commits: tuple[ListedCommit, ...]
    derived: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class DeleteReport:
    """What `hub delete` removed. `freed` is in bytes; None where a Hub does not say."""

    name: str
    endpoint: str
    freed: int | None

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


# The local registry ---------------------------------------------------------------------------------------------------


def info(target: str, endpoint: Endpoint | None, root: Path | None = None) -> InfoReport:
    """Describe `NAME[@revision]`: in the local registry first, then at the configured endpoint."""
    name, revision = parse_target(target)
    if endpoint is None or endpoint.url is None:
        if (store := existing_registry(root)) is not None:
            with store:
                if store.metadata.find(name) is not None:
                    return _info_local(store, store.find(name, revision))
        if endpoint is not None:
            raise InputError(
                f"There is no model called {name} in the local registry; `surgery hub list` shows what is."
            )
    chosen = endpoint or configured() or Endpoint(HUGGING_FACE)
    assert chosen.url is not None
    return _info_remote(str(name), revision, chosen.url)


def _info_local(store: Registry, found: Revision) -> InfoReport:
    name = found.repository.name
    refs = store.metadata.refs(name)
    edges = store.metadata.edges({name.key}, OWNER, up=False)
    derived = dict.fromkeys(sorted(edge.child.name for edge in edges))
    return InfoReport(
        name=str(name),
        endpoint="local",
        registry=str(store.root),
        commit=found.commit.id,
        private=found.repository.private,
        facts=found.commit.facts,
        files=tuple(ListedFile(entry.path, entry.size, entry.sha256) for entry in found.files),
        nbytes=found.nbytes,
        branches={ref.removeprefix(BRANCHES): at for ref, at in refs.items() if ref.startswith(BRANCHES)},
        tags={ref.removeprefix(TAGS): at for ref, at in refs.items() if ref.startswith(TAGS)},
        commits=tuple(ListedCommit(c.id, c.message, c.time) for c in iterate_history(store, found, MOST_COMMITS)),
        derived=tuple(derived),
    )


def delete(target: str, endpoint: Endpoint, root: Path | None = None) -> DeleteReport:
    """Delete a repository with its whole history."""
    name = parse_repository(target)
    if endpoint.url is not None:
        return _delete_remote(str(name), endpoint.url)
    if (store := existing_registry(root, writable=True)) is not None:
        with store:
            if (found := store.metadata.find(name)) is not None:
                return DeleteReport(str(found.name), "local", store.delete(name))
    raise InputError(f"There is no model called {name} in the local registry; `surgery hub list` shows what is.")


# A Hub ----------------------------------------------------------------------------------------------------------------


def _info_remote(name: str, revision: str | None, url: str) -> InfoReport:
    from huggingface_hub import HfApi

    from surgery.hub.network import network_errors, patiently
    from surgery.hub.remote_pull import HubCommit

    found = HubCommit.find(name, revision, url)
    api = HfApi(endpoint=url)
    try:
        refs = patiently(lambda: api.list_repo_refs(name))
        history: Sequence[Any] = patiently(lambda: api.list_repo_commits(name, revision=found.commit))
    except network_errors() as error:
        raise InputError(f"{url} cannot be reached ({first_line(error)}).") from error
    return InfoReport(
        name=found.name,
        endpoint=url,
        registry=None,
        commit=found.commit,
        private=found.private,
        facts={},
        files=tuple(ListedFile(entry.path, entry.size, entry.sha256) for entry in found.files),
        nbytes=sum(entry.size for entry in found.files),
        branches={ref.name: ref.target_commit for ref in refs.branches},
        tags={ref.name: ref.target_commit for ref in refs.tags},
        commits=tuple(ListedCommit(c.commit_id, c.title, _seconds(c.created_at)) for c in history[:MOST_COMMITS]),
        derived=(),
    )


def _seconds(time: datetime) -> int:
    return int(time.timestamp())


def _delete_remote(name: str, url: str) -> DeleteReport:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    from surgery.hub.network import network_errors, patiently

    api = HfApi(endpoint=url)
    try:
        patiently(lambda: api.delete_repo(name))
    except RepositoryNotFoundError as error:
        raise InputError(f"There is no model called {name} on {url} that you may delete.") from error
    except network_errors() as error:
        raise OutputError(f"{name} cannot be deleted from {url}: {first_line(error)}.") from error
    return DeleteReport(name, url, None)
