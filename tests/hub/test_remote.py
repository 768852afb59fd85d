"""Checkpoints and adapters read by id from a Hub over HTTP: which bytes move, and what failures say."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import surgery
from surgery.errors import FormatError, InputError
from surgery.hub.range_source import HEAD_BYTES, RangeSource
from surgery.hub.ranges import SMALL, RangeReader
from surgery.hub.remote import open_folder
from surgery.hub.traffic import Traffic
from surgery.keywords import ExtractKeywords
from surgery.source import read_bytes
from tests.hub.fake_hub import Cut, FakeHub, environment
from tests.tools import run_cli, square_adapter, square_checkpoint, unequal

LAYERS, SIDE = 6, 512
LOG_IN = "if it is private, log in with `hf auth login`, or set HF_TOKEN."


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of 3 MB and an adapter."""
    folder = tmp_path_factory.mktemp("made")
    square_checkpoint(folder / "base", LAYERS, SIDE)
    square_adapter(folder / "adapter", LAYERS, SIDE)
    return folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """No waiting between tries; the pauses that would have been made."""
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    return pauses


def test_inspect_fetches_headers_only(hub: FakeHub, made: Path) -> None:
    """Of a checkpoint of megabytes, the first 64 kB and the small files."""
    hub.add("lab/base", made / "base")
    report = surgery.inspect("lab/base")
    assert report.as_dict() == surgery.inspect(made / "base").as_dict() | {"label": "lab/base"}
    assert hub.served("model.safetensors") == HEAD_BYTES
    assert hub.served() < HEAD_BYTES + 5_000
    assert (made / "base" / "model.safetensors").stat().st_size > 20 * HEAD_BYTES


def test_a_long_header_is_fetched_once(hub: FakeHub, tmp_path: Path) -> None:
    """What the first request brought is not asked for again."""
    square_checkpoint(tmp_path / "wide", 1200, 4)
    header = 8 + int.from_bytes((tmp_path / "wide" / "model.safetensors").read_bytes()[:8], "little")
    assert header > HEAD_BYTES
    hub.add("lab/wide", tmp_path / "wide")
    surgery.inspect("lab/wide")
    assert hub.served("model.safetensors") == header


def test_merging_from_ids_gives_the_bytes_of_merging_from_disk(hub: FakeHub, made: Path, tmp_path: Path) -> None:
    """Base and adapter by id; `surgery.json` names ids and commits, everything else is equal."""
    commits = {name: hub.add(f"lab/{name}", made / name) for name in ("base", "adapter")}
    surgery.merge("lab/base@main", "lab/adapter=0.5", output=tmp_path / "remote")
    surgery.merge(made / "base", (made / "adapter", 0.5), output=tmp_path / "local")
    assert unequal(tmp_path / "remote", tmp_path / "local") == ["surgery.json"]
    text = (tmp_path / "remote" / "surgery.json").read_text()
    assert all(commit in text for commit in commits.values())
    # Each byte of the weights once, and the header once more: it is read on its own.
    size = (made / "base" / "model.safetensors").stat().st_size
    assert hub.served("base/resolve/" + commits["base"] + "/model.safetensors") <= size + HEAD_BYTES


def test_extracting_from_ids_gives_the_bytes_of_extracting_from_disk(hub: FakeHub, made: Path, tmp_path: Path) -> None:
    """Two checkpoints by id, one of them by its branch."""
    surgery.merge(made / "base", made / "adapter", output=tmp_path / "tuned")
    hub.add("lab/base", made / "base")
    hub.add("lab/tuned", tmp_path / "tuned", "v2")
    options = ExtractKeywords(rank=4, device="cpu", base_name="base")
    surgery.extract("lab/base", "lab/tuned@v2", output=tmp_path / "remote", **options)
    surgery.extract(made / "base", tmp_path / "tuned", output=tmp_path / "local", **options)
    assert unequal(tmp_path / "remote", tmp_path / "local") == ["surgery.json"]


def test_the_command_reads_ids(hub: FakeHub, made: Path, tmp_path: Path) -> None:
    """In a process of its own, with nothing but the environment to tell it where."""
    hub.add("lab/adapter", made / "adapter")
    done = run_cli("inspect", "lab/adapter", "--json", env=environment(hub, tmp_path / "home"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert '"modules": 6' in done.stdout


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        ("lab/nothing", "lab/nothing is neither a local path nor a model on {url} that you may read; " + LOG_IN),
        ("lab/base@v9", "lab/base on {url} has no revision 'v9'."),
        ("lab/secret", "lab/secret is gated on {url}: ask for access there, then log in."),
        ("lab/--odd", "lab/--odd is neither a local path nor a model on {url} that you may read; " + LOG_IN),
        ("lab/empty", "lab/empty holds no weights: neither .safetensors nor .bin files are in it."),
    ],
)
def test_what_is_not_there_is_said_in_a_sentence(
    hub: FakeHub, made: Path, tmp_path: Path, reference: str, sentence: str
) -> None:
    hub.add("lab/base", made / "base")
    hub.add("lab/secret", made / "base")
    hub.repositories["lab/secret"].gated = True
    (tmp_path / "empty").mkdir()
    hub.add("lab/empty", tmp_path / "empty")
    with pytest.raises(InputError) as error:
        surgery.inspect(reference)
    assert str(error.value) == sentence.format(url=hub.url)


def test_a_file_that_goes_missing_is_said_in_a_sentence(hub: FakeHub, made: Path, quick: list[float]) -> None:
    """The description lists it, and the address has nothing."""
    hub.add("lab/base", made / "base")
    hub.fault = lambda method, path: 404 if path.endswith("config.json") else None
    with pytest.raises(InputError) as error:
        surgery.inspect("lab/base")
    assert str(error.value).startswith("lab/base/config.json cannot be fetched: ")
    hub.fault = lambda method, path: 404 if path.endswith("model.safetensors") else None
    with pytest.raises(InputError) as error:
        surgery.inspect("lab/base")
    assert str(error.value).startswith("lab/base/model.safetensors cannot be read at byte 0: ")
    with pytest.raises(InputError) as error:
        open_folder("lab/base", None).open("other.txt")
    assert str(error.value) == "lab/base has no file other.txt."


def test_a_server_that_is_busy_is_asked_again(hub: FakeHub, made: Path, quick: list[float]) -> None:
    """The description, a small file, and a range; then all goes well."""
    hub.add("lab/base", made / "base")
    failed: set[str] = set()

    def once(method: str, path: str) -> int | None:
        if path in failed or method == "HEAD":
            return None
        failed.add(path)
        return 503

    hub.fault = once
    assert surgery.inspect("lab/base").as_dict()["model_type"] == "squares"
    assert {path.rpartition("/")[2] for path in failed} == {"base", "config.json", "model.safetensors"}
    assert quick


def test_a_server_that_stays_busy_is_given_up(hub: FakeHub, made: Path, quick: list[float]) -> None:
    hub.add("lab/base", made / "base")
    hub.fault = lambda method, path: 503
    with pytest.raises(InputError) as error:
        surgery.inspect("lab/base")
    assert str(error.value).startswith(
        f"lab/base is neither a local path nor in the local cache, and {hub.url} cannot be reached ("
    )
    assert len(hub.requests) == 4
    assert quick == [0.5, 1.0, 2.0]


def test_an_answer_that_breaks_off_is_asked_for_again(
    hub: FakeHub, made: Path, tmp_path: Path, quick: list[float]
) -> None:
    """A range that ends early is no range; the output has the bytes it would have had."""
    hub.add("lab/base", made / "base")
    cuts = iter([Cut(1000), Cut(0)])
    hub.fault = lambda method, path: next(cuts, None) if path.endswith("model.safetensors") else None
    surgery.merge("lab/base", made / "adapter", output=tmp_path / "remote")
    surgery.merge(made / "base", made / "adapter", output=tmp_path / "local")
    assert unequal(tmp_path / "remote", tmp_path / "local") == ["surgery.json"]


def test_an_answer_that_always_breaks_off_leaves_nothing(
    hub: FakeHub, made: Path, tmp_path: Path, quick: list[float]
) -> None:
    hub.add("lab/base", made / "base")
    hub.fault = lambda method, path: Cut(70_000) if path.endswith("model.safetensors") else None
    with pytest.raises(InputError, match=r"cannot be read at byte \d+ of \d+: .+, after 5 tries; .+\.$"):
        surgery.merge("lab/base", made / "adapter", output=tmp_path / "out" / "merged")
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_a_server_without_ranges_is_refused(hub: FakeHub, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole file in answer to a range is not taken for the range."""
    hub.add("lab/base", made / "base")
    hub.ranges = False
    monkeypatch.setattr("surgery.hub.ranges.SMALL", 1 << 20)
    size = (made / "base" / "model.safetensors").stat().st_size
    with pytest.raises(InputError) as error:
        surgery.inspect("lab/base")
    assert str(error.value) == (
        f"lab/base/model.safetensors: the server answered a request for bytes 0 to {HEAD_BYTES} with all {size} bytes; "
        "it must support range requests. `surgery pull` fetches it whole."
    )


def test_a_small_file_is_read_from_a_server_without_ranges(hub: FakeHub, made: Path, tmp_path: Path) -> None:
    """What comes before and after the part that is wanted is passed over."""
    hub.add("lab/base", made / "base")
    hub.ranges = False
    assert (made / "base" / "model.safetensors").stat().st_size <= SMALL
    surgery.merge("lab/base", made / "adapter", output=tmp_path / "remote")
    surgery.merge(made / "base", made / "adapter", output=tmp_path / "local")
    assert unequal(tmp_path / "remote", tmp_path / "local") == ["surgery.json"]


def test_a_size_that_the_description_lacks_is_asked_for(hub: FakeHub, made: Path) -> None:
    hub.add("lab/base", made / "base")
    hub.sizes = False
    assert surgery.inspect("lab/base").as_dict()["files"] == surgery.inspect(made / "base").as_dict()["files"]


@pytest.mark.parametrize("name", ["../evil.json", "/etc/evil", "a/../../evil", "a\\b", "a//b", "bad\x00name"])
def test_a_file_name_that_leads_out_is_refused(hub: FakeHub, made: Path, name: str) -> None:
    """A Hub is a stranger: its names become paths of the output."""
    hub.add("lab/base", made / "base")
    (sha,) = hub.repositories["lab/base"].commits
    hub.repositories["lab/base"].commits[sha][name] = b"{}"
    with pytest.raises(InputError, match=r"^lab/base holds a file .*, whose name .+\.$"):
        surgery.inspect("lab/base")


def test_reading_beyond_the_end_is_an_error_without_a_request() -> None:
    source = RangeSource(RangeReader("http://127.0.0.1:9/never", "lab/x/f", 10, Traffic()))
    with pytest.raises(FormatError, match=r"lab/x/f has 10 bytes, too few for 4 at 8\."):
        read_bytes(source, 8, 4)


def test_what_the_cache_holds_is_not_fetched(hub: FakeHub, made: Path) -> None:
    """Weights that another tool downloaded are read from the cache; the description alone comes from the Hub."""
    from huggingface_hub import snapshot_download

    hub.add("lab/base", made / "base")
    snapshot_download("lab/base")
    before = len(hub.requests)
    surgery.inspect("lab/base")
    assert [request.path for request in hub.requests[before:]] == ["/api/models/lab/base"]


def test_offline_the_cache_is_all_there_is(
    hub: FakeHub, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Set HF_HUB_OFFLINE, or take the Hub away: what is in the cache is read, and what is not is said."""
    from huggingface_hub import constants, snapshot_download

    commit = hub.add("lab/base", made / "base")
    hub.add("lab/adapter", made / "adapter")
    snapshot_download("lab/base")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(hub.requests)
    surgery.merge("lab/base", made / "adapter", output=tmp_path / "merged")
    assert commit in (tmp_path / "merged" / "surgery.json").read_text()
    with pytest.raises(InputError) as error:
        surgery.inspect("lab/adapter")
    assert str(error.value) == (
        f"lab/adapter is neither a local path nor in the local cache, and {hub.url} cannot be reached "
        "(HF_HUB_OFFLINE is set)."
    )
    assert len(hub.requests) == before


def test_an_endpoint_that_is_away_leaves_the_cache(
    hub: FakeHub, made: Path, monkeypatch: pytest.MonkeyPatch, quick: list[float]
) -> None:
    from huggingface_hub import constants, snapshot_download

    hub.add("lab/base", made / "base")
    snapshot_download("lab/base")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert surgery.inspect("lab/base").as_dict()["model_type"] == "squares"
    shutil.rmtree(constants.HF_HUB_CACHE)
    with pytest.raises(InputError, match=r"and http://127\.0\.0\.1:9 cannot be reached \(.+\)\.$"):
        surgery.inspect("lab/base")
