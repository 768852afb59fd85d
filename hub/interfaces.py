"""What a registry is made of, and the two narrow interfaces behind which it lies.

`Content` keeps bytes by their SHA-256. `Metadata` keeps repositories, commits and refs. A registry (`store.Registry`)
uses both and knows nothing else of how they are kept: the embedded registry has a local folder for the one and SQLite
for the other, and a server may put an object store and PostgreSQL there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from surgery.errors import InputError, OutputError
from surgery.hub.index import Index
from surgery.hub.naming import RepositoryName
from surgery.hub.xet.recipes import Recipe, StoredXorb
from surgery.hub.xet.xorbs import XorbIndex
from surgery.source import Source

BRANCHES = "refs/heads/"
TAGS = "refs/tags/"
PULLS = "refs/pr/"


def full_ref(branch: str) -> str:
    """The ref of a branch, or of a pull request, which is called by its whole ref."""
    return branch if branch.startswith(PULLS) else BRANCHES + branch


@dataclass(frozen=True, order=True)
class FileEntry:
    """A file of a commit.

    Attributes:
        path: relative, with forward slashes, see `naming.why_not_a_path`.
        size: in bytes.
        sha256: of its content, in hex: the key in `Content`, and what LFS and the Hub call it by.
        oid: SHA-1 of the git blob: of the content, or of its LFS pointer where `lfs` is set. What the Hub's protocol
            gives as `blobId` and as the ETag of a regular file.
        lfs: whether git would keep it in LFS; always so for weights and for anything large.
    """

    path: str
    size: int
    sha256: str
    oid: str
    lfs: bool


@dataclass(frozen=True)
class Commit:
    """One state of a repository.

    Attributes:
        id: 40 hex digits, see `store.commit_id`.
        parent: the commit before it, or None for the first.
        tree: id of its list of files.
        message: first line and body as one text.
        time: seconds since 1970, UTC.
        facts: what the files are (kind, base, rank and so on), read from them when they were committed. They follow
            from the tree and are no part of the id.
    """

    id: str
    parent: str | None
    tree: str
    message: str
    time: int
    facts: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Repository:
    """A repository. `kind` is `model` or `dataset`; times are seconds since 1970."""

    name: RepositoryName
    kind: str
    private: bool
    created: int
    updated: int


# What is given a commit, its files, and the id that its parent has now; and returns what is to be there instead.
Rewriting = Callable[[Commit, Sequence[FileEntry], str | None], tuple[Commit, Sequence[FileEntry]]]


class ConflictError(InputError):
    """A branch points elsewhere than was expected: somebody else committed meanwhile."""


class ContentMissingError(OutputError):
    """A commit names content that is not there (any more); `missing` are its SHA-256 sums."""

    def __init__(self, message: str, missing: Sequence[str]) -> None:
        super().__init__(message)
        self.missing = tuple(missing)

    def __reduce__(self) -> tuple[type[ContentMissingError], tuple[str, tuple[str, ...]]]:
        return type(self), (self.message, self.missing)


class Incoming(Protocol):
    """Content on its way in: appended to, then kept under its hash or dropped."""

    def write(self, data: memoryview) -> None: ...

    def keep(self, sha256: str) -> None:
        """Make it durable and visible. Nothing happens if content of that hash is there already."""
        ...

    def keep_xorb(self, index: XorbIndex) -> None:
        """Make it durable and visible as a xorb, with its footer. The caller has proved its hash."""
        ...


@dataclass(frozen=True)
class StoredFile:
    """A file of the content store.

    Attributes:
        name: the hash that it goes by, in hex.
        size: in bytes.
        touched: when somebody last referred to it, in seconds since 1970.
    """

    name: str
    size: int
    touched: float


class Content(Protocol):
    """Bytes by their SHA-256. What is there is whole, never changes, and survives a crash of the machine.

    Content lies as it is, or as a recipe of chunks that lie in xorbs (`surgery.hub.xet`); or both.
    """

    def size(self, sha256: str) -> int | None:
        """Length in bytes, or None where there is none."""
        ...

    def path(self, sha256: str) -> Path | None:
        """Where it lies as a file of its own, if it does; to read from, never to write to."""
        ...

    def open(self, sha256: str) -> Source:
        """To read from. Raises `FormatError` where there is none."""
        ...

    def stored(self, sha256: str) -> int:
        """Bytes that go away with it: of a file that lies in xorbs only the recipe."""
        ...

    def receive(self) -> AbstractContextManager[Incoming]:
        """A place for new content, which is gone after the `with` unless it was kept."""
        ...

    def recipe(self, sha256: str) -> Recipe | None:
        """The chunks that it is made of, where it came in as chunks."""
        ...

    def keep_recipe(self, recipe: Recipe) -> None:
        """Make a file of chunks visible. Its xorbs are stored, and the caller has proved its hash."""
        ...

    def has_xorb(self, digest: bytes) -> bool: ...

    def open_xorb(self, digest: bytes) -> StoredXorb:
        """To read from. Raises `FormatError` where there is none."""
        ...

    def touch_xorb(self, digest: bytes) -> bool:
        """Note that somebody is about to refer to it; False if it is not there."""
        ...

    def touched_xorb(self, digest: bytes) -> float:
        """When somebody last did, in seconds since 1970; 0 where there is none."""
        ...

    def xorbs(self) -> Iterator[StoredFile]:
        """All that are stored."""
        ...

    def remove_xorb(self, digest: bytes) -> None: ...

    def touch(self, sha256: str) -> bool:
        """Note that somebody is about to refer to it; False if it is not there."""
        ...

    def touched(self, sha256: str) -> float:
        """When somebody last did, in seconds since 1970; 0 where there is none."""
        ...

    def remove(self, sha256: str) -> None: ...

    def clear(self, dry_run: bool = False) -> Sequence[int]:
        """Remove what killed processes left on its way in. Returns the size of each."""
        ...

    def list(self) -> Iterator[tuple[str, int, float]]:
        """SHA-256, size, and the time of the last `touch`, of everything."""
        ...


class Metadata(Index, Protocol):
    """Repositories, commits, refs and their index. Each method is one transaction: all of it happens, or nothing."""

    def create(self, name: RepositoryName, kind: str, private: bool, time: int) -> Repository:
        """A new repository without commits. Raises `ConflictError` where one has the name, in any letter case."""
        ...

    def find(self, name: RepositoryName, kind: str = "model") -> Repository | None: ...

    def repositories(self, kind: str = "model") -> Sequence[Repository]:
        """All, by name."""
        ...

    def delete(self, name: RepositoryName, kind: str = "model") -> Collection[str]:
        """Forget a repository. Returns the SHA-256 sums that it referred to."""
        ...

    def move(self, name: RepositoryName, new: RepositoryName, kind: str) -> None:
        """Give a repository another name. Raises `ConflictError` where one has it."""
        ...

    def set_private(self, name: RepositoryName, kind: str, private: bool) -> None: ...

    def holding(self, sha256: str) -> Sequence[Repository]:
        """Every repository with a commit that refers to this content."""
        ...

    def used(self, namespace: str, more: Mapping[str, int]) -> int:
        """Bytes of all content that commits of a namespace refer to, and of `more` (by SHA-256); each counted once."""
        ...

    def refs(self, name: RepositoryName, kind: str = "model") -> Mapping[str, str]:
        """`refs/heads/main` and the like, each with its commit."""
        ...

    def set_ref(
        self, name: RepositoryName, ref: str, expected: str | None, commit: str | None, kind: str = "model"
    ) -> None:
        """Move a ref from `expected` to `commit`; None is no ref. Raises `ConflictError` where it is elsewhere."""
        ...

    def commit(
        self,
        name: RepositoryName,
        branch: str,
        expected: str | None,
        commit: Commit,
        files: Sequence[FileEntry],
        missing: Callable[[Collection[str]], Collection[str]],
        kind: str = "model",
    ) -> None:
        """Record a commit and move its branch to it.

        Args:
            name: of the repository.
            branch: without `refs/heads/`; or `refs/pr/N`.
            expected: where the branch points now; None for a new one. Raises `ConflictError` if it is elsewhere.
            commit: with `parent` equal to `expected`, or any commit for a new branch.
            files: the whole tree, sorted by path.
            missing: which of these SHA-256 sums are not in the content store. Asked within the transaction, which no
                collection of garbage overlaps; raises `ContentMissingError` if there are any.
            kind: `model` or `dataset`.
        """
        ...

    def rewrite(self, name: RepositoryName, kind: str, change: Rewriting) -> Collection[str]:
        """Replace every commit of a repository; refs and pull requests follow.

        Returns the SHA-256 sums that it referred to before.
        """
        ...

    def prune(self, name: RepositoryName, kind: str = "model") -> int:
        """Forget the commits of a repository that no ref leads to any more. Returns how many there were."""
        ...

    def history(self, name: RepositoryName, commit: str, kind: str = "model") -> Iterator[Commit]:
        """A commit and those before it, newest first."""
        ...

    def commits(self, name: RepositoryName, kind: str = "model") -> Sequence[Commit]:
        """Every commit of a repository, also those that no branch leads to; the oldest first."""
        ...

    def find_commit(self, name: RepositoryName, prefix: str, kind: str = "model") -> Commit | None:
        """The commit whose id begins so, if there is exactly one."""
        ...

    def files(self, tree: str) -> Sequence[FileEntry]:
        """The files of a tree, sorted by path."""
        ...

    def has_size(self, size: int) -> bool:
        """Whether any committed file has this length: if none has, content of that length is new."""
        ...

    def trees(self) -> Collection[str]:
        """Every tree that a commit has."""
        ...

    def close(self) -> None: ...

    def sweep(self, candidates: Iterable[str], remove: Callable[[str], bool]) -> Collection[str]:
        """Call `remove` for each candidate that no commit refers to. No commit happens meanwhile.

        It says whether it removed the content; returns what was removed.
        """
        ...
