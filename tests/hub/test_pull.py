"""pull from the local registry: every byte proved, interrupted pulls resumed, and the base told by its hashes."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

import surgery
from surgery.errors import IntegrityError, MismatchError, OptionError, OutputError
from surgery.hub.naming import parse_repository
from surgery.hub.store import open_registry
from tests.hub.registry_tools import assert_sound
from tests.models import make, perturb, save
from tests.tools import Tripwire, square_checkpoint, start_cli, unequal


def flip(name: str, path: str) -> None:
    """Flip a bit of a file's content in the registry."""
    registry = open_registry()
    entry = next(entry for entry in registry.find(parse_repository(name)).files if entry.path == path)
    blob = registry.content.path(entry.sha256)
    assert blob is not None
    blob.chmod(0o644)
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)


def test_a_flipped_bit_is_found(base: Path) -> None:
    surgery.push(base, "lab/base")
    flip("lab/base", "model.safetensors")
    with pytest.raises(IntegrityError) as error:
        surgery.pull("lab/base", output="again")
    assert str(error.value) == (
        "model.safetensors of lab/base does not have the hash on record: it was damaged on the way, or where it is "
        "kept; nothing is written."
    )
    assert not Path("again").exists()
    assert not list(Path().glob(".*.partial"))


def test_lost_content_is_found(base: Path) -> None:
    surgery.push(base, "lab/base")
    registry = open_registry()
    entry = next(e for e in registry.find(parse_repository("lab/base")).files if e.path == "config.json")
    registry.content.remove(entry.sha256)
    with pytest.raises(IntegrityError, match=r"has lost the content of config\.json of lab/base; push it again"):
        surgery.pull("lab/base", output="again")
    assert surgery.push(base, "lab/base").stored_bytes == entry.size
    surgery.pull("lab/base", output="again")


@pytest.mark.parametrize("limit", [0, 2_000_000, 5_000_000, 8_000_000, 11_500_000])
def test_an_interrupted_pull_goes_on(here: Path, limit: int) -> None:
    """Finished files are not read again, and of the one that was under way only the rest is."""
    big = square_checkpoint(here / "big", 6, 1024)
    (big / "another.safetensors.txt").write_bytes(bytes(3_000_000))
    surgery.push(big, "lab/big")

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        surgery.pull("lab/big", output="again", progress=Tripwire(limit, interrupt))
    assert not Path("again").exists()
    report = surgery.pull("lab/big", output="again")
    assert unequal(big, here / "again") == ["README.md"]
    # In order: README.md, the text, config.json, the weights.
    assert report.resumed == (0 if not limit else 1 if limit < 3_000_000 else 3)


def test_what_an_interrupted_pull_left_is_not_trusted(here: Path) -> None:
    """Other bytes in the place of those fetched are found by the hash, and fetched anew."""
    big = square_checkpoint(here / "big", 6, 1024)
    surgery.push(big, "lab/big")

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        surgery.pull("lab/big", output="again", progress=Tripwire(8_000_000, interrupt))
    partial = Path(".again.partial/files/model.safetensors")
    size = partial.stat().st_size
    assert size
    partial.write_bytes(bytes(size))
    surgery.pull("lab/big", output="again")
    assert unequal(big, here / "again") == ["README.md"]


@pytest.mark.slow
def test_kill_at_any_moment_of_a_pull_leaves_nothing_at_the_target(here: Path) -> None:
    big = square_checkpoint(here / "big", 10, 2048)
    surgery.push(big, "lab/big")
    killed = 0
    for delay in (0.0, 0.02, 0.05, 0.1):
        process = start_cli("pull", "lab/big", "-o", here / "again", "--quiet")
        while not Path(".again.partial").exists() and process.poll() is None:
            time.sleep(0.001)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        if Path("again").exists():
            assert unequal(big, here / "again") == ["README.md"]
            shutil.rmtree("again")
    surgery.pull("lab/big", output="again")
    assert unequal(big, here / "again") == ["README.md"]
    assert killed


def test_a_target_that_is_there_is_left_alone(style: Path, here: Path) -> None:
    surgery.push(style, "lab/style")
    with pytest.raises(OutputError, match=r"^The output style exists already; pass --overwrite to replace it\.$"):
        surgery.pull("lab/style", output="style")
    (style / "more.txt").write_text("")
    surgery.pull("lab/style", output="style", overwrite=True)
    assert not (style / "more.txt").exists()


def test_a_pulled_folder_may_be_written_to(base: Path) -> None:
    """The registry's read-only files are copied, not linked."""
    surgery.push(base, "lab/base")
    surgery.pull("lab/base", output="again")
    with open("again/model.safetensors", "r+b") as file:
        file.write(b"x")
    assert_sound(open_registry())


@pytest.fixture
def family(here: Path) -> Path:
    """A base, an adapter extracted from a fine-tune of it and pushed, and another base."""
    model = make("llama")
    save(model, here / "base", torch.bfloat16)
    save(perturb(model, rank=2, scale=0.3), here / "tuned", torch.bfloat16)
    save(make("llama", seed=5), here / "other", torch.bfloat16)
    surgery.extract("base", "tuned", output="adapter", rank=2, device="cpu")
    surgery.push("adapter", "lab/style")
    return here


def test_the_base_is_proved(family: Path) -> None:
    surgery.push("base", "lab/base")
    for base in ("base", "lab/base"):
        report = surgery.pull("lab/style", output=f"with-{base[:3]}", check_base=base)
        assert report.base is not None
        assert (report.base.proved, report.base.equal, report.base.label) == (True, 14, base)


def test_another_base_is_refused(family: Path) -> None:
    with pytest.raises(MismatchError) as error:
        surgery.pull("lab/style", output="again", check_base="other")
    assert str(error.value) == (
        "lab/style does not belong to other: 14 of the tensors that it changes, 'model.layers.0.mlp.down_proj.weight' "
        "first, are not those of its base base."
    )
    assert not Path("again").exists()


def test_an_adapter_without_a_record_is_not_proved(family: Path, here: Path) -> None:
    (here / "adapter" / "surgery.json").unlink()
    surgery.push("adapter", "lab/bare")
    with pytest.raises(MismatchError) as error:
        surgery.pull("lab/bare", output="again", check_base="base")
    assert str(error.value) == (
        "Nobody can tell whether lab/bare belongs to base: its surgery.json has no hash on record for 14 of the "
        "tensors that it changes."
    )
    surgery.push("base", "lab/base")
    with pytest.raises(OptionError, match=r"^--check-base is for adapters, and lab/base is none\.$"):
        surgery.pull("lab/base", output="again", check_base="base")
