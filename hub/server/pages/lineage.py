"""The family of a model: what it was made from, and what was made from it."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.responses import Response

from surgery.figures import number
from surgery.hub.lineage import Lineage, Link, Relative
from surgery.hub.lineage import lineage as family_of
from surgery.hub.naming import MAIN
from surgery.hub.server.pages.render import html
from surgery.hub.server.pages.repository import KINDS, common
from surgery.hub.server.pages.session import Visit

_WORDS = {
    "adapter": "adapter of it",
    "merge": "merged from it",
    "upcycle": "upcycled from it",
    "finetune": "fine-tuned from it",
    "quantized": "quantised from it",
}
_BY = {"name": "by name only", "name, other hash": "the weights differ from those on record"}
# Lines of the drawn tree; a node that was drawn above is named again, without what is below it.
_MOST = 500


@dataclass(frozen=True)
class Branch:
    """A node of the tree as it is drawn.

    Attributes:
        node: the model.
        link: the step that leads to it from the node above; None for the first.
        below: what is drawn below it.
        again: whether it is drawn elsewhere with all that is below it.
    """

    node: Relative
    link: Link | None
    below: tuple[Branch, ...]
    again: bool = False

    @property
    def kind(self) -> str | None:
        return KINDS.get(self.node.kind or "")

    @property
    def doubt(self) -> str | None:
        """What speaks against the link, in words."""
        return _BY.get(self.link.by) if self.link is not None and self.node.known else None

    @property
    def relation(self) -> str | None:
        return _WORDS.get(self.link.relation, self.link.relation) if self.link is not None else None

    @property
    def details(self) -> str:
        """Rank and parameters."""
        rank, count = self.node.rank, self.node.parameters
        parts = []
        if rank is not None:
            parts.append(f"rank {rank[0]}" if rank[0] == rank[1] else f"rank {rank[0]} to {rank[1]}")
        if count is not None:
            parts.append(f"{number(count)} parameters")
        return ", ".join(parts)


def page(visit: Visit) -> Response:
    """`/{id}/lineage`."""
    call = visit.call
    repository = call.repository()
    found = family_of(call.hub.metadata, repository.name, call.reader)
    if found is None:
        raise call.no_repository()
    values = common(visit, repository, MAIN, "lineage") | {
        "found": found,
        "ancestors": grow(found, up=True),
        "descendants": grow(found, up=False),
    }
    return html("lineage.html", values)


def grow(found: Lineage, up: bool) -> tuple[Branch, ...]:
    """The tree above or below a model, as nested branches."""
    drawn: set[str] = set()
    nodes = {node.id: node for node in found.nodes}
    steps: dict[str, list[Link]] = {}
    for link in found.links:
        steps.setdefault(link.child if up else link.parent, []).append(link)

    def below(identity: str, above: frozenset[str]) -> tuple[Branch, ...]:
        branches = []
        ordered = sorted(steps.get(identity, ()), key=lambda link: (link.relation, link.role, _end(link, up).lower()))
        for link in ordered:
            end = _end(link, up)
            if end in above or len(drawn) >= _MOST:
                continue
            again = end in drawn and bool(steps.get(end))
            drawn.add(end)
            branches.append(Branch(nodes[end], link, () if again else below(end, above | {end}), again))
        return tuple(branches)

    return below(found.id, frozenset({found.id}))


def _end(link: Link, up: bool) -> str:
    return link.parent if up else link.child
