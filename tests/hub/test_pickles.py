"""Pickles are found by their content, and what they import is told without running them."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import random
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgery.hub.pickles import SAFE, SUSPICIOUS, UNSAFE, is_called_so, judged, look, sniff
from surgery.source import BytesSource

HARM = b"cos\nsystem\n(S'echo harm'\ntR."


def found(data: bytes) -> str | None:
    result = look(BytesSource("file", data))
    return None if result is None else result.level


class Runs:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("echo harm",)


class Plain:
    """Any class of somebody's own."""


def saved(value: object, zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


STATE = OrderedDict(weight=torch.zeros(3, dtype=torch.bfloat16), bias=torch.nn.Parameter(torch.ones(2)))


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saves(zipped: bool) -> None:
    data = saved(STATE, zipped)
    assert found(data) == SAFE
    assert sniff("w.bin", data[:512])
    # The same verdict as torch's own, which refuses what it does not know.
    torch.load(io.BytesIO(data), weights_only=True)
    for value, level in ((Runs(), UNSAFE), (Plain(), SUSPICIOUS)):
        data = saved({"x": value}, zipped)
        assert found(data) == level
        with pytest.raises(pickle.UnpicklingError):
            torch.load(io.BytesIO(data), weights_only=True)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol(protocol: int) -> None:
    data = pickle.dumps(Runs(), protocol)
    result = look(BytesSource("file", data))
    assert result is not None
    assert (result.level, result.imports) == (UNSAFE, ("posix.system",))
    assert result.message == "It is a pickle that imports posix.system."
    assert sniff("x.bin", data[:512])
    if protocol >= 2:  # an old one that calls nothing cannot be told from text, and does no harm
        assert found(pickle.dumps({"a": [1, 2, 3]}, protocol)) == SAFE
        assert found(pickle.dumps(np.arange(3), protocol)) == SAFE
    # Optimised, or cut off, it runs as much.
    assert found(pickletools.optimize(data)) == UNSAFE
    assert found(data[:-1]) == UNSAFE


HIDDEN = {
    "old": HARM,
    "hidden behind what is popped": (
        b"\x80\x04\x8c\x02os\x8c\x06system\x8c\x0bcollections\x8c\x0bOrderedDict00\x93(\x8c\x04harmtR."
    ),
    "hidden in the memo": b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94N0h\x00h\x01\x930N.",
    "behind marks": b"\x80\x02((0cos\nsystem\n(U\x04harmtR.",
    "by an extension": b"\x80\x02\x82\x01)R.",
    "an instance": b"(S'harm'\nios\nsystem\n.",
    "after another": pickle.dumps(1, 2) + b"\x80\x02" + HARM,
    "deep in modules": b"\x80\x04\x8c\x15torch._utils._rebuild\x8c\x06os.sys\x93)R.",
}


@pytest.mark.parametrize("name", HIDDEN)
def test_what_hides(name: str) -> None:
    level = found(HIDDEN[name])
    assert level == (SUSPICIOUS if name == "deep in modules" else UNSAFE)


def archive(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return buffer.getvalue()


def test_archives() -> None:
    assert found(archive({"a.txt": b"text"})) is None
    assert found(archive({"x/data.pkl": pickle.dumps([1], 2), "x/more.PKL": HARM})) == UNSAFE
    bomb = archive({"x/data.pkl": bytes(200 << 20)}, zipfile.ZIP_DEFLATED)
    assert found(bomb) == SUSPICIOUS
    assert found(archive({f"{n}.pkl": b"N." for n in range(300)})) == SUSPICIOUS
    whole = archive({"x/data.pkl": HARM})
    assert found(whole[:-30]) == SUSPICIOUS
    encrypted = bytearray(whole)
    place = whole.rindex(b"PK\x01\x02")
    encrypted[place + 8] |= 1
    assert found(bytes(encrypted)) == SUSPICIOUS


def test_long_ones_end() -> None:
    assert found(b"\x80\x02" + b"N0" * (8 << 20)) == SUSPICIOUS
    assert found(b"\x80\x02N." * 1000) == SAFE


def test_arrays() -> None:
    for array, level in ((np.zeros(3), None), (np.array([Runs()]), SUSPICIOUS)):
        buffer = io.BytesIO()
        np.save(buffer, array)
        assert found(buffer.getvalue()) == level


def test_what_is_no_pickle() -> None:
    rng = random.Random(0)
    for path in sorted(Path(__file__).parents[2].glob("*/*.py"))[:200]:
        assert found(path.read_bytes()) is None
    for data in (b"", b".", b"config\nfoo\nbar", b"# A card\n", b"{}", b"\x80\x02", rng.randbytes(5000)):
        assert found(data) is None
    assert judged("x.bin", None) is None
    named = judged("X.PT", None)
    assert named is not None
    assert (named.level, named.message) == (SUSPICIOUS, "It is called like a pickle, and could not be looked into.")
    assert is_called_so("a/b.ckpt")
    assert not is_called_so("model.bin")
    assert not sniff("model.bin", rng.randbytes(512))


# What comes before the harm, means nothing, and runs.
BEFORE = {
    "a long text": b"X" + struct.pack("<I", 1000) + b"a" * 1000 + b"0",
    "a long line": b"S'" + b"a" * 600 + b"'\n0",
    "many opcodes": b"N0" * 300,
    "a number in hex": b"I0x10\n0",
    "a long number in hex": b"L0x10L\n0",
    "text that is not ASCII": "S'\u00e9'\n0".encode(),
    "a text too long to look through": b"X" + struct.pack("<I", 17 << 20) + b"a" * (17 << 20) + b"0",
    "more opcodes than are looked through": b"N0" * 300_000,
}


@pytest.mark.parametrize("what", BEFORE)
@pytest.mark.parametrize("head", [b"", b"\x80\x02"])
def test_what_comes_first_hides_nothing(what: str, head: bytes) -> None:
    harmless, data = head + BEFORE[what] + b"N.", head + BEFORE[what] + HARM
    assert pickle.loads(harmless, encoding="utf-8") is None
    assert found(data) == (SUSPICIOUS if "look" in what else UNSAFE)


def test_what_only_seems_to_be_long() -> None:
    for data in (b"X" * 100_000, b"X\xff\xff\xff\x7f" + b"a" * 5000, b"S" + b"a" * 5000, b"\x80\x02X" + b"a" * 5000):
        assert found(data) is None


@given(st.binary(max_size=300), st.sampled_from([b"", b"\x80\x02", b"\x80\x04", b"PK\x03\x04", b"\x93NUMPY", b"cos\n"]))
def test_nothing_makes_it_raise(data: bytes, head: bytes) -> None:
    found(head + data)
    sniff("x", head + data)
    whole = archive({"x.pkl": head + data})
    found(whole[: len(whole) // 2] + data + whole[len(whole) // 2 :])


_LEAVES = st.none() | st.integers() | st.text() | st.floats()
_VALUES = st.recursive(_LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


@given(_VALUES, st.integers(2, 5))
def test_plain_values_are_safe(value: object, protocol: int) -> None:
    assert found(pickle.dumps({"value": value}, protocol)) == SAFE
