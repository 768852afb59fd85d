"""The Hub's protocol as the stock client speaks it: what it gets back, and which of its own exceptions it raises."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile, RepoFolder

import surgery
from surgery.hub.naming import RepositoryName
from surgery.hub.server.run import add_organisation
from surgery.hub.store import open_registry
from tests.hub.server.serving import Server


@pytest.fixture(scope="module")
def api(server: Server) -> HfApi:
    return server.api()


def put(api: HfApi, name: str, files: dict[str, bytes], **options: Any) -> str:
    """Commit small files; returns the commit."""
    operations = [CommitOperationAdd(path, data) for path, data in files.items()]
    return api.create_commit(name, operations, commit_message=options.pop("message", "files"), **options).oid


def text(api: HfApi, name: str, path: str, revision: str | None = None, folder: Path | None = None) -> str:
    found = api.hf_hub_download(name, path, revision=revision, local_dir=folder, force_download=True)
    return Path(found).read_text()


def status(error: HfHubHTTPError) -> int:
    return error.response.status_code


def test_who_somebody_is(server: Server) -> None:
    found = server.api().whoami()
    assert (found["name"], [org["name"] for org in found["orgs"]]) == ("ada", ["lab"])
    assert found["auth"]["accessToken"]["role"] == "write"
    with pytest.raises(HfHubHTTPError) as error:
        server.api("no-such-token-at-all").whoami()
    assert status(error.value) == 401


def test_making_moving_and_removing(api: HfApi, server: Server, tmp_path: Path) -> None:
    assert api.create_repo("made") == f"{server.url}/ada/made"
    with pytest.raises(HfHubHTTPError, match="already created") as error:
        api.create_repo("ada/made")
    assert status(error.value) == 409
    assert api.create_repo("ADA/Made", exist_ok=True).repo_id.lower() == "ada/made"
    put(api, "ada/made", {"a.txt": b"one"})
    assert api.model_info("Ada/MADE").id == "ada/made"
    api.move_repo("ada/made", "lab/moved")
    assert text(api, "lab/moved", "a.txt", folder=tmp_path) == "one"
    assert api.model_info("ada/made").id == "lab/moved"
    assert text(api, "ada/made", "a.txt", folder=tmp_path / "old") == "one"
    api.create_repo("other")
    with pytest.raises(HfHubHTTPError, match="A model repository called ada/other already exists"):
        api.move_repo("lab/moved", "ada/other")
    api.delete_repo("lab/moved")
    for gone in ("lab/moved", "ada/made"):
        with pytest.raises(RepositoryNotFoundError):
            api.model_info(gone)
    api.delete_repo("lab/moved", missing_ok=True)
    assert api.create_repo("ada/made").repo_id == "ada/made"


@pytest.mark.parametrize("name", ["nobody/x", "bob/x", "ada/tree", "ada/x.git", "ada/x--y"])
def test_what_may_not_be_made(server: Server, name: str) -> None:
    url, headers = f"{server.url}/api/repos/create", {"Authorization": f"Bearer {server.tokens['ada']}"}
    namespace, _, last = name.partition("/")
    answer = httpx2.post(url, json={"name": last, "organization": namespace}, headers=headers)
    assert answer.status_code in (400, 403, 404)
    assert answer.json()["error"]


def test_files_and_folders(api: HfApi, tmp_path: Path) -> None:
    api.create_repo("files")
    head = put(api, "ada/files", {"a.txt": b"a", "sub/b.txt": b"bb", "sub/deep/c.txt": b"ccc"})
    assert [item.path for item in api.list_repo_tree("ada/files")] == ["a.txt", "sub"]
    every = list(api.list_repo_tree("ada/files", recursive=True, expand=True))
    assert [(item.path, isinstance(item, RepoFolder)) for item in every] == [
        ("a.txt", False), ("sub", True), ("sub/b.txt", False), ("sub/deep", True), ("sub/deep/c.txt", False),
    ]  # fmt: skip
    assert all(item.last_commit is not None and item.last_commit.oid == head for item in every)
    assert [item.path for item in api.list_repo_tree("ada/files", "sub")] == ["sub/b.txt", "sub/deep"]
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree("ada/files", "nowhere"))
    infos = api.get_paths_info("ada/files", ["a.txt", "sub", "nowhere"], expand=True)
    assert [type(item) for item in infos] == [RepoFile, RepoFolder]
    second = put(api, "ada/files", {"a.txt": b"A"})
    (info,) = api.get_paths_info("ada/files", "sub/b.txt", expand=True)
    assert info.last_commit is not None
    assert info.last_commit.oid == head
    assert api.file_exists("ada/files", "a.txt")
    assert not api.file_exists("ada/files", "b.txt")
    assert text(api, "ada/files", "a.txt", revision=head, folder=tmp_path) == "a"
    assert text(api, "ada/files", "a.txt", revision=second[:8], folder=tmp_path) == "A"
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download("ada/files", "b.txt")
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download("ada/files", "a.txt", revision="nowhere")


def test_how_far_back_the_last_change_is_looked_for(api: HfApi, server: Server) -> None:
    """A history of any length costs no more than 200 commits; beyond that nothing is said, as clients allow."""
    api.create_repo("long")
    first = put(api, "ada/long", {"old/a.txt": b"a", "b.txt": b"b"})
    name = RepositoryName("ada", "long")
    with open_registry(server.data) as registry:
        head = registry.head(name, "main")
        assert head is not None
        newest = head.commit
        for number in range(200):
            added = [replace(head.files[0], path=f"c-{number}.txt")]
            newest = registry.commit(name, "main", newest.id, [*head.files, *added], f"{number}", {})
            if number == 198:
                (found,) = api.get_paths_info("ada/long", "old", expand=True)
                assert found.last_commit is not None
                assert found.last_commit.oid == first
    listed = {item.path: item.last_commit for item in api.list_repo_tree("ada/long", recursive=True, expand=True)}
    known = {path: None if commit is None else commit.oid for path, commit in listed.items()}
    assert known == {"old": None, "old/a.txt": None, "b.txt": None, "c-199.txt": newest.id}
    (found,) = api.get_paths_info("ada/long", "old", expand=True)
    assert found.last_commit is None


def test_commits(api: HfApi) -> None:
    api.create_repo("history")
    first = put(api, "ada/history", {"a.txt": b"a", "b.txt": b"b", "dir/c.txt": b"c"}, commit_description="Body")
    operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
        CommitOperationDelete("a.txt"),
        CommitOperationDelete("dir/"),
        CommitOperationCopy("b.txt", "copied.txt"),
        CommitOperationAdd("w.bin", b"weights"),
    ]
    second = api.create_commit("ada/history", operations, commit_message="Change", parent_commit=first)
    assert api.list_repo_files("ada/history") == ["b.txt", "copied.txt", "w.bin"]
    assert second.commit_url.endswith(f"/ada/history/commit/{second.oid}")
    with pytest.raises(HfHubHTTPError, match="The branch was updated since you opened this page") as error:
        put(api, "ada/history", {"x": b""}, parent_commit=first)
    assert status(error.value) == 412
    history = api.list_repo_commits("ada/history")
    assert [(commit.commit_id, commit.title, commit.message) for commit in history[:2]] == [
        (second.oid, "Change", ""),
        (first, "files", "Body"),
    ]
    # The same again changes nothing, so that a client that did not hear the answer may ask again.
    again = put(api, "ada/history", {"b.txt": b"b"}, message="Again")
    assert again == second.oid
    with pytest.raises(RemoteEntryNotFoundError):
        api.delete_file("nowhere.txt", "ada/history")
    with pytest.raises(HfHubHTTPError, match="both as a file and as a folder"):
        put(api, "ada/history", {"b.txt/x": b""})
    with pytest.raises(RevisionNotFoundError):
        put(api, "ada/history", {"x": b""}, revision="nowhere")


def test_a_card_is_checked(api: HfApi) -> None:
    api.create_repo("card")
    with pytest.raises((HfHubHTTPError, ValueError), match="no YAML"):
        put(api, "ada/card", {"README.md": b"---\na: [\n---\n"})
    with pytest.raises((HfHubHTTPError, ValueError), match="aliases"):
        put(api, "ada/card", {"README.md": b"---\na: &x [1]\nb: [*x, *x]\n---\n"})
    put(api, "ada/card", {"README.md": b"---\nlicense: mit\ntags: [x]\nbase_model: lab/base\ndate: 2026-01-02\n---\n"})
    info = api.model_info("ada/card")
    assert info.card_data is not None
    assert info.card_data.to_dict()["date"] == "2026-01-02"
    assert {"x", "license:mit", "base_model:lab/base"} <= set(info.tags or [])


def test_branches_and_tags(api: HfApi, tmp_path: Path) -> None:
    api.create_repo("branches")
    first = put(api, "ada/branches", {"a.txt": b"1"})
    api.create_branch("ada/branches", branch="side")
    put(api, "ada/branches", {"a.txt": b"2"}, revision="side")
    assert text(api, "ada/branches", "a.txt", folder=tmp_path) == "1"
    assert text(api, "ada/branches", "a.txt", revision="side", folder=tmp_path / "side") == "2"
    assert text(api, "ada/branches", "a.txt", revision="refs/heads/side", folder=tmp_path / "ref") == "2"
    api.create_tag("ada/branches", tag="v1", revision="side")
    api.create_branch("ada/branches", branch="with/slash", revision=first)
    refs = api.list_repo_refs("ada/branches", include_pull_requests=True)
    assert {ref.name for ref in refs.branches} == {"main", "side", "with/slash"}
    assert [ref.name for ref in refs.tags] == ["v1"]
    with pytest.raises(HfHubHTTPError, match="Reference refs/heads/side already exists") as error:
        api.create_branch("ada/branches", branch="side")
    assert status(error.value) == 409
    api.create_branch("ada/branches", branch="side", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="already exists"):
        api.create_tag("ada/branches", tag="v1")
    with pytest.raises(RevisionNotFoundError):
        api.create_tag("ada/branches", tag="v2", revision="nowhere")
    with pytest.raises(HfHubHTTPError, match="Cannot delete refs/heads/main"):
        api.delete_branch("ada/branches", branch="main")
    api.delete_branch("ada/branches", branch="side")
    assert text(api, "ada/branches", "a.txt", revision="v1", folder=tmp_path / "tag") == "2"
    api.delete_tag("ada/branches", tag="v1")
    with pytest.raises(RevisionNotFoundError):
        api.delete_tag("ada/branches", tag="v1")


def test_lists(api: HfApi, server: Server) -> None:
    for name in ("list-a", "list-b", "list-c"):
        api.create_repo(name)
        put(api, f"ada/{name}", {"README.md": f"---\ntags: [t-{name}]\n---\n".encode()})
    api.create_repo("ada/list-private", private=True)
    found = {model.id for model in api.list_models(search="LIST-")}
    assert found == {"ada/list-a", "ada/list-b", "ada/list-c", "ada/list-private"}
    assert {model.id for model in server.api("bob").list_models(search="list-")} == found - {"ada/list-private"}
    assert {model.id for model in server.api(None).list_models(search="list-")} == found - {"ada/list-private"}
    assert [model.id for model in api.list_models(filter="t-list-b")] == ["ada/list-b"]
    assert not list(api.list_models(author="bob", search="list-"))
    newest = [model.id for model in api.list_models(search="list-", sort="created_at", limit=2)]
    assert len(newest) == 2
    # Pages lead to each other on this server.
    headers = {"Authorization": f"Bearer {server.tokens['ada']}"}
    url, seen = f"{server.url}/api/models?search=list-&limit=1", []
    while url:
        answer = httpx2.get(url, headers=headers)
        seen += [item["id"] for item in answer.json()]
        url = answer.links["next"]["url"] if "next" in answer.links else ""
        assert url == "" or url.startswith(server.url)
    assert sorted(seen) == sorted(found)


def test_settings_and_rights(api: HfApi, server: Server) -> None:
    api.create_repo("rights")
    put(api, "ada/rights", {"a.txt": b"a"})
    api.auth_check("ada/rights", write=True)
    with pytest.raises(HfHubHTTPError) as error:
        put(server.api("bob"), "ada/rights", {"b.txt": b"b"})
    assert status(error.value) == 403
    api.update_repo_settings("ada/rights", private=True)
    for user in ("bob", None):
        with pytest.raises(RepositoryNotFoundError):
            server.api(user).model_info("ada/rights")
    assert api.model_info("ada/rights").private


def test_an_old_name_can_be_written_to(api: HfApi) -> None:
    api.create_repo("before")
    api.move_repo("ada/before", "lab/after")
    put(api, "ada/before", {"a.txt": b"a"})
    api.create_branch("ada/before", branch="side")
    assert api.list_repo_files("lab/after", revision="side") == ["a.txt"]


def test_where_an_old_name_leads(api: HfApi, server: Server) -> None:
    api.create_repo("earlier")
    api.move_repo("ada/earlier", "lab/later")
    headers = {"Authorization": f"Bearer {server.tokens['ada']}"}
    for path, there in (
        ("api/models/ada/e%61rlier/tree/main?x=1", "/api/models/lab/later/tree/main?x=1"),
        ("ada/earlier/resolve/main/a/ada/earlier", "/lab/later/resolve/main/a/ada/earlier"),
    ):
        found = httpx2.get(f"{server.url}/{path}", headers=headers)
        assert (found.status_code, found.headers["location"]) == (307, there)
    url = f"{server.url}/ada/earlier.git/info/lfs/objects/batch"
    found = httpx2.post(url, json={"operation": "download", "objects": []}, headers=headers)
    assert (found.status_code, found.headers["location"]) == (307, "/lab/later.git/info/lfs/objects/batch")
    # A name in a body cannot be redirected: a client would ask the same again and again.
    with pytest.raises(RepositoryNotFoundError, match="It is called lab/later now"):
        api.delete_repo("ada/earlier")
    with pytest.raises(RepositoryNotFoundError, match="It is called lab/later now"):
        api.move_repo("ada/earlier", "ada/latest")
    assert api.repo_exists("lab/later")


def test_what_an_organisation_makes_may_be_private_by_default(api: HfApi, server: Server) -> None:
    add_organisation(server.data, "closed", ("ada",), private_by_default=True)
    api.create_repo("closed/x")
    api.create_repo("closed/y", private=False)
    assert api.model_info("closed/x").private
    assert not api.model_info("closed/y").private


def test_copies(api: HfApi, server: Server, tmp_path: Path) -> None:
    api.create_repo("copied", private=True)
    put(api, "ada/copied", {"a.txt": b"a", "b.txt": b"b"})
    server.client("api.upload_file(path_or_fileobj=b'weights' * 1000, path_in_repo='w.bin', repo_id='ada/copied')")
    assert api.duplicate_repo("ada/copied", "lab/twin").repo_id == "lab/twin"
    assert api.model_info("lab/twin").private
    assert api.list_repo_files("lab/twin") == ["a.txt", "b.txt", "w.bin"]
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.duplicate_repo("ada/copied", "lab/twin")
    with pytest.raises(RepositoryNotFoundError):
        server.api("bob").duplicate_repo("ada/copied", "bob/twin")
    api.create_repo("copy-target")
    copy = CommitOperationCopy("w.bin", "copy.bin", src_repo_id="ada/copied", src_repo_type="model")
    api.create_commit("ada/copy-target", [copy], commit_message="Copy")
    api.delete_repo("ada/copied")
    found = api.hf_hub_download("ada/copy-target", "copy.bin", local_dir=tmp_path)
    assert Path(found).read_bytes() == b"weights" * 1000


def test_datasets_are_stored(api: HfApi, tmp_path: Path) -> None:
    api.create_repo("data", repo_type="dataset")
    put(api, "ada/data", {"train.csv": b"a,b\n1,2\n"}, repo_type="dataset")
    assert api.dataset_info("ada/data").sha
    path = api.hf_hub_download("ada/data", "train.csv", repo_type="dataset", local_dir=tmp_path)
    assert Path(path).read_text() == "a,b\n1,2\n"
    assert [found.id for found in api.list_datasets(author="ada")] == ["ada/data"]
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("ada/data")


def test_ranges_and_conditions(api: HfApi, server: Server) -> None:
    api.create_repo("ranges")
    head = put(api, "ada/ranges", {"a.txt": bytes(range(100))})
    url = f"{server.url}/ada/ranges/resolve/main/a.txt"
    whole = httpx2.get(url)
    assert (whole.status_code, whole.content) == (200, bytes(range(100)))
    assert whole.headers["x-repo-commit"] == head
    etag = whole.headers["etag"]

    def ask(value: str, **headers: str) -> tuple[int, bytes, str | None]:
        found = httpx2.get(url, headers={"Range": value, **headers})
        return found.status_code, found.content, found.headers.get("content-range")

    assert ask("bytes=0-0") == (206, b"\0", "bytes 0-0/100")
    assert ask("bytes=90-") == (206, bytes(range(90, 100)), "bytes 90-99/100")
    assert ask("bytes=-5") == (206, bytes(range(95, 100)), "bytes 95-99/100")
    assert ask("bytes=50-1000") == (206, bytes(range(50, 100)), "bytes 50-99/100")
    for outside in ("bytes=100-", "bytes=-0", "bytes=9-8", f"bytes={'9' * 50}-"):
        code, _, of = ask(outside)
        assert (code, of) == (416, "bytes */100")
    assert ask("bytes=0-1,4-5")[0] == ask("lines=1-2")[0] == 200
    assert ask("bytes=0-0", **{"If-Range": etag})[0] == 206
    assert ask("bytes=0-0", **{"If-Range": '"other"'})[0] == 200
    assert httpx2.get(url, headers={"If-None-Match": f'"x", {etag}'}).status_code == 304
    head_only = httpx2.head(url)
    assert (head_only.content, head_only.headers["content-length"]) == (b"", "100")
    assert httpx2.get(f"{server.url}/ada/ranges/resolve/main/none").headers["x-repo-commit"] == head


def test_health(server: Server) -> None:
    found = httpx2.get(f"{server.url}/health").json()
    assert (found["status"], found["version"]) == ("ok", surgery.__version__)
    assert 0 < found["free_bytes"] < 1 << 60
    assert httpx2.get(f"{server.url}/api/agent-harnesses").status_code == 404
