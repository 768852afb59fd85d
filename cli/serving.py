"""Commands that serve a registry and administer the server."""

from __future__ import annotations

from pathlib import Path

import click

from surgery.cli.options import Command, Size, reporting

_folder = click.option(
    "--data", required=True, type=click.Path(path_type=Path), metavar="DIR", help="The registry's folder."
)


def _where(command: Command) -> Command:
    """`--data` or `--endpoint`: which server is administered."""
    data = click.option(
        "--data", type=click.Path(path_type=Path), metavar="DIR", help="The registry's folder, on this machine."
    )
    endpoint = click.option(
        "--endpoint", metavar="URL", help="The server's address; HF_TOKEN, or the log-in, is its administrator's."
    )
    return data(endpoint(command))


@click.command(
    epilog="""\b
Examples:
  surgery hub serve --data registry
  surgery hub serve --data registry --host 0.0.0.0 --port 80 --url https://hub.example.org
  surgery hub serve --data registry --pickle refuse --quota 500GB --log json"""
)
@_folder
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", default=8765, show_default=True, type=click.IntRange(0, 65535), help="Port; 0 is any free one.")
@click.option("--url", help="Address under which clients reach the server, if that is another.")
@click.option(
    "--pickle",
    default="flag",
    show_default=True,
    type=click.Choice(["allow", "flag", "refuse"]),
    help="What to do with pickles, which run code.",
)
@click.option("--quota", type=Size(1), metavar="SIZE", help="What a namespace may keep, as 500GB.  [default: any]")
@click.option("--max-file-size", type=Size(1), metavar="SIZE", help="What a file may have.  [default: any]")
@click.option(
    "--rate-limit",
    default=6000,
    show_default=True,
    type=click.IntRange(0),
    help="Requests a minute for each user and address; 0 is any number.",
)
@click.option(
    "--log", default="text", show_default=True, type=click.Choice(["text", "json", "none"]), help="How to log requests."
)
@click.option(
    "--trust-proxy",
    "proxies",
    multiple=True,
    metavar="ADDRESS",
    help="Believe this proxy's X-Forwarded-For and -Proto; may be given again.",
)
@click.option("--gc-every", type=float, metavar="HOURS", help="Collect garbage so often, as `hub gc` does.")
def serve(
    data: Path,
    host: str,
    port: int,
    url: str | None,
    pickle: str,
    quota: int | None,
    max_file_size: int | None,
    rate_limit: int,
    log: str,
    proxies: tuple[str, ...],
    gc_every: float | None,
) -> None:
    """Serve a registry to every Hugging Face client.

    Clients need nothing but HF_ENDPOINT and a token. The first start makes the user admin and prints a token for it,
    this one time, unless SURGERY_HUB_ADMIN_TOKEN has one. The folder may go on being used by push and pull meanwhile.
    """
    from surgery.hub.server.policy import Policy
    from surgery.hub.server.run import ServeOptions, Started
    from surgery.hub.server.run import serve as run

    def ready(started: Started) -> None:
        if started.token is not None:
            click.echo(f"Token of admin, shown this once: {started.token}")
        click.echo(f"Serving {data} at {url or started.url}; HF_ENDPOINT={url or started.url}")

    policy = Policy(pickle=pickle, quota=quota, max_file=max_file_size)
    options = ServeOptions(
        data=data, host=host, port=port, url=url, policy=policy, rate=rate_limit, log=log, proxies=proxies,
        gc_every=gc_every,
    )  # fmt: skip
    run(options, ready)


@click.group(
    epilog="""\b
Examples:
  surgery hub user add ada --data registry
  surgery hub user list --endpoint https://hub.example.org"""
)
def user() -> None:
    """Users of a server."""


@user.command(
    "add",
    epilog="""\b
Examples:
  surgery hub user add ada --data registry
  surgery hub user add bob --endpoint https://hub.example.org""",
)
@click.argument("name")
@_where
@reporting
def add_user(name: str, data: Path | None, endpoint: str | None, as_json: bool, quiet: bool) -> None:
    """Make a user."""
    from surgery.cli import render_serving
    from surgery.cli.tables import show
    from surgery.hub.server.administration import administering

    with administering(data, endpoint) as server:
        report = server.add_user(name)
    show(report, lambda console: render_serving.namespace(console, report), as_json, quiet)


@user.command(
    "list",
    epilog="""\b
Examples:
  surgery hub user list --data registry
  surgery hub user list --endpoint https://hub.example.org --json""",
)
@_where
@reporting
def list_users(data: Path | None, endpoint: str | None, as_json: bool, quiet: bool) -> None:
    """List users, and organisations with their members."""
    from surgery.cli import render_serving
    from surgery.cli.tables import show
    from surgery.hub.server.administration import administering

    with administering(data, endpoint) as server:
        report = server.namespaces()
    show(report, lambda console: render_serving.namespaces(console, report), as_json, quiet)


@click.group(
    epilog="""\b
Examples:
  surgery hub org add lab --member ada --data registry
  surgery hub org member add lab bob --endpoint https://hub.example.org"""
)
def org() -> None:
    """Organisations of a server."""


@org.command(
    "add",
    epilog="""\b
Examples:
  surgery hub org add lab --member ada --member bob --data registry
  surgery hub org add closed --member ada --private-by-default --endpoint https://hub.example.org""",
)
@click.argument("name")
@click.option("--member", "members", multiple=True, metavar="USER", help="A member; may be given again.")
@click.option("--private-by-default", is_flag=True, help="What is made here is private unless told otherwise.")
@_where
@reporting
def add_org(
    name: str,
    members: tuple[str, ...],
    private_by_default: bool,
    data: Path | None,
    endpoint: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Make an organisation."""
    from surgery.cli import render_serving
    from surgery.cli.tables import show
    from surgery.hub.server.administration import administering

    with administering(data, endpoint) as server:
        report = server.add_organisation(name, members, private_by_default)
    show(report, lambda console: render_serving.namespace(console, report), as_json, quiet)


@org.command(
    epilog="""\b
Examples:
  surgery hub org member add lab bob --data registry
  surgery hub org member remove lab bob --endpoint https://hub.example.org"""
)
@click.argument("change", type=click.Choice(["add", "remove"]))
@click.argument("organisation")
@click.argument("name", metavar="USER")
@_where
@reporting
def member(
    change: str, organisation: str, name: str, data: Path | None, endpoint: str | None, as_json: bool, quiet: bool
) -> None:
    """Take a user into an organisation, or out of it."""
    from surgery.cli import render_serving
    from surgery.cli.tables import show
    from surgery.hub.server.administration import administering

    with administering(data, endpoint) as server:
        report = server.set_member(organisation, name, change == "add")
    show(report, lambda console: render_serving.members(console, report), as_json, quiet)


@click.group(
    epilog="""\b
Examples:
  surgery hub token create --user ada --role write --data registry
  surgery hub token list --endpoint https://hub.example.org"""
)
def token() -> None:
    """Tokens of a server's users."""


@token.command(
    "create",
    epilog="""\b
Examples:
  surgery hub token create --user ada --role write --data registry
  surgery hub token create --user ada --role read --repo lab/style --expires 30 --endpoint https://hub.example.org""",
)
@click.option("--user", "name", required=True, metavar="NAME", help="Whose token it is.")
@click.option("--role", required=True, type=click.Choice(["read", "write", "admin"]), help="What it allows.")
@click.option("--repo", metavar="ID", help="The one repository that it is for.  [default: all]")
@click.option("--expires", type=int, metavar="DAYS", help="After so many days it is not valid.  [default: never]")
@click.option("--value-from-env", metavar="VAR", help="Take the token from this variable; do not print one.")
@_where
@reporting
def create_token(
    name: str,
    role: str,
    repo: str | None,
    expires: int | None,
    value_from_env: str | None,
    data: Path | None,
    endpoint: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Make a token, and print it this once: only its hash is kept."""
    from surgery.cli import render_serving
    from surgery.cli.tables import show
    from surgery.hub.server.administration import administering, given_token

    label = value_from_env or "token create"
    with administering(data, endpoint) as server:
        report = server.create_token(name, role, repo, expires, given_token(value_from_env), label)
    show(report, lambda console: render_serving.token(console, report), as_json, quiet)


@token.command(
    "list",
    epilog="""\b
Examples:
  surgery hub token list --data registry
  surgery hub token list --user ada --endpoint https://hub.example.org""",
)
@click.option("--user", "name", metavar="NAME", help="Whose.  [default: everybody's]")
@_where
@reporting
def list_tokens(name: str | None, data: Path | None, endpoint: str | None, as_json: bool, quiet: bool) -> None:
    """List tokens by their ids; what they are is on record as a hash only."""
    from surgery.cli import render_serving
    from surgery.cli.tables import show
    from surgery.hub.server.administration import administering

    with administering(data, endpoint) as server:
        report = server.tokens(name)
    show(report, lambda console: render_serving.tokens(console, report), as_json, quiet)


@token.command(
    "revoke",
    epilog="""\b
Examples:
  surgery hub token revoke 3f9a02c81be4 --data registry
  surgery hub token revoke 3f9a02c81be4 --endpoint https://hub.example.org""",
)
@click.argument("number", metavar="ID")
@_where
@reporting
def revoke_token(number: str, data: Path | None, endpoint: str | None, as_json: bool, quiet: bool) -> None:
    """Take a token away. What it signed for Xet and LFS stays valid for up to an hour."""
    from surgery.cli import render_serving
    from surgery.cli.tables import show
    from surgery.hub.server.administration import administering

    with administering(data, endpoint) as server:
        report = server.revoke_token(number)
    show(report, lambda console: render_serving.revoked(console, report), as_json, quiet)
