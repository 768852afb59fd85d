"""Repositories, files and commits as the Hub's clients expect them in JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from surgery.hub.index import Entry
from surgery.hub.interfaces import Commit, Content, FileEntry, Repository
from surgery.hub.server.front_matter import card_of
from surgery.hub.store import Revision
from surgery.hub.tags import bases_of, library_of, pipeline_tag_of, tags_of
from surgery.hub.xet import hashes

_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"
# Facts that only this server tells.
_FACTS = (
    "kind", "relation", "base", "base_revision", "base_weights", "method", "ranks", "targets", "modules", "task",
    "family", "architecture", "experts", "parameters", "dtype", "weights", "operation", "parents", "unread",
)  # fmt: skip


def iso(seconds: int) -> str:
    """A time as the Hub writes it."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def repository(found: Repository, head: Revision | None, content: Content, blobs: bool) -> dict[str, object]:
    """What `GET /api/models/{id}` says; with `blobs` also of the size and hashes of each file."""
    if head is None:
        return entry(Entry(found, None, None)) | {"siblings": [], "usedStorage": 0, "cardData": {}}
    card = card_of(content, head)
    facts = head.commit.facts
    known = Entry(found, head.commit.id, head.commit.tree, facts, tuple(tags(facts, card)), head.nbytes)
    described = entry(known) | {"siblings": [sibling(item, blobs) for item in head.files], "cardData": card}
    if found.kind == "model":
        described["pipeline_tag"] = card.get("pipeline_tag")
    return described


def entry(known: Entry) -> dict[str, object]:
    """What the index alone can say of a repository."""
    found, facts = known.repository, known.facts
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
        "tags": list(known.tags),
        "usedStorage": known.size,
    }
    if known.commit is not None:
        described["sha"] = known.commit
    if found.kind == "model":
        described |= {
            "modelId": str(found.name),
            "pipeline_tag": pipeline_tag_of(facts),
            "library_name": library_of(facts),
            "facts": {key: facts[key] for key in _FACTS if key in facts},
        }
        if isinstance(parameters := facts.get("dtypes"), dict):
            described["safetensors"] = {"parameters": parameters, "total": facts.get("parameters")}
        if config := _config(facts):
            described["config"] = config
    return described


def _config(facts: Mapping[str, object]) -> dict[str, object]:
    """What the Hub shows of `config.json`, or of `adapter_config.json`."""
    if facts.get("kind") == "adapter":
        return {"peft": {"base_model_name_or_path": facts.get("base"), "task_type": facts.get("task")}}
    found = {"model_type": facts.get("family")} if facts.get("family") else {}
    return found | ({"architectures": [facts["architecture"]]} if facts.get("architecture") else {})


def bases(facts: Mapping[str, object]) -> list[str]:
    """The Hub's `baseModels`: what something was made from, as far as these could be repositories."""
    return bases_of(facts)


def tags(facts: Mapping[str, object], card: Mapping[str, object]) -> list[str]:
    """The tags of a repository: those of the card, and what its files say it is and was made from."""
    return tags_of(facts if "version" in facts else {**facts, "card": card})


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
