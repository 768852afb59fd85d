"""The runner inside mlx-lm's environment: `python -m consumers.run_mlx WORK ANSWERS`, on the CPU.

A model is loaded by the functions that `mlx_lm.load` calls, without the tokenizer.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

from consumers.jobs import Job, LogProbs, Work, attempt, log_softmax


def main(arguments: Sequence[str]) -> None:
    """Answer every job."""
    work, answers = Work.read(Path(arguments[0])), Path(arguments[1])
    mx.set_default_device(mx.cpu)
    for job in work.jobs:
        attempt(answers, job.name, partial(_logprobs, job, work.prompts))


def _logprobs(job: Job, prompts: Sequence[Sequence[int]]) -> LogProbs:
    model, _ = load_model(Path(job.base))
    if job.adapter:
        model = load_adapters(model, job.adapter)
    model.set_dtype(mx.float32)
    model.eval()
    rows = [model(mx.array([list(prompt)]))[0, -1].astype(mx.float32) for prompt in prompts]
    return log_softmax(np.array(mx.stack(rows)))


if __name__ == "__main__":
    main(sys.argv[1:])
