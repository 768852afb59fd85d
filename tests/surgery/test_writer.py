"""The writer: a target appears whole or not at all, whatever happens, and nothing else is ever harmed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import surgery
from surgery import writer
from surgery.dtypes import U8
from surgery.errors import InputError, NonFiniteError, OutputError
from surgery.layout import TensorSpec, single_file
from surgery.writer import open_staging
from tests.models import make, save
from tests.peft_tools import write_adapter
from tests.tools import COMMAND, Tripwire, as_nobody, interrupt, own_disk, run_cli, start_cli, tree, unequal


class Work:
    """A base, an adapter, and what merging them gives; `total` is how many bytes pass when the base is hashed anew."""

    def __init__(self, folder: Path) -> None:
        model = make("llama")
        self.folder = folder
        self.base = save(model, folder / "base", torch.bfloat16, max_shard_size="20KB")
        (self.base / "tokenizer.json").write_text('{"a": 1}')
        self.adapter = write_adapter(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]), folder / "adapter")
        self.expected = folder / "expected"
        progress = Tripwire(0, list)
        self.merge(self.expected, progress=progress)
        self.total = progress.passed

    def merge(self, output: str | os.PathLike[str], **options: Any) -> Any:
        return surgery.merge(self.base, self.adapter, output=output, **options)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return Work(tmp_path_factory.mktemp("work"))


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run hashes its inputs anew, so that the same number of bytes passes each time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def refusal(call: Callable[[], object], *parts: str) -> str:
    """The sentence with which an output is refused; `parts` are in it."""
    with pytest.raises(OutputError) as caught:
        call()
    message = caught.value.message
    assert message.endswith(".")
    for part in parts:
        assert part in message
    return message


# Before the end -------------------------------------------------------------------------------------------------------


def test_nothing_is_at_the_target_before_the_end(work: Work, tmp_path: Path) -> None:
    """At every report of progress there is a hidden folder beside it, and no more."""
    seen: list[list[str]] = []

    class Look(Tripwire):
        def advance(self, count: int) -> None:
            seen.append(os.listdir(tmp_path))

    work.merge(tmp_path / "out", progress=Look(0, interrupt))
    assert len(seen) > 10
    assert all(names == [".out.partial"] for names in seen)
    assert os.listdir(tmp_path) == ["out"]
    assert unequal(tmp_path / "out", work.expected) == []


def test_missing_folders_above_the_target_are_made(work: Work, tmp_path: Path) -> None:
    work.merge(tmp_path / "a" / "b" / "out")
    assert unequal(tmp_path / "a" / "b" / "out", work.expected) == []


def test_a_relative_target(work: Work, here: Path) -> None:
    work.merge("out")
    assert unequal(here / "out", work.expected) == []


def test_a_known_error_leaves_nothing(work: Work, tmp_path: Path) -> None:
    """A NaN found half-way: neither a target nor a staging folder."""
    base = shutil.copytree(work.base, tmp_path / "base")
    for shard in base.glob("*.safetensors"):
        tensors = load_file(shard)
        if (weight := tensors.get("model.layers.1.mlp.up_proj.weight")) is not None:
            weight[-1, -1] = float("nan")
            save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        surgery.merge(base, work.adapter, output=tmp_path / "out")
    assert os.listdir(tmp_path) == ["base"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_or_a_bug_keeps_what_is_done(work: Work, tmp_path: Path, error: type[BaseException]) -> None:
    """For the same command to take up; the target stays empty until then."""

    def fail() -> None:
        raise error

    with pytest.raises(error):
        work.merge(tmp_path / "out", progress=Tripwire(work.total // 2, fail), threads=1)
    assert os.listdir(tmp_path) == [".out.partial"]
    assert work.merge(tmp_path / "out").resumed > 0
    assert unequal(tmp_path / "out", work.expected) == []
    assert os.listdir(tmp_path) == ["out"]


# Refused --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def own(work: Work, tmp_path: Path) -> Iterator[Work]:
    """The same work on copies, which must be the same afterwards."""
    mine = object.__new__(Work)
    mine.folder = tmp_path / "mine"
    mine.base = shutil.copytree(work.base, mine.folder / "base")
    mine.adapter = shutil.copytree(work.adapter, mine.folder / "adapter")
    mine.expected = work.expected
    yield mine
    assert unequal(mine.base, work.base) == []
    assert unequal(mine.adapter, work.adapter) == []


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("target", "part"),
    [
        ("base", "is, or holds, the base"),
        ("adapter", "is, or holds, the adapter"),
        ("adapter/../base", "is, or holds, the base"),
        ("link", "is, or holds, the base"),
        (".", "is, or holds, the base"),
        ("base/out", "lies inside the base"),
        ("adapter/sub/out", "lies inside the adapter"),
        ("link/out", "lies inside the base"),
    ],
)
def test_an_output_never_touches_an_input(own: Work, target: str, part: str, overwrite: bool) -> None:
    """Neither the same folder, nor one within the other, nor by a link; --overwrite or not."""
    (own.folder / "link").symlink_to("base")
    refusal(
        lambda: own.merge(own.folder / target, overwrite=overwrite),
        str(own.folder / target),
        part,
        "choose another output",
    )
    assert sorted(os.listdir(own.folder)) == ["adapter", "base", "link"]


def test_a_single_file_and_its_own_folder(own: Work) -> None:
    """A lone file is an input like any other."""
    file = sorted(own.base.glob("*.safetensors"))[0]
    call = partial(surgery.merge, file, own.adapter, output=own.base, overwrite=True)
    refusal(call, "is, or holds, the base")


def test_an_existing_folder_is_refused(own: Work, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    message = refusal(lambda: own.merge(tmp_path / "out"))
    assert message == f"The output {tmp_path / 'out'} exists already; pass --overwrite to replace it."
    assert tree(tmp_path / "out") == {"config.json": b"{}"}


def test_an_empty_folder_is_filled(own: Work, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    own.merge(tmp_path / "out")
    assert unequal(tmp_path / "out", own.expected) == []


@pytest.mark.parametrize(
    "files",
    [["thesis.tex"], ["main.py", "data/model.safetensors"], ["package.json", "config.json", "src/index.js"]],
    ids=["a thesis", "a project with a model", "a project with a config.json"],
)
def test_overwrite_refuses_a_folder_that_is_no_model(own: Work, tmp_path: Path, files: list[str]) -> None:
    """A slip in the name of the output must not cost anyone their work."""
    for name in files:
        path = tmp_path / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("work of months")
    before = tree(tmp_path / "out")
    refusal(
        lambda: own.merge(tmp_path / "out", overwrite=True),
        "exists and holds neither a model nor an adapter; it is left as it is, choose another output",
    )
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_or_a_link_is_refused(own: Work, tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to("model")
    for target in (tmp_path / "file", tmp_path / "dangling", tmp_path / "link"):
        refusal(partial(own.merge, target, overwrite=overwrite), f"The output {target} exists and is not a folder")
    assert (tmp_path / "file").read_text() == "mine"
    assert tree(tmp_path / "model") == {"config.json": b"{}"}


@pytest.mark.parametrize("length", [250, 300])
def test_a_name_that_is_too_long(own: Work, tmp_path: Path, length: int) -> None:
    """250 letters are a name for a folder, but leave no room for the staging folder beside it."""
    refusal(lambda: own.merge(tmp_path / ("n" * length)), "cannot be written: File name too long")


def test_a_file_where_a_folder_should_be(own: Work, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refusal(lambda: own.merge(tmp_path / "file" / "out"), f"{tmp_path / 'file' / 'out'} cannot be written: ")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.fixture
def nobody(work: Work) -> Iterator[Work]:
    """The same work in a folder of a user without rights, and the process with that user's rights."""
    with as_nobody() as place:
        mine = object.__new__(Work)
        mine.folder = place
        os.seteuid(os.getuid())  # to read the originals
        mine.base = shutil.copytree(work.base, place / "base")
        mine.adapter = shutil.copytree(work.adapter, place / "adapter")
        if os.getuid() == 0:
            for path in place.rglob("*"):
                os.chown(path, 65534, 65534)
            os.seteuid(65534)
        yield mine


def test_a_folder_without_the_right_to_write(nobody: Work) -> None:
    locked = nobody.folder / "locked"
    locked.mkdir(mode=0o555)
    refusal(lambda: nobody.merge(locked / "out"), f"{locked / 'out'} cannot be written: Permission denied.")
    assert os.listdir(locked) == []


def test_a_folder_without_the_right_to_look(nobody: Work) -> None:
    locked = nobody.folder / "locked"
    locked.mkdir(mode=0o000)
    refusal(lambda: nobody.merge(locked / "out"), f"{locked / 'out'} cannot be written: Permission denied.")


def test_weights_without_the_right_to_read(nobody: Work) -> None:
    shard = sorted(nobody.base.glob("*.safetensors"))[1]
    shard.chmod(0)
    with pytest.raises(InputError) as caught:
        nobody.merge(nobody.folder / "out")
    assert caught.value.message == f"{shard} cannot be read: Permission denied."


def test_a_read_only_disk(own: Work) -> None:
    with own_disk(1) as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        refusal(lambda: own.merge(disk / "out"), f"{disk / 'out'} cannot be written: Read-only file system.")


# Full disks -----------------------------------------------------------------------------------------------------------


def test_too_small_a_disk_is_refused_before_the_first_byte(work: Work) -> None:
    """The sentence says how much is needed and how much there is; nothing is left behind."""
    with own_disk(0.02) as disk:
        progress = Tripwire(0, list)
        message = refusal(lambda: work.merge(disk / "out", progress=progress))
        sentence = (
            r"(.*) needs ([\d,]+) bytes but its disk has ([\d,]+) free; free some space or choose another place\."
        )
        found = re.fullmatch(sentence, message)
        assert found is not None
        assert found[1] == str(disk / "out")
        size = sum(map(len, tree(work.base).values()))
        assert abs(int(found[2].replace(",", "")) - size) < 5_000
        assert int(found[3].replace(",", "")) <= 20_480
        assert os.listdir(disk) == []
        assert progress.passed == 0


def test_the_free_space_is_that_of_the_target(work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same check where nothing can be mounted: whatever the disk says is believed."""
    monkeypatch.setattr(writer, "free_bytes", lambda target: 1234)
    refusal(lambda: work.merge(tmp_path / "out"), "its disk has 1,234 free")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("share", [0, 0.4, 0.8])
def test_a_disk_that_fills_up_is_resumed_after(work: Work, share: float) -> None:
    """Another program takes the space meanwhile. Once it is free again, the same command ends with the same bytes."""
    with own_disk(1) as disk:
        ballast = disk / "ballast"

        def fill() -> None:
            with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))

        message = refusal(
            partial(work.merge, disk / "out", progress=Tripwire(int(share * work.total), fill), threads=1)
        )
        assert message == (
            f"The disk is full while {disk / 'out'} is being written; nothing is at the target. Free some space and "
            f"run the same command again to resume, or delete {disk / '.out.partial'}."
        )
        assert sorted(os.listdir(disk)) == [".out.partial", "ballast"]
        ballast.unlink()
        report = work.merge(disk / "out")
        assert report.resumed >= share * 10
        assert unequal(disk / "out", work.expected) == []
        assert os.listdir(disk) == ["out"]


def test_a_limit_on_file_sizes_is_a_sentence(work: Work, tmp_path: Path) -> None:
    """What the system refuses in the middle of a file is reported, and nothing is left."""
    limit = 10_000
    run = subprocess.run(
        [*COMMAND, "merge", work.base, work.adapter, "-o", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == f"Error: {tmp_path / 'out'} cannot be written: File too large.\n"
    assert os.listdir(tmp_path) == []


# Overwriting ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def old(work: Work, tmp_path: Path) -> Path:
    """An earlier output at the target, with a file that the new one does not have."""
    out = shutil.copytree(work.adapter, tmp_path / "out")
    (out / "old.txt").write_text("old")
    return out


def test_overwrite_replaces_the_whole_folder(work: Work, old: Path) -> None:
    """Nothing of the old model is mixed into the new one."""
    work.merge(old, overwrite=True)
    assert unequal(old, work.expected) == []
    assert os.listdir(old.parent) == ["out"]


def test_a_failed_run_leaves_the_old_output_alone(work: Work, old: Path) -> None:
    before = tree(old)
    with pytest.raises(KeyboardInterrupt):
        work.merge(old, overwrite=True, progress=Tripwire(work.total // 2, interrupt))
    assert tree(old) == before


def test_a_target_that_appears_meanwhile_is_left_alone(work: Work, tmp_path: Path) -> None:
    """Somebody else was faster; what they wrote stays, and so does nothing of ours."""

    def appear() -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs.txt").write_text("theirs")

    call = partial(work.merge, tmp_path / "out", progress=Tripwire(0, appear))
    assert refusal(call) == f"{tmp_path / 'out'} has appeared meanwhile; it is left as it is."
    assert tree(tmp_path / "out") == {"theirs.txt": b"theirs"}
    assert os.listdir(tmp_path) == ["out"]


KILL = """
import os, shutil, signal, sys
module, name, wanted, when = {module}, {name!r}, {call}, {when!r}
real, calls = getattr(module, name), 0
def fake(*arguments, **keywords):
    global calls
    calls += 1
    if calls == wanted and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = real(*arguments, **keywords)
    if calls == wanted:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(module, name, fake)
from surgery.cli.main import main
main()
"""
# The moments of a commit that replaces an old output: two renames, then the staging folder and the old one go.
MOMENTS = {
    "before the first rename": ("os", "rename", 1, "before"),
    "between the renames": ("os", "rename", 2, "before"),
    "after both renames": ("os", "rename", 2, "after"),
    "the staging folder is gone": ("shutil", "rmtree", 4, "after"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_during_the_replacement_loses_nothing(
    work: Work, old: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, moment: str
) -> None:
    """Either the old output or the new one is at the target after the next command, whole, and nothing beside it."""
    before = tree(old)
    module, name, call, when = MOMENTS[moment]
    code = KILL.format(module=module, name=name, call=call, when=when)
    arguments = ["merge", str(work.base), str(work.adapter), "-o", str(old), "--overwrite"]
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, check=False)
    assert run.returncode == -signal.SIGKILL
    replaced = moment in ("after both renames", "the staging folder is gone")
    twin = shutil.copytree(tmp_path, tmp_path_factory.mktemp("twin") / "t") / "out"
    # Without --overwrite, what is there stays.
    refusal(lambda: work.merge(twin), "exists already; pass --overwrite")
    assert tree(twin) == (tree(work.expected) if replaced else before)
    # With it, the work that was done is taken up.
    steps = sum(len(load_file(shard)) for shard in work.base.glob("*.safetensors"))
    assert work.merge(old, overwrite=True).resumed == (0 if replaced else steps)
    assert unequal(old, work.expected) == []
    assert os.listdir(tmp_path) == ["out"]


# Resuming -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def staged(work: Work, tmp_path: Path) -> Path:
    """The staging folder of an interrupted merge to `out`."""
    with pytest.raises(KeyboardInterrupt):
        work.merge(tmp_path / "out", progress=Tripwire(work.total * 2 // 3, interrupt), threads=1)
    return tmp_path / ".out.partial"


def lines(staged: Path) -> list[bytes]:
    return (staged / "journal.jsonl").read_bytes().splitlines(keepends=True)


def test_a_journal_is_taken_up(work: Work, staged: Path, tmp_path: Path) -> None:
    done = len(lines(staged)) - 1
    assert done > 3
    assert work.merge(tmp_path / "out").resumed == done
    assert unequal(tmp_path / "out", work.expected) == []


@pytest.mark.parametrize("keep", [0, 1, 5, -1])
def test_a_torn_line_counts_for_nothing(work: Work, staged: Path, tmp_path: Path, keep: int) -> None:
    """A kill in the middle of a line loses the step of that line and no other."""
    journal = lines(staged)
    (staged / "journal.jsonl").write_bytes(b"".join(journal[:-1]) + journal[-1][:keep])
    assert work.merge(tmp_path / "out").resumed == len(journal) - 2
    assert unequal(tmp_path / "out", work.expected) == []


@pytest.mark.parametrize("text", ["", '{"fingerprint"', "[]\n", "null\n", "\n", "\0\0\0\n", "x\n{}\n"], ids=repr)
def test_a_journal_without_a_first_line_starts_over(work: Work, staged: Path, tmp_path: Path, text: str) -> None:
    (staged / "journal.jsonl").write_text(text)
    assert work.merge(tmp_path / "out").resumed == 0
    assert unequal(tmp_path / "out", work.expected) == []


@pytest.mark.parametrize("key", ["boot", "fingerprint"])
def test_the_journal_of_another_boot_or_work_starts_over(work: Work, staged: Path, tmp_path: Path, key: str) -> None:
    """What was in memory when the machine went down may never have reached the disk."""
    journal = lines(staged)
    first = json.loads(journal[0]) | {key: "another"}
    for file in (staged / "files").glob("*.safetensors"):
        file.write_bytes(bytes(file.stat().st_size))
    (staged / "journal.jsonl").write_bytes(
        json.dumps(first, separators=(",", ":")).encode() + b"\n" + b"".join(journal[1:])
    )
    assert work.merge(tmp_path / "out").resumed == 0
    assert unequal(tmp_path / "out", work.expected) == []


def test_the_journal_names_this_boot(staged: Path) -> None:
    """The kernel's own name for it, so that it changes with each."""
    path = Path("/proc/sys/kernel/random/boot_id")
    if not path.exists():
        pytest.skip("this system has no boot id")
    assert json.loads(lines(staged)[0])["boot"] == path.read_text().strip()


def test_another_work_clears_the_leftovers(work: Work, staged: Path, tmp_path: Path) -> None:
    """With other options there is nothing to resume, and no file of the old work is in the new output."""
    (staged / "files" / "stray.txt").write_text("old")
    report = work.merge(tmp_path / "out", shard_bytes=25_000)
    assert report.resumed == 0
    surgery.merge(work.base, work.adapter, output=tmp_path / "fresh", shard_bytes=25_000)
    assert unequal(tmp_path / "out", tmp_path / "fresh") == []


DIE_WHILE_DELETING = """
import os, shutil, signal, sys
from pathlib import Path
target = Path(sys.argv[sys.argv.index("-o") + 1])
real = os.fsync
def appear(file):
    if {occupied}:
        target.mkdir(exist_ok=True)
        (target / "theirs").touch()
    real(file)
def delete_one_and_die(path, **options):
    min(Path(path).rglob("*.safetensors")).unlink()
    os.kill(os.getpid(), signal.SIGKILL)
os.fsync, shutil.rmtree = appear, delete_one_and_die
from surgery.cli.main import main
main()
"""


@pytest.mark.parametrize("failed", [False, True], ids=["another work starts over", "a failed work is cleared away"])
def test_a_kill_while_leftovers_are_deleted(work: Work, staged: Path, tmp_path: Path, failed: bool) -> None:
    """The journal must not vouch for files that are gone: the first work, run again, has every byte."""
    arguments = ["merge", str(work.base), str(work.adapter), "-o", str(tmp_path / "out")]
    arguments += [] if failed else ["--shard-size=25kB"]
    code = DIE_WHILE_DELETING.format(occupied=failed)
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, check=False)
    assert run.returncode == -signal.SIGKILL
    if failed:
        shutil.rmtree(tmp_path / "out")
    work.merge(tmp_path / "out")
    assert unequal(tmp_path / "out", work.expected) == []


# Two at a time --------------------------------------------------------------------------------------------------------


def test_two_processes_cannot_write_one_target(work: Work, tmp_path: Path) -> None:
    """The second is told so, at once; the first, frozen meanwhile, ends as if nothing had been."""
    first = start_cli("merge", work.base, work.adapter, "-o", tmp_path / "out")
    try:
        journal = tmp_path / ".out.partial" / "journal.jsonl"
        while not (journal.exists() and journal.stat().st_size) and first.poll() is None:
            time.sleep(0.002)
        first.send_signal(signal.SIGSTOP)
        assert first.poll() is None
        assert not (tmp_path / "out").exists(), "it was done before it could be stopped"
        second = run_cli("merge", work.base, work.adapter, "-o", tmp_path / "out")
        assert second.returncode == 1
        assert second.stderr == f"Error: {tmp_path / 'out'} is being written by another process; wait for it to end.\n"
    finally:
        first.send_signal(signal.SIGCONT)
        first.communicate(timeout=60)
    assert first.returncode == 0
    assert unequal(tmp_path / "out", work.expected) == []


def test_a_target_is_free_again_after_its_writer(tmp_path: Path) -> None:
    """Whether it failed or was done."""
    with open_staging(tmp_path / "out", "a"):
        refusal(lambda: open_staging(tmp_path / "out", "a").__enter__(), "is being written by another process")
    with open_staging(tmp_path / "out", "a") as staging:
        staging.write_file("f", b"x")
        staging.commit(overwrite=False)
    assert tree(tmp_path / "out") == {"f": b"x"}


# Copying --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", sorted(writer._NO_KERNEL_COPY), ids=errno.errorcode.get)
def test_copies_fall_back_where_the_kernel_cannot(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Between file systems, on old kernels, in sandboxes: the same bytes by reading and writing."""
    calls = []

    def refuse(*arguments: object) -> int:
        calls.append(arguments)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "copy_file_range", refuse)
    work.merge(tmp_path / "out")
    assert calls
    assert unequal(tmp_path / "out", work.expected) == []


def test_short_copies_are_continued(work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may copy less than it was asked to, or nothing."""
    real = os.copy_file_range
    calls = []

    def reluctant(source: int, target: int, count: int, *offsets: int) -> int:
        calls.append(count)
        return real(source, target, min(count, 700), *offsets) if len(calls) % 5 else 0

    monkeypatch.setattr(os, "copy_file_range", reluctant)
    work.merge(tmp_path / "out")
    assert len(calls) > 20
    assert unequal(tmp_path / "out", work.expected) == []


def test_systems_without_kernel_copies(work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a Mac the call is not even there."""
    monkeypatch.delattr(os, "copy_file_range")
    monkeypatch.setattr(sys, "platform", "darwin")
    work.merge(tmp_path / "out")
    assert unequal(tmp_path / "out", work.expected) == []


def test_a_failing_disk_is_a_sentence(work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any other refusal of the kernel is reported, not retried."""

    def fail(*arguments: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "copy_file_range", fail)
    refusal(lambda: work.merge(tmp_path / "out"), f"{tmp_path / 'out'} cannot be written: Input/output error.")
    assert os.listdir(tmp_path) == []


def test_short_writes_are_continued(work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: real(file, data[:999], offset))
    work.merge(tmp_path / "out")
    assert unequal(tmp_path / "out", work.expected) == []


def test_a_write_beyond_its_tensor_is_a_bug(tmp_path: Path) -> None:
    """No step can reach into its neighbour's bytes."""
    from surgery.dtypes import F32

    with open_staging(tmp_path / "out", "a") as staging:
        staging.lay_out(single_file("m.safetensors", [TensorSpec("a", F32, (2,)), TensorSpec("b", F32, (2,))]))
        staging.write("a", 4, memoryview(b"1234"))
        with pytest.raises(ValueError, match="5 bytes at 4 overrun the output tensor 'a'"):
            staging.write("a", 4, memoryview(b"12345"))


def test_new_files_obey_the_umask(work: Work, tmp_path: Path) -> None:
    """As if the user had made them with any other tool."""
    before = os.umask(0o027)
    try:
        work.merge(tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert set(modes.values()) == {0o640}


# The disk works along -------------------------------------------------------------------------------------------------


def test_writing_back_starts_in_whole_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece of a tensor goes to the disk once, when it is full; what the system refuses is left to the sync."""
    started: list[tuple[int, int, int]] = []

    def refuse(descriptor: int, begin: int, count: int, flags: int) -> int:
        started.append((begin, count, flags))
        return -1

    monkeypatch.setattr(writer, "_WRITEBACK", 1000)
    monkeypatch.setattr(writer, "_sync_file_range", lambda: refuse)
    layout = single_file("model.safetensors", [TensorSpec("w", U8, (3500,))], {})
    start = len(layout.files[0].raw_header)
    content = bytes(range(250)) * 14
    with open_staging(tmp_path / "out", "work") as staging:
        staging.lay_out(layout)
        for begin, end in ((0, 400), (400, 999), (999, 2500), (2500, 3500)):
            staging.write("w", begin, memoryview(content)[begin:end])
        staging.commit(False)
    assert started == [(start, 2000, 2), (start + 2000, 1000, 2)]
    assert (tmp_path / "out" / "model.safetensors").read_bytes()[start:] == content


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such call")
def test_the_system_takes_the_call(tmp_path: Path) -> None:
    call = writer._sync_file_range()
    assert call is not None
    with open(tmp_path / "file", "wb") as file:
        file.write(bytes(10_000))
        file.flush()
        assert call(file.fileno(), 4096, 4096, writer._SYNC_FILE_RANGE_WRITE) == 0
        assert call(-1, 0, 1, writer._SYNC_FILE_RANGE_WRITE) == -1
