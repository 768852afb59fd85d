"""Logging in with a token, and one's own tokens: listed, made and revoked."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from surgery.errors import SurgeryError
from surgery.hub.naming import parse_repository
from surgery.hub.server.interfaces import ADMIN, ROLES, WRITE
from surgery.hub.server.pages import addresses, session
from surgery.hub.server.pages.render import html, see_other
from surgery.hub.server.pages.session import Visit
from surgery.hub.server.web import HttpError

_MAX_TOKEN = 1024
_MAX_LABEL = 100
_MOST_DAYS = 3650
_DAY = 86_400
_NEVER_KEPT = {"Cache-Control": "no-store"}


@dataclass(frozen=True)
class Token:
    """What is known of a token, which is not the token itself.

    Attributes:
        id: the first digits of its hash.
        role: what it allows.
        repository: the one repository that it is for, in lower case; None for all.
        label: what it is called.
        created: seconds since 1970.
        expires: likewise; None for never.
    """

    id: str
    role: str
    repository: str | None
    label: str
    created: int
    expires: int | None


def login(visit: Visit, sentence: str = "", status: int = 200) -> Response:
    """`GET /login`."""
    visit, is_new = session.with_binding(visit)
    following = addresses.within(visit.call.request.query_params.get("next", "/"))
    response = html("login.html", {"visit": visit, "sentence": sentence, "following": following}, status)
    if is_new:
        session.bind(visit, response)
    return response


async def begin(visit: Visit) -> Response:
    """`POST /login`: a token for a session."""
    fields = await session.form_of(visit)
    token = fields.get("token", "").strip()
    accounts, now = visit.call.hub.accounts, int(time.time())
    identity = None
    if 0 < len(token) <= _MAX_TOKEN:
        identity = await run_in_threadpool(accounts.identify, token, now)
    if identity is None:
        sentence = "This server knows no such token, or it has expired. Check that all of it was copied."
        return await run_in_threadpool(login, visit, sentence, 403)
    response = see_other(addresses.within(fields.get("next", "/")))
    session.begin(visit, hashlib.sha256(token.encode()).digest(), response)
    return response


async def end(visit: Visit) -> Response:
    """`POST /logout`."""
    await session.form_of(visit)
    response = see_other("/")
    session.end(visit, response)
    return response


# Tokens ---------------------------------------------------------------------------------------------------------------


def tokens(visit: Visit, sentence: str = "", status: int = 200, made: str = "") -> Response:
    """`GET /settings/tokens`."""
    user = visit.call.identity
    if user is None:
        return see_other(addresses.with_query(addresses.LOGIN, {"next": addresses.TOKENS}))
    may_change = _why_not(visit) is None
    values = {
        "visit": visit,
        "tokens": _all(visit) if may_change else [_own(visit)],
        "own": _own(visit).id,
        "now": int(time.time()),
        "why_not": _why_not(visit),
        "roles": ROLES[: ROLES.index(user.role) + 1],
        "sentence": sentence,
        "made": made,
    }
    response = html("tokens.html", values, status)
    response.headers.update(_NEVER_KEPT)
    return response


def _all(visit: Visit) -> list[Token]:
    """The user's tokens, the oldest first."""
    listed = visit.call.hub.accounts.tokens(visit.call.user().user)
    return [Token(row[0], row[2], row[3], row[4], row[5], row[6]) for row in listed]


def _own(visit: Visit) -> Token:
    """The token of the session."""
    if visit.digest is None:
        raise HttpError(403, "Tokens are managed in a browser: log in first.")
    identity = visit.digest.hex()
    return next(token for token in _all(visit) if identity.startswith(token.id))


def _why_not(visit: Visit) -> str | None:
    """Why the session's token may not make or revoke others; None if it may.

    One token must not lead to more than it allows itself: not to another repository, nor to writing.
    """
    user = visit.call.user()
    if user.repository is not None:
        return f"You are logged in with a token for {user.repository} alone, which does not show or make others."
    if user.role not in (WRITE, ADMIN):
        return "You are logged in with a token that may only read, which does not show or make others."
    return None


async def make(visit: Visit) -> Response:
    """`POST /settings/tokens`: a new token, shown in the answer and never again."""
    fields = await session.form_of(visit)
    return await run_in_threadpool(_make, visit, fields)


def _make(visit: Visit, fields: Mapping[str, str]) -> Response:
    user = visit.call.user()
    if (why := _why_not(visit)) is not None:
        raise HttpError(403, why)
    role, label = fields.get("role", ""), fields.get("label", "").strip()
    repository, days = fields.get("repository", "").strip() or None, fields.get("days", "").strip()
    now = int(time.time())
    try:
        if role not in ROLES[: ROLES.index(user.role) + 1]:
            return tokens(visit, "Choose what the token may do.", 400)
        if not 0 < len(label) <= _MAX_LABEL or not label.isprintable():
            return tokens(visit, f"Give the token a name of 1 to {_MAX_LABEL} characters.", 400)
        if repository is not None:
            parse_repository(repository)
        if days and not (days.isdecimal() and len(days) < 6 and 0 < int(days) <= _MOST_DAYS):
            return tokens(visit, f"Give the days as a number from 1 to {_MOST_DAYS}, or leave it empty.", 400)
        expires = _earliest(now + int(days) * _DAY if days else None, _own(visit).expires)
        token = f"hub_{secrets.token_urlsafe(32)}"
        visit.call.hub.accounts.add_token(token, user.user, role, repository, label, now, expires)
    except SurgeryError as error:
        return tokens(visit, error.message, 400)
    return tokens(visit, made=token)


def _earliest(first: int | None, second: int | None) -> int | None:
    """A token that expires makes none that outlives it."""
    known = [time for time in (first, second) if time is not None]
    return min(known) if known else None


async def revoke(visit: Visit) -> Response:
    """`POST /settings/tokens/revoke`."""
    fields = await session.form_of(visit)
    return await run_in_threadpool(_revoke, visit, fields)


def _revoke(visit: Visit, fields: Mapping[str, str]) -> Response:
    identity, own = fields.get("token", ""), _own(visit).id
    # Its own token anybody may give up.
    if identity != own and (why := _why_not(visit)) is not None:
        raise HttpError(403, why)
    is_theirs = identity in {token.id for token in _all(visit)}
    if not is_theirs or not visit.call.hub.accounts.remove_token(identity):
        return tokens(visit, "There is no such token any more.", 404)
    response = see_other(addresses.LOGIN if identity == own else addresses.TOKENS)
    if identity == own:
        session.end(visit, response)
    return response
