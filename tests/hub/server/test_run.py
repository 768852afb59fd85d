"""Starting a server, its first token, and its administration from the command line."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx2
import pytest
from click.testing import CliRunner

from surgery.cli.main import cli
from surgery.errors import OptionError, SurgeryError
from surgery.hub.collecting import GcOptions, GcReport, gc
from surgery.hub.naming import RepositoryName
from surgery.hub.server import run
from surgery.hub.server.accounts import SqliteAccounts
from surgery.hub.server.run import ServeOptions, _listening, create_token, serve
from surgery.hub.store import open_registry
from tests.hub.server.serving import ROOT


def started(data: Path, count: int) -> tuple[subprocess.Popen[str], list[str]]:
    """A server without a token in its environment, and the first lines that it prints."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment.pop("SURGERY_HUB_ADMIN_TOKEN", None)
    command = [sys.executable, "-m", "surgery", "hub", "serve", "--data", str(data), "--port", "0"]
    process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, [process.stdout.readline().strip() for _ in range(count)]


def test_the_first_start_shows_a_token_once(tmp_path: Path) -> None:
    data = tmp_path / "data"
    process, (first, second) = started(data, 2)
    try:
        found = re.fullmatch(r"Token of admin, shown this once: (hub_[\w-]{43})", first)
        assert found is not None
        url = second.rpartition("=")[2]
        answer = httpx2.get(f"{url}/api/whoami-v2", headers={"Authorization": f"Bearer {found[1]}"})
        assert answer.json()["name"] == "admin"
        assert (data / "server.key").stat().st_mode & 0o777 == 0o600
    finally:
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=30)
    assert rest == ""
    assert process.returncode in (0, -signal.SIGTERM)
    process, (line,) = started(data, 1)
    process.kill()
    process.communicate(timeout=30)
    assert line.startswith("Serving ")


def invoke(*words: str) -> dict[str, object]:
    result = CliRunner().invoke(cli, [*words, "--json"], catch_exceptions=False)
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


def test_users_organisations_and_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ("--data", str(tmp_path))
    with pytest.raises(SurgeryError, match="has never been served"):
        create_token(tmp_path, "ada", "read", None, None, None)
    SqliteAccounts(tmp_path / "server.sqlite").close()
    assert invoke("hub", "user", "add", "Ada", *data) == {"name": "Ada", "kind": "user", "members": []}
    made = invoke("hub", "org", "add", "lab", "--member", "ada", "--private-by-default", *data)
    assert made == {"name": "lab", "kind": "organisation", "members": ["ada"]}
    token = invoke("hub", "token", "create", "--user", "ada", "--role", "write", "--repo", "lab/x", *data)["token"]
    assert isinstance(token, str)
    monkeypatch.setenv("GIVEN", "a-token-from-elsewhere")
    given = ("--user", "ada", "--role", "read", "--expires", "2", "--value-from-env", "GIVEN")
    assert invoke("hub", "token", "create", *given, *data)["token"] is None
    accounts = SqliteAccounts(tmp_path / "server.sqlite")
    identity = accounts.identify(token, 0)
    assert identity is not None
    assert (identity.user, identity.organisations, identity.role) == ("Ada", ("lab",), "write")
    assert identity.may_write(RepositoryName("lab", "X"))
    assert not identity.may_write(RepositoryName("lab", "y"))
    assert not identity.may_write(RepositoryName("", "x"))
    space = accounts.namespace("LAB")
    assert space is not None
    assert space.private_by_default
    assert accounts.identify("a-token-from-elsewhere", 0) is not None
    assert accounts.identify("a-token-from-elsewhere", 1 << 40) is None
    accounts.close()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("user", "add", "a/b"), "'a/b' is not a name for a user or an organisation: it has a slash."),
        (("user", "add", "api"), "'api' is not a name for a user or an organisation: it has another meaning."),
        (("user", "add", "ADA"), "There is a user called ada already."),
        (
            ("org", "add", "lab", "--member", "eve"),
            "There is no user called eve; `surgery hub user add eve` makes one.",
        ),
        (("token", "create", "--user", "eve", "--role", "read"), "There is no user called eve; `surgery hub user"),
        (("token", "create", "--user", "ada", "--role", "read", "--expires", "0"), "--expires is 0, expected a number"),
        (
            ("token", "create", "--user", "ada", "--role", "read", "--expires", "9" * 20),
            f"--expires is {'9' * 20}, expected a number of days, 1 to 36500.",
        ),
        (("token", "create", "--user", "ada", "--role", "read", "--repo", "a//b"), "'a//b' is not a name for"),
        (
            ("token", "create", "--user", "ada", "--role", "read", "--value-from-env", "UNSET"),
            "--value-from-env: UNSET has to hold 20 to 1024 printable characters",
        ),
    ],
)
def test_what_cannot_be_administered(tmp_path: Path, words: tuple[str, ...], sentence: str) -> None:
    accounts = SqliteAccounts(tmp_path / "server.sqlite")
    accounts.add_user("ada")
    accounts.close()
    with pytest.raises(SurgeryError) as error:
        CliRunner().invoke(cli, ["hub", *words, "--data", str(tmp_path)], catch_exceptions=False, standalone_mode=False)
    assert str(error.value).startswith(sentence)
    again = SqliteAccounts(tmp_path / "server.sqlite")
    assert again.namespace("lab") is None
    again.close()


def test_what_cannot_be_served(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SurgeryError, match=f"127.0.0.1 port {port} cannot be used: Address already in use"):
            serve(ServeOptions(data=tmp_path / "data", port=port), print)
    with pytest.raises(SurgeryError, match=r"--url is 'ftp://x', expected an address"):
        serve(ServeOptions(data=tmp_path / "data", url="ftp://x"), print)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_small_answers_do_not_wait_for_acknowledgements(tmp_path: Path, host: str) -> None:
    """Head and body of an answer are sent apart; connections send the second without waiting."""
    try:
        with (
            _listening(ServeOptions(data=tmp_path, host=host, port=0)) as listener,
            socket.create_connection(listener.getsockname()[:2]),
        ):
            accepted, _ = listener.accept()
            with accepted:
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
    except SurgeryError as error:
        if host != "::1":
            raise
        pytest.skip(f"this machine has no IPv6: {error}")


def test_collecting_goes_on_after_whatever_goes_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither a sentence nor a fault of the program ends the thread; both are in the log, and what was freed too."""
    open_registry(tmp_path).close()
    report = gc(GcOptions(data=tmp_path))
    outcomes: list[Exception | GcReport] = [SurgeryError("The disk is full."), RuntimeError("a fault"), report]
    asked: list[Path] = []
    done = threading.Event()

    def collect(options: GcOptions) -> GcReport:
        asked.append(options.data)
        if len(asked) > len(outcomes):
            done.set()
            return report
        outcome = outcomes[len(asked) - 1]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    logger = logging.Logger("collecting")
    logger.addHandler(caplog.handler)
    monkeypatch.setattr(run, "log", logger)
    monkeypatch.setattr(run, "gc", collect)
    with run._collecting(ServeOptions(data=tmp_path, gc_every=1e-6)):
        assert done.wait(30)
    assert set(asked) == {tmp_path}
    said = [(record.levelname, record.getMessage()) for record in caplog.records][:3]
    assert said == [
        ("ERROR", "gc: The disk is full."),
        ("ERROR", "gc failed; the next one is in 1e-06 hours"),
        ("INFO", "gc: 0 bytes freed"),
    ]
    assert "a fault" in caplog.text


@pytest.mark.parametrize("every", [0.0, -1.0, float("nan"), float("inf"), 1e12])
def test_how_often_to_collect_is_checked_before_anything_is_made(tmp_path: Path, every: float) -> None:
    """`nan` would collect without a pause; a wait that is too long would end the thread, and with it all collecting."""
    with pytest.raises(OptionError, match=r"^--gc-every is .*, expected a number of hours above 0\.$"):
        serve(ServeOptions(data=tmp_path / "data", gc_every=every), lambda _: None)
    assert not (tmp_path / "data").exists()
