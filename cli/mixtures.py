"""Commands on mixtures of experts: upcycle and dense."""

from __future__ import annotations

from typing import Any

import click

import surgery
from surgery.cli.options import LEAST_SHARD, Size, writing, writing_beside
from surgery.cli.progress import make_progress


@click.command(
    epilog="""\b
Examples:
  surgery upcycle model --experts 32
  surgery upcycle model --experts 8 --layers last:half -o moe
  surgery upcycle model --experts 64 --init granular:8 --top-k 16
  surgery upcycle model --init adapters:code,math=0.5,chat --router-init hidden:prompts.jsonl
  surgery upcycle moe-of-32 --experts 64   # a larger mixture, the same function
  surgery upcycle model --experts 8 --kind lora --rank 16   # a small file beside the model
  surgery upcycle vit --experts 32 --router expert-choice --capacity 2 --combine raw   # the paper's vision recipe"""
)
@click.argument("checkpoint", metavar="CHECKPOINT", type=click.Path())
@click.option("--experts", type=click.IntRange(2), help="Experts to each chosen MLP.  [default: 8]")
@click.option("--top-k", type=click.IntRange(1), help="Experts that a token goes to.  [default: 2]")
@click.option(
    "--router",
    default="top-k",
    show_default=True,
    help="top-k or expert-choice; encoder=expert-choice,decoder=top-k for models that have both.",
)
@click.option(
    "--capacity",
    type=click.FloatRange(0, min_open=True),
    help="Expert choice: experts that take a token, on average.  [default: 2]",
)
@click.option(
    "--group",
    type=click.Choice(["sequence", "batch"]),
    default="sequence",
    show_default=True,
    help="Expert choice: the tokens that compete; with batch, results depend on what is beside them.",
)
@click.option("--allow-future", is_flag=True, help="Let expert choice into a decoder, where it sees the future.")
@click.option(
    "--layers",
    default="all",
    show_default=True,
    help="all, last:N, last:half, every:N (the last one included), or zero-based numbers such as 0,4-7.",
)
@click.option(
    "--init",
    default="copy",
    show_default=True,
    help="copy, noise:STD (or noise:1% of each matrix's own), drop:RATIO, granular:G, from:CHECKPOINT,... or "
    "adapters:ADAPTER,...",
)
@click.option(
    "--rest",
    type=click.Choice(["average", "first", "base"]),
    help="Everything but the experts of several models.  [default: average; base for adapters]",
)
@click.option("--any-base", is_flag=True, help="Take adapters even if hashes prove that they are for another base.")
@click.option(
    "--router-init", default="normal:0.02", show_default=True, help="normal:STD, zeros, or hidden:PROMPTS.jsonl."
)
@click.option("--shared-expert", is_flag=True, help="Add an expert that sees every token and starts out silent.")
@click.option(
    "--combine",
    type=click.Choice(["normalized", "raw"]),
    help="Weights of a token's experts: summing to 1, which keeps the function, or as the router gives them.  "
    "[default: normalized; raw for switch]",
)
@click.option("--target", default="auto", show_default=True, metavar="TYPE", help="Model type to write.")
@click.option(
    "--kind",
    type=click.Choice(["copy", "lora"]),
    default="copy",
    show_default=True,
    help="Experts are copies of the MLP, or LoRA updates to the one MLP in CHECKPOINT: a small file without it.",
)
@click.option("--rank", type=click.IntRange(1), help="Of LoRA experts.  [default: 16]")
@click.option(
    "--alpha", type=click.FloatRange(0, min_open=True), help="LoRA experts add alpha/rank B A.  [default: the rank]"
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of routers, noise and redrawn weights.")
@click.option("--shard-size", "shard_bytes", type=Size(least=LEAST_SHARD), help="Largest weight file.  [default: 5GB]")
@click.option(
    "--verify/--no-verify",
    default=None,
    help="Measure the difference from the dense model with transformers.  [default: if both fit in memory]",
)
@click.option("--text", type=click.Path(), metavar="FILE", help="Measure the loss on a text, too.")
@writing_beside("CHECKPOINT-moe-Ex")
def upcycle(checkpoint: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Make a mixture of experts of a dense checkpoint.

    Each chosen MLP is copied for every expert and a router is drawn; everything else stays. The result is written in a
    format that transformers loads as it is, and the report says how far it is from the dense model and who loads it.
    """
    from surgery.cli import render

    report = surgery.upcycle(checkpoint, progress=make_progress(quiet), **options)
    render.present(report, as_json, quiet)


@click.command(
    epilog="""\b
Examples:
  surgery dense model-moe-8x -o model-again   # the very bits, if nobody has trained it
  surgery dense moe -o dense --expert 3
  surgery dense moe -o dense --average --to mistral"""
)
@click.argument("checkpoint", metavar="CHECKPOINT", type=click.Path())
@click.option("--expert", type=click.IntRange(0), help="Expert to take.  [default: the first, if all are the same]")
@click.option("--average", is_flag=True, help="Take the mean of all experts.")
@click.option("--to", metavar="TYPE", help="Dense model type.  [default: as on record, else the first that fits]")
@click.option("--drop-shared", is_flag=True, help="Leave out a shared expert that is not silent.")
@click.option("--shard-size", "shard_bytes", type=Size(least=LEAST_SHARD), help="Largest weight file.  [default: 5GB]")
@writing
def dense(checkpoint: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Make a dense checkpoint of a mixture of experts.

    Every mixture becomes one MLP: the one that all its experts are, one of them, or their mean. Routers and what else a
    dense model has no place for are left out, and the report says so.
    """
    from surgery.cli import render

    report = surgery.dense(checkpoint, progress=make_progress(quiet), **options)
    render.present(report, as_json, quiet)
