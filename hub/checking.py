"""`hub fsck`: read everything that a registry keeps, and name the files that are hit by what is damaged.

Every blob has to hash to its name, every chunk of every xorb to what the xorb's footer says, the chunks of a xorb to
its name, those of a recipe to the file's Xet hash; trees and commits to their ids; and the databases have to pass
SQLite's own check. That takes the time of reading the folder once. A quick check looks at what is there, at sizes and
footers. Servers and pushes may go on meanwhile.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from surgery.errors import SurgeryError
from surgery.execute import NoProgress, Progress
from surgery.hub.collecting import opened
from surgery.hub.content import LocalContent
from surgery.hub.database import Database
from surgery.hub.interfaces import FileEntry, Repository
from surgery.hub.metadata import SqliteMetadata
from surgery.hub.server.accounts import SqliteAccounts
from surgery.hub.store import commit_id, tree_id
from surgery.hub.transfer import pump
from surgery.hub.xet import hashes, placement
from surgery.hub.xet.recipes import Recipe, StoredXorb, read_chunks
from surgery.source import FileSource

KINDS = ("model", "dataset")


@dataclass(frozen=True, kw_only=True)
class FsckOptions:
    """What to check.

    Attributes:
        data: the registry's folder.
        quick: only what is there, sizes and footers; nothing is read in full.
        repair: remove what is damaged where the same content is there whole in the other form.
        progress: told about the bytes as they pass.
    """

    data: Path
    quick: bool = False
    repair: bool = False
    progress: Progress = field(default_factory=NoProgress)


@dataclass(frozen=True, order=True)
class HitFile:
    """A file of a repository; `revision` is the newest commit that has it so, or the branch or tag that is there."""

    repository: str
    kind: str
    revision: str
    path: str


@dataclass(frozen=True)
class Damage:
    """Something that is not as it was.

    Attributes:
        what: `blob`, `recipe`, `xorb`, `placement`, `missing`, `tree`, `commit`, `ref` or `database`.
        name: which one: a hash, an id, or a path.
        reason: what is wrong with it.
        files: of repositories, that cannot be read because of it.
        mendable: whether the content is there whole in the other form, as a blob or as chunks.
        repaired: whether it was removed for that reason.
    """

    what: str
    name: str
    reason: str
    files: tuple[HitFile, ...] = ()
    mendable: bool = False
    repaired: bool = False


@dataclass(frozen=True)
class FsckReport:
    """What `hub fsck` found.

    Attributes:
        data: the registry's folder.
        quick: whether only names and sizes were looked at.
        counts: how many `repositories`, `commits`, `blobs`, `recipes` and `xorbs` were checked.
        read_bytes: how much was read and hashed.
        damages: what is wrong; nothing, if all is well.
        unused, unused_bytes: content that no commit refers to: not damage, and what `hub gc` removes in time.
    """

    data: str
    quick: bool
    counts: Mapping[str, int]
    read_bytes: int
    damages: tuple[Damage, ...]
    unused: int
    unused_bytes: int

    @property
    def passed(self) -> bool:
        return all(damage.repaired for damage in self.damages)

    def as_dict(self) -> dict[str, object]:
        return asdict(self) | {"passed": self.passed}


def fsck(options: FsckOptions) -> FsckReport:
    """Check a registry. Raises `InputError` where there is none, `FormatError` where its database cannot be opened."""
    with opened(options.data, options.repair) as (registry, index):
        content, metadata = registry.content, registry.metadata
        assert isinstance(content, LocalContent)
        assert isinstance(metadata, SqliteMetadata)
        return _Check(content, metadata, index, options).run()


@dataclass
class _Named:
    """A file as commits have it: its length, and where."""

    size: int
    places: dict[tuple[str, str, str], str] = field(default_factory=dict)

    def files(self) -> tuple[HitFile, ...]:
        return tuple(sorted(HitFile(name, kind, rev, path) for (name, kind, path), rev in self.places.items()))


class _Check:
    """One check of a registry."""

    def __init__(
        self, content: LocalContent, metadata: SqliteMetadata, index: SqliteAccounts | None, options: FsckOptions
    ) -> None:
        self._content = content
        self._metadata = metadata
        self._index = index
        self._options = options
        self._damages: list[Damage] = []
        self._named: dict[str, _Named] = {}
        self._counts = dict.fromkeys(("repositories", "commits", "blobs", "recipes", "xorbs"), 0)
        self._read = 0
        # Chunks that cannot be read, by xorb; None for all of one.
        self._bad: dict[bytes, set[int] | None] = {}

    def run(self) -> FsckReport:
        self._databases()
        self._repositories()
        sums = sorted({sha256 for sha256, _, _ in self._content.list()})
        xorbs = [(digest, file.size) for file in self._content.xorbs() if (digest := hashes.digest_of(file.name))]
        blobs = {sha256: path for sha256 in sums if (path := self._content.path(sha256)) is not None}
        if not self._options.quick:
            total = sum(size for _, size in xorbs) + sum(path.stat().st_size for path in blobs.values())
            self._options.progress.start(total, "checking")
        try:
            reasons = {digest: reason for digest, _ in xorbs if (reason := self._xorb(digest))}
            bad_blobs = {sha256: reason for sha256, path in blobs.items() if (reason := self._blob(sha256, path))}
        finally:
            self._options.progress.stop()
        hit_by = self._recipes(sums, set(blobs) - set(bad_blobs), reasons)
        self._tell_of_xorbs(reasons, hit_by)
        self._tell_of_blobs(bad_blobs)
        self._placements()
        self._missing()
        unused = [sha256 for sha256 in sums if sha256 not in self._named]
        return FsckReport(
            data=str(self._options.data),
            quick=self._options.quick,
            counts=self._counts,
            read_bytes=self._read,
            damages=tuple(self._damages),
            unused=len(unused),
            unused_bytes=sum(self._content.stored(sha256) for sha256 in unused),
        )

    def _found(
        self, what: str, name: str, reason: str, *hit: str, mendable: bool = False, repaired: bool = False
    ) -> None:
        files = {file for sha256 in hit if sha256 in self._named for file in self._named[sha256].files()}
        self._damages.append(Damage(what, name, reason, tuple(sorted(files)), mendable, repaired))

    def _advance(self, count: int) -> None:
        self._read += count
        self._options.progress.advance(count)

    # What was committed -----------------------------------------------------------------------------------------------

    def _databases(self) -> None:
        databases: list[Database] = [self._metadata, *([self._index] if self._index is not None else [])]
        for database in databases:
            for problem in database.problems(self._options.quick):
                self._found("database", database.path.name, problem)

    def _repositories(self) -> None:
        for kind in KINDS:
            for repository in self._metadata.repositories(kind):
                self._counts["repositories"] += 1
                self._repository(repository)

    def _repository(self, repository: Repository) -> None:
        name, kind = repository.name, repository.kind
        commits = {commit.id: commit for commit in self._metadata.commits(name, kind)}
        refs = self._metadata.refs(name, kind)
        of_commit: dict[str, str] = {}
        for ref, target in refs.items():
            if target not in commits:
                self._found("ref", f"{name} {ref}", f"leads to commit {target}, which there is not")
            of_commit.setdefault(target, ref.removeprefix("refs/heads/").removeprefix("refs/tags/"))
        # The oldest first, so that the newest has the last word; what a branch is at has it after all others.
        for commit in sorted(commits.values(), key=lambda commit: (commit.id in of_commit, commit.time)):
            self._counts["commits"] += 1
            if commit.id != commit_id(commit.tree, commit.parent, commit.message, commit.time):
                self._found("commit", f"{name} {commit.id}", "does not have the id that follows from what it says")
            if commit.parent is not None and commit.parent not in commits:
                self._found("commit", f"{name} {commit.id}", f"comes after {commit.parent}, which there is not")
            try:
                files = self._metadata.files(commit.tree)
                whole = tree_id(files) == commit.tree
            except (SurgeryError, ValueError, TypeError):
                files, whole = [], False
            if not whole:
                self._found("tree", commit.tree, f"of commit {commit.id} of {name} cannot be read, or is another")
            self._note(files, str(name), kind, of_commit.get(commit.id, commit.id))

    def _note(self, files: Sequence[FileEntry], name: str, kind: str, revision: str) -> None:
        for entry in files:
            named = self._named.setdefault(entry.sha256, _Named(entry.size))
            named.places[name, kind, entry.path] = revision

    # What is stored ---------------------------------------------------------------------------------------------------

    def _xorb(self, digest: bytes) -> str | None:
        """What is wrong with a xorb; which chunks cannot be read is noted."""
        self._counts["xorbs"] += 1
        try:
            stored = self._content.open_xorb(digest)
        except SurgeryError as error:
            if not self._content.has_xorb(digest):  # collected meanwhile
                return None
            self._bad[digest] = None
            return error.message
        chunks = stored.index.chunks(0, len(stored.index))
        if hashes.xorb_hash(chunks) != digest:
            self._bad[digest] = None
            return "its chunks do not hash to its name"
        if self._options.quick:
            return None
        bad = dict(self._bad_chunks(stored))
        if not bad:
            return None
        self._bad[digest] = set(bad)
        return next(iter(bad.values()))

    def _bad_chunks(self, stored: StoredXorb) -> Iterator[tuple[int, str]]:
        begin, count = 0, len(stored.index)
        while begin < count:
            try:
                for number, _ in read_chunks(stored, begin, count):
                    self._advance(_packed(stored, number))
                    begin = number + 1
            except SurgeryError as error:
                yield begin, error.message
                self._advance(_packed(stored, begin))
                begin += 1

    def _blob(self, sha256: str, path: Path) -> str | None:
        self._counts["blobs"] += 1
        try:
            source = FileSource(path)
            named = self._named.get(sha256)
            if named is not None and named.size != source.size:
                return f"has {source.size} bytes, expected {named.size}"
            if self._options.quick:
                return None
            hasher = hashlib.sha256()
            pump(source, [hasher.update], self._advance)
        except SurgeryError as error:
            return error.message if path.exists() else None
        found = hasher.hexdigest()
        return None if found == sha256 else f"hashes to {found}"

    def _recipes(self, sums: Iterable[str], blobs: set[str], reasons: Mapping[bytes, str]) -> dict[bytes, list[str]]:
        """Check every recipe. Returns the contents that a damaged xorb hits, by xorb."""
        hit_by: dict[bytes, list[str]] = {digest: [] for digest in reasons}
        self._whole: set[str] = set()
        for sha256 in sums:
            try:
                recipe = self._content.recipe(sha256)
                if recipe is None:
                    continue
                self._counts["recipes"] += 1
                reason = self._recipe(recipe)
            except SurgeryError as error:
                reason, recipe = error.message, None
            hit = set()
            for term in recipe.terms if recipe is not None else ():
                bad = self._bad.get(term.xorb, set())
                if bad is None or not bad.isdisjoint(range(term.begin, term.end)):
                    hit.add(term.xorb)
            if reason is None and not hit:
                self._whole.add(sha256)
                continue
            mendable = sha256 in blobs
            repaired = mendable and self._mend(self._content.remove_recipe, sha256)
            if reason is not None:
                self._found("recipe", sha256, reason, sha256, mendable=mendable, repaired=repaired)
            for digest in hit:
                # Where the content is there as a blob, it is read from that.
                if not mendable:
                    hit_by[digest].append(sha256)
        return hit_by

    def _recipe(self, recipe: Recipe) -> str | None:
        named = self._named.get(recipe.sha256)
        if named is not None and named.size != recipe.size:
            return f"is of {recipe.size} bytes, expected {named.size}"
        chunks: list[tuple[bytes, int]] = []
        for term in recipe.terms:
            if not self._content.has_xorb(term.xorb):
                return f"needs the xorb {hashes.text(term.xorb)}, which is missing"
            if self._bad.get(term.xorb, set()) is None:
                return None  # it is told of with that xorb
            index = self._content.open_xorb(term.xorb).index
            if term.end > len(index) or index.size(term.begin, term.end) != term.size:
                return f"needs chunks {term.begin} to {term.end} of the xorb {hashes.text(term.xorb)}, of other lengths"
            chunks += index.chunks(term.begin, term.end)
        if hashes.file_hash(chunks) != recipe.digest:
            return "has other chunks than the file's Xet hash was made of"
        return None

    def _tell_of_xorbs(self, reasons: Mapping[bytes, str], hit_by: Mapping[bytes, Sequence[str]]) -> None:
        for digest, reason in reasons.items():
            self._found("xorb", hashes.text(digest), reason, *hit_by[digest])

    def _tell_of_blobs(self, bad: Mapping[str, str]) -> None:
        for sha256, reason in bad.items():
            mendable = sha256 in self._whole
            repaired = mendable and self._mend(self._content.remove_blob, sha256)
            self._found("blob", sha256, reason, sha256, mendable=mendable, repaired=repaired)

    def _mend(self, remove: Callable[[str], None], sha256: str) -> bool:
        if self._options.repair:
            remove(sha256)
        return self._options.repair

    def _placements(self) -> None:
        """What a server has on record of xorbs that it did not store as they came. Without it they are sent again."""
        for digest, _ in self._index.known_xorbs() if self._index is not None else ():
            assert self._index is not None
            try:
                placed = self._index.placement(digest)
                if placed is None or placement.check(placed, lambda xorb: self._content.open_xorb(xorb).index):
                    continue
                reason = "its chunks are not where they are said to be"
            except SurgeryError as error:
                reason = error.message
            if self._options.repair:
                self._index.forget_xorb(digest, None)
            name = hashes.text(digest)
            self._found("placement", name, reason, mendable=True, repaired=self._options.repair)

    def _missing(self) -> None:
        for sha256, named in sorted(self._named.items()):
            # Asked again of the database: it may have been deleted since.
            if not self._content.has(sha256) and self._metadata.holding(sha256):
                self._found("missing", sha256, f"the content of {named.size} bytes is not stored", sha256)


def _packed(stored: StoredXorb, number: int) -> int:
    begin, end = stored.index.packed_range(number, number + 1)
    return end - begin
