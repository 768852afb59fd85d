"""Which request goes where.

Paths are matched as they came, still percent-encoded: a revision such as `refs%2Fpr%2F1` is one part of a path.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from surgery.errors import OutputError, SurgeryError
from surgery.hub.server import (
    access,
    admin,
    cas,
    commits,
    copies,
    discussions,
    family,
    files,
    lfs,
    lfs_files,
    listing,
    logs,
    repos,
)  # fmt: skip
from surgery.hub.server.hub import Call, Hub, identify
from surgery.hub.server.limiting import Limiter, of_address
from surgery.hub.server.pages import routes, session
from surgery.hub.server.tracing import Trace, trace_of
from surgery.hub.server.web import HttpError, json_response, unquoted
from surgery.version import __version__
from surgery.writer import free_bytes

Handler = Callable[[Call], Awaitable[Response]]
log = logging.getLogger("surgery.hub")

# So many times more requests than others.
_TRANSFERS = 10
_NOWHERE = "There is no such address."
_KINDS = {"models": "model", "datasets": "dataset"}
# Method and address below /api.
_API: dict[tuple[str, str], Handler] = {
    ("GET", "whoami-v2"): repos.whoami,
    ("POST", "validate-yaml"): commits.validate_yaml,
    ("POST", "repos/create"): repos.create,
    ("DELETE", "repos/delete"): repos.delete,
    ("POST", "repos/move"): repos.move,
}


async def _lfs_files(call: Call) -> Response:
    handler = {"duplicate": copies.copy_files, "batch": lfs_files.remove}.get(call.rest[0])
    if handler is None:
        raise HttpError(404, _NOWHERE)
    return await handler(call)


async def _discussions(call: Call) -> Response:
    if len(call.rest) == 1:
        raise HttpError(404, _NOWHERE)
    return await (discussions.change(call) if call.rest else discussions.create(call))


# Method and the word after a repository's name; then how many parts follow at least, and at most.
_VERBS: dict[tuple[str, str], tuple[Handler, int, int]] = {
    ("GET", "revision"): (files.info, 1, 1),
    ("GET", "tree"): (files.tree, 1, 1000),
    ("POST", "paths-info"): (files.paths_info, 1, 1),
    ("GET", "refs"): (repos.refs, 0, 0),
    ("POST", "branch"): (repos.branch, 1, 100),
    ("DELETE", "branch"): (repos.branch, 1, 100),
    ("POST", "tag"): (repos.tag, 1, 100),
    ("DELETE", "tag"): (repos.tag, 1, 100),
    ("GET", "commits"): (repos.commits, 1, 1),
    ("POST", "preupload"): (commits.preupload, 1, 1),
    ("POST", "commit"): (commits.commit, 1, 1),
    ("PUT", "settings"): (repos.settings, 0, 0),
    ("GET", "auth-check"): (repos.auth_check, 0, 1),
    ("POST", "duplicate"): (copies.duplicate, 0, 0),
    ("GET", "lfs-files"): (lfs_files.listed, 0, 0),
    ("POST", "lfs-files"): (_lfs_files, 1, 1),
    ("GET", "lineage"): (family.lineage, 0, 0),
    ("GET", "fits"): (family.fits, 0, 0),
    ("POST", "super-squash"): (discussions.squash, 1, 100),
    ("GET", "discussions"): (discussions.listed, 0, 1),
    ("POST", "discussions"): (_discussions, 0, 2),
    ("GET", "user-access-request"): (access.requests, 1, 1),
    ("POST", "user-access-request"): (access.decide, 1, 1),
    ("GET", "xet-read-token"): (cas.give_token, 1, 1),
    ("GET", "xet-write-token"): (cas.give_token, 1, 1),
}


class App:
    """The server as an ASGI application."""

    def __init__(self, hub: Hub, rate: int = 0) -> None:
        """`rate` requests a minute are answered for each user and each address; 0 is any number."""
        self.hub = hub
        self._limiter = Limiter(rate)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        trace = trace_of(request)

        async def traced(message: Message) -> None:
            if message["type"] == "http.response.start":
                trace.status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", trace.id.encode())]
            trace.sent += len(message.get("body", b""))
            await send(message)

        try:
            response = await self._answer(request, trace)
            await response(scope, receive, traced)
        finally:
            logs.request(trace)

    async def _answer(self, request: Request, trace: Trace) -> Response:
        try:
            response = await self._route(request)
        except HttpError as error:
            response = await routes.error(self.hub, request, error)
        except SurgeryError as error:
            response = await routes.error(self.hub, request, _of(error))
        trace.status = response.status_code
        if trace.changes or trace.refused:
            try:
                await run_in_threadpool(self.hub.audit.request, trace)
            except SurgeryError as error:  # what is done is done; the log says that the audit log does not
                return _of(error).response()
        return response

    async def _route(self, request: Request) -> Response:
        trace = trace_of(request)
        parts = tuple(trace.path.strip("/").split("/"))
        base = Call(self.hub, request, None).base
        if parts[0] in ("cas", "lfs"):
            # Many requests for one file, most of them without a token.
            self._limiter.take(f"transfers of {of_address(trace.address)}", _TRANSFERS)
        match request.method, *parts:
            case _, "cas", *rest:
                return await cas.handle(self.hub, request, tuple(rest), base)
            case _, "lfs", *rest:
                return await lfs.handle(self.hub, request, tuple(rest))
            case "GET" | "HEAD", "health":
                return await self._health()
        try:
            identity = await identify(self.hub, request)
        except HttpError:
            self._limiter.take(f"address {of_address(trace.address)}")
            raise
        self._limiter.take(f"user {identity.user}" if identity is not None else f"address {of_address(trace.address)}")
        call = Call(self.hub, request, identity)
        if parts[0] == "api":
            return await _api(call, parts[1:])
        return await _page(call, parts)

    async def _health(self) -> Response:
        """Whether the registry answers."""
        await run_in_threadpool(self.hub.metadata.has_size, 0)
        await run_in_threadpool(self.hub.accounts.is_empty)
        free = await run_in_threadpool(free_bytes, self.hub.registry.root)
        return json_response({"status": "ok", "version": __version__, "free_bytes": free})


async def _api(call: Call, parts: tuple[str, ...]) -> Response:
    method = "GET" if call.request.method == "HEAD" else call.request.method
    if (handler := _API.get((method, "/".join(parts)))) is not None:
        return await handler(call)
    if parts[:1] == ("admin",):
        return await admin.handle(call, parts[1:])
    if not parts or (kind := _KINDS.get(parts[0])) is None:
        raise HttpError(404, _NOWHERE)
    if len(parts) == 1:
        if method != "GET":
            raise HttpError(405, _NOWHERE)
        return await listing.listing(Call(call.hub, call.request, call.identity, kind))
    # A name alone if a word with a meaning follows; else a name of two parts.
    length = 1 if len(parts) > 2 and parts[2] in repos.RESERVED else 2
    name = "/".join(unquoted(part) for part in parts[1 : 1 + length])
    rest = parts[1 + length :]
    if not rest:
        if method != "GET":
            raise HttpError(405, _NOWHERE)
        return await files.info(call.at(kind, name, ()))
    found = _VERBS.get((method, rest[0]))
    if found is None or not found[1] <= len(rest) - 1 <= found[2]:
        raise HttpError(404, _NOWHERE)
    return await found[0](call.at(kind, name, rest[1:]))


async def _page(call: Call, parts: tuple[str, ...]) -> Response:
    """`/{id}/resolve/...` and `/{id}.git/info/lfs/...`, with `datasets/` before them for a dataset; else a page."""
    kind = "model"
    if parts[0] in _KINDS:
        kind, parts = _KINDS[parts[0]], parts[1:]
    visit = await session.visiting(call)
    for length in (1, 2):
        name = "/".join(unquoted(part) for part in parts[:length])
        match call.request.method, *parts[length:]:
            case "GET" | "HEAD", "resolve", _, _, *_:
                return await files.resolve(visit.call.at(kind, name, parts[length + 1 :]))
            case "POST", "ask-access":
                return await access.ask(call.at(kind, name, ()))
            case "POST", "info", "lfs", "objects", "batch" if name.endswith(".git"):
                return await lfs.batch(call.at(kind, name.removesuffix(".git"), ()))
            case "POST", "info", "lfs", "verify" if name.endswith(".git"):
                return await lfs.verify(call.at(kind, name.removesuffix(".git"), ()))
    return await routes.page(visit, kind, parts)


def _of(error: SurgeryError) -> HttpError:
    """What is wrong with the registry is for the log; a stranger is told only that something is."""
    log.error("%s", error)
    if isinstance(error, OutputError):
        return HttpError(507, "The server cannot store this; its log says why.")
    return HttpError(500, "Something is wrong with what is stored; the server's log says what.")


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        if message["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        elif message["type"] == "lifespan.shutdown":
            await send({"type": "lifespan.shutdown.complete"})
            return
