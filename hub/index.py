"""What a registry knows of its repositories without opening a file: what a list, a search and a family tree ask for.

For each repository the index has the facts of its `main` (`surgery.hub.facts`): tags, kind, ranks, parameters, shapes,
and what it was made from. It is written in the transaction that moves `main`, so that it is never behind. Every
question comes with a `Reader`, and the answer has nothing that this reader may not read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from surgery.hub.naming import RepositoryName

if TYPE_CHECKING:
    from surgery.hub.interfaces import Repository

SORTS = ("updated", "created", "name", "parameters", "size")
BY_HASH, BY_NAME, OTHER_HASH = "hash", "name", "name, other hash"


@dataclass(frozen=True)
class Reader:
    """Who asks. Public repositories are for everybody.

    Attributes:
        everything: may read every private repository too.
        namespaces: whose private repositories may be read, in lower case.
        only: the one private repository that may be read at all, in lower case; None for no such limit.
    """

    everything: bool = False
    namespaces: frozenset[str] = frozenset()
    only: str | None = None

    def may_read(self, repository: Repository) -> bool:
        if not repository.private:
            return True
        member = self.everything or repository.name.namespace.lower() in self.namespaces
        return member and self.only in (None, repository.name.key)


OWNER = Reader(everything=True)
"""Whoever has the folder on disk."""
ANYBODY = Reader()


@dataclass(frozen=True)
class Span:
    """A range of numbers, both ends included; None for an open end."""

    least: int | None = None
    most: int | None = None

    @property
    def is_open(self) -> bool:
        return self.least is None and self.most is None


@dataclass(frozen=True)
class MadeFrom:
    """A condition on what something was made from: one of its parents has one of these names, or of these hashes.

    Attributes:
        keys: names in lower case.
        weights: hashes of all weights.
        relation: what it has to be to that parent; None for anything.
    """

    keys: frozenset[str]
    weights: frozenset[str] = frozenset()
    relation: str | None = None


@dataclass(frozen=True, kw_only=True)
class ModelQuery:
    """What a list is to have; every condition has to hold.

    Attributes:
        repositories: `model` or `dataset`.
        search: texts that occur in the name, a tag, the base or the family, in any letter case.
        author: the namespace.
        tags: all of these, in any letter case; library and pipeline tag count as tags.
        kind: `adapter`, `dense` or `moe`.
        family: the `model_type` of the config.
        ranks: at least one module's rank is in this range.
        parameters: how many there are.
        targets: last components of modules that an adapter changes.
        made_from: what it was made from; see `made_from`.
        shapes: adapters whose factors all have one of these shapes (`examining.shape_key`).
        names: keys of the repositories to choose from.
        weights: the hash of all weights.
        private: only private ones, or only public ones.
        sort: one of `SORTS`; by time and by size the largest first.
        ascending: the other way round; names are sorted from a to z unless this is False.
        begin, limit: which part of the answer.
    """

    repositories: str = "model"
    search: tuple[str, ...] = ()
    author: str | None = None
    tags: tuple[str, ...] = ()
    kind: str | None = None
    family: str | None = None
    ranks: Span = Span()
    parameters: Span = Span()
    targets: tuple[str, ...] = ()
    made_from: tuple[MadeFrom, ...] = ()
    shapes: Collection[str] | None = None
    names: Collection[str] | None = None
    weights: str | None = None
    private: bool | None = None
    sort: str = "updated"
    ascending: bool | None = None
    begin: int = 0
    limit: int = 1000


@dataclass(frozen=True)
class Entry:
    """A repository as the index has it.

    Attributes:
        commit, tree: of `main`; None where there is none yet.
        facts: of that commit, see `surgery.hub.facts`.
        tags: what it is found by.
        size: bytes of its files.
    """

    repository: Repository
    commit: str | None
    tree: str | None
    facts: Mapping[str, object] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    size: int = 0

    @property
    def name(self) -> str:
        return str(self.repository.name)

    @property
    def kind(self) -> str | None:
        return _text(self.facts.get("kind"))

    @property
    def relation(self) -> str | None:
        return _text(self.facts.get("relation"))

    @property
    def weights(self) -> str | None:
        """One hash for all tensors, where it is known."""
        return _text(self.facts.get("weights"))

    @property
    def parents(self) -> tuple[Parent, ...]:
        return parents_in(self.facts)


@dataclass(frozen=True)
class Parent:
    """What something was made from, as its own files record it.

    Attributes:
        source: a repository's name, or a folder's.
        revision: of a Hub's, where it is on record.
        role: what part it played: `base`, `tuned`, `adapter`, `merged`, `dense`, `expert`, `mixture`.
        relation: what the one is to the other: `adapter`, `merge`, `upcycle`, `finetune`, `quantized`, or an operation.
        weights: one hash for all of its tensors (`belonging.weights_id`), where they are on record.
    """

    source: str
    role: str
    relation: str
    revision: str | None = None
    weights: str | None = None


@dataclass(frozen=True)
class Edge:
    """Two repositories of the registry, one made from the other.

    Attributes:
        child, parent: what both are called now.
        record: what the child says of it.
        by: `hash` if the parent has, or had, the very tensors on record; `name` where nobody can tell;
            `name, other hash` if it bears the name and never had these tensors.
    """

    child: Entry
    parent: Entry
    record: Parent
    by: str


class Index(Protocol):
    """Questions to the index. None of them opens a file."""

    def select(self, query: ModelQuery, reader: Reader) -> Sequence[Entry]:
        """The repositories that a query describes, in its order."""
        ...

    def count(self, query: ModelQuery, reader: Reader) -> int:
        """How many there are, whatever part of them `begin` and `limit` choose."""
        ...

    def entry(self, name: RepositoryName, reader: Reader, kind: str = "model") -> Entry | None:
        """One repository, by the name that it has or had; None where there is none, or none for this reader."""
        ...

    def edges(self, names: Collection[str], reader: Reader, up: bool) -> Sequence[Edge]:
        """What these models (keys) were made from, if `up`; else what was made from them. One step, both ends readable.

        A parent is found by the name on record, which may be a former one, and by the hash of its weights at any
        commit.
        """
        ...

    def known_as(self, name: RepositoryName, kind: str = "model") -> Collection[str]:
        """The keys that a repository has and had; of a name that nothing has, that name."""
        ...

    def weights_of(self, name: RepositoryName, kind: str = "model") -> Collection[str]:
        """The hash of all weights, of every commit for which it is known."""
        ...

    def keep_tensor_hashes(self, files: Mapping[str, Mapping[str, str]]) -> None:
        """Remember the BLAKE3-256 of every tensor of safetensors files, which go by their SHA-256."""
        ...

    def tensor_hashes(self, sha256: str) -> Mapping[str, str] | None:
        """What was remembered of a file; None if nothing was."""
        ...

    def outdated(self, version: int) -> Sequence[tuple[RepositoryName, str]]:
        """Models and their commits, heads of a branch or a tag, whose facts are of an earlier version."""
        ...

    def set_facts(self, name: RepositoryName, commit: str, facts: Mapping[str, object]) -> None:
        """Put other facts beside a commit of a model, and into the index where `main` is there."""
        ...


def made_from(index: Index, name: RepositoryName, reader: Reader, relation: str | None = None) -> MadeFrom:
    """The condition that something was made from a model: by the names that it has and had, and by its weights.

    Of what this reader may not read, it says nothing but the name that was given.
    """
    found = index.entry(name, reader)
    if found is None:
        return MadeFrom(frozenset({name.key}), relation=relation)
    now = found.repository.name
    return MadeFrom(frozenset(index.known_as(now)), frozenset(index.weights_of(now)), relation)


def parents_in(facts: Mapping[str, object]) -> tuple[Parent, ...]:
    """The parents that facts name."""
    found = facts.get("parents")
    return tuple(
        Parent(
            source=item["source"],
            role=_text(item.get("role")) or "base",
            relation=_text(item.get("relation")) or "finetune",
            revision=_text(item.get("revision")),
            weights=_text(item.get("weights")),
        )
        for item in (found if isinstance(found, list) else [])
        if isinstance(item, dict) and isinstance(item.get("source"), str)
    )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
