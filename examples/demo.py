"""The main job, on text that every Python has: a fine-tune as an adapter, merged and taken out again.

A small Llama is trained on the source of the standard library and then, in full, on the reference manual that `help()`
quotes from. From there on everything is done to the two stored checkpoints, with the commands that are shown. Adapters
of several ranks are extracted; one is merged, and taken out again to the bit; one is kept with a record of all that it
lacks, and gives the fine-tune back; two are combined; one is checked, pushed and pulled; the fine-tune becomes a
mixture of eight experts, which is trained on, as is a LoRA of the base. The loss on pages that no model has seen says
what each of them knows of the manual.

Run it with `make demo`. Everything it writes goes to `.demo/`, and is written anew each time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from rich.table import Table
from serving import fresh_token, hf, served
from show import command, console, heading, steps
from tiny_models import (
    Corpus,
    Loss,
    Tokens,
    Training,
    encode,
    evaluate,
    make_model,
    make_tokenizer,
    python_manual,
    python_source,
    train,
)
from transformers import AutoModelForCausalLM, LlamaForCausalLM

# The fine-tune moved the embeddings and the head as well, so they get factors too.
EVERYTHING = "all-linear,embeddings,head"


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large everything is: `characters` of source to learn from, the model, and how long it is trained.

    `steps` are those of `surgery train`, for the LoRA and for the mixture; `letters` of each page go to `surgery eval`.
    """

    characters: int
    vocabulary: int
    hidden: int
    layers: int
    pretraining: Training
    tuning: Training
    steps: tuple[int, int]
    letters: int
    ranks: tuple[int, ...]


FULL = Scale(
    characters=3_000_000,
    vocabulary=2048,
    hidden=192,
    layers=2,
    pretraining=Training(steps=850, batch=8, learning_rate=4e-3, weight_decay=0.1, seed=1),
    tuning=Training(steps=300, batch=8, learning_rate=1e-3, seed=2),
    steps=(200, 60),
    letters=20_000,
    ranks=(1, 4, 16, 64),
)
QUICK = Scale(
    characters=200_000,
    vocabulary=512,
    hidden=64,
    layers=1,
    pretraining=Training(steps=60, batch=4, learning_rate=8e-3, weight_decay=0.1, seed=1),
    tuning=Training(steps=40, batch=4, learning_rate=4e-3, seed=2),
    steps=(20, 6),
    letters=1_000,
    ranks=(1, 4, 16),
)
# The rank that is merged, and whose number of parameters the budget is given.
MERGED_RANK = 16
_MADE = (
    "base", "tuned", "merged", "restored", "linear-only", "budget", "exact", "tuned-again", "half-and-half", "resized",
    "pulled", "registry", "mixture", "dense-again", "learnt", "mixture-trained",
    "from-registry", "from-server", "home",
)  # fmt: skip


def main() -> None:
    """Tell the story from the first word of training to the table."""
    parser = argparse.ArgumentParser(description="Train, extract, merge, subtract, verify, compare.")
    parser.add_argument("--quick", action="store_true", help="a model too small to be any good, in seconds")
    parser.add_argument("--folder", default=".demo", help="where to write (default: %(default)s)")
    arguments = parser.parse_args()
    scale = QUICK if arguments.quick else FULL

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers annotates little
    torch.set_num_threads(min(torch.get_num_threads(), 4))
    folder = Path(arguments.folder)
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    for name in (*_MADE, *map(_adapter, scale.ranks)):
        shutil.rmtree(name, ignore_errors=True)
    os.environ["SURGERY_REGISTRY"] = str(Path("registry").absolute())

    pages = train_checkpoints(scale)
    extract_adapters(scale)
    merge_and_take_out()
    keep_all_of_it()
    combine_and_resize(scale)
    share()
    upcycle_it()
    train_and_evaluate(scale)
    compare_losses(scale, pages)
    serve(pages)


def train_checkpoints(scale: Scale) -> Tokens:
    """Write `base` and `tuned`, in bfloat16 as most checkpoints are; returns the held-out pages of the manual."""
    source, manual = python_source(scale.characters), python_manual()
    heading("Two checkpoints to work on")
    console.print("base: a Llama trained on the standard library's source. tuned: base trained on the manual, in full.")
    _describe("source", source)
    _describe("manual", manual)
    tokenizer = make_tokenizer(source.train, scale.vocabulary)
    console.print(f"tokenizer: byte-level BPE of the source, {len(tokenizer)} tokens")

    model = make_model(len(tokenizer), scale.hidden, scale.layers, seed=0)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"model: {parameters / 1e6:.2f}M parameters, {scale.layers} layers, width {scale.hidden}\n")
    _train("training base", model, encode(tokenizer, source.train), scale.pretraining)
    _save(model, "base")
    tokenizer.save_pretrained("base")
    console.print(f"base on held-out source: {_words(evaluate(_load('base'), encode(tokenizer, source.held_out)))}")

    model = _load("base")
    _train("training tuned", model, encode(tokenizer, manual.train), scale.tuning)
    _save(model, "tuned")
    tokenizer.save_pretrained("tuned")
    _write_rows("manual.jsonl", ({"text": text} for text in manual.train))
    pages = [text[: scale.letters] for text in manual.held_out]
    _write_rows("pages.jsonl", ({"text": text} for text in pages))
    # Rows that say which adapter they are for, or that they are for none.
    code = [text[: scale.letters] for text in source.held_out[: len(pages)]]
    rows = [(text, "learnt") for text in pages] + [(text, "base") for text in code]
    _write_rows("mixed.jsonl", ({"text": text, "adapter": adapter} for text, adapter in rows))
    return encode(tokenizer, manual.held_out)


def extract_adapters(scale: Scale) -> None:
    """Adapters of every rank, one of the linear layers alone, and one whose ranks are shared out by need."""
    heading("The fine-tune as an adapter, at several ranks")
    command(f"extract base tuned -o {_adapter(MERGED_RANK)} --rank {MERGED_RANK} --targets {EVERYTHING}")
    console.print("\nThe others say as much; they are summed up in the table at the end.")
    for rank in scale.ranks:
        if rank != MERGED_RANK:
            command(f"extract base tuned -o {_adapter(rank)} --rank {rank} --targets {EVERYTHING} --quiet")
    command(f"extract base tuned -o linear-only --rank {MERGED_RANK} --quiet")
    budget = _report(_adapter(MERGED_RANK)).parameters
    command(f"extract base tuned -o budget --budget {budget} --targets {EVERYTHING} --quiet")


def merge_and_take_out() -> None:
    """Merge, look, take out; the checkpoint that comes back is the base, to the last bit."""
    heading("Merged, and taken out again")
    command(f"merge base {_adapter(MERGED_RANK)} -o merged --reversible")
    console.print(
        "\nThe record is this large because training was this short and rough: its size grows with the change."
    )
    command("verify merged")
    command("subtract merged -o restored")
    command("verify restored base")
    console.print()
    for name in ("base", "merged", "restored"):
        digest = hashlib.sha256(Path(name, "model.safetensors").read_bytes()).hexdigest()
        console.print(f"sha256 {digest}  {name}/model.safetensors")


def keep_all_of_it() -> None:
    """An extraction that loses nothing: the adapter, and a record of what it lacks."""
    heading("With nothing lost: the fine-tune from its adapter and a record, every byte of every file")
    command(f"extract base tuned -o exact --exact --rank best --targets {EVERYTHING} --quiet")
    command("inspect exact")
    command("restore base exact -o tuned-again")
    command("verify tuned tuned-again")
    whole, kept = _folder_bytes("tuned"), _folder_bytes("exact")
    console.print(f"\ntuned: {whole:,} bytes. exact, from which it came back: {kept:,} bytes, {kept / whole:.0%}.")


def combine_and_resize(scale: Scale) -> None:
    """The mean of two adapters, and a large one cut down: neither needs the base."""
    heading("Adapters made of adapters")
    command(f"combine {_adapter(MERGED_RANK)}=0.5 linear-only=0.5 -o half-and-half --quiet")
    command(f"resize {_adapter(scale.ranks[-1])} --rank 4 -o resized --quiet")
    console.print("\nTheir losses are in the table at the end.")


def share() -> None:
    """Checked for other tools, pushed to a registry in a folder, pulled into an empty one, and proved."""
    heading("Shared")
    command(f"lint {_adapter(MERGED_RANK)} --for peft,vllm,llama.cpp")
    command(f"push {_adapter(MERGED_RANK)} lab/manual --quiet")
    command("hub list")
    command("pull lab/manual -o pulled --check-base base")
    console.print("\nThe last table measures it as PEFT loads it from there.")


def upcycle_it() -> None:
    """Eight experts for each MLP, and one MLP again: while nobody trains the mixture, it is the dense model."""
    heading("The fine-tune as a mixture of experts")
    command("upcycle tuned --experts 8 -o mixture")
    command("dense mixture -o dense-again --quiet")
    command("verify tuned dense-again")
    console.print("\nThe last table measures the mixture as transformers loads it.")


def train_and_evaluate(scale: Scale) -> None:
    """A LoRA of the base and the mixture, each trained on the manual for a minute at most, and all of them measured."""
    heading("Trained: a LoRA of the base, and the mixture with a balancing loss for its routers")
    how = "--data manual.jsonl --over-length split --max-length 128 --quiet"
    command(f"train base {how} --rank 16 --steps {scale.steps[0]} --learning-rate 3e-3 -o learnt")
    command(f"train mixture {how} --recipe upcycle --steps {scale.steps[1]} --learning-rate 3e-4 -o mixture-trained")
    heading("Evaluated: base, adapters in one pass over it, the fine-tune, the mixture before and after")
    how = "--over-length split --max-length 128"
    adapters = f"{_adapter(MERGED_RANK)},learnt"
    others = "tuned,mixture,mixture-trained"
    command(f"eval base --data pages.jsonl {how} --adapters {adapters} --against {others}")
    console.print(
        "\nOne batch, rows on adapters of their own: the manual with the LoRA, the source with the base alone."
    )
    command(f"eval base --data mixed.jsonl {how} --adapters learnt")


def compare_losses(scale: Scale, pages: Tokens) -> None:
    """Measure every model on the held-out pages: adapters as PEFT loads them, `merged` as transformers does."""
    heading("What each of them knows of the manual")
    adapters = {
        **{f"rank {rank}": _adapter(rank) for rank in scale.ranks},
        f"ranks by budget, the size of rank {MERGED_RANK}": "budget",
        f"rank {MERGED_RANK}, linear layers only": "linear-only",
        f"half of rank {MERGED_RANK}, half of that": "half-and-half",
        f"rank {scale.ranks[-1]} resized to 4": "resized",
        f"rank {MERGED_RANK}, pulled": "pulled",
    }
    found: dict[str, Loss] = {}
    names = ["base", *adapters.values(), "merged", "tuned", "mixture"]
    with steps("measuring", len(names)) as step:
        for name in names:
            found[name] = evaluate(_with_adapter(name) if name in adapters.values() else _load_any(name), pages)
            step(f"{name}: {_words(found[name])}")

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("held-out pages of the manual")
    for title in ("bytes", "error", "nats/token", "bits/byte", "of the way"):
        table.add_column(title, justify="right")

    def add(label: str, name: str, nbytes: int, error: str) -> None:
        loss, first, last = found[name], found["base"], found["tuned"]
        way = (first.nats_per_token - loss.nats_per_token) / (first.nats_per_token - last.nats_per_token)
        table.add_row(label, f"{nbytes:,}", error, *_columns(loss), f"{way:.1%}")

    add("base", "base", _weight_bytes("base"), "")
    for label, name in adapters.items():
        report = _report(name)
        # The error of a combined adapter is that of its own factors, not one against the fine-tune.
        error = "" if name in ("half-and-half", "resized") else f"{report.error:.1%}"
        add(f"base + {label}", name, report.nbytes, error)
    add(f"rank {MERGED_RANK} merged, in bfloat16", "merged", _weight_bytes("merged"), "")
    add("tuned", "tuned", _weight_bytes("tuned"), "")
    add("tuned, as a mixture of 8 experts", "mixture", _weight_bytes("mixture"), "")
    console.print()
    console.print(table)
    console.print()
    console.print("bytes       of the adapter, or of the whole checkpoint")
    console.print("error       ||dW - B A|| / ||dW||, as the extraction states it")
    console.print("of the way  the part of the fall in loss from base to tuned that is there")


def serve(pages: Tokens) -> None:
    """The adapter and the mixture, pushed and pulled: first in the folder, then through a server over that folder."""
    heading("The registry, with and without a server")
    command("push mixture-trained lab/mixture --quiet")
    command("pull lab/manual -o from-registry/manual --quiet")
    command("pull lab/mixture -o from-registry/mixture --quiet")
    token = fresh_token()
    with served(Path("registry"), token) as endpoint:
        console.print(f"\n[bold green]$[/bold green] [green]surgery hub serve --data registry &[/green]\n{endpoint}")
        home = Path("home").absolute()
        hf(f"upload admin/manual {_adapter(MERGED_RANK)}", endpoint, token, home)
        hf("upload admin/mixture mixture-trained", endpoint, token, home)
        for name in ("admin/manual", "lab/mixture"):
            hf(f"download {name} --local-dir from-server/{name.partition('/')[2]}", endpoint, token, home)
    console.print("\nBoth adapters as PEFT loads them, both mixtures as transformers does, on the held-out pages:")
    for place in ("from-registry", "from-server"):
        adapter, mixture = (
            evaluate(_with_adapter(f"{place}/manual"), pages),
            evaluate(_load_any(f"{place}/mixture"), pages),
        )
        console.print(f"{place}: adapter {_words(adapter)}, mixture {_words(mixture)}")


def _write_rows(name: str, rows: Iterable[object]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _adapter(rank: int) -> str:
    return f"rank-{rank}"


def _describe(label: str, corpus: Corpus) -> None:
    sizes = [sum(map(len, texts)) / 1e6 for texts in (corpus.train, corpus.held_out)]
    count = f"{len(corpus.train)} documents, {sizes[0]:.2f} MB"
    console.print(f"{label}: {count}; held out: {len(corpus.held_out)} documents, {sizes[1]:.2f} MB")


def _train(label: str, model: LlamaForCausalLM, tokens: Tokens, how: Training) -> None:
    with steps(label, how.steps) as step:
        train(model, tokens, how, lambda loss: step(f"loss {loss:.2f}"))


def _save(model: LlamaForCausalLM, name: str) -> None:
    model.bfloat16().save_pretrained(name)


def _load(name: str) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(name, dtype=torch.float32)


def _load_any(name: str) -> torch.nn.Module:
    """As the class that its config names: the mixture is no Llama any more."""
    loaded = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    assert isinstance(loaded, torch.nn.Module)
    return loaded


def _with_adapter(name: str) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(_load("base"), name)


@dataclass(frozen=True)
class Extracted:
    """What `surgery.json` says of an adapter."""

    parameters: int
    nbytes: int
    error: float


def _report(name: str) -> Extracted:
    report = json.loads(Path(name, "surgery.json").read_text())["report"]
    return Extracted(report["parameters"], report["nbytes"], report["error"])


def _weight_bytes(name: str) -> int:
    return Path(name, "model.safetensors").stat().st_size


def _folder_bytes(name: str) -> int:
    return sum(path.stat().st_size for path in Path(name).rglob("*") if path.is_file())


def _words(loss: Loss) -> str:
    return f"{loss.nats_per_token:.3f} nats per token"


def _columns(loss: Loss) -> tuple[str, str]:
    return f"{loss.nats_per_token:.3f}", f"{loss.bits_per_byte:.3f}"


if __name__ == "__main__":
    main()
