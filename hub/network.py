"""What requests to a Hub share: which errors there are, which of them are worth another try, and how to say so."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

Answer = TypeVar("Answer")

# What the client's own calls for a repository's description do not do: try again.
TRIES = 4
FIRST_PAUSE = 0.5  # seconds; doubles
# A server that asks for more patience than this has no time for us.
LONGEST_PAUSE = 120.0
BUSY = (408, 429, 500, 502, 503, 504)


def patiently(call: Callable[[], Answer], *also: type[Exception]) -> Answer:
    """Call the Hub, again where it was busy or the line broke; `also` are other errors worth another try."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    pause = FIRST_PAUSE
    for _ in range(TRIES - 1):
        asked = None
        try:
            return call()
        except OfflineModeIsEnabled:
            raise
        except (*network_errors(), *also) as error:
            response = getattr(error, "response", None) if isinstance(error, HfHubHTTPError) else None
            if response is not None and response.status_code not in BUSY:
                raise
            if response is None and not isinstance(error, (*also, *line_errors())):
                raise
            asked = None if response is None else retry_after(response.headers)
        time.sleep(min(asked if asked is not None else pause, LONGEST_PAUSE))
        pause *= 2
    return call()


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds that a busy server asks for, in `Retry-After` or `RateLimit`; None without, and for a date."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]  # documented, not exported

    value = headers.get("retry-after", "").strip()
    if value.isdecimal() and len(value) < 10:
        return float(value)
    limit = parse_ratelimit_headers(headers)
    return limit.reset_in_seconds + 1.0 if limit is not None and limit.remaining == 0 else None


def line_errors() -> tuple[type[Exception], ...]:
    """What a connection that breaks or is refused raises, by the HTTP library that the Hub's client uses."""
    from huggingface_hub.errors import HfHubHTTPError

    library = sys.modules[HfHubHTTPError.__bases__[0].__module__.partition(".")[0]]
    return (library.TransportError,)


def network_errors() -> tuple[type[Exception], ...]:
    """What a failed request raises: the Hub client's own error, and whatever its HTTP library has for errors."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, HfHubHTTPError, *HfHubHTTPError.__bases__)
