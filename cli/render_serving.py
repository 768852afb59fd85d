"""How the reports on a server's users and tokens look."""

from __future__ import annotations

from datetime import UTC, datetime

from rich.console import Console

from surgery.cli.tables import line, table
from surgery.hub.server.administration import NamespaceReport, NamespacesReport, TokenReport, TokensReport


def namespace(console: Console, report: NamespaceReport) -> None:
    """`hub user add`, `hub org add`."""
    members = f" with {', '.join(report.members)}" if report.members else ""
    console.print(f"Made the {report.kind} {report.name}{members}.", highlight=False)


def token(console: Console, report: TokenReport) -> None:
    """`hub token create`."""
    where = f" for {report.repository}" if report.repository else ""
    console.print(f"Made a token of {report.user} to {report.role}{where}.", highlight=False)
    if report.token is not None:
        console.print(f"Shown this once: {report.token}", highlight=False, soft_wrap=True)


def namespaces(console: Console, report: NamespacesReport) -> None:
    """`hub user list`."""
    rows = [(found.name, found.kind, ", ".join(found.members) or "-") for found in report.namespaces]
    console.print(table(["name", "kind", "members"], rows, 3))


def members(console: Console, report: NamespaceReport) -> None:
    """`hub org member`."""
    line(console, f"{report.name} has {', '.join(report.members) if report.members else 'no members'}.")


def tokens(console: Console, report: TokensReport) -> None:
    """`hub token list`."""
    rows = [
        (item.id, item.user, item.role, item.repository or "all", item.label, _day(item.created), _day(item.expires))
        for item in report.tokens
    ]
    console.print(table(["id", "user", "role", "for", "label", "made", "expires"], rows, 7))


def revoked(console: Console, report: TokensReport) -> None:
    """`hub token revoke`."""
    for item in report.tokens:
        line(console, f"Revoked the token {item.id} of {item.user}.")


def _day(seconds: int | None) -> str:
    return "never" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")
