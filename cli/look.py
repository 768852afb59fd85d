"""Commands that only look: inspect, verify."""

from __future__ import annotations

import sys

import click

import surgery
from surgery.cli.options import listing, reporting
from surgery.cli.progress import make_progress


@click.command(
    epilog="""\b
Examples:
  surgery inspect checkpoint
  surgery inspect adapter --tensors
  surgery inspect org/model@v1 --json"""
)
@click.argument("path", metavar="PATH", type=click.Path())
@click.option("--tensors", is_flag=True, help="List every tensor.")
@reporting
def inspect(path: str, tensors: bool, as_json: bool, quiet: bool) -> None:
    """Say what a checkpoint or an adapter is.

    From its headers alone: family, tensors, dtypes, shards, parameters by part, experts; of an adapter rank, scale and
    targets; provenance.
    """
    from surgery.cli import render

    render.present(surgery.inspect(path, tensors=tensors), as_json, quiet)


@click.command(
    epilog="""\b
Examples:
  surgery verify merged                  # does it still match its surgery.json?
  surgery verify merged other            # which tensors differ, and by how much?
  surgery verify merged other --logits   # and how far apart are they as functions?"""
)
@click.argument("left", metavar="A", type=click.Path())
@click.argument("right", metavar="[B]", required=False, type=click.Path())
@click.option("--logits", is_flag=True, help="Run both with transformers, in float32, on the same random inputs.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random inputs.")
@listing("difference")
@reporting
def verify(left: str, right: str | None, logits: bool, seed: int, every: bool, as_json: bool, quiet: bool) -> None:
    """Check an output against its provenance, or compare two checkpoints.

    With one argument, hash every tensor and file again and compare with surgery.json. With two, compare tensor by
    tensor. Exits with 1 if anything differs.
    """
    from surgery.cli import render

    report = surgery.verify(left, right, logits=logits, seed=seed, progress=make_progress(quiet))
    render.present(report, as_json, quiet, every)
    if not report.passed:
        sys.exit(1)
