"""Repositories as a whole: making, removing, moving and listing them; branches and tags; who somebody is."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from surgery.errors import SurgeryError
from surgery.hub.interfaces import BRANCHES, PULLS, TAGS, ConflictError
from surgery.hub.naming import MAIN, RepositoryName, check_branch, parse_repository
from surgery.hub.server import describing
from surgery.hub.server.access import parsed_gate
from surgery.hub.server.files import next_page
from surgery.hub.server.hub import WRONG_TOKEN, Call
from surgery.hub.server.web import HttpError, json_body, json_response, page, text_of, unquoted
from surgery.hub.store import iterate_history

KINDS = ("model", "dataset")
# Words that follow a repository's name in an address; a repository of one of these names could not be told from them.
RESERVED = frozenset({
    "revision", "tree", "paths-info", "refs", "branch", "tag", "commits", "preupload", "commit", "settings", "resolve",
    "auth-check", "xet-read-token", "xet-write-token", "duplicate", "lfs-files", "super-squash", "discussions", "raw",
    "blob", "compare", "lineage", "fits", "user-access-request", "ask-access",
})  # fmt: skip
_FIRST = "initial commit"
_COMMITS = 100


async def whoami(call: Call) -> Response:
    """`GET /api/whoami-v2`."""
    user = call.identity
    if user is None:
        raise HttpError(401, WRONG_TOKEN)
    organisations = [{"type": "org", "id": name.lower(), "name": name, "fullname": name} for name in user.organisations]
    token = {"displayName": user.token, "role": "write" if user.role == "admin" else user.role}
    return json_response({
        "type": "user", "id": user.user.lower(), "name": user.user, "fullname": user.user, "email": None,
        "canPay": False, "isPro": False, "orgs": organisations, "auth": {"type": "access_token", "accessToken": token},
    })  # fmt: skip


# Making, removing, moving ---------------------------------------------------------------------------------------------


def parsed_target(call: Call, body: Mapping[str, Any]) -> tuple[str, RepositoryName]:
    """Kind and name in the body of a request. A name alone is one of the user's own."""
    kind = text_of(body.get("type"), "type", "model")
    if kind not in KINDS:
        raise HttpError(400, f"There are no {kind}s here, only models and datasets.")
    name = text_of(body.get("name"), "name")
    namespace = body.get("organization") or ("" if "/" in name else call.user().user)
    return kind, _parsed(f"{namespace}/{name}" if namespace else name)


def _parsed(text: str) -> RepositoryName:
    try:
        name = parse_repository(text)
    except SurgeryError as error:
        raise HttpError(400, error.message) from None
    if name.name.lower() in RESERVED:
        raise HttpError(400, f"No repository may be called {name.name}: that has a meaning in addresses.")
    return name


def _is_private(body: Mapping[str, Any], default: bool) -> bool:
    if isinstance(visibility := body.get("visibility"), str):
        return visibility != "public"
    return bool(body.get("private", default))


def _url(call: Call, kind: str, name: RepositoryName) -> str:
    return f"{call.base}/{'' if kind == 'model' else f'{kind}s/'}{name}"


async def create(call: Call) -> Response:
    """`POST /api/repos/create`."""
    body = await json_body(call.request)
    described, _ = await run_in_threadpool(make, call, body)
    return json_response(described)


def make(call: Call, body: Mapping[str, Any], private: bool = False) -> tuple[dict[str, object], RepositoryName]:
    """A new repository, as a client describes it; `private` where it does not say. Returns the answer and the name."""
    user = call.user()
    kind, name = parsed_target(call, body)
    space = call.hub.accounts.namespace(name.namespace) if name.namespace else None
    if space is None:
        raise HttpError(404, f"There is no user and no organisation called {name.namespace or name.name}.")
    if not user.may_write(name):
        raise HttpError(403, f"Your token does not allow you to create {name}.")
    name = RepositoryName(space.name, name.name)
    described: dict[str, object] = {"url": _url(call, kind, name), "name": str(name), "id": str(name)}
    call.note(action="create", kind=kind, repository=str(name))
    _make(call, kind, name, _is_private(body, private or space.private_by_default), described)
    return described, name


def _make(call: Call, kind: str, name: RepositoryName, private: bool, described: Mapping[str, object]) -> None:
    """A new repository with a first, empty commit, so that it has a `main`."""
    try:
        call.hub.metadata.create(name, kind, private, int(time.time()))
    except ConflictError:
        # The client that does not mind takes the address from the answer.
        raise HttpError(409, f"You already created this {kind} repo: {name}", body=described) from None
    call.hub.accounts.forget(kind, name)
    with contextlib.suppress(ConflictError):  # somebody has committed already
        call.hub.registry.commit(name, MAIN, None, [], _FIRST, {}, kind)


async def delete(call: Call) -> Response:
    """`DELETE /api/repos/delete`, with a body."""
    body = await json_body(call.request)

    def remove() -> None:
        kind, name = parsed_target(call, body)
        call.note(action="delete", kind=kind, repository=str(name))
        found = call.at(kind, str(name), ()).writable()
        call.hub.registry.delete(found.name, kind)

    await run_in_threadpool(remove)
    return json_response({})


async def move(call: Call) -> Response:
    """`POST /api/repos/move`: the old name goes on leading to it."""
    body = await json_body(call.request)

    def rename() -> None:
        kind, old = parsed_target(call, {"name": body.get("fromRepo"), "type": body.get("type")})
        _, new = parsed_target(call, {"name": body.get("toRepo"), "type": kind})
        call.note(action="move", kind=kind, repository=str(old), target=str(new))
        found = call.at(kind, str(old), ()).writable()
        space = call.hub.accounts.namespace(new.namespace) if new.namespace else None
        if space is None or not call.user().may_write(new):
            raise HttpError(403, f"Your token does not allow you to create {new}.")
        new = RepositoryName(space.name, new.name)
        # First the way to the new name, which means nothing as long as there is something under the old one.
        call.hub.accounts.redirect(kind, found.name, new)
        try:
            call.hub.metadata.move(found.name, new, kind)
        except ConflictError:
            call.hub.accounts.forget(kind, found.name)
            raise HttpError(409, f"A {kind} repository called {new} already exists") from None

    await run_in_threadpool(rename)
    return json_response({})


async def settings(call: Call) -> Response:
    """`PUT /api/models/{id}/settings`: who may see it, and who may open its files."""
    body = await json_body(call.request)

    def change() -> None:
        found = call.writable()
        gate = parsed_gate(body.get("gated"))
        call.hub.metadata.set_private(found.name, found.kind, _is_private(body, found.private))
        if "gated" in body:
            call.hub.community.set_gate(found, gate)
        call.note(action="settings", **{key: body[key] for key in ("visibility", "private", "gated") if key in body})

    await run_in_threadpool(change)
    return json_response({})


async def auth_check(call: Call) -> Response:
    """`GET /api/models/{id}/auth-check[/write]`."""
    await run_in_threadpool(call.writable if call.rest == ("write",) else call.repository)
    return json_response({})


# History --------------------------------------------------------------------------------------------------------------


async def commits(call: Call) -> Response:
    """`GET /api/models/{id}/commits/{revision}`: the history, newest first."""
    query = parse_qs(call.request.url.query)
    begin, limit = page(query, _COMMITS)
    revision = unquoted(call.rest[0])

    def find() -> list[dict[str, object]]:
        found = call.revision(revision)
        history = iterate_history(call.hub.registry, found, begin + limit + 1)
        return [describing.commit(commit) for commit in history][begin:]

    items = await run_in_threadpool(find)
    more = len(items) > limit
    return json_response(items[:limit], headers=next_page(call, begin + limit) if more else None)


# Refs -----------------------------------------------------------------------------------------------------------------


async def refs(call: Call) -> Response:
    """`GET /api/models/{id}/refs`."""

    def find() -> dict[str, object]:
        found = call.repository()
        known = call.hub.metadata.refs(found.name, found.kind)
        listed: dict[str, object] = {
            "branches": describing.refs(known, [BRANCHES]),
            "tags": describing.refs(known, [TAGS]),
            "converts": [],
        }
        if call.request.query_params.get("include_prs") in ("1", "true", "True"):
            listed["pullRequests"] = describing.refs(known, [PULLS])
        return listed

    return json_response(await run_in_threadpool(find))


async def branch(call: Call) -> Response:
    """`POST` and `DELETE /api/models/{id}/branch/{branch}`."""
    name = unquoted("/".join(call.rest))
    if call.request.method == "DELETE":
        await run_in_threadpool(_remove_ref, call, BRANCHES + name)
        return json_response({})
    body = await json_body(call.request)
    start = text_of(body.get("startingPoint"), "startingPoint", MAIN)
    await run_in_threadpool(_add_ref, call, BRANCHES + name, name, start)
    return json_response({})


async def tag(call: Call) -> Response:
    """`POST /api/models/{id}/tag/{revision}` with a name, and `DELETE /api/models/{id}/tag/{name}`."""
    given = unquoted("/".join(call.rest))
    if call.request.method == "DELETE":
        await run_in_threadpool(_remove_ref, call, TAGS + given)
        return json_response({})
    body = await json_body(call.request)
    name = text_of(body.get("tag"), "tag")
    await run_in_threadpool(_add_ref, call, TAGS + name, name, given)
    return json_response({})


def _add_ref(call: Call, ref: str, name: str, start: str) -> None:
    call.note(action="ref.add", ref=ref, start=start)
    found = call.writable()
    try:
        check_branch(name)
    except SurgeryError as error:
        raise HttpError(400, error.message) from None
    commit = call.hub.registry.resolve(found, start)
    if commit is None:
        raise HttpError(404, f"Invalid rev id: {start}", "RevisionNotFound")
    try:
        call.hub.metadata.set_ref(found.name, ref, None, commit.id, found.kind)
    except ConflictError:
        raise HttpError(409, f"Reference {ref} already exists") from None


def _remove_ref(call: Call, ref: str) -> None:
    call.note(action="ref.remove", ref=ref)
    found = call.writable()
    if ref == BRANCHES + MAIN:
        raise HttpError(403, f"Cannot delete {ref}")
    target = call.hub.metadata.refs(found.name, found.kind).get(ref)
    if target is None:
        raise HttpError(404, "Invalid rev id", "RevisionNotFound")
    try:
        call.hub.metadata.set_ref(found.name, ref, target, None, found.kind)
    except ConflictError:
        raise HttpError(409, f"{ref} was moved meanwhile; try again.") from None
