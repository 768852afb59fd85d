"""A repository on a Hub, seen as a folder. Weights are read by range requests; small files through the Hub's own cache.

What the cache already holds is read from there, and offline only that. Everything about the protocol is left to
huggingface_hub: endpoint, tokens, redirects, retries.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

from surgery.errors import FormatError, InputError
from surgery.folder import WEIGHT_SUFFIXES, LocalFolder
from surgery.hub.naming import check_paths
from surgery.source import FileSource, NotAFile, Source

Answer = TypeVar("Answer")

# One request moves this much: small enough to hold several at once, large enough to hide the latency of a request.
BLOCK_BYTES = 8 << 20
# Of all files together: what reading ahead may take of memory does not grow with the number of shards.
HELD_BLOCKS = 16
# A header is fetched on its own, in one request where it is no longer than this.
HEAD_BYTES = 64 << 10
# What the client's own calls for a repository's description do not do: try again.
_TRIES = 4
_FIRST_PAUSE = 0.5  # seconds; doubles


class BlockCache:
    """The latest blocks of several files. A block that two threads want is fetched once."""

    def __init__(self, limit: int = HELD_BLOCKS) -> None:
        self._limit = limit
        self._held: OrderedDict[tuple[str, int], Future[bytes]] = OrderedDict()
        self._mutex = threading.Lock()

    def get(self, key: tuple[str, int], fetch: Callable[[], bytes]) -> bytes:
        """The block, from memory or by `fetch`."""
        with self._mutex:
            if (found := self._held.get(key)) is not None:
                self._held.move_to_end(key)
            else:
                mine: Future[bytes] = Future()
                self._held[key] = mine
                while len(self._held) > self._limit:
                    self._held.popitem(last=False)
        if found is not None:
            return found.result()
        try:
            mine.set_result(fetch())
        except BaseException as error:
            with self._mutex:
                self._held.pop(key, None)
            mine.set_exception(error)
        return mine.result()


class RangeSource(NotAFile):
    """A file behind a URL, read in blocks by range requests."""

    def __init__(self, url: str, name: str, size: int, cache: BlockCache | None = None) -> None:
        self._url, self._name, self._size = url, name, size
        self._cache = cache or BlockCache()
        self._head = b""

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
        if offset == 0:
            # Nothing but a header lies at the very start: fetch that, and not the weights behind it.
            view[:] = self._start(len(view))
            return
        while view:
            number, within = divmod(offset, BLOCK_BYTES)
            begin, end = number * BLOCK_BYTES, min((number + 1) * BLOCK_BYTES, self._size)
            block = self._cache.get((self._url, number), partial(self._fetch, begin, end))
            count = min(len(view), len(block) - within)
            view[:count] = block[within : within + count]
            view, offset = view[count:], offset + count

    def _start(self, count: int) -> bytes:
        if count > len(self._head):
            known = self._head
            end = min(max(count, HEAD_BYTES), self._size)
            self._head = known + self._fetch(len(known), end)
        return self._head[:count]

    def _fetch(self, begin: int, end: int) -> bytes:
        # All three are documented as public.
        from huggingface_hub.utils import (  # type: ignore[attr-defined]  # not marked as exported for type checkers
            build_hf_headers,
            hf_raise_for_status,
            http_backoff,
        )

        headers = build_hf_headers() | {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        try:
            response = http_backoff("GET", self._url, headers=headers)
            hf_raise_for_status(response)
        except network_errors() as error:
            raise InputError(f"{self._name} cannot be read at byte {begin}: {first_line(error)}.") from error
        data: bytes = response.content
        if response.status_code != 206 or len(data) != end - begin:
            raise InputError(
                f"{self._name}: the server answered a request for bytes {begin} to {end} with status "
                f"{response.status_code} and {len(data)} bytes; it must support range requests."
            )
        return data


class HubFolder:
    """A model repository at one revision, on the Hub at `endpoint` (the configured one by default)."""

    def __init__(self, repository: str, revision: str | None, endpoint: str | None = None) -> None:
        self.repository = repository
        self._wanted = revision
        self._endpoint = endpoint
        self._cache = BlockCache()
        self._info = patiently(self._fetch_info)
        check_paths(list(self._info[1]), self.label)

    def _fetch_info(self) -> tuple[str, dict[str, int | None]]:
        """The commit, and the size of each file."""
        from huggingface_hub import HfApi

        info = HfApi(endpoint=self._endpoint).model_info(self.repository, revision=self._wanted, files_metadata=True)
        if info.sha is None:
            raise InputError(f"{self.label} has no commit.")
        return info.sha, {item.rfilename: item.size for item in info.siblings or []}

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
        from huggingface_hub import hf_hub_url, try_to_load_from_cache

        commit, sizes = self._info
        if name not in sizes:
            raise InputError(f"{self.label} has no file {name}.")
        cached = try_to_load_from_cache(self.repository, name, revision=commit)
        if isinstance(cached, str):
            return FileSource(cached)
        if name.endswith(WEIGHT_SUFFIXES) and not name.endswith((".json", ".bin")):
            url = hf_hub_url(self.repository, name, revision=commit, endpoint=self._endpoint)
            size = sizes[name]
            return RangeSource(url, f"{self.label}/{name}", self._size(url) if size is None else size, self._cache)
        return FileSource(self._download(name))

    def _download(self, name: str) -> str:
        """A small file, into the Hub's cache."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        def fetch() -> str:
            return hf_hub_download(self.repository, name, revision=self._info[0], endpoint=self._endpoint)

        try:
            return patiently(fetch, LocalEntryNotFoundError)
        except network_errors() as error:
            cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
            raise InputError(f"{self.label}/{name} cannot be fetched: {first_line(cause)}.") from error

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
        raise InputError(f"{label} is neither a local path nor a model on {place} that you may read.") from error
    except network_errors() as error:
        failure = error
    try:
        return _Snapshot(snapshot_download(repository, revision=revision, local_files_only=True), repository)
    except (LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise InputError(
            f"{label} is neither a local path nor in the local cache, and {place} cannot be reached "
            f"({first_line(failure)})."
        ) from error


class _Snapshot(LocalFolder):
    """A snapshot in the Hub's cache: a local folder that goes by the name of its repository."""

    def __init__(self, path: str, repository: str) -> None:
        super().__init__(path)
        self._repository = repository

    @property
    def provenance(self) -> Mapping[str, str]:
        return {"source": self._repository, "revision": Path(self.path).name}


def patiently(call: Callable[[], Answer], *also: type[Exception]) -> Answer:
    """Call the Hub, again where it was busy or the line broke; `also` are other errors worth another try."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    pause = _FIRST_PAUSE
    for _ in range(_TRIES - 1):
        try:
            return call()
        except OfflineModeIsEnabled:
            raise
        except (*network_errors(), *also) as error:
            response = getattr(error, "response", None) if isinstance(error, HfHubHTTPError) else None
            if response is not None and response.status_code not in (408, 429, 500, 502, 503, 504):
                raise
            if response is None and not isinstance(error, (*also, *_line_errors())):
                raise
        time.sleep(pause)
        pause *= 2
    return call()


def _line_errors() -> tuple[type[Exception], ...]:
    """What a connection that breaks or is refused raises, by the HTTP library that the Hub's client uses."""
    from huggingface_hub.errors import HfHubHTTPError

    library = sys.modules[HfHubHTTPError.__bases__[0].__module__.partition(".")[0]]
    return (library.TransportError,)


def network_errors() -> tuple[type[Exception], ...]:
    """What a failed request raises: the Hub client's own error, and whatever its HTTP library has for errors."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, HfHubHTTPError, *HfHubHTTPError.__bases__)


def first_line(error: Exception) -> str:
    """The first line of what an error says, without its full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
