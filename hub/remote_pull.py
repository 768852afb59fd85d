"""A commit on a Hub, to pull from: which files it has with which hashes, and their bytes by range requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from surgery.errors import InputError, first_line
from surgery.hub.interfaces import FileEntry
from surgery.hub.network import network_errors, patiently
from surgery.hub.range_source import RangeSource
from surgery.hub.ranges import RangeReader
from surgery.hub.traffic import Traffic
from surgery.source import BytesSource, Source


@dataclass(frozen=True)
class HubCommit:
    """A model repository at one commit. Large files have a SHA-256 on record, the others the id git gives them."""

    name: str
    commit: str
    endpoint: str
    files: Sequence[FileEntry]
    private: bool = False
    _traffic: Traffic = field(default_factory=Traffic, repr=False, compare=False)

    @classmethod
    def find(cls, name: str, revision: str | None, endpoint: str) -> HubCommit:
        """Ask the Hub for a repository. Raises `InputError` in one sentence where it has none to show."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        api = HfApi(endpoint=endpoint)
        try:
            info = patiently(lambda: api.model_info(name, revision=revision, files_metadata=True))
        except GatedRepoError as error:
            raise InputError(f"{name} is gated on {endpoint}: ask for access there, then log in.") from error
        except RevisionNotFoundError as error:
            raise InputError(f"{name} on {endpoint} has no revision {revision!r}.") from error
        except RepositoryNotFoundError as error:
            raise InputError(
                f"There is no model called {name} in the local registry, nor one on {endpoint} that you may read."
            ) from error
        except network_errors() as error:
            raise InputError(f"{endpoint} cannot be reached ({first_line(error)}).") from error
        if info.sha is None:
            raise InputError(f"{name} on {endpoint} has no commit.")
        files = []
        for item in info.siblings or []:
            sha256 = item.lfs.sha256 if item.lfs is not None else ""
            if item.size is None or not (sha256 or item.blob_id):
                raise InputError(
                    f"{endpoint} does not say how long {item.rfilename} of {name} is and what it hashes to, so it "
                    "cannot be proved; fetch it with another tool."
                )
            files.append(FileEntry(item.rfilename, item.size, sha256, item.blob_id or "", item.lfs is not None))
        return cls(info.id, info.sha, endpoint, tuple(sorted(files)), bool(info.private))

    def open(self, entry: FileEntry) -> Source:
        from huggingface_hub import hf_hub_url

        if not entry.size:
            return BytesSource(f"{self.name}/{entry.path}", b"")
        url = hf_hub_url(self.name, entry.path, revision=self.commit, endpoint=self.endpoint)
        # Whoever pulls hashes what comes, so the source need not.
        reader = RangeReader(url, f"{self.name}/{entry.path}", entry.size, self._traffic, self.commit)
        source = RangeSource(reader, self.commit)
        source.expect([(0, entry.size)])
        return source
