"""Commands that look into weights: analyze."""

from __future__ import annotations

from typing import Any

import click

import surgery
from surgery.cli.options import device, listing, reporting
from surgery.cli.progress import make_progress


@click.command(
    epilog="""\b
Examples:
  surgery analyze base                                  # spectra and effective ranks of W
  surgery analyze base adapter --plot adapter.html
  surgery analyze base rank8 rank64 --targets q_proj,v_proj --layers last:half
  surgery analyze base style facts --json > analysis.json"""
)
@click.argument("base", metavar="BASE", type=click.Path())
@click.argument("adapters", metavar="[ADAPTER[=WEIGHT]]...", nargs=-1)
@click.option(
    "--targets", metavar="LIST", help="Matrices, as for extract.  [default: all linear ones, or those of the adapters]"
)
@click.option(
    "--layers",
    metavar="LAYERS",
    default="all",
    show_default=True,
    help="all, last:N, last:half, every:N, or a list such as 0,4-7.",
)
@click.option(
    "--directions", type=click.IntRange(1), default=8, show_default=True, help="Tell phi(i, j) for i and j up to this."
)
@click.option(
    "--values", type=click.IntRange(4), default=64, show_default=True, help="List about so many singular values."
)
@click.option("--plot", metavar="FILE", type=click.Path(), help="Draw it, too: a .png or a .html file.")
@click.option("--overwrite", is_flag=True, help="Replace a picture that is there.")
@click.option("--threads", type=click.IntRange(1), help="Matrices at a time.  [default: processors, at most 8]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the randomised SVD of large matrices.")
@listing("matrix")
@device("cpu")
@reporting
def analyze(base: str, adapters: tuple[str, ...], every: bool, as_json: bool, quiet: bool, **options: Any) -> None:
    """Say how adapters relate to the weights they are for, or what the weights are.

    With adapters: how large each dW is, how many directions it has, whether W emphasises them (amplification), and how
    far the subspaces of two adapters, or of an adapter and W, are the same (phi), against what chance gives. Without:
    singular values and effective ranks of W. dW is never formed, and W is read matrix by matrix.
    """
    from surgery.cli import render

    report = surgery.analyze(base, *adapters, progress=make_progress(quiet), **options)
    render.present(report, as_json, quiet, every)
