"""The command: exit statuses, sentences, JSON, progress, completion, and what it does to a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import pytest
import torch
from safetensors.torch import save_file

import surgery
from surgery.cli import progress
from surgery.cli.main import COMMANDS, cli, run
from surgery.cli.options import Count, Size
from tests.peft_tools import write_three
from tests.tools import COMMAND, read_json, run_cli, square_adapter, square_checkpoint, start_cli, tree, unequal


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, its fine-tune, an adapter and two merges."""
    folder = tmp_path_factory.mktemp("inputs")
    write_three(folder)
    surgery.merge(folder / "base", folder / "adapter", output=folder / "merged")
    surgery.merge(folder / "base", folder / "adapter", output=folder / "reversible", reversible=True)
    surgery.upcycle(folder / "base", output=folder / "moe", experts=2)
    return folder


# Those that write, without their output.
WRITING: dict[str, tuple[str, ...]] = {
    "extract": ("extract", "base", "tuned", "--rank", "2", "--device", "cpu"),
    "merge": ("merge", "base", "adapter"),
    "merge reversibly": ("merge", "base", "adapter", "--reversible"),
    "subtract": ("subtract", "merged", "adapter"),
    "subtract exactly": ("subtract", "reversible"),
    "switch": ("switch", "reversible", "adapter", "adapter=0.5"),
    "dense": ("dense", "moe"),
}
LOOKING: dict[str, tuple[str, ...]] = {
    "inspect": ("inspect", "base", "--tensors"),
    "inspect an adapter": ("inspect", "adapter"),
    "verify": ("verify", "merged"),
    "verify two": ("verify", "base", "base"),
    "analyze": ("analyze", "base", "adapter", "adapter=0.5"),
    "analyze weights": ("analyze", "base", "--targets", "q_proj"),
}


@pytest.fixture
def inside(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The inputs as the current folder."""
    monkeypatch.chdir(inputs)
    return inputs


Captured = pytest.CaptureFixture[str]


# Exit statuses and sentences ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [*WRITING, *LOOKING])
def test_done_is_0(command: str, inside: Path, tmp_path: Path, capsys: Captured) -> None:
    """The report goes to stdout, and nothing to stderr where it is no terminal and the work is short."""
    arguments = [*WRITING[command], "-o", str(tmp_path / "out")] if command in WRITING else LOOKING[command]
    assert run(list(arguments)) == 0
    printed = capsys.readouterr()
    assert printed.out
    assert printed.err == ""


# Arguments, exit status, and what the sentence must say.
FAILING: dict[str, tuple[list[str], int, list[str]]] = {
    "nothing there": (["inspect", "gone"], 1, ["gone does not exist."]),
    "no checkpoint": (["merge", "adapter", "adapter", "-o", "OUT"], 1, ["adapter is an adapter, but a checkpoint"]),
    "no adapter": (["merge", "base", "tuned", "-o", "OUT"], 1, ["`surgery extract BASE tuned -o ADAPTER` makes an"]),
    "swapped": (
        ["merge", "adapter", "base", "-o", "OUT"],
        1,
        ["adapter is an adapter; BASE comes first; did you swap"],
    ),
    "merge first": (["extract", "base", "adapter", "-o", "OUT"], 1, ["`surgery merge BASE adapter -o MERGED`."]),
    "no weight": (["merge", "base", "adapter=1,5", "-o", "OUT"], 1, ["not exist; a weight is written adapter=0.5."]),
    "a quoted home": (
        ["inspect", "~/x"],
        1,
        ["~/x does not exist; the shell did not expand `~`, leave out the quotes"],
    ),
    "a quoted adapter": (["merge", "base", "~/x", "-o", "OUT"], 1, ["~/x does not exist; the shell did not expand"]),
    "no targets": (["extract", "base", "tuned", "--targets", "", "-o", "OUT"], 2, ["--targets is empty; name all-"]),
    "a bound alone": (["extract", "base", "tuned", "--max-rank", "2", "-o", "OUT"], 2, ["give one of them."]),
    "the target exists": (["merge", "base", "adapter", "-o", "merged"], 1, ["merged exists already; pass --overwrite"]),
    "into an input": (["merge", "base", "adapter", "-o", "base/out"], 1, ["base/out lies inside the base base"]),
    "no record": (["subtract", "merged", "-o", "OUT"], 1, ["merged has no undo record", "name the adapters"]),
    "a picture of another kind": (["analyze", "base", "--plot", "x.gif"], 2, ["ends in .png or .html"]),
    "no layer": (["analyze", "base", "--layers", "99"], 2, ["names layer 99, but the model has the layers 0 to"]),
    "no provenance": (["verify", "base"], 1, ["base has no surgery.json"]),
    "two kinds of rank": (
        ["extract", "base", "tuned", "--rank", "2", "--energy", "0.5", "-o", "OUT"],
        2,
        ["--rank and --energy exclude each other; give one of --rank, --energy, --budget."],
    ),
    "too small a budget": (["extract", "base", "tuned", "--budget", "3", "-o", "OUT"], 2, ["--budget is 3, below the"]),
    "no such device": (["merge", "base", "adapter", "--device", "tpu", "-o", "OUT"], 2, ["The device 'tpu' is not"]),
    "hash and record": (
        ["merge", "base", "adapter", "--reversible", "--no-hash", "-o", "OUT"],
        2,
        ["--no-hash and --reversible exclude each other"],
    ),
}


@pytest.mark.parametrize("case", FAILING)
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_a_known_error_is_one_sentence(
    case: str, as_json: bool, inside: Path, tmp_path: Path, capsys: Captured
) -> None:
    """On stderr, with status 1, or 2 for options that make no sense; as an object on stdout with --json; no output."""
    arguments, status, parts = FAILING[case]
    arguments = [str(tmp_path / "out") if word == "OUT" else word for word in arguments]
    assert run([*arguments, *(["--json"] if as_json else [])]) == status
    printed = capsys.readouterr()
    assert printed.err.startswith("Error: ")
    assert printed.err.count("\n") == 1
    assert printed.err.endswith((".\n", "?\n"))
    for part in parts:
        assert part in printed.err
    if as_json:
        content = json.loads(printed.out)
        assert content["error"]["message"] == printed.err.removeprefix("Error: ").rstrip("\n")
        assert content["error"]["kind"].endswith("Error")
    else:
        assert printed.out == ""
    assert os.listdir(tmp_path) == []


def test_several_problems_have_a_line_each(inside: Path, tmp_path: Path, capsys: Captured) -> None:
    """The sentence counts them, and the lines below name them."""
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    index = {"weight_map": {"b": "model.safetensors", "c": "model.safetensors"}}
    (tmp_path / "x.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model.safetensors").rename(tmp_path / "x.safetensors")
    index["weight_map"] = dict.fromkeys(("b", "c"), "x.safetensors")
    (tmp_path / "x.safetensors.index.json").write_text(json.dumps(index))
    assert run(["inspect", str(tmp_path), "--json"]) == 1
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert lines[0] == f"Error: 3 problems with {tmp_path}:"
    assert all(line.startswith(f"  {tmp_path}/") and line.endswith(".") for line in lines[1:])
    assert json.loads(printed.out)["error"]["problems"] == [line.strip() for line in lines[1:]]


USAGE: dict[str, list[str]] = {
    "no such command": ["operate"],
    "no such option": ["inspect", "base", "--deep"],
    "no output": ["merge", "base", "adapter"],
    "no adapter": ["merge", "base", "-o", "out"],
    "no number": ["extract", "base", "tuned", "-o", "out", "--rank", "many"],
    "rank of zero": ["extract", "base", "tuned", "-o", "out", "--rank", "0"],
    "no size": ["merge", "base", "adapter", "-o", "out", "--shard-size", "5 apples"],
    "a size without a unit": ["merge", "base", "adapter", "-o", "out", "--shard-size", "5"],
    "no threads": ["merge", "base", "adapter", "-o", "out", "--threads", "0"],
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage_is_2(case: str, inside: Path, capsys: Captured) -> None:
    """With the usage, and a pointer to the help."""
    assert run(USAGE[case]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Usage: surgery" in printed.err
    assert "Error: " in printed.err


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage_is_json_too(case: str, inside: Path, capsys: Captured) -> None:
    """A program that asked for JSON gets JSON, whatever went wrong."""
    assert run([*USAGE[case], "--json"]) == 2
    printed = capsys.readouterr()
    assert "message" in json.loads(printed.out)["error"]


def test_a_bug_keeps_its_traceback(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody foresaw is not dressed up as the user's mistake."""

    def broken(*arguments: object, **keywords: object) -> object:
        raise ZeroDivisionError

    monkeypatch.setattr(surgery, "inspect", broken)
    with pytest.raises(ZeroDivisionError):
        run(["inspect", "base"])


def test_a_reader_that_goes_away_is_no_crash(inputs: Path) -> None:
    """As `surgery inspect ... | head -1` does."""
    process = start_cli("inspect", inputs / "base", "--tensors")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(60) == 1
    assert "Traceback" not in errors
    process.stderr.close()


@pytest.mark.parametrize("length", [300, 5000])
def test_a_name_that_no_file_can_have(length: int, inside: Path, tmp_path: Path, capsys: Captured) -> None:
    """Longer than the system allows: a sentence, for an input as for an output."""
    name = "n" * length
    assert run(["inspect", name]) == 1
    assert run(["merge", "base", name, "-o", str(tmp_path / "out")]) == 1
    assert run(["merge", "base", "adapter", "-o", name]) == 1
    assert capsys.readouterr().err.count("Error: ") == 3


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_names_that_are_not_unicode(as_json: bool, inputs: Path, tmp_path: Path) -> None:
    """Any bytes can be a name on Linux, also for something to print."""
    place = tmp_path / os.fsdecode(b"\xff")
    try:
        shutil.copytree(inputs / "base", place)
    except OSError:
        pytest.skip("this file system has Unicode names only")
    variables = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}  # as in every locale but C
    command = [*COMMAND, "inspect", str(place), *(["--json"] if as_json else [])]
    found = subprocess.run(command, capture_output=True, check=False, env=variables)
    assert b"Traceback" not in found.stderr
    assert found.returncode == 0
    gone = subprocess.run([*COMMAND, "inspect", f"{place}gone"], capture_output=True, check=False)
    assert gone.returncode == 1
    assert b"does not exist." in gone.stderr
    assert b"Traceback" not in gone.stderr


# Interrupted ----------------------------------------------------------------------------------------------------------


def test_an_interrupt_is_130_and_the_same_command_resumes(tmp_path: Path) -> None:
    """Ctrl-C in the middle of a merge: nothing at the target, one line that says so, and then the same bytes."""
    base = square_checkpoint(tmp_path / "base", layers=40, side=1024)
    adapter = square_adapter(tmp_path / "adapter", layers=40, side=1024)
    arguments = ["merge", str(base), str(adapter), "--reversible", "--threads", "1", "-o", str(tmp_path / "out")]
    journal = tmp_path / ".out.partial" / "journal.jsonl"
    for _ in range(5):  # a merge that is done before the signal reaches it is begun anew
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        process = start_cli(*arguments)
        while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 2):
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=60)
        if process.returncode:
            break
    assert process.returncode == 130
    assert printed == ""
    partial = tmp_path / ".out.partial"
    assert errors == f"\nInterrupted. What is done is in {partial}; the same command goes on from there.\n"
    assert not (tmp_path / "out").exists()
    again = run_cli(*arguments)
    assert again.returncode == 0
    (line,) = [line for line in again.stdout.splitlines() if line.startswith("resumed")]
    assert re.fullmatch(r"resumed +([2-9]|[1-3]\d) steps from an earlier run", line)
    surgery.merge(base, adapter, output=tmp_path / "expected", reversible=True)
    assert unequal(tmp_path / "out", tmp_path / "expected") == []
    assert not (tmp_path / ".out.partial").exists()


@pytest.mark.parametrize("command", ["verify", "merge"])
def test_an_interrupt_before_there_is_anything_to_resume(
    command: str, inside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """What only looks has nothing to go on from, and neither has what did not begin."""

    def interrupted(*arguments: object, **keywords: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(surgery, command, interrupted)
    target = ["-o", str(tmp_path / "out")] if command == "merge" else []
    assert run([command, "base", "adapter", *target]) == 130
    assert capsys.readouterr().err == "\nInterrupted.\n"


# JSON and quiet -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [*WRITING, *LOOKING])
def test_json_is_one_object_and_nothing_else(command: str, inside: Path, tmp_path: Path, capfd: Captured) -> None:
    """It holds what the library's report holds."""
    arguments = [*WRITING[command], "-o", str(tmp_path / "out")] if command in WRITING else LOOKING[command]
    assert run([*arguments, "--json"]) == 0
    printed = capfd.readouterr()
    content = json.loads(printed.out)
    assert isinstance(content, dict)
    assert printed.err == ""
    if command in WRITING:
        assert (content["output"], content["dry_run"], content["resumed"]) == (str(tmp_path / "out"), False, 0)
        numbers = read_json(tmp_path / "out" / "surgery.json")["report"]
        assert {name: content[name] for name in numbers} == numbers


@pytest.mark.parametrize("command", [*WRITING, *LOOKING])
def test_quiet_prints_nothing(command: str, inside: Path, tmp_path: Path, capfd: Captured) -> None:
    arguments = [*WRITING[command], "-o", str(tmp_path / "out")] if command in WRITING else LOOKING[command]
    assert run([*arguments, "--quiet"]) == 0
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


@pytest.mark.parametrize("flag", ["--json", "--quiet"])
def test_warnings_are_heard_without_the_tables(flag: str, inside: Path, tmp_path: Path, capsys: Captured) -> None:
    """A change lost to rounding is said on stderr, and in the object; with the tables it is on stdout."""
    arguments = ["merge", "base", "adapter=0.0001", "-o", str(tmp_path / "out")]
    assert run([*arguments, flag]) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("Note: Most of the change was lost to rounding: it is smaller than the spacing of")
    assert printed.err.count("\n") == 1
    if flag == "--json":
        assert printed.err == f"Note: {json.loads(printed.out)['notes'][0]}\n"
    else:
        assert printed.out == ""
    assert run([*arguments, "--overwrite"]) == 0
    printed = capsys.readouterr()
    assert "Note: Most of the change was lost to rounding" in printed.out
    assert printed.err == ""


def test_quiet_still_says_what_failed(inside: Path, capsys: Captured) -> None:
    assert run(["inspect", "gone", "--quiet"]) == 1
    assert capsys.readouterr().err == "Error: gone does not exist.\n"


# Dry runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", WRITING)
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_a_dry_run_writes_nothing_at_all(
    command: str, as_json: bool, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """Not at the target, not beside it, not in the cache; and what it foretells comes true."""
    place = tmp_path / "place"
    shutil.copytree(inputs, place)
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    before = tree(place)
    listed = sorted(place.rglob("*"))
    arguments = [*WRITING[command], "-o", "new/out", *(["--json"] if as_json else [])]
    assert run([*arguments, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert sorted(place.rglob("*")) == listed
    assert tree(place) == before
    if not as_json:
        lines = [line.split("  ")[0].strip() for line in printed.splitlines()]
        writing = ["read", "written", "copied unchanged", "tensors"]
        extracting = ["modules", "rank", "parameters", "adapter", "read", "disk needed"]
        middle = extracting if command == "extract" else writing
        assert lines[: len(middle) + 3] == ["would write", *middle, "peak memory", "free disk"]
        return
    foretold = json.loads(printed)
    assert foretold["dry_run"] is True
    assert run(arguments) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["plan"]["write_bytes"] == foretold["plan"]["write_bytes"]
    written = sum(path.stat().st_size for path in (place / "new" / "out").rglob("*") if path.is_file())
    written -= (place / "new" / "out" / "surgery.json").stat().st_size
    assert foretold["plan"]["write_bytes"] == pytest.approx(written, rel=0.25, abs=20_000)


def test_a_dry_run_finds_what_a_run_would_find(inside: Path, tmp_path: Path, capsys: Captured) -> None:
    """Everything that needs no data: here, an output that exists and an adapter that does not fit."""
    assert run(["merge", "base", "adapter", "-o", "merged", "--dry-run"]) == 1
    square_adapter(tmp_path / "other", 1, 8)
    assert run(["merge", "base", str(tmp_path / "other"), "-o", str(tmp_path / "out"), "--dry-run"]) == 1
    assert "m.0" in capsys.readouterr().err


# Progress -------------------------------------------------------------------------------------------------------------


def test_progress_is_plain_lines_where_there_is_no_terminal(
    inside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """What is done, of how much, and how long it will take; never above 100%."""
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    assert run(["merge", "base", "adapter", "-o", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 5
    shares = []
    for line in lines:
        label, _, rest = line.partition(": ")
        share, _, rest = rest.partition("% of ")
        assert re.match(r"\d+(\.\d+)? kB, ", rest)
        assert label == "merging"
        assert rest.endswith(" s left")
        shares.append(int(share))
    assert shares == sorted(shares)
    assert shares[-1] == 100


def test_short_work_says_nothing_on_the_way(inside: Path, tmp_path: Path, capsys: Captured) -> None:
    """The first line comes after seconds."""
    assert run(["merge", "base", "adapter", "-o", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == ""


def on_terminal(arguments: Sequence[str | Path], **environment: str) -> tuple[int, bytes]:
    """Run the command on a terminal of its own; its status and everything that the terminal was sent."""
    parent, child = pty.openpty()
    variables = {**os.environ, "COLUMNS": "120", "TERM": "xterm-256color", **environment}
    process = subprocess.Popen([*COMMAND, *map(str, arguments)], stdin=child, stdout=child, stderr=child, env=variables)
    os.close(child)
    received = bytearray()
    with contextlib.suppress(OSError):  # that is how the end of a terminal looks on Linux
        while data := os.read(parent, 65536):
            received += data
    os.close(parent)
    return process.wait(60), bytes(received)


def test_progress_is_a_bar_on_a_terminal(tmp_path: Path) -> None:
    """With label, bytes, rate and time left, drawn over itself and gone at the end."""
    base = square_checkpoint(tmp_path / "base", layers=6, side=1024)
    adapter = square_adapter(tmp_path / "adapter", layers=6, side=1024)
    status, received = on_terminal(["merge", base, adapter, "--reversible", "-o", tmp_path / "out"])
    assert status == 0
    text = received.decode()
    assert "merging" in text
    assert "writing the undo record" in text
    assert "MB" in text
    assert "━" in text
    assert "\x1b[?25l" in text, "the cursor is hidden while the bar is drawn"
    assert "\x1b[?25h" in text, "and shown again"
    quiet, silent = on_terminal(["merge", base, adapter, "--quiet", "-o", tmp_path / "again"])
    assert (quiet, silent) == (0, b"")


# Terminals ------------------------------------------------------------------------------------------------------------

# Turn the text red, set the window's title, the same in one character, turn the writing round, ring the bell.
EVIL = "\x1b[31m\x1b]0;owned\x07\x9b31m\u202e\x08"


def hostile_adapter(folder: Path, **settings: object) -> Path:
    square_adapter(folder, 1, 8)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(read_json(path) | settings))
    return folder


def hostile_checkpoint(folder: Path, config: object = None, names: Sequence[str] = ()) -> Path:
    square_checkpoint(folder, 1, 8)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    for name in names:
        (folder / name).write_text("x")
    return folder


def hostile_provenance(folder: Path) -> Path:
    square_checkpoint(folder, 1, 8)
    content = {
        "schema": 1,
        "operation": EVIL,
        "inputs": [{"role": EVIL, "source": EVIL, "revision": EVIL}],
        "outputs": {f"t{EVIL}": {"dtype": EVIL, "shape": [EVIL], "blake3": "0"}, "m.0.weight": {"dtype": EVIL}},
        "files": {EVIL: "0"},
    }
    (folder / "surgery.json").write_text(json.dumps(content))
    return folder


def hostile_index(folder: Path) -> Path:
    square_checkpoint(folder, 1, 8)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    weight_map = {f"t{EVIL}": "a.safetensors", "u": f"{EVIL}.safetensors"}
    (folder / "a.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def hostile_names(folder: Path) -> Path:
    square_checkpoint(folder, 1, 8)
    (folder / "model.safetensors").rename(folder / f"{EVIL}.safetensors")
    shutil.copy(folder / f"{EVIL}.safetensors", folder / "b.safetensors")
    return folder


def hostile_tensor(folder: Path) -> Path:
    folder.mkdir()
    save_file({f"m{EVIL}": torch.ones(1)}, folder / "model.safetensors")
    return folder


HOSTILE: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "an adapter's base": ("inspect", lambda f: hostile_adapter(f, base_model_name_or_path=EVIL, task_type=EVIL)),
    "an adapter's scale": ("inspect", lambda f: hostile_adapter(f, lora_alpha=EVIL)),
    "an adapter's kind": ("inspect", lambda f: hostile_adapter(f, peft_type=EVIL)),
    "an adapter's rank": ("inspect", lambda f: hostile_adapter(f, r=EVIL)),
    "an architecture": ("inspect", lambda f: hostile_checkpoint(f, {"architectures": [EVIL], "model_type": EVIL})),
    "a file name": ("inspect", lambda f: hostile_checkpoint(f, names=[f"{EVIL}.gguf", f"{EVIL}.txt"])),
    "weight files": ("inspect", hostile_names),
    "an index": ("inspect", hostile_index),
    "a tensor": ("inspect", hostile_tensor),
    "an origin": ("inspect", hostile_provenance),
    "a record of hashes": ("verify", hostile_provenance),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_nothing_that_was_downloaded_speaks_to_the_terminal(case: str, tmp_path: Path) -> None:
    """Names and strings of files are shown, not obeyed; on a terminal without styles nothing but text arrives."""
    command, build = HOSTILE[case]
    check_terminal([command, build(tmp_path / "m")])


def test_nor_does_the_name_of_a_folder(tmp_path: Path) -> None:
    """A file that is there, one that is not, and an output."""
    place = square_checkpoint(tmp_path / f"m{EVIL}", 1, 8)
    adapter = square_adapter(tmp_path / "adapter", 1, 8)
    check_terminal(["inspect", place])
    check_terminal(["inspect", f"{place}gone"])
    check_terminal(["merge", place, adapter, "-o", tmp_path / f"out{EVIL}"])


def check_terminal(arguments: Sequence[str | Path]) -> None:
    status, received = on_terminal(arguments, TERM="dumb")
    assert status in (0, 1)
    text = received.decode()
    assert "Traceback" not in text
    assert not set(text) & set("\x1b\x07\x08\x9b\u202e"), text


# Completion -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the command `surgery`, at the head of the path."""
    script = tmp_path / "bin" / "surgery"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m surgery "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    return script.parent


def script_for(shell: str, folder: Path) -> Path:
    found = run_cli("completion", shell)
    assert found.returncode == 0
    path = folder / f"completion.{shell}"
    path.write_text(found.stdout)
    return path


def shell(name: str, code: str) -> list[str]:
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    found = subprocess.run([name, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stderr == ""
    return found.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [("mer", "merge"), ("ins", "inspect"), ("merge --rev", "--reversible"), ("extract --method e", "exact")],
)
def test_bash_completes(words: str, expected: str, on_path: Path) -> None:
    """Commands, options, and the values of options; with the script that the command prints."""
    script = script_for("bash", on_path)
    given = ["surgery", *words.split()]
    code = (
        f"source {script}; COMP_WORDS=({' '.join(given)}); COMP_CWORD={len(given) - 1}; "
        "_surgery_completion surgery; echo ${COMPREPLY[@]}"
    )
    assert shell("bash", code) == [expected]


def test_fish_completes(on_path: Path) -> None:
    script = script_for("fish", on_path)
    assert "merge" in shell("fish", f"source {script}; complete -C 'surgery mer'")


def test_zsh_takes_the_script(on_path: Path) -> None:
    """It parses; what it calls is tested below."""
    script = script_for("zsh", on_path)
    assert shell("zsh", f"zsh -n {script} && echo fine") == ["fine"]


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_every_shell_is_answered(name: str, on_path: Path) -> None:
    """The script asks the command itself, by a variable; the answer names `merge`."""
    assert "_SURGERY_COMPLETE" in script_for(name, on_path).read_text()
    words = {"COMP_WORDS": "surgery mer", "COMP_CWORD": "mer" if name == "fish" else "1"}
    found = run_cli(env={"_SURGERY_COMPLETE": f"{name}_complete", **words})
    assert found.returncode == 0
    assert "merge" in found.stdout.replace(",", "\n").split()


@pytest.mark.parametrize(
    "words", ["surgery inspect ./b", "surgery merge base ./b", "surgery merge base adapter -o ./b"]
)
def test_paths_are_completed(words: str) -> None:
    """Most arguments are paths, and the shell knows how to complete those if it is told."""
    variables = {"_SURGERY_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    found = run_cli(env=variables)
    assert found.stdout.startswith("file,")


# Imports --------------------------------------------------------------------------------------------------------------

HEAVY = ("torch", "numpy", "rich", "safetensors", "huggingface_hub", "transformers", "peft", "accelerate", "blake3")


def imported_by(code: str) -> set[str]:
    """Top-level packages that a fresh interpreter has after running some code."""
    shown = "\nimport sys\nprint('MODULES', *sorted({name.partition('.')[0] for name in sys.modules}))"
    found = subprocess.run([sys.executable, "-c", code + shown], capture_output=True, text=True, check=True)
    return set(found.stdout.rpartition("MODULES")[2].split())


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["merge", "--help"], ["extract", "--help"], ["operate"]]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    """It must come as fast as Python itself and click."""
    found = imported_by(f"from surgery.cli.main import run\nrun({arguments!r})")
    assert "click" in found
    assert not found & set(HEAVY)


def test_importing_the_library_imports_nothing_heavy() -> None:
    found = imported_by("import surgery")
    assert not found & {*HEAVY, "click"}


def test_looking_at_a_checkpoint_needs_no_torch(inputs: Path) -> None:
    """Headers are JSON; neither are hashes checked with it."""
    for arguments in (["inspect", "base"], ["inspect", "adapter"], ["verify", "merged"]):
        command = [arguments[0], str(inputs / arguments[1]), "--json"]
        found = imported_by(f"from surgery.cli.main import run\nassert run({command!r}) == 0")
        assert not found & {"torch", "numpy", "transformers", "huggingface_hub"}


# The rest -------------------------------------------------------------------------------------------------------------


def test_the_version(capsys: Captured) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"surgery {surgery.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples(name: str, capsys: Captured) -> None:
    """A first line, arguments and options, and examples that begin as the command is called."""
    assert run([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"Usage: surgery {name} ")
    assert f"surgery {name} " in text.partition("Examples:")[2]
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    for parameter in command.params:
        assert isinstance(parameter, click.Argument) or getattr(parameter, "help", None), parameter.name


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("5 gb", 5 * 10**9),
        ("5G", 5 * 10**9),
        ("5GiB", 5 * 2**30),
        ("5gi", 5 * 2**30),
        ("1.5MB", 1_500_000),
        ("500kB", 500_000),
        ("2TB", 2 * 10**12),
        ("7B", 7),
        ("7", 7),
        (" 7 ", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert Size().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["5", "9999", "9kB", "9 KiB"])
def test_sizes_too_small_for_a_shard(text: str) -> None:
    """Who types 5 means 5GB; a file for each tensor is nobody's wish."""
    assert Size(least=10_000).convert("10kB", None, None) == 10_000
    with pytest.raises(click.BadParameter, match=f"'{text}' is .* bytes, expected at least 10000; write a unit, as in"):
        Size(least=10_000).convert(text, None, None)


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5 apples", "5GBB", "1e9", "5,5GB", "0x10"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a size such as 5GB, 500MB or 2GiB"):
        Size().convert(text, None, None)


@pytest.mark.parametrize(
    ("text", "count"), [("18M", 18_000_000), ("1.5B", 1_500_000_000), ("300k", 300_000), ("1_0", None), ("42", 42)]
)
def test_counts(text: str, count: int | None) -> None:
    if count is not None:
        assert Count().convert(text, None, None) == count
        return
    with pytest.raises(click.BadParameter, match="is not a number of parameters such as 18M"):
        Count().convert(text, None, None)
