"""What a `.gitignore` leaves out: git says the same."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from surgery.hub.server.ignoring import MAX_RULES, ignore_rules, is_ignored
from surgery.hub.server.web import HttpError
from tests.hub.server.serving import Server

PATHS = [
    "a", "b", "ab", "a.b", "a/b", "b/a", "a/b/c", "a/ab/b", "c/a", "c/b/a", "a*b", "[a]", "!a", "#a", "a b", "a ", "-",
    "a/b/a.b/c", "b/b/b/b",
]  # fmt: skip


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("git")
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    return folder


def by_git(folder: Path, text: str) -> set[str]:
    (folder / ".gitignore").write_text(text)
    asked = "\0".join(PATHS).encode()
    found = subprocess.run(
        ["git", "-c", "core.excludesFile=/dev/null", "check-ignore", "--no-index", "-z", "--stdin"],
        cwd=folder, input=asked, capture_output=True, check=False,
    )  # fmt: skip
    assert found.returncode in (0, 1), found.stderr
    return set(found.stdout.decode().split("\0")) - {""}


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example("a/")
@example("/a\n!a/b")
@example("*\n!b\n!b/**")
@example("**/b\n")
@example("a/**/c")
@example("a/**")
@example("\\!a\n\\#a\na\\ ")
@example("[!a-b]\n[]a]\n[^a]*")
@example("a\\")
@example("[a")
@example("c/*")
@example("**")
@example("/")
@example("!")
@example("[\\]a]")
@given(st.lists(st.text("ab*?!/[]#\\- .^c", max_size=7), max_size=4).map("\n".join))
def test_as_git_does(repository: Path, text: str) -> None:
    # Here a slash ends the part also within a set, and after a backslash.
    assume(not re.search(r"\[[^\n]*/|\\\\/", text))
    rules = ignore_rules(text)
    assert {path for path in PATHS if is_ignored(rules, path)} == by_git(repository, text)


def test_rules_that_would_take_long() -> None:
    rules = ignore_rules("*a" * 500 + "b\n" + "**/a/" * 500 + "b")
    assert not is_ignored(rules, "/".join(["a" * 200] * 5))
    for text in ("x" * (MAX_RULES + 1), "x\n" * 1001):
        with pytest.raises(HttpError, match=r"A \.gitignore may have"):
            ignore_rules(text)


def test_a_client_leaves_out_what_is_ignored(server: Server, tmp_path: Path) -> None:
    api: HfApi = server.api()
    api.create_repo("ignoring")
    for name, data in {".gitignore": "*.log\nout/\n", "a.txt": "a", "b.log": "b", "out/c.txt": "c"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(data)
    api.upload_folder(repo_id="ada/ignoring", folder_path=tmp_path)
    assert api.list_repo_files("ada/ignoring") == [".gitignore", "a.txt"]
    # Also by the rules that are there, when they are not sent again.
    api.upload_file(path_or_fileobj=b"d", path_in_repo="d.log", repo_id="ada/ignoring")
    assert api.list_repo_files("ada/ignoring") == [".gitignore", "a.txt"]
