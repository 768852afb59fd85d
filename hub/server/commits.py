"""Writing: which files go which way, and commits, which are there whole or not at all."""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from surgery.errors import InputError, SurgeryError
from surgery.hub.facts import stored_facts
from surgery.hub.interfaces import (
    BRANCHES,
    PULLS,
    Commit,
    ConflictError,
    ContentMissingError,
    FileEntry,
    Repository,
)  # fmt: skip
from surgery.hub.naming import MAIN, check_branch, check_paths, why_not_a_path
from surgery.hub.parcel import LFS_FROM, is_lfs
from surgery.hub.server.checking import check_commit, check_offered
from surgery.hub.server.front_matter import parse
from surgery.hub.server.hub import Call
from surgery.hub.server.ignoring import MAX_RULES, Rule, ignore_rules, is_ignored
from surgery.hub.server.interfaces import OPEN, Event
from surgery.hub.server.pulls import branch_to_write, comment, head_of, is_opening, number_of, open_pull
from surgery.hub.server.web import HttpError, json_body, json_response, pieces, text_of, unquoted
from surgery.hub.store import Revision
from surgery.hub.transfer import git_blob, lfs_pointer_oid

# A file in a commit's own body, in base64, with room for its path.
MAX_LINE = LFS_FROM * 4 // 3 + (64 << 10)
MAX_BODY = 1 << 30
MAX_OPERATIONS = 100_000
_MAX_MESSAGE = 64 << 10
_MAX_PREUPLOAD = 256
_MAX_TITLE = 500
_SHA256 = re.compile(r"[0-9a-f]{64}")
TRIES = 50
STALE = "The branch was updated since you opened this page. Please refresh and try again."


async def preupload(call: Call) -> Response:
    """`POST /api/models/{id}/preupload/{revision}`: whether a file goes into the commit, or is uploaded before it."""
    body = await json_body(call.request)
    files = body.get("files")
    if not isinstance(files, list) or len(files) > _MAX_PREUPLOAD:
        raise HttpError(400, f"files has to be a list of at most {_MAX_PREUPLOAD}.")
    revision = unquoted(call.rest[0])

    def answer() -> list[dict[str, object]]:
        found = branch_to_write(call, revision.removeprefix(BRANCHES), is_opening(call))
        head = call.hub.registry.resolve(found, revision)
        if head is None and revision != MAIN:
            raise HttpError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        known = {entry.path: entry for entry in call.hub.metadata.files(head.tree)} if head is not None else {}
        rules = ignore_rules(_gitignore(call, body, known.get(".gitignore")))
        answers = [_mode(item, known, rules) for item in files]
        check_offered(call, found, [item for item, mode in zip(files, answers, strict=True) if _is_new(mode)])
        return answers

    return json_response({"files": await run_in_threadpool(answer)})


def _is_new(mode: Mapping[str, object]) -> bool:
    """Whether a file will come; one that is there may come again, changed or not, and is looked at then."""
    return not mode["shouldIgnore"] and "oid" not in mode


def _gitignore(call: Call, body: Mapping[str, object], entry: FileEntry | None) -> str:
    """The rules that the client is about to commit, else those of the repository."""
    if body.get("gitIgnore") is not None:
        return text_of(body["gitIgnore"], "gitIgnore")
    if entry is None or entry.size > MAX_RULES:
        return ""
    source = call.hub.content.open(entry.sha256)
    data = bytearray(source.size)
    source.read_into(0, memoryview(data))
    return data.decode(errors="replace")


def _mode(item: object, known: Mapping[str, FileEntry], rules: Sequence[Rule]) -> dict[str, object]:
    if not isinstance(item, dict) or not isinstance(item.get("size"), int):
        raise HttpError(400, "Each of files has to have a path and a size.")
    path = _path(item.get("path"))
    mode = "lfs" if is_lfs(path, item["size"]) else "regular"
    described: dict[str, object] = {"path": path, "uploadMode": mode, "shouldIgnore": is_ignored(rules, path)}
    if (entry := known.get(path)) is not None and entry.lfs == (mode == "lfs"):
        described["oid"] = entry.sha256 if entry.lfs else entry.oid
    return described


def _path(value: object) -> str:
    path = text_of(value, "path")
    if (why := why_not_a_path(path)) is not None:
        raise HttpError(422, f"The path {path[:200]!r} {why}.")
    return path


async def validate_yaml(call: Call) -> Response:
    """`POST /api/validate-yaml`: whether the front matter of a card can be read."""
    body = await json_body(call.request)
    content = text_of(body.get("content"), "content", "")
    try:
        parse(content)
    except InputError as error:
        return json_response({"errors": [{"message": error.message}], "warnings": []}, 400)
    return json_response({"errors": [], "warnings": []})


# Commits --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operation:
    """What a commit does to one path: put a file there, or remove what is there."""

    key: str
    path: str
    entry: FileEntry | None = None


@dataclass
class Draft:
    """A commit as it comes in, line by line.

    Attributes:
        store: what brings in the content of a file and says what it is.
        find: what says of what size content is that was uploaded before, and that this person may refer to.
    """

    store: Callable[[str, bytes], FileEntry]
    find: Callable[[str, str, int | None], FileEntry]
    message: str | None = None
    parent: str | None = None
    operations: list[Operation] = field(default_factory=list)
    _rest: bytearray = field(default_factory=bytearray)

    def feed(self, data: bytes) -> None:
        """The next bytes of the body. Raises `HttpError` for what is no commit."""
        self._rest += data
        *lines, rest = self._rest.split(b"\n") if b"\n" in data else [self._rest]
        for line in lines:
            self._take(bytes(line))
        self._rest = bytearray(rest)
        if len(self._rest) > MAX_LINE:
            raise HttpError(413, f"A line of the commit may have {MAX_LINE} bytes; larger files are uploaded before.")

    def finish(self) -> None:
        """Take the last line, and see that the header was there."""
        self._take(bytes(self._rest))
        if self.message is None:
            raise HttpError(400, "The commit has no header.")

    def _take(self, line: bytes) -> None:
        if not line.strip():
            return
        if len(line) > MAX_LINE:
            raise HttpError(413, f"A line of the commit may have {MAX_LINE} bytes; larger files are uploaded before.")
        try:
            item = json.loads(line)
        except (ValueError, RecursionError):
            raise HttpError(400, "A line of the commit is no JSON.") from None
        key, value = (item.get("key"), item.get("value")) if isinstance(item, dict) else (None, None)
        if not isinstance(key, str) or not isinstance(value, dict):
            raise HttpError(400, "Each line of the commit has to have a key and a value.")
        if (key == "header") == (self.message is not None):
            raise HttpError(400, "The commit has to begin with its header, and has only one.")
        if len(self.operations) >= MAX_OPERATIONS:
            raise HttpError(413, f"A commit may have {MAX_OPERATIONS} operations.")
        if key == "header":
            self._header(value)
        else:
            self.operations.append(self._operation(key, value))

    def _header(self, value: Mapping[str, object]) -> None:
        title = text_of(value.get("summary"), "summary").strip()
        body = text_of(value.get("description"), "description", "").strip()
        self.message = f"{title}\n\n{body}" if body else title
        if len(self.message) > _MAX_MESSAGE:
            raise HttpError(413, f"The message may have {_MAX_MESSAGE} characters.")
        if value.get("parentCommit") is not None:
            self.parent = text_of(value["parentCommit"], "parentCommit")

    def _operation(self, key: str, value: Mapping[str, object]) -> Operation:
        path = _path(text_of(value.get("path"), "path").rstrip("/"))
        match key:
            case "file":
                return Operation(key, path, self.store(path, _decoded(value)))
            case "lfsFile":
                oid, size = text_of(value.get("oid"), "oid"), value.get("size")
                if value.get("algo", "sha256") != "sha256" or _SHA256.fullmatch(oid) is None:
                    raise HttpError(400, f"{path} has to be named by its SHA-256.")
                return Operation(key, path, self.find(path, oid, size if isinstance(size, int) else None))
            case "deletedFile" | "deletedFolder":
                return Operation(key, path)
        raise HttpError(400, f"{key[:100]!r} is nothing that a commit can do here.")


def _decoded(value: Mapping[str, object]) -> bytes:
    content = text_of(value.get("content"), "content")
    encoding = value.get("encoding", "utf-8")
    if encoding not in ("base64", "utf-8"):
        raise HttpError(400, "The encoding of a file has to be base64 or utf-8.")
    try:
        return base64.b64decode(content, validate=True) if encoding == "base64" else content.encode()
    except (binascii.Error, UnicodeEncodeError):
        raise HttpError(400, "The content of a file is not what its encoding says.") from None


def applied(operations: Sequence[Operation], before: Sequence[FileEntry]) -> list[FileEntry]:
    """The files after a commit. Raises `HttpError` for a file that is to be removed and is not there."""
    files = {entry.path: entry for entry in before}
    for operation in operations:
        path = operation.path
        if operation.entry is not None:
            files[path] = operation.entry
            continue
        gone = [name for name in files if name.startswith(f"{path}/")] if operation.key == "deletedFolder" else [path]
        if not gone or gone[0] not in files:
            raise HttpError(404, f"There is nothing called {path} to delete.", "EntryNotFound")
        for name in gone:
            del files[name]
    try:
        check_paths(list(files), "The commit")
    except InputError as error:
        raise HttpError(422, error.message) from None
    return sorted(files.values())


async def commit(call: Call) -> Response:
    """`POST /api/models/{id}/commit/{branch}`: lines of JSON, a header first."""
    branch, opens = head_of(call.rest), is_opening(call)
    await run_in_threadpool(_check, call, branch, opens)
    draft = Draft(lambda path, data: _store(call, path, data), lambda *asked: _find(call, *asked))
    async for part in pieces(call.request, MAX_BODY):
        async with call.hub.parsing:
            await run_in_threadpool(draft.feed, part)
    async with call.hub.parsing:
        await run_in_threadpool(draft.finish)
    answer: dict[str, object] = {"success": True, "hookOutput": ""}
    if opens:
        branch, number = await run_in_threadpool(_open, call, draft)
        answer["pullRequestUrl"] = f"{call.page}/discussions/{number}"
    done = await run_in_threadpool(_commit, call, branch, draft)
    kind = "" if call.kind == "model" else f"{call.kind}s/"
    url = f"{call.base}/{kind}{done.repository.name}/commit/{done.commit.id}"
    call.note(action="commit", branch=branch, commit=done.commit.id)
    return json_response({**answer, "commitOid": done.commit.id, "commitUrl": url})


def _check(call: Call, branch: str, opens: bool) -> None:
    found = branch_to_write(call, branch, opens)
    if branch.startswith(PULLS):
        return
    try:
        check_branch(branch)
    except SurgeryError as error:
        raise HttpError(400, error.message) from None
    if branch != MAIN and call.hub.registry.head(found.name, branch, found.kind) is None:
        raise HttpError(404, f"Invalid rev id: {branch}", "RevisionNotFound")


def _open(call: Call, draft: Draft) -> tuple[str, int]:
    """A pull request for a commit that came in whole. Returns its ref and its number."""
    found, user = call.proposable(), call.user()
    head = call.hub.registry.head(found.name, MAIN, found.kind)
    # First, so that what cannot be committed opens nothing.
    check_commit(call, found, head.files if head is not None else (), _applied(draft, head))
    assert draft.message is not None
    title, _, text = draft.message.partition("\n")
    made = open_pull(call, found, title[:_MAX_TITLE], OPEN, comment(user.user, text.strip(), int(time.time())))
    # It starts from `main` as that is now, and that is what a parent was named for.
    draft.parent = None
    return f"{PULLS}{made.number}", made.number


def _store(call: Call, path: str, data: bytes) -> FileEntry:
    """Bring in a file that came with the commit."""
    if len(data) > LFS_FROM:
        raise HttpError(413, f"{path} has {len(data)} bytes; files of more than {LFS_FROM} are uploaded before.")
    sha256 = hashlib.sha256(data).hexdigest()
    if not call.hub.content.touch(sha256):
        with call.hub.content.receive() as incoming:
            incoming.write(memoryview(data))
            incoming.keep(sha256)
    return _entry(path, len(data), sha256, data)


def _entry(path: str, size: int, sha256: str, data: bytes | None) -> FileEntry:
    if data is None or is_lfs(path, size):
        return FileEntry(path, size, sha256, lfs_pointer_oid(sha256, size), True)
    sha1 = git_blob(size)
    sha1.update(memoryview(data))
    return FileEntry(path, size, sha256, sha1.hexdigest(), False)


def _find(call: Call, path: str, sha256: str, size: int | None) -> FileEntry:
    """A file that was uploaded before, by somebody whose uploads this person may refer to."""
    found = call.hub.content.size(sha256)
    if found is None or (size is not None and size != found) or not may_refer(call, sha256):
        raise HttpError(400, f"{path} was not uploaded: there is no content {sha256} of {size} bytes.")
    call.hub.content.touch(sha256)
    return _entry(path, found, sha256, None)


def may_refer(call: Call, sha256: str) -> bool:
    """Whether this person has proved to have content, or may read a repository that has it."""
    assert call.name is not None
    if call.hub.index.holds_content(sha256, call.visible(call.name.namespace)):
        return True
    return any(call.may_open(repository) for repository in call.hub.metadata.holding(sha256))


def _commit(call: Call, branch: str, draft: Draft) -> Revision:
    """Commit on top of wherever the branch is; only of a commit that names its parent there has to be that one."""
    found = branch_to_write(call, branch, False)
    registry, kind = call.hub.registry, found.kind
    assert draft.message is not None
    for _ in range(TRIES):
        head = registry.head(found.name, branch, kind)
        files = _applied(draft, head)
        if head is not None and list(head.files) == files:
            return head
        check_commit(call, found, head.files if head is not None else (), files)
        facts = stored_facts(call.hub.content, call.hub.metadata, files, str(found.name), kind)
        expected = head.commit.id if head is not None else None
        try:
            commit = registry.commit(found.name, branch, expected, files, draft.message, facts, kind)
        except ConflictError:  # somebody was quicker: on top of theirs, then
            continue
        except ContentMissingError:
            raise HttpError(409, "Content of the commit was removed meanwhile; upload it again.") from None
        if kind == "model":
            call.hub.completer.take_unhashed(found.name, commit.id, files)
        if branch.startswith(PULLS):
            _tell(call, found, branch, commit)
        return Revision(found, commit, tuple(files))
    raise HttpError(503, "The branch keeps moving; try again.", headers={"Retry-After": "1"})


def _applied(draft: Draft, head: Revision | None) -> list[FileEntry]:
    """The files after the commit, if it may be made on top of this one."""
    if draft.parent is not None and (head is None or head.commit.id != draft.parent):
        raise HttpError(412, STALE)
    return applied(draft.operations, head.files if head is not None else ())


def _tell(call: Call, found: Repository, branch: str, commit: Commit) -> None:
    """Say in a pull request that there is a commit."""
    number = number_of(branch)
    assert number is not None
    item = call.hub.community.discussion(found, number)
    data = {"subject": commit.message.partition("\n")[0], "oid": commit.id}
    if item is not None:
        with contextlib.suppress(ConflictError):  # closed or merged this very moment
            event = Event("commit", call.user().user, commit.time, data)
            call.hub.community.change(found, number, item.status, event, {})
