"""Xorbs and shards, made byte by byte as the format's description has them, and by none of the code under test."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import lz4.frame

from surgery.hub.xet import hashes

NONE, LZ4, GROUPED = 0, 1, 2
TAG = b"HFRepoMetaData\x00" + bytes([85, 105, 103, 69, 106, 123, 129, 87, 131, 165, 189, 217, 92, 205, 209, 74, 169])
BOOKEND = b"\xff" * 32 + bytes(16)


def chunk(data: bytes, scheme: int = NONE, packed: bytes | None = None, size: int | None = None) -> bytes:
    """A chunk with its header; `packed` and `size` to lie with."""
    if packed is None:
        grouped = b"".join(data[place::4] for place in range(4)) if scheme == GROUPED else data
        packed = data if scheme == NONE else lz4.frame.compress(grouped)
    announced = len(data) if size is None else size
    header = bytes([0]) + len(packed).to_bytes(3, "little") + bytes([scheme]) + announced.to_bytes(3, "little")
    return header + packed


def nodes(chunks: Sequence[bytes]) -> list[tuple[bytes, int]]:
    return [(hashes.chunk_hash(data), len(data)) for data in chunks]


def xorb(chunks: Sequence[bytes], scheme: int = NONE) -> tuple[bytes, bytes]:
    """The hash and the bytes of a xorb without a footer."""
    return hashes.xorb_hash(nodes(chunks)), b"".join(chunk(data, scheme) for data in chunks)


@dataclass(frozen=True)
class Described:
    """A file as a shard describes it. Each term is a xorb's hash, its chunks, and which of them."""

    terms: Sequence[tuple[bytes, Sequence[bytes], int, int]]
    sha256: str | None
    digest: bytes | None = None
    proofs: Sequence[bytes] | None = None
    sizes: Sequence[int] | None = None


def shard(files: Sequence[Described]) -> bytes:
    """A shard as clients upload it: without tables and footer."""
    parts = [TAG, struct.pack("<2Q", 2, 0)]
    for file in files:
        chosen = [list(chunks[begin:end]) for _, chunks, begin, end in file.terms]
        digest = file.digest or hashes.file_hash(nodes([data for part in chosen for data in part]))
        flags = (0 if file.proofs == [] else 1 << 31) | (0 if file.sha256 is None else 1 << 30)
        parts.append(digest + struct.pack("<2IQ", flags, len(file.terms), 0))
        for number, ((name, _, begin, end), part) in enumerate(zip(file.terms, chosen, strict=True)):
            size = sum(map(len, part)) if file.sizes is None else file.sizes[number]
            parts.append(name + struct.pack("<4I", 0, size, begin, end))
        proofs = file.proofs
        if proofs is None:
            proofs = [hashes.range_hash(hashes.chunk_hash(data) for data in part) for part in chosen]
        parts += [proof + bytes(16) for proof in proofs]
        if file.sha256 is not None:
            parts.append(swapped(file.sha256) + bytes(16))
    return b"".join([*parts, BOOKEND, BOOKEND])


def swapped(text: str) -> bytes:
    """A hash in hex as Xet stores it: the order turned around within each eight bytes."""
    raw = bytes.fromhex(text)
    return b"".join(raw[begin : begin + 8][::-1] for begin in range(0, 32, 8))
