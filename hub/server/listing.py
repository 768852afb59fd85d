"""`GET /api/models`: what the Hub's client asks of a list, and what only this server can be asked.

search, author, filter (repeated, or with commas; all have to hold), pipeline_tag, library, gated, num_parameters,
sort, direction, limit, cursor, full, cardData, config, expand (repeated)      as on the Hub
kind, base, family, rank, target (repeated, or with commas)                    of this server
fits=ID[@revision]                                                             likewise: adapters that fit a base
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from urllib.parse import parse_qs

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from surgery.errors import OptionError, SurgeryError
from surgery.hub.asking import base_of_tag, parameter_span, rank_span
from surgery.hub.fits import YES, Fit, fit_of
from surgery.hub.index import Entry, Index, ModelQuery, Reader, made_from
from surgery.hub.interfaces import Commit
from surgery.hub.naming import MAIN, parse_repository, parse_target
from surgery.hub.server import describing
from surgery.hub.server.files import expanded, next_page
from surgery.hub.server.hub import Call
from surgery.hub.server.web import HttpError, json_response, page
from surgery.hub.store import Registry, Revision

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
            shapes = base.commit.facts.get("shapes")
            if not isinstance(shapes, list):
                raise HttpError(400, f"Nothing is known of the shapes of {base.repository.name}.")
            asked = replace(asked, shapes=[shape for shape in shapes if isinstance(shape, str)])
        if _one(query, "gated").lower() in ("1", "true"):
            return [], False, size  # there is none here
        found = index.select(replace(asked, begin=begin, limit=size + 1), reader)
        entries = list(found[:size])
        if fitted:
            entries = [entry for entry in entries if _fits(call.hub.registry, entry, base)]
        return [described(call, entry, query) for entry in entries], len(found) > size, size

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
    if expand:
        return expanded(call, entry.repository, found, expand)
    if _one(query, "config").lower() not in ("1", "true"):
        found.pop("config", None)
    return found


def head_of(registry: Registry, entry: Entry) -> Revision | None:
    """The newest commit of an entry, with its files."""
    if entry.commit is None or entry.tree is None:
        return None
    commit = Commit(entry.commit, None, entry.tree, "", entry.repository.updated, entry.facts)
    return Revision(entry.repository, commit, tuple(registry.metadata.files(entry.tree)))


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


def _fits(registry: Registry, entry: Entry, base: Revision) -> bool:
    adapter = head_of(registry, entry)
    return adapter is not None and remembered_fit(registry, adapter, base).fits == YES


def remembered_fit(registry: Registry, adapter: Revision, base: Revision) -> Fit:
    """`fit_of`, once for each pair of commits."""
    found = _fit(registry, _Pair(adapter, base))
    return replace(found, adapter=str(adapter.repository.name), base=str(base.repository.name))


class _Pair:
    """Two commits, which are the same as two others with the same trees."""

    def __init__(self, adapter: Revision, base: Revision) -> None:
        self.adapter, self.base = adapter, base
        self._key = (adapter.commit.tree, base.commit.tree, str(adapter.repository.name), str(base.repository.name))

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Pair) and other._key == self._key


@lru_cache(maxsize=2048)
def _fit(registry: Registry, pair: _Pair) -> Fit:
    return fit_of(registry, pair.adapter, pair.base)
