"""Upkeep of a folder that is served: stock clients go on, also those that remember what is there no more."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from surgery.hub.backup import BackupOptions, RestoreOptions, backup, restore
from surgery.hub.checking import FsckOptions, fsck
from surgery.hub.collecting import GcOptions, gc
from surgery.hub.content import LocalContent
from surgery.hub.store import open_registry
from surgery.hub.xet import hashes
from tests.hub.registry_tools import assert_sound
from tests.hub.server.serving import ROOT, Server, serving
from tests.hub.server.test_growth import MB, PULL, UPLOAD
from tests.hub.test_collecting import part


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path) as server:
        yield server


def weights(path: Path, seed: int, size: int = 3 * MB) -> str:
    data = random.Random(seed).randbytes(size)
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def age(data: Path, days: float) -> None:
    for place in ("blobs", "recipes", "xorbs"):
        for path in (data / place).rglob("*"):
            then = path.stat().st_mtime - days * 86_400
            os.utime(path, (then, then))


def test_a_client_that_remembers_what_was_collected(own: Server, tmp_path: Path) -> None:
    """It deleted its repository, everything was collected without grace, and it pushes the same again."""
    path, home = tmp_path / "w.safetensors", tmp_path / "warm"
    digest = weights(path, 1)
    upload = UPLOAD.format(name="ada/gone", path=str(path))
    own.client(upload, home=home)
    own.client("api.delete_repo('ada/gone')", home=home)
    # By default what clients remember stays; so it is sent once, and there again at once.
    report = gc(GcOptions(data=own.data))
    assert (report.freed_bytes, part(report, "xorbs").kept, report.forgotten) == (0, 1, False)
    own.client(upload, home=home)
    assert own.client(PULL.format(name="ada/gone")) == digest
    own.client("api.delete_repo('ada/gone')", home=home)
    report = gc(GcOptions(data=own.data, grace=0))
    assert report.forgotten
    assert report.freed_bytes > 2.9 * MB
    assert own.stored() == 0
    own.client(upload, home=home)
    assert own.client(PULL.format(name="ada/gone")) == digest
    assert fsck(FsckOptions(data=own.data)).passed


def test_a_client_that_remembers_what_was_never_restored(own: Server, tmp_path: Path) -> None:
    """A backup is made while the server runs; a client pushes more; the disk is lost; the backup is restored."""
    first, second, home = tmp_path / "first", tmp_path / "second", tmp_path / "warm"
    sums = weights(first, 2), weights(second, 3)
    own.client(UPLOAD.format(name="ada/first", path=str(first)), home=home)
    backup(BackupOptions(data=own.data, destination=tmp_path / "backup"))
    own.client(UPLOAD.format(name="ada/second", path=str(second)), home=home)
    own.stop(signal.SIGKILL)
    shutil.rmtree(own.data)
    restore(RestoreOptions(source=tmp_path / "backup", data=own.data))
    own.start()
    assert own.client(PULL.format(name="ada/first"), home=home) == sums[0]
    own.client(UPLOAD.format(name="ada/second", path=str(second)), home=home)
    assert own.client(PULL.format(name="ada/second"), home=home) == sums[1]
    # What both have in common is still found, from the old home and from a new one.
    second.write_bytes(second.read_bytes() + b"more")
    before = own.stored()
    own.client(UPLOAD.format(name="ada/second", path=str(second)), home=home)
    own.client(UPLOAD.format(name="ada/third", path=str(second)))
    assert own.stored() - before < 0.5 * MB
    assert fsck(FsckOptions(data=own.data)).passed


def test_a_flipped_bit_is_named_and_not_served(own: Server, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    weights(path, 4)
    own.client(UPLOAD.format(name="ada/bit", path=str(path)))
    (xorb,) = LocalContent(own.data).xorbs()
    digest = hashes.digest_of(xorb.name)
    assert digest is not None
    place = LocalContent(own.data).xorb_path(digest)
    data = bytearray(place.read_bytes())
    data[1_000_000] ^= 4
    place.chmod(0o644)
    place.write_bytes(data)
    run = [sys.executable, "-m", "surgery", "hub", "fsck", "--data", str(own.data)]
    found = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert f"Damaged xorb {xorb.name}: Chunk " in found.stdout
    assert "  ada/bit@main: model.safetensors\n" in found.stdout
    quick = subprocess.run([*run, "--quick", "--json"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert quick.returncode == 0
    assert json.loads(quick.stdout)["passed"]


TURNS = """
import os
base = open({path!r}, "rb").read()
for turn in range(8):
    api.create_repo("turn-%d" % turn)
    data = os.urandom(300_000) + base[turn * 10_000:]
    for left in (2, 1, 0):
        try:
            api.upload_file(path_or_fileobj=data, path_in_repo="w.safetensors", repo_id="ada/turn-%d" % turn)
            break
        except Exception as error:  # what it was told of was removed before it came to send the rest
            if not left:
                raise
    found = api.hf_hub_download("ada/turn-%d" % turn, "w.safetensors", force_download=True)
    assert open(found, "rb").read() == data
    if turn % 2:
        api.delete_repo("ada/turn-%d" % turn)
    print(turn, flush=True)
    input()
"""


def test_a_damaged_xorb_is_healed_by_a_push(own: Server, tmp_path: Path) -> None:
    """It is removed by hand; gc forgets it, and so do clients; who pushes the file again brings it back for all."""
    path, home = tmp_path / "w.safetensors", tmp_path / "warm"
    digest = weights(path, 6)
    upload = UPLOAD.format(name="{name}", path=str(path))
    own.client(upload.format(name="ada/one"), home=home)
    (tmp_path / "more").write_bytes(b"x" * 200_000 + path.read_bytes())
    own.client(UPLOAD.format(name="ada/more", path=str(tmp_path / "more")))
    content = LocalContent(own.data)
    sizes = {file.name: file.size for file in content.xorbs()}
    assert len(sizes) == 2
    found = hashes.digest_of(max(sizes, key=lambda name: sizes[name]))
    assert found is not None
    content.xorb_path(found).unlink()
    assert len(fsck(FsckOptions(data=own.data, quick=True)).damages[0].files) == 1
    report = gc(GcOptions(data=own.data))
    assert (report.forgotten, part(report, "records").removed) == (True, 2)
    own.client(upload.format(name="ada/two"), home=home)
    for name in ("ada/one", "ada/two"):
        assert own.client(PULL.format(name=name)) == digest
    own.client(UPLOAD.format(name="ada/more", path=str(tmp_path / "more")), home=home)
    assert fsck(FsckOptions(data=own.data)).passed


@pytest.mark.slow
def test_pushes_gc_fsck_and_backups_at_once(own: Server, tmp_path: Path) -> None:
    """A client uploads, commits, deletes and pulls while everything else goes on over and over: nothing is lost."""
    path = tmp_path / "w.safetensors"
    weights(path, 5, 2 * MB)
    command = own.command(TURNS.format(path=str(path)), "ada", None, {})
    del command["capture_output"]
    done = threading.Event()
    freed = []

    def upkeep() -> None:
        while not done.is_set():
            freed.append(gc(GcOptions(data=own.data, grace=1)).freed_bytes)
            backup(BackupOptions(data=own.data, destination=tmp_path / "backup"))
            assert fsck(FsckOptions(data=own.data)).passed

    with (
        ThreadPoolExecutor(1) as pool,
        subprocess.Popen(**command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client,
    ):
        assert client.stdin is not None
        assert client.stdout is not None
        working = pool.submit(upkeep)
        try:
            for turn in range(8):
                assert client.stdout.readline() == f"{turn}\n"
                age(own.data, 2)  # while nothing is on its way
                print("go", file=client.stdin, flush=True)
            assert client.wait(60) == 0
        finally:
            done.set()
            client.kill()
        working.result()
    assert sum(freed) > 300_000  # of what was deleted, and made old in time
    backup(BackupOptions(data=own.data, destination=tmp_path / "backup"))
    for place in (own.data, tmp_path / "backup"):
        assert fsck(FsckOptions(data=place)).passed
        with open_registry(place) as registry:
            assert_sound(registry)
            assert len(registry.metadata.repositories()) == 4


def test_a_server_that_collects_by_itself(tmp_path: Path) -> None:
    """Every so often, what no commit refers to and nobody wanted for four weeks."""
    with open_registry(tmp_path / "data") as registry, registry.content.receive() as incoming:
        incoming.write(memoryview(b"old"))
        incoming.keep(hashlib.sha256(b"old").hexdigest())
        (blob,) = (path for path in (tmp_path / "data" / "blobs").rglob("*") if path.is_file())
    os.utime(blob, (0, 0))
    command = [sys.executable, "-m", "surgery", "hub", "serve", "--data", str(tmp_path / "data"), "--port", "0"]
    with subprocess.Popen(
        [*command, "--gc-every", "0.0001"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        for _ in range(200):
            if not blob.exists():
                break
            time.sleep(0.1)
        server.terminate()
        _, errors = server.communicate(timeout=30)
    assert not blob.exists()
    assert "gc: 3 bytes freed" in errors
