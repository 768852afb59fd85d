"""What the driver asks of an engine, and what the engine answers; files, because each engine has its own environment.

Only the standard library and numpy are imported here: nothing else is in all of the environments.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LogProbs = NDArray[np.float32]
"""Log-probabilities of the token after each prompt, [prompts, V]."""
AGAIN = 75
"""Exit status of a runner that wants to be started anew for the jobs it has not come to."""
NATIVE = "native.log"
"""File beside the answers in which a runner may catch what compiled code prints on one job."""


@dataclass(frozen=True)
class Job:
    """One artefact to load: a checkpoint, or an adapter on top of one.

    Attributes:
        name: `family/artefact`.
        base: folder of the checkpoint to load.
        adapter: folder of the adapter, if it is one.
    """

    name: str
    base: str
    adapter: str | None = None


@dataclass(frozen=True)
class Answer:
    """What came of a job: log-probabilities, or the text of the error with which it was refused."""

    logprobs: LogProbs | None = None
    refusal: str = ""


@dataclass(frozen=True)
class Work:
    """Jobs, and what they are run on.

    Attributes:
        prompts: rows of token ids, of any lengths.
        jobs: what to load.
        settings: the engine's, other than its defaults.
    """

    prompts: Sequence[Sequence[int]]
    jobs: Sequence[Job]
    settings: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Work:
        content = json.loads(path.read_text())
        return cls(content["prompts"], [Job(**job) for job in content["jobs"]], content["settings"])

    def by_base(self) -> Iterator[tuple[str, list[Job]]]:
        """Jobs that share a checkpoint, together; a checkpoint that is a job itself comes first among its own."""
        bases = dict.fromkeys(job.base for job in self.jobs)
        for base in bases:
            yield base, sorted((job for job in self.jobs if job.base == base), key=lambda job: job.adapter is not None)


def answer_path(folder: Path, name: str, ending: str) -> Path:
    """Where the answer to a job lies: `npy` has numbers, `txt` a refusal."""
    return folder / f"{name.replace('/', '--')}.{ending}"


def write_answer(folder: Path, name: str, answer: Answer) -> None:
    """Store an answer under the job's name; a later one replaces it."""
    folder.mkdir(parents=True, exist_ok=True)
    forget_answer(folder, name)
    if answer.logprobs is not None:
        np.save(answer_path(folder, name, "npy"), answer.logprobs.astype(np.float32))
    else:
        answer_path(folder, name, "txt").write_text(answer.refusal)


def forget_answer(folder: Path, name: str) -> None:
    """Remove the answer to a job, if there is one."""
    for ending in ("npy", "txt"):
        answer_path(folder, name, ending).unlink(missing_ok=True)


def read_answer(folder: Path, name: str) -> Answer | None:
    """The answer to a job, or None if the engine never came to it."""
    if (path := answer_path(folder, name, "npy")).exists():
        return Answer(logprobs=np.load(path))
    if (path := answer_path(folder, name, "txt")).exists():
        return Answer(refusal=path.read_text())
    return None


def attempt(folder: Path, name: str, call: Callable[[], LogProbs]) -> bool:
    """Write what `call` computes, or the error it raises; whether it computed something."""
    try:
        answer = Answer(logprobs=call())
    except Exception as error:  # an engine may raise anything
        traceback.print_exc()
        answer = refusal(error)
    write_answer(folder, name, answer)
    return answer.logprobs is not None


def is_sound(answer: Answer | None) -> bool:
    """Whether an answer is numbers, and finite ones."""
    return answer is not None and answer.logprobs is not None and bool(np.isfinite(answer.logprobs).all())


def refusal(error: BaseException) -> Answer:
    """An error as an answer."""
    return Answer(refusal=f"{type(error).__name__}: {error}".strip())


def log_softmax(logits: NDArray[np.float32]) -> LogProbs:
    """Of logits [..., V], in float64, as float32."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return (wide - np.log(np.exp(wide).sum(-1, keepdims=True))).astype(np.float32)
