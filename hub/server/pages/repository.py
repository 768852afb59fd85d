"""A repository's own page: the card, what is known of the files, how to load them."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from starlette.responses import Response

from surgery.card import by_a_person
from surgery.errors import SurgeryError
from surgery.hub.fits import Fit, remembered_fit
from surgery.hub.index import BY_HASH, Edge
from surgery.hub.interfaces import BRANCHES, TAGS, Repository
from surgery.hub.naming import MAIN, RepositoryName, why_not_a_repository
from surgery.hub.server import describing
from surgery.hub.server.front_matter import CARD, card_of
from surgery.hub.server.pages import addresses, markdown, snippets
from surgery.hub.server.pages.render import html
from surgery.hub.server.pages.session import Visit
from surgery.hub.store import Revision
from surgery.source import read_bytes

KINDS = {"adapter": "Adapter", "dense": "Dense model", "moe": "Mixture of experts"}
# A card is UTF-8: four bytes for a character at most.
_MAX_CARD = 4 * markdown.LONGEST
_MOST_TAGS = 40
_MOST_INPUTS = 20
# One card at a time: a hostile one takes a second, and the other threads of the process wait for each other anyway.
_rendering = threading.Lock()


Value = tuple[str, str | None]


@dataclass(frozen=True)
class Fact:
    """A line of the table of facts. Each value is a text, and where it leads, if anywhere."""

    title: str
    values: tuple[Value, ...]


def common(visit: Visit, found: Repository, revision: str, tab: str) -> dict[str, object]:
    """What every page of a repository shows."""
    refs = visit.call.hub.metadata.refs(found.name, found.kind)
    head = visit.call.hub.registry.head(found.name, MAIN, found.kind)
    kind = str(head.commit.facts.get("kind")) if head is not None else ""
    return {
        "visit": visit,
        "repository": found,
        "kind": KINDS.get(kind),
        "revision": revision,
        "tab": tab,
        "branches": [ref.removeprefix(BRANCHES) for ref in refs if ref.startswith(BRANCHES)],
        "tags": [ref.removeprefix(TAGS) for ref in refs if ref.startswith(TAGS)],
    }


def card(visit: Visit) -> Response:
    """`/{id}`."""
    call = visit.call
    found = call.repository()
    head = call.hub.registry.head(found.name, MAIN, found.kind)
    facts = head.commit.facts if head is not None else {}
    front = card_of(call.hub.content, head) if head is not None else {}
    base, rows = facts.get("base"), _facts(visit, found, facts)
    values = common(visit, found, MAIN, "card") | {
        "head": head,
        "card": _card(visit, head) if head is not None else None,
        "facts": rows,
        "fit": _fit(visit, head) if head is not None and facts.get("kind") == "adapter" else None,
        "unread": facts.get("unread"),
        "labels": describing.tags(facts, front)[:_MOST_TAGS],
        "snippets": snippets.snippets(found, facts, call.base),
        # What the libraries load goes by the name on record, whatever it is called now.
        "base_is_elsewhere": isinstance(base, str) and readable(visit, base) is None,
    }
    return html("card.html", values)


def _card(visit: Visit, head: Revision) -> str | None:
    """The card as HTML; None where there is none that can be read."""
    found, content = head.repository, visit.call.hub.content
    entry = next((entry for entry in head.files if entry.path == CARD), None)
    if entry is None:
        return None
    links = markdown.Links(
        page=lambda path: addresses.blob(found, MAIN, path),
        file=lambda path: addresses.resolve(found, MAIN, path),
    )
    try:
        source = content.open(entry.sha256)
        text = read_bytes(source, 0, min(source.size, _MAX_CARD)).decode("utf-8", "replace")
    except SurgeryError:  # lost from the store: the files page says so when it is opened
        return None
    with _rendering:
        # The tool's own section says what the page shows already.
        return markdown.render(by_a_person(text.removeprefix("\ufeff")), links)


def readable(visit: Visit, name: str, kind: str = "model") -> Repository | None:
    """The repository of this name on this server, if the visitor may read it."""
    if why_not_a_repository(name) is not None:
        return None
    call = visit.call.at(kind, name, ())
    assert call.name is not None
    found = call.hub.metadata.find(call.name, kind)
    return found if found is not None and call.may_read(found) else None


def parents(visit: Visit, names: Collection[RepositoryName]) -> dict[tuple[str, str], Repository]:
    """What models were made from, by key and by the name on record: found by hash, too, and under later names."""
    edges = visit.call.hub.metadata.edges([name.key for name in names], visit.call.reader, up=True)
    ordered = sorted(edges, key=_rank)
    found: dict[tuple[str, str], Repository] = {}
    for edge in ordered:
        found.setdefault((edge.child.repository.name.key, edge.record.source), edge.parent.repository)
    return found


def _rank(edge: Edge) -> tuple[bool, bool, str]:
    """Of several that may be meant, first the one of that name, then those with the very tensors on record."""
    key = edge.parent.repository.name.key
    return key != edge.record.source.lower(), edge.by != BY_HASH, key


def _fit(visit: Visit, head: Revision) -> Fit | None:
    """Whether an adapter fits the base it names; None where that is not here, or the visitor may not read it."""
    named = head.commit.facts.get("base")
    if not isinstance(named, str):
        return None
    name, registry = head.repository.name, visit.call.hub.registry
    base = parents(visit, [name]).get((name.key, named)) or readable(visit, named)
    newest = registry.head(base.name, MAIN) if base is not None else None
    return remembered_fit(registry, head, newest) if newest is not None else None


def _facts(visit: Visit, repository: Repository, facts: Mapping[str, object]) -> list[Fact]:
    rows: list[Fact] = []
    known = parents(visit, [repository.name]) if repository.kind == "model" else {}

    def named(source: str) -> Value:
        found = known.get((repository.name.key, source)) or readable(visit, source)
        return (str(found.name), addresses.repository(found)) if found is not None else (source, None)

    def add(title: str, *values: object) -> None:
        shown = tuple((str(value), None) for value in values if value is not None and value != "")
        if shown:
            rows.append(Fact(title, shown))

    add("Kind", KINDS.get(str(facts.get("kind"))))
    if isinstance(base := facts.get("base"), str):
        rows.append(Fact("Base", (named(base),)))
    add("Base revision", facts.get("base_revision"))
    add("Method", facts.get("method"))
    add("Task", facts.get("task"))
    add("Family", facts.get("family"))
    add("Architecture", facts.get("architecture"))
    add("Experts", facts.get("experts"))
    if isinstance(ranks := facts.get("ranks"), list) and ranks:
        add("Rank", ranks[0] if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}")
    if isinstance(targets := facts.get("targets"), list):
        add("Targets", *targets)
    for key, title in (("modules", "Modules"), ("parameters", "Parameters"), ("tensors", "Tensors")):
        if isinstance(count := facts.get(key), int):
            add(title, f"{count:,}")
    add("Stored as", facts.get("dtype"))
    if isinstance(operation := facts.get("operation"), str):
        add("Made by", f"surgery {operation}")
    inputs = facts.get("inputs")
    listed = [item for item in inputs[:_MOST_INPUTS] if isinstance(item, dict)] if isinstance(inputs, list) else []
    rows += [
        Fact(f"From {item.get('role') or 'input'}", (named(item["source"]),))
        for item in listed
        if isinstance(item.get("source"), str)
    ]
    return rows
