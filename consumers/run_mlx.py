"""The runner inside mlx-lm's environment: `python -m consumers.run_mlx WORK ANSWERS`, on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np

from consumers.jobs import Job, LogProbs, Work, attempt, log_softmax


def main(arguments: Sequence[str]) -> None:
    """Answer every job."""
    work, answers = Work.read(Path(arguments[0])), Path(arguments[1])
    mx.set_default_device(mx.cpu)
    for job in work.jobs:
        attempt(answers, job.name, partial(_logprobs, job, work.prompts))


def _logprobs(job: Job, prompts: Sequence[Sequence[int]]) -> LogProbs:
    model = mlx_lm.load(job.base, adapter_path=job.adapter)[0]
    model.set_dtype(mx.float32)
    model.eval()
    rows = [model(mx.array([list(prompt)]))[0, -1].astype(mx.float32) for prompt in prompts]
    return log_softmax(np.array(mx.stack(rows)))


if __name__ == "__main__":
    main(sys.argv[1:])
