"""Content in a local folder: one read-only file for each SHA-256.

    blobs/ab/abcd...    the content, named by its hash, mode 0444
    recipes/ab/abcd...  for content that came in as chunks: which ones, of which xorbs
    xorbs/12/1234...    xorbs by their hash
    incoming/...        content on its way in, locked by the process that writes it

Order of writing: the bytes, fsync of the file, chmod, rename into `blobs/`, fsync of that folder. Only then may a
commit name it; only when its xorbs are there may a recipe be. A kill leaves a file in `incoming/` whose lock is free:
whoever opens the store next removes it. Content is copied in, never linked to the file it came from: that one may be
written to later.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from surgery.errors import FormatError
from surgery.hub.interfaces import Content, Incoming, StoredFile
from surgery.hub.transfer import reserve, write_all
from surgery.hub.xet import hashes
from surgery.hub.xet.recipes import AssembledSource, Recipe, StoredXorb, decode, encode
from surgery.hub.xet.xorbs import XorbIndex, read_index
from surgery.source import FileSource, Source
from surgery.writer import one_sentence, sync

_SHA256 = re.compile(r"[0-9a-f]{64}")
# Linux's ioctl that makes one file share the blocks of another, on btrfs, XFS and their like.
_FICLONE = 0x40049409
# Xorbs whose indices are kept in memory, open: about 70 kB each.
_KEPT_XORBS = 256


class LocalContent:
    """See the module. Safe for any number of processes on one machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.blobs = root / "blobs"
        self._recipes = root / "recipes"
        self._xorbs = root / "xorbs"
        self._incoming = root / "incoming"
        self._open_xorbs: OrderedDict[bytes, StoredXorb] = OrderedDict()
        self._mutex = threading.Lock()

    def _blob(self, sha256: str) -> Path:
        if not _SHA256.fullmatch(sha256):
            raise ValueError(f"{sha256!r} is no SHA-256")
        return self.blobs / sha256[:2] / sha256

    def _recipe(self, sha256: str) -> Path:
        if not _SHA256.fullmatch(sha256):
            raise ValueError(f"{sha256!r} is no SHA-256")
        return self._recipes / sha256[:2] / sha256

    def path(self, sha256: str) -> Path | None:
        path = self._blob(sha256)
        return path if path.is_file() else None

    def open(self, sha256: str) -> Source:
        if (path := self.path(sha256)) is not None:
            return FileSource(path)
        recipe = self.recipe(sha256)
        if recipe is None:
            raise FormatError(
                f"The registry at {self.root} has lost the content {sha256}; push it again, or restore it from a "
                "backup."
            )
        return AssembledSource(str(self._recipe(sha256)), recipe, self.open_xorb)

    def size(self, sha256: str) -> int | None:
        try:
            return self._blob(sha256).stat().st_size
        except FileNotFoundError:
            recipe = self.recipe(sha256)
            return None if recipe is None else recipe.size

    def stored(self, sha256: str) -> int:
        found = 0
        for path in (self._blob(sha256), self._recipe(sha256)):
            with contextlib.suppress(FileNotFoundError):
                found += path.stat().st_size
        return found

    def touch(self, sha256: str) -> bool:
        found = [_touch(path) for path in (self._blob(sha256), self._recipe(sha256))]
        return any(found)

    def touched(self, sha256: str) -> float:
        return max(_touched(path) for path in (self._blob(sha256), self._recipe(sha256)))

    def has(self, sha256: str) -> bool:
        """Whether there is anything by this name, whole or not."""
        return self._blob(sha256).is_file() or self._recipe(sha256).is_file()

    def remove(self, sha256: str) -> None:
        self.remove_blob(sha256)
        self.remove_recipe(sha256)

    def remove_blob(self, sha256: str) -> None:
        """Remove the file, and leave the recipe, if there is one."""
        self._blob(sha256).unlink(missing_ok=True)

    def remove_recipe(self, sha256: str) -> None:
        """Remove the recipe, and leave the file, if there is one."""
        self._recipe(sha256).unlink(missing_ok=True)

    def list(self) -> Iterator[tuple[str, int, float]]:
        for root in (self.blobs, self._recipes):
            for file in _files(root):
                yield file.name, file.size, file.touched

    # Chunks -----------------------------------------------------------------------------------------------------------

    def recipe(self, sha256: str) -> Recipe | None:
        path = self._recipe(sha256)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        recipe = decode(data, str(path))
        if recipe.sha256 != sha256:
            raise FormatError(f"{path} is damaged (it is of another file); restore it from a backup.")
        return recipe

    def keep_recipe(self, recipe: Recipe) -> None:
        with self.receive() as incoming:
            incoming.write(memoryview(encode(recipe)))
            incoming.publish(self._recipe(recipe.sha256))

    def xorb_path(self, digest: bytes) -> Path:
        """Where a xorb lies, or would."""
        name = hashes.text(digest)
        return self._xorbs / name[:2] / name

    def has_xorb(self, digest: bytes) -> bool:
        return self.xorb_path(digest).is_file()

    def touch_xorb(self, digest: bytes) -> bool:
        return _touch(self.xorb_path(digest))

    def touched_xorb(self, digest: bytes) -> float:
        return _touched(self.xorb_path(digest))

    def xorbs(self) -> Iterator[StoredFile]:
        return _files(self._xorbs)

    def remove_xorb(self, digest: bytes) -> None:
        self.xorb_path(digest).unlink(missing_ok=True)
        with self._mutex:
            self._open_xorbs.pop(digest, None)

    def open_xorb(self, digest: bytes) -> StoredXorb:
        with self._mutex:
            if (found := self._open_xorbs.get(digest)) is not None:
                self._open_xorbs.move_to_end(digest)
                return found
        path = self.xorb_path(digest)
        if not path.is_file():
            raise FormatError(f"The registry at {self.root} has lost the xorb {path.name}; restore it from a backup.")
        source = FileSource(path)
        index = read_index(source)
        if index.digest != digest:
            raise FormatError(f"{path} is damaged (it is another xorb); restore it from a backup.")
        stored = StoredXorb(index, source)
        with self._mutex:
            self._open_xorbs[digest] = stored
            while len(self._open_xorbs) > _KEPT_XORBS:
                self._open_xorbs.popitem(last=False)
        return stored

    # Coming in --------------------------------------------------------------------------------------------------------

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

    def clear(self, dry_run: bool = False) -> Sequence[int]:
        found = []
        for path in self._incoming.iterdir() if self._incoming.is_dir() else ():
            with contextlib.suppress(OSError):
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    size = os.fstat(descriptor).st_size
                    if not dry_run:
                        path.unlink()
                    found.append(size)
                finally:
                    os.close(descriptor)
        return found


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
        self.publish(self._content._blob(sha256))

    def keep_xorb(self, index: XorbIndex) -> None:
        self.write(memoryview(index.footer))
        self.publish(self._content.xorb_path(index.digest))

    def publish(self, target: Path) -> None:
        """Make it durable, read-only, and visible under another name."""
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


def _touch(path: Path) -> bool:
    # By the clock that everything else here is compared with; the kernel's own for files is some milliseconds behind.
    now = time.time_ns()
    try:
        os.utime(path, ns=(now, now))
    except FileNotFoundError:
        return False
    return True


def _touched(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _files(root: Path) -> Iterator[StoredFile]:
    """The files two levels below a folder, by name."""
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        for path in sorted(folder.iterdir()):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                yield StoredFile(path.name, status.st_size, status.st_mtime)


def disk(root: Path) -> AbstractContextManager[None]:
    """Turn what the operating system says about the registry into one sentence."""
    return one_sentence(
        f"The registry at {root}",
        f"The disk is full: nothing was added to the registry at {root}; free some space and try again.",
    )


_: type[Incoming] = LocalIncoming
__: type[Content] = LocalContent
