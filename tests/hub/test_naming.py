"""Names from strangers: what is refused, and that the Hub's own client agrees."""

from __future__ import annotations

import subprocess
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.errors import InputError, OptionError
from surgery.hub.naming import (
    RepositoryName,
    check_paths,
    parse_repository,
    parse_target,
    why_not_a_path,
    why_not_a_repository,
    why_not_a_revision,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lab/style", (RepositoryName("lab", "style"), None)),
        ("style", (RepositoryName("", "style"), None)),
        ("Lab/Style_1.0@v2", (RepositoryName("Lab", "Style_1.0"), "v2")),
        ("lab/style@refs/pr/1", (RepositoryName("lab", "style"), "refs/pr/1")),
    ],
)
def test_a_target_has_a_name_and_perhaps_a_revision(text: str, expected: tuple[RepositoryName, str | None]) -> None:
    assert parse_target(text) == expected
    assert str(expected[0]) == text.partition("@")[0]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "'' is not a name for a repository: it may hold letters, digits, '-', '_' and '.', and begin and end with none of '-' and '.'."),
        ("../evil", "'../evil' is not a name for a repository: it may hold letters, digits, '-', '_' and '.', and begin and end with none of '-' and '.'."),
        ("a/b/c", "'a/b/c' is not a name for a repository: it has more than one slash."),
        ("a--b", "'a--b' is not a name for a repository: it may not hold '--' or '..'."),
        ("lab/x.GIT", "'lab/x.GIT' is not a name for a repository: it may not end in .git or .ipynb."),
        ("a" * 97, f"'{'a' * 97}' is not a name for a repository: it has a part of more than 96 characters."),
        ("lab/x@", "'' is not a revision: it must have 1 to 255 characters."),
        ("lab/x@a..b", "'a..b' is not a revision: it means something else to git."),
        ("lab/x@../b", "'../b' is not a revision: it has an empty part, or one that begins with '.' or '-', or ends in '.' or '.lock'."),
        ("lab/x@a b", "'a b' is not a revision: it holds a character that git does not allow."),
    ],
)  # fmt: skip
def test_what_is_no_name_is_refused_with_the_rule(text: str, sentence: str) -> None:
    with pytest.raises(OptionError) as error:
        parse_target(text)
    assert str(error.value) == sentence


NAMES = st.text(st.sampled_from("aZ0_-./@\\\n é"), max_size=12)


@given(NAMES)
def test_the_hubs_client_takes_the_names_that_are_taken_here(text: str) -> None:
    """And the other way round, but for endings that it leaves to the server."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, not marked as exported

    try:
        validate_repo_id(text)
    except HFValidationError:
        theirs = False
    else:
        theirs = True
    assert (why_not_a_repository(text) is None) == theirs


@given(NAMES)
def test_a_name_that_is_taken_comes_back(text: str) -> None:
    if why_not_a_repository(text) is None:
        name = parse_repository(text)
        assert str(name) == text
        assert name.key == text.lower()


@given(st.text(st.sampled_from("aZ0_-./@{}~^:?*[\\ \x7f\n"), max_size=10))
def test_git_takes_the_branches_that_are_taken_here(text: str) -> None:
    """Ours are a part of what `git check-ref-format` allows."""
    if why_not_a_revision(text) is None:
        done = subprocess.run(["git", "check-ref-format", f"refs/heads/{text}"], check=False)
        assert done.returncode == 0, text


@given(st.text(st.sampled_from("a.é/\\\x00\n~ g"), max_size=12) | st.sampled_from([".git/x", "a/.GIT", "e\u0301"]))
def test_a_path_that_is_taken_stays_in_its_folder(text: str) -> None:
    if why_not_a_path(text) is None:
        parts = PurePosixPath(text).parts
        assert "/".join(parts) == text
        assert not {"..", ".", "/", ".git"} & {part.lower() for part in parts}
        assert text.isprintable()


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("", "must have 1 to 1024 characters"),
        ("/etc/passwd", "leads out of its folder"),
        ("a/../../b", "leads out of its folder"),
        ("a//b", "leads out of its folder"),
        ("a\\b", "holds a backslash or an unprintable character"),
        ("a\x00b", "holds a backslash or an unprintable character"),
        ("x/.Git/config", "has a part named .git"),
        ("e\u0301.txt", "is not in Unicode's composed form (NFC)"),
        ("a" * 256, "has a part of more than 255 bytes"),
        ("a/" * 600, "must have 1 to 1024 characters"),
    ],
)
def test_a_hostile_path_is_refused(path: str, reason: str) -> None:
    assert why_not_a_path(path) == reason
    with pytest.raises(InputError, match="whose name"):
        check_paths([path], "x")


def test_a_file_cannot_be_a_folder_too() -> None:
    with pytest.raises(InputError, match=r"^x holds 'a/b' both as a file and as a folder\.$"):
        check_paths(["a/b", "a/b/c"], "x")
