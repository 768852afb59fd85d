"""Where things are on the site. Each part of a path is percent-encoded, so that a revision stays one part."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import quote, urlencode

from surgery.hub.interfaces import Repository

LOGIN, LOGOUT, TOKENS, REVOKE = "/login", "/logout", "/settings/tokens", "/settings/tokens/revoke"
# No namespace begins with a dash.
STATIC = "/-/"


def _part(text: str) -> str:
    return quote(text, safe="")


def repository(found: Repository) -> str:
    """The page of a repository: its card."""
    return f"/{'' if found.kind == 'model' else f'{found.kind}s/'}{found.name}"


def namespace(name: str) -> str:
    """What a user or an organisation has."""
    return f"/{_part(name)}"


def _below(found: Repository, what: str, revision: str, path: str = "") -> str:
    end = f"/{quote(path)}" if path else ""
    return f"{repository(found)}/{what}/{_part(revision)}{end}"


def tree(found: Repository, revision: str, path: str = "") -> str:
    """A folder."""
    return _below(found, "tree", revision, path)


def blob(found: Repository, revision: str, path: str) -> str:
    """A file, as far as it can be shown."""
    return _below(found, "blob", revision, path)


def resolve(found: Repository, revision: str, path: str) -> str:
    """A file itself."""
    return _below(found, "resolve", revision, path)


def commits(found: Repository, revision: str) -> str:
    """The history that leads to a revision."""
    return _below(found, "commits", revision)


def commit(found: Repository, identity: str) -> str:
    """What one commit changed."""
    return _below(found, "commit", identity)


def lineage(found: Repository) -> str:
    """The family of a model."""
    return f"{repository(found)}/lineage"


def with_query(path: str, query: Mapping[str, object]) -> str:
    """An address with what is set of a query."""
    text = urlencode({key: value for key, value in query.items() if value not in (None, "", 0)}, doseq=True)
    return f"{path}?{text}" if text else path


def within(text: str) -> str:
    """`text` if it is an address on this site, else that of the list: where to go on after a login."""
    # A browser takes a backslash for a slash, and `//host` for another site.
    if text.startswith("/") and not text.startswith(("//", "/\\")) and text.isprintable() and len(text) <= 2000:
        return text
    return "/"
