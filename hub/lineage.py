"""Family trees: what a model was made from, and what was made from it, as far as a reader may look.

Links come from `adapter_config.json` and `surgery.json` first and from cards second (`surgery.hub.facts`). They are
followed by name, through renames, and by the hash of the weights, so that a base that was pushed under another name is
found as well. A repository that the reader may not read is as good as not there: it is neither shown nor passed
through, and whoever records its name shows that name as one that nobody knows here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from surgery.hub.index import Edge, Entry, Index, ModelQuery, Parent, Reader
from surgery.hub.naming import RepositoryName

MOST_NODES = 1000
_DEPTH = 32


@dataclass(frozen=True)
class Relative:
    """A model of a family tree.

    Attributes:
        id: its name; of one that is not here, the name on record.
        known: whether it is a repository here that the reader may read.
        kind: `adapter`, `dense` or `moe`; None where it is not known.
        relation: what it is to its parent: `adapter`, `merge`, `upcycle`, `finetune`, `quantized`, or an operation.
        rank: of an adapter, the least and the greatest.
        parameters: how many it has.
        depth: steps from the model that was asked for; negative for what that was made from.
        private: as the repository is; False where it is not here.
        weights: one hash for all of its tensors, where it is known.
    """

    id: str
    known: bool
    kind: str | None = None
    relation: str | None = None
    rank: tuple[int, int] | None = None
    parameters: int | None = None
    depth: int = 0
    private: bool = False
    weights: str | None = None


@dataclass(frozen=True)
class Link:
    """One step: `child` was made from `parent`, both ids of nodes.

    Attributes:
        role: what part the parent played.
        revision: of the parent, where it is on record.
        by: see `index.Edge`; `name` where the parent is not known here.
    """

    child: str
    parent: str
    role: str
    relation: str
    revision: str | None
    by: str


@dataclass(frozen=True)
class Lineage:
    """The family of one model.

    Attributes:
        id: of that model.
        nodes: it and all relatives, by depth and name.
        links: every step between two of them.
        copies: names of repositories with the very same weights.
        truncated: whether there are more than could be shown.
        notes: why something may be missing.
    """

    id: str
    nodes: tuple[Relative, ...]
    links: tuple[Link, ...]
    copies: tuple[str, ...] = ()
    truncated: bool = False
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    def node(self, identity: str) -> Relative:
        return next(node for node in self.nodes if node.id == identity)

    def children(self, identity: str) -> list[Link]:
        """What was made from one of the nodes."""
        return [link for link in self.links if link.parent == identity]

    def parents(self, identity: str) -> list[Link]:
        """What one of the nodes was made from."""
        return [link for link in self.links if link.child == identity]


def lineage(index: Index, name: RepositoryName, reader: Reader) -> Lineage | None:
    """The family of a model, transitively and in both directions; None where this reader sees no such model."""
    start = index.entry(name, reader)
    if start is None:
        return None
    tree = _Tree(index, reader, start)
    tree.climb()
    tree.descend()
    return tree.result()


class _Tree:
    """A family tree as it grows."""

    def __init__(self, index: Index, reader: Reader, start: Entry) -> None:
        self._index, self._reader, self._start = index, reader, start
        self._entries: dict[str, tuple[Entry, int, str | None]] = {
            start.repository.name.key: (start, 0, start.relation)
        }
        self._strangers: dict[str, Relative] = {}
        self._links: dict[tuple[str, str, str], Link] = {}
        self._truncated = False

    def climb(self) -> None:
        """What the model was made from, and that in turn."""
        level = {self._start.repository.name.key: self._start}
        for depth in range(-1, -_DEPTH - 1, -1):
            found = self._index.edges(level.keys(), self._reader, up=True)
            resolved: dict[str, set[Parent]] = {}
            following: dict[str, Entry] = {}
            for edge in found:
                resolved.setdefault(edge.child.repository.name.key, set()).add(edge.record)
                if self._add(edge, edge.parent, depth, edge.parent.relation):
                    following[edge.parent.repository.name.key] = edge.parent
            for key, entry in level.items():
                for record in entry.parents:
                    if record not in resolved.get(key, set()):
                        self._add_stranger(entry, record, depth)
            level = following
            if not level:
                return
        self._truncated = True

    def descend(self) -> None:
        """What was made from the model, and from that in turn."""
        level = {self._start.repository.name.key}
        for depth in range(1, _DEPTH + 1):
            following = set()
            for edge in self._index.edges(level, self._reader, up=False):
                if self._add(edge, edge.child, depth, edge.record.relation):
                    following.add(edge.child.repository.name.key)
            level = following
            if not level:
                return
        self._truncated = True

    def _add(self, edge: Edge, entry: Entry, depth: int, relation: str | None) -> bool:
        """Add an end of an edge; whether it is new. Cycles end here."""
        key = entry.repository.name.key
        is_new = key not in self._entries
        if is_new and len(self._entries) >= MOST_NODES:
            self._truncated = True
            return False
        if is_new:
            self._entries[key] = (entry, depth, relation)
        self._link(Link(edge.child.name, edge.parent.name, edge.record.role, edge.record.relation,
                        edge.record.revision, edge.by))  # fmt: skip
        return is_new

    def _add_stranger(self, child: Entry, record: Parent, depth: int) -> None:
        if len(self._strangers) >= MOST_NODES:
            self._truncated = True
            return
        self._strangers.setdefault(record.source, Relative(record.source, known=False, depth=depth))
        self._link(Link(child.name, record.source, record.role, record.relation, record.revision, "name"))

    def _link(self, link: Link) -> None:
        self._links.setdefault((link.child, link.parent, link.role), link)

    def result(self) -> Lineage:
        nodes = [_relative(*found) for found in self._entries.values()] + list(self._strangers.values())
        nodes.sort(key=lambda node: (node.depth, node.id.lower()))
        return Lineage(self._start.name, tuple(nodes), tuple(self._links.values()), self._copies(), self._truncated)

    def _copies(self) -> tuple[str, ...]:
        if self._start.weights is None:
            return ()
        same = self._index.select(ModelQuery(weights=self._start.weights, sort="name"), self._reader)
        return tuple(entry.name for entry in same if entry.repository.name != self._start.repository.name)


def _relative(entry: Entry, depth: int, relation: str | None) -> Relative:
    ranks = entry.facts.get("ranks")
    numbers = [rank for rank in ranks if isinstance(rank, int)] if isinstance(ranks, list) else []
    parameters = entry.facts.get("parameters")
    return Relative(
        id=entry.name,
        known=True,
        kind=entry.kind,
        relation=relation,
        rank=(min(numbers), max(numbers)) if numbers else None,
        parameters=parameters if isinstance(parameters, int) else None,
        depth=depth,
        private=entry.repository.private,
        weights=entry.weights,
    )
