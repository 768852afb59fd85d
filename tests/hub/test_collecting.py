"""`hub gc` removes what nothing refers to and clients have forgotten, nothing else, whatever goes on meanwhile."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from surgery.errors import FormatError, InputError, OptionError, OutputError, SurgeryError
from surgery.hub.collecting import CLIENTS_REMEMBER, Collected, GcOptions, GcReport, collect, gc
from surgery.hub.content import LocalContent
from surgery.hub.interfaces import FileEntry
from surgery.hub.locking import tidying
from surgery.hub.naming import parse_repository
from surgery.hub.server.accounts import SqliteAccounts
from surgery.hub.server.placing import Finder, keep_xorb
from surgery.hub.server.registering import register
from surgery.hub.store import open_registry, registry_path
from surgery.hub.transfer import lfs_pointer_oid
from surgery.hub.xet import hashes
from surgery.hub.xet.repeats import Sieve
from surgery.hub.xet.xorbs import XorbParser
from tests.hub.registry_tools import assert_sound, contents, put
from tests.hub.test_store import commit
from tests.hub.xet_tools import Described, nodes, shard, xorb

HOLDERS = ("ada",)
DAY = 86_400
COUNT = 40


def made(seed: int, count: int = 12) -> list[bytes]:
    rng = random.Random(seed)
    return [rng.randbytes(rng.randint(200, 900)) for _ in range(count)]


class Folder:
    """A registry that a server has served, without a server."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.registry = open_registry(root)
        self.index = SqliteAccounts(root / "server.sqlite")

    @property
    def content(self) -> LocalContent:
        assert isinstance(self.registry.content, LocalContent)
        return self.registry.content

    def xorb(self, chunks: list[bytes]) -> bytes:
        digest, data = xorb(chunks)
        with self.content.receive() as incoming:
            sieve = Sieve(incoming.write, Finder(self.content, self.index, HOLDERS))
            parser = XorbParser(sieve.take)
            parser.feed(data)
            keep_xorb(self.content, self.index, incoming, sieve, parser.finish(digest), HOLDERS)
        return digest

    def file(self, chunks: list[bytes]) -> str:
        """Bring a file in as a xorb and a shard."""
        self.xorb(chunks)
        sha256 = hashlib.sha256(b"".join(chunks)).hexdigest()
        described = Described([(xorb(chunks)[0], chunks, 0, len(chunks))], sha256)
        register(self.content, self.index, shard([described]), HOLDERS, HOLDERS, lambda _: None)
        return sha256

    def commit(self, name: str, *sums: str) -> None:
        """A commit of contents that are stored."""
        repository = self.registry.create(parse_repository(name)).name
        head = self.registry.head(repository, "main")
        files = []
        for number, sha256 in enumerate(sums):
            size = self.content.size(sha256)
            assert size is not None
            files.append(FileEntry(f"{number}.safetensors", size, sha256, lfs_pointer_oid(sha256, size), True))
        self.registry.commit(repository, "main", head.commit.id if head else None, files, "c", {})

    def age(self, days: float) -> None:
        """Everything is older now."""
        for place in ("blobs", "recipes", "xorbs"):
            for path in (self.root / place).rglob("*"):
                if path.is_file():
                    then = path.stat().st_mtime - days * DAY
                    os.utime(path, (then, then))
        with self.index._change() as db:
            db.execute("UPDATE xorbs SET touched = touched - ?", (days * DAY,))

    def collect(self, days: float = 28, dry_run: bool = False) -> GcReport:
        return collect(self.registry, self.index, days * DAY, dry_run)

    def xorbs(self) -> set[bytes]:
        return {digest for file in self.content.xorbs() if (digest := hashes.digest_of(file.name)) is not None}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "data")


def part(report: GcReport, kind: str) -> Collected:
    (found,) = (part for part in report.parts if part.kind == kind)
    return found


def test_what_is_referred_to_stays_and_the_rest_goes_after_the_grace(folder: Folder) -> None:
    kept, dropped = made(1), made(2)
    sums = folder.file(kept), folder.file(dropped)
    folder.commit("lab/kept", sums[0])
    small = put(folder.registry, b"nobody's")
    # All of it is young.
    folder.age(27)
    report = folder.collect()
    assert report.freed_bytes == 0
    assert (part(report, "content").kept, part(report, "xorbs").kept) == (2, 0)
    assert part(report, "content").kept_bytes == folder.content.stored(sums[1]) + len(b"nobody's")
    folder.age(2)
    # A dry run says what a run then does.
    dry = folder.collect(dry_run=True)
    assert folder.content.size(sums[1]) is not None
    report = folder.collect()
    assert [vars(part) for part in dry.parts] == [vars(part) for part in report.parts]
    assert part(report, "content").removed == 2
    assert part(report, "xorbs").removed == 1
    assert part(report, "xorbs").removed_bytes > sum(map(len, dropped))
    assert not report.forgotten
    assert contents(folder.registry) == {sums[0]}
    assert folder.xorbs() == {xorb(kept)[0]}
    assert folder.content.size(small) is None
    # Nothing is on record of what is gone.
    assert folder.index.contents() == {sums[0]}
    assert [digest for digest, _ in folder.index.known_xorbs()] == [xorb(kept)[0]]
    assert folder.index.unheld([xorb(dropped)[0]], HOLDERS) == [xorb(dropped)[0]]
    assert folder.index.places(nodes(dropped)[0][0], HOLDERS) == []
    assert folder.index.places(nodes(kept)[0][0], HOLDERS) == [(xorb(kept)[0], 0)]
    assert_sound(folder.registry)
    assert folder.collect().freed_bytes == 0
    # What is sent again is there again.
    assert folder.file(dropped) == sums[1]


def test_a_xorb_is_kept_for_those_that_have_chunks_in_it(folder: Folder) -> None:
    """A placement stays while clients may name it, or a file of it is stored; and with it the xorbs it names."""
    base, new = made(3, 20), made(4, 3)
    first = folder.file(base)
    mixed = folder.file([*new, *base])
    folder.commit("lab/base", first)
    folder.commit("lab/mixed", mixed)
    assert folder.xorbs() == {xorb(base)[0], xorb(new)[0]}
    folder.registry.delete(parse_repository("lab/base"))
    folder.age(29)
    assert part(folder.collect(), "xorbs").removed == 0
    assert folder.index.placement(xorb([*new, *base])[0]) is not None
    # Nobody has the mixture any more, but a client that sent it may go on from there for a while.
    folder.registry.delete(parse_repository("lab/mixed"))
    folder.content.touch_xorb(xorb(new)[0])
    folder.index.touch_xorb(xorb([*new, *base])[0])
    report = folder.collect()
    assert (part(report, "xorbs").removed, part(report, "records").kept) == (0, 1)
    assert folder.file([*new, *base]) == mixed
    folder.content.remove(mixed)
    folder.age(29)
    report = folder.collect()
    assert part(report, "xorbs").removed == 2
    assert folder.xorbs() == set()
    assert folder.index.known_xorbs() == []


def test_who_wants_something_meanwhile_keeps_it(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the marking and the removal somebody takes a file in that was thought to be nobody's."""
    chunks, others = made(5), made(6)
    folder.xorb(chunks)
    folder.xorb(others)
    folder.age(40)
    candidates = folder.content.xorbs

    def later() -> object:
        found = list(candidates())
        monkeypatch.undo()
        folder.file(chunks)
        return iter(found)

    monkeypatch.setattr(folder.content, "xorbs", later)
    report = folder.collect()
    assert part(report, "xorbs").removed == 1
    assert folder.xorbs() == {xorb(chunks)[0]}
    # A placement likewise.
    mixed = [*made(7, 2), *chunks]
    folder.xorb(mixed)
    folder.age(40)
    named = folder.index.named_xorbs

    def then(but: object) -> object:
        found = named(())
        monkeypatch.undo()
        folder.file(mixed)
        return found

    monkeypatch.setattr(folder.index, "named_xorbs", then)
    folder.collect()
    assert folder.index.placement(xorb(mixed)[0]) is not None
    assert folder.xorbs() == {xorb(chunks)[0], xorb(made(7, 2))[0]}


def test_less_grace_makes_clients_forget(folder: Folder) -> None:
    folder.xorb(made(8))
    assert folder.index.epoch() == ""
    dry = folder.collect(0, dry_run=True)
    assert (dry.forgotten, folder.index.epoch()) == (True, "")
    report = folder.collect(0)
    assert report.forgotten
    assert part(report, "xorbs").removed == 1
    epoch = folder.index.epoch()
    assert len(epoch) == 8
    # Nothing to remove, nothing to forget.
    assert not folder.collect(0).forgotten
    assert folder.index.epoch() == epoch


def test_a_run_that_was_killed_in_between(folder: Folder) -> None:
    """The xorb is removed, and is still on record: the next run forgets it, and who names it is told to send it."""
    chunks = made(9)
    digest = folder.xorb(chunks)
    folder.content.remove_xorb(digest)
    described = Described([(digest, chunks, 0, len(chunks))], hashlib.sha256(b"".join(chunks)).hexdigest())
    with pytest.raises(InputError, match="refers to a xorb that is gone; upload it again"):
        register(folder.content, folder.index, shard([described]), HOLDERS, HOLDERS, lambda _: None)
    assert part(folder.collect(), "records").removed == 1
    assert folder.index.places(nodes(chunks)[0][0], HOLDERS) == []
    with pytest.raises(InputError, match="which was not uploaded"):
        register(folder.content, folder.index, shard([described]), HOLDERS, HOLDERS, lambda _: None)


def test_snapshots_and_what_is_on_its_way(folder: Folder) -> None:
    commit(folder.registry, {"a": b"1"}, "lab/a")
    place = folder.registry.snapshot(folder.registry.find(parse_repository("lab/a")))
    for name in ("f" * 64, ".half-made", ".young"):
        (folder.root / "snapshots" / name).mkdir()
        (folder.root / "snapshots" / name / "file").write_bytes(b"12345")
    os.utime(folder.root / "snapshots" / ".half-made", (0, 0))
    (folder.root / "incoming" / "dead").write_bytes(b"abc")
    with folder.content.receive() as incoming:
        incoming.write(memoryview(b"alive"))
        for dry in (True, False):
            report = folder.collect(dry_run=dry)
            assert (part(report, "incoming").removed, part(report, "incoming").removed_bytes) == (1, 3)
            assert (part(report, "snapshots").removed, part(report, "snapshots").removed_bytes) == (2, 10)
        incoming.keep(hashlib.sha256(b"alive").hexdigest())
    assert {path.name for path in place.parent.iterdir()} == {place.name, ".young"}


def test_what_cannot_be_collected(folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"^--grace is -1, expected a number of days, 0 or more\.$"):
        gc(GcOptions(data=folder.root, grace=-1))
    with pytest.raises(OptionError, match=r"^--grace is nan, expected a number of days, 0 or more\.$"):
        gc(GcOptions(data=folder.root, grace=float("nan")))
    with pytest.raises(InputError, match=r"^There is no registry at "):
        gc(GcOptions(data=tmp_path / "nothing"))
    with tidying(folder.root, shared=True), pytest.raises(OutputError, match="Another gc or backup is at work on"):
        gc(GcOptions(data=folder.root))
    assert gc(GcOptions(data=folder.root)).grace == CLIENTS_REMEMBER / DAY


_COLLECTOR = """
import sys
from pathlib import Path
from surgery.hub.collecting import GcOptions, gc
print("ready", flush=True)
gc(GcOptions(data=Path(sys.argv[1])))
"""


@pytest.mark.slow
def test_a_kill_leaves_a_sound_store(folder: Folder, tmp_path: Path) -> None:
    """At any moment; the next run removes the rest, and what is wanted was never touched."""
    keep, drop = [], []
    for number in range(COUNT):
        base = made(1000 + number, 10)
        keep.append(folder.file(base))
        drop.append(folder.file([*made(2000 + number, 3), *base]))
        drop.append(folder.file(made(3000 + number, 4)))
        put(folder.registry, b"blob %d" % number)
    folder.commit("lab/keep", *keep)
    folder.age(30)
    folder.index.close()
    removable = 5 * COUNT  # blobs, recipes of two kinds, and their xorbs
    gone = [
        _killed(folder, tmp_path / str(number), number * removable // 10, set(keep), drop[0]) for number in range(9)
    ]
    # Some were killed before the end, and some of those after the beginning.
    assert any(0 < count < removable for count in gone)


def _killed(before: Folder, place: Path, when: int, keep: set[str], dropped: str) -> int:
    """Kill a run on a copy when it has removed so many files. Returns how many it had removed when it was dead."""
    shutil.copytree(before.root, place)
    stored = len(_stored(place))
    with subprocess.Popen([sys.executable, "-c", _COLLECTOR, str(place)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        while process.poll() is None and stored - len(_stored(place)) < when:
            pass
        process.send_signal(signal.SIGKILL)
    gone = stored - len(_stored(place))
    folder = Folder(place)
    assert assert_sound(folder.registry) == 1
    assert keep <= contents(folder.registry)
    folder.collect()
    assert_sound(folder.registry)
    assert contents(folder.registry) == keep == set(folder.index.contents())
    assert folder.xorbs() == {xorb(made(1000 + number, 10))[0] for number in range(COUNT)}
    assert len(folder.index.known_xorbs()) == COUNT
    # All that was removed can be sent again.
    assert folder.file([*made(2000, 3), *made(1000, 10)]) == dropped
    folder.index.close()
    folder.registry.close()
    return gone


def _stored(root: Path) -> list[str]:
    folders = (found for name in ("blobs", "recipes", "xorbs") for found in (root / name).iterdir())
    return [name for folder in folders for name in os.listdir(folder)]


_PUSHER = """
import sys
from surgery.hub.interfaces import ContentMissingError
from surgery.hub.store import open_registry
from tests.hub.test_store import commit
registry = open_registry()
print("ready", flush=True)
for number in range(20):
    while True:
        try:
            commit(registry, {"weights": b"%d " % number * 20000})
            break
        except ContentMissingError:
            pass
"""


def test_pushes_go_on_meanwhile(tmp_path: Path) -> None:
    """Commits of one process, collections without any grace in another: none is lost, and all content is there."""
    with subprocess.Popen([sys.executable, "-c", _PUSHER], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        while process.poll() is None:
            gc(GcOptions(data=registry_path(), grace=0))
    assert process.returncode == 0
    with open_registry() as registry:
        assert assert_sound(registry) == 20


@pytest.mark.parametrize("lost", ["emptied", "gone"])
def test_content_without_its_database_is_not_garbage(folder: Folder, lost: str) -> None:
    folder.commit("lab/base", folder.file(made(1, 3)))
    folder.registry.close()
    folder.age(100)
    database = folder.root / "registry.sqlite"
    database.write_bytes(b"") if lost == "emptied" else database.unlink()
    before = sorted(folder.root.glob("*/*/*"))
    with pytest.raises(SurgeryError, match="empty or gone" if lost == "emptied" else "There is no registry"):
        gc(GcOptions(data=folder.root))
    # Nor is a new one begun above it, whose first collection would remove all.
    with pytest.raises(FormatError, match=r"keeps content, and its registry\.sqlite, which says what it is, is"):
        open_registry(folder.root)
    assert sorted(folder.root.glob("*/*/*")) == before
