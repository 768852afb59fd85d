"""A small Hub on this machine: the endpoints that huggingface_hub uses, with faults to order and every byte counted."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

# What a fault may do to a request: answer with a status, or break off after some bytes of the body.
Fault = Callable[[str, str], "int | Cut | None"]


@dataclass(frozen=True)
class Cut:
    """The body ends after this many bytes, though its length was announced."""

    after: int


@dataclass(frozen=True)
class Request:
    """A request that was answered: method, path, status, and bytes of the body that were sent."""

    method: str
    path: str
    status: int
    sent: int
    authorization: str | None = None


@dataclass
class Repository:
    """Commits (files by path), newest last, and what branches and tags point to."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    messages: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], branch: str = "main", message: str = "") -> str:
        described = json.dumps([[name, hashlib.sha256(data).hexdigest()] for name, data in sorted(files.items())])
        sha = hashlib.sha1(f"{described}{len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.refs[branch] = sha
        self.messages.append(message)
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)


class FakeHub:
    """Repositories by id, the requests so far, and the faults to come."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.objects: dict[str, bytes] = {}
        self.fault: Fault = lambda method, path: None
        self.sizes = True
        # Content whose hashes are given out as those of other content: what a Hub that lies, or was damaged, does.
        self.hashes: dict[bytes, bytes] = {}
        self.ranges = True
        # Whether answers have the SHA-256 of what is in LFS, and whether descriptions have it.
        self.linked = True
        self.lfs = True
        self.token: str | None = None
        self.url = ""

    def add(self, name: str, folder: Path, branch: str = "main") -> str:
        """Commit every file of a folder; returns the commit."""
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        return self.repositories.setdefault(name, Repository()).commit(files, branch)

    def served(self, suffix: str = "") -> int:
        """Bytes sent in answer to requests for paths that end so."""
        return sum(request.sent for request in self.requests if request.path.endswith(suffix))

    def paths(self) -> list[str]:
        return [f"{request.method} {request.path}" for request in self.requests]


class Hub(Protocol):
    """Whatever answers at an address."""

    url: str


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, format: str, *args: Any) -> None: ...  # noqa: A002 - the name of the base class

    def answer(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        sent = b"" if self.command == "HEAD" else body if cut is None else body[:cut]
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(Request(self.command, path, status, len(sent), self.headers.get("Authorization")))
        self.wfile.write(sent)
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True

    def json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def error(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        self.json({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})})

    def handle_all(self) -> None:
        path = urlsplit(self.path).path
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        fault = self.hub.fault(self.command, unquote(path))
        self.cut = fault.after if isinstance(fault, Cut) else None
        if isinstance(fault, int):
            return self.error(fault, "", "out of order")
        if path == "/api/whoami-v2":
            if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
                return self.error(401, "", "Invalid credentials in Authorization header")
            return self.json({"type": "user", "name": "ada", "fullname": "Ada", "orgs": [{"name": "lab"}], "auth": {}})
        if path == "/api/repos/create":
            return self.create(json.loads(self.body))
        if path == "/api/repos/delete":
            given = json.loads(self.body)
            name = f"{given['organization']}/{given['name']}" if given.get("organization") else given["name"]
            if self.hub.repositories.pop(name, None) is None:
                return self.error(404, "RepoNotFound", "Repository not found")
            return self.json({})
        if path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if path == "/api/models":
            wanted = set(parse_qs(urlsplit(self.path).query).get("filter", []))
            time = "2026-01-02T03:04:05.000Z"
            found = [(name, one.tags) for name, one in self.hub.repositories.items() if wanted <= set(one.tags)]
            return self.json([{"id": name, "lastModified": time, "tags": tags} for name, tags in found])
        if match := re.fullmatch(r"/objects/([0-9a-f]{64})", path):
            self.hub.objects[match[1]] = self.body
            return self.answer(200)
        if match := re.fullmatch(r"/(?P<id>[^/]+(?:/[^/]+)?)\.git/info/lfs/objects/batch", path):
            return self.lfs_batch()
        if match := re.fullmatch(r"/api/models/(?P<id>[^/]+/[^/]+)/refs", path):
            return self.refs(match["id"])
        if match := re.fullmatch(r"/api/models/(?P<id>[^/]+/[^/]+|[^/]+)", path):
            return self.info(match["id"], None)
        if match := re.fullmatch(r"/api/models/(?P<id>[^/]+/[^/]+|[^/]+?)/(?P<what>\w+[\w-]*)/(?P<rest>.+)", path):
            return self.model(match["id"], match["what"], match["rest"])
        if match := re.fullmatch(r"/(?P<id>[^/]+/[^/]+|[^/]+?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", path):
            return self.resolve(match["id"], unquote(match["revision"]), unquote(match["file"]))
        return self.error(404, "", f"no such endpoint {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_all  # noqa: N815 - the names that http.server calls

    def found(self, name: str) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self.error(404, "RepoNotFound", "Repository not found")
        elif repository.gated:
            self.error(403, "GatedRepo", "Access is restricted")
            return None
        return repository

    def info(self, name: str, revision: str | None) -> None:
        if (repository := self.found(name)) is None:
            return None
        sha = repository.resolve(revision or "main")
        if sha is None:
            return self.error(404, "RevisionNotFound", "Revision not found")
        siblings: list[dict[str, object]] = []
        for path, data in repository.commits[sha].items():
            item: dict[str, object] = {"rfilename": path}
            if self.hub.sizes and parse_qs(urlsplit(self.path).query).get("blobs"):
                data = self.hub.hashes.get(data, data)
                blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
                item |= {"size": len(data), "blobId": blob}
                if path.endswith(".safetensors") and self.hub.lfs:
                    item["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            siblings.append(item)
        return self.json(
            {"id": name, "sha": sha, "siblings": siblings, "private": repository.private, "tags": repository.tags}
        )

    def refs(self, name: str) -> None:
        if (repository := self.found(name)) is not None:
            branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repository.refs.items()]
            self.json({"branches": branches, "tags": [], "converts": []})

    def resolve(self, name: str, revision: str, path: str) -> None:
        if (repository := self.found(name)) is None:
            return None
        sha = repository.resolve(revision)
        if sha is None:
            return self.error(404, "RevisionNotFound", "Revision not found")
        data = repository.commits[sha].get(path)
        if data is None:
            return self.error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
        etag = _sha256(data) if path.endswith(".safetensors") else hashlib.sha1(data).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if path.endswith(".safetensors") and self.hub.linked:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted and self.hub.ranges:
            begin, end = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {begin}-{end}/{len(data)}"
            return self.answer(206, data[begin : end + 1], headers, self.cut)
        return self.answer(200, data, headers, self.cut)

    def create(self, given: dict[str, Any]) -> None:
        name = f"{given.get('organization') or 'ada'}/{given['name']}"
        described = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
        if name in self.hub.repositories:
            return self.json({**described, "error": "You already created this model repo"}, 409)
        private = given.get("visibility") == "private" or bool(given.get("private"))
        self.hub.repositories[name] = Repository(private=private)
        self.hub.repositories[name].commit({}, message="initial commit")
        return self.json(described)

    def lfs_batch(self) -> None:
        found = []
        for item in json.loads(self.body)["objects"]:
            actions = (
                {} if item["oid"] in self.hub.objects else {"upload": {"href": f"{self.hub.url}/objects/{item['oid']}"}}
            )
            found.append({**item, "actions": actions} if actions else dict(item))
        self.json({"transfer": "basic", "objects": found})

    def model(self, name: str, what: str, rest: str) -> None:
        revision = unquote(rest.split("/")[0])
        if what == "revision":
            return self.info(name, revision)
        if (repository := self.found(name)) is None:
            return None
        if what == "branch":
            start = json.loads(self.body or b"{}").get("startingPoint") or "main"
            repository.refs[revision] = repository.refs[start]
            return self.json({})
        sha = repository.resolve(revision)
        if sha is None:
            return self.error(404, "RevisionNotFound", "Revision not found")
        if what == "preupload":
            files = json.loads(self.body)["files"]
            modes = [{"path": f["path"], "uploadMode": _mode(f["path"]), "shouldIgnore": False} for f in files]
            return self.json({"files": modes})
        if what == "commits":
            history = [{"id": name, "title": name[:4], "message": "", "date": "2026-01-02T03:04:05.000Z", "authors": []}
                       for name in repository.commits]  # fmt: skip
            return self.json(history)
        if what == "tree":
            items = [{"type": "file", "path": p, "oid": hashlib.sha1(d).hexdigest(), "size": len(d)}
                     for p, d in repository.commits[sha].items()]  # fmt: skip
            return self.json(items)
        if what == "commit":
            return self.commit(name, repository, revision, sha)
        return self.error(404, "", f"no such endpoint {what}")

    def commit(self, name: str, repository: Repository, branch: str, parent: str) -> None:
        files = dict(repository.commits[parent])
        message = ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit", parent) != parent:
                    return self.error(412, "", "The branch was updated since you opened this page.")
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        sha = repository.commit(files, branch, message)
        return self.json({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha, "success": True})


@lru_cache(32)
def _sha256(data: bytes) -> str:
    """Of a file that is asked for in many parts, once."""
    return hashlib.sha256(data).hexdigest()


def _mode(path: str) -> str:
    return "lfs" if path.endswith((".safetensors", ".bin")) else "regular"


class PatientServer(ThreadingHTTPServer):
    """Says nothing of clients that hang up, as tests have them do."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextlib.contextmanager
def running() -> Iterator[FakeHub]:
    """A Hub that answers as long as this lasts."""
    hub = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = PatientServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def configure(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `hub` the configured endpoint of this process, with an empty cache and no token."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session  # type: ignore[attr-defined]  # documented, not marked as exported

    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(home / "stored_tokens"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    close_session()


def environment(hub: FakeHub, home: Path) -> dict[str, str]:
    """The same for another process."""
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
