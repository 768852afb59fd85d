"""Which page is where: the addresses that a person would type on the Hub."""

from __future__ import annotations

import logging
from collections.abc import Callable

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from surgery.errors import SurgeryError
from surgery.hub.server.hub import Call, Hub
from surgery.hub.server.pages import account, history, lineage, lists, repository, session, trees
from surgery.hub.server.pages.render import html, static
from surgery.hub.server.pages.session import Visit
from surgery.hub.server.web import HttpError, unquoted

Page = Callable[[Visit], Response]
log = logging.getLogger("surgery.hub")

_NOWHERE = "There is no such address."
# What a stranger is told of what is not there and of what is private: the same.
_NOT_FOUND = "There is nothing here, or it is private and you may not see it."
# The word after a repository's name; then how many parts follow at least, and at most.
_VERBS: dict[str, tuple[Page, int, int]] = {
    "tree": (trees.tree, 1, 1000),
    "blob": (trees.blob, 2, 1000),
    "commits": (history.commits, 1, 1),
    "commit": (history.commit, 1, 1),
    "lineage": (lineage.page, 0, 0),
}
# Addresses of programs: their errors stay as they are.
_NOT_PAGES = ("/api/", "/cas/", "/lfs/")


async def page(visit: Visit, kind: str, parts: tuple[str, ...]) -> Response:
    """A page. Raises `HttpError` where there is none.

    Args:
        visit: who asks.
        kind: `dataset` for what is below `/datasets`, else `model`.
        parts: of the path, as they came, without `datasets` or `models`.
    """
    method = visit.call.request.method
    if kind == "model":
        match method, *parts:
            case "GET" | "HEAD", "-", digest, name:
                if (found := static(digest, name)) is not None:
                    return found
            case "GET" | "HEAD", "login":
                return await run_in_threadpool(account.login, visit)
            case "GET" | "HEAD", "settings", "tokens":
                return await run_in_threadpool(account.tokens, visit)
            case "POST", "login":
                return await account.begin(visit)
            case "POST", "logout":
                return await account.end(visit)
            case "POST", "settings", "tokens":
                return await account.make(visit)
            case "POST", "settings", "tokens", "revoke":
                return await account.revoke(visit)
    if method not in ("GET", "HEAD"):
        raise HttpError(405, _NOWHERE, headers={"Allow": "GET, HEAD"})
    return await run_in_threadpool(_read, visit, kind, parts)


def _read(visit: Visit, kind: str, parts: tuple[str, ...]) -> Response:
    names = tuple(unquoted(part) for part in parts)
    if names in ((), ("",)):
        return lists.everything(visit, kind)
    for length in (1, 2):
        if len(parts) > length and (found := _VERBS.get(parts[length])) is not None:
            handler, least, most = found
            if least <= len(parts) - length - 1 <= most:
                return handler(visit.at(kind, "/".join(names[:length]), parts[length + 1 :]))
    if len(parts) == 1 and not _is_repository(visit, kind, names[0]):
        return lists.namespace(visit, kind, names[0])
    if len(parts) <= 2:
        return repository.card(visit.at(kind, "/".join(names), ()))
    raise HttpError(404, _NOWHERE)


def _is_repository(visit: Visit, kind: str, name: str) -> bool:
    """Whether a name alone is that of a repository."""
    return repository.readable(visit, name, kind) is not None


async def error(hub: Hub, request: Request, failure: HttpError) -> Response:
    """A failure as whoever asked can read it: as a page for a browser, else as the API's clients know it."""
    path = request.scope["raw_path"].decode("latin-1")
    if path.startswith(_NOT_PAGES) or "text/html" not in request.headers.get("accept", ""):
        return failure.response()
    try:
        visit = await session.visiting(Call(hub, request, None))
        return await run_in_threadpool(_error, visit, failure)
    except SurgeryError as nested:  # the database itself
        log.error("%s", nested)
        return failure.response()


def _error(visit: Visit, failure: HttpError) -> Response:
    is_missing = failure.code == "RepoNotFound"
    status = 404 if is_missing else failure.status
    sentence = _NOT_FOUND if is_missing else failure.message
    response = html("error.html", {"visit": visit, "status": status, "sentence": sentence}, status)
    response.headers.update(failure.headers)
    return response
