"""What people say and may do beside the content: gates, access, discussions, pull requests. In `registry.sqlite`.

These rows belong to a repository's own row, so that they move with it and go when it goes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from surgery.errors import InputError
from surgery.hub.database import Database
from surgery.hub.interfaces import ConflictError, Repository
from surgery.hub.metadata import STEPS
from surgery.hub.server.interfaces import ACCEPTED, AccessRequest, Community, Discussion, Event

_FIELDS = "number, title, author, status, created, base, merged"


class SqliteCommunity(Database):
    """See `interfaces.Community`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, STEPS)

    def _id(self, found: Repository) -> int:
        row = self._db.execute(
            "SELECT id FROM repositories WHERE kind = ? AND key = ?", (found.kind, found.name.key)
        ).fetchone()
        if row is None:
            raise InputError(f"There is no {found.kind} called {found.name} any more.")
        return int(row[0])

    # Gates ------------------------------------------------------------------------------------------------------------

    def gate(self, repository: Repository) -> str | None:
        with self._look() as db:
            row = db.execute(
                "SELECT mode FROM gates JOIN repositories ON id = repository WHERE kind = ? AND key = ?",
                (repository.kind, repository.name.key),
            ).fetchone()
        return None if row is None else str(row[0])

    def set_gate(self, repository: Repository, mode: str | None) -> None:
        with self._change() as db:
            number = self._id(repository)
            db.execute("DELETE FROM gates WHERE repository = ?", (number,))
            if mode is not None:
                db.execute("INSERT INTO gates (repository, mode) VALUES (?, ?)", (number, mode))

    def access(self, repository: Repository, user: str) -> str | None:
        with self._look() as db:
            row = db.execute(
                "SELECT status FROM access JOIN repositories ON id = repository "
                "WHERE kind = ? AND key = ? AND user = ?",
                (repository.kind, repository.name.key, user.lower()),
            ).fetchone()
        return None if row is None else str(row[0])

    def set_access(self, repository: Repository, user: str, status: str, time: int) -> None:
        with self._change() as db:
            db.execute(
                "INSERT OR REPLACE INTO access (repository, user, status, time) VALUES (?, ?, ?, ?)",
                (self._id(repository), user.lower(), status, time),
            )

    def ask(self, repository: Repository, user: str, status: str, time: int) -> str:
        with self._change() as db:
            number = self._id(repository)
            db.execute(
                "INSERT OR IGNORE INTO access (repository, user, status, time) VALUES (?, ?, ?, ?)",
                (number, user.lower(), status, time),
            )
            if status == ACCEPTED:  # whoever waited for an answer has it, now that nobody has to give one
                db.execute(
                    "UPDATE access SET status = ? WHERE repository = ? AND user = ? AND status = 'pending'",
                    (ACCEPTED, number, user.lower()),
                )
            row = db.execute(
                "SELECT status FROM access WHERE repository = ? AND user = ?", (number, user.lower())
            ).fetchone()
        return str(row[0])

    def requests(self, repository: Repository, status: str) -> Sequence[AccessRequest]:
        with self._look() as db:
            rows = db.execute(
                "SELECT user, status, time FROM access WHERE repository = ? AND status = ? ORDER BY time, user",
                (self._id(repository), status),
            ).fetchall()
        return [AccessRequest(*row) for row in rows]

    # Discussions ------------------------------------------------------------------------------------------------------

    def open_discussion(self, repository: Repository, new: Discussion, first: Event) -> Discussion:
        with self._change() as db:
            number = self._id(repository)
            (last,) = db.execute("SELECT MAX(number) FROM discussions WHERE repository = ?", (number,)).fetchone()
            made = replace(new, number=(last or 0) + 1)
            db.execute(
                f"INSERT INTO discussions (repository, {_FIELDS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (number, made.number, made.title, made.author, made.status, made.created, made.base, made.merged),
            )
            self._add(number, made.number, first)
        return made

    def _add(self, repository: int, discussion: int, event: Event) -> int:
        row = (repository, discussion, event.kind, event.author, event.time, json.dumps(event.data))
        added = self._db.execute(
            "INSERT INTO events (repository, discussion, kind, author, time, data) VALUES (?, ?, ?, ?, ?, ?)", row
        )
        return int(added.lastrowid or 0)

    def discussion(self, repository: Repository, number: int) -> Discussion | None:
        with self._look() as db:
            row = db.execute(
                f"SELECT {_FIELDS} FROM discussions WHERE repository = ? AND number = ?",
                (self._id(repository), number),
            ).fetchone()
        return None if row is None else Discussion(*row)

    def discussions(self, repository: Repository) -> Sequence[Discussion]:
        with self._look() as db:
            rows = db.execute(
                f"SELECT {_FIELDS} FROM discussions WHERE repository = ? ORDER BY number DESC",
                (self._id(repository),),
            ).fetchall()
        return [Discussion(*row) for row in rows]

    def events(self, repository: Repository, number: int) -> Sequence[Event]:
        with self._look() as db:
            rows = db.execute(
                "SELECT id, kind, author, time, data FROM events WHERE repository = ? AND discussion = ? ORDER BY id",
                (self._id(repository), number),
            ).fetchall()
        return [Event(kind, author, time, json.loads(data), number) for number, kind, author, time, data in rows]

    def change(
        self, repository: Repository, number: int, expected: str, event: Event, changes: Mapping[str, Any]
    ) -> Event:
        known = {"title", "status", "merged"}
        assert set(changes) <= known
        with self._change() as db:
            identity = self._id(repository)
            row = db.execute(
                "SELECT status FROM discussions WHERE repository = ? AND number = ?", (identity, number)
            ).fetchone()
            if row is None or row[0] != expected:
                raise ConflictError(f"Discussion {number} of {repository.name} was changed meanwhile.")
            for field, value in changes.items():
                db.execute(
                    f"UPDATE discussions SET {field} = ? WHERE repository = ? AND number = ?", (value, identity, number)
                )
            return replace(event, id=self._add(identity, number, event))

    # Scans ------------------------------------------------------------------------------------------------------------

    def scan(self, sha256: str) -> Mapping[str, Any] | None:
        with self._look() as db:
            row = db.execute("SELECT found FROM scans WHERE sha256 = ?", (sha256,)).fetchone()
        return None if row is None else dict(json.loads(row[0]))

    def keep_scans(self, found: Mapping[str, Mapping[str, Any]]) -> None:
        with self._change() as db:
            rows = [(sha256, json.dumps(result)) for sha256, result in found.items()]
            db.executemany("INSERT OR REPLACE INTO scans (sha256, found) VALUES (?, ?)", rows)


_: type[Community] = SqliteCommunity
