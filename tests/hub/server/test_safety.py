"""What strangers send, and what they are told: forged tokens and addresses, lies, other people's chunks."""

from __future__ import annotations

import hashlib
import json
import random
import socket
import sqlite3
import struct
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.hub.content import LocalContent
from surgery.hub.server.run import add_organisation
from surgery.hub.server.signing import Signer, load_key
from surgery.hub.xet import hashes
from tests.hub.server.serving import ADMIN, Server
from tests.hub.xet_tools import Described, nodes, shard, xorb

Chunks = Sequence[bytes]


class Xet:
    """Xet's routes for one repository, by hand."""

    def __init__(self, server: Server, user: str, name: str, scope: str = "write") -> None:
        headers = {"Authorization": f"Bearer {server.tokens[user]}"}
        answer = httpx2.get(f"{server.url}/api/models/{name}/xet-{scope}-token/main", headers=headers)
        assert answer.status_code == 200, answer.text
        self.url: str = answer.json()["casUrl"]
        self.headers = {"Authorization": f"Bearer {answer.json()['accessToken']}"}

    def xorb(self, chunks: Chunks) -> httpx2.Response:
        digest, data = xorb(chunks)
        return self.post(f"xorbs/default/{hashes.text(digest)}", data)

    def shard(self, *files: Described) -> httpx2.Response:
        return self.post("shards", shard(files))

    def post(self, path: str, data: bytes) -> httpx2.Response:
        return httpx2.post(f"{self.url}/v1/{path}", content=data, headers=self.headers)

    def get(self, path: str, **headers: str) -> httpx2.Response:
        return httpx2.get(f"{self.url}/v1/{path}", headers={**self.headers, **headers})


def made(seed: int, count: int = 4) -> list[bytes]:
    rng = random.Random(seed)
    return [rng.randbytes(rng.randint(1000, 5000)) for _ in range(count)]


def described(chunks: Chunks) -> Described:
    return Described([(xorb(chunks)[0], chunks, 0, len(chunks))], hashlib.sha256(b"".join(chunks)).hexdigest())


def commit(server: Server, user: str, name: str, *lines: dict[str, Any]) -> httpx2.Response:
    head = {"key": "header", "value": {"summary": "test"}}
    body = b"\n".join(json.dumps(line).encode() for line in (head, *lines))
    headers = {"Authorization": f"Bearer {server.tokens[user]}"}
    return httpx2.post(f"{server.url}/api/models/{name}/commit/main", content=body, headers=headers)


def lfs_file(sha256: str, size: int | None = None) -> dict[str, Any]:
    return {"key": "lfsFile", "value": {"path": "w.bin", "algo": "sha256", "oid": sha256, "size": size}}


@pytest.fixture(scope="module")
def content(server: Server) -> LocalContent:
    server.api("ada").create_repo("secret", private=True)
    server.api("ada").create_repo("open")
    server.api("bob").create_repo("own")
    return LocalContent(server.data)


# Lies about content ---------------------------------------------------------------------------------------------------


def test_an_upload_by_hand(server: Server, content: LocalContent) -> None:
    """So that the lies below differ from this in one thing only."""
    xet, chunks = Xet(server, "ada", "ada/open"), made(1)
    file = described(chunks)
    assert file.sha256 is not None
    assert xet.shard(file).status_code == 400
    assert xet.xorb(chunks).json() == {"was_inserted": True}
    assert content.recipe(file.sha256) is None
    assert xet.shard(file).json() == {"result": 1}
    assert xet.shard(file).json() == {"result": 1}
    assert commit(server, "ada", "ada/open", lfs_file(file.sha256)).status_code == 200
    found = httpx2.get(f"{server.url}/ada/open/resolve/main/w.bin", headers={"Range": "bytes=1000-8000"})
    assert found.content == b"".join(chunks)[1000:8001]


LIES: dict[str, tuple[dict[str, Any], str]] = {
    "sha256": ({"sha256": "0" * 64}, "does not have the SHA-256"),
    "no sha256": ({"sha256": None}, "comes without its SHA-256"),
    "hash": ({"digest": b"x" * 32}, "another hash than its chunks give"),
    "proof": ({"proofs": [b"x" * 32]}, "wrong proof"),
    "no proof": ({"proofs": []}, "without the proof"),
    "length": ({"sizes": [1]}, "or other lengths"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_shard_that_lies(server: Server, content: LocalContent, lie: str) -> None:
    xet, chunks = Xet(server, "ada", "ada/open"), made(hash(lie) % 1000 + 10)
    assert xet.xorb(chunks).status_code == 200
    changes, sentence = LIES[lie]
    file = replace(described(chunks), **changes)
    answer = xet.shard(file)
    assert answer.status_code == 400
    assert sentence in answer.json()["error"]
    assert str(server.data) not in answer.text
    for sha256 in (described(chunks).sha256, file.sha256):
        assert sha256 is None or content.recipe(sha256) is None
    # A range that is not there.
    beyond = replace(described(chunks), terms=[(xorb(chunks)[0], [*chunks, b"x"], 0, len(chunks) + 1)])
    assert "which has 4" in xet.shard(beyond).json()["error"]


def test_a_xorb_that_lies(server: Server, content: LocalContent) -> None:
    xet = Xet(server, "ada", "ada/open")
    digest, data = xorb(made(2))
    other = hashes.text(b"y" * 32)
    assert xet.post(f"xorbs/default/{other}", data).status_code == 400
    assert xet.post(f"xorbs/default/{hashes.text(digest)}", data[:-5]).status_code == 400
    flipped = data[:500] + bytes([data[500] ^ 1]) + data[501:]
    assert xet.post(f"xorbs/default/{hashes.text(digest)}", flipped).status_code == 400
    assert xet.post("xorbs/default/..%2f..%2fserver.key", data).status_code == 400
    assert xet.post(f"xorbs/default/{hashes.text(digest)}", bytes(70 << 20)).status_code in (400, 413)
    assert not content.has_xorb(digest)
    assert not content.has_xorb(b"y" * 32)
    assert not list((server.data / "incoming").iterdir())


def test_an_upload_that_breaks_off(server: Server, content: LocalContent) -> None:
    xet = Xet(server, "ada", "ada/open")
    digest, data = xorb(made(3, 40))
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        head = (
            f"POST /cas/v1/xorbs/default/{hashes.text(digest)} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
        )
        connection.sendall(f"{head}Authorization: {xet.headers['Authorization']}\r\n\r\n".encode() + data[:50_000])
        time.sleep(0.2)
    for _ in range(50):
        if not list((server.data / "incoming").iterdir()):
            break
        time.sleep(0.1)
    assert not list((server.data / "incoming").iterdir())
    assert not content.has_xorb(digest)


def test_an_lfs_upload_that_lies(server: Server, content: LocalContent) -> None:
    data = random.Random(4).randbytes(3000)
    sha256 = hashlib.sha256(data).hexdigest()
    href = lfs_address(server, "ada", "ada/open", sha256, len(data))
    assert href is not None
    assert httpx2.put(href, content=data[:-1]).status_code == 400
    assert httpx2.put(href, content=data + b"x").status_code == 413
    assert httpx2.put(href, content=bytes(len(data))).status_code == 400
    assert httpx2.put(href.replace(f"size={len(data)}", "size=4000"), content=data).status_code == 403
    assert httpx2.put(href.replace(sha256, "0" * 64), content=data).status_code == 403
    assert httpx2.put(href.replace("holders=ada", "holders=bob"), content=data).status_code == 403
    assert content.size(sha256) is None
    assert httpx2.put(href, content=data).status_code == 200
    assert content.size(sha256) == len(data)


def lfs_address(server: Server, user: str, name: str, sha256: str, size: int) -> str | None:
    body = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": sha256, "size": size}]}
    headers = {"Authorization": f"Bearer {server.tokens[user]}"}
    answer = httpx2.post(f"{server.url}/{name}.git/info/lfs/objects/batch", json=body, headers=headers)
    (found,) = answer.json()["objects"]
    href = found.get("actions", {}).get("upload", {}).get("href")
    assert href is None or isinstance(href, str)
    return href


def test_a_small_shard_of_huge_files(server: Server, content: LocalContent) -> None:
    """The same chunks again and again: nothing is set aside for them, and nothing is put together."""
    xet, chunks = Xet(server, "ada", "ada/open"), [bytes([number % 256, number // 256]) for number in range(8192)]
    xet.xorb(chunks)
    digest, sizes = xorb(chunks)[0], len(b"".join(chunks))
    terms = [(digest, chunks, 0, 8192)] * 1025
    proof = hashes.range_hash(hashes.chunk_hash(data) for data in chunks)
    file = Described([], "0" * 64, b"x" * 32)
    data = bytearray(shard([file]))
    # A file of many terms, written by hand: its chunks are not to be hashed here either.
    head = 48
    data[head + 36 : head + 40] = len(terms).to_bytes(4, "little")
    entry = digest + struct.pack("<4I", 0, sizes, 0, 8192)
    data[head + 48 : head + 48] = entry * len(terms) + (proof + bytes(16)) * len(terms)
    began = time.monotonic()
    answer = xet.post("shards", bytes(data))
    assert answer.status_code == 400
    assert "more than 8388608" in answer.json()["error"]
    assert time.monotonic() - began < 5


# Other people's content -----------------------------------------------------------------------------------------------


def test_nobody_gets_at_private_content_by_its_hash(server: Server, content: LocalContent) -> None:
    chunks = made(5)
    file = described(chunks)
    sha256 = file.sha256
    assert sha256 is not None
    ada = Xet(server, "ada", "ada/secret")
    ada.xorb(chunks)
    ada.shard(file)
    assert commit(server, "ada", "ada/secret", lfs_file(sha256)).status_code == 200
    digest = hashes.text(hashes.file_hash(nodes(chunks)))
    first = hashes.text(hashes.chunk_hash(chunks[0]))
    assert ada.get(f"reconstructions/{digest}").status_code == 200
    assert ada.get(f"chunks/default/{first}").status_code == 200
    # Bob knows every hash there is, and none of the bytes.
    bob = Xet(server, "bob", "bob/own")
    assert bob.get(f"reconstructions/{digest}").status_code == 404
    assert bob.get(f"chunks/default/{first}").status_code == 404
    assert "was not uploaded" in bob.shard(file).json()["error"]
    assert "was not uploaded" in commit(server, "bob", "bob/own", lfs_file(sha256)).json()["error"]
    assert lfs_address(server, "bob", "bob/own", sha256, sum(map(len, chunks))) is not None
    assert lfs_address(server, "ada", "ada/secret", sha256, sum(map(len, chunks))) is None
    # Nor does one for one repository lead to what the same person has elsewhere.
    server.tokens["scoped"] = server.token("ada", repository="ada/open")
    scoped = Xet(server, "scoped", "ada/open")
    assert scoped.get(f"chunks/default/{first}").status_code == 404
    assert "was not uploaded" in scoped.shard(file).json()["error"]
    assert "was not uploaded" in commit(server, "scoped", "ada/open", lfs_file(sha256)).json()["error"]
    # Nor does a token for another repository of the same person.
    assert Xet(server, "ada", "ada/open", "read").get(f"reconstructions/{digest}").status_code == 404
    # Whoever has the bytes is told nothing either, and may then use them.
    assert bob.xorb(chunks).json() == {"was_inserted": True}
    assert bob.shard(file).status_code == 200
    assert commit(server, "bob", "bob/own", lfs_file(sha256)).status_code == 200


def test_naming_a_xorb_for_one_file_gives_nobody_the_others_in_it(server: Server) -> None:
    """A client packs several files into one xorb; one of them then goes to a namespace with other members."""
    ada_api, bob_api = server.api("ada"), server.api("bob")
    ada_api.create_repo("behind")
    ada_api.update_repo_settings("ada/behind", gated="manual")
    add_organisation(server.data, "club", ("ada", "bob"), private_by_default=False)
    ada_api.create_repo("club/shared")
    bob_api.create_repo("taken")
    chunks = [*made(21, 12), *made(22, 12)]
    digest = xorb(chunks)[0]
    secret, shared = (
        Described([(digest, chunks, begin, end)], hashlib.sha256(b"".join(chunks[begin:end])).hexdigest())
        for begin, end in ((0, 12), (12, 24))
    )
    assert secret.sha256 is not None
    assert shared.sha256 is not None
    ada = Xet(server, "ada", "ada/behind")
    ada.xorb(chunks)
    assert ada.shard(secret, shared).status_code == 200
    assert commit(server, "ada", "ada/behind", lfs_file(secret.sha256)).status_code == 200
    # She has them all, and need not send them again; the club has the one file, and none of its neighbours.
    assert Xet(server, "ada", "club/shared").shard(shared).status_code == 200
    assert commit(server, "ada", "club/shared", lfs_file(shared.sha256)).status_code == 200
    first = hashes.text(hashes.chunk_hash(chunks[12]))
    assert Xet(server, "bob", "club/shared").get(f"chunks/default/{first}").status_code == 404
    for name in ("club/shared", "bob/taken"):
        assert "was not uploaded" in Xet(server, "bob", name).shard(secret).json()["error"]
        assert "was not uploaded" in commit(server, "bob", name, lfs_file(secret.sha256)).json()["error"]
    assert commit(server, "bob", "bob/taken", lfs_file(shared.sha256)).status_code == 200
    # A xorb with nothing else in it is the club's.
    alone = made(23, 12)
    ada.xorb(alone)
    assert ada.shard(described(alone)).status_code == 200
    assert Xet(server, "ada", "club/shared").shard(described(alone)).status_code == 200
    first = hashes.text(hashes.chunk_hash(alone[0]))
    assert hashes.chunk_hash(alone[3]) in Xet(server, "bob", "club/shared").get(f"chunks/default/{first}").content


def test_the_same_answer_for_private_and_missing(server: Server, content: LocalContent) -> None:
    paths = ["api/models/{}", "api/models/{}/tree/main", "{}/resolve/main/w.bin", "api/models/{}/xet-read-token/main"]
    for headers in ({}, {"Authorization": f"Bearer {server.tokens['bob']}"}):
        for path in paths:
            answers = []
            for name in ("ada/secret", "ada/nothing"):
                found = httpx2.get(f"{server.url}/{path.format(name)}", headers=headers)
                kept = {key: value for key, value in found.headers.items() if key not in ("date", "x-request-id")}
                answers.append((found.status_code, found.content, kept))
            assert answers[0] == answers[1]
            assert answers[0][0] == (404 if headers else 401)


# Tokens and addresses -------------------------------------------------------------------------------------------------


def test_tokens(server: Server, content: LocalContent) -> None:
    def writes(token: str, name: str = "ada/open") -> int:
        return httpx2.get(
            f"{server.url}/api/models/{name}/auth-check/write", headers={"Authorization": f"Bearer {token}"}
        ).status_code

    assert writes(server.token("ada")) == writes(ADMIN) == 200
    assert writes(server.token("ada", "read")) == 403
    assert writes(server.token("ada", repository="ada/open")) == 200
    assert writes(server.token("ada", repository="lab/other")) == 403
    assert writes(server.token("ada", repository="lab/other"), "ada/secret") == 404
    expired = server.token("ada", days=1)
    assert writes(expired) == 200
    database = server.data / "server.sqlite"
    with sqlite3.connect(database) as db:
        db.execute("UPDATE tokens SET expires = 1 WHERE expires IS NOT NULL")
    db.close()
    for wrong in (expired, "x", server.tokens["ada"] + "x", "?"):
        answer = httpx2.get(f"{server.url}/api/whoami-v2", headers={"Authorization": f"Bearer {wrong}"})
        assert (answer.status_code, answer.json()["error"]) == (401, "Invalid credentials in Authorization header")
    # What is kept of a token is not the token.
    stored = b"".join(path.read_bytes() for path in server.data.glob("server.sqlite*"))
    assert server.tokens["ada"].encode() not in stored
    assert ADMIN.encode() not in stored


def test_xet_tokens_and_addresses(server: Server, content: LocalContent) -> None:
    chunks = made(6)
    xet, file = Xet(server, "ada", "ada/open"), described(chunks)
    xet.xorb(chunks)
    xet.shard(file)
    assert file.sha256 is not None
    commit(server, "ada", "ada/open", lfs_file(file.sha256))
    reader = Xet(server, "ada", "ada/open", "read")
    assert reader.xorb(chunks).status_code == 403
    assert reader.shard(file).status_code == 403
    digest = hashes.text(hashes.file_hash(nodes(chunks)))
    plan = reader.get(f"reconstructions/{digest}", Range=f"bytes={len(chunks[0]) + 5}-{len(chunks[0]) + 10}").json()
    assert plan["offset_into_first_range"] == 5
    assert [term["range"] for term in plan["terms"]] == [{"start": 1, "end": 2}]
    (fetch,) = plan["fetch_info"][plan["terms"][0]["hash"]]
    begin, end = fetch["url_range"]["start"], fetch["url_range"]["end"]
    got = httpx2.get(fetch["url"], headers={"Range": f"bytes={begin}-{end}"})
    assert (got.status_code, got.content[8:]) == (206, chunks[1])
    outside = httpx2.get(fetch["url"], headers={"Range": f"bytes={begin - 1}-{end}"})
    assert outside.status_code == 403
    for forged in (
        fetch["url"].replace(f"begin={begin}", "begin=0"),
        fetch["url"].replace("expires=", "expires=1"),
        fetch["url"][:-1] + ("0" if fetch["url"][-1] != "0" else "1"),
        fetch["url"].partition("?")[0],
    ):
        assert httpx2.get(forged).status_code == 403
    signer = Signer(load_key(server.data / "server.key"))
    name, past = plan["terms"][0]["hash"], int(time.time()) - 1
    signature = signer.signature("xorb", name, begin, end + 1, past)
    query = f"begin={begin}&end={end + 1}&expires={past}&signature={signature}"
    assert "expired" in httpx2.get(f"{server.url}/cas/xorbs/{name}?{query}").json()["error"]
    assert reader.get(f"reconstructions/{digest}", Range="bytes=99999999-").status_code == 416
    old = signer.token("xet", {"k": "model", "n": "ada/open", "h": ["ada"], "v": ["ada"], "s": "write"}, past)
    for token in (old, "x.y", reader.headers["Authorization"][7:] + "A", server.tokens["ada"], "?"):
        answer = httpx2.post(f"{server.url}/cas/v1/shards", headers={"Authorization": f"Bearer {token}"})
        assert answer.status_code == 401


def test_a_user_of_many_organisations() -> None:
    signer = Signer(b"k" * 32)
    spaces = [f"organisation-with-a-long-name-{number:04}" for number in range(400)]
    token = signer.token("xet", {"h": spaces[:1], "v": spaces}, 100)
    assert signer.claims("xet", token, 99) == {"h": spaces[:1], "v": spaces, "exp": 100}


@given(st.text(max_size=50), st.dictionaries(st.text(), st.integers() | st.text()))
def test_only_what_was_signed_is_believed(garbage: str, claims: dict[str, Any]) -> None:
    signer, other = Signer(b"k" * 32), Signer(b"o" * 32)
    token = signer.token("a", claims, 100)
    assert signer.claims("a", token, 99) == {**claims, "exp": 100}
    assert signer.claims("a", token, 100) is None
    assert signer.claims("b", token, 99) is None
    assert other.claims("a", token, 99) is None
    assert signer.claims("a", garbage, 99) is None
    assert signer.claims("a", f"{token.partition('.')[0]}.{garbage}", 99) is None
