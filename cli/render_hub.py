"""How the reports of registries look: tables and facts."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

from rich.console import Console

from surgery.cli.formats import more, number, size
from surgery.cli.tables import MOST_ROWS, facts, line, notes, table
from surgery.hub.account import AccountReport
from surgery.hub.browsing import ListReport
from surgery.hub.listing import DeleteReport, InfoReport
from surgery.hub.pull import PullReport
from surgery.hub.push import PushReport

_ABBREVIATED = 12


def where(endpoint: str) -> str:
    """An endpoint for people."""
    return "the local registry" if endpoint == "local" else endpoint


def pushed(console: Console, report: PushReport) -> None:
    """Draw what `push` did."""
    changed = [file for file in report.files if file.state != "same"]
    verb = "would push" if report.dry_run else "unchanged" if report.unchanged else "pushed"
    stored = "" if report.stored_bytes is None or report.dry_run else f", {size(report.stored_bytes)} of it new"
    at = f"{report.name}@{report.branch}"
    console.print(
        facts(
            [
                (verb, f"{at} to {where(report.endpoint)}" + (", a new repository" if report.created else "")),
                *([("commit", report.commit)] if report.commit else []),
                ("kind", _kind(report.facts)),
                *_facts(report.facts),
                ("size", f"{size(report.nbytes)} in {sum(f.state != 'removed' for f in report.files)} files{stored}"),
                ("card", report.card),
            ]
        )
    )
    if changed:
        line(console, "")
        rows = [(file.path, size(file.size), file.state) for file in changed[:MOST_ROWS]]
        console.print(table(("file", "bytes", ""), rows))
        if len(changed) > MOST_ROWS:
            line(console, more(len(changed) - MOST_ROWS, "--json"))
    notes(console, report.notes)


def pulled(console: Console, report: PullReport) -> None:
    """Draw what `pull` did."""
    pairs = [
        ("would pull" if report.dry_run else "pulled", f"{report.name} from {where(report.endpoint)}"),
        ("commit", report.commit),
        ("to", report.output),
        ("size", f"{size(report.nbytes)} in {len(report.files)} files"),
    ]
    if not report.dry_run:
        pairs.append(("proved", "every file, by its hash"))
    if report.resumed:
        pairs.append(("resumed", f"{report.resumed} files were there already"))
    if report.base is not None:
        pairs.append(
            ("base", f"{report.base.label}: all {report.base.equal} tensors that it changes are those on record")
        )
    console.print(facts(pairs))


def listed(console: Console, report: ListReport) -> None:
    """Draw what `hub list` found."""
    if not report.repositories:
        line(console, f"There is nothing in {where(report.endpoint)}.")
        notes(console, report.notes)
        return
    rows = [
        (
            item.name,
            item.kind or "-",
            item.base or "-",
            _span(item.ranks),
            size(item.size) if item.size is not None else "-",
            _date(item.updated),
        )
        for item in report.repositories
    ]
    console.print(table(("name", "kind", "base", "rank", "size", "updated"), rows, left=3))
    notes(console, report.notes)


def described(console: Console, report: InfoReport) -> None:
    """Draw what `hub info` found."""
    refs = [f"{name} ({commit[:_ABBREVIATED]})" for name, commit in {**report.branches, **report.tags}.items()]
    console.print(
        facts(
            [
                ("name", report.name + (" (private)" if report.private else "")),
                ("in", where(report.endpoint)),
                ("commit", report.commit),
                *([("kind", _kind(report.facts))] if report.facts else []),
                *_facts(report.facts),
                ("size", f"{size(report.nbytes)} in {len(report.files)} files"),
                ("branches, tags", ", ".join(refs)),
                *([("made of it", ", ".join(report.derived))] if report.derived else []),
            ]
        )
    )
    line(console, "")
    console.print(table(("file", "bytes"), [(file.path, size(file.size)) for file in report.files[:MOST_ROWS]]))
    line(console, "")
    rows = [(item.id[:_ABBREVIATED], _date(item.time), item.message.partition("\n")[0]) for item in report.commits]
    console.print(table(("commit", "time", "message"), rows, left=3))


def deleted(console: Console, report: DeleteReport) -> None:
    """Draw what `hub delete` did."""
    freed = "" if report.freed is None else f"; {size(report.freed)} freed"
    line(console, f"{report.name} is deleted from {where(report.endpoint)}{freed}.")


def account(console: Console, report: AccountReport) -> None:
    """Draw whom a Hub takes one for."""
    if report.name is None:
        line(console, f"You are not logged in to {report.endpoint}.")
        return
    member = f", in {', '.join(report.organisations)}" if report.organisations else ""
    line(console, f"You are {report.name} on {report.endpoint}{member}.")


def _kind(found: Mapping[str, object]) -> str:
    kind = {"moe": "mixture of experts", "dense": "dense checkpoint"}.get(
        str(found.get("kind")), str(found.get("kind"))
    )
    parameters = found.get("parameters")
    return f"{kind}, {number(parameters)} parameters" if isinstance(parameters, int) else kind


def _facts(found: Mapping[str, object]) -> list[tuple[str, str]]:
    pairs = []
    if isinstance(base := found.get("base"), str):
        pairs.append(("base", base))
    if isinstance(ranks := found.get("ranks"), list) and ranks:
        pairs.append(("rank", _span(ranks)))
    if isinstance(targets := found.get("targets"), list) and targets:
        pairs.append(("targets", ", ".join(str(target) for target in targets[:8]) + (", ..." if targets[8:] else "")))
    inputs = found.get("inputs")
    if isinstance(inputs, list) and inputs:
        sources = [f"{item.get('role')} {item.get('source')}" for item in inputs if isinstance(item, dict)]
        pairs.append(("made by", f"{found.get('operation')} from {', '.join(sources)}"))
    return pairs


def _span(ranks: tuple[int, ...] | list[int]) -> str:
    return "-" if not ranks else str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}..{ranks[-1]}"


def _date(seconds: int | None) -> str:
    return "-" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
