"""Interrupted runs go on bit for bit, and what cannot go on says why."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from surgery.errors import OptionError, OutputError
from surgery.training import loop as loops
from surgery.training import state
from tests.surgery.training import making
from tests.tools import own_disk, start_cli, tree

# Dropout everywhere; the eleven batches of an epoch end with a short one, and steps of three passes cut it unevenly.
HOW: dict[str, Any] = {
    "steps": 7,
    "batch_size": 4,
    "gradient_accumulation": 3,
    "learning_rate": 2e-3,
    "warmup": 2,
    "eval_split": 5,
    "eval_every": 3,
    "save_every": 2,
    "seed": 5,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.checkpoint(tmp_path_factory.mktemp("base") / "model", "gpt2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.texts(tmp_path_factory.mktemp("data") / "texts.jsonl")


@pytest.fixture(scope="module")
def undisturbed(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    making.run(base, data, output, **HOW)
    return output


def figures(output: Path) -> list[dict[str, Any]]:
    """The log without what a clock or the machine says."""
    apart = ("tokens_per_second", "peak_memory")
    return [{name: value for name, value in line.items() if name not in apart} for line in making.log(output)]


def stop_after(passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C during the pass of that number, the first being 1."""
    real = loops.Loop._pass
    seen: list[None] = []

    def counted(self: Any, *arguments: Any) -> None:
        real(self, *arguments)
        seen.append(None)
        if len(seen) == passes:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(loops.Loop, "_pass", counted)


def interrupted(passes: int, base: Path, data: Path, output: Path, how: dict[str, Any]) -> None:
    """A run that is stopped in the pass of that number."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(passes, patch)
        with pytest.raises(KeyboardInterrupt):
            making.run(base, data, output, **how)
    assert not output.exists()


@pytest.mark.parametrize("passes", [1, 3, 11, 13, 18])
def test_a_run_goes_on_bit_for_bit(passes: int, base: Path, data: Path, undisturbed: Path, tmp_path: Path) -> None:
    """From within a step and from its end, within an epoch and at its end, with dropout: the same log and weights."""
    output = tmp_path / "out"
    interrupted(passes, base, data, output, HOW)
    position = json.loads((tmp_path / ".out.partial" / "state" / "latest.json").read_bytes())
    torch.randn(17)  # what happens between the two has no influence
    report = making.run(base, data, output, **HOW)
    assert report.resumed == position["step"]
    assert figures(output) == figures(undisturbed)
    assert tree(output)["model.safetensors"] == tree(undisturbed)["model.safetensors"]
    assert not (tmp_path / ".out.partial").exists()


def test_a_run_that_is_stopped_again_and_again(base: Path, data: Path, undisturbed: Path, tmp_path: Path) -> None:
    """After every second pass."""
    for _ in range(4):
        interrupted(4, base, data, tmp_path / "out", HOW)
    making.run(base, data, tmp_path / "out", **HOW)
    assert figures(tmp_path / "out") == figures(undisturbed)


def test_a_mixture_goes_on_bit_for_bit(data: Path, tmp_path: Path) -> None:
    """What its routers did in the passes before the interrupt is in the log, too."""
    base = making.checkpoint(tmp_path / "model", "mixtral", attention_dropout=0.1)
    how = {**HOW, "steps": 4, "eval_split": 0, "router_z_loss": 0.01}
    making.run(base, data, tmp_path / "whole", **how)
    interrupted(5, base, data, tmp_path / "out", how)
    making.run(base, data, tmp_path / "out", **how)
    assert figures(tmp_path / "out") == figures(tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_process_goes_on(base: Path, data: Path, tmp_path: Path) -> None:
    """From the last state that was saved, to the same end; with the threads it had, which are others here."""
    how = {"method": "full", "steps": 60, "batch_size": 4, "learning_rate": 1e-3, "save_every": 3}
    options = [word for name, value in how.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command: list[str | Path] = ["train", base, "--data", data, *options, "--device", "cpu", "-o", tmp_path / "out"]
    two_threads = {"OMP_NUM_THREADS": "2"}
    killed = start_cli(*command, "--quiet", env=two_threads)
    marker = tmp_path / ".out.partial" / "state" / "latest.json"
    deadline = time.monotonic() + 200
    while not marker.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert not (tmp_path / "out").exists()
    report = surgery.train(base, data=str(data), output=tmp_path / "out", device="cpu", **how)  # type: ignore[arg-type]  # likewise
    assert 3 <= report.resumed < 60
    assert torch.get_num_threads() == 1
    whole = [*command[:-1], tmp_path / "whole", "--quiet"]
    assert start_cli(*whole, env=two_threads).communicate() == ("", "")
    assert making.losses(tmp_path / "out") == making.losses(tmp_path / "whole")
    assert tree(tmp_path / "out")["model.safetensors"] == tree(tmp_path / "whole")["model.safetensors"]


def test_other_arguments_are_refused(base: Path, data: Path, tmp_path: Path) -> None:
    """The differences are named, and deleting the folder begins anew."""
    output = tmp_path / "out"
    interrupted(2, base, data, output, HOW)
    before = tree(tmp_path / ".out.partial")
    with pytest.raises(OptionError) as caught:
        making.run(base, data, output, **{**HOW, "steps": 9, "seed": 6})
    assert str(caught.value) == (
        f"An interrupted run lies in {tmp_path / '.out.partial'}, begun with other arguments: --seed was 5 and is 6; "
        "--steps was 7 and is 9; give the same ones to go on, or delete the folder to begin anew."
    )
    data = Path(shutil.copy(data, tmp_path / "other.jsonl"))
    with open(data, "a") as file:
        file.write('{"text": "one line more"}\n')
    with pytest.raises(OptionError, match=r"the data was '[0-9a-f]{64}' and is"):
        making.run(base, data, output, **HOW)
    assert tree(tmp_path / ".out.partial") == before
    shutil.rmtree(tmp_path / ".out.partial")
    assert making.run(base, data, output, **{**HOW, "steps": 1}).resumed == 0


def test_a_state_that_cannot_be_written_leaves_the_one_before(
    base: Path, data: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills up while saving: one sentence, and the last good state goes on."""
    real, calls = state._write, []

    def fails(path: Path, tensors: Any) -> None:
        calls.append(path)
        if len(calls) == 4:
            path.with_name(path.name + ".part").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(state, "_write", fails)
        with pytest.raises(OutputError) as caught:
            making.run(base, data, tmp_path / "out", **{**HOW, "keep": "last"})
    assert str(caught.value) == (
        f"The state of the run cannot be written to {tmp_path / '.out.partial' / 'state'}: the disk is full; "
        "the last good one is kept; free some space and run the same command again to go on."
    )
    assert making.run(base, data, tmp_path / "out", **{**HOW, "keep": "last"}).resumed == 2
    assert making.losses(tmp_path / "out") == making.losses(undisturbed)


def test_a_disk_that_is_really_full(base: Path, data: Path) -> None:
    """The sentence, too, where safetensors meets it first."""
    with own_disk(0.3) as place, pytest.raises(OutputError, match=r"cannot be written .*: the disk is full; "):
        making.run(base, data, place / "out", **HOW)


def test_a_full_staging_folder_of_another_command(base: Path, data: Path, tmp_path: Path) -> None:
    """What a merge left at the same target is no state to go on from."""
    (tmp_path / ".out.partial" / "files").mkdir(parents=True)
    (tmp_path / ".out.partial" / "files" / "half").write_bytes(b"x")
    report = surgery.train(base, data=data, output=tmp_path / "out", steps=1, device="cpu")
    assert report.resumed == 0
    assert "half" not in tree(tmp_path / "out")
