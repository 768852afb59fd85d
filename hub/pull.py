"""`pull NAME[@revision] -o DIR`: the files of a commit, each proved by its hash, as a folder that appears whole.

A pull that is killed goes on where it stopped, within a file too: what is there is hashed again and the rest is
fetched. With `--check-base` the adapter is held against a base before the folder appears.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from surgery.belonging import Belonging, judge, recorded_hashes
from surgery.checkpoint import Checkpoint
from surgery.errors import InputError, IntegrityError, MismatchError, OptionError
from surgery.execute import NoProgress, Progress
from surgery.hashing import HashBook
from surgery.hub.endpoint import LOCAL, Endpoint, configured
from surgery.hub.interfaces import Content, FileEntry
from surgery.hub.naming import RepositoryName, check_paths, parse_target
from surgery.hub.store import existing_registry
from surgery.hub.transfer import git_blob, pump, reserve, write_all
from surgery.provenance import read_provenance
from surgery.source import FileSource, Source
from surgery.writer import Staging, check_target, disk_errors, open_staging, sync

if TYPE_CHECKING:
    from surgery.adapter import Adapter


@dataclass(frozen=True, kw_only=True)
class PullOptions:
    """How to pull.

    Attributes:
        overwrite: replace a folder that is there.
        dry_run: say what would be fetched, write nothing.
        check_base: a checkpoint that the adapter has to belong to.
        progress: told about the bytes as they pass.
    """

    overwrite: bool = False
    dry_run: bool = False
    check_base: Checkpoint | None = None
    progress: Progress = field(default_factory=NoProgress)


@dataclass(frozen=True)
class PullReport:
    """What `pull` did.

    Attributes:
        name: the repository.
        endpoint: where it is: `local`, or an address.
        commit: what was pulled.
        output: the folder, as given.
        files: names of all files.
        nbytes: size of all files.
        resumed: how many files an interrupted pull had fetched before.
        base: with `--check-base`, what was compared; else null.
        dry_run: whether nothing was written.
    """

    name: str
    endpoint: str
    commit: str
    output: str
    files: tuple[str, ...]
    nbytes: int
    resumed: int
    base: BaseCheck | None
    dry_run: bool

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class BaseCheck:
    """The base an adapter was held against: `equal` of its changed tensors have the hash on record."""

    label: str
    equal: int
    proved: bool


class Remote(Protocol):
    """A commit to pull from: the local registry's, or a Hub's."""

    @property
    def name(self) -> str: ...
    @property
    def commit(self) -> str: ...
    @property
    def endpoint(self) -> str: ...
    @property
    def files(self) -> Sequence[FileEntry]: ...
    def open(self, entry: FileEntry) -> Source: ...


@dataclass(frozen=True)
class _Local:
    """A commit in the local registry."""

    name: str
    commit: str
    files: Sequence[FileEntry]
    content: Content
    endpoint: str = "local"

    def open(self, entry: FileEntry) -> Source:
        return self.content.open(entry.sha256)


def pull(
    source: str,
    output: str | os.PathLike[str],
    endpoint: Endpoint | None,
    options: PullOptions,
    registry: Path | None = None,
) -> PullReport:
    """Pull `NAME[@revision]` to the folder `output`.

    Looks in the local registry first and then at the configured endpoint, unless `endpoint` says where.
    """
    name, revision = parse_target(source)
    target = Path(output)
    check_target(target, [], options.overwrite)
    remote = find_remote(name, revision, endpoint, registry)
    check_paths([entry.path for entry in remote.files], f"{remote.name} at {remote.commit}")
    nbytes = sum(entry.size for entry in remote.files)
    names = tuple(entry.path for entry in remote.files)
    base, resumed = None, 0
    if not options.dry_run:
        work = hashlib.sha256(repr((remote.endpoint, remote.name, remote.commit, sorted(remote.files))).encode())
        with open_staging(target, work.hexdigest()) as staging:
            staging.check_space(nbytes)
            resumed = _fetch_all(remote, staging, options.progress, nbytes)
            if options.check_base is not None:
                base = check_base(staging.files, remote.name, options.check_base)
            staging.commit(options.overwrite)
    return PullReport(
        name=remote.name,
        endpoint=remote.endpoint,
        commit=remote.commit,
        output=str(output),
        files=names,
        nbytes=nbytes,
        resumed=resumed,
        base=base,
        dry_run=options.dry_run,
    )


def find_remote(
    name: RepositoryName, revision: str | None, endpoint: Endpoint | None, registry: Path | None = None
) -> Remote:
    """Where a repository is: in the local registry, else at the configured endpoint; or only where `endpoint` says."""
    if endpoint is None or endpoint.url is None:
        if (local := _find_local(name, revision, registry)) is not None:
            return local
        if endpoint == LOCAL:
            raise InputError(
                f"There is no model called {name} in the local registry; `surgery hub list` shows what is."
            )
    from surgery.hub.endpoint import HUGGING_FACE
    from surgery.hub.remote_pull import HubCommit

    chosen = endpoint or configured() or Endpoint(HUGGING_FACE)
    assert chosen.url is not None
    return HubCommit.find(str(name), revision, chosen.url)


def _find_local(name: RepositoryName, revision: str | None, registry: Path | None) -> _Local | None:
    store = existing_registry(registry)
    if store is None:
        return None
    with store:
        if store.metadata.find(name) is None:
            return None
        found = store.find(name, revision)
    lost = [entry.path for entry in found.files if store.content.size(entry.sha256) is None]
    if lost:
        raise IntegrityError(
            f"The registry at {store.root} has lost the content of {lost[0]} of {found.repository.name}; push it "
            "again, or restore it from a backup."
        )
    return _Local(str(found.repository.name), found.commit.id, found.files, store.content)


def _fetch_all(remote: Remote, staging: Staging, progress: Progress, nbytes: int) -> int:
    """Every file that is not there yet. Returns how many were."""
    resumed = 0
    progress.start(nbytes, "pulling")
    try:
        # Files reach the disk while others are fetched; the writer syncs all of them again before it renames.
        with ThreadPoolExecutor(1, thread_name_prefix="sync") as pool:
            for entry in remote.files:
                target = staging.files / entry.path
                if entry.path in staging.done and target.is_file() and target.stat().st_size == entry.size:
                    progress.advance(entry.size)
                    resumed += 1
                    continue
                with disk_errors(staging.target):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    _fetch(remote, entry, target, progress)
                staging.record(entry.path, {})
                pool.submit(sync, target)
    finally:
        progress.stop()
    return resumed


def _fetch(remote: Remote, entry: FileEntry, target: Path, progress: Progress) -> None:
    source = remote.open(entry)
    if source.size != entry.size:
        raise IntegrityError(f"{source.name} has {source.size} bytes, expected {entry.size}.")
    begin = target.stat().st_size if target.is_file() else 0
    if begin > entry.size or begin == 0:
        begin = 0
    if _transfer(source, entry, target, begin, progress):
        return
    # What an earlier run left may not be what it was: from the start, then.
    if begin and _transfer(source, entry, target, 0, NoProgress()):
        return
    target.unlink(missing_ok=True)
    raise IntegrityError(
        f"{entry.path} of {remote.name} does not have the hash on record: it was damaged on the way, or where it is "
        "kept; nothing is written."
    )


def _transfer(source: Source, entry: FileEntry, target: Path, begin: int, progress: Progress) -> bool:
    """Append bytes from `begin` to a file; whether the whole then has the right hash."""
    hasher = hashlib.sha256() if entry.sha256 else git_blob(entry.size)
    descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        os.ftruncate(descriptor, begin)
        if begin:
            pump(FileSource(target), [hasher.update], progress.advance)
        os.lseek(descriptor, begin, os.SEEK_SET)
        reserve(descriptor, entry.size)

        pump(source, [hasher.update, partial(write_all, descriptor)], progress.advance, begin)
    finally:
        os.close(descriptor)
    return hasher.hexdigest() == (entry.sha256 or entry.oid)


# The base -------------------------------------------------------------------------------------------------------------


def check_base(folder: Path, name: str, base: Checkpoint) -> BaseCheck:
    """Prove by hashes that an adapter belongs to a base. Raises `MismatchError` unless it does."""
    from surgery.adapter import open_adapter

    if not (folder / "adapter_config.json").is_file():
        raise OptionError(f"--check-base is for adapters, and {name} is none.")
    adapter = open_adapter(folder)
    found = belonging(base, adapter)
    if found.refuted:
        raise MismatchError(
            f"{name} does not belong to {base.label}: {len(found.different)} of the tensors that it changes, "
            f"{found.different[0]!r} first, are not those of its base {found.source}."
        )
    if not found.proved:
        raise MismatchError(
            f"Nobody can tell whether {name} belongs to {base.label}: its surgery.json has no hash on record for "
            f"{len(found.unknown)} of the tensors that it changes."
        )
    return BaseCheck(base.label, len(found.equal), found.proved)


def belonging(base: Checkpoint, adapter: Adapter) -> Belonging:
    """Hold the tensors of `base` that `adapter` changes against what its `surgery.json` has on record of its base."""
    from surgery.ops.fitting import fit

    recorded, source = recorded_hashes(read_provenance(adapter.files.folder), "base")
    changed = [name for name, change in fit(base, [adapter]).items() if change.base is not None]
    hashes = HashBook(remember=False)  # a proof rests on bytes that were read for it
    return judge(recorded, changed, lambda name: hashes.require(base.tensors[name]), source)
