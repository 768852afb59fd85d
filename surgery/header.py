"""The safetensors header: parsed as hostile input, and written byte for byte as the reference library writes it.

A file is 8 bytes little-endian N, N bytes of JSON, then the data. The JSON maps a tensor's name to its `dtype`, `shape`
and `data_offsets` (begin and end within the data); `__metadata__` maps strings to strings. The data must be covered
exactly: no overlap, no hole, nothing left over.
Source: the safetensors format description (README of the reference implementation, 0.8).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from surgery.dtypes import BY_NAME, DType
from surgery.errors import FormatError
from surgery.source import Source, read_bytes

# The Hub's client refuses longer headers too (huggingface_hub.constants.SAFETENSORS_MAX_HEADER_LENGTH): parsing one
# takes some forty times its size in memory. The largest published checkpoints stay below 6 MB a file.
MAX_HEADER_BYTES = 25_000_000

# Sizes beyond this are nonsense and would only slow the arithmetic of the checks: 2**63 - 1 bytes is the file limit.
_MAX_ELEMENTS = 2**63 - 1


@dataclass(frozen=True)
class TensorInfo:
    """One entry of a header. `begin` and `end` are byte offsets within the data part of the file."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A parsed header: entries in the order of their data, and `raw`, the file's first `data_start` bytes."""

    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]
    raw: bytes = field(repr=False)

    @property
    def data_start(self) -> int:
        return len(self.raw)

    @property
    def data_size(self) -> int:
        return self.tensors[-1].end if self.tensors else 0


def read_header(source: Source) -> Header:
    """Read and check the header of a safetensors file. Raises `FormatError` with a sentence naming the file."""
    if source.size < 8:
        raise FormatError(
            f"{source.name} has {source.size} bytes, too few for a safetensors file; it was cut short, fetch it again."
        )
    length = int.from_bytes(read_bytes(source, 0, 8), "little")
    if length > source.size - 8:
        raise FormatError(
            f"{source.name} announces a header of {length} bytes but has only {source.size - 8} bytes after the "
            "length field; it was cut short or is not a safetensors file."
        )
    if length > MAX_HEADER_BYTES:
        raise FormatError(
            f"{source.name} announces a header of {length} bytes, more than the {MAX_HEADER_BYTES} allowed; "
            "such a file is hostile or damaged."
        )
    raw = read_bytes(source, 0, 8 + length)
    return parse_header(raw, source.size - len(raw), source.name)


def parse_header(raw: bytes, data_size: int, where: str) -> Header:
    """Check `raw` (length field and JSON) against the `data_size` bytes that follow it; `where` names the file."""
    entries = _load_json(raw[8:], where)
    metadata = _check_metadata(entries.pop("__metadata__", {}), where)
    tensors = sorted((_check_entry(name, entry, where) for name, entry in entries.items()), key=_data_key)
    position = 0
    for info in tensors:
        if info.begin != position:
            kind = "overlaps the one before it" if info.begin < position else "leaves a hole before it"
            raise FormatError(
                f"{where}: tensor {_short(info.name)} {kind}: its data begin at {info.begin}, expected {position}."
            )
        position = info.end
    if position != data_size:
        raise FormatError(
            f"{where}: the header describes {position} bytes of data but the file holds {data_size}; "
            + ("it was cut short, fetch it again." if position > data_size else "it has bytes that nothing describes.")
        )
    return Header(tuple(tensors), metadata, raw)


def _data_key(info: TensorInfo) -> tuple[int, int, str]:
    return info.begin, info.end, info.name


def _load_json(text: bytes, where: str) -> dict[str, object]:
    def no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found: dict[str, object] = {}
        for name, value in pairs:
            if name in found:
                raise FormatError(f"{where}: the header names {_short(name)} twice.")
            found[name] = value
        return found

    def no_constant(text: str) -> object:
        raise ValueError(f"{text} is not JSON")

    def integer(text: str) -> int:
        if text == "-0":  # no number to the reference, which reads sizes as unsigned
            raise ValueError("-0 is no size")
        return int(text)

    hooks: dict[str, Any] = {"parse_constant": no_constant, "parse_int": integer}
    try:
        # Strict UTF-8, then JSON that refuses NaN; RecursionError and int()'s digit limit are attacks on the parser.
        value = json.loads(text.decode("utf-8"), object_pairs_hook=no_duplicates, **hooks)
    except UnicodeDecodeError as error:
        raise FormatError(f"{where}: the header is not UTF-8 (byte {error.start}).") from error
    except RecursionError as error:
        raise FormatError(f"{where}: the header is nested too deeply.") from error
    except ValueError as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{where}: the header is not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise FormatError(f"{where}: the header is a JSON {type(value).__name__}, expected an object.")
    return value


def _check_metadata(value: object, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise FormatError(f"{where}: '__metadata__' must map strings to strings.")
    try:
        "".join((*value, *value.values())).encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, which UTF-8 cannot hold
        raise FormatError(f"{where}: '__metadata__' holds a string that is not Unicode.") from error
    return value


def _check_entry(name: str, entry: object, where: str) -> TensorInfo:
    def wrong(what: str) -> FormatError:
        return FormatError(f"{where}: tensor {_short(name)} {what}.")

    # Unpaired surrogates cannot be written back; control characters would reach a terminal. No real name has either.
    if not name.isprintable():
        raise wrong("has a name with unprintable characters")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise wrong("must have exactly 'dtype', 'shape' and 'data_offsets'")
    dtype = BY_NAME.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise wrong(f"has the unknown dtype {_short(entry['dtype'])}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _sizes(shape):
        raise wrong(f"has the shape {_short(shape)}, expected a list of non-negative integers")
    if not _sizes(offsets) or len(offsets) != 2:
        raise wrong(f"has the data_offsets {_short(offsets)}, expected two non-negative integers")
    # Zero dimensions make the product small again, so bound every partial product.
    if prod(max(size, 1) for size in shape) > _MAX_ELEMENTS:
        raise wrong(f"has the impossible shape {_short(shape)}")
    if prod(shape) * dtype.bits % 8:
        raise wrong(f"of dtype {dtype} and shape {_short(shape)} does not fill whole bytes")
    begin, end = offsets
    expected = dtype.nbytes(tuple(shape))
    if end - begin != expected:
        raise wrong(f"has {end - begin} bytes of data, expected {expected} for {dtype} of shape {_short(shape)}")
    return TensorInfo(name, dtype, tuple(shape), begin, end)


def _sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _MAX_ELEMENTS for item in value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def layout_key(name: str, dtype: DType) -> tuple[int, str]:
    """The reference writer's order of tensors in a file: by descending dtype, then by name."""
    return -dtype.order, name


def build_header(
    tensors: Iterable[tuple[str, DType, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, tuple[TensorInfo, ...]]:
    """Lay out tensors in the order given and write the header: length field, JSON, spaces up to a multiple of 8.

    Returns the bytes that open the file and the placed entries. With tensors sorted by `layout_key` the bytes equal
    those of `safetensors.serialize_file`.
    """
    document: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    placed: list[TensorInfo] = []
    position = 0
    for name, dtype, shape in tensors:
        if name in document:
            raise ValueError(f"tensor {name!r} twice in one file")
        info = TensorInfo(name, dtype, shape, position, position + dtype.nbytes(shape))
        document[name] = {"dtype": dtype.name, "shape": list(shape), "data_offsets": [info.begin, info.end]}
        placed.append(info)
        position = info.end
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, tuple(placed)
