"""The hash of each tensor of a file whose bytes pass by in order, if it turns out to be a safetensors file."""

from __future__ import annotations

from collections.abc import Mapping

from surgery.errors import FormatError
from surgery.header import parse_header
from surgery.hub.scanning import TensorScan

# A longer header is passed over: taking JSON apart needs some forty times its size.
MOST_HEADER = 8_000_000
_LENGTH = 8


class PassingTensors:
    """Takes a file's bytes in order; afterwards `hashes` has the BLAKE3-256 of every tensor, or is None.

    Whatever it is, nothing is raised: a file that is none of these has no such hashes.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._beginning = bytearray()
        self._wanted: int | None = _LENGTH  # bytes of the beginning still to come in; None when all is decided
        self._scan: TensorScan | None = None
        self._seen = 0

    def update(self, data: bytes | memoryview) -> None:
        """The next bytes."""
        self._seen += len(data)
        if self._scan is not None:
            self._scan.update(memoryview(data))
        elif self._wanted is not None:
            self._beginning += data
            while self._wanted is not None and len(self._beginning) >= self._wanted:
                self._decide()

    def _decide(self) -> None:
        if self._wanted == _LENGTH:
            length = int.from_bytes(self._beginning[:_LENGTH], "little")
            # JSON of a header begins with a brace and has at least two.
            self._wanted = _LENGTH + length if 2 <= length <= min(MOST_HEADER, self._size - _LENGTH) else None
        else:
            raw = bytes(self._beginning[: self._wanted])
            try:
                self._scan = TensorScan(parse_header(raw, self._size - len(raw), "the file"), finite=False)
            except FormatError:
                pass
            else:
                self._scan.update(memoryview(bytes(self._beginning)))
            self._wanted = None
        if self._wanted is None:
            self._beginning.clear()

    @property
    def hashes(self) -> Mapping[str, str] | None:
        """By name of tensor; None for another file, and for one that was cut short."""
        whole = self._scan is not None and self._seen == self._size
        return dict(self._scan.hashes) if self._scan is not None and whole else None
