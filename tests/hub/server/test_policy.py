"""What a server takes in: pickles, sizes, quotas, numbers of requests; and what it says where it does not."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pickle
import random
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]  # not exported, and there

from surgery.errors import OptionError
from surgery.hub.pickles import LOOK_VERSION
from surgery.hub.server.community import SqliteCommunity
from surgery.hub.server.limiting import Limiter, of_address
from surgery.hub.server.policy import Policy
from surgery.hub.server.web import HttpError
from tests.hub.server.serving import Server, serving
from tests.hub.server.test_protocol import put, status
from tests.hub.server.test_safety import Xet, lfs_address
from tests.hub.xet_tools import Described, xorb


class Runs:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("echo harm",)


HARM = pickle.dumps(Runs())


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ("--pickle", "refuse", "--quota", "100kB", "--max-file-size", "60kB", "--rate-limit", "0")
    with serving(tmp_path_factory.mktemp("strict"), *options) as found:
        yield found


def test_pickles_are_flagged(server: Server) -> None:
    api = server.api()
    api.create_repo("flagged")
    put(api, "ada/flagged", {"w.bin": HARM, "a.txt": b"text", "plain.pkl": pickle.dumps([1, 2]), "odd.pt": b"odd"})
    found = {item.path: item for item in api.list_repo_tree("ada/flagged", expand=True)}
    levels = {}
    for path, item in found.items():
        assert isinstance(item, RepoFile)
        assert item.security is not None
        levels[path] = (item.security.safe, item.security.status)
    assert levels == {
        "w.bin": (False, "unsafe"), "a.txt": (True, "safe"), "plain.pkl": (True, "safe"),
        "odd.pt": (False, "suspicious"),
    }  # fmt: skip
    item = found["w.bin"]
    assert isinstance(item, RepoFile)
    assert item.security is not None
    scan = item.security.pickle_import_scan
    assert scan is not None
    assert scan["pickleImports"] == [{"module": "posix", "name": "system", "safety": "dangerous"}]
    (info,) = api.get_paths_info("ada/flagged", "w.bin", expand=True)
    assert isinstance(info, RepoFile)
    assert info.security == item.security
    (plain,) = api.get_paths_info("ada/flagged", "w.bin")
    assert isinstance(plain, RepoFile)
    assert plain.security is None
    described = api.model_info("ada/flagged", securityStatus=True).security_repo_status
    assert described is not None
    issues = {issue["path"]: issue["level"] for issue in described["filesWithIssues"]}
    assert issues == {"odd.pt": "suspicious", "w.bin": "unsafe"}
    assert api.model_info("ada/flagged").security_repo_status is None


def test_what_an_earlier_reader_found_is_looked_at_again(server: Server) -> None:
    """Verdicts are kept, with the version of the reader that gave them."""
    api = server.api()
    api.create_repo("earlier")
    put(api, "ada/earlier", {"w.bin": HARM + b"earlier", "a.txt": b"no pickle"})
    harm, plain = (hashlib.sha256(data).hexdigest() for data in (HARM + b"earlier", b"no pickle"))
    community = SqliteCommunity(server.data / "registry.sqlite")
    lenient: dict[str, object] = {"level": "safe", "imports": [], "message": None}
    levels = []
    for version in ({}, {"version": LOOK_VERSION - 1}, {"version": LOOK_VERSION}):
        community.keep_scans({harm: {**lenient, **version}, plain: dict(version)})
        for item in api.list_repo_tree("ada/earlier", expand=True):
            assert isinstance(item, RepoFile)
            assert item.security is not None
            levels.append((item.path, item.security.status, (community.scan(harm) or {})["version"]))
    community.close()
    again = [("a.txt", "safe", LOOK_VERSION), ("w.bin", "unsafe", LOOK_VERSION)]
    kept = [("a.txt", "safe", LOOK_VERSION), ("w.bin", "safe", LOOK_VERSION)]
    assert levels == [*again, *again, *kept]


@pytest.mark.parametrize("disabled", ["0", "1"])
def test_pickles_are_refused(strict: Server, tmp_path: Path, disabled: str) -> None:
    name = f"ada/refused-{disabled}"
    strict.api().create_repo(name)
    (tmp_path / "weights.bin").write_bytes(HARM)
    # Before anything is uploaded, by its first bytes; or by its name.
    before = strict.stored()
    for code in (
        f"api.upload_folder(repo_id={name!r}, folder_path={str(tmp_path)!r})",
        f"api.upload_file(path_or_fileobj=b'x', path_in_repo='x.pkl', repo_id={name!r})",
    ):
        refused = strict.client(
            f"""
            from huggingface_hub.errors import HfHubHTTPError
            try:
                {code}
            except HfHubHTTPError as error:
                print(json.dumps([error.response.status_code, str(error)]))
            """,
            HF_HUB_DISABLE_XET=disabled,
        )
        assert refused[0] == 422
        assert "is a pickle, which runs code when it is loaded; this server takes none" in refused[1]
    assert strict.stored() == before
    assert strict.api().list_repo_files(name) == []


def test_a_pickle_that_hides_from_the_first_look(strict: Server) -> None:
    """What says at first that it is something else is found by what was committed."""
    api = strict.api()
    api.create_repo("hiding")
    headers = {"Authorization": f"Bearer {strict.tokens['ada']}"}
    lines = [
        {"key": "header", "value": {"summary": "x"}},
        {"key": "file", "value": {"path": "a.md", "content": base64.b64encode(HARM).decode(), "encoding": "base64"}},
    ]
    body = "\n".join(json.dumps(line) for line in lines)
    for query in ("", "?create_pr=1"):
        answer = httpx2.post(f"{strict.url}/api/models/ada/hiding/commit/main{query}", content=body, headers=headers)
        assert (answer.status_code, "a.md is a pickle" in answer.json()["error"]) == (422, True)
    assert api.list_repo_files("ada/hiding") == []
    assert not list(api.get_repo_discussions("ada/hiding"))


def noise(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


def test_quotas(strict: Server) -> None:
    api = strict.api()
    api.create_repo("lab/first")
    api.create_repo("lab/second")
    put(api, "lab/first", {"a.txt": noise(50_000, 1)})
    # What the namespace has already counts once.
    put(api, "lab/second", {"a.txt": noise(50_000, 1), "b.txt": noise(45_000, 2)})
    with pytest.raises(HfHubHTTPError, match="lab may keep 100000 bytes on this server and would have 10") as error:
        put(api, "lab/first", {"c.txt": noise(6_000, 3)})
    assert status(error.value) == 403
    with pytest.raises(HfHubHTTPError, match="lab may keep 100000 bytes"):
        put(api, "lab/first", {f"{n}.txt": noise(55_000, 10 + n) for n in range(2)})
    sha256 = "0" * 64
    body = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": sha256, "size": 6_000}]}
    headers = {"Authorization": f"Bearer {strict.tokens['ada']}"}
    answer = httpx2.post(f"{strict.url}/lab/first.git/info/lfs/objects/batch", json=body, headers=headers)
    assert (answer.status_code, "lab may keep" in answer.json()["error"]) == (403, True)
    # Another namespace has its own.
    assert lfs_address(strict, "ada", "ada/hiding", sha256, 6_000) is not None
    put(api, "lab/first", {"c.txt": noise(4_000, 4)})
    # Nor does a copy get past it, however its name is written.
    api.create_repo("source")
    put(api, "ada/source", {"s.txt": noise(20_000, 6)})
    for target in ({"repository": "lab/copy"}, {"repository": "copy", "organization": "lab"}):
        answer = httpx2.post(f"{strict.url}/api/models/ada/source/duplicate", json=target, headers=headers)
        assert (answer.status_code, "lab may keep" in answer.json()["error"]) == (403, True)
    api.delete_repo("lab/second")
    put(api, "lab/first", {"d.txt": noise(30_000, 5)})


def test_whom_an_address_is() -> None:
    assert of_address("192.0.2.7") == of_address("::ffff:192.0.2.7") == "192.0.2.7"
    assert of_address("2001:db8:1:2::1") == of_address("2001:db8:1:2:ffff::9") == "2001:db8:1:2::/64"
    assert of_address("2001:db8:1:3::1") == "2001:db8:1:3::/64"
    assert of_address("fe80::1%eth0") == of_address("fe80::2%eth0")
    assert of_address("") == ""


def test_large_files(strict: Server) -> None:
    api = strict.api("bob")
    api.create_repo("bob/large")
    with pytest.raises(HfHubHTTPError, match=r"x\.txt has 70000 bytes; a file may have 60000 bytes") as error:
        put(api, "bob/large", {"x.txt": noise(70_000, 1)})
    assert status(error.value) == 413


def test_large_files_made_of_few_chunks(strict: Server) -> None:
    """A shard may name the same chunks again and again: what may not be kept is not put together either."""
    strict.api().create_repo("repeated")
    xet, chunks = Xet(strict, "ada", "ada/repeated"), [noise(5_000, 1)]
    assert xet.xorb(chunks).status_code == 200
    digest = xorb(chunks)[0]
    data = chunks[0] * 13
    file = Described([(digest, chunks, 0, 1)] * 13, hashlib.sha256(data).hexdigest())
    answer = xet.shard(file)
    assert (answer.status_code, "a file may have 60000 bytes" in answer.json()["error"]) == (413, True)
    put(strict.api(), "ada/repeated", {"a.txt": noise(56_000, 2)})
    half = Described(file.terms[:10], hashlib.sha256(data[:50_000]).hexdigest())
    answer = xet.shard(half)
    assert (answer.status_code, "ada may keep 100000 bytes" in answer.json()["error"]) == (403, True)
    assert xet.shard(Described(file.terms[:2], hashlib.sha256(data[:10_000]).hexdigest())).status_code == 200


def test_limits_that_make_no_sense() -> None:
    with pytest.raises(OptionError, match="--pickle is 'maybe', expected one of allow, flag, refuse"):
        Policy(pickle="maybe")
    with pytest.raises(OptionError, match="--quota is 0, expected a number of bytes above 0"):
        Policy(quota=0)


# Numbers of requests --------------------------------------------------------------------------------------------------


def test_a_bucket_fills_again() -> None:
    now = 0.0
    limiter = Limiter(60, lambda: now)
    for _ in range(60):
        limiter.take("a")
    limiter.take("b")
    with pytest.raises(HttpError, match="60 a minute are allowed; go on in 1 seconds") as error:
        limiter.take("a")
    assert error.value.headers == {
        "Retry-After": "1", "RateLimit": '"api";r=0;t=1', "RateLimit-Policy": '"fixed window";"api";q=60;w=60',
    }  # fmt: skip
    now = 1.0
    limiter.take("a")
    with pytest.raises(HttpError):
        limiter.take("a")
    now = 1000.0
    for _ in range(60):
        limiter.take("a")
    with pytest.raises(HttpError):
        limiter.take("a")
    for _ in range(100):
        Limiter(0).take("a")


def test_too_many_requests(tmp_path: Path) -> None:
    with serving(tmp_path, "--rate-limit", "30") as server:
        headers = {"Authorization": f"Bearer {server.tokens['ada']}"}
        url = f"{server.url}/api/whoami-v2"
        answers = [httpx2.get(url, headers=headers) for _ in range(40)]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert 5 <= len(refused) <= 10
        found = parse_ratelimit_headers(refused[-1].headers)
        assert found is not None
        assert (found.remaining, found.limit, found.window_seconds) == (0, 30, 60)
        assert int(refused[-1].headers["retry-after"]) == found.reset_in_seconds >= 1
        # Others are not held up, and neither is whoever looks whether the server is well.
        assert httpx2.get(url, headers={"Authorization": f"Bearer {server.tokens['bob']}"}).status_code == 200
        assert {httpx2.get(f"{server.url}/health").status_code for _ in range(40)} == {200}
        # Whoever guesses tokens is counted by the address.
        wrong = [httpx2.get(url, headers={"Authorization": f"Bearer guess-{n}"}).status_code for n in range(40)]
        assert set(wrong) == {401, 429}
