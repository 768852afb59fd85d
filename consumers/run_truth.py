"""What an adapter means: this project merges it into the base's weights in float32, and transformers runs the result.

`python -m consumers.run_truth WORK ANSWERS`. The other road to the same numbers is `run_peft`, which leaves the adapter
beside the weights; that both agree is one of the things to see.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

import surgery
from consumers.jobs import Job, LogProbs, Work, attempt
from consumers.run_peft import load, logprobs


def main(arguments: Sequence[str]) -> None:
    """Answer every job."""
    work, answers = Work.read(Path(arguments[0])), Path(arguments[1])
    with tempfile.TemporaryDirectory() as folder:
        for job in work.jobs:
            attempt(answers, job.name, partial(_merged, job, work.prompts, Path(folder)))


def _merged(job: Job, prompts: Sequence[Sequence[int]], folder: Path) -> LogProbs:
    if job.adapter is None:
        return logprobs(load(job.base), prompts)
    wide = folder / str(abs(hash(job.base)))
    if not wide.exists():
        load(job.base).to(torch.float32).save_pretrained(wide)
    out = folder / "merged"
    surgery.merge(wide, job.adapter, output=out, overwrite=True, hash=False, any_base=True)
    return logprobs(load(out), prompts)


if __name__ == "__main__":
    main(sys.argv[1:])
