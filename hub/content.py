"""Content in a local folder: one read-only file for each SHA-256.

    blobs/ab/abcd...    the content, named by its hash, mode 0444
    incoming/...        content on its way in, locked by the process that writes it

Order of writing: the bytes, fsync of the file, chmod, rename into `blobs/`, fsync of that folder. Only then may a
commit name it. A kill leaves a file in `incoming/` whose lock is free: whoever opens the store next removes it. Content
is copied in, never linked to the file it came from: that one may be written to later.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from surgery.hub.interfaces import Incoming
from surgery.hub.transfer import reserve, write_all
from surgery.writer import one_sentence, sync

_SHA256 = re.compile(r"[0-9a-f]{64}")
# Linux's ioctl that makes one file share the blocks of another, on btrfs, XFS and their like.
_FICLONE = 0x40049409


class LocalContent:
    """See the module. Safe for any number of processes on one machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.blobs = root / "blobs"
        self._incoming = root / "incoming"

    def path(self, sha256: str) -> Path:
        if not _SHA256.fullmatch(sha256):
            raise ValueError(f"{sha256!r} is no SHA-256")
        return self.blobs / sha256[:2] / sha256

    def size(self, sha256: str) -> int | None:
        try:
            return self.path(sha256).stat().st_size
        except FileNotFoundError:
            return None

    def touch(self, sha256: str) -> bool:
        try:
            os.utime(self.path(sha256))
        except FileNotFoundError:
            return False
        return True

    def remove(self, sha256: str) -> None:
        self.path(sha256).unlink(missing_ok=True)

    def list(self) -> Iterator[tuple[str, int, float]]:
        for folder in sorted(self.blobs.iterdir()) if self.blobs.is_dir() else ():
            for path in sorted(folder.iterdir()):
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    yield path.name, status.st_size, status.st_mtime

    def receive(self) -> AbstractContextManager[LocalIncoming]:
        return self._receive()

    @contextlib.contextmanager
    def _receive(self) -> Iterator[LocalIncoming]:
        with disk(self.root):
            self._incoming.mkdir(parents=True, exist_ok=True)
            incoming = LocalIncoming(self, self._incoming / secrets.token_hex(8))
        try:
            yield incoming
        finally:
            incoming.close()

    def clear(self) -> None:
        """Remove what killed processes left behind."""
        for path in self._incoming.iterdir() if self._incoming.is_dir() else ():
            with contextlib.suppress(OSError):
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink(missing_ok=True)
                finally:
                    os.close(descriptor)


class LocalIncoming:
    """A file in `incoming/`, locked for as long as it is open."""

    def __init__(self, content: LocalContent, path: Path) -> None:
        self._content = content
        self._path = path
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # Between the creation and the lock somebody may have taken it for a leftover and removed it.
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                    break
            os.close(descriptor)
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    def reserve(self, size: int) -> None:
        """Make room for so many bytes."""
        with disk(self._content.root):
            reserve(self._descriptor, size)

    def sync(self) -> None:
        """Begin to make it durable, while other work goes on; `keep` then has less to wait for."""
        with disk(self._content.root):
            os.fsync(self._descriptor)

    def write(self, data: memoryview) -> None:
        with disk(self._content.root):
            write_all(self._descriptor, data.cast("B"))

    def clone(self, descriptor: int) -> bool:
        """Share the blocks of another file, where the file system can: no bytes move. False where it cannot."""
        try:
            fcntl.ioctl(self._descriptor, _FICLONE, descriptor)
        except OSError:
            return False
        return True

    def keep(self, sha256: str) -> None:
        target = self._content.path(sha256)
        with disk(self._content.root):
            os.fsync(self._descriptor)
            os.fchmod(self._descriptor, 0o444)
            if not target.parent.is_dir():
                target.parent.mkdir(parents=True, exist_ok=True)
                sync(target.parent.parent)
                sync(target.parent.parent.parent)
            # Equal names have equal bytes: whoever comes second replaces a file by its like.
            os.rename(self._path, target)
            sync(target.parent)
        self.close()

    def close(self) -> None:
        """Let go of it; what was not kept is removed."""
        if self._descriptor >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1


def disk(root: Path) -> AbstractContextManager[None]:
    """Turn what the operating system says about the registry into one sentence."""
    return one_sentence(
        f"The registry at {root}",
        f"The disk is full: nothing was added to the registry at {root}; free some space and try again.",
    )


_: type[Incoming] = LocalIncoming
