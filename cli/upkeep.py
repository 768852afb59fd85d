"""Commands that keep a registry's folder in order: gc, fsck, backup, restore."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from surgery.cli.options import reporting
from surgery.cli.progress import make_progress

_FOLDER = click.Path(path_type=Path)
_data = click.option("--data", required=True, type=_FOLDER, metavar="DIR", help="The registry's folder.")


@click.command(
    epilog="""\b
Examples:
  surgery hub gc --data registry --dry-run
  surgery hub gc --data registry
  surgery hub gc --data registry --grace 0"""
)
@_data
@click.option(
    "--grace", default=28.0, show_default=True, metavar="DAYS", help="What was wanted within so many days stays."
)
@click.option("--dry-run", is_flag=True, help="Say what would be removed, remove nothing.")
@reporting
def gc(data: Path, grace: float, dry_run: bool, as_json: bool, quiet: bool) -> None:
    """Remove what no commit refers to any more.

    Pushes and a server may go on meanwhile. Clients remember for four weeks which chunks are stored; with a shorter
    grace they are made to forget, and send more of what they push next.
    """
    from surgery.cli import render_upkeep
    from surgery.cli.tables import show
    from surgery.hub.collecting import GcOptions
    from surgery.hub.collecting import gc as collect

    report = collect(GcOptions(data=data, grace=grace, dry_run=dry_run))
    show(report, lambda console: render_upkeep.collected(console, report), as_json, quiet)


@click.command(
    epilog="""\b
Examples:
  surgery hub fsck --data registry
  surgery hub fsck --data registry --quick
  surgery hub fsck --data backup --json"""
)
@_data
@click.option("--quick", is_flag=True, help="Look at names and sizes only; do not read everything.")
@click.option("--repair", is_flag=True, help="Remove what is damaged where the same content is stored whole as well.")
@reporting
def fsck(data: Path, quick: bool, repair: bool, as_json: bool, quiet: bool) -> None:
    """Read everything and name the files that are hit by damage.

    Exits with 1 if anything is damaged or missing and was not repaired.
    """
    from surgery.cli import render_upkeep
    from surgery.cli.tables import show
    from surgery.hub.checking import FsckOptions
    from surgery.hub.checking import fsck as check

    report = check(FsckOptions(data=data, quick=quick, repair=repair, progress=make_progress(quiet)))
    show(report, lambda console: render_upkeep.checked(console, report), as_json, quiet)
    if not report.passed:
        sys.exit(1)


@click.command(
    epilog="""\b
Examples:
  surgery hub backup --data registry /mnt/backup
  surgery hub backup --data registry snapshot --link"""
)
@click.argument("destination", metavar="DEST", type=_FOLDER)
@_data
@click.option("--link", is_flag=True, help="Make hard links, which take no space and protect from no damage.")
@reporting
def backup(destination: Path, data: Path, link: bool, as_json: bool, quiet: bool) -> None:
    """Copy a registry, or bring its backup at DEST up to date.

    A server may go on meanwhile. DEST is a registry itself, whole at any time: it can be checked and served.
    """
    from surgery.cli import render_upkeep
    from surgery.cli.tables import show
    from surgery.hub.backup import BackupOptions
    from surgery.hub.backup import backup as copy

    progress = make_progress(quiet)
    report = copy(BackupOptions(data=data, destination=destination, link=link, progress=progress))
    show(report, lambda console: render_upkeep.copied(console, report), as_json, quiet)


@click.command(
    epilog="""\b
Examples:
  surgery hub restore /mnt/backup --data registry
  surgery hub restore snapshot --data registry --link"""
)
@click.argument("source", metavar="SRC", type=_FOLDER)
@_data
@click.option("--link", is_flag=True, help="Make hard links, which take no space and protect from no damage.")
@reporting
def restore(source: Path, data: Path, link: bool, as_json: bool, quiet: bool) -> None:
    """Make a registry from a backup.

    The folder must not exist, or be empty. All of it is checked before it is there.
    """
    from surgery.cli import render_upkeep
    from surgery.cli.tables import show
    from surgery.hub.backup import RestoreOptions
    from surgery.hub.backup import restore as copy

    report = copy(RestoreOptions(source=source, data=data, link=link, progress=make_progress(quiet)))
    show(report, lambda console: render_upkeep.copied(console, report), as_json, quiet)
