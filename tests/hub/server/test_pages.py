"""The pages over HTTP: what they say, that they are sound, and what they do with what strangers upload."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

import surgery
from surgery.hub.server.pages import tensors
from tests.hub.registry_tools import adapter
from tests.hub.server.html_tools import Page, browser, logged_in, read
from tests.hub.server.serving import Server
from tests.hub.server.test_safety import commit
from tests.tools import entry, raw_file, square_checkpoint

CARD = """---
license: mit
tags: [letters]
---
# Letters

See [the config](adapter_config.json), ![a picture](notes/p.png) and [the notes](notes/a.md).

<script>alert(1)</script>
"""
NAME = "<img src=x onerror=alert(1)>&\"'.txt"


def file(path: str, data: bytes) -> dict[str, object]:
    value = {"path": path, "content": base64.b64encode(data).decode(), "encoding": "base64"}
    return {"key": "file", "value": value}


@pytest.fixture(scope="module", autouse=True)
def filled(server: Server, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A base, an adapter of it and a merge of both; a dataset; a repository of a stranger's; a private one."""
    folder = tmp_path_factory.mktemp("folders")
    square_checkpoint(folder / "base", 12, 16)
    adapter(folder / "style", layers=12)
    (folder / "style" / "README.md").write_text(CARD)
    adapter(folder / "other", layers=13)
    surgery.merge(folder / "base", folder / "style", output=folder / "merged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SURGERY_REGISTRY", str(server.data))
        patch.delenv("HF_ENDPOINT", raising=False)
        for name, here in (("base", "lab/base"), ("style", "lab/style"), ("merged", "ada/merged"),
                           ("other", "lab/other"), ("base", "solo")):  # fmt: skip
            surgery.push(folder / name, here)
    ada = server.api("ada")
    ada.create_repo("ada/hostile")
    ada.create_repo("ada/secret", private=True)
    ada.create_repo("ada/lines", repo_type="dataset")
    assert commit(
        server, "ada", "lab/style", file("notes/a.md", b"# Notes\n"), file("notes/p.png", b"\x89PNG")
    ).is_success
    headers = {
        "bomb": raw_file({"a": entry("F32", [1 << 40], 0, 1 << 42)}),
        "text": b"\xff" * 64,
        "deep": (100_000).to_bytes(8, "little") + b"[" * 100_000,
        "name": raw_file({"<script>alert(1)</script>": entry("U8", [1], 0, 1)}, b"x"),
        "digits": raw_file({f"layers.{'9' * 5000}.{'²' * 50}": entry("U8", [1], 0, 1)}, b"x"),
        "long": (tensors.MAX_HEADER + 1).to_bytes(8, "little") + b"{" + b" " * tensors.MAX_HEADER,
        "many": raw_file({f"layers.{n}.w": entry("U8", [2, 1], 2 * n, 2 * n + 2) for n in range(1200)}, b"x" * 2400),
    }
    files = [
        file(NAME, b"<script>alert(1)</script>"),
        file("x.html", b"<script>alert(1)</script>"),
        file("deep.json", b"[" * 100_000),
        file("good.json", b'{"b":[1,2],"a":"\xc3\xa9<b>"}'),
        file("binary.bin", b"\0\xff"),
        file("long.txt", "ä".encode() * 200_000),
        file("README.md", b"# <b>x</b>\n\n[x](javascript:alert(1))\n\n<script>alert(1)</script>\n"),
        *(file(f"{name}.safetensors", data) for name, data in headers.items()),
    ]
    assert commit(server, "ada", "ada/hostile", *files).is_success
    message = {"summary": "<script>alert(1)</script>\u202e", "description": "<b>body</b>\n\tindented \u202etxt"}
    line = {"key": "header", "value": message}
    body = b"\n".join(json.dumps(item).encode() for item in (line, file("second.txt", b"2")))
    answer = httpx2.post(
        f"{server.url}/api/models/ada/hostile/commit/main",
        content=body,
        headers={"Authorization": f"Bearer {server.tokens['ada']}"},
    )
    assert answer.is_success, answer.text


@pytest.fixture(scope="module")
def stranger(server: Server) -> Iterator[httpx2.Client]:
    with browser(server) as client:
        yield client


def page(client: httpx2.Client, path: str, status: int = 200) -> Page:
    answer = client.get(path)
    assert answer.status_code == status, (path, answer.status_code, answer.text[:500])
    return read(answer)


# What the pages say ---------------------------------------------------------------------------------------------------


def test_the_list(stranger: httpx2.Client) -> None:
    found = page(stranger, "/")
    assert found.title == "Models · Adapter hub"
    assert {"/lab/base", "/lab/style", "/ada/merged", "/ada/hostile"} <= set(found.links)
    assert "6 models" in found.text
    assert "ada/secret" not in found.text
    assert "of lab/base" in found.text


FILTERS = {
    "kind=adapter": {"lab/style"},
    "kind=dense": {"lab/base", "ada/merged"},
    "base=lab/base": {"lab/style", "ada/merged"},
    "base=LAB/base&kind=adapter": {"lab/style"},
    "base=no/such": set(),
    "rank=4": {"lab/style"},
    "rank=2..8": {"lab/style"},
    "rank=5..": set(),
    "family=squares": {"lab/base", "ada/merged"},
    "author=ada": {"ada/merged", "ada/hostile"},
    "search=STYLE": {"lab/style", "ada/merged"},
    "library=peft": {"lab/style"},
    "filter=letters": {"lab/style"},
    "filter=base_model:adapter:lab/base": {"lab/style"},
    "search=%3Cscript%3E": set(),
}


@pytest.mark.parametrize("query", FILTERS)
def test_filters(stranger: httpx2.Client, query: str) -> None:
    found = page(stranger, f"/?{query}")
    names = {"lab/base", "lab/style", "ada/merged", "ada/hostile"}  # and others
    assert {name for name in names if f"/{name}" in found.links} == FILTERS[query]


def test_a_filter_that_makes_no_sense(stranger: httpx2.Client) -> None:
    assert "The rank is '1-2', expected a number such as 16, or a range" in page(stranger, "/?rank=1-2").text
    page(stranger, "/?page=0", 400)
    assert "Nothing fits." in page(stranger, "/?search=zzz").text


def test_order_and_pages(stranger: httpx2.Client) -> None:
    found = page(stranger, "/?sort=id")
    listed = [link[1:] for link in found.links if link.count("/") == 2 and link.startswith(("/lab/", "/ada/"))]
    assert listed == sorted(listed)
    assert not [link for link in page(stranger, "/?page=2").links if link.startswith(("/lab/", "/ada/"))]


def test_a_namespace(stranger: httpx2.Client) -> None:
    found = page(stranger, "/ada")
    assert {"/ada/merged", "/ada/hostile", "/datasets/ada/lines"} <= set(found.links)
    assert "/lab/base" not in found.links
    assert page(stranger, "/Bob").title == "bob · Adapter hub"
    page(stranger, "/nobody", 404)
    assert "/datasets/ada/lines" in page(stranger, "/datasets").links
    found = page(stranger, "/datasets/ada")
    assert "/datasets/ada/lines" in found.links
    assert "/datasets/ada" in found.sources


def test_a_card(stranger: httpx2.Client, server: Server) -> None:
    found = page(stranger, "/lab/style")
    assert found.title == "lab/style · Adapter hub"
    for text in ("Adapter", "lora", "Targets", "Rank", "4", "Letters", "HF_ENDPOINT", f'"{server.url}"'):
        assert text in found.text, text
    assert {"/lab/base", "/lab/style/blob/main/adapter_config.json", "/lab/style/blob/main/notes/a.md"} <= set(
        found.links
    )
    assert "/lab/style/resolve/main/notes/p.png" in found.sources
    assert "How to load it" in found.text
    # The tool's own section says what the table says already.
    assert "What it is" not in found.text
    assert "not on this server" not in found.text


def test_whether_an_adapter_fits(stranger: httpx2.Client) -> None:
    found = page(stranger, "/lab/style")
    assert "yes, by shape" in found.text
    assert "All 12 tensors that it changes have the right shape; it has no hashes of its base on record." in found.text
    found = page(stranger, "/lab/other")
    assert "no" in found.text
    assert "m.12" in found.text


def test_a_name_alone(stranger: httpx2.Client) -> None:
    assert page(stranger, "/solo").title == "solo · Adapter hub"
    assert "/solo/blob/main/config.json" in page(stranger, "/solo/tree/main").links
    assert '"squares"' in page(stranger, "/solo/blob/main/config.json").text
    copies = page(stranger, "/lab/base/lineage")
    assert "The very same weights" in copies.text
    assert "/solo" in copies.links


def test_a_name_that_was(server: Server, stranger: httpx2.Client) -> None:
    server.api("ada").create_repo("ada/before")
    server.api("ada").move_repo("ada/before", "ada/after")
    answer = stranger.get("/ada/before/tree/main")
    assert (answer.status_code, answer.headers["location"]) == (307, "/ada/after/tree/main")
    server.api("ada").delete_repo("ada/after")


def test_a_dataset(stranger: httpx2.Client, server: Server) -> None:
    found = page(stranger, "/datasets/ada/lines")
    assert 'load_dataset("ada/lines")' in found.text
    assert "hf download ada/lines --repo-type dataset" in found.text
    assert "/datasets/ada/lines/tree/main" in found.links
    assert "There is nothing here yet." in page(stranger, "/datasets/ada/lines/tree/main").text


def test_files(stranger: httpx2.Client) -> None:
    found = page(stranger, "/lab/style/tree/main")
    assert {"/lab/style/tree/main/notes", "/lab/style/blob/main/adapter_config.json"} <= set(found.links)
    assert "/lab/style/resolve/main/adapter_model.safetensors" in found.links
    assert "/lab/style/blob/main/notes/a.md" in page(stranger, "/lab/style/tree/main/notes").links
    page(stranger, "/lab/style/tree/main/adapter_config.json", 404)
    page(stranger, "/lab/style/tree/main/nowhere", 404)
    page(stranger, "/lab/style/tree/nowhere", 404)
    page(stranger, "/lab/style/blob/main/nowhere", 404)
    assert '"r": 4' in page(stranger, "/lab/style/blob/main/adapter_config.json").text


def test_tensors_in_the_order_of_layers(stranger: httpx2.Client) -> None:
    found = page(stranger, "/lab/style/blob/main/adapter_model.safetensors")
    assert "24 tensors" in found.text
    assert found.text.index(".m.2.") < found.text.index(".m.10.")
    assert "16 × 4" in found.text
    assert "F32" in found.text


def test_history(stranger: httpx2.Client) -> None:
    found = page(stranger, "/lab/style/commits/main")
    (latest, first) = dict.fromkeys(link for link in found.links if "/commit/" in link)
    changed = page(stranger, latest)
    assert "2 changed files" in changed.text
    assert "added" in changed.text
    assert first in changed.links
    assert "Parent" not in page(stranger, first).text
    page(stranger, "/lab/style/commit/" + "0" * 40, 404)
    page(stranger, "/lab/style/commit/main", 404)


def test_lineage(stranger: httpx2.Client) -> None:
    found = page(stranger, "/lab/base/lineage")
    assert {"/lab/style", "/ada/merged"} <= set(found.links)
    assert "adapter of it; rank 4" in found.text
    assert "/lab/base" in page(stranger, "/lab/style/lineage").links
    assert "Nothing on this server" in page(stranger, "/ada/hostile/lineage").text


def test_every_link_leads_somewhere(stranger: httpx2.Client) -> None:
    """From the list on, to every page on the site."""
    waiting = ["/"]
    seen: set[str] = set()
    while waiting and len(seen) < 120:
        path = waiting.pop(0)
        if path in seen or not path.startswith("/") or "/-/" in path or "hostile" in path:
            continue
        seen.add(path)
        answer = stranger.get(path)
        assert answer.status_code == 200, path
        if answer.headers["content-type"].startswith("text/html"):
            waiting += read(answer).links
    assert len(seen) > 50


# What strangers upload ------------------------------------------------------------------------------------------------


def test_names_and_messages_of_strangers(stranger: httpx2.Client) -> None:
    """Each page is sound: the checker knows every tag and attribute that a page may have."""
    found = page(stranger, "/ada/hostile/tree/main")
    assert NAME in found.text
    quoted = next(link for link in found.links if "onerror" in link and "/blob/" in link)
    assert "<script>alert(1)</script>" in page(stranger, quoted).text
    history = page(stranger, "/ada/hostile/commits/main")
    assert "<script>alert(1)</script>" in history.text
    last, before, _ = dict.fromkeys(link for link in history.links if "/commit/" in link)
    assert "<b>body</b>\n    indented \\u202etxt" in page(stranger, last).text
    assert "\u202e" not in page(stranger, last).text + history.text
    assert NAME in page(stranger, before).text
    card = page(stranger, "/ada/hostile")
    assert "[x](javascript:alert(1))" in card.text
    assert "alert(1)\n</script>" not in card.text


HEADERS = {
    "bomb": "data",
    "text": "bytes",
    "deep": "nested too deeply",
    "long": f"those above {tensors.MAX_HEADER} are not shown here",
}


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_headers_become_a_sentence(server: Server, stranger: httpx2.Client, name: str) -> None:
    found = page(stranger, f"/ada/hostile/blob/main/{name}.safetensors")
    assert f"{name}.safetensors" in found.text
    assert HEADERS[name] in found.text
    assert str(server.data) not in found.text
    assert "By dtype" not in found.text


def test_headers_that_are_odd_and_sound(stranger: httpx2.Client) -> None:
    assert "<script>alert(1)</script>" in page(stranger, "/ada/hostile/blob/main/name.safetensors").text
    assert "1 tensor," in page(stranger, "/ada/hostile/blob/main/digits.safetensors").text
    first = page(stranger, "/ada/hostile/blob/main/many.safetensors")
    assert "Tensors 1 to 500 of 1200" in first.text
    following = next(link for link in first.links if "cursor=500" in link)
    last = next(link for link in page(stranger, following).links if "cursor=1000" in link)
    assert "Tensors 1001 to 1200 of 1200" in page(stranger, last).text
    assert "layers.1199.w" in page(stranger, last).text


def test_files_that_are_no_plain_text(stranger: httpx2.Client) -> None:
    assert "is not text" in page(stranger, "/ada/hostile/blob/main/binary.bin").text
    assert "This is no JSON" in page(stranger, "/ada/hostile/blob/main/deep.json").text
    assert (
        '{\n  "b": [\n    1,\n    2\n  ],\n  "a": "é<b>"\n}' in page(stranger, "/ada/hostile/blob/main/good.json").text
    )
    long = page(stranger, "/ada/hostile/blob/main/long.txt")
    assert "Only the beginning is shown" in long.text
    assert long.text.count("ä") == 131_072
    assert "<script>alert(1)</script>" in page(stranger, "/ada/hostile/blob/main/x.html").text


@pytest.mark.parametrize(
    "path",
    ["/<script>", "/%3Cscript%3E", "/a/b/c/d", "/ada/hostile/blob/main/%3Cscript%3E", "/settings", "/%ff", "/..%2f",
     "/-/x/y", "/-/0000000000000000/style.css", "/ada/hostile/tree/%3Cimg%20src=x%3E", "/ada/hostile/commit/%3Cb%3E"],
)  # fmt: skip
def test_addresses_of_nothing(stranger: httpx2.Client, path: str) -> None:
    answer = stranger.get(path)
    assert answer.status_code in (400, 404)
    read(answer)


def test_what_was_uploaded_does_not_run_here(stranger: httpx2.Client) -> None:
    for name in ("x.html", "good.json"):
        found = stranger.get(f"/ada/hostile/resolve/main/{name}")
        assert found.headers["content-type"] in ("application/octet-stream", "text/plain; charset=utf-8")
        assert "sandbox" in found.headers["content-security-policy"]


# Who may see what -----------------------------------------------------------------------------------------------------

PRIVATE = [
    "",
    "/tree/main",
    "/blob/main/README.md",
    "/commits/main",
    "/commit/" + "0" * 40,
    "/lineage",
    "/resolve/main/x",
]


@pytest.mark.parametrize("rest", PRIVATE)
def test_private_and_missing_look_the_same(server: Server, stranger: httpx2.Client, rest: str) -> None:
    with logged_in(server, "bob") as bob:
        for client in (stranger, bob):
            answers = [client.get(f"/ada/{name}{rest}") for name in ("secret", "nothing")]
            assert [answer.status_code for answer in answers] == [404, 404]
            first, second = (answer.text.replace("secret", "nothing") for answer in answers)
            assert first == second


def test_members_see_what_is_private(server: Server) -> None:
    with logged_in(server, "ada") as ada:
        found = page(ada, "/ada/secret")
        assert "Private" in found.text
        assert "HF_TOKEN" in found.text
        assert "/ada/secret" in page(ada, "/").links


def test_a_gate(server: Server, stranger: httpx2.Client) -> None:
    """What it is everybody sees, what is in it only who was let in."""
    server.api("ada").create_repo("ada/gated")
    assert commit(server, "ada", "ada/gated", file("x.txt", b"hidden"), file("README.md", b"# Seen")).is_success
    server.api("ada").update_repo_settings("ada/gated", gated="manual")
    assert "Seen" in page(stranger, "/ada/gated").text
    assert "x.txt" in page(stranger, "/ada/gated/tree/main").text
    assert "Seen" in page(stranger, "/ada/gated/blob/main/README.md").text
    for path in ("/ada/gated/blob/main/x.txt", "/ada/gated/resolve/main/x.txt"):
        found = page(stranger, path, 401)
        assert "Access to model ada/gated is restricted" in found.text
        assert "hidden" not in found.text
    with logged_in(server, "ada") as ada:
        assert "hidden" in page(ada, "/ada/gated/blob/main/x.txt").text
    server.api("ada").delete_repo("ada/gated")


def test_programs_get_the_answers_they_know(server: Server) -> None:
    plain = httpx2.get(f"{server.url}/ada/nothing", headers={"Accept": "*/*"})
    assert (plain.status_code, plain.json()) == (401, {"error": "Repository not found, or it needs a token."})
    assert plain.headers["x-error-code"] == "RepoNotFound"
    api = httpx2.get(f"{server.url}/api/models/ada/nothing", headers={"Accept": "text/html"})
    assert (api.status_code, api.headers["x-error-code"]) == (401, "RepoNotFound")
    assert api.headers["content-type"] == "application/json"


def test_pages_take_no_other_methods(server: Server) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        answer = httpx2.request(method, f"{server.url}/lab/style", headers={"Accept": "text/html"})
        assert answer.status_code == 405
        read(answer)
    head = httpx2.head(f"{server.url}/lab/style")
    assert (head.status_code, head.content) == (200, b"")


def test_files_of_the_site(stranger: httpx2.Client) -> None:
    found = stranger.get("/")
    named = [link for link in read(found).links + read(found).sources if link.startswith("/-/")]
    assert {link.rpartition(".")[2] for link in named} == {"css", "js", "svg"}
    for link in named:
        answer = stranger.get(link)
        assert answer.status_code == 200
        assert "immutable" in answer.headers["cache-control"]
        assert Path(link).suffix[1:].replace("js", "javascript") in answer.headers["content-type"]
