"""A chunk is stored once for a namespace, whatever its clients know; and only for those who have it."""

from __future__ import annotations

import hashlib
import random
import sqlite3
from pathlib import Path

import httpx2

from surgery.hub.content import LocalContent
from surgery.hub.server import accounts
from surgery.hub.server.accounts import SqliteAccounts
from surgery.hub.server.placing import place_all
from surgery.hub.store import open_registry
from surgery.hub.xet import hashes
from surgery.hub.xet.repeats import LEAST_RUN
from surgery.hub.xet.xorbs import XorbParser
from surgery.source import read_bytes
from tests.hub.registry_tools import assert_sound
from tests.hub.server.serving import Server
from tests.hub.server.test_safety import Xet, commit, described, lfs_file
from tests.hub.xet_tools import Described, nodes, xorb

UPLOAD = """
    api.create_repo({name!r}, exist_ok=True)
    api.upload_file(path_or_fileobj={path!r}, path_in_repo="model.safetensors", repo_id={name!r})
"""
PULL = """
    from huggingface_hub import hf_hub_download
    path = hf_hub_download({name!r}, "model.safetensors")
    print(json.dumps(hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()))
"""
MB = 1_000_000


def made(seed: int, count: int = 24) -> list[bytes]:
    rng = random.Random(seed)
    return [rng.randbytes(rng.randint(1000, 5000)) for _ in range(count)]


def push(server: Server, name: str, path: Path, home: Path | None = None, user: str = "ada") -> int:
    """Push a file with a client; returns by how much the store grew."""
    before = server.stored()
    server.client(UPLOAD.format(name=name, path=str(path)), user, home)
    return server.stored() - before


def test_what_a_new_client_sends_again_is_not_stored_again(server: Server, tmp_path: Path) -> None:
    """The shape of an upcycled checkpoint: what is new comes first, so that the client does not ask about the rest."""
    rng = random.Random(1)
    dense = tmp_path / "dense.safetensors"
    dense.write_bytes(weights := rng.randbytes(12 * MB))
    size = dense.stat().st_size
    assert push(server, "ada/dense", dense) > size
    mixture = tmp_path / "mixture.safetensors"
    with open(mixture, "wb") as file:
        file.write(rng.randbytes(300_000) + weights[: 4 * MB])
        for _ in range(8):
            file.write(weights[4 * MB : 10 * MB])
        file.write(weights[10 * MB :])
    grown = push(server, "ada/mixture", mixture)
    # What is new, the chunks at the seams, and recipes.
    assert 300_000 < grown < 0.3 * MB + 3 * 2 * 131_072 + 50_000
    expected = hashlib.sha256(mixture.read_bytes()).hexdigest()
    assert server.client(PULL.format(name="ada/mixture")) == expected
    # Whoever pushed it goes on from there, and the same again from a third home costs a few bytes.
    assert push(server, "ada/again", mixture) < 20_000
    with open_registry(server.data) as registry:
        assert assert_sound(registry) >= 4
        content = registry.content
        recipe = content.recipe(expected)
        assert recipe is not None
        assert len(recipe.terms) < 60
        assert all(content.has_xorb(term.xorb) for term in recipe.terms)


def test_a_warm_client_goes_on_naming_what_it_sent(server: Server, tmp_path: Path) -> None:
    """Its xorb was stored in part only; it does not know that."""
    rng = random.Random(2)
    shared, home = rng.randbytes(6 * MB), tmp_path / "warm"
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    first.write_bytes(shared)
    push(server, "ada/first", first)
    own = rng.randbytes(2 * MB)
    second.write_bytes(own + shared)
    push(server, "ada/second", second, home)
    third.write_bytes(rng.randbytes(100_000) + own + shared)
    assert push(server, "ada/third", third, home) < 0.5 * MB
    assert server.client(PULL.format(name="ada/third")) == hashlib.sha256(third.read_bytes()).hexdigest()


def test_only_what_the_sender_has_is_left_out(server: Server) -> None:
    """What somebody else has is stored again, and nobody learns of the rest of it."""
    content = LocalContent(server.data)
    for user, name in (("ada", "ada/private"), ("bob", "bob/private"), ("ada", "lab/shared")):
        server.api(user).create_repo(name, private=True, exist_ok=True)
    chunks, more = made(5), made(6)
    ada = Xet(server, "ada", "ada/private")
    assert ada.xorb([*chunks, *more]).status_code == 200
    assert ada.shard(described([*chunks, *more])).status_code == 200
    whole = xorb([*chunks, *more])[0]
    # Bob has the first half, and all of his is stored.
    bob = Xet(server, "bob", "bob/private")
    bob.xorb(chunks)
    assert content.has_xorb(xorb(chunks)[0])
    # Ada sends it to the lab, and nothing is.
    new = made(7, 3)
    mixed = [*new, *chunks]
    lab = Xet(server, "ada", "lab/shared")
    assert lab.xorb(mixed).status_code == 200
    assert not content.has_xorb(xorb(mixed)[0])
    assert content.has_xorb(xorb(new)[0])
    assert lab.shard(described(mixed)).status_code == 200
    sha256 = described(mixed).sha256
    assert sha256 is not None
    assert commit(server, "ada", "lab/shared", lfs_file(sha256)).status_code == 200
    recipe = content.recipe(sha256)
    assert recipe is not None
    assert [term.xorb for term in recipe.terms] == [xorb(new)[0], whole]
    found = httpx2.get(
        f"{server.url}/lab/shared/resolve/main/w.bin", headers={"Authorization": f"Bearer {server.tokens['ada']}"}
    )
    assert found.content == b"".join(mixed)
    # One who may write to the lab only is told of what was sent there, as it was sent, and of nothing else of Ada's.
    server.tokens["lab"] = server.token("ada", repository="lab/shared")
    scoped = Xet(server, "lab", "lab/shared")
    assert scoped.get(f"chunks/default/{hashes.text(nodes(chunks)[0][0])}").status_code == 404
    told = Xet(server, "ada", "lab/shared").get(f"chunks/default/{hashes.text(nodes(new)[0][0])}")
    assert told.status_code == 200
    assert xorb(mixed)[0] in told.content
    assert nodes(more)[0][0] not in told.content
    assert whole not in told.content
    # Nor may the rest be named by its place there.
    beyond = Described([(whole, [*chunks, *more], 0, 2 * len(chunks))], described([*chunks, *more]).sha256)
    assert "was not uploaded" in scoped.shard(beyond).json()["error"]
    assert "was not uploaded" in bob.shard(beyond).json()["error"]


def test_proofs_of_what_was_left_out(server: Server) -> None:
    """A shard that lies about such a xorb is refused as any other."""
    server.api().create_repo("lies", exist_ok=True)
    xet, chunks, new = Xet(server, "ada", "ada/lies"), made(8), made(9, 2)
    xet.xorb(chunks)
    xet.xorb([*new, *chunks])
    name = xorb([*new, *chunks])[0]
    part = [*new, *chunks][1:20]
    sha256 = hashlib.sha256(b"".join(part)).hexdigest()
    for proofs, sizes, sentence in (
        ([b"x" * 32], None, "wrong proof"),
        (None, [17], "or other lengths"),
    ):
        lie = Described([(name, [*new, *chunks], 1, 20)], sha256, proofs=proofs, sizes=sizes)
        assert sentence in xet.shard(lie).json()["error"]
    beyond = Described([(name, [*new, *chunks, b"x"], 1, len(chunks) + 3)], sha256)
    assert "which has 26" in xet.shard(beyond).json()["error"]
    assert xet.shard(Described([(name, [*new, *chunks], 1, 20)], sha256)).status_code == 200
    assert LocalContent(server.data).open(sha256).size == len(b"".join(part))


def test_what_is_left_out_and_lost_is_sent_again(server: Server) -> None:
    """A xorb that others relied on disappears: who sends it again is asked to try once more, and it is whole."""
    server.api().create_repo("lost", exist_ok=True)
    content = LocalContent(server.data)
    xet, chunks, new = Xet(server, "ada", "ada/lost"), made(10), made(11, 2)
    mixed = [*new, *chunks]
    xet.xorb(chunks)
    xet.xorb(mixed)
    content.remove_xorb(xorb(chunks)[0])
    answer = xet.xorb(mixed)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert xet.xorb(mixed).status_code == 200
    assert content.has_xorb(xorb(mixed)[0])
    assert xet.shard(described(mixed)).status_code == 200
    sha256 = described(mixed).sha256
    assert sha256 is not None
    source = LocalContent(server.data).open(sha256)
    assert hashlib.sha256(read_bytes(source, 0, source.size)).hexdigest() == sha256


def test_a_folder_of_before(tmp_path: Path) -> None:
    """A database of the first schema is brought up to date, and what lies there is found by its chunks."""
    chunks = made(12, LEAST_RUN)
    digest, data = xorb(chunks)
    path = tmp_path / "server.sqlite"
    with sqlite3.connect(path) as db:
        for statement in accounts._TABLES.split(";\n"):
            db.execute(statement)
        db.execute("INSERT INTO xorb_holders VALUES (?, 'ada')", (digest,))
        db.execute("INSERT INTO namespaces VALUES ('ada', 'Ada', 0, 0)")
        db.execute("PRAGMA user_version = 1")
    db.close()
    content = LocalContent(tmp_path)
    with content.receive() as incoming:
        parser = XorbParser(lambda _, packed, size: incoming.write(packed))
        parser.feed(data)
        incoming.keep_xorb(parser.finish(digest))
    database = SqliteAccounts(path)
    assert database.namespace("ada") is not None
    assert database.places(nodes(chunks)[3][0], ["ada"]) == []
    place_all(content, database)
    assert database.places(nodes(chunks)[3][0], ["ada"]) == [(digest, 3)]
    assert database.places(nodes(chunks)[3][0], ["bob"]) == []
    assert database.unplaced() == []
    database.close()
