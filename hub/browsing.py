"""`hub list`, `hub lineage`, `hub fits`: of the local registry, of a server of this tool, and what another Hub can say.

A server of this tool answers these itself. Any other Hub knows tags only: from them come the bases that cards name, and
what names a model as its base; nothing goes by hash there, nor by rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from surgery.errors import InputError, OptionError, first_line
from surgery.folder import Folder
from surgery.hub.asking import base_of_tag, parameter_span, rank_span
from surgery.hub.endpoint import HUGGING_FACE, LOCAL, Endpoint, configured
from surgery.hub.fits import Fit, check_fit, fit_of, fitting
from surgery.hub.index import OWNER, SORTS, Entry, ModelQuery, Span, made_from
from surgery.hub.lineage import Lineage, Link, Relative
from surgery.hub.lineage import lineage as family_of
from surgery.hub.naming import parse_repository, parse_target
from surgery.hub.reindexing import earlier_notes
from surgery.hub.store import Registry, existing_registry, registry_path

# Models that a list from a Hub has.
MOST_MODELS = 100
_MOST_LOCAL = 1_000_000
# What the server calls the orders of a list.
_THEIR_SORTS = {
    "updated": "lastModified", "created": "createdAt", "name": "id", "parameters": "num_parameters", "size": "size",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a list is to have; every condition has to hold.

    Attributes:
        search: words that occur in name, tags, base or family.
        kind: `adapter`, `dense` or `moe`.
        base: what it was made from.
        rank: `16`, or a range `8..64`.
        targets: last components of modules that an adapter changes.
        parameters: `min:1M,max:2B`.
        tags: as the Hub has them: `lora`, `license:mit`, `base_model:merge:ID`.
        fits: a base, `NAME[@revision]`, that the adapters have to fit by shape.
        sort: one of `index.SORTS`; by default `name` for the local registry, `updated` for others.
    """

    search: str | None = None
    kind: str | None = None
    base: str | None = None
    rank: str | None = None
    targets: tuple[str, ...] = ()
    parameters: str | None = None
    tags: tuple[str, ...] = ()
    fits: str | None = None
    sort: str | None = None


@dataclass(frozen=True)
class ListedRepository:
    """One line of a list. What is not known is null.

    Attributes:
        kind: `adapter`, `dense` or `moe`.
        base: what an adapter, or an output of an operation, was made from.
        ranks: of an adapter's modules, each once.
        size: bytes of the newest commit.
        updated: seconds since 1970.
    """

    name: str
    kind: str | None
    base: str | None
    ranks: tuple[int, ...]
    size: int | None
    updated: int | None


@dataclass(frozen=True)
class ListReport:
    """The repositories of a registry. `registry` is the local folder, or None for a Hub; `notes` say what may lack."""

    endpoint: str
    registry: str | None
    repositories: tuple[ListedRepository, ...]
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


# Lists ----------------------------------------------------------------------------------------------------------------


def list_repositories(endpoint: Endpoint | None, wanted: Wanted | None = None, root: Path | None = None) -> ListReport:
    """The repositories of the local registry, or of a Hub, that are wanted."""
    wanted = wanted or Wanted()
    if wanted.rank is not None:
        rank_span(wanted.rank)
    if wanted.parameters is not None:
        parameter_span(wanted.parameters)
    for name in (wanted.base, wanted.fits):
        if name is not None:
            parse_target(name)
    if wanted.sort not in (None, *SORTS):
        raise OptionError(f"--sort is {wanted.sort!r}, expected one of {', '.join(SORTS)}.")
    chosen = endpoint or configured() or Endpoint(None)
    if chosen.url is not None:
        return _list_remote(chosen.url, wanted)
    place = str(root or registry_path())
    if (store := existing_registry(root)) is None:
        return ListReport("local", place, ())
    with store:
        found = _list_local(store, wanted)
        # Of a list of everything nothing is missing.
        said = earlier_notes(store) if wanted != Wanted(sort=wanted.sort) else ()
    return ListReport("local", place, tuple(_listed(entry) for entry in found), said)


def _list_local(store: Registry, wanted: Wanted) -> list[Entry]:
    index = store.metadata
    bases = [made_from(index, parse_repository(wanted.base), OWNER)] if wanted.base else []
    conditions = {tag: base_of_tag(index, tag, OWNER) for tag in wanted.tags}
    bases += [condition for condition in conditions.values() if condition is not None]
    query = ModelQuery(
        search=tuple((wanted.search or "").split()),
        kind=wanted.kind,
        made_from=tuple(bases),
        ranks=rank_span(wanted.rank) if wanted.rank else Span(),
        parameters=parameter_span(wanted.parameters) if wanted.parameters else Span(),
        targets=wanted.targets,
        tags=tuple(tag for tag, condition in conditions.items() if condition is None),
        sort=wanted.sort or "name",
        limit=_MOST_LOCAL,
    )
    if wanted.fits is None:
        return list(index.select(query, OWNER))
    base = store.find(*parse_target(wanted.fits))
    return fitting(store, query, base, OWNER)


def _listed(entry: Entry) -> ListedRepository:
    return _listed_facts(entry.name, entry.facts, entry.size if entry.commit else None, entry.repository.updated)


def _listed_facts(name: str, facts: Mapping[str, object], size: int | None, updated: int | None) -> ListedRepository:
    kind, base, ranks = facts.get("kind"), facts.get("base"), facts.get("ranks")
    return ListedRepository(
        name=name,
        kind=kind if isinstance(kind, str) else None,
        base=base if isinstance(base, str) else None,
        ranks=tuple(ranks) if isinstance(ranks, list) else (),
        size=size,
        updated=updated,
    )


def _list_remote(url: str, wanted: Wanted) -> ListReport:
    from huggingface_hub import HfApi

    from surgery.hub.network import network_errors, patiently

    ours = is_ours(url)
    tags = list(wanted.tags)
    if not ours:
        _refuse_what_tags_cannot_say(url, wanted)
        if wanted.base is not None:
            tags.append(f"base_model:{'adapter:' if wanted.kind == 'adapter' else ''}{wanted.base}")
        elif wanted.kind == "adapter":
            tags.append("peft")
    if ours:
        return ListReport(url, None, tuple(_listed_json(item) for item in _ask_ours(url, wanted)))
    order = {"updated": "last_modified", "created": "created_at"}.get(wanted.sort or "")
    api = HfApi(endpoint=url)
    asked: dict[str, Any] = {"sort": order} if order else {}
    asked |= {"filter": tags} if tags else {}
    asked |= {"num_parameters": wanted.parameters} if wanted.parameters else {}
    try:
        models = patiently(lambda: list(api.list_models(search=wanted.search, limit=MOST_MODELS, full=True, **asked)))
    except network_errors() as error:
        raise InputError(f"{url} cannot be reached ({first_line(error)}).") from error
    return ListReport(url, None, tuple(_listed_model(model) for model in models))


def _refuse_what_tags_cannot_say(url: str, wanted: Wanted) -> None:
    asked = {
        "--rank": wanted.rank,
        "--target": wanted.targets,
        "--fits": wanted.fits,
        f"--kind {wanted.kind}": wanted.kind not in (None, "adapter"),
        f"--sort {wanted.sort}": wanted.sort not in (None, "updated", "created"),
    }
    for option, value in asked.items():
        if value:
            raise OptionError(
                f"{url} cannot be asked for {option}: only the local registry and a server of `surgery hub serve` know "
                "of that."
            )


def _ask_ours(url: str, wanted: Wanted) -> Any:
    given = {
        "search": wanted.search,
        "kind": wanted.kind,
        "base": wanted.base,
        "rank": wanted.rank,
        "target": ",".join(wanted.targets),
        "num_parameters": wanted.parameters,
        "filter": ",".join(wanted.tags),
        "fits": wanted.fits,
        "sort": _THEIR_SORTS[wanted.sort or "updated"],
        "limit": str(MOST_MODELS),
    }
    return ask(url, "", {name: value for name, value in given.items() if value})


def _listed_json(item: Any) -> ListedRepository:
    """One of the answers of a server of this tool."""
    updated = int(datetime.fromisoformat(item["lastModified"]).timestamp())
    return _listed_facts(item["id"], item.get("facts") or {}, item.get("usedStorage"), updated)


def _listed_model(model: Any) -> ListedRepository:
    """A model of another Hub, by its tags."""
    base = next((name for name, relation in _bases(model.tags or []) if relation == "adapter"), None)
    updated = int(model.last_modified.timestamp()) if model.last_modified else None
    return ListedRepository(model.id, "adapter" if base else None, base, (), None, updated)


def _bases(tags: list[str]) -> list[tuple[str, str]]:
    """Base and relation, as a Hub's tags name them."""
    found: dict[str, str] = {}
    for tag in tags:
        prefix, _, rest = tag.partition(":")
        relation, colon, name = rest.rpartition(":")
        if prefix == "base_model" and name and (colon or name not in found):
            found[name] = relation or "finetune"
    return list(found.items())


# Lineage --------------------------------------------------------------------------------------------------------------


def lineage(target: str, endpoint: Endpoint | None, root: Path | None = None) -> Lineage:
    """The family of a model: in the local registry first, then at the configured endpoint."""
    name = parse_repository(target)
    if endpoint is None or endpoint.url is None:
        if (store := existing_registry(root)) is not None:
            with store:
                if (found := family_of(store.metadata, name, OWNER)) is not None:
                    return replace(found, notes=earlier_notes(store))
        if endpoint is not None:
            raise InputError(
                f"There is no model called {name} in the local registry; `surgery hub list` shows what is."
            )
    url = (endpoint or configured() or Endpoint(HUGGING_FACE)).url
    assert url is not None
    return _lineage_of_json(ask(url, f"/{name}/lineage")) if is_ours(url) else _lineage_by_tags(str(name), url)


def _lineage_of_json(found: Any) -> Lineage:
    nodes = [Relative(**{**node, "rank": tuple(node["rank"]) if node["rank"] else None}) for node in found["nodes"]]
    links = tuple(Link(**link) for link in found["links"])
    return Lineage(found["id"], tuple(nodes), links, tuple(found["copies"]), found["truncated"])


def _lineage_by_tags(name: str, url: str) -> Lineage:
    """Parents and children of a model on another Hub, one step each way."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    from surgery.hub.network import network_errors, patiently

    api = HfApi(endpoint=url)
    try:
        model = patiently(lambda: api.model_info(name))
        tag = f"base_model:{model.id}"
        children = patiently(lambda: list(api.list_models(filter=tag, limit=MOST_MODELS)))
    except RepositoryNotFoundError as error:
        raise InputError(f"There is no model called {name} on {url} that you may read.") from error
    except network_errors() as error:
        raise InputError(f"{url} cannot be reached ({first_line(error)}).") from error
    nodes = [Relative(model.id, known=True)]
    links = []
    for base, relation in _bases(model.tags or []):
        nodes.insert(0, Relative(base, known=False, depth=-1))
        links.append(Link(model.id, base, "base", relation, None, "name"))
    for child in children:
        relation = dict(_bases(child.tags or [])).get(model.id, "finetune")
        kind = "adapter" if relation == "adapter" else None
        nodes.append(Relative(child.id, known=True, kind=kind, relation=relation, depth=1))
        links.append(Link(child.id, model.id, "base", relation, None, "name"))
    return Lineage(model.id, tuple(nodes), tuple(links), truncated=len(children) >= MOST_MODELS)


# Fits -----------------------------------------------------------------------------------------------------------------


def fits(adapter: str, base: str, endpoint: Endpoint | None, root: Path | None = None) -> Fit:
    """Whether an adapter fits a base; both are folders, or ids in the local registry or at an endpoint.

    A server of this tool that has both is asked. Otherwise headers are read from wherever the two are.
    """
    found: list[object] = [None, None]
    if (endpoint is None or endpoint == LOCAL) and (store := existing_registry(root)) is not None:
        with store:
            found = [_in(store, text) for text in (adapter, base)]
            if None not in found:
                return fit_of(store, *(store.find(*parse_target(text)) for text in (adapter, base)))
    if endpoint == LOCAL:
        raise InputError(
            f"The local registry does not have both {adapter} and {base}; `surgery hub list` shows what it has."
        )
    if endpoint is None and found == [None, None] and not any(Path(text).exists() for text in (adapter, base)):
        endpoint = configured()  # which knows hashes of what it has
    if endpoint is not None and endpoint.url is not None and is_ours(endpoint.url):
        name, revision = parse_target(adapter)
        return _fit_of_json(ask(endpoint.url, f"/{name}/fits", {"base": base, "revision": revision or "main"}))
    folders = [_folder(text) for text in (adapter, base)]
    return check_fit(folders[0], folders[1])


def _in(store: Registry, text: str) -> object:
    """A repository of the registry that a text names; None for a path, and for what is not there."""
    if Path(text).exists():
        return None
    try:
        return store.metadata.find(parse_target(text)[0])
    except OptionError:
        return None


def _folder(text: str) -> Folder:
    from surgery.hub.resolve import resolve_folder

    found = resolve_folder(text)
    if isinstance(found, Path):
        raise InputError(f"{text} is a file, expected a folder or an id: its config says what it is for.")
    return found


def _fit_of_json(found: Any) -> Fit:
    return Fit(**{**found, "reasons": tuple(found["reasons"])})


# A server of this tool ------------------------------------------------------------------------------------------------


def is_ours(url: str) -> bool:
    """Whether a Hub answers the questions of this tool."""
    return "x-surgery-hub" in _get(url, "", {"limit": "1"}).headers


def ask(url: str, path: str, query: Mapping[str, str] | None = None) -> Any:
    """The answer to `GET /api/models{path}`. Raises `InputError` with the server's own sentence."""
    return _get(url, path, query or {}).json()


def _get(url: str, path: str, query: Mapping[str, str]) -> Any:
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # not marked as exported for type checkers
        build_hf_headers,
        get_session,
        hf_raise_for_status,
    )

    from surgery.hub.network import network_errors, patiently

    def once() -> Any:
        response = get_session().get(f"{url}/api/models{path}", params=query, headers=build_hf_headers())
        hf_raise_for_status(response)
        return response

    try:
        return patiently(once)
    except HfHubHTTPError as error:
        said = error.response.headers.get("x-error-message") if error.response is not None else None
        raise InputError(f"{url} answers: {said or first_line(error)}") from error
    except network_errors() as error:
        raise InputError(f"{url} cannot be reached ({first_line(error)}).") from error
