"""One file of a Hub at one commit, read by range requests: redirects, signed addresses, retries, errors.

Client, tokens and headers are huggingface_hub's. As there, a token goes to the Hub's own hosts only: where an answer
leads to another host, the address itself carries the right to read, for a while.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from surgery.errors import InputError, IntegrityError, first_line
from surgery.hub.endpoint import HUGGING_FACE
from surgery.hub.network import BUSY, FIRST_PAUSE, LONGEST_PAUSE, line_errors, network_errors, retry_after

if TYPE_CHECKING:
    from surgery.hub.traffic import Traffic

# Tries of one range: what a try brought is kept, and the next one asks for the rest.
TRIES = 5
# Seconds without a byte after which a connection counts as broken.
TIMEOUT = 30.0
# A server that knows no ranges may send a file of this size whole, each time a part of it is wanted.
SMALL = 4 << 20
_REDIRECTS = 5
_REDIRECTED = (301, 302, 303, 307, 308)
_NO_ACCESS = (401, 403)
# What a signed address answers once it has expired: S3 and CloudFront 403, others 401, 404 or 410.
_EXPIRED = (400, 401, 403, 404, 410)


class _Later(Exception):  # noqa: N818 - a signal, not an error
    """The server asks to be tried again, after `pause` seconds if it says when."""

    def __init__(self, said: str, pause: float | None) -> None:
        super().__init__(said)
        self.pause = pause


class RangeReader:
    """A file behind an address, at a commit.

    Attributes:
        name: what errors call it.
        size: its length in bytes.
    """

    def __init__(self, url: str, name: str, size: int, traffic: Traffic, commit: str = "", sha256: str = "") -> None:
        self.name, self.size = name, size
        self._url, self._commit, self._sha256 = url, commit, sha256
        self._traffic = traffic
        # Where the Hub sent us, with the right to read in the address; one request less for each range.
        self._elsewhere: str | None = None

    def read(self, begin: int, view: memoryview, tries: int = TRIES) -> None:
        """Fill `view` with the bytes at `begin`.

        Raises:
            InputError: the server cannot be reached, or does not let these bytes be read.
            IntegrityError: it has another file there.
        """
        filled, pause = 0, FIRST_PAUSE
        for left in reversed(range(tries)):
            asked: float | None = None
            said = "the answer broke off"
            try:
                for piece in self._pieces(begin + filled, len(view) - filled):
                    view[filled : filled + len(piece)] = piece
                    filled += len(piece)
                    self._traffic.count(len(piece))
                if filled == len(view):
                    return
            except _Later as request:
                said, asked = str(request), request.pause
                if asked is not None and asked > LONGEST_PAUSE:
                    raise InputError(
                        f"{self.name} cannot be read at byte {begin + filled} of {self.size}: {said}, and asks for a "
                        f"pause of {asked:.0f} seconds; try again later."
                    ) from request
            except line_errors() as error:
                said = first_line(error)
            except network_errors() as error:
                raise InputError(
                    f"{self.name} cannot be read at byte {begin + filled}: {first_line(error)}."
                ) from error
            if not left:
                times = "one try" if tries == 1 else f"{tries} tries"
                raise InputError(
                    f"{self.name} cannot be read at byte {begin + filled} of {self.size}: {said}, after {times}; run "
                    "the command again when the network is better."
                )
            time.sleep(asked if asked is not None else pause)
            pause *= 2

    def _pieces(self, begin: int, count: int) -> Iterator[memoryview | bytes]:
        """The bytes of a range, as they come; fewer where the answer ends early."""
        with self._answer(begin, count) as response:
            skipped, expected = self._check(response, begin, count)
            for chunk in response.iter_raw():
                piece = memoryview(chunk)[min(skipped, len(chunk)) :]
                skipped -= len(chunk) - len(piece)
                if len(piece) > expected:
                    if response.status_code != 200:
                        raise InputError(
                            f"{self.name}: the server sends more than the {count} bytes that were asked for at "
                            f"{begin}; a proxy or the server is at fault."
                        )
                    piece = piece[:expected]
                expected -= len(piece)
                yield piece
                if not expected and response.status_code == 200:
                    return

    @contextmanager
    def _answer(self, begin: int, count: int) -> Iterator[Any]:
        """The response to a range request, wherever the address leads."""
        from huggingface_hub import get_session
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, not exported

        wanted = {"Range": f"bytes={begin}-{begin + count - 1}", "Accept-Encoding": "identity"}
        url, refreshed = self._elsewhere or self._url, False
        for _ in range(_REDIRECTS):
            ours = _is_ours(self._url, url)
            headers = (build_hf_headers() if ours else {}) | wanted
            with get_session().stream("GET", url, headers=headers, follow_redirects=False, timeout=TIMEOUT) as response:
                self._traffic.request()
                status = response.status_code
                if status in _REDIRECTED and "location" in response.headers:
                    self._check_origin(response.headers)
                    url = self._elsewhere = urljoin(url, response.headers["location"])
                    continue
                if url != self._url and status in _EXPIRED and not refreshed:
                    # The right to read has run out: ask the Hub once for a new address.
                    self._elsewhere, url, refreshed = None, self._url, True
                    continue
                self._raise_for(response, ours)
                if ours:
                    self._check_origin(response.headers)
                yield response
                return
        raise InputError(f"{self.name}: {urlsplit(self._url).netloc} leads from one address to the next without end.")

    def _raise_for(self, response: Any, ours: bool) -> None:
        """Raise what an answer without content means."""
        from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]  # documented, not exported

        status = response.status_code
        if status in (200, 206):
            return
        host = urlsplit(str(response.request.url)).netloc
        if status in BUSY:
            raise _Later(f"{host} answers with status {status}", retry_after(response.headers))
        if status == 416:
            raise IntegrityError(f"{self.name} is shorter at {host} than the {self.size} bytes it is described with.")
        if status in _NO_ACCESS:
            remedy = "log in with `hf auth login`, or set HF_TOKEN" if ours else "its address may have expired"
            raise InputError(f"{self.name} may not be read: {host} answers with status {status}; {remedy}.")
        response.read()
        hf_raise_for_status(response)
        raise InputError(f"{self.name} cannot be read: {host} answers with status {status}.")

    def _check_origin(self, headers: Mapping[str, str]) -> None:
        """Raise unless the Hub speaks of the commit and the content that were found at the start."""
        commit = headers.get("x-repo-commit", "")
        if self._commit and commit and commit != self._commit:
            raise IntegrityError(f"{self.name}: the server answers with commit {commit}, expected {self._commit}.")
        etag = headers.get("x-linked-etag", "").removeprefix("W/").strip('"')
        if self._sha256 and len(etag) == 64 and etag != self._sha256:
            raise IntegrityError(
                f"{self.name}: the server has content with the SHA-256 {etag} there, expected {self._sha256}."
            )

    def _check(self, response: Any, begin: int, count: int) -> tuple[int, int]:
        """How many bytes of the body come before those wanted, and how many are to follow."""
        encoding = response.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise InputError(f"{self.name}: the server compresses ({encoding}) what was asked for as it is.")
        if response.status_code == 206:
            said = response.headers.get("content-range", "")
            expected = f"bytes {begin}-{begin + count - 1}/"
            if said not in (f"{expected}{self.size}", f"{expected}*"):
                raise InputError(
                    f"{self.name}: the server answered a request for bytes {begin} to {begin + count} with "
                    f"{said[:80]!r}, expected {expected}{self.size}."
                )
            return 0, count
        length = response.headers.get("content-length", "")
        whole = begin == 0 and count == self.size
        if not whole and self.size > SMALL:
            raise InputError(
                f"{self.name}: the server answered a request for bytes {begin} to {begin + count} with all "
                f"{length or 'of the file'} bytes; it must support range requests. `surgery pull` fetches it whole."
            )
        if length and length != str(self.size):
            raise IntegrityError(f"{self.name} has {length} bytes at the server, expected {self.size}.")
        return begin, count


def _is_ours(url: str, other: str) -> bool:
    """Whether an address is on the Hub that `url` is on, which may see the token, or on huggingface.co itself."""
    return _origin(other) in (_origin(url), _origin(HUGGING_FACE), ("https", "hf.co", 443))


def _origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or {"https": 443, "http": 80}.get(parts.scheme, 0)
