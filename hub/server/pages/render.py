"""Pages as answers: the templates, and the headers that every page goes out with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.responses import Response

from surgery.figures import number, plural, size
from surgery.hub.interfaces import Commit
from surgery.hub.server.describing import iso
from surgery.hub.server.pages import addresses
from surgery.names import plain

if TYPE_CHECKING:
    from jinja2 import Environment

_FOLDER = Path(__file__).parent
# Nothing but our own style sheet and script, and no script within a page; images also from elsewhere, by https.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' https:; form-action 'self'; "
        "base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "private, no-cache",
    "Vary": "Cookie, Authorization, Accept",
}
_STATIC = {
    "style.css": "text/css; charset=utf-8",
    "copy.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
_YEAR = 31_536_000
_MAX_MESSAGE = 20_000


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(_FOLDER / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "size": size,
        "figure": number,
        "day": _day,
        "moment": _moment,
        "iso": iso,
        "plain": plain,
        "title_of": title_of,
    }
    made.globals |= {"to": addresses, "plural": plural, "asset": asset}
    return made


def title_of(commit: Commit) -> str:
    """The first line of a commit's message, without what would not show, or change how the rest shows."""
    return plain(commit.message.partition("\n")[0].strip()) or "(no message)"


def body_of(commit: Commit) -> str:
    """The other lines."""
    lines = commit.message.partition("\n")[2].strip()[:_MAX_MESSAGE].split("\n")
    return "\n".join(plain(line.replace("\t", "    ").rstrip("\r")) for line in lines)


def _day(seconds: int) -> str:
    when = datetime.fromtimestamp(seconds, UTC)
    return f"{when.day} {when:%b %Y}"


def _moment(seconds: int) -> str:
    return f"{_day(seconds)}, {datetime.fromtimestamp(seconds, UTC):%H:%M} UTC"


def html(template: str, values: Mapping[str, object], status: int = 200) -> Response:
    """A template, filled in."""
    text = _environment().get_template(template).render(values)
    return Response(text.encode("utf-8", "replace"), status, HEADERS, "text/html; charset=utf-8")


def see_other(path: str) -> Response:
    """Go on to another page, after a form."""
    return Response(None, 303, {**HEADERS, "Location": path})


@cache
def _static(name: str) -> tuple[bytes, str]:
    data = (_FOLDER / "static" / name).read_bytes()
    return data, hashlib.sha256(data).hexdigest()[:16]


def asset(name: str) -> str:
    """Where a file of the site's own is. The address changes with the file, so that browsers may keep it."""
    return f"{addresses.STATIC}{_static(name)[1]}/{name}"


def static(digest: str, name: str) -> Response | None:
    """A file of the site's own; None where there is none."""
    if name not in _STATIC or digest != _static(name)[1]:
        return None
    headers = {**HEADERS, "Cache-Control": f"public, max-age={_YEAR}, immutable"}
    return Response(_static(name)[0], 200, headers, _STATIC[name])


def pretty(text: str) -> str:
    """JSON as people read it. Raises `ValueError` for what is none, or is nested too deeply."""
    try:
        return json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
