"""A backup is a registry of its own, whole at any time; what is restored from it is what was backed up."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from surgery.errors import InputError, IntegrityError, OutputError
from surgery.hub import backup as module
from surgery.hub.backup import BackupOptions, CopyReport, RestoreOptions, backup, restore
from surgery.hub.checking import FsckOptions, fsck
from surgery.hub.collecting import collect
from surgery.hub.naming import parse_repository
from surgery.hub.store import existing_registry, open_registry
from tests.hub.registry_tools import assert_sound, contents
from tests.hub.test_checking import flip
from tests.hub.test_collecting import Folder, made
from tests.hub.test_store import commit
from tests.hub.xet_tools import xorb


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    found = Folder(tmp_path / "data")
    base = made(1, 20)
    found.commit("lab/base", found.file(base))
    found.commit("lab/both", found.file([*made(2, 3), *base[:10]]))
    commit(found.registry, {"README.md": b"text"}, "lab/text")
    (found.root / "server.key").write_bytes(b"k" * 32)
    (found.root / "server.key").chmod(0o600)
    return found


def copied(folder: Folder, destination: Path, link: bool = False) -> CopyReport:
    return backup(BackupOptions(data=folder.root, destination=destination, link=link))


def files(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for name in ("blobs", "recipes", "xorbs")
        for path in (root / name).rglob("*")
        if path.is_file()
    }


def is_sound(root: Path) -> bool:
    registry = existing_registry(root)
    assert registry is not None
    with registry:
        assert_sound(registry)
    return fsck(FsckOptions(data=root)).passed


def test_a_backup_is_the_registry(folder: Folder, tmp_path: Path) -> None:
    place = tmp_path / "backup"
    report = copied(folder, place)
    assert (report.copied, report.present, report.commits) == (len(files(folder.root)), 0, 3)
    assert files(place) == files(folder.root)
    assert is_sound(place)
    assert (place / "server.key").stat().st_mode & 0o777 == 0o600
    assert {path.stat().st_mode & 0o777 for path in (place / "xorbs").rglob("*") if path.is_file()} == {0o444}
    # What nobody has touched for long is not young there.
    folder.age(100)
    xorb_of = folder.content.xorb_path(xorb(made(1, 20))[0]).relative_to(folder.root)
    assert copied(folder, tmp_path / "second").copied == report.copied
    assert (tmp_path / "second" / xorb_of).stat().st_mtime == (folder.root / xorb_of).stat().st_mtime
    # Once more brings what is new, and the newest commits.
    folder.commit("lab/base", folder.file(made(3)))
    again = copied(folder, place)
    assert (again.copied, again.commits) == (2, 4)
    assert again.present == report.copied
    assert is_sound(place)
    assert not list(place.glob(".*"))
    assert not list((place / "incoming").iterdir())


def test_links(folder: Folder, tmp_path: Path) -> None:
    copied(folder, tmp_path / "backup", link=True)
    name = folder.content.xorb_path(xorb(made(1, 20))[0]).relative_to(folder.root)
    assert (tmp_path / "backup" / name).samefile(folder.root / name)
    assert is_sound(tmp_path / "backup")
    assert is_sound(folder.root)


def test_what_is_restored(folder: Folder, tmp_path: Path) -> None:
    copied(folder, tmp_path / "backup")
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "new" / "data", tmp_path / "empty"):
        place.parent.mkdir(exist_ok=True)
        report = restore(RestoreOptions(source=tmp_path / "backup", data=place))
        assert (report.commits, report.destination) == (3, str(place))
        assert files(place) == files(folder.root)
        assert is_sound(place)
        again = Folder(place)
        # Clients are to forget what they know; the server's key and accounts are the ones before.
        assert len(again.index.epoch()) == 8
        assert (place / "server.key").read_bytes() == b"k" * 32
        assert again.index.places(b"", ["ada"]) == []
        assert not list(place.parent.glob(".*"))
    assert folder.index.epoch() == ""


def test_a_damaged_backup_is_not_restored(folder: Folder, tmp_path: Path) -> None:
    copied(folder, tmp_path / "backup")
    path = tmp_path / "backup" / folder.content.xorb_path(xorb(made(1, 20))[0]).relative_to(folder.root)
    flip(path, 50)
    with pytest.raises(IntegrityError, match=rf"is damaged: 1 problems, the first with the xorb {path.name}; `surgery"):
        restore(RestoreOptions(source=tmp_path / "backup", data=tmp_path / "new"))
    assert not (tmp_path / "new").exists()
    # What came over damaged does not stay beside the place, where the next run would take it for copied.
    flip(path, 50)
    restore(RestoreOptions(source=tmp_path / "backup", data=tmp_path / "new"))
    assert is_sound(tmp_path / "new")


def test_another_registry_is_not_replaced(folder: Folder, tmp_path: Path) -> None:
    other = tmp_path / "other"
    with open_registry(other) as registry:
        commit(registry, {"README.md": b"other"}, "lab/other")
    before = (other / "registry.sqlite").read_bytes()
    with pytest.raises(InputError, match="other is a registry, or a backup that was written to since: all that it"):
        copied(folder, other)
    assert (other / "registry.sqlite").read_bytes() == before
    # Nor is a registry by its own backup, the arguments being the wrong way round.
    place = tmp_path / "backup"
    copied(folder, place)
    with pytest.raises(InputError, match="data is a registry, or a backup"):
        backup(BackupOptions(data=place, destination=folder.root))
    copied(folder, place)
    # A backup that was served, or pushed to, is a registry from then on; so is what was restored.
    with open_registry(place) as registry:
        commit(registry, {"README.md": b"pushed"}, "lab/pushed")
    with pytest.raises(InputError, match=r"make an empty file backup\.json in it"):
        copied(folder, place)
    (place / "backup.json").touch()
    assert copied(folder, place).commits == 3
    restore(RestoreOptions(source=place, data=tmp_path / "restored"))
    with pytest.raises(InputError, match="restored is a registry, or a backup"):
        copied(folder, tmp_path / "restored")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is no folder"):
        copied(folder, tmp_path / "file")


def test_a_first_backup_that_was_killed_goes_on(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module._Copier.copy

    def killed(copier: module._Copier, *groups: list[str]) -> None:
        real(copier, groups[0][:1])
        raise KeyboardInterrupt

    monkeypatch.setattr(module._Copier, "copy", killed)
    with pytest.raises(KeyboardInterrupt):
        copied(folder, tmp_path / "backup")
    monkeypatch.undo()
    assert copied(folder, tmp_path / "backup").present == 1
    assert is_sound(tmp_path / "backup")


def test_where_nothing_can_be_copied(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_bytes(b"x")
    with pytest.raises(InputError, match="has something in it that is no backup"):
        copied(folder, tmp_path / "full")
    with pytest.raises(InputError, match="lie in each other; a copy has to lie elsewhere"):
        copied(folder, folder.root / "backup")
    with pytest.raises(InputError, match=r"full is not empty; a backup is restored to a new folder\.$"):
        restore(RestoreOptions(source=folder.root, data=tmp_path / "full"))
    with pytest.raises(InputError, match="There is no registry at"):
        restore(RestoreOptions(source=tmp_path / "full", data=tmp_path / "new"))


def test_commits_and_deletions_meanwhile(folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes after the snapshot is not in the backup, or whole; for what goes a new snapshot is made."""
    real = module._Copier.copy
    rounds: list[int] = []

    def busy(copier: module._Copier, *groups: list[str]) -> None:
        rounds.append(len(rounds))
        if len(rounds) == 1:
            folder.commit("lab/new", folder.file(made(4)))
            folder.registry.delete(parse_repository("lab/text"))
            with pytest.raises(OutputError, match="Another gc or backup is at work"):
                collect(folder.registry, folder.index, 0)
        real(copier, *groups)

    monkeypatch.setattr(module._Copier, "copy", busy)
    report = copied(folder, tmp_path / "backup")
    assert (len(rounds), report.commits) == (2, 3)
    assert is_sound(tmp_path / "backup")
    assert contents(open_registry(tmp_path / "backup")) == contents(folder.registry)


def test_content_that_is_lost_is_not_called_backed_up(folder: Folder, tmp_path: Path) -> None:
    copied(folder, tmp_path / "backup")
    before = (tmp_path / "backup" / "registry.sqlite").read_bytes()
    commit(folder.registry, {"README.md": b"lost"}, "lab/text")
    backed_up = existing_registry(tmp_path / "backup")
    assert backed_up is not None
    (sha256,) = contents(folder.registry) - contents(backed_up)
    folder.content.remove(sha256)
    with pytest.raises(OutputError, match=rf"^Content of .*data keeps disappearing, {sha256} for one; check it with"):
        copied(folder, tmp_path / "backup")
    assert (tmp_path / "backup" / "registry.sqlite").read_bytes() == before
    assert is_sound(tmp_path / "backup")


_BACKUP = """
import sys
from pathlib import Path
from surgery.hub.backup import BackupOptions, backup
print("ready", flush=True)
backup(BackupOptions(data=Path(sys.argv[1]), destination=Path(sys.argv[2])))
"""


@pytest.mark.slow
def test_a_kill_leaves_the_backup_before(folder: Folder, tmp_path: Path) -> None:
    place = tmp_path / "backup"
    copied(folder, place)
    commits = set()
    for turn in range(12):
        for number in range(5):
            folder.commit("lab/base", folder.file(made(100 + 10 * turn + number, 30)))
        command = [sys.executable, "-c", _BACKUP, str(folder.root), str(place)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(turn * 0.007)
            process.send_signal(signal.SIGKILL)
        assert is_sound(place)
        with sqlite3.connect(place / "registry.sqlite") as db:
            commits.add(db.execute("SELECT count(*) FROM commits").fetchone()[0])
        db.close()
    assert copied(folder, place).commits == 63
    assert is_sound(place)
    assert min(commits) == 3  # the first kill came early
    assert not [path for path in (place / "incoming").iterdir() if os.path.getsize(path)]
