"""Looking at a file's data in passing: every number that is none is found, in whatever pieces the bytes come."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from surgery.header import read_header
from surgery.hub.scanning import TensorScan, has_nonfinite
from surgery.hub.transfer import CHUNK, git_blob, lfs_pointer_oid, pump
from surgery.source import BytesSource
from tests.tools import entry, raw_file


def scanned(data: bytes, cuts: list[int]) -> TensorScan:
    """A scan that was given the bytes in pieces, cut at these places."""
    scan = TensorScan(read_header(BytesSource("file", data)))
    ends = sorted({*(cut % (len(data) + 1) for cut in cuts), len(data)})
    begin = 0
    for end in ends:
        scan.update(memoryview(data)[begin:end])
        begin = end
    return scan


FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_pattern_of_small_floats_is_judged_as_torch_does(dtype: torch.dtype) -> None:
    """All of 8 and 16 bits; of wider ones the edges."""
    width = torch.tensor([], dtype=dtype).element_size()
    if width <= 2:
        raw = torch.arange(256**width, dtype=torch.int32).to({1: torch.uint8, 2: torch.uint16}[width])
    else:
        edges = torch.tensor(
            [0.0, -0.0, torch.finfo(dtype).max, torch.finfo(dtype).tiny, torch.inf, -torch.inf, torch.nan]
        )
        raw = edges.to(dtype).view({4: torch.int32, 8: torch.int64}[width])
    name = {8: "F64", 4: "F32", 2: "BF16" if dtype is torch.bfloat16 else "F16"}.get(width)
    name = name or {torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fn: "F8_E4M3"}[dtype]
    finite = torch.isfinite(raw.view(dtype).float() if width < 8 else raw.view(dtype))
    assert not has_nonfinite(name, memoryview(raw[finite].numpy().tobytes()))
    for pattern in raw[~finite]:
        assert has_nonfinite(name, memoryview(pattern.reshape(1).numpy().tobytes()))


def test_integers_have_no_nan() -> None:
    assert not has_nonfinite("I64", memoryview(b"\xff" * 64))
    assert has_nonfinite("F8_E4M3FNUZ", memoryview(b"\x00\x80"))
    assert not has_nonfinite("F8_E4M3FNUZ", memoryview(b"\x7f\xff"))


@given(
    st.lists(st.integers(0, 4000), max_size=6), st.integers(0, 39), st.sampled_from([torch.nan, torch.inf, -torch.inf])
)
def test_it_does_not_matter_how_the_bytes_are_cut(cuts: list[int], place: int, bad: float) -> None:
    """One bad number among four tensors is found in its tensor; hashes are those of each tensor alone."""
    from blake3 import blake3

    tensors = {
        "a": torch.arange(10, dtype=torch.float64),
        "b": torch.arange(10, dtype=torch.bfloat16),
        "c": torch.zeros(0),
        "d": torch.arange(10, dtype=torch.float32),
        "e": torch.arange(10, dtype=torch.float16),
    }
    names = ["a", "b", "d", "e"]
    tensors[names[place // 10]][place % 10] = bad
    scan = scanned(save(tensors), cuts)
    assert scan.nonfinite == [names[place // 10]]
    expected = {
        name: blake3(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, t in tensors.items()
    }
    assert scan.hashes == expected


def test_numbers_that_lie_at_odd_places_are_seen() -> None:
    """A hostile file need not align them."""
    nan = b"\x00\x00\xc0\x7f"
    data = raw_file({"a": entry("U8", [3], 0, 3), "b": entry("F32", [2], 3, 11)}, b"\xff" * 3 + b"\0" * 4 + nan)
    for cut in range(len(data)):
        assert scanned(data, [cut]).nonfinite == ["b"]


@given(st.integers(0, 3 * CHUNK + 5), st.integers(0, 3 * CHUNK + 5))
def test_every_byte_reaches_every_sink_in_order(size: int, begin: int) -> None:
    data = bytes(range(251)) * (size // 251 + 1)
    data = data[:size]
    begin = min(begin, size)
    found = [bytearray(), bytearray()]
    passed: list[int] = []
    sinks = [lambda view, out=out: out.extend(view) for out in found]
    pump(BytesSource("x", data), sinks, passed.append, begin)
    assert bytes(found[0]) == bytes(found[1]) == data[begin:]
    assert sum(passed) == size - begin


def test_a_sink_that_fails_ends_the_transfer() -> None:
    def fail(view: memoryview) -> None:
        raise OSError(28, "No space left on device")

    for size in (10, 4 * CHUNK):
        with pytest.raises(OSError, match="No space"):
            pump(BytesSource("x", bytes(size)), [fail, lambda view: None], lambda count: None)


def test_git_calls_a_blob_and_a_pointer_so(tmp_path: Path) -> None:
    """Compared with git itself."""
    import hashlib
    import subprocess

    data = b"hello\n"
    hasher = git_blob(len(data))
    hasher.update(memoryview(data))
    sha256 = hashlib.sha256(data).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n".encode()
    for content, found in ((data, hasher.hexdigest()), (pointer, lfs_pointer_oid(sha256, len(data)))):
        (tmp_path / "f").write_bytes(content)
        done = subprocess.run(["git", "hash-object", tmp_path / "f"], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == found
