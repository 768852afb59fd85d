"""Zstandard for short runs of bytes: from the standard library where it has it (3.14), else from its backport.

The streams coded here are differences from a prediction: there is nothing to find twice in them, only symbols of
unequal frequency. So the search for repetitions is made as good as idle, which leaves Huffman codes: smaller than level
3 and three times as fast. Where nearly all symbols are equal, runs are worth searching for too.
"""

from __future__ import annotations

import sys

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

__all__ = ["compress", "decompress", "zstd"]

_WINDOW_LOG = 20
# Bytes that Huffman codes make this much smaller hold runs of equal ones.
_SPARSE = 0.2
_Parameter = zstd.CompressionParameter
_LITERALS: dict[int, int] = {
    _Parameter.compression_level: 1,
    _Parameter.strategy: zstd.Strategy.fast,
    _Parameter.min_match: 7,
    _Parameter.hash_log: 6,
    _Parameter.window_log: _WINDOW_LOG,
}
_MATCHES: dict[int, int] = {_Parameter.compression_level: 9, _Parameter.window_log: _WINDOW_LOG}
_LIMITS: dict[int, int] = {zstd.DecompressionParameter.window_log_max: _WINDOW_LOG}


def compress(*pieces: bytes) -> bytes:
    """One frame of several pieces, each with Huffman codes of its own.

    Where these nearly reach their limit of a bit a byte, repetitions are coded too.
    """
    found = _frame(pieces, _LITERALS)
    if len(found) < sum(map(len, pieces)) * _SPARSE:
        found = min(found, _frame(pieces, _MATCHES), key=len)
    return found


def _frame(pieces: tuple[bytes, ...], options: dict[int, int]) -> bytes:
    stream = zstd.ZstdCompressor(options=options)
    stream.set_pledged_input_size(sum(map(len, pieces)))
    # A block ends where a piece does: each block has a table of its own.
    parts = [stream.compress(piece, mode=stream.FLUSH_BLOCK) for piece in pieces]
    return b"".join([*parts, stream.flush(stream.FLUSH_FRAME)])


def decompress(data: bytes | memoryview, size: int) -> bytes:
    """A frame that holds exactly `size` bytes; ValueError for anything else, before memory is taken for it."""
    try:
        announced = zstd.get_frame_info(data).decompressed_size
        if announced != size:
            raise ValueError(f"a frame of {announced} bytes, expected {size}")
        stream = zstd.ZstdDecompressor(options=_LIMITS)
        found = stream.decompress(data, max_length=size)
    except zstd.ZstdError as error:
        raise ValueError(str(error)) from error
    if len(found) != size or stream.unused_data or not stream.eof:
        raise ValueError("a frame that does not end where it should")
    return found
