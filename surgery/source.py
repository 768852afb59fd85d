"""Where stored bytes come from: a local file, or anything else that can hand out ranges.

Reading is by position (`pread`), never by memory map: a mapped page counts as memory of the process, faults one by one,
and turns a file that is truncated meanwhile into a signal instead of an error.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from surgery.errors import FormatError, InputError


class Source(Protocol):
    """A run of bytes that can be read in ranges, from several threads at once."""

    @property
    def name(self) -> str:
        """What to call it in an error: a path or an address."""
        ...

    @property
    def size(self) -> int:
        """Length in bytes."""
        ...

    @property
    def identity(self) -> tuple[str, int, int] | None:
        """Path, size and modification time (ns) of a local file: the key under which its hashes are cached."""
        ...

    @property
    def version(self) -> str:
        """What tells the content of a file that is none here from what may once be under the same name: its commit."""
        ...

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Be told what is going to be read, as begin and end of each range in their order; none when that is over.

        What is far away may be fetched before it is asked for. Nothing else follows from it.
        """
        ...

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole of `buffer` with the bytes at `offset`; raise `FormatError` where there are fewer."""
        ...

    def fileno(self) -> int | None:
        """A descriptor that the kernel can copy ranges from, or None."""
        ...

    def check_unchanged(self) -> None:
        """Raise `InputError` if the bytes may have changed since it was opened."""
        ...


class FileSource:
    """A local file, opened once and read by position."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        try:
            # Opening a pipe would wait for a writer.
            self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise InputError(f"{self._path} cannot be read: {error.strerror}.") from error
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{self._path} is not a file.")
        self._size, self._mtime = status.st_size, status.st_mtime_ns

    def __del__(self) -> None:
        if (fd := getattr(self, "_fd", None)) is not None:
            os.close(fd)

    @property
    def name(self) -> str:
        return str(self._path)

    @property
    def path(self) -> Path:
        return self._path

    @property
    def size(self) -> int:
        return self._size

    @property
    def identity(self) -> tuple[str, int, int] | None:
        return os.path.realpath(self._path), self._size, self._mtime

    @property
    def version(self) -> str:
        return ""

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        pass  # the kernel reads ahead

    def fileno(self) -> int:
        return self._fd

    def read_into(self, offset: int, buffer: memoryview) -> None:
        view = buffer.cast("B")
        while view:
            try:
                count = os.preadv(self._fd, [view], offset)
            except OSError as error:
                raise InputError(f"{self._path} cannot be read at byte {offset}: {error.strerror}.") from error
            if count == 0:
                raise FormatError(
                    f"{self._path} ends at byte {offset} with {len(view)} bytes still expected; "
                    "it was cut short, fetch it again."
                )
            view, offset = view[count:], offset + count

    def check_unchanged(self) -> None:
        status = os.fstat(self._fd)
        if (status.st_size, status.st_mtime_ns) != (self._size, self._mtime):
            raise InputError(f"{self._path} was changed while it was being read; run the command again.")


class NotAFile:
    """What a source has to say of a file if it is none."""

    @property
    def identity(self) -> tuple[str, int, int] | None:
        return None

    @property
    def version(self) -> str:
        return ""

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        pass

    def fileno(self) -> None:
        return None

    def check_unchanged(self) -> None:
        pass


class BytesSource(NotAFile):
    """Bytes in memory, as a source."""

    def __init__(self, name: str, data: bytes) -> None:
        self._name, self._data = name, data

    @property
    def name(self) -> str:
        return self._name

    @property
    def content(self) -> bytes:
        return self._data

    @property
    def size(self) -> int:
        return len(self._data)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        view = buffer.cast("B")
        if offset + len(view) > len(self._data):
            raise FormatError(f"{self._name} has {len(self._data)} bytes, too few for {len(view)} at {offset}.")
        view[:] = self._data[offset : offset + len(view)]


def kind_of(path: Path) -> str | None:
    """`folder` or `file` for what is at a path, None for nothing. Raises `InputError` where there is no telling."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # too long a name, no right to look, a null byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path} cannot be read: {reason}.") from error
    return "folder" if stat.S_ISDIR(mode) else "file"


def unexpanded(path: str | os.PathLike[str]) -> str:
    """What to add to "does not exist" where a path begins with `~`: in quotes, a shell leaves that as it is."""
    return "; the shell did not expand `~`, leave out the quotes" if os.fspath(path).startswith("~") else ""


def read_bytes(source: Source, offset: int, count: int) -> bytes:
    """`count` bytes at `offset`, as a new object."""
    data = bytearray(count)
    source.read_into(offset, memoryview(data))
    return bytes(data)
