"""Git LFS: uploads in parts, downloads, and what is not believed of either."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub.errors import HfHubHTTPError

from surgery.hub.content import LocalContent
from surgery.hub.server.lfs import PART
from surgery.hub.store import open_registry
from tests.hub.registry_tools import assert_sound
from tests.hub.server.serving import Server
from tests.hub.server.test_protocol import put
from tests.hub.server.test_safety import commit, lfs_file


@pytest.fixture(scope="module", autouse=True)
def opened(server: Server) -> None:
    server.api("ada").create_repo("open")
    server.api("ada").create_repo("secret", private=True)


def batch(server: Server, user: str, name: str, operation: str, sha256: str, size: int) -> Any:
    body = {
        "operation": operation, "transfers": ["basic", "multipart"], "objects": [{"oid": sha256, "size": size}],
        "ref": {"name": "main"},
    }  # fmt: skip
    headers = {"Authorization": f"Bearer {server.tokens[user]}"}
    answer = httpx2.post(f"{server.url}/{name}.git/info/lfs/objects/batch", json=body, headers=headers)
    return answer.json()["objects"][0] if answer.status_code == 200 else answer.status_code


def test_a_large_file_goes_in_parts(server: Server, tmp_path: Path) -> None:
    data = random.Random(1).randbytes(2 * PART + 12345)
    path = tmp_path / "w.bin"
    path.write_bytes(data)
    server.client(
        f"api.upload_file(path_or_fileobj={str(path)!r}, path_in_repo='w.bin', repo_id='ada/open')",
        HF_HUB_DISABLE_XET="1",
    )
    found = server.api().hf_hub_download("ada/open", "w.bin", local_dir=tmp_path / "there")
    assert Path(found).read_bytes() == data
    # Nothing is left of the parts.
    assert server.stored() == len(data)
    sha256 = hashlib.sha256(data).hexdigest()
    download = batch(server, "bob", "ada/open", "download", sha256, len(data))["actions"]["download"]["href"]
    answer = httpx2.get(download, headers={"Range": "bytes=5-9"})
    assert (answer.status_code, answer.content) == (206, data[5:10])
    assert httpx2.get(download.replace(sha256, "0" * 64)).status_code == 403
    assert httpx2.get(download.replace("expires=", "expires=1")).status_code == 403
    assert httpx2.put(download, content=b"x").status_code == 403
    assert batch(server, "bob", "ada/open", "download", "0" * 64, 5)["error"]["code"] == 404
    assert batch(server, "bob", "ada/open", "download", sha256, 5)["error"]["code"] == 404
    assert batch(server, "bob", "ada/secret", "download", sha256, len(data)) == 404
    assert batch(server, "bob", "ada/open", "upload", sha256, len(data)) == 403
    assert batch(server, "bob", "ada/open", "look", sha256, len(data)) == 422


def test_parts_that_lie(server: Server) -> None:
    content = LocalContent(server.data)
    data = random.Random(2).randbytes(PART + 5000)
    sha256 = hashlib.sha256(data).hexdigest()
    action = batch(server, "ada", "ada/open", "upload", sha256, len(data))["actions"]["upload"]
    header, href = action["header"], action["href"]
    assert int(header["chunk_size"]) == PART
    assert sorted(header) == ["00001", "00002", "chunk_size"]
    first, second = data[:PART], data[PART:]

    def put(number: str, part: bytes, address: str = "") -> httpx2.Response:
        return httpx2.put(address or header[number], content=part)

    def join(*etags: str) -> httpx2.Response:
        parts = [{"partNumber": number, "etag": etag} for number, etag in enumerate(etags, 1)]
        return httpx2.post(href, json={"oid": sha256, "parts": parts})

    assert put("00002", second[:-1]).status_code == 400
    assert put("00002", second + b"x").status_code == 413
    assert put("", second, header["00001"].replace("/1?", "/2?")).status_code == 403
    assert put("", second, href).status_code == 403
    one, two = put("00001", first).headers["etag"], put("00002", second).headers["etag"]
    other = put("00002", bytes(len(second))).headers["etag"]
    assert join(one).status_code == 400
    assert join(one, other).status_code == 400
    assert join(two, one).status_code == 422
    assert join(one, two.partition(".")[0]).status_code == 422
    assert content.size(sha256) is None
    # Nor is a file of somebody else's put together from its hash alone.
    private = random.Random(3).randbytes(PART + 1)
    secret = hashlib.sha256(private).hexdigest()
    server.api("ada").upload_file(path_or_fileobj=private, path_in_repo="w.bin", repo_id="ada/secret")
    server.api("bob").create_repo("bob/own", exist_ok=True)
    aim = batch(server, "bob", "bob/own", "upload", secret, len(private))["actions"]["upload"]["href"]
    forged = {"partNumber": 1, "etag": f'"{secret}.{"0" * 64}"'}
    assert httpx2.post(aim, json={"oid": secret, "parts": [forged]}).status_code == 422
    assert "was not uploaded" in commit(server, "bob", "bob/own", lfs_file(secret)).json()["error"]
    assert httpx2.post(href, json={"oid": sha256, "parts": []}).status_code == 422
    assert httpx2.post(href, json={"oid": sha256, "parts": ["x"]}).status_code == 422
    assert join(one, two).status_code == 200
    assert content.size(sha256) == len(data)
    assert join(one, two).status_code == 409
    assert commit(server, "ada", "ada/open", lfs_file(sha256)).status_code == 200
    assert not list((server.data / "incoming").iterdir())


def test_large_files_are_taken_out_of_the_history(server: Server, tmp_path: Path) -> None:
    api = server.api()
    api.create_repo("lean")
    files = {name: random.Random(name).randbytes(20_000) for name in ("old.bin", "new.bin", "kept.bin")}
    put(api, "ada/lean", {"a.txt": b"a"})
    first = api.list_repo_commits("ada/lean")[0].commit_id
    for name, data in files.items():
        api.upload_file(path_or_fileobj=data, path_in_repo=name, repo_id="ada/lean", commit_message=name)
    api.delete_file("old.bin", "ada/lean")
    api.create_tag("ada/lean", tag="v1")
    pull = api.create_pull_request("ada/lean", title="Change")
    put(api, "ada/lean", {"b.txt": b"b"}, revision="refs/pr/1")
    listed = {item.filename: item for item in api.list_lfs_files("ada/lean")}
    assert {name: item.size for name, item in listed.items()} == dict.fromkeys(files, 20_000)
    assert listed["old.bin"].file_oid == hashlib.sha256(files["old.bin"]).hexdigest()
    with pytest.raises(HfHubHTTPError) as error:
        server.api("bob").permanently_delete_lfs_files("ada/lean", [listed["old.bin"]])
    assert error.value.response.status_code == 403
    with pytest.raises(HfHubHTTPError, match="A commit never loses its files here"):
        api.permanently_delete_lfs_files("ada/lean", [listed["old.bin"]], rewrite_history=False)
    api.permanently_delete_lfs_files("ada/lean", [listed["old.bin"], listed["new.bin"]])
    assert [item.filename for item in api.list_lfs_files("ada/lean")] == ["kept.bin"]
    history = api.list_repo_commits("ada/lean")
    assert [found.title for found in history][-3:] == ["old.bin", "files", "initial commit"]
    assert history[-2].commit_id == first
    for found in history:
        assert not {"old.bin", "new.bin"} & set(api.list_repo_files("ada/lean", revision=found.commit_id))
    for revision in ("main", "v1", "refs/pr/1"):
        path = api.hf_hub_download("ada/lean", "kept.bin", revision=revision, local_dir=tmp_path / revision)
        assert Path(path).read_bytes() == files["kept.bin"]
    api.merge_pull_request("ada/lean", pull.num)
    assert api.list_repo_files("ada/lean") == ["a.txt", "b.txt", "kept.bin"]
    registry = open_registry(server.data)
    assert_sound(registry)
    for name in ("old.bin", "new.bin"):
        assert registry.content.size(listed[name].file_oid) is None
    registry.close()
