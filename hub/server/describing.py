"""Repositories, files and commits as the Hub's clients expect them in JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from surgery.hub.interfaces import Commit, Content, FileEntry, Repository
from surgery.hub.server.front_matter import card_of
from surgery.hub.store import Revision
from surgery.hub.xet import hashes

_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"


def iso(seconds: int) -> str:
    """A time as the Hub writes it."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def repository(found: Repository, head: Revision | None, content: Content, blobs: bool) -> dict[str, object]:
    """What `GET /api/models/{id}` says; with `blobs` also of the size and hashes of each file."""
    card = card_of(content, head) if head is not None else {}
    facts = head.commit.facts if head is not None else {}
    described: dict[str, object] = {
        "_id": f"{found.kind}:{found.name.key}",
        "id": str(found.name),
        "author": found.name.namespace or None,
        "private": found.private,
        "gated": False,
        "disabled": False,
        "createdAt": iso(found.created),
        "lastModified": iso(found.updated),
        "downloads": 0,
        "likes": 0,
        "tags": tags(facts, card),
        "siblings": [sibling(entry, blobs) for entry in head.files] if head is not None else [],
        "usedStorage": head.nbytes if head is not None else 0,
        "cardData": card,
    }
    if head is not None:
        described["sha"] = head.commit.id
    if found.kind == "model":
        described["modelId"] = str(found.name)
        described["pipeline_tag"] = card.get("pipeline_tag")
        described["library_name"] = card.get("library_name") or _library(facts)
    return described


def _library(facts: Mapping[str, object]) -> str | None:
    return {"adapter": "peft", "dense": "transformers", "moe": "transformers"}.get(str(facts.get("kind")))


def tags(facts: Mapping[str, object], card: Mapping[str, object]) -> list[str]:
    """The tags of a repository: those of the card, and what its config says it was made from."""
    found = dict.fromkeys(_texts(card.get("tags")))
    if (library := card.get("library_name") or _library(facts)) is not None:
        found[str(library)] = None
    for name in (facts.get("kind"), facts.get("method"), facts.get("family")):
        if isinstance(name, str):
            found[name] = None
    relation = "adapter" if facts.get("kind") == "adapter" else card.get("base_model_relation")
    bases = dict.fromkeys([*_texts(facts.get("base")), *_texts(card.get("base_model"))])
    for base in bases:
        found[f"base_model:{base}"] = None
        if isinstance(relation, str):
            found[f"base_model:{relation}:{base}"] = None
    if isinstance(card.get("license"), str):
        found[f"license:{card['license']}"] = None
    return list(found)


def _texts(value: object) -> list[str]:
    """A text, or each text of a list."""
    listed = value if isinstance(value, list) else [value]
    return [item for item in listed if isinstance(item, str)]


def sibling(entry: FileEntry, blobs: bool) -> dict[str, object]:
    """A file in the description of a repository."""
    if not blobs:
        return {"rfilename": entry.path}
    described: dict[str, object] = {"rfilename": entry.path, "size": entry.size, "blobId": entry.oid}
    if entry.lfs:
        described["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": _pointer_size(entry)}
    return described


def _pointer_size(entry: FileEntry) -> int:
    return len(_POINTER.format(entry.sha256, entry.size))


def file(entry: FileEntry, content: Content, last: Commit | None = None) -> dict[str, object]:
    """A file in a listing of files."""
    described: dict[str, object] = {"type": "file", "oid": entry.oid, "size": entry.size, "path": entry.path}
    if entry.lfs:
        described["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": _pointer_size(entry)}
        if (recipe := content.recipe(entry.sha256)) is not None:
            described["xetHash"] = hashes.text(recipe.digest)
    if last is not None:
        described["lastCommit"] = _last(last)
    return described


def folder(path: str, oid: str, last: Commit | None = None) -> dict[str, object]:
    """A folder in a listing of files."""
    described: dict[str, object] = {"type": "directory", "oid": oid, "size": 0, "path": path}
    if last is not None:
        described["lastCommit"] = _last(last)
    return described


def _last(commit: Commit) -> dict[str, str]:
    return {"id": commit.id, "title": commit.message.partition("\n")[0], "date": iso(commit.time)}


def commit(found: Commit) -> dict[str, object]:
    """A commit in a history. Who made it is not on record."""
    title, _, body = found.message.partition("\n")
    return {"id": found.id, "title": title, "message": body.strip(), "date": iso(found.time), "authors": []}


def refs(found: Mapping[str, str], prefixes: Sequence[str]) -> list[dict[str, str]]:
    """Refs that begin with one of the prefixes."""
    return [
        {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": target}
        for ref, target in found.items()
        for prefix in prefixes
        if ref.startswith(prefix)
    ]
