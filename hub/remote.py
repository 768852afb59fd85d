"""A repository on a Hub, seen as a folder. Weights are read by range requests; small files through the Hub's own cache.

What the cache already holds is read from there, and offline only that. Everything about the protocol is left to
huggingface_hub: endpoint, tokens, redirects, retries.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.errors import InputError, IntegrityError, first_line
from surgery.folder import SKIPPED_FOLDERS, WEIGHT_SUFFIXES, LocalFolder, read_json
from surgery.hub.naming import check_paths
from surgery.hub.network import network_errors, patiently
from surgery.hub.range_source import RangeSource
from surgery.hub.ranges import RangeReader
from surgery.hub.traffic import Traffic, note_opened
from surgery.hub.transfer import git_blob, pump
from surgery.provenance import FILE_NAME
from surgery.reports import Fetched
from surgery.source import FileSource, Source

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling


class HubFolder:
    """A model repository at one commit, on the Hub at `endpoint` (the configured one by default).

    What the revision means is asked once. All that is read is of that commit, wherever a branch goes meanwhile.
    """

    def __init__(self, repository: str, revision: str | None, endpoint: str | None = None) -> None:
        self.repository = repository
        self._wanted = revision
        self._endpoint = endpoint
        self._traffic = Traffic()
        self._ranges: dict[str, RangeSource] = {}
        self._by_tensors: set[str] = set()
        self._commit, self._files = patiently(self._fetch_info)
        check_paths(list(self._files), self.label)
        note_opened(self)

    def _fetch_info(self) -> tuple[str, dict[str, RepoSibling]]:
        """The commit, and what is said of each file."""
        from huggingface_hub import HfApi

        info = HfApi(endpoint=self._endpoint).model_info(self.repository, revision=self._wanted, files_metadata=True)
        if info.sha is None:
            raise InputError(f"{self.label} has no commit.")
        return info.sha, {item.rfilename: item for item in info.siblings or []}

    @property
    def label(self) -> str:
        return self.repository + (f"@{self._wanted}" if self._wanted else "")

    @property
    def provenance(self) -> Mapping[str, str]:
        return {"source": self.repository, "revision": self._commit}

    @cached_property
    def _names(self) -> list[str]:
        # As `LocalFolder` has them: without what is hidden, and without what belongs to a record.
        shown = [name for name in self._files if not any(part.startswith(".") for part in name.split("/"))]
        return sorted(name for name in shown if SKIPPED_FOLDERS.isdisjoint(name.split("/")[:-1]))

    def names(self) -> Sequence[str]:
        return self._names

    def open(self, name: str) -> Source:
        from huggingface_hub import hf_hub_url, try_to_load_from_cache

        if name not in self._files:
            raise InputError(f"{self.label} has no file {name}.")
        cached = try_to_load_from_cache(self.repository, name, revision=self._commit)
        if isinstance(cached, str):
            return FileSource(cached)
        if not name.endswith(WEIGHT_SUFFIXES) or name.endswith((".json", ".bin")):
            return FileSource(self._download(name))
        if name not in self._ranges:
            url = hf_hub_url(self.repository, name, revision=self._commit, endpoint=self._endpoint)
            said = self._files[name]
            size, sha256 = said.size, "" if said.lfs is None else said.lfs.sha256
            reader = RangeReader(
                url,
                f"{self.label}/{name}",
                self._size(url) if size is None else size,
                self._traffic,
                self._commit,
                sha256,
            )
            self._ranges[name] = RangeSource(reader, self._commit, sha256)
        return self._ranges[name]

    def subfolder_files(self, name: str) -> Mapping[str, int]:
        below = f"{name}/"
        found = {path.removeprefix(below): item for path, item in self._files.items() if path.startswith(below)}
        return {path: item.size or 0 for path, item in sorted(found.items())}

    def subfolder(self, name: str) -> LocalFolder:
        fetched = self.on_disk([f"{name}/{path}" for path in self.subfolder_files(name)])
        return LocalFolder(fetched.path / name)

    def on_disk(self, names: Sequence[str]) -> SnapshotFolder:
        """Fetch files whole into the Hub's cache, as those programs need them that load models from a disk.

        Raises:
            InputError: one cannot be fetched.
            IntegrityError: one has not the hash that the Hub gives it.
        """
        from huggingface_hub import snapshot_download, try_to_load_from_cache
        from huggingface_hub.errors import LocalEntryNotFoundError

        missing = [
            name
            for name in names
            if not isinstance(try_to_load_from_cache(self.repository, name, revision=self._commit), str)
        ]

        def fetch() -> str:
            return snapshot_download(
                self.repository,
                revision=self._commit,
                endpoint=self._endpoint,
                allow_patterns=[glob.escape(name) for name in names],
                local_files_only=not missing,
            )

        try:
            place = patiently(fetch, LocalEntryNotFoundError)
        except network_errors() as error:
            raise InputError(f"{self.label} cannot be fetched: {first_line(_cause(error))}.") from error
        for name in missing:
            self._prove(name, Path(place) / name)
        return SnapshotFolder(place, self.repository, self.label)

    def _download(self, name: str) -> str:
        """A small file, into the Hub's cache."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        def fetch() -> str:
            return hf_hub_download(self.repository, name, revision=self._commit, endpoint=self._endpoint)

        try:
            place = patiently(fetch, LocalEntryNotFoundError)
        except network_errors() as error:
            raise InputError(f"{self.label}/{name} cannot be fetched: {first_line(_cause(error))}.") from error
        self._prove(name, Path(place))
        return place

    def _prove(self, name: str, path: Path) -> None:
        """Compare what came with the hash that the Hub gives: SHA-256 of what is in LFS, git's of everything else."""
        said, source = self._files[name], FileSource(path)
        self._traffic.count(source.size)
        expected = said.blob_id if said.lfs is None else said.lfs.sha256
        if not expected:
            return
        hasher = git_blob(source.size) if said.lfs is None else hashlib.sha256()
        pump(source, [hasher.update], _no_advance)
        if hasher.hexdigest() != expected:
            os.unlink(path.resolve())  # the next run must not find it in the cache
            raise IntegrityError(
                f"{self.label}/{name} has the hash {hasher.hexdigest()}, expected {expected}: it was damaged on the "
                "way, or where it is kept; nothing is written."
            )

    def _size(self, url: str) -> int:
        """The length of a file that the repository's description does not give."""
        from huggingface_hub import get_hf_file_metadata

        try:
            size = patiently(lambda: get_hf_file_metadata(url)).size
        except network_errors() as error:
            raise InputError(f"{url} cannot be read: {first_line(error)}.") from error
        if size is None:
            raise InputError(f"{url}: the server does not say how long the file is, so it cannot be read in ranges.")
        return size

    def prove(self, tensors: Sequence[tuple[str, Source, str | None]]) -> None:
        """Hold what was read in ranges against the tensors' hashes in the repository's own `surgery.json`."""
        doubtful = {id(source): name for name, source in self._ranges.items() if source.read and not source.proved}
        if not doubtful or FILE_NAME not in self._files:
            return
        outputs = read_json(self.open(FILE_NAME)).get("outputs")
        recorded = outputs if isinstance(outputs, dict) else {}
        unknown: set[str] = set()
        for tensor, source, digest in tensors:
            if (file := doubtful.get(id(source))) is None:
                continue
            entry = recorded.get(tensor)
            expected = entry.get("blake3") if isinstance(entry, dict) else None
            if digest is None or expected is None:
                unknown.add(file)
            elif digest != expected:
                raise IntegrityError(
                    f"Tensor {tensor!r} of {self.label}/{file} has the hash {digest}, and {FILE_NAME} beside it has "
                    f"{expected} on record: it was damaged on the way, or where it is kept; nothing is written."
                )
        self._by_tensors |= {*doubtful.values()} - unknown

    @property
    def fetched(self) -> Fetched:
        """What came over the network so far, and what was proved of it."""
        read = {name: source for name, source in self._ranges.items() if source.read}
        proved = [name for name, source in read.items() if source.proved or name in self._by_tensors]
        return Fetched(
            source=self.repository,
            revision=self._commit,
            nbytes=self._traffic.nbytes,
            proved=tuple(sorted(proved)),
            unproved=tuple(sorted(read.keys() - {*proved})),
        )


def _no_advance(count: int) -> None:
    """Nobody is told."""


def _cause(error: Exception) -> Exception:
    return error.__cause__ if isinstance(error.__cause__, Exception) else error


def open_folder(repository: str, revision: str | None, endpoint: str | None = None) -> HubFolder | LocalFolder:
    """A repository on a Hub, or its snapshot in the local cache where the Hub cannot be reached.

    Raises `InputError` with one sentence where there is neither.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    label = repository + (f"@{revision}" if revision else "")
    place = endpoint or constants.ENDPOINT
    failure: Exception
    try:
        if not constants.HF_HUB_OFFLINE:
            return HubFolder(repository, revision, endpoint)
        failure = OSError("HF_HUB_OFFLINE is set")
    except GatedRepoError as error:
        raise InputError(f"{label} is gated on {place}: ask for access there, then log in.") from error
    except RevisionNotFoundError as error:
        raise InputError(f"{repository} on {place} has no revision {revision!r}.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(
            f"{label} is neither a local path nor a model on {place} that you may read; if it is private, log in with "
            "`hf auth login`, or set HF_TOKEN."
        ) from error
    except network_errors() as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):  # it was reached, and what the cache holds may be another token's
            raise InputError(
                f"{place} refuses what you are logged in with (status {status}); log in with `hf auth login`, or set "
                "HF_TOKEN."
            ) from error
        failure = error
    try:
        return SnapshotFolder(
            snapshot_download(repository, revision=revision, local_files_only=True), repository, label
        )
    except (LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise InputError(
            f"{label} is neither a local path nor in the local cache, and {place} cannot be reached "
            f"({first_line(failure)})."
        ) from error


class SnapshotFolder(LocalFolder):
    """A snapshot in the Hub's cache: a local folder that goes by the name of its repository."""

    is_cache = True

    def __init__(self, path: str, repository: str, label: str) -> None:
        super().__init__(path)
        self._repository, self._label = repository, label

    @property
    def label(self) -> str:
        return self._label

    @property
    def provenance(self) -> Mapping[str, str]:
        return {"source": self._repository, "revision": Path(self.path).name}
