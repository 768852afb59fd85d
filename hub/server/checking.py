"""Holding what comes in to the server's policy: before it is uploaded as far as can be told, and before each commit."""

from __future__ import annotations

import base64
import binascii
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from surgery.errors import SurgeryError
from surgery.hub.interfaces import FileEntry, Repository
from surgery.hub.pickles import LOOK_VERSION, SAFE, SUSPICIOUS, Pickled, judged, level_of, look, sniff
from surgery.hub.server.hub import Call, Hub
from surgery.hub.server.policy import ALLOW, REFUSE
from surgery.hub.server.web import HttpError

log = logging.getLogger("surgery.hub")
_SAMPLE = 2048  # characters of base64; clients send 512 bytes
_SAFETY = {"safe": "innocuous", "suspicious": "suspicious", "unsafe": "dangerous"}
_NO_SCAN = {"status": "unscanned", "message": None, "reportLink": None, "reportLabel": None}


def check_offered(call: Call, found: Repository, files: Sequence[Mapping[str, Any]]) -> None:
    """Refuse what a client is about to upload, by name, size and first bytes. Raises `HttpError`."""
    policy = call.hub.policy
    for item in files:
        path, size = str(item["path"]), int(item["size"])
        check_size(call.hub, path, size)
        sample = item.get("sample")
        if policy.pickle == REFUSE and sniff(path, _decoded(sample) if isinstance(sample, str) else b""):
            raise _no_pickles(path)
    # What of it is here already is not known yet, so only what cannot fit in any case is refused.
    check_room(call.hub, found.name.namespace, {}, sum(int(item["size"]) for item in files))


def _decoded(sample: str) -> bytes:
    try:
        return base64.b64decode(sample[:_SAMPLE])
    except binascii.Error:
        return b""


def check_size(hub: Hub, path: str, size: int) -> None:
    """Raise `HttpError` for a file that is too large for this server."""
    limit = hub.policy.max_file
    if limit is not None and size > limit:
        raise HttpError(413, f"{path} has {size} bytes; a file may have {limit} bytes on this server.")


def check_room(hub: Hub, space: str, new: Mapping[str, int], announced: int = 0) -> None:
    """Raise `HttpError` where a namespace would have more than its quota.

    Args:
        hub: the server.
        space: the namespace.
        new: bytes of content by its SHA-256, which counts unless the namespace has it already.
        announced: bytes that are about to come; how much of it is here already is not known.
    """
    quota = hub.policy.quota
    if quota is None:
        return
    used = hub.metadata.used(space, new)
    if used > quota or (announced and (used >= quota or announced > quota)):
        raise HttpError(
            403,
            f"{space or 'A repository without a namespace'} may keep {quota} bytes on this server and would have "
            f"{max(used, announced)}; delete something, or ask an administrator for more",
        )


def check_commit(call: Call, found: Repository, before: Sequence[FileEntry], after: Sequence[FileEntry]) -> None:
    """Refuse a commit for what is new in it. Raises `HttpError`."""
    hub, had = call.hub, {(entry.path, entry.sha256) for entry in before}
    new = [entry for entry in after if (entry.path, entry.sha256) not in had]
    for entry in new:
        check_size(hub, entry.path, entry.size)
    check_room(hub, found.name.namespace, {entry.sha256: entry.size for entry in new})
    if hub.policy.pickle == ALLOW:
        return
    pickles = {entry.path: pickled for entry in new if (pickled := scanned(hub, entry)) is not None}
    if pickles and hub.policy.pickle == REFUSE:
        raise _no_pickles(next(iter(pickles)))
    if pickles:
        call.note(pickles=[f"{path}: {pickled.level}" for path, pickled in pickles.items()])


def _no_pickles(path: str) -> HttpError:
    return HttpError(
        422, f"{path} is a pickle, which runs code when it is loaded; this server takes none: save it as safetensors."
    )


# Scans ----------------------------------------------------------------------------------------------------------------


def scanned(hub: Hub, entry: FileEntry) -> Pickled | None:
    """What is pickled in a file, by its content and its name. It is looked into once."""
    return scan_all(hub, [entry])[entry.path]


def scan_all(hub: Hub, entries: Sequence[FileEntry]) -> dict[str, Pickled | None]:
    """The same for many files, by path."""
    found: dict[str, Pickled | None] = {}
    new: dict[str, dict[str, Any]] = {}
    for entry in entries:
        known = hub.community.scan(entry.sha256)
        if known is None or known.get("version") != LOOK_VERSION:
            try:
                pickled = look(hub.content.open(entry.sha256))
            except SurgeryError as error:  # lost or damaged: a listing says so and goes on
                log.error("%s", error)
                found[entry.path] = Pickled(SUSPICIOUS, (), "It could not be read.")
                continue
            known = {"version": LOOK_VERSION} | ({} if pickled is None else asdict(pickled))
            new[entry.sha256] = known
        pickled = Pickled(known["level"], tuple(known["imports"]), known["message"]) if "level" in known else None
        found[entry.path] = judged(entry.path, pickled)
    if new:
        hub.community.keep_scans(new)
    return found


def file_status(pickled: Pickled | None) -> dict[str, object]:
    """`securityFileStatus` of a file in a listing."""
    level = SAFE if pickled is None else pickled.level
    scan: dict[str, object] = {**_NO_SCAN, "status": "unscanned", "pickleImports": []}
    if pickled is not None:
        imports = [(name.rpartition("."), _SAFETY[level_of(name)]) for name in pickled.imports]
        scan = {
            "status": level,
            "message": pickled.message,
            "highestSafetyLevel": _SAFETY[level],
            "pickleImports": [{"module": name[0], "name": name[2], "safety": safety} for name, safety in imports],
        }
    return {"status": level, "avScan": _NO_SCAN, "pickleImportScan": scan}


def repository_status(hub: Hub, entries: Sequence[FileEntry]) -> dict[str, object]:
    """`securityRepoStatus` of a repository."""
    found = scan_all(hub, entries)
    issues = [
        {"path": path, "level": pickled.level}
        for path, pickled in found.items()
        if pickled is not None and pickled.level != SAFE
    ]
    return {"scansDone": True, "filesWithIssues": issues}
