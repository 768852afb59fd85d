"""The hashes of Xet: of chunks, of xorbs and files as trees over them, and of ranges.

All are BLAKE3 with a key, one for each purpose. A hash is written as four little-endian numbers of 64 bits, so that
within each eight bytes the order is turned around.
Source: draft-denis-xet-05; huggingface.co/docs/xet, version 1.1.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Sequence

from blake3 import blake3

_CHUNK_KEY = bytes.fromhex("6697f5775b9550de3135cbaca597181c9de421109beb2b58b4d0b04b93adf229")
_NODE_KEY = bytes.fromhex("017ec5c7a5472996fd946666b48a02e65ddd536f37c76dd2f86352e64a53713f")
_RANGE_KEY = bytes.fromhex("7f1857d6ce56ed66127ff913e7a5c3f3a4cd26d5b5db49e64124987f28fb94c3")
_FILE_KEY = bytes(32)
# A node of the tree has about so many children; it ends after a child whose hash is a multiple.
_BRANCHING = 4
_LEAST, _MOST = 2, 2 * _BRANCHING + 1
_ASKED_FOR = 1024
_TEXT = re.compile(r"[0-9a-f]{64}")

ZERO = bytes(32)


def text(digest: bytes) -> str:
    """A hash of 32 bytes as 64 hex digits."""
    return "{:016x}{:016x}{:016x}{:016x}".format(*struct.unpack("<4Q", digest))


def digest_of(written: str) -> bytes | None:
    """The hash that is written so; None where it is none."""
    if _TEXT.fullmatch(written) is None:
        return None
    return struct.pack("<4Q", *(int(written[begin : begin + 16], 16) for begin in range(0, 64, 16)))


def chunk_hash(data: bytes | memoryview) -> bytes:
    """The hash of a chunk's bytes."""
    return blake3(data, key=_CHUNK_KEY).digest()


def xorb_hash(chunks: Sequence[tuple[bytes, int]]) -> bytes:
    """The root of the tree over chunks, each with its hash and its length; zeros where there are none."""
    nodes = list(chunks)
    if not nodes:
        return ZERO
    while len(nodes) > 1:
        above = []
        begin = 0
        while begin < len(nodes):
            end = _cut(nodes, begin)
            above.append(_join(nodes[begin:end]))
            begin = end
        nodes = above
    return nodes[0][0]


def file_hash(chunks: Sequence[tuple[bytes, int]]) -> bytes:
    """The hash of a file of these chunks; zeros for an empty one."""
    return blake3(xorb_hash(chunks), key=_FILE_KEY).digest() if chunks else ZERO


def range_hash(hashes: Iterable[bytes]) -> bytes:
    """What proves that somebody knows the hashes of the chunks in a range."""
    return blake3(b"".join(hashes), key=_RANGE_KEY).digest()


def is_asked_for(digest: bytes) -> bool:
    """Whether a client asks for a chunk of this hash wherever it comes in a file; for a file's first it always does."""
    return int.from_bytes(digest[24:], "little") % _ASKED_FOR == 0


def _cut(nodes: Sequence[tuple[bytes, int]], begin: int) -> int:
    """Where the node that begins here ends."""
    if len(nodes) - begin <= _LEAST:
        return len(nodes)
    most = min(begin + _MOST, len(nodes))
    for place in range(begin + _LEAST, most):
        if int.from_bytes(nodes[place][0][24:], "little") % _BRANCHING == 0:
            return place + 1
    return most


def _join(nodes: Sequence[tuple[bytes, int]]) -> tuple[bytes, int]:
    lines = "".join(f"{text(digest)} : {size}\n" for digest, size in nodes)
    return blake3(lines.encode(), key=_NODE_KEY).digest(), sum(size for _, size in nodes)
