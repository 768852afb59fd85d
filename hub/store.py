"""The embedded registry: a folder that holds models and adapters with their history, used by any number of processes.

    <root>/registry.json      the format's version
    <root>/registry.sqlite    repositories, commits, refs (`metadata`)
    <root>/blobs/ab/abcd...   content by SHA-256 (`content`)
    <root>/recipes, xorbs     content that came in as chunks (`surgery.hub.xet`)
    <root>/incoming/          content on its way in
    <root>/snapshots/<tree>/  a commit's files as links into blobs/, made when first read; may be deleted at any time

A commit is in the database whole or not at all, and only after all of its content is on disk. `docs/hub.md` says how a
server uses the same folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from surgery.errors import FormatError, InputError, OutputError
from surgery.folder import LocalFolder
from surgery.hashing import cache_folder
from surgery.hub.content import LocalContent, disk
from surgery.hub.interfaces import (
    BRANCHES,
    PULLS,
    TAGS,
    Commit,
    ConflictError,
    Content,
    FileEntry,
    Metadata,
    Repository,
    full_ref,
)
from surgery.hub.metadata import SqliteMetadata
from surgery.hub.naming import MAIN, RepositoryName, check_branch
from surgery.hub.sqlite_history import encode_tree
from surgery.hub.transfer import pump, write_all
from surgery.source import Source
from surgery.writer import sync

FORMAT = 1
# A file beside registry.json in what `hub backup` wrote and nobody has written to since.
BACKUP_MARK = "backup.json"
# A commit may be called by the first digits of its id, but not by fewer than these.
_LEAST_PREFIX = 7


def registry_path() -> Path:
    """`$SURGERY_REGISTRY`, or `checkpoint-surgery/registry` below `$XDG_DATA_HOME` or `~/.local/share`."""
    if given := os.environ.get("SURGERY_REGISTRY"):
        return Path(given)
    base = os.environ.get("XDG_DATA_HOME") or os.path.join(os.path.expanduser("~"), ".local", "share")
    return Path(base) / "checkpoint-surgery" / "registry"


@dataclass(frozen=True)
class Revision:
    """A commit of a repository, and its files."""

    repository: Repository
    commit: Commit
    files: tuple[FileEntry, ...]

    @property
    def nbytes(self) -> int:
        return sum(entry.size for entry in self.files)


class Registry:
    """Repositories and their commits. `content` and `metadata` do the keeping."""

    def __init__(self, root: Path, content: Content, metadata: Metadata) -> None:
        self.root = root
        self.content = content
        self.metadata = metadata

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the database."""
        self.metadata.close()

    # Reading ----------------------------------------------------------------------------------------------------------

    def find(self, name: RepositoryName, revision: str | None = None, kind: str = "model") -> Revision:
        """A repository at a branch, tag or commit; its `main` by default. Raises `InputError` where there is none."""
        repository = self.metadata.find(name, kind)
        if repository is None:
            raise InputError(f"There is no {kind} called {name} in the registry at {self.root}.")
        commit = self.resolve(repository, revision or MAIN)
        if commit is None:
            at = f"revision {revision!r}" if revision else "commit yet"
            raise InputError(f"{repository.name} in the registry at {self.root} has no {at}.")
        return Revision(repository, commit, tuple(self.metadata.files(commit.tree)))

    def resolve(self, repository: Repository, revision: str) -> Commit | None:
        """The commit that a branch, a tag, a full ref, or the first digits of an id stand for."""
        refs = self.metadata.refs(repository.name, repository.kind)
        target = refs.get(BRANCHES + revision) or refs.get(TAGS + revision) or refs.get(revision)
        if target is not None:
            return next(iter(self.metadata.history(repository.name, target, repository.kind)))
        digits = set(revision) <= set("0123456789abcdef")
        if digits and _LEAST_PREFIX <= len(revision) <= 40:
            return self.metadata.find_commit(repository.name, revision, repository.kind)
        return None

    def head(self, name: RepositoryName, branch: str, kind: str = "model") -> Revision | None:
        """The newest commit of a branch, or None where there is none."""
        repository = self.metadata.find(name, kind)
        if repository is None or (target := self.metadata.refs(name, kind).get(full_ref(branch))) is None:
            return None
        commit = next(iter(self.metadata.history(name, target, kind)))
        return Revision(repository, commit, tuple(self.metadata.files(commit.tree)))

    def snapshot(self, found: Revision) -> Path:
        """A folder with a commit's files, as links to the content: to be read, never to be written to."""
        places = [self.root / "snapshots" / found.commit.tree, cache_folder() / "snapshots" / found.commit.tree]
        for place in places:
            if place.is_dir():
                return place
        failure: OSError | None = None
        for place in places:
            try:
                self._make_snapshot(place, found)
            except OSError as error:  # a registry that this user may only read
                if isinstance(error, OutputError):
                    raise
                failure = error
            else:
                return place
        raise OutputError(f"No links to the files of {found.repository.name} can be made: {failure}.") from failure

    def _make_snapshot(self, place: Path, found: Revision) -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        making = place.with_name(f".{place.name[:16]}-{secrets.token_hex(4)}")
        try:
            for entry in found.files:
                if self.content.size(entry.sha256) is None:
                    raise FormatError(
                        f"The registry at {self.root} has lost the content of {entry.path} of {found.repository.name}; "
                        "push it again, or restore it from a backup."
                    )
                link = making / entry.path
                link.parent.mkdir(parents=True, exist_ok=True)
                blob = self.content.path(entry.sha256)
                if blob is None:  # it lies in xorbs
                    _put_together(self.content.open(entry.sha256), link)
                    continue
                inside = place.is_relative_to(self.root)
                link.symlink_to(os.path.relpath(blob, link.parent) if inside else blob.absolute())
            making.mkdir(exist_ok=True)
            with contextlib.suppress(FileExistsError, OSError):  # another process may have been quicker
                os.rename(making, place)
            if not place.is_dir():
                raise OSError(f"{place} cannot be made")
        finally:
            shutil.rmtree(making, ignore_errors=True)

    def folder(self, found: Revision, label: str) -> RegistryFolder:
        """A commit's files as a folder to open a checkpoint or an adapter in."""
        return RegistryFolder(self.snapshot(found), label, found, self.content)

    # Writing ----------------------------------------------------------------------------------------------------------

    def create(self, name: RepositoryName, private: bool = False) -> Repository:
        """A repository of this name: a new one, or the one there is."""
        found = self.metadata.find(name)
        if found is not None:
            return found
        try:
            return self.metadata.create(name, "model", private, int(time.time()))
        except ConflictError:  # another process was quicker
            return self.metadata.find(name) or self.create(name, private)

    def commit(
        self,
        name: RepositoryName,
        branch: str,
        expected: str | None,
        files: Iterable[FileEntry],
        message: str,
        facts: Mapping[str, object],
        kind: str = "model",
    ) -> Commit:
        """Commit a whole tree on top of `expected`, where the branch has to be; it may also be a `refs/pr/N`.

        A new branch of a repository that has others begins with this commit: its parent is None.
        """
        if not branch.startswith(PULLS):
            check_branch(branch)
        ordered = sorted(files)
        tree = tree_id(ordered)
        now = int(time.time())
        commit = Commit(commit_id(tree, expected, message, now), expected, tree, message, now, facts)
        self.metadata.commit(name, branch, expected, commit, ordered, self._missing, kind)
        return commit

    def squash(self, name: RepositoryName, branch: str, message: str, kind: str = "model") -> Commit | None:
        """Make the newest commit of a branch its only one. Others stay where another ref leads to them.

        Returns the new commit, or None where there is no such branch. Raises `ConflictError` where the branch moves.
        """
        head = self.head(name, branch, kind)
        if head is None:
            return None
        tree, now = head.commit.tree, int(time.time())
        commit = Commit(commit_id(tree, None, message, now), None, tree, message, now, head.commit.facts)
        self.metadata.commit(name, branch, head.commit.id, commit, head.files, self._missing, kind)
        self.metadata.prune(name, kind)
        self._clear_snapshots()
        return commit

    def drop(
        self,
        name: RepositoryName,
        kind: str,
        contents: Collection[str],
        facts: Callable[[Sequence[FileEntry]], Mapping[str, object]],
    ) -> int:
        """Take content out of every commit of a repository, which gives new ids to all from the first that had it on.

        Args:
            name: of the repository.
            kind: `model` or `dataset`.
            contents: SHA-256 sums.
            facts: what the files of a commit are.

        Returns:
            Bytes freed: of what no other repository has.
        """

        def change(
            commit: Commit, files: Sequence[FileEntry], parent: str | None
        ) -> tuple[Commit, Sequence[FileEntry]]:
            kept = [entry for entry in files if entry.sha256 not in contents]
            if len(kept) == len(files) and parent == commit.parent:
                return commit, files
            known = commit.facts if len(kept) == len(files) else facts(kept)
            tree = tree_id(kept)
            identity = commit_id(tree, parent, commit.message, commit.time)
            return Commit(identity, parent, tree, commit.message, commit.time, known), kept

        freed = self._sweep(set(self.metadata.rewrite(name, kind, change)) & set(contents))
        self._clear_snapshots()
        return freed

    def _missing(self, digests: Collection[str]) -> list[str]:
        return [sha256 for sha256 in digests if self.content.size(sha256) is None]

    def delete(self, name: RepositoryName, kind: str = "model") -> int:
        """Forget a repository with its history, and remove the content that no other one has. Returns bytes freed."""
        candidates = self.metadata.delete(name, kind)
        freed = self._sweep(candidates)
        self._clear_snapshots()
        return freed

    def _sweep(self, candidates: Iterable[str]) -> int:
        freed = 0

        def remove(sha256: str) -> bool:
            nonlocal freed
            freed += self.content.stored(sha256)
            self.content.remove(sha256)
            return True

        with disk(self.root):
            self.metadata.sweep(candidates, remove)
        return freed

    def _clear_snapshots(self) -> None:
        known = self.metadata.trees()
        folder = self.root / "snapshots"
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name not in known and not path.name.startswith("."):
                shutil.rmtree(path, ignore_errors=True)


class RegistryFolder(LocalFolder):
    """A commit of a local registry, read in place. Goes by the name of its repository."""

    def __init__(self, path: Path, label: str, found: Revision, content: Content) -> None:
        super().__init__(path)
        self._label = label
        self._found = found
        self._content = content

    @property
    def label(self) -> str:
        return self._label

    @property
    def provenance(self) -> Mapping[str, str]:
        return {"source": str(self._found.repository.name), "revision": self._found.commit.id}

    def stays_inside(self, name: str) -> bool:  # noqa: ARG002 - every link is like every other
        # Every link was made here, to the content of this registry.
        return True


def _put_together(source: Source, path: Path) -> None:
    with open(path, "xb", buffering=0) as file:
        pump(source, [partial(write_all, file.fileno())], lambda _: None)
        os.fchmod(file.fileno(), 0o444)


def tree_id(files: Sequence[FileEntry]) -> str:
    """SHA-256 of the list of files."""
    return hashlib.sha256(encode_tree(files).encode()).hexdigest()


def commit_id(tree: str, parent: str | None, message: str, seconds: int) -> str:
    """The first 40 hex digits (what the Hub's client takes for a commit) of the SHA-256 of what a commit is."""
    text = json.dumps({"message": message, "parent": parent, "time": seconds, "tree": tree}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def open_registry(root: Path | None = None) -> Registry:
    """Open the registry at `root` (by default the user's), and make it if it is not there."""
    root = registry_path() if root is None else root
    with disk(root):
        root.mkdir(parents=True, exist_ok=True)
        if not (root / "registry.json").exists():
            _write_format(root)
    _check_format(root)
    content = LocalContent(root)
    _check_database(root, content)
    content.clear()
    # Written to from now on, it is no copy any more that a backup may replace.
    with disk(root):
        (root / BACKUP_MARK).unlink(missing_ok=True)
    return Registry(root, content, SqliteMetadata(root / "registry.sqlite"))


def existing_registry(root: Path | None = None, writable: bool = False) -> Registry | None:
    """The registry at `root`, or None where there is none; to read from, unless it is to be `writable`."""
    root = registry_path() if root is None else root
    if not (root / "registry.sqlite").is_file():
        return None
    _check_format(root)
    content = LocalContent(root)
    _check_database(root, content)
    return Registry(root, content, SqliteMetadata(root / "registry.sqlite", writable))


def _write_format(root: Path) -> None:
    """Whole or not at all; of two processes that make one registry, either's file will do."""
    making = root / f".registry-{secrets.token_hex(4)}"
    making.write_text(json.dumps({"format": FORMAT}) + "\n")
    os.replace(making, root / "registry.json")
    sync(root)


def _check_format(root: Path) -> None:
    try:
        content = json.loads((root / "registry.json").read_bytes())
        found = content.get("format") if isinstance(content, dict) else None
    except (OSError, ValueError) as error:
        raise FormatError(f"{root} is not a registry: its registry.json cannot be read ({error}).") from error
    if found != FORMAT:
        raise FormatError(
            f"{root} is a registry of format {found!r}, expected {FORMAT}; use the version of this tool that made it."
        )


def _check_database(root: Path, content: Content) -> None:
    """Refuse to begin anew above content whose database was lost: a collection would then remove all of it.

    Content comes only after a database that has its schema, so whoever makes a registry is never refused.
    """
    path = root / "registry.sqlite"
    with disk(root):
        if path.is_file() and path.stat().st_size > 0:
            return
        if next(iter(content.list()), None) is not None or next(iter(content.xorbs()), None) is not None:
            raise FormatError(
                f"{root} keeps content, and its registry.sqlite, which says what it is, is empty or gone; restore that "
                "from a backup."
            )


def iterate_history(registry: Registry, found: Revision, limit: int) -> Iterator[Commit]:
    """The latest commits, newest first, at most `limit`."""
    for number, commit in enumerate(registry.metadata.history(found.repository.name, found.commit.id)):
        if number >= limit:
            return
        yield commit
