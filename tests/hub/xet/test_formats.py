"""Hashes, chunks, xorbs and shards: against hf-xet where it says them, against bytes made by hand, and on any bytes."""

from __future__ import annotations

import hashlib
import random
import struct
from pathlib import Path
from typing import Any

import hf_xet
import lz4.frame
import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.errors import FormatError, IntegrityError, SurgeryError
from surgery.hub.xet import hashes
from surgery.hub.xet.chunks import MAX_CHUNK
from surgery.hub.xet.recipes import AssembledSource, Recipe, StoredXorb, decode, encode
from surgery.hub.xet.shards import Term, read_files, write_xorbs
from surgery.hub.xet.xorbs import MAX_CHUNKS, XorbIndex, XorbParser, read_index
from surgery.source import BytesSource, read_bytes
from tests.hub.xet_tools import GROUPED, LZ4, NONE, Described, chunk, nodes, shard, swapped, xorb


def pieces(count: int, seed: int = 0, most: int = 300) -> list[bytes]:
    """Chunks of different lengths, some of them easy to pack."""
    rng = random.Random(seed)
    made = []
    for number in range(count):
        data = rng.randbytes(rng.randint(1, most))
        made.append(data if number % 2 else bytes(len(data)))
    return made


def parse(data: bytes, expected: bytes, step: int = 1 << 20) -> tuple[XorbIndex, bytes]:
    kept = bytearray()
    parser = XorbParser(lambda digest, packed, size: kept.extend(packed))
    for begin in range(0, len(data), step):
        parser.feed(data[begin : begin + step])
    return parser.finish(expected), bytes(kept)


# Hashes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 7, 1000, 8000])
def test_hash_of_a_small_file_is_that_of_the_client(tmp_path: Path, size: int) -> None:
    data = random.Random(size).randbytes(size)
    (tmp_path / "file").write_bytes(data)
    (found,) = hf_xet.hash_files([str(tmp_path / "file")])
    assert found.hash == hashes.text(hashes.file_hash(nodes([data])))


@given(st.binary(min_size=32, max_size=32))
def test_a_hash_is_read_as_it_is_written(digest: bytes) -> None:
    assert hashes.digest_of(hashes.text(digest)) == digest
    assert bytes.fromhex(hashes.text(digest)) == swapped(digest.hex())


@pytest.mark.parametrize("text", ["", "0" * 63, "0" * 65, "A" * 64, "g" * 64, "../" + "0" * 61])
def test_what_is_no_hash(text: str) -> None:
    assert hashes.digest_of(text) is None


# Xorbs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [NONE, LZ4, GROUPED])
@pytest.mark.parametrize("step", [1, 7, 1 << 20])
def test_a_xorb_in_any_pieces(scheme: int, step: int) -> None:
    chunks = pieces(23)
    digest, data = xorb(chunks, scheme)
    index, kept = parse(data, digest, step)
    assert kept == data
    assert index.chunks(0, 23) == nodes(chunks)
    # What is stored is read again, with the footer's own fields where its description has them.
    stored = BytesSource("xorb", kept + index.footer)
    assert read_index(stored) == index
    ident, ends = stored.content[len(kept) : len(kept) + 8], struct.unpack("<3I", index.footer[-32:-20])
    assert ident == b"XETBLOB\x01"
    assert ends[0] == 23
    assert index.footer[-4 - ends[1] :][:8] == b"XBLBHSH\x00"
    assert index.footer[-4 - ends[2] :][:8] == b"XBLBBND\x01"


def test_the_footer_of_a_client_is_passed_over() -> None:
    digest, data = xorb(pieces(3))
    index, _ = parse(data, digest)
    again, kept = parse(data + index.footer, digest, 11)
    assert (again, kept) == (index, data)
    with pytest.raises(FormatError, match="footer of more than"):
        parse(data + index.footer + bytes(1 << 20), digest)


def test_a_xorb_with_another_hash() -> None:
    digest, data = xorb(pieces(3))
    with pytest.raises(IntegrityError, match=f"hashes to {hashes.text(digest)}, expected 0000"):
        parse(data, bytes(32))
    flipped = bytearray(data)
    flipped[-1] ^= 1
    with pytest.raises(IntegrityError, match="send it again"):
        parse(bytes(flipped), digest)


HOSTILE = {
    "version": (b"\x01" + chunk(b"x")[1:], "has version 1, expected 0"),
    "scheme": (chunk(b"xxxx", 3, b"x"), r"packed in a way \(3\)"),
    "empty": (chunk(b""), "has 0 bytes"),
    "too large": (chunk(bytes(MAX_CHUNK + 1)), f"has {MAX_CHUNK + 1} bytes"),
    "bomb": (chunk(b"", LZ4, lz4.frame.compress(bytes(100 << 20))[: 2 * MAX_CHUNK], size=100), "does not unpack"),
    "longer": (chunk(b"", LZ4, lz4.frame.compress(bytes(101)), size=100), "does not unpack to the 100"),
    "shorter": (chunk(b"", LZ4, lz4.frame.compress(bytes(99)), size=100), "does not unpack to the 100"),
    "two frames": (chunk(b"", LZ4, lz4.frame.compress(b"ab") * 2, size=4), "does not unpack to the 4"),
    "no frame": (chunk(b"", LZ4, b"abcdefgh", size=4), "no LZ4 frame"),
    "other length": (chunk(b"abc", NONE, b"abcd"), "does not go with 3 bytes"),
    "cut short": (chunk(b"abc")[:-1], "ends within chunk 0"),
    "nothing": (b"", "ends within chunk 0"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_xorb(name: str) -> None:
    data, sentence = HOSTILE[name]
    with pytest.raises(FormatError, match=sentence):
        parse(data, bytes(32))


def test_a_xorb_of_too_many_chunks() -> None:
    with pytest.raises(FormatError, match=f"more than {MAX_CHUNKS} chunks"):
        parse(chunk(b"x") * (MAX_CHUNKS + 1), bytes(32))
    with pytest.raises(FormatError, match="more than 67108864 bytes"):
        parse(chunk(bytes(MAX_CHUNK), LZ4) * 513, bytes(32))


@given(st.data())
def test_any_bytes_are_a_xorb_or_a_known_error(data: st.DataObject) -> None:
    digest, made = xorb(pieces(5, data.draw(st.integers(0, 9)), 40), data.draw(st.sampled_from([NONE, LZ4, GROUPED])))
    index, _ = parse(made, digest)
    mutated = bytearray(made + index.footer)
    for _ in range(data.draw(st.integers(0, 3))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(mutated[: data.draw(st.integers(0, len(mutated)))])
    try:
        found, kept = parse(cut, digest)
    except SurgeryError:
        found = None
    if found is not None:
        assert found.hashes == index.hashes
        assert kept == cut[: len(kept)]
    try:
        again = read_index(BytesSource("xorb", cut))
    except SurgeryError:
        return
    assert again.packed_ends[-1] + len(again.footer) == len(cut)


@given(st.binary(max_size=400))
def test_random_bytes_are_no_xorb(data: bytes) -> None:
    with pytest.raises(SurgeryError):
        parse(data, bytes(32), 13)
    with pytest.raises(SurgeryError):
        read_index(BytesSource("xorb", data))


# Shards ---------------------------------------------------------------------------------------------------------------


def test_a_shard_is_read() -> None:
    chunks = pieces(9)
    name, _ = xorb(chunks)
    sha256 = hashlib.sha256(b"".join(chunks[2:5] + chunks[0:1])).hexdigest()
    data = shard([Described([(name, chunks, 2, 5), (name, chunks, 0, 1)], sha256), Described([], None, bytes(32), [])])
    first, second = read_files(data)
    assert first.digest == hashes.file_hash(nodes(chunks[2:5] + chunks[0:1]))
    assert [(term.begin, term.end) for term in first.terms] == [(2, 5), (0, 1)]
    assert first.size == sum(map(len, chunks[2:5] + chunks[0:1]))
    assert first.proofs[1] == hashes.range_hash([hashes.chunk_hash(chunks[0])])
    assert first.sha256 is not None
    assert hashes.text(first.sha256) == sha256
    assert (second.terms, second.proofs, second.sha256, second.size) == ((), (), None, 0)


def test_hostile_shards() -> None:
    name, _ = xorb([b"x"])
    good = shard([Described([(name, [b"x"], 0, 1)], "0" * 64)])
    with pytest.raises(FormatError, match="does not begin as one does"):
        read_files(b"x" + good[1:])
    with pytest.raises(FormatError, match="version 3, expected 2"):
        read_files(good[:32] + b"\x03" + good[33:])
    with pytest.raises(FormatError, match="bytes still expected"):
        read_files(good[:-1])
    head = 48 + 36  # the number of terms
    with pytest.raises(FormatError, match="4294967295 terms"):
        read_files(good[:head] + b"\xff" * 4 + good[head + 4 :])
    with pytest.raises(FormatError, match="still expected"):
        read_files(good[:head] + (1 << 20).to_bytes(4, "little") + good[head + 4 :])
    with pytest.raises(FormatError, match="chunks 5 to 5, which is no range"):
        read_files(shard([Described([(name, [b"x"], 5, 5)], None, bytes(32))]))


@given(st.data())
def test_any_bytes_are_a_shard_or_a_known_error(data: st.DataObject) -> None:
    name, _ = xorb([b"x", b"y"])
    made = bytearray(shard([Described([(name, [b"x", b"y"], 0, 2)] * 2, "0" * 64)] * 2))
    for _ in range(data.draw(st.integers(0, 4))):
        made[data.draw(st.integers(0, len(made) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(made[: data.draw(st.integers(0, len(made)))])
    try:
        files = read_files(cut)
    except FormatError:
        return
    assert 96 * len(files) <= len(cut)


def test_a_shard_for_clients_has_its_tables_where_the_footer_says() -> None:
    xorbs = []
    for seed in range(3):
        digest, data = xorb(pieces(4, seed))
        xorbs.append(parse(data, digest)[0])
    data = write_xorbs(xorbs, 1000, 2000)
    footer = struct.unpack("<9Q32s2Q48s4Q", data[-200:])
    version, files, listed, _, no_files, table, count, chunk_table, chunk_count = footer[:9]
    assert (version, no_files, count, chunk_count) == (1, 0, 3, 12)
    assert footer[9:12] == (bytes(32), 1000, 2000)
    assert footer[-1] == len(data) - 200
    assert footer[-2] == sum(xorb.ends[-1] for xorb in xorbs)
    assert data[files : files + 32] == b"\xff" * 32
    by_short = {int.from_bytes(xorb.digest[:8], "little"): xorb for xorb in xorbs}
    places = [struct.unpack_from("<QI", data, table + 12 * number) for number in range(3)]
    assert [short for short, _ in places] == sorted(by_short)
    for short, place in places:
        assert data[listed + 48 * place : listed + 48 * place + 32] == by_short[short].digest
    chunks = [struct.unpack_from("<Q2I", data, chunk_table + 16 * number) for number in range(12)]
    assert chunks == sorted(chunks)
    for short, place, number in chunks:
        entry = listed + 48 * (place + 1 + number)
        assert int.from_bytes(data[entry : entry + 8], "little") == short


# Recipes --------------------------------------------------------------------------------------------------------------


def stored(chunks: list[bytes], scheme: int = NONE) -> tuple[bytes, StoredXorb]:
    digest, data = xorb(chunks, scheme)
    index, kept = parse(data, digest)
    return digest, StoredXorb(index, BytesSource("xorb", kept + index.footer))


@given(st.data())
def test_any_range_of_a_file_in_xorbs(data: st.DataObject) -> None:
    sets = [pieces(6, seed, 50) for seed in range(3)]
    xorbs = dict(stored(chunks, scheme) for chunks, scheme in zip(sets, (NONE, LZ4, GROUPED), strict=True))
    terms, whole = [], b""
    for _ in range(data.draw(st.integers(0, 5))):
        number, begin = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 5))
        part = sets[number][begin : data.draw(st.integers(begin + 1, 6))]
        terms.append(Term(xorb(sets[number])[0], begin, begin + len(part), len(b"".join(part))))
        whole += b"".join(part)
    recipe = Recipe("0" * 64, bytes(32), tuple(terms))
    assert decode(encode(recipe), "recipe") == recipe
    source = AssembledSource("file", recipe, lambda digest: xorbs[digest])
    assert b"".join(source.blocks()) == whole
    for _ in range(4):
        begin = data.draw(st.integers(0, len(whole)))
        end = data.draw(st.integers(begin, len(whole)))
        assert read_bytes(source, begin, end - begin) == whole[begin:end]
    with pytest.raises(FormatError, match="fewer than"):
        read_bytes(source, len(whole), 1)


def test_a_flipped_bit_in_a_xorb_is_found() -> None:
    digest, made = stored([b"a" * 100, b"b" * 100])
    recipe = Recipe("0" * 64, bytes(32), (Term(digest, 0, 2, 200),))
    assert isinstance(made.source, BytesSource)
    damaged = bytearray(made.source.content)
    damaged[150] ^= 1
    broken = StoredXorb(made.index, BytesSource("xorb", bytes(damaged)))
    source = AssembledSource("file", recipe, lambda _: broken)
    assert read_bytes(source, 0, 50) == b"a" * 50
    with pytest.raises(IntegrityError, match="Chunk 1 of xorb has another hash"):
        read_bytes(source, 100, 10)


DAMAGED: dict[str, Any] = {
    "no JSON": b"{",
    "no object": b"[]",
    "format": b'{"format": 2}',
    "hash": b'{"format": 1, "xet": "00", "sha256": "", "terms": []}',
    "range": b'{"format": 1, "xet": "%s", "sha256": "", "terms": [["%s", 1, 1, 5]]}' % (b"0" * 64, b"0" * 64),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_recipe(name: str) -> None:
    with pytest.raises(FormatError, match=r"recipe (is damaged|has format 2)"):
        decode(DAMAGED[name], "recipe")
