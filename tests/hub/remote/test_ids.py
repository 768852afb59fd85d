"""Every command that takes a CHECKPOINT or an ADAPTER takes an id on a served Hub, and makes the same of it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import surgery
from surgery.cli.main import COMMANDS, run
from surgery.errors import InputError
from tests.hub import fake_hub
from tests.hub.server.serving import Server, serving
from tests.models import perturb
from tests.surgery.training import making
from tests.tools import tree

# What takes neither, or only names of a registry.
OTHERS = {"push", "hub", "verdicts", "completion"}
CASES = {
    "inspect": ["inspect lab/base", "inspect lab/style", "inspect lab/exact", "inspect lab/merged"],
    "lint": ["lint lab/style --base lab/base", "lint lab/moe"],
    "verify": ["verify lab/merged", "verify lab/style", "verify lab/base lab/tuned --logits"],
    "extract": [
        "extract lab/base lab/tuned -o out --rank 4 --base-name base",
        "extract lab/base lab/tuned -o out --energy 0.5 --base-name base --no-hash",
        "extract lab/base lab/tuned -o out --rank 2 --base-name base --exact",
    ],
    "restore": ["restore lab/base lab/exact -o out"],
    "merge": [
        "merge lab/base lab/style=0.5 lab/other -o out",
        "merge lab/base lab/style -o out --reversible",
        "merge lab/base lab/style -o out --shard-size 100KB --no-hash",
        "merge lab/base lab/style -o out --dry-run",
    ],
    "subtract": ["subtract lab/merged -o out", "subtract lab/merged lab/style -o out"],
    "switch": ["switch lab/merged lab/style lab/other -o out"],
    "convert": ["convert lab/style --to peft --portable --base lab/base -o out", "convert lab/style --to mlx -o out"],
    "combine": ["combine lab/style lab/other=0.5 -o out", "combine lab/style lab/other -o out --method ties --rank 2"],
    "resize": ["resize lab/style --rank 2 -o out"],
    "upcycle": [
        "upcycle lab/base --experts 4 -o out --verify",
        "upcycle lab/base --experts 2 -o out --init adapters:lab/style,lab/other --no-verify",
        "upcycle lab/base --experts 2 -o out --init from:lab/base,lab/tuned --no-verify",
    ],
    "dense": ["dense lab/moe -o out"],
    "estimate": ["estimate lab/base --method full"],
    "analyze": ["analyze lab/base lab/style", "analyze lab/base"],
    "eval": ["eval lab/base --data {data} --adapters lab/style,lab/other=0.5 --against lab/tuned --device cpu"],
    "train": [
        "train lab/base --data {data} --steps 2 --device cpu -o out --method full",
        "train lab/style --base lab/base --data {data} --steps 2 --device cpu -o out",
    ],
    "pull": ["pull lab/style -o out --check-base lab/base"],
}
# What a report says of the run, of this disk, and of time; and what is known of an id only.
PASSING = {
    "fetched", "plan", "seconds", "free_disk_bytes", "throughput", "tokens_per_second", "examples_per_second",
    "endpoint", "resumed", "peak_memory", "record_bytes", "ratio", "revision",
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`lab/base`, its fine-tune, adapters of several kinds, a reversible merge and a mixture."""
    root = tmp_path_factory.mktemp("made")
    lab = root / "lab"
    model = making.model("llama")
    making.checkpoint(lab / "base", made=model)
    making.checkpoint(lab / "tuned", made=perturb(model, seed=1, scale=0.01))
    making.checkpoint(lab / "tuned2", made=perturb(model, seed=2, scale=0.01))
    for name, tuned, exact in (("style", "tuned", False), ("other", "tuned2", False), ("exact", "tuned", True)):
        surgery.extract(
            lab / "base", lab / tuned, output=lab / name, rank=4, base_name="lab/base", exact=exact, device="cpu"
        )
    surgery.merge(lab / "base", lab / "style", output=lab / "merged", reversible=True)
    surgery.upcycle(lab / "base", output=lab / "moe", experts=4, verify=False)
    making.texts(root / "data.jsonl", 12)
    return root


@pytest.fixture(scope="module")
def served(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """A server that has them, and the folders as they come from it: with the cards that pushing wrote."""
    place = tmp_path_factory.mktemp("served")
    with serving(place) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SURGERY_REGISTRY", str(server.data))
        for folder in (folders / "lab").iterdir():
            surgery.push(folder, f"lab/{folder.name}")
            surgery.pull(f"lab/{folder.name}", output=place / "local" / "lab" / folder.name)
        yield server, place / "local"


def test_every_command_is_tried() -> None:
    assert CASES.keys() == COMMANDS.keys() - OTHERS


@pytest.mark.slow
@pytest.mark.parametrize("words", [words for cases in CASES.values() for words in cases])
def test_an_id_is_as_good_as_a_folder(
    served: tuple[Server, Path],
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: str,
) -> None:
    """The same words, in a folder where they are paths, and in one where they are ids: same bytes, same report."""
    server, local = served
    command = [*words.format(data=folders / "data.jsonl").split(), "--json", "--quiet"]
    found = {}
    for where in ("folders", "ids"):
        here = tmp_path / where
        here.mkdir()
        monkeypatch.chdir(here)
        if where == "folders":
            (here / "lab").symlink_to(local / "lab")
            if command[0] == "pull":
                monkeypatch.setenv("SURGERY_REGISTRY", str(server.data))
        else:
            monkeypatch.setenv("SURGERY_REGISTRY", str(here / "none"))
            fake_hub.configure(server, tmp_path / "home", monkeypatch)
            monkeypatch.setenv("HF_TOKEN", server.tokens["ada"])
        with contextlib.suppress(SystemExit):  # of `verify`, where two are not the same
            status = run(command)
            assert status == 0, capsys.readouterr()
        found[where] = _plain(json.loads(capsys.readouterr().out)), _output(here / "out")
    assert _apart(found["ids"], found["folders"]) == []


def test_what_is_private_asks_for_a_login(
    served: tuple[Server, Path], folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a token it is not there; with one of a member it is."""
    from huggingface_hub import snapshot_download

    server, _ = served
    with monkeypatch.context() as patch:
        patch.setenv("SURGERY_REGISTRY", str(server.data))
        surgery.push(folders / "lab" / "style", "lab/secret", private=True)
    monkeypatch.chdir(tmp_path)
    fake_hub.configure(server, tmp_path / "home", monkeypatch)
    for token, name in ((None, "lab/secret"), (server.tokens["bob"], "lab/secret"), (None, "lab/nothing")):
        if token is not None:
            monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(InputError) as error:
            surgery.inspect(name)
        assert error.value.message == (
            f"{name} is neither a local path nor a model on {server.url} that you may read; if it is private, log in "
            "with `hf auth login`, or set HF_TOKEN."
        )
    monkeypatch.setenv("HF_TOKEN", server.tokens["ada"])
    assert surgery.inspect("lab/secret").as_dict()["modules"] == 14
    # A token that is refused is no Hub that is away: the cache does not stand in for it.
    snapshot_download("lab/secret")
    with monkeypatch.context() as patch:
        patch.setenv("HF_TOKEN", "revoked-or-mistyped")
        with pytest.raises(InputError, match=r"refuses what you are logged in with \(status 401\); log in with `hf"):
            surgery.inspect("lab/secret")
    with pytest.raises(InputError, match=r"^lab/secret on http://127\.0\.0\.1:\d+ has no revision 'v9'\.$"):
        surgery.inspect("lab/secret@v9")


def _plain(value: Any) -> Any:
    """What JSON says, without what passes and without the difference between a name and an id."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if key not in PASSING}
    if isinstance(value, str):
        return value.replace("lab/", "")
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _output(folder: Path) -> dict[str, Any]:
    """The files of an output, JSON and texts without what differs between a name and an id."""
    found: dict[str, Any] = {}
    for name, data in tree(folder).items():
        if name.endswith(".json"):
            found[name] = _plain(json.loads(data))
            if name == "surgery.json":
                del found[name]["files"]  # of which those differ that name an input
        elif name.endswith(".jsonl"):
            found[name] = [_plain(json.loads(line)) for line in data.splitlines()]
        else:
            found[name] = data.replace(b"lab/", b"") if name.endswith(".md") else data
    return found


def _apart(left: Any, right: Any, place: str = "") -> list[str]:
    """Where two values differ."""
    if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
        return [line for key in left for line in _apart(left[key], right[key], f"{place}/{key}")]
    if isinstance(left, list | tuple) and isinstance(right, list | tuple) and len(left) == len(right):
        return [line for n in range(len(left)) for line in _apart(left[n], right[n], f"{place}/{n}")]
    return [] if left == right else [f"{place}: {str(left)[:300]} and {str(right)[:300]}"]
