"""Who changed what, when and from where: `audit.jsonl` in the data folder, one line of JSON for each change.

Lines are only ever added. A line is there before the answer goes out; it is not synced, so that a crash of the machine,
unlike one of the server, may lose the last ones. A file that has grown to its limit is renamed, and kept.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from surgery.hub.content import disk
from surgery.hub.server.tracing import Trace
from surgery.hub.transfer import write_all

FILE = "audit.jsonl"
_LIMIT = 64 << 20
_LONGEST = 500


class Audit:
    """See the module. Any number of processes may write to one file."""

    def __init__(self, data: Path, limit: int = _LIMIT) -> None:
        self._path = data / FILE
        self._limit = limit

    def request(self, trace: Trace) -> None:
        """Record what a request did, or was refused."""
        action = "login refused" if trace.refused else str(trace.notes.get("action", ""))
        details = {key: value for key, value in trace.notes.items() if key != "action"}
        self.record(action, trace.user, trace.address, details, result=trace.status, id=trace.id, token=trace.token,
                    method=trace.method, path=trace.path)  # fmt: skip

    def record(self, action: str, user: str, address: str, details: Mapping[str, object], **more: str | int) -> None:
        """Add a line. Raises `OutputError` where it cannot be written.

        Args:
            action: what was done.
            user: by whom; empty for nobody.
            address: from where.
            details: to what, and how.
            more: of a request what it was, and the status of HTTP that was answered.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        entry = {"time": now, "action": action, "user": user, "address": address, **more}
        whole = {key: _short(value) for key, value in entry.items()}
        whole["details"] = {key: _short(value) for key, value in details.items()}
        # Text of strangers: everything beyond ASCII and every control character is escaped, so a line stays a line.
        line = json.dumps(whole, ensure_ascii=True) + "\n"
        with disk(self._path.parent):
            self._add(line.encode())

    def _add(self, line: bytes) -> None:
        while True:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if not self._is_current(descriptor):
                    continue  # another process has just renamed it
                write_all(descriptor, memoryview(line))
                if os.fstat(descriptor).st_size >= self._limit:
                    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
                    os.rename(self._path, self._path.with_name(f"audit-{stamp}.jsonl"))
                return
            finally:
                os.close(descriptor)

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.stat(self._path).st_ino == os.fstat(descriptor).st_ino
        except FileNotFoundError:
            return False


def _short(value: object) -> object:
    if value is None or isinstance(value, bool | int | float):
        return value
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."
