"""Commits as rows of SQLite: writing one down, forgetting those that nothing leads to, replacing all of them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any

from surgery.hub.interfaces import Commit, FileEntry, Rewriting


def encode_tree(files: Sequence[FileEntry]) -> str:
    """The canonical text of a tree, whose SHA-256 is its id."""
    return json.dumps([astuple(entry) for entry in files], ensure_ascii=True, separators=(",", ":"))


def commit_of(row: Any) -> Commit:
    """A commit from `id, parent, tree, message, time, facts`."""
    identity, parent, tree, message, time, facts = row
    return Commit(identity, parent, tree, message, time, json.loads(facts))


def record(db: sqlite3.Connection, number: int, commit: Commit, files: Sequence[FileEntry]) -> None:
    """Write down a commit of a repository, and its tree unless there is one like it."""
    added = db.execute("INSERT OR IGNORE INTO trees (id, entries) VALUES (?, ?)", (commit.tree, encode_tree(files)))
    if added.rowcount:
        rows = {(entry.sha256, commit.tree, entry.size) for entry in files}
        db.executemany("INSERT INTO contents (sha256, tree, size) VALUES (?, ?, ?)", sorted(rows))
    facts = json.dumps(commit.facts, sort_keys=True)
    db.execute(
        "INSERT OR IGNORE INTO commits (repository, id, parent, tree, message, time, facts) "
        "VALUES (?, ?, ?, ?, ?, ?, ?)",
        (number, commit.id, commit.parent, commit.tree, commit.message, commit.time, facts),
    )


def forget_unreachable(db: sqlite3.Connection, number: int) -> int:
    """Remove the commits of a repository that no ref leads to. Returns how many there were."""
    gone = db.execute(
        "DELETE FROM commits WHERE repository = :r AND id NOT IN (WITH RECURSIVE kept (id) AS "
        "(SELECT target FROM refs WHERE repository = :r UNION SELECT parent FROM commits JOIN kept USING (id) "
        "WHERE repository = :r AND parent IS NOT NULL) SELECT id FROM kept)",
        {"r": number},
    )
    db.execute("DELETE FROM trees WHERE id NOT IN (SELECT tree FROM commits)")
    return gone.rowcount


def rewrite_all(db: sqlite3.Connection, number: int, change: Rewriting) -> set[str]:
    """Replace every commit of a repository; refs and pull requests follow.

    Returns the SHA-256 sums that it referred to before.
    """
    rows = db.execute(
        "SELECT id, parent, tree, message, time, facts FROM commits WHERE repository = ?", (number,)
    ).fetchall()
    contents: set[str] = set()
    renamed: dict[str, str] = {}
    for commit in _oldest_first({row[0]: commit_of(row) for row in rows}):
        (entries,) = db.execute("SELECT entries FROM trees WHERE id = ?", (commit.tree,)).fetchone()
        files = [FileEntry(*entry) for entry in json.loads(entries)]
        contents |= {entry.sha256 for entry in files}
        made, kept = change(commit, files, renamed.get(commit.parent or ""))
        renamed[commit.id] = made.id
        record(db, number, made, kept)
    changed = [(new, number, old) for old, new in renamed.items() if new != old]
    db.executemany("UPDATE refs SET target = ? WHERE repository = ? AND target = ?", changed)
    db.executemany("UPDATE discussions SET base = ? WHERE repository = ? AND base = ?", changed)
    db.executemany("UPDATE discussions SET merged = ? WHERE repository = ? AND merged = ?", changed)
    gone = [(number, old) for old in set(renamed) - set(renamed.values())]
    db.executemany("DELETE FROM commits WHERE repository = ? AND id = ?", gone)
    db.execute("DELETE FROM trees WHERE id NOT IN (SELECT tree FROM commits)")
    return contents


def _oldest_first(commits: Mapping[str, Commit]) -> list[Commit]:
    """Every commit after its parent."""
    done: dict[str, Commit] = {}
    for start in commits.values():
        line = []
        commit: Commit | None = start
        while commit is not None and commit.id not in done:
            line.append(commit)
            commit = commits.get(commit.parent or "")
        done |= {commit.id: commit for commit in reversed(line)}
    return list(done.values())
