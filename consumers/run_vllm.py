"""The runner inside vLLM's environment: `python -m consumers.run_vllm WORK ANSWERS`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from consumers.jobs import AGAIN, Job, LogProbs, Work, attempt, is_sound, read_answer, refusal, write_answer

# In this process, so that an error keeps its text; and no usage reports.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB


def main(arguments: Sequence[str]) -> None:
    """Answer every job."""
    work, answers = Work.read(Path(arguments[0])), Path(arguments[1])
    for base, jobs in work.by_base():
        _run(base, [job for job in jobs if not job.adapter], work, answers)
        _run(base, [job for job in jobs if job.adapter], work, answers)


def _run(base: str, jobs: Sequence[Job], work: Work, answers: Path) -> None:
    """Answer jobs that need the same engine: with adapters, or without."""
    if not jobs:
        return
    try:
        engine = _engine(base, jobs[0].adapter is not None, work.settings)
    except Exception as error:  # loading may raise anything: that is the answer
        for job in jobs:
            write_answer(answers, job.name, refusal(error))
        _start_anew()
    for number, job in enumerate(jobs, 1):
        _answer(engine, job, number, work.prompts, answers)
    _dismiss(engine)


def _dismiss(engine: Any) -> None:
    """End an engine before the next one begins: they share the groups of processes that talk to each other."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    engine.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


def _start_anew() -> NoReturn:
    """Leave the rest to a new process, without the tidying that a broken engine may never finish."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(AGAIN)


def _engine(base: str, with_adapters: bool, settings: dict[str, Any]) -> Any:
    from vllm import LLM

    return LLM(
        model=base,
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=64,
        max_num_seqs=2,
        max_logprobs=-1,
        seed=0,
        **({"enable_lora": True, "max_loras": 1, **settings} if with_adapters else {}),
    )


def _answer(engine: Any, job: Job, number: int, prompts: Sequence[Sequence[int]], answers: Path) -> None:
    """Answer one job. An adapter that does not load leaves the engine as it was; after any other error it is lost."""
    from vllm.lora.request import LoRARequest

    request = LoRARequest(job.name, number, job.adapter) if job.adapter else None
    if request:
        try:
            engine.llm_engine.add_lora(request)
        except Exception as error:  # whatever it raises is the answer
            write_answer(answers, job.name, refusal(error))
            return
    attempt(answers, job.name, partial(_logprobs, engine, request, prompts))
    if not is_sound(read_answer(answers, job.name)):  # a request that failed stays in the queue, a NaN in the cache
        _start_anew()
    if request:
        engine.llm_engine.remove_lora(number)


def _logprobs(engine: Any, request: Any, prompts: Sequence[Sequence[int]]) -> LogProbs:
    from vllm import SamplingParams

    outputs = engine.generate(
        [{"prompt_token_ids": list(prompt)} for prompt in prompts],
        SamplingParams(max_tokens=1, temperature=0.0, logprobs=-1, detokenize=False),
        lora_request=request,
        use_tqdm=False,
    )
    return np.array([_row(output.outputs[0].logprobs[0]) for output in outputs], dtype=np.float32)


def _row(at: Any) -> list[float]:
    """Log-probabilities of one place by token id."""
    return [at[token].logprob for token in range(len(at))]


if __name__ == "__main__":
    main(sys.argv[1:])
