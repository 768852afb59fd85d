"""How the reports of gc, fsck, backup and restore look."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.cli.formats import size
from surgery.cli.tables import MOST_ROWS, facts, line, table
from surgery.hub.backup import CopyReport
from surgery.hub.checking import Damage, FsckReport
from surgery.hub.collecting import GcReport

if TYPE_CHECKING:
    from rich.console import Console

_ONE = {
    "repositories": "repository",
    "commits": "commit",
    "blobs": "blob",
    "recipes": "recipe",
    "xorbs": "xorb",
}


def collected(console: Console, report: GcReport) -> None:
    """Draw what `hub gc` did."""
    rows = [
        (part.kind, str(part.removed), size(part.removed_bytes), str(part.kept), size(part.kept_bytes))
        for part in report.parts
    ]
    removed = "would be removed" if report.dry_run else "removed"
    console.print(table(("what", removed, "bytes", "kept by grace", "bytes"), rows))
    if report.forgotten:
        line(console, "Clients forget which chunks are stored.")


def checked(console: Console, report: FsckReport) -> None:
    """Draw what `hub fsck` found."""
    counts = ", ".join(
        f"{count} {_ONE.get(what, what) if count == 1 else what}" for what, count in report.counts.items()
    )
    pairs = [("checked", counts), ("read", "names and sizes only" if report.quick else size(report.read_bytes))]
    if report.unused:
        pairs.append(("in no commit", f"{report.unused} files, {size(report.unused_bytes)}"))
    console.print(facts(pairs))
    if not report.damages:
        line(console, "All is well.")
    for damage in report.damages:
        _damage(console, damage)


def _damage(console: Console, damage: Damage) -> None:
    mended = "; removed, for it is stored whole as well" if damage.repaired else ""
    mended = mended or ("; --repair mends it" if damage.mendable else "")
    line(console, f"Damaged {damage.what} {damage.name}: {damage.reason.rstrip('.')}{mended}.")
    for file in damage.files[:MOST_ROWS]:
        kind = "" if file.kind == "model" else f"{file.kind} "
        line(console, f"  {kind}{file.repository}@{file.revision}: {file.path}")
    if len(damage.files) > MOST_ROWS:
        line(console, f"  and {len(damage.files) - MOST_ROWS} more; --json has all")


def copied(console: Console, report: CopyReport) -> None:
    """Draw what `hub backup` or `hub restore` did."""
    console.print(
        facts(
            [
                ("from", report.source),
                ("to", report.destination),
                ("copied", f"{report.copied} files, {size(report.copied_bytes)}"),
                ("there already", f"{report.present} files"),
                ("commits", str(report.commits)),
            ]
        )
    )
