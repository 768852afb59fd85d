"""Users, organisations and tokens of a server: on its data folder, or over the network. Both ways run the same code.

Over the network a request goes to `/api/admin`, for an administrator's token only; the server then does what a command
on the data folder does itself.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from surgery.errors import InputError, OptionError, first_line
from surgery.hub.naming import parse_repository, why_not_a_repository
from surgery.hub.server.accounts import SqliteAccounts
from surgery.hub.server.audit import Audit
from surgery.hub.server.interfaces import ROLES, Accounts

_DAY = 86_400
# A century. Times beyond what SQLite or a calendar can hold would be in every list of tokens from then on.
_MOST_DAYS = 36_500
_LEAST_TOKEN = 20
_TOKEN = re.compile(r"[!-~]+")
# Names with another meaning in an address.
_TAKEN = frozenset({"api", "cas", "lfs", "health", "datasets", "models", "spaces", "login", "logout", "settings"})


@dataclass(frozen=True)
class NamespaceReport:
    """A user or an organisation.

    Attributes:
        kind: `user` or `organisation`.
        members: of an organisation.
    """

    name: str
    kind: str
    members: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class NamespacesReport:
    """All users and organisations."""

    namespaces: tuple[NamespaceReport, ...]

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class TokenReport:
    """A token that was made.

    Attributes:
        token: shown this once; None where it came from the environment.
        expires: seconds since 1970; None for never.
        id: by which it is revoked.
    """

    user: str
    role: str
    repository: str | None
    expires: int | None
    token: str | None
    id: str

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class TokenEntry:
    """A token that there is. Times are seconds since 1970; `expires` is None for never."""

    id: str
    user: str
    role: str
    repository: str | None
    label: str
    created: int
    expires: int | None


@dataclass(frozen=True)
class TokensReport:
    """The tokens that there are."""

    tokens: tuple[TokenEntry, ...]

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


class Administration(Protocol):
    """What an administrator does. Everything raises `OptionError` or `InputError` for what cannot be done."""

    def add_user(self, name: str) -> NamespaceReport: ...

    def add_organisation(self, name: str, members: Sequence[str], private_by_default: bool) -> NamespaceReport: ...

    def namespaces(self) -> NamespacesReport: ...

    def set_member(self, organisation: str, user: str, member: bool) -> NamespaceReport:
        """Take a user into an organisation, or out of it."""
        ...

    def create_token(
        self, user: str, role: str, repository: str | None, days: int | None, given: str | None, label: str
    ) -> TokenReport:
        """A token: a random one, or the one that is given. It is called `label` in lists and logs."""
        ...

    def tokens(self, user: str | None) -> TokensReport:
        """A user's, or everybody's."""
        ...

    def revoke_token(self, number: str) -> TokensReport:
        """Take a token away. Returns the one that it was."""
        ...


class LocalAdministration:
    """On the accounts themselves.

    Args:
        accounts: of the server.
        note: is told of each change, for the audit log.
    """

    def __init__(self, accounts: Accounts, note: Callable[[str, Mapping[str, object]], None]) -> None:
        self._accounts = accounts
        self._note = note

    def _done(self, action: str, **details: object) -> None:
        self._note(action, details)

    def add_user(self, name: str) -> NamespaceReport:
        _check_namespace(name)
        self._accounts.add_user(name)
        self._done("user.add", name=name)
        return NamespaceReport(name, "user", ())

    def add_organisation(self, name: str, members: Sequence[str], private_by_default: bool) -> NamespaceReport:
        _check_namespace(name)
        self._accounts.add_organisation(name, members, private_by_default)
        self._done("org.add", name=name, members=list(members), private_by_default=private_by_default)
        return NamespaceReport(name, "organisation", tuple(members))

    def namespaces(self) -> NamespacesReport:
        found = [
            NamespaceReport(space.name, "organisation" if space.is_organisation else "user", tuple(members))
            for space, members in self._accounts.namespaces()
        ]
        return NamespacesReport(tuple(found))

    def set_member(self, organisation: str, user: str, member: bool) -> NamespaceReport:
        self._accounts.set_member(organisation, user, member)
        self._done("org.member.add" if member else "org.member.remove", name=organisation, member=user)
        return next(found for found in self.namespaces().namespaces if found.name.lower() == organisation.lower())

    def create_token(
        self, user: str, role: str, repository: str | None, days: int | None, given: str | None, label: str
    ) -> TokenReport:
        if role not in ROLES:
            raise OptionError(f"--role is {role!r}, expected one of {', '.join(ROLES)}.")
        if repository is not None:
            parse_repository(repository)
        if days is not None and not 0 < days <= _MOST_DAYS:
            raise OptionError(f"--expires is {days}, expected a number of days, 1 to {_MOST_DAYS}.")
        now = int(time.time())
        expires = None if days is None else now + days * _DAY
        token = new_token() if given is None else given
        check_token(token, "The token")
        number = self._accounts.add_token(token, user, role, repository, label, now, expires)
        self._done("token.create", name=user, role=role, repository=repository, expires=expires, token_id=number)
        return TokenReport(user, role, repository, expires, token if given is None else None, number)

    def tokens(self, user: str | None) -> TokensReport:
        return TokensReport(tuple(TokenEntry(*row) for row in self._accounts.tokens(user)))

    def revoke_token(self, number: str) -> TokensReport:
        found = [entry for entry in self.tokens(None).tokens if entry.id == number]
        if not found or not self._accounts.remove_token(number):
            raise InputError(f"There is no token {number}; `surgery hub token list` shows those that there are.")
        self._done("token.revoke", name=found[0].user, token_id=number)
        return TokensReport(tuple(found))


def new_token() -> str:
    """256 random bits."""
    return f"hub_{secrets.token_urlsafe(32)}"


def check_token(token: str, where: str) -> None:
    """Raise `OptionError` for what may not be a token."""
    if len(token) < _LEAST_TOKEN or len(token) > 1024 or _TOKEN.fullmatch(token) is None:
        raise OptionError(f"{where} has to hold {_LEAST_TOKEN} to 1024 printable characters without spaces.")


def given_token(variable: str | None) -> str | None:
    """The token in a variable of the environment. Raises `OptionError` where it has none."""
    if variable is None:
        return None
    given = os.environ.get(variable, "")
    check_token(given, f"--value-from-env: {variable}")
    return given


def _check_namespace(name: str) -> None:
    why = "has a slash" if "/" in name else why_not_a_repository(name)
    if why is not None or name.lower() in _TAKEN:
        raise OptionError(f"{name!r} is not a name for a user or an organisation: it {why or 'has another meaning'}.")


@contextmanager
def on_folder(data: Path) -> Iterator[Administration]:
    """Administration of the server whose data these are."""
    if not (data / "server.sqlite").is_file():
        raise InputError(f"{data} has never been served; `surgery hub serve --data {data}` makes it ready.")
    accounts = SqliteAccounts(data / "server.sqlite")
    try:
        audit, actor = Audit(data), f"uid {os.getuid()}"
        yield LocalAdministration(
            accounts, lambda action, details: audit.record(action, actor, "command line", details)
        )
    finally:
        accounts.close()


# Over the network -----------------------------------------------------------------------------------------------------


class RemoteAdministration:
    """By requests to a server."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        from huggingface_hub import get_session, get_token, hf_raise_for_status

        from surgery.hub.network import network_errors

        token = get_token()
        if token is None:
            raise InputError(f"Administering {self._endpoint} needs an administrator's token; set HF_TOKEN, or log in.")
        url, headers = f"{self._endpoint}/api/admin/{path}", {"Authorization": f"Bearer {token}"}
        try:
            answer = get_session().request(method, url, headers=headers, json=body)
            why = _why(answer.content) if answer.status_code >= 400 else None
            if why is not None:
                raise InputError(why if answer.status_code == 400 else f"{self._endpoint} refused: {why}")
            hf_raise_for_status(answer)
        except network_errors() as error:
            raise InputError(f"{self._endpoint} cannot be administered: {first_line(error)}.") from error
        try:
            found = json.loads(answer.content)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise InputError(f"{self._endpoint} answers something else than expected; is it `surgery hub serve`?")
        return found

    def add_user(self, name: str) -> NamespaceReport:
        return _namespace(self._ask("POST", "users", {"name": name}))

    def add_organisation(self, name: str, members: Sequence[str], private_by_default: bool) -> NamespaceReport:
        body = {"name": name, "members": list(members), "private_by_default": private_by_default}
        return _namespace(self._ask("POST", "organisations", body))

    def namespaces(self) -> NamespacesReport:
        found = self._ask("GET", "namespaces")["namespaces"]
        return NamespacesReport(tuple(_namespace(item) for item in found))

    def set_member(self, organisation: str, user: str, member: bool) -> NamespaceReport:
        body = {"organisation": organisation, "user": user, "member": member}
        return _namespace(self._ask("POST", "members", body))

    def create_token(
        self, user: str, role: str, repository: str | None, days: int | None, given: str | None, label: str
    ) -> TokenReport:
        body = {"user": user, "role": role, "repository": repository, "days": days, "given": given, "label": label}
        return TokenReport(**self._ask("POST", "tokens", body))

    def tokens(self, user: str | None) -> TokensReport:
        return _tokens(self._ask("POST", "tokens/list", {"user": user}))

    def revoke_token(self, number: str) -> TokensReport:
        return _tokens(self._ask("POST", "tokens/revoke", {"id": number}))


def _why(body: bytes) -> str | None:
    """What a server says of a request that it refused."""
    try:
        found = json.loads(body)
    except ValueError:
        return None
    why = found.get("error") if isinstance(found, dict) else None
    return why if isinstance(why, str) else None


def _namespace(found: Mapping[str, Any]) -> NamespaceReport:
    return NamespaceReport(found["name"], found["kind"], tuple(found["members"]))


def _tokens(found: Mapping[str, Any]) -> TokensReport:
    return TokensReport(tuple(TokenEntry(**item) for item in found["tokens"]))


@contextmanager
def administering(data: Path | None, endpoint: str | None) -> Iterator[Administration]:
    """What `--data` or `--endpoint` names; exactly one of them has to be given."""
    if (data is None) == (endpoint is None):
        raise OptionError("Which server is meant is said by --data DIR or by --endpoint URL, one of the two.")
    if data is not None:
        with on_folder(data) as found:
            yield found
        return
    assert endpoint is not None
    if not endpoint.startswith(("http://", "https://")):
        raise OptionError(f"--endpoint is {endpoint!r}, expected an address with http:// or https://.")
    yield RemoteAdministration(endpoint.rstrip("/"))


_: type[Administration] = LocalAdministration
__: type[Administration] = RemoteAdministration
