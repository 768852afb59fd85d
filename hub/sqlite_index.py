"""The index in SQLite, in the registry's own file: its tables, how they follow a commit, and the questions as SQL."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from surgery.errors import FormatError, InputError
from surgery.hub.database import Database
from surgery.hub.index import BY_HASH, BY_NAME, OTHER_HASH, Edge, Entry, ModelQuery, Reader, parents_in
from surgery.hub.interfaces import BRANCHES, Repository
from surgery.hub.naming import MAIN, RepositoryName
from surgery.hub.tags import search_words, tags_of

_HEAD = BRANCHES + MAIN
_TABLES = """
CREATE TABLE listed (
    repository INTEGER PRIMARY KEY REFERENCES repositories (id) ON DELETE CASCADE,
    kind TEXT,                    -- adapter, dense, moe
    family TEXT,
    parameters INTEGER,
    size INTEGER NOT NULL,        -- bytes of all files
    commit_id TEXT NOT NULL,      -- where main is
    weights TEXT,                 -- hash of all tensors
    words TEXT NOT NULL,          -- what a search looks through beside the name, in lower case
    tags TEXT NOT NULL            -- JSON list; what is long comes last, so that the rest is read without it
);
CREATE INDEX listed_by_weights ON listed (weights);
CREATE TABLE marks (
    mark TEXT NOT NULL,           -- a tag in lower case
    repository INTEGER NOT NULL REFERENCES repositories (id) ON DELETE CASCADE,
    PRIMARY KEY (mark, repository)
) WITHOUT ROWID;
CREATE INDEX marks_by_repository ON marks (repository);
CREATE TABLE ranks (
    rank INTEGER NOT NULL,        -- of an adapter's modules, each once
    repository INTEGER NOT NULL REFERENCES repositories (id) ON DELETE CASCADE,
    PRIMARY KEY (rank, repository)
) WITHOUT ROWID;
CREATE INDEX ranks_by_repository ON ranks (repository);
CREATE TABLE shapes (
    repository INTEGER NOT NULL REFERENCES repositories (id) ON DELETE CASCADE,
    shape TEXT NOT NULL,          -- of weights that an adapter changes
    PRIMARY KEY (repository, shape)
) WITHOUT ROWID;
CREATE TABLE parents (
    repository INTEGER NOT NULL REFERENCES repositories (id) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    key TEXT NOT NULL,            -- the name on record, in lower case
    relation TEXT NOT NULL,
    weights TEXT,                 -- hash of all its tensors, if that is on record
    PRIMARY KEY (repository, number)
) WITHOUT ROWID;
CREATE INDEX parents_by_key ON parents (key);
CREATE INDEX parents_by_weights ON parents (weights);
CREATE TABLE weights (
    weights TEXT NOT NULL,        -- hash of all tensors of a commit
    repository INTEGER NOT NULL REFERENCES repositories (id) ON DELETE CASCADE,
    PRIMARY KEY (weights, repository)
) WITHOUT ROWID;
CREATE INDEX weights_by_repository ON weights (repository);
CREATE TABLE names (
    kind TEXT NOT NULL,
    key TEXT NOT NULL,            -- a name that a repository has or had, in lower case
    repository INTEGER NOT NULL REFERENCES repositories (id) ON DELETE CASCADE,
    PRIMARY KEY (kind, key)
) WITHOUT ROWID;
CREATE INDEX names_by_repository ON names (repository);
CREATE INDEX repositories_by_time ON repositories (kind, updated);
CREATE TABLE tensor_hashes (
    sha256 TEXT PRIMARY KEY,      -- of a safetensors file
    hashes TEXT NOT NULL          -- JSON: BLAKE3-256 by name of tensor
) WITHOUT ROWID
"""
_ROW = (
    "r.id, r.kind, r.namespace, r.name, r.private, r.created, r.updated, l.commit_id, c.tree, c.facts, l.tags, l.size"
)
_CHOOSE = "FROM repositories r LEFT JOIN listed l ON l.repository = r.id"
_FROM = f"{_CHOOSE} LEFT JOIN commits c ON c.repository = r.id AND c.id = l.commit_id"
_ORDER = {
    "updated": ("r.updated", False),
    "created": ("r.created", False),
    "name": ("r.key", True),
    "parameters": ("l.parameters", False),
    "size": ("l.size", False),
}
# A table of an adapter's facts may not grow without end.
_MOST = 256


def add_index(db: sqlite3.Connection) -> None:
    """Schema 1 to 2: make the tables, and fill them from the facts that commits have."""
    for statement in _TABLES.split(";\n"):
        db.execute(statement)
    db.execute("INSERT INTO names (kind, key, repository) SELECT kind, key, id FROM repositories")
    rows = db.execute("SELECT repository, facts FROM commits")
    for number, facts in rows.fetchall():
        note_weights(db, number, json.loads(facts))
    for (number,) in db.execute("SELECT id FROM repositories").fetchall():
        index_head(db, number)


def note_weights(db: sqlite3.Connection, number: int, facts: Mapping[str, object]) -> None:
    """Remember what the tensors of a commit hash to, together."""
    if isinstance(weights := facts.get("weights"), str):
        db.execute("INSERT OR IGNORE INTO weights (weights, repository) VALUES (?, ?)", (weights, number))


def index_head(db: sqlite3.Connection, number: int) -> None:
    """Make the index say what `main` of a repository is. Part of the transaction that moved it."""
    for table in ("listed", "marks", "ranks", "shapes", "parents"):
        db.execute(f"DELETE FROM {table} WHERE repository = ?", (number,))
    row = db.execute(
        "SELECT c.id, c.facts, t.entries FROM refs JOIN commits c ON c.repository = refs.repository AND c.id = target "
        "JOIN trees t ON t.id = c.tree WHERE refs.repository = ? AND refs.name = ?",
        (number, _HEAD),
    ).fetchone()
    if row is None:
        return
    commit, facts, size = row[0], json.loads(row[1]), sum(entry[1] for entry in json.loads(row[2]))
    tags = tags_of(facts)
    db.execute(
        "INSERT INTO listed (repository, commit_id, tags, words, size, kind, family, parameters, weights) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            number,
            commit,
            json.dumps(tags),
            search_words(facts, tags),
            size,
            _text(facts.get("kind")),
            _text(facts.get("family")),
            _number(facts.get("parameters")),
            _text(facts.get("weights")),
        ),
    )
    marks = {tag.lower() for tag in tags}
    db.executemany("INSERT INTO marks (mark, repository) VALUES (?, ?)", [(mark, number) for mark in sorted(marks)])
    ranks = {rank for rank in _listed(facts, "ranks") if _number(rank) is not None}
    db.executemany("INSERT INTO ranks (rank, repository) VALUES (?, ?)", [(rank, number) for rank in sorted(ranks)])
    if facts.get("kind") == "adapter":
        shapes = {shape for shape in _listed(facts, "shapes") if isinstance(shape, str)}
        rows = [(number, shape) for shape in sorted(shapes)]
        db.executemany("INSERT INTO shapes (repository, shape) VALUES (?, ?)", rows)
    parents = [
        (number, at, parent.source.lower(), parent.relation, parent.weights)
        for at, parent in enumerate(parents_in(facts))
    ]
    db.executemany("INSERT INTO parents (repository, number, key, relation, weights) VALUES (?, ?, ?, ?, ?)", parents)


def _listed(facts: Mapping[str, object], key: str) -> list[Any]:
    value = facts.get(key)
    return value[:_MOST] if isinstance(value, list) else []


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _number(value: object) -> int | None:
    """A number that SQLite can hold."""
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63 else None


class SqliteIndex(Database):
    """The questions of `index.Index`."""

    def has_index(self) -> bool:
        """Whether the file has the tables; one of an earlier version has not, until somebody writes to it."""
        with self._look() as db:
            return db.execute("SELECT 1 FROM sqlite_master WHERE name = 'listed'").fetchone() is not None

    @contextlib.contextmanager
    def _ask(self) -> Iterator[sqlite3.Connection]:
        with self._look() as db:
            self._indexed = self._indexed or self.has_index()
            if not self._indexed:
                raise FormatError(
                    f"{self._path} is of an earlier version and has no index yet; whoever may write there makes it, "
                    "with `surgery hub reindex`."
                )
            yield db

    _indexed = False

    def select(self, query: ModelQuery, reader: Reader) -> Sequence[Entry]:
        where, values = _conditions(query, reader)
        column, ascending = _ORDER[query.sort]
        direction = "ASC" if (ascending if query.ascending is None else query.ascending) else "DESC"
        # What has no such number comes last, as SQLite has it from large to small. Names decide between equals, so that
        # pages do not overlap.
        absent = f"{column} IS NULL, " if column.startswith("l.") and direction == "ASC" else ""
        order = f"ORDER BY {absent}{column} {direction}, r.key"
        # The facts, which are long, only of those that the page shows.
        chosen = f"SELECT r.id {_CHOOSE} WHERE {where} {order} LIMIT ? OFFSET ?"
        with self._ask() as db:
            rows = db.execute(
                f"SELECT {_ROW} {_FROM} WHERE r.id IN ({chosen}) {order}", (*values, query.limit, query.begin)
            )
            return [_entry(row) for row in rows.fetchall()]

    def count(self, query: ModelQuery, reader: Reader) -> int:
        where, values = _conditions(query, reader)
        with self._ask() as db:
            (count,) = db.execute(f"SELECT COUNT(*) {_CHOOSE} WHERE {where}", values).fetchone()
        return int(count)

    def entry(self, name: RepositoryName, reader: Reader, kind: str = "model") -> Entry | None:
        with self._ask() as db:
            row = db.execute(
                f"SELECT {_ROW} {_FROM} JOIN names n ON n.repository = r.id WHERE n.kind = ? AND n.key = ?",
                (kind, name.key),
            ).fetchone()
        found = None if row is None else _entry(row)
        return found if found is not None and reader.may_read(found.repository) else None

    def edges(self, names: Collection[str], reader: Reader, up: bool) -> Sequence[Edge]:
        asked = json.dumps(sorted(names))
        chosen = "p.repository" if up else "{parent}"
        models = "SELECT id FROM repositories WHERE kind = 'model' AND key IN (SELECT value FROM json_each(?))"
        inside = f"{chosen} IN ({models})"
        by_name = inside.format(parent="n.repository")
        by_hash = inside.format(parent="w.repository")
        pairs = (
            "SELECT p.repository, n.repository, p.number, 0 FROM parents p JOIN names n "
            f"ON n.key = p.key AND n.kind = 'model' WHERE {by_name} "
            "UNION SELECT p.repository, w.repository, p.number, 1 FROM parents p JOIN weights w "
            f"ON w.weights = p.weights WHERE {by_hash}"
        )
        with self._ask() as db:
            found: dict[tuple[int, int, int], bool] = {}
            for child, parent, at, same in db.execute(pairs, (asked, asked)).fetchall():
                if child != parent:
                    found[child, parent, at] = found.get((child, parent, at), False) or bool(same)
            wanted = {number for child, parent, _ in found for number in (child, parent)}
            entries = {
                number: entry for number, entry in self._entries(db, wanted) if reader.may_read(entry.repository)
            }
            hashed = self._hashed(db, {parent for _, parent, _ in found})
        edges = []
        for (child, parent, at), same in sorted(found.items()):
            if child in entries and parent in entries and at < len(entries[child].parents):
                record = entries[child].parents[at]
                by = BY_HASH if same else OTHER_HASH if record.weights and parent in hashed else BY_NAME
                edges.append(Edge(entries[child], entries[parent], record, by))
        return edges

    def _entries(self, db: sqlite3.Connection, numbers: Iterable[int]) -> list[tuple[int, Entry]]:
        chosen = json.dumps(sorted(numbers))
        rows = db.execute(f"SELECT {_ROW} {_FROM} WHERE r.id IN (SELECT value FROM json_each(?))", (chosen,))
        return [(row[0], _entry(row)) for row in rows.fetchall()]

    def _hashed(self, db: sqlite3.Connection, numbers: Iterable[int]) -> set[int]:
        """Those repositories of which the hash of all weights is known, for some commit."""
        chosen = json.dumps(sorted(numbers))
        rows = db.execute(
            "SELECT DISTINCT repository FROM weights WHERE repository IN (SELECT value FROM json_each(?))", (chosen,)
        )
        return {number for (number,) in rows.fetchall()}

    def known_as(self, name: RepositoryName, kind: str = "model") -> Collection[str]:
        with self._ask() as db:
            rows = db.execute(
                "SELECT key FROM names WHERE kind = ? AND repository = "
                "(SELECT repository FROM names WHERE kind = ? AND key = ?)",
                (kind, kind, name.key),
            ).fetchall()
        return {key for (key,) in rows} | {name.key}

    def weights_of(self, name: RepositoryName, kind: str = "model") -> Collection[str]:
        with self._ask() as db:
            rows = db.execute(
                "SELECT weights FROM weights JOIN names USING (repository) WHERE kind = ? AND key = ?", (kind, name.key)
            ).fetchall()
        return {weights for (weights,) in rows}

    def keep_tensor_hashes(self, files: Mapping[str, Mapping[str, str]]) -> None:
        rows = [(sha256, json.dumps(hashes, sort_keys=True)) for sha256, hashes in sorted(files.items())]
        with self._change() as db:
            db.executemany("INSERT OR REPLACE INTO tensor_hashes (sha256, hashes) VALUES (?, ?)", rows)

    def tensor_hashes(self, sha256: str) -> Mapping[str, str] | None:
        with self._ask() as db:
            row = db.execute("SELECT hashes FROM tensor_hashes WHERE sha256 = ?", (sha256,)).fetchone()
        return None if row is None else json.loads(row[0])

    def outdated(self, version: int) -> Sequence[tuple[RepositoryName, str]]:
        with self._ask() as db:
            rows = db.execute(
                "SELECT DISTINCT r.namespace, r.name, c.id FROM refs "
                "JOIN repositories r ON r.id = refs.repository AND r.kind = 'model' "
                "JOIN commits c ON c.repository = r.id AND c.id = refs.target "
                "WHERE COALESCE(json_extract(c.facts, '$.version'), 0) < ? ORDER BY r.key, c.id",
                (version,),
            ).fetchall()
        return [(RepositoryName(namespace, name), commit) for namespace, name, commit in rows]

    def set_facts(self, name: RepositoryName, commit: str, facts: Mapping[str, object]) -> None:
        with self._change() as db:
            row = db.execute("SELECT id FROM repositories WHERE kind = 'model' AND key = ?", (name.key,)).fetchone()
            text = json.dumps(facts, sort_keys=True)
            values = (text, None if row is None else row[0], commit)
            if not db.execute("UPDATE commits SET facts = ? WHERE repository = ? AND id = ?", values).rowcount:
                raise InputError(f"{name} has no commit {commit}.")
            note_weights(db, row[0], facts)
            index_head(db, row[0])


def _entry(row: Any) -> Entry:
    _, kind, namespace, name, private, created, updated, commit, tree, facts, tags, size = row
    repository = Repository(RepositoryName(namespace, name), kind, bool(private), created, updated)
    if commit is None:
        return Entry(repository, None, None)
    return Entry(repository, commit, tree, json.loads(facts), tuple(json.loads(tags)), size)


def _conditions(query: ModelQuery, reader: Reader) -> tuple[str, list[object]]:
    """The WHERE clause of a query, and its values."""
    found: list[str] = ["r.kind = ?"]
    values: list[object] = [query.repositories]

    def add(condition: str, *more: object) -> None:
        found.append(condition)
        values.extend(more)

    _add_reader(reader, add)
    if query.author is not None:
        add("r.key >= ? AND r.key < ?", f"{query.author.lower()}/", f"{query.author.lower()}0")  # 0 follows the slash
    for text in query.search:
        add("(instr(r.key, ?) OR instr(l.words, ?))", text.lower(), text.lower())
    for tag in (*query.tags, *(f"target:{target}" for target in query.targets)):
        add("r.id IN (SELECT repository FROM marks WHERE mark = ?)", tag.lower())
    if query.kind is not None:
        add("l.kind = ?", query.kind)
    if query.family is not None:
        add("lower(l.family) = ?", query.family.lower())
    if query.weights is not None:
        add("l.weights = ?", query.weights)
    if not query.ranks.is_open:
        least, most = _ends(query.ranks.least, query.ranks.most)
        add("r.id IN (SELECT repository FROM ranks WHERE rank BETWEEN ? AND ?)", least, most)
    if not query.parameters.is_open:
        add("l.parameters BETWEEN ? AND ?", *_ends(query.parameters.least, query.parameters.most))
    for made in query.made_from:
        narrowed, more = ("", ()) if made.relation is None else (" AND relation = ?", (made.relation,))
        add(
            f"r.id IN (SELECT repository FROM parents WHERE key IN (SELECT value FROM json_each(?)){narrowed} "
            f"UNION SELECT repository FROM parents WHERE weights IN (SELECT value FROM json_each(?)){narrowed})",
            *(json.dumps(sorted(made.keys)), *more),
            *(json.dumps(sorted(made.weights)), *more),
        )
    if query.shapes is not None:
        add("l.kind = 'adapter' AND EXISTS (SELECT 1 FROM shapes s WHERE s.repository = r.id)")
        add(
            "NOT EXISTS (SELECT 1 FROM shapes s WHERE s.repository = r.id AND s.shape NOT IN "
            "(SELECT value FROM json_each(?)))",
            json.dumps(sorted(query.shapes)),
        )
    if query.names is not None:
        add("r.key IN (SELECT value FROM json_each(?))", json.dumps(sorted(query.names)))
    if query.private is not None:
        add("r.private = ?", query.private)
    return " AND ".join(found), values


def _ends(least: int | None, most: int | None) -> tuple[int, int]:
    limit = 2**63 - 1
    return min(least or 0, limit), min(limit if most is None else most, limit)


def _add_reader(reader: Reader, add: Callable[..., None]) -> None:
    """The same rule as `Reader.may_read`."""
    if reader.everything and reader.only is None:
        return
    member, values = "1", []
    if not reader.everything:
        member = "lower(r.namespace) IN (SELECT value FROM json_each(?))"
        values = [json.dumps(sorted(reader.namespaces))]
    if reader.only is not None:
        member += " AND r.key = ?"
        values.append(reader.only)
    add(f"(NOT r.private OR ({member}))", *values)
