"""Paths, addresses, bodies and headers that are meant to do harm; and what was uploaded, sent to a browser."""

from __future__ import annotations

import base64
import json
import socket
from urllib.parse import urlsplit

import httpx2
import pytest

from tests.hub.server.serving import Server
from tests.hub.server.test_safety import commit


@pytest.fixture(scope="module", autouse=True)
def opened(server: Server) -> None:
    server.api("ada").create_repo("open")


PATHS = ["../x", "/x", "a/../b", "a//b", ".git/config", "a/.GIT/b", "a\\b", "a\0b", "x" * 2000, "e\u0301", "", "."]


@pytest.mark.parametrize("path", PATHS)
def test_paths_that_lead_out(server: Server, path: str) -> None:
    line = {"key": "file", "value": {"path": path, "content": base64.b64encode(b"x").decode(), "encoding": "base64"}}
    assert commit(server, "ada", "ada/open", line).status_code == 422


@pytest.mark.parametrize(
    "path",
    [
        "ada/open/resolve/main/..%2f..%2fserver.key",
        "ada/open/resolve/..%2f..%2f/server.key",
        "ada/..%2fopen/resolve/main/server.key",
        "..%2f..%2f/resolve/main/server.key",
        "cas/xorbs/..%2f..%2fserver.key?begin=0&end=1&expires=9999999999&signature=0",
        "lfs/..%2fserver.key",
        "api/models/%ff/x",
        "api/models/ada/open/tree/main/%2e%2e",
        "%00/resolve/main/x",
    ],
)
def test_addresses_that_lead_out(server: Server, path: str) -> None:
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port)) as connection:  # a client would tidy the path
        connection.sendall(f"GET /{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while data := connection.recv(65536):
            answer += data
    assert answer.split()[1] in (b"400", b"401", b"403", b"404")
    assert (server.data / "server.key").read_bytes() not in answer


BODIES = {
    "nothing": (b"", 400),
    "no JSON": (b"{", 400),
    "no header": (b'{"key": "deletedFile", "value": {"path": "x"}}\n', 400),
    "two headers": (b'{"key": "header", "value": {"summary": "x"}}\n' * 2, 400),
    "no object": (b"[1]\n", 400),
    "no text": (b'{"key": "header", "value": {"summary": 1}}\n', 400),
    "deep": (b"[" * 100_000, 400),
    "no such thing": (b'{"key": "header", "value": {"summary": "x"}}\n{"key": "run", "value": {"path": "x"}}\n', 400),
    "no base64": (
        b'{"key": "header", "value": {"summary": "x"}}\n'
        b'{"key": "file", "value": {"path": "x", "encoding": "base64", "content": "?"}}\n',
        400,
    ),
    "no content": (b'{"key": "header", "value": {"summary": "x"}}\n{"key": "file", "value": {"path": "x"}}\n', 400),
    "half a character": (b'{"key": "header", "value": {"summary": "\\ud800"}}\n', 400),
    "half a character in a path": (
        b'{"key": "header", "value": {"summary": "x"}}\n{"key": "deletedFile", "value": {"path": "\\ud800"}}\n',
        400,
    ),
    "long message": (json.dumps({"key": "header", "value": {"summary": "x" * 100_000}}).encode(), 413),
    "long line": (b'{"key": "header", "value": {"summary": "x"}}\n' + b" " * (15 << 20), 413),
    "no hash": (
        b'{"key": "header", "value": {"summary": "x"}}\n'
        b'{"key": "lfsFile", "value": {"path": "x", "oid": "../../server.key"}}\n',
        400,
    ),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_no_commit(server: Server, name: str) -> None:
    body, expected = BODIES[name]
    headers = {"Authorization": f"Bearer {server.tokens['ada']}"}
    answer = httpx2.post(f"{server.url}/api/models/ada/open/commit/main", content=body, headers=headers)
    assert answer.status_code == expected
    assert answer.json()["error"]


def test_header_bombs(server: Server) -> None:
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.settimeout(10)
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        sent = 0
        try:
            while sent < 50 << 20:
                sent += connection.send(b"X-Bomb: " + b"x" * 60_000 + b"\r\n")
        except (ConnectionError, TimeoutError):
            pass
    assert sent < 50 << 20
    assert httpx2.get(f"{server.url}/health").status_code == 200


def test_what_was_uploaded_does_not_run_here(server: Server) -> None:
    page = base64.b64encode(b"<script>alert(1)</script>").decode()
    line = {"key": "file", "value": {"path": "x.html", "content": page, "encoding": "base64"}}
    assert commit(server, "ada", "ada/open", line).status_code == 200
    found = httpx2.get(f"{server.url}/ada/open/resolve/main/x.html")
    assert found.headers["content-type"] == "application/octet-stream"
    assert found.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in found.headers["content-security-policy"]


ASKED = [
    ("POST", "api/models/ada/open/discussions"),
    ("POST", "api/models/ada/open/discussions/1/comment"),
    ("POST", "api/models/ada/open/discussions/1/title"),
    ("POST", "api/models/ada/open/discussions/1/status"),
    ("POST", "api/models/ada/open/discussions/1/merge"),
    ("POST", "api/models/ada/open/discussions/99999999999/merge"),
    ("POST", "api/models/ada/open/discussions/x/merge"),
    ("POST", "api/models/ada/open/super-squash/nowhere"),
    ("POST", "api/models/ada/open/user-access-request/handle"),
    ("POST", "api/models/ada/open/user-access-request/grant"),
    ("GET", "api/models/ada/open/user-access-request/forgotten"),
    ("POST", "api/models/ada/open/lfs-files/batch"),
    ("POST", "ada/open/ask-access"),
    ("POST", "ada/open.git/info/lfs/objects/batch"),
    ("POST", "ada/open.git/info/lfs/verify"),
    ("PUT", "api/models/ada/open/settings"),
    ("POST", "api/models/ada/open/preupload/refs%2Fpr%2F7"),
    ("POST", "api/models/ada/open/commit/refs%2Fpr%2F..%2F..%2Fmain"),
    ("POST", "api/models/ada/open/commit/main?create_pr=1"),
    ("POST", "api/admin/users"),
    ("POST", f"lfs/{'0' * 64}?size=x"),
    ("PUT", f"lfs/{'0' * 64}/1?size=5&expires={'9' * 400}"),
]
ODD_BODIES = [
    b"", b"[]", b"5", b"null", b"{", b"\xff", b"[" * 100_000,
    b'{"title": 5, "status": [], "user": {}, "deletions": []}',
    b'{"title": "x", "pullRequest": "maybe", "comment": {}, "status": "merged", "user": "\\u0000"}',
    b'{"gated": [1], "deletions": {"sha": ["x"], "rewriteHistory": true}, "parts": [{}]}',
    b'{"operation": "download", "objects": [{}]}',
    b'{"title": "x\\ud800", "comment": "\\ud800", "message": "\\ud800", "user": "\\ud800", "name": "\\ud800"}',
    b'{"operation": "upload", "transfers": 5, "objects": [], "ref": {"name": []}, "files": [{"path": "x"}]}',
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), ASKED)
def test_odd_bodies_are_refused_and_break_nothing(server: Server, method: str, path: str) -> None:
    headers = {"Authorization": f"Bearer {server.tokens['ada']}"}
    before = server.api("ada").model_info("ada/open")
    for body in ODD_BODIES:
        answer = httpx2.request(method, f"{server.url}/{path}", content=body, headers=headers)
        assert answer.status_code < 500, (body, answer.text)
    after = server.api("ada").model_info("ada/open")
    assert (after.sha, after.gated, after.private) == (before.sha, before.gated, before.private)
