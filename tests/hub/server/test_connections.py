"""Connections on which nothing, or half a request, comes; and those that are slow for a good reason."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from surgery.hub.server import connections

HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n"


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http":
        await PlainTextResponse(await Request(scope, receive).body())(scope, receive, send)


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A server that waits half a second for a head."""
    monkeypatch.setattr(connections, "HEAD", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(echo, http=connections.Connection, log_config=None, lifespan="off", ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join(20)


def open_to(port: int) -> socket.socket:
    found = socket.create_connection(("127.0.0.1", port))
    found.settimeout(10)
    return found


def ends(connection: socket.socket) -> bool:
    """Whether the other side hangs up, in whatever way, without a word."""
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


def drip(connection: socket.socket, data: bytes) -> None:
    for byte in data:
        connection.sendall(bytes([byte]))
        time.sleep(0.05)


@pytest.mark.parametrize("sent", [b"", b"POST / HTTP/1.1\r\nHost: x\r\n"], ids=["nothing", "half a head"])
def test_who_says_nothing_is_cut_off(port: int, sent: bytes) -> None:
    with open_to(port) as connection:
        connection.sendall(sent)
        begun = time.monotonic()
        assert ends(connection)
        assert 0.3 < time.monotonic() - begun < 8


def test_a_head_that_drips_is_cut_off(port: int) -> None:
    """A byte now and then does not win time."""
    with open_to(port) as connection:
        begun = time.monotonic()
        with pytest.raises(ConnectionError):
            drip(connection, HEAD[:-2] * 100)
        assert time.monotonic() - begun < 8


def test_bodies_and_pauses_may_take_their_time(port: int) -> None:
    with open_to(port) as connection:
        for _ in range(2):
            connection.sendall(HEAD)
            time.sleep(0.8)
            connection.sendall(b"body")
            found = b""
            while not found.endswith(b"body"):
                found += connection.recv(1000)
            assert found.startswith(b"HTTP/1.1 200 ")
            time.sleep(0.8)
        connection.sendall(HEAD[:10])  # the next one has to come whole, too
        assert ends(connection)
