"""Gated repositories: everybody sees what they are, and only who was let in opens their files."""

from __future__ import annotations

import hashlib
import time
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from surgery.hub.interfaces import Repository
from surgery.hub.server.describing import iso
from surgery.hub.server.hub import Call
from surgery.hub.server.interfaces import ACCEPTED, PENDING, REJECTED, AccessRequest
from surgery.hub.server.web import HttpError, json_body, json_response, text_of

MODES = ("auto", "manual")
_STATUSES = (PENDING, ACCEPTED, REJECTED)


def parsed_gate(value: object) -> str | None:
    """The mode in a request for new settings. Raises `HttpError` for what is none."""
    if value is None or value is False or value == "false":
        return None
    if value not in MODES:
        raise HttpError(400, f"gated has to be {', '.join(MODES)} or false.")
    return str(value)


async def ask(call: Call) -> Response:
    """`POST /{id}/ask-access`: let in at once where the gate is `auto`, else once a person has said yes."""

    def record() -> str:
        found, user = call.repository(), call.user()
        if not user.covers(found.name):
            raise HttpError(403, f"Your token is not for {found.name}.")
        gate = _gate(call, found)
        status = call.hub.community.ask(found, user.user, ACCEPTED if gate == "auto" else PENDING, int(time.time()))
        call.note(action="access.ask", status=status)
        return status

    return json_response({"status": await run_in_threadpool(record)})


def _gate(call: Call, found: Repository) -> str:
    gate = call.hub.community.gate(found)
    if gate is None:
        raise HttpError(400, f"{found.name} is not gated.")
    return gate


async def requests(call: Call) -> Response:
    """`GET /api/models/{id}/user-access-request/{status}`: who asked."""
    status = call.rest[0]
    if status not in _STATUSES:
        raise HttpError(404, f"The status of a request is one of {', '.join(_STATUSES)}.")

    def find() -> list[dict[str, object]]:
        found = call.writable()
        _gate(call, found)
        return [_described(call, found, request) for request in call.hub.community.requests(found, status)]

    return json_response(await run_in_threadpool(find))


def _described(call: Call, found: Repository, request: AccessRequest) -> dict[str, object]:
    space = call.hub.accounts.namespace(request.user)
    name = space.name if space is not None else request.user
    return {
        "requestId": _request_id(found, request.user),
        "user": {"user": name, "fullname": name, "type": "user"},
        "status": request.status,
        "timestamp": iso(request.time),
    }


def _request_id(found: Repository, user: str) -> str:
    return hashlib.sha256(f"{found.kind}\0{found.name.key}\0{user}".encode()).hexdigest()[:24]


async def decide(call: Call) -> Response:
    """`POST /api/models/{id}/user-access-request/handle` and `.../grant`."""
    body = await json_body(call.request)
    change = {"handle": _handle, "grant": _grant}.get(call.rest[0])
    if change is None:
        raise HttpError(404, "There is no such address.")
    await run_in_threadpool(change, call, body)
    return json_response({})


def _handle(call: Call, body: dict[str, Any]) -> None:
    found = call.writable()
    _gate(call, found)
    status = text_of(body.get("status"), "status")
    if status not in _STATUSES:
        raise HttpError(400, f"status has to be one of {', '.join(_STATUSES)}.")
    known = [request for each in _STATUSES for request in call.hub.community.requests(found, each)]
    if body.get("requestId") is not None:
        asked = [request for request in known if _request_id(found, request.user) == body["requestId"]]
    else:
        user = text_of(body.get("user"), "user").lower()
        asked = [request for request in known if request.user == user]
    if not asked:
        raise HttpError(404, f"Nobody of this name has asked for access to {found.name}.")
    if asked[0].status == status:
        raise HttpError(404, f"The request of {asked[0].user} is {status} already.")
    call.hub.community.set_access(found, asked[0].user, status, int(time.time()))
    call.note(action=f"access.{status}", of=asked[0].user)


def _grant(call: Call, body: dict[str, Any]) -> None:
    found = call.writable()
    _gate(call, found)
    name = text_of(body.get("user"), "user")
    space = call.hub.accounts.namespace(name)
    if space is None or space.is_organisation:
        raise HttpError(404, f"There is no user called {name}.")
    if call.hub.community.access(found, name) == ACCEPTED:
        raise HttpError(400, f"{space.name} has access to {found.name} already.")
    call.hub.community.set_access(found, name, ACCEPTED, int(time.time()))
    call.note(action="access.accepted", of=space.name)
