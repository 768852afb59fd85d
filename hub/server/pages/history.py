"""History: the commits of a branch, and what one of them changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import parse_qs

from starlette.responses import Response

from surgery.hub.interfaces import Commit, FileEntry
from surgery.hub.naming import COMMIT_ID
from surgery.hub.server.pages.render import body_of, html, title_of
from surgery.hub.server.pages.repository import common
from surgery.hub.server.pages.session import Visit
from surgery.hub.server.web import HttpError, page, unquoted

_PAGE = 50
_MOST_CHANGES = 1000


@dataclass(frozen=True)
class Change:
    """A file that two trees do not share; its length before and after, None where it was not there."""

    path: str
    before: int | None
    after: int | None

    @property
    def word(self) -> str:
        if self.before is None:
            return "added"
        return "removed" if self.after is None else "changed"


def commits(visit: Visit) -> Response:
    """`/{id}/commits/{revision}`."""
    revision = unquoted(visit.call.rest[0])
    found = visit.call.revision(revision)
    begin, _ = page(parse_qs(visit.call.request.url.query))
    repository = found.repository
    listed: list[Commit] = []
    more = False
    history = visit.call.hub.metadata.history(repository.name, found.commit.id, repository.kind)
    for number, commit in enumerate(history):
        if number >= begin + _PAGE:
            more = True
            break
        if number >= begin:
            listed.append(commit)
    values = common(visit, repository, revision, "history") | {
        "commits": listed,
        "begin": begin,
        "following": begin + _PAGE if more else None,
        "preceding": max(0, begin - _PAGE) if begin else None,
    }
    return html("commits.html", values)


def commit(visit: Visit) -> Response:
    """`/{id}/commit/{sha}`: what changed against the parent."""
    identity = unquoted(visit.call.rest[0])
    repository = visit.call.repository()
    metadata = visit.call.hub.metadata
    given = identity if COMMIT_ID.fullmatch(identity) else None
    found = metadata.find_commit(repository.name, given, repository.kind) if given else None
    if found is None:
        raise HttpError(404, f"There is no commit {identity[:100]}.", "RevisionNotFound")
    parent = metadata.find_commit(repository.name, found.parent, repository.kind) if found.parent else None
    before = metadata.files(parent.tree) if parent is not None else ()
    changed = changes(before, metadata.files(found.tree))
    values = common(visit, repository, identity, "history") | {
        "commit": found,
        "title": title_of(found),
        "body": body_of(found),
        "changes": changed[:_MOST_CHANGES],
        "count": len(changed),
        "growth": sum((change.after or 0) - (change.before or 0) for change in changed),
    }
    return html("commit.html", values)


def changes(before: Sequence[FileEntry], after: Sequence[FileEntry]) -> list[Change]:
    """The files that differ, by path."""
    old, new = ({entry.path: entry for entry in files} for files in (before, after))
    return [
        Change(path, old[path].size if path in old else None, new[path].size if path in new else None)
        for path in sorted(old.keys() | new.keys())
        if path not in old or path not in new or old[path].sha256 != new[path].sha256
    ]
