"""Users, organisations, tokens, and which chunks are whose: `server.sqlite`, beside the registry's own database."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path

from surgery.errors import InputError
from surgery.hub.interfaces import ConflictError
from surgery.hub.naming import RepositoryName
from surgery.hub.server.chunk_index import PLACES, ChunkTables
from surgery.hub.server.interfaces import Accounts, Identity, Namespace

_TABLES = """
CREATE TABLE namespaces (
    key TEXT PRIMARY KEY,         -- in lower case
    name TEXT NOT NULL,
    organisation INTEGER NOT NULL,
    private_by_default INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE members (
    organisation TEXT NOT NULL REFERENCES namespaces (key) ON DELETE CASCADE,
    user TEXT NOT NULL REFERENCES namespaces (key) ON DELETE CASCADE,
    PRIMARY KEY (organisation, user)
) WITHOUT ROWID;
CREATE INDEX members_by_user ON members (user);
CREATE TABLE tokens (
    digest BLOB PRIMARY KEY,      -- SHA-256
    user TEXT NOT NULL REFERENCES namespaces (key) ON DELETE CASCADE,
    role TEXT NOT NULL,
    repository TEXT,              -- in lower case
    label TEXT NOT NULL,
    created INTEGER NOT NULL,     -- seconds since 1970
    expires INTEGER
) WITHOUT ROWID;
CREATE TABLE redirects (
    kind TEXT NOT NULL,
    key TEXT NOT NULL,
    target TEXT NOT NULL,
    PRIMARY KEY (kind, key)
) WITHOUT ROWID;
CREATE TABLE xorb_holders (
    xorb BLOB NOT NULL,
    holder TEXT NOT NULL,         -- see ChunkIndex
    PRIMARY KEY (xorb, holder)
) WITHOUT ROWID;
CREATE TABLE content_holders (
    sha256 TEXT NOT NULL,
    holder TEXT NOT NULL,
    PRIMARY KEY (sha256, holder)
) WITHOUT ROWID;
CREATE TABLE files (
    xet BLOB PRIMARY KEY,
    sha256 TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE chunks (
    chunk BLOB NOT NULL,
    holder TEXT NOT NULL,
    sha256 TEXT NOT NULL,         -- of a file that has it
    PRIMARY KEY (chunk, holder)
) WITHOUT ROWID;
"""

# A token is called by so many of the first hex digits of its hash.
_SHOWN = 12


class SqliteAccounts(ChunkTables):
    """Both interfaces of `interfaces.py`, in one file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, (_TABLES, PLACES))
        with self._sqlite():
            # Readers and the writer do not wait for each other; nobody reads this file without the right to write it.
            self._db.execute("PRAGMA journal_mode = WAL")

    # Accounts ---------------------------------------------------------------------------------------------------------

    def is_empty(self) -> bool:
        with self._look() as db:
            return db.execute("SELECT 1 FROM namespaces LIMIT 1").fetchone() is None

    def add_user(self, name: str) -> None:
        self._add(Namespace(name, False, False), ())

    def add_organisation(self, name: str, members: Sequence[str], private_by_default: bool) -> None:
        self._add(Namespace(name, True, private_by_default), members)

    def _add(self, new: Namespace, members: Sequence[str]) -> None:
        key = new.name.lower()
        with self._change() as db:
            if (found := self.namespace(new.name)) is not None:
                what = "an organisation" if found.is_organisation else "a user"
                raise ConflictError(f"There is {what} called {found.name} already.")
            row = (key, new.name, new.is_organisation, new.private_by_default)
            db.execute("INSERT INTO namespaces (key, name, organisation, private_by_default) VALUES (?, ?, ?, ?)", row)
            for member in members:
                self._check_user(member)
                db.execute("INSERT OR IGNORE INTO members (organisation, user) VALUES (?, ?)", (key, member.lower()))

    def _check_user(self, name: str) -> None:
        found = self.namespace(name)
        if found is None or found.is_organisation:
            raise InputError(f"There is no user called {name}; `surgery hub user add {name}` makes one.")

    def namespace(self, name: str) -> Namespace | None:
        with self._look() as db:
            row = db.execute(
                "SELECT name, organisation, private_by_default FROM namespaces WHERE key = ?", (name.lower(),)
            ).fetchone()
        return None if row is None else Namespace(row[0], bool(row[1]), bool(row[2]))

    def namespaces(self) -> Sequence[tuple[Namespace, Sequence[str]]]:
        with self._look() as db:
            spaces = db.execute("SELECT key, name, organisation, private_by_default FROM namespaces ORDER BY key")
            rows = spaces.fetchall()
            members = db.execute(
                "SELECT m.organisation, n.name FROM members m JOIN namespaces n ON n.key = m.user ORDER BY n.key"
            ).fetchall()
        return [
            (Namespace(name, bool(organisation), bool(private)), [user for of, user in members if of == key])
            for key, name, organisation, private in rows
        ]

    def set_member(self, organisation: str, user: str, member: bool) -> None:
        with self._change() as db:
            found = self.namespace(organisation)
            if found is None or not found.is_organisation:
                raise InputError(
                    f"There is no organisation called {organisation}; `surgery hub org add {organisation}` makes one."
                )
            self._check_user(user)
            row = (organisation.lower(), user.lower())
            if member:
                db.execute("INSERT OR IGNORE INTO members (organisation, user) VALUES (?, ?)", row)
            else:
                db.execute("DELETE FROM members WHERE organisation = ? AND user = ?", row)

    def add_token(
        self, token: str, user: str, role: str, repository: str | None, label: str, now: int, expires: int | None
    ) -> str:
        with self._change() as db:
            self._check_user(user)
            row = (_digest(token), user.lower(), role, repository and repository.lower(), label, now, expires)
            known = db.execute("SELECT user, role, repository FROM tokens WHERE digest = ?", row[:1]).fetchone()
            if known not in (None, row[1:4]):
                raise ConflictError("There is another token of this value already; give a value that nobody has.")
            db.execute(
                "INSERT OR REPLACE INTO tokens (digest, user, role, repository, label, created, expires) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                row,
            )
        return row[0].hex()[:_SHOWN]

    def tokens(self, user: str | None) -> Sequence[tuple[str, str, str, str | None, str, int, int | None]]:
        with self._look() as db:
            if user is not None:
                self._check_user(user)
            return db.execute(
                f"SELECT lower(substr(hex(digest), 1, {_SHOWN})), n.name, role, repository, label, created, expires "
                "FROM tokens JOIN namespaces n ON n.key = user WHERE ? IS NULL OR user = ? ORDER BY created, 1",
                (user, user and user.lower()),
            ).fetchall()

    def remove_token(self, number: str) -> bool:
        with self._change() as db:
            gone = db.execute(
                f"DELETE FROM tokens WHERE lower(substr(hex(digest), 1, {_SHOWN})) = ?", (number.lower(),)
            )
            return gone.rowcount > 0

    def identify(self, token: str, now: int) -> Identity | None:
        return self.identify_digest(_digest(token), now)

    def identify_digest(self, digest: bytes, now: int) -> Identity | None:
        with self._look() as db:
            row = db.execute(
                "SELECT t.digest, n.key, n.name, t.role, t.repository, t.label FROM tokens t "
                "JOIN namespaces n ON n.key = t.user WHERE t.digest = ? AND (t.expires IS NULL OR t.expires > ?)",
                (digest, now),
            ).fetchone()
            if row is None or not hmac.compare_digest(row[0], digest):
                return None
            _, key, name, role, repository, label = row
            organisations = db.execute(
                "SELECT n.name FROM members m JOIN namespaces n ON n.key = m.organisation WHERE m.user = ? ORDER BY 1",
                (key,),
            ).fetchall()
        return Identity(name, tuple(name for (name,) in organisations), role, repository, label)

    def redirect(self, kind: str, old: RepositoryName, new: RepositoryName) -> None:
        with self._change() as db:
            db.execute("DELETE FROM redirects WHERE kind = ? AND key = ?", (kind, new.key))
            db.execute(
                "INSERT OR REPLACE INTO redirects (kind, key, target) VALUES (?, ?, ?)", (kind, old.key, str(new))
            )

    def forget(self, kind: str, name: RepositoryName) -> None:
        with self._change() as db:
            db.execute("DELETE FROM redirects WHERE kind = ? AND key = ?", (kind, name.key))

    def moved(self, kind: str, name: RepositoryName) -> RepositoryName | None:
        with self._look() as db:
            row = db.execute("SELECT target FROM redirects WHERE kind = ? AND key = ?", (kind, name.key)).fetchone()
        if row is None:
            return None
        namespace, _, last = row[0].rpartition("/")
        return RepositoryName(namespace, last)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


_: type[Accounts] = SqliteAccounts
