"""Who looks at a page: a session is a signed cookie that stands for a token.

The cookie holds the token's hash, not the token, and the hash is looked up with each request: revoking the token ends
the session. It lets a browser read pages and files, and fill in the site's own forms; requests that change anything
under `/api` take tokens only. Each form carries a value made from the cookie of the browser it was sent to, so that no
other site can have it sent.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, replace
from urllib.parse import parse_qs

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from surgery.hub.server.hub import Call
from surgery.hub.server.tracing import trace_of
from surgery.hub.server.web import HttpError, whole_body

# Seconds.
LIFE = 7 * 86_400
_PURPOSE = "session"
_MAX_FORM = 16 << 10
_FORGED = "This form was not sent from a page of this site, or the page was too old; load it again."


@dataclass(frozen=True)
class Visit:
    """A request by a browser.

    Attributes:
        call: the request; its identity is that of the session, if there is one.
        binding: what this browser's forms are bound to: the value of a cookie of its own. Empty where it has none.
        digest: SHA-256 of the session's token; None for nobody.
    """

    call: Call
    binding: str = ""
    digest: bytes | None = None

    @property
    def form(self) -> str:
        """What a form has to carry."""
        return self.call.hub.signer.signature("form", self.binding)

    def at(self, kind: str, name: str, rest: tuple[str, ...]) -> Visit:
        """The same for a repository."""
        return replace(self, call=self.call.at(kind, name, rest))


def _is_secure(call: Call) -> bool:
    return call.base.startswith("https://")


def _cookie(call: Call, name: str) -> str:
    # The prefix makes a browser take it from this very host only, and only by https.
    return f"__Host-{name}" if _is_secure(call) else name


def _set(call: Call, response: Response, name: str, value: str, life: int) -> None:
    secure = _is_secure(call)
    response.set_cookie(_cookie(call, name), value, max_age=life, secure=secure, httponly=True, samesite="lax")


async def visiting(call: Call) -> Visit:
    """The visit that a request is part of. A token in the request goes before a session."""
    cookies = call.request.cookies
    value = cookies.get(_cookie(call, "surgery-session"), "")
    if call.identity is None and value:
        claims = call.hub.signer.claims(_PURPOSE, value, int(time.time()))
        token = claims.get("token") if claims is not None else None
        if isinstance(token, str):
            digest = bytes.fromhex(token)
            identity = await run_in_threadpool(call.hub.accounts.identify_digest, digest, int(time.time()))
            if identity is not None:
                trace = trace_of(call.request)
                trace.user, trace.token = identity.user, identity.token
                return Visit(replace(call, identity=identity), value, digest)
    return Visit(call, cookies.get(_cookie(call, "surgery-form"), ""))


def with_binding(visit: Visit) -> tuple[Visit, bool]:
    """The visit with something to bind a form to; and whether that is new, and has to go to the browser."""
    return (visit, False) if visit.binding else (replace(visit, binding=secrets.token_urlsafe(32)), True)


def bind(visit: Visit, response: Response) -> None:
    """Give the browser of a stranger what the form is bound to."""
    _set(visit.call, response, "surgery-form", visit.binding, LIFE)


def begin(visit: Visit, digest: bytes, response: Response) -> None:
    """Begin a session for a token."""
    call = visit.call
    value = call.hub.signer.token(_PURPOSE, {"token": digest.hex()}, int(time.time()) + LIFE)
    _set(call, response, "surgery-session", value, LIFE)


def end(visit: Visit, response: Response) -> None:
    """Take the session's cookie from the browser."""
    secure = _is_secure(visit.call)
    name = _cookie(visit.call, "surgery-session")
    response.delete_cookie(name, secure=secure, httponly=True, samesite="lax")


async def form_of(visit: Visit) -> dict[str, str]:
    """The fields of a form of this site. Raises `HttpError` (403) for one that was sent from elsewhere."""
    request = visit.call.request
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise HttpError(403, _FORGED)
    if not request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
        raise HttpError(415, "A form has to come as application/x-www-form-urlencoded.")
    body = await whole_body(request, _MAX_FORM)
    try:
        fields = {name: values[-1] for name, values in parse_qs(body.decode(), max_num_fields=20).items()}
    except ValueError:
        raise HttpError(400, "The body is no form.") from None
    given, signer = fields.get("form", ""), visit.call.hub.signer
    if not visit.binding or not signer.is_signature(given, "form", visit.binding):
        raise HttpError(403, _FORGED)
    return fields
