"""What the server knows of models: filters and search as the stock client sends them, lineage, fits, and privacy."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import InputError
from surgery.hub.browsing import Wanted, list_repositories
from surgery.hub.browsing import fits as fits_of
from surgery.hub.browsing import lineage as browsing_lineage
from surgery.hub.endpoint import LOCAL, Endpoint
from surgery.hub.push import PushOptions, push
from surgery.hub.store import open_registry
from tests.hub.server.serving import Server
from tests.hub.test_index import downgrade
from tests.models import make, save
from tests.peft_tools import write_adapter
from tests.tools import read_json

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"model.layers.0.self_attn.q_proj": 2})


@dataclass(frozen=True)
class Family:
    """Folders: a base, and what PEFT and this tool made of it."""

    root: Path

    def __getitem__(self, name: str) -> Path:
        return self.root / name


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    root = tmp_path_factory.mktemp("family")
    torch.manual_seed(0)
    base = save(make("llama"), root / "base")
    adapter = write_adapter(make("llama"), LORA, root / "adapter")
    edit(adapter, base_model_name_or_path="lab/base")
    surgery.merge(base, adapter, output=root / "merged")
    surgery.extract(base, root / "merged", rank=8, output=root / "extracted")
    surgery.upcycle(base, experts=4, output=root / "moe")
    tensors = load_file(base / "model.safetensors")
    other = save(make("llama"), root / "other")
    save_file({name: tensor + 0.5 for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    save(make("gpt2"), root / "gpt2")
    return Family(root)


def edit(folder: Path, **values: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(read_json(path) | values))


def another(folder: Path, base: str, factor: float) -> Path:
    """An adapter with weights of its own."""
    write_adapter(make("llama"), LORA, folder)
    edit(folder, base_model_name_or_path=base)
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor * factor + factor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def pushed(server: Server, family: Family) -> Server:
    """The family on the server: pushed into the folder, over LFS and over Xet; the extracted adapter is private."""
    for name in ("base", "merged", "gpt2"):
        push(family[name], f"lab/{name}", LOCAL, PushOptions(), server.data)
    for name, xet in (("adapter", "1"), ("moe", "0"), ("other", "0"), ("extracted", "0")):
        server.client(
            f"""
            api.create_repo("lab/{name}", private={name == "extracted"})
            api.upload_folder(repo_id="lab/{name}", folder_path={str(family[name])!r})
            """,
            HF_HUB_DISABLE_XET=xet,
        )
    wait_for(server, "lab/adapter")
    return server


def wait_for(server: Server, name: str) -> None:
    """What came over LFS is hashed after the commit."""
    for _ in range(100):
        if vars(server.api().model_info(name))["facts"].get("weights"):
            return
        time.sleep(0.05)
    raise AssertionError(f"{name} was not hashed")


@pytest.fixture(scope="module")
def api(pushed: Server) -> HfApi:
    return pushed.api()


def names(api: HfApi, **query: Any) -> set[str]:
    return {model.id.removeprefix("lab/") for model in api.list_models(author="lab", **query)}


def ask(server: Server, path: str, user: str | None = "ada", **query: str) -> Any:
    headers = {} if user is None else {"Authorization": f"Bearer {server.tokens[user]}"}
    answer = httpx2.get(f"{server.url}/api/models{path}", params=query, headers=headers)
    return answer.json() if answer.status_code == 200 else (answer.status_code, answer.json()["error"])


# Facts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base", "adapter", "extracted", "merged", "moe"])
def test_facts_are_the_same_however_it_came(pushed: Server, family: Family, name: str) -> None:
    """Over Xet, over LFS, or pushed into the folder: the last is told from the others by its card alone."""
    push(family[name], f"same/{name}", LOCAL, PushOptions(), pushed.data)
    with open_registry(pushed.data) as registry:
        commits = [registry.find(_name(f"{space}/{name}")).commit for space in ("same", "lab")]
    here, there = ({key: value for key, value in c.facts.items() if key != "card"} for c in commits)
    assert here == there
    assert here["weights"]
    assert "unread" not in here
    pushed.api("admin").delete_repo(f"same/{name}")


def _name(text: str) -> Any:
    from surgery.hub.naming import parse_repository

    return parse_repository(text)


def test_what_a_model_is(api: HfApi) -> None:
    adapter = api.model_info("lab/adapter")
    assert {"lora", "adapter", "rank:2", "rank:4", "target:q_proj", "base_model:adapter:lab/base"} <= set(
        adapter.tags or []
    )
    facts = vars(adapter)["facts"]
    assert (facts["kind"], facts["method"], facts["ranks"]) == ("adapter", "lora", [2, 4])
    moe = api.model_info("lab/moe")
    assert {"moe", "experts:4"} <= set(moe.tags or [])
    assert moe.safetensors is not None
    assert moe.safetensors.total == sum(moe.safetensors.parameters.values()) == vars(moe)["facts"]["parameters"]
    merged = vars(api.model_info("lab/merged"))["facts"]
    assert [(p["role"], p["relation"]) for p in merged["parents"]] == [("base", "merge"), ("adapter", "merge")]


def test_expand(api: HfApi) -> None:
    found = api.model_info("lab/base", expand=["childrenModelCount", "baseModels", "safetensors", "config"])
    assert (found.children_model_count, found.base_models) == (4, [])
    assert found.config == {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    assert found.tags is None
    (listed,) = api.list_models(author="lab", search="lab/adapter", expand=["baseModels", "cardData", "siblings"])
    assert listed.base_models == ["lab/base"]
    assert "adapter_config.json" in {sibling.rfilename for sibling in listed.siblings or []}
    assert listed.card_data is not None


# Filters --------------------------------------------------------------------------------------------------------------

EVERY = {"base", "merged", "gpt2", "adapter", "moe", "other", "extracted"}


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({}, EVERY),
        ({"filter": "adapter"}, {"adapter", "extracted"}),
        ({"filter": ["lora", "rank:4"]}, {"adapter"}),
        ({"filter": "moe"}, {"moe"}),
        ({"filter": "experts:4"}, {"moe"}),
        ({"filter": "base_model:adapter:lab/base"}, {"adapter", "extracted"}),
        ({"filter": "base_model:adapter:LAB/Base"}, {"adapter", "extracted"}),
        ({"filter": "base_model:merge:lab/base"}, {"merged"}),
        ({"filter": "base_model:upcycle:lab/base"}, {"moe"}),
        ({"filter": "base_model:lab/base"}, {"adapter", "extracted", "merged", "moe"}),
        ({"filter": "base_model:finetune:lab/base"}, set()),
        ({"search": "gpt2"}, {"gpt2"}),
        ({"search": "q_proj"}, {"adapter", "extracted"}),
        ({"search": "LlamaForCausalLM"}, {"base", "merged", "other"}),
        ({"search": "lab/base adapter"}, {"adapter"}),
        ({"num_parameters": "min:40K"}, {"moe"}),
        ({"num_parameters": "max:0.01M"}, {"adapter", "extracted"}),
        ({"num_parameters": "min:1K,max:10K"}, {"extracted"}),
        ({"gated": True}, set()),
        ({"gated": False}, EVERY),
        ({"pipeline_tag": "text-generation"}, set()),
        ({"limit": 1, "sort": "num_parameters"}, {"moe"}),
    ],
)
def test_the_stock_clients_filters(api: HfApi, query: dict[str, Any], expected: set[str]) -> None:
    assert names(api, **query) == expected


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({"kind": "adapter"}, {"adapter", "extracted"}),
        ({"kind": "dense", "family": "gpt2"}, {"gpt2"}),
        ({"kind": "adapter", "base": "lab/base"}, {"adapter", "extracted"}),
        ({"base": "lab/merged"}, {"extracted"}),
        ({"rank": "8..64"}, {"extracted"}),
        ({"rank": "..4"}, {"adapter"}),
        ({"rank": "2"}, {"adapter"}),
        ({"target": "q_proj,v_proj"}, {"adapter", "extracted"}),
        ({"target": "k_proj"}, set()),
        ({"fits": "lab/base"}, {"adapter", "extracted"}),
        ({"fits": "lab/other@main"}, {"adapter", "extracted"}),
        ({"fits": "lab/gpt2"}, set()),
    ],
)
def test_filters_of_this_server(pushed: Server, query: dict[str, str], expected: set[str]) -> None:
    found = ask(pushed, "", author="lab", **query)
    assert {item["id"].removeprefix("lab/") for item in found} == expected


@pytest.mark.parametrize(
    ("query", "status", "sentence"),
    [
        ({"rank": "high"}, 400, "The rank is 'high', expected a number such as 16, or a range: 8..64, 8.. or ..64."),
        ({"num_parameters": "1B"}, 400, "num_parameters is '1B', expected 'min:1M,max:2B' or one of the two, with K, M, B or T."),
        ({"kind": "big"}, 400, "kind is 'big', expected adapter, dense or moe."),
        ({"fits": "lab/nothing"}, 404, "Repository not found"),
        ({"base": "a/b/c"}, 400, "'a/b/c' is not a name for a repository: it has more than one slash."),
    ],
)  # fmt: skip
def test_what_cannot_be_asked(pushed: Server, query: dict[str, str], status: int, sentence: str) -> None:
    assert ask(pushed, "", **query) == (status, sentence)


def test_pages_do_not_overlap(api: HfApi, server: Server) -> None:
    for number in range(7):
        api.create_repo(f"page-{number}", exist_ok=True)
    headers = {"Authorization": f"Bearer {server.tokens['ada']}"}
    url, seen = f"{server.url}/api/models?author=ada&search=page-&limit=3", []
    while url:
        answer = httpx2.get(url, headers=headers)
        seen += [item["id"] for item in answer.json()]
        url = answer.links.get("next", {}).get("url", "")
    assert sorted(seen) == [f"ada/page-{number}" for number in range(7)]


# Lineage --------------------------------------------------------------------------------------------------------------


def links(found: dict[str, Any]) -> set[tuple[str, str, str, str]]:
    return {(link["child"], link["parent"], link["relation"], link["by"]) for link in found["links"]}


def test_the_family_of_a_base(pushed: Server) -> None:
    found = ask(pushed, "/lab/base/lineage")
    assert links(found) == {
        ("lab/adapter", "lab/base", "adapter", "name"),
        ("lab/extracted", "lab/base", "adapter", "hash"),
        ("lab/merged", "lab/base", "merge", "hash"),
        ("lab/moe", "lab/base", "upcycle", "hash"),
        ("lab/merged", "lab/adapter", "merge", "hash"),
        ("lab/extracted", "lab/merged", "extract", "hash"),
    }
    assert {node["id"]: node["depth"] for node in found["nodes"]}["lab/base"] == 0
    up = ask(pushed, "/lab/extracted/lineage")
    assert {(node["id"], node["depth"]) for node in up["nodes"]} == {
        ("lab/extracted", 0), ("lab/base", -1), ("lab/merged", -1), ("lab/adapter", -2),
    }  # fmt: skip


def test_nobody_learns_of_what_is_private(pushed: Server) -> None:
    """Neither that it is there, nor through it of anything else, nor by a count."""
    for user in (None, "bob"):
        assert not any("extracted" in str(item) for item in ask(pushed, "/lab/base/lineage", user)["nodes"])
        assert ask(pushed, "/lab/extracted/lineage", user)[0] in (401, 404)
        assert {item["id"] for item in ask(pushed, "", user, author="lab", kind="adapter")} == {"lab/adapter"}
        assert ask(pushed, "", user, author="lab", rank="8") == []
        assert ask(pushed, "/lab/base", user, expand="childrenModelCount")["childrenModelCount"] == 3
        assert ask(pushed, "/lab/extracted/fits", user, base="lab/base")[0] in (401, 404)
        missing = ask(pushed, "/lab/adapter/fits", user, base="lab/missing")
        assert ask(pushed, "/lab/adapter/fits", user, base="lab/extracted") == missing
        assert ask(pushed, "", user, fits="lab/extracted") == missing


def test_a_private_parent_looks_like_one_that_is_not_here(pushed: Server, family: Family, tmp_path: Path) -> None:
    """The name stands in the child's own files; whether there is such a repository is not told."""
    for number, base in enumerate(("lab/secret", "lab/missing")):
        if base == "lab/secret":
            push(family["base"], base, LOCAL, PushOptions(), pushed.data)
            pushed.api().update_repo_settings(base, private=True)
        adapter = another(tmp_path / f"adapter-{number}", base, 2)
        push(adapter, f"bob/adapter-{number}", LOCAL, PushOptions(), pushed.data)
    seen = []
    for number in (0, 1):
        found = ask(pushed, f"/bob/adapter-{number}/lineage", "bob")
        del found["copies"]  # each is the other's
        seen.append(json.dumps(found).replace(f"adapter-{number}", "adapter"))
    assert seen[0].replace("secret", "missing") == seen[1].replace("secret", "missing")
    assert '"id": "lab/missing", "known": false' in seen[1]
    assert [node["known"] for node in ask(pushed, "/bob/adapter-0/lineage")["nodes"]] == [True, True]
    # By hash neither: it has the very weights of lab/base.
    assert ask(pushed, "/lab/base/lineage", "bob")["copies"] == []
    assert ask(pushed, "/lab/base/lineage")["copies"] == ["lab/secret"]
    for name in ("lab/secret", "bob/adapter-0", "bob/adapter-1"):
        pushed.api("admin").delete_repo(name)


def test_renames_and_cycles(pushed: Server, family: Family, tmp_path: Path) -> None:
    api = pushed.api()
    push(family["other"], "lab/old", LOCAL, PushOptions(), pushed.data)
    push(another(tmp_path / "adapter", "lab/old", 3), "lab/child", LOCAL, PushOptions(), pushed.data)
    api.move_repo("lab/old", "lab/new")
    assert ("lab/child", "lab/new", "adapter", "name") in links(ask(pushed, "/lab/new/lineage"))
    assert names(api, filter="base_model:adapter:lab/new") == {"child"}
    assert names(api, filter="base_model:adapter:lab/old") == {"child"}
    # The base says that it was made from its own adapter.
    card = b"---\nbase_model: lab/child\n---\n"
    api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="lab/new")
    for name in ("lab/new", "lab/child"):
        found = ask(pushed, f"/{name}/lineage")
        assert {node["id"] for node in found["nodes"]} == {"lab/new", "lab/child"}
        assert len(found["links"]) == 2
    # Another repository takes the old name, and the adapter with it.
    push(family["gpt2"], "lab/old", LOCAL, PushOptions(), pushed.data)
    assert names(api, filter="base_model:adapter:lab/old") == {"child"}
    assert names(api, filter="base_model:adapter:lab/new") == set()
    for name in ("lab/new", "lab/old", "lab/child"):
        api.delete_repo(name)


# Fits -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter", "base", "fits", "by", "reason"),
    [
        ("extracted", "base", "yes", "hash", "All 4 tensors that it changes are those it was made for."),
        ("extracted", "moe", "yes", "hash", "All 4 tensors that it changes are those it was made for."),
        ("extracted", "other", "yes", "shape", "lab/other is another model than base, which it was made for: all 4 tensors that it changes have the right shape, but 4 of them, 'model.layers.0.self_attn.q_proj.weight' first, are not those on record."),
        ("adapter", "base", "yes", "shape", "All 4 tensors that it changes have the right shape; it has no hashes of its base on record."),
        ("adapter", "gpt2", "no", "shape", "lab/adapter: lab/gpt2 has no module 'model.layers.0.self_attn.q_proj'; is it the adapter's base?"),
        ("adapter", "extracted", "no", "shape", "lab/extracted is an adapter itself, and no base."),
    ],
)  # fmt: skip
def test_whether_an_adapter_fits(pushed: Server, adapter: str, base: str, fits: str, by: str, reason: str) -> None:
    found = ask(pushed, f"/lab/{adapter}/fits", base=f"lab/{base}")
    assert (found["fits"], found["by"], found["reasons"][0]) == (fits, by, reason)


def test_the_configured_server_is_asked(pushed: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It knows the hashes of all tensors, where reading headers would prove shapes only."""
    monkeypatch.setenv("HF_ENDPOINT", pushed.url)
    monkeypatch.setenv("HF_TOKEN", pushed.tokens["ada"])
    monkeypatch.chdir(tmp_path)
    assert fits_of("lab/extracted", "lab/base", None, tmp_path / "none").reasons == (
        "All 4 tensors that it changes are those it was made for.",
    )


def test_another_shape_is_named(pushed: Server, family: Family, tmp_path: Path) -> None:
    tensors = load_file(family["base"] / "model.safetensors")
    wide = save(make("llama"), tmp_path / "wide")
    name = "model.layers.1.self_attn.v_proj.weight"
    tensors[name] = torch.zeros(tensors[name].shape[0] * 2, tensors[name].shape[1])
    save_file(tensors, wide / "model.safetensors", {"format": "pt"})
    push(wide, "lab/wide", LOCAL, PushOptions(), pushed.data)
    found = ask(pushed, "/lab/adapter/fits", base="lab/wide")
    shape = list(tensors[name].shape)
    factors = [[4, shape[1]], [shape[0] // 2, 4]]
    assert found["reasons"] == [
        f"lab/adapter: the factors of 'model.layers.1.self_attn.v_proj' are {factors[0]} and {factors[1]}, but lab/wide "
        f"has a weight of {shape} there; is it the adapter's base?"
    ]
    pushed.api().delete_repo("lab/wide")


def test_fits_needs_a_base(pushed: Server) -> None:
    assert ask(pushed, "/lab/adapter/fits") == (400, "fits needs ?base=ID, the base that the adapter is held against.")
    assert ask(pushed, "/lab/base/fits", base="lab/base")["fits"] == "unknown"


# The commands ---------------------------------------------------------------------------------------------------------


def test_the_commands_ask_the_server(pushed: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", pushed.tokens["ada"])
    place = Endpoint(pushed.url)

    def listed(**wanted: Any) -> set[str]:
        found = list_repositories(place, Wanted(**wanted)).repositories
        return {item.name for item in found if item.name.startswith("lab/")}

    assert listed(kind="adapter", rank="8..") == {"lab/extracted"}
    assert listed(fits="lab/base", targets=("q_proj",)) == {"lab/adapter", "lab/extracted"}
    assert listed(tags=("base_model:merge:lab/base",), search="merged") == {"lab/merged"}
    (item,) = list_repositories(place, Wanted(kind="moe")).repositories
    assert (item.name, item.kind, item.base) == ("lab/moe", "moe", "base")
    assert item.size is not None
    tree = browsing_lineage("lab/base", place)
    assert tree.as_dict() == family_of_server(pushed)
    assert fits_of("lab/extracted", "lab/base", place).by == "hash"
    with pytest.raises(InputError, match=r"^http://\S+ answers: Repository not found$"):
        fits_of("lab/adapter", "lab/none", place)
    monkeypatch.setenv("HF_TOKEN", pushed.tokens["bob"])
    with pytest.raises(InputError, match=r"^http://\S+ answers: Repository not found$"):
        browsing_lineage("lab/extracted", place)


def family_of_server(server: Server) -> dict[str, Any]:
    """As the server's JSON has it, with pairs for lists."""
    found: dict[str, Any] = ask(server, "/lab/base/lineage")
    for node in found["nodes"]:
        node["rank"] = tuple(node["rank"]) if node["rank"] else None
    return {**found, **{key: tuple(found[key]) for key in ("nodes", "links", "copies", "notes")}}


# Older registries -----------------------------------------------------------------------------------------------------


def test_a_server_examines_what_an_earlier_version_examined(family: Family, tmp_path: Path) -> None:
    server = Server(tmp_path / "data")
    push(family["extracted"], "lab/extracted", LOCAL, PushOptions(), server.data)
    push(family["base"], "lab/base", LOCAL, PushOptions(), server.data)
    downgrade(server.data)
    server.start()
    try:
        found: dict[str, Any] = {}
        for _ in range(100):
            found = httpx2.get(f"{server.url}/api/models/lab/base/lineage").json()
            if found["links"] and found["links"][0]["by"] == "hash":
                break
            time.sleep(0.05)
        assert [(link["child"], link["by"]) for link in found["links"]] == [("lab/extracted", "hash")]
    finally:
        server.stop()


# Hostile --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"adapter_config.json": b'{"peft_type": "LORA", "r": 4, "base_model_name_or_path": ' + b"[" * 50_000, "adapter_model.safetensors": b"\x10" + b"\0" * 30}, "nested|JSON|deep"),
        ({"model.safetensors": b"\xff" * 64}, "announces a header"),
        ({"config.json": b'{"architectures": {"a": 1}, "vocab_size": "many", "model_type": 7}', "model.safetensors": b"\x02" + b"\0" * 7 + b"{}"}, "no tensors"),
        ({"config.json": b"{}" + b" " * 9_000_000, "model.safetensors.index.json": b" " * 9_000_000, "surgery.json": b"{}" + b" " * 9_000_000, "model.safetensors": b"\x02" + b"\0" * 7 + b"{}"}, "more than 24,000,000 bytes|schema|JSON"),
    ],
)  # fmt: skip
def test_a_hostile_model_is_committed_without_facts(
    server: Server, files: dict[str, bytes], reason: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    import re

    name = f"bob/hostile-{abs(hash(request.node.name)) % 10**6}"
    for path, data in files.items():
        (tmp_path / path).write_bytes(data)
    server.client(
        f"api.create_repo({name!r}); api.upload_folder(repo_id={name!r}, folder_path={str(tmp_path)!r})", "bob"
    )
    facts = vars(server.api("bob").model_info(name))["facts"]
    assert re.search(reason, facts["unread"]), facts
    assert "kind" not in facts
    with pytest.raises(HfHubHTTPError):
        server.api("bob").model_info("bob/hostile-none")
