"""`hub backup` and `hub restore`: a copy of a registry that is whole at any time, made while a server runs.

A backup is a registry's folder itself: it can be checked, served, and backed up again. Making one goes in this order:

1. A snapshot of `registry.sqlite`, then one of `server.sqlite`, by SQLite's own backup. In this order, since what a
   server has on record of a file is written before the commit that names it.
2. Then content, because all that a snapshot names was stored before it: blobs, xorbs, and those recipes that were there
   before the xorbs were listed. Files go by their hash and never change, so one that is there already is left as it is.
   `hub gc` waits; only `hub delete` may remove something in between, and then a new snapshot is made.
3. When everything that the snapshot names is there and on the disk, the databases take their place. Until then the
   backup is the one before.

A restored registry begins a new epoch: clients forget which chunks they know to be stored, since some may not be.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import sqlite3
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from surgery.errors import InputError, IntegrityError, OutputError
from surgery.execute import NoProgress, Progress
from surgery.hub.checking import KINDS, Damage, FsckOptions, fsck
from surgery.hub.collecting import opened
from surgery.hub.content import LocalContent, disk
from surgery.hub.interfaces import Metadata
from surgery.hub.locking import tidying
from surgery.hub.metadata import SqliteMetadata
from surgery.hub.server.accounts import SqliteAccounts
from surgery.hub.store import BACKUP_MARK
from surgery.hub.xet import hashes
from surgery.source import FileSource
from surgery.writer import copy_range, sync

_REGISTRY, _SERVER = "registry.sqlite", "server.sqlite"
_DATABASES = (_REGISTRY, _SERVER)
_SMALL = ("registry.json", "server.key", "audit*.jsonl")
_ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class BackupOptions:
    """What to back up.

    Attributes:
        data: the registry's folder.
        destination: where to; a folder that is not there, is empty, or has an earlier backup.
        link: make hard links where that is possible: no space is taken, and what damages the one damages the other.
        progress: told about the bytes as they pass.
    """

    data: Path
    destination: Path
    link: bool = False
    progress: Progress = field(default_factory=NoProgress)


@dataclass(frozen=True, kw_only=True)
class RestoreOptions:
    """What to restore: a backup, to a folder that is not there or is empty."""

    source: Path
    data: Path
    link: bool = False
    progress: Progress = field(default_factory=NoProgress)


@dataclass
class CopyReport:
    """What `hub backup` or `hub restore` copied.

    Attributes:
        source, destination: from where to where.
        copied, copied_bytes: files of content that were copied or linked.
        present: files that were there already.
        commits: how many commits the copy has.
    """

    source: str
    destination: str
    copied: int = 0
    copied_bytes: int = 0
    present: int = 0
    commits: int = 0

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def backup(options: BackupOptions) -> CopyReport:
    """Back a registry up, or bring a backup up to date. Raises `InputError` for what is no registry or no place."""
    source, destination = options.data, options.destination
    _check_apart(source, destination)
    _check_replaceable(destination)
    with opened(source, writable=False), tidying(source, shared=True), disk(destination):
        destination.mkdir(parents=True, exist_ok=True)
        # First of all: a run that is killed goes on here, and finds that it may.
        (destination / BACKUP_MARK).write_text(json.dumps({"format": 1}) + "\n")
        with tidying(destination):
            return _copy(source, destination, options.link, options.progress)


def restore(options: RestoreOptions) -> CopyReport:
    """Make a registry from a backup, and check all of it before it is there. Raises `IntegrityError` for a damaged one.

    It is made beside its place, and a run that was killed goes on there.
    """
    source, data = options.source, options.data
    _check_apart(source, data)
    if data.exists() and (not data.is_dir() or any(data.iterdir())):
        raise InputError(f"{data} is not empty; a backup is restored to a new folder.")
    making = data.absolute().with_name(f".{data.absolute().name}.restoring")
    with opened(source, writable=False), tidying(source, shared=True), disk(data):
        making.mkdir(parents=True, exist_ok=True)
        with tidying(making):
            report = _copy(source, making, options.link, options.progress)
            found = fsck(FsckOptions(data=making, progress=options.progress))
            if not found.passed:
                _discard(making, found.damages)
                first = found.damages[0]
                raise IntegrityError(
                    f"The backup at {source} is damaged: {len(found.damages)} problems, the first with the "
                    f"{first.what} {first.name}; `surgery hub fsck --data {source}` names them all."
                )
            if (making / _SERVER).is_file():
                accounts = SqliteAccounts(making / _SERVER)
                accounts.begin_epoch(secrets.token_hex(4))
                accounts.close()
            if data.is_dir():
                data.rmdir()
            os.rename(making, data)
            sync(data.absolute().parent)
    report.destination = str(data)
    return report


def _discard(making: Path, damages: Iterable[Damage]) -> None:
    """Remove what came over damaged, so that the next run copies it anew: by then the backup may have been mended."""
    content = LocalContent(making)
    for damage in damages:
        if damage.what == "blob":
            content.remove_blob(damage.name)
        elif damage.what == "recipe":
            content.remove_recipe(damage.name)
        elif damage.what == "xorb" and (digest := hashes.digest_of(damage.name)) is not None:
            content.remove_xorb(digest)


def _check_replaceable(destination: Path) -> None:
    """Refuse what holds anything but a backup: its databases would be replaced, and with them what they name."""
    if not destination.exists() or (destination / BACKUP_MARK).is_file():
        return
    if not destination.is_dir():
        raise InputError(f"{destination} is no folder; give one that is empty, or is not there.")
    if (destination / "registry.json").is_file():
        raise InputError(
            f"{destination} is a registry, or a backup that was written to since: all that it holds would be replaced. "
            f"Give an empty folder; if that is what is wanted, make an empty file {BACKUP_MARK} in it."
        )
    if any(destination.iterdir()):
        raise InputError(f"{destination} has something in it that is no backup; give an empty folder.")


def _check_apart(source: Path, destination: Path) -> None:
    one, other = source.resolve(), destination.resolve()
    if one.is_relative_to(other) or other.is_relative_to(one):
        raise InputError(f"{destination} and {source} lie in each other; a copy has to lie elsewhere.")


def _copy(source: Path, destination: Path, link: bool, progress: Progress) -> CopyReport:
    """See the module."""
    report = CopyReport(str(source), str(destination))
    LocalContent(destination).clear()
    copier = _Copier(source, destination, link, progress, report)
    for _ in range(_ROUNDS):
        snapshots = [_snapshot(source / name, destination) for name in _DATABASES if (source / name).is_file()]
        try:
            recipes = copier.names("recipes")
            copier.copy([*copier.names("blobs"), *copier.names("xorbs")], recipes)
            report.commits, missing = _missing(snapshots[0], destination)
            if missing:  # a repository was deleted since
                continue
            _take_place(source, destination, snapshots)
        finally:
            for path in snapshots:
                path.unlink(missing_ok=True)
        return report
    raise OutputError(
        f"Content of {source} keeps disappearing, {missing[0]} for one; check it with `surgery hub fsck`."
    )


def _snapshot(path: Path, destination: Path) -> Path:
    """A database as it is at one moment, beside its place."""
    target = destination / f".{path.name}.partial"
    target.unlink(missing_ok=True)
    try:
        with (
            contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=60)) as now,
            contextlib.closing(sqlite3.connect(target)) as copy,
        ):
            now.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")  # so that it is one file
    except sqlite3.Error as error:
        raise OutputError(f"{path} cannot be copied: {error}.") from error
    return target


def _missing(registry: Path, destination: Path) -> tuple[int, list[str]]:
    """How many commits a snapshot has, and which content that they name is not in the copy."""
    content = LocalContent(destination)
    metadata: Metadata = SqliteMetadata(registry, create=False)
    try:
        commits = 0
        trees = set()
        for kind in KINDS:
            for repository in metadata.repositories(kind):
                found = metadata.commits(repository.name, kind)
                commits += len(found)
                trees |= {commit.tree for commit in found}
        sums = {entry.sha256 for tree in trees for entry in metadata.files(tree)}
        return commits, sorted(sha256 for sha256 in sums if not content.has(sha256))
    finally:
        metadata.close()


def _take_place(source: Path, destination: Path, snapshots: Iterable[Path]) -> None:
    """Make everything durable, and then the databases visible."""
    for path in (path for pattern in _SMALL for path in source.glob(pattern)):
        making = destination / f".{path.name}.partial"
        making.unlink(missing_ok=True)
        making.touch(0o600)
        making.write_bytes(path.read_bytes())
        shutil.copymode(path, making)
        os.replace(making, destination / path.name)
    os.sync()
    for path in snapshots:
        target = destination / path.name.removeprefix(".").removesuffix(".partial")
        for journal in ("-wal", "-shm", "-journal"):  # of what is replaced
            target.with_name(target.name + journal).unlink(missing_ok=True)
        shutil.copymode(source / target.name, path)
        sync(path)
        os.replace(path, target)
    sync(destination)


class _Copier:
    """Copies files of content that are not there yet."""

    def __init__(self, source: Path, destination: Path, link: bool, progress: Progress, report: CopyReport) -> None:
        self._source = source
        self._destination = destination
        self._link = link
        self._progress = progress
        self._report = report

    def names(self, kind: str) -> list[str]:
        """The files of a kind that are to be copied, relative to the folder."""
        found = []
        root = self._source / kind
        for folder in sorted(root.iterdir()) if root.is_dir() else ():
            for path in sorted(folder.iterdir()):
                name = str(path.relative_to(self._source))
                if self._is_there(name, path):
                    self._report.present += 1
                else:
                    found.append(name)
        return found

    def _is_there(self, name: str, path: Path) -> bool:
        try:
            return (self._destination / name).stat().st_size == path.stat().st_size
        except FileNotFoundError:
            return False

    def copy(self, *groups: Iterable[str]) -> None:
        """Copy files, one group after the other; those that are gone meanwhile are left out."""
        names = [name for group in groups for name in group]
        self._progress.start(sum(_size(self._source / name) for name in names), "copying")
        (self._destination / "incoming").mkdir(exist_ok=True)
        try:
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    self._copy(self._source / name, self._destination / name)
        finally:
            self._progress.stop()

    def _copy(self, source: Path, target: Path) -> None:
        status = source.stat()
        target.parent.mkdir(parents=True, exist_ok=True)
        making = self._destination / "incoming" / secrets.token_hex(8)
        try:
            if not (self._link and _linked(source, making)):
                self._copy_bytes(source, making)
                os.chmod(making, 0o444)
                os.utime(making, ns=(status.st_atime_ns, status.st_mtime_ns))
            os.replace(making, target)
        finally:
            making.unlink(missing_ok=True)
        self._report.copied += 1
        self._report.copied_bytes += status.st_size
        self._progress.advance(status.st_size)

    def _copy_bytes(self, source: Path, target: Path) -> None:
        """By the kernel, which shares the blocks where the file system can."""
        if not source.exists():
            raise FileNotFoundError(source)
        opened_ = FileSource(source)
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            copy_range(opened_, 0, descriptor, 0, opened_.size)
        finally:
            os.close(descriptor)


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without links
        return False
    return True


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
