"""push and pull between a folder and the local registry: what is refused, what is kept, what comes back."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import (
    FormatError,
    InputError,
    IntegrityError,
    NonFiniteError,
    OptionError,
    OutputError,
)
from surgery.hub.parcel import is_lfs
from surgery.hub.store import existing_registry, open_registry
from tests.hub.registry_tools import adapter, assert_sound, contents
from tests.models import make, perturb, save
from tests.tools import (
    Tripwire,
    own_disk,
    read_json,
    run_cli,
    square_adapter,
    square_checkpoint,
    start_cli,
    tree,
    unequal,
)

# There and back -------------------------------------------------------------------------------------------------------


def test_what_is_pushed_comes_back(base: Path, style: Path, here: Path) -> None:
    """Every file, to the byte, but for the section in the card; the folder itself is not touched."""
    (style / "nested").mkdir()
    (style / "nested" / "notes.txt").write_text("kept")
    (style / ".hidden").write_text("not pushed")
    before = tree(style)
    report = surgery.push(style, "lab/style")
    assert (report.created, report.unchanged, report.card, report.endpoint) == (True, False, "written", "local")
    assert report.stored_bytes == report.nbytes
    assert tree(style) == before
    pulled = surgery.pull("lab/style", output="again")
    assert unequal(style, here / "again") == [".hidden", "README.md"]
    assert pulled.commit == report.commit
    assert set(pulled.files) == {file.path for file in report.files}
    again = surgery.push(style, "lab/style")
    assert (again.created, again.unchanged, again.stored_bytes, again.commit) == (False, True, 0, report.commit)
    assert {file.state for file in again.files} == {"same"}


def test_a_pulled_folder_pushed_again_changes_nothing(style: Path) -> None:
    first = surgery.push(style, "lab/style")
    surgery.pull("lab/style", output="again")
    again = surgery.push("again", "lab/style")
    assert (again.unchanged, again.commit) == (True, first.commit)


def test_a_file_pushed_twice_is_stored_once(base: Path, here: Path) -> None:
    """Under another name, in another repository: only the card, which has the name in it, is new."""
    surgery.push(base, "lab/one")
    shutil.copytree(base, here / "copy")
    (here / "copy" / "extra.txt").write_text("new")
    report = surgery.push("copy", "lab/two")
    card = next(file.size for file in report.files if file.path == "README.md")
    assert report.stored_bytes == card + len("new")


def test_a_new_file_of_an_old_length_is_stored_too(base: Path) -> None:
    """Length alone decides nothing."""
    surgery.push(base, "lab/base")
    (base / "config.json").write_text('{"model_type": "circles"}')
    report = surgery.push(base, "lab/base")
    assert [file.path for file in report.files if file.state == "changed"] == ["README.md", "config.json"]
    surgery.pull("lab/base", output="again")
    assert (base / "config.json").read_bytes() == Path("again/config.json").read_bytes()


def test_branches_and_commits_can_be_pulled(style: Path) -> None:
    first = surgery.push(style, "lab/style", message="First\n\nand a body")
    (style / "notes.txt").write_text("more")
    second = surgery.push(style, "lab/style@v2")
    surgery.push(style, "lab/style")
    assert first.commit
    assert second.branch == "v2"
    surgery.pull(f"lab/style@{first.commit[:10]}", output="first")
    assert not Path("first/notes.txt").exists()
    surgery.pull("lab/style@v2", output="second")
    assert Path("second/notes.txt").read_text() == "more"
    report = run_cli("hub", "info", "lab/style", "--json")
    info = json.loads(report.stdout)
    assert set(info["branches"]) == {"main", "v2"}
    assert [commit["message"] for commit in info["commits"]] == ["Push adapter", "First\n\nand a body"]


def test_a_file_that_is_gone_is_removed_from_the_commit(style: Path) -> None:
    (style / "old.txt").write_text("old")
    surgery.push(style, "lab/style")
    (style / "old.txt").unlink()
    report = surgery.push(style, "lab/style")
    assert {file.path: file.state for file in report.files}["old.txt"] == "removed"
    surgery.pull("lab/style", output="again")
    assert not Path("again/old.txt").exists()


def test_an_undo_record_travels_along(here: Path) -> None:
    """A reversible merge is still reversible from the registry, and after a pull; its provenance still holds."""
    model = make("llama")
    save(model, here / "base", torch.bfloat16)
    save(perturb(model, rank=2, scale=0.3), here / "tuned", torch.bfloat16)
    surgery.extract("base", "tuned", output="adapter", rank=2, device="cpu")
    surgery.merge("base", "adapter", output="merged", reversible=True)
    surgery.push("merged", "lab/merged")
    surgery.pull("lab/merged", output="again")
    for source in ("lab/merged", "again"):
        surgery.subtract(source, output=f"restored-{source[:3]}")
        assert unequal(here / "base", here / f"restored-{source[:3]}") == ["README.md", "surgery.json"]
        report = surgery.verify(source)
        assert report.passed, report.as_dict()["problems"]


@pytest.mark.parametrize("by", ["lab/base", "LAB/Base@main", "alone"])
def test_ids_of_the_registry_stand_for_folders(base: Path, here: Path, by: str) -> None:
    """Merging from the registry gives the bytes of merging from disk; nothing is copied out first."""
    adapter(here / "style", by)
    surgery.push(base, by.partition("@")[0])
    surgery.push("style", "lab/style")
    surgery.merge(by, "lab/style=0.5", output="registry")
    surgery.merge("base", ("style", 0.5), output="disk")
    assert set(unequal(here / "registry", here / "disk")) == {"README.md", "surgery.json"}
    inputs = read_json(here / "registry" / "surgery.json")["inputs"]
    assert [item["source"].lower() for item in inputs] == [by.lower().partition("@")[0], "lab/style"]
    assert all(len(item["revision"]) == 40 for item in inputs)
    assert surgery.inspect(by).as_dict()["parts"] == surgery.inspect("base").as_dict()["parts"]


def test_the_registry_comes_before_the_hub_and_after_a_folder(base: Path, here: Path) -> None:
    """No network is at hand in these tests: what is in the registry needs none."""
    surgery.push(base, "lab/base")
    assert surgery.inspect("lab/base").as_dict()["label"] == "lab/base"
    square_checkpoint(here / "lab" / "base", 1, 8)
    assert surgery.inspect("lab/base").total.tensors == 1
    with pytest.raises(InputError, match=r"^lab/base in the registry at .* has no revision 'v7'\.$"):
        surgery.inspect("lab/base@v7")
    with pytest.raises(InputError, match=r"^nowhere does not exist\.$"):
        surgery.inspect("nowhere")


# The card -------------------------------------------------------------------------------------------------------------


def test_the_card_says_what_it_is_and_how_to_load_it(here: Path) -> None:
    """Base, method, rank, targets, error, and a way for each of the three consumers."""
    model = make("llama")
    save(model, here / "base", torch.bfloat16)
    save(perturb(model, rank=40, scale=0.3), here / "tuned", torch.bfloat16)
    report = surgery.extract("base", "tuned", output="adapter", rank=20, device="cpu", base_name="lab/base")
    push = surgery.push("adapter", "lab/style")
    assert push.card == "section renewed"
    surgery.pull("lab/style", output="again")
    card = Path("again/README.md").read_text()
    for expected in (
        "base_model: lab/base\n", "library_name: peft\n", "| base | lab/base |", "| method | lora |",
        "| rank | 16 to 20 |", "`q_proj`", f"| {report.error:.3%} |", 'from_pretrained(model, "lab/style")',
        'load_adapter("lab/style")', "vllm serve lab/base --enable-lora --max-lora-rank 32 --lora-modules adapter=",
        "surgery pull lab/style -o DIR",
    ):  # fmt: skip
        assert expected in card, expected
    assert card.count("<!-- surgery: begin -->") == 1


def test_what_a_person_wrote_stays(style: Path) -> None:
    """In the folder's card, and in the registry's where the folder has none."""
    (style / "README.md").write_text("---\nlicense: mit\n---\r\n\r\n# Mine\r\n")
    assert surgery.push(style, "lab/style").card == "section added"
    surgery.pull("lab/style", output="one")
    card = Path("one/README.md").read_bytes().decode()
    assert card.startswith("---\nlicense: mit\nbase_model: lab/base\n")
    assert "\r\n# Mine" in card
    (style / "README.md").unlink()
    report = surgery.push(style, "lab/style")
    assert (report.unchanged, report.card) == (True, "kept")


def test_a_card_that_is_no_text_is_left_alone(style: Path) -> None:
    (style / "README.md").write_bytes(b"\xff\xfe")
    assert surgery.push(style, "lab/style").card == "kept"
    surgery.pull("lab/style", output="one")
    assert Path("one/README.md").read_bytes() == b"\xff\xfe"


def test_a_hostile_config_cannot_write_into_the_card(style: Path) -> None:
    """Names from a config are cells and words, not Markdown, HTML or shell."""
    hostile = "x` | <script>\n## y $(rm)"
    config = read_json(style / "adapter_config.json") | {"base_model_name_or_path": hostile}
    (style / "adapter_config.json").write_text(json.dumps(config))
    surgery.push(style, "lab/style")
    surgery.pull("lab/style", output="one")
    card = Path("one/README.md").read_text()
    assert "<script>" not in card.partition("## How")[0]
    assert "\n## y" not in card
    assert "vllm serve 'x" in card
    assert "base_model:" not in card


# What is refused ------------------------------------------------------------------------------------------------------


def test_nan_is_refused_and_leaves_nothing(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["m.1.weight"][3, 3] = torch.nan
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    for dry in (True, False):
        with pytest.raises(NonFiniteError) as error:
            surgery.push(base, "lab/base", dry_run=dry)
        assert str(error.value) == (
            "base is not fit to be pushed: 1 of its tensors, 'm.1.weight' first, hold NaN or infinity; "
            "--allow-nonfinite lets them pass."
        )
    registry = open_registry()
    assert contents(registry) == set()
    assert list(registry.metadata.repositories()) == []
    surgery.push(base, "lab/base", allow_nonfinite=True)


def test_all_problems_are_named_at_once(style: Path) -> None:
    config = read_json(style / "adapter_config.json") | {"base_model_name_or_path": "", "r": 3}
    (style / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as error:
        surgery.push(style, "lab/style")
    assert str(error.value) == "style is not fit to be pushed, for 3 reasons:"
    assert len(error.value.problems) == 3


def test_weights_that_are_not_what_provenance_says_are_refused(base: Path, style: Path) -> None:
    """A bit that flipped after the merge."""
    surgery.merge("base", "style", output="merged")
    data = bytearray(Path("merged/model.safetensors").read_bytes())
    data[-1] ^= 1
    Path("merged/model.safetensors").write_bytes(data)
    with pytest.raises(
        IntegrityError, match=r"^merged: tensor 'm\.\d\.weight' does not have the hash that surgery\.json"
    ):
        surgery.push("merged", "lab/merged")


def test_a_truncated_file_is_refused(base: Path) -> None:
    data = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(data[:-10])
    with pytest.raises(FormatError, match="it was cut short, fetch it again"):
        surgery.push(base, "lab/base")


def test_a_folder_without_weights_is_refused(here: Path) -> None:
    (here / "empty").mkdir()
    with pytest.raises(InputError, match=r"^empty holds no weights"):
        surgery.push("empty", "lab/empty")
    with pytest.raises(InputError, match=r"^nothing is not a folder\.$"):
        surgery.push("nothing", "lab/empty")


def test_links_out_of_the_folder_are_refused(style: Path, here: Path) -> None:
    (here / "secret").write_text("secret")
    (style / "notes.txt").symlink_to(here / "secret")
    with pytest.raises(
        InputError, match=r"^style/notes\.txt is a link out of the folder, or no file; copy the file here\.$"
    ):
        surgery.push(style, "lab/style")
    (style / "notes.txt").unlink()
    (style / "more").symlink_to(here)
    with pytest.raises(
        InputError, match=r"^style/more is a link to a folder; copy that folder here, or leave it out\.$"
    ):
        surgery.push(style, "lab/style")


def test_a_file_name_that_no_repository_may_hold_is_refused(style: Path) -> None:
    (style / "back\\slash").write_text("")
    with pytest.raises(InputError, match=r"whose name holds a backslash or an unprintable character\.$"):
        surgery.push(style, "lab/style")


@pytest.mark.parametrize("name", ["../x", "a/b/c", "lab/x@..", "", "lab/x@" + "0" * 40])
def test_a_hostile_name_is_refused(style: Path, name: str) -> None:
    with pytest.raises(OptionError):
        surgery.push(style, name)
    assert existing_registry() is None


def test_an_endpoint_is_an_address(style: Path) -> None:
    with pytest.raises(OptionError, match=r"^--endpoint is 'ftp://x', expected 'local', 'hf', or an address"):
        surgery.push(style, "lab/style", endpoint="ftp://x")


def test_a_file_that_changes_meanwhile_is_refused(base: Path) -> None:
    """A commit holds what one state of the folder held."""
    path = base / "model.safetensors"
    before = path.stat()

    def change() -> None:
        path.write_bytes(path.read_bytes())

    with pytest.raises(InputError, match=r"was changed while it was being read; run the command again\.$"):
        surgery.push(base, "lab/base", progress=Tripwire(0, change))
    assert before.st_size == path.stat().st_size


def test_a_disk_that_is_too_small_is_said_before_the_work(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with own_disk(0.3) as disk:
        monkeypatch.setenv("SURGERY_REGISTRY", str(disk / "registry"))
        big = square_checkpoint(here / "big", 4, 512)
        with pytest.raises(
            OutputError, match=r"needs 2,\d+,\d+ bytes for .*big but its disk has \d+,\d+ free; free some"
        ):
            surgery.push(big, "lab/big")
        monkeypatch.setattr("surgery.hub.push.free_bytes", lambda place: 10**12)
        with pytest.raises(OutputError, match=r"^The disk is full: nothing was added to the registry"):
            surgery.push(big, "lab/big")
        with open_registry() as registry:
            assert contents(registry) == set()


# Dry runs and output --------------------------------------------------------------------------------------------------


def test_a_dry_run_writes_nothing(style: Path, own_registry: Path) -> None:
    report = surgery.push(style, "lab/style", dry_run=True)
    assert (report.commit, report.dry_run, report.card) == (None, True, "written")
    assert {file.state for file in report.files} == {"added"}
    assert not own_registry.exists()
    surgery.push(style, "lab/style")
    pull = surgery.pull("lab/style", output="again", dry_run=True)
    assert pull.nbytes == report.nbytes
    assert not Path("again").exists()
    assert not list(Path().glob(".*.partial"))


def test_the_commands_say_what_they_did(style: Path, here: Path) -> None:
    """One JSON object on stdout; the endpoint is in it, and in what is printed for people."""
    done = run_cli("push", "style", "lab/style", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["endpoint"] == "local"
    assert report["facts"]["ranks"] == [4]
    done = run_cli("hub", "pull", "lab/style", "-o", "again")
    assert "pulled  lab/style from the local registry" in done.stdout
    done = run_cli("hub", "list", "--json")
    (listed,) = json.loads(done.stdout)["repositories"]
    assert (listed["name"], listed["kind"], listed["base"], listed["ranks"]) == (
        "lab/style",
        "adapter",
        "lab/base",
        [4],
    )
    done = run_cli("hub", "delete", "lab/style")
    assert (done.returncode, done.stdout) == (2, "")
    assert "pass --yes" in done.stderr
    done = run_cli("hub", "delete", "lab/style", "--yes")
    assert done.stdout.startswith("lab/style is deleted from the local registry; ")
    done = run_cli("hub", "list")
    assert done.stdout == "There is nothing in the local registry.\n"
    done = run_cli("hub", "info", "lab/style", "--endpoint", "local")
    assert (done.returncode, done.stderr) == (
        1,
        "Error: There is no model called lab/style in the local registry; `surgery hub list` shows what is.\n",
    )


def test_info_knows_what_was_made_of_a_base(base: Path, style: Path) -> None:
    surgery.push(base, "lab/base")
    surgery.push(style, "lab/style")
    surgery.merge("lab/base", "lab/style", output="merged")
    surgery.push("merged", "lab/merged")
    report = json.loads(run_cli("hub", "info", "lab/base", "--json").stdout)
    assert report["derived"] == ["lab/merged", "lab/style"]


def test_weights_of_a_base_are_those_that_its_adapter_has_on_record(here: Path) -> None:
    """The one hash by which a registry finds the base of an adapter."""
    model = make("llama")
    save(model, here / "base", torch.bfloat16)
    save(perturb(model, rank=2, scale=0.3), here / "tuned", torch.bfloat16)
    surgery.extract("base", "tuned", output="adapter", rank=2, device="cpu")
    assert surgery.push("base", "lab/base").facts["weights"] == surgery.push("adapter", "lab/a").facts["base_weights"]


def test_weights_and_large_files_go_to_lfs() -> None:
    """As the Hub has it, so that a server can speak of them so."""
    assert is_lfs("model.safetensors", 10)
    assert is_lfs("tokenizer.json", 10_000_001)
    assert not is_lfs("tokenizer.json", 10_000_000)
    assert not is_lfs("model.safetensors.index.json", 10)


def test_an_adapter_of_squares_without_a_base_is_refused(here: Path) -> None:
    square_adapter(here / "bare", 1, 8)
    with pytest.raises(InputError, match=r"^bare is not fit to be pushed: adapter_config\.json does not name the base"):
        surgery.push("bare", "lab/bare")


@pytest.mark.slow
def test_kill_at_any_moment_of_a_push_leaves_a_sound_registry(here: Path) -> None:
    for number, delay in enumerate((0.0, 0.05, 0.1, 0.2, 0.3)):
        folder = square_checkpoint(here / f"big{number}", 10, 1024)
        (folder / "number").write_text(str(number))
        process = start_cli("push", folder, "lab/big", "--quiet")
        while not (here / ".registry" / "incoming").exists() and process.poll() is None:
            time.sleep(0.001)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert_sound(open_registry())
    surgery.push(here / "big4", "lab/big")
    registry = open_registry()
    assert assert_sound(registry)
    assert not list(registry.root.glob("incoming/*"))
