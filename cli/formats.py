"""Numbers as people read them."""

from __future__ import annotations

import math

from surgery.figures import number as number
from surgery.figures import plural as plural
from surgery.figures import size as size


def percent(share: float | None) -> str:
    """A share with three significant digits, with three decimals near the whole; a dash where there is none.

    Only what is exactly the whole is 100%.

    >>> percent(0.0290829), percent(0.05), percent(0.99915), percent(0.9999999), percent(1.0), percent(None)
    ('2.91%', '5.00%', '99.915%', '>99.999%', '100%', '-')
    """
    if share is None or not math.isfinite(share):
        return "-"
    if share in (0, 1):
        return f"{share:.0%}"
    if 0.99 < share < 1.01:
        text = f"{share:.3%}"
        return text if text != "100.000%" else ">99.999%" if share < 1 else ">100%"
    points = 100 * share
    if abs(points) < 1e-3:
        return f"{points:.2e}%"
    return f"{points:.{max(0, 2 - math.floor(math.log10(abs(points))))}f}%"


def some(names: list[str] | tuple[str, ...], most: int = 5) -> str:
    """The first few of a list.

    >>> some(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def more(count: int, remedy: str) -> str:
    """The line below a list that was cut: how many are missing, and which option lists them.

    >>> more(11, "--all")
    'and 11 more; --all lists every one.'
    """
    return f"and {count} more; {remedy} lists every one."
