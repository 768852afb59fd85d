"""The embedded registry: what is committed is there whole, for every process, after every kill."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from surgery.errors import FormatError, InputError, OptionError, OutputError
from surgery.hub.collecting import collect
from surgery.hub.content import LocalContent
from surgery.hub.interfaces import ConflictError, ContentMissingError
from surgery.hub.naming import parse_repository
from surgery.hub.store import Registry, existing_registry, open_registry, registry_path
from tests.hub.registry_tools import assert_sound, contents, entry, put
from tests.tools import as_nobody, own_disk

NAME = parse_repository("lab/style")


def commit(registry: Registry, files: dict[str, bytes], name: str = "lab/style", branch: str = "main") -> str:
    """Commit files on top of a branch; returns the commit."""
    repository = parse_repository(name)
    registry.create(repository)
    for data in files.values():
        put(registry, data)
    head = registry.head(repository, branch)
    entries = [entry(path, data) for path, data in files.items()]
    return registry.commit(repository, branch, head.commit.id if head else None, entries, "message", {}).id


@pytest.fixture
def registry(own_registry: Path) -> Registry:
    return open_registry()


# Reading and writing --------------------------------------------------------------------------------------------------


def test_the_registry_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SURGERY_REGISTRY", str(tmp_path / "here"))
    assert registry_path() == tmp_path / "here"
    monkeypatch.delenv("SURGERY_REGISTRY")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert registry_path() == tmp_path / "data" / "checkpoint-surgery" / "registry"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert registry_path() == tmp_path / ".local" / "share" / "checkpoint-surgery" / "registry"


def test_looking_makes_nothing(own_registry: Path) -> None:
    assert existing_registry() is None
    assert not own_registry.exists()


def test_a_commit_is_found_by_branch_tag_id_and_its_beginning(registry: Registry) -> None:
    first = commit(registry, {"a": b"1"})
    second = commit(registry, {"a": b"2"})
    other = commit(registry, {"a": b"3"}, branch="v2")
    registry.metadata.set_ref(NAME, "refs/tags/old", None, first)
    for revision, expected in {
        None: second, "main": second, "v2": other, "old": first, first: first, first[:7]: first,
        "refs/heads/main": second, "refs/tags/old": first,
    }.items():  # fmt: skip
        assert registry.find(NAME, revision).commit.id == expected
    for revision in ("v3", first[:6], "0" * 40, "f" * 7):
        with pytest.raises(InputError, match=rf"^lab/style in the registry at .* has no revision '{revision}'\.$"):
            registry.find(NAME, revision)
    assert [c.id for c in registry.metadata.history(NAME, second)] == [second, first]
    assert assert_sound(registry) == 4


def test_letter_case_is_kept_and_does_not_tell_names_apart(registry: Registry) -> None:
    commit(registry, {"a": b"1"}, "Lab/Style")
    found = registry.find(parse_repository("lab/STYLE"))
    assert str(found.repository.name) == "Lab/Style"
    assert str(registry.create(parse_repository("lab/style")).name) == "Lab/Style"
    with pytest.raises(ConflictError, match=r"^There is a model called Lab/Style already\.$"):
        registry.metadata.create(parse_repository("LAB/style"), "model", False, 0)
    assert registry.metadata.find(parse_repository("style")) is None


def test_a_name_alone_is_a_name(registry: Registry) -> None:
    commit(registry, {"a": b"1"}, "style")
    assert str(registry.find(parse_repository("style")).repository.name) == "style"


def test_the_same_content_is_stored_once_and_read_only(registry: Registry) -> None:
    commit(registry, {"a": b"same", "b": b"same"}, "lab/one")
    commit(registry, {"c": b"same"}, "lab/two")
    ((sha256, size, _),) = registry.content.list()
    assert (sha256, size) == (hashlib.sha256(b"same").hexdigest(), 4)
    path = registry.content.path(sha256)
    assert path is not None
    assert stat.S_IMODE(path.stat().st_mode) == 0o444


def test_a_branch_moves_only_from_where_it_is(registry: Registry) -> None:
    """Compare and swap: a stale parent is refused, and changes nothing."""
    first = commit(registry, {"a": b"1"})
    second = commit(registry, {"a": b"2"})
    put(registry, b"3")
    for expected in (first, None):
        with pytest.raises(ConflictError, match=r"^refs/heads/main of lab/style is at \w{40}, expected .+\.$"):
            registry.commit(NAME, "main", expected, [entry("a", b"3")], "stale", {})
    assert registry.find(NAME).commit.id == second
    with pytest.raises(ConflictError):
        registry.metadata.set_ref(NAME, "refs/tags/v1", first, second)
    with pytest.raises(InputError, match=r"^lab/style has no commit 0{40}\.$"):
        registry.metadata.set_ref(NAME, "refs/tags/v1", None, "0" * 40)
    registry.metadata.set_ref(NAME, "refs/tags/v1", None, second)
    registry.metadata.set_ref(NAME, "refs/tags/v1", second, None)
    assert list(registry.metadata.refs(NAME)) == ["refs/heads/main"]


def test_a_commit_of_content_that_is_not_there_is_refused(registry: Registry) -> None:
    registry.create(NAME)
    with pytest.raises(ContentMissingError) as error:
        registry.commit(NAME, "main", None, [entry("a", b"never brought in")], "message", {})
    assert error.value.missing == (hashlib.sha256(b"never brought in").hexdigest(),)
    assert registry.head(NAME, "main") is None


@pytest.mark.parametrize("branch", ["a..b", "-x", "", "a" * 300, "0123456789" * 4])
def test_a_branch_needs_a_name_for_one(registry: Registry, branch: str) -> None:
    registry.create(NAME)
    with pytest.raises(OptionError, match="is not a name for a branch: it "):
        registry.commit(NAME, branch, None, [], "message", {})


def test_a_snapshot_links_to_the_content_and_comes_back(registry: Registry) -> None:
    """It is a view: it may be deleted at any time, and a folder moved elsewhere keeps it."""
    commit(registry, {"a": b"1", "deep/er/b": b"2"})
    found = registry.find(NAME)
    place = registry.snapshot(found)
    assert {p.relative_to(place).as_posix(): p.read_bytes() for p in place.rglob("*") if p.is_file()} == {
        "a": b"1",
        "deep/er/b": b"2",
    }
    assert (place / "a").is_symlink()
    assert registry.snapshot(found) == place
    shutil.rmtree(place)
    assert (registry.snapshot(found) / "deep" / "er" / "b").read_bytes() == b"2"
    moved = registry.root.with_name("moved")
    registry.root.rename(moved)
    assert (moved / "snapshots" / found.commit.tree / "a").read_bytes() == b"1"


def test_lost_content_is_said_in_a_sentence(registry: Registry) -> None:
    commit(registry, {"a": b"1"})
    registry.content.remove(hashlib.sha256(b"1").hexdigest())
    with pytest.raises(FormatError, match=r"has lost the content of a of lab/style; push it again, or restore it"):
        registry.snapshot(registry.find(NAME))


def test_a_registry_that_may_only_be_read_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The links then lie in the user's cache."""
    with as_nobody() as place:
        monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        registry = open_registry(place / "registry")
        commit(registry, {"a": b"1"})
        for path in (place / "registry", *(place / "registry").rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        found = existing_registry(place / "registry")
        assert found is not None
        snapshot = found.snapshot(found.find(NAME))
        assert snapshot.is_relative_to(place / "cache")
        assert (snapshot / "a").read_bytes() == b"1"
        with pytest.raises(OutputError, match=r"cannot be (used|written)"):
            commit(found, {"a": b"2"})


# Files that are not what they should be -------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 2}'])
def test_a_registry_of_another_format_is_refused(registry: Registry, content: str) -> None:
    (registry.root / "registry.json").write_text(content)
    with pytest.raises(FormatError, match=r"^.*\.registry is (not a registry|a registry of format)"):
        existing_registry()
    with pytest.raises(FormatError):
        open_registry()


def test_a_damaged_database_is_said_in_a_sentence(registry: Registry) -> None:
    commit(registry, {"a": b"1"})
    (registry.root / "registry.sqlite").write_bytes(b"no database at all, but as long as one has to be " * 30)
    with pytest.raises(FormatError, match=r"registry\.sqlite is damaged \(.+\); restore it from a backup\.$"):
        existing_registry()


def test_a_database_of_another_schema_is_refused(registry: Registry) -> None:
    import sqlite3

    with sqlite3.connect(registry.root / "registry.sqlite") as db:
        db.execute("PRAGMA user_version = 9")
    db.close()
    with pytest.raises(FormatError, match=r"has schema 9, expected 3; use the version of this tool that made it\.$"):
        open_registry()


# Deletion and collection ----------------------------------------------------------------------------------------------


def test_deleting_removes_what_no_other_repository_has(registry: Registry) -> None:
    commit(registry, {"a": b"shared", "b": b"own"}, "lab/one")
    commit(registry, {"a": b"later"}, "lab/one")
    commit(registry, {"x": b"shared"}, "lab/two")
    place = registry.snapshot(registry.find(parse_repository("lab/one")))
    assert registry.delete(parse_repository("LAB/one")) == len(b"own") + len(b"later")
    assert contents(registry) == {hashlib.sha256(b"shared").hexdigest()}
    assert not place.exists()
    with pytest.raises(InputError, match=r"^There is no model called lab/one in the registry"):
        registry.find(parse_repository("lab/one"))
    assert assert_sound(registry) == 1


def test_content_on_its_way_survives_a_collection(registry: Registry) -> None:
    """What nobody refers to is kept for the time of grace, from when it was last wanted."""
    young, old = put(registry, b"young"), put(registry, b"old")
    path = registry.content.path(old)
    assert path is not None
    os.utime(path, (0, 0))
    assert collect(registry, None, 3600).freed_bytes == 3
    assert contents(registry) == {young}
    assert registry.content.touch(young)
    assert not registry.content.touch(old)
    assert collect(registry, None, -1).freed_bytes == 5


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("push"),
            st.sampled_from(["lab/a", "LAB/A", "lab/b", "c"]),
            st.dictionaries(st.sampled_from(["x", "y", "d/z"]), st.sampled_from([b"", b"1", b"22", b"33"]), min_size=1),
        ),
        st.tuples(st.just("delete"), st.sampled_from(["lab/a", "lab/b", "C"]), st.none()),
        st.tuples(st.just("collect"), st.none(), st.none()),
    ),
    max_size=8,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(OPERATIONS)
def test_a_registry_holds_what_a_dictionary_would(operations: list[tuple[str, str, dict[str, bytes]]]) -> None:
    """Pushes, deletions and collections in any order leave the newest files of each name, and nobody else's content."""
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # fsync costs nothing there
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        registry = open_registry(Path(folder))
        model: dict[str, list[dict[str, bytes]]] = {}
        for what, name, files in operations:
            if what == "push":
                commit(registry, files, name)
                model.setdefault(name.lower(), []).append(files)
            elif what == "delete" and name.lower() in model:
                registry.delete(parse_repository(name))
                del model[name.lower()]
            elif what == "collect":
                collect(registry, None, -1)
        assert {repository.name.key for repository in registry.metadata.repositories()} == set(model)
        for key, states in model.items():
            found = registry.find(parse_repository(key))
            place = registry.snapshot(found)
            assert {file.path: (place / file.path).read_bytes() for file in found.files} == states[-1]
            history = list(registry.metadata.history(found.repository.name, found.commit.id))
            assert len(history) == len(states)
        collect(registry, None, -1)
        held = {hashlib.sha256(data).hexdigest() for states in model.values() for s in states for data in s.values()}
        assert contents(registry) == held
        assert_sound(registry)


# Kills, and several processes -----------------------------------------------------------------------------------------

_PUSHER = """
import sys
from pathlib import Path
from tests.hub.test_store import commit
from surgery.hub.store import open_registry
from surgery.hub.interfaces import ConflictError
who, count = sys.argv[1], int(sys.argv[2])
registry = open_registry()
print("ready", flush=True)
for number in range(count):
    data = f"{who} {number} ".encode() * 20000
    while True:
        try:
            commit(registry, {"weights": data, "name": who.encode()})
            break
        except ConflictError:
            pass
    print(number, flush=True)
"""


def start(who: str, count: int) -> subprocess.Popen[str]:
    """A process that commits `count` times to one branch, each time again until it is its turn."""
    return subprocess.Popen([sys.executable, "-c", _PUSHER, who, str(count)], stdout=subprocess.PIPE, text=True)


def test_two_processes_at_once_lose_nothing(registry: Registry) -> None:
    """Every commit of both is in one line of history."""
    count = 12
    processes = [start(who, count) for who in ("one", "two")]
    assert [process.wait(120) for process in processes] == [0, 0]
    for process in processes:
        assert process.stdout is not None
        process.stdout.close()
    assert assert_sound(registry) == 2 * count
    assert not list((registry.root / "incoming").iterdir())


@pytest.mark.slow
def test_kill_at_any_moment_leaves_a_sound_registry(registry: Registry) -> None:
    """What was reported as committed is there, what was not is there whole or not at all, and nothing is left over."""
    randomly = random.Random(7)
    reported = 0
    for round_ in range(5):
        process = start(f"round {round_}", 1000)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        if round_ % 2:  # some are killed before their first commit, and some after it
            assert process.stdout.readline() == "0\n"
            reported += 1
        time.sleep(randomly.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        reported += len(process.stdout.read().splitlines())
        process.wait()
        process.stdout.close()
        again = open_registry()
        assert reported <= assert_sound(again) <= reported + round_ + 1
        assert not list(again.root.glob("incoming/*"))
    commit(open_registry(), {"weights": b"afterwards"})
    assert reported


def test_a_leftover_is_removed_and_a_file_on_its_way_is_not(registry: Registry) -> None:
    """The lock tells them apart."""
    leftover = registry.root / "incoming" / "left"
    leftover.parent.mkdir(exist_ok=True)
    leftover.write_bytes(b"half of somethi")
    with registry.content.receive() as incoming:
        incoming.write(memoryview(b"whole"))
        other = open_registry()
        assert not leftover.exists()
        assert len(list((registry.root / "incoming").iterdir())) == 1
        incoming.keep(hashlib.sha256(b"whole").hexdigest())
    assert contents(other) == {hashlib.sha256(b"whole").hexdigest()}


def test_content_that_is_not_kept_is_gone(registry: Registry) -> None:
    def give_up() -> None:
        with registry.content.receive() as incoming:
            incoming.write(memoryview(b"x" * 100))
            raise KeyError

    with pytest.raises(KeyError):
        give_up()
    assert contents(registry) == set()
    assert not list((registry.root / "incoming").iterdir())


def test_threads_of_one_process_share_a_registry(registry: Registry) -> None:
    """Each commits to a repository of its own."""

    def work(number: int) -> None:
        for step in range(5):
            commit(registry, {"a": f"{number} {step}".encode()}, f"lab/n{number}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert assert_sound(registry) == 20


def test_a_full_disk_is_said_in_a_sentence() -> None:
    """Nothing of the content stays, and the registry goes on afterwards."""
    with own_disk(2) as disk:
        registry = open_registry(disk / "registry")
        with pytest.raises(OutputError) as error:
            put(registry, b"x" * 3_000_000)
        assert str(error.value) == (
            f"The disk is full: nothing was added to the registry at {disk / 'registry'}; free some space and try "
            "again."
        )
        assert contents(registry) == set()
        assert not list((registry.root / "incoming").iterdir())
        commit(registry, {"a": b"small"})
        filler = disk / "filler"
        with pytest.raises(OSError, match="No space"):
            filler.write_bytes(b"x" * 3_000_000)
        with pytest.raises(OutputError, match=r"^The disk is full"):  # noqa: PT012 - at whichever write it may be
            for number in range(2000):
                commit(registry, {"a": b"small", "b": str(number).encode()})
        filler.unlink()
        assert_sound(registry)
        commit(registry, {"a": b"small again"})
        registry.close()


def test_a_hash_is_never_part_of_a_path_unless_it_is_one(tmp_path: Path) -> None:
    for hostile in ("../../x", "", "g" * 64, "A" * 64, "a" * 63 + "/"):
        with pytest.raises(ValueError, match="is no SHA-256"):
            LocalContent(tmp_path).path(hostile)


def test_the_tree_is_kept_as_json_that_anyone_can_read(registry: Registry) -> None:
    """The layout is part of the format: see docs/hub.md."""
    import sqlite3

    commit(registry, {"b": b"2", "a": b"1"})
    db = sqlite3.connect(registry.root / "registry.sqlite")
    (text,) = db.execute("SELECT entries FROM trees").fetchone()
    db.close()
    assert json.loads(text) == [
        ["a", 1, hashlib.sha256(b"1").hexdigest(), hashlib.sha1(b"blob 1\x001").hexdigest(), False],
        ["b", 1, hashlib.sha256(b"2").hexdigest(), hashlib.sha1(b"blob 1\x002").hexdigest(), False],
    ]


def test_a_folder_of_an_older_schema_is_taken_further(own_registry: Path) -> None:
    """Who writes adds what is new; who only reads leaves the file as it is."""
    registry = open_registry(own_registry)
    head = commit(registry, {"a.txt": b"a"})
    registry.close()
    database = own_registry / "registry.sqlite"
    with contextlib.closing(sqlite3.connect(database)) as db:
        for table in ("gates", "access", "events", "discussions", "scans"):
            db.execute(f"DROP TABLE {table}")
        db.execute("PRAGMA user_version = 2")
        before = set(db.execute("SELECT name FROM sqlite_master").fetchall())
    reader = existing_registry(own_registry)
    assert reader is not None
    assert reader.find(NAME).commit.id == head
    reader.close()
    with contextlib.closing(sqlite3.connect(database)) as db:
        assert set(db.execute("SELECT name FROM sqlite_master").fetchall()) == before
    several = [threading.Thread(target=lambda: open_registry(own_registry).close()) for _ in range(4)]
    for thread in several:
        thread.start()
    for thread in several:
        thread.join()
    registry = open_registry(own_registry)
    assert registry.find(NAME).commit.id == head
    assert_sound(registry)
    registry.close()
    with contextlib.closing(sqlite3.connect(database)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (3,)
        assert ("discussions",) in db.execute("SELECT name FROM sqlite_master").fetchall()
