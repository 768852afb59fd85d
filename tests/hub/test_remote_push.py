"""push, pull, list, info, delete, login and whoami against a Hub: a small one on this machine, with the stock client.

The client's uploads go through LFS here (`HF_HUB_DISABLE_XET`), because a Hub with Xet is another matter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import surgery
from surgery.cli.main import run
from surgery.errors import InputError, IntegrityError, OutputError
from surgery.hub.endpoint import HUGGING_FACE, LOCAL, Endpoint, configured, endpoint_of, for_writing
from tests.hub.fake_hub import Cut, FakeHub, environment
from tests.hub.registry_tools import adapter
from tests.tools import Tripwire, run_cli, square_checkpoint, unequal

# The stock client's own, on its way through LFS.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def style(hub: FakeHub, here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An adapter to push; the stock client without Xet, logged in."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub.token = "secret"
    adapter(here / "style")
    return Path("style")


def test_the_endpoint_is_given_or_configured_or_local(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (for_writing(None), configured()) == (LOCAL, None)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.example.org/")
    assert for_writing(None) == configured() == Endpoint("http://hub.example.org")
    assert for_writing("local") == LOCAL
    assert for_writing("hf") == Endpoint(HUGGING_FACE)
    assert endpoint_of("https://x/") == Endpoint("https://x")
    assert (LOCAL.label, Endpoint("https://x").label) == ("the local registry", "https://x")


def test_what_is_pushed_comes_back(hub: FakeHub, style: Path, here: Path, own_registry: Path) -> None:
    """The repository is made, all files are in one commit, and the local registry has no part in it."""
    report = surgery.push(style, "lab/style", message="First\n\nbody", private=True)
    assert (report.endpoint, report.created, report.unchanged, report.stored_bytes) == (hub.url, True, False, None)
    repository = hub.repositories["lab/style"]
    assert repository.private
    assert repository.messages == ["initial commit", "First"]
    assert repository.refs["main"] == report.commit
    pulled = surgery.pull("lab/style", output="again")
    assert (pulled.endpoint, pulled.commit) == (hub.url, report.commit)
    assert unequal(style, here / "again") == ["README.md"]
    assert "surgery merge lab/base lab/style" in Path("again/README.md").read_text()
    assert not own_registry.exists()
    assert {r.authorization for r in hub.requests if "/lab/style" in r.path} == {"Bearer secret"}


def test_only_what_changed_is_sent(hub: FakeHub, style: Path) -> None:
    surgery.push(style, "lab/style")
    before = len(hub.requests)
    assert surgery.push(style, "lab/style").unchanged
    assert not [request for request in hub.requests[before:] if request.method in ("POST", "PUT")]
    (style / "notes.txt").write_text("more")
    report = surgery.push(style, "lab/style")
    assert [file.path for file in report.files if file.state != "same"] == ["notes.txt"]
    (style / "notes.txt").unlink()
    report = surgery.push(style, "lab/style")
    assert [(file.path, file.state) for file in report.files if file.state != "same"] == [("notes.txt", "removed")]
    sha = hub.repositories["lab/style"].refs["main"]
    assert "notes.txt" not in hub.repositories["lab/style"].commits[sha]


def test_a_branch_is_made(hub: FakeHub, style: Path) -> None:
    surgery.push(style, "lab/style")
    first = hub.repositories["lab/style"].refs["main"]
    (style / "notes.txt").write_text("more")
    report = surgery.push(style, "lab/style@v2")
    assert hub.repositories["lab/style"].refs == {"main": first, "v2": report.commit}
    surgery.pull("lab/style@v2", output="again")
    assert Path("again/notes.txt").read_text() == "more"


def test_a_name_alone_is_in_the_users_namespace(hub: FakeHub, style: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert surgery.push(style, "style").name == "ada/style"
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match=r"^You are not logged in to http://.*; log in with `surgery hub login`"):
        surgery.push(style, "style")


def test_a_card_on_the_hub_stays(hub: FakeHub, style: Path) -> None:
    """A person edited it there."""
    surgery.push(style, "lab/style")
    repository = hub.repositories["lab/style"]
    files = dict(repository.commits[repository.refs["main"]])
    files["README.md"] = b"# Mine\n\n" + files["README.md"].partition(b"---\n\n")[2]
    repository.commit(files)
    report = surgery.push(style, "lab/style")
    assert report.card == "section renewed"
    assert b"# Mine\n" in repository.commits[repository.refs["main"]]["README.md"]


def test_a_dry_run_sends_nothing(hub: FakeHub, style: Path) -> None:
    report = surgery.push(style, "lab/style", dry_run=True)
    assert (report.commit, report.created) == (None, False)
    assert hub.repositories == {}
    assert {request.method for request in hub.requests} == {"GET"}


def test_what_is_not_fit_is_not_sent(hub: FakeHub, style: Path) -> None:
    config = json.loads((style / "adapter_config.json").read_text()) | {"r": 5}
    (style / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="is not fit to be pushed"):
        surgery.push(style, "lab/style")
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (412, r"somebody else has committed meanwhile; run the same command again"),
        (403, r"you may not write there \(403\); log in with `surgery hub login`"),
        (422, r".+"),
    ],
)
def test_a_refused_commit_is_said_in_a_sentence(hub: FakeHub, style: Path, status: int, reason: str) -> None:
    hub.fault = lambda method, path: status if "/commit/" in path else None
    with pytest.raises(OutputError, match=rf"^style cannot be pushed to lab/style on {hub.url}: {reason}\.$"):
        surgery.push(style, "lab/style")


def test_a_hub_that_is_away_is_said_in_a_sentence(style: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(OutputError, match=r"^style cannot be pushed to lab/style on http://127\.0\.0\.1:9: .+\.$"):
        surgery.push(style, "lab/style", endpoint="http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"^http://127\.0\.0\.1:9 cannot be reached \(.+\)\.$"):
        surgery.pull("lab/style", output="again", endpoint="http://127.0.0.1:9")


# Pull -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def big(hub: FakeHub, here: Path) -> Path:
    """20 MB on the Hub."""
    square_checkpoint(here / "big", 10, 1024)
    hub.add("lab/big", here / "big")
    return here / "big"


def test_damage_on_the_way_is_found(hub: FakeHub, big: Path) -> None:
    """The Hub says one hash and sends other bytes."""
    repository = hub.repositories["lab/big"]
    sha = repository.refs["main"]
    good = repository.commits[sha]["model.safetensors"]
    hub.hashes[good[:-1] + b"!"] = good
    repository.commits[sha]["model.safetensors"] = good[:-1] + b"!"
    with pytest.raises(IntegrityError) as error:
        surgery.pull("lab/big", output="again")
    assert str(error.value) == (
        "model.safetensors of lab/big does not have the hash on record: it was damaged on the way, or where it is "
        "kept; nothing is written."
    )
    assert not Path("again").exists()


def test_a_small_file_is_proved_by_what_git_calls_it(hub: FakeHub, big: Path) -> None:
    repository = hub.repositories["lab/big"]
    sha = repository.refs["main"]
    good = repository.commits[sha]["config.json"]
    hub.hashes[b"{}"] = good
    repository.commits[sha]["config.json"] = b"{}".ljust(len(good))
    hub.hashes[b"{}".ljust(len(good))] = good
    with pytest.raises(IntegrityError, match=r"^config\.json of lab/big does not have the hash on record"):
        surgery.pull("lab/big", output="again")


def test_an_interrupted_pull_fetches_only_the_rest(hub: FakeHub, big: Path) -> None:
    """Within the file: blocks that are there are not asked for again."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        surgery.pull("lab/big", output="again", progress=Tripwire(18_000_000, interrupt))
    before = hub.served("model.safetensors")
    assert before > 16_000_000
    report = surgery.pull("lab/big", output="again")
    assert report.resumed == 1
    assert unequal(big, Path("again")) == []
    assert hub.served("model.safetensors") - before < 13_000_000


def test_a_line_that_breaks_is_mended(hub: FakeHub, big: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    faults: Iterator[int | Cut] = iter([Cut(1000), 503, Cut(0)])
    hub.fault = lambda method, path: next(faults, None) if path.endswith("model.safetensors") else None
    surgery.pull("lab/big", output="again")
    assert unequal(big, Path("again")) == []


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("lab/none", "There is no model called lab/none in the local registry, nor one on {url} that you may read."),
        ("lab/big@v9", "lab/big on {url} has no revision 'v9'."),
        ("lab/gated", "lab/gated is gated on {url}: ask for access there, then log in."),
    ],
)
def test_what_is_not_there_is_said_in_a_sentence(hub: FakeHub, big: Path, name: str, sentence: str) -> None:
    hub.add("lab/gated", big)
    hub.repositories["lab/gated"].gated = True
    with pytest.raises(InputError) as error:
        surgery.pull(name, output="again")
    assert str(error.value) == sentence.format(url=hub.url)


def test_hostile_names_of_files_are_refused(hub: FakeHub, big: Path, here: Path) -> None:
    repository = hub.repositories["lab/big"]
    repository.commits[repository.refs["main"]]["../evil"] = b"x"
    with pytest.raises(InputError, match=r"holds a file '\.\./evil', whose name leads out of its folder\.$"):
        surgery.pull("lab/big", output="again")
    assert not (here / "evil").exists()


def test_the_local_registry_comes_first(hub: FakeHub, style: Path) -> None:
    """Unless the endpoint says otherwise."""
    surgery.push(style, "lab/style", endpoint="local")
    (style / "notes.txt").write_text("on the Hub")
    surgery.push(style, "lab/style")
    assert surgery.pull("lab/style", output="one").endpoint == "local"
    assert surgery.pull("lab/style", output="two", endpoint=hub.url).endpoint == hub.url
    assert Path("two/notes.txt").exists()
    assert not Path("one/notes.txt").exists()


# The rest -------------------------------------------------------------------------------------------------------------


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run a command in this process: its status, and what it prints to stdout and stderr."""
    status = run(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_list_info_and_delete(hub: FakeHub, big: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The endpoint is in every report."""
    listed = json.loads(said(capsys, "hub", "list", "--json")[1])
    assert (listed["endpoint"], [item["name"] for item in listed["repositories"]]) == (hub.url, ["lab/big"])
    info = json.loads(said(capsys, "hub", "info", "lab/big", "--json")[1])
    assert info["commit"] == hub.repositories["lab/big"].refs["main"]
    assert info["branches"] == hub.repositories["lab/big"].refs
    assert {file["path"] for file in info["files"]} == {"config.json", "model.safetensors"}
    assert "model.safetensors" in said(capsys, "hub", "info", "lab/big")[1]
    assert said(capsys, "hub", "delete", "lab/big", "--yes") == (0, f"lab/big is deleted from {hub.url}.\n", "")
    again = said(capsys, "hub", "delete", "lab/big", "--yes")
    assert again == (1, "", f"Error: There is no model called lab/big on {hub.url} that you may delete.\n")


def test_login_and_whoami(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token lies where huggingface_hub keeps it, and nowhere in what is printed."""
    hub.token = "hf_right"
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert said(capsys, "hub", "whoami") == (0, f"You are not logged in to {hub.url}.\n", "")
    status, out, err = said(capsys, "hub", "login", "--token", "hf_wrong")
    assert (status, out) == (1, "")
    assert err.startswith(f"Error: {hub.url} does not take this token: ")
    assert "hf_wrong" not in err
    status, out, err = said(capsys, "hub", "login", "--token", "hf_right")
    assert (status, out) == (0, f"You are ada on {hub.url}, in lab.\n"), err
    assert (tmp_path / "hf-home" / "token").read_text() == "hf_right"
    found = json.loads(said(capsys, "hub", "whoami", "--json")[1])
    assert found == {"endpoint": hub.url, "name": "ada", "organisations": ["lab"]}
    status, out, err = said(capsys, "hub", "whoami", "--endpoint", "local")
    assert (status, err) == (2, "Error: The local registry has no users; --endpoint is 'hf' or an address here.\n")


def test_the_commands_reach_a_hub_from_a_process_of_their_own(hub: FakeHub, style: Path, tmp_path: Path) -> None:
    """With nothing but the environment to tell them where; what is printed says where it went."""
    variables = environment(hub, tmp_path / "home") | {"HF_HUB_DISABLE_XET": "1"}
    done = run_cli("push", "style", "lab/style", "--quiet", "--json", env=variables)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["commit"] == hub.repositories["lab/style"].refs["main"]
