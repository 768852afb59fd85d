"""The runner in our own environment: transformers, and PEFT for adapters, in float32."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from consumers.jobs import Job, LogProbs, Work, attempt


def main(arguments: Sequence[str]) -> None:
    """Answer every job."""
    work, answers = Work.read(Path(arguments[0])), Path(arguments[1])
    for job in work.jobs:
        attempt(answers, job.name, partial(_answer, job, work.prompts))


def load(folder: str | Path) -> Any:
    """A checkpoint as transformers loads it."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _answer(job: Job, prompts: Sequence[Sequence[int]]) -> LogProbs:
    return logprobs(_load(job), prompts)


def _load(job: Job) -> Any:
    from peft import PeftModel

    model = load(job.base)
    if job.adapter:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PeftModel.from_pretrained(model, job.adapter)
    return model


@torch.no_grad()
def logprobs(model: Any, prompts: Sequence[Sequence[int]]) -> LogProbs:
    """Log-probabilities of the token after each prompt."""
    rows = [model.eval()(input_ids=torch.tensor([list(prompt)]), use_cache=False).logits[0, -1] for prompt in prompts]
    result: LogProbs = torch.stack(rows).double().log_softmax(-1).float().numpy()
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
