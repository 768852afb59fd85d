"""The refs of pull requests: opening one, and who may commit to it."""

from __future__ import annotations

import re
import time

from surgery.hub.interfaces import BRANCHES, PULLS, Repository
from surgery.hub.naming import MAIN
from surgery.hub.server.describing import iso
from surgery.hub.server.hub import Call
from surgery.hub.server.interfaces import DRAFT, OPEN, Discussion, Event
from surgery.hub.server.web import HttpError, unquoted

_PULL = re.compile(rf"{PULLS}([1-9][0-9]{{0,8}})")


def head_of(rest: tuple[str, ...]) -> str:
    """A branch in an address, or a whole `refs/pr/N`."""
    return unquoted("/".join(rest)).removeprefix(BRANCHES)


def number_of(branch: str) -> int | None:
    """Which pull request a ref is of; None for a branch."""
    found = _PULL.fullmatch(branch)
    return int(found[1]) if found is not None else None


def comment(author: str, text: str, now: int) -> Event:
    """Something said in a discussion."""
    data = {"edited": False, "hidden": False, "latest": {"raw": text, "updatedAt": iso(now)}, "history": []}
    return Event("comment", author, now, data)


def open_pull(call: Call, found: Repository, title: str, status: str, first: Event) -> Discussion:
    """A new pull request at the newest commit of `main`."""
    head = call.hub.registry.head(found.name, MAIN, found.kind)
    if head is None:
        raise HttpError(409, f"{found.name} has no {MAIN} to start from.")
    new = Discussion(0, title, call.user().user, status, int(time.time()), base=head.commit.id)
    made = call.hub.community.open_discussion(found, new, first)
    call.hub.metadata.set_ref(found.name, f"{PULLS}{made.number}", None, head.commit.id, found.kind)
    return made


def pull_to_write(call: Call, branch: str) -> tuple[Repository, Discussion]:
    """The pull request that a ref is of, if this person may commit to it."""
    found, number = call.proposable(), number_of(branch)
    item = call.hub.community.discussion(found, number) if number is not None else None
    if item is None or not item.is_pull:
        raise HttpError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
    user = call.user()
    if user.user.lower() != item.author.lower() and not user.may_write(found.name):
        raise HttpError(403, f"Only {item.author} and those who may write to {found.name} can commit to {branch}.")
    if item.status not in (OPEN, DRAFT):
        raise HttpError(409, f"Pull request {number} is {item.status}.")
    return found, item


def branch_to_write(call: Call, branch: str, opens: bool) -> Repository:
    """The repository, if this person may upload for a branch, a pull request, or one that is about to be opened."""
    if opens:
        if branch != MAIN:
            raise HttpError(400, f"Pull requests start from {MAIN} here, not from {branch[:100]}.")
        return call.proposable()
    return pull_to_write(call, branch)[0] if branch.startswith(PULLS) else call.writable()


def is_opening(call: Call) -> bool:
    """Whether a request says that its commit is to be a pull request."""
    return call.request.query_params.get("create_pr", "").lower() in ("1", "true")
