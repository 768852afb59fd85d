"""Options that commands share, and the types that parse them."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import click

Command = TypeVar("Command", bound=Callable[..., Any])
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[KMGT]i?B?|B)?", re.IGNORECASE)
# Powers of a thousand: of bytes, and of parameters.
_BYTES = {"B": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_PARAMETERS = {"": 0, "K": 1, "M": 2, "B": 3}

# No shard is meant to be smaller; who types 5 means 5GB.
LEAST_SHARD = 10_000
SHARDS = "Largest weight file, such as 5GB.  [default: split as {} is]"


class Size(click.ParamType[int]):
    """Bytes: `5GB` (10^9), `5GiB` (2^30), or a plain number; at least `least`."""

    name = "size"

    def __init__(self, least: int = 0) -> None:
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(str(value).strip())
        if match is None:
            self.fail(f"{value!r} is not a size such as 5GB, 500MB or 2GiB.", param, ctx)
        unit = (match["unit"] or "B").upper()
        base = 1024 if "I" in unit else 1000
        size = int(float(match["number"]) * base ** _BYTES[unit[0]])
        if size < self.least:
            self.fail(
                f"{value!r} is {size} bytes, expected at least {self.least}; write a unit, as in 5GB.", param, ctx
            )
        return size


class Count(click.ParamType[int]):
    """A number of parameters: `18M`, `1.5B`, `300K`, or a plain number."""

    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMB])?", str(value).strip(), re.IGNORECASE)
        if match is None:
            self.fail(f"{value!r} is not a number of parameters such as 18M.", param, ctx)
        return int(float(match[1]) * 1000 ** _PARAMETERS[(match[2] or "").upper()])


class Rank(click.ParamType[int | str]):
    """A rank, or `best`."""

    name = "rank"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == "best":
            return "best"
        if not str(value).isdecimal() or int(value) < 1:
            self.fail(f"{value!r} is not a rank: a number of at least 1, or best.", param, ctx)
        return int(value)


def restoring(command: Command) -> Command:
    """The options of a command whose output is proved by hashes."""
    return _apply(reporting(resumable(command)), _writing_options())


def writing(command: Command) -> Command:
    """The options of every other command that writes."""
    return _hashing(command, _writing_options())


def writing_beside(default: str) -> Callable[[Command], Command]:
    """Those of a command that has a name for its output where none is given."""
    output = click.option("-o", "--output", type=click.Path(), help=f"Folder to write.  [default: {default}]")
    return lambda command: _hashing(command, [output, *_writing_options()[1:]])


def _hashing(command: Command, options: list[Decorator]) -> Command:
    hashing = click.option(
        "--no-hash",
        "hash",
        flag_value=False,
        default=True,
        help="Skip hashes: faster, but verify cannot check the output.",
    )
    return _apply(reporting(resumable(command)), [*options[:-1], hashing, options[-1]])


def _writing_options() -> list[Decorator]:
    return [
        click.option("-o", "--output", required=True, type=click.Path(), help="Folder to write; must not exist."),
        click.option("--overwrite", is_flag=True, help="Replace an output that exists."),
        click.option("--dry-run", is_flag=True, help="Check everything, show the plan, write nothing."),
        click.option("--threads", type=click.IntRange(1), help="Tensors at a time.  [default: processors, at most 8]"),
    ]


def resumable(command: Command) -> Command:
    """A command that says, when it is interrupted, whether there is something to go on from."""

    @functools.wraps(command)
    def run(*arguments: Any, output: str | None, **options: Any) -> Any:
        try:
            return command(*arguments, output=output, **options)
        except KeyboardInterrupt as error:
            from surgery.writer import staging_folder

            click.echo(err=True)  # as click does: the terminal has just shown ^C
            raise Interrupted(staging_folder(Path(output or "."))) from error

    return cast("Command", run)


class Interrupted(click.Abort):
    """An interrupt of work that stages its output in `folder`."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder


def reporting(command: Command) -> Command:
    """The options of every command that reports."""
    options: list[Decorator] = [
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else on stdout."),
        click.option("-q", "--quiet", is_flag=True, help="No progress and no report; warnings stay."),
    ]
    return _apply(command, options)


def listing(what: str) -> Callable[[Command], Command]:
    """`--all`, with what the command lists."""
    return click.option("--all", "every", is_flag=True, help=f"List every {what}, however many there are.")


def device(default: str) -> Callable[[Command], Command]:
    """`--device`, with the default of the command."""
    return click.option(
        "--device", default=default, show_default=True, metavar="auto|cpu|cuda[:N]", help="Where to compute."
    )


def factor_dtype(command: Command) -> Command:
    """`--dtype` of commands that write factors."""
    option = click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16"]),
        default="float32",
        show_default=True,
        help="How the factors are stored; bfloat16 halves the size.",
    )
    return option(command)


def _apply(command: Command, options: Sequence[Decorator]) -> Command:
    """Apply decorators so that `--help` lists their options in this order."""
    for option in reversed(options):
        command = cast("Command", option(command))
    return command
