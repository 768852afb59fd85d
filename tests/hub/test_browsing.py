"""`hub list`, `hub lineage`, `hub fits`: of the local registry, and what a Hub that knows only tags can say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import surgery
from surgery.cli.main import cli
from surgery.errors import InputError, OptionError
from surgery.hub.browsing import Wanted, fits, lineage, list_repositories
from surgery.hub.endpoint import LOCAL, Endpoint
from surgery.hub.index import OWNER, SORTS, ModelQuery
from surgery.hub.naming import RepositoryName
from surgery.hub.reindexing import reindex
from surgery.hub.store import open_registry, registry_path
from tests.hub.fake_hub import FakeHub, Repository
from tests.hub.registry_tools import adapter
from tests.hub.test_index import downgrade
from tests.tools import square_checkpoint


@pytest.fixture
def family(here: Path, own_registry: Path) -> Path:
    """In the local registry: a base under two names, two adapters, and a merge."""
    square_checkpoint(here / "base", 2, 16)
    square_checkpoint(here / "wide", 2, 32)
    adapter(here / "style")
    surgery.merge("base", "style", output="merged")
    surgery.extract("base", "merged", rank=3, output="extracted")
    for name in ("base", "wide", "style", "merged", "extracted"):
        surgery.push(name, f"lab/{name}", endpoint="local")
    return own_registry


def names(**wanted: object) -> list[str]:
    return [item.name.removeprefix("lab/") for item in list_repositories(LOCAL, Wanted(**wanted)).repositories]  # type: ignore[arg-type]  # keywords of a table


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({}, ["base", "extracted", "merged", "style", "wide"]),
        ({"kind": "adapter"}, ["extracted", "style"]),
        ({"rank": "3"}, ["extracted"]),
        ({"base": "lab/base"}, ["extracted", "merged", "style"]),
        ({"base": "lab/base", "kind": "dense"}, ["merged"]),
        ({"tags": ("base_model:adapter:lab/base",)}, ["extracted", "style"]),
        ({"tags": ("lora",), "search": "sty"}, ["style"]),
        ({"targets": ("nothing",)}, []),
        ({"fits": "lab/base"}, ["extracted", "style"]),
        ({"fits": "lab/wide@main"}, []),
        ({"parameters": "min:0.5K,max:1K", "kind": "dense"}, ["base", "merged"]),
        ({"sort": "parameters", "kind": "dense"}, ["wide", "base", "merged"]),
    ],
)
def test_the_local_registry(family: Path, wanted: dict[str, object], expected: list[str]) -> None:
    assert names(**wanted) == expected


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ({"rank": "high"}, "The rank is 'high', expected a number such as 16, or a range: 8..64, 8.. or ..64."),
        ({"sort": "likes"}, f"--sort is 'likes', expected one of {', '.join(SORTS)}."),
        ({"fits": "lab/style"}, "does not matter"),
    ],
)
def test_what_cannot_be_wanted(family: Path, wanted: dict[str, str], sentence: str) -> None:
    if "fits" in wanted:  # an adapter has shapes too, and nothing fits it
        assert names(**wanted) == []
        return
    with pytest.raises(OptionError) as error:
        names(**wanted)
    assert error.value.message == sentence


def test_lineage_and_fits_of_the_local_registry(family: Path) -> None:
    found = lineage("lab/base", LOCAL)
    assert {(link.child, link.relation, link.by) for link in found.children("lab/base")} == {
        ("lab/style", "adapter", "name"), ("lab/extracted", "adapter", "hash"), ("lab/merged", "merge", "hash"),
    }  # fmt: skip
    assert (fits("lab/extracted", "lab/base", None).by, fits("lab/style", "lab/base", None).by) == ("hash", "shape")
    assert fits("lab/style", "lab/wide", LOCAL).fits == "no"
    # By headers, and a few small tensors, of folders.
    assert fits("extracted", "base", None).by == "hash"
    assert fits("extracted", "wide", None).fits == "no"
    assert fits("lab/extracted", "base", None).by == "hash"
    with pytest.raises(InputError, match="There is no model called lab/none in the local registry"):
        lineage("lab/none", LOCAL)
    with pytest.raises(InputError, match="does not have both lab/style and lab/none"):
        fits("lab/style", "lab/none", LOCAL)


def test_another_model_of_the_same_shapes(family: Path, here: Path) -> None:
    tensors = {name: tensor * 2 for name, tensor in load_file("base/model.safetensors").items()}
    save_file(tensors, square_checkpoint(here / "other", 2, 16) / "model.safetensors", {"format": "pt"})
    for found in (fits("extracted", "other", None), fits("lab/extracted", "other", None)):
        assert (found.fits, found.by) == ("yes", "shape")
        assert found.different > 0
        assert found.reasons[0].startswith(
            f"other is another model than base, which it was made for: all {found.changed} "
        )
    merged = fits("extracted", "merged", None)
    assert merged.reasons[-1] == "It was itself made from base, so the adapter is of its family."


def test_commands(family: Path) -> None:
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(cli, ["hub", *arguments], prog_name="surgery", catch_exceptions=False)
        assert result.exit_code == 0
        return result.stdout

    assert [line.split()[0] for line in run("list", "--kind", "adapter", "--sort", "name").splitlines()] == [
        "name", "lab/extracted", "lab/style",
    ]  # fmt: skip
    drawn = run("lineage", "lab/base")
    assert drawn.splitlines()[0].startswith("lab/base (dense, ")
    assert "── lab/extracted (adapter of rank 3, " in drawn
    assert json.loads(run("lineage", "lab/base", "--json"))["id"] == "lab/base"
    assert "answer   fits: it is the base that the adapter was made for, by hash" in run(
        "fits", "lab/extracted", "lab/base"
    )
    assert json.loads(run("fits", "lab/style", "lab/wide", "--json"))["fits"] == "no"
    assert "0 commits examined in" in run("reindex")
    assert "made from" in run("lineage", "lab/extracted")
    assert "Nothing here is known to have been made from it" in run("lineage", "lab/wide")


def test_what_an_earlier_version_examined_is_said(family: Path) -> None:
    """Its facts have no shapes and fewer parents: answers that rest on them say so, until somebody reindexes."""
    said = "were examined by an earlier version, so something may be missing here; run `surgery hub reindex`."
    assert list_repositories(LOCAL, Wanted(base="lab/base")).notes == lineage("lab/base", LOCAL).notes == ()
    with open_registry() as registry:  # what a server makes first, with nothing in it to examine
        registry.metadata.create(RepositoryName("lab", "empty"), "model", False, 0)
        registry.commit(RepositoryName("lab", "empty"), "main", None, [], "initial commit", {})
        count = len(registry.metadata.select(ModelQuery(), OWNER)) - 1
    downgrade(registry_path())

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(cli, ["hub", *arguments], prog_name="surgery", catch_exceptions=False)
        assert result.exit_code == 0
        return " ".join(result.stdout.split())

    for wanted in (Wanted(base="lab/base"), Wanted(rank="3")):
        assert list_repositories(LOCAL, wanted).notes == (f"{count} repositories {said}",)
    assert list_repositories(LOCAL, Wanted(sort="size")).notes == ()
    assert lineage("lab/style", LOCAL).notes == (f"{count} repositories {said}",)
    with pytest.raises(InputError, match=r"lab/base was examined by an earlier version, .*`surgery hub reindex` looks"):
        list_repositories(LOCAL, Wanted(fits="lab/base"))
    for arguments in (("list", "--base", "lab/base"), ("list", "--rank", "77"), ("lineage", "lab/style")):
        assert run(*arguments).endswith(f"Note: {count} repositories {said}")
        assert json.loads(run(*arguments, "--json"))["notes"] == [f"{count} repositories {said}"]
    # A base that is new, and adapters that are not.
    surgery.push("base", "lab/new", endpoint="local")
    found = list_repositories(LOCAL, Wanted(fits="lab/new"))
    assert (found.repositories, found.notes) == ((), (f"{count} repositories {said}",))
    reindex()
    assert list_repositories(LOCAL, Wanted(fits="lab/base")).notes == lineage("lab/style", LOCAL).notes == ()


# A Hub that knows only tags -------------------------------------------------------------------------------------------


@pytest.fixture
def tagged(hub: FakeHub) -> Endpoint:
    for name, tags in {
        "org/base": [],
        "org/style": ["base_model:org/base", "base_model:adapter:org/base", "peft"],
        "org/tuned": ["base_model:org/base", "base_model:finetune:org/base"],
    }.items():
        hub.repositories[name] = Repository(tags=tags)
        hub.repositories[name].commit({"README.md": b""})
    return Endpoint(hub.url)


def test_a_list_by_tags(tagged: Endpoint) -> None:
    listed = list_repositories(tagged, Wanted(kind="adapter", base="org/base")).repositories
    assert [(item.name, item.kind, item.base) for item in listed] == [("org/style", "adapter", "org/base")]
    assert {item.name for item in list_repositories(tagged, Wanted(base="org/base")).repositories} == {
        "org/style", "org/tuned",
    }  # fmt: skip
    assert [item.name for item in list_repositories(tagged, Wanted(kind="adapter")).repositories] == ["org/style"]


@pytest.mark.parametrize(
    ("wanted", "option"),
    [
        ({"rank": "8"}, "--rank"),
        ({"targets": ("q_proj",)}, "--target"),
        ({"fits": "org/base"}, "--fits"),
        ({"kind": "moe"}, "--kind moe"),
        ({"sort": "size"}, "--sort size"),
    ],
)
def test_what_tags_cannot_say(tagged: Endpoint, wanted: dict[str, object], option: str) -> None:
    with pytest.raises(OptionError) as error:
        list_repositories(tagged, Wanted(**wanted))  # type: ignore[arg-type]  # keywords of a table
    assert error.value.message == (
        f"{tagged.url} cannot be asked for {option}: only the local registry and a server of `surgery hub serve` know "
        "of that."
    )


def test_lineage_by_tags(tagged: Endpoint) -> None:
    found = lineage("org/base", tagged)
    assert [(link.child, link.parent, link.relation) for link in found.links] == [
        ("org/style", "org/base", "adapter"), ("org/tuned", "org/base", "finetune"),
    ]  # fmt: skip
    up = lineage("org/style", tagged)
    assert [(node.id, node.known, node.depth) for node in up.nodes] == [("org/base", False, -1), ("org/style", True, 0)]
    with pytest.raises(InputError, match=r"There is no model called org/none on http://\S+ that you may read\."):
        lineage("org/none", tagged)


def test_fits_on_another_hub_reads_headers(hub: FakeHub, base: Path, style: Path) -> None:
    for name, folder in (("org/base", base), ("org/style", style)):
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        hub.repositories[name] = Repository()
        hub.repositories[name].commit(files)
    found = fits("org/style", "org/base", Endpoint(hub.url))
    assert (found.fits, found.by) == ("yes", "shape")
