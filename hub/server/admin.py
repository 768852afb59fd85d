"""`/api/admin`: the same administration as on the data folder, for an administrator's token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from surgery.errors import InputError, OptionError
from surgery.hub.server.administration import Administration, LocalAdministration
from surgery.hub.server.hub import Call
from surgery.hub.server.interfaces import ADMIN
from surgery.hub.server.web import HttpError, json_body, json_response, text_of

_MAX_BODY = 64 << 10


def _texts(value: object, what: str) -> list[str]:
    if not isinstance(value, list):
        raise HttpError(400, f"{what} has to be a list.")
    return [text_of(item, what) for item in value]


def _or_none(value: object, what: str) -> str | None:
    return None if value is None else text_of(value, what)


def _days(value: object) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise HttpError(400, "days has to be a number.")
    return value


def _create_token(of: Administration, body: dict[str, Any]) -> Any:
    user, role = text_of(body.get("user"), "user"), text_of(body.get("role"), "role")
    repository, given = _or_none(body.get("repository"), "repository"), _or_none(body.get("given"), "given")
    label = text_of(body.get("label"), "label", "admin")[:100]
    return of.create_token(user, role, repository, _days(body.get("days")), given, label)


# What the audit log calls a request that is refused, whatever it asks for in particular; and how it is done.
_ACTIONS: dict[tuple[str, str], tuple[str, Callable[[Administration, dict[str, Any]], Any]]] = {
    ("GET", "namespaces"): ("user.list", lambda of, _: of.namespaces()),
    ("POST", "users"): ("user.add", lambda of, body: of.add_user(text_of(body.get("name"), "name"))),
    ("POST", "organisations"): ("org.add", lambda of, body: of.add_organisation(
        text_of(body.get("name"), "name"), _texts(body.get("members", []), "members"),
        body.get("private_by_default") is True,
    )),
    ("POST", "members"): ("org.member", lambda of, body: of.set_member(
        text_of(body.get("organisation"), "organisation"), text_of(body.get("user"), "user"),
        body.get("member") is not False,
    )),
    ("POST", "tokens"): ("token.create", _create_token),
    ("POST", "tokens/list"): ("token.list", lambda of, body: of.tokens(_or_none(body.get("user"), "user"))),
    ("POST", "tokens/revoke"): ("token.revoke", lambda of, body: of.revoke_token(text_of(body.get("id"), "id"))),
}  # fmt: skip


async def handle(call: Call, parts: tuple[str, ...]) -> Response:
    """A request below `/api/admin`."""
    name, action = _ACTIONS.get((call.request.method, "/".join(parts)), ("admin", None))
    call.note(action=name)
    user = call.user()
    if user.role != ADMIN or user.repository is not None:
        raise HttpError(403, "This needs the token of an administrator.")
    if action is None:
        raise HttpError(404, "There is no such address.")
    body = await json_body(call.request, _MAX_BODY) if call.request.method == "POST" else {}
    of = LocalAdministration(call.hub.accounts, lambda done, details: call.note(action=done, **details))
    try:
        report = await run_in_threadpool(action, of, body)
    except (OptionError, InputError) as error:
        raise HttpError(400, error.message) from None
    return json_response(report.as_dict())
