"""Helpers of the tests of the registry: whether one is sound, and folders to push."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from surgery.hub.interfaces import FileEntry
from surgery.hub.store import Registry, commit_id, tree_id
from surgery.hub.transfer import git_blob, lfs_pointer_oid
from surgery.source import read_bytes
from tests.tools import square_adapter


def put(registry: Registry, data: bytes) -> str:
    """Bring content in; returns its hash."""
    sha256 = hashlib.sha256(data).hexdigest()
    with registry.content.receive() as incoming:
        incoming.write(memoryview(data))
        incoming.keep(sha256)
    return sha256


def entry(path: str, data: bytes) -> FileEntry:
    sha1 = git_blob(len(data))
    sha1.update(memoryview(data))
    return FileEntry(path, len(data), hashlib.sha256(data).hexdigest(), sha1.hexdigest(), False)


def assert_sound(registry: Registry) -> int:
    """Every commit of every branch is whole: ids, trees, and the content of each file. Returns how many there are."""
    count = 0
    for repository in registry.metadata.repositories():
        for target in registry.metadata.refs(repository.name).values():
            for commit in registry.metadata.history(repository.name, target):
                count += 1
                files = list(registry.metadata.files(commit.tree))
                assert commit.tree == tree_id(files)
                assert commit.id == commit_id(commit.tree, commit.parent, commit.message, commit.time)
                for file in files:
                    data = read_bytes(registry.content.open(file.sha256), 0, file.size)
                    assert hashlib.sha256(data).hexdigest() == file.sha256
                    assert len(data) == file.size
                    if file.lfs:
                        assert file.oid == lfs_pointer_oid(file.sha256, file.size)
    return count


def contents(registry: Registry) -> set[str]:
    """Hashes of everything that is stored."""
    return {sha256 for sha256, _, _ in registry.content.list()}


def adapter(folder: Path, base: str = "lab/base", layers: int = 2, side: int = 16) -> Path:
    """An adapter that may be pushed: its base has a name."""
    square_adapter(folder, layers, side)
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": base, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
