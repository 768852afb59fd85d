"""The options that say what is trained: `--method` and those beside it, for every command that trains or plans to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


def method_options(command: Command) -> Command:
    """Add them all; see `given_options` for what of them was given."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def given_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those that were given: what is None or empty was not, so that a recipe, or the library's default, decides."""
    return {name: value for name, value in options.items() if value is not None and value != ()}


def _rates(
    _context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]
) -> tuple[tuple[str, float], ...]:
    from surgery.training.methods.options import parse_rate

    return tuple(parse_rate(value) for value in values)


_OPTIONS = [
    click.option(
        "--method",
        metavar="METHOD",
        help="lora, full, top:N (the last N layers), bitfit, prompt, prefix, adapter-h, adapter-l, lora+prompt, "
        "lora+prefix, router, experts, or selected.  [default: lora; selected with --train]",
    ),
    click.option("--rank", type=click.IntRange(1), help="Of LoRA, and the bottleneck of adapters.  [default: 16]"),
    click.option("--alpha", type=float, help="Of LoRA.  [default: 32; 8 with --rslora]"),
    click.option("--targets", help="Where LoRA acts: words, suffixes, re:PATTERN.  [default: all-linear]"),
    click.option("--dropout", type=float, help="LoRA: before A.  [default: 0]"),
    click.option("--rslora", is_flag=True, default=None, help="LoRA: scale by alpha/sqrt(rank)."),
    click.option("--dora", is_flag=True, default=None, help="LoRA: train magnitudes apart from directions."),
    click.option("--pissa", is_flag=True, default=None, help="LoRA: begin with the weights' leading singular vectors."),
    click.option("--lora-plus", type=float, help="LoRA: learning rate of B over A's.  [default: 1]"),
    click.option("--prompt-tokens", type=int, help="Virtual tokens before the input.  [default: 8]"),
    click.option("--infix-tokens", type=int, help="Virtual tokens between prompt and completion."),
    click.option(
        "--train",
        multiple=True,
        metavar="PATTERN[=FACTOR]",
        callback=_rates,
        help="Train parameters in whose names PATTERN is found, at FACTOR times the learning rate; may be repeated.",
    ),
    click.option(
        "--freeze", multiple=True, metavar="PATTERN", help="Do not train those in whose names it is found; likewise."
    ),
    click.option("--no-head", "head", flag_value=False, default=None, help="Leave a classifier's head as it is."),
]
