"""Lists: all models, a namespace's, all datasets; with a search and filters, as a plain form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from urllib.parse import parse_qs

from starlette.responses import Response

from surgery.errors import OptionError
from surgery.figures import number, size
from surgery.hub.index import Entry, ModelQuery
from surgery.hub.interfaces import Repository
from surgery.hub.naming import why_not_a_repository
from surgery.hub.server.listing import parsed
from surgery.hub.server.pages import addresses
from surgery.hub.server.pages.render import html
from surgery.hub.server.pages.repository import KINDS, parents
from surgery.hub.server.pages.session import Visit
from surgery.hub.server.web import HttpError

PAGE = 30
_MOST_PAGES = 10_000
_LONGEST = 200
# Fields of the form, in the order in which they go into an address.
FIELDS = ("search", "kind", "base", "family", "rank", "library", "author", "filter", "sort")
SORTS = {
    "lastModified": "Last updated",
    "createdAt": "Newest",
    "id": "Name",
    "num_parameters": "Most parameters",
    "size": "Largest",
}


@dataclass(frozen=True)
class Line:
    """A repository in a list."""

    entry: Entry
    kind: str | None
    base: str | None
    details: tuple[str, ...]


def everything(visit: Visit, kind: str) -> Response:
    """`/` and `/datasets`."""
    return _list(visit, kind, None)


def namespace(visit: Visit, kind: str, name: str) -> Response:
    """`/{namespace}`: what there is of it, as far as the visitor may see it."""
    found = visit.call.hub.accounts.namespace(name) if why_not_a_repository(name) is None else None
    shown = found.name if found is not None else name
    if found is None and not _has_any(visit, name):
        raise visit.call.no_repository()
    return _list(visit, kind, shown)


def _has_any(visit: Visit, name: str) -> bool:
    """Whether there is something in a namespace that no user and no organisation stands behind."""
    if why_not_a_repository(name) is not None:
        return False
    return any(
        visit.call.hub.metadata.count(ModelQuery(repositories=kind, author=name), visit.call.reader)
        for kind in ("model", "dataset")
    )


def _list(visit: Visit, kind: str, author: str | None) -> Response:
    given = parse_qs(visit.call.request.url.query)
    fields = {name: given.get(name, [""])[-1].strip()[:_LONGEST] for name in FIELDS}
    if author is not None:
        fields["author"] = author
    page = _page(given.get("page", ["1"])[-1])
    index, reader = visit.call.hub.metadata, visit.call.reader
    count, sentence = 0, ""
    shown: Sequence[Entry] = ()
    try:
        query = parsed({name: [value] for name, value in fields.items() if value}, index, reader, kind)
    except OptionError as error:
        sentence = error.message
    else:
        count = index.count(query, reader)
        shown = index.select(replace(query, begin=(page - 1) * PAGE, limit=PAGE), reader)
    top = "" if kind == "model" else "/datasets"
    path = f"{top}{addresses.namespace(author)}" if author is not None else top or "/"
    kept = {name: value for name, value in fields.items() if name != "author" or author is None}

    def at(number: int) -> str:
        return addresses.with_query(path, {**kept, "page": number if number > 1 else None})

    values: dict[str, object] = {
        "visit": visit,
        "kind": kind,
        "author": author,
        "path": path,
        "fields": fields,
        "filtered": any(value for name, value in kept.items() if name != "sort"),
        "sentence": sentence,
        "sorts": SORTS,
        "kinds": KINDS,
        "lines": _lines(visit, shown),
        "count": count,
        "page": page,
        "preceding": at(page - 1) if page > 1 else None,
        "following": at(page + 1) if page * PAGE < count else None,
        "datasets": _datasets_of(visit, author) if author is not None and kind == "model" and page == 1 else [],
    }
    return html("list.html", values)


def _datasets_of(visit: Visit, author: str) -> list[Line]:
    query = ModelQuery(repositories="dataset", author=author, limit=PAGE)
    return _lines(visit, visit.call.hub.metadata.select(query, visit.call.reader))


def _page(text: str) -> int:
    if not text.isdecimal() or len(text) > 6 or not 0 < int(text) <= _MOST_PAGES:
        raise HttpError(400, "page has to be a number.")
    return int(text)


def _lines(visit: Visit, entries: Sequence[Entry]) -> list[Line]:
    models = [entry.repository.name for entry in entries if entry.repository.kind == "model"]
    known = parents(visit, models) if models else {}
    return [_line(entry, known) for entry in entries]


def _line(entry: Entry, known: Mapping[tuple[str, str], Repository]) -> Line:
    facts = entry.facts
    ranks, base, parameters = facts.get("ranks"), facts.get("base"), facts.get("parameters")
    if isinstance(base, str) and (found := known.get((entry.repository.name.key, base))) is not None:
        base = str(found.name)
    rank = None
    if isinstance(ranks, list) and ranks:
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"rank {ranks[0]} to {ranks[-1]}"
    details = (
        rank,
        f"{number(parameters)} parameters" if isinstance(parameters, int) else None,
        facts.get("dtype"),
        facts.get("family"),
        size(entry.size) if entry.size else None,
    )
    shown = tuple(str(item) for item in details if item)
    return Line(entry, KINDS.get(str(facts.get("kind"))), base if isinstance(base, str) else None, shown)
