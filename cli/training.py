"""Commands that train: train."""

from __future__ import annotations

import os
from typing import Any

import click

import surgery
from surgery.cli.methods import given_options, method_options
from surgery.cli.options import reporting, resumable
from surgery.cli.training_progress import make_train_progress


def _choice(*names: str) -> click.Choice[str]:
    return click.Choice(names)


@click.command(
    epilog="""\b
Examples:
  surgery train model --data texts.jsonl --eval-split 0.05 -o adapter
  surgery train adapter --base model --data more.jsonl -o adapter-2
  surgery train model --data chats.jsonl --method full --epochs 3 --gradient-accumulation 8 -o tuned
  surgery train moe --data texts.jsonl --recipe upcycle --steps 2000 -o moe-trained
  surgery train vit --data pictures/ --method top:2 --new-head --epochs 5 -o classifier
  surgery train model --data chats.jsonl --recipe lima --set residual_dropout=0.2 -o tuned
  surgery train model --data texts.jsonl --packing --over-length split --max-length 1024 -o adapter"""
)
@click.argument("checkpoint", metavar="CHECKPOINT", type=click.Path())
@click.option("--data", required=True, metavar="DATA", help="File, folder, or data set on the Hub, name/repo[:split].")
@click.option("--eval-data", metavar="DATA", help="The same, to measure the loss on.")
@click.option(
    "--eval-split", type=click.FloatRange(0), help="Instead, hold out this share of --data, or from 1 this many."
)
@click.option(
    "--task",
    type=_choice("causal-lm", "seq2seq", "classification", "image-classification"),
    help="What to learn.  [default: told from checkpoint and data]",
)
@method_options
@click.option("--base", metavar="CHECKPOINT", help="What CHECKPOINT belongs to, if it is an adapter to train on.")
@click.option("--any-base", is_flag=True, default=None, help="Take it even if hashes prove that it is another.")
@click.option(
    "--recipe", metavar="NAME|FILE", help="lima, upcycle, lora-paper, or a YAML file; options given come first."
)
@click.option("--steps", type=click.IntRange(1), help="Steps of the optimiser.")
@click.option(
    "--epochs", type=click.FloatRange(0, min_open=True), help="Instead, times through the data.  [default: 1]"
)
@click.option("--batch-size", type=click.IntRange(1), help="Rows of a forward pass, on each device.  [default: 8]")
@click.option("--gradient-accumulation", type=click.IntRange(1), help="Forward passes to a step.  [default: 1]")
@click.option("--learning-rate", type=click.FloatRange(0), help="At its highest.  [default: by method; 2e-4 for lora]")
@click.option("--schedule", type=_choice("cosine", "linear", "constant"), help="How the rate falls.  [default: cosine]")
@click.option("--warmup", type=click.FloatRange(0), help="Steps of warm-up; below 1, a share of all.  [default: 0]")
@click.option("--weight-decay", type=click.FloatRange(0), help="Of matrices.  [default: 0]")
@click.option(
    "--max-grad-norm", type=click.FloatRange(0), help="Clip gradients to this norm; 0 for never.  [default: 1]"
)
@click.option(
    "--max-length", type=click.IntRange(1), help="Tokens of an example.  [default: the model's, at most 2048]"
)
@click.option(
    "--over-length",
    type=_choice("error", "truncate", "skip", "split"),
    help="What becomes of longer ones; split is for plain text.  [default: error]",
)
@click.option("--packing", is_flag=True, default=None, help="Several examples to a row, which do not see each other.")
@click.option(
    "--loss", type=_choice("auto", "all"), help="auto: on completions and the assistant's turns.  [default: auto]"
)
@click.option("--tokenizer", metavar="PATH", help="Take the tokenizer from there.")
@click.option("--chat-template", type=click.Path(), help="Jinja file to use instead of the tokenizer's template.")
@click.option("--end-token", metavar="TEXT", help="Ends completions and texts; added if it is not in the vocabulary.")
@click.option("--new-head", is_flag=True, default=None, help="Put a fresh head on, for other labels.")
@click.option(
    "--precision", type=_choice("auto", "fp32", "bf16", "fp16"), help="auto: bf16 where a GPU has it.  [default: auto]"
)
@click.option("--activation-checkpointing", is_flag=True, default=None, help="Less memory, a third more time.")
@click.option("--optimizer", type=_choice("adamw", "adamw-8bit"), help="[default: adamw]")
@click.option("--eval-every", type=click.IntRange(1), help="Steps between evaluations.  [default: a tenth of the run]")
@click.option("--save-every", type=click.IntRange(1), help="Steps between saves of the state.  [default: a tenth]")
@click.option(
    "--keep",
    type=_choice("best", "last"),
    help="Weights to write: of the least held-out loss, or the last.  [default: best]",
)
@click.option("--patience", type=click.IntRange(1), help="Stop after so many evaluations that are no better.")
@click.option(
    "--router-aux-loss", type=click.FloatRange(0), help="Load-balancing loss of a mixture.  [default: its config's]"
)
@click.option("--router-z-loss", type=click.FloatRange(0), help="z-loss of its routers.  [default: its config's]")
@click.option("--seed", type=int, help="Of everything random.  [default: 0]")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any option of surgery.train; may be repeated."
)
@click.option(
    "--track", "trackers", multiple=True, metavar="NAME", help="tensorboard, wandb, trackio, ...; may be repeated."
)
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]", help="Where to compute.")
@click.option("-o", "--output", required=True, type=click.Path(), help="Folder to write; must not exist.")
@click.option("--overwrite", is_flag=True, help="Replace an output that exists.")
@click.option("--dry-run", is_flag=True, help="Look at data and model, show the plan, train nothing.")
@click.option(
    "--no-hash", "hash", flag_value=False, default=True, help="Skip hashes: verify cannot check the output then."
)
@reporting
@resumable
def train(checkpoint: str, as_json: bool, quiet: bool, settings: tuple[str, ...], **options: Any) -> None:
    """Train a checkpoint, or an adapter of one, on texts, prompts, chats, labels or pictures.

    By default a LoRA of all linear layers is trained, and written as an adapter; --method full and others write a
    checkpoint. An adapter that is named instead of a checkpoint is trained on.

    What is in the data decides what is learnt. A run that was stopped goes on when the same command is given again,
    as if nothing had happened; the log is beside the output until it is done.
    """
    from surgery.cli import render
    from surgery.training.recipe import parse_setting

    # Of several processes one speaks.
    first = os.environ.get("RANK", "0") == "0"
    given = given_options(options)
    given |= dict(parse_setting(text) for text in settings)
    report = surgery.train(checkpoint, progress=make_train_progress(quiet or not first), **given)
    if first:
        render.present(report, as_json, quiet)
