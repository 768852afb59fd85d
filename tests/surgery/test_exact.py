"""Exact extraction and restoring: every byte of the fine-tune, or one sentence and nothing at the target."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import (
    FormatError,
    InputError,
    IntegrityError,
    MismatchError,
    OptionError,
    UnsupportedError,
)
from surgery.ops.inspection import AdapterReport
from surgery.ops.verify import VerifyReport
from surgery.reports import ExactReport, ExtractReport
from tests.models import FAMILIES, invent, make, perturb, save
from tests.tools import Tripwire, interrupt, interrupted, own_disk, run_cli, square_checkpoint, start_cli, tree, unequal

BF16 = torch.bfloat16
EXACT: dict[str, Any] = {"exact": True, "device": "cpu", "rank": 2}


def round_trip(base: Path, tuned: Path, place: Path, **options: Any) -> ExactReport:
    report = surgery.extract(base, tuned, output=place / "adapter", **{**EXACT, **options})
    surgery.restore(base, place / "adapter", output=place / "again")
    assert unequal(tuned, place / "again") == []
    return kept(report)


def kept(report: ExtractReport) -> ExactReport:
    assert report.exact is not None
    return report.exact


def pair_of(family: str, place: Path, dtype: torch.dtype = torch.bfloat16, **options: object) -> tuple[Path, Path]:
    model = make(family)
    base = save(model, place / "base", dtype)
    return base, save(perturb(model, 0.05, 2), place / "tuned", dtype, **options)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A base, a fine-tune in several files, and its exact extraction."""
    place = tmp_path_factory.mktemp("llama")
    base, tuned = pair_of("llama", place, max_shard_size="40KB")
    (tuned / "README.md").write_text("# tuned\n")
    (tuned / "nested").mkdir()
    (tuned / "nested" / "notes.txt").write_text("below\n")
    (tuned / "training_args.bin").write_bytes(b"a pickle that nobody opens")
    (tuned / "surgery.json").write_text('{"schema": 1}')
    shutil.copy(tuned / "README.md", base / "README.md")
    surgery.extract(base, tuned, output=place / "adapter", **EXACT)
    return base, tuned, place / "adapter"


def copied(adapter: Path, place: Path) -> Path:
    return shutil.copytree(adapter, place / "changed")


# Bit for bit ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back(family: str, tmp_path: Path) -> None:
    base, tuned = pair_of(family, tmp_path)
    report = round_trip(base, tuned, tmp_path)
    assert report.tuned_bytes == sum(len(data) for data in tree(tuned).values())
    assert report.record_bytes == sum(len(data) for data in tree(tmp_path / "adapter" / "exact").values())
    # What the factors say is used: the codes are smaller than those of the difference to the base.
    factored = [t for t in report.tensors if t.how == "coded"]
    assert factored


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "qwen2_moe", "gpt_oss"])
def test_other_dtypes_come_back(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    round_trip(*pair_of(family, tmp_path, dtype), tmp_path)


def test_every_file_comes_back(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, tuned, adapter = llama
    report = surgery.restore(base, adapter, output=tmp_path / "again")
    assert unequal(tuned, tmp_path / "again") == []
    assert len(list(tuned.glob("*.safetensors"))) > 1
    assert (report.files, report.nbytes) == (len(tree(tuned)), sum(len(data) for data in tree(tuned).values()))
    # What the base has as well is not kept again.
    assert not (adapter / "exact" / "files" / "README.md").exists()
    assert (adapter / "exact" / "files" / "nested" / "notes.txt").exists()


def test_the_adapter_is_the_one_of_a_plain_extraction(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, tuned, adapter = llama
    surgery.extract(base, tuned, output=tmp_path / "plain", rank=2, device="cpu")
    plain, exact = tree(tmp_path / "plain"), tree(adapter)
    for name in plain.keys() - {"surgery.json"}:
        assert plain[name] == exact[name]
    assert {name for name in exact if not name.startswith("exact/")} == set(plain)


def test_threads_do_not_change_a_byte(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, tuned, adapter = llama
    for threads in (1, 3):
        surgery.extract(base, tuned, output=tmp_path / f"{threads}", threads=threads, **EXACT)
        assert unequal(adapter, tmp_path / f"{threads}") == []
        surgery.restore(base, adapter, output=tmp_path / f"{threads}-again", threads=threads)
        assert unequal(tuned, tmp_path / f"{threads}-again") == []


def variant(place: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> tuple[Path, Path]:
    """An invented base, and a fine-tune of it that is then changed."""
    base, tuned = invent(place / "base"), invent(place / "tuned", delta=1.0)
    tensors = load_file(tuned / "model.safetensors")
    change(tensors)
    save_file(tensors, tuned / "model.safetensors", {"format": "pt", "by": "hand"})
    return base, tuned


def grown(weight: torch.Tensor) -> torch.Tensor:
    return torch.cat([weight, torch.ones(9, 24, dtype=weight.dtype)])


CHANGES: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "only in tuned": lambda t: t.update(extra=torch.randn(7, 5)),
    "only in base": lambda t: t.pop("trunk.final_norm.weight"),
    "grown vocabulary": lambda t: t.update({"reader.weight": grown(t["reader.weight"])}),
    "shrunk vocabulary": lambda t: t.update({"reader.weight": t["reader.weight"][:50].contiguous()}),
    "wider dtype": lambda t: t.update({k: v.float() for k, v in t.items() if v.dtype == torch.bfloat16}),
    "another dtype": lambda t: t.update({k: v.half() for k, v in t.items() if v.dtype == torch.bfloat16}),
    "integers": lambda t: t.update({"trunk.steps": t["trunk.steps"] * 3, "trunk.mask": ~t["trunk.mask"]}),
    "float64": lambda t: t.update({"trunk.table64": t["trunk.table64"] * 1.1}),
    "no elements": lambda t: t.update(empty=torch.zeros(0, 4), scalar=torch.tensor(3.5)),
    "float8": lambda t: t.update(small=torch.randn(64, 24).to(torch.float8_e4m3fn)),
    "complex": lambda t: t.update(phases=torch.randn(3, 3, dtype=torch.complex64)),
    "not a number": lambda t: t.update({"trunk.stage.0.widen.bias": torch.arange(0x7F70, 0x7FB0).short().view(BF16)}),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_else_a_fine_tune_may_be_comes_back(change: str, tmp_path: Path) -> None:
    base, tuned = variant(tmp_path, CHANGES[change])
    round_trip(base, tuned, tmp_path, allow_nonfinite=True)


def test_nan_in_factored_weights_comes_back(tmp_path: Path) -> None:
    """NaNs with payloads, infinities and both zeros, in base and fine-tune, within weights that have factors."""

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        bits = tensors["trunk.stage.0.widen.weight"].view(torch.int16)
        bits[0, :6] = torch.tensor([0x7FC1, -0x3F, 0x7F80, -0x80, 0, -0x8000], dtype=torch.int16)

    base, tuned = variant(tmp_path, spoil)
    tensors = load_file(base / "model.safetensors")
    tensors["trunk.stage.1.widen.weight"][3] = float("nan")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    round_trip(base, tuned, tmp_path, allow_nonfinite=True)


def test_float8_weights_come_back(tmp_path: Path) -> None:
    base, tuned = variant(tmp_path, lambda _: None)
    for folder in (base, tuned):
        tensors = load_file(folder / "model.safetensors")
        tensors = {n: t.to(torch.float8_e4m3fn) if t.dtype == torch.bfloat16 else t for n, t in tensors.items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    round_trip(base, tuned, tmp_path)


def test_a_fine_tune_that_is_one_file_comes_back(tmp_path: Path) -> None:
    base, tuned = pair_of("llama", tmp_path)
    surgery.extract(base, tuned / "model.safetensors", output=tmp_path / "adapter", **EXACT)
    surgery.restore(base, tmp_path / "adapter", output=tmp_path / "again")
    assert tree(tmp_path / "again") == {"model.safetensors": (tuned / "model.safetensors").read_bytes()}


def test_a_base_that_is_one_file_does(tmp_path: Path) -> None:
    """It is read as what the fine-tune is, when it is extracted from and when it is restored from."""
    base, tuned = pair_of("qwen2_moe", tmp_path)
    report = round_trip(base / "model.safetensors", tuned, tmp_path)
    assert report.residual_bytes < 0.8 * sum(tensor.tuned_bytes for tensor in report.tensors)
    surgery.restore(base, tmp_path / "adapter", output=tmp_path / "from-folder")
    assert unequal(tuned, tmp_path / "from-folder") == []


def test_names_without_a_prefix_come_back(tmp_path: Path) -> None:
    """A fine-tune saved from the task's class, of a base saved from the base class."""
    model = make("bert")
    base = save(model.bert, tmp_path / "base", torch.bfloat16)
    tuned = save(perturb(model, 0.05, 2), tmp_path / "tuned", torch.bfloat16)
    report = round_trip(base, tuned, tmp_path)
    assert report.residual_bytes < 0.7 * sum(tensor.tuned_bytes for tensor in report.tensors)


@pytest.mark.parametrize(
    "options", [{"save_residual": True}, {"targets": "all-linear,embeddings,head"}, {"rank": "best"}]
)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_options_of_the_extraction_do_not_matter(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    round_trip(*pair_of(family, tmp_path), tmp_path, **options)


# Sizes ----------------------------------------------------------------------------------------------------------------


def low_rank_pair(place: Path, side: int = 256) -> tuple[Path, Path]:
    """Square matrices, and the same with a change of rank 8 and a little noise."""
    base = square_checkpoint(place / "base", 2, side)
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, weight in load_file(base / "model.safetensors").items():
        left, right = torch.randn(side, 8, generator=generator), torch.randn(8, side, generator=generator)
        noise = torch.randn(side, side, generator=generator)
        tensors[name] = (weight.float() + 0.05 * left @ right + 0.002 * noise).bfloat16()
    tuned = place / "tuned"
    tuned.mkdir()
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    shutil.copy(base / "config.json", tuned / "config.json")
    return base, tuned


def test_a_factored_prediction_makes_the_record_smaller(tmp_path: Path) -> None:
    base, tuned = low_rank_pair(tmp_path)
    sizes = {}
    for rank in (1, 8):
        report = surgery.extract(base, tuned, output=tmp_path / f"{rank}", exact=True, device="cpu", rank=rank)
        sizes[rank] = kept(report).residual_bytes
    assert sizes[8] < 0.6 * sizes[1]


def test_best_rank_is_as_good_as_any(tmp_path: Path) -> None:
    base, tuned = low_rank_pair(tmp_path)
    totals = {}
    for rank in ("best", 1, 2, 4, 8, 16):
        report = surgery.extract(base, tuned, output=tmp_path / f"{rank}", exact=True, device="cpu", rank=rank)
        totals[rank] = kept(report).adapter_bytes + kept(report).record_bytes
        if rank == "best":
            assert {module.rank for module in report.modules} <= {6, 8, 12}
            shutil.rmtree(tmp_path / "best")
    assert totals.pop("best") <= 1.01 * min(totals.values())


def test_an_unchanged_tensor_costs_nothing(tmp_path: Path) -> None:
    base, tuned = pair_of("llama", tmp_path)
    tensors = load_file(tuned / "model.safetensors")
    tensors["lm_head.weight"] = load_file(base / "model.safetensors")["lm_head.weight"]
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    report = round_trip(base, tuned, tmp_path)
    found = {tensor.name: (tensor.how, tensor.nbytes) for tensor in report.tensors}
    assert found["lm_head.weight"] == ("same", 0)
    assert found["model.norm.weight"] == ("same", 0)


def test_a_dry_run_estimates_and_writes_nothing(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, tuned, adapter = llama
    report = surgery.extract(base, tuned, output=tmp_path / "out", dry_run=True, **EXACT)
    assert not list(tmp_path.iterdir())
    largest = sum(t.nbytes for t in load_file(next(iter(tuned.glob("*.safetensors")))).values())
    assert report.estimated_record_bytes is not None
    assert largest / 4 < report.estimated_record_bytes < 20 * largest
    assert surgery.restore(base, adapter, output=tmp_path / "out", dry_run=True).dry_run
    assert not list(tmp_path.iterdir())


# Looking --------------------------------------------------------------------------------------------------------------


def test_inspect_and_verify_know_the_record(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, _, adapter = llama
    report = surgery.inspect(adapter)
    assert isinstance(report, AdapterReport)
    assert report.exact_bytes == sum(len(data) for data in tree(adapter / "exact").values())
    assert surgery.verify(adapter).passed
    changed = copied(adapter, tmp_path)
    (changed / "exact" / "files" / "config.json").unlink(missing_ok=True)
    with open(changed / "exact" / "record.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    found = surgery.verify(changed)
    assert isinstance(found, VerifyReport)
    assert not found.passed
    assert any("exact/record.safetensors" in problem for problem in found.problems)


# Refusals -------------------------------------------------------------------------------------------------------------


def test_another_base_is_refused_by_name(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _, adapter = llama
    other = shutil.copytree(base, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        MismatchError, match=r"tensor 'model\.layers\.1\.mlp\.up_proj\.weight' has other values than in base"
    ):
        surgery.restore(other, adapter, output=tmp_path / "again")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"up_proj"):
        surgery.restore(other, adapter, output=tmp_path / "again")
    assert {path.name for path in tmp_path.iterdir()} == {"other"}


@pytest.mark.parametrize("damaged", [False, True])
def test_a_base_that_differs_further_on_is_named(damaged: bool, tmp_path: Path) -> None:
    """Found by the proof of the result, and named all the same, whatever else is wrong."""
    base, tuned = low_rank_pair(tmp_path)
    surgery.extract(base, tuned, output=tmp_path / "adapter", **EXACT)
    tensors = load_file(base / "model.safetensors")
    name = sorted(tensors)[0]
    assert tensors[name].nbytes > 2 << 15
    tensors[name][-1, -1] += 1
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    if damaged:
        path = tmp_path / "adapter" / "exact" / "record.safetensors"
        path.write_bytes(path.read_bytes()[:-9] + bytes(9))
    with pytest.raises(MismatchError, match="has other values than in base, the base of this extraction") as error:
        surgery.restore(base, tmp_path / "adapter", output=tmp_path / "again")
    assert [name in problem for problem in error.value.problems] == [True]
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned", "adapter"}


def test_a_file_that_the_base_has_lost_is_named(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _, adapter = llama
    other = shutil.copytree(base, tmp_path / "other")
    (other / "README.md").write_text("another")
    with pytest.raises(MismatchError, match=r"file README\.md is not the one that base had"):
        surgery.restore(other, adapter, output=tmp_path / "again")


def test_an_adapter_changed_since_is_refused(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _, adapter = llama
    changed = copied(adapter, tmp_path)
    tensors = load_file(changed / "adapter_model.safetensors")
    name = sorted(tensors)[0]
    tensors[name] *= 2
    save_file(tensors, changed / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(IntegrityError, match="is not as it was extracted"):
        surgery.restore(base, changed, output=tmp_path / "again")
    assert {path.name for path in tmp_path.iterdir()} == {"changed"}


def test_an_adapter_without_a_record_is_refused(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _, adapter = llama
    changed = copied(adapter, tmp_path)
    shutil.rmtree(changed / "exact")
    with pytest.raises(InputError, match="has no exact record"):
        surgery.restore(base, changed, output=tmp_path / "again")
    with pytest.raises(OptionError, match=r"given the weight 0\.5"):
        surgery.restore(base, (adapter, 0.5), output=tmp_path / "again")


def test_options_that_make_no_sense_are_refused(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, tuned, _ = llama
    with pytest.raises(OptionError, match="wants --exact"):
        surgery.extract(base, tuned, output=tmp_path / "out", rank="best")
    with pytest.raises(OptionError, match="expected a number or 'best'"):
        surgery.extract(base, tuned, output=tmp_path / "out", rank="most", exact=True)
    with pytest.raises(OptionError, match="leave out --no-hash"):
        surgery.extract(base, tuned, output=tmp_path / "out", hash=False, **EXACT)


def test_pickled_fine_tunes_are_refused(tmp_path: Path) -> None:
    base, tuned = pair_of("llama", tmp_path)
    torch.save(load_file(tuned / "model.safetensors"), tuned / "pytorch_model.bin")
    (tuned / "model.safetensors").unlink()
    with pytest.raises(UnsupportedError, match="restores safetensors files only"):
        surgery.extract(base, tuned, output=tmp_path / "out", **EXACT)


def edit(adapter: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = adapter / "exact" / "record.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "another schema": lambda c: c.update(schema=9),
    "no tensors": lambda c: c.pop("tensors"),
    "a tensor of a strange dtype": lambda c: c["tensors"]["lm_head.weight"].update(dtype="F7"),
    "a tensor of another shape": lambda c: c["tensors"]["lm_head.weight"].update(shape=[1 << 40, 1 << 20]),
    "no hash": lambda c: c["tensors"]["lm_head.weight"].pop("blake3"),
    "a file elsewhere": lambda c: c["files"].update({"../../escaped": {"blake3": "0" * 64, "in_base": False}}),
    "an absolute file": lambda c: c["files"].update({"/tmp/escaped": {"blake3": "0" * 64, "in_base": True}}),
    "a shard elsewhere": lambda c: c["shards"].update({"../escaped.safetensors": 10}),
    "a shard of another size": lambda c: c["shards"].update(dict.fromkeys(c["shards"], 10)),
    "a weight file as a file": lambda c: c["files"].update(dict.fromkeys(c["shards"], c["files"]["config.json"])),
    "a tensor that is the same as none": lambda c: c["tensors"]["lm_head.weight"].update(how="same", origin="nowhere"),
    "a tensor of no origin": lambda c: c["tensors"]["model.layers.0.mlp.up_proj.weight"].pop("origin"),
    "no hash of a beginning": lambda c: c["base"]["lm_head.weight"].pop("beginning"),
    "base not described": lambda c: c["base"].update({"lm_head.weight": 3}),
}  # fmt: skip


@pytest.mark.parametrize("how", HOSTILE)
def test_hostile_records_are_refused(how: str, llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _, adapter = llama
    changed = copied(adapter, tmp_path)
    edit(changed, HOSTILE[how])
    with pytest.raises((FormatError, IntegrityError)) as error:
        surgery.restore(base, changed, output=tmp_path / "again")
    assert str(error.value).endswith((".", ":"))
    assert {path.name for path in tmp_path.iterdir()} == {"changed"}


@pytest.mark.parametrize("name", ["record.safetensors", "record.json", "headers/*", "files/*"])
@pytest.mark.parametrize("how", ["cut", "flip", "gone"])
def test_damaged_files_are_refused(name: str, how: str, llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _, adapter = llama
    changed = copied(adapter, tmp_path)
    path = sorted(path for path in (changed / "exact").glob(name) if path.is_file())[0]
    data = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    else:
        data[len(data) // 2] ^= 0x11
        path.write_bytes(data[: len(data) // 2] if how == "cut" else data)
    with pytest.raises((FormatError, IntegrityError, InputError)):
        surgery.restore(base, changed, output=tmp_path / "again")
    assert {path.name for path in tmp_path.iterdir()} == {"changed"}


def test_no_flipped_bit_of_the_codes_goes_unnoticed(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _, adapter = llama
    changed = copied(adapter, tmp_path)
    path = changed / "exact" / "record.safetensors"
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for position in range(start, len(data), max(1, (len(data) - start) // 25)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(IntegrityError):
            surgery.restore(base, changed, output=tmp_path / "again")
    assert {path.name for path in tmp_path.iterdir()} == {"changed"}


# Interruptions --------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_resumes(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, tuned, adapter = llama
    total = sum(path.stat().st_size for path in tuned.glob("*.safetensors"))
    for share in (0.5, 1.5, 2.5):
        out = tmp_path / f"{share}"
        options: dict[str, Any] = {"output": out, "threads": 1, **EXACT}
        with pytest.raises(KeyboardInterrupt):
            surgery.extract(base, tuned, progress=Tripwire(int(share * total), interrupt), **options)
        assert not out.exists()
        surgery.extract(base, tuned, **options)
        assert unequal(adapter, out) == []
    out = tmp_path / "again"
    assert interrupted(total, lambda p: surgery.restore(base, adapter, output=out, threads=1, progress=p))
    assert not out.exists()
    assert surgery.restore(base, adapter, output=out, threads=1).resumed
    assert unequal(tuned, out) == []


@pytest.mark.slow
@pytest.mark.parametrize("command", ["extract", "restore"])
def test_a_killed_run_resumes(command: str, tmp_path: Path) -> None:
    base, tuned = low_rank_pair(tmp_path, 1024)
    extract = ("extract", base, tuned, "--exact", "--device", "cpu")
    run_cli(*extract, "-o", tmp_path / "adapter")
    arguments = extract if command == "extract" else ("restore", base, tmp_path / "adapter")
    out = tmp_path / "killed"
    killed = 0
    for wait in (0.7, 1.5, 2.5, 3.5):
        process = start_cli(*arguments, "-o", out)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if out.exists():  # whole, as the comparison below shows
            break
        killed += 1
    assert killed
    if not out.exists():
        done = run_cli(*arguments, "-o", out)
        assert done.returncode == 0, done.stderr
    assert unequal(tuned if command == "restore" else tmp_path / "adapter", out) == []


def test_a_full_disk_leaves_nothing_and_resumes(tmp_path: Path) -> None:
    base, tuned = low_rank_pair(tmp_path, 512)
    surgery.extract(base, tuned, output=tmp_path / "adapter", **EXACT)
    with own_disk(0.4) as small:
        extract = ("extract", base, tuned, "-o", small / "out", "--exact", "--rank", "2", "--device", "cpu")
        for arguments in (extract, ("restore", base, tmp_path / "adapter", "-o", small / "out")):
            done = run_cli(*arguments)
            assert done.returncode == 1
            assert (
                done.stderr.strip()
                .splitlines()[-1]
                .startswith(f"Error: {small}/out needs" if "restore" in arguments else "Error: The disk is full")
            )
            assert not (small / "out").exists()


# The command ----------------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_kept(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, tuned, _ = llama
    done = run_cli("extract", base, tuned, "-o", tmp_path / "adapter", "--exact", "--rank", "best", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "restored bit for bit by `surgery restore`" in done.stdout
    done = run_cli("restore", base, tmp_path / "adapter", "-o", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    assert "every tensor and file has the hash it had" in done.stdout
    assert unequal(tuned, tmp_path / "again") == []
    assert "gives the fine-tune back" in run_cli("inspect", tmp_path / "adapter").stdout
    done = run_cli("restore", tuned, tmp_path / "adapter", "-o", tmp_path / "wrong", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["kind"] == "MismatchError"
    assert run_cli("extract", base, tuned, "-o", tmp_path / "x", "--rank", "some").returncode == 2
