"""A repository on a Hub, seen as a folder. Weights are read by range requests; small files through the Hub's own cache.

What the cache already holds is read from there, and offline only that. Everything about the protocol is left to
huggingface_hub: endpoint, tokens, redirects, retries.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from surgery.errors import FormatError, InputError
from surgery.folder import WEIGHT_SUFFIXES, LocalFolder
from surgery.source import FileSource, NotAFile, Source

# One request moves this much: small enough to hold several at once, large enough to hide the latency of a request.
BLOCK_BYTES = 8 << 20
_HELD_BLOCKS = 16


class RangeSource(NotAFile):
    """A file behind a URL, read in blocks by range requests; the latest blocks are kept."""

    def __init__(self, url: str, name: str, size: int) -> None:
        self._url, self._name, self._size = url, name, size
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._mutex = threading.Lock()

    @property
    def name(self) -> str:
        return self._name

    @property
    def size(self) -> int:
        return self._size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        view = buffer.cast("B")
        if offset + len(view) > self._size:
            raise FormatError(f"{self._name} has {self._size} bytes, too few for {len(view)} at {offset}.")
        while view:
            number, within = divmod(offset, BLOCK_BYTES)
            block = self._block(number)
            count = min(len(view), len(block) - within)
            view[:count] = block[within : within + count]
            view, offset = view[count:], offset + count

    def _block(self, number: int) -> bytes:
        with self._mutex:
            if number in self._blocks:
                self._blocks.move_to_end(number)
                return self._blocks[number]
        block = self._fetch(number * BLOCK_BYTES, min((number + 1) * BLOCK_BYTES, self._size))
        with self._mutex:
            self._blocks[number] = block
            while len(self._blocks) > _HELD_BLOCKS:
                self._blocks.popitem(last=False)
        return block

    def _fetch(self, begin: int, end: int) -> bytes:
        # All three are documented as public; the package only lacks the marks that type checkers look for.
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            hf_raise_for_status,
            http_backoff,
        )

        headers = build_hf_headers() | {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        try:
            response = http_backoff("GET", self._url, headers=headers)
            hf_raise_for_status(response)
        except _network_errors() as error:
            raise InputError(f"{self._name} cannot be read at byte {begin}: {_first_line(error)}.") from error
        data: bytes = response.content
        if response.status_code != 206 or len(data) != end - begin:
            raise InputError(
                f"{self._name}: the server answered a request for bytes {begin} to {end} with status "
                f"{response.status_code} and {len(data)} bytes; it must support range requests."
            )
        return data


class HubFolder:
    """A model repository at one revision."""

    def __init__(self, repository: str, revision: str | None) -> None:
        self.repository = repository
        self._wanted = revision
        self._info = self._fetch_info()

    def _fetch_info(self) -> tuple[str, dict[str, int]]:
        """The commit, and the size of each file."""
        from huggingface_hub import HfApi

        info = HfApi().model_info(self.repository, revision=self._wanted, files_metadata=True)
        if info.sha is None:
            raise InputError(f"{self.label} has no commit.")
        return info.sha, {item.rfilename: item.size or 0 for item in info.siblings or []}

    @property
    def label(self) -> str:
        return self.repository + (f"@{self._wanted}" if self._wanted else "")

    @property
    def provenance(self) -> Mapping[str, str]:
        return {"source": self.repository, "revision": self._info[0]}

    @cached_property
    def _names(self) -> list[str]:
        return sorted(name for name in self._info[1] if not name.split("/")[-1].startswith("."))

    def names(self) -> Sequence[str]:
        return self._names

    def open(self, name: str) -> Source:
        from huggingface_hub import hf_hub_download, hf_hub_url, try_to_load_from_cache

        commit, sizes = self._info
        cached = try_to_load_from_cache(self.repository, name, revision=commit)
        if isinstance(cached, str):
            return FileSource(cached)
        if name.endswith(WEIGHT_SUFFIXES) and not name.endswith((".json", ".bin")):
            url = hf_hub_url(self.repository, name, revision=commit)
            return RangeSource(url, f"{self.label}/{name}", sizes[name])
        return FileSource(hf_hub_download(self.repository, name, revision=commit))


def open_folder(repository: str, revision: str | None) -> HubFolder | LocalFolder:
    """A repository on the configured Hub, or its snapshot in the local cache where the Hub cannot be reached.

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
    failure: Exception
    try:
        if not constants.HF_HUB_OFFLINE:
            return HubFolder(repository, revision)
        failure = OSError("HF_HUB_OFFLINE is set")
    except GatedRepoError as error:
        raise InputError(f"{label} is gated on {constants.ENDPOINT}: ask for access there, then log in.") from error
    except RevisionNotFoundError as error:
        raise InputError(f"{repository} on {constants.ENDPOINT} has no revision {revision!r}.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(
            f"{label} is neither a local path nor a model on {constants.ENDPOINT} that you may read."
        ) from error
    except _network_errors() as error:
        failure = error
    try:
        return _Snapshot(snapshot_download(repository, revision=revision, local_files_only=True), repository)
    except (LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{label} is neither a local path nor in the local cache, and {constants.ENDPOINT} cannot be reached "
            f"({_first_line(failure)})."
        ) from error


class _Snapshot(LocalFolder):
    """A snapshot in the Hub's cache: a local folder that goes by the name of its repository."""

    def __init__(self, path: str, repository: str) -> None:
        super().__init__(path)
        self._repository = repository

    @property
    def provenance(self) -> Mapping[str, str]:
        return {"source": self._repository, "revision": Path(self.path).name}


def _network_errors() -> tuple[type[Exception], ...]:
    """What a failed request raises: the Hub client's own error, and whatever its HTTP library has for errors."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, HfHubHTTPError, *HfHubHTTPError.__bases__)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
