"""A file that is kept as chunks: which ones it is made of, and how it is read.

A recipe is to a file in xorbs what a blob is to a file of its own. It is written only after the file was put together
once and had the SHA-256 by which it is kept; every chunk is proved again whenever it is read.
"""

from __future__ import annotations

import bisect
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate

from surgery.errors import FormatError, IntegrityError
from surgery.hub.xet import hashes
from surgery.hub.xet.chunks import HEADER, read_chunk_header, unpack
from surgery.hub.xet.placement import decode_terms, encode_terms
from surgery.hub.xet.shards import Term
from surgery.hub.xet.xorbs import XorbIndex
from surgery.source import NotAFile, Source

FORMAT = 1
# Chunks are fetched in runs of about so many packed bytes.
_RUN = 2 << 20


@dataclass(frozen=True)
class Recipe:
    """What a file is made of.

    Attributes:
        sha256: of the file, in hex.
        digest: Xet's hash of the file, 32 bytes.
        terms: its chunks in order.
    """

    sha256: str
    digest: bytes
    terms: tuple[Term, ...]

    @property
    def size(self) -> int:
        return sum(term.size for term in self.terms)


def encode(recipe: Recipe) -> bytes:
    """A recipe as JSON."""
    terms = encode_terms(recipe.terms)
    value = {"format": FORMAT, "sha256": recipe.sha256, "xet": hashes.text(recipe.digest), "terms": terms}
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def decode(data: bytes, where: str) -> Recipe:
    """The recipe that `encode` wrote. Raises `FormatError` for anything else."""
    try:
        value = json.loads(data)
        if value["format"] != FORMAT:
            raise FormatError(f"{where} has format {value['format']!r}, expected {FORMAT}.")
        digest = hashes.digest_of(value["xet"])
        if digest is None:
            raise ValueError("a hash is none")
        return Recipe(value["sha256"], digest, decode_terms(value["terms"]))
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{where} is damaged ({error}); restore it from a backup.") from error


@dataclass(frozen=True)
class StoredXorb:
    """A xorb that can be read."""

    index: XorbIndex
    source: Source


class AssembledSource(NotAFile):
    """A file read from its xorbs. The chunk that was read last is kept, since reads in order share it."""

    def __init__(self, name: str, recipe: Recipe, xorb: Callable[[bytes], StoredXorb]) -> None:
        self._name = name
        self._terms = recipe.terms
        self._begins = [0, *accumulate(term.size for term in recipe.terms)]
        self._xorb = xorb
        self._last: tuple[int, bytes | memoryview] = (-1, b"")
        self._mutex = threading.Lock()

    @property
    def name(self) -> str:
        return self._name

    @property
    def size(self) -> int:
        return self._begins[-1]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        view = buffer.cast("B")
        if offset < 0 or offset + len(view) > self.size:
            raise FormatError(f"{self._name} has {self.size} bytes, fewer than the {offset + len(view)} asked for.")
        with self._mutex:
            begin, chunk = self._last
        if begin >= 0 and begin <= offset < begin + len(chunk):
            taken = chunk[offset - begin : offset - begin + len(view)]
            view[: len(taken)] = taken
            view, offset = view[len(taken) :], offset + len(taken)
        if not view:
            return
        for begin, chunk in self._chunks(offset, offset + len(view)):
            skipped = max(offset - begin, 0)
            taken = chunk[skipped : skipped + len(view)]
            view[: len(taken)] = taken
            view, offset = view[len(taken) :], offset + len(taken)
        with self._mutex:
            self._last = (begin, chunk)

    def blocks(self) -> Iterator[bytes | memoryview]:
        """All chunks in order."""
        for _, chunk in self._chunks(0, self.size):
            yield chunk

    def _chunks(self, begin: int, end: int) -> Iterator[tuple[int, bytes | memoryview]]:
        """The chunks with bytes `begin` to `end` of the file, each with where it begins."""
        number = bisect.bisect_right(self._begins, begin) - 1
        while begin < end:
            term, place = self._terms[number], self._begins[number]
            stored = self._xorb(term.xorb)
            index = stored.index
            base = (index.ends[term.begin - 1] if term.begin else 0) - place  # within the xorb, of the file's beginning
            first = bisect.bisect_right(index.ends, begin + base, term.begin, term.end)
            last = bisect.bisect_left(index.ends, min(end, place + term.size) + base, first, term.end - 1)
            for chunk_number, chunk in read_chunks(stored, first, last + 1):
                yield index.ends[chunk_number] - len(chunk) - base, chunk
            begin = place + term.size
            number += 1


def read_chunks(stored: StoredXorb, begin: int, end: int) -> Iterator[tuple[int, bytes | memoryview]]:
    """Number and data of each chunk in a range, proved. Raises `IntegrityError` for one that is not what it was."""
    index, source = stored.index, stored.source
    while begin < end:
        at, _ = index.packed_range(begin, begin + 1)
        stop = max(bisect.bisect_right(index.packed_ends, at + _RUN, begin, end), begin + 1)
        buffer = memoryview(bytearray(index.packed_ends[stop - 1] - at))
        source.read_into(at, buffer)
        for number in range(begin, stop):
            where = f"Chunk {number} of {source.name}"
            low, high = (place - at for place in index.packed_range(number, number + 1))
            packed = buffer[low:high]
            header = read_chunk_header(packed[:HEADER], where)
            if HEADER + header.packed != len(packed):
                raise IntegrityError(f"{where} has another length than its xorb's footer says; restore the xorb.")
            chunk = unpack(header, packed[HEADER:], where)
            if hashes.chunk_hash(chunk) != index.hash(number):
                raise IntegrityError(f"{where} has another hash than its xorb's footer says; restore the xorb.")
            yield number, chunk
        begin = stop
