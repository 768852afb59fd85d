"""The large files of a repository's whole history: listing them, and taking them out of it for good."""

from __future__ import annotations

import re
from urllib.parse import parse_qs

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from surgery.hub.facts import stored_facts
from surgery.hub.interfaces import Repository
from surgery.hub.server.describing import iso
from surgery.hub.server.files import next_page
from surgery.hub.server.hub import Call
from surgery.hub.server.web import HttpError, json_body, json_response, page

_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_FILES = 1000


async def listed(call: Call) -> Response:
    """`GET /api/models/{id}/lfs-files`: each content once, as the first commit that had it called it."""
    begin, limit = page(parse_qs(call.request.url.query))
    found = await run_in_threadpool(_found, call)
    more = begin + limit < len(found)
    return json_response(found[begin : begin + limit], headers=next_page(call, begin + limit) if more else None)


def _found(call: Call) -> list[dict[str, object]]:
    here = call.writable()
    listed: dict[str, dict[str, object]] = {}
    seen: set[str] = set()
    for ref, target in call.hub.metadata.refs(here.name, here.kind).items():
        commits = list(call.hub.metadata.history(here.name, target, here.kind))
        for commit in reversed(commits):
            if commit.id in seen:
                continue
            seen.add(commit.id)
            for entry in call.hub.metadata.files(commit.tree):
                if entry.lfs and entry.sha256 not in listed:
                    listed[entry.sha256] = {
                        "fileOid": entry.sha256,
                        "oid": entry.sha256,
                        "filename": entry.path,
                        "size": entry.size,
                        "pushedAt": iso(commit.time),
                        "ref": ref,
                    }
    return list(listed.values())


async def remove(call: Call) -> Response:
    """`POST /api/models/{id}/lfs-files/batch`: out of every commit, which changes the ids of those that had them."""
    body = await json_body(call.request)
    deletions = body.get("deletions")
    if not isinstance(deletions, dict) or not isinstance(shas := deletions.get("sha"), list):
        raise HttpError(400, "deletions has to have a list of SHA-256 sums.")
    if len(shas) > _MAX_FILES or not all(isinstance(sha, str) and _SHA256.fullmatch(sha) for sha in shas):
        raise HttpError(400, f"deletions may have {_MAX_FILES} SHA-256 sums, and nothing else.")
    if deletions.get("rewriteHistory") is not True:
        raise HttpError(400, "A commit never loses its files here; pass rewrite_history=True.")

    def drop() -> int:
        found: Repository = call.writable()
        call.note(action="lfs.delete", count=len(shas), first=shas[0] if shas else "")
        return call.hub.registry.drop(
            found.name,
            found.kind,
            shas,
            lambda files: stored_facts(call.hub.content, call.hub.metadata, files, str(found.name), found.kind),
        )

    return json_response({"freed": await run_in_threadpool(drop)})
