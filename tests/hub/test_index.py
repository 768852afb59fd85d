"""The index: what it answers is what reading every repository answers, and it follows every change."""

from __future__ import annotations

import json
import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.errors import FormatError, OptionError
from surgery.hub.asking import parameter_span, rank_span
from surgery.hub.endpoint import LOCAL
from surgery.hub.facts import FACTS_VERSION
from surgery.hub.index import ANYBODY, OWNER, MadeFrom, ModelQuery, Reader, Span, made_from
from surgery.hub.interfaces import Commit
from surgery.hub.metadata import SqliteMetadata
from surgery.hub.naming import RepositoryName, parse_repository
from surgery.hub.push import PushOptions, push
from surgery.hub.reindexing import reindex
from surgery.hub.store import existing_registry, open_registry, tree_id
from tests.hub.registry_tools import adapter, entry

FILES = [entry("config.json", b"{}")]


def add(metadata: SqliteMetadata, name: str, number: int = 0, private: bool = False, **facts: Any) -> RepositoryName:
    """A repository with one commit of these facts."""
    repository = parse_repository(name)
    metadata.create(repository, "model", private, number)
    commit(metadata, repository, number, None, **facts)
    return repository


def commit(metadata: SqliteMetadata, name: RepositoryName, number: int, parent: str | None, **facts: Any) -> str:
    made = Commit(f"{number:040x}", parent, tree_id(FILES), "message", number, {"version": FACTS_VERSION, **facts})
    metadata.commit(name, "main", parent, made, FILES, lambda _: [])
    return made.id


@pytest.fixture
def metadata(tmp_path: Path) -> SqliteMetadata:
    return SqliteMetadata(tmp_path / "registry.sqlite")


def found(metadata: SqliteMetadata, reader: Reader = OWNER, **query: Any) -> list[str]:
    return [item.name for item in metadata.select(ModelQuery(**{"sort": "name", **query}), reader)]


# It is what reading everything gives ----------------------------------------------------------------------------------

_NAMES = st.sampled_from(["a/one", "A/two", "b/one", "b/three", "c/four", "alone"])
_FACTS = st.fixed_dictionaries(
    {},
    optional={
        "kind": st.sampled_from(["adapter", "dense", "moe"]),
        "family": st.sampled_from(["llama", "gpt2"]),
        "parameters": st.integers(0, 2**70),
        "ranks": st.lists(st.integers(1, 64), max_size=3),
        "targets": st.lists(st.sampled_from(["q_proj", "v_proj"]), max_size=2, unique=True),
        "shapes": st.lists(st.sampled_from(["8x4", "8x8"]), max_size=2, unique=True),
        "weights": st.sampled_from(["x" * 64, "y" * 64]),
        "card": st.just({"tags": ["Blue"], "license": "mit"}),
        "parents": st.lists(
            st.fixed_dictionaries(
                {"source": _NAMES, "role": st.just("base"), "relation": st.sampled_from(["adapter", "merge"])},
                optional={"weights": st.sampled_from(["x" * 64, "y" * 64])},
            ),
            max_size=2,
        ),
    },
)
_QUERIES = st.fixed_dictionaries(
    {},
    optional={
        "search": st.tuples(st.sampled_from(["one", "LLAMA", "blue", "a/", "q_proj"])),
        "author": st.sampled_from(["a", "B", "c", "al"]),
        "tags": st.tuples(st.sampled_from(["lora", "blue", "license:mit", "rank:8", "adapter"])),
        "kind": st.sampled_from(["adapter", "dense"]),
        "family": st.just("Llama"),
        "ranks": st.builds(Span, st.integers(1, 64), st.none() | st.integers(1, 64)),
        "parameters": st.builds(Span, st.none() | st.integers(0, 2**70), st.integers(0, 2**70)),
        "targets": st.just(("q_proj",)),
        "shapes": st.just(("8x4",)),
        "weights": st.just("x" * 64),
        "names": st.just({"a/one", "alone"}),
        "private": st.booleans(),
        "made_from": st.tuples(
            st.builds(
                MadeFrom,
                st.just(frozenset({"a/one"})),
                st.sampled_from([frozenset(), frozenset({"y" * 64})]),
                st.sampled_from([None, "merge"]),
            )
        ),
    },
)
_READERS = st.builds(
    Reader,
    st.booleans(),
    st.sampled_from([frozenset(), frozenset({"a"}), frozenset({"a", "b"})]),
    st.sampled_from([None, "a/one", "b/one"]),
)


def expected(item: Any, reader: Reader, q: dict[str, Any]) -> bool:
    """The same conditions, in Python, on an entry."""
    facts, key = item.facts, item.repository.name.key
    words = "\n".join([*item.tags, str(facts.get("family") or "")]).lower()
    number = facts.get("parameters")
    number = number if number is not None and number < 2**63 else None
    limit = 2**63 - 1
    checks = {
        "search": lambda v: all(text.lower() in key or text.lower() in words for text in v),
        "author": lambda v: item.repository.name.namespace.lower() == v.lower(),
        "tags": lambda v: {tag.lower() for tag in v} <= {tag.lower() for tag in item.tags},
        "kind": lambda v: facts.get("kind") == v,
        "family": lambda v: facts.get("family") == v.lower(),
        "ranks": lambda v: any((v.least or 0) <= r <= (v.most or limit) for r in facts.get("ranks", [])),
        "parameters": lambda v: number is not None and min(v.least or 0, limit) <= number <= min(v.most, limit),
        "targets": lambda v: set(v) <= set(facts.get("targets", [])),
        "shapes": lambda v: facts.get("kind") == "adapter" and set() < set(facts.get("shapes", ())) <= set(v),
        "weights": lambda v: facts.get("weights") == v,
        "names": lambda v: key in v,
        "private": lambda v: item.repository.private == v,
        "made_from": lambda v: all(
            any(
                (p.source.lower() in made.keys or p.weights in made.weights)
                and made.relation in (None, p.relation)
                for p in item.parents
            )
            for made in v
        ),
    }  # fmt: skip
    return reader.may_read(item.repository) and all(checks[name](value) for name, value in q.items())


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(_NAMES, st.booleans(), _FACTS), max_size=6, unique_by=lambda t: t[0]), _QUERIES, _READERS)
def test_it_answers_what_reading_everything_answers(
    repositories: list[tuple[str, bool, dict[str, Any]]], query: dict[str, Any], reader: Reader
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _compare(SqliteMetadata(Path(folder) / "registry.sqlite"), repositories, query, reader)


def _compare(
    metadata: SqliteMetadata,
    repositories: list[tuple[str, bool, dict[str, Any]]],
    query: dict[str, Any],
    reader: Reader,
) -> None:
    for number, (name, private, facts) in enumerate(repositories):
        add(metadata, name, number, private, **facts)
    everything = metadata.select(ModelQuery(sort="name"), OWNER)
    assert [item.name.lower() for item in everything] == sorted(name.lower() for name, _, _ in repositories)
    wanted = [item.name for item in everything if expected(item, reader, query)]
    assert found(metadata, reader, **query) == wanted
    assert metadata.count(ModelQuery(**query), reader) == len(wanted)
    for sort in ("updated", "created", "parameters", "size"):
        pages = [
            item.name
            for begin in range(len(wanted) + 1)
            for item in metadata.select(ModelQuery(**query, sort=sort, begin=begin, limit=1), reader)
        ]
        assert sorted(pages) == sorted(wanted)
    metadata.close()


# It follows what happens ----------------------------------------------------------------------------------------------


def test_it_follows_commits_moves_and_deletion(metadata: SqliteMetadata) -> None:
    name = add(metadata, "lab/one", 1, kind="adapter", ranks=[8], weights="x" * 64)
    assert found(metadata, tags=("rank:8",)) == ["lab/one"]
    commit(metadata, name, 2, f"{1:040x}", kind="adapter", ranks=[16], weights="y" * 64)
    assert found(metadata, tags=("rank:8",)) == []
    assert found(metadata, tags=("rank:16",)) == ["lab/one"]
    assert metadata.weights_of(name) == {"x" * 64, "y" * 64}
    metadata.move(name, parse_repository("lab/two"), "model")
    assert found(metadata, tags=("rank:16",)) == ["lab/two"]
    assert metadata.known_as(parse_repository("lab/two")) == {"lab/one", "lab/two"}
    former = metadata.entry(name, OWNER)
    assert former is not None
    assert former.name == "lab/two"
    metadata.set_ref(parse_repository("lab/two"), "refs/heads/main", f"{2:040x}", f"{1:040x}")
    assert found(metadata, tags=("rank:8",)) == ["lab/two"]
    metadata.delete(parse_repository("lab/two"))
    assert found(metadata) == []
    assert metadata.entry(name, OWNER) is None
    with sqlite3.connect(metadata._path) as db:
        for table in ("listed", "marks", "ranks", "shapes", "parents", "weights", "names"):
            assert db.execute(f"SELECT COUNT(*) FROM {table}").fetchone() == (0,), table
    db.close()


def test_a_commit_that_fails_leaves_the_index_as_it_was(metadata: SqliteMetadata) -> None:
    name = add(metadata, "lab/one", 1, kind="adapter", ranks=[8])
    with pytest.raises(Exception, match="is at"):
        commit(metadata, name, 3, "f" * 40, kind="moe")
    assert found(metadata, kind="adapter") == ["lab/one"]
    assert found(metadata, kind="moe") == []


def test_a_name_that_another_takes_is_no_former_name(metadata: SqliteMetadata) -> None:
    old, new = parse_repository("lab/old"), parse_repository("lab/new")
    add(metadata, "lab/old", 1)
    metadata.move(old, new, "model")
    add(metadata, "lab/old", 2)
    assert metadata.known_as(new) == {"lab/new"}
    assert made_from(metadata, old, OWNER).keys == {"lab/old"}


def test_what_may_not_be_read_is_known_by_its_name_only(metadata: SqliteMetadata) -> None:
    name = add(metadata, "lab/one", 1, private=True, weights="x" * 64)
    metadata.move(name, parse_repository("lab/two"), "model")
    assert made_from(metadata, parse_repository("lab/two"), ANYBODY) == MadeFrom(frozenset({"lab/two"}))
    assert made_from(metadata, name, ANYBODY) == MadeFrom(frozenset({"lab/one"}))
    member = Reader(namespaces=frozenset({"lab"}))
    assert made_from(metadata, name, member) == MadeFrom(frozenset({"lab/one", "lab/two"}), frozenset({"x" * 64}))


# Older files ----------------------------------------------------------------------------------------------------------


def downgrade(root: Path) -> None:
    """Make a registry what the version before the index would have left: without its tables, with plainer facts."""
    with sqlite3.connect(root / "registry.sqlite") as db:
        index = ("listed", "marks", "ranks", "shapes", "parents", "weights", "names", "tensor_hashes")
        for table in (*index, "gates", "access", "events", "discussions", "scans"):
            db.execute(f"DROP TABLE {table}")
        db.execute("DROP INDEX repositories_by_time")
        for identity, text in db.execute("SELECT id, facts FROM commits").fetchall():
            facts = json.loads(text)
            kept = {key: facts[key] for key in ("kind", "base", "ranks", "targets", "parameters") if key in facts}
            db.execute("UPDATE commits SET facts = ? WHERE id = ?", (json.dumps(kept), identity))
        db.execute("PRAGMA user_version = 1")
    db.close()


@pytest.mark.parametrize("writable", [True, False])
def test_an_older_registry_is_indexed_when_it_is_opened(tmp_path: Path, writable: bool) -> None:
    root = tmp_path / "registry"
    push(adapter(tmp_path / "style"), "lab/style", LOCAL, PushOptions(), root)
    downgrade(root)
    with existing_registry(root, writable) or pytest.fail("gone") as registry:
        (known,) = registry.metadata.select(ModelQuery(kind="adapter"), OWNER)
        assert "base_model:adapter:lab/base" in known.tags
        assert "version" not in known.facts
    report = reindex(root)
    assert (report.examined, report.changed, report.failed) == (1, 1, ())
    with open_registry(root) as registry:
        (known,) = registry.metadata.select(ModelQuery(kind="adapter"), OWNER)
        assert known.facts["version"] == FACTS_VERSION
        assert known.weights
    assert reindex(root).examined == 0
    assert (reindex(root, everything=True).examined, reindex(root, everything=True).changed) == (1, 0)


def test_an_older_registry_that_may_not_be_written_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "registry"
    push(adapter(tmp_path / "style"), "lab/style", LOCAL, PushOptions(), root)
    downgrade(root)
    monkeypatch.setattr(SqliteMetadata, "_bring_up_to_date", lambda _: None)
    with existing_registry(root) or pytest.fail("gone") as registry:
        assert registry.metadata.find(parse_repository("lab/style")) is not None
        with pytest.raises(FormatError, match=r"of an earlier version and has no index yet; whoever may write there"):
            registry.metadata.select(ModelQuery(), OWNER)


# Ranges ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("16", Span(16, 16)),
        ("8..64", Span(8, 64)),
        ("8..", Span(8, None)),
        ("..64", Span(None, 64)),
        (" 4", Span(4, 4)),
    ],
)
def test_ranks(text: str, span: Span) -> None:
    assert rank_span(text) == span


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("min:1M,max:2B", Span(10**6, 2 * 10**9)),
        ("max:0.5b", Span(None, 500_000_000)),
        ("min:1500", Span(1500, None)),
        ("min:0.0015K", Span(2, None)),
        ("max:0.0015K", Span(None, 1)),
        ("min:6T", Span(6 * 10**12, None)),
    ],
)
def test_parameters(text: str, span: Span) -> None:
    assert parameter_span(text) == span


@given(st.text(max_size=30))
def test_any_text_is_a_range_or_refused_in_a_sentence(text: str) -> None:
    for parse, sentence in ((rank_span, "The rank is "), (parameter_span, "num_parameters is ")):
        found = parsed_or_sentence(parse, text)
        assert found.startswith(sentence) if isinstance(found, str) else not found.is_open


def parsed_or_sentence(parse: Callable[[str], Span], text: str) -> Span | str:
    try:
        return parse(text)
    except OptionError as error:
        return error.message


@given(st.none() | st.integers(0, 10**6), st.none() | st.integers(0, 10**6))
def test_ranges_go_there_and_back(least: int | None, most: int | None) -> None:
    if least is None and most is None:
        return
    text = f"{'' if least is None else least}..{'' if most is None else most}"
    assert rank_span(text) == Span(least, most)
    parts = [f"{name}:{end}" for name, end in (("min", least), ("max", most)) if end is not None]
    assert parameter_span(",".join(parts)) == Span(least, most)
