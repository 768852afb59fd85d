"""The server is killed, and clients come at once: a commit is there whole or not at all, none is lost or doubled."""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub.errors import HfHubHTTPError

from surgery.hub.content import LocalContent
from surgery.hub.naming import parse_repository
from surgery.hub.store import open_registry
from surgery.hub.xet import hashes
from tests.hub.registry_tools import assert_sound
from tests.hub.server.serving import Server, serving

CLIENTS, COMMITS = 4, 5


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path) as server:
        yield server


def test_commits_of_several_clients_at_once(server: Server) -> None:
    server.api().create_repo("busy")

    def work(number: int) -> object:
        return server.client(
            f"""
            from concurrent.futures import ThreadPoolExecutor

            def commit(turn):
                data = b"%d %d" % ({number}, turn)
                path = f"{number}-{{turn}}.txt"
                return api.upload_file(path_or_fileobj=data, path_in_repo=path, repo_id="ada/busy").oid

            with ThreadPoolExecutor(2) as pool:
                commits = list(pool.map(commit, range({COMMITS})))
            weights = hashlib.sha256(b"{number}").digest() * 1000
            path = "{number}.bin"
            commits.append(api.upload_file(path_or_fileobj=weights, path_in_repo=path, repo_id="ada/busy").oid)
            print(json.dumps(commits))
            """
        )

    with ThreadPoolExecutor(CLIENTS) as pool:
        said = [commit for commits in pool.map(work, range(CLIENTS)) for commit in commits]  # type: ignore[attr-defined]  # lists
    api = server.api()
    expected = {f"{number}-{turn}.txt" for number in range(CLIENTS) for turn in range(COMMITS)}
    assert set(api.list_repo_files("ada/busy")) == expected | {f"{number}.bin" for number in range(CLIENTS)}
    history = [commit.commit_id for commit in api.list_repo_commits("ada/busy")]
    assert sorted(history[:-1]) == sorted(said)
    assert len(set(history)) == CLIENTS * (COMMITS + 1) + 1
    with open_registry(server.data) as registry:
        assert assert_sound(registry) == len(history)


def test_only_one_of_several_commits_on_one_parent(server: Server) -> None:
    api = server.api()
    api.create_repo("raced")
    parent = api.model_info("ada/raced").sha

    def commit(number: int) -> int:
        path = f"{number}.txt"
        try:
            server.api().upload_file(path_or_fileobj=b"x", path_in_repo=path, repo_id="ada/raced", parent_commit=parent)
        except HfHubHTTPError as error:
            return error.response.status_code
        return 200

    with ThreadPoolExecutor(6) as pool:
        assert sorted(pool.map(commit, range(6))) == [200] + [412] * 5
    assert len(api.list_repo_files("ada/raced")) == 1


UPLOAD = """
import os
api.create_repo("killed", exist_ok=True)
for turn in range(1000):
    for name in ("a", "b"):
        with open(f"{home}/{{name}}.safetensors", "wb") as file:
            file.write(os.urandom(3_000_000))
    api.upload_folder(repo_id="ada/killed", folder_path={home!r}, commit_message=str(turn))
"""


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.2, 0.7, 1.3])
def test_nothing_is_half_there_after_a_kill(own: Server, tmp_path: Path, delay: float) -> None:
    home = tmp_path / "files"
    home.mkdir()
    command = own.command(UPLOAD.format(home=str(home)), "ada", None, {"HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1"})
    del command["capture_output"]
    name = parse_repository("ada/killed")
    with subprocess.Popen(**command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as client:
        # Once it is at work, and has committed something.
        for _ in range(400):
            if any((own.data / "incoming").glob("*")):
                break
            time.sleep(0.02)
        time.sleep(delay + random.random() * 0.2)
        own.stop(signal.SIGKILL)
        client.kill()
    with open_registry(own.data) as registry:
        assert assert_sound(registry) >= 1
        assert not list((own.data / "incoming").iterdir())
        content = registry.content
        assert isinstance(content, LocalContent)
        for path in (own.data / "xorbs").rglob("*"):
            if path.is_file():
                digest = hashes.digest_of(path.name)
                assert digest is not None
                assert content.open_xorb(digest).index.digest == digest
        for commit in registry.metadata.history(name, registry.metadata.refs(name)["refs/heads/main"]):
            paths = [entry.path for entry in registry.metadata.files(commit.tree)]
            assert paths in ([], ["a.safetensors", "b.safetensors"])
    # The server comes back on the same data, and a client goes on where it was.
    own.start()
    own.client(
        f"""
        api.upload_folder(repo_id="ada/killed", folder_path={str(home)!r}, commit_message="after")
        """
    )
    found = own.client(
        """
        from huggingface_hub import snapshot_download
        folder = pathlib.Path(snapshot_download("ada/killed"))
        print(json.dumps(sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir())))
        """
    )
    assert found == sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in home.iterdir())
