"""The `surgery` command: its group, and how errors become one sentence and an exit status.

Commands are imported when they are called, so that `surgery --help` costs little more than importing click.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from surgery.errors import OptionError, SurgeryError
from surgery.names import plain
from surgery.version import __version__

# Name: where it is defined, and its line in `surgery --help` (a test holds it against the command's own).
COMMANDS: dict[str, tuple[str, str]] = {
    "inspect": ("surgery.cli.look:inspect", "Say what a checkpoint or an adapter is."),
    "extract": ("surgery.cli.adapters:extract", "Extract a LoRA adapter from the difference of two checkpoints."),
    "restore": ("surgery.cli.adapters:restore", "Restore a fine-tune from its base and an exact extraction."),
    "merge": ("surgery.cli.adapters:merge", "Merge adapters into a checkpoint."),
    "subtract": ("surgery.cli.adapters:subtract", "Take adapters out of a merged checkpoint."),
    "switch": ("surgery.cli.adapters:switch", "Take one adapter out of a merged checkpoint and put another in."),
    "convert": ("surgery.cli.exchange:convert", "Write an adapter as another tool has it."),
    "lint": ("surgery.cli.exchange:lint", "Say what other tools would refuse, or silently get wrong."),
    "combine": ("surgery.cli.algebra:combine", "Combine adapters into one."),
    "resize": ("surgery.cli.algebra:resize", "Bring an adapter to another rank."),
    "upcycle": ("surgery.cli.mixtures:upcycle", "Make a mixture of experts of a dense checkpoint."),
    "dense": ("surgery.cli.mixtures:dense", "Make a dense checkpoint of a mixture of experts."),
    "estimate": (
        "surgery.cli.training_estimate:estimate",
        "Say what a training run would take: parameters, bytes, memory.",
    ),
    "train": (
        "surgery.cli.training:train",
        "Train a checkpoint, or an adapter of one, on texts, prompts, chats, labels or pictures.",
    ),
    "eval": ("surgery.cli.evaluation:evaluate", "Evaluate a checkpoint, and many adapters on it in one pass."),
    "verdicts": ("surgery.cli.evaluation:verdicts", "Count a judge's verdicts on blinded pairs of answers."),
    "analyze": (
        "surgery.cli.analysis:analyze",
        "Say how adapters relate to the weights they are for, or what the weights are.",
    ),
    "verify": ("surgery.cli.look:verify", "Check an output against its provenance, or compare two checkpoints."),
    "push": ("surgery.cli.hub:push", "Check a model or an adapter and commit it to a registry."),
    "pull": ("surgery.cli.hub:pull", "Fetch a model or an adapter from a registry into a folder."),
    "hub": ("surgery.cli.hub:hub", "Look into a registry and keep it in order."),
    "completion": ("surgery.cli.completion:completion", "Print a script that completes this command in a shell."),
}

INTERRUPTED = 130


class LazyGroup(click.Group):
    """A group that imports a command when it is called and knows its line of help without."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Run `surgery COMMAND --help` for its options and examples.",
)
@click.version_option(__version__, prog_name="surgery", message="%(prog)s %(version)s")
def cli() -> None:
    """Offline tools for stored model checkpoints.

    A CHECKPOINT is a folder, a .safetensors file, or an id `name/repo[@revision]` on a Hub; an ADAPTER likewise, with
    an optional weight: `path=0.5`. Nothing is ever written to an input, and an output appears whole or not at all.
    """


def main() -> NoReturn:
    """Run the command line and exit: 0 done, 1 a known error, 2 wrong usage, 130 interrupted."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit status."""
    try:
        status = cli.main(arguments, prog_name="surgery", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except click.exceptions.Exit as request:
        return request.exit_code
    except click.Abort as interrupt:
        click.echo(_interrupted(interrupt), err=True)
        return INTERRUPTED
    except click.ClickException as error:
        error.show()
        if "--json" in arguments:
            click.echo(_as_json(type(error).__name__, error.format_message()))
        return error.exit_code
    except SurgeryError as error:
        return _report(error, as_json="--json" in arguments)
    except BrokenPipeError:
        # The reader of stdout has gone; point it elsewhere so that the interpreter can flush in peace.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _interrupted(interrupt: click.Abort) -> str:
    """What is left of interrupted work, if anything is."""
    from surgery.cli.options import Interrupted

    if isinstance(interrupt, Interrupted) and interrupt.folder.exists():
        return f"Interrupted. What is done is in {plain(str(interrupt.folder))}; the same command goes on from there."
    return "Interrupted."


def _report(error: SurgeryError, as_json: bool) -> int:
    """One sentence on stderr, with a line for each of several problems; with --json also an object on stdout."""
    lines = [f"Error: {plain(error.message)}"]
    if len(error.problems) > 1:
        lines += [f"  {plain(problem)}" for problem in error.problems]
    click.echo("\n".join(lines), err=True)
    if as_json:
        click.echo(_as_json(type(error).__name__, error.message, error.problems))
    return 2 if isinstance(error, OptionError) else 1


def _as_json(kind: str, message: str, problems: Sequence[str] = ()) -> str:
    return json.dumps({"error": {"kind": kind, "message": message, "problems": list(problems)}})
