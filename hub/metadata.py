"""Repositories, commits and refs in SQLite: one file, `registry.sqlite`, and one transaction for each change."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery.errors import FormatError, InputError, SurgeryError
from surgery.hub.interfaces import (
    BRANCHES,
    PULLS,
    Commit,
    ConflictError,
    ContentMissingError,
    FileEntry,
    Repository,
    Rewriting,
    full_ref,
)  # fmt: skip
from surgery.hub.naming import MAIN, RepositoryName
from surgery.hub.sqlite_community import COMMUNITY
from surgery.hub.sqlite_history import commit_of, forget_unreachable, record, rewrite_all
from surgery.hub.sqlite_index import SqliteIndex, add_index, index_head, note_weights

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
STEPS = (_TABLES, add_index, COMMUNITY)


class SqliteMetadata(SqliteIndex):
    """See the module. One object may be used from several threads; each transaction has the connection to itself."""

    def __init__(self, path: Path, create: bool = True) -> None:
        super().__init__(path, STEPS, create)
        if not create:
            self._bring_up_to_date()

    def _bring_up_to_date(self) -> None:
        """Give an older file the index if whoever only reads it may write to it too."""
        if not self.has_index():
            with contextlib.suppress(SurgeryError):
                SqliteMetadata(self._path).close()

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
            self._remember(db, self._id(name, kind), name, kind)
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

    def move(self, name: RepositoryName, new: RepositoryName, kind: str) -> None:
        with self._change() as db:
            number = self._id(name, kind)
            if (found := self._row(new, kind)) is not None and found[0] != number:
                raise ConflictError(f"There is a {kind} called {_repository(found).name} already.")
            row = (new.namespace, new.name, new.key, number)
            db.execute("UPDATE repositories SET namespace = ?, name = ?, key = ? WHERE id = ?", row)
            self._remember(db, number, new, kind)

    def _remember(self, db: sqlite3.Connection, number: int, name: RepositoryName, kind: str) -> None:
        """Let a name mean a repository from now on. Those that it had go on meaning it until another takes them."""
        values = (kind, name.key, number)
        db.execute("INSERT OR REPLACE INTO names (kind, key, repository) VALUES (?, ?, ?)", values)

    def set_private(self, name: RepositoryName, kind: str, private: bool) -> None:
        with self._change() as db:
            db.execute("UPDATE repositories SET private = ? WHERE id = ?", (private, self._id(name, kind)))

    def holding(self, sha256: str) -> Sequence[Repository]:
        with self._look() as db:
            rows = db.execute(
                "SELECT DISTINCT r.id, kind, namespace, name, private, created, updated FROM contents "
                "JOIN commits USING (tree) JOIN repositories r ON r.id = commits.repository WHERE sha256 = ?",
                (sha256,),
            ).fetchall()
        return [_repository(row) for row in rows]

    def used(self, namespace: str, more: Mapping[str, int]) -> int:
        inside = (
            "FROM contents c JOIN commits USING (tree) JOIN repositories r ON r.id = commits.repository "
            "WHERE lower(r.namespace) = ?"
        )
        with self._look() as db:
            (total,) = db.execute(
                f"SELECT COALESCE(SUM(size), 0) FROM (SELECT DISTINCT c.sha256, c.size {inside})", (namespace.lower(),)
            ).fetchone()
            query = f"SELECT 1 {inside} AND c.sha256 = ? LIMIT 1"
            new = [
                size
                for sha256, size in more.items()
                if db.execute(query, (namespace.lower(), sha256)).fetchone() is None
            ]
        return int(total) + sum(new)

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
            if ref == BRANCHES + MAIN:
                index_head(db, number)
            return
        if db.execute("SELECT 1 FROM commits WHERE repository = ? AND id = ?", (number, commit)).fetchone() is None:
            raise InputError(f"{name} has no commit {commit}.")
        db.execute("INSERT OR REPLACE INTO refs (repository, name, target) VALUES (?, ?, ?)", (number, ref, commit))
        if ref == BRANCHES + MAIN:
            index_head(db, number)

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
            record(db, number, commit, files)
            if not branch.startswith(PULLS):  # what a stranger proposes says nothing of the repository
                note_weights(db, number, commit.facts)
            self._move(db, number, name, full_ref(branch), expected, commit.id)
            db.execute("UPDATE repositories SET updated = ? WHERE id = ?", (commit.time, number))

    def rewrite(self, name: RepositoryName, kind: str, change: Rewriting) -> Collection[str]:
        with self._change() as db:
            number = self._id(name, kind)
            contents = rewrite_all(db, number, change)
            index_head(db, number)
            return contents

    def prune(self, name: RepositoryName, kind: str = "model") -> int:
        with self._change() as db:
            return forget_unreachable(db, self._id(name, kind))

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
            found = commit_of(row)
            yield found
            following = found.parent

    def commits(self, name: RepositoryName, kind: str = "model") -> Sequence[Commit]:
        with self._look() as db:
            rows = db.execute(
                "SELECT id, parent, tree, message, time, facts FROM commits WHERE repository = ? ORDER BY time, id",
                (self._id(name, kind),),
            ).fetchall()
        return [commit_of(row) for row in rows]

    def find_commit(self, name: RepositoryName, prefix: str, kind: str = "model") -> Commit | None:
        with self._look() as db:
            rows = db.execute(
                "SELECT id, parent, tree, message, time, facts FROM commits "
                "WHERE repository = ? AND id >= ? AND id < ? LIMIT 2",
                (self._id(name, kind), prefix, prefix + "g"),
            ).fetchall()
        return commit_of(rows[0]) if len(rows) == 1 else None

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

    def sweep(self, candidates: Iterable[str], remove: Callable[[str], bool]) -> Collection[str]:
        with self._change() as db:
            found = [
                sha256
                for sha256 in candidates
                if db.execute("SELECT 1 FROM contents WHERE sha256 = ? LIMIT 1", (sha256,)).fetchone() is None
            ]
            removed = [sha256 for sha256 in found if remove(sha256)]
            db.executemany("DELETE FROM tensor_hashes WHERE sha256 = ?", [(sha256,) for sha256 in removed])
            return removed

    def trees(self) -> Collection[str]:
        """Every tree that a commit has."""
        with self._look() as db:
            return {tree for (tree,) in db.execute("SELECT id FROM trees").fetchall()}


def _repository(row: Any) -> Repository:
    _, kind, namespace, name, private, created, updated = row
    return Repository(RepositoryName(namespace, name), kind, bool(private), created, updated)
