"""A shard: which files are made of which chunks of which xorbs. Clients send one with every upload.

A header, then entries of 48 bytes: for each file a head, a term for each run of chunks, a hash that proves the sender
knows these chunks, and the file's SHA-256; then for each xorb a head and its chunks. Each list ends with an entry whose
hash is all ones. A shard that is sent out to a client has tables to look things up and a footer besides.
Source: draft-denis-xet-05, section "Shard format"; xet-core 1.5 (August 2026) for tables and footer.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from surgery.errors import FormatError
from surgery.hub.xet.xorbs import MAX_CHUNKS, XorbIndex

_TAG = bytes.fromhex("48465265706f4d6574614461746100556967456a7b815783a5bdd95ccdd14aa9")
_VERSION = 2
_ENTRY = 48
_END = b"\xff" * 32
_WITH_PROOFS, _WITH_SHA256 = 1 << 31, 1 << 30
_FOOTER_VERSION, _FOOTER = 1, 200
# Terms of one file: a terabyte in the smallest chunks that clients cut is less.
MAX_TERMS = 1 << 20
_FOREVER = (1 << 64) - 1


@dataclass(frozen=True)
class Term:
    """Chunks `begin` to `end` of a xorb, the last not included; `size` bytes unpacked."""

    xorb: bytes
    begin: int
    end: int
    size: int


@dataclass(frozen=True)
class ShardFile:
    """A file as a client describes it: nothing of it is proved.

    Attributes:
        digest: Xet's hash of the file.
        terms: its chunks, in order.
        proofs: `hashes.range_hash` for each term; empty where the client sent none.
        sha256: of the file, as Xet writes hashes; None where the client sent none.
    """

    digest: bytes
    terms: tuple[Term, ...]
    proofs: tuple[bytes, ...]
    sha256: bytes | None

    @property
    def size(self) -> int:
        return sum(term.size for term in self.terms)


def read_files(data: bytes) -> list[ShardFile]:
    """The files of a shard. Raises `FormatError` for what is none; nothing is allocated on the sender's word."""
    if len(data) < _ENTRY or data[:32] != _TAG:
        raise FormatError("The shard does not begin as one does.")
    version, _ = struct.unpack_from("<2Q", data, 32)
    if version != _VERSION:
        raise FormatError(f"The shard has version {version}, expected {_VERSION}.")
    reader = _Reader(data, _ENTRY)
    files = []
    while (head := reader.entry())[:32] != _END:
        flags, count = struct.unpack_from("<2I", head, 32)
        files.append(_file(reader, head[:32], flags, count))
    # The xorbs are known from what was uploaded; here they only have to be well-formed.
    while (head := reader.entry())[:32] != _END:
        _, count = struct.unpack_from("<2I", head, 32)
        if count > MAX_CHUNKS:
            raise FormatError(f"The shard has a xorb of {count} chunks, more than {MAX_CHUNKS}.")
        reader.entries(count)
    return files


def _file(reader: _Reader, digest: bytes, flags: int, count: int) -> ShardFile:
    if count > MAX_TERMS:
        raise FormatError(f"The shard has a file of {count} terms, more than {MAX_TERMS}.")
    terms = []
    for entry in reader.entries(count):
        size, begin, end = struct.unpack_from("<3I", entry, 36)
        if not begin < end <= MAX_CHUNKS:
            raise FormatError(f"The shard has a term of the chunks {begin} to {end}, which is no range.")
        terms.append(Term(entry[:32], begin, end, size))
    proofs = tuple(entry[:32] for entry in reader.entries(count)) if flags & _WITH_PROOFS else ()
    sha256 = reader.entry()[:32] if flags & _WITH_SHA256 else None
    return ShardFile(digest, tuple(terms), proofs, sha256)


class _Reader:
    """Entries of 48 bytes, one after the other."""

    def __init__(self, data: bytes, position: int) -> None:
        self._data = data
        self._position = position

    def entry(self) -> bytes:
        return self.entries(1)[0]

    def entries(self, count: int) -> list[bytes]:
        begin, end = self._position, self._position + count * _ENTRY
        if end > len(self._data):
            raise FormatError(f"The shard ends at byte {len(self._data)} with {end - begin} bytes still expected.")
        self._position = end
        return [self._data[place : place + _ENTRY] for place in range(begin, end, _ENTRY)]


def write_xorbs(xorbs: Iterable[XorbIndex], now: int, expiry: int = _FOREVER) -> bytes:
    """A shard that tells a client of xorbs that are stored, for it to send only what they do not have.

    Args:
        xorbs: whose chunks the client may refer to; each once.
        now: seconds since 1970.
        expiry: from when on the client is to forget them.
    """
    ordered = sorted(xorbs, key=lambda xorb: struct.unpack("<4Q", xorb.digest))
    head = _TAG + struct.pack("<2Q", _VERSION, _FOOTER)
    files = _END + bytes(16)
    parts: list[bytes] = []
    places: list[tuple[int, int]] = []  # the beginning of a xorb's hash, and the number of its entry
    chunks: list[tuple[int, int, int]] = []
    number = 0
    packed = unpacked = 0
    for xorb in ordered:
        places.append((_short(xorb.digest), number))
        parts.append(xorb.digest + struct.pack("<4I", 0, len(xorb), xorb.ends[-1], xorb.packed_ends[-1]))
        begin = 0
        for place, end in enumerate(xorb.ends):
            digest = xorb.hash(place)
            parts.append(digest + struct.pack("<4I", begin, end - begin, 0, 0))
            chunks.append((_short(digest), number, place))
            begin = end
        number += 1 + len(xorb)
        packed, unpacked = packed + xorb.packed_ends[-1], unpacked + xorb.ends[-1]
    listed = b"".join(parts) + _END + bytes(16)
    chunks.sort()
    xorb_table = b"".join(struct.pack("<QI", *place) for place in places)
    chunk_table = b"".join(struct.pack("<Q2I", *chunk) for chunk in chunks)
    return head + files + listed + xorb_table + chunk_table + _footer(
        [len(head), len(files), len(listed), len(xorb_table), len(chunk_table)],
        (len(places), len(chunks)), (now, expiry), (packed, unpacked),
    )  # fmt: skip


def _footer(lengths: Sequence[int], counts: tuple[int, int], times: tuple[int, int], sizes: tuple[int, int]) -> bytes:
    head, files, listed, xorb_table, chunk_table = lengths
    tables = head + files + listed
    end = tables + xorb_table + chunk_table
    offsets = (head, head + files, tables, 0, tables, counts[0], tables + xorb_table, counts[1])
    # Key of the chunks' hashes: none. Six numbers are kept free.
    return (
        struct.pack("<9Q", _FOOTER_VERSION, *offsets)
        + bytes(32)
        + struct.pack("<2Q", *times)
        + bytes(48)
        + struct.pack("<4Q", sizes[0], 0, sizes[1], end)
    )


def _short(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "little")
