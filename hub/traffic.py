"""What went over the network during one piece of work, and how far it was proved: for reports."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from surgery.reports import Fetched


class Traffic:
    """Counts the requests for a repository and the bytes that came, from several threads."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.requests = 0
        self._mutex = threading.Lock()

    def count(self, nbytes: int) -> None:
        with self._mutex:
            self.nbytes += nbytes

    def request(self) -> None:
        with self._mutex:
            self.requests += 1


class Remote(Protocol):
    """What can say what was fetched from it."""

    @property
    def fetched(self) -> Fetched: ...


_opened: ContextVar[list[Remote] | None] = ContextVar("opened", default=None)


def note_opened(remote: Remote) -> None:
    """Count a repository among those that the work under way reads."""
    if (found := _opened.get()) is not None:
        found.append(remote)


@contextmanager
def counting() -> Iterator[list[Remote]]:
    """Collect the repositories that are opened while this lasts."""
    found: list[Remote] = []
    token = _opened.set(found)
    try:
        yield found
    finally:
        _opened.reset(token)


def summary(remotes: list[Remote]) -> tuple[Fetched, ...]:
    """What was fetched from each, one that was opened twice once."""
    found: dict[tuple[str, str], Fetched] = {}
    for remote in remotes:
        one = remote.fetched
        before = found.get((one.source, one.revision))
        found[one.source, one.revision] = one if before is None else before + one
    return tuple(found.values())
