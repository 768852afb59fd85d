"""`make demo`, in its quick form: the story holds together, and the table says what it is there to say."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.examples.conftest import EXAMPLES


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the demo prints the second time it runs in the same folder."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--quick", "--folder", str(folder)]
    printed = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(2)]
    assert _rows(printed[0]) == _rows(printed[1])
    return printed[1]


def _rows(shown: str) -> dict[str, float]:
    """Nats per token of every row of the last table."""
    table = shown.rpartition("held-out pages of the manual")[2]
    found = re.findall(r"^(\S.*?) +[\d,]+ +(?:[\d.]+% +)?(\d+\.\d{3}) ", table, re.MULTILINE)
    return {label: float(loss) for label, loss in found}


@pytest.mark.slow
def test_the_loss_goes_from_base_to_tuned_as_the_rank_grows(shown: str) -> None:
    loss = _rows(shown)
    falling = [loss[name] for name in ("base", "base + rank 1", "base + rank 4", "base + rank 16", "tuned")]
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] < falling[0] - 0.3
    assert falling[-2] - falling[-1] < 0.25 * (falling[0] - falling[-1])


@pytest.mark.slow
def test_a_merged_adapter_is_as_good_as_one_beside_the_base(shown: str) -> None:
    loss = _rows(shown)
    assert loss["rank 16 merged, in bfloat16"] == pytest.approx(loss["base + rank 16"], abs=0.01)


@pytest.mark.slow
def test_what_was_pulled_is_what_was_pushed(shown: str) -> None:
    loss = _rows(shown)
    assert loss["base + rank 16, pulled"] == loss["base + rank 16"]
    assert loss["base + rank 16 resized to 4"] == pytest.approx(loss["base + rank 4"], abs=0.01)


@pytest.mark.slow
def test_the_server_hands_out_what_the_folder_holds(shown: str) -> None:
    """The losses of what was pulled are those of the table, from the folder and through the server."""
    found = re.findall(r"^from-(\w+): adapter (\d+\.\d{3}) .*, mixture (\d+\.\d{3}) ", shown, re.MULTILINE)
    assert [place for place, *_ in found] == ["registry", "server"]
    assert found[0][1:] == found[1][1:]
    assert float(found[0][1]) == _rows(shown)["base + rank 16"]
    assert shown.count("Uploaded") == shown.count("Downloaded") == 2


@pytest.mark.slow
def test_the_fine_tune_comes_back_whole(shown: str) -> None:
    assert "tuned and tuned-again are the same in all" in shown
    found = re.search(r"^tuned: ([\d,]+) bytes\. exact, from which it came back: ([\d,]+) bytes", shown, re.MULTILINE)
    assert found is not None
    whole, kept = (int(count.replace(",", "")) for count in found.groups())
    assert kept < whole


@pytest.mark.slow
def test_the_restored_file_is_the_base_to_the_byte(shown: str) -> None:
    digests = {name: digest for digest, name in re.findall(r"sha256 (\w{64})  (\w+)/", shown)}
    assert digests["restored"] == digests["base"] != digests["merged"]
    assert "restored and base are the same in all" in shown


@pytest.mark.slow
def test_every_command_is_shown_before_what_it_prints(shown: str) -> None:
    commands = re.findall(r"^\$ surgery (\w+)", shown, re.MULTILINE)
    assert commands == [
        *["extract"] * 5, "merge", "verify", "subtract", "verify", "extract", "inspect", "restore", "verify",
        "combine", "resize", "lint", "push", "hub", "pull", "upcycle", "dense", "verify",
        "train", "train", "eval", "eval", "push", "pull", "pull", "hub",
    ]  # fmt: skip
    assert shown.index("$ surgery subtract merged") < shown.index("exactly, proved by the base's hashes")
