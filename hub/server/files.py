"""Reading: files by name, listings of files, and what a repository is."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from urllib.parse import parse_qs

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from surgery.hub.index import ModelQuery, made_from
from surgery.hub.interfaces import Commit, FileEntry, Repository
from surgery.hub.server import describing
from surgery.hub.server.checking import file_status, repository_status, scan_all
from surgery.hub.server.hub import Call
from surgery.hub.server.policy import ALLOW
from surgery.hub.server.web import HttpError, json_response, page, parse_range, stream, unquoted, whole_body
from surgery.hub.store import Revision
from surgery.hub.xet import hashes

_CARD = "README.md"
_MAX_FORM = 4 << 20
# How far back the commit that changed a file is looked for. Each step reads a whole tree.
_MOST_COMMITS = 200
_TEXT = (".md", ".txt", ".json", ".jsonl", ".yaml", ".yml", ".py", ".csv")


async def resolve(call: Call) -> Response:
    """`GET` and `HEAD /{id}/resolve/{revision}/{path}`: a file."""
    revision, path = unquoted(call.rest[0]), unquoted("/".join(call.rest[1:]))
    # The card of a gated repository is for everybody, as on the Hub.
    found = await run_in_threadpool(call.revision, revision, path != _CARD)
    head = {"X-Repo-Commit": found.commit.id}
    entry = next((entry for entry in found.files if entry.path == path), None)
    if entry is None:
        raise HttpError(404, "Entry not found", "EntryNotFound", head)
    etag = f'"{entry.sha256 if entry.lfs else entry.oid}"'
    head |= {"ETag": etag, "Vary": "Authorization", "Cache-Control": "private, no-cache"}
    if entry.lfs:
        head |= {"X-Linked-Etag": etag, "X-Linked-Size": str(entry.size)}
        recipe = await run_in_threadpool(call.hub.content.recipe, entry.sha256)
        if recipe is not None:
            kind = f"{found.repository.kind}s"
            route = f"{call.base}/api/{kind}/{found.repository.name}/xet-read-token/{found.commit.id}"
            head |= {
                "X-Xet-Hash": hashes.text(recipe.digest),
                "X-Xet-Refresh-Route": route,
                "Link": f'<{route}>; rel="xet-auth"',
            }
    matching = [part.strip().removeprefix("W/") for part in call.request.headers.get("if-none-match", "").split(",")]
    if etag in matching or "*" in matching:
        return Response(None, 304, head)
    source = await run_in_threadpool(call.hub.content.open, entry.sha256)
    head["Content-Type"] = "text/plain; charset=utf-8" if path.endswith(_TEXT) else "application/octet-stream"
    if_range = call.request.headers.get("if-range")
    asked = call.request.headers.get("range") if if_range in (None, etag) else None
    return stream(source, parse_range(asked, entry.size), head, call.request.method == "HEAD")


async def info(call: Call) -> Response:
    """`GET /api/models/{id}` and `/api/models/{id}/revision/{revision}`."""
    query = parse_qs(call.request.url.query)
    blobs, expand = _is_set(query.get("blobs")), query.get("expand", [])

    def describe() -> dict[str, object]:
        found = call.repository()
        if call.rest:
            head: Revision | None = call.revision(unquoted(call.rest[0]))
        else:
            head = call.hub.registry.head(found.name, "main", found.kind)
        described = describing.repository(found, head, call.hub.content, blobs)
        described["gated"] = call.hub.community.gate(found) or False
        if head is not None and _is_set(query.get("securityStatus")):
            described["securityRepoStatus"] = repository_status(call.hub, head.files)
        return expanded(call, found, described, expand) if expand else described

    return json_response(await run_in_threadpool(describe))


def expanded(
    call: Call, found: Repository, described: Mapping[str, object], expand: Sequence[str]
) -> dict[str, object]:
    """Only the properties that are asked for; two of them are counted or looked up only then."""
    more = dict(described)
    facts = described.get("facts")
    if "baseModels" in expand:
        more["baseModels"] = describing.bases(facts if isinstance(facts, dict) else {})
    if "childrenModelCount" in expand:
        made = made_from(call.hub.metadata, found.name, call.reader)
        more["childrenModelCount"] = call.hub.metadata.count(ModelQuery(made_from=(made,)), call.reader)
    return {key: more[key] for key in ("_id", "id", *expand) if key in more}


def _is_set(values: list[str] | None) -> bool:
    return bool(values) and values is not None and values[-1].lower() in ("1", "true")


async def tree(call: Call) -> Response:
    """`GET /api/models/{id}/tree/{revision}[/{path}]?recursive=&expand=`."""
    revision, path = unquoted(call.rest[0]), unquoted("/".join(call.rest[1:])).strip("/")
    query = parse_qs(call.request.url.query)
    recursive, expand = _is_set(query.get("recursive")), _is_set(query.get("expand"))
    begin, limit = page(query)

    def describe() -> tuple[list[dict[str, object]], bool]:
        found = call.revision(revision)
        listed = below(found.files, path, recursive)
        if path and not listed:
            raise HttpError(404, f"{path} does not exist on {revision}", "EntryNotFound",
                            {"X-Repo-Commit": found.commit.id})  # fmt: skip
        page = listed[begin : begin + limit]
        last = last_commits(call, found, _paths(page)) if expand else {}
        return _described_all(call, found, page, last, expand), begin + limit < len(listed)

    items, more = await run_in_threadpool(describe)
    return json_response(items, headers=next_page(call, begin + limit) if more else None)


def next_page(call: Call, begin: int) -> dict[str, str]:
    """The header that leads to the next page, on this very server."""
    url = call.request.url.include_query_params(cursor=begin)
    path = call.request.scope["raw_path"].decode("latin-1")
    return {"Link": f'<{call.base}{path}?{url.query}>; rel="next"'}


def below(files: Iterable[FileEntry], path: str, recursive: bool) -> list[FileEntry | str]:
    """Files and folders (by name) below a path, in order; of a file's own path the file itself."""
    prefix = f"{path}/" if path else ""
    found: dict[str, FileEntry | str] = {}
    for entry in files:
        if entry.path == path:
            return [entry]
        if not entry.path.startswith(prefix):
            continue
        parts = entry.path[len(prefix) :].split("/")
        for depth in range(1, len(parts)) if recursive else ([1] if len(parts) > 1 else []):
            folder = prefix + "/".join(parts[:depth])
            found.setdefault(folder, folder)
        if recursive or len(parts) == 1:
            found[entry.path] = entry
    return list(found.values())


def _paths(items: Iterable[FileEntry | str]) -> list[str]:
    return [item if isinstance(item, str) else item.path for item in items]


def _described(call: Call, ids: Mapping[str, str], item: FileEntry | str, last: dict[str, Commit]) -> dict[str, object]:
    if isinstance(item, FileEntry):
        return describing.file(item, call.hub.content, last.get(item.path))
    return describing.folder(item, ids[item], last.get(item))


def _described_all(
    call: Call, found: Revision, items: Sequence[FileEntry | str], last: dict[str, Commit], expand: bool
) -> list[dict[str, object]]:
    ids = _folder_ids(found.files, {item for item in items if isinstance(item, str)})
    described = [_described(call, ids, item, last) for item in items]
    if expand and call.hub.policy.pickle != ALLOW:
        pickles = scan_all(call.hub, [item for item in items if isinstance(item, FileEntry)])
        for item in described:
            if item["type"] == "file":
                item["securityFileStatus"] = file_status(pickles[str(item["path"])])
    return described


def _folder_ids(files: Iterable[FileEntry], folders: Collection[str]) -> dict[str, str]:
    """Of each of these folders 40 hex digits that change with what is in it."""
    hashers = {folder: hashlib.sha256() for folder in folders}
    for entry in files if hashers else ():
        line = f"{entry.path}\0{entry.oid}\n".encode()
        for folder in _above(entry.path):
            if (hasher := hashers.get(folder)) is not None:
                hasher.update(line)
    return {folder: hasher.hexdigest()[:40] for folder, hasher in hashers.items()}


def _above(path: str) -> Iterator[str]:
    """The folders that a file is in."""
    names = path.split("/")
    return ("/".join(names[:depth]) for depth in range(1, len(names)))


def last_commits(call: Call, found: Revision, paths: Iterable[str]) -> dict[str, Commit]:
    """The commit that last changed each file or folder; of those that none of the latest ones changed, nothing."""
    waiting = set(paths)
    last: dict[str, Commit] = {}
    if not waiting:
        return last
    history = call.hub.metadata.history(found.repository.name, found.commit.id, found.repository.kind)
    now, files = next(history), _contents(found.files)
    for before in islice(history, _MOST_COMMITS):
        older = _contents(call.hub.metadata.files(before.tree))
        for path in _changed(files, older) & waiting:
            last[path] = now
            waiting.discard(path)
        if not waiting:
            return last
        now, files = before, older
    if now.parent is None:
        last |= dict.fromkeys(waiting, now)
    return last


def _contents(files: Iterable[FileEntry]) -> set[tuple[str, str]]:
    return {(entry.path, entry.oid) for entry in files}


def _changed(files: set[tuple[str, str]], older: set[tuple[str, str]]) -> set[str]:
    """Files that two trees do not share, and the folders they are in."""
    changed = {path for path, _ in files ^ older}
    parts = [path.split("/") for path in changed]
    return changed | {"/".join(names[:depth]) for names in parts for depth in range(1, len(names))}


async def paths_info(call: Call) -> Response:
    """`POST /api/models/{id}/paths-info/{revision}` with a form of paths. What is not there is left out."""
    body = await whole_body(call.request, _MAX_FORM)
    try:
        form = parse_qs(body.decode(), max_num_fields=10_000)
    except ValueError:
        raise HttpError(400, "The body is no form, or has too many fields.") from None
    paths = [path.strip("/") for path in form.get("paths", [])]
    expand = _is_set(form.get("expand"))
    revision = unquoted(call.rest[0])

    def describe() -> list[dict[str, object]]:
        found = call.revision(revision)
        known = {entry.path: entry for entry in found.files}
        folders = {folder for name in known for folder in _above(name)}
        items: list[FileEntry | str] = [
            known.get(path, path) for path in dict.fromkeys(paths) if path in known or path in folders
        ]
        last = last_commits(call, found, _paths(items)) if expand else {}
        return _described_all(call, found, items, last, expand)

    return json_response(await run_in_threadpool(describe))
