"""The audit log and the request log: who did what from where, and never a token or a signed address."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.hub.server.audit import FILE, Audit
from tests.hub.server.serving import ADMIN, Server, serving
from tests.hub.server.test_protocol import put


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("logged"), "--log", "json", "--trust-proxy", "127.0.0.1") as found:
        yield found


def audit(server: Server) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (server.data / FILE).read_text().splitlines()]


def requests(server: Server, number: str = "") -> list[dict[str, Any]]:
    """What the log says; of one request when its id is given, for which it may have to be waited."""
    assert server.log is not None
    for _ in range(50):
        found = [json.loads(line) for line in server.log.read_text().splitlines()]
        found = [entry for entry in found if not number or entry.get("id") == number]
        if found:
            return found
        time.sleep(0.1)
    return []


def test_what_is_recorded(logged: Server) -> None:
    api = logged.api()
    api.create_repo("recorded")
    head = put(api, "ada/recorded", {"a.txt": b"a"})
    api.create_branch("ada/recorded", branch="side")
    headers = {"Authorization": f"Bearer {logged.tokens['bob']}", "X-Forwarded-For": "192.0.2.7"}
    refused = httpx2.request(
        "DELETE", f"{logged.url}/api/repos/delete", json={"name": "recorded", "organization": "ada"}, headers=headers
    )
    assert refused.status_code == 403
    api.list_repo_files("ada/recorded")
    api.delete_repo("ada/recorded")
    wrong = httpx2.get(f"{logged.url}/api/whoami-v2", headers={"Authorization": "Bearer no-such-token-at-all"})
    found = audit(logged)
    changes = [(entry["action"], entry["user"], entry["result"]) for entry in found if "result" in entry]
    assert changes == [
        ("create", "ada", 200),
        ("commit", "ada", 200),
        ("ref.add", "ada", 200),
        ("delete", "bob", 403),
        ("delete", "ada", 200),
        ("login refused", "", 401),
    ]
    by_hand = [(entry["action"], entry["address"]) for entry in found if "result" not in entry]
    assert ("user.add", "command line") in by_hand
    made = next(entry for entry in found if entry["action"] == "commit")
    assert made["details"] == {"branch": "main", "commit": head}
    assert (made["method"], made["path"]) == ("POST", "/api/models/ada/recorded/commit/main")
    assert made["address"] == "127.0.0.1"
    assert [entry["address"] for entry in found if entry["user"] == "bob"] == ["192.0.2.7"]
    assert found[-1]["id"] == wrong.headers["x-request-id"]
    assert (logged.data / FILE).stat().st_mode & 0o777 == 0o600


def test_what_is_refused_to_an_administrator_or_a_stranger_has_a_name(logged: Server) -> None:
    def ask(token: str, path: str, body: object) -> int:
        headers = {"Authorization": f"Bearer {token}"}
        return httpx2.post(f"{logged.url}/api/admin/{path}", json=body, headers=headers).status_code

    before, bob = len(audit(logged)), logged.tokens["bob"]
    assert ask(bob, "users", {"name": "mallory"}) == 403
    assert ask(bob, "tokens", {"user": "bob", "role": "admin"}) == 403
    assert ask(ADMIN, "users", {"name": "ada"}) == 400
    assert ask(ADMIN, "users", []) == 400
    assert ask(ADMIN, "members", {"organisation": "none", "user": "ada"}) == 400
    assert ask(ADMIN, "members", {"organisation": "lab", "user": "bob"}) == 200
    assert ask(ADMIN, "tokens/revoke", {"id": "0"}) == 400
    assert ask(ADMIN, "tokens/list", {}) == 200
    assert ask(ADMIN, "nothing", {}) == 404
    assert httpx2.post(f"{logged.url}/api/admin/users", json={"name": "mallory"}).status_code == 401
    found = [(entry["action"], entry["user"], entry["result"]) for entry in audit(logged)[before:]]
    assert found == [
        ("user.add", "bob", 403), ("token.create", "bob", 403), ("user.add", "admin", 400), ("user.add", "admin", 400),
        ("org.member", "admin", 400), ("org.member.add", "admin", 200), ("token.revoke", "admin", 400),
        ("token.list", "admin", 200), ("admin", "admin", 404), ("user.add", "", 401),
    ]  # fmt: skip


def test_no_name_of_a_branch_keeps_a_change_out(logged: Server) -> None:
    """Some requests are sent by POST and change nothing; a branch may be called like these."""
    logged.api("bob").create_repo("words")
    headers = {"Authorization": f"Bearer {logged.tokens['bob']}"}
    url = f"{logged.url}/api/models/bob/words"
    names = ["validate-yaml", "objects/batch", "lfs/objects/batch", "info/lfs/verify", "preupload/x", "paths-info"]
    before = len(audit(logged))
    for number, name in enumerate(names, 1):
        assert httpx2.post(f"{url}/branch/{name}", json={}, headers=headers).status_code == 200
        assert audit(logged)[before:][-1]["details"]["ref"] == f"refs/heads/{name}"
        assert len(audit(logged)) == before + number
    before = len(audit(logged))
    for name in names:
        assert httpx2.post(f"{url}/super-squash/{name}", json={"message": name}, headers=headers).status_code == 200
    assert [entry["action"] for entry in audit(logged)[before:]] == ["squash"] * len(names)
    before = len(audit(logged))
    assert httpx2.post(f"{url}/preupload/main", json={"files": []}, headers=headers).status_code == 200
    assert httpx2.post(f"{url}/paths-info/main", headers=headers).status_code == 200
    assert httpx2.post(f"{logged.url}/api/validate-yaml", json={"content": ""}, headers=headers).status_code == 200
    batch = {"operation": "download", "objects": []}
    answer = httpx2.post(f"{logged.url}/bob/words.git/info/lfs/objects/batch", json=batch, headers=headers)
    assert answer.status_code == 200
    assert len(audit(logged)) == before


def test_what_is_logged(logged: Server) -> None:
    headers = {"Authorization": f"Bearer {logged.tokens['ada']}"}
    answer = httpx2.get(f"{logged.url}/api/whoami-v2?x=1", headers=headers)
    (entry,) = requests(logged, answer.headers["x-request-id"])
    assert (entry["method"], entry["path"], entry["status"], entry["user"]) == ("GET", "/api/whoami-v2", 200, "ada")
    assert entry["bytes"] == len(answer.content)
    assert 0 <= entry["ms"] < 60_000
    ids = [httpx2.get(f"{logged.url}/health", headers={"X-Request-Id": "x"}).headers["x-request-id"] for _ in "ab"]
    assert len({*ids, "x"}) == 3


def test_no_secrets_anywhere(logged: Server, tmp_path: Path) -> None:
    """Uploads and downloads both ways, tokens good and bad, and then the whole folder is searched."""
    api = logged.api()
    api.create_repo("kept")
    path = tmp_path / "w.bin"
    signed = []
    for number, disabled in enumerate("01"):
        path.write_bytes(random.Random(number).randbytes(300_000))
        logged.client(
            f"""
            api.upload_file(path_or_fileobj={str(path)!r}, path_in_repo='w{disabled}.bin', repo_id='ada/kept')
            api.hf_hub_download('ada/kept', 'w{disabled}.bin')
            """,
            HF_HUB_DISABLE_XET=disabled,
        )
    headers = {"Authorization": f"Bearer {logged.tokens['ada']}"}
    answer = httpx2.get(f"{logged.url}/api/models/ada/kept/xet-read-token/main", headers=headers).json()
    signed.append(answer["accessToken"])
    (info,) = api.get_paths_info("ada/kept", "w0.bin")
    plan = httpx2.get(
        f"{answer['casUrl']}/v1/reconstructions/{getattr(info, 'xet_hash', '')}",
        headers={"Authorization": f"Bearer {answer['accessToken']}"},
    ).json()
    url = next(iter(plan["fetch_info"].values()))[0]["url"]
    signed.append(url.rpartition("signature=")[2])
    assert httpx2.get(url).status_code in (200, 206)
    assert httpx2.get(url + "0").status_code == 403
    httpx2.get(f"{logged.url}/api/whoami-v2", headers={"Authorization": "Bearer a-token-that-is-wrong"})
    httpx2.get(f"{logged.url}/api/whoami-v2", headers={"Authorization": f"Basic {ADMIN}"})
    assert logged.log is not None
    for record in (logged.log, logged.data / FILE):
        text = record.read_text()
        assert len(text.splitlines()) > 5
        for secret in (*logged.tokens.values(), ADMIN, "a-token-that-is-wrong", *signed, "signature", "hub_"):
            assert secret not in text, (record, secret)


def test_hostile_text_stays_on_its_line(logged: Server) -> None:
    before = len(audit(logged))
    api = logged.api()
    api.create_repo("hostile")
    headers = {"Authorization": f"Bearer {logged.tokens['ada']}"}
    evil = 'a\n{"action": "forged"}\r\x1b[2J\u2028'
    for name in (evil, "x" * 100_000):
        httpx2.post(f"{logged.url}/api/models/ada/hostile/tag/main", json={"tag": name}, headers=headers)
    found = audit(logged)[before:]
    assert [entry["action"] for entry in found] == ["create", "ref.add", "ref.add"]
    assert found[1]["details"]["ref"] == f"refs/tags/{evil}"
    assert len(json.dumps(found[2])) < 2000
    data = (logged.data / FILE).read_bytes()
    assert data.isascii()
    assert b"\x1b" not in data


@given(st.text(), st.dictionaries(st.text(), st.text() | st.integers() | st.lists(st.text())))
def test_a_line_is_a_line(tmp_path_factory: pytest.TempPathFactory, text: str, details: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("audit")
    Audit(folder).record(text, text, text, details, path=text)
    (line,) = (folder / FILE).read_bytes().splitlines()
    assert json.loads(line)["details"].keys() == details.keys()


def test_several_write_and_files_are_renamed(tmp_path: Path) -> None:
    several = [Audit(tmp_path, 5000) for _ in range(4)]

    def write(number: int) -> None:
        for count in range(100):
            several[number].record("x", str(number), "here", {"count": count})

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    files = sorted(tmp_path.glob("audit*.jsonl"))
    assert len(files) > 5
    lines = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    assert len(lines) == 400
    assert {(entry["user"], entry["details"]["count"]) for entry in lines} == {
        (str(number), count) for number in range(4) for count in range(100)
    }
    assert max(path.stat().st_size for path in files) < 5200
