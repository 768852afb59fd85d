"""Hashes of tensors: BLAKE3 of the raw bytes, read once and remembered as long as the file stays the same."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from peft import LoraConfig
from safetensors.torch import save_file

import surgery
from surgery.checkpoint import open_checkpoint
from surgery.errors import InputError
from surgery.hashing import HashBook, cache_folder, hash_tensor
from surgery.source import FileSource, read_bytes
from tests.models import invent, make, save
from tests.peft_tools import write_adapter
from tests.tools import Tripwire, read_json, unequal


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "checkpoint-surgery"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(make("llama"), tmp_path / "base", torch.bfloat16)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(make("llama"), LoraConfig(r=2, target_modules=["q_proj"]), tmp_path / "adapter")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes each call read from a file; the kernel's own copies do not count."""
    counts: list[int] = []
    real = FileSource.read_into

    def counting(self: FileSource, offset: int, buffer: memoryview) -> None:
        counts.append(buffer.nbytes)
        real(self, offset, buffer)

    monkeypatch.setattr(FileSource, "read_into", counting)
    return counts


# The hash -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 1023, 4 << 20, (4 << 20) + 1, 9_000_001])
def test_it_is_blake3_of_the_raw_bytes(tmp_path: Path, count: int) -> None:
    """Whatever the size, as one call of the reference implementation gives it."""
    data = os.urandom(count)
    tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8) if count else torch.zeros(0, dtype=torch.uint8)
    save_file({"first": torch.zeros(3), "a": tensor}, tmp_path / "model.safetensors")
    stored = open_checkpoint(tmp_path).tensors["a"]
    told: list[int] = []
    assert hash_tensor(stored, told.append) == blake3(data).hexdigest()
    assert sum(told) == count


def test_it_does_not_know_dtype_shape_or_file(tmp_path: Path) -> None:
    """Equal bytes have equal hashes: in another shard, under another name, in a .bin file."""
    values = torch.arange(12, dtype=torch.float32)
    tensors = {"a": values, "b": values.view(3, 4).clone(), "c": values.view(torch.int32).clone()}
    save_file(tensors, tmp_path / "model.safetensors")
    torch.save({"a": values.view(3, 4).t().contiguous().t()}, tmp_path / "legacy.bin")
    stored = [*open_checkpoint(tmp_path).tensors.values(), open_checkpoint(tmp_path / "legacy.bin").tensors["a"]]
    assert {hash_tensor(tensor) for tensor in stored} == {blake3(values.numpy().tobytes()).hexdigest()}


def test_every_hash_in_surgery_json_is_that_of_the_bytes_on_disk(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Of inputs and outputs, of tensors and files, copied, computed or carried along."""
    out = tmp_path / "out"
    surgery.merge(base, adapter, output=out, reversible=True)
    content = read_json(out / "surgery.json")
    found = {"base": base, "adapter": adapter / "adapter_model.safetensors"}
    for item in content["inputs"]:
        assert_hashes(item["tensors"], found[item["role"]])
    assert_hashes(content["outputs"], out)
    files = [path for path in out.rglob("*") if path.is_file()]
    others = {path.relative_to(out).as_posix(): path for path in files}
    del others["surgery.json"], others["model.safetensors"]
    assert content["files"] == {name: blake3(path.read_bytes()).hexdigest() for name, path in others.items()}


def assert_hashes(described: dict[str, dict[str, object]], place: Path) -> None:
    tensors = open_checkpoint(place).tensors
    assert described.keys() == tensors.keys()
    for name, tensor in tensors.items():
        digest = blake3(read_bytes(tensor.source, tensor.offset, tensor.nbytes)).hexdigest()
        assert described[name] == {"dtype": tensor.dtype.name, "shape": list(tensor.shape), "blake3": digest}


# The cache ------------------------------------------------------------------------------------------------------------


def test_a_second_run_reads_less(base: Path, adapter: Path, tmp_path: Path, reads: list[int]) -> None:
    """The base is hashed once: what a second merge copies, the kernel moves without our reading it."""
    surgery.merge(base, adapter, output=tmp_path / "one")
    first = sum(reads)
    reads.clear()
    report = surgery.merge(base, adapter, output=tmp_path / "two")
    second = sum(reads)
    assert first - second >= report.plan.copied_bytes > 0
    assert unequal(tmp_path / "one", tmp_path / "two") == []


def test_every_byte_is_read_at_most_once_and_hashed_on_the_way(
    base: Path, adapter: Path, tmp_path: Path, reads: list[int]
) -> None:
    """What is computed with is not read again for its hash; headers and small files aside."""
    surgery.merge(base, adapter, output=tmp_path / "out")
    size = open_checkpoint(base).nbytes + open_checkpoint(adapter / "adapter_model.safetensors").nbytes
    written = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*"))
    small = sum(path.stat().st_size for path in [*base.rglob("*.json"), *adapter.rglob("*.json")])
    assert sum(reads) <= size + 5 * small + 0.2 * written


def test_without_hashes_copied_bytes_are_not_read_at_all(
    base: Path, adapter: Path, tmp_path: Path, reads: list[int]
) -> None:
    surgery.merge(base, adapter, output=tmp_path / "hashed")
    hashed = sum(reads)
    reads.clear()
    shutil.rmtree(cache_folder())
    report = surgery.merge(base, adapter, output=tmp_path / "out", hash=False)
    assert hashed - sum(reads) >= report.plan.copied_bytes
    assert not cache_folder().exists()


def entries(cache: Path) -> list[Path]:
    return sorted((cache / "hashes").glob("*.json"))


def plant(cache: Path, digest: str) -> None:
    """Replace every hash in the cache."""
    for path in entries(cache):
        content = read_json(path)
        content["tensors"] = dict.fromkeys(content["tensors"], digest)
        path.write_text(json.dumps(content))


def base_hashes(out: Path) -> set[str]:
    """The hashes of the base that an output names."""
    (item,) = [item for item in read_json(out / "surgery.json")["inputs"] if item["role"] == "base"]
    return {entry["blake3"] for entry in item["tensors"].values()}


FALSE = "f" * 64


def test_what_is_remembered_is_used(base: Path, adapter: Path, tmp_path: Path, cache: Path) -> None:
    """A false hash in the cache comes out again; the tests below rely on that."""
    surgery.merge(base, adapter, output=tmp_path / "one")
    plant(cache, FALSE)
    surgery.merge(base, adapter, output=tmp_path / "two")
    assert base_hashes(tmp_path / "two") == {FALSE}


def grow(path: Path) -> None:
    """The same tensors in a longer file of the same age."""
    times = path.stat()
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    path.write_bytes((length + 8).to_bytes(8, "little") + content[8 : 8 + length] + b" " * 8 + content[8 + length :])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def replace(path: Path) -> None:
    """A copy in its place, made later."""
    shutil.copy(path, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


INVALIDATING: dict[str, Callable[[Path], object]] = {
    "touched": os.utime,
    "older": lambda path: os.utime(path, (1, 1)),
    "a nanosecond": lambda path: os.utime(path, ns=(0, path.stat().st_mtime_ns + 1)),
    "grown": grow,
    "replaced": replace,
}


@pytest.mark.parametrize("how", INVALIDATING)
def test_a_file_that_changed_is_hashed_anew(how: str, base: Path, adapter: Path, tmp_path: Path, cache: Path) -> None:
    """By its time or by its size."""
    surgery.merge(base, adapter, output=tmp_path / "one")
    plant(cache, FALSE)
    time.sleep(0.01)
    INVALIDATING[how](base / "model.safetensors")
    surgery.merge(base, adapter, output=tmp_path / "two")
    assert base_hashes(tmp_path / "two") == base_hashes(tmp_path / "one")


def aged(path: Path, days: float) -> Path:
    """A file that was written some days ago."""
    then = time.time() - days * 86_400
    os.utime(path, (then, then))
    return path


def test_the_cache_forgets_what_is_gone_and_what_is_old(base: Path, adapter: Path, tmp_path: Path, cache: Path) -> None:
    """Once a day: entries of files that are not there any more, entries of 90 days, and what killed processes left."""
    for name in ("gone", "old", "kept"):
        shutil.copytree(base, tmp_path / name)
        known = set(entries(cache))
        surgery.merge(tmp_path / name, adapter, output=tmp_path / f"from-{name}")
        (entry,) = [path for path in entries(cache) if path not in known and str(tmp_path / name) in path.read_text()]
        (tmp_path / name / "entry").write_text(str(entry))
    gone, old, kept = (Path((tmp_path / name / "entry").read_text()) for name in ("gone", "old", "kept"))
    shutil.rmtree(tmp_path / "gone")
    aged(old, 91)
    aged(kept, 89)
    broken = cache / "hashes" / "0.json"
    broken.write_text("x")
    leftover, young = cache / "hashes" / "0.123", cache / "hashes" / "0.124"
    leftover.write_text("{")
    aged(leftover, 2)
    young.write_text("{")
    surgery.merge(base, adapter, output=tmp_path / "same-day")
    assert all(path.exists() for path in (gone, old, kept, broken, leftover, young))
    aged(cache / "hashes" / ".pruned", 1.1)
    surgery.merge(base, adapter, output=tmp_path / "next-day")
    assert [path.exists() for path in (gone, old, broken, leftover)] == [False] * 4
    assert kept.exists()
    assert young.exists()


def test_a_cache_that_cannot_be_pruned_is_no_error(base: Path, adapter: Path, tmp_path: Path, cache: Path) -> None:
    (cache / "hashes" / ".pruned").mkdir(parents=True)
    aged(cache / "hashes" / ".pruned", 2)
    (cache / "hashes" / "folder.json").mkdir()
    surgery.merge(base, adapter, output=tmp_path / "out")
    assert (cache / "hashes" / "folder.json").is_dir()


def test_another_path_is_hashed_anew_and_a_link_is_not(base: Path, adapter: Path, tmp_path: Path, cache: Path) -> None:
    """A copy with the same time is another file; a link is the same one."""
    surgery.merge(base, adapter, output=tmp_path / "one")
    plant(cache, FALSE)
    shutil.copytree(base, tmp_path / "copy")
    (tmp_path / "link").symlink_to("base")
    surgery.merge(tmp_path / "copy", adapter, output=tmp_path / "two")
    surgery.merge(tmp_path / "link", adapter, output=tmp_path / "three")
    assert base_hashes(tmp_path / "two") == base_hashes(tmp_path / "one")
    assert base_hashes(tmp_path / "three") == {FALSE}


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"null", b"{}", b'{"identity": 1}', b"\xff\xfe", b"[" * 100_000],
    ids=["empty", "cut short", "a list", "null", "no keys", "no path", "not UTF-8", "nested deeply"],
)
def test_a_damaged_cache_is_ignored(text: bytes, base: Path, adapter: Path, tmp_path: Path, cache: Path) -> None:
    """And written anew."""
    surgery.merge(base, adapter, output=tmp_path / "one")
    for path in entries(cache):
        path.write_bytes(text)
    surgery.merge(base, adapter, output=tmp_path / "two")
    assert unequal(tmp_path / "one", tmp_path / "two") == []
    assert sum(path.read_bytes() != text for path in entries(cache)) >= 2


@pytest.mark.parametrize("tensors", [[], None, 1, "x"], ids=repr)
def test_a_cache_of_another_form_is_ignored(
    tensors: object, base: Path, adapter: Path, tmp_path: Path, cache: Path
) -> None:
    surgery.merge(base, adapter, output=tmp_path / "one")
    for path in entries(cache):
        path.write_text(json.dumps(read_json(path) | {"tensors": tensors}))
    surgery.merge(base, adapter, output=tmp_path / "two")
    assert unequal(tmp_path / "one", tmp_path / "two") == []


def test_a_cache_that_cannot_be_written_costs_time_only(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    surgery.merge(base, adapter, output=tmp_path / "one")
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    surgery.merge(base, adapter, output=tmp_path / "two")
    assert unequal(tmp_path / "one", tmp_path / "two") == []


def test_the_cache_lies_where_caches_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """XDG_CACHE_HOME, or .cache in the home folder."""
    assert cache_folder() == tmp_path / "cache" / "checkpoint-surgery"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "checkpoint-surgery"


def test_the_hash_of_a_file_in_flux_is_not_remembered(base: Path, adapter: Path, tmp_path: Path, cache: Path) -> None:
    """A file that changes while it is read, and then is put back with its old time: nothing false was kept."""
    surgery.merge(base, adapter, output=tmp_path / "expected")
    shutil.rmtree(cache)
    path = base / "model.safetensors"
    times, content = path.stat(), path.read_bytes()

    def damage() -> None:
        with open(path, "r+b") as file:
            file.write(content[: len(content) // 2] + bytes(byte ^ 1 for byte in content[len(content) // 2 :]))

    with pytest.raises(InputError, match="was changed while it was being read"):
        surgery.merge(base, adapter, output=tmp_path / "out", progress=Tripwire(0, damage), threads=1)
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    surgery.merge(base, adapter, output=tmp_path / "out")
    assert unequal(tmp_path / "out", tmp_path / "expected") == []


def test_a_book_without_hashes_knows_nothing(tmp_path: Path) -> None:
    tensor = next(iter(open_checkpoint(invent(tmp_path / "m")).tensors.values()))
    book = HashBook()
    digest = book.require(tensor)
    book.save()
    assert HashBook().get(tensor) == digest
    assert HashBook(enabled=False).get(tensor) is None
