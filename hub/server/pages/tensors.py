"""What is in a safetensors file, from its header alone."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from surgery.errors import FormatError
from surgery.header import Header, TensorInfo, read_header
from surgery.names import layer_of, natural_key
from surgery.source import NotAFile, Source, read_bytes

# Bytes of a header that are parsed for a page: some forty times as much memory. One file of the largest published
# checkpoints stays below 6 MB; most have less than 1.
MAX_HEADER = 4 << 20
PAGE = 500
_MOST_METADATA = 50
_MOST_SIDES = 8
_LONGEST_NAME = 300
_parsing = threading.Lock()


@dataclass(frozen=True)
class Row:
    """A tensor. `layer` is the zero-based number in its name, or None."""

    name: str
    layer: int | None
    shape: str
    dtype: str
    parameters: int
    nbytes: int


@dataclass(frozen=True)
class TensorPage:
    """A page of a file's tensors, in natural order of names.

    Attributes:
        tensors, parameters: of the whole file.
        dtypes: for each dtype its tensors and bytes, the most bytes first.
        metadata: the file's own, at most the first few.
        rows: those of this page.
        begin: which is the first of them, from 0.
    """

    tensors: int
    parameters: int
    header: int
    dtypes: tuple[tuple[str, int, int], ...]
    metadata: tuple[tuple[str, str], ...]
    rows: tuple[Row, ...]
    begin: int

    @property
    def following(self) -> int | None:
        """Where the next page begins."""
        end = self.begin + len(self.rows)
        return end if end < self.tensors else None


class _Named(NotAFile):
    """A source by the name that a stranger may be told."""

    def __init__(self, name: str, source: Source) -> None:
        self._name, self._source = name, source

    @property
    def name(self) -> str:
        return self._name

    @property
    def size(self) -> int:
        return self._source.size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._source.read_into(offset, buffer)


def page(source: Source, name: str, begin: int) -> TensorPage:
    """A page of the tensors of a file. Raises `FormatError` for a header that is not sound, or too long to show."""
    named = _Named(name, source)
    length = int.from_bytes(read_bytes(named, 0, 8), "little") if source.size >= 8 else 0
    if MAX_HEADER < length <= source.size - 8:
        raise FormatError(f"{name} has a header of {length} bytes; those above {MAX_HEADER} are not shown here.")
    with _parsing:
        return _page(read_header(named), begin)


def _page(header: Header, begin: int) -> TensorPage:
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for info in header.tensors:
        counts[info.dtype.name] += 1
        sizes[info.dtype.name] += info.end - info.begin
    ordered = sorted(header.tensors, key=lambda info: natural_key(info.name))
    return TensorPage(
        tensors=len(ordered),
        parameters=sum(_count(info) for info in ordered),
        header=header.data_start,
        dtypes=tuple((dtype, counts[dtype], size) for dtype, size in sizes.most_common()),
        metadata=_metadata(header.metadata),
        rows=tuple(_row(info) for info in ordered[begin : begin + PAGE]),
        begin=begin,
    )


def _count(info: TensorInfo) -> int:
    count = 1
    for side in info.shape:
        count *= side
    return count


def _row(info: TensorInfo) -> Row:
    shape = " × ".join(str(side) for side in info.shape[:_MOST_SIDES]) or "scalar"
    shape += " × …" if len(info.shape) > _MOST_SIDES else ""
    return Row(
        info.name[:_LONGEST_NAME], layer_of(info.name), shape, info.dtype.name, _count(info), info.end - info.begin
    )


def _metadata(found: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple((key[:200], value[:1000]) for key, value in sorted(found.items())[:_MOST_METADATA])
