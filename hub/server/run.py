"""`surgery hub serve`: the server as a process, and its administration on the data folder."""

from __future__ import annotations

import logging
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from surgery.errors import InputError, MissingExtraError, OptionError, OutputError, SurgeryError
from surgery.hub.collecting import GcOptions, gc
from surgery.hub.interfaces import ConflictError
from surgery.hub.naming import parse_repository, why_not_a_repository
from surgery.hub.server.accounts import SqliteAccounts
from surgery.hub.server.interfaces import ADMIN, ROLES
from surgery.hub.server.placing import place_all
from surgery.hub.server.signing import Signer, load_key
from surgery.hub.store import open_registry

log = logging.getLogger("surgery.hub")
ADMIN_VARIABLE = "SURGERY_HUB_ADMIN_TOKEN"
_ADMINISTRATOR = "admin"
_LEAST_TOKEN = 20
_TOKEN = re.compile(r"[!-~]+")
_DAY = 86_400
_HOUR = 3600
# Requests at once; more are told to come back.
_MOST_AT_ONCE = 500
_MOST_HEADER_BYTES = 64 << 10
# Seconds that a connection stays open with nothing on it. Clients (httpx) close theirs after 5: a server that closes it
# at the same moment, as uvicorn does by default, resets some of those on which a request is just being sent.
_KEPT_OPEN = 75


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How to serve.

    Attributes:
        data: the registry's folder.
        host, port: where to listen; 0 is any free port.
        url: the address under which clients reach the server, if that is another.
        gc_every: collect garbage so often, in hours; None for never.
    """

    data: Path
    host: str = "127.0.0.1"
    port: int = 8765
    url: str | None = None
    gc_every: float | None = None


@dataclass(frozen=True)
class Started:
    """What a server says when it is ready.

    Attributes:
        url: where it listens.
        token: of the administrator, on the first start, unless it came from the environment.
    """

    url: str
    token: str | None


def serve(options: ServeOptions, ready: Callable[[Started], None]) -> None:
    """Serve until the process is told to stop. Raises `OutputError` where it cannot listen."""
    try:
        import uvicorn
    except ImportError as error:
        raise MissingExtraError("uvicorn", "hub") from error
    from surgery.hub.server.app import App
    from surgery.hub.server.hub import Hub

    if options.url is not None and not re.fullmatch(r"https?://[^\s/]+", options.url.rstrip("/")):
        raise OptionError(f"--url is {options.url!r}, expected an address like https://hub.example.org.")
    registry = open_registry(options.data)
    accounts = SqliteAccounts(options.data / "server.sqlite")
    try:
        place_all(registry.content, accounts)
        token = _first_start(accounts)
        signer = Signer(load_key(options.data / "server.key"))
        app = App(Hub(registry, accounts, accounts, signer, options.url.rstrip("/") if options.url else None))
        config = uvicorn.Config(
            app,
            http="h11",  # with a limit on headers, which httptools has not
            h11_max_incomplete_event_size=_MOST_HEADER_BYTES,
            limit_concurrency=_MOST_AT_ONCE,
            access_log=False,
            log_level="warning",
            server_header=False,
            timeout_keep_alive=_KEPT_OPEN,
            timeout_graceful_shutdown=10,
        )
        with _listening(options) as listener:
            host = f"[{options.host}]" if ":" in options.host else options.host
            ready(Started(f"http://{host}:{listener.getsockname()[1]}", token))
            with _collecting(options):
                uvicorn.Server(config).run([listener])
    finally:
        accounts.close()
        registry.close()


@contextmanager
def _collecting(options: ServeOptions) -> Iterator[None]:
    """Collect garbage every so often, as `hub gc` does by default."""
    every = options.gc_every
    if every is None:
        yield
        return
    if every <= 0:
        raise OptionError(f"--gc-every is {every:g}, expected a number of hours above 0.")
    stopped = threading.Event()

    def work() -> None:
        while not stopped.wait(every * _HOUR):
            try:
                report = gc(GcOptions(data=options.data))
            except SurgeryError as error:
                log.error("gc: %s", error)
            else:
                log.warning("gc: %d bytes freed", report.freed_bytes)

    thread = threading.Thread(target=work, name="gc", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


@contextmanager
def _listening(options: ServeOptions) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        listener = socket.create_server((options.host, options.port), family=family, backlog=512)
    except OSError as error:
        raise OutputError(f"{options.host} port {options.port} cannot be used: {error.strerror or error}.") from error
    with listener:
        yield listener


def _first_start(accounts: SqliteAccounts) -> str | None:
    """An administrator, if there is nobody yet. Returns the token to show, this one time."""
    given = os.environ.get(ADMIN_VARIABLE)
    new = accounts.is_empty()
    if new:
        try:
            accounts.add_user(_ADMINISTRATOR)
        except ConflictError:  # another process was quicker
            new = False
    if given is not None:
        _check_token(given, ADMIN_VARIABLE)
        if accounts.identify(given, int(time.time())) is None:
            accounts.add_token(given, _ADMINISTRATOR, ADMIN, None, ADMIN_VARIABLE, int(time.time()), None)
        return None
    if not new:
        return None
    token = _new_token()
    accounts.add_token(token, _ADMINISTRATOR, ADMIN, None, "first start", int(time.time()), None)
    return token


def _new_token() -> str:
    return f"hub_{secrets.token_urlsafe(32)}"


def _check_token(token: str, where: str) -> None:
    if len(token) < _LEAST_TOKEN or len(token) > 1024 or _TOKEN.fullmatch(token) is None:
        raise OptionError(f"{where} has to hold {_LEAST_TOKEN} to 1024 printable characters without spaces.")


# Administration -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NamespaceReport:
    """A user or an organisation that was made."""

    name: str
    kind: str
    members: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class TokenReport:
    """A token that was made.

    Attributes:
        token: shown this once; None where it came from the environment.
        expires: seconds since 1970; None for never.
    """

    user: str
    role: str
    repository: str | None
    expires: int | None
    token: str | None

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@contextmanager
def _accounts(data: Path) -> Iterator[SqliteAccounts]:
    if not (data / "server.sqlite").is_file():
        raise InputError(f"{data} has never been served; `surgery hub serve --data {data}` makes it ready.")
    accounts = SqliteAccounts(data / "server.sqlite")
    try:
        yield accounts
    finally:
        accounts.close()


def add_user(data: Path, name: str) -> NamespaceReport:
    """A new user of the server whose data these are."""
    _check_namespace(name)
    with _accounts(data) as accounts:
        accounts.add_user(name)
    return NamespaceReport(name, "user", ())


def add_organisation(data: Path, name: str, members: tuple[str, ...], private_by_default: bool) -> NamespaceReport:
    """A new organisation, with users as members."""
    _check_namespace(name)
    with _accounts(data) as accounts:
        accounts.add_organisation(name, members, private_by_default)
    return NamespaceReport(name, "organisation", members)


def _check_namespace(name: str) -> None:
    why = "has a slash" if "/" in name else why_not_a_repository(name)
    if why is not None or name.lower() in ("api", "cas", "lfs", "health", "datasets", "models", "spaces"):
        raise OptionError(f"{name!r} is not a name for a user or an organisation: it {why or 'has another meaning'}.")


def create_token(
    data: Path, user: str, role: str, repository: str | None, days: int | None, variable: str | None
) -> TokenReport:
    """A new token for a user: a random one, or the one in an environment variable."""
    if role not in ROLES:
        raise OptionError(f"--role is {role!r}, expected one of {', '.join(ROLES)}.")
    if repository is not None:
        parse_repository(repository)
    if days is not None and days <= 0:
        raise OptionError(f"--expires is {days}, expected a number of days above 0.")
    now = int(time.time())
    expires = None if days is None else now + days * _DAY
    token = _new_token() if variable is None else os.environ.get(variable, "")
    if variable is not None:
        _check_token(token, f"--value-from-env: {variable}")
    with _accounts(data) as accounts:
        accounts.add_token(token, user, role, repository, variable or "token create", now, expires)
    return TokenReport(user, role, repository, expires, token if variable is None else None)
