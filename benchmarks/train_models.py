"""Train a small language model and several full fine-tunes of it, and save them in bfloat16 and float32.

    python -m benchmarks.train_models FOLDER HIDDEN STEPS

FOLDER gets `base` (source code of the standard library), and for each entry of `TUNINGS` a fine-tune of every parameter
on the language reference; with `-float32` at the end the same pair unrounded. Data, tokenizer and loop are those of
`examples/tiny_models.py`.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from tiny_models import Training, encode, make_model, make_tokenizer, python_manual, python_source, train  # noqa: E402 - found since the line above

VOCABULARY = 2048
# Learning rates from one that hardly moves bfloat16 weights, as fine-tunes of large models use, to one that rewrites
# them.
TUNINGS = {"light": 2e-5, "medium": 2e-4, "heavy": 1e-3}


def main() -> None:
    folder, hidden, steps = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    source, manual = python_source(1_500_000), python_manual()
    tokenizer = make_tokenizer([*source.train[:100], *manual.train[:50]], VOCABULARY)
    code, prose = encode(tokenizer, source.train), encode(tokenizer, manual.train)
    model = make_model(VOCABULARY, hidden, 2, seed=0)
    pretraining = Training(steps=steps, batch=8, learning_rate=4e-3, weight_decay=0.1, seed=1)
    train(model, code, pretraining, lambda _: None)
    # Fine-tunes start from what is stored.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    models = {"base": model}
    for name, rate in TUNINGS.items():
        models[name] = copy.deepcopy(model)
        tuning = Training(steps=steps // 2, batch=8, learning_rate=rate, seed=2)
        train(models[name], prose, tuning, lambda _: None)
    for name, found in models.items():
        for suffix, dtype in (("", torch.bfloat16), ("-float32", torch.float32)):
            stored: Any = copy.deepcopy(found)
            stored.to(dtype)
            stored.save_pretrained(folder / f"{name}{suffix}")
            tokenizer.save_pretrained(folder / f"{name}{suffix}")


if __name__ == "__main__":
    main()
