"""Xet's own routes: what is stored (chunks), taking in xorbs and shards, and how a file is put together.

A client comes here with a token that the Hub's routes gave it for one repository, to read or to write. Xorbs are
fetched without a token, from addresses that are signed for one range of bytes and expire.
Source: xet-core's `openapi/cas.openapi.yaml`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from surgery.errors import InputError, IntegrityError
from surgery.hub.interfaces import ContentMissingError
from surgery.hub.naming import MAIN, RepositoryName
from surgery.hub.server.checking import check_room, check_size
from surgery.hub.server.hub import Call, Hub
from surgery.hub.server.interfaces import READ, WRITE
from surgery.hub.server.placing import Finder, keep_xorb, placement_of
from surgery.hub.server.pulls import branch_to_write, head_of, is_opening
from surgery.hub.server.registering import register
from surgery.hub.server.signing import ADDRESS_LIFE, TOKEN_LIFE
from surgery.hub.server.tracing import trace_of
from surgery.hub.server.web import ByteRange, HttpError, json_response, parse_range, pieces, stream, whole_body
from surgery.hub.xet import hashes
from surgery.hub.xet.recipes import Recipe
from surgery.hub.xet.repeats import Sieve
from surgery.hub.xet.shards import Term, write_xorbs
from surgery.hub.xet.xorbs import MAX_FOOTER, MAX_PACKED, XorbParser

PREFIX = "/cas"
_EPOCH = "since-"
_PURPOSE = "xet"
_ADDRESS = "xorb"
# Clients make shards of at most 64 MiB.
MAX_SHARD = 80 << 20
_MAX_TELEMETRY = 1 << 20
# Chunks that one answer to a query tells of: 24 MB, or 34 GB of files.
_MAX_TOLD = 1 << 19
# A client forgets what a query told it after these seconds, long before anything unused would be removed.
_TOLD_FOR = 7 * 24 * 3600


@dataclass(frozen=True)
class Grant:
    """What a Xet token allows.

    Attributes:
        kind, name: of the repository.
        holders: who has what is uploaded (`Call.holders`).
        visible: whose chunks may be referred to (`Call.visible`).
        writes: whether anything may be uploaded.
    """

    kind: str
    name: RepositoryName
    holders: frozenset[str]
    visible: frozenset[str]
    writes: bool


async def give_token(call: Call) -> Response:
    """`GET /api/models/{id}/xet-read-token/{revision}`, and `write`."""
    writes = call.request.scope["raw_path"].find(b"/xet-write-token/") >= 0
    if writes:
        opens = is_opening(call)
        # The client writes None for a pull request that is about to be opened, which has no name yet.
        branch = MAIN if opens and call.rest == ("None",) else head_of(call.rest)
        found = await run_in_threadpool(branch_to_write, call, branch, opens)
        await run_in_threadpool(check_room, call.hub, found.name.namespace, {}, 1)
    else:
        found = await run_in_threadpool(call.opened)
    # Who only reads has nothing to do with what anybody uploaded.
    holders = sorted(call.holders(found.name.namespace)) if writes else []
    visible = sorted(call.visible(found.name.namespace)) if writes else []
    scope = WRITE if writes else READ
    claims = {"k": found.kind, "n": str(found.name), "h": holders, "v": visible, "s": scope}
    expires = int(time.time()) + TOKEN_LIFE
    token = call.hub.signer.token(_PURPOSE, claims, expires)
    # Clients keep what they know of stored chunks for each address apart.
    epoch = await run_in_threadpool(call.hub.index.epoch)
    url = f"{call.base}{PREFIX}/{_EPOCH}{epoch}" if epoch else call.base + PREFIX
    # The client's Rust part reads the body, its Python part the headers.
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expires)}
    return json_response({"casUrl": url, "exp": expires, "accessToken": token}, headers=headers)


async def handle(hub: Hub, request: Request, parts: tuple[str, ...], base: str) -> Response:
    """A request below `/cas`."""
    if parts and parts[0].startswith(_EPOCH):
        parts = parts[1:]
    match request.method, *parts:
        case "GET" | "HEAD", "xorbs", xorb:
            return await _send_xorb(hub, request, xorb)
        case "GET", "v1", "reconstructions", file:
            return await _reconstruct(hub, request, _grant(hub, request, False), file, base)
        case "GET", "v1", "chunks", _, chunk:
            return await _query(hub, _grant(hub, request, True), chunk)
        case "POST", "v1", "xorbs", _, xorb:
            return await _take_xorb(hub, request, _grant(hub, request, True), xorb)
        case "POST", "v1", "shards":
            return await _take_shard(hub, request, _grant(hub, request, True))
        case "POST", "v1", "telemetry":
            _grant(hub, request, False)
            await whole_body(request, _MAX_TELEMETRY)
            return json_response({})
    raise HttpError(404, "There is no such address.")


def _grant(hub: Hub, request: Request, writes: bool) -> Grant:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    claims = hub.signer.claims(_PURPOSE, token.strip(), int(time.time())) if scheme.lower() == "bearer" else None
    if claims is None:
        trace_of(request).refused = True
        raise HttpError(401, "The token is not valid, or has expired.")
    if writes and claims["s"] != WRITE:
        raise HttpError(403, "The token is for reading only.")
    namespace, _, last = str(claims["n"]).rpartition("/")
    holders, visible = claims["h"], claims["v"]
    assert isinstance(holders, list)
    assert isinstance(visible, list)
    name = RepositoryName(namespace, last)
    return Grant(str(claims["k"]), name, frozenset(holders), frozenset(visible), claims["s"] == WRITE)


def _digest(text: str) -> bytes:
    digest = hashes.digest_of(text)
    if digest is None:
        raise HttpError(400, "The hash has to be 64 hex digits.")
    return digest


# Coming in ------------------------------------------------------------------------------------------------------------


async def _take_xorb(hub: Hub, request: Request, grant: Grant, text: str) -> Response:
    expected = _digest(text)
    with _refused(hub), hub.content.receive() as incoming:
        sieve = Sieve(incoming.write, Finder(hub.content, hub.index, grant.holders))
        parser = XorbParser(sieve.take)
        async for part in pieces(request, MAX_PACKED + MAX_FOOTER):
            await run_in_threadpool(parser.feed, part)

        def keep() -> None:
            keep_xorb(hub.content, hub.index, incoming, sieve, parser.finish(expected), grant.holders)

        await run_in_threadpool(keep)
    # Always true: that somebody else has it already is nobody's business.
    return json_response({"was_inserted": True})


@contextlib.contextmanager
def _refused(hub: Hub) -> Iterator[None]:
    """What is wrong with an upload is said to whoever sent it, without the registry's whereabouts."""
    try:
        yield
    except (InputError, IntegrityError) as error:
        raise HttpError(400, error.message.replace(str(hub.registry.root), "the registry")) from None
    except ContentMissingError:
        raise HttpError(503, "Chunks were removed meanwhile; send it again.", headers={"Retry-After": "1"}) from None


async def _take_shard(hub: Hub, request: Request, grant: Grant) -> Response:
    data = await whole_body(request, MAX_SHARD)
    with _refused(hub):
        async with hub.registering:
            await run_in_threadpool(_register, hub, grant, data)
    return json_response({"result": 1})


def _register(hub: Hub, grant: Grant, data: bytes) -> None:
    def check(sha256: str, size: int) -> None:
        # What cannot be committed is not put together for it.
        check_size(hub, sha256, size)
        check_room(hub, grant.name.namespace, {sha256: size})

    register(hub.content, hub.index, data, grant.visible, grant.holders, hub.metadata.keep_tensor_hashes, check)


# Going out ------------------------------------------------------------------------------------------------------------


async def _query(hub: Hub, grant: Grant, text: str) -> Response:
    chunk = _digest(text)
    data = await run_in_threadpool(_told, hub, grant.holders, chunk)
    if data is None:
        raise HttpError(404, "The chunk is not known.")
    return Response(data, media_type="application/octet-stream")


def _told(hub: Hub, holders: Collection[str], chunk: bytes) -> bytes | None:
    """All xorbs of a file with this chunk, as far as there is room; None where no holder has such a file."""
    sha256 = hub.index.with_chunk(chunk, holders)
    recipe = hub.content.recipe(sha256) if sha256 is not None else None
    if sha256 is None or recipe is None:
        return None
    # Only what may then be referred to: of a file that others sent too, what these holders named.
    named = hub.index.named(sha256) or {term.xorb for term in recipe.terms}
    unheld = set(hub.index.unheld(named, holders))
    found = []
    room = _MAX_TOLD
    for xorb in sorted(set(named) - unheld):
        placed = placement_of(hub.content, hub.index, xorb)
        room -= len(placed.index)
        if room < 0:
            break
        touched = [hub.content.touch_xorb(term.xorb) for term in placed.terms]
        if all(touched):
            hub.index.touch_xorb(xorb)
            found.append(placed.index)
    if not found:
        return None
    now = int(time.time())
    return write_xorbs(found, now, now + _TOLD_FOR)


async def _reconstruct(hub: Hub, request: Request, grant: Grant, text: str, base: str) -> Response:
    digest = _digest(text)
    recipe = await run_in_threadpool(_find, hub, grant, digest)
    if recipe is None:
        raise HttpError(404, "The file is not known.")
    wanted = parse_range(request.headers.get("range"), recipe.size) or ByteRange(0, recipe.size)
    return json_response(await run_in_threadpool(_plan, hub, recipe, wanted, base))


def _find(hub: Hub, grant: Grant, digest: bytes) -> Recipe | None:
    """The recipe of a file, if the repository has it; whoever uploads may also look at what was just registered."""
    sha256 = hub.index.file(digest)
    if sha256 is None:
        return None
    here = any(r.kind == grant.kind and r.name.key == grant.name.key for r in hub.metadata.holding(sha256))
    if not here and not (grant.writes and hub.index.holds_content(sha256, grant.holders)):
        return None
    return hub.content.recipe(sha256)


def _plan(hub: Hub, recipe: Recipe, wanted: ByteRange, base: str) -> dict[str, object]:
    """Which chunks make up a range of a file, and from where to fetch them."""
    terms: list[Term] = []
    skipped = 0
    place = 0
    for term in recipe.terms:
        begin, end = place, place + term.size
        place = end
        if end <= wanted.begin or begin >= wanted.end:
            continue
        index = hub.content.open_xorb(term.xorb).index
        base_of = (index.ends[term.begin - 1] if term.begin else 0) - begin
        first, last = term.begin, term.end
        while index.ends[first] - base_of <= wanted.begin:
            first += 1
        while last - 1 > first and index.ends[last - 2] - base_of >= wanted.end:
            last -= 1
        if not terms:
            skipped = wanted.begin - (index.ends[first - 1] - base_of if first else -base_of)
        terms.append(Term(term.xorb, first, last, index.size(first, last)))
    expires = int(time.time()) + ADDRESS_LIFE
    fetched: dict[str, list[dict[str, object]]] = {}
    for xorb, ranges in _joined(terms).items():
        index = hub.content.open_xorb(xorb).index
        name = hashes.text(xorb)
        fetched[name] = []
        for first, last in ranges:
            low, high = index.packed_range(first, last)
            signature = hub.signer.signature(_ADDRESS, name, low, high, expires)
            fetched[name].append({
                "range": {"start": first, "end": last},
                "url": f"{base}{PREFIX}/xorbs/{name}?begin={low}&end={high}&expires={expires}&signature={signature}",
                "url_range": {"start": low, "end": high - 1},
            })  # fmt: skip
    listed = [
        {"hash": hashes.text(t.xorb), "unpacked_length": t.size, "range": {"start": t.begin, "end": t.end}}
        for t in terms
    ]
    return {"offset_into_first_range": skipped, "terms": listed, "fetch_info": fetched}


def _joined(terms: list[Term]) -> dict[bytes, list[tuple[int, int]]]:
    """For each xorb the ranges of its chunks, joined where they overlap or touch, so that nothing is fetched twice."""
    found: dict[bytes, list[tuple[int, int]]] = {}
    for term in sorted(terms, key=lambda term: (term.xorb, term.begin)):
        ranges = found.setdefault(term.xorb, [])
        if ranges and term.begin <= ranges[-1][1]:
            ranges[-1] = (ranges[-1][0], max(ranges[-1][1], term.end))
        else:
            ranges.append((term.begin, term.end))
    return found


async def _send_xorb(hub: Hub, request: Request, text: str) -> Response:
    """A range of a xorb, for whoever has an address that was signed for it."""
    digest = _digest(text)
    given = request.query_params
    numbers = [given.get(name, "") for name in ("begin", "end", "expires")]
    if not all(number.isdecimal() and len(number) < 18 for number in numbers):
        raise HttpError(403, "The address is not valid.")
    low, high, expires = map(int, numbers)
    if not hub.signer.is_signature(given.get("signature", ""), _ADDRESS, text, low, high, expires):
        raise HttpError(403, "The address is not valid.")
    if time.time() >= expires:
        raise HttpError(403, "The address has expired.")
    stored = await run_in_threadpool(hub.content.open_xorb, digest)
    wanted = parse_range(request.headers.get("range"), stored.source.size) or ByteRange(low, high)
    if wanted.begin < low or wanted.end > high:
        raise HttpError(403, "The address is for other bytes.")
    return stream(stored.source, wanted, {"ETag": f'"{text}"'}, request.method == "HEAD")
