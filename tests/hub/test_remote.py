"""Checkpoints and adapters read by id from a Hub over HTTP: which bytes move, and what failures say."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import surgery
from surgery.errors import FormatError, InputError, IntegrityError
from surgery.hub.range_source import HEAD_BYTES, RangeSource
from surgery.hub.ranges import SMALL, RangeReader
from surgery.hub.remote import open_folder
from surgery.hub.resolve import resolve_bases, resolve_checkpoint
from surgery.hub.traffic import Traffic
from surgery.keywords import ExtractKeywords
from surgery.source import read_bytes
from tests.hub.fake_hub import Cut, FakeHub, environment
from tests.models import make, save
from tests.tools import interrupted, run_cli, square_adapter, square_checkpoint, unequal

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


def header_end(folder: Path, name: str = "model.safetensors") -> int:
    """Where the data of a safetensors file begin."""
    return 8 + int.from_bytes((folder / name).read_bytes()[:8], "little")


def weights(hub: FakeHub, name: str) -> int:
    """Bytes that were served of a repository's weights."""
    return sum(r.sent for r in hub.requests if f"/{name}/resolve/" in r.path and r.path.endswith(".safetensors"))


def test_a_dry_run_reads_headers_only(hub: FakeHub, made: Path, tmp_path: Path) -> None:
    hub.add("lab/base", made / "base")
    hub.add("lab/adapter", made / "adapter")
    report = surgery.merge("lab/base", "lab/adapter", output=tmp_path / "out", dry_run=True)
    assert weights(hub, "base") == HEAD_BYTES
    assert weights(hub, "adapter") <= HEAD_BYTES
    assert [(one.source, one.proved, one.unproved) for one in report.fetched] == [
        ("lab/adapter", (), ()),
        ("lab/base", (), ()),
    ]


def test_an_extraction_reads_each_byte_once(hub: FakeHub, made: Path, tmp_path: Path) -> None:
    """Of both, whatever the threads; and the report says how many and that all of them are proved."""
    surgery.merge(made / "base", made / "adapter", output=tmp_path / "tuned", hash=False)
    hub.add("lab/base", made / "base")
    hub.add("lab/tuned", tmp_path / "tuned")
    report = surgery.extract("lab/base", "lab/tuned", output=tmp_path / "out", rank=4, device="cpu", threads=3)
    # Before that, the first 128 kB of each module, to see whether the two belong together.
    size = (made / "base" / "model.safetensors").stat().st_size + LAYERS * (128 << 10)
    assert (weights(hub, "base"), weights(hub, "tuned")) == (size, size)
    assert sum(one.nbytes for one in report.fetched) == sum(r.sent for r in hub.requests if "/resolve/" in r.path)
    assert [one.proved for one in report.fetched] == [("model.safetensors",)] * 2


@pytest.mark.slow
def test_memory_does_not_grow_with_what_is_far_away(hub: FakeHub, made: Path, tmp_path: Path) -> None:
    """A merge of 270 MB by id takes at most 100 MB more than from the disk."""
    square_checkpoint(tmp_path / "base", 16, 2900)
    square_adapter(tmp_path / "adapter", 1, 2900)
    hub.add("lab/large", tmp_path / "base")
    measured = "import resource, runpy, sys; sys.argv = ['surgery', *sys.argv[1:]]\ntry: runpy.run_module('surgery', "
    measured += "run_name='__main__')\nfinally: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    peaks = []
    for base, out in ((str(tmp_path / "base"), "one"), ("lab/large", "other")):
        done = subprocess.run(
            [sys.executable, "-c", measured, "merge", base, str(tmp_path / "adapter"), "-o", out, "-q"],
            env={**os.environ, **environment(hub, tmp_path / "home")},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout) // 1024)
    assert unequal(tmp_path / "one", tmp_path / "other") == ["surgery.json"]
    assert peaks[1] - peaks[0] <= 100, peaks


def test_only_the_matrices_that_an_adapter_acts_on_are_read(hub: FakeHub, made: Path, tmp_path: Path) -> None:
    """`analyze` looks at one matrix of six."""
    square_adapter(tmp_path / "one", 1, SIDE)
    hub.add("lab/base", made / "base")
    report = surgery.analyze("lab/base", tmp_path / "one")
    assert len(report.modules) == 1
    # The matrix is the first in the file: what the first request brought of it is not asked for again.
    assert weights(hub, "base") == header_end(made / "base") + 2 * SIDE * SIDE


def test_what_is_copied_many_times_is_fetched_once(hub: FakeHub, tmp_path: Path) -> None:
    """A mixture of eight copies of each MLP."""
    save(make("llama"), tmp_path / "dense")
    hub.add("lab/dense", tmp_path / "dense")
    surgery.upcycle("lab/dense", output=tmp_path / "remote", experts=8, verify=False)
    surgery.upcycle(tmp_path / "dense", output=tmp_path / "local", experts=8, verify=False)
    assert unequal(tmp_path / "remote", tmp_path / "local") == ["surgery.json"]
    assert weights(hub, "dense") == (tmp_path / "dense" / "model.safetensors").stat().st_size


def test_a_branch_that_moves_is_read_at_the_commit_it_had(hub: FakeHub, made: Path, tmp_path: Path) -> None:
    """What is open stays what it is; the output names the commit."""
    commit = hub.add("lab/base", made / "base")
    base = resolve_checkpoint("lab/base")
    square_checkpoint(tmp_path / "other", 2, 8)
    hub.add("lab/base", tmp_path / "other")
    surgery.merge(base, made / "adapter", output=tmp_path / "remote")
    surgery.merge(made / "base", made / "adapter", output=tmp_path / "local")
    assert unequal(tmp_path / "remote", tmp_path / "local") == ["surgery.json"]
    assert f'"revision": "{commit}"' in (tmp_path / "remote" / "surgery.json").read_text()


def damaged(hub: FakeHub, name: str, file: str, place: int) -> str:
    """Flip a byte of what a Hub has, which goes on giving out the hash of what it was; returns the commit."""
    (sha,) = hub.repositories[name].commits
    files = hub.repositories[name].commits[sha]
    before = files[file]
    files[file] = before[:place] + bytes([before[place] ^ 1]) + before[place + 1 :]
    hub.hashes[files[file]] = before
    return sha


def test_damaged_weights_are_refused(hub: FakeHub, made: Path, tmp_path: Path) -> None:
    """Found when the last byte has passed, and nothing is at the target."""
    hub.add("lab/base", made / "base")
    hub.linked = False
    damaged(hub, "lab/base", "model.safetensors", 2_000_000)
    with pytest.raises(IntegrityError, match=r"^lab/base/model\.safetensors has the SHA-256 \w+, expected \w+: it was"):
        surgery.merge("lab/base", made / "adapter", output=tmp_path / "out" / "merged")
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_a_server_that_has_another_file_is_refused_at_once(hub: FakeHub, made: Path) -> None:
    """Its answers say so."""
    hub.add("lab/base", made / "base")
    damaged(hub, "lab/base", "model.safetensors", 2_000_000)
    with pytest.raises(IntegrityError, match=r"^lab/base/model\.safetensors: the server has content with the SHA-256 "):
        surgery.inspect("lab/base")


def test_a_damaged_config_is_refused_and_not_kept(hub: FakeHub, made: Path) -> None:
    """Small files are proved before they are read, and do not stay in the cache."""
    hub.add("lab/base", made / "base")
    sha = damaged(hub, "lab/base", "config.json", 3)
    for _ in range(2):
        with pytest.raises(IntegrityError, match=r"^lab/base/config\.json has the hash \w+, expected \w+: "):
            surgery.inspect("lab/base")
    files = hub.repositories["lab/base"].commits[sha]
    files["config.json"] = hub.hashes[files["config.json"]]
    surgery.inspect("lab/base")


def test_parts_are_proved_by_the_hashes_on_record(hub: FakeHub, made: Path, tmp_path: Path) -> None:
    """Nothing gives the SHA-256 of the file; `surgery.json` has what its tensors hash to, and finds a flipped bit."""
    surgery.merge(made / "base", made / "adapter", output=tmp_path / "tuned")
    hub.linked = False
    for name in ("tuned", "bare", "damaged"):
        hub.add(f"lab/{name}", tmp_path / "tuned")
    (sha,) = hub.repositories["lab/bare"].commits
    del hub.repositories["lab/bare"].commits[sha]["surgery.json"]
    damaged(hub, "lab/damaged", "model.safetensors", 2_000_000)
    hub.lfs = False
    found = surgery.merge("lab/tuned", made / "adapter", output=tmp_path / "one", any_base=True)
    assert [(one.proved, one.unproved) for one in found.fetched] == [(("model.safetensors",), ())]
    found = surgery.merge("lab/bare", made / "adapter", output=tmp_path / "two", any_base=True)
    assert [(one.proved, one.unproved) for one in found.fetched] == [((), ("model.safetensors",))]
    with pytest.raises(IntegrityError, match=r"^Tensor 'm\.3\.weight' of lab/damaged/model\.safetensors has"):
        surgery.merge("lab/damaged", made / "adapter", output=tmp_path / "three", any_base=True)
    assert not (tmp_path / "three").exists()


def test_the_command_says_what_it_fetched(hub: FakeHub, made: Path, tmp_path: Path) -> None:
    commit = hub.add("lab/base", made / "base")
    arguments: list[str | Path] = ["merge", "lab/base", made / "adapter", "-o", "out"]
    done = run_cli(*arguments, env=environment(hub, tmp_path / "home"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"Fetched 3.15 MB of lab/base at {commit[:12]}.\n" in done.stdout
    hub.lfs = hub.linked = False
    done = run_cli(*arguments, "--overwrite", env=environment(hub, tmp_path / "home"), cwd=tmp_path)
    assert "Note: no hash proves what was read of model.safetensors, since not all" in done.stdout


def test_a_run_that_was_stopped_goes_on_unless_the_branch_has_moved(hub: FakeHub, made: Path, tmp_path: Path) -> None:
    """The steps that are done are of the commit that the name meant then."""
    hub.add("lab/base", made / "base")
    call = partial(surgery.merge, "lab/base", made / "adapter", output=tmp_path / "out", threads=1)
    assert interrupted(1_500_000, lambda wire: call(progress=wire))
    assert call().resumed > 0
    shutil.rmtree(tmp_path / "out")
    assert interrupted(1_500_000, lambda wire: call(progress=wire))
    hub.add("lab/base", made / "base")
    assert call().resumed == 0


def test_a_pipeline_on_a_hub_has_its_components(hub: FakeHub, made: Path, tmp_path: Path) -> None:
    for name in ("unet", "text_encoder"):
        shutil.copytree(made / "base", tmp_path / "pipe" / name)
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    hub.add("lab/pipe", tmp_path / "pipe")
    found = resolve_bases("lab/pipe")
    assert [(name, one.label, len(one.tensors)) for name, one in found.items()] == [
        ("unet", "lab/pipe/unet", LAYERS),
        ("text_encoder", "lab/pipe/text_encoder", LAYERS),
    ]
    for name in ("unet", "text_encoder"):
        shutil.rmtree(tmp_path / "pipe" / name)
    hub.add("lab/pipe", tmp_path / "pipe", "empty")
    with pytest.raises(InputError, match=r"^lab/pipe@empty is a pipeline without unet, transformer, text_encoder or"):
        resolve_bases("lab/pipe@empty")
