"""The SHA-256 of a file whose parts come in nearly their order."""

from __future__ import annotations

import hashlib
import threading

# Parts that wait for one before them. Beyond this they come in another order than the file's, and there is no hash.
WAITING_BYTES = 32 << 20


class Sequential:
    """A hash that is fed parts of a file as they come. Safe to use from several threads.

    `waiting` bounds the bytes of parts that came before their turn, which are kept until it is.
    """

    def __init__(self, size: int, waiting: int = WAITING_BYTES) -> None:
        self._size, self._limit = size, waiting
        self._hasher = hashlib.sha256()
        self._position = 0
        self._waiting: dict[int, bytes | bytearray] = {}
        self._given_up = False
        self._mutex = threading.Lock()

    def add(self, begin: int, data: bytes | bytearray) -> None:
        """Take the bytes at `begin`; those that were taken before are passed over."""
        with self._mutex:
            if self._given_up or begin < self._position:
                return
            self._waiting[begin] = data
            while (part := self._waiting.pop(self._position, None)) is not None:
                self._hasher.update(part)
                self._position += len(part)
            if sum(len(part) for part in self._waiting.values()) > self._limit:
                self._given_up = True
                self._waiting.clear()

    @property
    def digest(self) -> str | None:
        """The hash in hexadecimal, once all bytes have come."""
        return self._hasher.hexdigest() if self._position == self._size and not self._given_up else None
