"""What a server keeps beside the registry, and the narrow interfaces behind which it lies.

`Accounts` says who somebody is. `ChunkIndex` says which chunks a namespace has, and who has proved to have what. Both
are one SQLite file here (`accounts.py`). `Community` is what people say of a repository and who may open it; that lies
beside the repositories (`community.py`). Several machines would have all three in PostgreSQL.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from surgery.hub.interfaces import Repository
from surgery.hub.naming import RepositoryName
from surgery.hub.xet.placement import Placement
from surgery.hub.xet.recipes import Recipe
from surgery.hub.xet.xorbs import XorbIndex

READ, WRITE, ADMIN = "read", "write", "admin"
ROLES = (READ, WRITE, ADMIN)


@dataclass(frozen=True)
class Identity:
    """Whoever sends a request with a token.

    Attributes:
        user: the name, as it was given when the user was made.
        organisations: whose member the user is.
        role: `read`, `write` or `admin`: what the token allows. An administrator's token allows everything.
        repository: the one repository that the token is for, in lower case; None for all.
        token: what the token is called.
    """

    user: str
    organisations: tuple[str, ...]
    role: str
    repository: str | None
    token: str

    @property
    def holders(self) -> frozenset[str]:
        """The namespaces of the user, in lower case."""
        return frozenset(name.lower() for name in (self.user, *self.organisations))

    def covers(self, name: RepositoryName) -> bool:
        """Whether the token is for this repository, perhaps among others."""
        return self.repository is None or self.repository == name.key

    def belongs(self, name: RepositoryName) -> bool:
        """Whether the repository is the user's own, or its organisation's; everything is an administrator's."""
        return self.covers(name) and (self.role == ADMIN or name.namespace.lower() in self.holders)

    def may_read(self, repository: Repository) -> bool:
        return not repository.private or self.belongs(repository.name)

    def may_write(self, name: RepositoryName) -> bool:
        return self.role != READ and self.belongs(name)


@dataclass(frozen=True)
class Namespace:
    """A user or an organisation; what is made in it is private unless told otherwise where `private_by_default`."""

    name: str
    is_organisation: bool
    private_by_default: bool


class Accounts(Protocol):
    """Users, organisations and tokens. A token is kept as its SHA-256 only: it is 256 random bits, shown once."""

    def is_empty(self) -> bool: ...

    def add_user(self, name: str) -> None:
        """Raises `ConflictError` where a user or an organisation has the name, in any letter case."""
        ...

    def add_organisation(self, name: str, members: Sequence[str], private_by_default: bool) -> None:
        """Raises `ConflictError` likewise, and `InputError` for a member who is no user."""
        ...

    def namespace(self, name: str) -> Namespace | None: ...

    def namespaces(self) -> Sequence[tuple[Namespace, Sequence[str]]]:
        """All, by name, with their members."""
        ...

    def set_member(self, organisation: str, user: str, member: bool) -> None:
        """Raises `InputError` where there is no such organisation, or no such user."""
        ...

    def add_token(
        self, token: str, user: str, role: str, repository: str | None, label: str, now: int, expires: int | None
    ) -> str:
        """Raises `InputError` where there is no such user. Returns by what it is called in lists.

        A token that there is already is made anew; raises `ConflictError` where it is another user's, or has another
        role or repository.
        """
        ...

    def tokens(self, user: str | None) -> Sequence[tuple[str, str, str, str | None, str, int, int | None]]:
        """What each is called, its user, role, repository, label, and when it was made and expires; the oldest first.

        Raises `InputError` where there is no such user.
        """
        ...

    def remove_token(self, number: str) -> bool:
        """Whether there was one."""
        ...

    def identify(self, token: str, now: int) -> Identity | None:
        """Whose token it is; None for one that is unknown or has expired."""
        ...

    def identify_digest(self, digest: bytes, now: int) -> Identity | None:
        """The same by the token's SHA-256, for a session that began with it."""
        ...

    def redirect(self, kind: str, old: RepositoryName, new: RepositoryName) -> None:
        """Remember under which name a repository was known."""
        ...

    def forget(self, kind: str, name: RepositoryName) -> None:
        """Let a name lead nowhere."""
        ...

    def moved(self, kind: str, name: RepositoryName) -> RepositoryName | None:
        """What it was called next; that may have been moved again."""
        ...


PENDING, ACCEPTED, REJECTED = "pending", "accepted", "rejected"
DRAFT, OPEN, CLOSED, MERGED = "draft", "open", "closed", "merged"


@dataclass(frozen=True)
class AccessRequest:
    """Somebody who asked for what is behind a gate. `user` is in lower case, `time` in seconds since 1970."""

    user: str
    status: str
    time: int


@dataclass(frozen=True)
class Discussion:
    """A discussion, or a pull request, which has a `base`.

    Attributes:
        number: within the repository, from 1.
        status: `draft`, `open`, `closed`, `merged`.
        created: seconds since 1970.
        base: the commit that a pull request starts from; its own are at `refs/pr/<number>`.
        merged: the commit that took it in.
    """

    number: int
    title: str
    author: str
    status: str
    created: int
    base: str | None = None
    merged: str | None = None

    @property
    def is_pull(self) -> bool:
        return self.base is not None


@dataclass(frozen=True)
class Event:
    """Something that happened in a discussion: `comment`, `status-change`, `commit`, `title-change`."""

    kind: str
    author: str
    time: int
    data: Mapping[str, Any]
    id: int = 0


class Community(Protocol):
    """Gates, discussions and pull requests of repositories, and what was found in files. Each method is a transaction.

    What is asked of a repository that is gone raises `InputError`, except for its gate.
    """

    def gate(self, repository: Repository) -> str | None:
        """How access to its files is given: `auto`, `manual`; None where everybody has it who may see it."""
        ...

    def set_gate(self, repository: Repository, mode: str | None) -> None: ...

    def access(self, repository: Repository, user: str) -> str | None:
        """What came of a user's request."""
        ...

    def set_access(self, repository: Repository, user: str, status: str, time: int) -> None: ...

    def ask(self, repository: Repository, user: str, status: str, time: int) -> str:
        """Record a request with this status, unless there is one. Returns the status it has now."""
        ...

    def requests(self, repository: Repository, status: str) -> Sequence[AccessRequest]:
        """By time."""
        ...

    def open_discussion(self, repository: Repository, new: Discussion, first: Event) -> Discussion:
        """Gives it the next number."""
        ...

    def discussion(self, repository: Repository, number: int) -> Discussion | None: ...

    def discussions(self, repository: Repository) -> Sequence[Discussion]:
        """The newest first."""
        ...

    def events(self, repository: Repository, number: int) -> Sequence[Event]: ...

    def change(
        self, repository: Repository, number: int, expected: str, event: Event, changes: Mapping[str, Any]
    ) -> Event:
        """Add an event, and change title, status or merge. Raises `ConflictError` where the status is not `expected`.

        Returns the event with its number.
        """
        ...

    def scan(self, sha256: str) -> Mapping[str, Any] | None:
        """What was found in a file."""
        ...

    def keep_scans(self, found: Mapping[str, Mapping[str, Any]]) -> None: ...

    def close(self) -> None: ...


class ChunkIndex(Protocol):
    """Who has which content, where the chunks of a namespace lie, and in which of its files.

    A holder is a namespace in lower case, or, for what came with a token for one repository, that repository. Whoever
    knows no more than a hash is told nothing, and may not refer to what it names: a holder is recorded only when all of
    the bytes came in, or the hashes of all the chunks.

    Xorbs are known here as clients sent them. Where their chunks lie is their placement.
    """

    def keeping(self) -> AbstractContextManager[object]:
        """A time in which nothing is collected, and at the end of which what was recorded is, all of it or nothing.

        Whoever is going to name a xorb in a recipe or a placement touches it first, within this.
        """
        ...

    def epoch(self) -> str:
        """Part of the address under which clients know the chunks; empty at first."""
        ...

    def begin_epoch(self, epoch: str) -> None:
        """Have clients forget which chunks are stored: what they remember, they remember of an address."""
        ...

    def hold_xorb(self, placed: Placement, holders: Collection[str]) -> None:
        """Record that these namespaces have a xorb, and where its chunks lie."""
        ...

    def placement(self, digest: bytes) -> Placement | None:
        """Where the chunks of a xorb lie that is not stored as it was sent; None for any other."""
        ...

    def places(self, chunk: bytes, holders: Collection[str]) -> Sequence[tuple[bytes, int]]:
        """Xorbs of these holders that may have a chunk, and its number in each. To be compared with the whole hash."""
        ...

    def unplaced(self) -> Sequence[tuple[bytes, Sequence[str]]]:
        """Xorbs with holders whose chunks are not recorded; from before there were placements."""
        ...

    def unheld(self, xorbs: Collection[bytes], holders: Collection[str]) -> Collection[bytes]:
        """Those xorbs that none of the holders has."""
        ...

    def hold_content(self, sha256: str, holders: Collection[str]) -> None: ...

    def holds_content(self, sha256: str, holders: Collection[str]) -> bool: ...

    def add_file(
        self,
        recipe: Recipe,
        xorbs: Collection[bytes],
        whole: Collection[bytes],
        holders: Collection[str],
        chunks: Collection[bytes],
    ) -> None:
        """Record a file that came in as chunks, the xorbs that the client named, and under which chunks it is found.

        Its holders have those xorbs from now on of which it has every chunk (`whole`). What else lies in the others
        was not sent for them.
        """
        ...

    def file(self, digest: bytes) -> str | None:
        """The SHA-256 of a file by its Xet hash."""
        ...

    def with_chunk(self, chunk: bytes, holders: Collection[str]) -> str | None:
        """The SHA-256 of a file of these holders that has a chunk; only of chunks that clients ask for."""
        ...

    def named(self, sha256: str) -> Sequence[bytes]:
        """The xorbs that clients named for a file."""
        ...

    # Upkeep.

    def contents(self) -> Collection[str]:
        """Every SHA-256 that anything is recorded of."""
        ...

    def forget_contents(self, sums: Collection[str]) -> None: ...

    def known_xorbs(self) -> Sequence[tuple[bytes, float]]:
        """Every xorb, and when anybody last named it, in seconds since 1970."""
        ...

    def named_xorbs(self, but: Collection[str] = ()) -> Collection[bytes]:
        """Every xorb that a client named for a file that is recorded, some files left out."""
        ...

    def touch_xorb(self, digest: bytes) -> None:
        """Note that somebody may name it from now on."""
        ...

    def touched_xorb(self, digest: bytes) -> float:
        """When somebody last did, in seconds since 1970; 0 for one that is not known."""
        ...

    def forget_xorb(self, digest: bytes, index: XorbIndex | None) -> None:
        """Forget a xorb as clients know it, and its chunks; that takes long without its index."""
        ...
