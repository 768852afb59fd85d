"""Commands that make adapters of adapters: combine, resize."""

from __future__ import annotations

from typing import Any

import click

import surgery
from surgery.cli.options import device, factor_dtype, listing, writing
from surgery.cli.progress import make_progress

_METHODS = ("sum", "cat", "ties", "dare-ties", "dare-linear", "magnitude-prune", "tsv", "iso", "linear")


@click.command(
    epilog="""\b
Methods:
  sum              the weighted sum of all dW; the best adapter of the rank
  cat              the same, exactly: the ranks add up
  ties             largest entries of each dW, sign by majority, mean of those that agree
  dare-ties        the same with random entries, divided by the density
  dare-linear      sum of random entries of each dW, divided by the density
  magnitude-prune  sum of the largest entries of each dW
  tsv              singular vectors of the adapters made orthogonal to each other's
  iso              the sum with all its singular values made equal
  linear           with --as-peft only: sum of A times sum of B

\b
Examples:
  surgery combine style facts -o both
  surgery combine style=0.7 facts=0.3 -o both --rank 32
  surgery combine tuned forget=-1 -o without --energy 0.99
  surgery combine a b c -o merged --method ties --density 0.2"""
)
@click.argument("adapters", metavar="ADAPTER[=WEIGHT]...", nargs=-1, required=True)
@click.option("--method", type=click.Choice(_METHODS), default="sum", show_default=True, help="How; see below.")
@click.option("--rank", type=click.IntRange(1), help="Rank of every module.  [default: the largest of the adapters']")
@click.option("--energy", type=click.FloatRange(0, 1, min_open=True), help="Keep this share of each dW instead.")
@click.option(
    "--density",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.5,
    show_default=True,
    help="Share of the entries that ties, dare and magnitude-prune keep.",
)
@click.option("--as-peft", is_flag=True, help="Do it to A and B separately, as PEFT's add_weighted_adapter.")
@factor_dtype
@click.option("--drop-saved", is_flag=True, help="Leave out what adapters store whole (modules_to_save).")
@click.option("--any-base", is_flag=True, help="Combine adapters that name different bases.")
@click.option("--base-name", metavar="NAME", help="What the result calls its base.  [default: as the first]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of DARE and of the randomised SVD.")
@listing("module")
@device("cpu")
@writing
def combine(adapters: tuple[str, ...], every: bool, as_json: bool, quiet: bool, **options: Any) -> None:
    """Combine adapters into one.

    Each counts with its weight, which may be negative. Ranks, scales and targets may differ; no base is
    needed. Works on dW = B A, without forming it where the method allows, and says what the rank loses.
    """
    from surgery.cli import render

    report = surgery.combine(*adapters, progress=make_progress(quiet), **options)
    render.present(report, as_json, quiet, every)


@click.command(
    epilog="""\b
Examples:
  surgery resize adapter --rank 8 -o smaller
  surgery resize adapter --energy 0.95 -o smaller"""
)
@click.argument("adapter", metavar="ADAPTER")
@click.option("--rank", type=click.IntRange(1), help="Rank of every module.")
@click.option(
    "--energy", type=click.FloatRange(0, 1, min_open=True), help="Keep this share of each module's dW instead."
)
@factor_dtype
@click.option("--drop-saved", is_flag=True, help="Leave out what the adapter stores whole (modules_to_save).")
@click.option("--base-name", metavar="NAME", help="What the result calls its base.  [default: as ADAPTER]")
@listing("module")
@device("cpu")
@writing
def resize(adapter: str, every: bool, as_json: bool, quiet: bool, **options: Any) -> None:
    """Bring an adapter to another rank.

    The nearest adapter of the rank, from the factors alone. What the adapter stores whole goes along.
    """
    from surgery.cli import render

    report = surgery.resize(adapter, progress=make_progress(quiet), **options)
    render.present(report, as_json, quiet, every)
