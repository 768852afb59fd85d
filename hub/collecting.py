"""`hub gc`: remove what nothing refers to and nobody has touched for a while. Mark, then sweep.

Servers and pushes may go on meanwhile, and a kill at any moment leaves a sound registry, because:

- **Content** is removed within a transaction of the registry's database in which no commit refers to it. A commit
  looks, within its own transaction, whether its content is there; so it comes before, and the content stays, or after,
  and is told to bring it in again. Whoever finds content and is going to refer to it touches it, and gc looks at the
  time of the last touch within the transaction.
- **Xorbs** are removed within a transaction of the server's database. Whoever writes a recipe or a placement touches
  the xorbs in it, and writes it, within one transaction there (`ChunkIndex.keeping`). Either that came before this
  began to mark, and was seen; or it came later, and the touch is newer than anything that is removed; or the removal
  came first, and whoever wanted the xorb is told to send it again.
- Everything is removed before what it needs: commits (by `hub delete`) before content, recipes before xorbs. What a
  killed run leaves is more than needed, never less, and the next run removes it.

Clients remember for up to four weeks which chunks are stored, and go on naming them. So nothing that they were told of
within that time is removed by default. Where less is asked for, the server's epoch changes before the first removal:
clients then remember nothing (`docs/hub.md`).
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from surgery.errors import FormatError, InputError, OptionError
from surgery.hub.content import disk
from surgery.hub.interfaces import StoredFile
from surgery.hub.locking import tidying
from surgery.hub.server.accounts import SqliteAccounts
from surgery.hub.server.interfaces import ChunkIndex
from surgery.hub.server.placing import lost
from surgery.hub.store import Registry, existing_registry
from surgery.hub.xet import hashes
from surgery.hub.xet.xorbs import XorbIndex

_T = TypeVar("_T")
_DAY = 86_400.0
# Three weeks that clients keep what they sent, and one that they add to what they were told.
CLIENTS_REMEMBER = 28 * _DAY
# Half-made snapshots of this age were left by processes that died.
_ABANDONED = _DAY
# Removed in one transaction, while others wait.
_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class GcOptions:
    """What to collect.

    Attributes:
        data: the registry's folder.
        grace: what was touched within so many days stays.
        dry_run: say what would be removed, and remove nothing.
    """

    data: Path
    grace: float = CLIENTS_REMEMBER / _DAY
    dry_run: bool = False


@dataclass
class Collected:
    """One kind of thing: how many were removed with how many bytes, and how many stay only because they are young."""

    kind: str
    removed: int = 0
    removed_bytes: int = 0
    kept: int = 0
    kept_bytes: int = 0

    def remove(self, size: int) -> None:
        self.removed += 1
        self.removed_bytes += size

    def keep(self, size: int) -> None:
        self.kept += 1
        self.kept_bytes += size


@dataclass(frozen=True)
class GcReport:
    """What `hub gc` did.

    Attributes:
        data: the registry's folder.
        grace: in days.
        dry_run: whether nothing was removed, and this is what would have been.
        parts: by kind: `content`, `xorbs`, `snapshots`, `incoming`, and `records` of a server's database.
        freed_bytes: of all parts.
        forgotten: whether clients were made to forget what they know of stored chunks.
    """

    data: str
    grace: float
    dry_run: bool
    parts: tuple[Collected, ...]
    freed_bytes: int
    forgotten: bool

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def gc(options: GcOptions) -> GcReport:
    """Collect a registry's garbage. Raises `InputError` where there is no registry."""
    if not options.grace >= 0:  # nan as well, to which nothing compares: it would spare nothing
        raise OptionError(f"--grace is {options.grace:g}, expected a number of days, 0 or more.")
    with opened(options.data) as (registry, index):
        return collect(registry, index, options.grace * _DAY, options.dry_run)


@contextlib.contextmanager
def opened(data: Path, writable: bool = True) -> Iterator[tuple[Registry, SqliteAccounts | None]]:
    """The registry in a folder, and the server's database if it was ever served."""
    registry = existing_registry(data, writable)
    if registry is None:
        raise InputError(f"There is no registry at {data}.")
    with contextlib.ExitStack() as stack:
        stack.enter_context(registry)
        index = SqliteAccounts(data / "server.sqlite") if (data / "server.sqlite").is_file() else None
        if index is not None:
            stack.callback(index.close)
        yield registry, index


def collect(registry: Registry, index: ChunkIndex | None, grace: float, dry_run: bool = False) -> GcReport:
    """Remove what nothing refers to and nobody has touched for `grace` seconds."""
    with tidying(registry.root), disk(registry.root):
        run = _Run(registry, index, time.time() - grace, dry_run)
        parts = run.incoming(), run.content(), *run.xorbs(), run.snapshots()
    freed = sum(part.removed_bytes for part in parts)
    return GcReport(str(registry.root), grace / _DAY, dry_run, parts, freed, run.forgotten)


class _Run:
    """One collection; `limit` is the time since 1970 after which whatever was touched stays."""

    def __init__(self, registry: Registry, index: ChunkIndex | None, limit: float, dry_run: bool) -> None:
        self._registry = registry
        self._store = registry.content
        self._index = index
        self._limit = limit
        self._dry_run = dry_run
        self._gone: set[str] = set()
        self._clients_remember = time.time() - CLIENTS_REMEMBER
        self.forgotten = False

    def incoming(self) -> Collected:
        part = Collected("incoming")
        for size in self._store.clear(self._dry_run):
            part.remove(size)
        return part

    def content(self) -> Collected:
        """Blobs and recipes that no commit refers to."""
        part = Collected("content")
        touched: dict[str, float] = {}
        for sha256, _, time_ in self._store.list():
            touched[sha256] = max(time_, touched.get(sha256, 0.0))

        def remove(sha256: str) -> bool:
            size = self._store.stored(sha256)
            if max(touched[sha256], self._store.touched(sha256)) >= self._limit:
                part.keep(size)
                return False
            part.remove(size)
            self._gone.add(sha256)
            if not self._dry_run:
                self._store.remove(sha256)
            return not self._dry_run

        for batch in _batches(sorted(touched)):
            self._registry.metadata.sweep(batch, remove)
        return part

    # Chunks -----------------------------------------------------------------------------------------------------------

    def xorbs(self) -> tuple[Collected, Collected]:
        """Xorbs that no recipe and no placement names, and what a server has on record of what is gone."""
        part, records = Collected("xorbs"), Collected("records")
        if self._index is not None:
            for _ in self._forget_contents(self._index):
                records.remove(0)
        live = self._named_by_recipes()
        if self._index is not None:
            live |= self._named_by_placements(self._index, records)
        candidates = []
        for file in self._store.xorbs():
            digest = hashes.digest_of(file.name)
            if digest is None or digest in live:
                continue
            if file.touched >= self._limit:
                part.keep(file.size)
            else:
                candidates.append((digest, file))
        self._remember_nothing([file.touched for _, file in candidates])
        for batch in _batches(candidates):
            self._remove_xorbs(batch, part)
        if self._index is not None:
            self._forget_lost(self._index, records)
        return part, records

    def _forget_contents(self, index: ChunkIndex) -> Iterator[str]:
        def is_gone(sha256: str) -> bool:
            return sha256 in self._gone or self._store.size(sha256) is None

        for batch in _batches(sorted(filter(is_gone, index.contents()))):
            yield from batch
            if not self._dry_run:
                with index.keeping():
                    index.forget_contents([sha256 for sha256 in batch if self._store.size(sha256) is None])

    def _named_by_recipes(self) -> set[bytes]:
        live: set[bytes] = set()
        for sha256, _, _ in self._store.list():
            recipe = self._store.recipe(sha256) if sha256 not in self._gone else None
            if recipe is not None:
                live |= {term.xorb for term in recipe.terms}
        return live

    def _named_by_placements(self, index: ChunkIndex, records: Collected) -> set[bytes]:
        """Xorbs with chunks of others that clients may still name; those that no client can are forgotten."""
        live: set[bytes] = set()
        named = index.named_xorbs(self._gone)
        old = []
        for digest, touched in index.known_xorbs():
            placed = index.placement(digest)
            if placed is None:
                continue
            if digest not in named and touched < self._limit:
                old.append((digest, touched))
                continue
            if digest not in named:
                records.keep(0)
            live |= {term.xorb for term in placed.terms}
        self._remember_nothing([touched for _, touched in old])
        for batch in _batches(old):
            for _ in batch:
                records.remove(0)
            if not self._dry_run:
                live |= self._forget_placements(index, [digest for digest, _ in batch])
        return live

    def _forget_placements(self, index: ChunkIndex, digests: Sequence[bytes]) -> set[bytes]:
        """Returns what is still needed: somebody named one of these meanwhile."""
        live: set[bytes] = set()
        with index.keeping():
            for digest in digests:
                if (placed := index.placement(digest)) is None:
                    continue
                if index.touched_xorb(digest) < self._limit:
                    index.forget_xorb(digest, placed.index)
                else:
                    live |= {term.xorb for term in placed.terms}
        return live

    def _remember_nothing(self, touched: Sequence[float]) -> None:
        """Change the epoch where something is going to be removed that clients may remember."""
        if self._index is None or self.forgotten or not any(time_ >= self._clients_remember for time_ in touched):
            return
        self.forgotten = True
        if not self._dry_run:
            self._index.begin_epoch(secrets.token_hex(4))

    def _remove_xorbs(self, batch: Sequence[tuple[bytes, StoredFile]], part: Collected) -> None:
        with self._index.keeping() if self._index is not None else contextlib.nullcontext():
            for digest, file in batch:
                if self._store.touched_xorb(digest) >= self._limit:
                    part.keep(file.size)
                    continue
                part.remove(file.size)
                if self._dry_run:
                    continue
                if self._index is not None:
                    self._index.forget_xorb(digest, self._read_index(digest))
                self._store.remove_xorb(digest)

    def _read_index(self, digest: bytes) -> XorbIndex | None:
        try:
            return self._store.open_xorb(digest).index
        except FormatError:  # damaged: its chunks are looked for in all that is on record
            return None

    def _forget_lost(self, index: ChunkIndex, records: Collected) -> None:
        """What is on record of xorbs that are not there: a run was killed, or somebody removed a damaged one."""
        for digest, _ in index.known_xorbs():
            if not self._is_lost(index, digest):
                continue
            records.remove(0)
            if self._dry_run:
                continue
            if not self.forgotten:
                self.forgotten = True
                index.begin_epoch(secrets.token_hex(4))
            with index.keeping():
                if self._is_lost(index, digest):
                    index.forget_xorb(digest, None)

    def _is_lost(self, index: ChunkIndex, digest: bytes) -> bool:
        placed = index.placement(digest)
        if placed is None:
            return not self._store.has_xorb(digest)
        return lost(self._store, placed.terms)

    # Snapshots --------------------------------------------------------------------------------------------------------

    def snapshots(self) -> Collected:
        """Folders of commits that there are no more, and half-made ones."""
        part = Collected("snapshots")
        folder = self._registry.root / "snapshots"
        known = self._registry.metadata.trees()
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            with contextlib.suppress(FileNotFoundError):
                making = path.name.startswith(".")
                if path.name in known or (making and path.stat().st_mtime > time.time() - _ABANDONED):
                    continue
                part.remove(sum(entry.lstat().st_size for entry in path.rglob("*") if not entry.is_dir()))
                if not self._dry_run:
                    shutil.rmtree(path, ignore_errors=True)
        return part


def _batches(items: Sequence[_T]) -> Iterator[Sequence[_T]]:
    for begin in range(0, len(items), _BATCH):
        yield items[begin : begin + _BATCH]
