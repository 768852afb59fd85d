"""Copies that are made without sending anything: of a repository, and of files from one repository to another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from surgery.hub.interfaces import Repository
from surgery.hub.naming import MAIN
from surgery.hub.server.access import parsed_gate
from surgery.hub.server.checking import check_room
from surgery.hub.server.hub import Call
from surgery.hub.server.repos import make, parsed_target
from surgery.hub.server.web import HttpError, json_body, json_response, text_of

_MAX_FILES = 10_000


async def duplicate(call: Call) -> Response:
    """`POST /api/models/{id}/duplicate`: the newest files of `main` under another name, without the history.

    The copy is private, or gated, where the source is.
    """
    body = await json_body(call.request)

    def copy() -> dict[str, object]:
        source = call.revision(MAIN, files=True)
        target = {**body, "name": text_of(body.get("repository"), "repository"), "type": source.repository.kind}
        private, gate = source.repository.private, _gate(call, source.repository, body)
        _, wanted = parsed_target(call, target)
        check_room(call.hub, wanted.namespace, {entry.sha256: entry.size for entry in source.files})
        described, name = make(call, target, private)
        call.note(action="duplicate", target=str(name))
        head = call.hub.registry.head(name, MAIN, call.kind)
        assert head is not None
        # The gate stands before there is anything behind it.
        if gate is not None:
            call.hub.community.set_gate(head.repository, gate)
        message = f"Duplicate of {source.repository.name} at {source.commit.id}"
        call.hub.registry.commit(
            name, MAIN, head.commit.id, source.files, message, source.commit.facts, source.repository.kind
        )
        return described

    return json_response(await run_in_threadpool(copy))


def _gate(call: Call, source: Repository, body: Mapping[str, Any]) -> str | None:
    """The gate of a copy: that of the source, unless somebody who may write to the source says otherwise."""
    found = call.hub.community.gate(source)
    asked = parsed_gate(body.get("gated"))
    free = found is None or call.user().may_write(source.name)
    return asked if free and "gated" in body else found


async def copy_files(call: Call) -> Response:
    """`POST /api/models/{id}/lfs-files/duplicate`, before a commit to another repository names files of this one.

    Content is kept once for all repositories: it is enough that this person may read it here and write there.
    """
    body = await json_body(call.request)
    files, target = body.get("files"), body.get("target")
    if not isinstance(files, list) or len(files) > _MAX_FILES or not isinstance(target, dict):
        raise HttpError(400, f"files has to be a list of at most {_MAX_FILES}, and target a repository.")

    def check() -> list[dict[str, object]]:
        found = call.opened()
        kind, name = parsed_target(call, target)
        call.at(kind, str(name), ()).writable()
        failed: list[dict[str, object]] = []
        for item in files:
            sha256 = text_of(item.get("sha256") if isinstance(item, dict) else None, "sha256")
            here = any((r.kind, r.name.key) == (found.kind, found.name.key) for r in call.hub.metadata.holding(sha256))
            if not here:
                failed.append({"sha256": sha256, "error": f"{found.name} has no such file."})
        return failed

    return json_response({"failed": await run_in_threadpool(check)})
