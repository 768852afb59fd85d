"""Administration over the network does what it does on the data folder, for an administrator only."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from click.testing import CliRunner

from surgery.cli.main import cli
from surgery.errors import SurgeryError
from tests.hub.server.serving import ADMIN, Server


@pytest.fixture(params=["folder", "network"])
def run(request: pytest.FixtureRequest, server: Server, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a command on the server, one way or the other, and returns its report."""
    place = ("--data", str(server.data)) if request.param == "folder" else ("--endpoint", server.url)
    monkeypatch.setenv("HF_TOKEN", ADMIN)

    def invoke(*words: str) -> Any:
        found = CliRunner().invoke(
            cli, ["hub", *words, *place, "--json"], catch_exceptions=False, standalone_mode=False
        )
        return json.loads(found.stdout)

    invoke.__name__ = str(request.param)
    return invoke


def works(server: Server, token: str) -> int:
    return httpx2.get(f"{server.url}/api/whoami-v2", headers={"Authorization": f"Bearer {token}"}).status_code


def test_from_the_first_user_to_the_last_token(run: Callable[..., Any], server: Server) -> None:
    name, lab = f"eve-{run.__name__}", f"lab-{run.__name__}"
    assert run("user", "add", name) == {"name": name, "kind": "user", "members": []}
    assert run("org", "add", lab, "--member", name) == {"name": lab, "kind": "organisation", "members": [name]}
    assert run("org", "member", "add", lab, "ADA")["members"] == ["ada", name]
    made = run("token", "create", "--user", name, "--role", "write", "--repo", f"{lab}/x", "--expires", "2")
    token = made.pop("token")
    assert works(server, token) == 200
    assert (made["user"], made["role"], made["repository"]) == (name, "write", f"{lab}/x")
    whoami = server.api(token).whoami()
    assert [org["name"] for org in whoami["orgs"]] == [lab]
    assert run("org", "member", "remove", lab, name)["members"] == ["ada"]
    assert server.api(token).whoami()["orgs"] == []
    (listed,) = run("token", "list", "--user", name)["tokens"]
    assert listed["id"] == made["id"]
    assert (listed["label"], listed["expires"]) == ("token create", made["expires"])
    assert token not in json.dumps(run("token", "list"))
    spaces = {item["name"]: item for item in run("user", "list")["namespaces"]}
    assert spaces[lab] == {"name": lab, "kind": "organisation", "members": ["ada"]}
    assert spaces["ada"]["kind"] == "user"
    assert run("token", "revoke", made["id"])["tokens"] == [listed]
    assert works(server, token) == 401


def test_a_token_of_somebody_else_is_not_replaced(
    run: Callable[..., Any], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = "There is another token of this value already"
    monkeypatch.setenv("GIVEN", server.tokens["ada"])
    for words in (
        ("--user", "bob", "--role", "write"),
        ("--user", "ada", "--role", "read"),
        ("--user", "ada", "--role", "write", "--repo", "ada/x"),
    ):
        with pytest.raises(SurgeryError, match=taken):
            run("token", "create", *words, "--value-from-env", "GIVEN")
    monkeypatch.setenv("GIVEN", ADMIN)
    with pytest.raises(SurgeryError, match=taken):
        run("token", "create", "--user", "bob", "--role", "admin", "--value-from-env", "GIVEN")
    assert [server.api(user).whoami()["name"] for user in ("ada", "admin")] == ["ada", "admin"]
    # The same one again has a new time; nothing else changes.
    monkeypatch.setenv("GIVEN", server.tokens["ada"])
    again = run("token", "create", "--user", "ADA", "--role", "write", "--expires", "3", "--value-from-env", "GIVEN")
    assert [entry["expires"] for entry in run("token", "list", "--user", "ada")["tokens"]].count(again["expires"]) == 1
    assert server.api("ada").whoami()["name"] == "ada"


MISTAKES = [
    (("user", "add", "ADA"), "There is a user called ada already."),
    (("user", "add", "a/b"), "'a/b' is not a name for a user or an organisation: it has a slash."),
    (("org", "add", "new", "--member", "nobody"), "There is no user called nobody; `surgery hub user add nobody`"),
    (("org", "member", "add", "nolab", "ada"), "There is no organisation called nolab; `surgery hub org add nolab`"),
    (("token", "create", "--user", "nobody", "--role", "read"), "There is no user called nobody"),
    (("token", "create", "--user", "ada", "--role", "read", "--expires", "0"), "--expires is 0, expected a number"),
    (
        ("token", "create", "--user", "ada", "--role", "read", "--expires", "9" * 20),
        f"--expires is {'9' * 20}, expected a number of days, 1 to 36500.",
    ),
    (("token", "list", "--user", "nobody"), "There is no user called nobody"),
    (("token", "revoke", "0123"), "There is no token 0123; `surgery hub token list` shows those that there are."),
]


@pytest.mark.parametrize(("words", "sentence"), MISTAKES)
def test_the_same_sentences(run: Callable[..., Any], words: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(SurgeryError) as error:
        run(*words)
    assert str(error.value).startswith(sentence)


def test_for_administrators_only(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def add(token: str) -> str:
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(SurgeryError) as error:
            CliRunner().invoke(
                cli,
                ["hub", "user", "add", "mallory", "--endpoint", server.url],
                catch_exceptions=False,
                standalone_mode=False,
            )
        return str(error.value)

    refused = f"{server.url} refused: This needs the token of an administrator."
    assert add(server.tokens["ada"]) == refused
    assert add(server.token("admin", "admin", repository="ada/x")) == refused
    assert add("a-token-that-is-wrong") == f"{server.url} refused: Invalid credentials in Authorization header"
    answer = httpx2.post(f"{server.url}/api/admin/users", json={"name": "mallory"})
    assert answer.status_code == 401
    headers = {"Authorization": f"Bearer {ADMIN}"}
    for path, body in {
        "users": {"name": 5}, "organisations": {"name": "x", "members": "ada"}, "members": {}, "tokens": {"days": "x"},
        "tokens/revoke": {"id": None},
    }.items():  # fmt: skip
        assert httpx2.post(f"{server.url}/api/admin/{path}", json=body, headers=headers).status_code == 400
    assert httpx2.post(f"{server.url}/api/admin/nothing", headers=headers).status_code == 404
    names = [
        item["name"] for item in httpx2.get(f"{server.url}/api/admin/namespaces", headers=headers).json()["namespaces"]
    ]
    assert "mallory" not in names


def test_which_server_is_said(server: Server) -> None:
    for words in ((), ("--data", "x", "--endpoint", "http://x")):
        with pytest.raises(SurgeryError, match="Which server is meant is said by --data DIR or by --endpoint URL"):
            CliRunner().invoke(cli, ["hub", "user", "list", *words], catch_exceptions=False, standalone_mode=False)
    with pytest.raises(SurgeryError, match="--endpoint is 'x', expected an address"):
        CliRunner().invoke(
            cli, ["hub", "user", "list", "--endpoint", "x"], catch_exceptions=False, standalone_mode=False
        )
