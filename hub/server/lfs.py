"""Git LFS, for clients without Xet: files go to and come from addresses that are signed and expire.

A small file is one PUT. A larger one goes in parts, as the Hub's client can, so that a connection that breaks costs one
part only: each is kept under its own SHA-256 until the last request puts them together. What a part's PUT answers is
signed, so that nobody has a file put together from what others sent.
Source: the git-lfs specification (`docs/api/batch.md`, `basic-transfers.md`), version 3.7; huggingface_hub 2.4
(`lfs.py`) for the parts.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Sequence
from urllib.parse import urlencode

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from surgery.hub.interfaces import BRANCHES, Incoming, Repository
from surgery.hub.server.checking import check_room, check_size
from surgery.hub.server.commits import may_refer
from surgery.hub.server.hub import Call, Hub
from surgery.hub.server.pulls import branch_to_write
from surgery.hub.server.signing import ADDRESS_LIFE
from surgery.hub.server.web import HttpError, json_body, json_response, parse_range, pieces, stream
from surgery.hub.transfer import pump

PREFIX = "/lfs"
_WHOLE, _PART, _KEPT, _JOINED, _DOWNLOAD = "lfs", "lfs-part", "lfs-kept", "lfs-joined", "lfs-download"
# Bytes of a part, unless there would be too many of them.
PART = 16 << 20
_MAX_PARTS = 1000
_MEDIA = {"Content-Type": "application/vnd.git-lfs+json"}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_OBJECTS = 1000
MAX_FILE = 1 << 42


async def batch(call: Call) -> Response:
    """`POST /{id}.git/info/lfs/objects/batch`: where each file goes, if it is not here; or is to be had."""
    body = await json_body(call.request)
    objects, operation = body.get("objects"), body.get("operation")
    if operation not in ("upload", "download") or not isinstance(objects, list) or len(objects) > _MAX_OBJECTS:
        raise HttpError(422, f"Only an upload or a download of at most {_MAX_OBJECTS} objects can be asked for.")
    if body.get("hash_algo", "sha256") != "sha256":
        raise HttpError(409, "Objects have to be named by their SHA-256.")
    transfers = body.get("transfers")
    in_parts = operation == "upload" and isinstance(transfers, list) and "multipart" in transfers

    def answer() -> list[dict[str, object]]:
        parsed = [_parsed(item) for item in objects]
        if operation == "download":
            found = call.opened()
            return [_download(call, found, oid, size) for oid, size in parsed]
        found = _check_upload(call, body.get("ref"))
        for oid, size in parsed:
            check_size(call.hub, oid, size)
        check_room(call.hub, found.name.namespace, dict(parsed))
        return [_upload(call, oid, size, in_parts) for oid, size in parsed]

    found = await run_in_threadpool(answer)
    return json_response({"transfer": "multipart" if in_parts else "basic", "objects": found}, headers=_MEDIA)


def _parsed(item: object) -> tuple[str, int]:
    oid, size = (item.get("oid"), item.get("size")) if isinstance(item, dict) else (None, None)
    if not isinstance(oid, str) or _SHA256.fullmatch(oid) is None or not isinstance(size, int) or size < 0:
        raise HttpError(422, "Each object has to have its SHA-256 and its size.")
    return oid, size


def _check_upload(call: Call, ref: object) -> Repository:
    """The repository, if this person may upload for a branch; without one, for a pull request to be opened."""
    name = ref.get("name") if isinstance(ref, dict) else None
    if isinstance(name, str):
        return branch_to_write(call, name.removeprefix(BRANCHES), False)
    return call.proposable()


def _signed(call: Call, path: str, purpose: str, *fields: tuple[str, object]) -> str:
    """An address below `/lfs` for one purpose, for a while."""
    given = (*fields, ("expires", int(time.time()) + ADDRESS_LIFE))
    signature = call.hub.signer.signature(purpose, path, *(value for _, value in given))
    return f"{call.base}{PREFIX}/{path}?{urlencode([*given, ('signature', signature)])}"


def _fields(hub: Hub, request: Request, path: str, purpose: str, *names: str) -> list[str]:
    """What a signed address says. Raises `HttpError` for one that was not given out for this, or has expired."""
    given = request.query_params
    values = [given.get(name, "") for name in (*names, "expires")]
    # What was signed as a number is a number.
    plain = [
        value if name == "holders" else _integer(value) for name, value in zip((*names, "expires"), values, strict=True)
    ]
    if not hub.signer.is_signature(given.get("signature", ""), purpose, path, *plain):
        raise HttpError(403, "The address is not valid.")
    if time.time() >= _integer(values[-1]):
        raise HttpError(403, "The address has expired.")
    return values[:-1]


def _integer(text: str) -> int:
    if not text.isdecimal() or len(text) >= 18:
        raise HttpError(403, "The address is not valid.")
    return int(text)


def _download(call: Call, found: Repository, oid: str, size: int) -> dict[str, object]:
    described: dict[str, object] = {"oid": oid, "size": size}
    here = any((r.kind, r.name.key) == (found.kind, found.name.key) for r in call.hub.metadata.holding(oid))
    if not here or call.hub.content.size(oid) != size:
        return described | {"error": {"code": 404, "message": f"{found.name} has no such file."}}
    return described | {"authenticated": True, "actions": {"download": {"href": _signed(call, oid, _DOWNLOAD)}}}


def _upload(call: Call, oid: str, size: int, in_parts: bool) -> dict[str, object]:
    described: dict[str, object] = {"oid": oid, "size": size}
    if size > MAX_FILE:
        return described | {"error": {"code": 422, "message": f"A file may have {MAX_FILE} bytes."}}
    if call.hub.content.size(oid) == size and may_refer(call, oid):
        call.hub.content.touch(oid)
        return described
    assert call.name is not None
    holders = ("holders", ",".join(sorted(call.holders(call.name.namespace))))
    actions: dict[str, object] = {"verify": {"href": f"{call.page}.git/info/lfs/verify"}}
    if not in_parts or size <= PART:
        actions["upload"] = {"href": _signed(call, oid, _WHOLE, ("size", size), holders)}
        return described | {"actions": actions}
    part = max(PART, -(-size // _MAX_PARTS))
    header = {"chunk_size": str(part)}
    for number, begin in enumerate(range(0, size, part), 1):
        length = min(part, size - begin)
        header[f"{number:05}"] = _signed(call, f"{oid}/{number}", _PART, ("size", length))
    href = _signed(call, oid, _JOINED, ("size", size), holders)
    return described | {"actions": {**actions, "upload": {"href": href, "header": header}}}


async def handle(hub: Hub, request: Request, parts: tuple[str, ...]) -> Response:
    """A request below `/lfs`, to an address that was signed."""
    match request.method, *parts:
        case "PUT", oid:
            return await put(hub, request, oid)
        case "PUT", oid, number:
            return await _put_part(hub, request, oid, number)
        case "POST", oid:
            return await _join(hub, request, oid)
        case "GET" | "HEAD", oid:
            _fields(hub, request, oid, _DOWNLOAD)
            source = await run_in_threadpool(hub.content.open, oid)
            wanted = parse_range(request.headers.get("range"), source.size)
            return stream(source, wanted, {"ETag": f'"{oid}"'}, request.method == "HEAD")
    raise HttpError(404, "There is no such address.")


async def put(hub: Hub, request: Request, oid: str) -> Response:
    """`PUT /lfs/{sha256}`: the bytes. They are visible only if they have this hash."""
    size, holders = _fields(hub, request, oid, _WHOLE, "size", "holders")
    with hub.content.receive() as incoming:
        count, sha256 = await _receive(request, incoming, int(size))

        def keep() -> None:
            if count != int(size) or sha256 != oid:
                raise HttpError(400, f"What came is not {oid} of {size} bytes; send it again.")
            if not hub.content.touch(oid):
                incoming.keep(oid)
            hub.index.hold_content(oid, holders.split(","))

        await run_in_threadpool(keep)
    return Response(None, 200, {"ETag": f'"{oid}"'})


async def _put_part(hub: Hub, request: Request, oid: str, number: str) -> Response:
    """`PUT /lfs/{sha256}/{number}`: a part of a file."""
    (size,) = _fields(hub, request, f"{oid}/{number}", _PART, "size")
    with hub.content.receive() as incoming:
        count, sha256 = await _receive(request, incoming, int(size))
        if count != int(size):
            raise HttpError(400, f"Part {number} has {size} bytes, not {count}; send it again.")
        await run_in_threadpool(incoming.keep, sha256)
    signature = hub.signer.signature(_KEPT, oid, int(number), sha256)
    return Response(None, 200, {"ETag": f'"{sha256}.{signature}"'})


async def _receive(request: Request, incoming: Incoming, limit: int) -> tuple[int, str]:
    """Take a body in. Returns how many bytes there were, and their SHA-256."""
    hasher = hashlib.sha256()
    count = 0

    def take(data: bytes) -> None:
        hasher.update(data)
        incoming.write(memoryview(data))

    async for piece in pieces(request, limit):
        count += len(piece)
        await run_in_threadpool(take, piece)
    return count, hasher.hexdigest()


async def _join(hub: Hub, request: Request, oid: str) -> Response:
    """`POST /lfs/{sha256}`: the parts are all there."""
    size, holders = _fields(hub, request, oid, _JOINED, "size", "holders")
    body = await json_body(request)
    parts = body.get("parts")
    if not isinstance(parts, list) or not 0 < len(parts) <= _MAX_PARTS:
        raise HttpError(422, f"parts has to be a list of 1 to {_MAX_PARTS}.")
    kept = [_kept(hub, oid, number, item) for number, item in enumerate(parts, 1)]
    await run_in_threadpool(_put_together, hub, oid, int(size), kept, holders.split(","))
    return json_response({"success": True}, headers=_MEDIA)


def _kept(hub: Hub, oid: str, number: int, item: object) -> str:
    """The SHA-256 of a part, as its PUT answered it."""
    etag = item.get("etag") if isinstance(item, dict) else None
    if not isinstance(etag, str) or not isinstance(item, dict) or item.get("partNumber") != number:
        raise HttpError(422, "Each part has to have its number, in order, and its etag.")
    sha256, _, signature = etag.strip('"').partition(".")
    if not hub.signer.is_signature(signature, _KEPT, oid, number, sha256):
        raise HttpError(422, f"The etag of part {number} is not the one that its upload answered.")
    return sha256


def _put_together(hub: Hub, oid: str, size: int, parts: Sequence[str], holders: Sequence[str]) -> None:
    hasher = hashlib.sha256()
    with hub.content.receive() as incoming:
        count = 0
        for number, sha256 in enumerate(parts, 1):
            if hub.content.size(sha256) is None:
                raise HttpError(409, f"Part {number} was removed meanwhile; send it again.")
            source = hub.content.open(sha256)
            count += source.size
            if count > size:
                break
            pump(source, [hasher.update, incoming.write], lambda _: None)
        if count != size or hasher.hexdigest() != oid:
            raise HttpError(400, f"The parts are not {oid} of {size} bytes; send them again.")
        if not hub.content.touch(oid):
            incoming.keep(oid)
        hub.index.hold_content(oid, holders)
    # If a part happens to be a file of somebody else's that is not committed yet, that has to be sent again.

    def remove(part: str) -> bool:
        hub.content.remove(part)
        return True

    hub.metadata.sweep(set(parts) - {oid}, remove)


async def verify(call: Call) -> Response:
    """`POST /{id}.git/info/lfs/verify`: whether an upload has arrived."""
    body = await json_body(call.request)
    oid, size = body.get("oid"), body.get("size")

    def check() -> None:
        call.proposable()
        if not isinstance(oid, str) or _SHA256.fullmatch(oid) is None:
            raise HttpError(422, "The object has to be named by its SHA-256.")
        if call.hub.content.size(oid) != size or not may_refer(call, oid):
            raise HttpError(404, f"{oid} was not uploaded.")

    await run_in_threadpool(check)
    return json_response({}, headers=_MEDIA)
