"""Sessions and tokens in a browser: what a cookie may do, what it may not, and what ends it."""

from __future__ import annotations

import json
import re
import socket
import sqlite3
import time
from pathlib import Path

import httpx2
import pytest

from surgery.hub.server.signing import Signer, load_key
from tests.hub.server.html_tools import browser, logged_in, read
from tests.hub.server.serving import ADMIN, Server, serving

COOKIE = "surgery-session"


@pytest.fixture(scope="module", autouse=True)
def filled(server: Server) -> None:
    server.api("ada").create_repo("ada/secret", private=True)
    server.api("ada").upload_file(path_or_fileobj=b"hidden", path_in_repo="x.txt", repo_id="ada/secret")


def form_at(client: httpx2.Client, path: str) -> str:
    return read(client.get(path)).fields["form"]


def made_token(answer: httpx2.Response) -> str:
    found = re.search(r"hub_[\w-]{43}", answer.text)
    assert found is not None
    return found[0]


# Logging in -----------------------------------------------------------------------------------------------------------


def test_in_and_out(server: Server) -> None:
    with logged_in(server, "ada") as ada:
        assert ada.get("/ada/secret").status_code == 200
        assert ada.get("/ada/secret/resolve/main/x.txt").content == b"hidden"
        assert "ada" in read(ada.get("/")).text
        answer = ada.post("/logout", data={"form": form_at(ada, "/")})
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        assert COOKIE not in ada.cookies
        assert ada.get("/ada/secret").status_code == 404


def test_the_cookie(server: Server) -> None:
    with browser(server) as client:
        form = form_at(client, "/login")
        answer = client.post("/login", data={"form": form, "token": server.tokens["ada"], "next": "/ada/secret"})
    assert answer.headers["location"] == "/ada/secret"
    cookie = answer.headers["set-cookie"]
    assert {"HttpOnly", "Path=/", "SameSite=lax", "Max-Age=604800"} <= {part.strip() for part in cookie.split(";")}
    assert "Secure" not in cookie  # this server speaks http
    assert server.tokens["ada"] not in cookie


@pytest.mark.parametrize(
    "following", ["//example.org", "/\\example.org", "https://example.org", "javascript:x", "", "/\n"]
)
def test_where_a_login_does_not_lead(server: Server, following: str) -> None:
    with browser(server) as client:
        form = form_at(client, "/login")
        answer = client.post("/login", data={"form": form, "token": server.tokens["ada"], "next": following})
        assert answer.headers["location"] == "/"
        page = read(client.get("/login", params={"next": following}))
        assert page.fields["next"] == "/"


@pytest.mark.parametrize("token", ["", "wrong", "hub_" + "x" * 43, "x" * 5000, "\0"])
def test_wrong_tokens(server: Server, token: str) -> None:
    with browser(server) as client:
        answer = client.post("/login", data={"form": form_at(client, "/login"), "token": token})
        assert answer.status_code == 403
        assert "This server knows no such token, or it has expired." in read(answer).text
        assert COOKIE not in client.cookies


def test_a_forged_or_expired_cookie_is_nobody(server: Server) -> None:
    signer = Signer(load_key(server.data / "server.key"))
    with sqlite3.connect(server.data / "server.sqlite") as db:
        digest = db.execute("SELECT digest FROM tokens WHERE user = 'ada'").fetchone()[0].hex()
    db.close()
    now = int(time.time())
    good = signer.token("session", {"token": digest}, now + 60)
    cookies = {
        good: 200,
        signer.token("session", {"token": digest}, now - 1): 404,
        signer.token("xet", {"token": digest}, now + 60): 404,
        Signer(b"x" * 32).token("session", {"token": digest}, now + 60): 404,
        signer.token("session", {"token": "0" * 64}, now + 60): 404,
        good[:-2]: 404,
        "x": 404,
        ".": 404,
    }
    for cookie, status in cookies.items():
        answer = httpx2.get(f"{server.url}/ada/secret", headers={"Cookie": f"{COOKIE}={cookie}", "Accept": "text/html"})
        assert answer.status_code == status, cookie


# What a cookie may not do ---------------------------------------------------------------------------------------------

CHANGES = [
    ("POST", "/api/repos/create", {"name": "new"}),
    ("DELETE", "/api/repos/delete", {"name": "ada/secret"}),
    ("POST", "/api/repos/move", {"fromRepo": "ada/secret", "toRepo": "ada/other"}),
    ("PUT", "/api/models/ada/secret/settings", {"private": False}),
    ("POST", "/api/models/ada/secret/branch/b", {}),
    ("DELETE", "/api/models/ada/secret/branch/main", {}),
    ("POST", "/api/models/ada/secret/tag/main", {"tag": "v1"}),
    ("POST", "/api/models/ada/secret/commit/main", {"key": "header", "value": {"summary": "x"}}),
    ("POST", "/api/models/ada/secret/preupload/main", {"files": []}),
    ("POST", "/api/models/ada/secret/duplicate", {"repository": "ada/copy"}),
    ("GET", "/api/models/ada/secret/xet-write-token/main", {}),
    ("GET", "/api/models/ada/secret/xet-read-token/main", {}),
    ("GET", "/api/models/ada/secret", {}),
    ("GET", "/api/whoami-v2", {}),
    ("POST", "/ada/secret.git/info/lfs/objects/batch", {"operation": "upload", "objects": []}),
]


@pytest.mark.parametrize(("method", "path", "body"), CHANGES)
def test_the_api_takes_tokens_only(server: Server, method: str, path: str, body: dict[str, object]) -> None:
    with logged_in(server, "ada") as ada:
        assert COOKIE in ada.cookies
        answer = ada.request(method, path, content=json.dumps(body), headers={"Accept": "*/*"})
        assert answer.status_code == 401, answer.text
        assert ada.get("/ada/secret").status_code == 200


FORMS = ["/login", "/logout", "/settings/tokens", "/settings/tokens/revoke"]


@pytest.mark.parametrize("path", FORMS)
def test_forms_from_elsewhere_are_refused(server: Server, path: str) -> None:
    with logged_in(server, "ada") as ada, logged_in(server, "bob") as bob:
        good, other = form_at(ada, "/settings/tokens"), form_at(bob, "/settings/tokens")
        fields = {"label": "x", "role": "read", "token": server.tokens["ada"]}
        before = ada.get("/settings/tokens").text.count("<tr>")
        for form, headers in (
            ({}, {}),
            ({"form": "x"}, {}),
            ({"form": other}, {}),
            ({"form": good}, {"Sec-Fetch-Site": "cross-site"}),
            ({"form": good}, {"Sec-Fetch-Site": "same-site"}),
        ):
            answer = ada.post(path, data={**fields, **form}, headers=headers)
            assert answer.status_code == 403
            assert "not sent from a page of this site" in read(answer).text
        answer = ada.post(path, content=json.dumps({**fields, "form": good}), headers={"Content-Type": "text/plain"})
        assert answer.status_code == 415
        assert ada.post(path, data={"form": good, "label": "x" * 20_000}).status_code == 413
        assert ada.get("/settings/tokens").text.count("<tr>") == before


# Tokens ---------------------------------------------------------------------------------------------------------------


def test_a_token_is_made_listed_and_revoked(server: Server) -> None:
    with logged_in(server, "ada") as ada:
        fields = {"form": form_at(ada, "/settings/tokens"), "label": "<b>laptop</b>", "role": "read", "days": "7",
                  "repository": "ada/secret"}  # fmt: skip
        answer = ada.post("/settings/tokens", data=fields)
        assert answer.headers["cache-control"] == "no-store"
        token = made_token(answer)
        assert "<b>laptop</b>" in read(answer).text
        listed = ada.get("/settings/tokens")
        assert token not in listed.text
        assert "ada/secret" in read(listed).text
        headers = {"Authorization": f"Bearer {token}"}
        address = f"{server.url}/api/models/ada/secret"
        assert httpx2.get(address, headers=headers).status_code == 200
        assert httpx2.post(f"{address}/branch/b", headers=headers, json={}).status_code == 403
        with logged_in(server, token) as narrow:
            assert narrow.get("/ada/secret").status_code == 200
            identity = re.findall(r'name="token" value="(\w{12})"', narrow.get("/settings/tokens").text)
            assert len(identity) == 1
            form = form_at(ada, "/settings/tokens")
            answer = ada.post("/settings/tokens/revoke", data={"form": form, "token": identity[0]})
            assert (answer.status_code, answer.headers["location"]) == (303, "/settings/tokens")
            # The session that began with it is over.
            assert narrow.get("/ada/secret").status_code == 404
        assert httpx2.get(address, headers=headers).status_code == 401
        answer = ada.post("/settings/tokens/revoke", data={"form": form, "token": identity[0]})
        assert answer.status_code == 404
        assert "There is no such token any more." in read(answer).text


def test_revoking_the_token_of_the_session_ends_it(server: Server) -> None:
    token = server.token("ada")
    with logged_in(server, token) as ada:
        listed = ada.get("/settings/tokens").text
        own = re.search(r'This session.*?name="token" value="(\w{12})"', listed, re.DOTALL)
        assert own is not None
        answer = ada.post("/settings/tokens/revoke", data={"form": form_at(ada, "/"), "token": own[1]})
        assert (answer.status_code, answer.headers["location"]) == (303, "/login")
        assert ada.get("/ada/secret").status_code == 404
    with logged_in(server, "ada") as again:
        assert again.get("/ada/secret").status_code == 200


def test_nobody_revokes_what_is_not_theirs(server: Server) -> None:
    with logged_in(server, "ada") as ada, logged_in(server, "bob") as bob:
        theirs = re.findall(r'name="token" value="(\w{12})"', ada.get("/settings/tokens").text)[0]
        answer = bob.post("/settings/tokens/revoke", data={"form": form_at(bob, "/"), "token": theirs})
        assert answer.status_code == 404
        assert ada.get("/ada/secret").status_code == 200


@pytest.mark.parametrize("scope", [{"role": "read"}, {"role": "write", "repository": "ada/secret"}])
def test_a_token_leads_to_no_greater_one(server: Server, scope: dict[str, str]) -> None:
    token = server.token("ada", scope["role"], repository=scope.get("repository"))
    with logged_in(server, token) as ada:
        page = read(ada.get("/settings/tokens"))
        assert "which does not show or make others" in page.text
        assert page.text.count("token create") == 1
        fields = {"form": page.fields["form"], "label": "x", "role": "read"}
        assert ada.post("/settings/tokens", data=fields).status_code == 403


def test_roles_and_ends_are_not_exceeded(server: Server) -> None:
    with logged_in(server, server.token("ada", days=1)) as ada:
        form = form_at(ada, "/settings/tokens")
        answer = ada.post("/settings/tokens", data={"form": form, "label": "x", "role": "admin"})
        assert answer.status_code == 400
        assert "Choose what the token may do." in read(answer).text
        token = made_token(
            ada.post("/settings/tokens", data={"form": form, "label": "long", "role": "read", "days": "90"})
        )
    with sqlite3.connect(server.data / "server.sqlite") as db:
        expires = db.execute("SELECT expires FROM tokens WHERE label = 'long'").fetchone()[0]
    db.close()
    assert token
    assert expires <= time.time() + 86_400
    with logged_in(server, ADMIN) as admin:
        form = form_at(admin, "/settings/tokens")
        made_token(admin.post("/settings/tokens", data={"form": form, "label": "x", "role": "admin"}))


WRONG = {
    "role": ("owner", "Choose what the token may do."),
    "label": ("", "Give the token a name"),
    "repository": ("a/b/c", "is not a name for a repository"),
    "days": ("-1", "Give the days as a number"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_token_cannot_be(server: Server, name: str) -> None:
    value, sentence = WRONG[name]
    with logged_in(server, "ada") as ada:
        fields = {"form": form_at(ada, "/settings/tokens"), "label": "x", "role": "read", name: value}
        answer = ada.post("/settings/tokens", data=fields)
        assert answer.status_code == 400
        assert sentence in read(answer).text


def test_strangers_are_sent_to_the_login(server: Server) -> None:
    with browser(server) as client:
        answer = client.get("/settings/tokens")
        assert (answer.status_code, answer.headers["location"]) == (303, "/login?next=%2Fsettings%2Ftokens")
        form = form_at(client, "/login")
        assert client.post("/settings/tokens", data={"form": form, "label": "x", "role": "read"}).status_code == 401


def test_a_bearer_of_a_token_is_no_browser(server: Server) -> None:
    headers = {"Authorization": f"Bearer {server.tokens['ada']}", "Accept": "text/html"}
    assert httpx2.get(f"{server.url}/ada/secret", headers=headers).status_code == 200
    assert httpx2.get(f"{server.url}/settings/tokens", headers=headers).status_code == 403


# Behind https ---------------------------------------------------------------------------------------------------------


def test_cookies_behind_https(tmp_path: Path) -> None:
    """A server that clients reach by https: its cookies go over nothing else, and to this host only."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with serving(tmp_path, "--url", "https://hub.example.org", "--port", str(port)) as server:
        behind = f"http://127.0.0.1:{port}"
        first = httpx2.get(f"{behind}/login")
        cookie = first.headers["set-cookie"].partition(";")[0]
        fields = {"form": read(first).fields["form"], "token": server.tokens["ada"]}
        # As it is without https, the cookie is not taken for one.
        plain = {"Cookie": cookie.removeprefix("__Host-")}
        assert httpx2.post(f"{behind}/login", data=fields, headers=plain).status_code == 403
        answer = httpx2.post(f"{behind}/login", data=fields, headers={"Cookie": cookie})
        given = answer.headers["set-cookie"]
        assert given.startswith(f"__Host-{COOKIE}=")
        assert "Secure" in given
        assert "Path=/" in given
        assert "Domain" not in given
        listed = httpx2.get(f"{behind}/settings/tokens", headers={"Cookie": given.partition(";")[0]})
        assert "Tokens of ada" in read(listed).text
