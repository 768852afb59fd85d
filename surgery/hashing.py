"""Hashes of tensors: BLAKE3-256 of the raw bytes, the same in provenance, `verify` and the hub.

Each distinct input tensor is hashed once. What a file's tensors hash to is remembered in the user's cache folder under
the file's path, size and modification time, so that the second of forty merges onto one base reads it once less.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.checkpoint import StoredTensor
from surgery.dtypes import DType
from surgery.source import Source

if TYPE_CHECKING:
    from blake3 import blake3

_CHUNK = 4 << 20
_DAY = 86_400.0
_OLDEST = 90 * _DAY
# The path at the beginning of an entry: no path is longer on Linux, also if every byte of it is escaped.
_BEGINNING = 32_768


def new_hash() -> blake3:
    """A hasher with `update` and `hexdigest`, for one thread."""
    from blake3 import blake3

    return blake3()


def hash_tensor(tensor: StoredTensor, advance: Callable[[int], None] | None = None) -> str:
    """The hash of a stored tensor, read in chunks."""
    hasher = new_hash()
    buffer = memoryview(bytearray(min(_CHUNK, tensor.nbytes)))
    for begin in range(0, tensor.nbytes, _CHUNK):
        view = buffer[: min(_CHUNK, tensor.nbytes - begin)]
        tensor.source.read_into(tensor.offset + begin, view)
        hasher.update(view)
        if advance is not None:
            advance(len(view))
    return hasher.hexdigest()


def hash_as(tensor: StoredTensor, dtype: DType) -> str:
    """The hash that a stored tensor would have in another dtype, rounded."""
    import torch

    hasher = new_hash()
    step = max(_CHUNK // tensor.dtype.nbytes((1,)), 1)
    for begin in range(0, tensor.numel, step):
        raw = bytearray(tensor.dtype.nbytes((min(step, tensor.numel - begin),)))
        tensor.source.read_into(tensor.offset + tensor.dtype.nbytes((begin,)), memoryview(raw))
        values = torch.frombuffer(raw, dtype=torch.uint8).view(tensor.dtype.to_torch).to(dtype.to_torch)
        hasher.update(values.view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def hash_source(source: Source) -> str:
    """The hash of a whole file."""
    hasher = new_hash()
    buffer = memoryview(bytearray(min(_CHUNK, source.size)))
    for begin in range(0, source.size, _CHUNK):
        view = buffer[: min(_CHUNK, source.size - begin)]
        source.read_into(begin, view)
        hasher.update(view)
    return hasher.hexdigest()


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/checkpoint-surgery`, or the same below `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "checkpoint-surgery"


class HashBook:
    """Known hashes of stored tensors, by `StoredTensor.key`. Safe to use from several threads.

    With `enabled=False` nothing is hashed and nothing is known. With `remember=False` the cache is left alone: what a
    proof rests on is read.
    """

    def __init__(self, enabled: bool = True, remember: bool = True) -> None:
        self.enabled = enabled
        self._remember = remember
        self._known: dict[tuple[str, str, int, str], str] = {}
        self._files: dict[tuple[str, int, int], dict[str, str]] = {}
        self._changed: set[tuple[str, int, int]] = set()
        self._mutex = threading.Lock()

    def get(self, tensor: StoredTensor) -> str | None:
        with self._mutex:
            if (known := self._known.get(tensor.key)) is not None or not self.enabled:
                return known
            identity = tensor.source.identity
            return None if identity is None or not self._remember else self._load(identity).get(_entry(tensor))

    def put(self, tensor: StoredTensor, digest: str) -> None:
        with self._mutex:
            self._known[tensor.key] = digest
            if (identity := tensor.source.identity) is not None and self._remember:
                self._load(identity)[_entry(tensor)] = digest
                self._changed.add(identity)

    def require(self, tensor: StoredTensor, advance: Callable[[int], None] | None = None) -> str:
        """The hash of a tensor, read now if it is not known."""
        if (digest := self.get(tensor)) is None:
            digest = hash_tensor(tensor, advance)
            self.put(tensor, digest)
        return digest

    def _load(self, identity: tuple[str, int, int]) -> dict[str, str]:
        if identity not in self._files:
            self._files[identity] = _read_cache(identity)
        return self._files[identity]

    def save(self) -> None:
        """Remember what was learnt. A cache that cannot be written costs time later and nothing else."""
        with self._mutex:
            for identity in self._changed:
                try:
                    # A file that was written to while it was read has hashes of neither state.
                    if _is_still(identity):
                        _write_cache(identity, self._files[identity])
                except OSError:
                    return
            self._changed.clear()
            with contextlib.suppress(OSError):
                _prune(cache_folder() / "hashes")


def _entry(tensor: StoredTensor) -> str:
    # Name, place, dtype and shape: a rewritten file of equal size and time would have to agree in all of them.
    return f"{tensor.name}|{tensor.offset}|{tensor.dtype}|{list(tensor.shape)}"


def _is_still(identity: tuple[str, int, int]) -> bool:
    path, size, mtime = identity
    status = os.stat(path)
    return (status.st_size, status.st_mtime_ns) == (size, mtime)


def _cache_path(identity: tuple[str, int, int]) -> Path:
    name = hashlib.blake2b(identity[0].encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return cache_folder() / "hashes" / f"{name}.json"


def _read_cache(identity: tuple[str, int, int]) -> dict[str, str]:
    try:
        stored = json.loads(_cache_path(identity).read_bytes())
        if stored["identity"] == list(identity):
            return {str(key): str(value) for key, value in stored["tensors"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    return {}


def _write_cache(identity: tuple[str, int, int], tensors: dict[str, str]) -> None:
    path = _cache_path(identity)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps({"identity": identity, "tensors": tensors}))
    os.replace(temporary, path)


def _prune(folder: Path) -> None:
    """Once a day, drop the entries of files that are gone, and those that nobody has written for 90 days."""
    now, marker = time.time(), folder / ".pruned"
    if not folder.is_dir() or (marker.exists() and 0 <= now - marker.stat().st_mtime < _DAY):
        return
    marker.touch()
    for path in folder.iterdir():
        if path == marker:
            continue
        with contextlib.suppress(OSError):  # another process drops it at the same time
            age = now - path.stat().st_mtime
            # What is no entry was left by a process that was killed while it wrote one.
            if age > _OLDEST or (age > _DAY if path.suffix != ".json" else _is_gone(path)):
                path.unlink()


def _is_gone(entry: Path) -> bool:
    """Whether the file that an entry is about is not there any more, or the entry says nothing."""
    with open(entry, "rb") as file:
        beginning = file.read(_BEGINNING)
    try:
        # The identity comes first; what follows may be long and is not read.
        identity, _ = json.JSONDecoder().raw_decode(beginning.decode("ascii").removeprefix('{"identity": '))
        return not os.path.exists(identity[0])
    except (ValueError, TypeError, IndexError, KeyError, RecursionError):
        return True
