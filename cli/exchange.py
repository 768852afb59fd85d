"""Commands about other tools: convert, lint."""

from __future__ import annotations

import sys
from typing import Any

import click

import surgery
from surgery.cli.options import reporting, writing
from surgery.cli.progress import make_progress

_COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


@click.command(
    epilog="""\b
Examples:
  surgery convert style.safetensors --to peft --base unet -o style
  surgery convert adapter --to mlx -o adapter-mlx
  surgery convert adapter --to peft --experts per-expert --base model -o adapter-per-expert
  surgery convert adapter --to peft --portable -o adapter-portable"""
)
@click.argument("adapter", metavar="ADAPTER")
@click.option(
    "--to", required=True, type=click.Choice(["peft", "kohya", "diffusers", "mlx"]), help="The format to write."
)
@click.option("--base", metavar="CHECKPOINT", help="Its model, or a pipeline's folder: where names depend on it.")
@click.option(
    "--experts",
    type=click.Choice(["fused", "per-expert"]),
    help="LoRAs on experts as transformers 5 has them in memory, or one module for each expert.",
)
@click.option("--component", type=click.Choice(_COMPONENTS), help="Which part of a pipeline it is for.")
@click.option("--portable", is_flag=True, help="Fold scales into B: no alpha_pattern, no rsLoRA, one lora_alpha.")
@click.option("--pad-ranks", is_flag=True, help="Fill up all modules with zeros to the largest rank.")
@click.option("--base-name", metavar="NAME", help="What the result calls its base.  [default: what ADAPTER calls it]")
@writing
def convert(adapter: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Write an adapter as another tool has it.

    ADAPTER is a PEFT folder, a LoRA file of kohya or diffusers, or an mlx-lm folder. What it adds to each weight stays
    the same; numbers move as bytes wherever the target can express their scale.
    """
    from surgery.cli import render

    report = surgery.convert(adapter, progress=make_progress(quiet), **options)
    render.present(report, as_json, quiet)


@click.command(
    epilog="""\b
Examples:
  surgery lint adapter
  surgery lint adapter --for vllm,llama.cpp --base model
  surgery lint merged --for peft,vllm,llama.cpp,mlx --json"""
)
@click.argument("path", metavar="PATH")
@click.option(
    "--for",
    "consumers",
    default="peft,vllm,llama.cpp",
    show_default=True,
    metavar="NAMES",
    help="Comma-separated: peft, vllm, llama.cpp, mlx, sglang, lorax.",
)
@click.option("--base", metavar="CHECKPOINT", help="The model of an adapter: some rules depend on it.")
@reporting
def lint(path: str, consumers: str, base: str | None, as_json: bool, quiet: bool) -> None:
    """Say what other tools would refuse, or silently get wrong.

    PATH is an adapter of any format, or a checkpoint. Each finding comes with its source and the command that mends it.
    Exits with 1 if a tool named in --for would refuse it or get it wrong.
    """
    from surgery.cli import render

    report = surgery.lint(path, consumers=consumers, base=base)
    render.present(report, as_json, quiet)
    if not report.passed:
        sys.exit(1)
