"""The runner inside llama.cpp's environment: `python -m consumers.run_llama_cpp WORK ANSWERS`.

A checkpoint goes through `convert_hf_to_gguf.py` and an adapter through `convert_lora_to_gguf.py`, which lie in the
source package of llama-cpp-python, and the results are loaded as `llama-cli -m MODEL --lora ADAPTER` would.
"""

from __future__ import annotations

import contextlib
import logging
import os
import runpy
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from consumers.jobs import NATIVE, Job, LogProbs, Work, attempt, log_softmax

_SOURCE = Path(sys.prefix) / "source" / "vendor" / "llama.cpp"
_FLOAT32 = 0  # ggml's number for the type


class ConversionError(Exception):
    """What a converter logged before it gave up."""


def main(arguments: Sequence[str]) -> None:
    """Answer every job."""
    work, answers = Work.read(Path(arguments[0])), Path(arguments[1])
    sys.path.insert(0, str(_SOURCE))
    _know_our_tokenizers()
    with tempfile.TemporaryDirectory() as folder:
        for job in work.jobs:
            attempt(answers, job.name, partial(_logprobs, job, work.prompts, Path(folder), answers))


def _know_our_tokenizers() -> None:
    """Have invented byte-level tokenizers accepted: the converters know one by a hash of what it makes of a text."""
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda *_: "gpt-2"


def _logprobs(job: Job, prompts: Sequence[Sequence[int]], folder: Path, answers: Path) -> LogProbs:
    model, adapter = folder / f"{Path(job.base).name}-{abs(hash(job.base))}.gguf", None
    if not model.exists():
        _convert("convert_hf_to_gguf.py", job.base, "--outfile", model, "--outtype", "f32")
    if job.adapter:
        adapter = folder / "adapter.gguf"
        adapter.unlink(missing_ok=True)
        _convert("convert_lora_to_gguf.py", "--base", job.base, job.adapter, "--outfile", adapter, "--outtype", "f32")
    return _run(model, adapter, prompts, answers)


def _convert(script: str, *arguments: str | Path) -> None:
    """Run a converter as a command; what it logs as errors becomes the message."""
    record = _Record()
    logging.getLogger().addHandler(record)
    before, sys.argv = sys.argv, [script, *map(str, arguments)]
    try:
        runpy.run_path(str(_SOURCE / script), run_name="__main__")
    except SystemExit as stop:
        if stop.code:
            raise ConversionError(f"{script}: {' '.join(record.lines) or stop.code}") from stop
    except Exception as error:  # a converter may raise anything: KeyError, AssertionError, its own
        raise ConversionError(f"{script}: {type(error).__name__}: {error}") from error
    finally:
        sys.argv = before
        logging.getLogger().removeHandler(record)


class _Record(logging.Handler):
    """Keeps what is logged as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _run(model: Path, adapter: Path | None, prompts: Sequence[Sequence[int]], folder: Path) -> LogProbs:
    import llama_cpp

    with _stderr(folder) as said:
        try:
            engine: Any = llama_cpp.Llama(
                str(model),
                lora_path=str(adapter) if adapter else None,
                n_ctx=64,
                n_batch=64,
                logits_all=True,
                type_k=_FLOAT32,
                type_v=_FLOAT32,
                flash_attn=False,
                n_threads=2,
            )
        except (ValueError, RuntimeError) as error:  # of the model, of the adapter; the reason is in what was printed
            lines = [line for line in said().splitlines() if "error" in line.lower() or "failed" in line.lower()]
            raise RuntimeError("; ".join([*lines[-3:], str(error)])) from error
        rows = []
        for prompt in prompts:
            engine.reset()
            engine.eval(list(prompt))
            rows.append(engine.scores[len(prompt) - 1].copy())
        engine.close()
    return log_softmax(np.array(rows, dtype=np.float32))


@contextlib.contextmanager
def _stderr(folder: Path) -> Iterator[Any]:
    """Catch what C code prints to stderr, in a file that outlives a crash; gives a function that returns it so far."""
    with (folder / NATIVE).open("w+", errors="replace") as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)

        def said() -> str:
            file.seek(0)
            return file.read()

        try:
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            print(said(), file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
