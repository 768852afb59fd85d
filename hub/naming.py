"""Names in a registry: repositories, branches and tags, files. The rules are the Hub's, as its client checks them.

A repository is `namespace/name`, or `name` alone (as `gpt2` on the Hub). Letter case is kept and does not tell two
repositories apart. Names come from strangers and become parts of paths and addresses, so whatever could lead out of a
folder or mean two things is refused.
Source: huggingface_hub 2.4 (`validate_repo_id`), git's `check-ref-format`.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from surgery.errors import InputError, OptionError

MAIN = "main"
_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?")
_MAX_PART = 96
_MAX_REVISION = 255
_MAX_PATH = 1024
_MAX_COMPONENT = 255
COMMIT_ID = re.compile(r"[0-9a-f]{40}")
_FORBIDDEN_IN_REVISIONS = set(" ~^:?*[\\\"'<>|") | {chr(code) for code in range(32)} | {"\x7f"}


@dataclass(frozen=True)
class RepositoryName:
    """`namespace/name`; `namespace` is empty for a name alone."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}" if self.namespace else self.name

    @property
    def key(self) -> str:
        """What two spellings of one repository share."""
        return str(self).lower()


def why_not_a_repository(text: str) -> str | None:
    """Why `text` names no repository, as the end of a sentence; None if it does."""
    parts = text.split("/")
    if len(parts) > 2:
        return "has more than one slash"
    if not all(_PART.fullmatch(part) for part in parts):
        return "may hold letters, digits, '-', '_' and '.', and begin and end with none of '-' and '.'"
    if "--" in text or ".." in text:
        return "may not hold '--' or '..'"
    if text.lower().endswith((".git", ".ipynb")):
        return "may not end in .git or .ipynb"
    if any(len(part) > _MAX_PART for part in parts):
        return f"has a part of more than {_MAX_PART} characters"
    return None


def parse_repository(text: str) -> RepositoryName:
    """A repository's name. Raises `OptionError` with the rule that is broken."""
    if (why := why_not_a_repository(text)) is not None:
        raise OptionError(f"{text!r} is not a name for a repository: it {why}.")
    namespace, _, name = text.rpartition("/")
    return RepositoryName(namespace, name)


def why_not_a_revision(text: str) -> str | None:
    """Why `text` can be neither a branch nor a tag, as the end of a sentence; None if it can."""
    if not text or len(text) > _MAX_REVISION:
        return f"must have 1 to {_MAX_REVISION} characters"
    if not text.isprintable() or _FORBIDDEN_IN_REVISIONS & set(text):
        return "holds a character that git does not allow"
    parts = text.split("/")
    if any(not part or part.startswith((".", "-")) or part.endswith((".", ".lock")) for part in parts):
        return "has an empty part, or one that begins with '.' or '-', or ends in '.' or '.lock'"
    if ".." in text or "@{" in text or text in ("@", "HEAD"):
        return "means something else to git"
    return None


def check_branch(name: str) -> None:
    """Raise `OptionError` for what may be a revision and may not be the name of a branch."""
    reason = "looks like the id of a commit" if COMMIT_ID.fullmatch(name) else why_not_a_revision(name)
    if name.startswith("refs/"):
        reason = "looks like a whole ref"
    if reason is not None:
        raise OptionError(f"{name!r} is not a name for a branch: it {reason}.")


def parse_target(text: str) -> tuple[RepositoryName, str | None]:
    """`name[@revision]` as a repository and a revision. Raises `OptionError`."""
    name, at, revision = text.partition("@")
    repository = parse_repository(name)
    if at and (why := why_not_a_revision(revision)) is not None:
        raise OptionError(f"{revision!r} is not a revision: it {why}.")
    return repository, revision if at else None


def why_not_a_path(path: str) -> str | None:
    """Why a repository may not hold a file of this name, as the end of a sentence; None if it may."""
    if not path or len(path) > _MAX_PATH:
        return f"must have 1 to {_MAX_PATH} characters"
    if "\\" in path or not path.isprintable():
        return "holds a backslash or an unprintable character"
    if unicodedata.normalize("NFC", path) != path:
        return "is not in Unicode's composed form (NFC)"
    for part in path.split("/"):
        if part in ("", ".", ".."):
            return "leads out of its folder"
        if part.lower() == ".git":
            return "has a part named .git"
        if len(part.encode()) > _MAX_COMPONENT:
            return f"has a part of more than {_MAX_COMPONENT} bytes"
    return None


def check_paths(paths: list[str], where: str) -> None:
    """Raise `InputError` naming the first path that no repository may hold, or two that some disks take for one."""
    for path in paths:
        if (why := why_not_a_path(path)) is not None:
            raise InputError(f"{where} holds a file {path[:200]!r}, whose name {why}.")
    # A file may not also be a folder.
    found = set(paths)
    for path in paths:
        parts = path.split("/")
        for depth in range(1, len(parts)):
            if (parent := "/".join(parts[:depth])) in found:
                raise InputError(f"{where} holds {parent!r} both as a file and as a folder.")
