"""One chunk as it lies in a xorb: eight bytes of header, and the data, which may be packed.

    version       1 byte, 0
    packed size   3 bytes
    scheme        1 byte: 0 as it is, 1 an LZ4 frame, 2 an LZ4 frame of every fourth byte, then every fourth from the
                  second on, and so on
    size          3 bytes

Source: draft-denis-xet-05, section "Xorb format".
"""

from __future__ import annotations

from dataclasses import dataclass

from surgery.errors import FormatError, MissingExtraError

HEADER = 8
MAX_CHUNK = 128 << 10
# LZ4 makes data that it cannot pack a little longer; clients then store them as they are. Anything beyond is an attack.
MAX_PACKED = 2 * MAX_CHUNK
_NONE, _LZ4, _GROUPED = 0, 1, 2


@dataclass(frozen=True)
class ChunkHeader:
    """Sizes in bytes; `packed` is without the header."""

    scheme: int
    packed: int
    size: int


def read_chunk_header(data: bytes | memoryview, where: str) -> ChunkHeader:
    """The header in the first eight bytes. Raises `FormatError` for what no client writes."""
    header = ChunkHeader(data[4], int.from_bytes(data[1:4], "little"), int.from_bytes(data[5:8], "little"))
    if data[0] != 0:
        raise FormatError(f"{where} has version {data[0]}, expected 0.")
    if header.scheme not in (_NONE, _LZ4, _GROUPED):
        raise FormatError(f"{where} is packed in a way ({header.scheme}) that is not known; expected 0, 1 or 2.")
    if not 0 < header.size <= MAX_CHUNK:
        raise FormatError(f"{where} has {header.size} bytes, expected 1 to {MAX_CHUNK}.")
    if not 0 < header.packed <= MAX_PACKED or (header.scheme == _NONE and header.packed != header.size):
        raise FormatError(f"{where} has {header.packed} packed bytes, which does not go with {header.size} bytes.")
    return header


def unpack(header: ChunkHeader, packed: memoryview, where: str) -> bytes | memoryview:
    """The data of a chunk. Raises `FormatError` unless they unpack to exactly the size in the header."""
    if header.scheme == _NONE:
        return packed
    try:
        from lz4.frame import LZ4FrameDecompressor
    except ImportError as error:
        raise MissingExtraError("lz4", "hub") from error
    unpacker = LZ4FrameDecompressor()
    try:
        # One byte more than announced: what unpacks to more is found, and no more memory than that is used.
        data = unpacker.decompress(packed, max_length=header.size + 1)
    except RuntimeError as error:
        raise FormatError(f"{where} is no LZ4 frame ({error}).") from error
    if len(data) != header.size or not unpacker.eof or unpacker.unused_data:
        raise FormatError(f"{where} does not unpack to the {header.size} bytes that its header announces.")
    return _ungroup(data) if header.scheme == _GROUPED else data


def _ungroup(data: bytes) -> bytes:
    import numpy as np

    grouped = np.frombuffer(data, np.uint8)
    found = np.empty_like(grouped)
    begin = 0
    for place in range(4):
        count = (len(data) - place + 3) // 4
        found[place::4] = grouped[begin : begin + count]
        begin += count
    return found.tobytes()
