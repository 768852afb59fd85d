"""Bodies, ranges, front matter and commits as they come in: any bytes in any pieces, and clients that are slow."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from surgery.errors import InputError
from surgery.hub.interfaces import FileEntry
from surgery.hub.server import web
from surgery.hub.server.commits import Draft, applied
from surgery.hub.server.front_matter import parse
from surgery.hub.server.web import HttpError, parse_range, whole_body


def request(parts: list[bytes], headers: dict[str, str] | None = None, end: str = "end") -> Request:
    """A request whose body comes in parts, and then ends, stops coming, or breaks off."""
    waiting = list(parts)

    async def receive() -> dict[str, Any]:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting) or end != "end"}
        if end == "slow":
            await asyncio.sleep(10)
        return {"type": "http.disconnect"} if end == "break" else {"type": "http.request", "more_body": False}

    listed = [(key.encode(), value.encode()) for key, value in (headers or {}).items()]
    taking: Callable[[], Awaitable[Any]] = receive
    return Request({"type": "http", "method": "POST", "headers": listed}, taking)


def test_a_body_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asyncio.run(whole_body(request([b"ab", b"", b"cd"]), 4)) == b"abcd"
    for sent, headers in (([b"abcde"], {}), ([b"x"], {"content-length": "5"}), ([b"x"], {"content-length": "9" * 30})):
        with pytest.raises(HttpError) as error:
            asyncio.run(whole_body(request(sent, headers), 4))
        assert error.value.status == 413
    monkeypatch.setattr(web, "PATIENCE", 0.05)
    for end, status in (("slow", 408), ("break", 400)):
        with pytest.raises(HttpError) as error:
            asyncio.run(whole_body(request([b"a"], end=end), 4))
        assert error.value.status == status


@given(st.text(max_size=20) | st.from_regex(r"bytes=\d{0,3}-\d{0,3}", fullmatch=True), st.integers(0, 500))
def test_any_range_lies_within(value: str, size: int) -> None:
    refused = None
    try:
        found = parse_range(value, size)
    except HttpError as error:
        refused, found = error, None
    assert found is None or 0 <= found.begin < found.end <= size
    assert refused is None or (refused.status, refused.headers["Content-Range"]) == (416, f"bytes */{size}")


# Commits --------------------------------------------------------------------------------------------------------------


def entry(path: str, data: bytes) -> FileEntry:
    return FileEntry(path, len(data), hashlib.sha256(data).hexdigest(), "0" * 40, False)


def found(path: str, sha256: str, size: int | None) -> FileEntry:
    return FileEntry(path, size or 0, sha256, "0" * 40, True)


def taken(body: bytes, step: int) -> Draft:
    draft = Draft(entry, found)
    for begin in range(0, len(body), step):
        draft.feed(body[begin : begin + step])
    draft.finish()
    return draft


@given(st.lists(st.tuples(st.text("ab/", min_size=1, max_size=5), st.binary(max_size=30))), st.integers(1, 50))
def test_a_commit_in_any_pieces(files: list[tuple[str, bytes]], step: int) -> None:
    lines: list[dict[str, Any]] = [{"key": "header", "value": {"summary": "x", "parentCommit": "y"}}]
    for path, data in files:
        content = base64.b64encode(data).decode()
        lines.append({"key": "file", "value": {"path": path, "content": content, "encoding": "base64"}})
    body = b"\n".join(json.dumps(line).encode() for line in lines)
    good = all(part for path, _ in files for part in path.rstrip("/").split("/"))
    if not good:
        with pytest.raises(HttpError):
            taken(body, step)
        return
    draft = taken(body, step)
    assert (draft.message, draft.parent) == ("x", "y")
    assert [operation.entry for operation in draft.operations] == [
        entry(path.rstrip("/"), data) for path, data in files
    ]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from(["header", "file", "lfsFile", "deletedFile", "deletedFolder", "x"])
FIELDS = st.sampled_from(["path", "content", "encoding", "oid", "algo", "size", "summary", "parentCommit"])
LINES = st.fixed_dictionaries({"key": KEYS, "value": st.dictionaries(FIELDS, VALUES) | VALUES}) | VALUES


@given(st.lists(LINES, max_size=4), st.binary(max_size=20), st.integers(1, 100))
def test_any_lines_are_a_commit_or_a_known_error(lines: list[Any], tail: bytes, step: int) -> None:
    head = json.dumps({"key": "header", "value": {"summary": "x"}}).encode()
    body = b"\n".join([head, *(json.dumps(line).encode() for line in lines), tail])
    files, status = [], 400
    try:
        files = applied(taken(body, step).operations, [entry("a", b"")])
    except HttpError as error:
        status = error.status
    assert status in (400, 404, 413, 422)
    assert sorted(files) == files


def test_a_line_is_limited() -> None:
    with pytest.raises(HttpError) as error:
        taken(bytes(20 << 20), 1 << 20)
    assert error.value.status == 413


# Front matter ---------------------------------------------------------------------------------------------------------


@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda data: data.decode("latin-1")))
def test_any_front_matter_is_json_or_a_known_error(text: str) -> None:
    try:
        value = parse(f"---\n{text}\n---\n")
    except InputError:
        return
    json.dumps(value, allow_nan=False)


def test_front_matter_that_grows() -> None:
    assert parse("# No front matter") == parse("") == parse("---\nnever ends") == {}
    with pytest.raises(InputError, match="aliases"):
        parse("---\na: &a [x]\nb: &b [*a, *a]\n---\n")
    with pytest.raises(InputError, match="65536 characters"):
        parse(f"---\na: {'x' * 70_000}\n---\n")
    with pytest.raises(InputError, match="no YAML"):
        parse("---\na: !!python/object/apply:os.system [ls]\n---\n")
    with pytest.raises(InputError, match="no YAML"):
        parse(f"---\na: {'[' * 5000}\n---\n")
