"""What is remembered of a request while it is answered: who sent it, from where, and what it did."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # who administers the data folder needs no server
    from starlette.requests import Request

_KEY = "surgery.trace"


@dataclass
class Trace:
    """One request.

    Attributes:
        id: what the answer has in `X-Request-Id`, the log and the audit log beside it.
        method, path: the path as it came, still percent-encoded, without the query, which may hold a signature.
        address: of the client, or of the nearest proxy that is not trusted.
        user, token: who sent it, and what the token is called; empty for nobody.
        refused: whether it came with a token that is not valid.
        notes: what was done.
        status: of the answer.
        sent: bytes of its body.
    """

    id: str
    method: str
    path: str
    address: str
    user: str = ""
    token: str = ""
    refused: bool = False
    notes: dict[str, object] = field(default_factory=dict)
    status: int = 500
    sent: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def milliseconds(self) -> int:
        return round(1000 * (time.monotonic() - self.started))

    @property
    def changes(self) -> bool:
        """Whether the request asks for a change, done or refused; bringing in content that nothing names is none."""
        if self.method in ("GET", "HEAD", "OPTIONS"):
            return False
        if "action" in self.notes:
            return True
        # Whole addresses, for a branch may be called by any of these words.
        parts = self.path.strip("/").split("/")
        if parts[0] in ("cas", "lfs") or parts == ["api", "validate-yaml"]:
            return False
        if parts[0] == "api":
            return all(parts[place:-1] not in (["preupload"], ["paths-info"]) for place in (3, 4))
        return parts[-3:] != ["lfs", "objects", "batch"] and parts[-3:] != ["info", "lfs", "verify"]


def trace_of(request: Request) -> Trace:
    """The trace of a request; it is made when first asked for."""
    scope: dict[str, Any] = request.scope  # type: ignore[assignment]  # a MutableMapping that is a dict
    if _KEY not in scope:
        path = scope["raw_path"].decode("latin-1").partition("?")[0]
        address = request.client.host if request.client is not None else ""
        scope[_KEY] = Trace(secrets.token_hex(8), scope["method"], path, address)
    found = scope[_KEY]
    assert isinstance(found, Trace)
    return found
