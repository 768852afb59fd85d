"""The one writer. An output grows in a staging folder beside its target and is renamed there last.

    <parent>/.<name>.partial/
        journal.jsonl   first line: what is being made; then one line for each finished step
        files/          becomes the target
        parts/          intermediate tensors of single steps

A killed run leaves the staging folder; the same command finds its fingerprint in the journal, keeps the finished steps
and does the others. Data reach the page cache before their line reaches the journal, so a journal is to be trusted
after a kill of the process but not after a crash of the machine: it names its boot, and another boot starts over.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from surgery.checkpoint import StoredTensor
from surgery.errors import OutputError, SurgeryError
from surgery.header import TensorInfo, read_header
from surgery.layout import Layout
from surgery.source import FileSource, Source

_CHUNK = 8 << 20
_KERNEL_CHUNK = 64 << 20
# Larger writes take pages that were never used, which costs several times as much (docs/experiments.md).
_PIECE = 256 << 10
# The disk is set to work whenever so much of a tensor is written.
_WRITEBACK = 8 << 20
_SYNC_FILE_RANGE_WRITE = 2
_NO_KERNEL_COPY = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM}
_CONFIGS = {"config.json", "adapter_config.json"}
_WEIGHTS = (".safetensors", ".bin", ".index.json")


class PartSource(FileSource):
    """A file of intermediate tensors: its hashes are of no use to a later run, so it goes by no identity."""

    @property
    def identity(self) -> None:
        return None


class Staging:
    """An output in the making. Use `open_staging`, which decides what becomes of it when the work ends.

    `write`, `copy` and `record` may be called from several threads at once.
    """

    def __init__(self, target: Path, fingerprint: str) -> None:
        self.target = target
        self.root = staging_folder(target)
        self.files = self.root / "files"
        self.parts = self.root / "parts"
        self.done: dict[str, dict[str, object]] = {}
        self._descriptors: dict[str, int] = {}
        self._places: dict[str, tuple[str, int, TensorInfo]] = {}
        self._mutex = threading.Lock()
        with disk_errors(self.target):
            target.parent.mkdir(parents=True, exist_ok=True)
            self.root.mkdir(exist_ok=True)
            self._journal = os.open(self.root / "journal.jsonl", os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
            self._lock()
            self._resume(fingerprint)
            self.files.mkdir(exist_ok=True)
            self.parts.mkdir(exist_ok=True)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._journal)
            raise OutputError(f"{self.target} is being written by another process; wait for it to end.") from error

    def _resume(self, fingerprint: str) -> None:
        """Take over the finished steps of an earlier run of the same work, or clear what another work left."""
        first = {"fingerprint": fingerprint, "boot": _boot()}
        lines = os.pread(self._journal, os.fstat(self._journal).st_size, 0).split(b"\n")
        entries = []
        for line in lines[:-1]:  # what follows the last newline is a line that a kill cut short
            with contextlib.suppress(ValueError):
                entries.append(json.loads(line))
        # A kill between the last rename and the removal of this folder leaves a full journal without its files.
        if entries and entries[0] == first and self.files.is_dir():
            self.done = {entry["step"]: entry for entry in entries[1:]}
            os.ftruncate(self._journal, sum(len(line) + 1 for line in lines[:-1]))
            return
        self._clear()
        self._append(first)

    def _clear(self) -> None:
        """Remove what is staged: the journal's lines first, which must not vouch for files that are gone."""
        os.ftruncate(self._journal, 0)
        shutil.rmtree(self.files, ignore_errors=True)
        shutil.rmtree(self.parts, ignore_errors=True)

    def _append(self, entry: Mapping[str, object]) -> None:
        line = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
        with self._mutex, disk_errors(self.target):
            while line:
                line = line[os.write(self._journal, line) :]

    def record(self, step: str, entry: Mapping[str, object]) -> None:
        """Note that a step is finished, with what it found out. Everything it wrote is in the page cache by now."""
        self._append({"step": step, **entry})

    def lay_out(self, layout: Layout, subfolder: str = "") -> None:
        """Create the files of a layout at full length with their headers, and its index."""
        for file in layout.files:
            name = f"{subfolder}{file.name}"
            with disk_errors(self.target):
                path = self._path(name)
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                self._descriptors[name] = descriptor
                _write_at(descriptor, memoryview(file.raw_header), 0)
                os.ftruncate(descriptor, file.size)
            for info in file.entries:
                self._places[info.name] = (name, len(file.raw_header) + info.begin, info)
        if layout.index is not None:
            self.write_file(subfolder + layout.index[0], layout.index[1])

    def _path(self, name: str) -> Path:
        path = self.files / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write(self, tensor: str, offset: int, data: memoryview) -> None:
        """Write bytes at `offset` within an output tensor."""
        name, start, info = self._places[tensor]
        if offset + len(data) > info.end - info.begin:
            raise ValueError(f"{len(data)} bytes at {offset} overrun the output tensor {tensor!r}")
        with disk_errors(self.target):
            _write_at(self._descriptors[name], data, start + offset)
            _start_writeback(self._descriptors[name], start, offset, offset + len(data))

    def copy(self, tensor: str, source: StoredTensor, begin: int, end: int) -> None:
        """Copy bytes `begin` to `end` of a stored tensor to the same place in an output tensor, in the kernel."""
        name, start, _ = self._places[tensor]
        with disk_errors(self.target):
            copy_range(source.source, source.offset + begin, self._descriptors[name], start + begin, end - begin)
            _start_writeback(self._descriptors[name], start, begin, end)

    def copy_written(self, origin: str, tensor: str) -> int:
        """Copy an output tensor that is written already to another of the same bytes; returns how many there are."""
        (name, start, info), (other, begin, _) = self._places[origin], self._places[tensor]
        count = info.end - info.begin
        with disk_errors(self.target):
            copy_range(FileSource(self.files / name), start, self._descriptors[other], begin, count)
            _start_writeback(self._descriptors[other], begin, 0, count)
        return count

    def write_file(self, name: str, data: bytes) -> None:
        """Write a small file whole."""
        with disk_errors(self.target):
            self._path(name).write_bytes(data)

    def carry(self, name: str, source: Source) -> None:
        """Copy a file that belongs to the model as it is."""
        with disk_errors(self.target):
            descriptor = os.open(self._path(name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            try:
                copy_range(source, 0, descriptor, 0, source.size)
            finally:
                os.close(descriptor)

    def write_part(self, step: str, raw_header: bytes, data: list[memoryview]) -> None:
        """Keep the intermediate tensors of a step in a safetensors file of its own."""
        with disk_errors(self.target):
            path = self.parts / _part_name(step)
            with open(path, "wb") as file:
                file.write(raw_header)
                for view in data:
                    file.write(view)

    def read_part(self, step: str) -> dict[str, StoredTensor]:
        """The intermediate tensors of a finished step; empty if it left none."""
        path = self.parts / _part_name(step)
        if not path.exists():
            return {}
        source = PartSource(path)
        header = read_header(source)
        return {
            i.name: StoredTensor(i.name, i.dtype, i.shape, source, header.data_start + i.begin) for i in header.tensors
        }

    def check_space(self, needed: int) -> None:
        """Raise `OutputError` unless `needed` bytes fit on the disk, beside what an earlier run has already written."""
        staged = sum(_allocated(path) for path in self.root.rglob("*"))
        free = free_bytes(self.target)
        if needed - staged > free:
            raise OutputError(
                f"{self.target} needs {needed - staged:,} bytes but its disk has {free:,} free; "
                "free some space or choose another place."
            )

    def commit(self, overwrite: bool) -> None:
        """Sync everything, then rename the finished folder to the target."""
        with disk_errors(self.target):
            for path in self.files.rglob("*"):
                sync(path)
            sync(self.files)
            self.close_files()
            old = self.target.parent / f".{self.target.name}.replaced"
            if self.target.exists() and not _is_empty(self.target):
                if not overwrite:
                    raise OutputError(f"{self.target} has appeared meanwhile; it is left as it is.")
                # Both renames or none survive a kill: `recover` puts the old one back where only the first was done.
                shutil.rmtree(old, ignore_errors=True)
                os.rename(self.target, old)
            os.rename(self.files, self.target)
            sync(self.target.parent)
            self.discard()
            shutil.rmtree(old, ignore_errors=True)

    def close_files(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def discard(self) -> None:
        """Remove the staging folder."""
        self.close_files()
        self._clear()
        shutil.rmtree(self.root, ignore_errors=True)

    def close(self) -> None:
        self.close_files()
        with contextlib.suppress(OSError):
            os.close(self._journal)


class NullStaging(Staging):
    """For plans that only look: nothing is staged, and a step that writes is a bug."""

    def __init__(self) -> None:
        self.done: dict[str, dict[str, object]] = {}

    def lay_out(self, layout: Layout, subfolder: str = "") -> None:
        if layout.files or subfolder:
            raise ValueError("a plan without an output has files to write")

    def record(self, step: str, entry: Mapping[str, object]) -> None:
        pass


@contextlib.contextmanager
def open_staging(target: Path, fingerprint: str) -> Iterator[Staging]:
    """Stage an output. Nothing appears at `target` before `commit`.

    On a known error the staging folder is removed. It is kept when the disk fills up, on an interrupt and on an
    unexpected failure, so that the same command can resume.
    """
    staging = Staging(target, fingerprint)
    try:
        yield staging
    except OutputError as error:
        if not isinstance(error.__cause__, OSError) or error.__cause__.errno not in (errno.ENOSPC, errno.EDQUOT):
            staging.discard()
        raise
    except SurgeryError:
        staging.discard()
        raise
    finally:
        staging.close()


def check_target(target: Path, inputs: Iterable[tuple[str, Path]], overwrite: bool) -> None:
    """Refuse a target that exists, is an input, lies in one, or holds one. `inputs` are roles and paths."""
    with disk_errors(target):
        _check_target(target, inputs, overwrite)


def _check_target(target: Path, inputs: Iterable[tuple[str, Path]], overwrite: bool) -> None:
    recover(target)
    real = target.resolve()
    for role, path in inputs:
        place = path.resolve()
        if place == real or place.is_relative_to(real):
            raise OutputError(f"The output {target} is, or holds, the {role} {path}; choose another output.")
        if real.is_relative_to(place) and place.is_dir():
            raise OutputError(f"The output {target} lies inside the {role} {path}; choose another output.")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise OutputError(f"The output {target} exists and is not a folder; choose another name.")
    if not target.exists() or _is_empty(target):
        return
    if not overwrite:
        raise OutputError(f"The output {target} exists already; pass --overwrite to replace it.")
    if not _is_ours(target):
        raise OutputError(
            f"The output {target} exists and holds neither a model nor an adapter; it is left as it is, "
            "choose another output."
        )


def _is_ours(target: Path) -> bool:
    """Whether a folder is what this tool or a training run writes: provenance, or weights beside their config."""
    names = set(os.listdir(target))
    return "surgery.json" in names or bool(_CONFIGS & names and any(name.endswith(_WEIGHTS) for name in names))


def recover(target: Path) -> None:
    """Undo the first half of a replacement that a kill interrupted: put the old folder back at `target`."""
    old = target.parent / f".{target.name}.replaced"
    if old.exists() and not target.exists():
        os.rename(old, target)


def free_bytes(target: Path) -> int:
    """Free bytes for this user on the disk that `target` would be written to."""
    with disk_errors(target):
        place = target.absolute()
        while not place.exists():
            place = place.parent
        status = os.statvfs(place)
        return status.f_bavail * status.f_frsize


def disk_errors(target: Path) -> contextlib.AbstractContextManager[None]:
    """What the operating system says about the output at `target` while this lasts becomes one sentence."""
    return one_sentence(
        str(target),
        f"The disk is full while {target} is being written; nothing is at the target. Free some space and run the same "
        f"command again to resume, or delete {staging_folder(target)}.",
    )


@contextlib.contextmanager
def one_sentence(place: str, full: str) -> Iterator[None]:
    """Turn what the operating system says about `place` into one sentence, which is `full` where the disk is."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(full) from error
        raise OutputError(f"{place} cannot be written: {error.strerror or error}.") from error


def staging_folder(target: Path) -> Path:
    """Where the output at `target` is staged, and what is done of it lies after an interrupt."""
    return target.parent / f".{target.name}.partial"


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    view = data.cast("B")
    while view:
        count = os.pwrite(descriptor, view[:_PIECE], offset)
        view, offset = view[count:], offset + count


def _start_writeback(descriptor: int, start: int, begin: int, end: int) -> None:
    """Let the disk write what a tensor at `start` of a file has had filled, in large pieces, while work goes on.

    Otherwise Linux waits for the sync at the end, and then so do we. Bytes `begin` to `end` of the tensor are new.
    """
    first, last = begin // _WRITEBACK * _WRITEBACK, end // _WRITEBACK * _WRITEBACK
    if first < last and (call := _sync_file_range()) is not None:
        call(descriptor, start + first, last - first, _SYNC_FILE_RANGE_WRITE)  # what it cannot do, the sync does


@functools.cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """The call of that name where the system has one."""
    if sys.platform != "linux":
        return None
    import ctypes

    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is not None:
        call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return call


def copy_range(source: Source, begin: int, descriptor: int, offset: int, count: int) -> None:
    """Copy bytes from one place to another, by the kernel where it can; it shares blocks where the file system can."""
    origin = source.fileno()
    while count and origin is not None and sys.platform == "linux":
        try:
            done = os.copy_file_range(origin, descriptor, min(count, _KERNEL_CHUNK), begin, offset)
        except OSError as error:
            if error.errno in _NO_KERNEL_COPY:
                break
            raise
        if done == 0:
            break
        begin, offset, count = begin + done, offset + done, count - done
    buffer = memoryview(bytearray(min(count, _CHUNK)))
    while count:
        view = buffer[: min(count, _CHUNK)]
        source.read_into(begin, view)
        _write_at(descriptor, view, offset)
        begin, offset, count = begin + len(view), offset + len(view), count - len(view)


def sync(path: Path) -> None:
    """Make a file durable, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _allocated(path: Path) -> int:
    status = path.lstat()
    return min(status.st_blocks * 512, status.st_size)


def _part_name(step: str) -> str:
    # Step names are tensor names: too long, or too strange, for file names.
    return hashlib.blake2b(step.encode(), digest_size=16).hexdigest() + ".safetensors"


def _boot() -> str:
    """What tells this boot of the machine from every other."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{round((time.time() - time.monotonic()) / 60)}"
