"""`surgery hub serve`: the server as a process, and its administration on the data folder."""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from surgery.errors import MissingExtraError, OptionError, OutputError, SurgeryError
from surgery.hub.collecting import GcOptions, gc
from surgery.hub.interfaces import ConflictError
from surgery.hub.server.accounts import SqliteAccounts
from surgery.hub.server.administration import (
    NamespaceReport,
    TokenReport,
    check_token,
    given_token,
    new_token,
    on_folder,
)  # fmt: skip
from surgery.hub.server.community import SqliteCommunity
from surgery.hub.server.interfaces import ADMIN
from surgery.hub.server.placing import place_all
from surgery.hub.server.policy import Policy
from surgery.hub.server.signing import Signer, load_key
from surgery.hub.store import open_registry

log = logging.getLogger("surgery.hub")
ADMIN_VARIABLE = "SURGERY_HUB_ADMIN_TOKEN"
_ADMINISTRATOR = "admin"
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
        policy: what it takes in.
        rate: requests a minute that are answered for each user and each address; 0 is any number.
        log: `text`, `json` or `none`.
        proxies: addresses whose X-Forwarded-For and -Proto are believed, as `10.0.0.1` or `10.0.0.0/8`.
        gc_every: collect garbage so often, in hours; None for never.
    """

    data: Path
    host: str = "127.0.0.1"
    port: int = 8765
    url: str | None = None
    policy: Policy = field(default_factory=Policy)
    rate: int = 6000
    log: str = "text"
    proxies: tuple[str, ...] = ()
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
    from surgery.hub.server import logs
    from surgery.hub.server.app import App
    from surgery.hub.server.audit import Audit
    from surgery.hub.server.connections import Connection
    from surgery.hub.server.hub import Hub

    if options.url is not None and not re.fullmatch(r"https?://[^\s/]+", options.url.rstrip("/")):
        raise OptionError(f"--url is {options.url!r}, expected an address like https://hub.example.org.")
    if options.log not in logs.KINDS:
        raise OptionError(f"--log is {options.log!r}, expected one of {', '.join(logs.KINDS)}.")
    if options.rate < 0:
        raise OptionError(f"--rate-limit is {options.rate}, expected a number of requests, or 0 for any.")
    # A wait that is not a number does not wait, and threads cannot wait for longer than this.
    if options.gc_every is not None and not 0 < options.gc_every * _HOUR <= threading.TIMEOUT_MAX:
        raise OptionError(f"--gc-every is {options.gc_every:g}, expected a number of hours above 0.")
    registry = open_registry(options.data)
    accounts = SqliteAccounts(options.data / "server.sqlite")
    community = SqliteCommunity(options.data / "registry.sqlite")
    try:
        place_all(registry.content, accounts)
        token = _first_start(accounts)
        signer = Signer(load_key(options.data / "server.key"))
        url = options.url.rstrip("/") if options.url else None
        hub = Hub(registry, accounts, accounts, community, signer, Audit(options.data), url, options.policy)
        hub.completer.take_outdated()
        app = App(hub, options.rate)
        logs.configure(options.log)
        config = uvicorn.Config(
            app,
            http=Connection,  # h11's, with a limit on headers, which httptools has not
            h11_max_incomplete_event_size=_MOST_HEADER_BYTES,
            limit_concurrency=_MOST_AT_ONCE,
            access_log=False,
            log_config=None,
            proxy_headers=bool(options.proxies),
            forwarded_allow_ips=list(options.proxies),
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
        community.close()
        accounts.close()
        registry.close()


@contextmanager
def _collecting(options: ServeOptions) -> Iterator[None]:
    """Collect garbage every so often, as `hub gc` does by default."""
    every = options.gc_every
    if every is None:
        yield
        return
    stopped = threading.Event()

    def work() -> None:
        while not stopped.wait(every * _HOUR):
            try:
                report = gc(GcOptions(data=options.data))
            except SurgeryError as error:
                log.error("gc: %s", error)
            except Exception:  # whatever it is, it is no reason never to collect again
                log.exception("gc failed; the next one is in %g hours", every)
            else:
                log.info("gc: %d bytes freed", report.freed_bytes)

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
    # Connections have it from the listener. asyncio sets it only where the protocol was named when the socket was made;
    # without it a small answer, whose head and body are sent apart, waits 40 ms for the client to acknowledge the head.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
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
        check_token(given, ADMIN_VARIABLE)
        if accounts.identify(given, int(time.time())) is None:
            accounts.add_token(given, _ADMINISTRATOR, ADMIN, None, ADMIN_VARIABLE, int(time.time()), None)
        return None
    if not new:
        return None
    token = new_token()
    accounts.add_token(token, _ADMINISTRATOR, ADMIN, None, "first start", int(time.time()), None)
    return token


# Administration -------------------------------------------------------------------------------------------------------


def add_user(data: Path, name: str) -> NamespaceReport:
    """A new user of the server whose data these are."""
    with on_folder(data) as found:
        return found.add_user(name)


def add_organisation(data: Path, name: str, members: tuple[str, ...], private_by_default: bool) -> NamespaceReport:
    """A new organisation, with users as members."""
    with on_folder(data) as found:
        return found.add_organisation(name, members, private_by_default)


def create_token(
    data: Path, user: str, role: str, repository: str | None, days: int | None, variable: str | None
) -> TokenReport:
    """A new token for a user: a random one, or the one in an environment variable."""
    with on_folder(data) as found:
        return found.create_token(user, role, repository, days, given_token(variable), variable or "token create")
