"""Commands that plan a training run: estimate."""

from __future__ import annotations

from typing import Any

import click

import surgery
from surgery.cli.methods import given_options, method_options
from surgery.cli.options import reporting

_WIDTH = click.FloatRange(0, 64)


@click.command(
    epilog="""\b
Examples:
  surgery estimate model --method lora --rank 8
  surgery estimate model --method full --length 4096 --checkpointing --devices 8 --sharding full
  surgery estimate model --method lora --targets q_proj,v_proj --weight-bytes 0.5
  surgery estimate model --method adapter-h --rank 64 --no-head --json"""
)
@click.argument("checkpoint", metavar="CHECKPOINT", type=click.Path())
@method_options
@click.option(
    "--task",
    metavar="TASK",
    help="causal-lm, classification, seq2seq or image-classification.  [default: as its config says]",
)
@click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True, help="Rows on each device.")
@click.option("--length", type=click.IntRange(1), help="Tokens of a row.  [default: 512, or as many as it can take]")
@click.option("--checkpointing", is_flag=True, help="Compute each layer's activations again in the backward pass.")
@click.option(
    "--no-activations",
    "activations",
    flag_value=False,
    default=True,
    help="Leave them out; a large model takes seconds for them.",
)
@click.option("--devices", type=click.IntRange(1), default=1, show_default=True, help="That share the work.")
@click.option(
    "--sharding",
    type=click.Choice(["none", "optimizer", "gradients", "full"]),
    default="none",
    show_default=True,
    help="What devices share out: ZeRO-1, ZeRO-2, ZeRO-3 or FSDP.",
)
@click.option("--weight-bytes", type=_WIDTH, help="Width of the model's weights.  [default: as its config says]")
@click.option(
    "--trained-bytes", type=_WIDTH, help="Width of what is trained.  [default: 4 for adapters, else the weights']"
)
@click.option("--master-bytes", type=_WIDTH, default=0.0, show_default=True, help="Width of a second copy of it.")
@click.option("--gradient-bytes", type=_WIDTH, help="Width of gradients.  [default: of what is trained]")
@click.option(
    "--optimizer-bytes",
    type=_WIDTH,
    default=8.0,
    show_default=True,
    help="Of the optimiser's states together: 8 for AdamW, 4 in bfloat16, 2 in 8 bits.",
)
@reporting
def estimate(checkpoint: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Say what a training run would take: parameters, bytes, memory.

    Nothing is loaded: config.json is enough. Trained parameters are counted on the model without weights, and
    activations by a step on it, in which every tensor has a shape and no data.
    """
    from surgery.cli import render

    render.present(surgery.estimate(checkpoint, **given_options(options)), as_json, quiet)
