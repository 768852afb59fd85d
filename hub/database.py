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

    A schema grows by steps, each a text of statements, or a function where what is there has to be worked on. Its
    number is how many of them a file has been through; a file of an older version takes the missing ones, in one
    transaction, when it is opened to write. Steps only add: who only reads an older file finds in it what was there
    then.
    """

    def __init__(
        self, path: Path, steps: Sequence[str | Callable[[sqlite3.Connection], None]], create: bool = True
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
            if create and self._version() < len(steps):
                with self._change():
                    # Another process may have come first.
                    for step in steps[self._version() :]:
                        if callable(step):
                            step(self._db)
                            continue
                        for statement in step.split(";\n"):
                            self._db.execute(statement)
                    self._db.execute(f"PRAGMA user_version = {max(len(steps), self._version())}")
            if not 1 <= self._version() <= len(steps):
                raise FormatError(
                    f"{path} has schema {self._version()}, expected {len(steps)}; use the version of this tool that "
                    "made it."
                )

    @property
    def path(self) -> Path:
        return self._path

    def problems(self, quick: bool = False) -> list[str]:
        """What SQLite's own check finds wrong."""
        with self._look() as db:
            check = "quick_check" if quick else "integrity_check"
            found = [str(text) for (text,) in db.execute(f"PRAGMA {check}") if text != "ok"]
            broken = {str(row[0]) for row in db.execute("PRAGMA foreign_key_check")}
        return found + [f"a row of {table} refers to one that is not there" for table in sorted(broken)]

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

    def _is_changing(self) -> bool:
        return self._db.in_transaction

    @contextlib.contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """A transaction that changes something; only one at a time, in all processes. Within one it is part of that."""
        with self._mutex, self._sqlite():
            if self._is_changing():  # this thread: it has the mutex
                yield self._db
                return
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
