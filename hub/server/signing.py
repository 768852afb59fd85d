"""Short-lived tokens and addresses that prove themselves: signed with a key that only the server has (HMAC-SHA256)."""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from surgery.errors import FormatError

# Seconds. Clients renew them on their own.
TOKEN_LIFE = 3600
ADDRESS_LIFE = 3600
_KEY_BYTES = 32
# A token names the namespaces of its user, who may be in hundreds; a request's headers may have 64 KiB.
_LONGEST = 48 << 10


def load_key(path: Path) -> bytes:
    """The key in a file, which is made if it is not there, for its owner to read only."""
    while True:
        try:
            key = path.read_bytes()
        except FileNotFoundError:
            _make_key(path)
            continue
        if len(key) != _KEY_BYTES:
            raise FormatError(f"{path} has {len(key)} bytes, expected {_KEY_BYTES}; remove it to have a new key made.")
        return key


def _make_key(path: Path) -> None:
    making = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    descriptor = os.open(making, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, secrets.token_bytes(_KEY_BYTES))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    with contextlib.suppress(FileExistsError):  # of two processes that start at once, the first makes it
        os.link(making, path)
    making.unlink()


class Signer:
    """Signs and checks. What is signed says for what purpose, so that one thing cannot be used for another."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def _mac(self, purpose: str, message: bytes) -> bytes:
        return hmac.digest(self._key, purpose.encode() + b"\0" + message, hashlib.sha256)

    def token(self, purpose: str, claims: Mapping[str, object], expires: int) -> str:
        """A token with claims that anybody can read and nobody change."""
        text = json.dumps({**claims, "exp": expires}, separators=(",", ":"), sort_keys=True).encode()
        return f"{_encode(text)}.{_encode(self._mac(purpose, text))}"

    def claims(self, purpose: str, token: str, now: int) -> Mapping[str, object] | None:
        """What a token claims; None where it is forged, of another purpose, or has expired."""
        first, dot, last = token.partition(".")
        if not dot or len(token) > _LONGEST:
            return None
        try:
            text, mac = _decode(first), _decode(last)
        except (ValueError, binascii.Error):
            return None
        if not hmac.compare_digest(mac, self._mac(purpose, text)):
            return None
        claims: dict[str, object] = json.loads(text)
        expires = claims["exp"]
        return claims if isinstance(expires, int) and now < expires else None

    def signature(self, purpose: str, *parts: object) -> str:
        """What goes into an address to prove the rest of it."""
        return self._mac(purpose, json.dumps(parts).encode()).hex()

    def is_signature(self, given: str, purpose: str, *parts: object) -> bool:
        return hmac.compare_digest(given.encode(), self.signature(purpose, *parts).encode())


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
