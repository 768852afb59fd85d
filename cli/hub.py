"""Commands on registries: push, pull, and the group `hub`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.options import Command, reporting
from surgery.cli.progress import make_progress
from surgery.cli.serving import org, serve, token, user
from surgery.cli.upkeep import backup, fsck, gc, restore

if TYPE_CHECKING:
    from surgery.hub.endpoint import Endpoint

_ENDPOINT_HELP = "A Hub's address, `hf`, or `local`.  [default: {default}]"


def _endpoint(default: str) -> Callable[[Command], Command]:
    """`--endpoint`, with what it is by default."""
    return click.option("--endpoint", metavar="URL|hf|local", help=_ENDPOINT_HELP.format(default=default))


_writing_to = _endpoint("HF_ENDPOINT if set, else local")
_reading_from = _endpoint("local, then HF_ENDPOINT")


@click.command(
    epilog="""\b
Examples:
  surgery push adapter lab/style
  surgery push adapter lab/style@v2 --message "Rank 64"
  surgery push merged lab/merged --dry-run
  surgery push adapter user/style --endpoint hf --private"""
)
@click.argument("folder", metavar="FOLDER")
@click.argument("name", metavar="NAME[@BRANCH]")
@click.option("-m", "--message", help="Of the commit.  [default: what is pushed]")
@click.option("--private", is_flag=True, help="A repository that this push makes is private.")
@click.option("--allow-nonfinite", is_flag=True, help="Let NaN and infinity pass; do not refuse.")
@click.option("--dry-run", is_flag=True, help="Check everything, write nothing.")
@_writing_to
@reporting
def push(folder: str, name: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Check a model or an adapter and commit it to a registry.

    Refuses what would not load: damaged headers, NaN, a config that contradicts the tensors, ranks that do not fit, an
    adapter without a base. Adds a section to the commit's README.md; FOLDER itself stays as it is.
    """
    import surgery
    from surgery.cli import render_hub
    from surgery.cli.tables import show

    report = surgery.push(folder, name, progress=make_progress(quiet), **options)
    show(report, lambda console: render_hub.pushed(console, report), as_json, quiet)


@click.command(
    epilog="""\b
Examples:
  surgery pull lab/style -o adapter
  surgery pull lab/style@v2 -o adapter --check-base base
  surgery pull org/model -o model --endpoint hf"""
)
@click.argument("name", metavar="NAME[@REVISION]")
@click.option("-o", "--output", required=True, type=click.Path(), help="Folder to write; must not exist.")
@click.option("--overwrite", is_flag=True, help="Replace an output that exists.")
@click.option("--check-base", metavar="CHECKPOINT", help="Refuse unless hashes prove that the adapter is this base's.")
@click.option("--dry-run", is_flag=True, help="Say what would be fetched, write nothing.")
@_reading_from
@reporting
def pull(name: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Fetch a model or an adapter from a registry into a folder.

    Every file is proved by its hash. The folder appears whole or not at all, and a pull that was killed goes on where
    it stopped.
    """
    import surgery
    from surgery.cli import render_hub
    from surgery.cli.tables import show

    report = surgery.pull(name, progress=make_progress(quiet), **options)
    show(report, lambda console: render_hub.pulled(console, report), as_json, quiet)


@click.group(
    epilog="""\b
Examples:
  surgery hub list
  surgery hub info lab/style
  surgery hub delete lab/style"""
)
def hub() -> None:
    """Look into a registry and keep it in order.

    The local registry is a folder: the one that SURGERY_REGISTRY names, else checkpoint-surgery/registry in the user's
    data folder.
    """


@hub.command(
    "list",
    epilog="""\b
Examples:
  surgery hub list
  surgery hub list --kind adapter --base lab/base --rank 8..64
  surgery hub list --fits lab/base --sort size
  surgery hub list style --endpoint hf""",
)
@click.argument("words", metavar="[SEARCH]", required=False)
@click.option("--search", help="Words in name, tags, base or family; SEARCH is the same.")
@click.option("--kind", type=click.Choice(["adapter", "dense", "moe"]), help="What it is.")
@click.option("--base", metavar="ID", help="What it was made from; found by its weights under other names too.")
@click.option("--rank", metavar="N|N..M", help="Rank of an adapter's modules: 16, 8..64, 8.. or ..64.")
@click.option("--target", "targets", multiple=True, metavar="MODULE", help="A module that it changes; may be repeated.")
@click.option("--parameters", metavar="RANGE", help="How many it has: min:1M,max:2B, or one of the two.")
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="A tag as on the Hub; may be repeated.")
@click.option("--fits", metavar="ID[@REVISION]", help="Adapters that fit this base by shape.")
@click.option(
    "--sort",
    type=click.Choice(["updated", "created", "name", "parameters", "size"]),
    help="Order.  [default: name, of a Hub updated]",
)
@_writing_to
@reporting
def list_(
    words: str | None, search: str | None, endpoint: str | None, as_json: bool, quiet: bool, **conditions: Any
) -> None:
    """List what a registry holds; of it, what meets every condition.

    Rank, target, kind, fits and the like are known to the local registry and to a server of `surgery hub serve`; other
    Hubs know tags.
    """
    from surgery.cli import render_hub
    from surgery.cli.tables import show
    from surgery.hub.browsing import Wanted, list_repositories
    from surgery.hub.endpoint import endpoint_of

    wanted = Wanted(search=" ".join(part for part in (words, search) if part) or None, **conditions)
    report = list_repositories(endpoint_of(endpoint), wanted)
    show(report, lambda console: render_hub.listed(console, report), as_json, quiet)


@hub.command(
    epilog="""\b
Examples:
  surgery hub lineage lab/base
  surgery hub lineage lab/style --json"""
)
@click.argument("name", metavar="NAME")
@_reading_from
@reporting
def lineage(name: str, endpoint: str | None, as_json: bool, quiet: bool) -> None:
    """Show what a model was made from, and all that was made from it.

    Links come from adapter_config.json and surgery.json, through renames, and by the hash of the weights.
    """
    from surgery.cli import render_lineage
    from surgery.cli.tables import show
    from surgery.hub.browsing import lineage as family_of
    from surgery.hub.endpoint import endpoint_of

    report = family_of(name, endpoint_of(endpoint))
    show(report, lambda console: render_lineage.tree(console, report), as_json, quiet)


@hub.command(
    epilog="""\b
Examples:
  surgery hub fits lab/style lab/base
  surgery hub fits adapter base --json"""
)
@click.argument("adapter", metavar="ADAPTER")
@click.argument("base", metavar="BASE")
@_reading_from
@reporting
def fits(adapter: str, base: str, endpoint: str | None, as_json: bool, quiet: bool) -> None:
    """Say whether an adapter fits a base: by hash, by shape only, or not; and why.

    Both are folders or ids. Reads headers, and a few small tensors where no hashes are known.
    """
    from surgery.cli import render_lineage
    from surgery.cli.tables import show
    from surgery.hub.browsing import fits as check
    from surgery.hub.endpoint import endpoint_of

    report = check(adapter, base, endpoint_of(endpoint))
    show(report, lambda console: render_lineage.fit(console, report), as_json, quiet)


@hub.command(
    epilog="""\b
Examples:
  surgery hub reindex
  surgery hub reindex --data registry --all"""
)
@click.option("--data", type=click.Path(path_type=Path), metavar="DIR", help="The registry's folder.  [default: local]")
@click.option("--all", "everything", is_flag=True, help="Also what this version examined.")
@reporting
def reindex(data: Path | None, everything: bool, as_json: bool, quiet: bool) -> None:
    """Examine commits again that an earlier version examined, and hash weights that nobody has hashed.

    Of every branch and tag the newest. A server does this by itself.
    """
    from surgery.cli import render_lineage
    from surgery.cli.tables import show
    from surgery.hub.reindexing import reindex as run

    report = run(data, everything, make_progress(quiet))
    show(report, lambda console: render_lineage.reindexed(console, report), as_json, quiet)


@hub.command(
    epilog="""\b
Examples:
  surgery hub info lab/style
  surgery hub info lab/style@v2 --json"""
)
@click.argument("name", metavar="NAME[@REVISION]")
@_reading_from
@reporting
def info(name: str, endpoint: str | None, as_json: bool, quiet: bool) -> None:
    """Show a repository: what it is, its files, its history, what was made of it."""
    from surgery.cli import render_hub
    from surgery.cli.tables import show
    from surgery.hub.endpoint import endpoint_of
    from surgery.hub.listing import info as describe

    report = describe(name, endpoint_of(endpoint))
    show(report, lambda console: render_hub.described(console, report), as_json, quiet)


@hub.command(
    epilog="""\b
Examples:
  surgery hub delete lab/style
  surgery hub delete lab/style --yes"""
)
@click.argument("name", metavar="NAME")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@_writing_to
@reporting
def delete(name: str, yes: bool, endpoint: str | None, as_json: bool, quiet: bool) -> None:
    """Delete a repository with its whole history."""
    from surgery.cli import render_hub
    from surgery.cli.tables import show
    from surgery.errors import OptionError
    from surgery.hub.endpoint import for_writing
    from surgery.hub.listing import delete as remove

    place = for_writing(endpoint)
    if not yes:
        if not sys.stdin.isatty():
            raise OptionError(f"{name} would be deleted with its whole history; pass --yes where nobody can be asked.")
        click.confirm(f"Delete {name} from {place.label}, with its whole history?", abort=True, err=True)
    report = remove(name, place)
    show(report, lambda console: render_hub.deleted(console, report), as_json, quiet)


@hub.command(
    epilog="""\b
Examples:
  surgery hub login
  surgery hub login --endpoint https://hub.example.org"""
)
@click.option("--token", envvar="HF_TOKEN", help="The token; asked for, or read from stdin, by default.")
@click.option("--endpoint", metavar="URL|hf", help="A Hub's address, or `hf`.  [default: HF_ENDPOINT, else hf]")
@reporting
def login(token: str | None, endpoint: str | None, as_json: bool, quiet: bool) -> None:
    """Keep a token for a Hub, where other programs of Hugging Face find it too."""
    _choose(endpoint)
    from surgery.cli import render_hub
    from surgery.cli.tables import show
    from surgery.errors import OptionError
    from surgery.hub.account import login as log_in

    if token is None:
        token = click.prompt("Token", hide_input=True, err=True) if sys.stdin.isatty() else sys.stdin.readline()
    if not token.strip():
        raise OptionError("No token was given; pass it on stdin, or as HF_TOKEN.")
    report = log_in(token.strip())
    show(report, lambda console: render_hub.account(console, report), as_json, quiet)


@hub.command(
    epilog="""\b
Examples:
  surgery hub whoami
  surgery hub whoami --endpoint hf"""
)
@click.option("--endpoint", metavar="URL|hf", help="A Hub's address, or `hf`.  [default: HF_ENDPOINT, else hf]")
@reporting
def whoami(endpoint: str | None, as_json: bool, quiet: bool) -> None:
    """Say whom a Hub takes you for."""
    _choose(endpoint)
    from surgery.cli import render_hub
    from surgery.cli.tables import show
    from surgery.hub.account import whoami as ask

    report = ask()
    show(report, lambda console: render_hub.account(console, report), as_json, quiet)


def _choose(endpoint: str | None) -> None:
    """Make an endpoint the configured one, before huggingface_hub is imported and looks."""
    from surgery.errors import OptionError
    from surgery.hub.endpoint import endpoint_of

    chosen: Endpoint | None = endpoint_of(endpoint)
    if chosen is None:
        return
    if chosen.url is None:
        raise OptionError("The local registry has no users; --endpoint is 'hf' or an address here.")
    os.environ["HF_ENDPOINT"] = chosen.url
    if (constants := sys.modules.get("huggingface_hub.constants")) is not None:
        vars(constants)["ENDPOINT"] = chosen.url


for command in (gc, fsck, backup, restore):
    hub.add_command(command)
for command in (push, pull, serve, user, org, token):
    hub.add_command(command)
