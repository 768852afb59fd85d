"""Who a Hub takes you for: huggingface_hub's own log-in, kept where its other programs look for it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from surgery.errors import InputError, first_line
from surgery.hub.network import network_errors, patiently


@dataclass(frozen=True)
class AccountReport:
    """A user of a Hub, and the organisations it is in. `name` is None for nobody."""

    endpoint: str
    name: str | None
    organisations: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def login(token: str) -> AccountReport:
    """Check a token with the configured Hub and keep it. Raises `InputError` for one that the Hub does not know."""
    from huggingface_hub import constants, hf_api
    from huggingface_hub import login as hub_login

    # Its log-in asks through an object that was made when the package was imported, with the endpoint of then.
    hf_api.api.endpoint = constants.ENDPOINT
    refused: tuple[type[Exception], ...] = (ValueError, *network_errors())
    try:
        hub_login(token=token, add_to_git_credential=False)
    except refused as error:
        raise InputError(f"{constants.ENDPOINT} does not take this token: {first_line(error)}.") from error
    return whoami(token)


def whoami(token: str | None = None) -> AccountReport:
    """Whom the configured Hub takes the token for: the one given, else the one on this machine."""
    from huggingface_hub import HfApi, constants, get_token

    token = token or get_token()
    if token is None:
        return AccountReport(constants.ENDPOINT, None, ())
    try:
        found = patiently(lambda: HfApi(endpoint=constants.ENDPOINT, token=token).whoami())
    except network_errors() as error:
        raise InputError(f"{constants.ENDPOINT} does not take this machine's token: {first_line(error)}.") from error
    names = tuple(str(item["name"]) for item in found.get("orgs", []) if isinstance(item, dict) and "name" in item)
    return AccountReport(constants.ENDPOINT, str(found["name"]), names)
