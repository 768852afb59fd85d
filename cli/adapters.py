"""Commands on adapters: extract, restore, merge, subtract, switch."""

from __future__ import annotations

from typing import Any

import click

import surgery
from surgery.cli.options import (
    LEAST_SHARD,
    SHARDS,
    Count,
    Rank,
    Size,
    device,
    factor_dtype,
    listing,
    restoring,
    writing,
)
from surgery.cli.progress import make_progress


@click.command(
    epilog="""\b
Examples:
  surgery extract base tuned -o adapter
  surgery extract base tuned -o adapter --rank 64 --targets attention
  surgery extract base tuned -o adapter --energy 0.95 --save-residual
  surgery extract org/base org/tuned@v2 -o adapter --budget 18M --dtype bfloat16
  surgery extract base tuned -o adapter --exact --rank best   # `surgery restore base adapter` gives tuned back"""
)
@click.argument("base", metavar="BASE", type=click.Path())
@click.argument("tuned", metavar="TUNED", type=click.Path())
@click.option("--rank", type=Rank(), metavar="N|best", help="Rank of every module (best: see --exact).  [default: 16]")
@click.option("--energy", type=click.FloatRange(0, 1, min_open=True), help="Keep this share of each change instead.")
@click.option("--budget", type=Count(), help="Total parameters, such as 18M, spread over modules for the least error.")
@click.option("--max-rank", type=click.IntRange(1), help="Bound on the ranks that --energy and --budget choose.")
@click.option(
    "--targets",
    default="all-linear",
    show_default=True,
    help="Comma-separated: all-linear, attention, mlp, experts, router, embeddings, head, convolutions, a suffix such "
    "as q_proj, or re:PATTERN.",
)
@click.option(
    "--method",
    type=click.Choice(["randomized", "exact"]),
    default="randomized",
    show_default=True,
    help="Randomised SVD with a certificate, or the full SVD.",
)
@factor_dtype
@click.option(
    "--exact",
    is_flag=True,
    help="Keep what the adapter misses, too, compressed, so that `surgery restore` gives TUNED back bit for bit; "
    "--rank best makes adapter and record smallest together.",
)
@click.option("--save-residual", is_flag=True, help="Store what changed and has no factors whole (modules_to_save).")
@click.option("--allow-missing", is_flag=True, help="Report tensors found in one checkpoint only; do not refuse.")
@click.option("--allow-nonfinite", is_flag=True, help="Count NaN and infinity as unchanged; do not refuse.")
@click.option("--any-base", is_flag=True, help="Extract even if BASE does not look like the base of TUNED.")
@click.option("--base-name", metavar="NAME", help="What the adapter calls its base.  [default: its id or folder]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the randomised SVD.")
@listing("module")
@device("auto")
@writing
def extract(base: str, tuned: str, every: bool, as_json: bool, quiet: bool, **options: Any) -> None:
    """Extract a LoRA adapter from the difference of two checkpoints.

    Factors TUNED - BASE by truncated SVD, module by module, and says what that loses. Norms, biases, embeddings and
    heads that changed are reported, and stored with --save-residual.
    """
    from surgery.cli import render

    report = surgery.extract(base, tuned, progress=make_progress(quiet), **options)
    render.present(report, as_json, quiet, every)


@click.command(
    epilog="""\b
Examples:
  surgery restore base adapter -o tuned       # after `surgery extract base tuned -o adapter --exact`
  surgery restore org/base adapter -o tuned --dry-run"""
)
@click.argument("base", metavar="BASE", type=click.Path())
@click.argument("adapter", metavar="ADAPTER", type=click.Path())
@restoring
def restore(base: str, adapter: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Restore a fine-tune from its base and an exact extraction.

    Every file of it, bit for bit, proved by the hashes in the adapter's exact record; another base is refused before
    any work.
    """
    from surgery.cli import render

    report = surgery.restore(base, adapter, progress=make_progress(quiet), **options)
    render.present(report, as_json, quiet)


@click.command(
    epilog="""\b
Examples:
  surgery merge base adapter -o merged
  surgery merge base adapter --reversible -o merged     # `surgery subtract merged` gives base back, bit for bit
  surgery merge base style=0.7 facts=0.3 -o merged"""
)
@click.argument("base", metavar="BASE", type=click.Path())
@click.argument("adapters", metavar="ADAPTER...", nargs=-1, required=True, type=click.Path())
@click.option("--reversible", is_flag=True, help="Write the record that makes `surgery subtract` exact.")
@click.option("--shard-size", "shard_bytes", type=Size(least=LEAST_SHARD), help=SHARDS.format("BASE"))
@click.option("--allow-nonfinite", is_flag=True, help="Let NaN and infinity pass; do not refuse.")
@click.option("--any-base", is_flag=True, help="Merge even if hashes prove that an adapter is for another base.")
@listing("weight")
@device("cpu")
@writing
def merge(base: str, adapters: tuple[str, ...], every: bool, as_json: bool, quiet: bool, **options: Any) -> None:
    """Merge adapters into a checkpoint.

    They are added in the order given, each with an optional weight: `path=0.5`. The bits are those of
    PEFT's merge_and_unload; the report says how much of each change survived the rounding.
    """
    from surgery.cli import render

    report = surgery.merge(base, *adapters, progress=make_progress(quiet), **options)
    render.present(report, as_json, quiet, every)


@click.command(
    epilog="""\b
Examples:
  surgery subtract merged -o base                       # a reversible merge: bit for bit
  surgery subtract merged style -o without-style        # one of several adapters
  surgery subtract merged adapter -o almost-base        # any other merge: the error is stated"""
)
@click.argument("merged", metavar="MERGED", type=click.Path())
@click.argument("adapters", metavar="[ADAPTER]...", nargs=-1, type=click.Path())
@click.option("--shard-size", "shard_bytes", type=Size(least=LEAST_SHARD), help=SHARDS.format("MERGED"))
@click.option("--allow-nonfinite", is_flag=True, help="Let NaN and infinity pass; do not refuse.")
@listing("weight")
@device("cpu")
@writing
def subtract(merged: str, adapters: tuple[str, ...], every: bool, as_json: bool, quiet: bool, **options: Any) -> None:
    """Take adapters out of a merged checkpoint.

    All of them, or those named. After `merge --reversible` the result is the base, bit for bit, proved by its
    hashes, which --no-hash does not turn off; what stays merged is merged anew and stays reversible. Otherwise the
    adapters are subtracted in float32 and the error is stated.
    """
    from surgery.cli import render

    report = surgery.subtract(merged, *adapters, progress=make_progress(quiet), **options)
    render.present(report, as_json, quiet, every)


@click.command(
    epilog="""\b
Examples:
  surgery switch merged old-adapter new-adapter -o switched
  surgery switch merged old-adapter new-adapter=0.5 -o switched"""
)
@click.argument("merged", metavar="MERGED", type=click.Path())
@click.argument("old", metavar="OLD", type=click.Path())
@click.argument("new", metavar="NEW", type=click.Path())
@click.option("--reversible", is_flag=True, help="Write an undo record (always done if MERGED has one).")
@click.option("--shard-size", "shard_bytes", type=Size(least=LEAST_SHARD), help=SHARDS.format("MERGED"))
@click.option("--allow-nonfinite", is_flag=True, help="Let NaN and infinity pass; do not refuse.")
@listing("weight")
@device("cpu")
@writing
def switch(merged: str, old: str, new: str, every: bool, as_json: bool, quiet: bool, **options: Any) -> None:
    """Take one adapter out of a merged checkpoint and put another in.

    OLD goes and NEW comes in one pass. After `merge --reversible` the result has the bits of merging NEW into the base
    itself, proved by hashes, which --no-hash does not turn off.
    """
    from surgery.cli import render

    report = surgery.switch(merged, old, new, progress=make_progress(quiet), **options)
    render.present(report, as_json, quiet, every)
