"""How family trees and fits look."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from surgery.cli.formats import number, plural
from surgery.cli.tables import facts, line, notes
from surgery.hub.fits import Fit
from surgery.hub.lineage import Lineage, Link
from surgery.hub.reindexing import ReindexReport
from surgery.names import plain

_KINDS = {"moe": "mixture of experts", "dense": "dense"}
_ANSWERS = {
    ("yes", "hash"): "fits: it is the base that the adapter was made for, by hash",
    ("yes", "shape"): "fits by shape",
    ("no", "shape"): "does not fit",
}


def tree(console: Console, report: Lineage) -> None:
    """Draw what a model was made from, and below it what was made from it."""
    for title, up in (("made from", True), ("made of it", False)):
        if (report.parents if up else report.children)(report.id):
            root = Tree(Text(f"{_label(report, report.id)}, {title}"))
            _grow(root, report, report.id, up, {report.id})
            console.print(root)
            line(console, "")
    if not report.links:
        line(console, f"{_label(report, report.id)}")
        line(console, "Nothing here is known to have been made from it, nor what it was made from.")
    if report.copies:
        line(console, f"The same weights: {', '.join(plain(name) for name in report.copies)}.")
    if report.truncated:
        notes(console, ("There are more than are shown.",))
    notes(console, report.notes)


def _grow(branch: Tree, report: Lineage, identity: str, up: bool, drawn: set[str]) -> None:
    """Add the relatives of a model, each with its own; of one that was drawn before only the name."""
    for link in report.parents(identity) if up else report.children(identity):
        other = link.parent if up else link.child
        again = other in drawn
        text = f"{_label(report, other)}: {_way(link)}" + ("; see above" if again else "")
        grown = branch.add(Text(text))
        if not again:
            drawn.add(other)
            _grow(grown, report, other, up, drawn)


def _way(link: Link) -> str:
    """Relation, and how it is known."""
    known = {"hash": "by hash", "name": "by name", "name, other hash": "by name, but its weights are other ones"}
    role = "" if link.role == "base" else f" ({plain(link.role)})"
    return f"{plain(link.relation)}{role}, {known.get(link.by, link.by)}"


def _label(report: Lineage, identity: str) -> str:
    node = report.node(identity)
    if not node.known:
        return f"{plain(identity)} (not here)"
    told = []
    if node.kind == "adapter":
        told.append("adapter" if node.rank is None else f"adapter of rank {_span(node.rank)}")
    elif node.kind is not None:
        told.append(_KINDS.get(node.kind, node.kind))
    told += [f"{number(node.parameters)} parameters"] if node.parameters is not None else []
    told += ["private"] if node.private else []
    return f"{plain(identity)} ({', '.join(told)})" if told else plain(identity)


def _span(rank: tuple[int, int]) -> str:
    return str(rank[0]) if rank[0] == rank[1] else f"{rank[0]} to {rank[1]}"


def fit(console: Console, report: Fit) -> None:
    """Draw whether an adapter fits a base."""
    answer = _ANSWERS.get((report.fits, report.by or ""), "nobody can tell")
    console.print(facts([("adapter", report.adapter), ("base", report.base), ("answer", answer)]))
    for reason in report.reasons:
        line(console, f"  {plain(reason)}")


def reindexed(console: Console, report: ReindexReport) -> None:
    """Draw what `hub reindex` did."""
    line(console, f"{plural(report.examined, 'commit')} examined in {report.registry}, {report.changed} changed.")
    notes(console, report.failed)
