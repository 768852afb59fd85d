"""Commands that serve a registry and administer the server."""

from __future__ import annotations

from pathlib import Path

import click

from surgery.cli.options import reporting

_data = click.option(
    "--data", required=True, type=click.Path(path_type=Path), metavar="DIR", help="The registry's folder."
)


@click.command(
    epilog="""\b
Examples:
  surgery hub serve --data registry
  surgery hub serve --data registry --host 0.0.0.0 --port 80 --url https://hub.example.org"""
)
@_data
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", default=8765, show_default=True, type=click.IntRange(0, 65535), help="Port; 0 is any free one.")
@click.option("--url", help="Address under which clients reach the server, if that is another.")
@click.option("--gc-every", type=float, metavar="HOURS", help="Collect garbage so often, as `hub gc` does.")
def serve(data: Path, host: str, port: int, url: str | None, gc_every: float | None) -> None:
    """Serve a registry to every Hugging Face client.

    Clients need nothing but HF_ENDPOINT and a token. The first start makes the user admin and prints a token for it,
    this one time, unless SURGERY_HUB_ADMIN_TOKEN has one. The folder may go on being used by push and pull meanwhile.
    """
    from surgery.hub.server.run import ServeOptions, Started
    from surgery.hub.server.run import serve as run

    def ready(started: Started) -> None:
        if started.token is not None:
            click.echo(f"Token of admin, shown this once: {started.token}")
        click.echo(f"Serving {data} at {url or started.url}; HF_ENDPOINT={url or started.url}")

    run(ServeOptions(data=data, host=host, port=port, url=url, gc_every=gc_every), ready)


@click.group(
    epilog="""\b
Examples:
  surgery hub user add ada --data registry
  surgery hub user add bob --data registry --json"""
)
def user() -> None:
    """Users of a server."""


@user.command(
    "add",
    epilog="""\b
Examples:
  surgery hub user add ada --data registry
  surgery hub user add bob --data registry --json""",
)
@click.argument("name")
@_data
@reporting
def add_user(name: str, data: Path, as_json: bool, quiet: bool) -> None:
    """Make a user."""
    from surgery.cli import render_hub
    from surgery.cli.tables import show
    from surgery.hub.server.run import add_user as add

    report = add(data, name)
    show(report, lambda console: render_hub.namespace(console, report), as_json, quiet)


@click.group(
    epilog="""\b
Examples:
  surgery hub org add lab --member ada --data registry
  surgery hub org add closed --private-by-default --data registry"""
)
def org() -> None:
    """Organisations of a server."""


@org.command(
    "add",
    epilog="""\b
Examples:
  surgery hub org add lab --member ada --member bob --data registry
  surgery hub org add closed --member ada --private-by-default --data registry""",
)
@click.argument("name")
@click.option("--member", "members", multiple=True, metavar="USER", help="A member; may be given again.")
@click.option("--private-by-default", is_flag=True, help="What is made here is private unless told otherwise.")
@_data
@reporting
def add_org(
    name: str, members: tuple[str, ...], private_by_default: bool, data: Path, as_json: bool, quiet: bool
) -> None:
    """Make an organisation."""
    from surgery.cli import render_hub
    from surgery.cli.tables import show
    from surgery.hub.server.run import add_organisation

    report = add_organisation(data, name, members, private_by_default)
    show(report, lambda console: render_hub.namespace(console, report), as_json, quiet)


@click.group(
    epilog="""\b
Examples:
  surgery hub token create --user ada --role write --data registry
  surgery hub token create --user ada --role read --expires 30 --data registry"""
)
def token() -> None:
    """Tokens of a server's users."""


@token.command(
    "create",
    epilog="""\b
Examples:
  surgery hub token create --user ada --role write --data registry
  surgery hub token create --user ada --role read --repo lab/style --expires 30 --data registry""",
)
@click.option("--user", "name", required=True, metavar="NAME", help="Whose token it is.")
@click.option("--role", required=True, type=click.Choice(["read", "write", "admin"]), help="What it allows.")
@click.option("--repo", metavar="ID", help="The one repository that it is for.  [default: all]")
@click.option("--expires", type=int, metavar="DAYS", help="After so many days it is not valid.  [default: never]")
@click.option("--value-from-env", metavar="VAR", help="Take the token from this variable; do not print one.")
@_data
@reporting
def create_token(
    name: str,
    role: str,
    repo: str | None,
    expires: int | None,
    value_from_env: str | None,
    data: Path,
    as_json: bool,
    quiet: bool,
) -> None:
    """Make a token, and print it this once: only its hash is kept."""
    from surgery.cli import render_hub
    from surgery.cli.tables import show
    from surgery.hub.server.run import create_token as create

    report = create(data, name, role, repo, expires, value_from_env)
    show(report, lambda console: render_hub.token(console, report), as_json, quiet)
