"""Stock clients push and pull: over Xet, over LFS, and beside `surgery push` and `surgery pull` on the same folder."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import hf_xet
import numpy as np
import pytest
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
from safetensors.numpy import load_file, save_file

from surgery.hub.endpoint import LOCAL
from surgery.hub.pull import PullOptions, pull
from surgery.hub.push import PushOptions, push
from surgery.hub.store import open_registry
from tests.hub.registry_tools import adapter, assert_sound
from tests.hub.server.serving import Server


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def weights(path: Path, megabytes: float, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    save_file({"weight": rng.standard_normal(int(megabytes * 250_000)).astype(np.float32)}, path)
    return path


PULL = """
from huggingface_hub import snapshot_download
folder = pathlib.Path(snapshot_download({name!r}))
files = {{p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
         for p in sorted(folder.rglob("*")) if p.is_file()}}
print(json.dumps(files))
"""


@pytest.mark.parametrize("xet", ["xet", "lfs"])
@pytest.mark.parametrize("pulled", ["xet", "lfs"])
def test_a_folder_goes_there_and_back(server: Server, tmp_path: Path, xet: str, pulled: str) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    weights(folder / "model.safetensors", 9, seed=hash((xet, pulled)) % 1000)
    (folder / "empty.bin").write_bytes(b"")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (folder / "sub" / "ünï.txt").write_text("text\n")
    name = f"ada/model-{xet}-{pulled}"
    disabled = {"xet": "0", "lfs": "1"}
    server.client(
        f"""
        api.create_repo({name!r})
        api.upload_folder(repo_id={name!r}, folder_path={str(folder)!r})
        """,
        HF_HUB_DISABLE_XET=disabled[xet],
    )
    found = server.client(PULL.format(name=name), HF_HUB_DISABLE_XET=disabled[pulled])
    assert found == {p.relative_to(folder).as_posix(): sha256(p) for p in folder.rglob("*") if p.is_file()}
    entry = next(item for item in server.api().list_repo_tree(name) if item.path == "model.safetensors")
    assert isinstance(entry, RepoFile)
    (expected,) = hf_xet.hash_files([str(folder / "model.safetensors")])
    assert entry.xet_hash == (expected.hash if xet == "xet" else None)


def test_a_second_client_uploads_only_what_is_new(server: Server, tmp_path: Path) -> None:
    first = weights(tmp_path / "first.safetensors", 12)
    data = bytearray(first.read_bytes())
    data[6_000_000:6_050_000] = random.Random(1).randbytes(50_000)
    second = tmp_path / "second.safetensors"
    second.write_bytes(data)
    upload = """
    api.create_repo({1!r}, exist_ok=True)
    api.upload_file(path_or_fileobj={0!r}, path_in_repo="w.safetensors", repo_id={1!r})
    """
    server.client(upload.format(str(first), "ada/versions"))
    before = server.stored()
    server.client(upload.format(str(second), "ada/versions"))
    assert server.stored() - before < 400_000
    # Not so for another namespace, which is not told what there is; it gets the same xorb by sending all of it.
    before = server.stored()
    server.client(upload.format(str(first), "bob/copy"), "bob")
    assert server.stored() - before < 10_000
    assert sha256(Path(server.api("bob").hf_hub_download("bob/copy", "w.safetensors", local_dir=tmp_path))) == sha256(
        first
    )


def test_a_warm_client_uploads_to_another_namespace(server: Server, tmp_path: Path) -> None:
    path, home = weights(tmp_path / "w.safetensors", 3, 7), server.home()
    for name in ("ada/warm", "lab/warm"):
        server.client(
            f"""
            api.create_repo({name!r})
            api.upload_file(path_or_fileobj={str(path)!r}, path_in_repo="w.safetensors", repo_id={name!r})
            """,
            home=home,
        )
        assert server.client(PULL.format(name=name)) == {"w.safetensors": sha256(path)}


@pytest.mark.parametrize("xet", ["0", "1"])
def test_a_token_for_one_repository_is_enough_to_push_to_it(server: Server, tmp_path: Path, xet: str) -> None:
    path, name = weights(tmp_path / "w.safetensors", 1, int(xet)), f"lab/scoped-{xet}"
    server.api().create_repo(name, private=True)
    server.client(
        f"api.upload_file(path_or_fileobj={str(path)!r}, path_in_repo='w.safetensors', repo_id={name!r})",
        server.token("ada", repository=name),
        HF_HUB_DISABLE_XET=xet,
    )
    assert server.client(PULL.format(name=name)) == {"w.safetensors": sha256(path)}


def test_a_name_without_a_namespace(server: Server, tmp_path: Path) -> None:
    """From the folder it is a repository of its own, as `gpt2` is on the Hub; over the network one of the user's."""
    folder = adapter(tmp_path / "adapter")
    report = push(folder, "Alone", LOCAL, PushOptions(), server.data)
    for name in ("Alone", "alone"):
        assert server.client(PULL.format(name=name)) == {file.path: file.sha256 for file in report.files}
    assert server.client("print(json.dumps(api.create_repo('alone').repo_id))") == "ada/alone"
    with pytest.raises(HfHubHTTPError, match="does not allow you to write to Alone"):
        server.api().upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="Alone")


def test_what_push_wrote_is_served(server: Server, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter")
    report = push(folder, "lab/pushed", LOCAL, PushOptions(), server.data)
    found = server.client(PULL.format(name="lab/pushed"))
    assert found == {file.path: file.sha256 for file in report.files}
    info = server.api().model_info("lab/pushed", files_metadata=True)
    assert info.sha == report.commit
    assert "base_model:adapter:lab/base" in (info.tags or [])
    # A client that adds to it goes on from there.
    server.client(
        "api.upload_file(path_or_fileobj=b'more', path_in_repo='notes.txt', repo_id='lab/pushed', "
        f"parent_commit={report.commit!r})"
    )
    with open_registry(server.data) as registry:
        assert assert_sound(registry) > 1


@pytest.mark.parametrize("xet", ["0", "1"])
def test_what_clients_pushed_is_pulled_from_the_folder(server: Server, tmp_path: Path, xet: str) -> None:
    folder = adapter(tmp_path / "adapter")
    server.client(
        f"""
        api.create_repo("lab/by-client-{xet}", private=True)
        api.upload_folder(repo_id="lab/by-client-{xet}", folder_path={str(folder)!r})
        """,
        HF_HUB_DISABLE_XET=xet,
    )
    pull(f"lab/by-client-{xet}", tmp_path / "pulled", LOCAL, PullOptions(), server.data)
    pulled = {path.name: sha256(path) for path in (tmp_path / "pulled").iterdir()}
    assert pulled == {path.name: sha256(path) for path in folder.iterdir()}
    with open_registry(server.data) as registry:
        found = registry.find(registry.metadata.repositories()[-1].name)
        assert found.files
        head = registry.find(
            next(r.name for r in registry.metadata.repositories() if r.name.name == f"by-client-{xet}")
        )
        assert head.commit.facts["kind"] == "adapter"
        # In place, as `surgery merge` reads it.
        assert load_file(registry.snapshot(head) / "adapter_model.safetensors").keys()
