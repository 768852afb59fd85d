"""The server's log on stderr: a line for each request and for what goes wrong, for people or for machines.

Of an address only the path is written: the query may hold a signature. No token is ever written; of a valid one its
user and its label are.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

from surgery.hub.server.tracing import Trace

TEXT, JSON, NONE = "text", "json", "none"
KINDS = (TEXT, JSON, NONE)
log = logging.getLogger("surgery.hub")


def configure(kind: str) -> None:
    """Have this process write its log to stderr. With `none` only what goes wrong is written, as text."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Json() if kind == JSON else _Text())
    levels = {"surgery.hub": logging.ERROR if kind == NONE else logging.INFO, "uvicorn": logging.WARNING}
    for name, level in levels.items():
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False


def request(trace: Trace) -> None:
    """Write that a request was answered."""
    fields = {
        "id": trace.id, "method": trace.method, "path": trace.path[:2000], "status": trace.status,
        "ms": trace.milliseconds, "bytes": trace.sent, "user": trace.user, "token": trace.token,
        "address": trace.address,
    }  # fmt: skip
    log.info("request", extra={"fields": fields})


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {"time": _time(record), "level": record.levelname.lower()}
        entry["message"] = record.getMessage()
        entry |= getattr(record, "fields", {})
        if record.exc_info is not None:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=True)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", None)
        if fields is None:
            line = f"{_time(record)} {record.levelname} {record.getMessage()}"
            return line if record.exc_info is None else f"{line}\n{self.formatException(record.exc_info)}"
        who = f"{fields['user']} " if fields["user"] else ""
        # Nothing of a stranger's is to move the cursor of a terminal.
        text = (
            f"{_time(record)} {fields['status']} {fields['method']} {fields['path']} {fields['bytes']} bytes "
            f"{fields['ms']} ms {who}{fields['address']} {fields['id']}"
        )
        return ascii(text)[1:-1]


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
