"""What a server or a line can do wrong, and what is made of it: the right bytes, or one sentence."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from surgery.errors import FormatError, InputError, IntegrityError, SurgeryError
from surgery.hub.ahead import Blocks
from surgery.hub.range_source import HEAD_BYTES, RangeSource
from surgery.hub.ranges import RangeReader
from surgery.hub.traffic import Traffic
from surgery.source import read_bytes
from tests.hub.remote.faulty import COMMIT, Do, FaultyServer, serving_badly

SIZE = 300_000
DATA = random.Random(0).randbytes(SIZE)
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session  # type: ignore[attr-defined]  # not exported, and there

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    close_session()
    yield
    close_session()


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with serving_badly(DATA) as found:
        yield found


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """No waiting between tries; the pauses that would have been made."""
    found: list[float] = []
    monkeypatch.setattr("surgery.hub.ranges.time.sleep", found.append)
    return found


def reader(server: FaultyServer, size: int = SIZE, sha256: str = "") -> RangeReader:
    return RangeReader(server.url, "lab/x/f", size, Traffic(), COMMIT, sha256)


def part(found: RangeReader, begin: int, count: int) -> bytes:
    data = bytearray(count)
    found.read(begin, memoryview(data))
    return bytes(data)


@pytest.mark.parametrize(
    ("plans", "expected"),
    [
        ([Do(cut=0)], [0.5]),
        ([Do(cut=1000), Do(cut=77)], [0.5, 1.0]),
        ([Do(status=503), Do(status=500), Do(status=408)], [0.5, 1.0, 2.0]),
        ([Do(status=429, headers={"Retry-After": "7"})], [7.0]),
        ([Do(status=429, headers={"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"})], [0.5]),
        ([Do(status=429, headers={"RateLimit": '"api";r=0;t=30'})], [31.0]),
        ([Do(pause=0.3)], []),
        ([Do(total=SIZE)], []),
    ],
)
def test_what_passes_is_waited_for(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch, plans: list[Do], expected: list[float]
) -> None:
    """What a try brought is kept: the next one asks for the rest only."""
    found: list[float] = []
    monkeypatch.setattr("surgery.hub.ranges.time.sleep", found.append)
    server.plans.extend(plans)
    assert part(reader(server), 5000, 9000) == DATA[5000:14000]
    assert found == expected
    got = sum(plan.cut or 0 for plan in plans)
    assert server.requests[-1][1] == f"bytes={5000 + got}-13999"


@pytest.mark.parametrize(
    ("plan", "kind", "sentence"),
    [
        (Do(whole=True), None, ""),
        (
            Do(moved=1),
            InputError,
            "lab/x/f: the server answered a request for bytes 5000 to 14000 with 'bytes 5001-14000/300000', expected "
            "bytes 5000-13999/300000.",
        ),
        (
            Do(total=77),
            InputError,
            "lab/x/f: the server answered a request for bytes 5000 to 14000 with 'bytes 5000-13999/77', expected bytes "
            "5000-13999/300000.",
        ),
        (
            Do(extra=10),
            InputError,
            "lab/x/f: the server sends more than the 9000 bytes that were asked for at 5000; a proxy or the server is "
            "at fault.",
        ),
        (Do(encoding="gzip"), InputError, "lab/x/f: the server compresses (gzip) what was asked for as it is."),
        (
            Do(commit="d" * 40),
            IntegrityError,
            f"lab/x/f: the server answers with commit {'d' * 40}, expected {COMMIT}.",
        ),
        (
            Do(etag='"' + "e" * 64 + '"'),
            IntegrityError,
            f"lab/x/f: the server has content with the SHA-256 {'e' * 64} there, expected {SHA256}.",
        ),
        (
            Do(status=416),
            IntegrityError,
            "lab/x/f is shorter at 127.0.0.1:{port} than the 300000 bytes it is described with.",
        ),
        (
            Do(status=401),
            InputError,
            "lab/x/f may not be read: 127.0.0.1:{port} answers with status 401; log in with `hf auth login`, or set "
            "HF_TOKEN.",
        ),
        (
            Do(status=429, headers={"Retry-After": "3600"}),
            InputError,
            "lab/x/f cannot be read at byte 5000 of 300000: 127.0.0.1:{port} answers with status 429, and asks for a "
            "pause of 3600 seconds; try again later.",
        ),
        (Do(status=204), InputError, "lab/x/f cannot be read: 127.0.0.1:{port} answers with status 204."),
    ],
)
def test_what_is_wrong_is_said(
    server: FaultyServer, pauses: list[float], plan: Do, kind: type[SurgeryError] | None, sentence: str
) -> None:
    """At once, without another try; a small file that comes whole is no fault."""
    server.plans.extend([plan] * 5)
    if kind is None:
        assert part(reader(server, sha256=SHA256), 5000, 9000) == DATA[5000:14000]
        return
    with pytest.raises(SurgeryError) as error:
        part(reader(server, sha256=SHA256), 5000, 9000)
    assert type(error.value) is kind
    assert error.value.message == sentence.replace("{port}", str(server.port))
    assert pauses == []


def test_a_line_that_stays_broken_is_given_up(server: FaultyServer, pauses: list[float]) -> None:
    """It says how far it came."""
    server.plans.extend([Do(cut=100)] * 9)
    with pytest.raises(InputError) as error:
        part(reader(server), 5000, 9000)
    assert error.value.message.startswith("lab/x/f cannot be read at byte 5500 of 300000: ")
    assert error.value.message.endswith(" after 5 tries; run the command again when the network is better.")
    assert pauses == [0.5, 1.0, 2.0, 4.0]


def test_a_large_file_that_comes_whole_is_refused(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgery.hub.ranges.SMALL", SIZE - 1)
    server.plans.extend([Do(whole=True)] * 2)
    with pytest.raises(InputError) as error:
        part(reader(server), 5000, 9000)
    assert error.value.message == (
        "lab/x/f: the server answered a request for bytes 5000 to 14000 with all 300000 bytes; it must support range "
        "requests. `surgery pull` fetches it whole."
    )
    assert part(reader(server), 0, SIZE) == DATA  # all that was wanted


def test_a_signed_address_is_used_again_and_renewed(server: FaultyServer) -> None:
    """The token goes to the Hub only. An address that has expired is asked for once more."""
    server.away, server.lasts = True, 2
    found = reader(server)
    for begin in (0, 1000, 2000, 3000):
        assert part(found, begin, 1000) == DATA[begin : begin + 1000]
    asked = [(path.split("/")[1], token) for path, _, token in server.requests]
    ours, theirs = ("lab", "Bearer hf_secret"), ("signed", None)
    assert asked == [ours, theirs, theirs, theirs, ours, theirs, theirs]


def test_an_address_that_never_holds_is_an_error(server: FaultyServer) -> None:
    server.away, server.lasts = True, 0
    with pytest.raises(InputError) as error:
        part(reader(server), 0, 1000)
    assert error.value.message == (
        f"lab/x/f may not be read: localhost:{server.port} answers with status 403; its address may have expired."
    )
    assert len(server.requests) == 4


def test_addresses_that_lead_in_a_circle_are_an_error(server: FaultyServer) -> None:
    server.plans.extend([Do(status=302, headers={"Location": server.url})] * 9)
    with pytest.raises(InputError, match=r"leads from one address to the next without end\.$"):
        part(reader(server), 0, 1000)


def test_one_connection_serves_many_ranges(server: FaultyServer) -> None:
    found = reader(server)
    for begin in range(0, SIZE, 30_000):
        part(found, begin, 30_000)
    assert (server.connections, server.served) == (1, SIZE)


def source(server: FaultyServer, sha256: str = SHA256) -> RangeSource:
    return RangeSource(reader(server, sha256=sha256), COMMIT, sha256, Blocks(200_000, 2))


def test_a_file_that_is_read_whole_is_proved(server: FaultyServer) -> None:
    found = source(server)
    read_bytes(found, 0, 8)
    found.expect([(HEAD_BYTES, SIZE)])
    assert read_bytes(found, HEAD_BYTES, SIZE - HEAD_BYTES) == DATA[HEAD_BYTES:]
    found.check_unchanged()
    assert found.proved
    assert server.served == SIZE


def test_a_flipped_byte_is_found(server: FaultyServer) -> None:
    found = source(server)
    read_bytes(found, 0, 8)
    server.plans.append(Do(flip=True))
    found.expect([(HEAD_BYTES, SIZE)])
    with pytest.raises(IntegrityError, match=rf"^lab/x/f has the SHA-256 \w+, expected {SHA256}: it was damaged on"):
        read_bytes(found, HEAD_BYTES, SIZE - HEAD_BYTES)
    with pytest.raises(IntegrityError):
        found.check_unchanged()
    assert not found.proved


def test_a_part_proves_nothing(server: FaultyServer) -> None:
    found = source(server)
    read_bytes(found, 0, 8)
    found.expect([(HEAD_BYTES, SIZE - 1)])
    read_bytes(found, HEAD_BYTES, SIZE - 1 - HEAD_BYTES)
    found.check_unchanged()
    assert (found.read, found.proved) == (True, False)


def test_reading_ahead_that_fails_is_tried_again_by_whoever_needs_it(
    server: FaultyServer, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surgery.hub.ahead.BLOCK_BYTES", 50_000)
    found = source(server)
    read_bytes(found, 0, 8)
    server.plans.extend([Do(status=503)] * 4)
    found.expect([(HEAD_BYTES, SIZE)])
    assert read_bytes(found, HEAD_BYTES, SIZE - HEAD_BYTES) == DATA[HEAD_BYTES:]
    assert found.proved


def test_reading_beyond_the_end_is_an_error(server: FaultyServer) -> None:
    with pytest.raises(FormatError, match=r"^lab/x/f has 300000 bytes, too few for 4 at 299998\.$"):
        read_bytes(source(server), SIZE - 2, 4)
    assert server.requests == []


SPANS = st.tuples(st.integers(0, SIZE - 1), st.integers(1, 40_000)).map(lambda s: (s[0], min(s[0] + s[1], SIZE)))


@given(
    announced=st.lists(SPANS, max_size=12),
    others=st.lists(SPANS, max_size=4),
    order=st.randoms(use_true_random=False),
    faults=st.lists(st.sampled_from([Do(), Do(cut=500), Do(status=503)]), max_size=3),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_reads_in_any_order_give_the_bytes_of_the_file(
    server: FaultyServer,
    pauses: list[float],
    announced: list[tuple[int, int]],
    others: list[tuple[int, int]],
    order: random.Random,
    faults: list[Do],
) -> None:
    """Announced or not, once or twice, overlapping, on a bad line, in as little memory as it takes."""
    server.plans.clear()
    server.plans.extend(faults)
    found = RangeSource(reader(server), COMMIT, SHA256, Blocks(100_000, 2))
    found.expect(announced)
    spans = [*announced, *others]
    order.shuffle(spans)
    for begin, end in spans:
        assert read_bytes(found, begin, end - begin) == DATA[begin:end]
    found.expect(())
