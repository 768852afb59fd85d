"""Discussions and pull requests, as far as the Hub's client needs them.

A pull request is a ref of its own, `refs/pr/N`, that starts where `main` is. Whoever may read the repository and has a
token to write with may open one and commit to it; those who may write to the repository merge it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qs

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from surgery.hub.facts import stored_facts
from surgery.hub.interfaces import PULLS, ConflictError, ContentMissingError, FileEntry, Repository
from surgery.hub.naming import MAIN
from surgery.hub.server.commits import TRIES
from surgery.hub.server.describing import iso
from surgery.hub.server.hub import Call
from surgery.hub.server.interfaces import CLOSED, DRAFT, MERGED, OPEN, Discussion, Event
from surgery.hub.server.merging import change_lines, merged
from surgery.hub.server.pulls import comment, head_of, open_pull
from surgery.hub.server.web import HttpError, json_body, json_response, page_number, text_of

_PAGE = 50
_MAX_TITLE = 500
_MAX_TEXT = 64 << 10


async def listed(call: Call) -> Response:
    """`GET /api/models/{id}/discussions[/{number}]`."""
    if call.rest:
        return json_response(await run_in_threadpool(_details, call, _number(call.rest[0])))
    query = parse_qs(call.request.url.query)
    kind, status, author = (query.get(name, [""])[-1] for name in ("type", "status", "author"))
    start = page_number(query, "p") * _PAGE

    def find() -> dict[str, object]:
        found = call.repository()
        fitting = [
            item
            for item in call.hub.community.discussions(found)
            if (kind not in ("pull_request", "discussion") or item.is_pull == (kind == "pull_request"))
            and (status not in ("open", "closed") or (item.status in (OPEN, DRAFT)) == (status == "open"))
            and (not author or item.author.lower() == author.lower())
        ]
        shown = [_short(found, item) for item in fitting[start : start + _PAGE]]
        return {"discussions": shown, "count": len(fitting), "start": start, "numClosedDiscussions": 0}

    return json_response(await run_in_threadpool(find))


def _number(text: str) -> int:
    if not text.isdecimal() or len(text) > 9:
        raise HttpError(404, "There is no such discussion.")
    return int(text)


def _found(call: Call, found: Repository, number: int) -> Discussion:
    item = call.hub.community.discussion(found, number)
    if item is None:
        raise HttpError(404, f"{found.name} has no discussion {number}.")
    return item


def _short(found: Repository, item: Discussion) -> dict[str, object]:
    return {
        "num": item.number,
        "title": item.title,
        "status": item.status,
        "isPullRequest": item.is_pull,
        "author": {"name": item.author},
        "createdAt": iso(item.created),
        "repo": {"name": str(found.name), "type": found.kind},
    }


def _details(call: Call, number: int) -> dict[str, object]:
    found = call.repository()
    item = _found(call, found, number)
    described = _short(found, item)
    described["events"] = [_event(event) for event in call.hub.community.events(found, number)]
    if item.base is not None:
        base, ours, theirs = _three(call, found, item, item.base)
        waiting = item.status in (OPEN, DRAFT)
        described["changes"] = {"base": f"refs/heads/{MAIN}", "mergeCommitId": item.merged}
        described["filesWithConflicts"] = merged(base, ours, theirs)[1] if waiting else []
        described["diff"] = "\n".join(change_lines(base, theirs))
    return described


def _three(
    call: Call, found: Repository, item: Discussion, start: str
) -> tuple[Sequence[FileEntry], Sequence[FileEntry], Sequence[FileEntry]]:
    """The files that a pull request starts from, those of `main`, and its own."""
    registry, name, kind = call.hub.registry, found.name, found.kind
    base = registry.resolve(found, start)
    theirs = registry.head(name, f"{PULLS}{item.number}", kind)
    ours = registry.head(name, MAIN, kind)
    if base is None or theirs is None:
        raise HttpError(404, f"The commits of pull request {item.number} are gone.", "RevisionNotFound")
    return call.hub.metadata.files(base.tree), ours.files if ours is not None else (), theirs.files


def _event(event: Event) -> dict[str, object]:
    return {
        "id": f"{event.id:016x}",
        "type": event.kind,
        "createdAt": iso(event.time),
        "author": {"name": event.author},
        "data": dict(event.data),
    }


def _text(body: dict[str, Any], name: str, limit: int, default: str | None = None) -> str:
    text = text_of(body.get(name), name, default).strip()
    if len(text) > limit:
        raise HttpError(413, f"{name} may have {limit} characters.")
    if default is None and not text:
        raise HttpError(400, f"{name} is empty.")
    return text


async def create(call: Call) -> Response:
    """`POST /api/models/{id}/discussions`: a pull request made so is a draft, as on the Hub."""
    body = await json_body(call.request)

    def make() -> dict[str, object]:
        found, user = call.proposable(), call.user()
        title = _text(body, "title", _MAX_TITLE)
        now = int(time.time())
        first = comment(user.user, _text(body, "description", _MAX_TEXT, ""), now)
        if body.get("pullRequest") is True:
            made = open_pull(call, found, title, DRAFT, first)
        else:
            new = Discussion(0, title, user.user, OPEN, now)
            made = call.hub.community.open_discussion(found, new, first)
        call.note(action="discussion.open", number=made.number)
        described = _short(found, made)
        described["pullRequest"] = made.is_pull
        described["url"] = f"{call.page}/discussions/{made.number}"
        return described

    return json_response(await run_in_threadpool(make))


async def change(call: Call) -> Response:
    """`POST /api/models/{id}/discussions/{number}/{comment|title|status|merge}`."""
    number, what = _number(call.rest[0]), call.rest[1]
    handler = {"comment": _add_comment, "title": _rename, "status": _set_status, "merge": _merge}.get(what)
    if handler is None:
        raise HttpError(404, "There is no such address.")
    body = await json_body(call.request)
    call.note(action=f"discussion.{what}", number=number)
    try:
        return json_response(await run_in_threadpool(handler, call, number, body))
    except ConflictError as error:
        raise HttpError(409, error.message) from None


def _of_author(call: Call, number: int) -> tuple[Repository, Discussion]:
    """A discussion, if this person began it or may write to the repository."""
    found = call.proposable()
    item = _found(call, found, number)
    user = call.user()
    if user.user.lower() != item.author.lower() and not user.may_write(found.name):
        raise HttpError(403, f"Only {item.author} and those who may write to {found.name} can do this.")
    return found, item


def _add_comment(call: Call, number: int, body: dict[str, Any]) -> dict[str, object]:
    found = call.proposable()
    item = _found(call, found, number)
    event = comment(call.user().user, _text(body, "comment", _MAX_TEXT), int(time.time()))
    return {"newMessage": _event(call.hub.community.change(found, number, item.status, event, {}))}


def _rename(call: Call, number: int, body: dict[str, Any]) -> dict[str, object]:
    found, item = _of_author(call, number)
    title = _text(body, "title", _MAX_TITLE)
    event = Event("title-change", call.user().user, int(time.time()), {"from": item.title, "to": title})
    return {"newTitle": _event(call.hub.community.change(found, number, item.status, event, {"title": title}))}


def _set_status(call: Call, number: int, body: dict[str, Any]) -> dict[str, object]:
    found, item = _of_author(call, number)
    status = text_of(body.get("status"), "status")
    if status not in (OPEN, CLOSED):
        raise HttpError(400, "status has to be open or closed.")
    if item.status == MERGED:
        raise HttpError(409, f"Pull request {number} is merged.")
    return {"newStatus": _event(_changed(call, found, item, status, body))}


def _changed(
    call: Call, found: Repository, item: Discussion, status: str, body: dict[str, Any], commit: str | None = None
) -> Event:
    """Give a discussion another status, with a comment if there is one."""
    user, now = call.user().user, int(time.time())
    if text := _text(body, "comment", _MAX_TEXT, ""):
        call.hub.community.change(found, item.number, item.status, comment(user, text, now), {})
    event = Event("status-change", user, now, {"status": status})
    changes = {"status": status} if commit is None else {"status": status, "merged": commit}
    return call.hub.community.change(found, item.number, item.status, event, changes)


def _merge(call: Call, number: int, body: dict[str, Any]) -> dict[str, object]:
    """One commit on `main` that does what the pull request does. Merging again what was cut short changes nothing."""
    found = call.writable()
    item = _found(call, found, number)
    if item.base is None:
        raise HttpError(400, f"Discussion {number} is no pull request.")
    if item.status not in (OPEN, DRAFT):
        raise HttpError(409, f"Pull request {number} is {item.status}.")
    registry = call.hub.registry
    for _ in range(TRIES):
        base, _, theirs = _three(call, found, item, item.base)
        head = registry.head(found.name, MAIN, found.kind)
        ours = head.files if head is not None else ()
        files, conflicts = merged(base, ours, theirs)
        if conflicts:
            raise HttpError(409, f"Pull request {number} and {MAIN} both changed {', '.join(conflicts[:5])}.")
        commit_id = head.commit.id if head is not None else None
        if files != list(ours):
            facts = stored_facts(call.hub.content, call.hub.metadata, files, str(found.name), found.kind)
            message = f"{item.title} (#{number})"
            try:
                commit_id = registry.commit(found.name, MAIN, commit_id, files, message, facts, found.kind).id
            except ConflictError:  # somebody was quicker
                continue
            except ContentMissingError:
                raise HttpError(409, "Content of the pull request is gone; upload it again.") from None
        _changed(call, found, item, MERGED, body, commit_id)
        call.note(commit=commit_id)
        return {"status": MERGED, "oid": commit_id}
    raise HttpError(503, f"{MAIN} keeps moving; try again.", headers={"Retry-After": "1"})


async def squash(call: Call) -> Response:
    """`POST /api/models/{id}/super-squash/{branch}`: the newest commit becomes the branch's only one."""
    body = await json_body(call.request)
    branch = head_of(call.rest)

    def do() -> dict[str, object]:
        found = call.writable()
        message = _text(body, "message", _MAX_TEXT, "") or f"Super-squash branch '{branch}'"
        try:
            commit = call.hub.registry.squash(found.name, branch, message, found.kind)
        except ConflictError:
            raise HttpError(409, f"{branch} was moved meanwhile; try again.") from None
        if commit is None:
            raise HttpError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        call.note(action="squash", branch=branch, commit=commit.id)
        return {"commitOid": commit.id}

    return json_response(await run_in_threadpool(do))
