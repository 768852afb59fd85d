"""What a reference means: a path before an id, a weight behind it, an adapter or a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

import surgery
from surgery.adapter import Adapter
from surgery.checkpoint import Checkpoint
from surgery.errors import InputError
from surgery.hub.resolve import is_adapter, resolve, resolve_adapter, resolve_checkpoint, split_weight
from tests.hub.fake_hub import FakeHub
from tests.tools import square_adapter, square_checkpoint


def test_a_folder_comes_before_an_id_of_the_same_spelling(hub: FakeHub, here: Path) -> None:
    """No request is made for what is there."""
    square_checkpoint(here / "elsewhere", 2, 8)
    hub.add("lab/base", here / "elsewhere")
    square_checkpoint(here / "lab" / "base", 1, 8)
    assert len(resolve_checkpoint("lab/base").tensors) == 1
    assert hub.requests == []
    assert len(resolve_checkpoint("lab/base@main").tensors) == 2


@pytest.mark.parametrize("reference", ["./lab/base", "/lab/base", "~/lab/base", "lab/base/model", "../lab/base"])
def test_what_looks_like_a_path_is_never_an_id(hub: FakeHub, here: Path, reference: str) -> None:
    with pytest.raises(InputError, match=r"does not exist(; the shell did not expand `~`, leave out the quotes)?\.$"):
        resolve_checkpoint(reference)
    assert hub.requests == []


def test_an_empty_reference_is_refused() -> None:
    with pytest.raises(InputError, match=r"^An empty path was given\.$"):
        resolve_checkpoint("")


def test_an_id_is_an_adapter_or_a_checkpoint_by_its_files(hub: FakeHub, tmp_path: Path) -> None:
    square_checkpoint(tmp_path / "base", 1, 8)
    square_adapter(tmp_path / "adapter", 1, 8)
    for name in ("base", "adapter"):
        hub.add(f"lab/{name}", tmp_path / name)
    assert not is_adapter("lab/base")
    assert is_adapter("lab/adapter")
    assert isinstance(resolve("lab/base"), Checkpoint)
    assert isinstance(resolve("lab/adapter"), Adapter)


def test_the_kind_of_an_id_is_asked_for_once(hub: FakeHub, tmp_path: Path) -> None:
    """To say what an id is takes one description of it, not two."""
    square_adapter(tmp_path / "adapter", 1, 8)
    hub.add("lab/adapter", tmp_path / "adapter")
    surgery.inspect("lab/adapter")
    assert sum(request.path.startswith("/api/") for request in hub.requests) == 1


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("lab/a=0.5", ("lab/a", 0.5)),
        ("lab/a@v1=-1", ("lab/a@v1", -1.0)),
        ("a=1e-3", ("a", 1e-3)),
        ("a=.5", ("a", 0.5)),
        ("a=b", ("a=b", 1.0)),
        ("a=", ("a=", 1.0)),
        ("a", ("a", 1.0)),
    ],
)
def test_a_weight_stands_behind_the_last_sign(reference: str, expected: tuple[str, float]) -> None:
    assert split_weight(reference) == expected


def test_a_folder_with_a_sign_in_its_name_has_no_weight(here: Path) -> None:
    """`alpha=0.5` may be what the folder is called."""
    square_adapter(here / "alpha=0.5", 1, 8)
    assert resolve_adapter("alpha=0.5").weight == 1.0
    assert resolve_adapter("alpha=0.5=2").weight == 2.0


def test_a_weight_and_a_revision_reach_the_adapter(hub: FakeHub, tmp_path: Path) -> None:
    square_adapter(tmp_path / "adapter", 1, 8)
    commit = hub.add("lab/adapter", tmp_path / "adapter", "v1")
    adapter = resolve_adapter("lab/adapter@v1=0.25")
    assert adapter.weight == 0.25
    assert adapter.files.provenance == {"source": "lab/adapter", "revision": commit}
