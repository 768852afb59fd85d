"""The one loop: interrupted anywhere and run again, in any number of threads, it makes the same bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import surgery
from surgery.checkpoint import open_checkpoint
from surgery.dtypes import F32
from surgery.errors import InputError, NonFiniteError, OptionError
from surgery.execute import Settings, execute, resolve_device
from surgery.hashing import HashBook
from surgery.layout import TensorSpec, single_file
from surgery.plan import CopyStep, Plan, StepResult, copies
from surgery.tiling import TILE_ROWS, tiles
from surgery.writer import NullStaging, open_staging
from tests.models import invent, make, perturb, save
from tests.peft_tools import write_adapter
from tests.tools import COMMAND, Tripwire, interrupted, read_json, tree, unequal


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run hashes its inputs anew: the cache has a place where nothing can be written."""
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)


@dataclass(frozen=True)
class Files:
    """Inputs of every operation."""

    base: Path
    tuned: Path
    adapter: Path
    merged: Path
    reversible: Path

    @classmethod
    def make(cls, folder: Path, model: Any, targets: list[str], **options: Any) -> Files:
        base = save(model, folder / "base", **options)
        (base / "tokenizer.json").write_text('{"a": 1}')
        adapter = write_adapter(model, LoraConfig(r=3, target_modules=targets), folder / "adapter")
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("XDG_CACHE_HOME", os.devnull)
            surgery.merge(base, adapter, output=folder / "merged")
            surgery.merge(base, adapter, output=folder / "reversible", reversible=True)
        tuned = save(perturb(model, rank=3), folder / "tuned", **options)
        return cls(base, tuned, adapter, folder / "merged", folder / "reversible")


Operation = Callable[..., Any]
OPERATIONS: dict[str, Callable[[Files], Operation]] = {
    "extract": lambda f: lambda **o: surgery.extract(f.base, f.tuned, rank=2, device="cpu", **o),
    "extract by energy": lambda f: lambda **o: surgery.extract(f.base, f.tuned, energy=0.9, device="cpu", **o),
    "extract by budget": lambda f: (
        lambda **o: surgery.extract(f.base, f.tuned, budget=3000, save_residual=True, device="cpu", **o)
    ),
    "merge": lambda f: lambda **o: surgery.merge(f.base, f.adapter, **o),
    "merge into shards": lambda f: lambda **o: surgery.merge(f.base, f.adapter, shard_bytes=25_000, **o),
    "merge reversibly": lambda f: lambda **o: surgery.merge(f.base, f.adapter, reversible=True, **o),
    "subtract exactly": lambda f: lambda **o: surgery.subtract(f.reversible, **o),
    "subtract": lambda f: lambda **o: surgery.subtract(f.merged, f.adapter, **o),
    "switch": lambda f: lambda **o: surgery.switch(f.reversible, f.adapter, (f.adapter, 0.5), **o),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    model = make_bfloat16(make("llama"))
    return Files.make(tmp_path_factory.mktemp("files"), model, ["q_proj", "up_proj"], max_shard_size="20KB")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Matrices of several tiles each."""
    model = llama(hidden_size=640, intermediate_size=1100, num_hidden_layers=1, num_attention_heads=4, vocab_size=96)
    return Files.make(tmp_path_factory.mktemp("wide"), model, ["q_proj", "up_proj", "down_proj"])


def llama(**settings: Any) -> Any:
    """A Llama of any size in bfloat16."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(max_position_embeddings=64, num_key_value_heads=2, **settings)
    return make_bfloat16(transformers.LlamaForCausalLM(config))


def make_bfloat16(model: Any) -> Any:
    return model.to(torch.bfloat16)


# Interrupted ----------------------------------------------------------------------------------------------------------


def until_stopped(call: Operation) -> Callable[[Any], object]:
    return lambda wire: call(progress=wire)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_interrupted_anywhere_and_run_again_it_makes_the_same_bytes(
    operation: str, files: Files, tmp_path: Path
) -> None:
    """Every file, surgery.json with it; and what was done before is not done again."""
    call = OPERATIONS[operation](files)
    progress = Tripwire(0, list)
    call(output=tmp_path / "expected", progress=progress)
    moments = [share / 10 for share in range(10)]
    resumed = []
    for number, share in enumerate(moments):
        out = tmp_path / f"out{number}"
        limit = int(share * progress.passed)
        threads = 1 + number % 2
        assert interrupted(limit, until_stopped(partial(call, output=out, threads=threads)))
        assert not out.exists()
        resumed.append(call(output=out, threads=3 - threads).resumed)
        assert unequal(out, tmp_path / "expected") == []
    assert sum(count > 0 for count in resumed) >= 7
    assert resumed[-1] > resumed[2]


def test_interrupted_again_and_again(files: Files, tmp_path: Path) -> None:
    """Each run gets a little further than the one before."""
    call = OPERATIONS["merge reversibly"](files)
    call(output=tmp_path / "expected")
    rounds = 0
    while interrupted(20_000, lambda wire: call(output=tmp_path / "out", progress=wire, threads=1)):
        rounds += 1
        assert rounds < 20
    assert rounds >= 3
    assert unequal(tmp_path / "out", tmp_path / "expected") == []


def changed_weight(files: Files) -> None:
    for shard in files.base.glob("*.safetensors"):
        tensors = load_file(shard)
        for tensor in tensors.values():
            tensor.view(-1)[0] += 1
        save_file(tensors, shard, {"format": "pt"})


def changed_setting(path: Path, **settings: object) -> None:
    path.write_text(json.dumps(read_json(path) | settings))


CHANGES: dict[str, Callable[[Files], object]] = {
    "the base's weights": changed_weight,
    "the adapter's weights": lambda f: save_file(
        {name: -tensor for name, tensor in load_file(f.adapter / "adapter_model.safetensors").items()},
        f.adapter / "adapter_model.safetensors",
    ),
    "the adapter's scale": lambda f: changed_setting(f.adapter / "adapter_config.json", lora_alpha=99),
    "the base's tokenizer": lambda f: (f.base / "tokenizer.json").write_text('{"a": 2}'),
    "the base's config": lambda f: changed_setting(f.base / "config.json", eos_token_id=7),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_input_that_changed_since_is_not_resumed_over(change: str, files: Files, tmp_path: Path) -> None:
    """Between the interrupt and the next run an input became another: nothing of the old one is in the output."""
    mine = Files(*(shutil.copytree(path, tmp_path / path.name) for path in vars(files).values()))
    call = OPERATIONS["merge"](mine)
    assert interrupted(70_000, lambda wire: call(output=tmp_path / "out", progress=wire, threads=1))
    CHANGES[change](mine)
    call(output=tmp_path / "out")
    call(output=tmp_path / "expected")
    assert unequal(tmp_path / "out", tmp_path / "expected") == []


def test_a_bin_file_that_changed_since_is_not_resumed_over(files: Files, tmp_path: Path) -> None:
    """A legacy base is an input like any other."""
    base = tmp_path / "base"
    base.mkdir()
    shutil.copy(files.base / "config.json", base)
    state = {name: tensor for shard in files.base.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    torch.save(state, base / "pytorch_model.bin")
    call = partial(surgery.merge, base, files.adapter)
    assert interrupted(40_000, lambda wire: call(output=tmp_path / "out", progress=wire, threads=1))
    torch.save({name: 2 * tensor for name, tensor in state.items()}, base / "pytorch_model.bin")
    call(output=tmp_path / "out")
    call(output=tmp_path / "expected")
    assert unequal(tmp_path / "out", tmp_path / "expected") == []


OTHER_WORK: dict[str, Callable[[Files], Operation]] = {
    "another weight": lambda f: lambda **o: surgery.merge(f.base, (f.adapter, 0.5), **o),
    "a record": OPERATIONS["merge reversibly"],
    "no hashes": lambda f: lambda **o: surgery.merge(f.base, f.adapter, hash=False, **o),
    "another base": lambda f: lambda **o: surgery.merge(f.tuned, f.adapter, **o),
    "the adapter twice": lambda f: lambda **o: surgery.merge(f.base, f.adapter, f.adapter, **o),
    "another operation": OPERATIONS["subtract"],
}


@pytest.mark.parametrize("other", OTHER_WORK)
def test_other_work_at_the_same_target_does_not_resume(other: str, files: Files, tmp_path: Path) -> None:
    call = OPERATIONS["merge"](files)
    assert interrupted(70_000, lambda wire: call(output=tmp_path / "out", progress=wire, threads=1))
    work = OTHER_WORK[other](files)
    assert work(output=tmp_path / "out").resumed == 0
    work(output=tmp_path / "expected")
    assert unequal(tmp_path / "out", tmp_path / "expected") == []


# Changed while it is read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "victim"),
    [
        ("merge", "base/model-00001-of-00003.safetensors"),
        ("merge", "base/model-00003-of-00003.safetensors"),
        ("merge", "adapter/adapter_model.safetensors"),
        ("merge", "base/tokenizer.json"),
        ("extract", "base/model-00002-of-00003.safetensors"),
        ("extract", "tuned/model-00002-of-00003.safetensors"),
        ("subtract", "merged/model-00001-of-00003.safetensors"),
        ("subtract exactly", "reversible/undo/record.safetensors"),
    ],
)
@pytest.mark.parametrize("how", ["touched", "grown"])
def test_an_input_that_changes_while_it_is_read_is_refused(
    operation: str, victim: str, how: str, files: Files, tmp_path: Path
) -> None:
    """What was read may be half old and half new; nothing of it stays."""
    mine = Files(*(shutil.copytree(path, tmp_path / "in" / path.name) for path in vars(files).values()))
    path = tmp_path / "in" / victim

    def change() -> None:
        if how == "touched":
            os.utime(path)
        else:
            with open(path, "ab") as file:
                file.write(b"x")

    with pytest.raises(InputError) as caught:
        OPERATIONS[operation](mine)(output=tmp_path / "out", progress=Tripwire(0, change))
    assert caught.value.message == f"{path} was changed while it was being read; run the command again."
    assert os.listdir(tmp_path) == ["in"]


def test_a_bin_file_that_changes_while_it_is_read_is_refused(files: Files, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    path = base / "pytorch_model.bin"
    torch.save(
        {name: tensor for shard in files.base.glob("*.safetensors") for name, tensor in load_file(shard).items()}, path
    )
    with pytest.raises(InputError, match="was changed while it was being read"):
        surgery.merge(base, files.adapter, output=tmp_path / "out", progress=Tripwire(0, lambda: os.utime(path)))


# Threads --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("inputs", ["files", "wide"])
def test_the_bytes_do_not_depend_on_threads(
    operation: str, inputs: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """One, two or four: every file is the same, surgery.json with its numbers too."""
    found: Files = request.getfixturevalue(inputs)
    call = OPERATIONS[operation](found)
    for threads in (1, 2, 4):
        call(output=tmp_path / str(threads), threads=threads)
    assert unequal(tmp_path / "1", tmp_path / "2") == []
    assert unequal(tmp_path / "1", tmp_path / "4") == []


def test_torch_has_its_threads_back_afterwards(files: Files, tmp_path: Path) -> None:
    """One each while steps run side by side; the caller's own setting is restored, after an error too."""
    torch.set_num_threads(2)
    try:
        seen: set[int] = set()
        OPERATIONS["merge"](files)(
            output=tmp_path / "out", progress=Tripwire(0, lambda: seen.add(torch.get_num_threads()))
        )
        assert seen == {1}
        assert torch.get_num_threads() == 2
        assert interrupted(0, lambda wire: OPERATIONS["merge"](files)(output=tmp_path / "other", progress=wire))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_hashing_changes_no_weight(files: Files, tmp_path: Path) -> None:
    """Without it the same files are written, and surgery.json has no hashes."""
    OPERATIONS["merge"](files)(output=tmp_path / "with")
    OPERATIONS["merge"](files)(output=tmp_path / "without", hash=False)
    assert unequal(tmp_path / "with", tmp_path / "without") == ["surgery.json"]
    text = (tmp_path / "without" / "surgery.json").read_text()
    assert "blake3" not in text
    assert "model.norm.weight" in text


def test_one_failure_stops_the_other_steps(files: Files, tmp_path: Path) -> None:
    """An error in the first tensor is not reported after an hour of copying the rest."""
    base = shutil.copytree(files.base, tmp_path / "base")
    for shard in base.glob("*.safetensors"):
        tensors = load_file(shard)
        if (weight := tensors.get("model.layers.0.mlp.up_proj.weight")) is not None:
            weight[0, 0] = float("inf")
            save_file(tensors, shard, {"format": "pt"})

    class Slow(Tripwire):
        def advance(self, count: int) -> None:
            super().advance(count)
            time.sleep(0.01)

    whole, partly = Slow(0, list), Slow(0, list)
    OPERATIONS["merge"](files)(output=tmp_path / "whole", progress=whole, threads=2)
    with pytest.raises(NonFiniteError, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
        surgery.merge(base, files.adapter, output=tmp_path / "out", progress=partly, threads=2)
    assert partly.passed < 0.9 * whole.passed


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "cpu:x", ""])
def test_a_device_that_is_not_there(device: str) -> None:
    with pytest.raises(OptionError) as caught:
        resolve_device(device)
    assert caught.value.message == f"The device {device!r} is not available here; use cpu or auto."


def test_auto_is_a_device_that_is_there() -> None:
    assert resolve_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")


# Plans ----------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 5000), st.integers(0, 1 << 20), st.none() | st.integers(1, 3000))
def test_tiles_cover_all_rows_once_and_keep_to_their_block(rows: int, columns: int, block: int | None) -> None:
    """Row ranges follow each other; none crosses a block, none is of less than 64 rows unless its block is."""
    found = list(tiles(rows, columns, block))
    edges = [begin for begin, _ in found] + [rows]
    assert [end for _, end in found] == edges[1:]
    assert not found or found[0][0] == 0
    size = block or max(rows, 1)
    for begin, end in found:
        assert begin < end
        assert begin // size == (end - 1) // size
        start, stop = begin // size * size, min((begin // size + 1) * size, rows)
        assert end - begin >= min(TILE_ROWS, stop - start)


def spec(name: str, rows: int = 2) -> TensorSpec:
    return TensorSpec(name, F32, (rows,))


@pytest.mark.parametrize("fault", ["missing", "twice", "shape", "not laid out"])
def test_a_plan_that_does_not_add_up_is_a_bug(fault: str, tmp_path: Path) -> None:
    """Every tensor laid out is written by exactly one step, in its shape, and nothing else is."""
    checkpoint = open_checkpoint(invent(tmp_path / "m"))
    steps = copies(checkpoint.tensors.values())
    specs = [step.output for step in steps]
    if fault == "missing":
        steps = steps[1:]
    elif fault == "twice":
        steps = (*steps, steps[0])
    elif fault == "shape":
        steps = (CopyStep(TensorSpec(specs[0].name, F32, (1,)), steps[0].source), *steps[1:])
    else:
        specs = specs[1:]
    with pytest.raises(ValueError, match=r"^plan: "):
        Plan(steps, single_file("m.safetensors", specs)).check()


def test_a_step_that_writes_too_little_is_a_bug(tmp_path: Path) -> None:
    """What a step promises it writes, or the run fails."""
    checkpoint = open_checkpoint(invent(tmp_path / "m"))

    @dataclass(frozen=True)
    class Lazy(CopyStep):
        def run(self, io: Any) -> Any:
            return StepResult()

    first, *rest = copies(checkpoint.tensors.values())
    lazy = Lazy(first.output, first.source)
    plan = Plan((lazy, *rest), single_file("m.safetensors", [step.output for step in (lazy, *rest)]))
    with (
        open_staging(tmp_path / "out", "x") as staging,
        pytest.raises(ValueError, match=f"{first.name}: 0 of {first.output.nbytes} bytes written"),
    ):
        execute(plan, staging, Settings(threads=1), HashBook())


def test_a_plan_that_only_looks_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has files to write"):
        NullStaging().lay_out(single_file("m.safetensors", [spec("a")]))


# Killed ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """55 MB of bfloat16, so that there is time to be killed in."""
    model = llama(hidden_size=512, intermediate_size=1408, num_hidden_layers=10, num_attention_heads=8, vocab_size=1000)
    targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
    return Files.make(tmp_path_factory.mktemp("large"), model, targets, max_shard_size="20MB")


COMMANDS: dict[str, Callable[[Files], list[str | Path]]] = {
    "extract": lambda f: ["extract", f.base, f.tuned, "--rank", "4", "--device", "cpu"],
    "merge": lambda f: ["merge", f.base, f.adapter],
    "merge reversibly": lambda f: ["merge", f.base, f.adapter, "--reversible"],
    "subtract": lambda f: ["subtract", f.reversible],
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_any_moment_and_run_again_it_makes_the_same_bytes(command: str, large: Files, tmp_path: Path) -> None:
    """kill -9, several times over, at moments drawn by a fixed seed from the time in which it works.

    The moments are as good as random still, for the machine has other work; what must hold does so at all of them.
    """
    arguments = [str(argument) for argument in COMMANDS[command](large)]
    seconds = attempt([*arguments, "-o", str(tmp_path / "expected")], tmp_path / "expected")[0]
    dice = random.Random(command)
    resumed = kills = 0
    for chain in range(8):  # two will do, unless other work slows the kills until nothing is left to resume
        latest = (1.0, 0.4)[chain % 2]
        out = tmp_path / f"out{chain}"
        for moment in [*(dice.uniform(0, latest) for _ in range(3)), None]:  # the last run is left to end
            delay = None if moment is None else moment * seconds
            _, report = attempt([*arguments, "-o", str(out)], out, delay)
            resumed += report["resumed"] if report is not None else 0
            kills += report is None
            if out.exists():
                break
        assert unequal(out, tmp_path / "expected") == []
        if chain and kills >= 2 and resumed:
            break
    assert kills >= 2
    assert resumed > 0


def attempt(arguments: list[str], out: Path, delay: float | None = None) -> tuple[float, dict[str, Any] | None]:
    """Run a command and kill it `delay` seconds after it finished its first step; never, without a delay.

    Returns how long its output took to appear from then on, and its report; none if it was killed before that.
    """
    journal = out.with_name(f".{out.name}.partial") / "journal.jsonl"
    done = max(steps_done(journal), 0)
    process = subprocess.Popen(
        [*COMMAND, *arguments, "--quiet", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and steps_done(journal) <= done:
        time.sleep(0.002)
    begun = time.monotonic()
    while process.poll() is None and not out.exists() and (delay is None or time.monotonic() < begun + delay):
        time.sleep(0.002)
    seconds = time.monotonic() - begun
    if delay is not None:
        process.send_signal(signal.SIGKILL)
    printed, errors = process.communicate(timeout=120)
    if process.returncode == -signal.SIGKILL:
        return seconds, None
    assert process.returncode == 0, errors
    return seconds, json.loads(printed)


def steps_done(journal: Path) -> int:
    """How many steps a journal holds: its lines but the first; -1 where there is none."""
    try:
        return journal.read_bytes().count(b"\n") - 1
    except OSError:
        return -1


def test_the_trees_that_these_tests_compare_do_differ(files: Files, tmp_path: Path) -> None:
    """One flipped bit is seen."""
    copy = shutil.copytree(files.base, tmp_path / "copy")
    path = sorted(copy.glob("*.safetensors"))[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert unequal(copy, files.base) == [path.name]
    contents: Mapping[str, bytes] = tree(copy)
    assert len(contents) > 4
