"""The front matter of a card: YAML from a stranger."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery.errors import InputError
from surgery.hub.interfaces import Content
from surgery.hub.store import Revision
from surgery.source import read_bytes

CARD = "README.md"
_MAX_CARD = 1_000_000
_MAX_FRONT = 64 << 10


def parse(text: str) -> dict[str, object]:
    """The front matter of a card; an empty object where there is none. Raises `InputError` for what is no YAML."""
    import yaml

    lines = text.removeprefix("\ufeff").splitlines()
    if not lines or lines[0].rstrip() != "---":
        return {}
    end = next((number for number, line in enumerate(lines) if number and line.rstrip() == "---"), None)
    if end is None:
        return {}
    front = "\n".join(lines[1:end])
    if len(front) > _MAX_FRONT:
        raise InputError(f"The front matter may have {_MAX_FRONT} characters.")

    class Loader(yaml.SafeLoader):  # type: ignore[misc] # yaml has no types
        """Without anchors: they make a small text stand for a huge value."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.events.AliasEvent):
                raise InputError("The front matter may not use aliases (*name).")
            return super().compose_node(parent, index)

    # Dates are texts here: JSON has none.
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    try:
        value = yaml.load(front, Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"The front matter is no YAML: {' '.join(str(error).split())[:300]}.") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError("The front matter has to be a mapping of keys to values.")
    return {str(key): _plain(item) for key, item in value.items()}


def _plain(value: object) -> object:
    """A value as JSON can hold it."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float) and value == value and abs(value) != float("inf"):
        return value
    return str(value)


_cache: dict[str, Mapping[str, Any]] = {}
_MAX_CACHED = 4096


def card_of(content: Content, head: Revision) -> Mapping[str, Any]:
    """The front matter of a commit's card; an empty object where there is none that can be read."""
    entry = next((entry for entry in head.files if entry.path == CARD), None)
    if entry is None or entry.size > _MAX_CARD or content.size(entry.sha256) is None:
        return {}
    if (known := _cache.get(entry.sha256)) is None:
        try:
            known = parse(read_bytes(content.open(entry.sha256), 0, entry.size).decode())
        except (InputError, UnicodeDecodeError):
            known = {}
        if len(_cache) >= _MAX_CACHED:
            _cache.clear()
        _cache[entry.sha256] = known
    return known
