"""What each way of combining adapters does to the loss on text that no model has seen.

A small Llama is trained on the source of the standard library. Three LoRA adapters are trained on it by PEFT, each on
another kind of text that an installed Python has: the reference manual, C++ headers, and what packages say of
themselves. They are combined by every method of `surgery combine`, at several weights, and the loss of each result is
measured on held-out text of all three kinds, and of the base's own.

    python examples/combine_methods.py [--quick] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from rich.table import Table
from show import console, heading, steps
from tiny_models import (
    Corpus,
    Tokens,
    Training,
    encode,
    evaluate,
    make_model,
    make_tokenizer,
    package_descriptions,
    python_manual,
    python_source,
    torch_headers,
    train,
)
from transformers import LlamaForCausalLM

import surgery
from surgery.keywords import CombineKeywords

Losses = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large everything is: `characters` of source and of headers, the model, the adapters, the training.

    `weights` are tried with every method; the loss is taken over `measured` tokens of each kind of text.
    """

    characters: int
    vocabulary: int
    hidden: int
    layers: int
    rank: int
    pretraining: Training
    tuning: Training
    weights: tuple[float, ...]
    measured: int


FULL = Scale(
    characters=3_000_000,
    vocabulary=2048,
    hidden=192,
    layers=2,
    rank=16,
    pretraining=Training(steps=850, batch=8, learning_rate=4e-3, weight_decay=0.1, seed=1),
    tuning=Training(steps=250, batch=8, learning_rate=3e-3, seed=2),
    weights=(0.33, 0.67, 1.0),
    measured=10_000,
)
QUICK = Scale(
    characters=100_000,
    vocabulary=400,
    hidden=64,
    layers=1,
    rank=4,
    pretraining=Training(steps=25, batch=4, learning_rate=8e-3, weight_decay=0.1, seed=1),
    tuning=Training(steps=15, batch=4, learning_rate=1e-2, seed=2),
    weights=(0.5,),
    measured=2_000,
)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# What is shown, and how it is made.
METHODS: dict[str, CombineKeywords] = {
    "sum": {"method": "sum"},
    "cat": {"method": "cat"},
    "ties, density 0.2": {"method": "ties", "density": 0.2},
    "ties, density 0.5": {"method": "ties", "density": 0.5},
    "dare-ties, density 0.5": {"method": "dare-ties", "density": 0.5},
    "dare-linear, density 0.5": {"method": "dare-linear", "density": 0.5},
    "magnitude-prune, density 0.2": {"method": "magnitude-prune", "density": 0.2},
    "magnitude-prune, density 0.5": {"method": "magnitude-prune", "density": 0.5},
    "tsv": {"method": "tsv"},
    "iso": {"method": "iso"},
    "linear, as PEFT": {"method": "linear", "as_peft": True},
    "ties, density 0.5, as PEFT": {"method": "ties", "density": 0.5, "as_peft": True},
}
# Those whose rank may be chosen are also made at the adapters' ranks together.
AT_FULL_RANK = ("ties, density 0.5", "magnitude-prune, density 0.5", "tsv", "iso")


def main() -> None:
    """Train a base and three adapters, combine, measure, show."""
    parser = argparse.ArgumentParser(description="Combine three adapters by every method, and measure the loss.")
    parser.add_argument("--quick", action="store_true", help="a model too small to be any good, in seconds")
    parser.add_argument("--folder", default=".combine", help="where to write (default: %(default)s)")
    arguments = parser.parse_args()
    scale = QUICK if arguments.quick else FULL

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers annotates little
    torch.set_num_threads(min(torch.get_num_threads(), 4))
    folder = Path(arguments.folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.chdir(folder)

    source = python_source(scale.characters)
    texts = {
        "manual": python_manual(),
        "headers": torch_headers(scale.characters),
        "descriptions": package_descriptions(),
    }
    tokens = train_all(scale, source, texts)
    show(scale, list(texts), tokens, measure(scale, list(texts), tokens))


def train_all(scale: Scale, source: Corpus, texts: dict[str, Corpus]) -> dict[str, Tokens]:
    """Write `base` and an adapter for each kind of text; returns held-out tokens of every kind."""
    heading("A base, and an adapter for each kind of text")
    everything = [*source.train, *(text for corpus in texts.values() for text in corpus.train)]
    tokenizer = make_tokenizer(everything, scale.vocabulary)
    model = make_model(len(tokenizer), scale.hidden, scale.layers, seed=0)
    with steps("training base", scale.pretraining.steps) as step:
        train(model, encode(tokenizer, source.train), scale.pretraining, lambda loss: step(f"loss {loss:.2f}"))
    model.save_pretrained("base")
    for number, (name, corpus) in enumerate(texts.items()):
        console.print(f"{name}: {sum(map(len, corpus.train)) / 1e6:.2f} MB in {len(corpus.train)} documents")
        torch.manual_seed(3 + number)  # adapters that start from one A would have its directions in common
        config = LoraConfig(r=scale.rank, lora_alpha=scale.rank, target_modules=TARGETS, task_type="CAUSAL_LM")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tuned = get_peft_model(LlamaForCausalLM.from_pretrained("base"), config)
        with steps(f"training {name}", scale.tuning.steps) as step:
            rows = encode(tokenizer, corpus.train)
            train(cast("LlamaForCausalLM", tuned), rows, scale.tuning, lambda loss: step(f"loss {loss:.2f}"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tuned.save_pretrained(name)
    held_out = {name: encode(tokenizer, corpus.held_out) for name, corpus in {**texts, "source": source}.items()}
    return {name: Tokens(found.ids[: scale.measured], found.nbytes) for name, found in held_out.items()}


def ways(scale: Scale, count: int) -> dict[str, CombineKeywords]:
    """Every method, and some of them at the rank that `count` adapters have together."""
    rank = count * scale.rank
    return METHODS | {f"{label}, rank {rank}": METHODS[label] | {"rank": rank} for label in AT_FULL_RANK}


def measure(scale: Scale, names: list[str], tokens: dict[str, Tokens]) -> dict[str, dict[float, Losses]]:
    """The losses of the base, of each adapter alone, and of every method at every weight."""
    heading("Every method at every weight")
    made = ways(scale, len(names))
    found: dict[str, dict[float, Losses]] = {"base": {1.0: _losses(None, tokens)}}
    with steps("measuring", len(names) + len(made) * len(scale.weights)) as step:
        for name in names:
            found[f"{name} alone"] = {1.0: _losses(name, tokens)}
            step(name)
        for label, options in made.items():
            found[label] = {}
            for weight in scale.weights:
                given = [(name, weight) for name in names]
                surgery.combine(*given, output="combined", **(options | CombineKeywords(overwrite=True, hash=False)))
                found[label][weight] = _losses("combined", tokens)
                step(f"{label}, weight {weight}")
    return found


def _losses(adapter: str | None, tokens: dict[str, Tokens]) -> Losses:
    """Nats per token on each kind of text."""
    model: torch.nn.Module = LlamaForCausalLM.from_pretrained("base")
    if adapter is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(cast("LlamaForCausalLM", model), adapter).eval()
    return {name: evaluate(model, found).nats_per_token for name, found in tokens.items()}


def show(scale: Scale, names: list[str], tokens: dict[str, Tokens], found: dict[str, dict[float, Losses]]) -> None:
    """One row for each method: the losses at its best weight, the mean over the three kinds of text at every weight."""
    heading("Held-out loss, nats per token, each method at its best weight")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("adapter", no_wrap=True)
    made = ways(scale, len(names))
    means = [f"at {weight:g}" for weight in scale.weights]
    for title in ("weight", *tokens, "mean", *means):
        table.add_column(title, justify="right")

    def mean(losses: Losses) -> float:
        return sum(losses[name] for name in names) / len(names)

    for label, by_weight in found.items():
        best = min(by_weight, key=lambda weight: mean(by_weight[weight]))
        losses = by_weight[best]
        own = [f"{mean(losses):.3f}" for losses in by_weight.values()] if label in made else []
        shown = f"{best:g}" if label in made else ""
        table.add_row(label, shown, *(f"{losses[name]:.3f}" for name in tokens), f"{mean(losses):.3f}", *own)
    console.print(table)


if __name__ == "__main__":
    main()
