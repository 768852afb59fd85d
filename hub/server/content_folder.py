"""A commit's files as a folder: read where they lie, as blobs or as chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from surgery.errors import InputError
from surgery.folder import WithoutRecords
from surgery.hub.interfaces import Content, FileEntry
from surgery.source import Source


class ContentFolder(WithoutRecords):
    """Named files of a registry. `label` is the repository's name."""

    def __init__(self, content: Content, files: Sequence[FileEntry], label: str) -> None:
        self._content = content
        self._files = {entry.path: entry for entry in files}
        self._label = label

    @property
    def label(self) -> str:
        return self._label

    @property
    def provenance(self) -> Mapping[str, str]:
        return {"source": self._label}

    def names(self) -> Sequence[str]:
        return sorted(self._files)

    def open(self, name: str) -> Source:
        if name not in self._files:
            raise InputError(f"{self._label} has no file {name}.")
        return self._content.open(self._files[name].sha256)
