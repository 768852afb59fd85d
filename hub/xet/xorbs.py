"""A xorb: up to 64 MiB of chunks one after the other, and a footer that says where they are and what they hash to.

What a client sends is taken apart as it comes: each chunk is unpacked and hashed, so that memory stays small and
nothing has to be believed. The footer that is kept is made here from what was found, never the client's.
Source: draft-denis-xet-05, section "Xorb format"; xet-core 1.5 (August 2026) for the footer.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from surgery.errors import FormatError, IntegrityError
from surgery.hub.xet import hashes
from surgery.hub.xet.chunks import HEADER, read_chunk_header, unpack
from surgery.source import Source, read_bytes

MAX_CHUNKS = 8192
MAX_DATA = 64 << 20
# Headers, and what chunks that cannot be packed take more.
MAX_PACKED = MAX_DATA + MAX_CHUNKS * 64
MAX_FOOTER = 512 << 10
_IDENT, _HASHES, _BOUNDS = b"XETBLOB\x01", b"XBLBHSH\x00", b"XBLBBND\x01"
_FIXED = len(_IDENT) + 32 + len(_HASHES) + 4 + len(_BOUNDS) + 4 + 12 + 16
_EACH = 32 + 8


@dataclass(frozen=True)
class XorbIndex:
    """Where the chunks of a xorb are.

    Attributes:
        digest: the xorb's hash, 32 bytes.
        hashes: of the chunks, 32 bytes each, one after the other.
        packed_ends: where each chunk ends in the xorb, headers included.
        ends: where each chunk's data end, counted without headers and packing.
    """

    digest: bytes
    hashes: bytes
    packed_ends: tuple[int, ...]
    ends: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ends)

    def hash(self, number: int) -> bytes:
        return self.hashes[32 * number : 32 * number + 32]

    def size(self, begin: int, end: int) -> int:
        """Bytes of data in chunks `begin` to `end`, the last not included."""
        return self.ends[end - 1] - (self.ends[begin - 1] if begin else 0)

    def packed_range(self, begin: int, end: int) -> tuple[int, int]:
        """Where chunks `begin` to `end` lie in the xorb: the first byte, and the one after the last."""
        return (self.packed_ends[begin - 1] if begin else 0), self.packed_ends[end - 1]

    def chunks(self, begin: int, end: int) -> list[tuple[bytes, int]]:
        """Hash and size of each chunk in a range."""
        return [(self.hash(number), self.size(number, number + 1)) for number in range(begin, end)]

    @cached_property
    def footer(self) -> bytes:
        """The footer, with its length behind it."""
        count = struct.pack("<I", len(self))
        bounds = _BOUNDS + count + struct.pack(f"<{2 * len(self)}I", *self.packed_ends, *self.ends)
        hashed = _HASHES + count + self.hashes
        from_end = len(bounds) + 12 + 16
        tail = count + struct.pack("<2I", len(hashed) + from_end, from_end) + bytes(16)
        footer = _IDENT + self.digest + hashed + bounds + tail
        return footer + struct.pack("<I", len(footer))


def make_index(digests: Sequence[bytes], packed_ends: Sequence[int], ends: Sequence[int]) -> XorbIndex:
    """The index of chunks with these hashes, and with it the xorb's own hash."""
    sizes = [end - begin for begin, end in zip((0, *ends), ends, strict=False)]
    digest = hashes.xorb_hash(list(zip(digests, sizes, strict=True)))
    return XorbIndex(digest, b"".join(digests), tuple(packed_ends), tuple(ends))


def read_index(source: Source) -> XorbIndex:
    """The index of a stored xorb, from its footer. Raises `FormatError` for one that does not hold together."""
    damaged = f"{source.name} is damaged"
    if source.size < 4 + _FIXED:
        raise FormatError(f"{damaged}: it has {source.size} bytes and no footer.")
    (length,) = struct.unpack("<I", read_bytes(source, source.size - 4, 4))
    count, rest = divmod(length - _FIXED, _EACH)
    if rest or not 0 < count <= MAX_CHUNKS or length + 4 > source.size:
        raise FormatError(f"{damaged}: its footer cannot have {length} bytes.")
    index = read_footer(read_bytes(source, source.size - 4 - length, length + 4), source.name)
    if index.packed_ends[-1] != source.size - 4 - length:
        raise FormatError(f"{damaged}: its footer does not hold together.")
    return index


def read_footer(footer: bytes, name: str) -> XorbIndex:
    """The index that a footer was made of. Raises `FormatError` where it does not hold together."""
    damaged = f"{name} is damaged"
    count, rest = divmod(len(footer) - 4 - _FIXED, _EACH)
    if rest or not 0 < count <= MAX_CHUNKS:
        raise FormatError(f"{damaged}: its footer cannot have {len(footer)} bytes.")
    hashed = footer[52 : 52 + 32 * count]
    numbers = struct.unpack_from(f"<{2 * count}I", footer, 52 + 32 * count + 12)
    index = XorbIndex(footer[8:40], hashed, numbers[:count], numbers[count:])
    if index.footer != footer:
        raise FormatError(f"{damaged}: its footer does not hold together.")
    for ends in (index.packed_ends, index.ends):
        if any(end <= begin for begin, end in zip((0, *ends), ends, strict=False)):
            raise FormatError(f"{damaged}: its chunks overlap.")
    return index


class XorbParser:
    """Takes a xorb's bytes as they come, in any pieces. Hands on each chunk; knows the index at the end.

    Args:
        take: called with the hash of a chunk, its bytes as they came with their header, and its length unpacked.
    """

    def __init__(self, take: Callable[[bytes, memoryview, int], object]) -> None:
        self._take = take
        self._rest = b""
        self._footer = 0
        self._hashes: list[bytes] = []
        self._packed_ends: list[int] = []
        self._ends: list[int] = []

    def feed(self, data: bytes) -> None:
        """The next bytes. Raises `FormatError` for what is no xorb, or too large a one."""
        if self._footer:
            self._skip(len(data))
            return
        view = memoryview(self._rest + data if self._rest else data)
        position = 0
        while len(view) - position >= HEADER:
            where = f"Chunk {len(self._ends)} of the xorb"
            head = view[position : position + HEADER]
            if bytes(head[:7]) == _IDENT[:7]:
                self._skip(len(view) - position)
                return
            header = read_chunk_header(head, where)
            end = position + HEADER + header.packed
            if end > len(view):
                break
            chunk = unpack(header, view[position + HEADER : end], where)
            digest = hashes.chunk_hash(chunk)
            self._add(digest, end - position, header.size)
            self._take(digest, view[position:end], header.size)
            position = end
        self._rest = bytes(view[position:])

    def _add(self, digest: bytes, packed: int, size: int) -> None:
        if len(self._ends) == MAX_CHUNKS:
            raise FormatError(f"The xorb has more than {MAX_CHUNKS} chunks.")
        self._hashes.append(digest)
        self._packed_ends.append((self._packed_ends[-1] if self._packed_ends else 0) + packed)
        self._ends.append((self._ends[-1] if self._ends else 0) + size)
        if self._ends[-1] > MAX_DATA or self._packed_ends[-1] > MAX_PACKED:
            raise FormatError(f"The xorb has more than {MAX_DATA} bytes of data.")

    def _skip(self, count: int) -> None:
        self._footer += count
        self._rest = b""
        if self._footer > MAX_FOOTER:
            raise FormatError(f"The xorb has a footer of more than {MAX_FOOTER} bytes.")

    def finish(self, expected: bytes) -> XorbIndex:
        """The index. Raises `FormatError` where a chunk is cut short, `IntegrityError` where the hash is another."""
        if self._rest or not self._ends:
            raise FormatError(f"The xorb ends within chunk {len(self._ends)}; send it again.")
        index = make_index(self._hashes, self._packed_ends, self._ends)
        if (found := index.digest) != expected:
            raise IntegrityError(
                f"The xorb hashes to {hashes.text(found)}, expected {hashes.text(expected)}; send it again."
            )
        return index
