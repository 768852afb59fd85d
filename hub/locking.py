"""One at a time: what tidies a registry up, and what copies it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from surgery.errors import OutputError


@contextlib.contextmanager
def tidying(root: Path, shared: bool = False) -> Iterator[None]:
    """Hold the folder's lock for upkeep; several may if all of them share it. Raises `OutputError` if somebody has it.

    Who only pushes, pulls, serves or checks needs no lock.
    """
    path = root / "upkeep.lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise OutputError(f"{path} cannot be made: {error.strerror or error}.") from error
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"Another gc or backup is at work on {root}; wait for it to end.") from None
        yield
    finally:
        os.close(descriptor)
