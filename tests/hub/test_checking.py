"""`hub fsck` finds what is damaged, and names the files that it hits."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from surgery.errors import FormatError, InputError
from surgery.hub.checking import Damage, FsckOptions, FsckReport, HitFile, fsck
from surgery.hub.naming import parse_repository
from surgery.hub.xet import hashes
from tests.hub.registry_tools import put
from tests.hub.test_collecting import Folder, made
from tests.hub.test_store import commit
from tests.hub.xet_tools import xorb

TEXT = b"a small file of its own"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Two repositories: one of chunks, of which the other has some, and one of a blob."""
    folder = Folder(tmp_path_factory.mktemp("check") / "data")
    base = made(1, 20)
    sums = folder.file(base), folder.file([*made(2, 3), *base[:10]]), folder.file(made(3, 2))
    folder.commit("lab/base", sums[0])
    folder.commit("lab/both", sums[1], sums[2])
    commit(folder.registry, {"README.md": TEXT, "again/README.md": TEXT}, "lab/text")
    put(folder.registry, b"nobody's")
    return folder


def check(folder: Folder, quick: bool = False, repair: bool = False) -> FsckReport:
    # What this process has read of xorbs is not what is on the disk now.
    return fsck(FsckOptions(data=folder.root, quick=quick, repair=repair))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    path.chmod(0o444)


def xorb_path(folder: Folder, chunks: list[bytes]) -> Path:
    return folder.content.xorb_path(xorb(chunks)[0])


def only(report: FsckReport) -> Damage:
    (damage,) = report.damages
    return damage


@pytest.fixture
def folder(whole: Folder, tmp_path: Path) -> Folder:
    shutil.copytree(whole.root, tmp_path / "data")
    return Folder(tmp_path / "data")


def test_a_sound_registry(folder: Folder) -> None:
    report = check(folder)
    assert report.passed
    assert report.counts == {"repositories": 3, "commits": 3, "blobs": 2, "recipes": 3, "xorbs": 3}
    assert (report.unused, report.unused_bytes) == (1, len(b"nobody's"))
    stored = sum(path.stat().st_size for path in (folder.root / "blobs").rglob("*") if path.is_file())
    chunks = sum(len(xorb(made(*which))[1]) for which in ((1, 20), (2, 3), (3, 2)))
    assert report.read_bytes == stored + chunks
    quick = check(folder, quick=True)
    assert (quick.passed, quick.read_bytes, quick.counts) == (True, 0, report.counts)
    assert json.loads(json.dumps(report.as_dict()))["passed"] is True


def test_a_flipped_bit_in_a_chunk(folder: Folder) -> None:
    """The files with that very chunk are named, and no other of the xorb."""
    chunks = made(1, 20)
    path = xorb_path(folder, chunks)
    flip(path, len(xorb(chunks[:4])[1]) + 100)
    damage = only(check(folder))
    assert (damage.what, damage.name) == ("xorb", path.name)
    assert damage.reason.startswith(f"Chunk 4 of {path} has another hash")
    assert damage.files == (
        HitFile("lab/base", "model", "main", "0.safetensors"),
        HitFile("lab/both", "model", "main", "0.safetensors"),
    )
    assert check(folder, quick=True).passed
    # A chunk that one file has only.
    flip(path, len(xorb(chunks[:4])[1]) + 100)
    flip(path, len(xorb(chunks[:15])[1]) + 100)
    assert [file.repository for file in only(check(folder)).files] == ["lab/base"]
    # Two chunks are told of once.
    flip(path, len(xorb(chunks[:4])[1]) + 100)
    assert len(only(check(folder)).files) == 2


def test_a_damaged_footer_hits_all_of_a_xorb(folder: Folder) -> None:
    path = xorb_path(folder, made(1, 20))
    flip(path, path.stat().st_size - 60)
    for quick in (True, False):
        damage = only(check(folder, quick))
        assert (damage.what, len(damage.files)) == ("xorb", 2)
        assert "footer" in damage.reason or "hash to its name" in damage.reason


def test_a_lost_xorb(folder: Folder) -> None:
    xorb_path(folder, made(3, 2)).unlink()
    damage = only(check(folder, quick=True))
    assert (damage.what, damage.reason) == (
        "recipe",
        f"needs the xorb {hashes.text(xorb(made(3, 2))[0])}, which is missing",
    )
    assert damage.files == (HitFile("lab/both", "model", "main", "1.safetensors"),)


def test_a_flipped_bit_in_a_blob(folder: Folder) -> None:
    sha256 = hashlib.sha256(TEXT).hexdigest()
    path = folder.content.path(sha256)
    assert path is not None
    flip(path, 3)
    damage = only(check(folder))
    assert (damage.what, damage.name, damage.mendable) == ("blob", sha256, False)
    assert damage.reason.startswith("hashes to ")
    assert [file.path for file in damage.files] == ["README.md", "again/README.md"]
    os.truncate(path, 5)
    assert only(check(folder, quick=True)).reason == f"has 5 bytes, expected {len(TEXT)}"
    path.unlink()
    assert only(check(folder, quick=True)).reason == f"the content of {len(TEXT)} bytes is not stored"


def test_the_other_form_mends_it(folder: Folder) -> None:
    """What is stored both as a blob and as chunks: what is damaged of it is removed, on demand."""
    data = b"".join(made(3, 2))
    sha256 = put(folder.registry, data)
    path, packed = folder.content.path(sha256), xorb_path(folder, made(3, 2))
    assert path is not None
    flip(path, 7)
    assert only(check(folder)).mendable
    assert not check(folder).passed
    report = check(folder, repair=True)
    assert (report.passed, only(report).repaired) == (True, True)
    assert folder.content.path(sha256) is None
    assert check(folder).passed
    # The other way round.
    put(folder.registry, data)
    recipe = folder.root / "recipes" / sha256[:2] / sha256
    flip(recipe, recipe.read_bytes().index(b'"xet":"') + 9)
    damage = only(check(folder, repair=True))
    assert (damage.what, damage.repaired) == ("recipe", True)
    assert check(folder).passed
    assert folder.content.path(sha256) is not None
    assert packed.exists()


def test_recipes_and_what_commits_say(folder: Folder) -> None:
    sha256 = hashlib.sha256(b"".join(made(3, 2))).hexdigest()
    recipe = folder.root / "recipes" / sha256[:2] / sha256
    text = recipe.read_bytes()
    for wrong, reason in (
        (text.replace(b",0,2,", b",0,1,"), "of other lengths"),
        (text.replace(b",0,2,", b",1,2,"), "of other lengths"),
        (text.replace(sha256.encode(), b"0" * 64), "is damaged"),
        (text[:-20], "is damaged"),
    ):
        recipe.chmod(0o644)
        recipe.write_bytes(wrong)
        damage = only(check(folder, quick=True))
        assert damage.what == "recipe"
        assert reason in damage.reason
        assert [file.path for file in damage.files] == ["1.safetensors"]


def test_a_damaged_history(folder: Folder) -> None:
    name = parse_repository("lab/base")
    head = folder.registry.metadata.refs(name)["refs/heads/main"]
    with folder.registry.metadata._change() as db:  # type: ignore[attr-defined]  # it is a SqliteMetadata
        db.execute("UPDATE commits SET message = 'forged' WHERE id = ?", (head,))
    damage = only(check(folder))
    assert (damage.what, damage.name) == ("commit", f"lab/base {head}")
    with folder.registry.metadata._change() as db:  # type: ignore[attr-defined]  # likewise
        db.execute("UPDATE commits SET message = 'c', parent = ? WHERE id = ?", ("0" * 40, head))
        db.execute("UPDATE refs SET target = ? WHERE target = ?", ("1" * 40, head))
        db.execute("UPDATE trees SET entries = replace(entries, '0.safe', '9.safe') WHERE entries LIKE '%0.safe%'")
    found = {(damage.what, damage.reason.partition(",")[0]) for damage in check(folder).damages}
    assert ("ref", "leads to commit " + "1" * 40) in found
    assert ("commit", "comes after " + "0" * 40) in found
    assert {what for what, _ in found} == {"ref", "commit", "tree"}


def test_a_damaged_placement(folder: Folder) -> None:
    """A server would translate wrongly: it is found, and forgetting it is all that it takes."""
    with folder.index._change() as db:
        db.execute("UPDATE xorbs SET terms = replace(terms, ',0,10,', ',1,11,') WHERE terms IS NOT NULL")
    damage = only(check(folder))
    assert (damage.what, damage.mendable) == ("placement", True)
    assert check(folder, repair=True).passed
    assert check(folder).damages == ()


def test_a_damaged_database(folder: Folder) -> None:
    path = folder.root / "registry.sqlite"
    data = bytearray(path.read_bytes())
    folder.registry.close()
    place = data.index(b"again/README.md")
    for begin in range(place - 40, place + 40):
        data[begin] = 0xFF
    path.write_bytes(data)
    try:
        damages = check(folder).damages
    except FormatError:
        return
    assert damages


def test_where_there_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no registry at"):
        fsck(FsckOptions(data=tmp_path))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_flipped_bit_is_found(whole: Folder, data: st.DataObject) -> None:
    """In any content, anywhere; and with the bit back in its place all is well."""
    files = sorted(p for name in ("blobs", "recipes", "xorbs") for p in (whole.root / name).rglob("*") if p.is_file())
    path = data.draw(st.sampled_from(files))
    place = data.draw(st.integers(0, path.stat().st_size - 1))
    flip(path, place)
    try:
        assert not check(whole).passed
    finally:
        flip(path, place)
    assert check(whole).passed
