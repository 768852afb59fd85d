"""Where a registry is: in a local folder, or behind an address."""

from __future__ import annotations

import os
from dataclasses import dataclass

from surgery.errors import OptionError

HUGGING_FACE = "https://huggingface.co"


@dataclass(frozen=True)
class Endpoint:
    """`url` is None for the local registry."""

    url: str | None

    @property
    def label(self) -> str:
        return "the local registry" if self.url is None else self.url


LOCAL = Endpoint(None)


def endpoint_of(given: str | None) -> Endpoint | None:
    """What `--endpoint` names: an address, `hf` or `local`; None where nothing is given."""
    if given is None:
        return None
    if given == "local":
        return LOCAL
    if given == "hf":
        return Endpoint(HUGGING_FACE)
    if given.startswith(("http://", "https://")):
        return Endpoint(given.rstrip("/"))
    raise OptionError(f"--endpoint is {given!r}, expected 'local', 'hf', or an address with http:// or https://.")


def configured() -> Endpoint | None:
    """The address in `HF_ENDPOINT`, if it is set."""
    value = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    return Endpoint(value) if value else None


def for_writing(given: str | None) -> Endpoint:
    """Where a push goes: to what is given, else to the configured endpoint, else to the local registry."""
    return endpoint_of(given) or configured() or LOCAL
