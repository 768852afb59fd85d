"""Repositories, commits and refs in SQLite: one file, `registry.sqlite`, and one transaction for each change.

Every change begins with `BEGIN IMMEDIATE`, so that changes come one after the other, in however many processes.
`synchronous=FULL` has SQLite sync before a commit returns. The journal is SQLite's default, a rollback journal: it
needs no shared memory, so that readers without the right to write can read; a server may switch to WAL.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from surgery.errors import FormatError, InputError, OutputError
from surgery.hub.interfaces import BRANCHES, Commit, ConflictError, ContentMissingError, FileEntry, Repository
from surgery.hub.naming import RepositoryName

SCHEMA = 1
# Seconds to wait while another process changes something; a change takes milliseconds.
_PATIENCE = 60.0
_TABLES = """
CREATE TABLE repositories (
    id INTEGER PRIMARY KEY,
    kind TEXT NOT NULL,           -- model, dataset
    namespace TEXT NOT NULL,      -- empty for a name alone
    name TEXT NOT NULL,
    key TEXT NOT NULL,            -- namespace/name in lower case
    private INTEGER NOT NULL,
    created INTEGER NOT NULL,     -- seconds since 1970
    updated INTEGER NOT NULL,
    UNIQUE (kind, key)
);
CREATE TABLE trees (
    id TEXT PRIMARY KEY,          -- SHA-256 of `entries`
    entries TEXT NOT NULL         -- JSON: [[path, size, sha256, oid, lfs], ...] by path
) WITHOUT ROWID;
CREATE TABLE commits (
    repository INTEGER NOT NULL REFERENCES repositories (id) ON DELETE CASCADE,
    id TEXT NOT NULL,
    parent TEXT,
    tree TEXT NOT NULL REFERENCES trees (id),
    message TEXT NOT NULL,
    time INTEGER NOT NULL,
    facts TEXT NOT NULL,          -- JSON object
    PRIMARY KEY (repository, id)
) WITHOUT ROWID;
CREATE INDEX commits_by_tree ON commits (tree);
CREATE TABLE refs (
    repository INTEGER NOT NULL REFERENCES repositories (id) ON DELETE CASCADE,
    name TEXT NOT NULL,           -- refs/heads/main
    target TEXT NOT NULL,
    PRIMARY KEY (repository, name)
) WITHOUT ROWID;
CREATE TABLE contents (
    sha256 TEXT NOT NULL,         -- a file of a tree
    tree TEXT NOT NULL REFERENCES trees (id) ON DELETE CASCADE,
    size INTEGER NOT NULL,
    PRIMARY KEY (sha256, tree)
) WITHOUT ROWID;
CREATE INDEX contents_by_size ON contents (size);
CREATE INDEX contents_by_tree ON contents (tree);
"""


class SqliteMetadata:
    """See the module. One object may be used from several threads; each transaction has the connection to itself."""

    def __init__(self, path: Path, create: bool = True) -> None:
        self._path = path
        self._mutex = threading.RLock()
        with self._sqlite():
            # isolation_level=None: transactions begin where this module says so.
            mode = "rwc" if create else "ro"
            self._db = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode={mode}",
                uri=True,
                timeout=_PATIENCE,
                isolation_level=None,
                check_same_thread=False,
            )
            self._db.execute("PRAGMA foreign_keys = ON")
            self._db.execute("PRAGMA synchronous = FULL")
            if create and self._version() == 0:
                with self._change():
                    if self._version() == 0:  # another process may have come first
                        for statement in _TABLES.split(";\n"):
                            self._db.execute(statement)
                        self._db.execute(f"PRAGMA user_version = {SCHEMA}")
            if self._version() != SCHEMA:
                raise FormatError(
                    f"{path} has schema {self._version()}, expected {SCHEMA}; use the version of this tool that made "
                    "it."
                )

    def close(self) -> None:
        self._db.close()

    def __del__(self) -> None:
        if (db := getattr(self, "_db", None)) is not None:
            db.close()

    def _version(self) -> int:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        return int(version)

    @contextlib.contextmanager
    def _sqlite(self) -> Iterator[None]:
        """Turn SQLite's errors into one sentence."""
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorname", "")
            if code.startswith("SQLITE_FULL"):
                raise OutputError(
                    f"The disk is full: nothing was added to the registry at {self._path.parent}; free some space and "
                    "try again."
                ) from error
            if code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
                raise OutputError(
                    f"The registry at {self._path.parent} was busy for {_PATIENCE:.0f} seconds; try again."
                ) from error
            if code.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")):
                raise FormatError(f"{self._path} is damaged ({error}); restore it from a backup.") from error
            raise OutputError(f"{self._path} cannot be used: {error}.") from error

    @contextlib.contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """A transaction that changes something; only one at a time, in all processes."""
        with self._mutex, self._sqlite():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _look(self) -> Iterator[sqlite3.Connection]:
        with self._mutex, self._sqlite():
            yield self._db

    # Repositories -----------------------------------------------------------------------------------------------------

    def create(self, name: RepositoryName, kind: str, private: bool, time: int) -> Repository:
        with self._change() as db:
            if (found := self._row(name, kind)) is not None:
                raise ConflictError(f"There is a {kind} called {_repository(found).name} already.")
            row = (kind, name.namespace, name.name, name.key, private, time, time)
            db.execute(
                "INSERT INTO repositories (kind, namespace, name, key, private, created, updated) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                row,
            )
            return Repository(name, kind, private, time, time)

    def _row(self, name: RepositoryName, kind: str) -> Any:
        return self._db.execute(
            "SELECT id, kind, namespace, name, private, created, updated FROM repositories WHERE kind = ? AND key = ?",
            (kind, name.key),
        ).fetchone()

    def _id(self, name: RepositoryName, kind: str) -> int:
        if (row := self._row(name, kind)) is None:
            raise InputError(f"There is no {kind} called {name} in the registry at {self._path.parent}.")
        return int(row[0])

    def find(self, name: RepositoryName, kind: str = "model") -> Repository | None:
        with self._look():
            row = self._row(name, kind)
            return None if row is None else _repository(row)

    def repositories(self, kind: str = "model") -> Sequence[Repository]:
        with self._look() as db:
            rows = db.execute(
                "SELECT id, kind, namespace, name, private, created, updated FROM repositories WHERE kind = ? "
                "ORDER BY key",
                (kind,),
            ).fetchall()
        return [_repository(row) for row in rows]

    def delete(self, name: RepositoryName, kind: str = "model") -> Collection[str]:
        with self._change() as db:
            number = self._id(name, kind)
            rows = db.execute(
                "SELECT DISTINCT sha256 FROM contents WHERE tree IN (SELECT tree FROM commits WHERE repository = ?)",
                (number,),
            ).fetchall()
            db.execute("DELETE FROM repositories WHERE id = ?", (number,))
            db.execute("DELETE FROM trees WHERE id NOT IN (SELECT tree FROM commits)")
            return {sha256 for (sha256,) in rows}

    # Refs and commits -------------------------------------------------------------------------------------------------

    def refs(self, name: RepositoryName, kind: str = "model") -> Mapping[str, str]:
        with self._look() as db:
            rows = db.execute(
                "SELECT name, target FROM refs WHERE repository = ? ORDER BY name", (self._id(name, kind),)
            )
            return dict(rows.fetchall())

    def set_ref(
        self, name: RepositoryName, ref: str, expected: str | None, commit: str | None, kind: str = "model"
    ) -> None:
        with self._change() as db:
            number = self._id(name, kind)
            self._move(db, number, name, ref, expected, commit)

    def _move(
        self,
        db: sqlite3.Connection,
        number: int,
        name: RepositoryName,
        ref: str,
        expected: str | None,
        commit: str | None,
    ) -> None:
        """Compare and swap."""
        row = db.execute("SELECT target FROM refs WHERE repository = ? AND name = ?", (number, ref)).fetchone()
        found = None if row is None else row[0]
        if found != expected:
            raise ConflictError(f"{ref} of {name} is at {found or 'no commit'}, expected {expected or 'no commit'}.")
        if commit is None:
            db.execute("DELETE FROM refs WHERE repository = ? AND name = ?", (number, ref))
            return
        if db.execute("SELECT 1 FROM commits WHERE repository = ? AND id = ?", (number, commit)).fetchone() is None:
            raise InputError(f"{name} has no commit {commit}.")
        db.execute("INSERT OR REPLACE INTO refs (repository, name, target) VALUES (?, ?, ?)", (number, ref, commit))

    def commit(
        self,
        name: RepositoryName,
        branch: str,
        expected: str | None,
        commit: Commit,
        files: Sequence[FileEntry],
        missing: Callable[[Collection[str]], Collection[str]],
        kind: str = "model",
    ) -> None:
        with self._change() as db:
            number = self._id(name, kind)
            if absent := missing({entry.sha256 for entry in files}):
                raise ContentMissingError(
                    f"{len(absent)} files of the commit to {name} are not stored.", sorted(absent)
                )
            added = db.execute(
                "INSERT OR IGNORE INTO trees (id, entries) VALUES (?, ?)", (commit.tree, encode_tree(files))
            )
            if added.rowcount:
                rows = {(entry.sha256, commit.tree, entry.size) for entry in files}
                db.executemany("INSERT INTO contents (sha256, tree, size) VALUES (?, ?, ?)", sorted(rows))
            facts = json.dumps(commit.facts, sort_keys=True)
            db.execute(
                "INSERT OR IGNORE INTO commits (repository, id, parent, tree, message, time, facts) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (number, commit.id, commit.parent, commit.tree, commit.message, commit.time, facts),
            )
            self._move(db, number, name, BRANCHES + branch, expected, commit.id)
            db.execute("UPDATE repositories SET updated = ? WHERE id = ?", (commit.time, number))

    def history(self, name: RepositoryName, commit: str, kind: str = "model") -> Iterator[Commit]:
        following: str | None = commit
        while following is not None:
            with self._look() as db:
                row = db.execute(
                    "SELECT id, parent, tree, message, time, facts FROM commits WHERE repository = ? AND id = ?",
                    (self._id(name, kind), following),
                ).fetchone()
            if row is None:
                raise InputError(f"{name} has no commit {following}.")
            found = _commit(row)
            yield found
            following = found.parent

    def find_commit(self, name: RepositoryName, prefix: str, kind: str = "model") -> Commit | None:
        with self._look() as db:
            rows = db.execute(
                "SELECT id, parent, tree, message, time, facts FROM commits "
                "WHERE repository = ? AND id >= ? AND id < ? LIMIT 2",
                (self._id(name, kind), prefix, prefix + "g"),
            ).fetchall()
        return _commit(rows[0]) if len(rows) == 1 else None

    def files(self, tree: str) -> Sequence[FileEntry]:
        with self._look() as db:
            row = db.execute("SELECT entries FROM trees WHERE id = ?", (tree,)).fetchone()
        if row is None:
            raise FormatError(f"{self._path} has no tree {tree}; restore it from a backup.")
        return [FileEntry(*entry) for entry in json.loads(row[0])]

    # Content ----------------------------------------------------------------------------------------------------------

    def has_size(self, size: int) -> bool:
        with self._look() as db:
            return db.execute("SELECT 1 FROM contents WHERE size = ? LIMIT 1", (size,)).fetchone() is not None

    def sweep(self, candidates: Iterable[str], remove: Callable[[str], None]) -> Collection[str]:
        with self._change() as db:
            found = [
                sha256
                for sha256 in candidates
                if db.execute("SELECT 1 FROM contents WHERE sha256 = ? LIMIT 1", (sha256,)).fetchone() is None
            ]
            for sha256 in found:
                remove(sha256)
            return found

    def trees(self) -> Collection[str]:
        """Every tree that a commit has."""
        with self._look() as db:
            return {tree for (tree,) in db.execute("SELECT id FROM trees").fetchall()}


def encode_tree(files: Sequence[FileEntry]) -> str:
    """The canonical text of a tree, whose SHA-256 is its id."""
    return json.dumps([astuple(entry) for entry in files], ensure_ascii=True, separators=(",", ":"))


def _repository(row: Any) -> Repository:
    _, kind, namespace, name, private, created, updated = row
    return Repository(RepositoryName(namespace, name), kind, bool(private), created, updated)


def _commit(row: Any) -> Commit:
    identity, parent, tree, message, time, facts = row
    return Commit(identity, parent, tree, message, time, json.loads(facts))
