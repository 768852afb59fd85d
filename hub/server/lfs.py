"""Git LFS, for clients without Xet: one PUT for each file, to an address that is signed and expires.

Source: the git-lfs specification (`docs/api/batch.md`, `basic-transfers.md`), version 3.7.
"""

from __future__ import annotations

import hashlib
import re
import time
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from surgery.hub.server.commits import may_refer
from surgery.hub.server.hub import Call, Hub
from surgery.hub.server.signing import ADDRESS_LIFE
from surgery.hub.server.web import HttpError, json_body, json_response, pieces

PREFIX = "/lfs"
_PURPOSE = "lfs"
_MEDIA = {"Content-Type": "application/vnd.git-lfs+json"}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_OBJECTS = 1000
MAX_FILE = 1 << 42


async def batch(call: Call) -> Response:
    """`POST /{id}.git/info/lfs/objects/batch`: where to put each file, if it is not here already."""
    body = await json_body(call.request)
    objects = body.get("objects")
    if body.get("operation") != "upload" or not isinstance(objects, list) or len(objects) > _MAX_OBJECTS:
        raise HttpError(422, f"Only uploads of at most {_MAX_OBJECTS} objects can be asked for.")
    if body.get("hash_algo", "sha256") != "sha256":
        raise HttpError(409, "Objects have to be named by their SHA-256.")

    def answer() -> list[dict[str, object]]:
        call.writable()
        return [_action(call, item) for item in objects]

    return json_response({"transfer": "basic", "objects": await run_in_threadpool(answer)}, headers=_MEDIA)


def _action(call: Call, item: object) -> dict[str, object]:
    oid, size = (item.get("oid"), item.get("size")) if isinstance(item, dict) else (None, None)
    if not isinstance(oid, str) or _SHA256.fullmatch(oid) is None or not isinstance(size, int) or size < 0:
        raise HttpError(422, "Each object has to have its SHA-256 and its size.")
    described: dict[str, object] = {"oid": oid, "size": size}
    if size > MAX_FILE:
        return described | {"error": {"code": 422, "message": f"A file may have {MAX_FILE} bytes."}}
    if call.hub.content.size(oid) == size and may_refer(call, oid):
        call.hub.content.touch(oid)
        return described
    assert call.name is not None
    expires = int(time.time()) + ADDRESS_LIFE
    holders = ",".join(sorted(call.holders(call.name.namespace)))
    signature = call.hub.signer.signature(_PURPOSE, oid, size, holders, expires)
    kind = "" if call.kind == "model" else f"{call.kind}s/"
    href = f"{call.base}{PREFIX}/{oid}?size={size}&holders={quote(holders)}&expires={expires}&signature={signature}"
    verify = f"{call.base}/{kind}{call.name}.git/info/lfs/verify"
    return described | {"actions": {"upload": {"href": href}, "verify": {"href": verify}}}


async def put(hub: Hub, request: Request, oid: str) -> Response:
    """`PUT /lfs/{sha256}`: the bytes. They are visible only if they have this hash."""
    given = request.query_params
    size, expires = given.get("size", ""), given.get("expires", "")
    if not all(number.isdecimal() and len(number) < 18 for number in (size, expires)):
        raise HttpError(403, "The address is not valid.")
    holders = given.get("holders", "")
    parts = (oid, int(size), holders, int(expires))
    if not hub.signer.is_signature(given.get("signature", ""), _PURPOSE, *parts):
        raise HttpError(403, "The address is not valid.")
    if time.time() >= int(expires):
        raise HttpError(403, "The address has expired.")
    hasher = hashlib.sha256()
    count = 0
    with hub.content.receive() as incoming:
        async for part in pieces(request, int(size)):
            count += len(part)

            def take(data: bytes = part) -> None:
                hasher.update(data)
                incoming.write(memoryview(data))

            await run_in_threadpool(take)

        def keep() -> None:
            if count != int(size) or hasher.hexdigest() != oid:
                raise HttpError(400, f"What came is not {oid} of {size} bytes; send it again.")
            if not hub.content.touch(oid):
                incoming.keep(oid)
            hub.index.hold_content(oid, holders.split(","))

        await run_in_threadpool(keep)
    return Response(None, 200, {"ETag": f'"{oid}"'})


async def verify(call: Call) -> Response:
    """`POST /{id}.git/info/lfs/verify`: whether an upload has arrived."""
    body = await json_body(call.request)
    oid, size = body.get("oid"), body.get("size")

    def check() -> None:
        call.writable()
        if not isinstance(oid, str) or _SHA256.fullmatch(oid) is None:
            raise HttpError(422, "The object has to be named by its SHA-256.")
        if call.hub.content.size(oid) != size or not may_refer(call, oid):
            raise HttpError(404, f"{oid} was not uploaded.")

    await run_in_threadpool(check)
    return json_response({}, headers=_MEDIA)
