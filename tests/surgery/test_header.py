"""The safetensors header: written as the reference library writes it, and read as hostile input."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.dtypes import BY_NAME, DTYPES, DType, from_torch
from surgery.errors import FormatError
from surgery.header import MAX_HEADER_BYTES, Header, build_header, layout_key, parse_header, read_header
from surgery.source import FileSource
from tests.tools import entry, raw_file

STORED_BY_TORCH = [dtype for dtype in DTYPES if dtype.torch_name is not None]
# Names that JSON has to escape, or that are more than one byte a letter.
STRANGE_NAMES = ["é", "中文", 'a"b', "a\\b", "a/b", "😀", "", "a.b-c_d", "'", "{}", "__metadata"]


def read(path: Path) -> Header:
    return read_header(FileSource(path))


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def ours(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """The header that we write for these tensors."""
    specs = []
    for name, tensor in tensors.items():
        dtype = from_torch(tensor.dtype)
        assert dtype is not None
        specs.append((name, dtype, tuple(tensor.shape)))
    return build_header(sorted(specs, key=lambda spec: layout_key(spec[0], spec[1])), metadata)[0]


def zeros(dtype: DType, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.zeros(dtype.nbytes(shape), dtype=torch.uint8).view(dtype.to_torch).view(shape)


# Written --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", STORED_BY_TORCH, ids=str)
def test_a_header_has_the_bytes_of_the_reference(dtype: DType, shape: tuple[int, ...]) -> None:
    """One tensor of every dtype and kind of shape, scalars and empty ones among them."""
    tensors = {"a.weight": zeros(dtype, shape)}
    assert safetensors.torch.save(tensors).startswith(ours(tensors))


def test_all_dtypes_lie_in_the_order_of_the_reference() -> None:
    """Names given against the order: what counts is the dtype, then the name."""
    tensors = {f"{name}.{d.name}": zeros(d, (2, 4)) for name in "zmA" for d in reversed(STORED_BY_TORCH)}
    assert safetensors.torch.save(tensors).startswith(ours(tensors))


@pytest.mark.parametrize("name", STRANGE_NAMES)
def test_names_are_spelt_as_the_reference_spells_them(name: str) -> None:
    """Escapes, and everything beyond ASCII as UTF-8."""
    tensors = {name: torch.zeros(3), "other": torch.zeros(2)}
    assert safetensors.torch.save(tensors).startswith(ours(tensors))


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}, {"größe": '\t\x01\x1f\x7f\n"\\/ é'}], ids=str)
def test_metadata_has_the_bytes_of_the_reference(metadata: dict[str, str]) -> None:
    """None, the usual one, and one that needs every kind of escape. (The reference orders several keys at random.)"""
    tensors = {"a": torch.zeros(3)}
    assert safetensors.torch.save(tensors, metadata or None).startswith(ours(tensors, metadata))


def test_several_metadata_keys_are_sorted() -> None:
    """The reference writes them in another order each time; ours are the same bytes whatever the order given."""
    tensors = {"a": torch.zeros(3)}
    one, other = {"b": "1", "a": "2", "c": "3"}, {"c": "3", "a": "2", "b": "1"}
    assert ours(tensors, one) == ours(tensors, other)
    reference = safetensors.torch.save(tensors, one)
    assert json.loads(ours(tensors, one)[8:]) == json.loads(reference[8 : len(ours(tensors, one))])


def test_numpy_files_have_our_header() -> None:
    """The reference's other front end lays out the same way."""
    arrays: dict[str, np.ndarray] = {
        "b": np.zeros((2, 2), np.float32),
        "a": np.zeros(3, np.int16),
        "c": np.zeros((), bool),
    }
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    assert safetensors.numpy.save(arrays).startswith(ours(tensors))


def test_no_tensors_at_all() -> None:
    """An empty file is a header, too."""
    assert ours({}) == safetensors.torch.save({})


def test_a_name_twice_is_a_bug_of_the_caller() -> None:
    with pytest.raises(ValueError, match="'a' twice"):
        build_header([("a", BY_NAME["U8"], (1,)), ("a", BY_NAME["U8"], (1,))])


# Read -----------------------------------------------------------------------------------------------------------------


def test_everything_the_reference_writes_is_read(tmp_path: Path) -> None:
    """Names, dtypes, shapes, metadata and the place of every byte."""
    tensors = {f"t.{d.name}": torch.randint(0, 2, (d.nbytes((3, 8)),), dtype=torch.uint8) for d in STORED_BY_TORCH}
    tensors = {name: t.view(BY_NAME[name[2:]].to_torch).view(3, 8) for name, t in tensors.items()}
    tensors |= {"empty": torch.zeros(4, 0), "scalar": torch.tensor(1.5), "中": torch.ones(1)}
    path = written(tmp_path / "m.safetensors", safetensors.torch.save(tensors, {"a": "b", "ü": "中"}))
    header = read(path)
    content = path.read_bytes()
    assert content.startswith(header.raw)
    assert dict(header.metadata) == {"a": "b", "ü": "中"}
    assert {info.name for info in header.tensors} == tensors.keys()
    for info in header.tensors:
        tensor = tensors[info.name]
        assert (info.dtype.to_torch, info.shape) == (tensor.dtype, tuple(tensor.shape))
        stored = content[header.data_start + info.begin : header.data_start + info.end]
        assert stored == tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def test_four_bit_floats_that_torch_writes_are_read(tmp_path: Path) -> None:
    """Two numbers to a byte: the format counts numbers."""
    packed = torch.zeros(3, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    (info,) = read(written(tmp_path / "m", safetensors.torch.save({"a": packed}))).tensors
    assert (info.dtype.name, info.shape, info.end - info.begin) == ("F4", (3, 8), 12)


def test_entries_come_in_the_order_of_their_data(tmp_path: Path) -> None:
    """Whatever the order in the JSON."""
    header = {"late": entry("U8", [2], 1, 3), "none": entry("F32", [0], 1, 1), "early": entry("U8", [1], 0, 1)}
    names = [info.name for info in read(written(tmp_path / "m", raw_file(header, b"abc"))).tensors]
    assert names == ["early", "none", "late"]


@pytest.mark.parametrize("padding", ["", " ", "\n\t \r"])
def test_any_padding_is_read(tmp_path: Path, padding: str) -> None:
    """Older writers did not align the data; white space around the JSON is no harm."""
    text = padding + json.dumps({"a": entry("U8", [1], 0, 1)}) + padding
    assert read(written(tmp_path / "m", raw_file(text, b"x"))).data_start == 8 + len(text)


specs = st.lists(
    st.tuples(
        st.text(st.characters(exclude_categories=["Cs", "Cc", "Cf", "Co", "Cn", "Zl", "Zp", "Zs"]), max_size=12),
        st.sampled_from(DTYPES),
        st.lists(st.integers(0, 6), max_size=3),
    ),
    max_size=6,
    unique_by=lambda spec: spec[0],
)
texts = st.dictionaries(st.text(max_size=5), st.text(max_size=8), max_size=3)


@given(specs, texts)
def test_what_is_built_is_parsed(described: list[tuple[str, DType, list[int]]], metadata: dict[str, str]) -> None:
    """Round trip: the same entries and metadata, and a data part without a hole."""
    whole = [(name, dtype, tuple(s) if prod(s) * dtype.bits % 8 == 0 else (8, *s)) for name, dtype, s in described]
    raw, placed = build_header(whole, metadata)
    assert len(raw) % 8 == 0
    header = parse_header(raw, sum(dtype.nbytes(shape) for _, dtype, shape in whole), "it")
    assert sorted(header.tensors, key=str) == sorted(placed, key=str)
    assert [(i.name, i.dtype, i.shape) for i in placed] == whole
    assert header.metadata == metadata
    assert header.raw == raw


# Hostile --------------------------------------------------------------------------------------------------------------

GOOD = entry("U8", [2], 0, 2)
# Name: (content of the file, what the sentence must say).
HOSTILE: dict[str, tuple[bytes, list[str]]] = {
    "no bytes": (b"", ["has 0 bytes", "too few for a safetensors file", "fetch it again"]),
    "seven bytes": (b"\2\0\0\0\0\0\0", ["has 7 bytes", "too few"]),
    "header past the end": (
        raw_file({"a": GOOD})[:20],
        ["announces a header of 60 bytes", "only 12 bytes after the length field", "cut short"],
    ),
    "length of all ones": (b"\xff" * 8 + b"{}", [str(2**64 - 1), "only 2 bytes"]),
    "a git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
        ["announces a header of", "is not a safetensors file"],
    ),
    "overlap": (
        raw_file({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, b"x" * 6),
        ["tensor 'b' overlaps the one before it", "begin at 2", "expected 4"],
    ),
    "the same bytes twice": (
        raw_file({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 0, 4)}, b"x" * 4),
        ["tensor 'b' overlaps the one before it", "begin at 0", "expected 4"],
    ),
    "hole": (
        raw_file({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 3, 5)}, b"x" * 5),
        ["tensor 'b' leaves a hole before it", "begin at 3", "expected 2"],
    ),
    "hole at the start": (raw_file({"a": entry("U8", [2], 1, 3)}, b"xxx"), ["'a' leaves a hole", "expected 0"]),
    "too few bytes for the shape": (
        raw_file({"a": entry("F32", [2, 3], 0, 20)}, b"x" * 20),
        ["tensor 'a' has 20 bytes of data", "expected 24 for F32 of shape [2, 3]"],
    ),
    "too many bytes for the shape": (raw_file({"a": entry("U8", [2], 0, 3)}, b"xxx"), ["has 3 bytes", "expected 2"]),
    "end before begin": (raw_file({"a": entry("U8", [2], 2, 0)}, b"xx"), ["has -2 bytes of data, expected 2"]),
    "a name twice": (
        raw_file('{"a":' + json.dumps(GOOD) + ',"a":' + json.dumps(GOOD) + "}", b"xx"),
        ["the header names 'a' twice"],
    ),
    "a field twice": (
        raw_file('{"a":{"dtype":"U8","dtype":"F32","shape":[1],"data_offsets":[0,1]}}', b"x"),
        ["names 'dtype' twice"],
    ),
    "not UTF-8": (raw_file(b'{"\xff":1}'), ["not UTF-8 (byte 2)"]),
    "surrogates in UTF-8": (raw_file(b'{"\xed\xa0\x80":1}'), ["not UTF-8 (byte 2)"]),
    "byte order mark": (raw_file(b"\xef\xbb\xbf{}"), ["not valid JSON"]),
    "nested deeply": (raw_file(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), ["nested too deeply"]),
    "nested deeply, unclosed": (raw_file(b"[" * 100_000), ["nested too deeply"]),
    "an integer of 5000 digits": (
        raw_file('{"a":{"dtype":"U8","shape":[' + "9" * 5000 + '],"data_offsets":[0,2]}}', b"xx"),
        ["not valid JSON"],
    ),
    "an integer beyond 64 bits": (
        raw_file({"a": entry("U8", [2**64], 0, 0)}),
        ["tensor 'a' has the shape [18446744073709551616]", "expected a list of non-negative integers"],
    ),
    "offsets beyond 64 bits": (raw_file({"a": entry("U8", [1], 0, 2**64)}), [f"data_offsets [0, {2**64}]"]),
    "a product beyond 64 bits": (
        raw_file({"a": entry("U8", [2**32, 2**32], 0, 0)}),
        ["tensor 'a' has the impossible shape [4294967296, 4294967296]"],
    ),
    "a product hidden by a zero": (raw_file({"a": entry("U8", [2**62, 2**62, 0], 0, 0)}), ["impossible shape"]),
    "NaN": (raw_file('{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,2]}}', b"xx"), ["NaN is not JSON"]),
    "Infinity": (raw_file('{"a":-Infinity}'), ["-Infinity is not JSON"]),
    "true in a shape": (raw_file({"a": entry("U8", [True, 2], 0, 2)}, b"xx"), ["has the shape [True, 2]"]),
    "a float in a shape": (raw_file({"a": entry("U8", [2.0], 0, 2)}, b"xx"), ["has the shape [2.0]"]),
    "a negative size": (raw_file({"a": entry("U8", [-2, -1], 0, 2)}, b"xx"), ["has the shape [-2, -1]"]),
    "a string for a shape": (raw_file({"a": entry("U8", "22", 0, 2)}, b"xx"), ["has the shape '22'"]),
    "no shape": (raw_file({"a": entry("U8", None, 0, 2)}, b"xx"), ["has the shape None"]),
    "a float offset": (raw_file({"a": entry("U8", [2], 0.0, 2)}, b"xx"), ["the data_offsets [0.0, 2]", "expected two"]),
    "a negative offset": (raw_file({"a": entry("U8", [2], -2, 0)}, b"xx"), ["the data_offsets [-2, 0]"]),
    "three offsets": (
        raw_file({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 1, 2]}}, b"xx"),
        ["the data_offsets [0, 1, 2], expected two non-negative integers"],
    ),
    "unknown dtype": (raw_file({"a": entry("F3", [2], 0, 2)}, b"xx"), ["tensor 'a' has the unknown dtype 'F3'"]),
    "a list for a dtype": (raw_file({"a": entry(["U8"], [2], 0, 2)}, b"xx"), ["the unknown dtype ['U8']"]),
    "bytes left over": (
        raw_file({"a": GOOD}, b"xxx"),
        ["describes 2 bytes of data", "the file holds 3", "bytes that nothing describes"],
    ),
    "bytes without a tensor": (raw_file({}, b"x"), ["describes 0 bytes of data", "the file holds 1"]),
    "data cut short": (raw_file({"a": GOOD}, b"x"), ["describes 2 bytes", "the file holds 1", "fetch it again"]),
    "half a byte": (raw_file({"a": entry("F4", [3], 0, 1)}, b"x"), ["F4 and shape [3] does not fill whole bytes"]),
    "three quarters": (raw_file({"a": entry("F6_E2M3", [2], 0, 1)}, b"x"), ["F6_E2M3", "does not fill whole bytes"]),
    "a missing field": (raw_file({"a": {"dtype": "U8", "shape": [2]}}, b"xx"), ["must have exactly 'dtype', 'shape'"]),
    "one field more": (raw_file({"a": {**GOOD, "x": 1}}, b"xx"), ["must have exactly"]),
    "an entry that is a list": (raw_file({"a": [1]}), ["tensor 'a' must have exactly"]),
    "a list for a header": (raw_file("[]"), ["the header is a JSON list, expected an object"]),
    "a string for a header": (raw_file('"a"'), ["the header is a JSON str"]),
    "no JSON": (raw_file("{'a': 1}"), ["not valid JSON"]),
    "JSON and more": (raw_file("{}{}"), ["not valid JSON", "Extra data"]),
    "an empty header": (raw_file(""), ["not valid JSON"]),
    "zeros for padding": (raw_file(b"{}\0\0"), ["not valid JSON"]),
    "metadata of numbers": (raw_file({"__metadata__": {"a": 1}}), ["'__metadata__' must map strings to strings"]),
    "metadata that is a list": (raw_file({"__metadata__": []}), ["'__metadata__' must map"]),
    "an escape sequence for a name": (
        raw_file({"\x1b[31m": GOOD}, b"xx"),
        [r"tensor '\x1b[31m'", "name with unprintable characters"],
    ),
    "half a surrogate for a name": (raw_file(r'{"\ud800":' + json.dumps(GOOD) + "}", b"xx"), ["unprintable"]),
    "text that turns round": (raw_file({"a\u202eb": GOOD}, b"xx"), ["unprintable"]),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_with_a_sentence(case: str, tmp_path: Path) -> None:
    """The sentence names the file and what is wrong, fits on a screen, and holds nothing that a terminal would obey."""
    content, parts = HOSTILE[case]
    path = written(tmp_path / "bad.safetensors", content)
    with pytest.raises(FormatError) as caught:
        read(path)
    message = caught.value.message
    assert str(path) in message
    assert message.endswith(".")
    assert message.isprintable()
    for part in parts:
        assert part in message
    assert len(message) < len(str(path)) + 300


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (raw_file({"a": entry("X" * 100_000, [2], 0, 2)}, b"xx"), "unknown dtype"),
        (raw_file({"n" * 100_000: entry("U8", [3], 0, 2)}, b"xx"), "expected 3 for U8"),
        (raw_file({"a": entry("U8", [1] * 100_000, 0, 2)}, b"xx"), "expected 1 for U8"),
        (raw_file('{"' + "n" * 100_000 + '":1,"' + "n" * 100_000 + '":1}'), "twice"),
    ],
    ids=["dtype", "name", "shape", "duplicate"],
)  # fmt: skip
def test_a_sentence_stays_short_whatever_the_file_says(content: bytes, what: str, tmp_path: Path) -> None:
    """A header may hold strings of megabytes; the error repeats the start of them."""
    path = written(tmp_path / "bad.safetensors", content)
    with pytest.raises(FormatError) as caught:
        read(path)
    assert what in caught.value.message
    assert len(caught.value.message) < len(str(path)) + 500


def test_a_header_of_100_megabytes_is_refused_unread(tmp_path: Path) -> None:
    """The file is sparse: were its header parsed, the sentence would be about JSON."""
    path = tmp_path / "big.safetensors"
    with open(path, "wb") as file:
        file.write((100_000_000).to_bytes(8, "little"))
        file.truncate(8 + 100_000_000)
    with pytest.raises(FormatError, match="header of 100000000 bytes, more than the 25000000 allowed"):
        read(path)


# Stricter than the reference, on purpose ------------------------------------------------------------------------------

STRICTER = {
    "a name twice": HOSTILE["a name twice"][0],
    "one field more": HOSTILE["one field more"][0],
    "an escape sequence for a name": HOSTILE["an escape sequence for a name"][0],
    "text that turns round": HOSTILE["text that turns round"][0],
    "a header above 25 MB": raw_file(b"{}" + b" " * MAX_HEADER_BYTES),
    "a product hidden by a zero": raw_file({"a": entry("U8", [0, 2**62, 2**62], 0, 0)}),
}


@pytest.mark.parametrize("case", STRICTER)
def test_where_we_are_stricter_than_the_reference(case: str, tmp_path: Path) -> None:
    """The reference reads these files; no known writer makes them."""
    path = written(tmp_path / "odd.safetensors", STRICTER[case])
    with safetensors.safe_open(path, "pt"):
        pass
    with pytest.raises(FormatError):
        read(path)


@pytest.mark.parametrize(
    "content",
    [
        raw_file('{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'),
        raw_file('{"a":{"dtype":"U8","shape":[0],"data_offsets":[-0,0]}}'),
        raw_file(r'{"__metadata__":{"a":"\ud800"}}'),
        raw_file(r'{"__metadata__":{"\udc00":"a"}}'),
    ],
    ids=["minus zero in a shape", "minus zero for an offset", "half a surrogate", "half a surrogate for a key"],
)
def test_what_the_reference_refuses_we_refuse(content: bytes, tmp_path: Path) -> None:
    """JSON that Python reads and the reference does not. (Half a surrogate cannot be written back, either.)"""
    path = written(tmp_path / "odd.safetensors", content)
    with pytest.raises(safetensors.SafetensorError), safetensors.safe_open(path, "pt"):
        pass
    with pytest.raises(FormatError):
        read(path)


# Fuzzed ---------------------------------------------------------------------------------------------------------------


def check(content: bytes, path: Path) -> bool:
    """Either we refuse a file with our own error, or it is in order and the reference reads it, too."""
    path.unlink(missing_ok=True)  # faster than cutting it to nothing, which some file systems sync
    path.write_bytes(content)
    try:
        header = read(path)
    except FormatError:
        return False
    position = 0
    for info in header.tensors:
        assert info.begin == position
        assert info.end - info.begin == info.dtype.nbytes(info.shape)
        position = info.end
    assert header.data_start + position == len(content)
    with safetensors.safe_open(path, "pt") as file:
        assert sorted(file.keys()) == sorted(info.name for info in header.tensors)
    return True


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "f.safetensors"


@given(st.binary(max_size=64), st.integers(0, 80) | st.integers(0, 2**64 - 1))
@settings(max_examples=300)
def test_arbitrary_bytes_never_surprise(scratch: Path, content: bytes, length: int) -> None:
    """Raw bytes, and raw bytes behind a length field."""
    check(content, scratch)
    check(length.to_bytes(8, "little") + content, scratch)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.sampled_from(["U8", "F32", "F4", "é"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "a", "__metadata__"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(json_values, st.binary(max_size=8))
@settings(max_examples=300)
def test_arbitrary_json_never_surprises(scratch: Path, value: object, data: bytes) -> None:
    """JSON of the right words in the wrong places."""
    check(raw_file(value if not isinstance(value, str) else json.dumps(value), data), scratch)


VALID = safetensors.torch.save(
    {"a": torch.arange(5, dtype=torch.uint8), "b.c": torch.zeros(2, 3), "e": torch.zeros(0, 4), "s": torch.tensor(1.0)},
    {"format": "pt"},
)
edits = st.lists(
    st.tuples(
        st.integers(0, len(VALID) + 8),
        st.integers(0, 6),
        st.binary(max_size=3) | st.sampled_from([b"0", b"1", b"-", b",", b'"', b"[", b"]", b"{", b"}", b" ", b"e2"]),
    ),
    min_size=1,
    max_size=4,
)


@given(edits)
@settings(max_examples=600)
def test_damaged_files_never_surprise(scratch: Path, changes: list[tuple[int, int, bytes]]) -> None:
    """A valid file with a few places cut out, replaced or put in; the length field is set right half of the time."""
    content = bytearray(VALID)
    for place, removed, inserted in changes:
        content[place : place + removed] = inserted
    check(bytes(content), scratch)
    length = int.from_bytes(VALID[:8], "little") + len(content) - len(VALID)
    if length >= 0:
        check(length.to_bytes(8, "little") + bytes(content[8:]), scratch)


@given(
    st.permutations(["a", "b", "c", "d"]),
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=4, max_size=4),
)
def test_only_exact_tilings_are_accepted(scratch: Path, names: list[str], spans: list[tuple[int, int]]) -> None:
    """Four tensors anywhere in ten bytes: accepted if and only if each byte belongs to exactly one of them."""
    header = {
        name: entry("U8", [max(end - begin, 0)], begin, end) for name, (begin, end) in zip(names, spans, strict=True)
    }
    owners = [sum(begin <= byte < end for begin, end in spans) for byte in range(9)]
    size = max(end for _, end in spans)
    in_order = all(begin <= end for begin, end in spans)
    # An empty tensor has to lie between two others, not within one.
    empty = all(sum(b < begin < e for b, e in spans) == 0 for begin, end in spans if begin == end)
    exact = in_order and empty and all(count == 1 for count in owners[:size])
    assert check(raw_file(header, b"x" * size), scratch) == exact
