"""A SQLite file: its schema, transactions, and what goes wrong with one in a sentence.

Every change begins with `BEGIN IMMEDIATE`, so that changes come one after the other, in however many processes.
`synchronous=FULL` has SQLite sync before a commit returns. The journal is SQLite's default, a rollback journal: it
needs no shared memory, so that readers without the right to write can read.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from surgery.errors import FormatError, OutputError

# Seconds to wait while another process changes something; a change takes milliseconds.
_PATIENCE = 60.0


class Database:
    """One object may be used from several threads; each transaction has the connection to itself.

    Args:
        path: the file.
        tables: what a new file begins with, as SQL.
        schema: the version that this program works with.
        create: whether to make the file, and to bring an older one up to date.
        upgrades: what leads from each version to the next, up to `schema`; a new file goes through all of them.
    """

    def __init__(
        self,
        path: Path,
        tables: str,
        schema: int,
        create: bool = True,
        upgrades: Sequence[Callable[[sqlite3.Connection], None]] = (),
    ) -> None:
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
            oldest = schema - len(upgrades)
            if create and (self._version() == 0 or oldest <= self._version() < schema):
                with self._change():
                    version = self._version()  # another process may have come first
                    if version == 0:
                        for statement in tables.split(";\n"):
                            self._db.execute(statement)
                        version = oldest
                    for upgrade in upgrades[version - oldest :]:
                        upgrade(self._db)
                    self._db.execute(f"PRAGMA user_version = {schema}")
            if not create and oldest <= self._version() < schema:
                # A reader who may write brings the file up to date; who may not is told below.
                with contextlib.suppress(OutputError):
                    Database(path, tables, schema, True, upgrades).close()
            found = self._version()
            if found != schema:
                remedy = "use the version of this tool that made it"
                if oldest <= found < schema:
                    remedy = "whoever may write there brings it up to date, with `surgery hub reindex`"
                raise FormatError(f"{path} has schema {found}, expected {schema}; {remedy}.")

    def close(self) -> None:
        """Let go of the file."""
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
