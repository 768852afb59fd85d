"""Shell completion."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from surgery.errors import OptionError


@click.command(
    epilog="""\b
Examples:
  surgery completion bash >> ~/.bashrc
  surgery completion zsh  >> ~/.zshrc
  surgery completion fish >  ~/.config/fish/completions/surgery.fish"""
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a script that completes this command in a shell."""
    from surgery.cli.main import cli

    made = get_completion_class(shell)
    if made is None:
        raise OptionError(f"There is no completion for {shell}.")
    click.echo(made(cli, {}, "surgery", "_SURGERY_COMPLETE").source())
