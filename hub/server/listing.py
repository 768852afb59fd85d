"""`GET /api/models`: what the Hub's client asks of a list, and what only this server can be asked.

search, author, filter (repeated, or with commas; all have to hold), pipeline_tag, library, gated, num_parameters,
sort, direction, limit, cursor, full, cardData, config, expand (repeated)      as on the Hub
kind, base, family, rank, target (repeated, or with commas)                    of this server
fits=ID[@revision]                                                             likewise: adapters that fit a base
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from urllib.parse import parse_qs

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from surgery.errors import InputError, OptionError, SurgeryError
from surgery.hub.asking import base_of_tag, parameter_span, rank_span
from surgery.hub.fits import does_fit, head_of, shapes_of
from surgery.hub.index import Entry, Index, ModelQuery, Reader, made_from
from surgery.hub.naming import MAIN, parse_repository, parse_target
from surgery.hub.server import describing
from surgery.hub.server.files import expanded, next_page
from surgery.hub.server.hub import Call
from surgery.hub.server.web import HttpError, json_response, page
from surgery.hub.store import Revision

Query = Mapping[str, Sequence[str]]
# Tells a client that the questions of this server's own were understood.
OURS = {"X-Surgery-Hub": "1"}
_SORTS = {
    "lastModified": "updated", "createdAt": "created", "num_parameters": "parameters", "id": "name", "size": "size",
}  # fmt: skip
_NEEDS_FILES = {"siblings", "cardData", "usedStorage"}
# Each adapter of such a page is held against the base; further ones are on further pages.
_MOST_FITTED = 50


async def listing(call: Call) -> Response:
    """All that may be seen and that fits the conditions, page by page."""
    query = parse_qs(call.request.url.query)
    begin, limit = page(query)

    def find() -> tuple[list[dict[str, object]], bool, int]:
        index, reader = call.hub.metadata, call.reader
        try:
            asked = parsed(query, index, reader, call.kind)
        except OptionError as error:
            raise HttpError(400, error.message) from None
        fitted = _one(query, "fits")
        size = min(limit, _MOST_FITTED) if fitted else limit
        if fitted:
            base = base_revision(call, fitted)
            try:
                asked = replace(asked, shapes=shapes_of(base))
            except InputError as error:
                raise HttpError(400, error.message) from None
        found = index.select(replace(asked, begin=begin, limit=size + 1), reader)
        entries = list(found[:size])
        if fitted:
            entries = [entry for entry in entries if does_fit(call.hub.registry, entry, base)]
        # Few are: they are picked out of a page, which may then be short.
        gated = {"1": True, "true": True, "0": False, "false": False}.get(_one(query, "gated").lower())
        if gated is not None:
            entries = [entry for entry in entries if (call.hub.community.gate(entry.repository) is not None) == gated]
        return [described(call, entry, query) for entry in entries], len(found) > size, size

    async with call.hub.parsing if _one(query, "fits") else nullcontext():
        items, more, size = await run_in_threadpool(find)
    return json_response(items, headers=OURS | (next_page(call, begin + size) if more else {}))


def parsed(query: Query, index: Index, reader: Reader, kind: str = "model") -> ModelQuery:
    """The conditions of a request. Raises `OptionError` for what cannot be understood."""
    tags: list[str] = []
    made = []
    for tag in [*_parts(query, "filter"), *query.get("pipeline_tag", ()), *query.get("library", ())]:
        if (condition := base_of_tag(index, tag, reader)) is not None:
            made.append(condition)
        else:
            tags.append(tag)
    made += [made_from(index, parse_repository(name), reader) for name in query.get("base", ())]
    asked = _one(query, "kind")
    if asked not in ("", "adapter", "dense", "moe"):
        raise OptionError(f"kind is {asked[:100]!r}, expected adapter, dense or moe.")
    order = _one(query, "sort") or "lastModified"
    ascending = {"1": True, "-1": False}.get(_one(query, "direction"))
    found = ModelQuery(
        repositories=kind,
        search=tuple(_one(query, "search").split())[:16],
        author=_one(query, "author") or None,
        tags=tuple(tags),
        kind=asked or None,
        family=_one(query, "family") or None,
        targets=tuple(_parts(query, "target")),
        made_from=tuple(made),
        sort=_SORTS.get(order, "updated"),
        ascending=ascending,
    )
    if text := _one(query, "rank"):
        found = replace(found, ranks=rank_span(text))
    if text := _one(query, "num_parameters"):
        found = replace(found, parameters=parameter_span(text))
    if len(found.tags) + len(found.made_from) + len(found.targets) > 64:
        raise OptionError("A list may have 64 conditions.")
    return found


def _one(query: Query, name: str) -> str:
    return query[name][-1].strip() if query.get(name) else ""


def _parts(query: Query, name: str) -> list[str]:
    return [part.strip() for value in query.get(name, ()) for part in value.split(",") if part.strip()]


# What is said of each -------------------------------------------------------------------------------------------------


def described(call: Call, entry: Entry, query: Query) -> dict[str, object]:
    """A repository in a list; what costs more than the index has is looked up only where it is asked for."""
    expand = list(query.get("expand", ()))
    full = any(_one(query, name).lower() in ("1", "true") for name in ("full", "cardData"))
    if full or _NEEDS_FILES & set(expand):
        found = describing.repository(entry.repository, head_of(call.hub.registry, entry), call.hub.content, False)
    else:
        found = describing.entry(entry)
    found["gated"] = call.hub.community.gate(entry.repository) or False
    if expand:
        return expanded(call, entry.repository, found, expand)
    if _one(query, "config").lower() not in ("1", "true"):
        found.pop("config", None)
    return found


def base_revision(call: Call, text: str) -> Revision:
    """The base that a request names, `ID[@revision]`, if this person may read it."""
    try:
        name, revision = parse_target(text)
    except SurgeryError as error:
        raise HttpError(400, error.message) from None
    entry = call.hub.metadata.entry(name, call.reader)
    if entry is None:
        raise call.no_repository()
    return call.at("model", entry.name, ()).revision(revision or MAIN)
