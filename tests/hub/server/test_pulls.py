"""Pull requests, discussions and squashed histories, as the stock client asks for them."""

from __future__ import annotations

import contextlib
import random
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.community import DiscussionComment, DiscussionCommit, DiscussionStatusChange
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from surgery.hub.interfaces import FileEntry
from surgery.hub.server.merging import change_lines, merged
from surgery.hub.store import open_registry
from tests.hub.server.serving import Server
from tests.hub.server.test_protocol import put, status, text


@pytest.fixture(scope="module")
def api(server: Server) -> HfApi:
    return server.api()


def test_a_pull_request_of_somebody_who_may_only_read(api: HfApi, server: Server, tmp_path: Path) -> None:
    api.create_repo("asked")
    first = put(api, "ada/asked", {"a.txt": b"a", "b.txt": b"b"})
    bob = server.api("bob")
    operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
        CommitOperationAdd("c.txt", b"c"),
        CommitOperationDelete("b.txt"),
    ]
    made = bob.create_commit(
        "ada/asked", operations, commit_message="Better", commit_description="Why", create_pr=True, parent_commit=first
    )
    assert (made.pr_num, made.pr_revision) == (1, "refs/pr/1")
    assert made.pr_url == f"{server.url}/ada/asked/discussions/1"
    # It is nowhere but in its own ref.
    assert api.list_repo_files("ada/asked") == ["a.txt", "b.txt"]
    assert api.list_repo_files("ada/asked", revision="refs/pr/1") == ["a.txt", "c.txt"]
    assert text(server.api(None), "ada/asked", "c.txt", revision="refs/pr/1", folder=tmp_path) == "c"
    refs = api.list_repo_refs("ada/asked", include_pull_requests=True)
    assert [(ref.ref, ref.target_commit) for ref in refs.pull_requests or []] == [("refs/pr/1", made.oid)]
    put(bob, "ada/asked", {"d.txt": b"d"}, revision="refs/pr/1", message="More")
    found = api.get_discussion_details("ada/asked", 1)
    assert (found.title, found.status, found.author, found.is_pull_request) == ("Better", "open", "bob", True)
    assert [type(event) for event in found.events] == [DiscussionComment, DiscussionCommit, DiscussionCommit]
    assert isinstance(found.events[0], DiscussionComment)
    assert found.events[0].content == "Why"
    assert found.diff == "D\tb.txt\nA\tc.txt\nA\td.txt"
    assert (found.target_branch, found.conflicting_files) == ("refs/heads/main", [])
    # Only those who may write merge; meanwhile main has gone on.
    with pytest.raises(HfHubHTTPError) as error:
        bob.merge_pull_request("ada/asked", 1)
    assert status(error.value) == 403
    second = put(api, "ada/asked", {"a.txt": b"A"})
    api.merge_pull_request("ada/asked", 1, comment="Thank you")
    assert api.list_repo_files("ada/asked") == ["a.txt", "c.txt", "d.txt"]
    assert text(api, "ada/asked", "a.txt", folder=tmp_path / "merged") == "A"
    history = api.list_repo_commits("ada/asked")
    assert [commit.title for commit in history] == ["Better (#1)", "files", "files", "initial commit"]
    assert history[1].commit_id == second
    found = api.get_discussion_details("ada/asked", 1)
    assert (found.status, found.merge_commit_oid) == ("merged", history[0].commit_id)
    assert [type(event) for event in found.events[3:]] == [DiscussionComment, DiscussionStatusChange]
    for again in (
        lambda: api.merge_pull_request("ada/asked", 1),
        lambda: put(bob, "ada/asked", {"e.txt": b"e"}, revision="refs/pr/1"),
        lambda: bob.change_discussion_status("ada/asked", 1, "open"),
    ):
        with pytest.raises(HfHubHTTPError, match="is merged") as error:
            again()
        assert status(error.value) == 409


def test_who_may_not(api: HfApi, server: Server) -> None:
    api.create_repo("closed-shop")
    put(api, "ada/closed-shop", {"a.txt": b"a"})
    made = api.create_commit(
        "ada/closed-shop", [CommitOperationAdd("b.txt", b"b")], commit_message="Mine", create_pr=True
    )
    assert made.pr_revision == "refs/pr/1"
    bob = server.api("bob")
    for name, forbidden in {
        "another's pull request": lambda: put(bob, "ada/closed-shop", {"x": b""}, revision="refs/pr/1"),
        "its status": lambda: bob.change_discussion_status("ada/closed-shop", 1, "closed"),
        "its title": lambda: bob.rename_discussion("ada/closed-shop", 1, "Bob's"),
        "reading only": lambda: server.api(server.token("bob", "read")).create_pull_request(
            "ada/closed-shop", title="No"
        ),
        "another repository's token": lambda: server.api(server.token("bob", repository="bob/own")).create_pull_request(
            "ada/closed-shop", title="No"
        ),
    }.items():
        with pytest.raises(HfHubHTTPError) as error:
            forbidden()
        assert status(error.value) == 403, name
    with pytest.raises(RevisionNotFoundError):
        put(api, "ada/closed-shop", {"x": b""}, revision="refs/pr/9")
    with pytest.raises(HfHubHTTPError) as error:
        server.api(None).create_pull_request("ada/closed-shop", title="No")
    assert status(error.value) == 401
    api.update_repo_settings("ada/closed-shop", private=True)
    with pytest.raises(RepositoryNotFoundError):
        bob.create_pull_request("ada/closed-shop", title="No")
    with pytest.raises(HfHubHTTPError, match="looks like a whole ref"):
        api.create_branch("ada/closed-shop", branch="refs/pr/7")
    assert [item.num for item in api.get_repo_discussions("ada/closed-shop")] == [1]


@pytest.mark.parametrize("disabled", ["0", "1"])
def test_a_folder_as_a_pull_request(server: Server, tmp_path: Path, disabled: str) -> None:
    name = f"ada/folder-{disabled}"
    server.api().create_repo(name)
    (tmp_path / "w.bin").write_bytes(random.Random(1).randbytes(300_000))
    (tmp_path / "a.txt").write_text("text")
    (revision,) = server.client(
        f"print(json.dumps([api.upload_folder(repo_id={name!r}, folder_path={str(tmp_path)!r}, create_pr=True)"
        ".pr_revision]))",
        user="bob",
        HF_HUB_DISABLE_XET=disabled,
    )
    assert revision == "refs/pr/1"
    # What Bob proposes is Bob's and in no other place of Ada's.
    api = server.api()
    assert api.list_repo_files(name) == []
    # Over Xet the client asks for an empty one first; that is a draft.
    assert api.get_discussion_details(name, 1).status == ("draft" if disabled == "0" else "open")
    api.merge_pull_request(name, 1)
    found = api.hf_hub_download(name, "w.bin", local_dir=tmp_path / "there")
    assert Path(found).read_bytes() == (tmp_path / "w.bin").read_bytes()


@pytest.mark.parametrize("disabled", ["0", "1"])
def test_a_large_file_as_a_pull_request(server: Server, tmp_path: Path, disabled: str) -> None:
    """In one call, as transformers' `push_to_hub(create_pr=True)` does it: no draft is there before the upload."""
    name = f"ada/large-{disabled}"
    server.api().create_repo(name)
    (tmp_path / "w.bin").write_bytes(random.Random(2).randbytes(300_000))
    (revision,) = server.client(
        f"print(json.dumps([api.upload_file(repo_id={name!r}, path_or_fileobj={str(tmp_path / 'w.bin')!r}, "
        "path_in_repo='w.bin', create_pr=True).pr_revision]))",
        user="bob",
        HF_HUB_DISABLE_XET=disabled,
    )
    assert revision == "refs/pr/1"
    api = server.api()
    api.merge_pull_request(name, 1)
    found = api.hf_hub_download(name, "w.bin", local_dir=tmp_path / "there")
    assert Path(found).read_bytes() == (tmp_path / "w.bin").read_bytes()


def test_proposing_leads_to_nothing_that_the_owner_has(server: Server) -> None:
    """A token for chunks that a stranger gets for a pull request names the stranger only."""
    server.api().create_repo("lure")
    claims = []
    for user in ("ada", "bob"):
        headers = {"Authorization": f"Bearer {server.tokens[user]}"}
        url = f"{server.url}/api/models/ada/lure/xet-write-token/main"
        assert httpx2.get(url, headers=headers).status_code == (200 if user == "ada" else 403)
        answer = httpx2.get(f"{url}?create_pr=1", headers=headers).json()
        claims.append(_claims(answer["accessToken"]))
    assert claims[0]["h"] == ["ada"]
    assert set(claims[0]["v"]) == {"ada", "lab"}
    assert claims[1]["h"] == claims[1]["v"] == ["bob"]


def _claims(token: str) -> Any:
    import base64
    import json

    text = token.partition(".")[0]
    return json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))


def test_conflicts(api: HfApi) -> None:
    api.create_repo("conflicts")
    put(api, "ada/conflicts", {"a.txt": b"a"})
    pull = api.create_pull_request("ada/conflicts", title="Other", description="x")
    assert pull.git_reference == "refs/pr/1"
    put(api, "ada/conflicts", {"a.txt": b"theirs"}, revision="refs/pr/1")
    put(api, "ada/conflicts", {"a.txt": b"ours"})
    assert api.get_discussion_details("ada/conflicts", 1).conflicting_files == ["a.txt"]
    with pytest.raises(HfHubHTTPError, match=r"both changed a\.txt") as error:
        api.merge_pull_request("ada/conflicts", 1)
    assert status(error.value) == 409
    event = api.change_discussion_status("ada/conflicts", 1, "closed", comment="No")
    assert event.new_status == "closed"
    with pytest.raises(HfHubHTTPError, match="is closed"):
        api.merge_pull_request("ada/conflicts", 1)


def test_a_merge_that_was_cut_short_is_finished(api: HfApi, server: Server) -> None:
    """As after a kill between the commit on main and what the pull request says of itself."""
    api.create_repo("cut")
    api.create_commit("ada/cut", [CommitOperationAdd("a.txt", b"a")], commit_message="A", create_pr=True)
    api.merge_pull_request("ada/cut", 1)
    merged_at = api.list_repo_commits("ada/cut")[0].commit_id
    with contextlib.closing(sqlite3.connect(server.data / "registry.sqlite", timeout=30)) as db:
        db.execute("UPDATE discussions SET status = 'open', merged = NULL WHERE title = 'A'")
        db.commit()
    api.merge_pull_request("ada/cut", 1)
    assert [found.title for found in api.list_repo_commits("ada/cut")] == ["A (#1)", "initial commit"]
    found = api.get_discussion_details("ada/cut", 1)
    assert (found.status, found.merge_commit_oid) == ("merged", merged_at)


def test_merges_at_once(api: HfApi, server: Server) -> None:
    """Several pull requests and commits at the same moment: each is there, once."""
    api.create_repo("busy")
    for number in range(1, 5):
        api.create_commit(
            "ada/busy", [CommitOperationAdd(f"{number}.txt", b"x")], commit_message=f"P{number}", create_pr=True
        )
    with ThreadPoolExecutor(8) as pool:
        merges = [pool.submit(server.api().merge_pull_request, "ada/busy", number) for number in range(1, 5)]
        again = pool.submit(server.api().merge_pull_request, "ada/busy", 1)
        commits = [pool.submit(put, server.api(), "ada/busy", {f"c{number}.txt": b"y"}) for number in range(3)]
        for future in (*merges[1:], *commits):
            future.result()
        outcomes = [future.exception() for future in (merges[0], again)]
    assert outcomes.count(None) >= 1
    assert all(error is None or (isinstance(error, HfHubHTTPError) and status(error) == 409) for error in outcomes)
    names = sorted([*(f"{number}.txt" for number in range(1, 5)), *(f"c{number}.txt" for number in range(3))])
    assert api.list_repo_files("ada/busy") == names
    titles = [found.title for found in api.list_repo_commits("ada/busy")]
    assert sorted(titles) == sorted([*(f"P{n} (#{n})" for n in range(1, 5)), *["files"] * 3, "initial commit"])


@pytest.mark.parametrize("disabled", ["0", "1"])
def test_what_is_proposed_says_nothing_of_the_repository(server: Server, tmp_path: Path, disabled: str) -> None:
    """A repository is known by the hash of its own weights; those that a stranger proposes are none until merged."""
    name = f"ada/known-{disabled}"
    server.api().create_repo(name)
    save_file({"weight": np.full(50_000, int(disabled), np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 5}')
    server.client(
        f"api.upload_folder(repo_id={name!r}, folder_path={str(tmp_path)!r}, create_pr=True)",
        user="bob",
        HF_HUB_DISABLE_XET=disabled,
    )

    def known() -> int:
        with contextlib.closing(sqlite3.connect(server.data / "registry.sqlite", timeout=30)) as db:
            query = "SELECT COUNT(*) FROM weights JOIN repositories ON id = repository WHERE key = ?"
            return int(db.execute(query, (name,)).fetchone()[0])

    time.sleep(0.3)
    assert known() == 0
    server.api().merge_pull_request(name, 1)
    for _ in range(100):
        if known():
            break
        time.sleep(0.1)
    assert known() == 1


def test_discussions(api: HfApi, server: Server) -> None:
    api.create_repo("talk")
    bob = server.api("bob")
    made = bob.create_discussion("ada/talk", "  A <b>question</b>  ", description="Does it?")
    assert (made.num, made.status, made.is_pull_request, made.git_reference) == (1, "open", False, None)
    assert api.comment_discussion("ada/talk", 1, "It does").content == "It does"
    assert api.rename_discussion("ada/talk", 1, "Question").new_title == "Question"
    api.create_pull_request("ada/talk", title="Change")
    listed = list(api.get_repo_discussions("ada/talk"))
    assert [(item.num, item.title, item.is_pull_request) for item in listed] == [
        (2, "Change", True),
        (1, "Question", False),
    ]
    kinds = [item.num for item in api.get_repo_discussions("ada/talk", discussion_type="discussion")]
    assert kinds == [1]
    bob.change_discussion_status("ada/talk", 1, "closed")
    opened = api.get_repo_discussions("ada/talk", discussion_status="open")
    assert [item.num for item in opened] == [2]
    assert [item.num for item in api.get_repo_discussions("ada/talk", author="BOB")] == [1]
    with pytest.raises(HfHubHTTPError, match="no discussion 9") as error:
        api.get_discussion_details("ada/talk", 9)
    assert status(error.value) == 404
    with pytest.raises(HfHubHTTPError, match="is no pull request"):
        api.merge_pull_request("ada/talk", 1)
    with pytest.raises(HfHubHTTPError, match="title is empty"):
        api.create_discussion("ada/talk", " ")
    # They go where the repository goes, and when it goes.
    api.move_repo("ada/talk", "ada/talked")
    assert api.get_discussion_details("ada/talked", 1).title == "Question"
    api.delete_repo("ada/talked")
    api.create_repo("ada/talked")
    assert not list(api.get_repo_discussions("ada/talked"))


def test_squashing(api: HfApi, server: Server, tmp_path: Path) -> None:
    api.create_repo("squashed")
    first = put(api, "ada/squashed", {"a.txt": b"1"})
    kept = put(api, "ada/squashed", {"a.txt": b"2"})
    api.create_tag("ada/squashed", tag="v2")
    last = put(api, "ada/squashed", {"a.txt": b"3"})
    api.super_squash_history("ada/squashed", commit_message="All")
    history = api.list_repo_commits("ada/squashed")
    assert [commit.title for commit in history] == ["All"]
    assert text(api, "ada/squashed", "a.txt", folder=tmp_path) == "3"
    # What a tag leads to stays; the rest is gone.
    assert [commit.commit_id for commit in api.list_repo_commits("ada/squashed", revision="v2")][:2] == [kept, first]
    with pytest.raises(RevisionNotFoundError):
        api.list_repo_commits("ada/squashed", revision=last)
    with pytest.raises(RevisionNotFoundError):
        api.super_squash_history("ada/squashed", branch="nowhere")
    with pytest.raises(HfHubHTTPError) as error:
        server.api("bob").super_squash_history("ada/squashed")
    assert status(error.value) == 403
    put(api, "ada/squashed", {"b.txt": b"b"})
    registry = open_registry(server.data)
    assert registry.metadata.prune(registry.metadata.repositories()[0].name) == 0
    registry.close()


# Merging by itself ----------------------------------------------------------------------------------------------------

_FILES = st.dictionaries(st.sampled_from("abcd"), st.sampled_from("123"))


def _entries(files: dict[str, str]) -> list[FileEntry]:
    return [FileEntry(path, 1, data * 64, data * 40, False) for path, data in sorted(files.items())]


@given(_FILES, _FILES, _FILES)
def test_merging_is_what_git_does_to_whole_files(
    base: dict[str, str], ours: dict[str, str], theirs: dict[str, str]
) -> None:
    files, conflicts = merged(_entries(base), _entries(ours), _entries(theirs))
    found = {entry.path: entry.sha256[0] for entry in files}
    for path in "abcd":
        was, here, there = base.get(path), ours.get(path), theirs.get(path)
        sides = {here, there}
        if len(sides) == 1:
            expected, conflict = here, False
        else:
            changed = [side for side in (here, there) if side != was]
            expected, conflict = (changed[0], False) if len(changed) == 1 else (here, True)
        assert found.get(path) == expected
        assert (path in conflicts) == conflict
    lines = change_lines(_entries(base), _entries(theirs))
    assert sorted(line[2:] for line in lines) == sorted(path for path in "abcd" if base.get(path) != theirs.get(path))
