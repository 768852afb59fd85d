"""Gated repositories: everybody sees what they are, and only who was let in opens their files."""

from __future__ import annotations

import hashlib
import random
import secrets
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from tests.hub.server.serving import Server
from tests.hub.server.test_protocol import put, status, text
from tests.hub.server.test_safety import commit, lfs_address, lfs_file


@pytest.fixture(scope="module")
def api(server: Server) -> HfApi:
    return server.api()


def ask(server: Server, user: str, name: str) -> httpx2.Response:
    headers = {"Authorization": f"Bearer {server.tokens[user]}"}
    return httpx2.post(f"{server.url}/{name}/ask-access", headers=headers)


def opens(api: HfApi, name: str, folder: Path) -> str:
    """What a client reads that has never seen the repository."""
    return Path(api.hf_hub_download(name, "a.txt", local_dir=folder / secrets.token_hex(4))).read_text()


def gated(api: HfApi, name: str, mode: str) -> None:
    api.create_repo(name)
    put(api, name, {"README.md": b"---\ntags: [secret-recipe]\n---\n", "a.txt": b"a"})
    api.update_repo_settings(name, gated=mode)  # type: ignore[arg-type]  # one of two words, from a list of tests


def test_who_is_not_let_in(api: HfApi, server: Server, tmp_path: Path) -> None:
    gated(api, "ada/manual", "manual")
    bob, nobody = server.api("bob"), server.api(None)
    for stranger in (bob, nobody):
        info = stranger.model_info("ada/manual")
        assert (info.gated, info.tags) == ("manual", ["secret-recipe"])
        assert stranger.list_repo_files("ada/manual") == ["README.md", "a.txt"]
        assert "secret-recipe" in text(stranger, "ada/manual", "README.md", folder=tmp_path)
        with pytest.raises(GatedRepoError) as error:
            opens(stranger, "ada/manual", tmp_path)
        assert status(error.value) == (403 if stranger is bob else 401)
        for path in ("xet-read-token/main", "discussions"):
            assert httpx2.get(f"{server.url}/api/models/ada/manual/{path}").status_code in (200, 401)
        with pytest.raises(HfHubHTTPError):
            stranger.duplicate_repo("ada/manual", "bob/mine")
        with pytest.raises(HfHubHTTPError):
            stranger.create_pull_request("ada/manual", title="In")
    (listed,) = nobody.list_models(search="ada/manual", expand=["gated"])
    assert listed.gated == "manual"
    assert [found.id for found in nobody.list_models(search="ada/manual", gated=True)] == ["ada/manual"]
    assert not list(nobody.list_models(search="ada/manual", gated=False))
    # Its own people need nobody's leave.
    assert opens(api, "ada/manual", tmp_path) == "a"
    assert opens(server.api("admin"), "ada/manual", tmp_path) == "a"


def test_by_hand(api: HfApi, server: Server, tmp_path: Path) -> None:
    gated(api, "ada/by-hand", "manual")
    bob = server.api("bob")
    assert ask(server, "bob", "ada/by-hand").json() == {"status": "pending"}
    with pytest.raises(GatedRepoError, match="awaits an answer"):
        opens(bob, "ada/by-hand", tmp_path)
    with pytest.raises(HfHubHTTPError) as error:
        list(bob.list_pending_access_requests("ada/by-hand"))
    assert status(error.value) == 403
    (request,) = api.list_pending_access_requests("ada/by-hand")
    assert (request.username, request.status) == ("bob", "pending")
    api.accept_access_request("ada/by-hand", request_id=request.request_id)
    assert opens(bob, "ada/by-hand", tmp_path) == "a"
    assert not list(api.list_pending_access_requests("ada/by-hand"))
    with pytest.raises(HfHubHTTPError, match="accepted already") as error:
        api.accept_access_request("ada/by-hand", "bob")
    assert status(error.value) == 404
    api.reject_access_request("ada/by-hand", "bob", rejection_reason="No")
    with pytest.raises(GatedRepoError, match="was rejected"):
        opens(bob, "ada/by-hand", tmp_path)
    # Asking again does not undo that.
    assert ask(server, "bob", "ada/by-hand").json() == {"status": "rejected"}
    assert [request.username for request in api.list_rejected_access_requests("ada/by-hand")] == ["bob"]
    api.cancel_access_request("ada/by-hand", "bob")
    assert [request.username for request in api.list_pending_access_requests("ada/by-hand")] == ["bob"]
    with pytest.raises(HfHubHTTPError) as error:
        api.accept_access_request("ada/by-hand", "eve")
    assert status(error.value) == 404


def test_at_once_and_unasked(api: HfApi, server: Server, tmp_path: Path) -> None:
    gated(api, "ada/auto", "auto")
    bob = server.api("bob")
    with pytest.raises(GatedRepoError, match=r"ask for it with a POST to .*/ada/auto/ask-access"):
        opens(bob, "ada/auto", tmp_path)
    assert ask(server, "bob", "ada/auto").json() == {"status": "accepted"}
    assert opens(bob, "ada/auto", tmp_path) == "a"
    # A token for another repository is not let in with its user.
    scoped = server.api(server.token("bob", repository="bob/own"))
    with pytest.raises(GatedRepoError):
        scoped.hf_hub_download("ada/auto", "a.txt", local_dir=tmp_path / "scoped")
    gated(api, "ada/granted", "manual")
    api.grant_access("ada/granted", "bob")
    assert opens(bob, "ada/granted", tmp_path) == "a"
    with pytest.raises(HfHubHTTPError, match="has access to ada/granted already"):
        api.grant_access("ada/granted", "bob")
    with pytest.raises(HfHubHTTPError, match="no user called eve"):
        api.grant_access("ada/granted", "eve")
    api.update_repo_settings("ada/granted", gated=False)
    with pytest.raises(HfHubHTTPError, match="is not gated"):
        api.grant_access("ada/granted", "bob")
    assert not api.model_info("ada/granted").gated
    with pytest.raises(ValueError, match="gated"):
        api.update_repo_settings("ada/granted", gated="maybe")  # type: ignore[arg-type]  # what the client refuses
    headers = {"Authorization": f"Bearer {server.tokens['ada']}"}
    answer = httpx2.put(f"{server.url}/api/models/ada/granted/settings", json={"gated": "maybe"}, headers=headers)
    assert (answer.status_code, answer.json()["error"]) == (400, "gated has to be auto, manual or false.")


def test_no_way_around_by_hashes(api: HfApi, server: Server) -> None:
    """Everybody sees the SHA-256 of what is behind a gate; nobody may commit it elsewhere for that."""
    gated(api, "ada/hashed", "manual")
    data = random.Random(9).randbytes(5000)
    sha256 = hashlib.sha256(data).hexdigest()
    api.upload_file(path_or_fileobj=data, path_in_repo="w.bin", repo_id="ada/hashed")
    bob = server.api("bob")
    bob.create_repo("bob/copy")
    (found,) = bob.get_paths_info("ada/hashed", "w.bin")
    assert getattr(found, "lfs", None) is not None
    assert "was not uploaded" in commit(server, "bob", "bob/copy", lfs_file(sha256)).json()["error"]
    assert lfs_address(server, "bob", "bob/copy", sha256, len(data)) is not None
    headers = {"Authorization": f"Bearer {server.tokens['bob']}"}
    token = httpx2.get(f"{server.url}/api/models/ada/hashed/xet-read-token/main", headers=headers)
    assert (token.status_code, token.headers["x-error-code"]) == (403, "GatedRepo")
    api.grant_access("ada/hashed", "bob")
    assert commit(server, "bob", "bob/copy", lfs_file(sha256)).status_code == 200


def test_a_copy_has_the_gate_of_its_source(api: HfApi, server: Server, tmp_path: Path) -> None:
    """Whoever was let in makes no copy for everybody by that alone; the people of the source may say otherwise."""
    gated(api, "ada/source", "manual")
    api.grant_access("ada/source", "bob")
    bob, nobody = server.api("bob"), server.api(None)
    bob.duplicate_repo("ada/source", "bob/kept")
    assert nobody.model_info("bob/kept").gated == "manual"
    assert opens(bob, "bob/kept", tmp_path) == "a"
    with pytest.raises(GatedRepoError):
        opens(nobody, "bob/kept", tmp_path)
    asked: tuple[tuple[str, str, object, object], ...] = (
        ("bob", "opened", False, "manual"), ("bob", "eased", "auto", "manual"),
        ("ada", "same", None, False), ("ada", "opened", False, False), ("ada", "eased", "auto", "auto"),
    )  # fmt: skip
    for user, name, gate, expected in asked:
        headers = {"Authorization": f"Bearer {server.tokens[user]}"}
        body = {"repository": f"{user}/{name}", "gated": gate}
        answer = httpx2.post(f"{server.url}/api/models/ada/source/duplicate", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        assert nobody.model_info(f"{user}/{name}").gated == expected
    api.create_repo("ada/open")
    api.duplicate_repo("ada/open", "ada/open-too")
    assert nobody.model_info("ada/open-too").gated is False


def test_a_private_gate_is_private(api: HfApi, server: Server) -> None:
    gated(api, "ada/both", "auto")
    api.update_repo_settings("ada/both", private=True)
    with pytest.raises(RepositoryNotFoundError):
        server.api("bob").model_info("ada/both")
    assert ask(server, "bob", "ada/both").status_code == 404
