"""What only this server can be asked of a model: its family, and whether an adapter fits a base."""

from __future__ import annotations

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from surgery.hub.fits import remembered_fit
from surgery.hub.lineage import lineage as family_of
from surgery.hub.naming import MAIN
from surgery.hub.server.hub import Call
from surgery.hub.server.listing import OURS, base_revision
from surgery.hub.server.web import HttpError, json_response


async def lineage(call: Call) -> Response:
    """`GET /api/models/{id}/lineage`: what it was made from and what was made from it, as far as one may look."""

    def find() -> dict[str, object]:
        found = call.repository()
        tree = family_of(call.hub.metadata, found.name, call.reader) if found.kind == "model" else None
        if tree is None:
            raise HttpError(404, "Only models have a lineage.")
        return tree.as_dict()

    return json_response(await run_in_threadpool(find), headers=OURS)


async def fits(call: Call) -> Response:
    """`GET /api/models/{id}/fits?base=ID[@revision][&revision=...]`: whether an adapter fits a base."""
    base = call.request.query_params.get("base")
    if not base:
        raise HttpError(400, "fits needs ?base=ID, the base that the adapter is held against.")

    def find() -> dict[str, object]:
        adapter = call.revision(call.request.query_params.get("revision") or MAIN)
        return remembered_fit(call.hub.registry, adapter, base_revision(call, base)).as_dict()

    async with call.hub.parsing:
        found = await run_in_threadpool(find)
    return json_response(found, headers=OURS)
