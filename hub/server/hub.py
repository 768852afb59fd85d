"""What every request needs: the registry, who sends it, and what that person may see."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace
from functools import cached_property

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from surgery.hub.index import ANYBODY, Reader
from surgery.hub.interfaces import Content, Metadata, Repository
from surgery.hub.naming import RepositoryName, why_not_a_repository
from surgery.hub.server.audit import Audit
from surgery.hub.server.completing import Completer
from surgery.hub.server.interfaces import ACCEPTED, ADMIN, PENDING, READ, Accounts, ChunkIndex, Community, Identity
from surgery.hub.server.policy import Policy
from surgery.hub.server.signing import Signer
from surgery.hub.server.tracing import trace_of
from surgery.hub.server.web import HttpError, unquoted
from surgery.hub.store import Registry, Revision

# How often a repository may be moved until its first name leads nowhere.
_MOST_MOVES = 20
_PARSED_AT_ONCE = 4
WRONG_TOKEN = "Invalid credentials in Authorization header"


@dataclass(frozen=True)
class Hub:
    """A server's parts.

    Attributes:
        url: the address under which clients reach it; None to take what each request says.
        audit: what was changed and by whom.
        policy: what it takes in.
        parsing: held while a piece of a commit is taken apart, which takes memory; for a few at a time.
        registering: likewise while a shard is, and its files are put together. That takes minutes for a large one, and
            commits do not wait for it.
    """

    registry: Registry
    accounts: Accounts
    index: ChunkIndex
    community: Community
    signer: Signer
    audit: Audit
    url: str | None = None
    policy: Policy = field(default_factory=Policy)
    parsing: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_PARSED_AT_ONCE))
    registering: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_PARSED_AT_ONCE))

    @cached_property
    def completer(self) -> Completer:
        """What examines commits after they were made."""
        return Completer(self.registry)

    @property
    def content(self) -> Content:
        return self.registry.content

    @property
    def metadata(self) -> Metadata:
        return self.registry.metadata


@dataclass(frozen=True)
class Call:
    """One request.

    Attributes:
        identity: who sends it; None for nobody.
        kind: of the repository: `model` or `dataset`.
        name: of the repository, as the client writes it.
        rest: what follows in the path, part by part, as it came.
    """

    hub: Hub
    request: Request
    identity: Identity | None
    kind: str = "model"
    name: RepositoryName | None = None
    rest: tuple[str, ...] = ()

    @property
    def base(self) -> str:
        """The server's own address, as the client sees it."""
        return self.hub.url or f"{self.request.url.scheme}://{self.request.headers.get('host', 'localhost')}"

    @property
    def page(self) -> str:
        """The address of the repository itself."""
        return f"{self.base}/{'' if self.kind == 'model' else f'{self.kind}s/'}{self.name}"

    def note(self, **details: object) -> None:
        """Say for the audit log what was done."""
        trace_of(self.request).notes.update(details)

    def at(self, kind: str, name: str, rest: tuple[str, ...]) -> Call:
        """The same for a repository. Raises `HttpError` for a name that none can have."""
        if why_not_a_repository(name) is not None:
            raise self.no_repository()
        namespace, _, last = name.rpartition("/")
        return replace(self, kind=kind, name=RepositoryName(namespace, last), rest=rest)

    def no_repository(self) -> HttpError:
        """The one answer for what is not there and for what this person may not see."""
        if self.identity is None:
            return HttpError(401, "Repository not found, or it needs a token.", "RepoNotFound")
        return HttpError(404, "Repository not found", "RepoNotFound")

    # These ask the database, and are called in a thread.

    def repository(self) -> Repository:
        """The repository, if this person may read it."""
        assert self.name is not None
        found = self.hub.metadata.find(self.name, self.kind)
        if found is None:
            raise self._moved(self.name)
        if not self.may_read(found):
            raise self.no_repository()
        return found

    @property
    def reader(self) -> Reader:
        """The same person, as the index asks for one."""
        user = self.identity
        return ANYBODY if user is None else Reader(user.role == ADMIN, user.holders, user.repository)

    def may_read(self, repository: Repository) -> bool:
        return not repository.private if self.identity is None else self.identity.may_read(repository)

    def _moved(self, name: RepositoryName) -> HttpError:
        """Where a repository that had this name is now."""
        found, target = None, self.hub.accounts.moved(self.kind, name)
        for _ in range(_MOST_MOVES):
            if target is None or (found := self.hub.metadata.find(target, self.kind)) is not None:
                break
            target = self.hub.accounts.moved(self.kind, target)
        if found is None or not self.may_read(found):
            return self.no_repository()
        sentence = f"It is called {target} now."
        if (path := self._renamed(str(name), str(target))) is None:
            return HttpError(404, sentence, "RepoNotFound")
        query = self.request.url.query
        return HttpError(307, sentence, headers={"Location": path + (f"?{query}" if query else "")})

    def _renamed(self, old: str, new: str) -> str | None:
        """The path of this request with another name in it; None where the name came in the body."""
        parts = self.request.scope["raw_path"].decode("latin-1").partition("?")[0].split("/")
        count = old.count("/") + 1
        if parts[1:2] == ["api"] and parts[2:3] not in (["models"], ["datasets"]):
            return None
        for begin in range(3 if parts[1:2] == ["api"] else 1, len(parts) - count + 1):
            found = unquoted("/".join(parts[begin : begin + count]))
            if found in (old, f"{old}.git"):
                return "/".join([*parts[:begin], new + found[len(old) :], *parts[begin + count :]])
        return None

    def writable(self) -> Repository:
        """The repository, if this person may write to it."""
        found = self.repository()
        if self.identity is None:
            raise HttpError(401, "This needs a token.")
        if not self.identity.may_write(found.name):
            raise HttpError(403, f"Your token does not allow you to write to {found.name}.")
        return found

    def may_open(self, repository: Repository) -> bool:
        """Whether this person may read files of a repository, and not only what it is."""
        if not self.may_read(repository):
            return False
        if self.hub.community.gate(repository) is None:
            return True
        user = self.identity
        if user is None or not user.covers(repository.name):
            return False
        return user.belongs(repository.name) or self.hub.community.access(repository, user.user) == ACCEPTED

    def opened(self) -> Repository:
        """The repository, if this person may read its files."""
        found = self.repository()
        if self.may_open(found):
            return found
        what = f"Access to {found.kind} {found.name} is restricted"
        if self.identity is None:
            message = f"{what}. You must have access to it and be authenticated to access it. Please log in."
            raise HttpError(401, message, "GatedRepo")
        status = self.hub.community.access(found, self.identity.user)
        if status is None:
            raise HttpError(403, f"{what}; ask for it with a POST to {self.page}/ask-access.", "GatedRepo")
        why = "your request awaits an answer" if status == PENDING else "your request was rejected"
        raise HttpError(403, f"{what}: {why}.", "GatedRepo")

    def proposable(self) -> Repository:
        """The repository, if this person may take part in it: read its files, with a token to write with."""
        found = self.opened()
        user = self.user()
        if user.role == READ or not user.covers(found.name):
            raise HttpError(403, f"Your token does not allow you to take part in {found.name}.")
        return found

    def revision(self, text: str, files: bool = False) -> Revision:
        """The repository at a branch, a tag or a commit; with `files` to read what is in them."""
        found = self.opened() if files else self.repository()
        commit = self.hub.registry.resolve(found, text)
        if commit is None:
            raise HttpError(404, f"Invalid rev id: {text}", "RevisionNotFound")
        return Revision(found, commit, tuple(self.hub.metadata.files(commit.tree)))

    def holders(self, namespace: str) -> frozenset[str]:
        """Who has what this person uploads to a repository of a namespace (see `ChunkIndex`).

        With a token for one repository it is that repository alone, so that the token leads to nothing else. Whoever
        only proposes a change brings it in for nobody else.
        """
        user = self.user()
        assert self.name is not None
        writes, own = user.may_write(self.name), user.user.lower()
        if user.repository is not None:
            return frozenset({f"repository {user.repository}" + ("" if writes else f" by {own}")})
        return frozenset({own, namespace.lower()} if writes else {own})

    def visible(self, namespace: str) -> frozenset[str]:
        """Whose uploads this person may refer to by their hashes."""
        user = self.user()
        return self.holders(namespace) | (user.holders if user.repository is None else frozenset())

    def user(self) -> Identity:
        """Whoever it is. Raises `HttpError` (401) for nobody."""
        if self.identity is None:
            raise HttpError(401, "This needs a token.")
        return self.identity


async def identify(hub: Hub, request: Request) -> Identity | None:
    """Who sends a request. Raises `HttpError` (401) for a token that is not known."""
    given = request.headers.get("authorization")
    if given is None:
        return None
    scheme, _, token = given.partition(" ")
    found = None
    if scheme.lower() == "bearer" and 0 < len(token) <= 1024:
        found = await run_in_threadpool(hub.accounts.identify, token.strip(), int(time.time()))
    trace = trace_of(request)
    if found is None:
        trace.refused = True
        raise HttpError(401, WRONG_TOKEN)
    trace.user, trace.token = found.user, found.token
    return found
