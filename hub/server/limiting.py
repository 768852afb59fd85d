"""How many requests somebody may send: for each user and each address a bucket that fills at a steady rate."""

from __future__ import annotations

import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable

from surgery.hub.server.web import HttpError

_WINDOW = 60
_MOST_BUCKETS = 20_000
_IPV6_NETWORK = 64


def of_address(address: str) -> str:
    """Under what somebody at an address is counted: of IPv6 the network, since everybody has countless addresses."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return address
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((int(found), _IPV6_NETWORK), strict=False))


class Limiter:
    """Buckets of this process. Each holds what is allowed in a minute, and is full at first."""

    def __init__(self, rate: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`rate` requests a minute; 0 for any number."""
        self._rate = rate
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # what is in it, and when that was

    def take(self, key: str, times: int = 1) -> None:
        """Count a request, of which `times` as many are allowed. Raises `HttpError` (429) where there were too many."""
        allowed = self._rate * times
        if allowed <= 0:
            return
        now = self._clock()
        left, before = self._buckets.pop(key, (float(allowed), now))
        left = min(float(allowed), left + (now - before) * allowed / _WINDOW)
        enough = left >= 1
        self._buckets[key] = (left - 1 if enough else left, now)
        while len(self._buckets) > _MOST_BUCKETS:
            self._buckets.popitem(last=False)
        if enough:
            return
        wait = max(1, math.ceil((1 - left) * _WINDOW / allowed))
        raise HttpError(
            429,
            f"Too many requests: {allowed} a minute are allowed; go on in {wait} seconds.",
            headers={
                "Retry-After": str(wait),
                # What the Hub's client reads: draft-ietf-httpapi-ratelimit-headers-09.
                "RateLimit": f'"api";r=0;t={wait}',
                "RateLimit-Policy": f'"fixed window";"api";q={allowed};w={_WINDOW}',
            },
        )
