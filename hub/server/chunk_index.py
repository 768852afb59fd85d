"""Which chunks and contents are whose, in SQLite: the tables of `server.sqlite` behind `ChunkIndex`."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from functools import cached_property

from surgery.hub.database import Database
from surgery.hub.server.interfaces import ChunkIndex
from surgery.hub.xet import hashes, placement
from surgery.hub.xet.placement import Placement
from surgery.hub.xet.recipes import Recipe
from surgery.hub.xet.xorbs import XorbIndex, read_footer

# The step of the schema with which chunks are found wherever they lie.
PLACES = """
CREATE TABLE xorbs (
    id INTEGER PRIMARY KEY,
    digest BLOB NOT NULL UNIQUE,  -- of a xorb as a client sent it
    footer BLOB,                  -- where it is not stored so: what its footer would be, and
    terms BLOB,                   -- JSON: where its chunks lie, see xet/placement.py
    touched REAL NOT NULL         -- seconds since 1970
);
CREATE TABLE holders (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE     -- see ChunkIndex
);
CREATE TABLE places (
    chunk INTEGER NOT NULL,       -- the first 8 bytes of its hash
    holder INTEGER NOT NULL,
    xorb INTEGER NOT NULL,
    number INTEGER NOT NULL,
    PRIMARY KEY (chunk, holder)
) WITHOUT ROWID;
CREATE TABLE named_xorbs (
    sha256 TEXT NOT NULL,         -- of a file
    xorb BLOB NOT NULL,           -- one that the client named for it
    PRIMARY KEY (sha256, xorb)
) WITHOUT ROWID;
CREATE TABLE settings (
    key TEXT PRIMARY KEY,
    value TEXT NOT NULL
) WITHOUT ROWID;
"""
_EPOCH = "epoch"


class ChunkTables(Database):
    """See the module and `ChunkIndex`."""

    def keeping(self) -> AbstractContextManager[object]:
        return self._change()

    def epoch(self) -> str:
        with self._look() as db:
            row = db.execute("SELECT value FROM settings WHERE key = ?", (_EPOCH,)).fetchone()
        return "" if row is None else str(row[0])

    def begin_epoch(self, epoch: str) -> None:
        with self._change() as db:
            db.execute("INSERT OR REPLACE INTO settings (key, value) VALUES (?, ?)", (_EPOCH, epoch))

    # Xorbs ------------------------------------------------------------------------------------------------------------

    def hold_xorb(self, placed: Placement, holders: Collection[str]) -> None:
        index = placed.index
        whole = placed == placement.plain(index)
        footer, terms = (None, None) if whole else (index.footer, placement.encode(placed))
        with self._change() as db:
            # A xorb that is known stays as it is known, and stored.
            db.execute(
                "INSERT INTO xorbs (digest, footer, terms, touched) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (digest) DO UPDATE SET touched = excluded.touched",
                (index.digest, footer, terms, time.time()),
            )
            (number,) = db.execute("SELECT id FROM xorbs WHERE digest = ?", (index.digest,)).fetchone()
            for holder in sorted(holders):
                db.execute("INSERT OR IGNORE INTO xorb_holders (xorb, holder) VALUES (?, ?)", (index.digest, holder))
                identity = self._holder(holder)
                rows = [(_key(index.hash(chunk)), identity, number, chunk) for chunk in range(len(index))]
                db.executemany("INSERT OR IGNORE INTO places (chunk, holder, xorb, number) VALUES (?, ?, ?, ?)", rows)

    def _holder(self, name: str) -> int:
        self._db.execute("INSERT OR IGNORE INTO holders (name) VALUES (?)", (name,))
        (number,) = self._db.execute("SELECT id FROM holders WHERE name = ?", (name,)).fetchone()
        return int(number)

    def placement(self, digest: bytes) -> Placement | None:
        with self._look() as db:
            row = db.execute("SELECT footer, terms FROM xorbs WHERE digest = ?", (digest,)).fetchone()
        if row is None or row[0] is None:
            return None
        return placement.decode(read_footer(row[0], f"What is known of the xorb {hashes.text(digest)}"), row[1])

    def places(self, chunk: bytes, holders: Collection[str]) -> Sequence[tuple[bytes, int]]:
        # Asked for every chunk that comes in, and mostly there is none: two look-ups by key, and no more.
        key = _key(chunk)
        with self._look() as db:
            found: set[tuple[int, int]] = set()
            for holder in holders:
                identity = self._identities.get(holder) or self._known_holder(holder)
                if identity is not None:
                    query = "SELECT xorb, number FROM places WHERE chunk = ? AND holder = ?"
                    found.update(db.execute(query, (key, identity)))
            rows = [
                (db.execute("SELECT digest FROM xorbs WHERE id = ?", (xorb,)).fetchone(), number)
                for xorb, number in sorted(found)
            ]
        return [(row[0], number) for row, number in rows if row is not None]

    def _known_holder(self, name: str) -> int | None:
        """The number of a holder, which never changes."""
        row = self._db.execute("SELECT id FROM holders WHERE name = ?", (name,)).fetchone()
        if row is not None and not self._is_changing():  # one that is just being added may be taken back
            self._identities[name] = row[0]
        return None if row is None else int(row[0])

    @cached_property
    def _identities(self) -> dict[str, int]:
        return {}

    def unplaced(self) -> Sequence[tuple[bytes, Sequence[str]]]:
        with self._look() as db:
            rows = db.execute(
                "SELECT xorb, holder FROM xorb_holders WHERE xorb NOT IN (SELECT digest FROM xorbs) ORDER BY xorb"
            ).fetchall()
        found: dict[bytes, list[str]] = {}
        for xorb, holder in rows:
            found.setdefault(xorb, []).append(holder)
        return list(found.items())

    def forget_xorb(self, digest: bytes, index: XorbIndex | None) -> None:
        with self._change() as db:
            row = db.execute("SELECT id FROM xorbs WHERE digest = ?", (digest,)).fetchone()
            if row is not None and index is None:
                db.execute("DELETE FROM places WHERE xorb = ?", row)
            elif row is not None and index is not None:
                keys = ((_key(index.hash(chunk)), row[0]) for chunk in range(len(index)))
                db.executemany("DELETE FROM places WHERE chunk = ? AND xorb = ?", keys)
            for table, column in (("xorbs", "digest"), ("xorb_holders", "xorb"), ("named_xorbs", "xorb")):
                db.execute(f"DELETE FROM {table} WHERE {column} = ?", (digest,))

    def touch_xorb(self, digest: bytes) -> None:
        with self._change() as db:
            db.execute("UPDATE xorbs SET touched = ? WHERE digest = ?", (time.time(), digest))

    def touched_xorb(self, digest: bytes) -> float:
        with self._look() as db:
            row = db.execute("SELECT touched FROM xorbs WHERE digest = ?", (digest,)).fetchone()
        return 0.0 if row is None else float(row[0])

    def unheld(self, xorbs: Collection[bytes], holders: Collection[str]) -> Collection[bytes]:
        marks = ", ".join("?" * len(holders))
        query = f"SELECT 1 FROM xorb_holders WHERE xorb = ? AND holder IN ({marks}) LIMIT 1"
        with self._look() as db:
            return [xorb for xorb in xorbs if db.execute(query, (xorb, *holders)).fetchone() is None]

    # Contents ---------------------------------------------------------------------------------------------------------

    def hold_content(self, sha256: str, holders: Collection[str]) -> None:
        with self._change() as db:
            rows = [(sha256, holder) for holder in holders]
            db.executemany("INSERT OR IGNORE INTO content_holders (sha256, holder) VALUES (?, ?)", rows)

    def holds_content(self, sha256: str, holders: Collection[str]) -> bool:
        marks = ", ".join("?" * len(holders))
        query = f"SELECT 1 FROM content_holders WHERE sha256 = ? AND holder IN ({marks}) LIMIT 1"
        with self._look() as db:
            return db.execute(query, (sha256, *holders)).fetchone() is not None

    def add_file(
        self,
        recipe: Recipe,
        xorbs: Collection[bytes],
        whole: Collection[bytes],
        holders: Collection[str],
        chunks: Collection[bytes],
    ) -> None:
        now = time.time()
        with self._change() as db:
            db.execute("INSERT OR REPLACE INTO files (xet, sha256) VALUES (?, ?)", (recipe.digest, recipe.sha256))
            named = [(recipe.sha256, xorb) for xorb in xorbs]
            db.executemany("INSERT OR IGNORE INTO named_xorbs (sha256, xorb) VALUES (?, ?)", named)
            db.executemany("UPDATE xorbs SET touched = ? WHERE digest = ?", [(now, xorb) for xorb in xorbs])
            for holder in sorted(holders):
                content = (recipe.sha256, holder)
                db.execute("INSERT OR IGNORE INTO content_holders (sha256, holder) VALUES (?, ?)", content)
                held = [(xorb, holder) for xorb in whole]
                db.executemany("INSERT OR IGNORE INTO xorb_holders (xorb, holder) VALUES (?, ?)", held)
                rows = [(chunk, holder, recipe.sha256) for chunk in chunks]
                db.executemany("INSERT OR REPLACE INTO chunks (chunk, holder, sha256) VALUES (?, ?, ?)", rows)

    def file(self, digest: bytes) -> str | None:
        with self._look() as db:
            row = db.execute("SELECT sha256 FROM files WHERE xet = ?", (digest,)).fetchone()
        return None if row is None else str(row[0])

    def with_chunk(self, chunk: bytes, holders: Collection[str]) -> str | None:
        marks = ", ".join("?" * len(holders))
        query = f"SELECT sha256 FROM chunks WHERE chunk = ? AND holder IN ({marks}) LIMIT 1"
        with self._look() as db:
            row = db.execute(query, (chunk, *holders)).fetchone()
        return None if row is None else str(row[0])

    def named(self, sha256: str) -> Sequence[bytes]:
        with self._look() as db:
            rows = db.execute("SELECT xorb FROM named_xorbs WHERE sha256 = ?", (sha256,)).fetchall()
        return [xorb for (xorb,) in rows]

    # Upkeep -----------------------------------------------------------------------------------------------------------

    def contents(self) -> Collection[str]:
        with self._look() as db:
            tables = ("content_holders", "files", "chunks", "named_xorbs")
            return {sha256 for table in tables for (sha256,) in db.execute(f"SELECT DISTINCT sha256 FROM {table}")}

    def forget_contents(self, sums: Collection[str]) -> None:
        listed = json.dumps(sorted(sums))
        with self._change() as db:
            for table in ("content_holders", "files", "chunks", "named_xorbs"):
                db.execute(f"DELETE FROM {table} WHERE sha256 IN (SELECT value FROM json_each(?))", (listed,))

    def known_xorbs(self) -> Sequence[tuple[bytes, float]]:
        with self._look() as db:
            return db.execute("SELECT digest, touched FROM xorbs ORDER BY digest").fetchall()

    def named_xorbs(self, but: Collection[str] = ()) -> Collection[bytes]:
        left_out = json.dumps(sorted(but))
        with self._look() as db:
            rows = db.execute(
                "SELECT DISTINCT xorb FROM named_xorbs WHERE sha256 NOT IN (SELECT value FROM json_each(?))",
                (left_out,),
            ).fetchall()
        return {xorb for (xorb,) in rows}


def _key(chunk: bytes) -> int:
    return int.from_bytes(chunk[:8], "little", signed=True)


_: type[ChunkIndex] = ChunkTables
