"""Requests and answers: errors as the Hub's client knows them, bodies with a limit, ranges, streams."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from surgery.source import Source

# A client that sends nothing for so many seconds is given up.
PATIENCE = 60.0
MAX_JSON = 4 << 20
MAX_PAGE = 1000
_BLOCK = 1 << 20
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
# Nothing that somebody uploaded runs in the name of this server.
_HARMLESS = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "default-src 'none'; sandbox"}


class HttpError(Exception):
    """An answer that is no success.

    Attributes:
        status: of HTTP.
        code: what makes the client raise its own exception: `RepoNotFound`, `RevisionNotFound`, `EntryNotFound`,
            `GatedRepo`; empty for others.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str = "",
        headers: Mapping[str, str] | None = None,
        body: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.headers = dict(headers or {})
        self.body = dict(body or {})

    def response(self) -> Response:
        headers = {**self.headers, "X-Error-Message": _header(self.message)}
        if self.code:
            headers["X-Error-Code"] = self.code
        return json_response({"error": self.message, **self.body}, self.status, headers)


def _header(text: str) -> str:
    """A line of text as a header may hold it."""
    return "".join(char if 32 <= ord(char) < 127 else "?" for char in text)[:500]


def json_response(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON, in one piece."""
    body = json.dumps(value, separators=(",", ":")).encode()
    return Response(body, status, {**_HARMLESS, **(headers or {})}, "application/json")


async def pieces(request: Request, limit: int, size: int = _BLOCK) -> AsyncIterator[bytes]:
    """The body in pieces of about `size` bytes. Raises `HttpError` beyond `limit` bytes, and for a slow client."""
    announced = request.headers.get("content-length", "0")
    if not announced.isdecimal() or len(announced) > 18 or int(announced) > limit:
        raise HttpError(413, f"The body may have {limit} bytes.")
    stream = request.stream()
    waiting = bytearray()
    count = 0
    while True:
        try:
            async with asyncio.timeout(PATIENCE):
                part = await anext(stream)
        except StopAsyncIteration:
            break
        except TimeoutError:
            raise HttpError(408, f"Nothing came for {PATIENCE:.0f} seconds.") from None
        except ClientDisconnect:
            raise HttpError(400, "The body was cut short.") from None
        count += len(part)
        if count > limit:
            raise HttpError(413, f"The body may have {limit} bytes.")
        waiting += part
        if len(waiting) >= size:
            yield bytes(waiting)
            waiting.clear()
    if waiting:
        yield bytes(waiting)


async def whole_body(request: Request, limit: int) -> bytes:
    """The body in one piece."""
    return b"".join([part async for part in pieces(request, limit)])


async def json_body(request: Request, limit: int = MAX_JSON) -> dict[str, Any]:
    """A JSON object from the body; an empty body is an empty object. Raises `HttpError` for anything else."""
    body = await whole_body(request, limit)
    try:
        value = json.loads(body or b"{}")
    except (ValueError, RecursionError) as error:
        raise HttpError(400, f"The body is no JSON ({error}).") from None
    if not isinstance(value, dict):
        raise HttpError(400, "The body has to be a JSON object.")
    return value


def text_of(value: object, what: str, default: str | None = None) -> str:
    """A text of a JSON object. Raises `HttpError` where it is missing, or anything else."""
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise HttpError(400, f"{what} has to be a text.")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can write half of a character, which no database takes
        raise HttpError(400, f"{what} has to be a text that is Unicode.") from None
    return value


def page(query: Mapping[str, list[str]], default: int = MAX_PAGE) -> tuple[int, int]:
    """Where a page of a list begins, and how many items it has. Raises `HttpError` for what is no number."""
    return page_number(query, "cursor"), max(1, min(page_number(query, "limit", default), MAX_PAGE))


def page_number(query: Mapping[str, list[str]], name: str, default: int = 0) -> int:
    """A number in an address. Raises `HttpError` for what is none."""
    text = query.get(name, [str(default)])[-1]
    if not text.isdecimal() or len(text) > 9:
        raise HttpError(400, f"{name} has to be a number.")
    return int(text)


@dataclass(frozen=True)
class ByteRange:
    """Bytes `begin` to `end`, the last not included."""

    begin: int
    end: int


def parse_range(value: str | None, size: int) -> ByteRange | None:
    """What a `Range` header asks for; None for all. Raises `HttpError` (416) for what there is not.

    A header that asks for several ranges, or is no range of bytes, may be passed over (RFC 9110, 14.2).
    """
    if value is None or (found := _RANGE.fullmatch(value.strip())) is None or found[1] == found[2] == "":
        return None
    if max(len(found[1]), len(found[2])) > 18:
        raise HttpError(416, "There is no such range.", headers={"Content-Range": f"bytes */{size}"})
    if found[1]:
        begin, end = int(found[1]), min(int(found[2] or size), size - 1) + 1
    else:
        begin, end = max(size - int(found[2]), 0), size
    if begin >= end:
        raise HttpError(416, "There is no such range.", headers={"Content-Range": f"bytes */{size}"})
    return ByteRange(begin, end)


def stream(source: Source, wanted: ByteRange | None, headers: Mapping[str, str], head: bool = False) -> Response:
    """A range of a source, or all of it, as an answer; only its headers for a HEAD request."""
    chosen = wanted or ByteRange(0, source.size)
    length = chosen.end - chosen.begin
    sent = {**_HARMLESS, "Accept-Ranges": "bytes", "Content-Length": str(length), **headers}
    if wanted is not None:
        sent["Content-Range"] = f"bytes {wanted.begin}-{wanted.end - 1}/{source.size}"
    status = 200 if wanted is None else 206
    media_type = headers.get("Content-Type", "application/octet-stream")
    if head:
        return Response(None, status, sent, media_type)

    async def parts() -> AsyncIterator[bytes]:
        for block in _blocks(chosen):
            yield await run_in_threadpool(_read, source, block)

    return StreamingResponse(parts(), status, sent, media_type)


def _blocks(chosen: ByteRange) -> Iterator[ByteRange]:
    for begin in range(chosen.begin, chosen.end, _BLOCK):
        yield ByteRange(begin, min(begin + _BLOCK, chosen.end))


def _read(source: Source, block: ByteRange) -> bytes:
    buffer = bytearray(block.end - block.begin)
    source.read_into(block.begin, memoryview(buffer))
    return bytes(buffer)


def unquoted(part: str) -> str:
    """A part of a path as text. Raises `HttpError` for what is no UTF-8."""
    try:
        return unquote(part, errors="strict")
    except UnicodeDecodeError:
        raise HttpError(400, "The address is no UTF-8.") from None
