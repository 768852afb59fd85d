"""One file behind an address, on a server that does one thing wrong after the other: drops, lies, sends away."""

from __future__ import annotations

import contextlib
import re
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.hub.fake_hub import PatientServer

COMMIT = "c" * 40


@dataclass(frozen=True)
class Do:
    """What to do with one request for a range; by default what is asked for.

    Attributes:
        status: to answer instead, with `headers`.
        cut: bytes after which the connection breaks.
        extra: bytes too many at the end, of a body whose length is not announced.
        moved: how far `Content-Range` and body are from what was asked for.
        total: size in `Content-Range`.
        whole: the whole file with status 200.
        commit: in `X-Repo-Commit`.
        etag: in `X-Linked-Etag`.
        encoding: in `Content-Encoding`.
        flip: the first byte is another.
        pause: seconds between one half of the body and the other.
    """

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    extra: int = 0
    moved: int = 0
    total: int | None = None
    whole: bool = False
    commit: str = COMMIT
    etag: str = ""
    encoding: str = ""
    flip: bool = False
    pause: float = 0.0


class FaultyServer:
    """`data` at `url`; `plans` are for the requests to come, in order, and after them all goes well.

    With `away` the file lies elsewhere: on another host by name, at addresses that hold for `lasts` requests.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.plans: deque[Do] = deque()
        self.requests: list[tuple[str, str, str | None]] = []
        self.served = 0
        self.connections = 0
        self.away = False
        self.lasts = 1_000_000
        self.left: dict[str, int] = {}
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/lab/x/resolve/{COMMIT}/f.safetensors"

    def ranges(self) -> list[str]:
        """The ranges asked for, where the file lies."""
        return [wanted for path, wanted, _ in self.requests if path.startswith("/signed") or not self.away]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FaultyServer

    def log_message(self, format: str, *args: Any) -> None: ...  # noqa: A002 - the name of the base class

    def setup(self) -> None:
        super().setup()
        self.owner.connections += 1

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:  # the client has had enough
            self.close_connection = True

    def do_GET(self) -> None:
        owner = self.owner
        owner.requests.append((self.path, self.headers.get("Range", ""), self.headers.get("Authorization")))
        if owner.away and not self.path.startswith("/signed"):
            path = f"/signed/{len(owner.requests)}"
            owner.left[path] = owner.lasts
            return self.reply(302, {"Location": f"http://localhost:{owner.port}{path}", "X-Repo-Commit": COMMIT})
        if owner.away:
            owner.left[self.path] -= 1
            if owner.left[self.path] < 0:
                return self.reply(403, {})
        do = owner.plans.popleft() if owner.plans else Do()
        if do.status is not None:
            return self.reply(do.status, do.headers)
        return self.send(do)

    def reply(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": "0"}.items():
            self.send_header(name, value)
        self.end_headers()

    def send(self, do: Do) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
        assert match is not None
        begin, end = int(match[1]) + do.moved, min(int(match[2]) + 1, len(self.owner.data)) + do.moved
        body = self.owner.data if do.whole else self.owner.data[begin:end]
        if do.flip:
            body = bytes([body[0] ^ 1]) + body[1:]
        self.send_response(200 if do.whole else 206)
        if not do.whole:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{do.total or len(self.owner.data)}")
        for name, value in (
            ("X-Repo-Commit", do.commit),
            ("X-Linked-Etag", do.etag),
            ("Content-Encoding", do.encoding),
        ):
            if value:
                self.send_header(name, value)
        if do.extra:
            self.send_header("Connection", "close")
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        body = body[: do.cut] + b"x" * do.extra
        with contextlib.suppress(OSError):  # the client may have had enough
            half = len(body) // 2 if do.pause else 0
            self.wfile.write(body[:half])
            self.wfile.flush()
            threading.Event().wait(do.pause)  # not the sleep that tests replace
            self.wfile.write(body[half:])
        self.owner.served += len(body)
        if do.cut is not None:
            self.close_connection = True


@contextlib.contextmanager
def serving_badly(data: bytes) -> Iterator[FaultyServer]:
    """A server that has `data`, as long as this lasts."""
    owner = FaultyServer(data)
    server = PatientServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": owner}))
    server.daemon_threads = True
    owner.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield owner
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
